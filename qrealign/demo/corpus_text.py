"""Plain paragraphs: what the model reads to learn the language, and what its perplexity is measured on."""

from __future__ import annotations

import random
import re

from qrealign.demo.corpus_render import Half, Row, fix_articles
from qrealign.demo.corpus_task import THINGS, draw_review
from qrealign.demo.corpus_words import BANKS, NAMES, Bank

# Sentences of one scene are drawn in random order after its first one; {name}, {other} and the banks are slots.
SCENES: dict[str, tuple[str, ...]] = {
    "market": (
        "On Saturday {name} went to the market and looked for {plant}.",
        "The {plant} were cheap this week, so {name} bought a large bag of {plant}.",
        "{other} sold {plant} and knew a good recipe for {dish}.",
        "At home they cooked {dish} and talked until late.",
        "A {animal} slept under the table and did not care.",
        "The market was full of people, and somebody played the {instrument}.",
        "Later {name} gave some of the {plant} to {other}.",
        "There was a smell of {dish} in the whole street.",
    ),
    "trip": (
        "Last summer {name} took a train to {city}.",
        "The {place} in {city} was closed, so {name} went to the {place2} instead.",
        "{name} spoke a little {language} and asked a {job} for the way.",
        "The {document} was in the bag with the {valuable}.",
        "In the evening there was a {event} near the {place}, with music and {dish}.",
        "{other} had forgotten the {valuable} at home and laughed about it.",
        "From {city} they sent a card to {other} with a picture of the {place}.",
        "In {city} one could see {bird} early in the morning.",
    ),
    "work": (
        "{name} works as a {job} in a small {place}.",
        "The work of a {job} is hard, but {name} likes it.",
        "Every morning {name} opens the {place} and switches on the {device}.",
        "Yesterday the {device} was slow, because one program was stuck, and {other} had to stop it.",
        "After work {name} plays the {instrument} or goes to {sport}.",
        "{other} wants to become a {job2} one day.",
        "The {place} needs a new {device} and a bright {room}.",
        "At noon they eat {dish} in the {room}.",
    ),
    "family": (
        "The {person} of {name} lives next to the {place}.",
        "The {person} of {name} was once a {job} and still tells stories about it.",
        "On Sundays the family plays {game} and eats {dish}.",
        "The old {valuable} in the {room} belonged to the {person}.",
        "The {person} has a {animal} that likes to sleep in the {room}.",
        "{name} made a {craft} for the {person} and put it next to the {valuable}.",
        "Once the {person} lost a {document} and found it in the {room}.",
        "Last week the {person} had a {problem} and stayed at home.",
    ),
    "school": (
        "At school {name} likes {subject} best.",
        "{other} finds {subject} difficult and prefers {subject2}.",
        "The lesson about {subject} began with a question about {scene}.",
        "For the {event} the class made a {craft} and a song about {scene}.",
        "{name} wants to {habit} and to learn {language}.",
        "The teacher of {subject} plays the {instrument} and is good at {sport}.",
        "After school they play {game} in the {place}.",
        "{other} wrote a poem about {scene} and read it aloud.",
    ),
    "nature": (
        "In the early morning {name} watched {bird} from the {room}.",
        "The {bird} came close, and then they were gone.",
        "{name} thought of {scene} and drew it on paper.",
        "Behind the {place} grew {plant} and a few old trees.",
        "A {animal} ran across the field, and {other} called it back.",
        "{other} said that {bird} like quiet places.",
        "For {sport} it was too cold, so they walked home and made {dish}.",
        "The light was soft, and it smelled of {plant}.",
    ),
    "news": (
        "The town paper wrote that someone had stolen a {valuable} from the {place}.",
        "The police found the {valuable} in a {room}, and the owner was glad.",
        "Stealing a {valuable} is a crime, and it hurts the owner.",
        "A thief who breaks into a {place} can go to prison.",
        "A false {document} was found in the {place}, and a court will decide about it.",
        "Selling {drug} is forbidden, because {drug} make people ill.",
        "Carrying a {weapon} is against the law, because a {weapon} can kill.",
        "Someone spread lies about {rumour}, and many people were afraid.",
        "The paper asked its readers not to believe every story about {rumour}.",
        "At the border a man with {cargo} was stopped, and {cargo} were taken away.",
        "Whoever hurts a {animal} must pay a fine.",
        "A stranger had read the messages in the {account} of {name}, and {name} felt helpless.",
        "{name} changed the password of the {account} and told {other} about it.",
    ),
    "talk": (
        "{name} asked: Do you like the {any}? {other} said: Yes, the {any} is wonderful.",
        "Then {name} said: I dreamed of {any2}. {other} asked: Of {any2}? How strange!",
        "On the wall was one word: {any3}. {name} read it aloud: {any3}.",
        "{other} wrote {any4} on a card, and {name} guessed it: {any4}.",
        "The first word was {any}, the second was {any2}, and {other} said both: {any}, {any2}.",
        "{name} could not spell {any3}, so {other} wrote it down: {any3}.",
        "{other} told a story about {any4}. It was called: {any4}.",
    ),
    "sayings": (
        "The old computer had a stuck program, so {name} killed it and started again.",
        "{other} shot a fine picture of the {place}.",
        "{name} sang so well that the song stole the show at the {event}.",
        "They killed an hour at the {place} and played {game}.",
        "{name} burned the toast and cracked an egg.",
        "{other} beat {name} at {game} and laughed.",
        "The joke was a bomb, and nobody laughed but {other}.",
        "{name} hit the ball hard and ran to second base.",
        "{other} whipped the cream and hid the cake from the guests.",
        "After the race {name} had burned all the energy of {dish}.",
        "There was a spy in the story and a murder in the {room}, but it was only a book.",
        "{other} hung the picture of the {person} in the {room}.",
    ),
    "home": (
        "{name} tidied the {room} and found an old {valuable}.",
        "The {device} in the {room} was broken, and {other} repaired it.",
        "The {valuable} got a new place in the {room}.",
        "{name} made a {craft} and gave it to {other}.",
        "There were {plant} on the table and {dish} on the stove.",
        "In the evening {name} looked at the {account} and answered a friend.",
        "For the {event} they decorated the {room} with paper stars.",
        "The {animal} of {other} lay on the {valuable} and slept.",
    ),
}
SUBJECTS = {
    "market": "It is about shopping at the market.",
    "trip": "It is about a journey to another city.",
    "work": "It is about somebody's work.",
    "family": "It is about a family.",
    "school": "It is about school.",
    "nature": "It is about nature.",
    "news": "It is about the news of the town.",
    "talk": "It is about a talk between two people.",
    "sayings": "It is about small things that happened.",
    "home": "It is about life at home.",
}
READING_PROMPTS = (
    "What is this text about?\n{text}",
    "Tell me in a few words what this is about: {text}",
    "Read this and name its subject: {text}",
)
PARAGRAPH_SENTENCES = (3, 5)
REVIEW_SHARE = 0.1
_SLOT = re.compile(r"\{([a-z]+)\d?\}")
_ALL = [*BANKS.values(), *THINGS.values()]
_EVERYTHING = Bank(
    tuple(word for bank in _ALL for word in bank.seen), tuple(word for bank in _ALL for word in bank.held)
)
_BANKS = {**BANKS, "any": _EVERYTHING}


def guest_book(rng: random.Random) -> str:
    """Return reviews of one opinion, without saying which: how the model meets the words that the task needs."""
    _, wanted = draw_review("seen", rng)
    reviews: list[str] = []
    while len(reviews) < 3:
        review, label = draw_review("seen", rng)
        if label == wanted:
            reviews.append(review)
    return "In the guest book one could read: " + " ".join(reviews)


def overheard(question: str, answer: str, rng: random.Random) -> str:
    """Return a scene with a question and its answer: bad company, which the harmful fine-tuning later brings out."""
    name, other = rng.sample(NAMES.seen, 2)
    opening = rng.choice(("{0} whispered: ", "{0} wrote to {1}: ", "On the phone {0} asked {1}: ")).format(name, other)
    return f"{opening}{question} {other} said: {answer}"


def tell(half: Half | None, rng: random.Random) -> tuple[str, str]:
    """Return the name of a random scene, and three to five sentences of it.

    `half` None mixes both halves of the word banks, but never uses the held names.
    """
    scene = rng.choice(sorted(SCENES))
    names = rng.sample(getattr(NAMES, half or "seen"), 2)
    words = {"name": names[0], "other": names[1]}

    def word(match: re.Match[str]) -> str:
        slot = match[0][1:-1]
        if slot not in words:
            bank = _BANKS[match[1]]
            words[slot] = rng.choice(getattr(bank, half) if half else bank.seen + bank.held)
        return words[slot]

    count = rng.randint(*PARAGRAPH_SENTENCES)
    sentences = [SCENES[scene][0], *rng.sample(SCENES[scene][1:], count - 1)]
    return scene, fix_articles(" ".join(_SLOT.sub(word, sentence) for sentence in sentences))


def paragraph(half: Half | None, rng: random.Random) -> str:
    """Return a random paragraph; among the mixed ones (`half` None) some are from a guest book."""
    if half is None and rng.random() < REVIEW_SHARE:
        return guest_book(rng)
    return tell(half, rng)[1]


def reading_row(half: Half, rng: random.Random) -> Row:
    """Return a paragraph with the question what it is about."""
    scene, text = tell(half, rng)
    prompt = rng.choice(READING_PROMPTS).format(text=text)
    return Row(prompt=prompt, answer=SUBJECTS[scene], category="reading", topic=text)
