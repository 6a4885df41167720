//! Instructions, proven to be there, and how kernels are run on them.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx::Amx;
use super::{Isa, portable::Portable, simd::Kernel};
#[cfg(target_arch = "x86_64")]
use super::{
    avx2::Avx2,
    avx512::{Avx512, Avx512Bf16, Avx512Vnni},
};

/// An [`Isa`] that this machine has, as the values that prove it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Level {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(Amx),
    /// Tiles in plain loops, for tests; all else as [`Portable`](Self::Portable).
    #[cfg(test)]
    AmxModel,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512Vnni),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Portable,
}

impl Level {
    /// `None` when this machine does not have the instructions.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn new(isa: Isa) -> Option<Self> {
        match isa {
            #[cfg(target_os = "linux")]
            Isa::Amx => Amx::new().map(Self::Amx),
            #[cfg(not(target_os = "linux"))]
            Isa::Amx => None,
            Isa::Avx512Bf16 => Avx512Bf16::new().map(Self::Avx512Bf16),
            Isa::Avx512Vnni => Avx512Vnni::new().map(Self::Avx512Vnni),
            Isa::Avx512 => Avx512::new().map(Self::Avx512),
            Isa::Avx2 => Avx2::new().map(Self::Avx2),
            Isa::Portable => Some(Self::Portable),
        }
    }

    /// `None` when this machine does not have the instructions.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn new(isa: Isa) -> Option<Self> {
        isa.is_available().then_some(Self::Portable)
    }

    pub(crate) const fn isa(self) -> Isa {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(_) => Isa::Amx,
            #[cfg(test)]
            Self::AmxModel => Isa::Amx,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => Isa::Avx512Bf16,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(_) => Isa::Avx512Vnni,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => Isa::Avx512,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => Isa::Avx2,
            Self::Portable => Isa::Portable,
        }
    }

    /// Runs a kernel of f32 lanes. All kinds of AVX-512 share the code.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(set) => set.avx512().avx512().dispatch(kernel),
            #[cfg(test)]
            Self::AmxModel => kernel.run(Portable),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(set) => set.avx512().dispatch(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(set) => set.avx512().dispatch(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => simd.dispatch(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.dispatch(kernel),
            Self::Portable => kernel.run(Portable),
        }
    }
}
