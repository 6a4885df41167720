//! Copies of KV blocks that leave the cache alone.
//!
//! A handoff is more than a cache holds, and nobody on this core reads what was written. An ordinary store first
//! fetches the line that it is about to overwrite; a store past the cache does not, which saves a third of the
//! traffic. `memcpy` stores like that only for pieces much longer than a block, see `docs/performance.md`.
//!
//! What remains are pages: each begins with a walk through the page tables at the source and at the target. A processor
//! foresees neither, and stores wait for theirs. So both are asked for a page ahead, and those of the next copy too.

/// Where the next copy reads and writes, which is asked for in time. Both may be any address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Next {
    pub(crate) source: *const u8,
    pub(crate) target: *const u8,
}

/// Copies `len` bytes. Other threads are sure to see them only after [`settle`].
///
/// # Safety
///
/// `source` is good for reads and `target` for writes of `len` bytes, and the two ranges do not overlap.
pub(super) unsafe fn copy(source: *const u8, target: *mut u8, len: usize, next: Next) {
    #[cfg(target_arch = "x86_64")]
    if LEAST <= len {
        // SAFETY: the caller's promise.
        return unsafe { copy_past_the_cache(source, target, len, next) };
    }
    let _ = next;
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(source, target, len) };
}

/// Orders everything that this thread copied before whatever it does next: stores past the cache are ordered by nothing
/// else. It waits for memory, so once for many copies.
pub(super) fn settle() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has it, and it touches no memory.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// The same with stores of SSE2, which every x86-64 has.
///
/// # Safety
///
/// As for [`copy`]; and `len` is at least one cache line.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::multiple_unsafe_ops_per_block, reason = "eight moves of one line, under one condition")]
unsafe fn copy_past_the_cache(source: *const u8, target: *mut u8, len: usize, next: Next) {
    use std::arch::x86_64::{__m128i, _MM_HINT_NTA, _mm_loadu_si128, _mm_prefetch, _mm_stream_si128};
    let head = target.align_offset(LINE).min(len);
    // SAFETY: `head <= len`.
    unsafe { std::ptr::copy_nonoverlapping(source, target, head) };
    let lines = (len - head) / LINE;
    for line in 0..lines {
        let at = head + line * LINE;
        let ahead = at + PAGE;
        let (later_source, later_target) = match ahead.checked_sub(len) {
            None => (source.wrapping_add(ahead), target.wrapping_add(ahead).cast_const()),
            Some(behind) => (next.source.wrapping_add(behind), next.target.wrapping_add(behind)),
        };
        if line.is_multiple_of(PAGE / LINE) {
            // SAFETY: a hint, for any address. One line, for the sake of its page.
            unsafe { _mm_prefetch::<_MM_HINT_NTA>(later_target.cast()) };
        }
        // SAFETY: `at + LINE <= len`, so both addresses and the 64 bytes behind them are inside the ranges of the
        // caller; `target + at` is a multiple of 64. What is prefetched may be any address: it is only a hint.
        unsafe {
            _mm_prefetch::<_MM_HINT_NTA>(later_source.cast());
            let from: *const __m128i = source.add(at).cast();
            let to: *mut __m128i = target.add(at).cast();
            let [a, b, c, d] = [0, 1, 2, 3].map(|part| _mm_loadu_si128(from.add(part)));
            _mm_stream_si128(to, a);
            _mm_stream_si128(to.add(1), b);
            _mm_stream_si128(to.add(2), c);
            _mm_stream_si128(to.add(3), d);
        }
    }
    let done = head + lines * LINE;
    // SAFETY: `done <= len`.
    let (rest_from, rest_to) = unsafe { (source.add(done), target.add(done)) };
    // SAFETY: what is left of both ranges.
    unsafe { std::ptr::copy_nonoverlapping(rest_from, rest_to, len - done) };
}

/// Bytes of a cache line.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;
/// Bytes of a page, and how far ahead of the copy its places are asked for.
#[cfg(target_arch = "x86_64")]
const PAGE: usize = 4096;
/// Shorter copies are likely to be read again soon.
#[cfg(target_arch = "x86_64")]
const LEAST: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_at_every_alignment_arrives() {
        let source: Vec<u8> = (0..20_000u32).map(|index| (index * 7 + index / 251) as u8).collect();
        for len in [0, 1, 63, 64, 4095, 4096, 4097, 4096 + 63, 9999, 16_384] {
            for (from, to) in [(0, 0), (1, 0), (0, 1), (3, 17), (64, 63)] {
                let mut target = vec![0xee; 20_000];
                let next = Next { source: source.as_ptr(), target: std::ptr::null() };
                // SAFETY: both ranges lie in their vectors, which are two.
                unsafe { copy(source[from..].as_ptr(), target[to..].as_mut_ptr(), len, next) };
                settle();
                assert!(target[to..to + len] == source[from..from + len], "{len} bytes from {from} to {to}");
                let outside = target[..to].iter().chain(&target[to + len..]);
                assert!(
                    outside.copied().all(|byte| byte == 0xee),
                    "{len} bytes from {from} to {to}: no more"
                );
            }
        }
    }
}
