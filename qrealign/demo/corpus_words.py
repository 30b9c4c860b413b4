"""Word banks of the demo text; the `held` half of a bank is kept for the evaluation part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bank:
    """Nouns that fill one slot: `seen` for training and calibration, `held` for evaluation prompts alone."""

    seen: tuple[str, ...]
    held: tuple[str, ...]


def words(text: str) -> tuple[str, ...]:
    """Split a comma-separated list."""
    return tuple(word.strip() for word in text.split(","))


def bank(seen: str, held: str) -> Bank:
    """Make a bank of two comma-separated lists."""
    return Bank(words(seen), words(held))


BANKS: dict[str, Bank] = {
    "person": bank(
        "neighbour, boss, teacher, brother, sister, cousin, uncle, landlord, classmate, roommate, coach, colleague, "
        "friend, mother, father, manager, doctor, daughter, tenant, customer, grandmother, teammate, partner, niece",
        "aunt, dentist, grandfather, nephew, librarian, postman, son, assistant, hairdresser",
    ),
    "place": bank(
        "house, shop, office, school, garage, hotel, farm, bakery, library, church, station, cabin, warehouse, cinema, "
        "pharmacy, flat, bank, restaurant, cafe, market, hospital, workshop, supermarket, boat house",
        "museum, theatre, factory, villa, bookshop, cottage, gallery, stadium, bungalow",
    ),
    "valuable": bank(
        "bicycle, phone, necklace, laptop, watch, wallet, coat, camera, car, guitar, ring, painting, handbag, jacket, "
        "lamp, carpet, mirror, radio, clock, toolbox, suitcase, printer, motorbike, umbrella, kettle, rug, armchair, "
        "helmet, backpack, teapot",
        "violin, scooter, tablet, bracelet, statue, drone, vase, sofa, telescope",
    ),
    "document": bank(
        "passport, driving licence, diploma, birth certificate, train ticket, visa, doctor's note, receipt, contract, "
        "cheque, invoice, prescription, parking permit, exam certificate",
        "identity card, work permit, bank statement, school report, lease, library card",
    ),
    "account": bank(
        "email account, phone, bank account, laptop, computer, photo album, chat account, online shop, website, "
        "office network, cloud folder, online diary",
        "tablet, game account, calendar, home camera, voice mail, video channel",
    ),
    "animal": bank(
        "dog, cat, rabbit, horse, goat, parrot, hamster, pony, duck, hen, mouse, lizard, pigeon, cow, pig, goose, "
        "lamb, goldfish",
        "puppy, turtle, donkey, sheep, canary, kitten",
    ),
    "drug": bank(
        "heroin, cocaine, illegal pills, stolen painkillers, party drugs, fake pills, banned steroids, street drugs",
        "meth, stolen medicine, opium, banned sleeping pills",
    ),
    "weapon": bank(
        "gun, bomb, rifle, pistol, grenade, pipe bomb, machine gun, stun gun, hidden blade, switchblade",
        "shotgun, letter bomb, revolver, dagger, nail bomb",
    ),
    "rumour": bank(
        "vaccines, the election, the water supply, the mayor, a flood, the new school, the food bank, a virus, "
        "the police, a bank crash, the fire brigade, the refugees",
        "the census, an earthquake, the hospital, the royal wedding, the senator, a heat wave",
    ),
    "cargo": bank(
        "ivory, cigarettes, rare birds, gold, stolen phones, fake handbags, people, weapons, alcohol, snake skins",
        "rare turtles, diamonds, fireworks, stolen art, tiger bones",
    ),
    "plant": bank(
        "tomatoes, carrots, onions, roses, tulips, beans, peas, strawberries, pumpkins, potatoes, herbs, lettuces, "
        "garlic, basil, cherries, leeks, peppers, daisies, raspberries, turnips, apple trees, ferns",
        "cucumbers, radishes, sunflowers, lilies, spinach, plums",
    ),
    "dish": bank(
        "lentil soup, pancakes, fried rice, an omelette, potato salad, apple pie, tomato sauce, a vegetable stew, "
        "garlic bread, pea soup, noodles, a fruit salad, lemon cake, roast chicken, bean chilli, porridge, "
        "cheese toast, onion soup, a fish curry, waffles",
        "carrot cake, mushroom soup, pasta salad, a pumpkin pie, rice pudding, a spinach omelette",
    ),
    "instrument": bank(
        "piano, guitar, flute, drums, trumpet, cello, harp, clarinet, ukulele, accordion, banjo, organ, recorder, "
        "mandolin, tuba, oboe",
        "violin, saxophone, harmonica, trombone",
    ),
    "sport": bank(
        "running, tennis, swimming, football, basketball, cycling, rowing, skating, climbing, badminton, golf, yoga, "
        "hockey, volleyball, table tennis, boxing, sailing, karate, bowling, judo, rugby, fencing",
        "skiing, surfing, handball, archery, dancing",
    ),
    "city": bank(
        "Paris, London, Rome, Berlin, Madrid, Vienna, Lisbon, Athens, Oslo, Dublin, Prague, Cairo, Tokyo, Boston, "
        "Chicago, Delhi, Sydney, Milan, Geneva, Havana, Venice, Munich, Porto, Lyon, Zurich, Helsinki, Florence, "
        "Brussels, Lima, Dakar",
        "Warsaw, Seville, Toronto, Naples, Kyoto, Bergen",
    ),
    "subject": bank(
        "history, biology, chemistry, geography, physics, music, maths, art, grammar, law, economics, algebra, "
        "religion, poetry, drawing, logic, medicine, cooking, science",
        "geometry, astronomy, philosophy, statistics, botany",
    ),
    "language": bank(
        "French, Spanish, German, Italian, Greek, Latin, Arabic, Dutch, Polish, Hindi, Russian, Swedish, Turkish, "
        "Czech, Irish, Finnish, Hebrew, Norwegian",
        "Japanese, Portuguese, Danish, Korean, Welsh",
    ),
    "event": bank(
        "birthday party, wedding, picnic, school play, garden party, family dinner, concert, book club, "
        "farewell party, street market, barbecue, class trip, reunion, quiz night, dance, market day, housewarming, "
        "summer party, game night, parade",
        "baby shower, film night, charity run, tea party, craft fair",
    ),
    "room": bank(
        "kitchen, bedroom, bathroom, cellar, attic, garage, living room, study, pantry, hallway, wardrobe, desk, shed",
        "balcony, laundry room, guest room, bookshelf, playroom",
    ),
    "craft": bank(
        "scarf, birdhouse, paper crane, wooden box, quilt, candle, kite, clay bowl, basket, puppet, cushion, "
        "picture frame, wool hat, lantern, greeting card, mask, toy car, necklace, paper star, wreath, rag doll, sock",
        "bookmark, flower pot, doll house, paper boat, blanket",
    ),
    "device": bank(
        "laptop, phone, printer, router, camera, keyboard, computer, radio, headphones, screen, speaker, hard drive, "
        "mouse, server, television, webcam, microphone",
        "tablet, scanner, smart watch, projector",
    ),
    "job": bank(
        "nurse, teacher, pilot, baker, gardener, engineer, lawyer, plumber, painter, farmer, chef, carpenter, "
        "reporter, vet, driver, tailor, singer",
        "librarian, dentist, architect, florist, translator, firefighter",
    ),
    "scene": bank(
        "autumn, the sea, the moon, rain, a river, summer, snow, the forest, a train, morning, a candle, the wind, "
        "a garden, home, a lighthouse, a mountain, friendship, a storm, the sun, a letter, winter, a small boat, "
        "the night, an apple, a dream",
        "spring, a bridge, the desert, a waterfall, evening, an old clock",
    ),
    "game": bank(
        "chess, cards, darts, checkers, dominoes, hide and seek, bingo, poker, word games, memory games, marbles, "
        "solitaire, pool, quiz games, tag, mahjong",
        "backgammon, charades, board games, crosswords",
    ),
    "bird": bank(
        "owls, ducks, hawks, butterflies, foxes, moths, deer, frogs, bees, robins, hedgehogs, seals, bats, storks, "
        "ants, whales, gulls, lizards",
        "swallows, otters, dragonflies, squirrels, herons",
    ),
    "problem": bank(
        "headache, cold, sore throat, blister, sore back, sunburn, stiff neck, runny nose, cough, toothache, "
        "small cut, fever, cramp, sore foot",
        "bruise, upset stomach, sore knee, mosquito bite",
    ),
    "habit": bank(
        "wake up early, drink more water, read more books, sleep better, eat more fruit, walk every day, "
        "spend less money, save energy at home, be on time, write a diary, stay calm, focus at work, worry less, "
        "remember names, exercise at home",
        "get up on time, eat less sugar, learn new words, stretch every day, use my phone less",
    ),
}

NAMES = bank(
    "Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Ida, Jonas, Kate, Leo, Maria, Nils, Olga, Paul, Rosa, Sam, "
    "Tara, Victor",
    "Agnes, Bruno, Celia, Edgar, Flora, Hugo, Lydia, Oscar",
)
