//! NVIDIA's driver as a library: what it gives out is owned here, and what it says becomes a [`CudaError`].
//!
//! cudarc finds the library and its functions when they are first called, and panics without them; so nothing here is made before
//! [`library`] has found the library, of a version that has all these functions.

use crate::cuda::{ComputeCapability, CudaError, CudaVersion, DeviceIdentity, Properties};
use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute as Attribute, CUevent, CUgraph, CUgraphExec, CUgraphNode,
    CUresult, CUstream,
};
use std::{
    ffi::{CStr, c_char},
    ptr,
};

/// The library is there and initialised; how many GPUs it sees.
pub(super) fn library() -> Result<u32, CudaError> {
    // SAFETY: loads a library of NVIDIA's by its name, or of whoever has set the loader's path.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver { reason: "libcuda.so.1 was not found".to_owned() });
    }
    // SAFETY: the library is there; has no other condition.
    let started = unsafe { sys::cuInit(0) };
    match started {
        CUresult::CUDA_SUCCESS => {}
        CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
        // A library that only satisfies the linker, or one that does not go with the kernel's part of the driver.
        failed => return Err(CudaError::NoDriver { reason: format!("cuInit says {failed:?}") }),
    }
    let mut version = 0;
    // SAFETY: writes a number.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    let version = unsigned(version);
    let found = CudaVersion { major: version / 1000, minor: version % 1000 / 10 };
    if found < OLDEST_DRIVER {
        return Err(CudaError::DriverTooOld { found, needed: OLDEST_DRIVER });
    }
    let mut count = 0;
    // SAFETY: writes a number.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    Ok(unsigned(count))
}

/// One of the GPUs that the library sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Device(pub(super) CUdevice);

impl Device {
    pub(super) fn new(index: u32) -> Result<Self, CudaError> {
        let count = library()?;
        if count <= index {
            return Err(CudaError::NoDevice { index, count });
        }
        let mut device = 0;
        // SAFETY: writes a number.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, index as i32) })?;
        Ok(Self(device))
    }

    pub(super) fn properties(self) -> Result<Properties, CudaError> {
        let mut name = [0u8; 256];
        let (room, bytes) = (name.as_mut_ptr().cast::<c_char>(), name.len() as i32);
        // SAFETY: writes at most so many bytes, the last of them zero.
        check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(room, bytes, self.0) })?;
        let name = CStr::from_bytes_until_nul(&name).map(|it| it.to_string_lossy().into_owned());
        let capability = ComputeCapability {
            major: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        };
        let kilohertz = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
        let bits = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
        Ok(Properties {
            name: name.unwrap_or_else(|_| "a GPU".to_owned()),
            compute_capability: capability,
            multiprocessors: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            // Twice in a cycle.
            memory_bandwidth: 2 * u64::from(kilohertz) * 1000 * u64::from(bits) / 8,
            shared_bytes: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            identity: self.identity()?,
        })
    }

    fn identity(self) -> Result<DeviceIdentity, CudaError> {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: writes so many bytes.
        check("cuDeviceGetUuid_v2", unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, self.0) })?;
        Ok(DeviceIdentity(uuid.bytes.map(|byte| byte as u8)))
    }

    /// The GPU of that identity, if this process sees it.
    pub(super) fn by_identity(identity: DeviceIdentity) -> Result<Option<Self>, CudaError> {
        for index in 0..library()? {
            let device = Self::new(index)?;
            if device.identity()? == identity {
                return Ok(Some(device));
            }
        }
        Ok(None)
    }

    /// Whether it can copy to another's memory.
    pub(super) fn reaches(self, other: Self) -> Result<bool, CudaError> {
        let mut can = 0;
        // SAFETY: writes a number.
        let result = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, self.0, other.0) };
        check("cuDeviceCanAccessPeer", result).map(|()| can != 0)
    }

    pub(super) fn attribute(self, attribute: Attribute) -> Result<u32, CudaError> {
        let mut value = 0;
        // SAFETY: writes a number.
        let result = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, self.0) };
        check("cuDeviceGetAttribute", result).map(|()| unsigned(value))
    }
}

/// What a process has of a GPU, shared with whoever else in the process uses it.
#[derive(Debug)]
pub(super) struct Context {
    context: CUcontext,
    device: Device,
}

impl Context {
    pub(super) fn new(device: Device) -> Result<Self, CudaError> {
        let mut context = ptr::null_mut();
        // SAFETY: writes a handle.
        let result = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device.0) };
        check("cuDevicePrimaryCtxRetain", result)?;
        let context = Self { context, device };
        context.enter()?;
        Ok(context)
    }

    /// The calls of this thread are for this GPU from now on.
    pub(super) fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: retained until `drop`.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained by `new`, once.
        let result = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device.0) };
        drop(check("cuDevicePrimaryCtxRelease_v2", result));
    }
}

/// A queue of the driver.
#[derive(Debug)]
pub(super) struct Stream(pub(super) CUstream);

impl Stream {
    pub(super) fn new() -> Result<Self, CudaError> {
        let mut stream = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes a handle.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut stream, flags) }).map(|()| Self(stream))
    }

    pub(super) fn wait_for(&self, event: &Event) -> Result<(), CudaError> {
        // SAFETY: both are there until they are dropped.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.0, event.0, 0) })
    }

    pub(super) fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: there until `drop`.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.0) })
    }

    pub(super) fn begin_capture(&self) -> Result<(), CudaError> {
        // What other threads do is none of this capture's business.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: there until `drop`.
        check("cuStreamBeginCapture_v2", unsafe { sys::cuStreamBeginCapture_v2(self.0, mode) })
    }

    /// What was recorded last.
    pub(super) fn last_node(&self) -> Result<CUgraphNode, CudaError> {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let (mut nodes, mut count) = (ptr::null(), 0);
        // SAFETY: writes a state, a place and a number, and nothing where there is no room given.
        let result = unsafe {
            sys::cuStreamGetCaptureInfo_v3(
                self.0,
                &raw mut status,
                ptr::null_mut(),
                ptr::null_mut(),
                &raw mut nodes,
                ptr::null_mut(),
                &raw mut count,
            )
        };
        check("cuStreamGetCaptureInfo_v3", result)?;
        // One stream, each of whose operations comes after the one before.
        assert_eq!(count, 1, "a captured stream goes on from one node");
        // SAFETY: so many nodes are there until the next call for this stream.
        Ok(unsafe { nodes.read() })
    }

    pub(super) fn end_capture(&self) -> Result<RecordedGraph, CudaError> {
        let mut graph = ptr::null_mut();
        // SAFETY: writes a handle.
        check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(self.0, &raw mut graph) })?;
        Ok(RecordedGraph { graph, executable: ptr::null_mut() })
    }

    /// Makes a graph ready to be replayed, for which the device takes memory.
    pub(super) fn prepare(&self, recorded: &mut RecordedGraph) -> Result<(), CudaError> {
        assert!(recorded.executable.is_null(), "a graph is made ready once");
        // SAFETY: the graph ended a capture and is there until it is dropped; writes a handle.
        let result =
            unsafe { sys::cuGraphInstantiateWithFlags(&raw mut recorded.executable, recorded.graph, 0) };
        check("cuGraphInstantiateWithFlags", result)?;
        // SAFETY: just made; the stream is there until `drop`.
        check("cuGraphUpload", unsafe { sys::cuGraphUpload(recorded.executable, self.0) })?;
        self.synchronize()
    }

    pub(super) fn replay(&self, graph: &RecordedGraph) -> Result<(), CudaError> {
        // SAFETY: both are there until they are dropped.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph.executable, self.0) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made by `new`, used by nobody after this.
        drop(check("cuStreamDestroy_v2", unsafe { sys::cuStreamDestroy_v2(self.0) }));
    }
}

/// A place in a stream.
#[derive(Debug)]
pub(super) struct Event(pub(super) CUevent);

impl Event {
    pub(super) fn new() -> Result<Self, CudaError> {
        let mut event = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: writes a handle.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) }).map(|()| Self(event))
    }

    /// Moves it to the end of a stream.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both are there until they are dropped.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.0, stream.0) })
    }

    pub(super) fn is_done(&self) -> Result<bool, CudaError> {
        // SAFETY: there until `drop`.
        match unsafe { sys::cuEventQuery(self.0) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuEventQuery", result).map(|()| true),
        }
    }

    pub(super) fn wait(&self) -> Result<(), CudaError> {
        // SAFETY: there until `drop`.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.0) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, used by nobody after this.
        drop(check("cuEventDestroy_v2", unsafe { sys::cuEventDestroy_v2(self.0) }));
    }
}

/// A graph, and what the device has made of it.
#[derive(Debug)]
pub(super) struct RecordedGraph {
    graph: CUgraph,
    pub(super) executable: CUgraphExec,
}

impl Drop for RecordedGraph {
    fn drop(&mut self) {
        if !self.executable.is_null() {
            // SAFETY: made together with the graph, used by nobody after this.
            drop(check("cuGraphExecDestroy", unsafe { sys::cuGraphExecDestroy(self.executable) }));
        }
        if !self.graph.is_null() {
            // SAFETY: ended a capture, used by nobody after this.
            drop(check("cuGraphDestroy", unsafe { sys::cuGraphDestroy(self.graph) }));
        }
    }
}

// SAFETY: handles of the driver, whose functions any thread may call that has entered the context.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

/// What a call says.
pub(super) fn check(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        failed => Err(CudaError::Call { call, code: failed as i32, name: format!("{failed:?}") }),
    }
}

/// Numbers that the driver counts from zero.
fn unsigned(number: i32) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

/// The first one that has all functions that we call; the last of them was `cuStreamGetCaptureInfo_v3`.
const OLDEST_DRIVER: CudaVersion = CudaVersion { major: 12, minor: 3 };
