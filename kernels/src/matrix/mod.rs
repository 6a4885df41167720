//! Weights, packed once when they are loaded, in the type that they come in or quantised.
//!
//! A packed matrix is cut into panels of [`PANEL`] outputs; a panel holds its outputs' weights unit by unit:
//! `[panel][unit][output]`. A vector register then holds neighbouring outputs, so that each output is summed over the
//! inputs in their order, alone in its lane: its bits depend on its own row and column and on nothing else.
//!
//! A unit is what one instruction takes of each output, at most 32 bits: one input of f32 or f16, two of bf16, four of
//! int8. AVX-512 and AMX multiply exactly such units, and whoever has no instruction for two inputs of bf16 widens them
//! with a shift and a mask. Int4 is two units of four inputs in the two halves of four bytes. One layout thus serves
//! every instruction set. The last unit of an output is filled up with zeros, and there are as many units as the widest
//! instructions take at a time.
//!
//! Quantised weights are `step * scale`: int8 with one scale per output, int4 with one per group of inputs. Fp8 has units of four codes, each
//! a number that bf16 has, and one scale per output.

mod pack;
mod rows;

pub use crate::aligned::{HUGE_PAGE_SETTING, has_huge_pages};
use crate::{aligned::AlignedBuffer, reference::e4m3_to_f32};
use bytemuck::AnyBitPattern;
use half::{bf16, f16};
pub(crate) use pack::quantize_int4;
use pack::{PanelSizes, Panels, pack, widen_row};
pub use rows::{RowSteps, RowValues};
use std::{fmt, iter, str::FromStr};

/// Outputs per panel.
pub(crate) const PANEL: usize = 16;

/// Type of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
}

/// How weights are made smaller when they are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// 8 bits and one scale per output: `scale = max|row| / 127`.
    Int8,
    /// 8 bits of floating point ([E4M3](crate::reference::e4m3_to_f32)) and one scale per output, a power of two where it is made here.
    Fp8,
    /// 4 bits and one scale per so many inputs of an output.
    Int4 {
        /// Inputs that share a scale: 32, 64 or 128.
        group: usize,
    },
}

/// A text that names no [`Quantization`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{name}` is no quantization; there are int8, fp8, int4 (that is int4-g32), int4-g32, int4-g64, int4-g128"
)]
pub struct UnknownQuantization {
    /// The text.
    pub name: String,
}

/// How a packed matrix holds its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// As they came.
    Stored(WeightDtype),
    /// In fewer bits.
    Quantized(Quantization),
}

/// A row-major matrix `[outputs][inputs]` as it lies in a file: little-endian, of any alignment.
#[derive(Clone, Copy, Debug)]
pub struct MatrixSource<'a> {
    /// `outputs * inputs * dtype.bytes()` bytes.
    pub bytes: &'a [u8],
    /// Type of the elements.
    pub dtype: WeightDtype,
}

/// A weight matrix in the layout of the CPU kernels.
#[derive(Debug)]
pub struct PackedMatrix {
    outputs: usize,
    inputs: usize,
    format: WeightFormat,
    panels: AlignedBuffer,
    /// Int8 and fp8: f32 `[panel][output]`. Int4: bf16 `[panel][group][output]`.
    scales: AlignedBuffer,
    /// Int8: `-128 * Σ weights` of each output, for instructions that want inputs from 0 to 255.
    corrections: AlignedBuffer,
}

/// A table of row vectors: token embeddings.
#[derive(Debug)]
pub struct Embedding {
    width: usize,
    dtype: WeightDtype,
    rows: AlignedBuffer,
}

impl PackedMatrix {
    /// Packs a matrix of `outputs` rows and `inputs` columns.
    ///
    /// # Panics
    ///
    /// When the source does not have exactly `outputs * inputs` elements.
    pub fn pack(outputs: usize, inputs: usize, source: MatrixSource<'_>) -> Self {
        Self::pack_on(1, outputs, inputs, source)
    }

    /// The same, with the panels of a large matrix shared out among `threads` threads: a single one can neither fault
    /// in the pages nor move the bytes as fast as memory allows.
    ///
    /// # Panics
    ///
    /// When the source does not have exactly `outputs * inputs` elements.
    pub fn pack_on(threads: usize, outputs: usize, inputs: usize, source: MatrixSource<'_>) -> Self {
        Self::pack_as(WeightFormat::Stored(source.dtype), threads, outputs, inputs, source)
    }

    /// The same in fewer bits.
    ///
    /// # Panics
    ///
    /// As [`pack_on`](Self::pack_on), and when int4 groups are not of 32, 64 or 128 inputs.
    pub fn quantize_on(
        threads: usize,
        outputs: usize,
        inputs: usize,
        source: MatrixSource<'_>,
        quantization: Quantization,
    ) -> Self {
        if let Quantization::Int4 { group } = quantization {
            assert!(INT4_GROUPS.contains(&group), "int4 in groups of {group}");
        }
        Self::pack_as(WeightFormat::Quantized(quantization), threads, outputs, inputs, source)
    }

    fn pack_as(
        format: WeightFormat,
        threads: usize,
        outputs: usize,
        inputs: usize,
        source: MatrixSource<'_>,
    ) -> Self {
        source.assert_holds(outputs, inputs);
        let mut matrix = Self::empty(format, outputs, inputs);
        let threads = if source.bytes.len() < SHARED_FROM { 1 } else { threads };
        let panel_bytes = PANEL * inputs * source.dtype.bytes();
        matrix.fill_on(threads, &|first, panels| {
            pack(panels, &source.bytes[first * panel_bytes..], inputs, source.dtype, format);
        });
        matrix
    }

    /// A matrix of zeros.
    fn empty(format: WeightFormat, outputs: usize, inputs: usize) -> Self {
        let count = outputs.div_ceil(PANEL);
        let sizes = format.panel_sizes(inputs);
        Self {
            outputs,
            inputs,
            format,
            panels: AlignedBuffer::zeroed_beside_others(count * sizes.panel),
            scales: AlignedBuffer::zeroed_beside_others(count * sizes.scales),
            corrections: AlignedBuffer::zeroed_beside_others(count * sizes.corrections * size_of::<i32>()),
        }
    }

    /// Shares the panels out among threads; `fill` gets the number of the first of its panels.
    fn fill_on(&mut self, threads: usize, fill: &(dyn Fn(usize, Panels<'_>) + Sync)) {
        let share = self.outputs.div_ceil(PANEL).div_ceil(threads.max(1));
        let sizes = self.format.panel_sizes(self.inputs);
        let all = Panels {
            panels: self.panels.as_mut_slice(),
            scales: self.scales.as_mut_slice(),
            corrections: self.corrections.as_mut_slice(),
        };
        let mut shares = all.split(share, sizes).enumerate();
        std::thread::scope(|scope| {
            let own = shares.next();
            for (index, panels) in shares {
                scope.spawn(move || fill(index * share, panels));
            }
            if let Some((_, panels)) = own {
                fill(0, panels);
            }
        });
    }

    /// Rows of the source: length of an output row.
    pub const fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the source: length of an input row.
    pub const fn inputs(&self) -> usize {
        self.inputs
    }

    /// How the weights are held.
    pub const fn format(&self) -> WeightFormat {
        self.format
    }

    /// Bytes held.
    pub const fn bytes(&self) -> usize {
        self.panels.len() + self.scales.len() + self.corrections.len()
    }

    /// Unpacks row `index` of the source: an embedding that is tied to the output matrix.
    ///
    /// Reads a whole panel, sixteen rows, for the one: some ten microseconds, so nothing beside a step.
    ///
    /// # Panics
    ///
    /// When `index` is no row or `out` is not `inputs` long.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.outputs, "row {index} of a matrix of {}", self.outputs);
        assert_eq!(out.len(), self.inputs, "a row has as many elements as the matrix has inputs");
        let (panel, lane) = (index / PANEL, index % PANEL);
        let words = || self.panel::<[u32; PANEL]>(panel).iter().map(|line| line[lane].to_le_bytes());
        match self.format {
            WeightFormat::Stored(WeightDtype::F32) => fill(out, words().map(f32::from_le_bytes)),
            WeightFormat::Stored(WeightDtype::F16) => {
                let halves = self.panel::<[u16; PANEL]>(panel).iter().map(|line| line[lane]);
                fill(out, halves.map(|bits| f16::from_bits(bits).to_f32()));
            }
            WeightFormat::Stored(WeightDtype::Bf16) => {
                let halves = words().flat_map(|[a, b, c, d]| [[a, b], [c, d]]);
                fill(out, halves.map(|bytes| bf16::from_le_bytes(bytes).to_f32()));
            }
            WeightFormat::Quantized(Quantization::Int8) => {
                let scale = self.output_scales(panel)[lane];
                fill(out, words().flatten().map(|step| scale * f32::from(step.cast_signed())));
            }
            WeightFormat::Quantized(Quantization::Fp8) => {
                let scale = self.output_scales(panel)[lane];
                fill(out, words().flatten().map(|code| scale * e4m3_to_f32(code)));
            }
            WeightFormat::Quantized(Quantization::Int4 { group }) => {
                let halves = words().flat_map(|bytes| {
                    bytes.map(|byte| byte & 15).into_iter().chain(bytes.map(|byte| byte >> 4))
                });
                let scales = self
                    .int4_scales(panel, group)
                    .iter()
                    .map(|scales| bf16::from_bits(scales[lane]).to_f32());
                let scales = scales.flat_map(|scale| iter::repeat_n(scale, group));
                fill(out, halves.zip(scales).map(|(half, scale)| scale * f32::from(half.cast_signed() - 8)));
            }
        }
    }

    /// Inputs with those that fill up the last units.
    pub(crate) fn padded_inputs(&self) -> usize {
        self.format.padded_inputs(self.inputs)
    }

    /// One panel as lines of [`PANEL`] units each; `T` is as wide as a line.
    #[inline]
    pub(crate) fn panel<T: AnyBitPattern>(&self, index: usize) -> &[T] {
        let bytes = self.format.panel_bytes(self.inputs);
        bytemuck::cast_slice(&self.panels.as_slice::<u8>()[index * bytes..(index + 1) * bytes])
    }

    /// All panels, and bytes of each.
    pub(crate) fn all_panels(&self) -> (&[u8], usize) {
        (self.panels.as_slice(), self.format.panel_bytes(self.inputs))
    }

    /// All scales, and bytes of those of each panel.
    pub(crate) fn all_scales(&self) -> (&[u8], usize) {
        (self.scales.as_slice(), self.format.panel_sizes(self.inputs).scales)
    }

    /// Scales of one panel of int8 or fp8.
    pub(crate) fn output_scales(&self, panel: usize) -> &[f32; PANEL] {
        &self.scales.as_slice().as_chunks().0[panel]
    }

    /// Corrections of one panel of int8.
    pub(crate) fn int8_corrections(&self, panel: usize) -> &[i32; PANEL] {
        &self.corrections.as_slice().as_chunks().0[panel]
    }

    /// Scales of one panel of int4, group by group, as bits of bf16.
    pub(crate) fn int4_scales(&self, panel: usize, group: usize) -> &[[u16; PANEL]] {
        let groups = self.inputs.div_ceil(group);
        &self.scales.as_slice().as_chunks().0[panel * groups..(panel + 1) * groups]
    }
}

impl Embedding {
    /// Copies a table of `rows` vectors of `width` elements.
    ///
    /// # Panics
    ///
    /// When the source does not have exactly `rows * width` elements.
    pub fn new(rows: usize, width: usize, source: MatrixSource<'_>) -> Self {
        source.assert_holds(rows, width);
        let mut copy = AlignedBuffer::zeroed(source.bytes.len());
        copy.as_mut_slice::<u8>().copy_from_slice(source.bytes);
        Self { width, dtype: source.dtype, rows: copy }
    }

    /// Reads row `index`.
    ///
    /// # Panics
    ///
    /// When `index` is no row or `out` is not `width` long.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.width, "a row has the width of the table");
        let bytes = self.width * self.dtype.bytes();
        widen_row(out, &self.rows.as_slice()[index * bytes..(index + 1) * bytes], self.dtype);
    }

    /// Bytes held.
    pub const fn bytes(&self) -> usize {
        self.rows.len()
    }
}

impl WeightDtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl WeightFormat {
    /// Inputs with those that fill up the last units, so that the widest instructions find whole ones.
    pub(crate) const fn padded_inputs(self, inputs: usize) -> usize {
        match self {
            Self::Stored(WeightDtype::F32 | WeightDtype::F16) => inputs,
            Self::Stored(WeightDtype::Bf16) => inputs.next_multiple_of(32),
            Self::Quantized(Quantization::Int8 | Quantization::Fp8) => inputs.next_multiple_of(64),
            Self::Quantized(Quantization::Int4 { group }) => inputs.next_multiple_of(group),
        }
    }

    const fn panel_bytes(self, inputs: usize) -> usize {
        let inputs = PANEL * self.padded_inputs(inputs);
        match self {
            Self::Stored(dtype) => inputs * dtype.bytes(),
            Self::Quantized(Quantization::Int8 | Quantization::Fp8) => inputs,
            Self::Quantized(Quantization::Int4 { .. }) => inputs / 2,
        }
    }

    const fn scale_bytes(self, inputs: usize) -> usize {
        match self {
            Self::Stored(_) => 0,
            Self::Quantized(Quantization::Int8 | Quantization::Fp8) => PANEL * size_of::<f32>(),
            Self::Quantized(Quantization::Int4 { group }) => {
                PANEL * inputs.div_ceil(group) * size_of::<bf16>()
            }
        }
    }

    const fn panel_sizes(self, inputs: usize) -> PanelSizes {
        PanelSizes {
            panel: self.panel_bytes(inputs),
            scales: self.scale_bytes(inputs),
            corrections: if self.has_corrections() { PANEL } else { 0 },
        }
    }

    const fn has_corrections(self) -> bool {
        matches!(self, Self::Quantized(Quantization::Int8))
    }
}

impl Quantization {
    /// Whether what is multiplied with it becomes E4M3 and not int8.
    pub const fn takes_e4m3(self) -> bool {
        matches!(self, Self::Fp8)
    }

    /// Scales of a row of so many inputs.
    pub const fn groups(self, inputs: usize) -> usize {
        match self {
            Self::Int8 | Self::Fp8 => 1,
            Self::Int4 { group } => inputs.div_ceil(group),
        }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int8 => formatter.write_str("int8"),
            Self::Fp8 => formatter.write_str("fp8"),
            Self::Int4 { group } => write!(formatter, "int4-g{group}"),
        }
    }
}

impl FromStr for Quantization {
    type Err = UnknownQuantization;

    fn from_str(name: &str) -> Result<Self, UnknownQuantization> {
        match name {
            "int8" => Ok(Self::Int8),
            "fp8" => Ok(Self::Fp8),
            "int4" | "int4-g32" => Ok(Self::Int4 { group: 32 }),
            "int4-g64" => Ok(Self::Int4 { group: 64 }),
            "int4-g128" => Ok(Self::Int4 { group: 128 }),
            _ => Err(UnknownQuantization { name: name.into() }),
        }
    }
}

/// Fills `out`; what comes after it is padding.
fn fill(out: &mut [f32], values: impl Iterator<Item = f32>) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = value;
    }
}

/// Inputs that may share a scale.
const INT4_GROUPS: [usize; 3] = [32, 64, 128];

/// Bytes from which on threads are worth their start.
const SHARED_FROM: usize = 1 << 20;
