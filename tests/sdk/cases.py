"""Requests that have one right answer each, because they are greedy or have a seed, and requests that are refused.

Bodies are as they go over the wire; the model's name is added by `body`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from server import Server

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

SUM = [{"role": "user", "content": "What is 7 + 5?"}]
STORY = "Once upon a time there was a fox"
UNICODE = "Ça va? 你好 😀 👩‍👩‍👧 e\u0301 שלום"


@dataclass(frozen=True)
class Case:
    """A request by a name that says what it is about."""

    name: str
    path: str
    fields: dict = field(default_factory=dict)


def body(server: Server, case: Case) -> dict:
    """Returns the body of a case for a server."""
    return {"model": server.model, **case.fields}


def chat(name: str, **fields: object) -> Case:
    """Returns a chat, a greedy one unless told otherwise."""
    return Case(name, CHAT, {"messages": SUM, "temperature": 0, "max_tokens": 24, **fields})


def completion(name: str, **fields: object) -> Case:
    """Returns a completion, a greedy one that goes on to its limit unless told otherwise."""
    return Case(name, COMPLETIONS, {"prompt": STORY, "temperature": 0, "max_tokens": 24, "ignore_eos": True, **fields})


ANSWERED = [
    chat("chat"),
    chat("chat with logprobs", logprobs=True),
    chat("chat with top logprobs", logprobs=True, top_logprobs=4),
    chat("chat of several turns", messages=[*SUM, {"role": "assistant", "content": "12"}, *SUM]),
    chat("chat with a system text", messages=[{"role": "system", "content": "Be brief."}, *SUM]),
    chat("chat with a content of parts", messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]),
    chat("chat in many scripts", messages=[{"role": "user", "content": UNICODE}], ignore_eos=True),
    chat("chat by max_completion_tokens", max_tokens=None, max_completion_tokens=5, ignore_eos=True),
    chat("sampled chat", temperature=1.2, top_p=0.9, seed=3),
    chat("sampled chat, three choices", temperature=1.2, seed=4, n=3),
    completion("completion"),
    completion("completion that may end", ignore_eos=False),
    completion("completion of one token", max_tokens=1),
    completion("completion with logprobs", logprobs=3),
    completion("completion with echo", echo=True, logprobs=2),
    completion("completion of a long prompt", prompt=" and then".join([STORY] * 20), max_tokens=8),
    completion("completion of two prompts", prompt=[STORY, "One, two, three,"]),
    completion("completion of tokens", prompt=list(range(30, 70))),
    completion("completion of two lists of tokens", prompt=[[30, 31, 32], [40, 41]]),
    completion("sampled completion", temperature=1.0, seed=5, logprobs=1),
    completion("sampled within top_k", temperature=1.5, top_k=5, seed=6),
    completion("sampled with min_p", temperature=1.5, min_p=0.2, seed=7),
    completion("sampled with penalties", temperature=0.8, seed=8, presence_penalty=0.5, frequency_penalty=0.4),
    completion("sampled with a repetition penalty", temperature=0.8, seed=9, repetition_penalty=1.4),
    completion("sampled with a bias", temperature=1.0, seed=10, logit_bias={"30": 4.0, "31": -100}),
    completion("four choices of two prompts", prompt=[STORY, "One,"], temperature=1.3, seed=11, n=4, max_tokens=6),
    completion("stopped by a text", stop=["the", "and", "a"], max_tokens=60),
    completion("no fewer tokens than min_tokens", stop=["e"], min_tokens=10, max_tokens=60),
]  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """A request that is refused, and with what: status, field and code; what is None here is not compared."""

    case: Case
    status: int = 400
    param: str | None = None
    code: str | None = None


def wrong(base: Callable[..., Case], param: str, value: object, **more: object) -> Refusal:
    """Returns the refusal of one field of a chat or completion, whose type or range is wrong."""
    return Refusal(base(f"{base.__name__}, {param}={value!r}", **{param: value}, **more), param=param)


REFUSED = [
    *[
        wrong(base, param, value)
        for base in (chat, completion)
        for param, value in [
            ("temperature", "hot"),
            ("temperature", -1),
            ("top_p", []),
            ("top_p", 1.5),
            ("max_tokens", "ten"),
            ("max_tokens", -1),
            ("max_tokens", 2.5),
            ("n", "two"),
            ("n", 0),
            ("n", 100_000),
            ("stream", "yes"),
            ("stop", 5),
            ("seed", "luck"),
            ("logit_bias", [1]),
            ("logit_bias", {"word": 1}),
            ("presence_penalty", "much"),
            ("presence_penalty", 9),
            ("frequency_penalty", -9),
            ("repetition_penalty", 0),
            ("top_k", "few"),
            ("min_p", 2),
            ("min_tokens", -1),
            ("stop_token_ids", "3"),
            ("ignore_eos", "no"),
            ("model", 7),
        ]
    ],
    wrong(chat, "messages", "Hi"),
    wrong(chat, "messages", []),
    wrong(chat, "messages", None),
    wrong(chat, "messages", [{"content": "no role"}]),
    wrong(chat, "messages", [{"role": "user", "content": 7}]),
    wrong(chat, "logprobs", 3),
    wrong(chat, "top_logprobs", "3", logprobs=True),
    wrong(chat, "top_logprobs", 1000, logprobs=True),
    wrong(chat, "top_logprobs", 3, logprobs=False),
    wrong(completion, "prompt", {"text": "Hi"}),
    wrong(completion, "prompt", None),
    wrong(completion, "prompt", []),
    wrong(completion, "prompt", [10**9]),
    wrong(completion, "logprobs", "all"),
    wrong(completion, "logprobs", 1000),
    wrong(completion, "echo", "loud"),
    Refusal(chat("chat with no such model", model="nobody"), 404, "model", "model_not_found"),
    Refusal(completion("completion by no such model", model="nobody"), 404, "model", "model_not_found"),
    Refusal(completion("a prompt beyond the context", prompt=[30] * 200_000), code="context_length_exceeded"),
    Refusal(completion("an answer beyond the context", max_tokens=100_000_000), code="context_length_exceeded"),
    Refusal(chat("a chat beyond the context", max_tokens=100_000_000), code="context_length_exceeded"),
]  # fmt: skip
