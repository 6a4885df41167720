//! What this machine can do at most, measured again and again between the things that it limits.

use std::sync::Arc;
use std::time::Instant;

use tidemill_kernels::cpu::{Arithmetic, Cpu, Numbers};
use tidemill_kernels::matrix::{WeightDtype, WeightFormat};

use super::statistics::Distribution;

/// Limits of all threads of a [`Cpu`] together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Limits {
    /// Bytes read from memory in a second.
    pub(super) read: f64,
    /// Multiplications and additions in a second.
    pub(super) flop: f64,
}

/// Measures limits.
#[derive(Debug)]
pub(super) struct Yardstick {
    cpu: Arc<Cpu>,
    /// More than any cache holds.
    memory: Numbers,
    measured: Vec<Limits>,
}

impl Yardstick {
    pub(super) fn new(cpu: Arc<Cpu>) -> Self {
        Self { cpu, memory: Numbers::ones(MEMORY / size_of::<f32>()), measured: Vec::new() }
    }

    /// The limits now, operations being those of `arithmetic`: the best of some tries, as a limit is not what is usual.
    pub(super) fn measure(&mut self, arithmetic: Arithmetic) -> Limits {
        let best = |rate: &mut dyn FnMut() -> f64| (0..TRIES).map(|_| rate()).fold(0.0, f64::max);
        let read = best(&mut || {
            let start = Instant::now();
            std::hint::black_box(self.cpu.sum(self.memory.as_slice()));
            MEMORY as f64 / start.elapsed().as_secs_f64()
        });
        let flop = best(&mut || {
            let start = Instant::now();
            let flop = self.cpu.multiply_add(arithmetic, ROUNDS);
            flop as f64 / start.elapsed().as_secs_f64()
        });
        let limits = Limits { read, flop };
        self.measured.push(limits);
        limits
    }

    /// The middle of all that were measured.
    pub(super) fn median(&self) -> Limits {
        Limits {
            read: Distribution::new(self.measured.iter().map(|limits| limits.read)).median(),
            flop: Distribution::new(self.measured.iter().map(|limits| limits.flop)).median(),
        }
    }
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

#[cfg(test)]
mod tests {
    use tidemill_kernels::cpu::CpuOptions;

    use super::*;

    #[test]
    fn limits_are_numbers() {
        let cpu = Cpu::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
        let mut yardstick = Yardstick::new(Arc::new(cpu));
        let limits = yardstick.measure(Arithmetic::F32);
        assert!(0.0 < limits.read && limits.read.is_finite(), "{limits:?}");
        assert!(0.0 < limits.flop && limits.flop.is_finite(), "{limits:?}");
        assert_eq!(yardstick.median(), limits);
    }
}
