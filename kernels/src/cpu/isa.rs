//! Which instructions the kernels use: chosen once, when a [`Cpu`](super::Cpu) is made.

use std::{fmt, str::FromStr};

/// A set of instructions that the kernels are written for; each includes those after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// [`Avx512Bf16`](Self::Avx512Bf16) and tiles of bf16 and int8, on Linux 5.16 or newer: Intel since Sapphire Rapids.
    Amx,
    /// [`Avx512Vnni`](Self::Avx512Vnni) and products of bf16: Intel since Cooper Lake and Sapphire Rapids, AMD since Zen 4.
    Avx512Bf16,
    /// [`Avx512`](Self::Avx512) and products of int8: Intel since Cascade Lake, AMD since Zen 4.
    Avx512Vnni,
    /// x86-64 with AVX-512 F, BW, VL and DQ: Intel servers since Skylake, AMD since Zen 4.
    Avx512,
    /// x86-64 with AVX2, FMA and F16C: Intel since Haswell, AMD since Zen.
    Avx2,
    /// Whatever the compiler makes of plain loops.
    Portable,
}

/// A text that names no [`Isa`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no instruction set; there are {}", Isa::ALL.map(Isa::name).join(", "))]
pub struct UnknownIsa {
    /// The text.
    pub name: String,
}

impl Isa {
    /// All of them, the fastest first.
    pub const ALL: [Self; 6] =
        [Self::Amx, Self::Avx512Bf16, Self::Avx512Vnni, Self::Avx512, Self::Avx2, Self::Portable];

    /// The fastest one that this machine has. [`Amx`](Self::Amx) must be asked for by name: its kernels were tested by a
    /// model of the instructions and have not run on a machine yet.
    pub fn detect() -> Self {
        let is_taken = |isa: &Self| *isa != Self::Amx && isa.is_available();
        Self::ALL.into_iter().find(is_taken).unwrap_or(Self::Portable)
    }

    /// What flags and banners call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Whether this machine has it.
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_os = "linux")]
            Self::Amx => Self::Avx512Bf16.is_available() && super::amx::is_available(),
            #[cfg(not(target_os = "linux"))]
            Self::Amx => false,
            Self::Avx512Bf16 => Self::Avx512Vnni.is_available() && is_x86_feature_detected!("avx512bf16"),
            Self::Avx512Vnni => Self::Avx512.is_available() && is_x86_feature_detected!("avx512vnni"),
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            }
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            Self::Portable => true,
        }
    }

    /// Whether this machine has it.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        self == Self::Portable
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        Self::ALL.into_iter().find(|isa| isa.name() == name).ok_or_else(|| UnknownIsa { name: name.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        let error = "sse9".parse::<Isa>().unwrap_err().to_string();
        assert_eq!(
            error,
            "`sse9` is no instruction set; there are amx, avx512-bf16, avx512-vnni, avx512, avx2, portable"
        );
    }

    #[test]
    fn each_set_includes_those_after_it() {
        let available: Vec<bool> = Isa::ALL.iter().map(|isa| isa.is_available()).collect();
        assert!(available.is_sorted(), "{available:?}");
        assert!(Isa::detect().is_available());
    }
}
