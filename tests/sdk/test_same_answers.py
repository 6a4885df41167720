"""Two servers, one split and one whole, give the same answers: text, logprobs, usage, reasons of the end, errors."""

import pytest

from answers import comparable
from cases import ANSWERED, REFUSED, Case, Refusal, body
from server import Server


@pytest.mark.parametrize("streamed", [False, True], ids=["in one piece", "streamed"])
@pytest.mark.parametrize("case", ANSWERED, ids=lambda case: case.name)
def test_answers_are_equal(server: Server, other_server: Server, case: Case, streamed: bool) -> None:
    stream = {"stream": True, "stream_options": {"include_usage": True}} if streamed else {}
    ours, theirs = (
        comparable(each.http.post(case.path, json={**body(each, case), **stream})) for each in (server, other_server)
    )
    assert ours["status"] == 200
    assert ours == theirs


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.case.name)
def test_refusals_are_equal(server: Server, other_server: Server, refusal: Refusal) -> None:
    ours, theirs = (
        comparable(each.http.post(refusal.case.path, json=body(each, refusal.case))) for each in (server, other_server)
    )
    assert ours == theirs


def test_the_servers_serve_the_same_model(server: Server, other_server: Server) -> None:
    assert (server.model, server.max_model_len) == (other_server.model, other_server.max_model_len)
