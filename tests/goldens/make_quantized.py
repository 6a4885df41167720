"""Writes `tests/fixtures/quantized/`: small random models in the formats of few bits, with what transformers computes from
the weights that the formats stand for.

Each format is written by its own makers' library where that runs without a GPU (`gguf`, `compressed-tensors`), by its
specification otherwise (GPTQ, AWQ, and the K types of GGUF, which `gguf` only reads). The weights are then taken back
from what was written, and a model of transformers computes with those in float32. Activations are not rounded there as
they are in the engine, so weights are drawn small enough for the difference to stay small, and from seed after seed until
no greedy token is a close call.

    python make_quantized.py                 every model
    python make_quantized.py awq gguf-k      only those named
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import gguf_tokenizers
import tiny_tokenizer
from variants import LLAMA3_SCALING, YARN_SCALING, llama, qwen

MODELS = tiny_tokenizer.FIXTURES / "quantized"
PROMPT_LENGTH = 20
GREEDY_TOKENS = 8
SMALLEST_GAP = 0.12
"""Between the best and the second logit, relative to the spread of the logits: several times the error of the engine."""
MOST_SEEDS = 2000

Weights = dict[str, torch.Tensor]
Stored = dict[str, torch.Tensor]


def main(names: list[str]) -> None:
    """Makes the named models, or all."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for name, (config, write) in VARIANTS.items():
        if not names or name in names:
            make(name, config, write)


def make(name: str, config: dict, write: Callable[[Path, dict, Weights], Weights]) -> None:
    """Writes the folder of one model, with the first seed whose greedy tokens are clear."""
    folder = MODELS / name
    for seed in range(MOST_SEEDS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**{**config, "dtype": "float32"}), attn_implementation="eager"
        )
        model = model.float().eval()
        weights = draw(model, seed)
        stands_for = write(folder, config, weights)
        assert stands_for.keys() == weights.keys()
        state = {**stands_for}
        if config["tie_word_embeddings"]:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, strict=True)
        prompt = torch.randint(config["vocab_size"], (PROMPT_LENGTH,), generator=torch.Generator().manual_seed(20))
        golden = compute(model, prompt.tolist())
        if golden is None:
            continue
        write_goldens(folder, golden, stands_for)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: seed {seed}, {size >> 10} KiB")
        return
    raise SystemExit(f"{name}: none of {MOST_SEEDS} seeds is good")


def draw(model: torch.nn.Module, seed: int) -> Weights:
    """Returns random weights that keep the size of activations: rows of a matrix have a length near one."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in sorted(model.state_dict().items()):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        normal = torch.randn(weight.shape, generator=random)
        if "norm" in name:
            weights[name] = 1.0 + 0.2 * normal
        elif name.endswith("bias"):
            weights[name] = 0.1 * normal
        else:
            weights[name] = normal / weight.shape[-1] ** 0.5
    return weights


@torch.no_grad()
def compute(model: torch.nn.Module, prompt: list[int]) -> dict | None:
    """Returns logits of all positions and the greedy tokens, or nothing if one of those was a close call."""
    tokens, all_logits = list(prompt), None
    for _ in range(GREEDY_TOKENS):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
        all_logits = logits if all_logits is None else all_logits
        best = logits[-1].topk(2)
        if best.values[0] - best.values[1] < SMALLEST_GAP * logits[-1].std():
            return None
        tokens.append(best.indices[0].item())
    return {"prompt": prompt, "greedy": tokens[len(prompt) :], "logits": all_logits}


def write_goldens(folder: Path, golden: dict, weights: Weights) -> None:
    """Writes what was computed, and some rows of what each matrix stands for."""
    tensors = {"logits": golden["logits"].contiguous()}
    for name, weight in weights.items():
        count = weight.shape[0]
        rows = [0, 1, count // 2 + 1, count - 1]
        tensors[f"rows.{name}"] = weight[rows].float().contiguous()
    save_file(tensors, folder / "goldens.safetensors")
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__, "gguf": "0.19.0"}
    text = {"made_with": made_with, "prompt": golden["prompt"], "greedy": golden["greedy"]}
    (folder / "goldens.json").write_text(json.dumps(text) + "\n")


# GGUF


def k_scales(values: np.ndarray, bits: int) -> tuple[np.ndarray, ...]:
    """Returns `d`, `dmin`, the 6-bit scales and least values and the steps of blocks `[blocks, 8, 32]`."""
    low = np.minimum(values.min(axis=2), 0.0)
    scale = (values.max(axis=2) - low) / (2**bits - 1)
    d = (scale.max(axis=1, keepdims=True) / 63).astype(np.float16)
    dmin = (-low.min(axis=1, keepdims=True) / 63).astype(np.float16)
    scales = np.clip(np.round(scale / d.astype(np.float32)), 1, 63).astype(np.uint8)
    least = np.clip(np.round(-low / np.maximum(dmin.astype(np.float32), 1e-8)), 0, 63).astype(np.uint8)
    real = d.astype(np.float32) * scales
    offset = dmin.astype(np.float32) * least
    steps = np.clip(np.round((values + offset[..., None]) / real[..., None]), 0, 2**bits - 1).astype(np.uint8)
    return d, dmin, scales, least, steps


def pack_k_scales(scales: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Returns the twelve bytes of a block that hold its scales and least values."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = least[:, :4] | (least[:, 4:] >> 4 << 6)
    third = (scales[:, 4:] & 15) | ((least[:, 4:] & 15) << 4)
    return np.concatenate([first, second, third], axis=1)


def quantize_k(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """Returns the bytes of a matrix in `Q4_K`, `Q5_K` or `Q6_K`."""
    rows, columns = weight.shape
    blocks = weight.astype(np.float32).reshape(-1, 256)
    if kind == Kind.Q6_K:
        groups = blocks.reshape(-1, 16, 16)
        scale = np.abs(groups).max(axis=2) / 31
        d = (scale.max(axis=1, keepdims=True) / 127).astype(np.float16)
        scales = np.clip(np.round(scale / d.astype(np.float32)), 1, 127).astype(np.int8)
        steps = np.round(groups / (d.astype(np.float32) * scales)[..., None])
        steps = (np.clip(steps, -32, 31).astype(np.int16) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
        low, high = steps & 15, steps >> 4
        ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
        qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
        parts = [ql.reshape(-1, 128), qh.reshape(-1, 64), scales.view(np.uint8), d.view(np.uint8)]
    else:
        d, dmin, scales, least, steps = k_scales(blocks.reshape(-1, 8, 32), 4 if kind == Kind.Q4_K else 5)
        pairs = (steps & 15).reshape(-1, 4, 2, 32)
        qs = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
        parts = [d.view(np.uint8), dmin.view(np.uint8), pack_k_scales(scales, least)]
        if kind == Kind.Q5_K:
            fifth = (steps >> 4).astype(np.uint8)
            parts.append(sum(fifth[:, group] << group for group in range(8)).astype(np.uint8))
        parts.append(qs)
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of query or key in the order of llama.cpp: what turns together lies together."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def in_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of query or key in the order of transformers."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Returns what a GGUF file calls a tensor."""
    stem, what = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{what}"
    return f"{GGUF_NAMES[stem]}.{what}"


def write_gguf(kinds: Callable[[str], Kind], tokenizer: Callable) -> Callable:
    """Returns what writes a model as GGUF, each matrix in the type that `kinds` gives to its name."""

    def write(folder: Path, config: dict, weights: Weights) -> Weights:
        family = config["model_type"]
        writer = gguf.GGUFWriter(folder / "model.gguf", family)
        writer.add_name(folder.name)
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_theta"])
        if "head_dim" in config:
            writer.add_key_length(config["head_dim"])
            writer.add_value_length(config["head_dim"])
        scaling = config.get("rope_scaling") or {}
        if scaling.get("rope_type") == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(scaling["factor"])
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        if scaling.get("rope_type") == "llama3":
            head_size = config["hidden_size"] // config["num_attention_heads"]
            writer.add_tensor("rope_freqs.weight", rope_factors(scaling, config["rope_theta"], head_size))
        tokenizer(writer)
        stands_for = {}
        for name, weight in weights.items():
            array = weight.numpy()
            heads = None
            if family == "llama" and ".q_proj." in name:
                heads = config["num_attention_heads"]
            if family == "llama" and ".k_proj." in name:
                heads = config["num_key_value_heads"]
            stored = in_pairs(array, heads) if heads else array
            kind = kinds(name) if array.ndim == 2 else Kind.F32
            if kind in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
                data = quantize_k(stored, kind)
            else:
                data = gguf.quantize(stored.astype(np.float32), kind)
            writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
            back = gguf.dequantize(data, kind).reshape(array.shape)
            assert np.abs(back - stored).max() <= 0.2 * np.abs(stored).max(), (name, kind)
            stands_for[name] = torch.from_numpy(in_halves(back, heads) if heads else back).clone()
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return stands_for

    return write


def rope_factors(scaling: dict, theta: float, head_size: int) -> np.ndarray:
    """Returns what each frequency is divided by, as files have it for rope scaling `llama3`."""
    frequencies = theta ** -(np.arange(0, head_size, 2) / head_size)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - kept) / factor + kept)).astype(np.float32)


# Formats of safetensors


def write_packed(quantization: dict, pack: Callable[[torch.Tensor], tuple[Stored, torch.Tensor]]) -> Callable:
    """Returns what writes a model as safetensors, each projection of a layer packed by `pack`."""

    def write(folder: Path, config: dict, weights: Weights) -> Weights:
        stored, stands_for = {}, {}
        for name, weight in weights.items():
            if name.endswith("_proj.weight"):
                parts, stands_for[name] = pack(weight)
                stem = name.removesuffix(".weight")
                stored.update({f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items()})
            else:
                stored[name] = weight.half()
                stands_for[name] = stored[name].float()
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps({**config, "quantization_config": quantization}, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n")
        return stands_for

    return write


def compressed_config(fmt: str, **weights: object) -> dict:
    """Returns a `quantization_config` of compressed-tensors."""
    weights = {"type": "int", "symmetric": True, "dynamic": False, "actorder": None, "group_size": None, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def grouped(weight: torch.Tensor, group: int, bits: int, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Returns unsigned steps `[outputs, inputs]`, scales and zero points `[outputs, groups]`."""
    parts = weight.reshape(weight.shape[0], -1, group)
    most, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        scales = (parts.abs().amax(2) / (most / 2)).half().float()
        zeros = torch.full_like(scales, middle)
    else:
        low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
        scales = ((high - low) / most).half().float()
        zeros = (-low / scales).round().clamp(0, most)
    steps = (parts / scales[..., None] + zeros[..., None]).round().clamp(0, most)
    return steps.reshape(weight.shape).int(), scales, zeros.int()


def values(steps: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Returns what the steps stand for; `groups` names the group of each input."""
    return (steps - zeros[:, groups]).float() * scales[:, groups]


def in_order(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Returns the group of each input where they follow one another."""
    return torch.arange(weight.shape[1]) // group


def words(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the rows of `fields`, so many in each whole number of 32 bits, the first in the lowest bits."""
    per_word = 32 // bits
    parts = fields.long().reshape(-1, per_word, fields.shape[1])
    packed = sum(parts[:, index] << (bits * index) for index in range(per_word))
    return torch.where(packed < 2**31, packed, packed - 2**32).int()


def pack_int8(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """int8 with a scale per output, as compressed-tensors has it."""
    steps, scales, zeros = grouped(weight, weight.shape[1], 8, symmetric=True)
    real = values(steps, scales, zeros, in_order(weight, weight.shape[1]))
    return {"weight": (steps - 128).to(torch.int8), "weight_scale": scales.half()}, real


def pack_compressed(group: int, symmetric: bool) -> Callable:
    """Returns what packs 4 bits in groups, as compressed-tensors has it."""

    def pack(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        steps, scales, zeros = grouped(weight, group, 4, symmetric)
        parts = {
            "weight_packed": pack_to_int32((steps - 8).to(torch.int8), 4),
            "weight_scale": scales.half(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = pack_to_int32((zeros - 8).to(torch.int8), 4, packed_dim=0)
        return parts, values(steps, scales, zeros, in_order(weight, group))

    return pack


def pack_gptq(bits: int, group: int, symmetric: bool, shuffled: bool = False) -> Callable:
    """Returns what packs as GPTQ does; `shuffled` gives each input a group of its own choice."""

    def pack(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        size = weight.shape[1] if group == -1 else group
        groups = in_order(weight, size)
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(3)) if shuffled else None
        steps, scales, zeros = grouped(weight if order is None else weight[:, order], size, bits, symmetric)
        if order is not None:
            back = order.argsort()
            steps, groups = steps[:, back], groups[back]
        parts = {
            "qweight": words(steps.T, bits),
            "qzeros": words(((zeros - 1) % 2**bits), bits).T,
            "scales": scales.T.half(),
            "g_idx": groups.int(),
        }
        return parts, values(steps, scales, zeros, groups)

    return pack


def gptq_config(bits: int, group: int, symmetric: bool, shuffled: bool = False) -> dict:
    """Returns a `quantization_config` of GPTQ."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": shuffled,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }


def pack_awq(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """4 bits in groups of 32 with zero points, as AWQ has it for GEMM."""
    steps, scales, zeros = grouped(weight, 32, 4, symmetric=False)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def pack(fields: torch.Tensor) -> torch.Tensor:
        return words(fields.reshape(-1, 8, fields.shape[1])[:, order].reshape(fields.shape), 4).T

    parts = {"qweight": pack(steps), "qzeros": pack(zeros), "scales": scales.T.half()}
    return parts, values(steps, scales, zeros, in_order(weight, 32))


def second_layer(first: Kind, second: dict[str, Kind], tables: Kind) -> Callable[[str], Kind]:
    """Returns a type for each matrix: one for the first layer, one per projection for the second, one for the tables."""

    def kind(name: str) -> Kind:
        if ".layers.0." in name:
            return first
        return next((kind for part, kind in second.items() if part in name), tables)

    return kind


SMALL = {"intermediate_size": 96, "num_hidden_layers": 1}
MIXED = {"q_proj": Kind.Q4_1, "k_proj": Kind.Q5_0, "v_proj": Kind.Q5_1, "o_proj": Kind.Q8_0, "mlp": Kind.Q4_0}
PLAIN = {"q_proj": Kind.F32, "k_proj": Kind.BF16, "v_proj": Kind.F32, "lm_head": Kind.BF16}
BIG = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
K = {"q_proj": Kind.Q4_K, "k_proj": Kind.Q4_K, "v_proj": Kind.Q6_K, "mlp.down": Kind.Q6_K, "mlp.gate": Kind.Q5_K}
GPTQ_SHUFFLED = (4, 32, False, True)
VARIANTS = {
    "gguf-q4_0": (
        llama(intermediate_size=96, rope_theta=10000.0, rope_scaling=LLAMA3_SCALING),
        write_gguf(second_layer(Kind.Q4_0, MIXED, Kind.Q8_0), gguf_tokenizers.byte_level("llama-bpe")),
    ),
    "gguf-q8_0": (
        qwen(2, **SMALL, tie_word_embeddings=True, rope_theta=1000000.0),
        write_gguf(lambda _: Kind.Q8_0, gguf_tokenizers.byte_level("qwen2")),
    ),
    "gguf-k": (
        qwen(3, **BIG, tie_word_embeddings=True, attention_bias=False),
        write_gguf(
            lambda name: next((kind for part, kind in {**K, "embed": Kind.Q6_K}.items() if part in name), Kind.Q4_K),
            gguf_tokenizers.byte_level("qwen2"),
        ),
    ),
    "gguf-plain": (
        llama(**SMALL, rope_scaling=YARN_SCALING, vocab_size=gguf_tokenizers.PIECES),
        write_gguf(
            lambda name: next((kind for part, kind in PLAIN.items() if part in name), Kind.F16),
            gguf_tokenizers.pieces,
        ),
    ),
    "compressed-int8": (
        llama(**SMALL),
        write_packed(compressed_config("int-quantized", num_bits=8, strategy="channel"), pack_int8),
    ),
    "compressed-int4": (
        llama(**SMALL, tie_word_embeddings=True),
        write_packed(
            compressed_config("pack-quantized", num_bits=4, strategy="group", group_size=32),
            pack_compressed(32, symmetric=True),
        ),
    ),
    "compressed-int4-zeros": (
        llama(**SMALL, tie_word_embeddings=True),
        write_packed(
            compressed_config("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
            pack_compressed(32, symmetric=False),
        ),
    ),
    "gptq-int4": (
        qwen(2, **SMALL, tie_word_embeddings=True),
        write_packed(gptq_config(4, 32, True), pack_gptq(4, 32, True)),
    ),
    "gptq-int4-order": (
        llama(**SMALL, tie_word_embeddings=True),
        write_packed(gptq_config(*GPTQ_SHUFFLED), pack_gptq(*GPTQ_SHUFFLED)),
    ),
    "gptq-int8": (
        llama(**SMALL, tie_word_embeddings=True),
        write_packed(gptq_config(8, -1, True), pack_gptq(8, -1, True)),
    ),
    "awq": (
        llama(**SMALL, tie_word_embeddings=True),
        write_packed(
            {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, pack_awq
        ),
    ),
}
"""The configuration of each model, and what writes it and returns the weights that it stands for."""


if __name__ == "__main__":
    main(sys.argv[1:])
