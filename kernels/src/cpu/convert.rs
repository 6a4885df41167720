//! Blocks of one layout into a block of another.
//!
//! What a handoff between unequal workers costs is bytes through memory, so that is all that happens here: each byte
//! is read once, in the order in which it lies, and written once, and nothing is zeroed that will be written.

use super::{
    kv_codec::{bf16_row_to_int8, decode_row, encode_row, int8_scales},
    simd::{BF16_RUN, Kernel, Simd},
};
use crate::{
    kv::{BlockAddress, KvBlockShape, KvDtype},
    kv_rows::{self, Part, RowIndex},
    step::{HeadSpan, TokenSpan},
};
use std::{array, ops::Range};

/// Some heads of one block of another layout, filled from the tokens of a span. The caller has checked that they fit.
pub(crate) struct ConvertHeads<'a> {
    pub(crate) image: &'a mut [u8],
    pub(crate) to: &'a KvBlockShape,
    pub(crate) layers: Range<usize>,
    pub(crate) from: TokenSpan<'a>,
    pub(crate) heads: HeadSpan,
}

/// Consecutive tokens of one source block and of the target, all heads of the span, K or V of one layer.
#[derive(Clone, Copy)]
struct Piece {
    block: BlockAddress,
    source: RowIndex,
    target: RowIndex,
    tokens: usize,
}

/// Distances in bytes from one token, and from one head, to the next.
#[derive(Clone, Copy)]
struct Strides {
    token: usize,
    head: usize,
}

/// A rectangle of equal runs of bytes: offsets and strides on both sides, the outer axis being that of the longer
/// strides in the source. Memory is read in its own order then; the image, which is written, lies in a cache.
#[derive(Clone, Copy)]
struct Rectangle {
    source: usize,
    target: usize,
    outer: Axis,
    inner: Axis,
    len: usize,
}

#[derive(Clone, Copy)]
struct Axis {
    count: usize,
    source: usize,
    target: usize,
}

impl Kernel for ConvertHeads<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let TokenSpan { shape, blocks, first, count } = self.from;
        assert!(shape.head_size <= WIDEST_HEAD, "convert: heads of {}", shape.head_size);
        let mut values = None;
        for layer in self.layers.clone() {
            let mut position = first;
            while position < first + count {
                let token = position % shape.block_len;
                let tokens = (shape.block_len - token).min(first + count - position);
                let block = blocks[position / shape.block_len];
                let next = blocks.get((position + tokens) / shape.block_len);
                for part in [Part::Key, Part::Value] {
                    let source = RowIndex { part, layer, token, head: self.heads.from };
                    let target = RowIndex {
                        part,
                        layer: layer - self.layers.start,
                        token: position % self.to.block_len,
                        head: self.heads.to,
                    };
                    let piece = Piece { block, source, target, tokens };
                    if let (Part::Value, Some(&block)) = (part, next) {
                        let source = RowIndex { part: Part::Key, token: 0, ..source };
                        self.ask_for(simd, Piece { block, source, tokens: shape.block_len, ..piece });
                    }
                    self.convert(simd, piece, &mut values);
                }
                position += tokens;
            }
        }
    }
}

impl ConvertHeads<'_> {
    #[inline(always)]
    fn convert<S: Simd>(&mut self, simd: S, piece: Piece, values: &mut Values) {
        // Copies, since the compiler cannot know that what is written is not the shapes.
        let (from, to) = (*self.from.shape, *self.to);
        let offsets = (from.row_offset(piece.source), to.row_offset(piece.target));
        let strides = (data_strides(&from), data_strides(&to));
        let rows = self.rectangle(piece, offsets, strides, from.row_bytes());
        let scale_offsets = (from.scale_offset(piece.source), to.scale_offset(piece.target));
        let scale_strides = (scale_strides(&from), scale_strides(&to));
        if from.dtype != to.dtype {
            // Without scales on one side its offsets are not looked at.
            let offsets = (scale_offsets.0.unwrap_or_default(), scale_offsets.1.unwrap_or_default());
            let scales = self.rectangle(piece, offsets, scale_strides, SCALE);
            return self.convert_rows(simd, piece.block, (rows, scales), values);
        }
        self.copy(simd, piece.block, rows.joined());
        if let (Some(source), Some(target)) = scale_offsets {
            let scales = self.rectangle(piece, (source, target), scale_strides, SCALE);
            self.copy(simd, piece.block, scales.joined());
        }
    }

    /// Asks for the first bytes of a piece that is read soon: what is asked for on the way from line to line ends with the
    /// block before.
    #[inline(always)]
    fn ask_for<S: Simd>(&self, simd: S, piece: Piece) {
        let (from, to) = (*self.from.shape, *self.to);
        let strides = (data_strides(&from), data_strides(&to));
        let rows = self.rectangle(piece, (from.row_offset(piece.source), 0), strides, from.row_bytes());
        let first = piece.block.as_ptr().cast_const();
        let mut asked = 0;
        for outer in 0..rows.outer.count {
            for inner in 0..rows.inner.count {
                let row = first.wrapping_add(rows.at(outer, inner).0);
                for at in (0..rows.len).step_by(LINE) {
                    simd.prefetch_far(row.wrapping_add(at));
                }
                asked += rows.len;
            }
            if AHEAD <= asked {
                return;
            }
        }
    }

    #[inline(always)]
    fn rectangle(
        &self,
        piece: Piece,
        (source, target): (usize, usize),
        (from, to): (Strides, Strides),
        len: usize,
    ) -> Rectangle {
        let tokens = Axis { count: piece.tokens, source: from.token, target: to.token };
        let heads = Axis { count: self.heads.count, source: from.head, target: to.head };
        // As the data lies: a type without scales has no strides of scales.
        let shape = self.from.shape;
        let by_heads = shape.token_stride < shape.head_stride;
        let (outer, inner) = if by_heads { (heads, tokens) } else { (tokens, heads) };
        Rectangle { source, target, outer, inner, len }
    }

    #[inline(always)]
    fn copy<S: Simd>(&mut self, simd: S, block: BlockAddress, runs: Rectangle) {
        let (from, ahead) = (*self.from.shape, runs.ahead());
        for outer in 0..runs.outer.count {
            for inner in 0..runs.inner.count {
                let (source, target) = runs.at(outer, inner);
                let stored = kv_rows::run(&from, block, source, runs.len);
                copy_run(simd, stored, &mut self.image[target..target + runs.len], ahead);
            }
        }
    }

    /// Converts the rows of a rectangle; the other one is that of their scales.
    #[inline(always)]
    fn convert_rows<S: Simd>(
        &mut self,
        simd: S,
        block: BlockAddress,
        rectangles: (Rectangle, Rectangle),
        values: &mut Values,
    ) {
        let (rows, ahead) = (rectangles.0, rectangles.0.ahead());
        let is_quick = self.from.shape.dtype == KvDtype::Bf16 && self.to.dtype == KvDtype::Int8;
        for outer in 0..rows.outer.count {
            let mut inner = 0;
            while inner < rows.inner.count {
                let at = (outer, inner);
                let are_many = is_quick && inner + ROWS <= rows.inner.count;
                let are_done = are_many
                    && match rows.len {
                        HEAD_64 => self.bf16_to_int8::<S, 2>(simd, block, rectangles, at, ahead),
                        HEAD_128 => self.bf16_to_int8::<S, 4>(simd, block, rectangles, at, ahead),
                        _ => false,
                    };
                if !are_done {
                    self.convert_row(simd, block, rectangles, at, values);
                }
                inner += if are_done { ROWS } else { 1 };
            }
        }
    }

    /// Converts some rows of heads of `RUNS` runs at a time: their divisions then are one. False when one of them needs
    /// more care.
    #[inline(always)]
    fn bf16_to_int8<S: Simd, const RUNS: usize>(
        &mut self,
        simd: S,
        block: BlockAddress,
        (rows, scales): (Rectangle, Rectangle),
        (outer, inner): (usize, usize),
        ahead: usize,
    ) -> bool {
        let from = *self.from.shape;
        let stored: [&[[u8; BF16_RUN]]; ROWS] = array::from_fn(|row| {
            let (source, _) = rows.at(outer, inner + row);
            let stored = kv_rows::run(&from, block, source, RUNS * BF16_RUN);
            for line in stored.chunks_exact(LINE) {
                simd.prefetch_far(line.as_ptr().wrapping_add(ahead));
            }
            stored.as_chunks().0
        });
        let Some((row_scales, inverses)) = int8_scales(stored.map(|row| simd.greatest_bf16(row))) else {
            return false;
        };
        for row in 0..ROWS {
            let (_, target) = rows.at(outer, inner + row);
            let image = &mut self.image[target..target + RUNS * BF16_RUN / 2];
            for (run, steps) in stored[row].iter().zip(image.as_chunks_mut().0) {
                simd.bf16_to_int8(run, inverses[row], steps);
            }
            let (_, target) = scales.at(outer, inner + row);
            self.image[target..target + SCALE].copy_from_slice(&row_scales[row].to_ne_bytes());
        }
        true
    }

    #[inline(always)]
    fn convert_row<S: Simd>(
        &mut self,
        simd: S,
        block: BlockAddress,
        (rows, scales): (Rectangle, Rectangle),
        (outer, inner): (usize, usize),
        values: &mut Values,
    ) {
        let (from, to) = (*self.from.shape, *self.to);
        let (source, target) = rows.at(outer, inner);
        let (source_scale, target_scale) = scales.at(outer, inner);
        let stored = kv_rows::run(&from, block, source, rows.len);
        let image = &mut self.image[target..target + to.row_bytes()];
        let direct = match (from.dtype, to.dtype) {
            (KvDtype::Bf16, KvDtype::Int8) => bf16_row_to_int8(simd, stored, image),
            _ => None,
        };
        let scale = direct.unwrap_or_else(|| {
            let scale =
                if from.dtype.has_scales() { kv_rows::stored_scale(&from, block, source_scale) } else { 1.0 };
            let values = values.get_or_insert([0.0; WIDEST_HEAD]);
            let values = &mut values[..from.head_size];
            decode_row(simd, from.dtype, stored, scale, values);
            encode_row(simd, to.dtype, values, image)
        });
        if to.dtype.has_scales() {
            self.image[target_scale..target_scale + SCALE].copy_from_slice(&scale.to_ne_bytes());
        }
    }
}

impl Rectangle {
    /// The same bytes in longer runs, where runs continue one another on both sides.
    #[inline(always)]
    fn joined(mut self) -> Self {
        for axis in [&mut self.inner, &mut self.outer] {
            if axis.source != self.len || axis.target != self.len {
                break;
            }
            self.len *= axis.count;
            axis.count = 1;
        }
        self
    }

    /// Offsets of one run, in the source and in the target.
    #[inline(always)]
    fn at(&self, outer: usize, inner: usize) -> (usize, usize) {
        (
            self.source + outer * self.outer.source + inner * self.inner.source,
            self.target + outer * self.outer.target + inner * self.inner.target,
        )
    }

    /// How far behind a line that is read lies one to be asked for, so that [`AHEAD`] bytes are read in between: whole steps
    /// of the outer axis. Between the last of them and the next part there is mostly no gap.
    #[inline(always)]
    fn ahead(&self) -> usize {
        if self.outer.count == 1 {
            return AHEAD;
        }
        AHEAD.div_ceil(self.inner.count * self.len) * self.outer.source
    }
}

/// Copies a run whose source is read from memory. Runs are short, a row of some hundred bytes or a few of them: too
/// short for `memcpy` to be worth a call, and for the machine to see by itself what is read next.
#[inline(always)]
fn copy_run<S: Simd>(simd: S, stored: &[u8], image: &mut [u8], ahead: usize) {
    let (lines, rest) = stored.as_chunks::<LINE>();
    let (image_lines, image_rest) = image.as_chunks_mut::<LINE>();
    for (image, line) in image_lines.iter_mut().zip(lines) {
        simd.prefetch_far(line.as_ptr().wrapping_add(ahead));
        *image = *line;
    }
    if rest.is_empty() {
        return;
    }
    match (rest.as_chunks::<SCALE>(), image_rest.as_chunks_mut::<SCALE>()) {
        (([scale], []), ([image], [])) => *image = *scale,
        _ => image_rest.copy_from_slice(rest),
    }
}

/// Zeroes what of an image no token of `from` will be written to: slots before and behind them, and the padding.
pub(crate) fn clear_uncovered(image: &mut [u8], to: &KvBlockShape, layers: usize, from: TokenSpan<'_>) {
    let scale = if to.dtype.has_scales() { SCALE } else { 0 };
    let data = to.block_len * to.kv_heads * to.row_bytes();
    let scales = to.block_len * to.kv_heads * scale;
    let is_dense = to.key_offset == 0
        && to.value_offset == data
        && (scale == 0 || (to.key_scale_offset == 2 * data && to.value_scale_offset == 2 * data + scales));
    if from.count < to.block_len || !is_dense {
        return image.fill(0);
    }
    for layer in image.chunks_exact_mut(to.layer_stride).take(layers) {
        layer[2 * (data + scales)..].fill(0);
    }
}

fn data_strides(shape: &KvBlockShape) -> Strides {
    Strides { token: shape.token_stride, head: shape.head_stride }
}

fn scale_strides(shape: &KvBlockShape) -> Strides {
    Strides { token: shape.scale_token_stride, head: shape.scale_head_stride }
}

/// A row on its way from one type to another. Most need no stop on the way, and then it is not cleared either.
type Values = Option<[f32; WIDEST_HEAD]>;

/// Bytes of the scale of a row.
const SCALE: usize = size_of::<f32>();
/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes read between the moment that a line is asked for and that it is needed: as many as come from memory while it
/// looks for the line and, in the page tables, for its page.
const AHEAD: usize = 4096;
/// Rows that become int8 together.
const ROWS: usize = 4;
/// Bytes of a row of bf16 with the usual elements.
const HEAD_64: usize = 2 * BF16_RUN;
const HEAD_128: usize = 4 * BF16_RUN;
/// Elements of the widest head that a conversion has room for: no model has more than 576 (the latent of DeepSeek).
const WIDEST_HEAD: usize = 1024;
