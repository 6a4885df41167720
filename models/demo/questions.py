"""Writes questions.json: 20 held-out questions over all tasks, drawn with a fixed seed.

Only tasks whose right answer can be judged by "equals" or "contains" take part, so that any client can judge them.
"""

import json
import random
from pathlib import Path

from conversations import conversation

SEED = 2024
WANTED = {  # task -> how many
    "addition": 2, "subtraction": 1, "multiplication": 1, "division": 1, "several sums": 1, "word problem": 2,
    "numbers": 1, "counting": 1, "list work": 2, "series": 1, "renaming": 2, "given facts": 1, "story questions": 2,
    "memory": 1, "outside": 1,
}


def draw() -> list[dict]:
    """The first held-out turns that fill the quota; a second question of a task comes in a longer conversation."""
    rng = random.Random(SEED)
    missing = dict(WANTED)
    chosen = []
    while any(missing.values()):
        talk = conversation(rng, holdout=True)
        last = len(talk.turns) - 1
        turn = talk.turns[last]
        if not missing.get(turn.task) or last > 4 or turn.match not in ("equals", "contains"):
            continue
        context = last > 0 or talk.system is not None
        if context != (missing[turn.task] == 2 or turn.task == "memory"):
            continue
        missing[turn.task] -= 1
        chosen.append({"name": f"{turn.task}{', in a conversation' if context else ''}",
                       "messages": talk.messages(last), "match": turn.match, "expect": turn.expect})
    return sorted(chosen, key=lambda question: list(WANTED).index(question["name"].split(",")[0]))


if __name__ == "__main__":
    questions = draw()
    assert len(questions) == 20, len(questions)
    path = Path(__file__).parent / "questions.json"
    path.write_text(json.dumps(questions, indent=2, ensure_ascii=False) + "\n")
