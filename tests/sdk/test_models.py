"""What is served."""

import openai
import pytest

from server import Server


def test_the_list_names_a_model(server: Server) -> None:
    page = server.api.models.list()
    assert page.object == "list"
    model = page.data[0]
    assert model.object == "model"
    assert model.id
    assert model.owned_by
    assert model.created > 0


def test_a_model_says_how_long_a_text_it_takes(server: Server) -> None:
    model = server.http.get("/v1/models").json()["data"][0]
    assert model["max_model_len"] == server.max_model_len
    assert model["max_model_len"] >= 64


def test_one_model_can_be_asked_for(server: Server) -> None:
    assert server.api.models.retrieve(server.model).id == server.model


def test_another_model_is_not_found(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        server.api.models.retrieve("nobody")
    assert error.value.code == "model_not_found"
