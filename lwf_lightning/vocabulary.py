"""The ids that a model embeds: its tokenizer may know more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def embedded_ids(model: Any) -> int | None:
    """How many ids a model embeds; None where it does not say."""
    with suppress(AttributeError, NotImplementedError):
        return int(model.get_input_embeddings().weight.shape[0])
    return None


def padding_id(candidates: Iterable[object], model: Any) -> int:
    """The first of these ids that a model embeds, or else 0: padding is masked, so any will do.

    Args:
        candidates: Ids, or None, the best first.
        model: A causal LM; None if it is not known.
    """
    ids = embedded_ids(model)
    known = (id for id in candidates if isinstance(id, int) and (ids is None or id < ids))
    return next(known, 0)


def check_ids(
    texts: Iterable[Sequence[int]], model: Any, tokenizer: PreTrainedTokenizerBase, what: str
) -> None:
    """Refuses token ids that a model does not embed.

    Args:
        texts: Token ids of each text.
        model: The model that will read them.
        tokenizer: What has made them.
        what: Names the texts in the error.

    Raises:
        ValueError: If there is one; names both sizes.
    """
    ids = embedded_ids(model)
    highest = max(map(max, texts), default=0)
    if ids is not None and highest >= ids:
        raise ValueError(
            f"{what} hold token id {highest}, but the model embeds {ids} ids and its tokenizer has "
            f"{len(tokenizer)}: give the model its own tokenizer, or resize_token_embeddings to "
            "the tokenizer's length and save it as another model.init_args.model_name"
        )
