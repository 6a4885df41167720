"""Computes again by torch what our kernels computed, from the same tensors, in f64, and compares.

A kernel may be off by what rounding its result to its type makes, and by what sums in f32 make; or by twice as much as torch's own
kernel of the same type is, if that is more.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def tensor(folder, file, *shape):
    values = torch.frombuffer(bytearray((folder / file).read_bytes()), dtype=torch.float32)
    return values.reshape(shape)


def product(folder, case):
    x = tensor(folder, case["x"], case["rows"], case["inputs"])
    w = tensor(folder, case["w"], case["outputs"], case["inputs"])
    return [x, w], lambda x, w: x @ w.T


def rms_norm(folder, case):
    x = tensor(folder, case["x"], case["rows"], case["width"])
    w = tensor(folder, case["w"], case["width"])
    return [x, w], lambda x, w: torch.nn.functional.rms_norm(x, (case["width"],), w, case["eps"])


def silu_mul(folder, case):
    shape = case["rows"], case["width"]
    inputs = [tensor(folder, case["gate"], *shape), tensor(folder, case["up"], *shape)]
    return inputs, lambda gate, up: torch.nn.functional.silu(gate) * up


def attention(folder, case):
    heads, kv_heads, size, contexts = case["heads"], case["kv_heads"], case["head_size"], case["contexts"]
    query = tensor(folder, case["query"], len(contexts), heads, size)
    key, value = (tensor(folder, case[name], sum(contexts), kv_heads, size) for name in ("key", "value"))

    def attend(query, key, value):
        rows, first = [], 0
        for row, context in enumerate(contexts):
            keys, values = (it[first : first + context].transpose(0, 1) for it in (key, value))
            keys, values = (it.repeat_interleave(heads // kv_heads, 0) for it in (keys, values))
            rows.append(torch.nn.functional.scaled_dot_product_attention(query[row].unsqueeze(1), keys, values))
            first += context
        return torch.stack(rows)

    return [query, key, value], attend


def prompt(folder, case):
    heads, kv_heads, size, tokens = case["heads"], case["kv_heads"], case["head_size"], case["tokens"]
    query = tensor(folder, case["query"], tokens, heads, size)
    key, value = (tensor(folder, case[name], tokens, kv_heads, size) for name in ("key", "value"))

    def attend(query, key, value):
        keys, values = (it.transpose(0, 1).repeat_interleave(heads // kv_heads, 0) for it in (key, value))
        rows = torch.nn.functional.scaled_dot_product_attention(query.transpose(0, 1), keys, values, is_causal=True)
        return rows.transpose(0, 1)

    return [query, key, value], attend


OPERATIONS = {"product": product, "rms_norm": rms_norm, "silu_mul": silu_mul, "attention": attention, "prompt": prompt}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", required=True)
    typed = parser.parse_args()
    # Sums of 32 bits are to be sums of 32 bits.
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = 0
    for line in (typed.folder / "cases.jsonl").read_text().splitlines():
        case = json.loads(line)
        inputs, compute = OPERATIONS[case["operation"]](typed.folder, case)
        right = compute(*(it.to(typed.device, torch.float64) for it in inputs))
        theirs = compute(*(it.to(typed.device, DTYPES[case["dtype"]]) for it in inputs))
        ours = tensor(typed.folder, case["out"], *right.shape).to(typed.device)
        greatest = right.abs().max().clamp_min(1e-30)
        off, off_theirs = (((it.to(torch.float64) - right).abs().max() / greatest).item() for it in (ours, theirs))
        # A prompt's probabilities are rounded to the type as well as the result.
        roundings = 2 if case["operation"] == "prompt" else 1
        bound = max(roundings * case["tolerance"], 2 * off_theirs)
        good = off <= bound and bool(torch.isfinite(ours).all())
        failed += not good
        sizes = {key: value for key, value in case.items() if isinstance(value, (int, list)) and key != "tolerance"}
        word = "good" if good else "FAILED"
        name = case.get("kernel", case["operation"])
        print(f"{word}: {name} {case['dtype']} {sizes}: off by {off:.1e}, torch by {off_theirs:.1e}, bound {bound:.1e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
