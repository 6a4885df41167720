//! Operations that touch each row or element once: normalisation, activation, rotation, addition.
//!
//! Sums and `exp` are written in sixteen lanes. The rest is plain loops: they have nothing to reduce, so the compiler may
//! choose the lanes and the bits stay the same.

use super::{
    Level,
    pool::Pool,
    shared_out::SharedOut,
    simd::{Kernel, Simd, padded},
};
use crate::{matrix::PANEL, step::RopeTable};
use std::ops::Range;

/// Cuts `items` items of `elements` elements each into chunks and runs `body` on ranges of items.
pub(crate) fn for_ranges(pool: &mut Pool, items: usize, elements: usize, body: impl Fn(Range<usize>) + Sync) {
    let per_chunk = MIN_CHUNK_ELEMENTS.div_ceil(elements.max(1));
    pool.for_each(items.div_ceil(per_chunk), |_, chunk| {
        body(chunk * per_chunk..((chunk + 1) * per_chunk).min(items));
    });
}

/// `out[row] = x[row] / sqrt(mean(x[row]²) + eps) * weight`; `x` is `None` when `out` holds the input.
pub(crate) fn rms_norm(
    out: &mut [f32],
    x: Option<&[f32]>,
    weight: &[f32],
    eps: f32,
    level: Level,
    pool: &mut Pool,
) {
    let width = weight.len();
    assert!(x.is_none_or(|x| x.len() == out.len()), "rms_norm: out is as long as x");
    assert!(width > 0 && out.len().is_multiple_of(width), "rms_norm: x is whole rows of {width}");
    let rows = out.len() / width;
    let out = SharedOut::new(out);
    for_ranges(pool, rows, width, |rows| {
        let elements = rows.start * width..rows.end * width;
        // SAFETY: ranges of rows do not overlap.
        let out = unsafe { out.part(elements.clone()) };
        if let Some(x) = x {
            out.copy_from_slice(&x[elements]);
        }
        level.run(RmsNorm { rows: out, weight, eps });
    });
}

/// `out = silu(gate) * up`.
pub(crate) fn silu_mul(out: &mut [f32], gate: &[f32], up: &[f32], level: Level, pool: &mut Pool) {
    assert_eq!(out.len(), gate.len(), "silu_mul: gate is as long as out");
    assert_eq!(out.len(), up.len(), "silu_mul: up is as long as out");
    let elements = out.len();
    let out = SharedOut::new(out);
    for_ranges(pool, elements, 1, |range| {
        // SAFETY: ranges do not overlap.
        let out = unsafe { out.part(range.clone()) };
        level.run(SiluMul { out, gate: &gate[range.clone()], up: &up[range] });
    });
}

/// `out += x`.
pub(crate) fn add(out: &mut [f32], x: &[f32], level: Level, pool: &mut Pool) {
    assert_eq!(out.len(), x.len(), "add: both sides are equally long");
    let elements = out.len();
    let out = SharedOut::new(out);
    for_ranges(pool, elements, 1, |range| {
        // SAFETY: ranges do not overlap.
        let out = unsafe { out.part(range.clone()) };
        level.run(Add { out, x: &x[range] });
    });
}

/// Rotates every head of every token of `x` in place.
pub(crate) fn rope(
    x: &mut [f32],
    positions: &[u32],
    table: RopeTable<'_>,
    head_size: usize,
    level: Level,
    pool: &mut Pool,
) {
    let tokens = positions.len();
    if tokens == 0 {
        return;
    }
    assert!(2 * table.half <= head_size, "rope: {} pairs in a head of {head_size}", table.half);
    assert!(x.len().is_multiple_of(tokens * head_size), "rope: x is [tokens][heads][{head_size}]");
    let width = x.len() / tokens;
    let x = SharedOut::new(x);
    for_ranges(pool, tokens, width, |tokens| {
        // SAFETY: ranges of tokens do not overlap.
        let rows = unsafe { x.part(tokens.start * width..tokens.end * width) };
        level.run(Rope { rows, width, positions: &positions[tokens], table, head_size });
    });
}

struct RmsNorm<'a> {
    rows: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        for row in self.rows.chunks_exact_mut(width) {
            let mean = sum_of_squares(simd, row) / width as f32;
            let factor = 1.0 / (mean + self.eps).sqrt();
            for (x, weight) in row.iter_mut().zip(self.weight) {
                *x = *x * factor * weight;
            }
        }
    }
}

/// Four panels of partial sums, so that the additions need not wait for each other; then lane by lane.
#[inline(always)]
fn sum_of_squares<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let mut sums = [simd.panel_zero(); 4];
    let (panels, tail) = row.as_chunks::<PANEL>();
    let (quads, rest) = panels.as_chunks::<4>();
    for quad in quads {
        for (sum, x) in sums.iter_mut().zip(quad) {
            let x = simd.panel_f32(x);
            *sum = simd.panel_fma(x, x, *sum);
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest.iter().copied().chain([padded(tail)])) {
        let x = simd.panel_f32(&x);
        *sum = simd.panel_fma(x, x, *sum);
    }
    let [a, b, c, d] = sums;
    simd.panel_sum(simd.panel_add(simd.panel_add(a, b), simd.panel_add(c, d)))
}

struct SiluMul<'a> {
    out: &'a mut [f32],
    gate: &'a [f32],
    up: &'a [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (gates, gate_tail) = self.gate.as_chunks();
        let (ups, up_tail) = self.up.as_chunks();
        let (outs, out_tail) = self.out.as_chunks_mut();
        for ((out, gate), up) in outs.iter_mut().zip(gates).zip(ups) {
            silu_mul_panel(simd, out, gate, up);
        }
        let mut last = [0.0; PANEL];
        silu_mul_panel(simd, &mut last, &padded(gate_tail), &padded(up_tail));
        out_tail.copy_from_slice(&last[..out_tail.len()]);
    }
}

#[inline(always)]
fn silu_mul_panel<S: Simd>(simd: S, out: &mut [f32; PANEL], gate: &[f32; PANEL], up: &[f32; PANEL]) {
    let gate = simd.panel_f32(gate);
    let exp = simd.panel_exp(simd.panel_mul(gate, simd.panel_splat(-1.0)));
    let silu = simd.panel_div(gate, simd.panel_add(simd.panel_splat(1.0), exp));
    simd.panel_store(simd.panel_mul(silu, simd.panel_f32(up)), out);
}

struct Add<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            *out += x;
        }
    }
}

struct Rope<'a> {
    rows: &'a mut [f32],
    width: usize,
    positions: &'a [u32],
    table: RopeTable<'a>,
    head_size: usize,
}

impl Kernel for Rope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        for (row, &position) in self.rows.chunks_exact_mut(self.width).zip(self.positions) {
            let (cos, sin) = self.table.at(position);
            for head in row.chunks_exact_mut(self.head_size) {
                let (lows, highs) = head[..2 * self.table.half].split_at_mut(self.table.half);
                for (((low, high), cos), sin) in lows.iter_mut().zip(highs).zip(cos).zip(sin) {
                    // Each product rounded by itself, as PyTorch does it.
                    (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
                }
            }
        }
    }
}

/// Elements per chunk: some microseconds of work.
const MIN_CHUNK_ELEMENTS: usize = 1 << 13;
