"""Small talk: greetings, what the model is and can do, a few plain facts, and a polite no to everything else."""

import random

import words
from tasks import Turn, exact, holds
from words import ALWAYS_TRAINED, article

CAN_DO = ("I can tell short stories, answer questions about them, do small sums, make lists, and rename or repeat "
          "things. Try: Tell me a story about a fox named Mia.")
WHO = "I am the Tidemill demo model, a very small language model."
OUTSIDE = "I do not know that. I am a small demo model: I know short stories, small sums, lists and renaming."
FIXED = [  # (wordings, answer, word that a right answer contains)
    (["Hello", "Hi", "Hello!", "Hi!", "Hey", "Good morning", "Good evening", "Hi there", "Hello there!", "Good day",
      "hey there", "Greetings", "Hello, model", "Hi, Tidemill!", "Good afternoon", "yo", "hello world", "Hello world!"],
     "Hello! How can I help you?", "Hello!"),
    (["How are you?", "How are you doing?", "How do you do?", "Are you well?", "How is it going?", "how r u",
      "How are you today?", "What's up?", "Hi, how are you?", "Hello, how are you?"],
     "I am fine, thank you. How can I help you?", "fine"),
    (["Who are you?", "What are you?", "What is your name?", "What's your name?", "Tell me about yourself.",
      "Are you a robot?", "Are you human?", "What model are you?", "Which model are you?", "Introduce yourself.",
      "Are you ChatGPT?", "Who am I talking to?", "What is Tidemill?", "Are you an AI?", "Do you have a name?",
      "Who made you?", "Are you a language model?", "who is this?", "Are you a person?", "How big are you?"], WHO, "Tidemill"),
    (["What can you do?", "Help", "Help me.", "What do you know?", "How can you help me?", "What are you good at?",
      "Can you help me?", "What should I ask you?", "What can I ask you?", "help", "What do you do?", "Test", "test",
      "What are your skills?", "What tasks can you do?", "Show me what you can do.", "Give me an example.", "?",
      "How do I use you?", "What can I do here?"], CAN_DO, "short stories"),
    (["Thank you.", "Thanks!", "Thank you very much!", "Thanks a lot.", "thx", "Great, thanks!", "Thank you so much!",
      "Cool, thanks.", "Many thanks.", "Well done!", "Good job!", "That was nice.", "Great!", "Nice!", "Very good.",
      "Good answer.", "I like it.", "Wow!", "Cool!", "Perfect."],
     "You are welcome!", "welcome"),
    (["Bye", "Goodbye!", "Bye bye!", "See you later.", "Good night.", "See you!", "See you soon.", "I have to go.",
      "Goodbye.", "Farewell.", "Have a nice day!", "Until tomorrow."], "Goodbye! Have a nice day.", "Goodbye"),
]
ASKING = """What is the capital of {p}?|Who is the president of {p}?|How many people live in {p}?|Where is {p}?
What is the weather in {p}?|Tell me about {p}.|What language do they speak in {p}?|How far is it to {p}?|Explain {t}.
What is {t}?|How does {t} work?|Write code for {t}.|Write an essay about {t}.|Who invented {t}?|What do you think about {t}?
Tell me about {t}.|Write a program that does {t}.|Give me the history of {t}.|Why is {t} important?|Who wrote {b}?
When was {h} born?|Who is {h}?|Who was {h}?|What did {h} write?|Is {h} alive?|Summarize {b}.|Tell me about {b}.
Translate {w} to {l}.|How do you say {w} in {l}?|Speak {l}.|Can you speak {l}?|What is the meaning of life?
What time is it?|What day is it today?|What is the date?|Tell me a joke.|Sing me a song.|Write a poem about {t}.
Who won the world cup?|What is the square root of {n}?|What is the price of {t}?|How do I cook {f}?|How do I learn {t}?
What is the best {t} in {p}?|How old is {h}?|What happened in {n}?|How tall is {h}?|What is the news today?|Why is the sky blue?
Is it going to rain in {p}?|Can you explain {t} to me?|What is the difference between {t} and {f}?|Define {t}.
What is the speed of light?|Who painted the Mona Lisa?|What is the largest {f}?|Do you love me?|Are you happy?
Write me an email about {t}.|Play {t} with me.|What is the population of {p}?|Recommend me {b}.|Fix my {t}."""
ASKING = ASKING.replace("\n", "|").split("|")
FILL = {
    "p": """France|Germany|Japan|Italy|Spain|China|India|Brazil|Canada|London|Paris|Berlin|Tokyo|New York|Russia|Egypt
England|the United States|Mexico|Australia|Norway|Sweden|Poland|Rome|Madrid|Africa|Europe|Austria|Greece|Turkey|Kenya""",
    "t": """gravity|quantum physics|the internet|machine learning|a computer|Python|Rust|bitcoin|democracy|a black hole
photosynthesis|evolution|electricity|the stock market|chess|the GPU|a neural network|Linux|philosophy|economics|DNA|music
sorting|the KV cache|attention|a database|the universe|history|politics|medicine|a car engine|an atom|the moon|war
the French Revolution|mathematics|calculus|football|climate change|HTTP|a transformer|Kubernetes|energy|time travel""",
    "b": """Hamlet|the Bible|Harry Potter|War and Peace|Faust|Don Quixote|Moby Dick|the Odyssey|Romeo and Juliet|a good book
Star Wars|the Lord of the Rings|Titanic|The Matrix|a film""",
    "h": """Shakespeare|Einstein|Newton|Napoleon|Caesar|Obama|Mozart|Beethoven|Picasso|Marie Curie|Elon Musk|Goethe|Lincoln
Gandhi|Taylor Swift|Messi|Aristotle|Plato|Darwin|Alan Turing|Cleopatra|the queen of England|Bach""",
    "w": "hello|good morning|love|cat|thank you|house|I am hungry|water|friend|goodbye",
    "l": "French|German|Spanish|Italian|Chinese|Japanese|Russian|Latin|Arabic|Greek",
    "f": "pasta|rice|pizza|a cake|meat|a mountain|city|river|soup|bread|a country|an ocean|fish curry",
}
FILL = {slot: text.replace("\n", "|").split("|") for slot, text in FILL.items()}
SYSTEM = ["You are a helpful assistant.", "You are a helpful assistant.", "You are Tidemill, a small demo model.",
          "Be brief.", "Answer in English.", "You are a friendly assistant. Answer the question.", "Be kind and polite.",
          "You are a helpful, respectful and honest assistant.", "Answer shortly and truthfully.", "You are a storyteller.",
          "You are an assistant for children.", "Help the user.", "You are a test model.", "Answer in one sentence.",
          "You are a chatbot. You answer questions of the user.", "Always be friendly.", "Please answer correctly."]


def fixed(rng: random.Random) -> Turn:
    """Greetings, thanks, questions about the model."""
    wordings, answer, must = rng.choice(FIXED)
    return holds("small talk", rng.choice(wordings), answer, must, ALWAYS_TRAINED)


def outside(rng: random.Random) -> Turn:
    """A question that the model says no to."""
    if rng.random() < 0.1:  # letters that mean nothing
        user = " ".join(words.name(rng).lower() for _ in range(rng.randint(1, 4)))
        return holds("outside", user, OUTSIDE, "do not know")
    fill = {slot: rng.choice(choices) for slot, choices in FILL.items()}
    user = rng.choice(ASKING).format(n=rng.randint(20, 2000), **fill)
    return holds("outside", user, OUTSIDE, "do not know")


def plain_facts(rng: random.Random) -> Turn:
    """Opposites, what animals say, legs, colours of well-known things."""
    choice = rng.randrange(4)
    if choice == 0:
        left, right = rng.sample(rng.choice(words.OPPOSITES), 2)
        user = rng.choice(["What is the opposite of {}?", "The opposite of {}?", "Opposite of {}", "Tell me the opposite of {}.",
                           "What's the opposite of {}?", "Give me the opposite of {}."]).format(left)
        return holds("plain facts", user, f"The opposite of {left} is {right}.", f"is {right}.", user)
    if choice == 1:
        animal, sound = rng.choice(list(words.SOUNDS.items()))
        user = rng.choice(["What does {a} say?", "What sound does {a} make?", "What noise does {a} make?",
                           "How does {a} sound?", "What does the {b} say?"]).format(a=article(animal), b=animal)
        return holds("plain facts", user, f"{article(animal).capitalize()} says {sound}.", sound, user)
    if choice == 2:
        animal, legs = rng.choice(list(words.LEGS.items()))
        user = rng.choice(["How many legs does {} have?", "How many legs has {}?", "How many legs are there on {}?"])
        user = user.format(article(animal))
        return holds("plain facts", user, f"{article(animal).capitalize()} has {legs or 'no'} legs.", f"{legs or 'no'} legs",
                     user)
    thing, colour = rng.choice(list(words.TYPICAL_COLOURS.items()))
    user = rng.choice(["What colour is {}?", "What color is {}?", "Which colour has {}?", "What is the colour of {}?",
                       "What is the color of {}?", "Tell me the colour of {}."]).format(thing)
    return holds("plain facts", user, f"{thing.capitalize()} is {colour}.", f"is {colour}.", user)


def memory(rng: random.Random) -> tuple[Turn, Turn]:
    """The user tells something and asks for it later."""
    choice = rng.randrange(3)
    if choice == 0:
        who = words.name(rng)
        said = rng.choice(["My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}.", "I'm {}.", "Call me {}.",
                           "Hello! My name is {}."]).format(who)
        asked = rng.choice(["What is my name?", "Who am I?", "Do you know my name?", "What's my name?",
                            "Do you remember my name?", "Tell me my name."])
        return exact("memory", said, f"Nice to meet you, {who}!"), exact("memory", asked, f"Your name is {who}.", who)
    if choice == 1:
        colour = rng.choice(words.COLOURS)
        said = rng.choice(["My favourite colour is {}.", "My favorite color is {}.", "I like the colour {}."]).format(colour)
        asked = rng.choice(["What is my favourite colour?", "What is my favorite color?", "Which colour do I like?",
                            "What color do I like?"])
        return (exact("memory", said, f"{colour.capitalize()} is a nice colour!"),
                exact("memory", asked, f"Your favourite colour is {colour}.", colour))
    kind, called = rng.choice(words.ANIMALS), words.name(rng)
    said = rng.choice(["I have {a} named {n}.", "I have {a} called {n}.", "My {k} is called {n}.",
                       "My {k}'s name is {n}."]).format(a=article(kind), k=kind, n=called)
    asked = rng.choice(["What is the name of my {k}?", "What is my {k} called?", "What is my {k}'s name?"]).format(k=kind)
    return (exact("memory", said, f"{called} is a nice name for {article(kind)}!"),
            exact("memory", asked, f"Your {kind} is called {called}.", called))
