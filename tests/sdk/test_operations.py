"""What operators and tools ask: health, version, metrics, tokens."""

import pytest

from cases import STORY, SUM, UNICODE
from server import Server

GAUGES = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"]
COUNTERS = [
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
]
HISTOGRAMS = [
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_params_n",
    "request_params_max_tokens",
]
SAMPLES = (
    [f"vllm:{name}" for name in GAUGES]
    + [f"vllm:{name}_total" for name in COUNTERS]
    + [f"vllm:{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "count", "sum")]
)


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_a_serving_server_is_well(server: Server, path: str) -> None:
    assert server.http.get(path).status_code == 200


def test_the_version_is_told(server: Server) -> None:
    assert server.http.get("/version").json()["version"]


@pytest.fixture(scope="module")
def metrics(server: Server) -> dict[str, float]:
    """The metrics after a chat and a completion."""
    server.api.chat.completions.create(model=server.model, messages=SUM, max_tokens=4)
    server.api.completions.create(model=server.model, prompt=STORY, max_tokens=4, n=2, temperature=1.0)
    return server.metrics()


@pytest.mark.parametrize("name", SAMPLES)
def test_dashboards_find_their_metrics(metrics: dict[str, float], name: str) -> None:
    assert name in metrics


def test_metrics_count_tokens(server: Server) -> None:
    before = server.metrics()
    answer = server.api.completions.create(
        model=server.model, prompt=STORY, max_tokens=9, n=2, temperature=1.0, extra_body={"ignore_eos": True}
    )
    after = server.metrics()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["vllm:generation_tokens_total"] == answer.usage.completion_tokens == 18
    assert grown["vllm:request_success_total"] == 2
    assert grown["vllm:time_to_first_token_seconds_count"] >= 1


def test_metrics_have_types_and_the_name_of_the_model(server: Server, metrics: dict[str, float]) -> None:
    assert metrics
    text = server.http.get("/metrics").text
    assert "# TYPE vllm:num_requests_running gauge" in text
    assert "# TYPE vllm:generation_tokens_total counter" in text
    assert "# TYPE vllm:time_to_first_token_seconds histogram" in text
    assert f'model_name="{server.model}"' in text


@pytest.mark.parametrize("text", ["", STORY, UNICODE, "  space \n\n\t", "<|im_start|>"], ids=repr)
def test_tokens_and_text_go_both_ways(server: Server, text: str) -> None:
    tokens = server.tokens(text)
    assert server.text(tokens) == text


def test_tokenize_has_the_shape_of_vllm(server: Server) -> None:
    answer = server.http.post("/tokenize", json={"model": server.model, "prompt": STORY}).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == server.max_model_len
    assert all(isinstance(token, int) for token in answer["tokens"])
    with_strings = server.http.post(
        "/tokenize", json={"model": server.model, "prompt": STORY, "return_token_strs": True}
    ).json()
    assert len(with_strings["token_strs"]) == answer["count"]


def test_tokenize_renders_a_chat(server: Server) -> None:
    opened, closed = (
        server.http.post(
            "/tokenize", json={"model": server.model, "messages": SUM, "add_generation_prompt": is_opened}
        ).json()["tokens"]
        for is_opened in (True, False)
    )
    assert SUM[0]["content"] in server.text(opened)
    assert opened[: len(closed)] == closed
    assert len(opened) > len(closed)


def test_the_model_may_be_left_out_of_tokenize(server: Server) -> None:
    tokens = server.http.post("/tokenize", json={"prompt": STORY}).json()["tokens"]
    assert server.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"].endswith(STORY)
