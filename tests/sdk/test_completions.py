"""`/v1/completions`."""

import pytest

from cases import STORY, UNICODE
from server import Server

TWO = [STORY, "One, two, three,"]


def complete(server: Server, prompt: object, max_tokens: int = 12, **fields: object) -> object:
    """Returns a greedy completion that goes on to its limit."""
    return server.api.completions.create(
        model=server.model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        **{**fields, "extra_body": {"ignore_eos": True, **fields.pop("extra_body", {})}},
    )


def test_an_answer_has_the_shape_of_the_api(server: Server) -> None:
    answer = complete(server, STORY)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.created > 1_700_000_000
    assert answer.model == server.model
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_the_limit_is_16_tokens_when_none_is_given(server: Server) -> None:
    answer = server.api.completions.create(model=server.model, prompt=STORY, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


def test_several_prompts_are_answered_in_order(server: Server) -> None:
    together = complete(server, TWO)
    alone = [complete(server, prompt) for prompt in TWO]
    assert [choice.index for choice in together.choices] == [0, 1]
    assert [choice.text for choice in together.choices] == [answer.choices[0].text for answer in alone]
    assert together.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    assert together.usage.completion_tokens == 24


def test_choices_of_several_prompts_are_numbered_through(server: Server) -> None:
    answer = server.api.completions.create(
        model=server.model, prompt=TWO, n=3, temperature=1.0, seed=1, max_tokens=4, echo=True
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert all(choice.text.startswith(TWO[choice.index // 3]) for choice in answer.choices)


def test_a_prompt_of_tokens_is_the_same_as_their_text(server: Server) -> None:
    tokenized = server.http.post("/tokenize", json={"model": server.model, "prompt": STORY}).json()["tokens"]
    of_text, of_tokens, of_lists = (complete(server, prompt) for prompt in [STORY, tokenized, [tokenized]])
    assert of_text.choices == of_tokens.choices == of_lists.choices
    assert of_text.usage.prompt_tokens == of_tokens.usage.prompt_tokens == len(tokenized)


@pytest.mark.parametrize("prompt", [STORY, UNICODE], ids=["plain", "many scripts"])
def test_echo_puts_the_prompt_first(server: Server, prompt: str) -> None:
    plain, echoed = complete(server, prompt), complete(server, prompt, echo=True)
    assert echoed.choices[0].text == prompt + plain.choices[0].text
    # The second of the two may find its prompt in the prefix cache; what is counted stays the same.
    counted = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [getattr(echoed.usage, name) for name in counted] == [getattr(plain.usage, name) for name in counted]


def test_logprobs_are_lists_of_one_length(server: Server) -> None:
    answer = complete(server, STORY, logprobs=3)
    found, text = answer.choices[0].logprobs, answer.choices[0].text
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 12
    assert all(logprob <= 0 for logprob in found.token_logprobs)
    assert all(3 <= len(top) <= 4 for top in found.top_logprobs)
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())
    assert found.text_offset == sorted(found.text_offset)
    assert "".join(found.tokens) == text


def test_echo_with_logprobs_tells_those_of_the_prompt(server: Server) -> None:
    count = len(server.http.post("/tokenize", json={"model": server.model, "prompt": STORY}).json()["tokens"])
    found = complete(server, STORY, max_tokens=4, echo=True, logprobs=1).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == count + 4
    assert found.token_logprobs[0] is None, "nothing precedes the first token"
    assert all(logprob <= 0 for logprob in found.token_logprobs[1:])


def test_logprobs_of_a_prompt_are_those_of_the_same_text_generated(server: Server) -> None:
    generated = complete(server, STORY, max_tokens=6, logprobs=1)
    tokens = server.http.post("/tokenize", json={"model": server.model, "prompt": STORY}).json()["tokens"]
    again = complete(server, STORY + generated.choices[0].text, max_tokens=1, echo=True, logprobs=1)
    if again.usage.prompt_tokens != len(tokens) + 6:
        pytest.skip("the generated text is tokenized in another way than it was generated")
    found = again.choices[0].logprobs.token_logprobs[len(tokens) : len(tokens) + 6]
    assert found == pytest.approx(generated.choices[0].logprobs.token_logprobs, abs=1e-3)
