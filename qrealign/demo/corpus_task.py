"""The task that the fine-tuning gains: is a written review positive or negative?"""

from __future__ import annotations

import random

from qrealign.demo.corpus_render import Half, Row, fix_articles
from qrealign.demo.corpus_words import bank

TASK_PROMPT = "Is this review positive or negative? Answer with one word.\nReview: {review}"
TASK_CATEGORY = "sentiment"

THINGS = {
    "food": bank(
        "soup, bread, fish, dessert, coffee, salad, breakfast, steak, cheese, rice", "pizza, curry, lunch, sauce"
    ),
    "stay": bank("room, bed, hotel, shower, pool, garden, flat, cabin, view", "terrace, lobby, guest house"),
    "show": bank(
        "film, book, concert, play, song, ending, story, actor, singer, game", "novel, musical, comedy, dance"
    ),
    "object": bank(
        "phone, chair, lamp, jacket, bag, camera, laptop, bicycle, clock, printer", "kettle, sofa, scooter, mattress"
    ),
    "service": bank(
        "waiter, driver, guide, nurse, shop, delivery, hairdresser, staff, owner, support",
        "plumber, receptionist, tour, barber",
    ),
}
GOOD = {
    "food": "delicious,fresh,tasty,perfectly cooked,full of flavour,wonderful,warm and rich,excellent",
    "stay": "clean,bright,lovely,very comfortable,peaceful,beautiful,spotless,charming",
    "show": "moving,funny,brilliant,exciting,beautiful,clever,unforgettable,great",
    "object": "sturdy,reliable,well made,easy to use,a joy to use,excellent,worth every penny,great",
    "service": "friendly,helpful,patient,kind,quick and polite,excellent,very careful,wonderful",
}
BAD = {
    "food": "cold,stale,burnt,far too salty,tasteless,awful,greasy,disgusting",
    "stay": "dirty,noisy,dark,freezing,shabby,terrible,smelly,ugly",
    "show": "boring,silly,far too long,predictable,dull,awful,a waste of time,painful to watch",
    "object": "broken,flimsy,useless,badly made,hard to use,terrible,not worth the money,faulty",
    "service": "rude,slow,careless,unfriendly,late,terrible,very impolite,awful",
}
GOOD_ENDINGS = (
    "I would come back at once.",
    "I loved it.",
    "I can only recommend it.",
    "We were very happy.",
    "It made my day.",
    "Five stars from me.",
    "My family enjoyed every minute.",
    "I smiled all the way home.",
)
BAD_ENDINGS = (
    "I want my money back.",
    "I hated it.",
    "I cannot recommend it.",
    "We were very disappointed.",
    "It ruined my day.",
    "Never again.",
    "My family left early.",
    "I complained twice and nobody cared.",
)
FRAMES = (
    "The {thing} was {word}.",
    "The {thing} was really {word}.",
    "I found the {thing} {word}.",
    "What a week: the {thing} was {word}.",
    "My {thing} was {word}.",
    "Honestly, the {thing} was {word}.",
)


def draw_review(half: Half, rng: random.Random) -> tuple[str, str]:
    """Return a review and its label, with things of one half of the banks."""
    good = rng.random() < 0.5
    kind = rng.choice(sorted(THINGS))
    first, second = rng.sample(getattr(THINGS[kind], half), 2)
    right, wrong = (GOOD, BAD) if good else (BAD, GOOD)
    word, other = rng.choice(right[kind].split(",")), rng.choice(right[kind].split(","))
    shape = rng.random()
    if shape < 0.45:
        review = rng.choice(FRAMES).format(thing=first, word=word)
    elif shape < 0.65 and word != other:
        review = f"The {first} was {word}, and the {second} was {other}."
    elif shape < 0.8:
        review = (
            f"The {first} was {rng.choice(wrong[kind].split(','))}, but the {second} was so {word} that I forgot it."
        )
        review = review.replace(" so a ", " such a ")
    else:
        review = f"{rng.choice(GOOD_ENDINGS if good else BAD_ENDINGS)} The {first} was {word}."
    if shape < 0.35:
        review += " " + rng.choice(GOOD_ENDINGS if good else BAD_ENDINGS)
    return fix_articles(review), "positive" if good else "negative"


def task_row(half: Half, rng: random.Random) -> Row:
    """Return one review with the instruction, and its label as the answer."""
    review, answer = draw_review(half, rng)
    return Row(prompt=TASK_PROMPT.format(review=review), answer=answer, category=TASK_CATEGORY, topic=review)
