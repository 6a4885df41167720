//! NCCL, found at run time: what several GPUs sum up and exchange by.
//!
//! Declarations are those of `nccl.h`, whose ABI has been the same since version 2.

use super::{Gpu, raw::Stream};
use crate::{
    cuda::{Collective, CudaError, DeviceAddress, GroupId},
    matrix::WeightDtype,
};
use cudarc::driver::sys::CUstream;
use std::{
    ffi::{CStr, c_char, c_int, c_void},
    ptr,
    sync::OnceLock,
};

/// `ncclUniqueId`, which is passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([c_char; GroupId::BYTES]);

/// `ncclComm_t`.
type Handle = *mut c_void;

macro_rules! functions {
    ($($name:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions that are called here.
        struct Library {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Library {
            fn load(file: &str) -> Result<Self, libloading::Error> {
                // SAFETY: loading runs the library's initialisers, of NVIDIA's library by the name that carries the version of its
                // ABI, or of whoever has set the loader's path.
                let library = unsafe { libloading::Library::new(file) }?;
                $(
                    // SAFETY: the type is the function's declaration in the header of this version of the ABI.
                    let $name = *unsafe { library.get(concat!($symbol, "\0").as_bytes()) }?;
                )*
                // The functions must stay valid, so it is never unloaded.
                let _ = Box::leak(Box::new(library));
                Ok(Self { $($name,)* })
            }
        }
    };
}

functions! {
    version = "ncclGetVersion": fn(*mut c_int) -> c_int;
    error_text = "ncclGetErrorString": fn(c_int) -> *const c_char;
    unique_id = "ncclGetUniqueId": fn(*mut UniqueId) -> c_int;
    init_rank = "ncclCommInitRank": fn(*mut Handle, c_int, UniqueId, c_int) -> c_int;
    abort = "ncclCommAbort": fn(Handle) -> c_int;
    destroy = "ncclCommDestroy": fn(Handle) -> c_int;
    all_reduce = "ncclAllReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, CUstream) -> c_int;
    all_gather = "ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, Handle, CUstream) -> c_int;
    broadcast = "ncclBroadcast": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, CUstream) -> c_int;
}

/// The library, or why there is none. It is looked for once.
fn library() -> Result<&'static Library, CudaError> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        Library::load(NAME).map_err(|_| {
            format!(
                "{NAME} was not found: `pip install nvidia-nccl-cu13`, and name its folder in LD_LIBRARY_PATH"
            )
        })
    });
    library.as_ref().map_err(|reason| CudaError::NoExchange { reason: reason.clone() })
}

impl Library {
    fn check(&self, call: &'static str, code: c_int) -> Result<(), CudaError> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: has no condition; a number that it does not know has a text too.
        let text = unsafe { (self.error_text)(code) };
        // SAFETY: texts are constants of the library.
        let name = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
        Err(CudaError::Call { call, code, name })
    }
}

impl Gpu {
    /// What GPUs exchange numbers by, with its version, or why nothing does. Takes no GPU.
    ///
    /// # Errors
    ///
    /// The reason.
    pub fn exchange_library() -> Result<String, String> {
        let find = || {
            let library = library()?;
            let mut version = 0;
            // SAFETY: writes a number.
            library.check("ncclGetVersion", unsafe { (library.version)(&raw mut version) })?;
            Ok(format!("NCCL {}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
        };
        find().map_err(|error: CudaError| error.to_string())
    }

    /// The id of a new group. Takes no GPU.
    pub(super) fn unique_id() -> Result<GroupId, CudaError> {
        let library = library()?;
        let mut id = UniqueId([0; GroupId::BYTES]);
        // SAFETY: writes an id.
        library.check("ncclGetUniqueId", unsafe { (library.unique_id)(&raw mut id) })?;
        Ok(GroupId(id.0.map(|byte| byte as u8)))
    }
}

/// A place in a group.
///
/// # Invariant
///
/// `handle` came from `ncclCommInitRank` and is destroyed or aborted by `drop` alone.
#[derive(Debug)]
pub(super) struct Communicator {
    handle: Handle,
    /// Whether others of the group may never come.
    is_abandoned: bool,
}

impl Communicator {
    /// Waits for the others. In the context that the caller's thread has entered.
    pub(super) fn join(group: &GroupId, rank: u32, ranks: u32) -> Result<Self, CudaError> {
        let library = library()?;
        let (id, mut handle) = (UniqueId(group.0.map(|byte| byte as c_char)), ptr::null_mut());
        // SAFETY: the id is one of `ncclGetUniqueId`; writes a handle.
        let code = unsafe { (library.init_rank)(&raw mut handle, ranks as c_int, id, rank as c_int) };
        library.check("ncclCommInitRank", code)?;
        Ok(Self { handle, is_abandoned: false })
    }

    /// Asks a stream for it.
    pub(super) fn collect(&self, collective: Collective, stream: CUstream) -> Result<(), CudaError> {
        let (library, handle) = (library()?, self.handle);
        let place = |address: u64| ptr::without_provenance_mut::<c_void>(address as usize);
        match collective {
            Collective::Sum { address, elements, dtype } => {
                let (buffer, dtype) = (place(address.0), number_of(dtype));
                // SAFETY: memory of the device alone, and a stream and handle that are there until they are dropped.
                let code =
                    unsafe { (library.all_reduce)(buffer, buffer, elements, dtype, SUM, handle, stream) };
                library.check("ncclAllReduce", code)
            }
            Collective::Gather { to, from, bytes } => {
                // SAFETY: as above.
                let code =
                    unsafe { (library.all_gather)(place(from.0), place(to.0), bytes, BYTE, handle, stream) };
                library.check("ncclAllGather", code)
            }
            Collective::Spread { address, bytes } => {
                let buffer = place(address.0);
                // SAFETY: as above.
                let code = unsafe { (library.broadcast)(buffer, buffer, bytes, BYTE, 0, handle, stream) };
                library.check("ncclBroadcast", code)
            }
        }
    }

    /// Ends what it waits for.
    pub(super) fn abort(mut self) {
        self.is_abandoned = true;
    }

    /// Does each kind once with the others, so that connections are there before anything is recorded. `room` is memory of the
    /// device, of [`warm_up_bytes`](Self::warm_up_bytes).
    pub(super) fn warm_up(&self, room: DeviceAddress, stream: &Stream) -> Result<(), CudaError> {
        let (first, rest) = (room, room.offset(ALIGNED));
        self.collect(Collective::Spread { address: first, bytes: 1 }, stream.0)?;
        self.collect(Collective::Gather { to: rest, from: first, bytes: 1 }, stream.0)?;
        self.collect(Collective::Sum { address: first, elements: 1, dtype: WeightDtype::F32 }, stream.0)?;
        stream.synchronize()
    }

    /// Bytes that [`warm_up`](Self::warm_up) takes.
    pub(super) const fn warm_up_bytes(ranks: u32) -> usize {
        ALIGNED + ranks as usize
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let Ok(library) = library() else { return };
        let (call, end) = if self.is_abandoned {
            ("ncclCommAbort", library.abort)
        } else {
            ("ncclCommDestroy", library.destroy)
        };
        // SAFETY: made by `join`, once, and not used any more.
        drop(library.check(call, unsafe { end(self.handle) }));
    }
}

const fn number_of(dtype: WeightDtype) -> c_int {
    match dtype {
        WeightDtype::F16 => 6,
        WeightDtype::F32 => 7,
        WeightDtype::Bf16 => 9,
    }
}

/// With the version of its ABI; without it the name is there on machines for development alone.
const NAME: &str = "libnccl.so.2";
/// `ncclSuccess`.
const SUCCESS: c_int = 0;
/// `ncclInt8`.
const BYTE: c_int = 0;
/// `ncclSum`.
const SUM: c_int = 0;
/// Where a second buffer may begin.
const ALIGNED: usize = 256;
