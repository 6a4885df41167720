//! Why there is no RDMA here, and what a device said no to.

use std::io;

/// No device can be used. The first three are the ways in which a machine has no RDMA at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// The library is not installed.
    #[error("libibverbs is not installed (package libibverbs1 or rdma-core): {detail}")]
    NoLibrary {
        /// What the loader said.
        detail: String,
    },
    /// The kernel has no RDMA core, or its modules are not loaded.
    #[error("the kernel has no RDMA support loaded (modules ib_core and ib_uverbs)")]
    NoKernelSupport,
    /// Library and kernel are ready, and there is no device.
    #[error("there is no RDMA device")]
    NoDevice,
    /// There are devices, of which none fits.
    #[error("no RDMA device can be used: {reason}")]
    NoneFits {
        /// What is wrong with each.
        reason: String,
    },
}

/// A call that a device or the library did not carry out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerbsError {
    /// There is no device to call.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// The limit on pinned memory is too low.
    #[error(
        "{bytes} bytes cannot be registered: RLIMIT_MEMLOCK allows this process {limit}; raise it (ulimit -l, \
         LimitMEMLOCK= in systemd, or the capability IPC_LOCK)"
    )]
    MemoryLock {
        /// What was to be pinned.
        bytes: usize,
        /// The limit, as text: a number of bytes or "unlimited".
        limit: String,
    },
    /// The installed library is too old for it.
    #[error("the installed libibverbs has no {function}")]
    NoFunction {
        /// The missing symbol.
        function: &'static str,
    },
    /// The device, or its driver, cannot be given memory of another device.
    #[error("this RDMA device or its driver cannot reach the memory of other devices (dma-buf)")]
    NoDmaBuf,
    /// What the peer said of itself cannot be used.
    #[error("the peer's path is not usable: {what}")]
    Peer {
        /// What is wrong with it.
        what: &'static str,
    },
    /// Anything else.
    #[error("cannot {operation}")]
    Call {
        /// What was attempted, as a verb phrase.
        operation: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl Unavailable {
    /// A short name for counters and scripts.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::NoLibrary { .. } => "no-library",
            Self::NoKernelSupport => "no-kernel-support",
            Self::NoDevice => "no-device",
            Self::NoneFits { .. } => "none-fits",
        }
    }
}

impl VerbsError {
    /// The error of a call that set `errno`.
    pub(super) fn last(operation: &'static str) -> Self {
        Self::Call { operation, source: io::Error::last_os_error() }
    }

    /// The error of a call that returned `code`, an error number, or its negative.
    pub(super) fn code(operation: &'static str, code: i32) -> Result<(), Self> {
        match code {
            0 => Ok(()),
            code => Err(Self::Call { operation, source: io::Error::from_raw_os_error(code.abs()) }),
        }
    }

    /// With its cause, on one line.
    pub fn to_line(&self) -> String {
        match self {
            Self::Call { source, .. } => format!("{self}: {source}"),
            _ => self.to_string(),
        }
    }
}
