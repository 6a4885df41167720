"""Writes `tests/fixtures/models/`: small random models of every family, with what transformers computes from them.

For each variant it draws weights from seed after seed until the greedy continuations are varied and no step is so close
that the rounding of another implementation could choose another token. Everything is computed in float32 with eager
attention, also where the weights are stored in 16 bits: those are widened first.

    python make_models.py            every model
    python make_models.py mistral    only those named
"""

import copy
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import tiny_tokenizer
from variants import REMOVED, UNKNOWN, VARIANTS, Trial, Variant

MODELS = tiny_tokenizer.FIXTURES / "models"
GREEDY_TOKENS = 64
PROMPT_LENGTHS = [1, 15, 16, 17, 300]
ALL_POSITIONS_OF = 17
"""The prompt whose logits are stored for every position, the others for the last alone."""

SMALLEST_GAP = 2e-3
"""Between the best and the second logit at each greedy step: several times the error that parity allows."""
LARGEST_NOISE = 1e-5
"""Between float32 and float64, relative to the largest logit: a tenth of the error that parity allows."""
FEWEST_DISTINCT = 24
"""Different tokens among the greedy ones of each prompt."""
SMALLEST_EFFECT = 0.02
"""Largest change of a logit that a trial must cause."""
MOST_SEEDS = 400


class Rejected(Exception):
    """These weights make poor goldens; the next seed may do better."""


@dataclass
class Golden:
    """What transformers computed for one prompt."""

    prompt: list[int]
    logits: torch.Tensor
    """`[prompt length, vocabulary]`, float32"""
    greedy: list[int]
    logprobs: list[float]
    smallest_gap: float


def main(names: list[str]) -> None:
    """Makes the named models, or all."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = [variant for variant in VARIANTS if not names or variant.name in names]
    for variant in chosen:
        make(variant)
    if not names:
        folder = MODELS / "unknown-architecture"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", UNKNOWN)


def make(variant: Variant) -> None:
    """Writes the folder of one model, with the first seed whose goldens are good."""
    folder = MODELS / variant.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", variant.config)
    write_json(folder / "generation_config.json", generation_config(variant))
    tiny_tokenizer.save(folder)
    for seed in range(MOST_SEEDS):
        write_weights(folder, variant, seed)
        model = load(folder)
        try:
            goldens = [compute(model, prompt) for prompt in prompts(variant)]
        except Rejected as reason:
            print(f"{variant.name}: seed {seed}: {reason}", file=sys.stderr)
            continue
        check_against_generate(model, goldens)
        noise = rounding_noise(folder, goldens)
        check_trials(folder, variant, goldens[-1])
        write_goldens(folder, seed, goldens)
        gap = min(golden.smallest_gap for golden in goldens)
        distinct = [len(set(golden.greedy)) for golden in goldens]
        print(f"{variant.name}: seed {seed}, smallest gap {gap:.4f}, noise {noise:.1e}, distinct tokens {distinct}")
        return
    raise SystemExit(f"{variant.name}: none of {MOST_SEEDS} seeds is good")


def generation_config(variant: Variant) -> dict:
    """Returns what a published model has there; sampling is on, so a test of greedy decoding must ask for it."""
    return {
        "bos_token_id": variant.config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": variant.eos,
        "temperature": 0.6,
        "top_p": 0.9,
        "transformers_version": transformers.__version__,
    }


def prompts(variant: Variant) -> list[list[int]]:
    """Returns a prompt of each length. Those of 16 and 17 tokens open that of 300; the shorter ones are their own."""
    random = torch.Generator().manual_seed(20)

    def draw(length: int) -> list[int]:
        return torch.randint(variant.config["vocab_size"], (length,), generator=random).tolist()

    longest = draw(max(PROMPT_LENGTHS))
    return [draw(length) if length < 16 else longest[:length] for length in PROMPT_LENGTHS]


def write_weights(folder: Path, variant: Variant, seed: int) -> None:
    """Writes random weights, in as many files as the variant has shards."""
    config = AutoConfig.from_pretrained(folder)
    shapes = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    random = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, variant.stored_as)
    weights = {name: draw_weight(name, shapes[name].shape, random).to(dtype) for name in sorted(shapes)}
    if variant.shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for index, name in enumerate(weights):
        shard = index * variant.shards // len(weights) + 1
        weight_map[name] = f"model-{shard:05}-of-{variant.shards:05}.safetensors"
    for file in sorted(set(weight_map.values())):
        part = {name: weight for name, weight in weights.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(weight.numel() * weight.element_size() for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def draw_weight(name: str, shape: torch.Size, random: torch.Generator) -> torch.Tensor:
    """Returns one weight. Queries and keys are large, so that attention is sharp and depends on the positions;
    embeddings are small, so that the layers decide on the next token and not the last token itself."""
    normal = torch.randn(shape, generator=random)
    if "q_norm" in name or "k_norm" in name:
        return 1.8 + 0.3 * normal
    if "norm" in name:
        return 1.0 + 0.2 * normal
    if name.endswith(".bias"):
        return 0.3 * normal
    if "embed_tokens" in name or "lm_head" in name:
        return 0.2 * normal
    return (0.2 if "q_proj" in name or "k_proj" in name else 0.15) * normal


def load(folder: Path) -> torch.nn.Module:
    """Returns the model of a folder as transformers reads it, widened to float32."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), f"{folder.name}: weights and configuration disagree: {info}"
    return model.eval()


@torch.no_grad()
def all_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Returns the logits `[tokens, vocabulary]` of one pass over all tokens, with no cache."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def compute(model: torch.nn.Module, prompt: list[int]) -> Golden:
    """Computes the logits and the greedy tokens of one prompt, or raises `Rejected`. Each step is a whole new pass, so
    that nothing depends on a cache."""
    prompt_logits = all_logits(model, prompt)
    last, tokens, logprobs, smallest = prompt_logits[-1], list(prompt), [], float("inf")
    while True:
        best = last.topk(2)
        gap = (best.values[0] - best.values[1]).item()
        if gap < SMALLEST_GAP:
            raise Rejected(f"gap {gap:.5f} at step {len(logprobs)} after {len(prompt)} tokens")
        smallest = min(smallest, gap)
        token = best.indices[0].item()
        tokens.append(token)
        logprobs.append(last.double().log_softmax(-1)[token].item())
        if len(logprobs) == GREEDY_TOKENS:
            break
        last = all_logits(model, tokens)[-1]
    greedy = tokens[len(prompt) :]
    if len(set(greedy)) < FEWEST_DISTINCT:
        raise Rejected(f"only {len(set(greedy))} different tokens after {len(prompt)}")
    return Golden(prompt, prompt_logits, greedy, logprobs, smallest)


def check_against_generate(model: torch.nn.Module, goldens: list[Golden]) -> None:
    """Fails unless `generate`, which decodes with a cache, chooses the same tokens."""
    for golden in goldens:
        prompt = torch.tensor([golden.prompt])
        settings = {"do_sample": False, "temperature": None, "top_p": None, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=GREEDY_TOKENS, **settings)
        assert out[0, len(golden.prompt) :].tolist() == golden.greedy, (
            f"generate differs after {len(golden.prompt)} tokens"
        )


@torch.no_grad()
def rounding_noise(folder: Path, goldens: list[Golden]) -> float:
    """Returns the largest error of the float32 logits, relative to the largest logit of the prompt and measured against
    float64 (in which transformers leaves the norms and the angles of the rope as they were). Fails if it is so large
    that the goldens would be an accident of one order of summation."""
    exact = load(folder).double()
    noise = 0.0
    for golden in goldens:
        error = (all_logits(exact, golden.prompt) - golden.logits).abs().max() / golden.logits.abs().max()
        noise = max(noise, error.item())
    assert noise < LARGEST_NOISE, f"{folder.name}: float32 is off by {noise:.1e}"
    return noise


def check_trials(folder: Path, variant: Variant, golden: Golden) -> None:
    """Fails if some trial leaves the logits as they are: then the goldens could not tell whether it was done right."""
    for trial in variant.trials:
        logits = all_logits(changed_model(folder, variant, trial), golden.prompt)[-1]
        effect = (logits - golden.logits[-1]).abs().max().item()
        assert effect > SMALLEST_EFFECT, f"{variant.name}: {trial.name}: changes the logits by {effect:.5f} only"


def changed_model(folder: Path, variant: Variant, trial: Trial) -> torch.nn.Module:
    """Returns the model as it would be with the change of a trial."""
    changed = copy.deepcopy({**variant.config, **trial.config})
    config = AutoConfig.for_model(**{key: value for key, value in changed.items() if value is not REMOVED})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(file))
    for name, weight in weights.items():
        if trial.zeroed and trial.zeroed in name:
            weight.zero_()
        if trial.ones and trial.ones in name:
            weight.fill_(1.0)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, "the changed model has the same weights"
    return model


def write_goldens(folder: Path, seed: int, goldens: list[Golden]) -> None:
    """Writes `goldens.json` (prompts, greedy tokens, their log probabilities) and `goldens.safetensors` (logits)."""
    tensors, rows = {}, []
    for golden in goldens:
        length = len(golden.prompt)
        kept = golden.logits if length == ALL_POSITIONS_OF else golden.logits[-1:]
        tensors[f"logits.{length}"] = kept.contiguous()
        rows.append(
            {
                "length": length,
                "prompt": golden.prompt,
                "greedy": golden.greedy,
                "logprobs": [float(f"{logprob:.7g}") for logprob in golden.logprobs],
                "smallest_gap": float(f"{golden.smallest_gap:.4g}"),
            }
        )
    save_file(tensors, folder / "goldens.safetensors")
    made_with = {"seed": seed, "torch": torch.__version__, "transformers": transformers.__version__}
    lines = ",\n    ".join(json.dumps(row) for row in rows)
    text = f'{{\n  "made_with": {json.dumps(made_with)},\n  "prompts": [\n    {lines}\n  ]\n}}\n'
    (folder / "goldens.json").write_text(text)


def write_json(path: Path, value: dict) -> None:
    """Writes JSON as published models have it."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
