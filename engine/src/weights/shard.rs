//! Which part of a model one of several ranks computes with.
//!
//! As Megatron-LM cuts a layer (Shoeybi et al., 2019): query, key, value, gate and up by their outputs, so that a rank has whole
//! heads and features; output and down by their inputs, so that ranks meet twice a layer, to sum. The head is cut by
//! tokens. Norms are everybody's, and one rank has the embedding for all.

use std::ops::Range;

use crate::models::{ModelError, ModelSpec};

/// One of several ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which one, from 0.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
}

/// A matrix, and what of it is kept.
#[derive(Clone, Debug)]
pub(super) struct Part<'a> {
    /// Its name, for errors.
    pub(super) name: &'a str,
    /// Outputs and inputs of the whole.
    pub(super) shape: [usize; 2],
    /// Outputs that are kept.
    pub(super) rows: Range<usize>,
    /// Inputs that are kept.
    pub(super) columns: Range<usize>,
}

/// By what a matrix is cut.
#[derive(Clone, Debug)]
pub(super) enum Cut {
    /// These outputs, and their biases.
    Outputs(Range<usize>),
    /// These inputs. Biases are the first rank's, or they would be added more than once.
    Inputs(Range<usize>),
}

impl Shard {
    /// Everything.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// All of so many.
    pub fn all(ranks: usize) -> impl Iterator<Item = Self> {
        (0..ranks).map(move |rank| Self { rank, ranks })
    }

    /// Why a model cannot be shared by so many ranks; `None` when it can.
    pub fn refusal(ranks: usize, spec: &ModelSpec) -> Option<String> {
        let ModelSpec { heads, kv_heads, intermediate_size, vocab_size, .. } = *spec;
        let because = |what: String| Some(format!("--tensor-parallel-size {ranks} {what}"));
        if ranks == 0 {
            return because("leaves nobody to compute".into());
        }
        if !heads.is_multiple_of(ranks) {
            return because(format!("does not divide the model's {heads} query heads"));
        }
        if !kv_heads.is_multiple_of(ranks) && !ranks.is_multiple_of(kv_heads) {
            return because(format!(
                "neither divides the model's {kv_heads} key/value heads nor is a multiple of them"
            ));
        }
        if intermediate_size < ranks {
            return because(format!(
                "is more than the model's {intermediate_size} features between gate and down"
            ));
        }
        if vocab_size < ranks {
            return because(format!("is more than the model's {vocab_size} tokens"));
        }
        None
    }

    /// Query heads of this rank.
    pub fn heads(self, whole: &ModelSpec) -> Range<usize> {
        self.of(whole.heads)
    }

    /// KV heads of this rank: where there are fewer than ranks, neighbours have the same one.
    pub fn kv_heads(self, whole: &ModelSpec) -> Range<usize> {
        let first = self.rank * whole.kv_heads / self.ranks;
        first..first + whole.kv_heads.div_ceil(self.ranks)
    }

    /// Whether this rank stores the keys and values of its heads: the first of those that have the same one does.
    pub fn stores_kv(self, whole: &ModelSpec) -> bool {
        self.rank == 0 || (self.rank * whole.kv_heads).is_multiple_of(self.ranks)
    }

    /// Tokens of the vocabulary whose logits this rank computes.
    pub fn vocabulary(self, whole: &ModelSpec) -> Range<usize> {
        let first = |rank: usize| rank * whole.vocab_size / self.ranks;
        first(self.rank)..first(self.rank + 1)
    }

    /// The shape of what this rank computes. The vocabulary stays whole: any token can be asked for.
    pub fn spec(self, whole: &ModelSpec) -> ModelSpec {
        ModelSpec {
            heads: self.heads(whole).len(),
            kv_heads: self.kv_heads(whole).len(),
            intermediate_size: self.features(whole).len(),
            ..whole.clone()
        }
    }

    /// This rank's of what divides evenly.
    fn of(self, count: usize) -> Range<usize> {
        let each = count / self.ranks;
        self.rank * each..(self.rank + 1) * each
    }

    pub(super) fn query(self, whole: &ModelSpec) -> Range<usize> {
        elements(self.heads(whole), whole.head_size)
    }

    pub(super) fn key_or_value(self, whole: &ModelSpec) -> Range<usize> {
        elements(self.kv_heads(whole), whole.head_size)
    }

    /// Features between gate and down: whole granules, so that groups of few bits are not cut.
    pub(super) fn features(self, whole: &ModelSpec) -> Range<usize> {
        let all = whole.intermediate_size;
        let granule = GRANULES.into_iter().find(|granule| granule * self.ranks <= all).unwrap_or(1);
        let first = |rank: usize| (rank * all.div_ceil(granule) / self.ranks * granule).min(all);
        first(self.rank)..first(self.rank + 1)
    }
}

impl<'a> Part<'a> {
    pub(super) fn new(name: &'a str, shape: [usize; 2], cut: &Cut) -> Self {
        let [rows, columns] = shape;
        match cut {
            Cut::Outputs(rows) => Self { name, shape, rows: rows.clone(), columns: 0..columns },
            Cut::Inputs(columns) => Self { name, shape, rows: 0..rows, columns: columns.clone() },
        }
    }

    /// Whether inputs are left out.
    pub(super) fn is_of_inputs(&self) -> bool {
        self.columns.len() < self.shape[1]
    }

    /// Says that ranks cannot have whole groups of so many inputs.
    pub(super) fn refused(&self, size: usize) -> ModelError {
        ModelError::Shared {
            tensor: self.name.into(),
            reason: format!("the {} inputs of a rank are no whole groups of {size}", self.columns.len()),
        }
    }

    /// Whether groups of so many inputs are kept or left out whole.
    pub(super) fn has_groups_of(&self, size: usize) -> bool {
        let Range { start, end } = self.columns;
        start.is_multiple_of(size) && (end.is_multiple_of(size) || end == self.shape[1])
    }
}

/// Groups of int4, the largest first.
const GRANULES: [usize; 3] = [128, 64, 32];

fn elements(heads: Range<usize>, head_size: usize) -> Range<usize> {
    heads.start * head_size..heads.end * head_size
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(heads: usize, kv_heads: usize, intermediate_size: usize) -> ModelSpec {
        let config = format!(
            r#"{{"architectures": ["LlamaForCausalLM"], "vocab_size": 1001, "hidden_size": {}, "num_hidden_layers": 1,
            "intermediate_size": {intermediate_size}, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads},
            "max_position_embeddings": 64}}"#,
            heads * 8
        );
        ModelSpec::parse("config.json", config.as_bytes()).expect("a config")
    }

    #[test]
    fn what_cannot_be_shared_is_refused_with_the_number() {
        #[rustfmt::skip]
        let rows = [
            ("one rank",                        1, spec(7, 7, 13), None),
            ("as many as KV heads",             2, spec(8, 2, 64), None),
            ("more than KV heads",              8, spec(8, 2, 64), None),
            ("heads that do not divide",        4, spec(6, 2, 64), Some("does not divide the model's 6 query heads")),
            ("KV heads neither way",            4, spec(12, 6, 64), Some("neither divides the model's 6 key/value heads")),
            ("features that do not divide",     4, spec(8, 4, 66), None),
            ("fewer features than ranks",       8, spec(8, 4, 7), Some("is more than the model's 7 features")),
            ("none",                            0, spec(8, 4, 66), Some("nobody")),
        ];
        for (name, ranks, spec, expected) in rows {
            let refusal = Shard::refusal(ranks, &spec);
            match (&refusal, expected) {
                (None, None) => {}
                (Some(text), Some(part)) => {
                    assert!(text.contains(part), "{name}: {text}");
                    assert!(text.starts_with(&format!("--tensor-parallel-size {ranks} ")), "{name}: {text}");
                }
                _ => panic!("{name}: {refusal:?}"),
            }
        }
    }

    #[test]
    fn features_are_cut_between_groups() {
        #[rustfmt::skip]
        let rows: [(usize, usize, &[usize]); 6] = [
            (14336, 4, &[3584, 3584, 3584, 3584]),
            (11008, 4, &[2688, 2816, 2688, 2816]),
            (8960,  2, &[4480, 4480]),
            (112,   2, &[64, 48]),
            (96,    2, &[32, 64]),
            (96,    4, &[24, 24, 24, 24]),
        ];
        for (all, ranks, expected) in rows {
            let spec = spec(8, 8, all);
            let found: Vec<usize> = Shard::all(ranks).map(|it| it.features(&spec).len()).collect();
            assert_eq!(found, expected, "{all} among {ranks}");
        }
    }

    #[test]
    fn every_head_feature_and_token_has_a_rank() {
        for (ranks, spec) in
            [(1, spec(8, 4, 64)), (2, spec(8, 4, 64)), (4, spec(8, 4, 64)), (8, spec(8, 2, 64))]
        {
            let all: Vec<Shard> = Shard::all(ranks).collect();
            let joined = |part: &dyn Fn(Shard) -> Range<usize>| {
                all.iter().flat_map(|it| part(*it)).collect::<Vec<_>>()
            };
            assert_eq!(joined(&|it| it.heads(&spec)), (0..spec.heads).collect::<Vec<_>>());
            assert_eq!(joined(&|it| it.features(&spec)), (0..spec.intermediate_size).collect::<Vec<_>>());
            assert_eq!(joined(&|it| it.vocabulary(&spec)), (0..spec.vocab_size).collect::<Vec<_>>());
            let stored = all.iter().filter(|it| it.stores_kv(&spec)).flat_map(|it| it.kv_heads(&spec));
            assert_eq!(
                stored.collect::<Vec<_>>(),
                (0..spec.kv_heads).collect::<Vec<_>>(),
                "each is stored once"
            );
            let group = spec.heads / spec.kv_heads;
            for shard in all {
                let (heads, kv_heads) = (shard.heads(&spec), shard.kv_heads(&spec));
                let read = heads.start / group..(heads.end - 1) / group + 1;
                assert_eq!(read, kv_heads, "{shard:?} has what its queries read");
                let own = shard.spec(&spec);
                assert_eq!((own.heads, own.kv_heads), (heads.len(), kv_heads.len()));
            }
        }
    }
}
