//! Why a device did not do what it was asked for.

use std::fmt;

/// What the driver, the compiler or the lack of one says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The driver's library is not there, or is not one.
    #[error("no driver for NVIDIA GPUs: {reason}")]
    NoDriver {
        /// What the loader says.
        reason: String,
    },
    /// The driver does not know what we ask it for.
    #[error("the NVIDIA driver is for CUDA {found}; CUDA {needed} or newer is needed: update the driver")]
    DriverTooOld {
        /// The newest that it knows.
        found: CudaVersion,
        /// The oldest that is good enough.
        needed: CudaVersion,
    },
    /// No GPU has this number.
    #[error("there is no GPU {index}: the driver sees {count}")]
    NoDevice {
        /// Which was asked for.
        index: u32,
        /// How many there are.
        count: u32,
    },
    /// The kernels need instructions that the GPU does not have.
    #[error("{name} has compute capability {found}; {needed} or newer is needed")]
    DeviceTooOld {
        /// The GPU.
        name: String,
        /// What it has.
        found: ComputeCapability,
        /// The oldest that is good enough.
        needed: ComputeCapability,
    },
    /// Less memory is free than was asked for.
    #[error("the GPU has no {bytes} bytes of free memory")]
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
    },
    /// The host has no memory of that kind.
    #[error("the host has no {bytes} bytes of memory that a GPU can copy from")]
    OutOfPinnedMemory {
        /// What was asked for.
        bytes: usize,
    },
    /// The device has no memory that others can be given.
    #[error("memory of the GPU cannot be shared: {reason}")]
    NotShareable {
        /// What it lacks.
        reason: String,
    },
    /// The device cannot copy to memory of another.
    #[error("the GPU does not reach the other's memory: {reason}")]
    Unreachable {
        /// What is in between.
        reason: String,
    },
    /// The compiler's library is not there, or is not one.
    #[error("no compiler for CUDA kernels: {reason}")]
    NoCompiler {
        /// What the loader says.
        reason: String,
    },
    /// The compiler does not take one of our kernels.
    #[error("{module}.cu does not compile:\n{log}")]
    Compile {
        /// Name of the file, without `.cu`.
        module: String,
        /// What the compiler says.
        log: String,
    },
    /// A kernel did not start.
    #[error("{kernel} cannot be launched: {name} ({code})")]
    Launch {
        /// Name of the kernel.
        kernel: &'static str,
        /// The driver's number.
        code: i32,
        /// The driver's name of it.
        name: String,
    },
    /// Devices were to do something together, and one of them has failed.
    #[error("another GPU of the same model has failed")]
    GroupAbandoned,
    /// One of several devices that compute together has failed.
    #[error("GPU of rank {rank}: {error}")]
    Rank {
        /// Which.
        rank: u32,
        /// What it says.
        error: Box<Self>,
    },
    /// There is nothing by which devices could exchange what they computed.
    #[error("several GPUs need NCCL: {reason}")]
    NoExchange {
        /// What the loader says.
        reason: String,
    },
    /// The driver refused a call, or reports what an earlier one came to.
    #[error("{call}: {name} ({code})")]
    Call {
        /// Name of the driver's function.
        call: &'static str,
        /// The driver's number.
        code: i32,
        /// The driver's name of it.
        name: String,
    },
}

/// A version of CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CudaVersion {
    /// Before the point.
    pub major: u32,
    /// After it.
    pub minor: u32,
}

/// What a GPU can do, as NVIDIA numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ComputeCapability {
    /// Before the point: the generation.
    pub major: u32,
    /// After it.
    pub minor: u32,
}

impl fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl fmt::Display for ComputeCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}
