"""What the memory of a run depends on: the model's size, the passes, the plan. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lwf_lightning.data.passes import fill_rows, group_by_length


@dataclass(frozen=True)
class ModelSize:
    """What the memory of a causal LM depends on.

    Attributes:
        layers: Blocks.
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        heads: Attention heads.
        key_value_heads: Heads of keys and values.
        vocabulary: Rows of the head.
        parameters: All weights, tied ones once.
        trainable: Those that train: all of them, or an adapter.
        block: Weights of the largest block.
        block_trainable: Those of them that train.
        root: Weights outside the blocks: embedding, last norm, head.
        root_trainable: Those of them that train.
        largest: Elements of the largest tensor that trains.
        head_size: Width of a head; 0 takes ``hidden / heads``.
        tied: Whether the head is the embedding.
        trains_norms: Whether norms train, which keeps their output.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    parameters: int
    trainable: int
    block: int
    block_trainable: int
    root: int
    root_trainable: int
    largest: int
    head_size: int = 0
    tied: bool = False
    trains_norms: bool = True

    @property
    def attention(self) -> int:
        """Width of all query heads together."""
        return self.heads * (self.head_size or self.hidden // self.heads)

    @property
    def key_value(self) -> int:
        """Width of all key heads together."""
        return self.attention // self.heads * self.key_value_heads

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter trains and the rest is frozen."""
        return self.trainable < self.parameters


@dataclass(frozen=True)
class Precision:
    """Bytes per element.

    Attributes:
        weights: Of the weights, as the run holds them.
        trained: Of the weights that train: float32 in an adapter unless all is cast.
        compute: Of activations in matrix products.
        loaded: Of the weights as ``dtype`` loads them, before the trainer casts them.
        mixed: Whether products run under autocast, on cast copies of the weights.
    """

    weights: int = 4
    trained: int = 4
    compute: int = 4
    loaded: int = 4
    mixed: bool = False


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        texts: Texts in it.
        width: Tokens of the longest, to which all are padded.
        columns: Positions at which some text has a label: where the head runs.
        labelled: Labelled tokens of all texts.
        padded: Whether there is padding, which takes an attention mask and repeated keys.
        in_one_row: Whether its texts lie one after another, as one of that width, whose attention
            is put together from theirs.
    """

    texts: int
    width: int
    columns: int
    labelled: int
    padded: bool = True
    in_one_row: bool = False

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.texts * self.width


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts to be answered.

    Attributes:
        texts: Prompts.
        tokens: Tokens of the longest, to which all are padded.
        answer: Tokens of an answer.
        read: How many of them are read in one pass; None reads all.
        cached: Tokens whose keys and values are held at most; None takes those of all.
    """

    texts: int = 0
    tokens: int = 0
    answer: int = 0
    read: int | None = None
    cached: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a run does, as far as its memory depends on it; passes are the largest of their kind.

    Attributes:
        learning: Passes of a learning step.
        evaluation: Passes of an evaluation batch.
        unlearns: Whether the run unlearns: a base copy, and moments of its own.
        compares: Whether the run keeps the base weights without unlearning: a base copy.
        pulls: Whether a pull weighs by the Fisher information, which it keeps.
        guards: Whether an AscentGuard judges unlearning steps, which takes a copy of the weights.
        retains: Whether an unlearning step has a second pass, of what is to stay.
        anchor: Where theta*_L comes from; None without a FisherCallback.
        unlearning: Passes of an unlearning step.
        pull_fisher: Passes of the Fisher information of a pull.
        probe: Passes of a step of the probe.
        fisher: Passes of the Fisher estimate.
        scoring: Passes of scoring.
        elicitation: The largest batch of self-generation.
        evaluation_prompts: The largest batch of prompts that evaluation answers.
        accumulates: Whether a learning step has several passes.
        probe_accumulates: Whether a step of the probe has.
        checkpointing: Whether activations are recomputed.
        is_eager: Whether attention keeps its scores, as ``eager`` does.
        buckets: Whether DDP holds a second gradient.
        ranks: Processes among which FSDP2 shards everything.
        device: ``cpu`` or ``cuda``.
        precision: Bytes per element.
    """

    learning: Sequence[Pass]
    evaluation: Sequence[Pass] = ()
    unlearns: bool = False
    compares: bool = False
    pulls: bool = False
    guards: bool = False
    retains: bool = False
    anchor: Literal["probe", "online"] | None = None
    unlearning: Sequence[Pass] = ()
    pull_fisher: Sequence[Pass] = ()
    probe: Sequence[Pass] = ()
    fisher: Sequence[Pass] = ()
    scoring: Sequence[Pass] = ()
    elicitation: Prompts = Prompts()
    evaluation_prompts: Prompts = Prompts()
    accumulates: bool = False
    probe_accumulates: bool = False
    checkpointing: bool = False
    is_eager: bool = False
    buckets: bool = False
    ranks: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Precision = field(default_factory=Precision)


def passes_of(
    texts: Sequence[tuple[int, int]], cost: int, max_tokens: int | None = None
) -> list[Pass]:
    """The padded passes of a batch.

    Args:
        texts: Tokens of each text, and how many at its end are labelled.
        cost: See :func:`lwf_lightning.data.passes.pass_cost`; 0 puts all texts in one pass.
        max_tokens: See :func:`lwf_lightning.data.passes.group_by_length`.

    Example:
        >>> passes_of([(10, 4), (8, 1)], cost=100)
        [Pass(texts=2, width=10, columns=4, labelled=5, padded=True, in_one_row=False)]
    """
    lengths = [tokens for tokens, _ in texts]
    groups = group_by_length(lengths, cost, max_tokens) if cost else [list(range(len(texts)))]
    found = []
    for group in groups:
        part = [texts[index] for index in group]
        width = max(tokens for tokens, _ in part)
        first = min(tokens - labelled for tokens, labelled in part)
        columns = width - max(1, first)  # the first token is never predicted
        padded = any(tokens < width for tokens, _ in part)
        found.append(Pass(len(part), width, max(columns, 0), _labelled(part), padded))
    return found


def rows_of(texts: Sequence[tuple[int, int]], max_tokens: int | None = None) -> list[Pass]:
    """The passes of a batch whose texts lie one after another.

    Args:
        texts: Tokens of each text, and how many at its end are labelled.
        max_tokens: See :func:`lwf_lightning.data.passes.fill_rows`.

    Example:
        >>> rows_of([(10, 4), (8, 1)])
        [Pass(texts=1, width=18, columns=5, labelled=5, padded=False, in_one_row=True)]
    """
    found = []
    for group in fill_rows([tokens for tokens, _ in texts], max_tokens):
        part = [texts[index] for index in group]
        labelled = _labelled(part)
        found.append(Pass(1, sum(tokens for tokens, _ in part), labelled, labelled, False, True))
    return found


def _labelled(texts: Sequence[tuple[int, int]]) -> int:
    return sum(min(labels, tokens - 1) for tokens, labels in texts)
