//! What to compute on, as it is typed, and which GPUs there are.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use tidemill_kernels::cuda::Driver;
use tidemill_kernels::cuda::gpu::{Gpu, Nvrtc};
use tidemill_kernels::cuda::images::Images;
pub use tidemill_kernels::cuda::{CudaError, Properties as GpuProperties};

use crate::device::DeviceChoice;

/// What to compute on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceName {
    /// The processor.
    #[default]
    Cpu,
    /// The first GPU, where it is of use and can do what is asked for, else the processor.
    Auto,
    /// The GPU of this number, as the driver counts.
    Cuda(u32),
}

/// A name that is none of a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no device; there are cpu, auto, and cuda:0, cuda:1, …")]
pub struct UnknownDevice(String);

impl DeviceName {
    /// Whether there is such a device on this machine.
    ///
    /// # Errors
    ///
    /// Why the GPU that is named is of no use.
    pub fn check(self) -> Result<(), CudaError> {
        match self {
            Self::Cpu | Self::Auto => Ok(()),
            Self::Cuda(index) => usable(index),
        }
    }

    /// Takes the GPU, if it is to be one, and of several ranks as many from it on. Kernels that are not kept on disk are compiled now.
    ///
    /// # Errors
    ///
    /// Why a GPU that is named, or that a rank would take, is of no use.
    pub fn open(self, ranks: u32) -> Result<DeviceChoice, CudaError> {
        match self {
            Self::Cpu => Ok(DeviceChoice::Cpu),
            Self::Cuda(first) if ranks == 1 => open(first).map(DeviceChoice::Cuda),
            Self::Cuda(first) => open_all(first, ranks).map(DeviceChoice::CudaRanks),
            Self::Auto => {
                let opened = match ranks {
                    1 => open(0).map(DeviceChoice::CudaOrCpu),
                    _ => open_all(0, ranks).map(DeviceChoice::CudaRanksOrCpu),
                };
                opened.or_else(|reason| {
                    tracing::info!(%reason, "cpu only");
                    Ok(DeviceChoice::Cpu)
                })
            }
        }
    }
}

/// What GPUs the driver sees, each with the reason why it is of no use, if it is of none.
///
/// # Errors
///
/// Why there is no driver to ask.
pub fn gpus() -> Result<Vec<(GpuProperties, Option<CudaError>)>, CudaError> {
    let with_reason = |gpu: GpuProperties| {
        let reason = Gpu::check(&gpu).and_then(|()| Nvrtc::open().map(drop)).err();
        (gpu, reason)
    };
    Ok(Gpu::all()?.into_iter().map(with_reason).collect())
}

fn usable(index: u32) -> Result<(), CudaError> {
    let gpus = gpus()?;
    let count = u32::try_from(gpus.len()).unwrap_or(u32::MAX);
    let gpu = gpus.into_iter().nth(index as usize).ok_or(CudaError::NoDevice { index, count })?;
    gpu.1.map_or(Ok(()), Err)
}

/// GPUs for so many ranks. Each is looked at before the first is taken.
fn open_all(first: u32, ranks: u32) -> Result<Vec<Arc<dyn Driver>>, CudaError> {
    let all = || first..first.saturating_add(ranks);
    all().try_for_each(usable)?;
    all().map(open).collect()
}

fn open(index: u32) -> Result<Arc<dyn Driver>, CudaError> {
    let gpu = Gpu::open(index, Images::usual_folder())?;
    let GpuProperties { name, multiprocessors, .. } = gpu.properties();
    tracing::info!(gpu = index, %name, multiprocessors, compiled = gpu.compiled(), "computes on a GPU");
    Ok(Arc::new(gpu))
}

impl FromStr for DeviceName {
    type Err = UnknownDevice;

    fn from_str(text: &str) -> Result<Self, UnknownDevice> {
        let unknown = || UnknownDevice(text.to_owned());
        match text {
            "cpu" => Ok(Self::Cpu),
            "auto" => Ok(Self::Auto),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let index = text.strip_prefix("cuda:").ok_or_else(unknown)?;
                let digits = !index.is_empty() && index.bytes().all(|it| it.is_ascii_digit());
                index.parse().ok().filter(|_| digits).map(Self::Cuda).ok_or_else(unknown)
            }
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => formatter.write_str("cpu"),
            Self::Auto => formatter.write_str("auto"),
            Self::Cuda(index) => write!(formatter, "cuda:{index}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for (text, expected) in [
            ("cpu", Some(DeviceName::Cpu)),
            ("auto", Some(DeviceName::Auto)),
            ("cuda:0", Some(DeviceName::Cuda(0))),
            ("cuda:17", Some(DeviceName::Cuda(17))),
            ("cuda:", None),
            ("cuda:-1", None),
            ("cuda:+1", None),
            ("cuda:4294967296", None),
            ("CPU", None),
            ("gpu", None),
            ("", None),
        ] {
            assert_eq!(text.parse::<DeviceName>().ok(), expected, "{text}");
            if let Some(device) = expected {
                assert_eq!(device.to_string(), text);
            }
        }
        assert_eq!("cuda".parse(), Ok(DeviceName::Cuda(0)));
        let error = "tpu".parse::<DeviceName>().expect_err("is no device").to_string();
        assert_eq!(error, "`tpu` is no device; there are cpu, auto, and cuda:0, cuda:1, …");
    }

    #[test]
    fn a_device_is_checked_before_it_is_taken() {
        for device in [DeviceName::Cpu, DeviceName::Auto] {
            assert_eq!(device.check(), Ok(()));
        }
        assert!(DeviceName::Cpu.open(2).is_ok_and(|device| matches!(device, DeviceChoice::Cpu)));
        // No machine has so many.
        let beyond = DeviceName::Cuda(1000);
        let error = beyond.check().expect_err("is not there");
        match gpus() {
            Ok(gpus) => {
                assert_eq!(error, CudaError::NoDevice { index: 1000, count: gpus.len() as u32 });
            }
            Err(reason) => {
                assert_eq!(error, reason);
                for ranks in [1, 2] {
                    let opened = DeviceName::Auto.open(ranks);
                    assert!(opened.is_ok_and(|device| matches!(device, DeviceChoice::Cpu)), "falls back");
                }
                assert_eq!(DeviceName::Cuda(0).open(2).map(drop), Err(reason));
            }
        }
    }
}
