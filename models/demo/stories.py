"""Stories, requests that lead to them, and questions about them with the right answers.

A story is drawn as a set of facts first; the sentences and the questions are both written from those facts, so an
answer is right by construction.
"""

import random
from dataclasses import dataclass, field

from words import (ACTIVITIES, ANIMALS, BOYS, CHARACTERS, COLOURS, FEELINGS, FOODS, GIRLS, HOMES, OBJECTS, PLACES, SPOTS, TRAITS, article,
                   held_out, name, other, pronoun)

OF_KIND = {"girl": GIRLS, "princess": GIRLS, "boy": BOYS, "king": BOYS}
TIMES = ["One morning", "One day", "One sunny day", "One afternoon"]
NOT_TOLD = ["How old is {N}?", "How old was {N}?", "When is {N}'s birthday?", "What did {N} eat for breakfast?",
            "What is {N}'s last name?", "How tall is {N}?", "What is the name of {N}'s mother?",
            "What is {N}'s favourite song?"]


@dataclass
class Story:
    """One story: its text, its facts, and (questions in several wordings, answer, the word that must appear)."""
    hero: str
    kind: str
    friend: str
    friend_kind: str
    colour: str
    thing: str
    place: str
    text: str = ""
    questions: list[tuple[list[str], str, str]] = field(default_factory=list)

    def key(self) -> tuple[str, ...]:
        """What must not be shared between training and the held-out set."""
        return ("story", self.hero, self.kind, self.colour, self.thing, self.place)


def draw_facts(rng: random.Random) -> Story:
    """Random facts; the text is written later by one of the plots."""
    kind = rng.choice(CHARACTERS)
    hero = rng.choice(OF_KIND[kind]) if kind in OF_KIND else name(rng)
    return Story(hero, kind, name(rng, hero), other(rng, CHARACTERS, kind), rng.choice(COLOURS), rng.choice(OBJECTS),
                 rng.choice(PLACES))


def story(rng: random.Random, holdout: bool = False) -> Story:
    """A story whose facts are on the wanted side of the split."""
    while True:
        drawn = draw_facts(rng)
        if held_out(*drawn.key()) == holdout:
            rng.choice(PLOTS)(rng, drawn)
            return drawn


def opening(rng: random.Random, tale: Story) -> str:
    """The first sentence or two, with the questions they answer."""
    hero, kind, trait, home = tale.hero, tale.kind, rng.choice(TRAITS), rng.choice(HOMES)
    tale.questions += [
        (["Who is the story about?", "Who is this story about?", "Who is the main character?",
          "What is the story about?"], f"The story is about {article(kind)} named {hero}.", hero),
        ([f"What is the name of the {kind}?", f"What is the {kind} called?", f"What is the {kind}'s name?"],
         f"The {kind} is called {hero}.", hero),
        ([f"What kind of animal is {hero}?" if kind in ANIMALS else f"Who is {hero}?", f"What is {hero}?",
          f"Who is {hero}?"], f"{hero} is {article(kind)}.", kind),
    ]
    choice = rng.random()
    if choice < 0.3:
        return f"Once upon a time there was {article(trait)} {kind} named {hero}."
    if choice < 0.5:
        return f"{hero} was {article(trait)} {kind}."
    tale.questions.append(([f"Where did {hero} live?", f"Where does {hero} live?", f"Where did the {kind} live?",
                            f"Where is {hero}'s home?"], f"{hero} lived {home}.", home))
    if choice < 0.75:
        return f"Once there was {article(trait)} {kind} named {hero} who lived {home}."
    return f"{hero} was {article(trait)} {kind}. {pronoun(hero).capitalize()} lived {home}."


def ending(rng: random.Random, tale: Story) -> str:
    """The last sentence."""
    feeling = rng.choice(FEELINGS)
    tale.questions.append((["How did {0} feel?", "How did {0} feel at the end?", "How did the story end for {0}?",
                            "Was {0} happy or sad?" if feeling == "happy" else "How did {0} feel in the end?"],
                           f"{tale.hero} was {feeling}.", feeling))
    tale.questions[-1] = ([wording.format(tale.hero) for wording in tale.questions[-1][0]],) + tale.questions[-1][1:]
    return rng.choice([f"In the evening {tale.hero} was {feeling} and went home.",
                       f"At the end of the day {tale.hero} was very {feeling}.",
                       f"{tale.hero} went home and was {feeling}."])


def colour_question(tale: Story) -> tuple[list[str], str, str]:
    """What colour the thing has, in both spellings."""
    thing, hero = tale.thing, tale.hero
    return ([f"What colour was the {thing}?", f"What color was the {thing}?", f"What colour is the {thing}?",
             f"What color is the {thing}?", f"Which colour did the {thing} have?"],
            f"The {thing} was {tale.colour}.", tale.colour)


def friend_questions(tale: Story, verb: str, past: str) -> list[tuple[list[str], str, str]]:
    """Who the friend is and what kind of character the friend is."""
    hero, friend = tale.hero, tale.friend
    return [([f"Who did {hero} {verb}?", f"Who did the {tale.kind} {verb}?"], f"{hero} {past} {friend}.", friend),
            ([f"What is {friend}?", f"Who is {friend}?"], f"{friend} is {article(tale.friend_kind)}.",
             tale.friend_kind)]


def found(rng: random.Random, tale: Story) -> None:
    """The hero finds a thing, meets a friend, and they do something together."""
    hero, friend, spot, doing = tale.hero, tale.friend, rng.choice(SPOTS), rng.choice(ACTIVITIES)
    thing = f"{article(tale.colour)} {tale.thing}"
    begin = opening(rng, tale)
    if rng.random() < 0.5:
        walk = f"{rng.choice(TIMES)} {hero} went to {tale.place} and found {thing} {spot}."
    else:
        walk = f"{rng.choice(TIMES)} {hero} walked to {tale.place}. There {pronoun(hero)} found {thing} {spot}."
    meet = rng.choice([f"Then {hero} met {article(tale.friend_kind)} named {friend}.",
                       f"On the way home {hero} met {article(tale.friend_kind)} called {friend}."])
    play = rng.choice([f"Together they {doing}.", f"{hero} and {friend} {doing}.",
                       f"They became friends and {doing}."])
    tale.text = " ".join([begin, walk, meet, play, ending(rng, tale)])
    tale.questions += [
        ([f"What did {hero} find?", f"What did the {tale.kind} find?", f"What was found in the story?"],
         f"{hero} found {thing}.", f"{tale.colour} {tale.thing}"),
        ([f"Where did {hero} go?", f"Where did the {tale.kind} go?"], f"{hero} went to {tale.place}.", tale.place),
        ([f"Where was the {tale.thing}?", f"Where did {hero} find the {tale.thing}?"],
         f"The {tale.thing} was {spot}.", spot),
        ([f"What did {hero} and {friend} do?", "What did they do together?", "What did they do?"],
         f"{hero} and {friend} {doing}.", doing),
        colour_question(tale)] + friend_questions(tale, "meet", "met")


def lost(rng: random.Random, tale: Story) -> None:
    """The hero has lost a thing and a friend finds it."""
    hero, friend, spot = tale.hero, tale.friend, rng.choice(SPOTS)
    thing = f"{article(tale.colour)} {tale.thing}"
    begin = opening(rng, tale)
    had = rng.choice([f"{hero} had {thing}.", f"{hero} loved a very special thing: {thing}."])
    gone = f"{rng.choice(TIMES)} the {tale.thing} was gone."
    search = f"{hero} looked for it in {tale.place}, but {pronoun(hero)} could not find it."
    help_ = f"{article(tale.friend_kind).capitalize()} named {friend} helped {hero} and found it {spot}."
    tale.text = " ".join([begin, had, gone, search, help_, ending(rng, tale)])
    tale.questions += [
        ([f"What did {hero} lose?", f"What did the {tale.kind} lose?", f"What was gone?", f"What was lost?"],
         f"{hero} lost {thing}.", f"{tale.colour} {tale.thing}"),
        ([f"Who found the {tale.thing}?"], f"{friend} found the {tale.thing}.", friend),
        ([f"Where did {hero} look?", f"Where did {hero} look for the {tale.thing}?"],
         f"{hero} looked in {tale.place}.", tale.place),
        ([f"Where was the {tale.thing}?", f"Where did {friend} find the {tale.thing}?"],
         f"The {tale.thing} was {spot}.", spot),
        ([f"Who helped {hero}?", f"Who helped the {tale.kind}?"], f"{friend} helped {hero}.", friend),
        colour_question(tale), friend_questions(tale, "", "")[1]]


def gift(rng: random.Random, tale: Story) -> None:
    """It is the hero's birthday and a friend brings a present."""
    hero, friend, doing, food = tale.hero, tale.friend, rng.choice(ACTIVITIES), rng.choice(FOODS)
    thing = f"{article(tale.colour)} {tale.thing}"
    begin = opening(rng, tale)
    party = f"It was {hero}'s birthday, and there was a party in {tale.place}."
    bring = f"{hero}'s friend {friend} the {tale.friend_kind} came and gave {hero} {thing}."
    eat = f"They ate {food} and {doing}."
    tale.text = " ".join([begin, party, bring, eat, ending(rng, tale)])
    tale.questions += [
        ([f"What did {hero} get?", f"What did {friend} give {hero}?", f"What was the present?",
          f"What did the {tale.kind} get?"], f"{hero} got {thing}.", f"{tale.colour} {tale.thing}"),
        ([f"Who gave {hero} the {tale.thing}?", f"Who came to the party?", f"Who is {hero}'s friend?"],
         f"It was {friend}.", friend),
        ([f"Where was the party?", "Where did they have the party?"], f"The party was in {tale.place}.", tale.place),
        (["What did they eat?", f"What did {hero} and {friend} eat?"], f"They ate {food}.", food),
        (["What did they do?", "What did they do together?", f"What did {hero} and {friend} do?"],
         f"They {doing}.", doing), colour_question(tale), friend_questions(tale, "", "")[1]]


def rain(rng: random.Random, tale: Story) -> None:
    """The hero is caught by the weather and a friend offers shelter and food."""
    hero, friend, food, doing = tale.hero, tale.friend, rng.choice(FOODS), rng.choice(ACTIVITIES)
    weather = rng.choice(["rain", "snow"])
    thing = f"{article(tale.colour)} {tale.thing}"
    begin = opening(rng, tale)
    walk = f"{rng.choice(TIMES)} {hero} was in {tale.place} when it began to {weather}."
    shelter = f"{article(tale.friend_kind).capitalize()} named {friend} opened the door and let {hero} in."
    eat = f"{friend} gave {hero} {food}."
    thanks = f"{hero} said thank you and gave {friend} {thing}."
    after = f"When the {weather} stopped, they {doing}."
    tale.text = " ".join([begin, walk, shelter, eat, thanks, after, ending(rng, tale)])
    tale.questions += [
        ([f"Where was {hero}?", f"Where was the {tale.kind}?", f"Where was {hero} when it began to {weather}?"],
         f"{hero} was in {tale.place}.", tale.place),
        ([f"What did {friend} give {hero}?", f"What did {hero} eat?"], f"{friend} gave {hero} {food}.", food),
        ([f"What did {hero} give {friend}?"], f"{hero} gave {friend} {thing}.", f"{tale.colour} {tale.thing}"),
        ([f"Who opened the door?", f"Who let {hero} in?", f"Who helped {hero}?"], f"{friend} let {hero} in.", friend),
        (["What was the weather like?", "How was the weather?"], f"It began to {weather}.", weather),
        ([f"What did they do when the {weather} stopped?", "What did they do?"], f"They {doing}.", doing),
        colour_question(tale), friend_questions(tale, "", "")[1]]


PLOTS = [found, found, lost, gift, rain]


def request(rng: random.Random, tale: Story) -> str:
    """A wish for a story that `tale` fulfils: it names some of the facts."""
    called = rng.choice(["named", "called"])
    subject = rng.choice([
        f"{article(tale.kind)} {called} {tale.hero}", f"{article(tale.kind)} {called} {tale.hero}",
        f"{article(tale.kind)} {called} {tale.hero}", f"{tale.hero} the {tale.kind}", f"{article(tale.kind)}",
        f"{article(tale.kind)}", tale.hero, f"{tale.hero} and {tale.friend}",
        f"{article(tale.kind)} and {article(tale.friend_kind)}",
        f"{article(tale.kind)} {called} {tale.hero} and {article(tale.friend_kind)} {called} {tale.friend}",
        f"{article(tale.kind)} and {article(tale.colour)} {tale.thing}",
        f"{article(tale.kind)} {called} {tale.hero} and {article(tale.colour)} {tale.thing}",
        f"{tale.hero} in {tale.place}", f"{article(tale.kind)} in {tale.place}",
        f"{article(tale.colour)} {tale.thing}",
    ])
    return rng.choice(["Tell me a story about {}.", "Tell me a short story about {}.", "Write a story about {}.",
                       "Write a short story about {}.", "Can you tell me a story about {}?", "A story about {}.",
                       "I want a story about {}.", "Make up a story about {}.", "Story about {}.",
                       "Please write me a story about {}."]).format(subject)


OPEN_REQUESTS = ["Tell me a story.", "Write a story.", "Tell me a short story.", "I want to hear a story.",
                 "Can you tell me a story?", "Write a short story.", "Tell me another story.", "Another story.",
                 "One more story.", "Tell me a bedtime story.", "Do you know a story?", "Story please."]


def question(rng: random.Random, tale: Story) -> tuple[str, str, str]:
    """One question about the story: (question, answer, what a right answer contains)."""
    if rng.random() < 0.06:
        return rng.choice(NOT_TOLD).format(N=tale.hero), "The story does not say.", "does not say"
    wordings, answer, must = rng.choice(tale.questions)
    return rng.choice(wordings), answer, must


def ask_about(rng: random.Random, text: str, asked: str) -> str:
    """A story given by the user together with the question."""
    return rng.choice(["{t} {q}", "{t}\n{q}", "{t}\n\n{q}", "Story: {t}\nQuestion: {q}", "Read this story: {t}\n{q}",
                       "Here is a story: {t}\n\nQuestion: {q}", "{t}\nQuestion: {q}", "{q}\n\n{t}",
                       "Answer the question. {t} {q}", "{q} {t}", "Context: {t}\n{q}"]).format(t=text, q=asked)
