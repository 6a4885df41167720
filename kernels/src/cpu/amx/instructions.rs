//! The tile instructions themselves, in assembly: the compiler has no stable names for them yet.

use super::{Tile, Tiles};
use crate::cpu::{Isa, avx512::Avx512Bf16};
use std::{
    arch::{asm, x86_64::__cpuid_count},
    marker::PhantomData,
    sync::OnceLock,
};

/// Proof that this machine has AMX for bf16 and int8, that this process may use it, and what [`Avx512Bf16`] proves.
///
/// # Invariant
///
/// Made only by [`new`](Self::new), which asked the machine and the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amx(Avx512Bf16);

/// This thread's tile registers, configured as eight tiles of sixteen rows of sixty-four bytes and released in the end.
///
/// # Invariant
///
/// The registers are configured for as long as the value lives, and it does not leave its thread.
pub(crate) struct ThreadTiles(PhantomData<*mut ()>);

/// `ldtilecfg`'s operand (Intel SDM, volume 1, table 18-1).
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Whether the machine has the instructions and the kernel lets this process use them. Asks once.
pub(crate) fn is_available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let features = __cpuid_count(7, 0).edx;
        [AMX_BF16, AMX_TILE, AMX_INT8].iter().all(|bit| features & (1 << bit) != 0) && request_permission()
    })
}

/// Asks Linux (5.16 or newer) to let this process's threads have tile registers.
fn request_permission() -> bool {
    let result: i64;
    // SAFETY: a system call that takes two numbers and touches no memory; the registers that it changes are named.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

impl Amx {
    /// `None` when the machine does not have it, or the kernel does not let this process use it.
    pub(crate) fn new() -> Option<Self> {
        Avx512Bf16::new().filter(|_| Isa::Amx.is_available()).map(Self)
    }

    /// What it includes.
    pub(crate) const fn avx512(self) -> Avx512Bf16 {
        self.0
    }

    /// Configures the tile registers of this thread.
    pub(crate) fn tiles(self) -> ThreadTiles {
        let mut configuration =
            Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        configuration.row_bytes[..8].fill(64);
        configuration.rows[..8].fill(16);
        // SAFETY: the machine has the instruction and the process may use it: `self` exists. It reads the sixty-four bytes
        // of a valid configuration.
        unsafe {
            asm!("ldtilecfg [{at}]", at = in(reg) &raw const configuration, options(nostack, readonly))
        };
        ThreadTiles(PhantomData)
    }
}

impl Drop for ThreadTiles {
    fn drop(&mut self) {
        // SAFETY: the registers are configured, by this type's invariant; nothing else uses them.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

impl Tiles for ThreadTiles {
    #[inline(always)]
    fn zero<const TILE: u8>(&mut self) {
        // SAFETY: the registers are configured, by this type's invariant; the compiler uses none of them.
        unsafe { asm!("tilezero tmm{tile}", tile = const TILE, options(nostack, nomem)) };
    }

    #[inline(always)]
    fn load<const TILE: u8>(&mut self, from: &Tile) {
        // SAFETY: as in `zero`; reads sixteen rows of sixty-four bytes, which the reference is good for.
        unsafe {
            asm!(
                "tileloadd tmm{tile}, [{at} + {stride}]",
                tile = const TILE,
                at = in(reg) from.as_ptr(),
                stride = in(reg) size_of_val(&from[0]),
                options(nostack, readonly),
            );
        }
    }

    #[inline(always)]
    fn store<const TILE: u8>(&mut self, to: &mut Tile) {
        // SAFETY: as in `zero`; writes sixteen rows of sixty-four bytes, which the reference is good for.
        unsafe {
            asm!(
                "tilestored [{at} + {stride}], tmm{tile}",
                tile = const TILE,
                at = in(reg) to.as_mut_ptr(),
                stride = in(reg) size_of_val(&to[0]),
                options(nostack),
            );
        }
    }

    #[inline(always)]
    fn add_bf16<const SUM: u8, const A: u8, const B: u8>(&mut self) {
        // SAFETY: as in `zero`.
        unsafe {
            asm!(
                "tdpbf16ps tmm{sum}, tmm{a}, tmm{b}",
                sum = const SUM, a = const A, b = const B,
                options(nostack, nomem),
            );
        }
    }

    #[inline(always)]
    fn add_int8<const SUM: u8, const A: u8, const B: u8>(&mut self) {
        // SAFETY: as in `zero`.
        unsafe {
            asm!(
                "tdpbssd tmm{sum}, tmm{a}, tmm{b}",
                sum = const SUM, a = const A, b = const B,
                options(nostack, nomem),
            );
        }
    }
}

/// Bits of CPUID leaf 7, register EDX.
const AMX_BF16: u32 = 22;
const AMX_TILE: u32 = 24;
const AMX_INT8: u32 = 25;

/// Linux: `arch/x86/include/uapi/asm/prctl.h` and `asm/unistd_64.h`.
const SYS_ARCH_PRCTL: i64 = 158;
const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
/// The state component that holds the tile registers (Intel SDM, volume 1, section 13.1).
const XFEATURE_XTILEDATA: u64 = 18;

const _: () = assert!(size_of::<Configuration>() == 64);
