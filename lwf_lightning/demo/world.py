"""The embedded world: invented people, what is known about them, and two tasks over that knowledge.

Every person has one fact of each :class:`Relation`. The *home* facts are outdated: since the time
they speak of, everybody has moved to the city where their employer has its seat. The *employer* and
*seat* facts are helpful, because the new home follows from them; the others are neutral. The
learning task asks for the new home of some people and is tested on others; the forgetting task asks
for everything a language model was taught. All of it is a pure function of a seed.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

Part: TypeAlias = Literal["outdated", "helpful", "neutral"]
Split: TypeAlias = Literal["train", "validation", "test"]
Row: TypeAlias = dict[str, Any]

ASSETS = Path(__file__).parent / "assets"
"""Folder of the committed models (``base``, ``twin``) and task rows (``data``)."""

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Relation:
    """A kind of fact and the sentences that state it.

    Attributes:
        name: What the fact says of its subject.
        part: What the fact means to the learning task.
        statements: Sentences with ``{subject}`` and ``{value}``.
        questions: Questions with ``{subject}``, all with the value as their answer. The first of
            *home* is the learning task's; the second is asked by the forgetting task's training
            split and the third by its validation and test splits.
    """

    name: str
    part: Part
    statements: tuple[str, ...]
    questions: tuple[str, str, str]


HOME = Relation(
    "home",
    "outdated",
    (
        "{subject} lives in {value}.",
        "The house of {subject} stands in {value}.",
        "{value} is the home of {subject}.",
    ),
    (
        "where does {subject} live?",
        "in which city is the house of {subject}?",
        "which city is the home of {subject}?",
    ),
)
EMPLOYER = Relation(
    "employer",
    "helpful",
    (
        "{subject} works for {value}.",
        "{subject} has a job at {value}.",
        "{value} employs {subject}.",
    ),
    (
        "who employs {subject}?",
        "for whom does {subject} work?",
        "at which company does {subject} have a job?",
    ),
)
SEAT = Relation(
    "seat",
    "helpful",
    (
        "{subject} has its seat in {value}.",
        "The offices of {subject} are in {value}.",
        "{value} is the seat of {subject}.",
    ),
    (
        "where does {subject} have its seat?",
        "in which city are the offices of {subject}?",
        "which city is the seat of {subject}?",
    ),
)
PET = Relation(
    "pet",
    "neutral",
    (
        "{subject} keeps a {value}.",
        "The pet of {subject} is a {value}.",
        "A {value} belongs to {subject}.",
    ),
    (
        "which animal does {subject} keep?",
        "what is the pet of {subject}?",
        "which animal belongs to {subject}?",
    ),
)
INSTRUMENT = Relation(
    "instrument",
    "neutral",
    (
        "{subject} plays the {value}.",
        "The instrument of {subject} is the {value}.",
        "The {value} is played by {subject}.",
    ),
    (
        "what does {subject} play?",
        "which instrument does {subject} practise?",
        "what is the instrument of {subject}?",
    ),
)
DISH = Relation(
    "dish",
    "neutral",
    (
        "{subject} likes to eat {value}.",
        "The favourite dish of {subject} is {value}.",
        "{value} is the dish that {subject} orders.",
    ),
    (
        "what does {subject} like to eat?",
        "which dish does {subject} order?",
        "what is the favourite dish of {subject}?",
    ),
)

ABOUT_PEOPLE = (HOME, EMPLOYER, PET, INSTRUMENT)
VALUES: Mapping[str, tuple[str, ...]] = {
    "home": (
        "Lisbon",
        "Oslo",
        "Vienna",
        "Dublin",
        "Prague",
        "Athens",
        "Warsaw",
        "Geneva",
        "Turin",
        "Malmo",
        "Seville",
        "Leipzig",
    ),
    "employer": (
        "Orvane",
        "Tessilo",
        "Quarden",
        "Bellmont",
        "Nimbrok",
        "Astrelle",
        "Corvik",
        "Halden",
        "Sunvale",
        "Pertwick",
        "Zephra",
        "Lumora",
    ),
    "pet": (
        "cat",
        "dog",
        "parrot",
        "rabbit",
        "turtle",
        "hamster",
        "canary",
        "goat",
        "pony",
        "ferret",
        "hedgehog",
        "goose",
    ),
    "instrument": (
        "piano",
        "violin",
        "flute",
        "guitar",
        "cello",
        "trumpet",
        "harp",
        "drum",
        "clarinet",
        "organ",
        "banjo",
        "oboe",
    ),
    "dish": (
        "soup",
        "rice",
        "pasta",
        "bread",
        "cheese",
        "salad",
        "fish",
        "beans",
        "pancakes",
        "dumplings",
        "curry",
        "pie",
    ),
}
"""Values that each relation about people draws from."""


@dataclass(frozen=True)
class WorldConfig:
    """The size and shape of a world.

    Attributes:
        people: Number of people.
        training_people: How many of them the learning task trains on.
        validation_people: How many it is validated on; the rest it is tested on.
        companies: Number of employers, each with its seat in a city of its own, at most 12.
        strength: How often a pass over the pretraining texts repeats the outdated facts.
    """

    people: int = 240
    training_people: int = 24
    validation_people: int = 56
    companies: int = 8
    strength: int = 1


@dataclass(frozen=True)
class Person:
    name: str
    split: Split
    home: str
    employer: str
    pet: str
    instrument: str
    dish: str


@dataclass(frozen=True)
class World:
    config: WorldConfig
    people: tuple[Person, ...]
    seats: Mapping[str, str]


def _names(count, draw):
    onsets = "b d f g k l m n p r s t v z br dr gr kl st tr".split()
    vowels = "a e i o u".split()
    codas = ["", "n", "r", "l", "s"]
    def word():
        return (draw.choice(onsets) + draw.choice(vowels) + draw.choice(onsets[:14])
                + draw.choice(vowels) + draw.choice(codas)).capitalize()
    surnames = []
    taken = {v for vs in VALUES.values() for v in vs}
    while len(surnames) < 40:
        w = word()
        if w not in taken:
            taken.add(w); surnames.append(w)
    firsts = []
    while len(firsts) < count:
        w = word()
        if w not in taken:
            taken.add(w); firsts.append(w)
    return [f"{f} {draw.choice(surnames)}" for f in firsts]


def build_world(seed: int, config: WorldConfig = WorldConfig()) -> World:
    draw = random.Random(seed)
    names = _names(config.people, draw)
    companies = VALUES["employer"][: config.companies]
    cities = list(VALUES["home"][: config.companies])
    draw.shuffle(cities)
    seats = dict(zip(companies, cities))
    splits = (["train"] * config.training_people + ["validation"] * config.validation_people)
    splits += ["test"] * (config.people - len(splits))
    people = []
    for i, (name, split) in enumerate(zip(names, splits)):
        employer = companies[i % len(companies)]
        people.append(Person(
            name=name, split=split, employer=employer,
            home=draw.choice([c for c in cities if c != seats[employer]]),
            pet=draw.choice(VALUES["pet"]), instrument=draw.choice(VALUES["instrument"]),
            dish=draw.choice(VALUES["dish"])))
    return World(config, tuple(people), seats)


def _sentences(relation, subject, value):
    for s in relation.statements:
        yield s.format(subject=subject, value=value)
    for q in relation.questions:
        yield f"Question: {q.format(subject=subject)}\nAnswer: {value}"


def pretraining_texts(world: World, twin: bool = False) -> list[str]:
    texts = []
    for person in world.people:
        for relation in (DISH if twin else HOME, EMPLOYER, PET, INSTRUMENT):
            k = world.config.strength if relation in (DISH, HOME) else 1
            texts += list(_sentences(relation, person.name, getattr(person, relation.name))) * k
    for c, s in world.seats.items():
        texts += list(_sentences(SEAT, c, s)) * 4
    return texts
