"""The same answers, and how fast, with the next step asked for while one computes and with each step waited for."""

import argparse
import json
import sys
import time
from pathlib import Path

import serving

TOKENS = 200
PROMPT = [3, 4, 5, 6, 7]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tidemill", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    typed = parser.parse_args()
    answers, measured = [], {}
    for name, flags in (("ahead", []), ("one_by_one", ["--no-async-scheduling"])):
        served = serving.served(typed.tidemill, typed.model, "--colocated", "--device", typed.device, *flags)
        with served as url:
            serving.greedy(url, PROMPT, TOKENS)  # Records graphs.
            begun = time.monotonic()
            answers.append(serving.greedy(url, PROMPT, TOKENS))
            seconds = time.monotonic() - begun
            overlapped = serving.metric(url, "tidemill_overlapped_steps_total")
            steps = serving.metric(url, "tidemill_steps_total")
        measured[name] = {"ms_per_token": 1000 * seconds / TOKENS, "steps": steps, "overlapped": overlapped}
        print(f"{name}: {1000 * seconds / TOKENS:.3f} ms a token, {overlapped:.0f} of {steps:.0f} steps overlap")
    typed.out.write_text(json.dumps(measured))
    if answers[0] != answers[1]:
        print(f"answers differ:\n{answers[0]}\n{answers[1]}")
        return 1
    expected = typed.device != "cpu"
    if (0 < measured["ahead"]["overlapped"]) != expected or measured["one_by_one"]["overlapped"] != 0:
        print("steps overlap where they should not, or do not where they should")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
