"""The fixture models as data: what each one's `config.json` says, how its weights are stored, what must matter in it.

Configurations are written as published models write them and not as transformers would save them, because the spelling
of the keys is part of what the engine reads. `trials` name single changes that must move the logits: a model whose
sliding window, rope scaling or bias does not matter within its prompts would prove nothing.
"""

from dataclasses import dataclass, field

import tiny_tokenizer

BEGIN_ID, END_ID, TURN_END_ID = 0, 1, 3
WINDOW = 32


@dataclass(frozen=True)
class Trial:
    """A change that must be seen in the logits after the longest prompt."""

    name: str
    config: dict = field(default_factory=dict)
    """Keys that replace those of the configuration; a key with the value `REMOVED` is taken out."""
    zeroed: str = ""
    """Weights whose name contains this are set to zero."""
    ones: str = ""
    """Weights whose name contains this are set to one."""


@dataclass(frozen=True)
class Variant:
    """One fixture model."""

    name: str
    config: dict
    trials: list[Trial]
    stored_as: str = "float32"
    shards: int = 1
    eos: int | list[int] = field(default_factory=lambda: [END_ID, TURN_END_ID])


REMOVED = object()


def base(architecture: str, model_type: str, **changes: object) -> dict:
    """Returns a configuration in the older spelling of its keys, with `changes`; what becomes `REMOVED` is left out."""
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_dropout": 0.0,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": TURN_END_ID,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 112,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": tiny_tokenizer.VOCAB_SIZE,
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not REMOVED}


def llama(**changes: object) -> dict:
    """Returns a Llama configuration."""
    return base("LlamaForCausalLM", "llama", **{"attention_bias": False, "mlp_bias": False, **changes})


def qwen(generation: int, **changes: object) -> dict:
    """Returns a configuration of Qwen's second or third generation: with a window that, unless changed, is not used."""
    window = {"sliding_window": WINDOW, "max_window_layers": 1, "use_sliding_window": False}
    return base(f"Qwen{generation}ForCausalLM", f"qwen{generation}", **{"rms_norm_eps": 1e-06, **window, **changes})


LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
YARN_SCALING = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "yarn"}
YARN_ALL_FIELDS = {
    **YARN_SCALING,
    "beta_fast": 8.0,
    "beta_slow": 2.0,
    "mscale": 1.2,
    "mscale_all_dim": 0.4,
    "rope_theta": 10000.0,
    "truncate": False,
}


def no_scaling(key: str = "rope_scaling") -> Trial:
    """Returns the trial that takes the rope scaling away."""
    return Trial("no rope scaling", {key: {"rope_type": "default", "rope_theta": 10000.0}})


VARIANTS = [
    Variant(
        "llama2",
        llama(num_key_value_heads=4, pretraining_tp=1, rope_scaling=None),
        [Trial("another rope base", {"rope_theta": 20000.0}), Trial("no attention", zeroed="o_proj")],
        eos=END_ID,
    ),
    Variant(
        "llama3",
        llama(rope_theta=500000.0, rope_scaling=LLAMA3_SCALING, tie_word_embeddings=True, head_dim=16),
        [
            Trial("no rope scaling", {"rope_scaling": None}),
            Trial("another low factor", {"rope_scaling": {**LLAMA3_SCALING, "low_freq_factor": 2.0}}),
            Trial("another high factor", {"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 8.0}}),
        ],
    ),
    Variant(
        "llama-linear",
        llama(rope_scaling={"type": "linear", "factor": 4.0}, tie_word_embeddings=True),
        [no_scaling(), Trial("another factor", {"rope_scaling": {"type": "linear", "factor": 3.0}})],
    ),
    Variant(
        "llama-yarn",
        llama(rope_scaling=YARN_SCALING, tie_word_embeddings=True),
        [no_scaling(), Trial("no attention factor", {"rope_scaling": {**YARN_SCALING, "attention_factor": 1.0}})],
    ),
    Variant(
        "llama-yarn-all-fields",
        llama(rope_theta=REMOVED, rope_parameters=YARN_ALL_FIELDS, tie_word_embeddings=True),
        [no_scaling("rope_parameters")]
        + [
            Trial(f"another {key}", {"rope_parameters": {**YARN_ALL_FIELDS, key: value}})
            for key, value in {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "truncate": True,
            }.items()
        ],
    ),
    Variant(
        "mistral",
        base("MistralForCausalLM", "mistral", sliding_window=WINDOW),
        [Trial("no window", {"sliding_window": None}), Trial("a window longer by one", {"sliding_window": WINDOW + 1})],
        eos=END_ID,
    ),
    Variant(
        "qwen2",
        # More rows in the embedding than the tokenizer has tokens, as published: greedy tokens may have no text.
        qwen(2, rope_theta=1000000.0, tie_word_embeddings=True, vocab_size=304),
        [
            Trial("no biases", zeroed="bias"),
            Trial("the window used", {"use_sliding_window": True, "max_window_layers": 0}),
        ],
    ),
    Variant(
        "qwen2-window",
        qwen(2, use_sliding_window=True),
        [
            Trial("no window", {"use_sliding_window": False}),
            Trial("the window in every layer", {"max_window_layers": 0}),
            Trial("a window longer by one", {"sliding_window": WINDOW + 1}),
        ],
    ),
    Variant(
        "qwen3",
        qwen(3, head_dim=32, rope_theta=1000000.0, rope_scaling=None, attention_bias=False, tie_word_embeddings=True),
        [Trial("no scale in the query norm", ones="q_norm"), Trial("no scale in the key norm", ones="k_norm")],
    ),
    Variant(
        "qwen3-yarn",
        qwen(
            3,
            head_dim=32,
            attention_bias=True,
            rope_theta=REMOVED,
            rope_parameters={**YARN_SCALING, "rope_theta": 10000.0, "attention_factor": 1.3},
            torch_dtype=REMOVED,
            dtype="bfloat16",
        ),
        [
            Trial("no biases", zeroed="bias"),
            no_scaling("rope_parameters"),
            Trial("the default attention factor", {"rope_parameters": {**YARN_SCALING, "rope_theta": 10000.0}}),
        ],
        stored_as="bfloat16",
    ),
    Variant(
        "llama-bias",
        llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        [Trial(f"no {part} bias", zeroed=f"{part}_proj.bias") for part in ["q", "k", "v", "o", "gate", "up", "down"]],
    ),
    Variant(
        "llama-sharded",
        llama(num_hidden_layers=3, torch_dtype="bfloat16"),
        [Trial("no third layer", zeroed="layers.2.")],
        stored_as="bfloat16",
        shards=3,
    ),
    Variant(
        "llama-bf16-new-keys",
        llama(
            rope_theta=REMOVED,
            rope_parameters={**LLAMA3_SCALING, "rope_theta": 500000.0},
            torch_dtype=REMOVED,
            dtype="bfloat16",
        ),
        [
            Trial("no rope scaling", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
            Trial("the default rope base", {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 10000.0}}),
        ],
        stored_as="bfloat16",
    ),
    Variant(
        "llama-f16-old-keys",
        llama(
            rope_theta=500000.0,
            rope_scaling={**LLAMA3_SCALING, "type": "llama3"},
            torch_dtype="float16",
            tie_word_embeddings=REMOVED,
        ),
        [Trial("no rope scaling", {"rope_scaling": None}), Trial("the default rope base", {"rope_theta": 10000.0})],
        stored_as="float16",
    ),
]

UNKNOWN = {
    "architectures": ["FooForCausalLM"],
    "model_type": "foo",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": tiny_tokenizer.VOCAB_SIZE,
}
