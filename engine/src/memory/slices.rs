//! What of a block a rank has, where each rank keeps its heads in blocks of its own: the way from there to blocks with all heads,
//! which are what the host and peers have, and back.

use std::ops::Range;

use tidemill_kernels::kv::KvBlockShape;

/// Which bytes of whole blocks one rank's blocks have. Places are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeadSlices {
    /// Those of a layer, in the order of the rank's blocks.
    runs: Vec<Run>,
    /// From one layer to the next.
    whole_layer: usize,
    own_layer: usize,
}

/// Bytes that lie together in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    whole: usize,
    own: usize,
    bytes: usize,
}

/// The same bytes in both kinds of blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    /// In the whole block.
    pub(crate) whole: Range<usize>,
    /// In the rank's.
    pub(crate) own: Range<usize>,
}

impl HeadSlices {
    /// Of a rank whose blocks have this shape, and whose first head has this number in the whole ones.
    ///
    /// # Panics
    ///
    /// When the shapes are not of the same cache.
    pub(crate) fn new(whole: &KvBlockShape, own: &KvBlockShape, first_head: usize) -> Self {
        let fields = |it: &KvBlockShape| (it.dtype, it.layers, it.block_len, it.head_size);
        assert_eq!(fields(whole), fields(own), "blocks of one cache");
        let part = whole.of_heads(first_head, own.kv_heads);
        let mut runs = Vec::new();
        let (row, scale) = (own.head_size * own.dtype.bytes(), size_of::<f32>());
        for token in 0..own.block_len {
            for head in 0..own.kv_heads {
                let at = |place: fn(&KvBlockShape, usize, usize, usize) -> usize, bytes| Run {
                    whole: place(&part, 0, token, head),
                    own: place(own, 0, token, head),
                    bytes,
                };
                runs.extend([at(KvBlockShape::key_offset, row), at(KvBlockShape::value_offset, row)]);
                if own.dtype.has_scales() {
                    let places = [KvBlockShape::key_scale_offset, KvBlockShape::value_scale_offset];
                    runs.extend(places.map(|place| at(place, scale)));
                }
            }
        }
        runs.sort_unstable_by_key(|run| run.own);
        runs.dedup_by(|next, run| {
            let goes_on = run.own + run.bytes == next.own && run.whole + run.bytes == next.whole;
            run.bytes += if goes_on { next.bytes } else { 0 };
            goes_on
        });
        Self { runs, whole_layer: whole.layer_stride, own_layer: own.layer_stride }
    }

    /// Bytes of the rank's blocks that some layers are.
    pub(crate) const fn own(&self, layers: &Range<usize>) -> Range<usize> {
        layers.start * self.own_layer..layers.end * self.own_layer
    }

    /// All slices of some layers.
    pub(crate) fn of(&self, layers: Range<usize>) -> impl Iterator<Item = Slice> {
        layers.flat_map(move |layer| {
            self.runs.iter().map(move |run| {
                let (whole, own) = (layer * self.whole_layer + run.whole, layer * self.own_layer + run.own);
                Slice { whole: whole..whole + run.bytes, own: own..own + run.bytes }
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
    use tidemill_kvtransfer_proto::units::BlockLen;

    use super::*;
    use crate::memory::block_shape;

    fn layout(dtype: KvDtype, order: AxisOrder) -> KvLayout {
        KvLayout {
            model: String::new(),
            layers: 3,
            kv_heads: 6,
            heads: HeadRange { first: 0, count: 6 },
            head_size: 16,
            dtype,
            block_len: BlockLen::new(8).expect("a power of two"),
            order,
        }
    }

    #[test]
    fn ranks_have_all_rows_of_a_block_once_and_each_where_the_shapes_say() {
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8] {
            for order in [AxisOrder::TokenHead, AxisOrder::HeadToken] {
                let layout = layout(dtype, order);
                let whole = block_shape(&layout);
                let mut times = vec![0; whole.block_bytes()];
                for first in [0, 2, 4] {
                    let heads = HeadRange { first, count: 2 };
                    let own = block_shape(&KvLayout { heads, ..layout.clone() });
                    let slices = HeadSlices::new(&whole, &own, first.into());
                    // Each byte of a rank's block says where it belongs.
                    let mut place = vec![None; own.block_bytes()];
                    for slice in slices.of(0..3) {
                        assert_eq!(slice.whole.len(), slice.own.len());
                        for (whole, own) in slice.whole.zip(slice.own) {
                            times[whole] += 1;
                            assert_eq!(place[own].replace(whole), None);
                        }
                    }
                    for layer in 0..3 {
                        for (token, head) in (0..8).flat_map(|token| [(token, 0), (token, 1)]) {
                            let at = |shape: &KvBlockShape, head| {
                                [shape.key_offset(layer, token, head), shape.value_offset(layer, token, head)]
                            };
                            let of_whole = at(&whole, usize::from(first) + head);
                            for (own, whole) in at(&own, head).into_iter().zip(of_whole) {
                                assert_eq!(
                                    place[own],
                                    Some(whole),
                                    "{dtype:?}, {order:?}, head {first}+{head}"
                                );
                            }
                        }
                    }
                }
                let bytes =
                    2 * 3 * 6 * 8 * (16 * whole.dtype.bytes() + if whole.dtype.has_scales() { 4 } else { 0 });
                assert_eq!(times.iter().filter(|it| **it == 1).count(), bytes, "{dtype:?}, {order:?}");
                assert!(times.iter().all(|it| *it <= 1), "{dtype:?}, {order:?}");
            }
        }
    }

    #[test]
    fn what_lies_together_is_one_run() {
        for (order, runs) in [(AxisOrder::TokenHead, 2 * 8), (AxisOrder::HeadToken, 2)] {
            let layout = layout(KvDtype::Bf16, order);
            let whole = block_shape(&layout);
            let own = block_shape(&KvLayout { heads: HeadRange { first: 2, count: 2 }, ..layout });
            let slices = HeadSlices::new(&whole, &own, 2);
            assert_eq!(slices.of(1..2).count(), runs, "{order:?}");
            assert_eq!(slices.own(&(1..3)), own.layer_stride..3 * own.layer_stride);
        }
        let one = block_shape(&layout(KvDtype::Bf16, AxisOrder::TokenHead));
        assert_eq!(HeadSlices::new(&one, &one, 0).of(0..1).count(), 1, "one rank has all");
    }
}
