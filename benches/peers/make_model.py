"""Writes a Llama model of a known shape with random weights, as every engine reads it.

The weights are spread so that activations neither vanish nor overflow; speed does not depend on them otherwise. The
tokenizer knows single bytes; the rest of its vocabulary is there so that every token that a model emits has a text.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

SHAPES = {
    "llama-tiny": dict(vocab=8192, hidden=256, inner=1024, layers=9, heads=4, kv_heads=2, tied=True),
    "llama-0.4b": dict(vocab=32000, hidden=896, inner=4864, layers=24, heads=14, kv_heads=2, tied=True),
    "llama-1.1b": dict(vocab=32000, hidden=2048, inner=5632, layers=22, heads=32, kv_heads=4, tied=False),
}
SPECIAL = ["<|unk|>", "<|begin|>", "<|end|>"]


def config(shape):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inner"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shape["tied"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def tensors(shape):
    """Names and shapes, in the order of a checkpoint."""
    hidden, inner = shape["hidden"], shape["inner"]
    kv = hidden // shape["heads"] * shape["kv_heads"]
    yield "model.embed_tokens.weight", (shape["vocab"], hidden)
    for layer in range(shape["layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not shape["tied"]:
        yield "lm_head.weight", (shape["vocab"], hidden)


def weights(shape, seed):
    generator = np.random.default_rng(seed)
    made = {}
    for name, size in tensors(shape):
        if len(size) == 1:
            made[name] = torch.ones(size, dtype=torch.bfloat16)
            continue
        reach = math.sqrt(3.0 / size[1])
        values = generator.random(size, dtype=np.float32) * (2 * reach) - reach
        made[name] = torch.from_numpy(values).to(torch.bfloat16)
    return made


def byte_texts():
    """The characters that byte-level tokenizers write bytes with (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def tokenizer(vocab):
    texts = SPECIAL + byte_texts()
    texts += [f"w{index}" for index in range(vocab - len(texts))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [
        dict(id=i, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for i, text in enumerate(SPECIAL)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: index for index, text in enumerate(texts)},
            "merges": [],
        },
    }


def make(name, folder, seed=0):
    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    write = lambda file, content: (folder / file).write_text(json.dumps(content, indent=1))
    write("config.json", config(shape))
    write("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write("tokenizer.json", tokenizer(shape["vocab"]))
    write(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": SPECIAL[0],
            "bos_token": SPECIAL[1],
            "eos_token": SPECIAL[2],
            "model_max_length": 8192,
        },
    )
    save_file(weights(shape, seed), folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("shape", choices=SHAPES)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--seed", type=int, default=0)
    typed = arguments.parse_args()
    make(typed.shape, typed.folder, typed.seed)
