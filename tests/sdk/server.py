"""A server under test: the official client, and a plain one for what the official one would not send or not show."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import httpx
from openai import AsyncOpenAI, OpenAI

REQUEST_LIMIT_S = 120.0


@dataclass(frozen=True)
class Server:
    """One server, by its base URL as the official client takes it (ending in `/v1`)."""

    base_url: str
    api_key: str

    @cached_property
    def api(self) -> OpenAI:
        """The official client. It does not retry, so that no error stays hidden."""
        return OpenAI(base_url=self.base_url, api_key=self.api_key, max_retries=0, timeout=REQUEST_LIMIT_S)

    def parallel_api(self) -> AsyncOpenAI:
        """Returns the official client for many requests at once; it belongs to the event loop of its first request."""
        return AsyncOpenAI(base_url=self.base_url, api_key=self.api_key, max_retries=0, timeout=REQUEST_LIMIT_S)

    @cached_property
    def http(self) -> httpx.Client:
        """A plain client; paths are those of the server, so the API's begin with `/v1`."""
        root = self.base_url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=root, headers=headers, timeout=REQUEST_LIMIT_S)

    @cached_property
    def model(self) -> str:
        """The id of the first model."""
        return self.api.models.list().data[0].id

    @cached_property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        body = {"model": self.model, "prompt": "Hi"}
        return self.http.post("/tokenize", json=body).raise_for_status().json()["max_model_len"]

    def tokens(self, text: str) -> list[int]:
        """Returns the ids of a text's tokens, without special ones."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return self.http.post("/tokenize", json=body).raise_for_status().json()["tokens"]

    def text(self, tokens: list[int]) -> str:
        """Returns the text of tokens."""
        body = {"model": self.model, "tokens": tokens}
        return self.http.post("/detokenize", json=body).raise_for_status().json()["prompt"]

    def metrics(self) -> dict[str, float]:
        """Returns the samples of `/metrics`, summed over their labels."""
        lines = self.http.get("/metrics").raise_for_status().text.splitlines()
        samples = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
        pairs = sorted((name.split("{")[0], float(value)) for name, value in samples)
        return {name: sum(value for _, value in group) for name, group in groupby(pairs, key=lambda pair: pair[0])}


def eventually(what: str, limit_s: float, is_so: Callable[[], bool]) -> None:
    """Asks again and again until something is so; fails when it is not within the limit."""
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.02)
