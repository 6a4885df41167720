//! `libibverbs.so.1`, found when it is first asked for.
//!
//! Nothing is linked, so the same binary starts where the library is missing. It stays loaded for the life of the
//! process: the functions below are plain pointers into it.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use super::{
    AsyncEvent, CompChannel, Context, Cq, Device, DeviceAttr, Gid, Mr, Pd, PortAttr, Qp, QpAttr, QpInitAttr,
};

macro_rules! functions {
    ($($(#[$note:meta])* $name:ident: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The functions that this crate calls. Names, arguments and results are those of the header.
        pub(in crate::verbs) struct Library {
            $($(#[$note])* pub(in crate::verbs) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            /// From rdma-core 31 on.
            pub(in crate::verbs) ibv_reg_dmabuf_mr: Option<RegDmabufMr>,
        }

        impl Library {
            fn load(name: &str) -> Result<Self, libloading::Error> {
                // SAFETY: loading runs the initialisers of libibverbs, which only register providers; the name
                // carries the version of the ABI that the declarations here are of.
                let library = unsafe { libloading::Library::new(name) }?;
                $(
                    // SAFETY: the type is the function's declaration in the header, whose ABI version 1 never
                    // changes; what is passed is checked by `raw/layout.rs`.
                    let $name = *unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) }?;
                )*
                // SAFETY: as above.
                let ibv_reg_dmabuf_mr = unsafe { library.get::<RegDmabufMr>(b"ibv_reg_dmabuf_mr\0") };
                let ibv_reg_dmabuf_mr = ibv_reg_dmabuf_mr.ok().map(|symbol| *symbol);
                // The pointers must stay valid, so the library is never unloaded.
                let _ = Box::leak(Box::new(library));
                Ok(Self { $($name,)* ibv_reg_dmabuf_mr })
            }
        }
    };
}

functions! {
    ibv_get_device_list: fn(*mut c_int) -> *mut *mut Device;
    ibv_free_device_list: fn(*mut *mut Device);
    ibv_get_device_name: fn(*mut Device) -> *const c_char;
    ibv_open_device: fn(*mut Device) -> *mut Context;
    ibv_close_device: fn(*mut Context) -> c_int;
    ibv_query_device: fn(*mut Context, *mut DeviceAttr) -> c_int;
    ibv_query_port: fn(*mut Context, u8, *mut PortAttr) -> c_int;
    ibv_query_gid: fn(*mut Context, u8, c_int, *mut Gid) -> c_int;
    ibv_alloc_pd: fn(*mut Context) -> *mut Pd;
    ibv_dealloc_pd: fn(*mut Pd) -> c_int;
    ibv_reg_mr: fn(*mut Pd, *mut c_void, usize, c_int) -> *mut Mr;
    ibv_dereg_mr: fn(*mut Mr) -> c_int;
    ibv_create_comp_channel: fn(*mut Context) -> *mut CompChannel;
    ibv_destroy_comp_channel: fn(*mut CompChannel) -> c_int;
    ibv_create_cq: fn(*mut Context, c_int, *mut c_void, *mut CompChannel, c_int) -> *mut Cq;
    ibv_destroy_cq: fn(*mut Cq) -> c_int;
    ibv_get_cq_event: fn(*mut CompChannel, *mut *mut Cq, *mut *mut c_void) -> c_int;
    ibv_ack_cq_events: fn(*mut Cq, c_uint);
    ibv_create_qp: fn(*mut Pd, *mut QpInitAttr) -> *mut Qp;
    ibv_modify_qp: fn(*mut Qp, *mut QpAttr, c_int) -> c_int;
    ibv_destroy_qp: fn(*mut Qp) -> c_int;
    ibv_wc_status_str: fn(c_uint) -> *const c_char;
    ibv_get_async_event: fn(*mut Context, *mut AsyncEvent) -> c_int;
    ibv_ack_async_event: fn(*mut AsyncEvent);
}

/// Arguments: domain, offset in the buffer, length, address by which it is named, descriptor, access.
pub(in crate::verbs) type RegDmabufMr =
    unsafe extern "C" fn(*mut Pd, u64, usize, u64, c_int, c_int) -> *mut Mr;

/// The library, or why there is none.
pub(in crate::verbs) fn library() -> Result<&'static Library, &'static str> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| Library::load(NAME).map_err(|error| error.to_string()));
    library.as_ref().map_err(String::as_str)
}

/// The name with the ABI version, which is what every distribution installs at run time.
const NAME: &str = "libibverbs.so.1";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_names_it() {
        let error = Library::load("libibverbs.so.missing").err().expect("no such library");
        assert!(error.to_string().contains("libibverbs.so.missing"), "{error}");
    }
}
