//! How K and V lie inside one block, and what two layouts must share for one to be turned into the other.
//!
//! A block holds all layers, one after another, so that a finished layer (or group of layers) is one
//! contiguous range and a whole block of equal layout is one write:
//!
//! ```text
//! block      = layer 0 | layer 1 | …                       each padded to 64 bytes
//! layer      = K data | V data | K scales | V scales        scales only for Int8 and Fp8
//! K, V data  = [token][head][element]  or  [head][token][element]
//! scales     = f32, same two axes as the data, without the last
//! ```
//!
//! This is the only place that knows the order of these parts; the kernels get the strides that follow from it.

use crate::units::BlockLen;

/// The type of one stored element of K or V.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum KvDtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Signed 8-bit with one f32 scale per token and head: `value = scale * stored`.
    Int8,
    /// Floating point of 8 bits (E4M3) with one f32 scale per token and head, a power of two: `value = scale * stored`.
    Fp8,
}

/// Which of the two middle axes of a layer comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AxisOrder {
    /// `[token][head][element]`, also written NHD.
    TokenHead,
    /// `[head][token][element]`, also written HND: one head's tokens are contiguous.
    HeadToken,
}

/// The KV heads that one tensor-parallel rank holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeadRange {
    /// The first head held.
    pub first: u16,
    /// How many heads are held. Never zero.
    pub count: u16,
}

/// Everything that decides the meaning of the bytes of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Fingerprint of the model's weights and configuration: equal text means equal K and V for equal tokens.
    pub model: String,
    /// Number of decoder layers.
    pub layers: u16,
    /// KV heads of the whole model.
    pub kv_heads: u16,
    /// Which of them this worker holds.
    pub heads: HeadRange,
    /// Elements per head.
    pub head_size: u16,
    /// Stored type.
    pub dtype: KvDtype,
    /// Tokens per block.
    pub block_len: BlockLen,
    /// Order of the token and head axes.
    pub order: AxisOrder,
}

/// Distances in bytes inside a block, derived from a [`KvLayout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStrides {
    /// From one layer to the next.
    pub layer: usize,
    /// From a layer's start to its V data; K data is at the start.
    pub value_offset: usize,
    /// From a layer's start to its K scales (equal to `layer` when there are none).
    pub key_scale_offset: usize,
    /// From a layer's start to its V scales.
    pub value_scale_offset: usize,
    /// From one token to the next in K or V data.
    pub token: usize,
    /// From one head to the next in K or V data.
    pub head: usize,
    /// From one token to the next in scales.
    pub scale_token: usize,
    /// From one head to the next in scales.
    pub scale_head: usize,
}

/// How a sender gets from its layout to the receiver's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bridge {
    /// Equal in every byte: ranges are written as they are.
    Identical,
    /// Gather and convert into a staging slab, then write. `lossless` is false when the stored type loses bits.
    Convert {
        /// Whether every stored value survives unchanged.
        lossless: bool,
    },
}

/// The first field in which two layouts differ so that no conversion can help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("KV layouts cannot be bridged: {field} is {ours} here and {theirs} at the peer")]
pub struct LayoutMismatch {
    /// Name of the field.
    pub field: &'static str,
    /// Its value on this side.
    pub ours: String,
    /// Its value at the peer.
    pub theirs: String,
}

impl KvDtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 | Self::Fp8 => 1,
        }
    }

    /// Whether elements carry a scale.
    pub const fn has_scales(self) -> bool {
        matches!(self, Self::Int8 | Self::Fp8)
    }

    /// Whether every value of `self` is a value of `to`.
    pub const fn embeds_in(self, to: Self) -> bool {
        matches!(
            (self, to),
            (Self::F32, Self::F32)
                | (Self::F16, Self::F16 | Self::F32)
                | (Self::Bf16, Self::Bf16 | Self::F32)
                | (Self::Int8, Self::Int8)
                // bf16 has three bits of fraction and their scale; f16 has not all scales.
                | (Self::Fp8, Self::Fp8 | Self::Bf16 | Self::F32)
        )
    }

    /// The name used by flags, logs and errors.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        }
    }
}

impl AxisOrder {
    /// The name used by flags, logs and errors.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TokenHead => "token-head",
            Self::HeadToken => "head-token",
        }
    }
}

impl KvLayout {
    /// Where each part of a block lies.
    pub fn strides(&self) -> BlockStrides {
        let tokens = self.block_len.tokens() as usize;
        let heads = usize::from(self.heads.count);
        let row = usize::from(self.head_size) * self.dtype.bytes();
        let scale = if self.dtype.has_scales() { SCALE_BYTES } else { 0 };
        let (token, head) = match self.order {
            AxisOrder::TokenHead => (heads, 1),
            AxisOrder::HeadToken => (1, tokens),
        };
        let data = tokens * heads * row;
        let scales = tokens * heads * scale;
        BlockStrides {
            layer: (2 * data + 2 * scales).next_multiple_of(LAYER_ALIGNMENT),
            value_offset: data,
            key_scale_offset: 2 * data,
            value_scale_offset: 2 * data + scales,
            token: token * row,
            head: head * row,
            scale_token: token * scale,
            scale_head: head * scale,
        }
    }

    /// Bytes of one block: all layers, padding included.
    pub fn block_bytes(&self) -> usize {
        self.strides().layer * usize::from(self.layers)
    }

    /// Whether blocks of this layout can be turned into blocks of `to`, and how.
    ///
    /// # Errors
    ///
    /// [`LayoutMismatch`] names the first field that no conversion can bridge.
    pub fn bridge(&self, to: &Self) -> Result<Bridge, LayoutMismatch> {
        let differs = |field, ours: &dyn ToString, theirs: &dyn ToString| {
            Err(LayoutMismatch { field, ours: ours.to_string(), theirs: theirs.to_string() })
        };
        if self.model != to.model {
            return differs("model", &self.model, &to.model);
        }
        if self.layers != to.layers {
            return differs("layers", &self.layers, &to.layers);
        }
        if self.kv_heads != to.kv_heads {
            return differs("kv_heads", &self.kv_heads, &to.kv_heads);
        }
        if self.head_size != to.head_size {
            return differs("head_size", &self.head_size, &to.head_size);
        }
        if !self.heads.contains(to.heads) {
            // One sender fills a reservation, so it must have all that the reservation is for.
            return differs("heads", &self.heads.to_text(), &to.heads.to_text());
        }
        if self.dtype.has_scales() && to.dtype != self.dtype {
            // Widening 8 bits would hand decode worse numbers than its layout promises, without a trace.
            return differs("dtype", &self.dtype.name(), &to.dtype.name());
        }
        if self == to {
            return Ok(Bridge::Identical);
        }
        Ok(Bridge::Convert { lossless: self.dtype.embeds_in(to.dtype) })
    }
}

impl HeadRange {
    /// Whether all of `other` is held.
    pub fn contains(self, other: Self) -> bool {
        let end = |it: Self| u32::from(it.first) + u32::from(it.count);
        self.first <= other.first && end(other) <= end(self)
    }

    fn to_text(self) -> String {
        format!("{}..{}", self.first, self.first + self.count)
    }
}

/// Bytes of one scale.
pub const SCALE_BYTES: usize = 4;

/// Layers start on a cache line, so that vector loads of K and V never split one.
pub const LAYER_ALIGNMENT: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> KvLayout {
        KvLayout {
            model: "m".into(),
            layers: 3,
            kv_heads: 2,
            heads: HeadRange { first: 0, count: 2 },
            head_size: 16,
            dtype: KvDtype::Bf16,
            block_len: BlockLen::new(16).expect("a power of two"),
            order: AxisOrder::TokenHead,
        }
    }

    #[test]
    fn strides_follow_from_the_fields() {
        let token_head = layout().strides();
        assert_eq!((token_head.token, token_head.head), (64, 32));
        assert_eq!(token_head.value_offset, 16 * 64);
        assert_eq!(token_head.layer, 2 * 16 * 64);
        let head_token = KvLayout { order: AxisOrder::HeadToken, ..layout() }.strides();
        assert_eq!((head_token.token, head_token.head), (32, 16 * 32));
        let int8 = KvLayout { dtype: KvDtype::Int8, ..layout() }.strides();
        assert_eq!(int8.key_scale_offset, 2 * 16 * 32);
        assert_eq!(int8.layer, 2 * 16 * 32 + 2 * 16 * 2 * 4);
    }

    #[test]
    fn bridges() {
        let other = |change: fn(&mut KvLayout)| {
            let mut layout = layout();
            change(&mut layout);
            layout
        };
        let lossless = Ok(Bridge::Convert { lossless: true });
        let lossy = Ok(Bridge::Convert { lossless: false });
        #[rustfmt::skip]
        let rows = [
            ("equal layouts need nothing",        other(|_| {}),                                        Ok(Bridge::Identical)),
            ("block length converts",             other(|l| l.block_len = BlockLen::new(64).unwrap()),  lossless),
            ("axis order converts",               other(|l| l.order = AxisOrder::HeadToken),            lossless),
            ("bf16 widens to f32 unchanged",      other(|l| l.dtype = KvDtype::F32),                    lossless),
            ("one rank of two gets its heads",    other(|l| l.heads = HeadRange { first: 1, count: 1 }), lossless),
            ("bf16 to f16 may lose bits",         other(|l| l.dtype = KvDtype::F16),                    lossy),
            ("bf16 to int8 loses bits",           other(|l| l.dtype = KvDtype::Int8),                   lossy),
            ("bf16 to fp8 loses bits",            other(|l| l.dtype = KvDtype::Fp8),                    lossy),
            ("another model is refused by name",  other(|l| l.model = "n".into()),                      Err("model")),
            ("another depth is refused by name",  other(|l| l.layers = 4),                              Err("layers")),
            ("another head size is refused",      other(|l| l.head_size = 32),                          Err("head_size")),
            ("heads that are not here",           other(|l| l.heads = HeadRange { first: 1, count: 2 }), Err("heads")),
        ];
        for (name, to, expected) in rows {
            assert_eq!(layout().bridge(&to).map_err(|mismatch| mismatch.field), expected, "{name}");
        }
        let all = [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8];
        for (from, to) in [KvDtype::Int8, KvDtype::Fp8].into_iter().flat_map(|from| all.map(|to| (from, to)))
        {
            let expected = if from == to { Ok(Bridge::Identical) } else { Err("dtype") };
            let (from, to) = (KvLayout { dtype: from, ..layout() }, KvLayout { dtype: to, ..layout() });
            assert_eq!(
                from.bridge(&to).map_err(|mismatch| mismatch.field),
                expected,
                "8 bits stay what they are"
            );
        }
    }
}
