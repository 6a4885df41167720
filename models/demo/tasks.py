"""Sums, lists, renaming, and questions about a given text: the tasks with one right answer.

A task is a function of a random source that returns one `Turn`. Turns carry the concrete combination they were made
from (`key`), which decides on which side of the training / held-out split they fall.
"""

import random
import re
from dataclasses import dataclass

import stories
import words
from words import COLOURS, OBJECTS, PLACES, THINGS, article, held_out, name, other


@dataclass
class Turn:
    """One question and its right answer. `match` says how to judge another answer; see README.md."""
    task: str
    user: str
    answer: str
    match: str
    expect: str
    key: tuple = ()


def exact(task: str, user: str, answer: str, *key: object) -> Turn:
    """A turn with one right answer."""
    return Turn(task, user, answer, "equals", answer, (task, user) + key)


def holds(task: str, user: str, answer: str, expect: str, *key: object) -> Turn:
    """A turn whose right answers all contain `expect`."""
    return Turn(task, user, answer, "contains", expect, (task,) + (key or (user,)))


# ---------------------------------------------------------------- arithmetic

def number(rng: random.Random, value: int, spelled: bool) -> str:
    """The number as digits, or as a word when `spelled`."""
    return words.NUMBER_WORDS[value] if spelled and value <= 20 else str(value)


QUESTIONS = ["What is {}?", "What is {}?", "what's {}?", "How much is {}?", "{}", "{} = ?", "{}=", "Calculate {}.",
             "What does {} make?", "Can you tell me what {} is?", "Solve {}.", "What is {}", "whats {}", "Compute {}."]
SIGNS = {"+": [" + ", "+", " plus ", " and "], "-": [" - ", "-", " minus ", " take away "],
         "*": [" * ", " x ", " times ", "*", "x", " × "], "/": [" / ", "/", " divided by ", " ÷ "]}


def sum_turn(rng: random.Random, sign: str, a: int, b: int, answer: str, expect: str) -> Turn:
    """One calculation in one of many wordings."""
    task = {"+": "addition", "-": "subtraction", "*": "multiplication", "/": "division"}[sign]
    form = rng.choice(SIGNS[sign])
    spelled = form.strip().isalpha() and len(form) > 3 and rng.random() < 0.35
    left, right = number(rng, a, spelled), number(rng, b, spelled)
    named = {"+": ["Add {} and {}.", "What is the sum of {} and {}?"], "-": ["What is the difference of {} and {}?"],
             "*": ["Multiply {} by {}."], "/": ["Divide {} by {}."]}[sign]
    if form == " and " or rng.random() < 0.08:
        user = rng.choice(named).format(left, right)
    else:
        user = rng.choice(QUESTIONS).format(left + form + right)
    return holds(task, user, answer, expect, user)


def known_sum(rng: random.Random) -> tuple[str, int, int, int]:
    """A sign, two numbers and the result, inside the range the model knows."""
    sign = rng.choices("+-*/", weights=(10, 7, 5, 3))[0]
    if sign == "+":
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        return sign, a, b, a + b
    if sign == "-":
        a = rng.randint(0, 20)
        b = rng.randint(0, a)
        return sign, a, b, a - b
    if sign == "*":
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        return sign, a, b, a * b
    b, result = rng.randint(1, 10), rng.randint(0, 10)
    return sign, b * result, b, result


def arithmetic(rng: random.Random) -> Turn:
    """A sum inside the range the model knows, or now and then one outside, which it declines."""
    if rng.random() < 0.06:
        sign = rng.choice("+-*/")
        a, b = rng.choice([(rng.randint(21, 999), rng.randint(1, 999)), (rng.randint(1, 20), rng.randint(21, 999))])
        if sign != "/" or a > 100:
            return sum_turn(rng, sign, a, b, "That is too big for me. I only know sums with numbers up to 20.", "too big")
    sign, a, b, result = known_sum(rng)
    return sum_turn(rng, sign, a, b, f"{a} {sign} {b} = {result}.", f"= {result}.")


def several_sums(rng: random.Random) -> Turn:
    """Some sums at once, or a times table: many results in few tokens."""
    if rng.random() < 0.2:
        base = rng.randint(1, 10)
        user = rng.choice(["Say the {} times table.", "What is the {} times table?", "List the {} times table.",
                           "Write the times table of {}.", "Tell me the {} times table."]).format(base)
        return holds("several sums", user, ", ".join(f"{base} * {i} = {base * i}" for i in range(1, 11)) + ".",
                     f"{base} * 2 = {2 * base}, {base} * 3 = {3 * base},", user)
    known = [known_sum(rng) for _ in range(rng.randint(2, 8))]
    form = rng.choice([" {} ", "{}", " {} "])
    given = ", ".join(f"{a}{form.format(sign)}{b}" for sign, a, b, _ in known)
    user = rng.choice(["Do these sums: {}.", "Calculate: {}.", "Solve these: {}.", "{}", "What is {}?",
                       "Work out {}."]).format(given)
    return exact("several sums", user, ", ".join(f"{a} {sign} {b} = {result}" for sign, a, b, result in known) + ".")


def word_problem(rng: random.Random) -> Turn:
    """A small sum told with a person and things. The answer writes the sum out: so the model can use what it knows."""
    who, friend = name(rng), name(rng)
    one, many = rng.choice(list(THINGS.items()))
    count = lambda value: f"{value} {one if value == 1 else many}"
    a = rng.randint(1, 15)
    ask = rng.choice([f"How many {many} does {who} have now?", f"How many {many} does {who} have?"])
    if rng.random() < 0.5:
        b = rng.randint(1, 10)
        more = rng.choice([f"{who} finds {b} more.", f"{friend} gives {who} {b} more.", f"{who} gets {b} more.",
                           f"{who} buys {b} more {many}."])
        user, worked, result = f"{who} has {count(a)}. {more} {ask}", f"{a} + {b} = {a + b}.", a + b
    else:
        b = rng.randint(1, a)
        less = rng.choice([f"{who} loses {b}.", f"{who} gives {b} to {friend}.", f"{who} gives {friend} {b}.",
                           f"{who} gives {count(b)} to {friend}."])
        ask = rng.choice([ask, f"How many {many} are left?", f"How many {many} does {who} have left?"])
        user, worked, result = f"{who} has {count(a)}. {less} {ask}", f"{a} - {b} = {a - b}.", a - b
    return exact("word problem", user, f"{worked} {who} has {count(result)}.")


def compare(rng: random.Random) -> Turn:
    """Order of the numbers up to 20: bigger, smaller, before, after; even and odd."""
    a, b = rng.sample(range(0, 21), 2)
    choice = rng.randrange(4)
    if choice == 0:
        user = rng.choice(["Which is bigger, {} or {}?", "Which number is bigger, {} or {}?", "What is more, {} or {}?",
                           "Which is larger, {} or {}?"]).format(a, b)
        return exact("numbers", user, f"{max(a, b)} is bigger than {min(a, b)}.")
    if choice == 1:
        user = rng.choice(["Which is smaller, {} or {}?", "Which number is smaller, {} or {}?",
                           "What is less, {} or {}?"]).format(a, b)
        return exact("numbers", user, f"{min(a, b)} is smaller than {max(a, b)}.")
    if choice == 2:
        side, step = rng.choice([("after", 1), ("before", -1)])
        a = max(a, 1)
        user = rng.choice(["What number comes {} {}?", "What comes {} {}?", "Which number comes {} {}?"]).format(side, a)
        return holds("numbers", user, f"{a + step} comes {side} {a}.", f"{a + step} comes", user)
    user = rng.choice(["Is {} even or odd?", "Is {} odd or even?", "Is the number {} even or odd?"]).format(a)
    return holds("numbers", user, f"{a} is {'odd' if a % 2 else 'even'}.", "odd." if a % 2 else "even.", user)


# ---------------------------------------------------------------- lists

def joined(items: list[str]) -> str:
    """Items as English writes them: commas, and "and" before the last."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def counting(rng: random.Random) -> Turn:
    """Counting up or down between two numbers up to 30."""
    start = rng.choice([0, 1, rng.randint(0, 25), rng.randint(0, 27)])
    stop = min(start + rng.randint(2, 12), 30)
    if rng.random() < 0.4:
        start, stop = stop, start
    step = 1 if stop > start else -1
    user = rng.choice(["Count from {} to {}.", "count from {} to {}", "Can you count from {} to {}?",
                       "List the numbers from {} to {}.", "Count down from {} to {}." if step < 0 else "Count up from {} to {}."])
    if start == 1 and rng.random() < 0.4:
        user = rng.choice(["Count to {1}.", "Can you count to {1}?"])
    spelled = stop > start and stop <= 20 and rng.random() < 0.2
    user = user.format(number(rng, start, spelled), number(rng, stop, spelled))
    return exact("counting", user, ", ".join(map(str, range(start, stop + step, step))) + ".")


def listing(rng: random.Random) -> Turn:
    """Some members of a category; any choice of distinct members is right. Shown are neighbours in the word list, from
    one of its first three: a chain that can be learned, where a free choice could not."""
    category = rng.choice(list(words.CATEGORIES))
    members = words.CATEGORIES[category]
    count = rng.randint(2, min(6, len(members)))
    shown = rng.choice([str(count), words.NUMBER_WORDS[count]])
    user = rng.choice(["List {n} {c}.", "Name {n} {c}.", "Give me {n} {c}.", "Tell me {n} {c}.", "Can you list {n} {c}?",
                       "Can you name {n} {c}?", "Give me a list of {n} {c}.", "I need {n} {c}.", "Write a list of {n} {c}.",
                       "{n} {c}"]).format(n=shown, c=category)
    if rng.random() < 0.12:
        count, user = 3, rng.choice(["List some {}.", "Name some {}.", "Give me some {}.", "Tell me some {}."]).format(category)
    start = rng.randint(0, min(2, len(members) - count))
    answer = joined(members[start:start + count]) + "."
    return Turn("listing", user, answer, "list", f"{category}:{count}", ("listing", user))


def whole_series(rng: random.Random) -> Turn:
    """Series that have an order: days, months, seasons, planets; and what follows what."""
    series = rng.choice(["days", "days", "months", "months", "seasons", "planets"])
    items = words.CATEGORIES[series]
    if rng.random() < 0.35:
        of = {"days": "days of the week", "months": "months of the year", "seasons": "seasons of the year",
              "planets": "planets"}[series]
        user = rng.choice(["List the {}.", "Name the {}.", "What are the {}?", "List all the {}.", "Tell me the {}.",
                           "Can you list the {}?", "Name all {}."]).format(of)
        return exact("series", user, joined(items) + ".", rng.random())
    side, step = rng.choice([("after", 1), ("before", -1), ("before", -1)])  # backwards is harder
    index = rng.randrange(len(items))
    if series == "planets":
        index = min(max(index, 1), len(items) - 2)
    one = {"days": "day", "months": "month", "seasons": "season", "planets": "planet"}[series]
    user = rng.choice(["What comes {s} {i}?", "Which {o} comes {s} {i}?", "What {o} comes {s} {i}?",
                       "What {o} is {s} {i}?", "Which {o} is {s} {i}?"]).format(s=side, i=items[index], o=one)
    found = items[(index + step) % len(items)]
    return holds("series", user, f"{found} comes {side} {items[index]}.", f"{found} comes {side}", user)


def some_words(rng: random.Random, low: int, high: int) -> list[str]:
    """Distinct words of mixed kinds to make lists from."""
    pool = rng.choice([OBJECTS, COLOURS, words.ANIMALS, list(THINGS), words.CATEGORIES["fruits"], OBJECTS + COLOURS,
                       words.CATEGORIES["vegetables"], words.GIRLS + words.BOYS, words.ANIMALS + OBJECTS])
    return rng.sample(pool, rng.randint(low, high))


def list_work(rng: random.Random) -> Turn:
    """Work on a list that the user gives: bullets, numbers, first, last, how many, reverse, add, remove."""
    items = some_words(rng, 3, 6)
    given = rng.choice([", ".join(items), ", ".join(items), joined(items)])
    choice = rng.randrange(10)
    if choice == 0:
        user = rng.choice(["Make a list of {}.", "Make a bullet list: {}.", "Write as a bullet list: {}.",
                           "Turn this into a list: {}.", "Make a list: {}", "Put this in a list: {}."])
        return exact("list work", user.format(given), "\n".join("- " + item for item in items))
    if choice == 1:
        user = rng.choice(["Make a numbered list of {}.", "Make a numbered list: {}.", "Number this list: {}."])
        return exact("list work", user.format(given), "\n".join(f"{i + 1}. {item}" for i, item in enumerate(items)))
    if choice == 2:
        word, index = rng.choice([("first", 0), ("last", -1), ("second", 1), ("first", 0), ("last", -1)])
        user = rng.choice(["What is the {} word in this list: {}?", "What is the {} word: {}?",
                           "Which word is {} in this list: {}?", "Give me the {} word of this list: {}."])
        return exact("list work", user.format(word, given), f"The {word} word is {items[index]}.")
    if choice == 3:
        user = rng.choice(["How many words are in this list: {}?", "How many words are there: {}?", "Count the words: {}.",
                           "How many things are in this list: {}?"]).format(given)
        return exact("list work", user, f"There are {len(items)}.")
    if choice in (4, 5):
        items = items[:5]
        user = rng.choice(["Reverse this list: {}.", "Reverse the list {}.", "Write this list backwards: {}.",
                           "Reverse: {}", "Can you reverse this list: {}?"]).format(", ".join(items))
        return exact("list work", user, ", ".join(reversed(items)) + ".")
    if choice in (6, 7, 8):
        gone = rng.choice(items + items[:1] * 3)  # the first is the hardest to leave out
        user = rng.choice(["Remove {g} from this list: {l}.", "Take {g} out of this list: {l}.",
                           "Delete {g} from the list {l}.", "Write this list without {g}: {l}."])
        return exact("list work", user.format(g=gone, l=", ".join(items)),
                     ", ".join(item for item in items if item != gone) + ".")
    new = other(rng, OBJECTS + words.ANIMALS, *items)
    user = rng.choice(["Add {n} to this list: {l}.", "Put {n} at the end of this list: {l}.", "Add {n} to the list {l}."])
    return exact("list work", user.format(n=new, l=", ".join(items)), ", ".join(items + [new]) + ".")


# ---------------------------------------------------------------- renaming and repeating

def sentences(rng: random.Random, who: str) -> list[str]:
    """Two to four short sentences about `who` and others."""
    friend, colour = name(rng, who), rng.choice(COLOURS)
    forms = [f"{who} has {article(colour)} {rng.choice(OBJECTS)}.", f"{who} is {rng.choice(words.FEELINGS)}.",
             f"{who} lives {rng.choice(words.HOMES)}.", f"{who} is {article(rng.choice(words.CHARACTERS))}.",
             f"{who} goes to {rng.choice(PLACES)}.", f"The {rng.choice(OBJECTS)} belongs to {who}.",
             f"{who} found {article(colour)} {rng.choice(OBJECTS)}."]
    for _ in range(6):  # either may come first, whatever the verb: only comparing the names tells which it is
        one, two = rng.choice([(who, friend), (friend, who)])
        forms.append(rng.choice([f"{one} likes {two}.", f"{one} likes {two}.", f"{one} and {two} are friends.",
                                 f"{one} gives {two} {rng.choice(words.FOODS)}.",
                                 f"{one} went to {rng.choice(PLACES)} and met {two}.",
                                 f"{one} saw {two} in {rng.choice(PLACES)}."]))
    return list(dict.fromkeys(rng.sample(forms, rng.choice([1, 1, 2, 2, 3]))))


def renaming(rng: random.Random) -> Turn:
    """Put one name, colour or thing in the place of another, everywhere in a text."""
    old = name(rng)
    text = " ".join(sentences(rng, old))
    new = name(rng, *re.findall(r"\w+", text))
    wordings = ["Rename {o} to {n}: {t}", "Rename {o} to {n}: {t}", "Rename {o} to {n} in this text: {t}",
                "Replace {o} with {n}: {t}", "Change {o} to {n}: {t}", "Change the name {o} to {n}: {t}",
                "Replace {o} with {n} in this sentence: {t}", "Use the name {n} instead of {o}: {t}", "{t} Rename {o} to {n}.",
                "Please rename {o} to {n} in this: {t}", "Rename {o} to {n}.\n{t}", "Write this again with {n} instead of {o}: {t}",
                "{t}\nChange {o} to {n}."]
    if rng.random() < 0.2:
        old, new = rng.sample(COLOURS, 2)
        thing, place = rng.sample(OBJECTS, 2)
        text = rng.choice([f"The {thing} is {old}.", f"The {old} {thing} is near the {place}.",
                           f"{name(rng)} has {article(old)} {thing} and {article(old)} {place}."])
        wordings = ["Replace {o} with {n}: {t}", "Change {o} to {n}: {t}", "Replace {o} with {n} in this sentence: {t}"]
        if old[0] in "aeio" or new[0] in "aeio":
            text = f"The {old} {thing} is near the {place}."
    return exact("renaming", rng.choice(wordings).format(o=old, n=new, t=text), re.sub(rf"\b{old}\b", new, text))


def repeating(rng: random.Random) -> Turn:
    """Say the same again."""
    text = rng.choice([" ".join(some_words(rng, 1, 4)), sentences(rng, name(rng))[0], name(rng)])
    user = rng.choice(["Repeat after me: {}", "Repeat: {}", "Say: {}", "Repeat this: {}", "Please repeat: {}", "Say this: {}"])
    if rng.random() < 0.25:
        word, count = rng.choice(some_words(rng, 1, 1) + ["hello"]), rng.randint(2, 5)
        user = rng.choice([f"Say {word} {words.NUMBER_WORDS[count]} times.", f"Say {word} {count} times.",
                           f"Repeat the word {word} {words.NUMBER_WORDS[count]} times."])
        return exact("repeating", user, " ".join([word] * count))
    return exact("repeating", user.format(text), text)


# ---------------------------------------------------------------- questions about given facts

def facts(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """One to four facts of one shape about different people: the text, and a question with its answer for each."""
    count = rng.choice((1, 2, 2, 3, 3, 4))
    people: list[str] = []
    while len(people) < count:
        people.append(name(rng, *people))
    lines, asked = [], []
    shape = rng.randrange(4)
    if shape == 0:
        for who, place in zip(people, rng.sample(PLACES, count)):
            lines.append(rng.choice(["{} is in {}.", "{} went to {}.", "{} is in {}."]).format(who, place))
            asked.append(rng.choice([(f"Where is {who}?", lines[-1]),
                                     (f"Who is in {place}?", f"The one in {place} is {who}.")]))
    elif shape == 1:
        for who, thing, colour in zip(people, rng.sample(OBJECTS, count), rng.sample(COLOURS, count)):
            lines.append(f"{who} has {article(colour)} {thing}.")
            asked.append(rng.choice([
                (rng.choice([f"What does {who} have?", f"What has {who} got?"]), lines[-1]),
                (f"Who has the {thing}?", f"The one with the {thing} is {who}."),
                (f"Who has the {thing}?", f"The one with the {thing} is {who}."),
                (f"What colour is the {thing}?", f"The {thing} is {colour}."),
                (rng.choice([f"What color is {who}'s {thing}?", f"What colour is {who}'s {thing}?"]),
                 f"{who}'s {thing} is {colour}.")]))
    elif shape == 2:
        for who, kind in zip(people, rng.sample(words.CHARACTERS, count)):
            lines.append(f"{who} is {article(kind)}.")
            asked.append(rng.choice([(rng.choice([f"What is {who}?", f"Who is {who}?"]), lines[-1]),
                                     (f"Who is the {kind}?", f"The {kind} is {who}."),
                                     (f"What is the name of the {kind}?", f"The {kind} is called {who}.")]))
    else:
        for who, food in zip(people, rng.sample(words.FOODS, count)):
            lines.append(f"{who} ate {food}.")
            asked.append(rng.choice([(f"What did {who} eat?", lines[-1]),
                                     (f"Who ate {food}?", f"The one who ate {food} is {who}.")]))
    rng.shuffle(lines)
    rng.shuffle(asked)
    return " ".join(lines), asked


def given_facts(rng: random.Random) -> list[Turn]:
    """Facts with a question about each of them. An answer to "who" says first what was asked, then the name: looking
    up backwards is the hardest thing here, and is learned sooner when the thing stands right before the name."""
    text, ((first, answer), *others) = facts(rng)
    turns = [exact("given facts", stories.ask_about(rng, text, first), answer)]
    return turns + [Turn("given facts", asked, answer, "equals", answer, turns[0].key) for asked, answer in others]


def about_story(rng: random.Random, tale: stories.Story, with_text: bool) -> Turn:
    """A question about a story, which it brings along or not."""
    asked, answer, must = stories.question(rng, tale)
    user = stories.ask_about(rng, tale.text, asked) if with_text else asked
    return Turn("story questions", user, answer, "contains", must, tale.key())


def story_question(rng: random.Random, holdout: bool = False) -> list[Turn]:
    """A whole story in the question; in half of the cases with more questions after it."""
    tale = stories.story(rng, holdout)
    more = rng.choice((0, 0, 0, 1, 2, 3))
    return [about_story(rng, tale, True)] + [about_story(rng, tale, False) for _ in range(more)]
