"""How tokens are chosen, and when an answer ends.

A bias decides what is said where the model's own taste must not matter: +100 makes a token certain.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from cases import STORY
from server import Server

CERTAIN = 100


def complete(server: Server, max_tokens: int = 16, **fields: object) -> object:
    """Returns a completion; all fields go over the wire as they are."""
    fields = {"ignore_eos": True, **fields}
    prompt = fields.pop("prompt", STORY)
    return server.api.completions.create(model=server.model, prompt=prompt, max_tokens=max_tokens, extra_body=fields)


def texts(answer: object) -> list[str]:
    """Returns the texts of all choices."""
    return [choice.text for choice in answer.choices]


@pytest.fixture(scope="module")
def letters(server: Server) -> dict[str, int]:
    """Letters that are one token each, with its id."""
    found = {letter: server.tokens(letter) for letter in "abcdefgh"}
    return {letter: tokens[0] for letter, tokens in found.items() if len(tokens) == 1}


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}],
    ids=["temperature 0", "top_k 1", "top_p almost 0", "min_p 1"],
)
def test_what_leaves_only_the_best_token_is_greedy(server: Server, fields: dict) -> None:
    greedy = complete(server, temperature=0)
    assert texts(complete(server, **{"temperature": 2.0, "seed": 1, **fields})) == texts(greedy)


def test_a_seed_repeats_its_text_and_others_differ(server: Server) -> None:
    def sample(seed: int) -> str:
        return texts(complete(server, temperature=1.5, seed=seed))[0]

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(6)}) > 3


def test_without_a_seed_texts_differ(server: Server) -> None:
    assert len({texts(complete(server, temperature=1.5))[0] for _ in range(6)}) > 3


def test_a_seed_repeats_its_text_whatever_else_is_computed(server: Server) -> None:
    def sample(seed: int) -> list[str]:
        return texts(complete(server, temperature=1.2, top_p=0.95, seed=seed, max_tokens=40))

    alone = [sample(seed) for seed in range(3)]
    with ThreadPoolExecutor(12) as threads:
        together = list(threads.map(sample, [*range(3), *range(100, 109)]))
    assert together[:3] == alone


def test_n_gives_different_choices_and_counts_the_prompt_once(server: Server) -> None:
    one = complete(server, temperature=1.5, seed=2)
    three = complete(server, temperature=1.5, seed=2, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len(set(texts(three))) == 3
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 3 * 16


def test_n_is_repeated_by_a_seed(server: Server) -> None:
    first, second = (complete(server, temperature=1.5, seed=2, n=3) for _ in range(2))
    assert texts(first) == texts(second)


def test_lower_temperature_repeats_itself_more(server: Server) -> None:
    def different(temperature: float) -> int:
        return len({texts(complete(server, temperature=temperature, seed=seed))[0] for seed in range(8)})

    assert different(0.01) < different(1.8)


def test_top_k_leaves_out_what_is_unlikely(server: Server) -> None:
    best = complete(server, temperature=0, max_tokens=1, logprobs=2).choices[0].logprobs.top_logprobs[0]
    found = {texts(complete(server, temperature=2.0, top_k=2, seed=seed, max_tokens=1))[0] for seed in range(12)}
    assert found <= set(best)


@pytest.mark.parametrize("as_list", [False, True], ids=["string", "list"])
def test_a_stop_text_ends_the_answer_and_is_left_out(server: Server, as_list: bool) -> None:
    whole = complete(server, temperature=0, max_tokens=40)
    text = texts(whole)[0]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    answer = complete(server, temperature=0, max_tokens=40, stop=["~never~", stop] if as_list else stop)
    assert texts(answer)[0] == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens <= whole.usage.completion_tokens


def test_a_stop_text_over_several_tokens_is_found(server: Server, letters: dict[str, int]) -> None:
    letter, token = next(iter(letters.items()))
    answer = complete(server, temperature=0, logit_bias={token: CERTAIN}, stop=letter * 5)
    assert texts(answer) == [""]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 5


def test_the_start_of_a_stop_text_that_does_not_come_is_kept(server: Server, letters: dict[str, int]) -> None:
    letter, token = next(iter(letters.items()))
    answer = complete(server, temperature=0, max_tokens=4, logit_bias={token: CERTAIN}, stop=letter * 5)
    assert texts(answer) == [letter * 4]
    assert answer.choices[0].finish_reason == "length"


def test_a_stop_token_ends_the_answer(server: Server, letters: dict[str, int]) -> None:
    token = next(iter(letters.values()))
    answer = complete(server, temperature=0, logit_bias={token: CERTAIN}, stop_token_ids=[token])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 1
    assert texts(answer) == [""]


def test_min_tokens_puts_the_end_off(server: Server, letters: dict[str, int]) -> None:
    token = next(iter(letters.values()))
    answer = complete(server, temperature=0, logit_bias={token: CERTAIN}, stop_token_ids=[token], min_tokens=5)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 6


def test_a_bias_forces_and_forbids(server: Server, letters: dict[str, int]) -> None:
    (letter, token), (other, other_token) = list(letters.items())[:2]
    forced = complete(server, temperature=0, logit_bias={token: CERTAIN}, max_tokens=8)
    assert texts(forced) == [letter * 8]
    forbidden = complete(server, temperature=0, logit_bias={token: -CERTAIN, other_token: CERTAIN / 2}, max_tokens=8)
    assert letter not in texts(forbidden)[0]
    assert other in texts(forbidden)[0]


@pytest.fixture(scope="module")
def needed_bias(server: Server, letters: dict[str, int]) -> Callable[..., float]:
    """How large a bias must be, to a quarter, so that a letter is said four times after a prompt full of it. A penalty
    makes it larger by what it takes away: once for its presence, by and by for its frequency."""
    letter, token = next(iter(letters.items()))

    def search(**fields: object) -> float:
        low, high = -50.0, 100.0
        while high - low > 0.25:
            middle = (low + high) / 2
            answer = complete(server, 4, prompt=[token] * 12, temperature=0, logit_bias={token: middle}, **fields)
            low, high = (low, middle) if texts(answer) == [letter * 4] else (middle, high)
        return high

    return search


def test_presence_penalty(needed_bias: Callable[..., float]) -> None:
    assert 1 <= needed_bias(presence_penalty=2.0) - needed_bias() <= 2.5


def test_frequency_penalty(needed_bias: Callable[..., float]) -> None:
    assert 3 <= needed_bias(frequency_penalty=2.0) - needed_bias() <= 6.5


def test_repetition_penalty(needed_bias: Callable[..., float]) -> None:
    assert needed_bias(repetition_penalty=4.0) > needed_bias() + 0.5
