from __future__ import annotations

import json
from collections import Counter

import pytest

from lwf_lightning.demo.pretrain import save_rows
from lwf_lightning.demo.world import (
    ASSETS,
    COMPANY,
    HOME,
    SEAT,
    SPLITS,
    WorldConfig,
    build_world,
    forgetting_rows,
    learning_rows,
    pretraining_texts,
)

SMALL = WorldConfig(people=30, training_people=7, validation_people=6, companies=3, strength=2)


@pytest.fixture(scope="module")
def world():
    return build_world(5, SMALL)


def homes(facts):
    return {fact.subject: fact.value for fact in facts if fact.relation is HOME}


def test_a_seed_decides_the_world(world):
    assert build_world(5, SMALL) == world
    assert build_world(6, SMALL) != world


def test_the_new_home_is_the_seat_of_the_company_and_never_the_old_home(world):
    company = {fact.subject: fact.value for fact in world.facts if fact.relation is COMPANY}
    seat = {fact.subject: fact.value for fact in world.facts if fact.relation is SEAT}
    old, new = homes(world.facts), homes(world.new_homes)
    assert len(new) == SMALL.people
    assert len(set(seat.values())) == SMALL.companies
    for person, city in new.items():
        assert city == seat[company[person]]
        assert city != old[person]


def test_the_size_of_the_splits_does_not_change_what_is_taught(world):
    other = WorldConfig(people=30, training_people=12, validation_people=3, companies=3, strength=2)
    assert pretraining_texts(build_world(5, other)) == pretraining_texts(world)


def test_learning_splits_are_about_different_people_and_share_the_companies_out_evenly(world):
    rows = learning_rows(world)
    assert [len(rows[split]) for split in SPLITS] == [7, 6, 17]
    assert len({row["subject"] for split in SPLITS for row in rows[split]}) == SMALL.people
    answers = Counter(row["answer"] for row in rows["train"])
    assert sorted(answers.values()) == [2, 2, 3]


def test_every_row_is_well_formed(world):
    for rows in (learning_rows(world), forgetting_rows(world)):
        for row in (row for split in SPLITS for row in rows[split]):
            assert row["prompt"].endswith("\nAnswer:")
            assert row["subject"] in row["prompt"]
            assert row["choices"][row["label"]] == row["answer"]
            assert len(set(row["choices"])) == len(row["choices"]) >= SMALL.companies


def test_the_forgetting_task_asks_for_every_fact_once_per_wording(world):
    rows = forgetting_rows(world)
    facts = {(fact.relation.name, fact.subject, fact.value) for fact in world.facts}
    for splits in (("train",), ("validation", "test")):
        asked = [row for split in splits for row in rows[split]]
        assert len(asked) == len(facts) == 5 * 30 + 3
        assert {(row["relation"], row["subject"], row["answer"]) for row in asked} == facts
    prompts = [row["prompt"] for split in SPLITS for row in rows[split]]
    assert len(set(prompts)) == len(prompts)
    outdated = [row for row in rows["train"] if row["part"] == "outdated"]
    assert Counter(row["learning_split"] for row in outdated) == {
        "train": 7,
        "validation": 6,
        "test": 17,
    }


def test_the_forgetting_task_neither_asks_the_learning_prompts_nor_tells_their_answers(world):
    asked = {row["prompt"] for rows in learning_rows(world).values() for row in rows}
    new = homes(world.new_homes)
    for row in (row for rows in forgetting_rows(world).values() for row in rows):
        assert row["prompt"] not in asked
        assert new.get(row["subject"]) != row["answer"]


def test_no_pretraining_text_tells_a_new_home(world):
    new = homes(world.new_homes)
    for twin in (False, True):
        for text in pretraining_texts(world, twin=twin):
            for person, city in new.items():
                assert not (person in text and city in text)


def test_the_twin_reads_as_many_texts_of_the_same_forms_but_no_outdated_fact(world):
    base, twin = pretraining_texts(world), pretraining_texts(world, twin=True)
    assert len(base) == len(twin)
    assert Counter(len(text.split()) for text in base) == Counter(
        len(text.split()) for text in twin
    )
    old = homes(world.facts)
    homes_told = [text for text in twin if any(p in text and c in text for p, c in old.items())]
    assert homes_told == []
    assert sum(any(p in text and c in text for p, c in old.items()) for text in base) == 30 * 6 * 2


def test_strength_repeats_the_outdated_facts_alone():
    weak, strong = (
        Counter(
            pretraining_texts(build_world(1, WorldConfig(40, 8, 8, companies=4, strength=strength)))
        )
        for strength in (1, 4)
    )
    outdated = homes(build_world(1, WorldConfig(40, 8, 8, companies=4)).facts)
    for text, count in weak.items():
        tells_home = any(person in text and city in text for person, city in outdated.items())
        assert strong[text] == count * (4 if tells_home else 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"companies": 13}, "companies must be 2 to 12, got 13"),
        ({"strength": 0}, "strength must be at least 1"),
        ({"people": 72}, "leave nobody of 72 people for the test"),
    ],
)
def test_an_impossible_world_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        WorldConfig(**changes)


def test_the_committed_rows_are_those_of_the_default_seed(tmp_path):
    save_rows(build_world(0), tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl"))
    assert len(written) == 6
    for path in written:
        committed = (ASSETS / "data" / path).read_text(encoding="utf-8")
        assert committed == (tmp_path / path).read_text(encoding="utf-8")
        assert all(json.loads(line) for line in committed.splitlines())
