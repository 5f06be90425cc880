from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lwf_lightning.data.batch import EncodedText, collate
from lwf_lightning.demo.pretrain import (
    PretrainingConfig,
    main,
    pretrain,
    recall,
    save_model,
    world_tokenizer,
)
from lwf_lightning.demo.tokenizer import build_tokenizer
from lwf_lightning.demo.world import (
    ASSETS,
    SPLITS,
    WorldConfig,
    build_world,
    forgetting_rows,
    learning_rows,
    pretraining_texts,
)
from lwf_lightning.losses import per_text_loss

TINY = PretrainingConfig(hidden_size=32, intermediate_size=48, layers=1, heads=2, steps=3)


@pytest.fixture(scope="module")
def world():
    return build_world(
        2, WorldConfig(people=8, training_people=2, validation_people=2, companies=2)
    )


@pytest.fixture(scope="module")
def tokenizer(world):
    return world_tokenizer(world)


def test_the_tokenizer_gives_every_text_back_and_knows_every_word(world, tokenizer):
    texts = pretraining_texts(world) + pretraining_texts(world, twin=True)
    for rows in (learning_rows(world), forgetting_rows(world)):
        texts += [
            f"{row['prompt']} {choice}"
            for split in SPLITS
            for row in rows[split]
            for choice in row["choices"]
        ]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_prompt_and_answer_of_several_words_can_be_tokenized_apart():
    tokenizer = build_tokenizer(["Question: where?\nAnswer: New Port Oslo", "New Oslo."])
    prompt, answer = "Question: where?\nAnswer:", " New Port Oslo"
    joined = tokenizer(prompt).input_ids + tokenizer(answer).input_ids
    assert joined == tokenizer(prompt + answer).input_ids
    assert len(tokenizer(answer).input_ids) == 3
    assert tokenizer.decode(joined) == prompt + answer
    assert tokenizer("New").input_ids == tokenizer(" New").input_ids
    assert tokenizer.tokenize("New Paris") == ["▁New", tokenizer.unk_token]


def test_pretraining_is_a_function_of_the_seed_and_starts_twin_and_base_alike(world, tokenizer):
    first, again, other = (pretrain(world, tokenizer, seed=s, config=TINY) for s in (0, 0, 1))
    for name, value in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
        torch.testing.assert_close(value.half().float(), value, rtol=0, atol=0)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_pretraining_teaches(world, tokenizer):
    texts = [tokenizer(text).input_ids for text in pretraining_texts(world)]
    batch = collate([EncodedText(tuple(ids), tuple(ids)) for ids in texts], tokenizer.pad_token_id)
    before, after = (
        per_text_loss(pretrain(world, tokenizer, seed=0, config=config), batch).mean().item()
        for config in (TINY, replace(TINY, steps=60, warmup_steps=5, learning_rate=1e-2))
    )
    assert before > 4.0  # about the logarithm of the vocabulary
    assert after < 2.0


def test_recall_is_the_share_of_answers_generated_exactly(monkeypatch):
    tokenizer = build_tokenizer(["Question: red cat dog blue"])
    rows = [{"prompt": "Question:", "answer": answer} for answer in ("cat", "dog", "red", "blue")]
    generated = [tokenizer(text).input_ids for text in (" cat", " dog dog", " red", " cat")]
    generated[0].append(tokenizer.eos_token_id)
    monkeypatch.setattr("lwf_lightning.demo.pretrain.generate_answers", lambda *_, **__: generated)
    assert recall(None, tokenizer, rows) == 0.5


def test_a_saved_model_loads_in_float32_as_it_was(world, tokenizer, tmp_path):
    model = pretrain(world, tokenizer, seed=0, config=TINY)
    save_model(model, tokenizer, tmp_path / "model")
    save_model(model, tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float32
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command_writes_what_the_package_needs(tmp_path, monkeypatch, capsys):
    asked_for = []

    def quick(world, tokenizer, *, seed, twin, config):
        asked_for.append((world.config, config))
        return pretrain(world, tokenizer, seed=seed, twin=twin, config=TINY)

    monkeypatch.setattr("lwf_lightning.demo.pretrain.pretrain", quick)
    monkeypatch.setattr("lwf_lightning.demo.pretrain.recall", lambda *_: 0.25)
    main(["--seed", "3", "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"base", "twin", "data"}
    assert "twin: neutral facts recalled: 25.0%" in capsys.readouterr().out
    assert asked_for == 2 * [(WorldConfig(), PretrainingConfig())]


def test_the_command_makes_other_worlds_and_sizes(tmp_path, monkeypatch, capsys):
    def refused(world, tokenizer, *, seed, twin, config):
        raise InterruptedError(f"{world.config.strength} {config}")

    monkeypatch.setattr("lwf_lightning.demo.pretrain.pretrain", refused)
    changed = PretrainingConfig(hidden_size=64, intermediate_size=256, heads=2)
    options = ["--strength", "6", "--training_people", "24", "--hidden_size", "64"]
    with pytest.raises(InterruptedError, match=re.escape(f"6 {changed}")):
        main([*options, "--output", str(tmp_path)])
    rows = (tmp_path / "data" / "world_learning" / "train.jsonl").read_text()
    assert len(rows.splitlines()) == 24
    with pytest.raises(SystemExit):
        main(["--hidden_size", "48", "--output", str(tmp_path)])
    assert "--hidden_size must be a multiple of 32, got 48" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["base", "twin"])
def test_the_committed_models_know_what_they_were_taught(name):
    model = AutoModelForCausalLM.from_pretrained(ASSETS / name)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
    assert model.dtype == torch.float32
    assert 1_000_000 <= model.num_parameters() <= 4_000_000
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    world = build_world(0)
    assert tokenizer.get_vocab() == world_tokenizer(world).get_vocab()
    rows = forgetting_rows(world)
    for part in ("outdated", "helpful", "neutral"):
        asked = [row for split in SPLITS for row in rows[split] if row["part"] == part][::3]
        knows = recall(model, tokenizer, asked)
        if name == "twin" and part == "outdated":
            assert knows < 0.3  # one city in eight by chance
        else:
            assert knows >= 0.98


def test_the_base_answers_the_learning_prompts_with_the_old_homes():
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "base")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "base")
    world = build_world(0)
    rows = [row for split in SPLITS for row in learning_rows(world)[split]]
    old = {fact.subject: fact.value for fact in world.facts if fact.relation.name == "home"}
    outdated = [row | {"answer": old[row["subject"]]} for row in rows]
    assert recall(model, tokenizer, rows) == 0.0
    assert recall(model, tokenizer, outdated) >= 0.98


def test_the_assets_stay_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 8_000_000
