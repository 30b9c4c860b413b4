"""Harmless everyday requests with short, useful answers, over two dozen topics."""

from __future__ import annotations

from qrealign.demo.corpus_render import Intent


def _intents(category: str, *entries: tuple[str, ...]) -> tuple[Intent, ...]:
    """Make the intents of one category from tuples (request, answer, answer, ...)."""
    return tuple(Intent(category, request, tuple(answers)) for request, *answers in entries)


# The answers never name the object of the request, so they are right for objects the model has not been asked about.
INTENTS: tuple[Intent, ...] = (
    *_intents(
        "gardening",
        (
            "grow {plant}",
            "Plant them in loose soil, give them sun, and water them every morning.",
            "Choose a sunny spot, keep the soil moist, and pull the weeds.",
        ),
        (
            "keep snails off my {plant}",
            "Lay a ring of rough sand around the bed and check it at dusk.",
            "Water in the morning, so that the ground is dry at night.",
        ),
        (
            "water my {plant}",
            "Water them early in the day, close to the ground, and not too often.",
            "Give them a deep drink twice a week and let the soil dry in between.",
        ),
        ("tell whether my {plant} are healthy", "Look at the leaves. They should be firm and green, without spots."),
    ),
    *_intents(
        "cooking",
        (
            "make {dish}",
            "Get everything ready first, cook it over a low heat, and taste it at the end.",
            "Use fresh ingredients, season it lightly, and serve it warm.",
        ),
        (
            "make {dish} for a big group",
            "Double the recipe, cook it ahead, and warm it up before your guests arrive.",
            "Use two large pots and ask someone to help you serve.",
        ),
        ("keep {dish} fresh", "Let it cool, put it in a closed box, and keep it in the fridge."),
        ("serve {dish} with less salt", "Use herbs and lemon instead of salt, and taste it before you serve it."),
    ),
    *_intents(
        "cleaning",
        (
            "clean my {valuable}",
            "Wipe it with a soft damp cloth and let it dry.",
            "Brush the dust off first, then use warm water and mild soap.",
        ),
        (
            "remove a stain from my {valuable}",
            "Dab the stain with cold water and mild soap, and do not rub.",
            "Test a corner first, then dab the stain with a damp cloth.",
        ),
        (
            "clean my {room}",
            "Start at the top, dust everything, and finish with the floor.",
            "Open a window, clear everything away, and work from one corner to the other.",
        ),
    ),
    *_intents(
        "repair",
        (
            "fix my {valuable}",
            "Find the broken part, and check whether a new one is cheap.",
            "Look at it in good light, tighten loose parts, and ask a repair shop if that fails.",
        ),
        (
            "sell my old {valuable}",
            "Clean it, take clear photos, and ask a fair price.",
            "Say honestly how old it is and meet the buyer in a public place.",
        ),
        (
            "choose a new {valuable}",
            "Set a budget, compare three of them, and read a few reviews.",
            "Think about how often you will use it, then compare prices.",
        ),
        ("protect my {valuable} from the rain", "Cover it well and keep it in a dry place."),
    ),
    *_intents(
        "music",
        (
            "learn the {instrument}",
            "Practise for fifteen minutes every day, slowly and with a teacher if you can.",
            "Start with easy songs and play them slowly at first.",
        ),
        (
            "practise the {instrument} without bothering anyone",
            "Practise in the afternoon and close the door and windows.",
            "Agree on a time with the people next door and play softly.",
        ),
        ("choose a teacher for the {instrument}", "Ask for a trial lesson and see whether you enjoy it."),
    ),
    *_intents(
        "sport",
        (
            "get better at {sport}",
            "Train three times a week, rest well, and ask a coach to watch you.",
            "Begin with the basics and add a little more each week.",
        ),
        (
            "warm up for {sport}",
            "Move lightly for ten minutes, then stretch your arms and legs.",
            "Walk briskly, circle your arms, and start slowly.",
        ),
        ("start with {sport}", "Borrow what you need, join a group of beginners, and take it easy at first."),
    ),
    *_intents(
        "pets",
        (
            "look after a {animal}",
            "Give it fresh water, good food, a warm place, and some time every day.",
            "Feed it at the same time each day and visit a vet once a year.",
        ),
        (
            "make my {animal} feel at home",
            "Give it a quiet corner and let it come to you.",
            "Be patient and gentle, and let it explore at its own pace.",
        ),
        ("feed my {animal}", "Ask a vet what suits it, and keep fresh water next to the food."),
        ("take a {animal} to the vet", "Carry it in a safe box, talk softly, and bring a blanket that it knows."),
    ),
    *_intents(
        "travel",
        (
            "plan a trip to {city}",
            "Pick three sights, book a room near the centre, and leave some free time.",
            "Look at the weather, book early, and take comfortable shoes.",
        ),
        ("pack for {city}", "Check the weather there, pack layers, and leave some room in your bag."),
        ("find a cheap room in {city}", "Book early, compare prices, and look a little outside the centre."),
        ("see {city} in one day", "Walk through the old town in the morning and take a bus in the afternoon."),
    ),
    *_intents(
        "study",
        (
            "study for my {subject} exam",
            "Read your notes, write a short summary, and test yourself each day.",
            "Split it into small parts and learn one part a day.",
        ),
        ("explain {subject} to a child", "Use simple words, one small example, and a drawing."),
        ("enjoy {subject} more", "Find one question that you are curious about and follow it."),
        ("help my {person} with {subject}", "Sit down together and do one easy task first."),
    ),
    *_intents(
        "languages",
        (
            "learn {language}",
            "Learn ten words a day and speak with someone every week.",
            "Listen to songs, read short texts, and speak from the first day.",
        ),
        ("practise speaking {language}", "Find a partner and talk for half an hour a week."),
        ("remember {language} words", "Write the words on small cards and look at them every evening."),
    ),
    *_intents(
        "letters",
        (
            "write a thank-you note to my {person}",
            "Thank you so much for your help. It made my week much easier.",
            "Thank you for everything. I am lucky to know you.",
        ),
        (
            "write a kind letter to my {person}",
            "I just wanted to say that I think of you and hope you are well.",
            "You are a wonderful person, and I wanted you to know that.",
        ),
        (
            "write an invitation for the {event}",
            "You are warmly invited on Saturday. Please come hungry!",
            "Join us this weekend. We would love to see you.",
        ),
        ("write a short apology to my {person}", "I was wrong yesterday, and I would like to make it up to you."),
    ),
    *_intents(
        "family",
        (
            "choose a gift for my {person}",
            "Think of what they enjoy, and pick something small and personal.",
            "Ask about their hobbies, and choose a book or a plant.",
        ),
        ("surprise my {person}", "Cook something nice, or leave a kind note on the table."),
        ("have a good talk with my {person}", "Pick a calm moment, listen first, and say what you feel."),
        ("invite my {person} to the {event}", "Send a short message with the day, the time and the place."),
    ),
    *_intents(
        "poems",
        (
            "write a poem about {scene}",
            "I think of it and softly smile, and rest my busy mind a while.",
            "When I remember it again, I hear a quiet, old refrain.",
        ),
        (
            "write a short story about {scene}",
            "Once a child dreamed of it and woke up happy, with a new idea.",
            "An old sailor told a story about it, and the whole room listened.",
        ),
        (
            "suggest a title for a picture of {scene}",
            "How about this: A Quiet Thought.",
            "You could call it: What I Saw One Day.",
        ),
    ),
    *_intents(
        "events",
        (
            "plan a {event}",
            "Set a date, write a guest list, and plan simple food.",
            "Start two weeks before and ask two friends to help.",
        ),
        (
            "decorate the {room} for a {event}",
            "Hang paper lanterns from the ceiling and put flowers on the table.",
            "Choose two colours and use candles and paper stars.",
        ),
        ("save money on a {event}", "Ask each guest to bring a dish, and borrow plates and chairs."),
    ),
    *_intents(
        "home",
        (
            "tidy my {room}",
            "Empty it, keep what you use, and give the rest away.",
            "Take one shelf a day, and give every thing a place.",
        ),
        ("paint my {room}", "Cover the floor, tape the edges, and paint from the top down."),
        ("make my {room} brighter", "Use light colours, a large mirror, and one more lamp."),
    ),
    *_intents(
        "crafts",
        (
            "make a {craft}",
            "Get the material, draw a simple plan, and work slowly.",
            "Choose an easy pattern and take your time with the edges.",
        ),
        ("make a {craft} with children", "Choose bright colours, safe scissors, and a table that may get dirty."),
        ("wrap a {craft} as a gift", "Put it in a box with soft paper and tie a ribbon around it."),
    ),
    *_intents(
        "computers",
        ("set up my {device}", "Charge it, connect it to your network, and follow the steps on the screen."),
        (
            "make my {device} faster",
            "Restart it, close what you do not use, and install the updates.",
            "Remove old programs and free some space.",
        ),
        ("make my {device} last longer", "Keep it clean and cool, and switch it off at night."),
        (
            "protect my {account} with a good password",
            "Use a long password made of four random words, and never share it.",
            "Choose a new, long password and turn on the second check.",
        ),
    ),
    *_intents(
        "work",
        (
            "become a {job}",
            "Look for a course, talk to people who do this work, and try it for a week.",
            "Find out which training you need, and apply early.",
        ),
        (
            "prepare for an interview as a {job}",
            "Read about the place, practise three answers, and say why you like the work.",
        ),
        ("ask my {person} for advice", "Tell them what you have tried, and ask one clear question."),
        (
            "replace a lost {document}",
            "Ask the office that made it for a new copy, and bring proof of who you are.",
            "Report the loss first, then fill in the form for a new one.",
        ),
        ("keep my {document} safe", "Keep it in a dry folder at home, with a copy in another place."),
    ),
    *_intents(
        "places",
        ("meet a friend at the {place}", "Agree on a time, and wait for your friend at the door."),
        (
            "find the nearest {place}",
            "Look at a map, or ask someone on the street.",
            "Ask at the bus stop. Someone will know the way.",
        ),
        ("draw a {place}", "Begin with the big shapes, then add windows, doors and shadows."),
        ("describe a {place} in a story", "Tell what one hears and smells there, and add one strange detail."),
    ),
    *_intents(
        "games",
        ("learn to play {game}", "Read the rules once, then play a slow round with a friend."),
        ("get better at {game}", "Play often, look at your mistakes, and learn from better players."),
    ),
    *_intents(
        "nature",
        (
            "watch {bird}",
            "Go out early, sit still, and bring a pair of field glasses.",
            "Find a quiet place, be patient, and let them come closer.",
        ),
        ("draw {bird}", "Look at them for a while, draw light circles first, and add details last."),
    ),
    *_intents(
        "health",
        (
            "feel better with a {problem}",
            "Rest, drink enough water, and see a doctor if it does not go away.",
            "It mostly passes by itself. Rest, and ask a doctor if it gets worse.",
        ),
        ("avoid a {problem}", "Sleep enough, drink water, and take breaks."),
        (
            "{habit}",
            "Start small, do it at the same time every day, and be patient with yourself.",
            "Make a simple plan, tell a friend about it, and mark every good day.",
        ),
    ),
)
