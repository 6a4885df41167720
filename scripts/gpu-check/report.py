"""Puts what the parts have measured beside its limits and targets: a table, and a line of JSON for each row."""

import argparse
import json
import sys
import time
from pathlib import Path


def read(folder, name):
    try:
        return json.loads((folder / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def pass_of(report, phase, size):
    return next((row for row in report.get("rows", []) if (row.get("phase"), row.get("size")) == (phase, size)), None)


def kernel_of(report, name):
    return next((row for row in report.get("rows", []) if row.get("operation") == name), None)


class Table:
    def __init__(self):
        self.rows = []

    def add(self, measure, value, unit, limit, limit_is, least):
        """`least` of the limit is the target; None is told and not judged. What was not measured has no row."""
        if value is None or (limit_is and not limit):
            return
        ratio = value / limit if limit else None
        row = {"measure": measure, "value": value, "unit": unit, "limit": limit, "limit_is": limit_is, "ratio": ratio}
        row["target"] = least
        row["met"] = None if least is None or ratio is None else ratio >= least
        self.rows.append(row)

    def add_most(self, measure, value, unit, most):
        if value is not None:
            row = {"measure": measure, "value": value, "unit": unit, "limit": None, "limit_is": None, "ratio": None}
            self.rows.append({**row, "target": most, "met": value <= most})

    def print(self):
        print(f"{'':58}{'':>12} {'':10}{'of limit':>9}{'target':>8}  limit")
        for row in self.rows:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            target = "" if row["target"] is None else f"{row['target']:g}"
            met = {True: "", False: "  MISSED", None: ""}[row["met"]]
            print(f"{row['measure']:58}{row['value']:12.2f} {row['unit']:10}{ratio:>9}{target:>8}  {row['limit_is'] or ''}{met}")


def rows(folder):
    limits, peers, start, overlap = (read(folder, name) for name in ("limits", "peers", "start", "overlap"))
    graph, eager, kernels = (read(folder, name) for name in ("graph", "eager", "kernels"))
    bandwidth, product = limits.get("copy_bytes_per_s"), limits.get("product_flop_per_s")
    table = Table()

    def tokens(row):
        return row and row["tokens_per_s"]

    def at_best(row):
        """Tokens per second if memory and multipliers did what torch gets out of them, at the same time."""
        if not row or not bandwidth or not product:
            return None
        passed = tokens_in(row)
        return passed / max(row["bytes"] / bandwidth, row["flop"] / product)

    def tokens_in(row):
        return row["size"]

    one = pass_of(graph, "decode", 1)
    for size, least in ((1, 0.88), (64, 0.75), (256, 0.75)):
        row = pass_of(graph, "decode", size)
        limit_is = "weights and KV at torch's copy bandwidth" if size == 1 else "the nearer of bytes and FLOP, as torch gets them"
        table.add(f"decode, batch {size}, context 1024, bf16, graph", tokens(row), "tokens/s", at_best(row), limit_is, least)
    for name, least in (("compiled", 1.0), ("eager", 3.0)):
        limit_is = f"transformers, {name}"
        table.add("decode, batch 1", tokens(one), "tokens/s", peers.get(f"decode_1_{name}_tokens_per_s"), limit_is, least)
    for size in (2048, 8192):
        row = pass_of(graph, "prefill", size)
        table.add(f"prefill {size}, bf16", tokens(row), "tokens/s", at_best(row), "FLOP at torch's rate of 8192³", 0.70)
        limit_is = "transformers with flash attention"
        table.add(f"prefill {size}, bf16", tokens(row), "tokens/s", peers.get(f"prefill_{size}_tokens_per_s"), limit_is, 1.0)

    def kernel(name, limit, limit_is, least):
        row = kernel_of(kernels, name)
        # Rates are in units of 10⁹ per second.
        table.add(name, row and row["rate"], row["unit"] if row else "", limit and limit / 1e9, limit_is, least)

    kernel("attention decode, 32 x 8192", bandwidth, "copy bandwidth", 0.85)
    kernel("attention decode, 32 x 8192", limits.get("attention_decode_bytes_per_s"), "torch's attention", None)
    kernel("attention prefill, 8192", limits.get("attention_prefill_flop_per_s"), "torch's flash attention", 0.75)
    kernel("attention prefill, 8192, by warpgroups", limits.get("attention_prefill_flop_per_s"), "torch's flash attention", 0.75)
    kernel("matmul 1 rows, bf16, 4096 to 14336", bandwidth, "copy bandwidth", None)
    kernel("matmul 64 rows, bf16, 4096 to 14336", bandwidth, "copy bandwidth", None)
    kernel("matmul 2048 rows, bf16, 4096 to 14336", product, "torch's rate of 8192³", None)
    kernel("matmul 2048 rows, bf16, 4096 to 14336, by warpgroups", product, "torch's rate of 8192³", None)
    kernel("matmul 2048 rows, bf16, 4096 to 14336, by cuBLASLt", product, "torch's rate of 8192³", None)
    kernel("handoff gather, token by token to head by head", bandwidth, "copy bandwidth", 0.80)
    kernel("handoff convert, bf16 to int8", bandwidth, "copy bandwidth", 0.80)
    kernel("handoff convert, bf16 to fp8", bandwidth, "copy bandwidth", 0.80)
    kernel("handoff digest, every byte", bandwidth, "copy bandwidth", 0.80)
    table.add("decode, batch 1: graph beside launches", tokens(one), "tokens/s", tokens(pass_of(eager, "decode", 1)), "launch by launch", None)
    table.add_most("decode, batch 1: the host's part of a step", one and one.get("asking_s") and one["asking_s"] * 1e3, "ms", 0.3)
    ahead, one_by_one = (overlap[name]["ms_per_token"] if name in overlap else None for name in ("ahead", "one_by_one"))
    rates = [1000 / ms if ms else None for ms in (ahead, one_by_one)]
    table.add("a small model served, batch 1, steps overlap", rates[0], "tokens/s", rates[1], "each step waited for", None)
    table.add_most("start to first token, nothing compiled", start.get("cold"), "s", 3.0)
    table.add_most("start to first token, kernels on disk", start.get("warm"), "s", 3.0)
    return table, limits, graph


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--append", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    typed = parser.parse_args()
    table, limits, graph = rows(typed.results)
    if typed.dry_run:
        # What a processor reaches says nothing about targets of a GPU.
        table.rows = [{**row, "met": None} for row in table.rows]
    for name, unit in (("copy_bytes_per_s", "GB/s copied"), ("read_bytes_per_s", "GB/s read"), ("product_flop_per_s", "GFLOP/s of 8192³")):
        if name in limits:
            print(f"torch: {limits[name] / 1e9:.0f} {unit}")
    if not table.rows:
        print("nothing was measured that has a limit")
    else:
        table.print()
    about = {"device": limits.get("device") or graph.get("device"), "commit": typed.commit, "time": int(time.time())}
    about |= {name: value for name, value in limits.items() if name.endswith("_per_s") or name == "torch"}
    lines = "".join(json.dumps({**row, **about}, ensure_ascii=False) + "\n" for row in table.rows)
    (typed.results / "table.jsonl").write_text(lines)
    if not typed.dry_run:
        typed.append.parent.mkdir(parents=True, exist_ok=True)
        with typed.append.open("a") as file:
            file.write(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
