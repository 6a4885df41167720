"""From the start of a server to its first token, with an empty folder for compiled kernels and then with what is in it."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import serving


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tidemill", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    typed = parser.parse_args()
    seconds = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        for name in ("cold", "warm"):
            begun = time.monotonic()
            flags = ["--colocated", "--device", typed.device]
            with serving.served(typed.tidemill, typed.model, *flags, environment=environment) as url:
                serving.greedy(url, [3, 4, 5], 1)
                seconds[name] = time.monotonic() - begun
            print(f"{name}: {seconds[name]:.2f} s from the start to the first token")
    typed.out.write_text(json.dumps(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
