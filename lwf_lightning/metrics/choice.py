"""Choice tasks by log-likelihood: the functional core."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lwf_lightning.data.batch import IGNORE_INDEX, Batch, padded_right
from lwf_lightning.data.passes import take_texts, texts_of_passes
from lwf_lightning.losses import labelled_tokens
from lwf_lightning.metrics.shared_prompts import share_prompts, shares_exactly, with_tree_mask
from lwf_lightning.shards import in_step


@torch.no_grad()
def choice_log_likelihoods(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-likelihood of the labelled tokens of each text.

    Neighbouring texts with the same prompt, as the choices of an example, go through the model as
    one, where its attention allows that: the prompt is read once.

    Args:
        model: Any ``transformers`` causal LM, in eval mode for exact figures.
        batch: ``input_ids``, ``attention_mask``, ``labels``, each (texts, tokens): one text per
            example and choice, labels on the choice; padded on either side.

    Returns:
        Sums in nats, at most 0, higher is more likely, float32 or wider; and the number of tokens
        behind each, int64; both of shape (texts,).

    Raises:
        ValueError: If no position of the batch carries a label.
    """
    batch = padded_right(batch)
    texts, width = batch["input_ids"].shape
    shares = shares_exactly(model, width)
    rows = torch.arange(texts, device=batch["labels"].device)
    whole = share_prompts(batch) if shares else {**batch, "text": rows[:, None].expand(-1, width)}
    parts = [take_texts(whole, chosen) for chosen in texts_of_passes(model, whole)]
    values, owners = [], []
    for number, part in enumerate(in_step(parts, model.parameters())):
        shared = with_tree_mask(part) if shares else part
        tokens = labelled_tokens(model, shared, allow_none=number >= len(parts))
        values.append(-tokens.token_losses())
        owners.append(part["text"][:, 1:][part["labels"][:, 1:] != IGNORE_INDEX])
    value, owner = torch.cat(values), torch.cat(owners)
    return value.new_zeros(texts).index_add(0, owner, value), torch.bincount(owner, minlength=texts)


def predicted_choices(
    sums: Tensor, counts: Tensor, choice_counts: Tensor, *, normalise: bool = True
) -> Tensor:
    """The most likely choice of each example.

    Args:
        sums: Log-likelihood of each choice in nats, shape (choices of all examples,), ordered by
            example, then choice.
        counts: Number of tokens behind each sum, same shape.
        choice_counts: Choices of each example, shape (examples,).
        normalise: Whether to compare the mean per token rather than the sum, which favours short
            choices. Length-normalised is the better by far on qasc.

    Returns:
        Index of the choice within its example, shape (examples,), int64; the first one of equals;
        -1, which is never right, where no choice has a finite score.

    Raises:
        ValueError: If the shapes do not fit together, or an example has no choice.

    Example:
        >>> sums = torch.tensor([-3.0, -4.0, -1.0, -2.0, -9.0])
        >>> counts = torch.tensor([1, 2, 1, 1, 1])
        >>> predicted_choices(sums, counts, torch.tensor([2, 3])).tolist()
        [1, 0]
        >>> predicted_choices(sums, counts, torch.tensor([2, 3]), normalise=False).tolist()
        [0, 0]
    """
    if sums.ndim != 1 or sums.shape != counts.shape or int(choice_counts.sum()) != len(sums):
        raise ValueError(
            "expected one sum and one count per choice of all examples, got shapes "
            f"{tuple(sums.shape)} and {tuple(counts.shape)} for {int(choice_counts.sum())} choices"
        )
    if choice_counts.numel() == 0 or int(choice_counts.min()) < 1:
        raise ValueError("every example needs at least one choice")
    scores = sums / counts.clamp(min=1) if normalise else sums
    scores = torch.where(scores.isfinite(), scores, -torch.inf)
    columns = torch.arange(int(choice_counts.max()), device=sums.device)
    there = columns < choice_counts.unsqueeze(1)  # (examples, most choices)
    table = scores.new_full(there.shape, -torch.inf).masked_scatter(there, scores)
    best, index = table.max(dim=1)
    return torch.where(best.isfinite(), index, -1)
