"""Answers in a form in which two of them can be compared: without ids and times, streams put together."""

import json
from collections.abc import Iterable

import httpx

DIFFERS = {"id", "created", "system_fingerprint"}
"""Fields in which equal answers differ."""
TIMING = {"prompt_tokens_details"}
"""Which worker had a prefix cached is not part of the answer."""


def comparable(response: httpx.Response) -> dict:
    """Returns status and body of a response; a stream becomes one body, as if it had not been streamed."""
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        return {"status": response.status_code, "body": joined(events(response.text))}
    return {"status": response.status_code, "body": stripped(response.json())}


def events(text: str) -> list[dict]:
    """Returns the JSON of the events of a whole stream, which must be closed by `[DONE]`."""
    data = [event.removeprefix("data: ") for event in text.split("\n\n") if event.startswith("data: ")]
    assert data, f"no events in {text[:200]!r}"
    assert data[-1] == "[DONE]", f"a stream ends with [DONE], not with {data[-1]!r}"
    return [json.loads(event) for event in data[:-1]]


def joined(chunks: Iterable[dict]) -> dict:
    """Returns per choice the text, the logprobs and the reason of the end, and the usage of a stream. How many tokens
    came in one chunk depends on timing and is forgotten."""
    choices: dict[int, dict] = {}
    usage = None
    for chunk in chunks:
        assert "error" not in chunk, f"the stream broke: {chunk}"
        usage = chunk.get("usage") or usage
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "logprobs": [], "finish_reason": None})
            choice["text"] += part.get("text") or part.get("delta", {}).get("content") or ""
            choice["logprobs"] += logprobs(part)
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
    return {"choices": choices, "usage": stripped(usage)}


def unstreamed(body: dict) -> dict:
    """Returns the body of an answer that was not streamed in the form of `joined`."""
    choices = {
        choice["index"]: {
            "text": choice["text"] if "text" in choice else choice["message"]["content"],
            "logprobs": logprobs(choice),
            "finish_reason": choice["finish_reason"],
        }
        for choice in body["choices"]
    }
    return {"choices": choices, "usage": stripped(body["usage"])}


def logprobs(choice: dict) -> list:
    """Returns a list with what is known of each token: `content` of a chat, the parallel lists of a completion."""
    found = choice.get("logprobs") or {}
    if "content" in found:
        return found["content"] or []
    names = ["tokens", "token_logprobs", "top_logprobs"]
    return [list(row) for row in zip(*(found.get(name) or [] for name in names), strict=False)]


def stripped(value: object) -> object:
    """Returns a JSON value without the fields in which equal answers differ, at any depth."""
    if isinstance(value, dict):
        return {key: stripped(item) for key, item in value.items() if key not in DIFFERS | TIMING}
    if isinstance(value, list):
        return [stripped(item) for item in value]
    return value
