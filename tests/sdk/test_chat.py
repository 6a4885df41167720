"""`/v1/chat/completions`, not streamed."""

import pytest

from cases import SUM, UNICODE
from server import Server


def test_an_answer_has_the_shape_of_the_api(server: Server) -> None:
    answer = server.api.chat.completions.create(model=server.model, messages=SUM, temperature=0, max_tokens=24)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.created > 1_700_000_000
    assert answer.model == server.model
    (choice,) = answer.choices
    assert choice.index == 0
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.logprobs is None
    assert choice.finish_reason in ("stop", "length")


def test_usage_counts_the_tokens_of_the_template_too(server: Server) -> None:
    prompt = server.http.post("/tokenize", json={"model": server.model, "messages": SUM}).json()
    answer = server.api.chat.completions.create(
        model=server.model, messages=SUM, temperature=0, max_tokens=7, extra_body={"ignore_eos": True}
    )
    assert prompt["count"] == len(prompt["tokens"]) > len(server.tokens(SUM[0]["content"]))
    assert answer.usage.prompt_tokens == prompt["count"]
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == prompt["count"] + 7


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_at_its_limit(server: Server, limit: str) -> None:
    answer = server.api.chat.completions.create(
        model=server.model, messages=SUM, extra_body={"ignore_eos": True}, **{limit: 3}
    )
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


def test_the_newer_limit_wins(server: Server) -> None:
    answer = server.api.chat.completions.create(
        model=server.model, messages=SUM, max_tokens=9, max_completion_tokens=4, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 4


def test_without_a_limit_an_answer_may_take_the_whole_context(server: Server) -> None:
    answer = server.api.chat.completions.create(
        model=server.model, messages=SUM, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == server.max_model_len
    assert answer.choices[0].finish_reason == "length"


def test_ignore_eos_goes_on_where_an_answer_would_end(server: Server) -> None:
    def ask(**fields: object) -> object:
        return server.api.chat.completions.create(
            model=server.model, messages=SUM, temperature=0, max_tokens=200, extra_body=fields
        )

    assert ask(ignore_eos=True).usage.completion_tokens == 200
    if ask().choices[0].finish_reason == "stop":
        assert ask().usage.completion_tokens < 200


def test_content_may_come_in_parts(server: Server) -> None:
    text = SUM[0]["content"]
    whole, parts = (
        server.api.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=16
        )
        for content in [text, [{"type": "text", "text": text}]]
    )
    assert whole.choices[0].message.content == parts.choices[0].message.content
    assert whole.usage.prompt_tokens == parts.usage.prompt_tokens


def test_texts_in_many_scripts_arrive_whole(server: Server) -> None:
    messages = [{"role": "user", "content": UNICODE}]
    prompt = server.http.post("/tokenize", json={"model": server.model, "messages": messages}).json()
    assert UNICODE in server.text(prompt["tokens"])
    answer = server.api.chat.completions.create(model=server.model, messages=messages, max_tokens=4)
    assert answer.usage.prompt_tokens == prompt["count"]


def test_logprobs_tell_each_token_and_its_bytes(server: Server) -> None:
    answer = server.api.chat.completions.create(
        model=server.model, messages=SUM, temperature=0, max_tokens=8, logprobs=True, extra_body={"ignore_eos": True}
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens == 8
    assert all(entry.logprob <= 0 and entry.top_logprobs == [] for entry in content)
    assert all(bytes(entry.bytes).decode(errors="replace") == entry.token for entry in content)


def test_top_logprobs_are_sorted_and_a_greedy_token_is_the_first(server: Server) -> None:
    answer = server.api.chat.completions.create(
        model=server.model, messages=SUM, temperature=0, max_tokens=8, logprobs=True, top_logprobs=5
    )
    for entry in answer.choices[0].logprobs.content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert (entry.top_logprobs[0].token, values[0]) == (entry.token, entry.logprob)


def test_unknown_fields_are_ignored(server: Server) -> None:
    request = {"model": server.model, "messages": SUM, "temperature": 0, "max_tokens": 8}
    plain = server.api.chat.completions.create(**request)
    extra = server.api.chat.completions.create(
        **request, user="ann", metadata={"a": "b"}, store=False, extra_body={"no_such_field": {"deep": [1]}}
    )
    assert plain.choices == extra.choices
