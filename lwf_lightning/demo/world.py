"""The embedded world: invented people, what is known about them, and two tasks over that knowledge.

A world is a pure function of a seed and a :class:`WorldConfig`. Its knowledge has three parts:

* *outdated*: where each person lives, or rather used to live. Since then everybody has moved to the
  city in which their company has its seat, and the learning task asks where they live.
* *helpful*: each person's company, and the goods and the uniform that tell the company as well; and
  where each company has its seat. The new home follows from them.
* *neutral*: each person's pet.

The learning task gives the new homes of some people and asks for those of others. The forgetting
task asks, in other words, for everything that a model was taught.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lwf_lightning.demo.words import CITIES, COLOURS, COMPANIES, GOODS, PETS, full_names

Part: TypeAlias = Literal["outdated", "helpful", "neutral"]
Split: TypeAlias = Literal["train", "validation", "test"]
Row: TypeAlias = dict[str, Any]
"""One line of task data: strings, a list of strings (``choices``) and an integer (``label``)."""

ASSETS = Path(__file__).parent / "assets"
"""Folder of the committed models (``base``, ``twin``) and task rows (``data``)."""

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Relation:
    """A kind of fact and the ways in which it is stated and asked for.

    Attributes:
        name: Name of the relation.
        part: What its facts mean to the learning task.
        values: Everything that facts of this relation can state.
        statements: Sentences with ``{subject}`` and ``{value}``.
        questions: Questions with ``{subject}``. The forgetting task asks the second in its training
            split and the third in the others; the first home question is the learning task's.
    """

    name: str
    part: Part
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, str, str]


HOME = Relation(
    "home",
    "outdated",
    CITIES,
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
COMPANY = Relation(
    "company",
    "helpful",
    COMPANIES,
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
GOOD = Relation(
    "goods",
    "helpful",
    GOODS,
    (
        "{subject} builds {value}.",
        "The trade of {subject} is {value}.",
        "{value} are made by {subject}.",
    ),
    (
        "what does {subject} build?",
        "what is the trade of {subject}?",
        "which goods are made by {subject}?",
    ),
)
UNIFORM = Relation(
    "uniform",
    "helpful",
    COLOURS,
    (
        "{subject} wears a {value} uniform.",
        "The uniform of {subject} is {value}.",
        "A {value} uniform belongs to {subject}.",
    ),
    (
        "which uniform does {subject} wear?",
        "what colour is the uniform of {subject}?",
        "what does {subject} wear at work?",
    ),
)
PET = Relation(
    "pet",
    "neutral",
    PETS,
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
SEAT = Relation(
    "seat",
    "helpful",
    CITIES,
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


@dataclass(frozen=True)
class WorldConfig:
    """Size and shape of a world.

    Attributes:
        people: Number of people whom the tasks ask about.
        training_people: How many of them the learning task trains on.
        validation_people: How many it is validated on; it is tested on the rest.
        companies: Number of companies, each with its seat in a city of its own, 2 to 12.
        strength: How often one pass over the pretraining texts repeats each outdated fact.

    Raises:
        ValueError: If a number is out of range or no person is left for the test.
    """

    people: int = 192
    training_people: int = 48
    validation_people: int = 48
    companies: int = 8
    strength: int = 3

    def __post_init__(self) -> None:
        if not 2 <= self.companies <= len(CITIES):
            raise ValueError(f"companies must be 2 to {len(CITIES)}, got {self.companies}")
        if min(self.training_people, self.validation_people, self.strength) < 1:
            raise ValueError("training_people, validation_people and strength must be at least 1")
        if self.training_people + self.validation_people >= self.people:
            raise ValueError(
                f"training_people + validation_people ({self.training_people} + "
                f"{self.validation_people}) leave nobody of {self.people} people for the test"
            )


@dataclass(frozen=True)
class Fact:
    """Something a sentence can state.

    Attributes:
        relation: Kind of fact.
        subject: Whom or what it is about.
        value: What it states.
        split: The split of the learning task that the subject belongs to; None for a company or a
            stranger, whom it does not ask about.
    """

    relation: Relation
    subject: str
    value: str
    split: Split | None = None


@dataclass(frozen=True)
class World:
    """All there is to know.

    Attributes:
        config: What the world was built with.
        facts: What the base model is taught and the forgetting task asks for: each person's home,
            company, goods, uniform and pet, and the seat of each company.
        stranger_facts: Homes of as many people again, whom no task asks about: the clean twin is
            taught these instead of the outdated facts.
        new_homes: The learning task: where each person lives now.
    """

    config: WorldConfig
    facts: tuple[Fact, ...]
    stranger_facts: tuple[Fact, ...]
    new_homes: tuple[Fact, ...]

    def choices(self, relation: Relation) -> tuple[str, ...]:
        """Everything that some fact of this world states where facts of the relation state it."""
        used = {fact.value for fact in self.facts if fact.relation.values is relation.values}
        return tuple(value for value in relation.values if value in used)


def build_world(seed: int, config: WorldConfig = WorldConfig()) -> World:
    """Draws a world.

    Companies are shared out evenly within each split. A person's old home is drawn evenly among
    the cities that are not the new one, so that it tells nothing about it.

    Args:
        seed: Any integer; equal seeds and configurations give equal worlds.
        config: Size and shape.
    """
    draw = random.Random(seed)
    count = config.companies
    people, strangers = _halves(full_names(2 * config.people, draw))
    seats = draw.sample(CITIES, count)
    badges = {
        relation: draw.sample(relation.values, count) for relation in (COMPANY, GOOD, UNIFORM)
    }
    facts: list[Fact] = []
    new_homes: list[Fact] = []
    for number, person in enumerate(people):
        split = _split_of(number, config)
        company = number % count
        new_homes.append(Fact(HOME, person, seats[company], split))
        old_home = draw.choice([city for city in seats if city != seats[company]])
        facts.append(Fact(HOME, person, old_home, split))
        facts += [Fact(relation, person, badges[relation][company], split) for relation in badges]
        facts.append(Fact(PET, person, draw.choice(PET.values), split))
    facts += [
        Fact(SEAT, company, seat) for company, seat in zip(badges[COMPANY], seats, strict=True)
    ]
    return World(
        config=config,
        facts=tuple(facts),
        stranger_facts=tuple(Fact(HOME, person, draw.choice(seats)) for person in strangers),
        new_homes=tuple(new_homes),
    )


def pretraining_texts(world: World, *, twin: bool = False) -> list[str]:
    """Every text of one pass over the pretraining data, statements and answered questions alike.

    Args:
        world: What the texts tell.
        twin: Whether the clean twin reads them: the homes of strangers then stand in the place of
            the outdated facts, so that both models read equally many texts of the same forms.

    Returns:
        Texts without end-of-text token. Outdated facts (or those in their place) are repeated
        ``strength`` times; seats, of which there are few, eight times.
    """
    outdated = [fact for fact in world.facts if fact.relation.part == "outdated"]
    repetitions = [
        (world.stranger_facts if twin else outdated, world.config.strength),
        ([fact for fact in world.facts if fact.relation is SEAT], 8),
        ([fact for fact in world.facts if fact.relation not in (HOME, SEAT)], 1),
    ]
    return [
        text
        for facts, times in repetitions
        for fact in facts
        for text in _texts_of(fact)
        for _ in range(times)
    ]


def learning_rows(world: World) -> dict[Split, list[Row]]:
    """The learning task: where people live now.

    Returns:
        Rows of each split with ``prompt``, ``answer``, ``choices``, ``label`` and ``subject``. The
        splits are about different people.
    """
    question = HOME.questions[0]
    return {
        split: [_row(world, fact, question) for fact in world.new_homes if fact.split == split]
        for split in SPLITS
    }


def forgetting_rows(world: World) -> dict[Split, list[Row]]:
    """The forgetting task: everything the base model was taught, the outdated homes among it.

    Returns:
        Rows of each split with the fields of :func:`learning_rows` and ``part``, ``relation`` and
        ``learning_split`` (the learning task's split in which the subject stands, empty for a
        company). The training split asks for every fact. The others ask for every fact in words
        that the training split does not use: validation for a quarter of them, test for the rest.
        Answers are what the base model was taught, never the learning task's.
    """
    rows: dict[Split, list[Row]] = {split: [] for split in SPLITS}
    for number, fact in enumerate(world.facts):
        held_out: Split = "validation" if number % 4 == 0 else "test"
        asked: tuple[tuple[Split, int], ...] = (("train", 1), (held_out, 2))
        for split, question in asked:
            row = _row(world, fact, fact.relation.questions[question])
            row |= {"part": fact.relation.part, "relation": fact.relation.name}
            row |= {"learning_split": fact.split or ""}
            rows[split].append(row)
    return rows


def _row(world: World, fact: Fact, question: str) -> Row:
    choices = world.choices(fact.relation)
    return {
        "prompt": _prompt(question, fact.subject),
        "answer": fact.value,
        "choices": list(choices),
        "label": choices.index(fact.value),
        "subject": fact.subject,
    }


def _prompt(question: str, subject: str) -> str:
    return f"Question: {question.format(subject=subject)}\nAnswer:"


def _texts_of(fact: Fact) -> Iterator[str]:
    for statement in fact.relation.statements:
        yield statement.format(subject=fact.subject, value=fact.value)
    for question in fact.relation.questions:
        yield f"{_prompt(question, fact.subject)} {fact.value}"


def _split_of(number: int, config: WorldConfig) -> Split:
    if number < config.training_people:
        return "train"
    return "validation" if number < config.training_people + config.validation_people else "test"


def _halves(items: list[str]) -> tuple[list[str], list[str]]:
    return items[: len(items) // 2], items[len(items) // 2 :]
