"""Starts `tidemill serve` and asks it, with nothing but the standard library."""

import contextlib
import json
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

# Loading a model and compiling kernels, on a slow machine.
START_S = 60


class Refused(Exception):
    """The server did not start, or did not answer."""


@contextlib.contextmanager
def served(tidemill, *flags, environment=None):
    """Gives the address of a server, and stops it at the end. Who waits looks at the server's own word, not at a clock."""
    with tempfile.TemporaryFile("w+") as log:
        command = [tidemill, "serve", "--port", "0", "--threads", "2", *flags]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment)
        try:
            yield ready(process, log)
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ready(process, log):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        log.seek(0)
        text = log.read()
        found = re.search(r"http://127\.0\.0\.1:\d+", text)
        if found and is_ready(found.group()):
            return found.group()
        if process.poll() is not None:
            raise Refused(f"the server ended with {process.returncode}:\n{text[-3000:]}")
        time.sleep(0.01)
    raise Refused(f"the server is not ready after {START_S} s:\n{text[-3000:]}")


def is_ready(url):
    try:
        with urllib.request.urlopen(url + "/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def post(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise Refused(f"{path}: {error.code} {error.read().decode(errors='replace')[:500]}") from error


def greedy(url, prompt, tokens):
    """The likeliest tokens behind a prompt of ids, as the tokenizer names them, and the log-probability of each."""
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "seed": 1,
    }
    logprobs = post(url, "/v1/completions", body)["choices"][0]["logprobs"]
    return logprobs["tokens"], logprobs["token_logprobs"]


def labels(url, name, label):
    """The values of a label of a gauge that is not zero."""
    with urllib.request.urlopen(url + "/metrics", timeout=10) as answer:
        text = answer.read().decode()
    lines = [line for line in text.splitlines() if line.startswith(name + "{") and float(line.rsplit(" ", 1)[1]) != 0]
    return {found for line in lines for found in re.findall(rf'{label}="([^"]*)"', line)}


def metric(url, name):
    """The sum of a counter over all its labels."""
    with urllib.request.urlopen(url + "/metrics", timeout=10) as answer:
        text = answer.read().decode()
    lines = [line for line in text.splitlines() if re.match(rf"{name}(\{{|\s)", line)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
