"""Word lists the generator draws from, and the split into training and held-out combinations.

The lists are short on purpose: a model of a few million parameters masters what it meets often. Names are the
exception: a third of them are made up on the spot, so that copying a name never seen before is learned too.
"""

import hashlib
import random

GIRLS = """Mia Anna Lily Emma Nora Zoe Ella Lucy Ruby Ida Clara Rosa Maya Lena Ivy Amy Kate Sara Eva Mary Alice Julia
Olivia Sophie Grace Hannah Jane Lisa Maria Nina""".split()
BOYS = """Tom Ben Leo Max Sam Finn Oscar Paul Noah Jack Hugo Otto Tim Theo Luke Peter Adam Felix David Bob Jim Dan
Henry Charlie Mark Nick Omar Ravi Will Alex""".split()
ANIMALS = """fox cat dog bear rabbit mouse owl horse duck frog hedgehog squirrel wolf lion tiger elephant penguin
turtle pig cow sheep goat monkey bird fish""".split()
CHARACTERS = ANIMALS + "girl boy robot dragon knight wizard pirate princess king farmer sailor giant".split()
COLOURS = "red blue green yellow orange purple pink brown black white grey golden silver".split()
OBJECTS = """ball hat book kite key lamp cup bell box coin drum boat scarf stone feather flower shell basket map
ring button umbrella bag spoon clock whistle""".split()
PLACES = """the garden|the forest|the park|the valley|the market|the school|the library|the castle|the kitchen
the barn|the village|the meadow|the town|the cave|the harbour|the shop|the museum|the orchard|the palace|the desert"""
PLACES = PLACES.replace("\n", "|").split("|")
SPOTS = """under a tree|behind a rock|next to a bench|in the grass|near a gate|under a bridge|behind a wall
between two bushes|on the path|beside a well"""
SPOTS = SPOTS.replace("\n", "|").split("|")
HOMES = """in a small house|in a tall tower|in a little hut|in a cosy cave|near the sea|at the edge of the forest
on a green hill|by the river|in a quiet village|in an old mill"""
HOMES = HOMES.replace("\n", "|").split("|")
TRAITS = "little brave kind clever curious happy shy young friendly quiet funny gentle".split()
FEELINGS = "happy proud glad tired cheerful excited calm".split()
ACTIVITIES = """played in the sun|sang a song|danced around|told jokes|drew pictures|picked berries|flew a kite
played hide and seek|built a tower of stones|looked at the clouds|ran races|shared a picnic"""
ACTIVITIES = ACTIVITIES.replace("\n", "|").split("|")
FOODS = "an apple|a cake|some soup|a pie|some bread|a pear|some cheese|a pancake|some honey|a cookie".split("|")
THINGS = {  # singular -> plural, for counting
    "apple": "apples", "ball": "balls", "book": "books", "pear": "pears", "coin": "coins", "shell": "shells",
    "egg": "eggs", "stone": "stones", "cookie": "cookies", "flower": "flowers", "pencil": "pencils", "cup": "cups",
    "orange": "oranges", "star": "stars", "toy": "toys", "marble": "marbles", "banana": "bananas", "key": "keys",
}
CATEGORIES = {
    "animals": "cat dog fox bear horse cow pig sheep owl rabbit lion tiger mouse duck".split(),
    "fruits": "apple pear plum banana cherry orange lemon grape peach mango".split(),
    "colours": "red blue green yellow orange purple pink brown black white".split(),
    "vegetables": "carrot potato onion pea bean cabbage pumpkin spinach leek corn".split(),
    "birds": "owl duck eagle robin swan goose crow parrot sparrow penguin".split(),
    "drinks": "water milk tea coffee juice lemonade cocoa soda".split(),
    "toys": "ball doll kite puzzle train drum robot car".split(),
    "clothes": "hat coat shirt sock shoe scarf glove dress jacket belt".split(),
    "names": "Tom Anna Ben Mia Leo Emma Max Lucy Sam Nora".split(),
    "tools": "hammer saw drill spade brush ladder rope axe".split(),
    "trees": "oak pine birch maple willow apple elm palm".split(),
    "flowers": "rose tulip daisy lily violet poppy iris sunflower".split(),
    "months": "January February March April May June July August September October November December".split(),
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "seasons": "spring summer autumn winter".split(),
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split(),
    "shapes": "circle square triangle star heart oval cube cone".split(),
    "sports": "football tennis swimming running hockey rowing skiing golf".split(),
}
NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen twenty""".split()
OPPOSITES = """hot cold|big small|up down|fast slow|happy sad|day night|young old|light dark|wet dry|open closed
left right|early late|full empty|hard soft|high low|long short|loud quiet|rich poor|strong weak|good bad
near far|clean dirty|first last|yes no|in out|black white|thick thin|awake asleep"""
OPPOSITES = [pair.split() for pair in OPPOSITES.replace("\n", "|").split("|")]
SOUNDS = {
    "cow": "moo", "dog": "woof", "cat": "meow", "sheep": "baa", "duck": "quack", "pig": "oink", "lion": "roar",
    "mouse": "squeak", "frog": "ribbit", "owl": "hoot", "horse": "neigh", "bee": "buzz", "snake": "hiss",
}
LEGS = {
    "cat": 4, "dog": 4, "horse": 4, "cow": 4, "pig": 4, "fox": 4, "bird": 2, "duck": 2, "owl": 2, "spider": 8,
    "ant": 6, "bee": 6, "snake": 0, "fish": 0, "sheep": 4, "lion": 4, "mouse": 4, "rabbit": 4, "elephant": 4,
}
TYPICAL_COLOURS = {
    "a banana": "yellow", "the sky": "blue", "grass": "green", "snow": "white", "a tomato": "red", "coal": "black",
    "a carrot": "orange", "a lemon": "yellow", "blood": "red", "chocolate": "brown", "the sun": "yellow",
    "milk": "white", "a frog": "green", "a strawberry": "red", "the sea": "blue", "an elephant": "grey",
}
SYLLABLES = "ba be bo da do fe go ka ki lo la li lu ma mi mo ne no pa pe ra ri ro su si ta to va vi wa yu ze"
ALWAYS_TRAINED = "always trained"  # the key of what has no other wording and so cannot be held out
ENDINGS = ["", "", "n", "r", "x", "la", "s", "m", "tt", "nda", "rin", "ly", "dor", "bix"]


def held_out(*key: object) -> bool:
    """True for the one combination in twenty that training never shows. A hash decides, not the order of drawing."""
    if key[-1] == ALWAYS_TRAINED:
        return False
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return digest[0] % 20 == 0


def name(rng: random.Random, *taken: str) -> str:
    """A first name not in `taken`; one in three is invented from syllables."""
    while True:
        if rng.random() < 0.33:
            syllables = rng.choices(SYLLABLES.split(), k=rng.choice((1, 2, 2, 3)))
            drawn = ("".join(syllables) + rng.choice(ENDINGS)).capitalize()
        else:
            drawn = rng.choice(GIRLS + BOYS)
        if drawn not in taken and len(drawn) > 1:
            return drawn


def pronoun(who: str) -> str:
    """The pronoun the stories use: by the name lists, for invented names by the last letter."""
    if who in BOYS:
        return "he"
    return "she" if who in GIRLS or who[-1] in "aey" else "he"


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return ("an " if noun[0] in "aeio" or noun.startswith("umbrella") else "a ") + noun


def other(rng: random.Random, choices: list[str], *taken: str) -> str:
    """One of `choices` that is not in `taken`."""
    return rng.choice([choice for choice in choices if choice not in taken])
