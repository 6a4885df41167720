"""Two ranks of one model, each on a GPU of its own, answer as one does, and hand over to one and from one."""

import argparse
import sys
from pathlib import Path

import serving
from split import answers, compare


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tidemill", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    typed = parser.parse_args()
    size, device = "tensor-parallel-size", ["--device", typed.device]
    rows = [
        ("two ranks", ["--colocated", f"--{size}", "2"]),
        ("two ranks, launch by launch", ["--colocated", f"--{size}", "2", "--enforce-eager"]),
        ("two to one", ["--prefill", "1", "--decode", "1", f"--prefill-{size}", "2"]),
        ("one to two", ["--prefill", "1", "--decode", "1", f"--decode-{size}", "2"]),
    ]
    rows = rows[:1] + rows[2:3] if typed.quick else rows
    failed = 0
    for model in ["llama3"] if typed.quick else ["llama3", "qwen3"]:
        folder = typed.models / model
        try:
            alone, *_ = answers(typed.tidemill, folder, "--colocated", *device)
        except (AssertionError, serving.Refused) as error:
            failed += 1
            print(f"FAILED: {model}, one rank: {error}")
            continue
        for name, flags in rows:
            try:
                given, *_ = answers(typed.tidemill, folder, *flags, *device)
                # Sums in parts are rounded elsewhere.
                compare(f"{model}, {name}", alone, given, False)
                print(f"good: {model}, {name}")
            except (AssertionError, serving.Refused) as error:
                failed += 1
                print(f"FAILED: {model}, {name}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
