"""The loss of each text of a batch: the quantity that is learned, unlearned and scored."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from lwf_lightning.data.batch import IGNORE_INDEX, Batch, padded_right
from lwf_lightning.generation import unwrapped
from lwf_lightning.named import check_name
from lwf_lightning.packing import is_text_by_text, one_row

Reduction: TypeAlias = Literal["mean", "sum"]


@dataclass(frozen=True)
class LabelledTokens:
    """The predictions of a batch at its labelled positions, and nothing else.

    Attributes:
        logits: Shape (labelled tokens, vocabulary), in the order of text, then position.
        targets: Shape (labelled tokens,): the token id that each row should predict.
        text: Shape (labelled tokens,): which text of the batch each row belongs to.
        texts: How many texts the batch holds.
    """

    logits: Tensor
    targets: Tensor
    text: Tensor
    texts: int

    def per_text(self, token_values: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Adds or averages one value per labelled token into one per text, shape (texts,).

        A text without a label gets 0.

        Raises:
            ValueError: If ``reduction`` is unknown.
        """
        check_name("reduction", reduction, get_args(Reduction))
        total = token_values.new_zeros(self.texts).index_add(0, self.text, token_values)
        if reduction == "sum":
            return total
        return total / self.tokens_per_text().clamp(min=1).to(total.dtype)

    def tokens_per_text(self) -> Tensor:
        """Number of labelled tokens of each text, shape (texts,), int64."""
        return torch.bincount(self.text, minlength=self.texts)

    def token_losses(self) -> Tensor:
        """Cross-entropy of each labelled token in nats, shape (labelled tokens,)."""
        logits = self.logits.float() if self.logits.dtype.itemsize < 4 else self.logits
        return functional.cross_entropy(logits, self.targets, reduction="none")


def _accepts_logits_to_keep(model: Any) -> bool:
    # A PEFT wrapper forwards keyword arguments as they are.
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters


def labelled_columns(batch: Batch) -> tuple[Tensor, Tensor]:
    """The positions from which a labelled token is predicted.

    Args:
        batch: ``labels``, and perhaps ``attention_mask``, of shape (texts, tokens).

    Returns:
        Whether the token after each position but the last is labelled, shape (texts, tokens - 1);
        and the positions at which that is so in some text, ascending.
    """
    wanted = batch["labels"][:, 1:] != IGNORE_INDEX  # the first token is never predicted
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        wanted = wanted & (mask[:, :-1] != 0)  # nor is one that padding precedes
    return wanted, wanted.any(dim=0).nonzero().squeeze(1)


def labelled_tokens(model: nn.Module, batch: Batch, *, allow_none: bool = False) -> LabelledTokens:
    """Runs the model and keeps the logits of the labelled positions.

    The head is evaluated only at positions that some text of the batch needs, where the
    architecture allows it (``logits_to_keep``); and at no other, nor anything at padding, within
    :func:`~lwf_lightning.packing.text_by_text`. Texts may be padded on either side.

    Args:
        model: Any ``transformers`` causal LM.
        batch: ``input_ids``, ``attention_mask``, ``labels``, each (texts, tokens); perhaps
            ``position_ids``.
        allow_none: Whether a batch may be without any label, as the share of a rank that has no
            text left: its sums are 0 and so are their gradients.

    Raises:
        TypeError: If the model is no causal LM whose tokens stay where they are.
        ValueError: If padding is labelled, or no position of the batch carries a label, unless
            that is allowed.
    """
    _check_model(model)
    _check_labels(batch)
    if "position_ids" not in batch:  # else texts share a prompt: columns are no positions
        batch = padded_right(batch)
    wanted, columns = labelled_columns(batch)
    if columns.numel() == 0 and not allow_none:
        raise ValueError("the batch has no labelled token: every label is -100, so it has no loss")
    text, column = wanted.nonzero(as_tuple=True)
    targets = batch["labels"][text, column + 1]
    if is_text_by_text(model):
        places = batch["attention_mask"].flatten().cumsum(dim=0).view_as(batch["labels"]) - 1
        kept = places[:, :-1][wanted]
        row = model(**one_row(batch), use_cache=False, logits_to_keep=kept).logits
        return LabelledTokens(row.flatten(0, 1), targets, text, len(batch["labels"]))
    inputs: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "use_cache": False,
    }
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"]
    if _accepts_logits_to_keep(model):
        logits = model(**inputs, logits_to_keep=columns).logits
        column = torch.searchsorted(columns, column)
    else:
        logits = model(**inputs).logits
    return LabelledTokens(logits[text, column], targets, text, len(batch["labels"]))


def _check_model(model: Any) -> None:
    if getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"{type(unwrapped(model)).__name__} is an encoder and a decoder: its encoder would "
            "read the answer. Take a causal language model (AutoModelForCausalLM)"
        )
    adapter: Any = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False) and adapter.peft_type != "PREFIX_TUNING":
        raise TypeError(
            f"{adapter.peft_type} puts tokens of its own before each text, so that labels no "
            "longer stand beside their tokens. Take LoRA"
        )


def _check_labels(batch: Batch) -> None:
    mask = batch["attention_mask"]
    if mask.ndim == 2 and bool(((mask == 0) & (batch["labels"] != IGNORE_INDEX)).any()):
        raise ValueError(
            f"labels stand on padding, where attention_mask is 0: set them to {IGNORE_INDEX}, as "
            "in labels.masked_fill(attention_mask == 0, -100)"
        )


def per_text_loss(model: nn.Module, batch: Batch, *, reduction: Reduction = "mean") -> Tensor:
    """Negative log-likelihood of each text's labelled tokens under the model.

    Args:
        model: Any ``transformers`` causal LM.
        batch: ``input_ids``, ``attention_mask``, ``labels``, each (texts, tokens).
        reduction: ``mean`` or ``sum`` over the labelled tokens of a text.

    Returns:
        Shape (texts,), nats (per token with ``mean``), at least 0, lower is better. A text
        without a label gets 0.
    """
    tokens = labelled_tokens(model, batch)
    return tokens.per_text(tokens.token_losses(), reduction)
