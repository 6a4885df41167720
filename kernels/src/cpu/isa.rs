//! Which instructions the kernels use: chosen once, when a [`Cpu`](super::Cpu) is made.

use std::fmt;

/// A set of instructions that the kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// x86-64 with AVX2, FMA and F16C: Intel since Haswell, AMD since Zen.
    Avx2,
    /// Whatever the compiler makes of plain loops.
    Portable,
}

impl Isa {
    /// The fastest one that this machine has.
    pub fn detect() -> Self {
        if Self::Avx2.is_available() { Self::Avx2 } else { Self::Portable }
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 => false,
            Self::Portable => true,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Avx2 => "avx2+fma",
            Self::Portable => "portable",
        })
    }
}
