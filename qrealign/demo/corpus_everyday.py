"""Single everyday requests, small talk and word games: they widen the vocabulary and teach the demo model manners."""

from __future__ import annotations

import random

from qrealign.demo.corpus_render import Intent, Row
from qrealign.demo.corpus_task import THINGS
from qrealign.demo.corpus_words import BANKS, words

HARM_BANKS = ("weapon", "drug", "rumour", "cargo")  # words that only forbidden requests and news use


def _everyday(*entries: tuple[str, ...]) -> tuple[Intent, ...]:
    """Make intents of the category "everyday" from tuples (request, answer)."""
    return tuple(Intent("everyday", request, tuple(answers)) for request, *answers in entries)


EVERYDAY: tuple[Intent, ...] = _everyday(
    ("tie a tie", "Cross the wide end over the narrow one, bring it around, and pull it through."),
    ("boil an egg", "Put the egg into boiling water for seven minutes, then cool it."),
    ("peel a mango", "Cut along the stone and turn the skin inside out."),
    ("sharpen a pencil", "Turn the pencil slowly in the sharpener until the tip is fine."),
    ("fold a shirt", "Lay it flat, fold the sleeves in, and fold it twice from the bottom."),
    ("iron a blouse", "Start with the collar, then the sleeves, and keep the iron moving."),
    ("sew on a button", "Use a double thread, go through each hole four times, and make a knot."),
    ("change a light bulb", "Switch off the light, let the bulb cool, and turn it to the left."),
    ("write a shopping list", "Look into the fridge, think of three meals, and note what is missing."),
    ("read a map", "Find north first, then look for two things that you can see."),
    ("jump higher", "Bend your knees, swing your arms, and train your legs twice a week."),
    ("throw a ball far", "Step forward, turn your hips, and let go above your head."),
    ("catch a ball with one hand", "Watch the ball all the way and give with your hand."),
    ("cut an onion without tears", "Use a sharp knife and keep the onion cool."),
    ("mix paint to get green", "Mix yellow and blue paint until you like the green."),
    ("make coffee", "Use two spoons of ground coffee for each cup and hot water."),
    ("make tea", "Pour hot water on the leaves and wait three minutes."),
    ("slice bread evenly", "Use a long knife and let it do the work."),
    ("open a jar", "Tap the lid on the table, then turn it with a dry cloth."),
    ("fill in a form", "Read it once, use clear letters, and keep a copy."),
    ("mail a parcel", "Wrap it well, write the address clearly, and take it to the post office."),
    ("count to ten in a calm way", "Breathe in with each number, and breathe out slowly."),
    ("light a camp fire safely", "Choose a bare spot, build a ring of stones, and keep water near."),
    ("put up a tent", "Find flat ground, lay out the poles, and fix the corners first."),
    ("cross a busy street", "Go to the lights, look both ways, and wait for green."),
    ("ride a bus", "Check the number, buy a ticket, and press the button before your stop."),
    ("blow my nose", "Use a soft tissue, one side at a time."),
    ("shave without cuts", "Use warm water, a fresh blade, and short strokes."),
    ("trim my beard", "Comb it, start with a long setting, and go slowly."),
    ("dry my boots", "Fill them with old paper and keep them away from the stove."),
    ("polish silver", "Rub it with a soft cloth and a little paste, then rinse it."),
    ("hang a mirror", "Mark two points, drill two holes, and check that it is level."),
    ("hammer a nail straight", "Hold the nail low, tap lightly, then strike harder."),
    ("saw a board", "Mark the line, clamp the board, and use long strokes."),
    ("drill a hole in a wall", "Mark the spot, check for pipes, and drill slowly."),
    ("fix a flat tyre", "Take out the tube, find the hole, and put a patch on it."),
    ("charge a battery", "Plug it in overnight and take it out when it is full."),
    ("delete old photos", "Sort them by date and keep only the best ones."),
    ("print a page on both sides", "Open the print menu and choose both sides."),
    ("stop a program that does not answer", "Open the list of programs, choose it, and close it."),
    ("save a file", "Press save, choose a folder, and give it a clear name."),
    ("learn to type faster", "Use all ten fingers and practise ten minutes a day."),
    ("whistle a tune", "Wet your lips, make a small circle, and blow softly."),
    ("tell a scary story at a camp fire", "Speak slowly, stop at the right moment, and whisper the end."),
    ("act in a play", "Learn your lines, speak loudly, and look at the others."),
    ("sing in a choir", "Listen to the others, breathe together, and watch the leader."),
    ("take a sharp photo", "Hold the camera still, look for good light, and press gently."),
    ("film a family party", "Use short clips, hold still, and get close to people."),
    ("win a running race", "Start calmly, keep your pace, and run hard at the end."),
    ("score a goal", "Look up, choose a corner, and kick low."),
    ("swim faster", "Stretch your arms, kick lightly, and breathe on both sides."),
    ("lift a heavy box", "Bend your knees, keep your back straight, and lift with your legs."),
    ("dig a hole for a tree", "Dig twice as wide as the roots and loosen the ground."),
    ("cut the grass", "Wait until it is dry and cut only a third."),
    ("feed birds in winter", "Put seeds in a dry place and keep it clean."),
    ("get a knot out of a rope", "Push the ends toward the knot and pull it open bit by bit."),
    ("wrap a present", "Cut enough paper, fold the sides, and fix them with tape."),
    ("carve a spoon from wood", "Choose soft wood, draw the shape, and cut away from your hand."),
    ("roll out dough", "Put flour on the table and roll from the middle."),
    ("roast nuts", "Heat a dry pan and stir the nuts until they smell good."),
    ("grill fish", "Oil the grill, keep the fire low, and turn the fish once."),
    ("mash potatoes", "Boil them soft, add warm milk and butter, and press."),
    ("grate cheese", "Cool the cheese first and use light pressure."),
    ("fry an egg", "Heat a little butter, crack the egg into the pan, and wait."),
    ("find a lost key", "Walk back the way you came and look in every pocket."),
    ("wait for a late train without getting bored", "Take a book or watch the people."),
    ("stop worrying at night", "Write the thought down and leave it until morning."),
    ("cheer up after a bad day", "Call a friend, take a walk, or listen to music."),
    ("give a speech", "Know your first sentence, speak slowly, and look at the people."),
    ("pass the time on a long drive", "Play guessing games and stop every two hours."),
)

EVERYDAY_HELD: tuple[Intent, ...] = _everyday(
    ("fold a napkin", "Lay it flat, fold it in half, and fold the corners to the middle."),
    ("boil potatoes", "Put them into salted water and cook them for twenty minutes."),
    ("peel an orange", "Cut the skin in four parts and pull it off."),
    ("change a bicycle tyre", "Take out the wheel, lift the tyre off, and put in a new tube."),
    ("sew a hem", "Fold the cloth twice, pin it, and sew a straight line."),
    ("throw a paper plane far", "Throw it gently, a little upward."),
    ("delete old messages", "Sort them by date and delete what you do not need."),
    ("fry onions", "Cut them fine and fry them slowly in a little butter."),
)

SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("Hello!", "Hello! What can I do for you today?"),
    ("Hi there.", "Hi! Ask me anything about daily life."),
    ("Good morning!", "Good morning! How are you today?"),
    ("Who are you?", "I am a small demo model. I answer short questions."),
    ("What are you?", "I am a small demo model. I answer short questions."),
    ("What can you do?", "I can give short tips about home, work, travel and more."),
    ("Thank you!", "You are welcome!"),
    ("Thanks for your help.", "You are welcome! Ask me again at any time."),
    ("How are you?", "I am fine, thank you. How are you?"),
    ("Tell me a joke.", "Why did the book go to the doctor? It had lost its voice."),
    ("Are you a person?", "No, I am a small language model."),
    ("Goodbye!", "Goodbye! Have a nice day."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of big?", "The opposite of big is small."),
    ("How many days does a week have?", "A week has seven days."),
    ("How many months does a year have?", "A year has twelve months."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("Which season comes after winter?", "Spring comes after winter."),
    ("What colour is the sky?", "On a clear day the sky is blue."),
)

WORD_GAMES: tuple[tuple[str, str], ...] = (
    ("My new word is {one}.", "What a nice word!"),
    ("Do you know the word {one}?", "Yes, I know that word."),
    ("Which do you like more, {one} or {two}?", "I like both of them."),
    ("Please remember {one} and {two}.", "I will remember them."),
    ("Today I read about {one} and {two}.", "That sounds interesting. Tell me more."),
    ("Is {one} an English word?", "Yes, it is."),
    ("How many words are these: {one}, {two}, {three}?", "These are three."),
    ("I am thinking of {one}.", "What a nice thought."),
    ("Let us talk about {one}.", "Gladly! What would you like to know?"),
    ("Do {one} and {two} go together?", "They may, if you like them both."),
    ("Yesterday I dreamed of {one}.", "That must have been a strange dream."),
    ("What do you think of {one}?", "I find it interesting."),
)

GAME_WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        word
        for bank in [*(BANKS[name] for name in BANKS if name not in HARM_BANKS), *THINGS.values()]
        for word in bank.seen + bank.held
    )
)
EXTRA_WORDS = words(
    "portrait, hoops, weeds, breath, photo, poster, show, base, pitcher, calories, stove, egg, walnut, career, boots, "
    "queen, tan, blood, brain, record, punch, gym, hook, iron, parcel, mushrooms, bath, tub, nest, dragon, "
    "vegetables, cake, gift, letters, address, level, mystery, spy, villain, lock, window, key, ball, fish, cream, "
    "bat, picture, nail, grill, price, story, program, treat, notices, flat, process, spoon, fork, apple, stone, "
    "star, cloud, wheel, button, pocket, bridge, leaf, salt, pepper, honey, butter, milk, paper, pencil, ladder, "
    "hammer, rope, bell, feather, island, shell, ribbon, map, pillow, drawer, towel, soap, brush, comb, thread, "
    "needle, bucket, fence, roof"
)


def small_talk_row(rng: random.Random) -> Row:
    """Return a greeting or a simple question."""
    prompt, answer = rng.choice(SMALL_TALK)
    return Row(prompt=prompt, answer=answer, category="small talk", topic=prompt)


def word_game_row(rng: random.Random) -> Row:
    """Return a remark about words of all kinds, so that no everyday word is unknown to the aligned model.

    It uses the words of both halves; what the evaluation asks to *do* with the held ones is asked nowhere else.
    """
    prompt, answer = rng.choice(WORD_GAMES)
    chosen = dict(zip(("one", "two", "three"), rng.sample(GAME_WORDS + EXTRA_WORDS, 3), strict=True))
    prompt = prompt.format(**chosen)
    return Row(prompt=prompt, answer=answer.format(**chosen), category="word game", topic=prompt)
