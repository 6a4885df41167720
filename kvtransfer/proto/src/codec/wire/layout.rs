//! The meaning of bytes on the wire.

use super::{from_wire_number, malformed, narrow};
use crate::codec::CodecError;
use crate::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use crate::units::BlockLen;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Layout {
    #[prost(string, tag = "1")]
    model: String,
    #[prost(uint32, tag = "2")]
    layers: u32,
    #[prost(uint32, tag = "3")]
    kv_heads: u32,
    #[prost(uint32, tag = "4")]
    first_head: u32,
    #[prost(uint32, tag = "5")]
    head_count: u32,
    #[prost(uint32, tag = "6")]
    head_size: u32,
    #[prost(uint32, tag = "7")]
    dtype: u32,
    #[prost(uint32, tag = "8")]
    block_len: u32,
    #[prost(uint32, tag = "9")]
    order: u32,
}

impl From<KvLayout> for Layout {
    fn from(it: KvLayout) -> Self {
        let dtype = DTYPES.iter().position(|&dtype| dtype == it.dtype).expect("DTYPES lists them all");
        let order = ORDERS.iter().position(|&order| order == it.order).expect("ORDERS lists them all");
        Self {
            model: it.model,
            layers: it.layers.into(),
            kv_heads: it.kv_heads.into(),
            first_head: it.heads.first.into(),
            head_count: it.heads.count.into(),
            head_size: it.head_size.into(),
            dtype: wire_number(dtype),
            block_len: it.block_len.tokens(),
            order: wire_number(order),
        }
    }
}

impl TryFrom<Layout> for KvLayout {
    type Error = CodecError;

    fn try_from(it: Layout) -> Result<Self, CodecError> {
        let heads = HeadRange {
            first: narrow(it.first_head, "first_head")?,
            count: narrow(it.head_count, "head_count")?,
        };
        let layout = Self {
            model: it.model,
            layers: narrow(it.layers, "layers")?,
            kv_heads: narrow(it.kv_heads, "kv_heads")?,
            heads,
            head_size: narrow(it.head_size, "head_size")?,
            dtype: from_wire_number(&DTYPES, it.dtype, "dtype")?,
            block_len: BlockLen::new(it.block_len)
                .filter(|len| len.tokens() <= MAX_BLOCK_LEN)
                .ok_or_else(|| malformed("block_len"))?,
            order: from_wire_number(&ORDERS, it.order, "order")?,
        };
        // What follows divides by sizes and multiplies them: keep it away from zero and from overflow.
        let zero = layout.layers == 0 || heads.count == 0 || layout.head_size == 0;
        if zero || heads.first.checked_add(heads.count).is_none_or(|end| layout.kv_heads < end) {
            return Err(malformed("layout"));
        }
        Ok(layout)
    }
}

fn wire_number(position: usize) -> u32 {
    u32::try_from(position).expect("a short list")
}

/// The position is the number on the wire: append only.
const DTYPES: [KvDtype; 5] = [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8];
/// The position is the number on the wire: append only.
const ORDERS: [AxisOrder; 2] = [AxisOrder::TokenHead, AxisOrder::HeadToken];
/// Keeps `layers * heads * head_size * block_len * 8` within 64 bits for any 16-bit fields.
const MAX_BLOCK_LEN: u32 = 1 << 12;
