"""Asks the demo model held-out questions: `python models/demo/evaluate.py`.

First the 20 questions of questions.json, then some hundred fresh ones from the held-out side of the split, per task.
Greedy, through transformers, in the arithmetic that --dtype names. Ends with status 1 below the promised accuracy.
"""

import argparse
import json
import random
import sys
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import words
from conversations import Conversation, conversation
from tasks import Turn

HERE = Path(__file__).parent
LEAST_OF_20 = 19
LEAST_SHARE = 0.95


def right(match: str, expect: str, answer: str) -> bool:
    """Judges a trimmed answer; the rules are listed in README.md."""
    answer = answer.strip()
    if match == "equals":
        return answer == expect
    if match == "contains":
        return expect in answer
    if match == "list":
        category, count = expect.split(":")
        items = answer.rstrip(".").replace(" and ", ", ").split(", ")
        return len(items) == len(set(items)) == int(count) and set(items) <= set(words.CATEGORIES[category])
    if match == "story":
        return all(fact in answer for fact in expect.split("|")) and answer.endswith(".") and answer.count(".") >= 4
    raise ValueError(f"unknown match rule {match}")


def held_out_questions(count: int, seed: int) -> list[tuple[Conversation, int]]:
    """`count` held-out conversations and the turn to ask in each: the last one, so that context counts."""
    rng = random.Random(seed)
    asked = []
    while len(asked) < count:
        talk = conversation(rng, holdout=True)
        if len(talk.turns) <= 6:
            asked.append((talk, len(talk.turns) - 1))
    return asked


class Model:
    """The exported folder, asked through its chat template."""

    def __init__(self, folder: str, dtype: str):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def answer(self, messages: list[dict[str, str]]) -> str:
        """The greedy answer."""
        given = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",
                                                   return_dict=True)
        with torch.inference_mode():
            made = self.model.generate(**given, max_new_tokens=200, do_sample=False)
        return self.tokenizer.decode(made[0, given["input_ids"].size(1):], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default=str(HERE / "weights"))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = Model(args.weights, args.dtype)

    questions = json.loads((HERE / "questions.json").read_text())
    good = 0
    for question in questions:
        answer = model.answer(question["messages"])
        hit = right(question["match"], question["expect"], answer)
        good += hit
        print(f"{'right' if hit else 'WRONG'}  {question['name']}: {answer!r}")
    print(f"{good} of {len(questions)} questions right")

    tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for talk, index in held_out_questions(args.count, args.seed):
        turn: Turn = talk.turns[index]
        answer = model.answer(talk.messages(index))
        hit = right(turn.match, turn.expect, answer)
        tally[turn.task][0] += hit
        tally[turn.task][1] += 1
        if not hit:
            print(f"WRONG  {turn.task}: {turn.user!r} -> {answer!r}, expected {turn.answer!r}")
    for task, (hits, asked) in sorted(tally.items()):
        print(f"{task:16} {hits:4} of {asked:4}")
    share = sum(hits for hits, _ in tally.values()) / max(1, sum(asked for _, asked in tally.values()))
    print(f"all held-out     {100 * share:.1f} %")
    sys.exit(0 if good >= LEAST_OF_20 and share >= LEAST_SHARE else 1)


if __name__ == "__main__":
    main()
