"""What a run of a study will take in time and memory, before anything is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch

from lwf_lightning.callbacks.fisher import FisherCallback
from lwf_lightning.callbacks.guard import AscentGuard
from lwf_lightning.callbacks.validate_first import ValidateFirst
from lwf_lightning.data.encode import encode_prompt
from lwf_lightning.data.sampler import batches_per_pass
from lwf_lightning.estimate import meta_model, predict
from lwf_lightning.memory import highest
from lwf_lightning.study.architectures import known_config
from lwf_lightning.study.length import (
    batches_of_epoch,
    last_validation_of,
    steps_of,
    validations_of,
)
from lwf_lightning.study.matrix import digest_of

if TYPE_CHECKING:
    import lightning as L
    from torch import nn

    from lwf_lightning.datamodule import LWFDataModule
    from lwf_lightning.module import LWFModule

DECODING_PASSES = 40
"""Assumed forward passes per second that add one token to every answer of a batch (ours)."""


@dataclass(frozen=True)
class Work:
    """What a run computes, counted in tokens, padding left out.

    Attributes:
        trained: Tokens that go forward and backward: learning, unlearning, probe, Fisher, scoring.
        read: Tokens that only go forward: evaluation, and what the base model is asked for.
        decoded: Passes that add one token to each answer of a batch, if no answer ends early.
    """

    trained: int = 0
    read: int = 0
    decoded: int = 0

    def hours(self, parameters: int, flops: float) -> float:
        """Hours at a sustained speed.

        Args:
            parameters: Weights of the model, frozen ones too.
            flops: Floating-point operations per second: 6 per weight for a trained token, 2 for
                one that is read.

        Example:
            >>> Work(trained=6_000_000).hours(parameters=10**9, flops=1e13)
            1.0
        """
        operations = parameters * (6 * self.trained + 2 * self.read)
        return (operations / flops + self.decoded / DECODING_PASSES) / 3600


@dataclass(frozen=True)
class Expected:
    """The prediction for a run.

    Attributes:
        steps: Learning steps.
        validated: How many it has taken when it validates last.
        work: What it computes, self-generation left out.
        elicitation: Self-generation, which runs with the same prompts share through the cache.
        pool: What is elicited: a mark of model, prompts and length of answers; empty where nothing
            is.
        parameters: Weights of the model.
        memory: Bytes in the fullest phase, on one device.
        phase: That phase.
    """

    steps: int
    validated: int
    work: Work
    elicitation: Work
    pool: str
    parameters: int
    memory: int
    phase: str


class RoughTokenizer:
    """Takes four characters for a token, where a model's own tokenizer is not at hand."""

    eos_token_id = pad_token_id = 0
    bos_token_id = eos_token = None
    chat_template = "yes"

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
        """Ids without a meaning, one per four characters begun: of a text, or of each of a list."""
        if isinstance(text, str):
            return {"input_ids": [1] * -(-len(text) // 4)}
        return {"input_ids": [self(one)["input_ids"] for one in text]}

    def get_chat_template(self) -> str:
        """Stands for that of the model's own."""
        return self.chat_template

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **_: Any) -> str:
        """Turns, each headed by its role."""
        return "".join(f"<|{turn['role']}|>\n{turn['content']}\n" for turn in messages)


def model_of(module: LWFModule) -> nn.Module:
    """The model without its weights; its architecture comes from the Hub unless it is known here.

    Raises:
        ValueError: If the architecture cannot be found.
    """
    return meta_model(module, known_config(module.hparams["model_name"]))


def expected(
    module: LWFModule,
    data: LWFDataModule,
    settings: Mapping[str, Any],
    model: nn.Module,
) -> Expected:
    """Predicts a run from its model's architecture and its texts; no weight is loaded.

    Args:
        module: The module of the run.
        data: Its datamodule, not set up.
        settings: Its ``trainer`` configuration, callbacks instantiated.
        model: Its :func:`model_of`.

    Raises:
        ValueError: If the texts cannot be found.
    """
    if known_config(module.hparams["model_name"]) is not None:
        data.tokenizer = cast(Any, RoughTokenizer())
    found = predict(cast("L.Trainer", _planned(settings)), module, data, model=model)
    top = highest(found.phases)
    steps, validated, work, elicitation = _work(module, data, settings)
    return Expected(
        steps=steps,
        validated=validated,
        work=work,
        elicitation=elicitation,
        pool=_pool(module, data) if module.needs_self_knowledge else "",
        parameters=found.size.parameters,
        memory=top.total,
        phase=top.name,
    )


def _planned(settings: Mapping[str, Any]) -> SimpleNamespace:
    """What a prediction asks of a trainer; the real one refuses devices that are not here."""
    accelerator = settings["accelerator"]
    has_gpu = accelerator in ("gpu", "cuda") or (
        accelerator == "auto" and torch.cuda.is_available()
    )
    callbacks = list(settings["callbacks"] or [])
    if settings.get("ascent_guard", True):  # as LWFTrainer does
        callbacks.append(AscentGuard())
    return SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cuda" if has_gpu else "cpu")),
        precision=settings["precision"] or "32-true",
        callbacks=callbacks,
        max_steps=settings["max_steps"],
        world_size=1,
    )


def _work(
    module: LWFModule, data: LWFDataModule, settings: Mapping[str, Any]
) -> tuple[int, int, Work, Work]:
    """Learning steps, those before the last validation, the work, and that of self-generation."""
    callbacks = settings["callbacks"] or []
    texts = [len(text) for text in data.learning_encoded]
    batches = batches_of_epoch(settings, batches_per_pass(len(texts), data.batch_size))
    steps = steps_of(settings, batches)
    learned = steps * min(data.batch_size, len(texts)) * fmean(texts)
    trained, read = learned, 0.0
    if module.hparams["learning_loss"] == "token_forgetting":
        read += learned  # by the base model
    elicitation = Work()
    if module.needs_self_knowledge:
        answers = data.max_new_tokens
        ids = [
            encode_prompt(data._tokenizer, example.prompt, chat_template=data.chat_template)
            for _, example in data.forgetting_examples
        ]
        prompts = [min(len(prompt), data.max_length) for prompt in ids]
        scored = sum(prompts) + answers * len(prompts)
        unlearned = sum(module.schedule.steps_before(step) for step in range(steps))
        pushed = unlearned * data.forget_batch_size * (fmean(prompts) + answers)
        trained += 2 * pushed if module.hparams["unlearning_retain"] else pushed  # or rehearsed
        if module.objective.needs_reference:
            read += pushed
        if not module.schedule.unlearns:
            trained += scored  # for the Fisher information of a regularizer
        elicitation = Work(
            read=sum(prompts), decoded=_passes(len(prompts), data.elicit_batch_size, answers)
        )
        for callback in callbacks:
            if module.schedule.unlearns and isinstance(callback, FisherCallback):
                probed = callback.probe_steps * callback.probe_batch_size
                drawn = min(callback.fisher_texts, len(texts))
                refreshes = 1
                if callback.refresh_interval is not None:
                    refreshes, probed = (steps - 1) // callback.refresh_interval, 0
                trained += (probed + refreshes * drawn) * fmean(texts) + refreshes * scored
    validations = validations_of(settings, batches, steps)
    validations += any(isinstance(callback, ValidateFirst) for callback in callbacks)
    data.setup("test")
    validation = _evaluation(data, ("validation", "seen"))
    test = _evaluation(data, ("test",))
    work = Work(
        trained=round(trained),
        read=round(read) + validations * validation.read + test.read,
        decoded=validations * validation.decoded + test.decoded,
    )
    return steps, last_validation_of(settings, batches, steps), work, elicitation


def _pool(module: LWFModule, data: LWFDataModule) -> str:
    prompts = [example.prompt for _, example in data.forgetting_examples]
    return digest_of([module.hparams["model_name"], prompts, data.max_new_tokens])


def _evaluation(data: LWFDataModule, splits: Sequence[str]) -> Work:
    """Work of one evaluation on some splits; the choices of a question each read its prompt."""
    read = decoded = 0
    for (_, name, kind), items in data._eval_items.items():
        if name in splits:
            texts = itertools.chain.from_iterable(item.texts for item in items)
            read += sum(len(text) for text in texts)
            if kind == "generate":
                decoded += _passes(len(items), data.eval_batch_size, data.max_new_tokens)
    return Work(read=read, decoded=decoded)


def _passes(prompts: int, batch_size: int, answer: int) -> int:
    """Passes to answer prompts with continuous batching, if every answer is as long as it may."""
    return -(-prompts * answer // batch_size)
