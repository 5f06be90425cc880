"""What a configured run will need in memory, before any of it is allocated."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from lwf_lightning.callbacks.fisher import FisherCallback
from lwf_lightning.callbacks.guard import AscentGuard
from lwf_lightning.data.batch import IGNORE_INDEX, EncodedText
from lwf_lightning.data.encode import encode_prompt
from lwf_lightning.data.passes import pass_cost
from lwf_lightning.data.sampler import batch_indices
from lwf_lightning.generation import unwrapped
from lwf_lightning.memory import Phase, phases
from lwf_lightning.memory_plan import ModelSize, Pass, Plan, Precision, Prompts, passes_of, rows_of
from lwf_lightning.metrics.shared_prompts import can_share_prompts, share_prompts
from lwf_lightning.models import load_config
from lwf_lightning.packing import can_attend_text_by_text

if TYPE_CHECKING:
    import lightning as L

    from lwf_lightning.datamodule import LWFDataModule
    from lwf_lightning.module import LWFModule

_BATCHES_LOOKED_AT = 256
"""Batches of a run whose passes are looked at: enough to meet long texts."""


@dataclass(frozen=True)
class Estimate:
    """The prediction for one rank, and what it was made of."""

    size: ModelSize
    plan: Plan
    phases: list[Phase]


def predict(
    trainer: L.Trainer,
    module: LWFModule,
    data: LWFDataModule,
    ranks: int | None = None,
    model: nn.Module | None = None,
) -> Estimate:
    """Predicts the memory of a fit.

    Only the model's configuration, its tokenizer and the texts are read.

    Args:
        trainer: Says devices, precision and callbacks.
        module: Says the model and what is done to it.
        data: Says the texts, which are tokenized; by its own tokenizer if it has one.
        ranks: Processes to shard among with FSDP2, whatever the trainer's; None takes its own.
        model: The model without its weights; None takes :func:`meta_model`.

    Raises:
        ValueError: If the model or the data cannot be found.
    """
    model = meta_model(module) if model is None else model
    size = size_of(model)
    plan = _plan(trainer, module, data, model, ranks)
    return Estimate(size, plan, phases(size, plan))


def meta_model(module: LWFModule, config: Any = None) -> nn.Module:
    """The model without its weights, adapter included.

    Args:
        module: Says which model.
        config: Its configuration; None loads it by the model's name.
    """
    from transformers import AutoModelForCausalLM

    options = module.hparams
    trust = options["trust_remote_code"]
    config = config or load_config(options["model_name"], trust_remote_code=trust)
    with torch.device("meta"):
        model: nn.Module = cast(Any, AutoModelForCausalLM).from_config(
            config, dtype=getattr(torch, options["dtype"]), trust_remote_code=trust
        )
        if module.lora is not None:
            from peft import get_peft_model

            lora = copy.deepcopy(module.lora)
            lora.task_type = "CAUSAL_LM"
            model = get_peft_model(model, lora)
    return model


def size_of(model: Any) -> ModelSize:
    """The size of a model, which may lie on the meta device.

    Raises:
        ValueError: If its configuration says too little, as those of models without attention do.
    """
    config = model.config.get_text_config()
    trained = [p for p in model.parameters() if p.requires_grad]
    layers = _whole_number(config, "num_hidden_layers")
    hidden = _whole_number(config, "hidden_size")
    heads = _whole_number(config, "num_attention_heads")
    blocks = _blocks(model, layers)
    counts = [(_count(b.parameters()), _count(_trained(b))) for b in blocks]
    parameters, trainable = _count(model.parameters()), _count(trained)
    return ModelSize(
        layers=layers,
        hidden=hidden,
        intermediate=_whole_number(config, "intermediate_size", 4 * hidden),
        heads=heads,
        key_value_heads=_whole_number(config, "num_key_value_heads", heads),
        head_size=_whole_number(config, "head_dim", 0),
        vocabulary=_whole_number(config, "vocab_size"),
        parameters=parameters,
        trainable=trainable,
        block=max(count for count, _ in counts),
        block_trainable=max(count for _, count in counts),
        root=parameters - sum(count for count, _ in counts),
        root_trainable=trainable - sum(count for _, count in counts),
        largest=max(p.numel() for p in trained),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        trains_norms=any(p.ndim == 1 for p in trained),
    )


def _whole_number(config: Any, name: str, default: int | None = None) -> int:
    """A number of the configuration; the largest of them where layers have one each."""
    value = getattr(config, name, None)
    if isinstance(value, (list, tuple)) and value:
        value = max(value)
    if isinstance(value, int):
        return value
    if default is None:
        raise ValueError(
            f"the memory of a model of the kind {config.model_type} cannot be predicted, only "
            f"that of transformers with attention: its configuration has no number {name}"
        )
    return default


def _blocks(model: nn.Module, layers: int) -> list[nn.Module]:
    lists: list[nn.Module] = [
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers
    ]
    if not lists:
        return [model]
    return list(max(lists, key=lambda blocks: _count(blocks.parameters())).children())


def _trained(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in module.parameters() if parameter.requires_grad)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def precision_of(dtype: str, trainer_precision: str, model: nn.Module) -> Precision:
    """Bytes per element under a dtype of the weights and a precision of the trainer.

    Args:
        dtype: ``model.init_args.dtype``.
        trainer_precision: ``trainer.precision``.
        model: The model as it is loaded.
    """
    loaded = getattr(torch, dtype).itemsize
    trained = max(p.element_size() for p in _trained(model))  # an adapter on bf16 is float32
    if trainer_precision == "64-true":
        return Precision(8, 8, 8, loaded)
    if trainer_precision.endswith("-true") and not trainer_precision.startswith("32"):
        return Precision(2, 2, 2, loaded)
    mixed = trainer_precision.endswith("-mixed")
    return Precision(loaded, trained, 2 if mixed else loaded, loaded, mixed)


def _plan(
    trainer: L.Trainer,
    module: LWFModule,
    data: LWFDataModule,
    model: nn.Module,
    ranks: int | None,
) -> Plan:
    data.tokenizer = data.tokenizer or module.tokenizer
    data.setup("fit")
    texts = [_tokens_and_labels(text) for text in data.learning_encoded]
    device = "cuda" if trainer.strategy.root_device.type == "cuda" else "cpu"
    cost = pass_cost(device, _count(model.parameters()))
    passes = passes_of
    if module.hparams["attention"] in (None, "sdpa"):  # the model here has that, whatever is set
        passes = partial(_training_passes, model, device)
    world = trainer.world_size if ranks is None else ranks
    steps = min(_BATCHES_LOOKED_AT, trainer.max_steps if trainer.max_steps > 0 else math.inf)
    batches = _batches(texts, data.batch_size, data.seed, int(steps))
    learning_cost, limit = 0 if module.takes_one_pass else cost, module.hparams["tokens_per_pass"]
    learning = [passes(batch, learning_cost, limit) for batch in batches]
    options: dict[str, Any] = {
        "learning": _distinct(learning),
        "accumulates": any(len(step) > 1 for step in learning),
        "unlearns": module.schedule.unlearns,
        "compares": module.needs_base_weights,
        "pulls": module.hparams["regularizer"] == "ewc",
        "guards": module.objective.ascends
        and any(isinstance(c, AscentGuard) for c in _callbacks(trainer)),
        "retains": module.hparams["unlearning_retain"] > 0,
        "checkpointing": module.hparams["gradient_checkpointing"],
        "is_eager": module.hparams["attention"] == "eager",
        "buckets": isinstance(trainer.strategy, DDPStrategy),
        "ranks": world if ranks is not None or _shards(trainer) else 1,
        "device": device,
        "precision": precision_of(module.hparams["dtype"], str(trainer.precision), model),
    }
    options |= _evaluation(data, model, cost)
    if module.needs_self_knowledge:
        options |= _forgetting(trainer, model, data, texts, cost, passes)
    return Plan(**options)


def _forgetting(
    trainer: L.Trainer,
    model: nn.Module,
    data: LWFDataModule,
    texts: Sequence[tuple[int, int]],
    cost: int,
    passes: Callable[[Sequence[tuple[int, int]], int], list[Pass]],
) -> dict[str, Any]:
    """What self-knowledge, its scores and unlearning add to the plan."""
    encoded = (
        encode_prompt(data._tokenizer, example.prompt, chat_template=data.chat_template)
        for _, example in data.forgetting_examples
    )
    prompts = [min(len(ids), data.max_length) for ids in encoded]
    prompts = sorted(prompts, reverse=True) or [data.max_length]
    # Whatever is chosen to be forgotten, it is no longer than this.
    known = [(tokens + data.max_new_tokens, data.max_new_tokens) for tokens in prompts]
    found: dict[str, Any] = {
        "unlearning": passes(known[: data.forget_batch_size], 0),
        "pull_fisher": passes_of(known[: data.forget_batch_size], 0),
        "elicitation": _prompts(
            model,
            min(data.elicit_batch_size, len(prompts)),
            prompts[0],
            data.max_new_tokens,
        ),
    }
    for callback in _callbacks(trainer):
        if isinstance(callback, FisherCallback):
            longest = sorted(texts, reverse=True)
            chosen = _batches(texts, callback.probe_batch_size, callback.seed, 64)
            probe = [passes(batch, cost) for batch in chosen]
            found |= {
                "anchor": callback.anchor,
                "probe": _distinct(probe),
                "probe_accumulates": any(len(step) > 1 for step in probe),
                "fisher": passes_of(longest[: callback.batch_size], 0),
                "scoring": passes_of(known[: callback.batch_size], 0),
            }
    return found


def _evaluation(data: LWFDataModule, model: nn.Module, cost: int) -> dict[str, Any]:
    """Passes of choices to score, and the prompts to answer."""
    passes: list[list[Pass]] = []
    prompts = [Prompts(0, 0, 0)]
    for loader in data.val_dataloader():
        for batch in itertools.islice(loader, _BATCHES_LOOKED_AT):
            shares = batch.kind == "choice" and can_share_prompts(
                model, batch.batch["input_ids"].shape[1]
            )
            rows = share_prompts(batch.batch) if shares else batch.batch
            labels = (rows["labels"] != IGNORE_INDEX).sum(dim=1).tolist()
            lengths = rows["attention_mask"].sum(dim=1).tolist()
            if batch.kind == "choice":
                passes.append(passes_of(list(zip(lengths, labels, strict=True)), cost))
            else:
                prompts.append(_prompts(model, len(batch), max(lengths), data.max_new_tokens))
    longest = max(prompts, key=lambda p: p.texts * (p.tokens + p.answer))
    return {"evaluation": _distinct(passes), "evaluation_prompts": longest}


def _prompts(model: nn.Module, texts: int, tokens: int, answer: int) -> Prompts:
    """A batch of prompts as :mod:`lwf_lightning.decoding` answers it, where it can."""
    from lwf_lightning.decoding import can_decode, room_for  # imports transformers: seconds

    if not can_decode(unwrapped(model), tokens + answer):
        return Prompts(texts, tokens, answer)
    return Prompts(texts, tokens, answer, *room_for(texts, tokens, answer))


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return cast(list["L.Callback"], trainer.callbacks)  # type: ignore[attr-defined]


def _training_passes(
    model: nn.Module,
    device: str,
    texts: Sequence[tuple[int, int]],
    cost: int,
    max_tokens: int | None = None,
) -> list[Pass]:
    """The forward passes of a step; see :func:`lwf_lightning.packing.forward_passes`."""
    if can_attend_text_by_text(model, max(tokens for tokens, _ in texts), device):
        return rows_of(texts, max_tokens)
    return passes_of(texts, cost, max_tokens)


def _batches(
    texts: Sequence[tuple[int, int]], batch_size: int, seed: int, steps: int
) -> Iterator[list[tuple[int, int]]]:
    for step in range(min(steps, max(1, len(texts) // batch_size))):
        yield [texts[index] for index in batch_indices(len(texts), batch_size, seed, step)]


def _distinct(batches: Iterable[list[Pass]]) -> list[Pass]:
    return list(dict.fromkeys(one for passes in batches for one in passes))


def _tokens_and_labels(text: EncodedText) -> tuple[int, int]:
    return len(text), sum(label != IGNORE_INDEX for label in text.labels)


def _shards(trainer: L.Trainer) -> bool:
    return isinstance(trainer.strategy, ModelParallelStrategy)


def available(trainer: L.Trainer) -> int:
    """Bytes of memory that one rank's device has."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // trainer.num_devices
