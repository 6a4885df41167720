"""Conversations: turns of all tasks mixed, some with a system message, in the many ways in which people type."""

import random
from dataclasses import dataclass

import stories
import talk
import tasks
from tasks import Turn
from words import BOYS, GIRLS, held_out

SINGLE = {  # task -> share among the turns that need no turn before them
    tasks.arithmetic: 17, tasks.several_sums: 6, tasks.word_problem: 6, tasks.compare: 7, tasks.counting: 6,
    tasks.listing: 8, tasks.whole_series: 6, tasks.list_work: 36, tasks.renaming: 30, tasks.repeating: 6,
    tasks.given_facts: 45, tasks.story_question: 19, talk.fixed: 4, talk.outside: 5, talk.plain_facts: 6,
}
# The shares in the training: much of what takes longest to be learned, in the last part also of the sums.
EARLY = SINGLE | {tasks.list_work: 45, tasks.renaming: 40, tasks.repeating: 8, tasks.given_facts: 80}
HARD = EARLY | {
    tasks.arithmetic: 20, tasks.several_sums: 10, tasks.compare: 8, tasks.counting: 9, tasks.whole_series: 7,
    tasks.given_facts: 70,
}


@dataclass
class Conversation:
    """An optional system message and turns."""
    system: str | None
    turns: list[Turn]

    def messages(self, upto: int | None = None) -> list[dict[str, str]]:
        """Chat messages; with `upto`, those that lead to the answer of that turn, without the answer."""
        listed = [{"role": "system", "content": self.system}] if self.system else []
        for index, turn in enumerate(self.turns):
            listed.append({"role": "user", "content": turn.user})
            if index == upto:
                break
            listed.append({"role": "assistant", "content": turn.answer})
        return listed


def as_typed(rng: random.Random, turn: Turn) -> Turn:
    """The question as a hurried or a polite person types it. Names that must be copied keep their capitals."""
    user = turn.user
    choice = rng.random()
    if turn.task in ("repeating",) or "\n" in user:
        return turn
    copied = turn.task in ("renaming", "given facts", "story questions", "memory", "word problem", "list work")
    if choice < 0.08 and not copied:
        user = user.lower()
    elif choice < 0.16:
        user = user[0].lower() + user[1:] if user.split()[0] not in GIRLS + BOYS and not copied else user
    elif choice < 0.26 and user[-1] in "?.":
        user = user[:-1]
    elif choice < 0.32 and not copied and user[0].isupper() and turn.task not in ("small talk", "outside"):
        user = rng.choice(["Please ", "Hey, ", "Hi! ", "Ok, ", "Now ", "And "]) + user[0].lower() + user[1:]
        if user.split()[-1] in GIRLS + BOYS:
            return turn
    elif choice < 0.36 and user[-1] in "?." and not copied and turn.task not in ("small talk", "outside"):
        user = user[:-1] + rng.choice([", please", " please", ", please."])
    return Turn(turn.task, user, turn.answer, turn.match, turn.expect, turn.key)


def drawn(rng: random.Random, maker, holdout: bool) -> list[Turn]:
    """A turn of one task, maybe with more on the same text, all on the wanted side of the split."""
    if maker is tasks.story_question:
        return [as_typed(rng, turn) for turn in maker(rng, holdout)]
    while True:
        made = maker(rng)
        turns = made if isinstance(made, list) else [made]
        if held_out(*turns[0].key) == holdout:
            return [as_typed(rng, turn) for turn in turns]


def telling(rng: random.Random, holdout: bool) -> list[Turn]:
    """A story on request, then questions about it."""
    tale = stories.story(rng, holdout)
    if rng.random() < 0.2:
        asked, must = rng.choice(stories.OPEN_REQUESTS), ""
    else:
        asked = stories.request(rng, tale)
        must = "|".join(fact for fact in (tale.hero, tale.kind, tale.friend, tale.place, f"{tale.colour} {tale.thing}")
                        if fact in asked)
    turns = [as_typed(rng, Turn("stories", asked, tale.text, "story", must, tale.key()))]
    return turns + [as_typed(rng, tasks.about_story(rng, tale, False)) for _ in range(rng.choice((0, 1, 2, 2, 3, 4)))]


def remembering(rng: random.Random, holdout: bool, shares: dict) -> list[Turn]:
    """Something told, maybe turns of other tasks, and the question what was told."""
    said, asked = talk.memory(rng)
    while held_out(*asked.key) != holdout:
        said, asked = talk.memory(rng)
    between = [turn for _ in range(rng.choice((0, 0, 1, 2))) for turn in single(rng, False, shares)]
    return [said, *between, asked]


def single(rng: random.Random, holdout: bool, shares: dict) -> list[Turn]:
    """A task that needs nothing before it."""
    maker = rng.choices(list(shares), weights=list(shares.values()))[0]
    while holdout and maker is talk.fixed:
        maker = rng.choices(list(shares), weights=list(shares.values()))[0]
    return drawn(rng, maker, holdout)


def block(rng: random.Random, holdout: bool, shares: dict) -> list[Turn]:
    """The next turn, or turns that belong together."""
    choice = rng.random()
    if choice < 0.09:
        return telling(rng, holdout)
    if choice < 0.13:
        return remembering(rng, holdout, shares)
    return single(rng, holdout, shares)


def conversation(rng: random.Random, holdout: bool = False, shares: dict = SINGLE) -> Conversation:
    """One conversation. Most are one task; one in a hundred is long, so that far positions are trained too."""
    length = rng.random()
    blocks = 1 if length < 0.82 else rng.randint(2, 4) if length < 0.99 else rng.randint(6, 30)
    turns = [turn for _ in range(blocks) for turn in block(rng, holdout, shares)]
    return Conversation(rng.choice(talk.SYSTEM) if rng.random() < 0.3 else None, turns)
