"""What the measuring programs of this folder share."""

import os
import random
import socket
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHON = HERE / ".venv/bin/python"


def prompt(length):
    """Ids of bytes' tokens, none of them special, and never the same: some engines remember prompts."""
    return [random.randrange(3, 259) for _ in range(length)]


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True).stdout.strip()


def circumstances(typed):
    text = Path("/proc/cpuinfo").read_text()
    names = [line.split(": ", 1)[1] for line in text.splitlines() if line.startswith("model name")]
    commit = git("rev-parse", "--short", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": names[0] if names else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit + ("+changes" if changes else ""),
        "tidemill": subprocess.run([typed.tidemill, "--version"], capture_output=True, text=True).stdout.strip(),
        "shape": typed.shape,
        "threads": typed.threads,
        "peers": [line for line in (HERE / "requirements.txt").read_text().split() if "==" in line],
        "time": int(time.time()),
    }
