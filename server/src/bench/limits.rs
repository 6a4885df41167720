//! What this machine can do at most, measured again and again between the things that it limits.

use std::sync::Arc;
use std::time::Instant;

use tidemill_engine::memory::DeviceBuffer;
use tidemill_kernels::cpu::{Arithmetic, Cpu, Numbers};
use tidemill_kernels::cuda::{CudaError, DeviceAddress, Driver, MatrixProduct, Product, Queue};
use tidemill_kernels::matrix::{WeightDtype, WeightFormat};

use super::statistics::Distribution;

/// Limits of all threads of a [`Cpu`] together, or of a GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Limits {
    /// Bytes read from memory in a second; of a GPU, bytes read and written by a copy.
    pub(super) read: f64,
    /// Multiplications and additions in a second; of a GPU, those of a large product of bf16 by its library, and infinite where it has none.
    pub(super) flop: f64,
}

/// Measures limits.
#[derive(Debug)]
pub(super) struct Yardstick {
    device: Device,
    measured: Vec<Limits>,
}

#[derive(Debug)]
enum Device {
    /// With more memory than any cache holds.
    Cpu(Arc<Cpu>, Numbers),
    /// With two places of so many bytes; `flop` is known from the start.
    Gpu { driver: Arc<dyn Driver>, from: DeviceBuffer, to: DeviceBuffer, flop: f64 },
}

impl Yardstick {
    pub(super) fn new(cpu: Arc<Cpu>) -> Self {
        let memory = Numbers::ones(MEMORY / size_of::<f32>());
        Self { device: Device::Cpu(cpu, memory), measured: Vec::new() }
    }

    /// Of a GPU, of whose memory it takes at most a sixteenth.
    ///
    /// # Errors
    ///
    /// What the GPU says.
    pub(super) fn on_gpu(driver: &Arc<dyn Driver>) -> Result<Self, CudaError> {
        let bytes = (driver.memory()?.free / 32).clamp(1, GPU_MEMORY);
        let place = || DeviceBuffer::zeroed(driver, bytes);
        let flop = product_rate(driver)?.unwrap_or(f64::INFINITY);
        let device = Device::Gpu { driver: Arc::clone(driver), from: place()?, to: place()?, flop };
        Ok(Self { device, measured: Vec::new() })
    }

    /// The limits now, operations of a processor being those of `arithmetic`: the best of some tries, as a limit is not what is usual.
    ///
    /// # Errors
    ///
    /// What the GPU says.
    pub(super) fn measure(&mut self, arithmetic: Option<Arithmetic>) -> Result<Limits, CudaError> {
        let limits = match &self.device {
            Device::Cpu(cpu, memory) => of_cpu(cpu, memory, arithmetic.unwrap_or(Arithmetic::F32)),
            Device::Gpu { driver, from, to, flop } => {
                // The first try brings the clock of the memory up.
                let rates = (0..TRIES).map(|_| copy_rate(driver, from, to)).collect::<Result<Vec<_>, _>>()?;
                Limits { read: rates.into_iter().fold(0.0, f64::max), flop: *flop }
            }
        };
        self.measured.push(limits);
        Ok(limits)
    }

    /// The middle of all that were measured.
    pub(super) fn median(&self) -> Limits {
        Limits {
            read: Distribution::new(self.measured.iter().map(|limits| limits.read)).median(),
            flop: Distribution::new(self.measured.iter().map(|limits| limits.flop)).median(),
        }
    }
}

fn of_cpu(cpu: &Cpu, memory: &Numbers, arithmetic: Arithmetic) -> Limits {
    let best = |rate: &dyn Fn() -> f64| (0..TRIES).map(|_| rate()).fold(0.0, f64::max);
    let read = best(&|| {
        let start = Instant::now();
        std::hint::black_box(cpu.sum(memory.as_slice()));
        MEMORY as f64 / start.elapsed().as_secs_f64()
    });
    let flop = best(&|| {
        let start = Instant::now();
        let flop = cpu.multiply_add(arithmetic, ROUNDS);
        flop as f64 / start.elapsed().as_secs_f64()
    });
    Limits { read, flop }
}

/// Bytes read and written in a second by copies within a GPU's memory.
fn copy_rate(driver: &Arc<dyn Driver>, from: &DeviceBuffer, to: &DeviceBuffer) -> Result<f64, CudaError> {
    driver.synchronize()?;
    let start = Instant::now();
    for _ in 0..COPIES {
        driver.copy(Queue::Compute, to.address(), from.address(), from.bytes())?;
    }
    driver.synchronize()?;
    Ok((2 * COPIES * from.bytes()) as f64 / start.elapsed().as_secs_f64())
}

/// Multiplications and additions in a second of a square product, where a library does it.
fn product_rate(driver: &Arc<dyn Driver>) -> Result<Option<f64>, CudaError> {
    let side = if driver.memory()?.free < LARGE_GPU { SMALL_SIDE } else { SIDE };
    // Numbers of bf16 around a quarter, of either sign: for zeros a GPU takes less power, and is faster.
    let numbers: Vec<u8> = (0..side * side)
        .flat_map(|index| (0x3e80 | (index.wrapping_mul(0x9e37_79b9) >> 7) as u16 & 0x80ff).to_le_bytes())
        .collect();
    let [x, w] = [DeviceBuffer::holding(driver, &numbers)?, DeviceBuffer::holding(driver, &numbers)?];
    let out = DeviceBuffer::zeroed(driver, numbers.len())?;
    let size = u32::try_from(side).expect("a few thousand");
    let bias = DeviceAddress::NULL;
    let product = Product {
        out: out.address(),
        x: x.address(),
        w: w.address(),
        bias,
        rows: size,
        inputs: size,
        outputs: size,
        adds: 0,
    };
    let asked = MatrixProduct { dtype: WeightDtype::Bf16, to_f32: false, product };
    if !driver.multiply(&asked)? {
        return Ok(None);
    }
    driver.synchronize()?;
    let start = Instant::now();
    for _ in 0..COPIES {
        driver.multiply(&asked)?;
    }
    driver.synchronize()?;
    let flop = 2.0 * (COPIES as f64) * (side as f64).powi(3);
    Ok(Some(flop / start.elapsed().as_secs_f64()))
}

/// What reports call weights of a format.
pub(super) fn weights_name(format: WeightFormat) -> String {
    match format {
        WeightFormat::Stored(WeightDtype::F32) => "f32".to_owned(),
        WeightFormat::Stored(WeightDtype::F16) => "f16".to_owned(),
        WeightFormat::Stored(WeightDtype::Bf16) => "bf16".to_owned(),
        WeightFormat::Quantized(quantization) => quantization.to_string(),
    }
}

/// Bytes that are read at a time.
const MEMORY: usize = 256 << 20;
/// Rounds of multiply-adds at a time: some milliseconds.
const ROUNDS: usize = 1 << 20;
const TRIES: usize = 3;
/// Bytes that a GPU copies at a time, and how often before somebody looks at the clock.
const GPU_MEMORY: usize = 1 << 30;
const COPIES: usize = 8;
/// Rows and columns of the product whose rate is the limit, as it is usually given; and where there is too little memory.
const SIDE: usize = 8192;
const SMALL_SIDE: usize = 16;
/// Free memory of a GPU of the usual kind.
const LARGE_GPU: usize = 8 << 30;

#[cfg(test)]
mod tests {
    use tidemill_kernels::cpu::CpuOptions;

    use super::*;

    #[test]
    fn limits_are_numbers() {
        let cpu = Cpu::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
        let mut yardstick = Yardstick::new(Arc::new(cpu));
        let limits = yardstick.measure(Some(Arithmetic::F32)).unwrap();
        assert!(0.0 < limits.read && limits.read.is_finite(), "{limits:?}");
        assert!(0.0 < limits.flop && limits.flop.is_finite(), "{limits:?}");
        assert_eq!(yardstick.median(), limits);
    }
}
