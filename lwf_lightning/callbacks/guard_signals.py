"""What an AscentGuard measures: the watched loss, the unlearned texts' jump, and fluency."""

from __future__ import annotations

from typing import cast

import lightning as L
import torch
from torch import Tensor

from lwf_lightning.data.batch import Batch, collate
from lwf_lightning.data.encode import encode_examples, encode_prompt
from lwf_lightning.data.evaluation import EvalItem
from lwf_lightning.data.sampler import seeded_sample
from lwf_lightning.datamodule import LWFDataModule
from lwf_lightning.distributed import ranks_of
from lwf_lightning.forgetting.weights import exchanged_weights
from lwf_lightning.generation import (
    evaluation_mode,
    generate_answers,
    keep_end,
    positions_of,
    prompt_limit,
)
from lwf_lightning.losses import LabelledTokens, labelled_tokens
from lwf_lightning.metrics.fluency import Fluency, fluency
from lwf_lightning.module import LWFModule
from lwf_lightning.packing import text_by_text

NEUTRAL_PROMPTS = (
    "The weather today is",
    "Once upon a time there was",
    "In the morning, most people",
    "The three most important things in life are",
)
_JUMP_TEXTS = 4  # unlearned texts that are looked at again after the step


class GuardSignals:
    """Measures a module in evaluation mode, without gradients and without randomness.

    Every process watches the same texts, and all get the same figures.

    Args:
        trainer: The trainer of the fit, with an LWFDataModule that is set up.
        module: The module.
        watched_texts: Validation examples behind the watched loss.
        fluency_prompts: Validation prompts to continue, beside the neutral ones.
        fluency_tokens: Tokens generated for each, at most half of the model's positions; a prompt
            that leaves no room for them loses its start.
        seed: Seed of the choice of examples.

    Raises:
        ValueError: If no validation example has a gold answer.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: LWFModule,
        *,
        watched_texts: int,
        fluency_prompts: int,
        fluency_tokens: int,
        seed: int,
    ) -> None:
        self.trainer, self.module = trainer, module
        data = cast(LWFDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        share = cast(list[EvalItem], data.val_dataloader()[0].dataset)
        items = [item for item in ranks_of(trainer).merge(share) if item.counts]
        answered = [item.example for item in items if item.example.answer.strip()]
        if not answered:
            raise ValueError(
                f"AscentGuard has nothing to watch: no validation example of {data.learning_task} "
                "has a gold answer"
            )
        examples = seeded_sample(answered, watched_texts, seed)
        texts, _ = encode_examples(module.tokenizer, examples, data.max_length, data.chat_template)
        batch = collate(texts, data.pad_token_id)
        self._watched = {name: tensor.to(module.device) for name, tensor in batch.items()}
        prompts = [
            encode_prompt(module.tokenizer, example.prompt, chat_template=data.chat_template)
            for example in seeded_sample(answered, fluency_prompts, seed)
        ]
        prompts += [encode_prompt(module.tokenizer, prompt) for prompt in NEUTRAL_PROMPTS]
        positions = positions_of(module.model)
        if positions is not None:
            fluency_tokens = min(fluency_tokens, positions // 2)
        self.fluency_tokens = fluency_tokens
        limit = prompt_limit(module.model, fluency_tokens, None)
        bos = module.tokenizer.bos_token_id
        self._prompts = [keep_end(ids, limit, bos) for ids in prompts if ids]

    @torch.no_grad()
    def watched_loss(self) -> float:
        """Loss of the watched validation examples, nats per token of the gold answers."""
        return self.highest(float(self._labelled(self._watched).token_losses().mean()))

    @torch.no_grad()
    def jump(self, batch: Batch, nll: Tensor) -> float:
        """How far unlearned texts' mean negative log-likelihood has risen, in nats per token.

        Args:
            batch: The texts; the first few are measured.
            nll: What it was before, shape (texts,).
        """
        few = {name: rows[:_JUMP_TEXTS] for name, rows in batch.items()}
        if len(nll) == 0:  # every pushed text is on another process, which may wait for this one
            few = {name: rows[:1] for name, rows in self._watched.items()}
        tokens = self._labelled(few)
        if len(nll) == 0:
            return self.highest(float("-inf"))
        rises = tokens.per_text(tokens.token_losses()) - nll[:_JUMP_TEXTS]
        return self.highest(float(rises.mean()))

    def _labelled(self, batch: Batch) -> LabelledTokens:
        model = self.module.model
        with evaluation_mode(model), text_by_text(model, batch):
            return labelled_tokens(model, batch)

    def fluency(self) -> Fluency:
        """Fluency of greedy continuations of the prompts."""
        with self.trainer.precision_plugin.forward_context():
            texts = generate_answers(
                self.module.model,
                self.module.tokenizer,
                self._prompts,
                max_new_tokens=self.fluency_tokens,
                batch_size=len(self._prompts),
            )
        return fluency(texts)

    def base_fluency(self) -> Fluency:
        """The same for the base model."""
        base = cast(dict[str, Tensor], self.module.base_weights)
        with exchanged_weights(self.module.model, base):
            return self.fluency()

    def highest(self, value: float) -> float:
        """The highest of all processes, so that they decide alike; NaN is the highest."""
        tensor = torch.tensor(value, device=self.module.device)
        return float(ranks_of(self.trainer).stack(tensor).amax(0))
