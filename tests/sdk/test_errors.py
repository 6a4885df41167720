"""What is refused, and in which words."""

import os

import httpx
import openai
import pytest

from cases import CHAT, COMPLETIONS, REFUSED, SUM, Refusal, body
from server import Server


def error_of(response: httpx.Response, status: int) -> dict:
    """Returns the error in a response of this status, which must have the form of the API."""
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"].startswith("application/json")
    answer = response.json()
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"] and answer["error"]["type"]
    return answer["error"]


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.case.name)
def test_a_wrong_request_is_refused_with_the_name_of_its_field(server: Server, refusal: Refusal) -> None:
    response = server.http.post(refusal.case.path, json=body(server, refusal.case))
    error = error_of(response, refusal.status)
    if refusal.param:
        assert error["param"] and error["param"].split(".")[0].split("[")[0] == refusal.param, error
        assert refusal.param in error["message"]
    if refusal.code:
        assert error["code"] == refusal.code


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (COMPLETIONS, "prompt")])
def test_a_missing_field_is_named(server: Server, path: str, field: str) -> None:
    error = error_of(server.http.post(path, json={"model": server.model}), 400)
    assert error["param"] == field


def test_errors_are_those_of_the_official_client(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        server.api.chat.completions.create(model=server.model, messages=SUM, temperature="hot")
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        server.api.chat.completions.create(model="nobody", messages=SUM)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        server.api.completions.create(model=server.model, prompt=[30] * (server.max_model_len + 1))
    assert long.value.code == "context_length_exceeded"
    assert str(server.max_model_len) in long.value.message


def test_a_prompt_that_fills_the_context_is_one_token_too_long(server: Server) -> None:
    request = {"model": server.model, "max_tokens": 1}
    full = server.http.post(COMPLETIONS, json={**request, "prompt": [30] * server.max_model_len})
    assert error_of(full, 400)["code"] == "context_length_exceeded"
    fits = server.http.post(COMPLETIONS, json={**request, "prompt": [30] * (server.max_model_len - 1)})
    assert fits.status_code == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"model": }'], ids=repr)
def test_what_is_no_json_object_is_refused(server: Server, path: str, content: bytes) -> None:
    response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    error_of(response, 400)


def test_the_server_still_answers_after_all_that(server: Server) -> None:
    assert server.api.chat.completions.create(model=server.model, messages=SUM, max_tokens=2).choices


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_routes_that_take_a_body_cannot_be_got(server: Server, path: str) -> None:
    error_of(server.http.get(path), 405)


@pytest.mark.parametrize("path", ["/v1/nothing", "/nothing", "/v1/chat", "/v1/chat/completions/more"])
def test_other_routes_are_not_found(server: Server, path: str) -> None:
    error_of(server.http.get(path), 404)
    error_of(server.http.post(path, json={}), 404)


@pytest.mark.skipif("TIDEMILL_API_KEY" not in os.environ, reason="TIDEMILL_API_KEY names no key that the server wants")
class TestKey:
    """A server that was given a key wants it from everyone, except where a probe has none."""

    def test_a_wrong_key_is_refused(self, server: Server) -> None:
        with pytest.raises(openai.AuthenticationError) as error:
            server.api.with_options(api_key="wrong").models.list()
        assert error.value.code == "invalid_api_key"

    @pytest.mark.parametrize("header", [None, "Bearer", "Bearer x", "Basic abc", "wrong"])
    def test_no_key_is_refused(self, server: Server, header: str | None) -> None:
        headers = {"Authorization": header} if header else {}
        url = server.http.base_url.join(COMPLETIONS)
        error_of(httpx.post(url, json={"prompt": "Hi"}, headers=headers), 401)

    @pytest.mark.parametrize("path", ["/health", "/metrics"])
    def test_probes_need_none(self, server: Server, path: str) -> None:
        assert httpx.get(server.http.base_url.join(path)).status_code == 200
