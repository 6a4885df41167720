//! Devices, opened ones, and protection domains.

use std::ffi::{CStr, c_int};
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use super::loaded;
use crate::verbs::error::{Unavailable, VerbsError};
use crate::verbs::raw::{self, Library, library};

/// An open device.
pub(in crate::verbs) struct Context {
    raw: NonNull<raw::Context>,
}

// SAFETY: the library allows any thread to use a context, also at the same time (ibv_open_device(3)).
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// What queue pairs and memory have in common so that the one may use the other.
pub(in crate::verbs) struct Domain {
    raw: NonNull<raw::Pd>,
    context: Arc<Context>,
}

// SAFETY: the library allows any thread to use a domain, also at the same time.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

/// The list that the library hands out, given back when dropped.
struct DeviceList {
    first: NonNull<*mut raw::Device>,
    len: usize,
    library: &'static Library,
}

impl DeviceList {
    fn new() -> Result<Self, Unavailable> {
        let library = library().map_err(|detail| Unavailable::NoLibrary { detail: detail.to_owned() })?;
        let mut len: c_int = 0;
        // SAFETY: the argument is a valid place for a number.
        let first = unsafe { (library.ibv_get_device_list)(&raw mut len) };
        let Some(first) = NonNull::new(first) else {
            // ENOSYS: /sys/class/infiniband_verbs is missing.
            let error = io::Error::last_os_error();
            tracing::debug!(%error, "no list of RDMA devices");
            return Err(Unavailable::NoKernelSupport);
        };
        let list = Self { first, len: usize::try_from(len).unwrap_or(0), library };
        if list.len == 0 { Err(Unavailable::NoDevice) } else { Ok(list) }
    }

    fn devices(&self) -> impl Iterator<Item = (*mut raw::Device, String)> {
        (0..self.len).map(|index| {
            // SAFETY: `index` is below the length that the library gave with the list.
            let entry = unsafe { self.first.as_ptr().add(index) };
            // SAFETY: as above; the list lives as long as `self`.
            let device = unsafe { *entry };
            // SAFETY: the device is an element of a living list.
            let name = unsafe { (self.library.ibv_get_device_name)(device) };
            // SAFETY: the name is a string inside the device, ended by zero; it is copied here.
            let name = unsafe { CStr::from_ptr(name) };
            (device, name.to_string_lossy().into_owned())
        })
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: the list came from `ibv_get_device_list` and is given back once; opened devices outlive it.
        unsafe { (self.library.ibv_free_device_list)(self.first.as_ptr()) };
    }
}

/// Names of all devices; at least one.
pub(in crate::verbs) fn device_names() -> Result<Vec<String>, Unavailable> {
    Ok(DeviceList::new()?.devices().map(|(_, name)| name).collect())
}

impl Context {
    /// Opens the device of that name.
    pub(in crate::verbs) fn open(name: &str) -> Result<Arc<Self>, VerbsError> {
        let list = DeviceList::new()?;
        let found = list.devices().find(|(_, other)| other == name);
        let Some((device, _)) = found else {
            return Err(Unavailable::NoneFits { reason: format!("there is no device {name}") }.into());
        };
        // SAFETY: the device is an element of the list, which lives until the end of this function.
        let raw = unsafe { (list.library.ibv_open_device)(device) };
        let raw = NonNull::new(raw).ok_or_else(|| VerbsError::last("open the device"))?;
        let context = Self { raw };
        rustix::io::ioctl_fionbio(context.event_fd(), true)
            .map_err(|errno| VerbsError::Call { operation: "prepare a device", source: errno.into() })?;
        Ok(Arc::new(context))
    }

    pub(super) fn as_ptr(&self) -> *mut raw::Context {
        self.raw.as_ptr()
    }

    /// Limits of the device.
    pub(in crate::verbs) fn attributes(&self) -> Result<raw::DeviceAttr, VerbsError> {
        let mut attributes = raw::DeviceAttr::default();
        // SAFETY: the context is open, and the structure at least as long as what the library writes.
        let code = unsafe { (loaded().ibv_query_device)(self.as_ptr(), &raw mut attributes) };
        VerbsError::code("query the device", code)?;
        Ok(attributes)
    }

    /// State of a port; they count from one.
    pub(in crate::verbs) fn port(&self, port: u8) -> Result<raw::PortAttr, VerbsError> {
        let mut attributes = raw::PortAttr::default();
        // SAFETY: the context is open, and the structure at least as long as what the library writes.
        let code = unsafe { (loaded().ibv_query_port)(self.as_ptr(), port, &raw mut attributes) };
        VerbsError::code("query the port", code)?;
        Ok(attributes)
    }

    /// An entry of a port's table of addresses.
    pub(in crate::verbs) fn gid(&self, port: u8, index: i32) -> Result<[u8; 16], VerbsError> {
        let mut gid = raw::Gid::default();
        // SAFETY: the context is open, and the argument a valid place for one address.
        let code = unsafe { (loaded().ibv_query_gid)(self.as_ptr(), port, index, &raw mut gid) };
        VerbsError::code("query an address of the port", code)?;
        Ok(gid.0)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is open, and everything made from it holds an `Arc` of it and is gone.
        let code = unsafe { (loaded().ibv_close_device)(self.as_ptr()) };
        debug_assert_eq!(code, 0, "a context that nothing uses closes");
    }
}

impl Domain {
    pub(in crate::verbs) fn new(context: &Arc<Context>) -> Result<Arc<Self>, VerbsError> {
        // SAFETY: the context is open and kept by the result.
        let raw = unsafe { (loaded().ibv_alloc_pd)(context.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(|| VerbsError::last("make a protection domain"))?;
        Ok(Arc::new(Self { raw, context: Arc::clone(context) }))
    }

    pub(super) fn as_ptr(&self) -> *mut raw::Pd {
        self.raw.as_ptr()
    }

    pub(in crate::verbs) fn context(&self) -> &Arc<Context> {
        &self.context
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: queue pairs and registrations hold an `Arc` of their domain, so none is left.
        let code = unsafe { (loaded().ibv_dealloc_pd)(self.as_ptr()) };
        debug_assert_eq!(code, 0, "a domain that nothing uses goes");
    }
}
