"""Streams: their shape, and that they say the same as an answer in one piece."""

import json

import pytest

from answers import comparable, events, joined, unstreamed
from cases import ANSWERED, CHAT, COMPLETIONS, STORY, SUM, Case, body
from server import Server

WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def test_a_chat_stream_has_the_shape_of_the_api(server: Server) -> None:
    chunks = list(
        server.api.chat.completions.create(model=server.model, messages=SUM, temperature=0, max_tokens=16, **WITH_USAGE)
    )
    *parts, last, usage = chunks
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {(chunk.object, chunk.model, chunk.created) for chunk in chunks} == {
        ("chat.completion.chunk", server.model, chunks[0].created)
    }
    assert parts[0].choices[0].delta.role == "assistant"
    assert not parts[0].choices[0].delta.content
    assert all(part.choices[0].finish_reason is None and part.usage is None for part in parts)
    assert all(part.choices[0].delta.role is None for part in parts[1:])
    assert last.choices[0].finish_reason in ("stop", "length")
    assert usage.choices == []
    assert usage.usage.total_tokens == usage.usage.prompt_tokens + usage.usage.completion_tokens


def test_a_completion_stream_has_the_shape_of_the_api(server: Server) -> None:
    chunks = list(server.api.completions.create(model=server.model, prompt=STORY, max_tokens=8, **WITH_USAGE))
    *parts, last, usage = chunks
    assert {(chunk.id, chunk.object, chunk.model) for chunk in chunks} == {
        (chunks[0].id, "text_completion", server.model)
    }
    assert all(part.choices[0].finish_reason is None and part.usage is None for part in parts)
    assert last.choices[0].finish_reason in ("stop", "length")
    assert (usage.choices, usage.usage.completion_tokens > 0) == ([], True)


def test_without_being_asked_a_stream_tells_no_usage(server: Server) -> None:
    stream = server.api.chat.completions.create(model=server.model, messages=SUM, max_tokens=4, stream=True)
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_a_stream_is_made_of_server_sent_events(server: Server) -> None:
    request = {"model": server.model, "messages": SUM, "max_tokens": 4, "stream": True}
    with server.http.stream("POST", CHAT, json=request) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    assert len(events(text)) >= 2


def test_tokens_come_as_they_are_made(server: Server) -> None:
    stream = server.api.completions.create(
        model=server.model, prompt=STORY, max_tokens=64, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices and chunk.choices[0].text]
    assert len(pieces) > 16, "a stream in few large pieces is none"


@pytest.mark.parametrize("case", ANSWERED, ids=lambda case: case.name)
def test_a_stream_says_what_an_answer_in_one_piece_says(server: Server, case: Case) -> None:
    whole = server.http.post(case.path, json=body(server, case)).raise_for_status().json()
    streamed = comparable(server.http.post(case.path, json={**body(server, case), **WITH_USAGE}))
    assert streamed == {"status": 200, "body": unstreamed(whole)}


def test_a_refused_stream_is_an_error_with_its_status(server: Server) -> None:
    response = server.http.post(CHAT, json={"model": "nobody", "messages": SUM, "stream": True})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.fixture(scope="module", params=["é", "日", "😀"], ids=["two bytes", "three bytes", "four bytes"])
def scrambled(request: pytest.FixtureRequest, server: Server) -> list[dict]:
    """Chats that answer with the tokens of one character alone, in any order: whole characters among broken ones."""
    tokens = server.tokens(request.param)
    if len(set(tokens)) < 2:
        pytest.skip(f"{request.param} is one token")
    shared = {"model": server.model, "messages": SUM, "temperature": 2.0, "max_tokens": 40, "ignore_eos": True}
    shared["logit_bias"] = {str(token): 100 for token in tokens}
    # Else a model that prefers one of them may say nothing but that.
    shared["frequency_penalty"] = 2.0
    return [{**shared, "seed": seed, "n": 4, "logprobs": True} for seed in range(2)]


def test_only_bytes_that_are_no_character_are_replaced(server: Server, scrambled: list[dict]) -> None:
    characters = set()
    for request in scrambled:
        for choice in server.http.post(CHAT, json=request).raise_for_status().json()["choices"]:
            parts = [bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]]
            assert choice["message"]["content"] == b"".join(parts).decode(errors="replace")
            characters |= set(choice["message"]["content"])
    assert characters - {"\ufffd"}, "no character is whole, so this proves nothing"


def test_a_stream_never_splits_a_character(server: Server, scrambled: list[dict]) -> None:
    for request in scrambled:
        whole = unstreamed(server.http.post(CHAT, json=request).raise_for_status().json())
        streamed = comparable(server.http.post(CHAT, json={**request, **WITH_USAGE}))["body"]
        assert streamed == whole


def test_an_echoed_stream_has_whole_characters(server: Server) -> None:
    prompt = "日本語😀é" * 4
    request = {"model": server.model, "prompt": prompt, "echo": True, "max_tokens": 1, "stream": True}
    chunks = events(server.http.post(COMPLETIONS, json=request).raise_for_status().text)
    pieces = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]]
    assert joined(chunks)["choices"][0]["text"].startswith(prompt)
    assert "\ufffd" not in "".join(pieces)[: len(prompt)]


def test_every_event_is_one_line_of_json(server: Server) -> None:
    request = {
        "model": server.model,
        "prompt": "line\nbreak\u2028and\r\nmore",
        "echo": True,
        "max_tokens": 2,
        "stream": True,
    }
    text = server.http.post(COMPLETIONS, json=request).raise_for_status().text
    for event in text.removesuffix("data: [DONE]\n\n").split("\n\n"):
        if event:
            json.loads(event.removeprefix("data: "))
