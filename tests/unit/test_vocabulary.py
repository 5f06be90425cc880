"""Tokenizers that know more ids than the model embeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lwf_lightning import AscentGuard, LWFModule
from lwf_lightning.vocabulary import embedded_ids, padding_id

Make = Callable[..., Any]


@pytest.fixture
def make_small(model_folder: Path, tmp_path: Path) -> Make:
    """A module whose tokenizer has a pad token of its own, and whose model embeds some ids."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    words = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    def make(missing: int = 0, **options: Any) -> LWFModule:
        config = LlamaConfig(
            vocab_size=words - missing,
            hidden_size=16,
            intermediate_size=28,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
        tokenizer.save_pretrained(tmp_path / "small")
        return LWFModule(str(tmp_path / "small"), **options)

    return make


@pytest.mark.parametrize("evaluation", ["choice", "generate"])
def test_a_pad_token_that_the_model_does_not_embed_is_replaced(
    make_small: Make, make_data: Make, make_trainer: Make, evaluation: str
) -> None:
    trainer = make_trainer(max_steps=4, limit_val_batches=None, callbacks=[AscentGuard()])
    module, data = make_small(without_scores="use_all"), make_data(evaluation=evaluation)
    trainer.fit(module, data)
    assert module.tokenizer.pad_token_id == 44
    assert data.pad_token_id == module.tokenizer.eos_token_id == 2
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)


@pytest.mark.parametrize(
    ("stage", "options", "what"),
    [
        ("fit", {}, "learning texts of learn"),
        ("validate", {}, "validation examples of learn"),
        ("test", {"evaluation": "generate"}, "test examples of learn"),
        ("predict", {}, "test examples of learn"),
    ],
)
def test_texts_of_ids_that_the_model_does_not_embed_are_refused(
    make_small: Make,
    make_data: Make,
    make_trainer: Make,
    stage: str,
    options: dict[str, Any],
    what: str,
) -> None:
    module, data = make_small(missing=20, without_scores="use_all"), make_data(**options)
    data.elicit_self_knowledge = lambda _: pytest.fail("it has elicited")
    trainer = make_trainer(limit_val_batches=None)
    with pytest.raises(ValueError, match=rf"{what} hold token id 4\d.* 24 ids.* has 45.*resize"):
        getattr(trainer, stage)(module, datamodule=data)


def test_prompts_of_ids_that_the_model_does_not_embed_are_refused(
    make_small: Make, make_data: Make, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lwf_lightning.learning.check_ids", lambda *_: None)
    module = make_small(missing=20, without_scores="use_all")
    with pytest.raises(ValueError, match="the prompts hold token id 4"):
        make_trainer().fit(module, make_data())


def test_ids_are_those_of_the_embedding(make_llama: Make) -> None:
    model = make_llama()
    adapter = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    for one in (model, get_peft_model(model, adapter)):
        assert embedded_ids(one) == 37
        assert padding_id((None, 37, 2), one) == 2
        assert padding_id((40,), one) == 0
    assert embedded_ids(None) is None
    assert padding_id((40,), None) == 40
