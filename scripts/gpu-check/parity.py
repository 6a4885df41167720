"""Models with random weights, made here, beside transformers: the same tokens, and log-probabilities that are close.

What is right is computed by transformers in f32 from the weights as they are stored. In 16 bits every engine rounds on its way: ours may be
off by three times as much as transformers is in the same type. Where two tokens are as likely as that can tell, both are right.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
import transformers

import serving

VOCABULARY = 512
LENGTHS = [1, 16, 70]
TOKENS = 16


def config(family, **more):
    """Small, and of sizes that are whole packs of the kernels."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    return family(**{**sizes, **more})


# Name, how it is made, and its type.
MODELS = [
    ("llama-f32", lambda: config(transformers.LlamaConfig), torch.float32),
    ("qwen3-f32", lambda: config(transformers.Qwen3Config), torch.float32),
    ("llama-128-bf16", lambda: config(transformers.LlamaConfig, head_dim=128), torch.bfloat16),
    ("qwen2-f16", lambda: config(transformers.Qwen2Config, num_attention_heads=8, head_dim=32), torch.float16),
]
# How far a log-probability of f32 may be off.
CLOSE = 2e-3


def make(folder, made, dtype):
    """Writes a model folder, and returns the model as it is stored, and in f32."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(made())
    with torch.no_grad():
        for name, weights in model.named_parameters():
            # So wide that tokens are told apart.
            weights.copy_(torch.randn_like(weights) * 0.3 + 1 if "norm" in name else torch.randn_like(weights) * 0.09)
    model = model.to(dtype)
    model.save_pretrained(folder)
    words = {f"w{number} ": number for number in range(VOCABULARY)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0 "},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return model.eval(), copy.deepcopy(model).float().eval()


def prompts():
    return [[2 + (index * 31 + which * 7) % (VOCABULARY - 2) for index in range(length)] for which, length in enumerate(LENGTHS)]


def log_probabilities(model, device, prompt, ids):
    """Of every token behind the prompt and behind each of `ids` but the last."""
    with torch.no_grad():
        logits = model.to(device)(torch.tensor([prompt + ids], device=device)).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1).cpu()


def check(models, device, prompt, answer):
    """Takes the answer token by token as a continuation, so that one close call does not decide about what comes after it."""
    names, logprobs = answer
    ids = [int(name.strip().removeprefix("w")) for name in names]
    stored, plain = models
    right = log_probabilities(plain, device, prompt, ids)
    rounded = log_probabilities(stored, device, prompt, ids)
    bound = max(CLOSE, 3 * (rounded - right).abs().max().item())
    furthest = 0.0
    for place, token in enumerate(ids):
        off = abs(right[place, token].item() - logprobs[place])
        short = (right[place].max() - right[place, token]).item()
        furthest = max(furthest, off, short)
        if not off <= bound:
            raise AssertionError(f"token {place}: log-probability {logprobs[place]}, right {right[place, token]:.5f}, bound {bound:.1e}")
        if not short <= 2 * bound:
            raise AssertionError(f"token {place}: {token} is less likely than the best by {short:.1e}, bound {bound:.1e}")
    return furthest, bound


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tidemill", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="the first model alone")
    typed = parser.parse_args()
    failed = 0
    for name, made, dtype in MODELS[: 1 if typed.quick else None]:
        folder = typed.scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        models = make(folder, made, dtype)
        try:
            with serving.served(typed.tidemill, str(folder), "--colocated", "--device", typed.device) as url:
                rows = [check(models, typed.device, prompt, serving.greedy(url, prompt, TOKENS)) for prompt in prompts()]
            told = ", ".join(f"{off:.1e} of {bound:.1e}" for off, bound in rows)
            print(f"good: {name}: {len(LENGTHS) * TOKENS} tokens, off by {told} that are allowed")
        except (AssertionError, serving.Refused) as error:
            failed += 1
            print(f"FAILED: {name}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
