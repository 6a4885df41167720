"""Many requests at once, and clients that leave."""

import asyncio

import openai

from cases import STORY
from server import Server, eventually

PARALLEL = 16
SOON_S = 10.0


def request(server: Server, number: int) -> dict:
    """Returns one of many requests with one right answer each: half greedy, half with a seed."""
    sampling = {"temperature": 0} if number % 2 else {"temperature": 1.0, "seed": number}
    prompt = STORY + " and a crow" * (number % 5)
    return {"model": server.model, "prompt": prompt, "max_tokens": 8 + 3 * number, **sampling}


def test_parallel_streams_say_what_each_would_say_alone(server: Server) -> None:
    extra = {"extra_body": {"ignore_eos": True}}
    requests = [request(server, number) for number in range(PARALLEL)]
    alone = [server.api.completions.create(**request, **extra).choices[0].text for request in requests]

    async def stream(api: openai.AsyncOpenAI, request: dict) -> str:
        chunks = await api.completions.create(**request, **extra, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks if chunk.choices])

    async def all_at_once() -> list[str]:
        async with server.parallel_api() as api:
            return await asyncio.gather(*(stream(api, request) for request in requests))

    assert asyncio.run(all_at_once()) == alone


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    eventually("idle before", SOON_S, lambda: is_idle(server))
    before = server.metrics().get("vllm:generation_tokens_total", 0.0)
    long = server.max_model_len - 64
    fields = {"temperature": 1.0, "extra_body": {"ignore_eos": True}}
    streams = [
        server.api.completions.create(model=server.model, prompt=STORY, max_tokens=long, stream=True, **fields)
        for _ in range(4)
    ]
    for stream in streams:
        assert [next(stream).choices[0].index for _ in range(3)] == [0, 0, 0]
    for stream in streams:
        stream.close()
    eventually("idle after the clients left", SOON_S, lambda: is_idle(server))
    made = server.metrics()["vllm:generation_tokens_total"] - before
    assert made < 4 * long, "the answers were written to their end although nobody read them"
    assert server.http.get("/health").status_code == 200


def test_a_client_that_leaves_before_the_first_token_frees_its_place(server: Server) -> None:
    prompt = [30 + number % 100 for number in range(server.max_model_len - 64)]
    request = {"model": server.model, "prompt": prompt, "max_tokens": 32, "stream": True}

    async def leave() -> None:
        async with server.parallel_api() as api:
            asking = [asyncio.create_task(api.completions.create(**request)) for _ in range(4)]
            await asyncio.wait(asking, timeout=0.02)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    asyncio.run(leave())
    eventually("idle after the clients left", SOON_S, lambda: is_idle(server))


def is_idle(server: Server) -> bool:
    """Returns whether nothing runs and nothing waits."""
    metrics = server.metrics()
    return metrics["vllm:num_requests_running"] == 0 and metrics["vllm:num_requests_waiting"] == 0
