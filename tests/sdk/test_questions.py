"""The demo model's held-out questions, asked through the official client."""

import json
from pathlib import Path

import pytest

from server import Server

QUESTIONS = Path(__file__).resolve().parents[2] / "models" / "demo" / "questions.json"
ENOUGH = 18


def ask(server: Server, messages: list[dict], streamed: bool) -> str:
    """Returns the greedy answer."""
    request = {"model": server.model, "messages": messages, "temperature": 0}
    if not streamed:
        return server.api.chat.completions.create(**request).choices[0].message.content
    chunks = server.api.chat.completions.create(**request, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def is_right(question: dict, answer: str) -> bool:
    """Returns whether an answer is the expected one, or has it in it, as the question says."""
    if question["match"] == "equals":
        return answer.strip() == question["expect"]
    return question["expect"] in answer


@pytest.mark.parametrize("streamed", [False, True], ids=["in one piece", "streamed"])
def test_the_demo_model_is_right(server: Server, streamed: bool) -> None:
    if "demo" not in server.model:
        pytest.skip(f"{server.model} is not the demo model")
    questions = json.loads(QUESTIONS.read_text())
    assert len(questions) == 20
    answers = [(question, ask(server, question["messages"], streamed)) for question in questions]
    wrong = {question["name"]: answer for question, answer in answers if not is_right(question, answer)}
    assert len(questions) - len(wrong) >= ENOUGH, wrong
