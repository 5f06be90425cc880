"""What a run that goes on learns from: the texts of its checkpoint, and of no other files."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lwf_lightning.data.batch import EncodedText


def texts_digest(texts: Sequence[EncodedText]) -> str:
    """Tells encoded texts from others, or from the same in another order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(repr((text.input_ids, text.labels)).encode())
    return digest.hexdigest()


def warn_of_batches(state: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Warns of steps that take another number of texts than those of the checkpoint.

    Args:
        state: The datamodule's state; one of before it kept ``batch_sizes`` is not checked.
        sizes: Argument -> texts of a step over all processes.
    """
    for name, before in state.get("batch_sizes", {}).items():
        if sizes[name] != before:
            warnings.warn(
                f"the checkpoint's steps have {before} texts over all processes "
                f"(data.init_args.{name} times their number), now they have {sizes[name]}: the run "
                f"goes on as another, and its place in the texts is not the same. Set {name} so "
                "that the product is that again",
                stacklevel=3,
            )


def check_learning(state: Mapping[str, Any], seed: int, texts: str | None) -> None:
    """Compares what a fit learns with the datamodule's state in its checkpoint.

    Args:
        state: The state; one of before it kept ``learning_texts`` is not checked for them.
        seed: Seed of the datamodule; another one is warned of.
        texts: Digest of the learning texts; None where there are none.

    Raises:
        ValueError: If the learning texts are others.
    """
    if state["seed"] != seed:
        warnings.warn(
            f"the checkpoint was made with data.init_args.seed={state['seed']}, now it is "
            f"{seed}: the order of batches will not be that of an uninterrupted run",
            stacklevel=3,
        )
    if texts is not None and state.get("learning_texts") not in (None, texts):
        raise ValueError(
            "the learning texts are not those of the checkpoint: resume with the same rows in "
            "data.init_args.data_dir and the same learning_task, its fields and form, "
            "chat_template, max_length, learning_texts and seed; to learn others on top, export "
            "the checkpoint and name that folder in model.init_args.model_name"
        )
