"""Prefill and decode in two processes, on a GPU and on the CPU in every combination, answer as one process does."""

import argparse
import sys
import time
from pathlib import Path

import serving

# Below a block, at its end, and over several; the second begins as the third does.
LENGTHS = [3, 16, 17, 70]
TOKENS = 12
# What f32 on two kinds of device may differ by.
CLOSE = 2e-3


def prompts():
    return [[3 + (index * 7 + index // 16 * which) % 200 for index in range(length)] for which, length in enumerate(LENGTHS)]


def answers(tidemill, model, *flags):
    with serving.served(tidemill, str(model), *flags) as url:
        given = [serving.greedy(url, prompt, TOKENS) for prompt in prompts()]
        # Once more, from the prefix cache.
        warm = [serving.greedy(url, prompt, TOKENS) for prompt in prompts()]
        handoffs = handoffs_of(url) if "--colocated" not in flags else 0
        ways = serving.labels(url, "tidemill_link_device_way", "way")
    for cold, again in zip(given, warm):
        if cold[0] != again[0]:
            raise AssertionError(f"{flags}: from the prefix cache {again[0]}, before {cold[0]}")
    return given, handoffs, ways


def handoffs_of(url):
    """How many there were; workers tell of themselves from time to time."""
    for _ in range(50):
        if count := serving.metric(url, "tidemill_handoff_total"):
            return count
        time.sleep(0.1)
    return 0


def compare(name, expected, given, exactly):
    """Exactly: on the same kind of device. Else two tokens may change places that are as likely."""
    for number, ((tokens, logprobs), (others, other_logprobs)) in enumerate(zip(expected, given)):
        for place, (one, other) in enumerate(zip(tokens, others)):
            near = abs(logprobs[place] - other_logprobs[place])
            if one != other and (exactly or CLOSE < near):
                raise AssertionError(f"{name}: prompt {number}, token {place} is {other!r}, whole {one!r}")
            if one != other:
                break
            if CLOSE < near:
                raise AssertionError(f"{name}: prompt {number}, token {place}: log-probability off by {near:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tidemill", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    typed = parser.parse_args()
    gpu = typed.device
    models = ["llama3"] if typed.quick else ["llama3", "qwen3", "llama-bf16-new-keys"]
    rows = [(gpu, gpu, "auto"), (gpu, "cpu", "auto"), ("cpu", gpu, "auto"), (gpu, gpu, "tcp"), (gpu, "cpu", "tcp")]
    if typed.quick:
        rows = [(gpu, "cpu", "auto"), (gpu, "cpu", "tcp")]
    failed = 0
    for model in models:
        folder = typed.models / model
        try:
            whole, _, _ = answers(typed.tidemill, folder, "--colocated", "--device", gpu)
        except (AssertionError, serving.Refused) as error:
            failed += 1
            print(f"FAILED: {model}, whole: {error}")
            continue
        for prefill, decode, transport in rows:
            name = f"{model}: {prefill} to {decode}, {transport}"
            # Of 16 bits a GPU and a CPU round differently, at other places: that is no error, and shows nothing.
            if "bf16" in model and prefill != decode:
                continue
            flags = ["--prefill", "1", "--decode", "1", "--prefill-device", prefill, "--decode-device", decode]
            try:
                given, handoffs, ways = answers(typed.tidemill, folder, *flags, "--transport", transport)
                compare(name, whole, given, prefill == decode == gpu)
                if handoffs == 0:
                    raise AssertionError(f"{name}: nothing was handed over")
                # Two processes on one GPU reach each other's memory: anything else is a fault here.
                if prefill == decode == gpu != "cpu" and transport == "auto" and ways != {"peer copy"}:
                    raise AssertionError(f"{name}: from device to device by {sorted(ways)}, not by peer copy; the log says why")
                print(f"good: {name}, {handoffs:.0f} handoffs, devices by {', '.join(sorted(ways)) or 'none'}")
            except (AssertionError, serving.Refused) as error:
                failed += 1
                print(f"FAILED: {name}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
