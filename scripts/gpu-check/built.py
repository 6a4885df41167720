"""Reads what cargo says about what it built, and names the programs: NAME PATH, line by line."""

import json
import sys

NAMES = {
    ("tidemill", "bin"): "tidemill",
    ("cuda", "test"): "kernels-cuda",
    ("models", "test"): "engine-models",
    ("serving", "test"): "engine-serving",
}


def main():
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("reason") != "compiler-artifact" or not message.get("executable"):
            continue
        target, profile = message["target"], message["profile"]
        # A binary is built as it is and as a test of itself.
        is_wanted = "test" in target["kind"] or not profile["test"]
        name = NAMES.get((target["name"], target["kind"][0])) if is_wanted else None
        if name:
            print(name, message["executable"])


if __name__ == "__main__":
    main()
