//! What tells one family of decoders from another, as data.
//!
//! Each row repeats what transformers does for the architecture, including the values it assumes for absent fields. A
//! new family of the same skeleton is a new row.

/// How a family's decoder differs from the skeleton.
#[derive(Debug)]
pub(super) struct Family {
    /// The name in `architectures`.
    pub(super) architecture: &'static str,
    /// Bias of the query, key and value projections.
    pub(super) qkv_bias: Switch,
    /// Bias of the attention's output projection.
    pub(super) output_bias: Switch,
    /// Biases of the feed-forward projections.
    pub(super) mlp_bias: Switch,
    /// Whether each head of query and key is normalised before it turns.
    pub(super) qk_norm: bool,
    /// Which layers see only the last tokens.
    pub(super) window: WindowRule,
    /// Elements per head when `head_dim` is absent; `None` divides the hidden size among the heads.
    pub(super) head_size: Option<u32>,
    /// KV heads when `num_key_value_heads` is absent; `None` takes one per query head.
    pub(super) kv_heads: Option<u32>,
}

/// Whether a part is there.
#[derive(Clone, Copy, Debug)]
pub(super) enum Switch {
    /// In every model of the family.
    On,
    /// In none.
    Off,
    /// Where this field is true; absent means false.
    Field(&'static str),
}

/// Which layers see only the last `sliding_window` tokens.
#[derive(Clone, Copy, Debug)]
pub(super) enum WindowRule {
    /// None; the field is ignored.
    Never,
    /// All, unless `sliding_window` is null.
    EveryLayer,
    /// Where `use_sliding_window` is true: those that `layer_types` names, or from `max_window_layers` on.
    NamedLayers,
}

/// Every family that can be loaded.
pub(super) const FAMILIES: [Family; 4] = [
    Family {
        architecture: "LlamaForCausalLM",
        qkv_bias: Switch::Field("attention_bias"),
        output_bias: Switch::Field("attention_bias"),
        mlp_bias: Switch::Field("mlp_bias"),
        qk_norm: false,
        window: WindowRule::Never,
        head_size: None,
        kv_heads: None,
    },
    Family {
        architecture: "MistralForCausalLM",
        qkv_bias: Switch::Off,
        output_bias: Switch::Off,
        mlp_bias: Switch::Off,
        qk_norm: false,
        window: WindowRule::EveryLayer,
        head_size: None,
        kv_heads: Some(8),
    },
    Family {
        architecture: "Qwen2ForCausalLM",
        qkv_bias: Switch::On,
        output_bias: Switch::Off,
        mlp_bias: Switch::Off,
        qk_norm: false,
        window: WindowRule::NamedLayers,
        head_size: None,
        kv_heads: Some(32),
    },
    Family {
        architecture: "Qwen3ForCausalLM",
        qkv_bias: Switch::Field("attention_bias"),
        output_bias: Switch::Field("attention_bias"),
        mlp_bias: Switch::Off,
        qk_norm: true,
        window: WindowRule::NamedLayers,
        head_size: Some(128),
        kv_heads: Some(32),
    },
];

/// The families' names, for messages.
pub(super) fn supported() -> String {
    FAMILIES.each_ref().map(|family| family.architecture).join(", ")
}
