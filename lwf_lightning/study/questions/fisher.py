"""How good is the approximation of the Fisher information behind the forgetting confidence?

The method takes the diagonal of the empirical Fisher, from some texts. On a small model the scores
are also computed with blocks of it (one per parameter tensor) and with all of it, and with labels
drawn from the model's own predictions. No matrix is formed: for gradients a_n of the learning
texts, <F g, g> with F = mean_n a_n a_n^T is mean_n <a_n, g>^2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from lwf_lightning.data.batch import IGNORE_INDEX, Batch, EncodedText, batches_of
from lwf_lightning.data.sampler import pass_order, seeded_sample
from lwf_lightning.demo.world import ASSETS
from lwf_lightning.files import json_lines
from lwf_lightning.forgetting.confidence import (
    ForgettingConfidence,
    automatic_alpha,
    forgetting_confidence,
)
from lwf_lightning.forgetting.elicit import SelfText
from lwf_lightning.forgetting.fisher import FisherEstimator, fisher_sums
from lwf_lightning.forgetting.weights import exchanged_weights, trainable_parameters
from lwf_lightning.generation import evaluation_mode
from lwf_lightning.losses import Reduction, labelled_tokens, per_text_loss
from lwf_lightning.study.questions.answer import Answer
from lwf_lightning.study.questions.ground import Ground

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Part: TypeAlias = Literal["diagonal", "block", "full"]
Gradients: TypeAlias = Mapping[str, Tensor]
"""Parameter name -> gradients of texts, shape (texts, elements of the parameter)."""

PARTS: tuple[Part, ...] = ("diagonal", "block", "full")
ESTIMATORS: tuple[FisherEstimator, ...] = ("empirical", "true")
EXACT_LIMIT = 2_000_000_000
"""Most numbers in the gradients that are kept text by text: 8 GB."""
SCORED = 128  # texts of D_self
SIZES = (8, 16, 32, 64, 128, 256)  # learning texts behind a Fisher
DRAWS = 3  # orders in which they are taken
LABEL_DRAWS = 4  # drawn answers per learning text, in the exact Fisher with drawn labels


def text_gradients(
    model: torch.nn.Module, texts: Iterable[Batch], reduction: Reduction = "mean"
) -> dict[str, Tensor]:
    """The gradient of each text's loss, one by one through plain autograd.

    Args:
        model: A causal LM; in evaluation mode meanwhile.
        texts: Batches of one text each.
        reduction: Whether a text's loss is the mean or the sum over its labelled tokens.
    """
    parameters, texts = trainable_parameters(model), list(texts)
    rows = {name: p.new_empty(len(texts), p.numel()) for name, p in parameters.items()}
    with evaluation_mode(model):
        for row, text in enumerate(tqdm(texts, desc="Gradients")):
            loss = per_text_loss(model, text, reduction=reduction).sum()
            found = torch.autograd.grad(loss, list(parameters.values()))
            for name, gradient in zip(parameters, found, strict=True):
                rows[name][row] = gradient.flatten()
    return rows


@torch.no_grad()
def with_drawn_labels(model: torch.nn.Module, text: Batch, generator: torch.Generator) -> Batch:
    """A text whose labels are drawn from the model's predictions, given the tokens before."""
    with evaluation_mode(model):
        tokens = labelled_tokens(model, text)
    labels = text["labels"].clone()
    labels[:, 0] = IGNORE_INDEX  # the first token is never predicted
    drawn = torch.multinomial(tokens.logits.float().softmax(-1), 1, generator=generator)
    labels[labels != IGNORE_INDEX] = drawn.squeeze(1)
    return {**text, "labels": labels}


def products(
    learning: Gradients, own: Gradients, difference: Mapping[str, Tensor], part: Part
) -> tuple[Tensor, Tensor]:
    """<F d, g> and <F g, g> of each text, with F = mean_n a_n a_n^T or a part of it.

    Args:
        learning: a_n: gradients of the learning texts at theta*_L.
        own: g: gradients of the self-generated texts at theta_base, or unit vectors along them.
        difference: d = theta_base - theta*_L, each (elements,).
        part: What is kept of F: its ``diagonal``, a ``block`` per parameter, or ``full``: all.

    Returns:
        Alignment and sensitivity, each (texts,), float64.
    """
    texts = len(next(iter(own.values())))
    rows = len(next(iter(learning.values())))
    alignment, sensitivity = (torch.zeros(texts, dtype=torch.float64) for _ in range(2))
    all_cross, all_along = torch.zeros(texts, rows), torch.zeros(rows)
    for name, a in learning.items():
        g, d = own[name], difference[name].to(a)
        if part == "diagonal":
            diagonal = a.square().mean(0)
            alignment += (g @ (diagonal * d)).double()
            sensitivity += (g.square() @ diagonal).double()
            continue
        cross, along = g @ a.T, a @ d
        if part == "block":
            alignment += (cross * along).double().mean(1)
            sensitivity += cross.double().square().mean(1)
        all_cross, all_along = all_cross.to(cross) + cross, all_along.to(along) + along
    if part == "full":
        return (all_cross * all_along).double().mean(1), all_cross.double().square().mean(1)
    return alignment, sensitivity


def of_unit_length(gradients: Gradients) -> dict[str, Tensor]:
    """Each text's gradient over all parameters, divided by its norm; none at all stays 0."""
    squares = torch.stack([rows.double().square().sum(1) for rows in gradients.values()])
    norms = squares.sum(0).sqrt()
    norms[norms == 0] = 1
    return {name: rows / norms[:, None].to(rows) for name, rows in gradients.items()}


def area_under_roc(scores: Sequence[float], is_wanted: Sequence[bool]) -> float:
    """Chance that a wanted text is scored above another, ties half: 0 to 1, 0.5 is chance.

    Example:
        >>> area_under_roc([3.0, 1.0, 2.0], [True, False, True])
        1.0
    """
    wanted = np.array(is_wanted)
    ranks = stats.rankdata(scores)[wanted]
    count, others = wanted.sum(), (~wanted).sum()
    return float((ranks.sum() - count * (count + 1) / 2) / (count * others))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: -1 to 1; 1 ranks the texts alike."""
    return float(stats.spearmanr(first, second).statistic)


def shared_top(first: Sequence[float], second: Sequence[float], rate: float) -> float:
    """Share of the highest texts of one score that are among the highest of the other."""
    count = max(1, round(rate * len(first)))
    top = [set(np.argsort(-np.array(scores), kind="stable")[:count]) for scores in (first, second)]
    return len(top[0] & top[1]) / count


@dataclass(frozen=True)
class Scored:
    """The confidence of each text with one Fisher."""

    fisher: str
    estimator: str
    texts: int
    confidence: list[float]


def answer(ground: Ground, seed: int, folder: Path) -> Answer:
    """Scores the same texts with each Fisher, and compares the rankings."""
    ground.need_probe()
    ground.prepare()
    ground.data.elicit_self_knowledge(ground.model)
    knowledge = ground.data.self_knowledge
    texts = seeded_sample(knowledge.texts if knowledge else [], SCORED, seed)
    own = [text.encoded() for text in texts]
    anchor = ground.anchor(ground.callback.seed)
    exact: list[Scored] = []
    rows = len(own) + (1 + LABEL_DRAWS) * min(max(SIZES), len(ground.data.learning_encoded))
    weights = sum(p.numel() for p in trainable_parameters(ground.model).values())
    if rows * weights <= EXACT_LIMIT:
        exact = _exact(ground, own, anchor, seed)
    by_size = _by_size(ground, own, anchor, seed)
    return _told(ground, texts, exact, by_size)


def _exact(
    ground: Ground, own: Sequence[EncodedText], anchor: dict[str, Tensor], seed: int
) -> list[Scored]:
    model, pad = ground.model, ground.data.pad_token_id
    every, reduction = ground.data.learning_encoded, ground.callback.reduction
    order = pass_order(len(every), seed, 0)[: max(SIZES)]  # that of the reference
    learning = list(batches_of([every[index] for index in order], 1, pad))
    difference = {
        name: (parameter.detach() - anchor[name]).flatten()
        for name, parameter in trainable_parameters(model).items()
    }
    generator = torch.Generator().manual_seed(seed)
    gradients: dict[str, Gradients] = {}
    with exchanged_weights(model, anchor):
        drawn = [
            with_drawn_labels(model, t, generator) for t in learning for _ in range(LABEL_DRAWS)
        ]
        gradients["empirical"] = text_gradients(model, learning, reduction)
        gradients["true"] = text_gradients(model, drawn, reduction)
    of_texts = text_gradients(model, batches_of(own, 1, pad), reduction)
    if ground.callback.text_step == "unit":
        of_texts = of_unit_length(of_texts)
    found = []
    for part, estimator in itertools.product(PARTS, ESTIMATORS):
        alignment, sensitivity = products(gradients[estimator], of_texts, difference, part)
        alpha = automatic_alpha(alignment, sensitivity)
        scores = ForgettingConfidence(alignment, sensitivity, alpha, 0.0)
        found.append(Scored(part, estimator, len(learning), scores.confidence.tolist()))
    return found


def sizes_up_to(texts: int) -> list[int]:
    """The numbers of learning texts behind a Fisher, where there are so many.

    Example:
        >>> sizes_up_to(48), sizes_up_to(64), sizes_up_to(7634)
        ([8, 16, 32, 48], [8, 16, 32, 64], [8, 16, 32, 64, 128, 256])
    """
    most = min(texts, max(SIZES))
    return [*(size for size in SIZES if size < most), most]


def _by_size(
    ground: Ground, own: Sequence[EncodedText], anchor: dict[str, Tensor], seed: int
) -> list[list[Scored]]:
    """One list per draw: the diagonal Fisher by more and more texts, with both estimators."""
    learning, batches = ground.data.learning_encoded, ground.batches(own)
    steps = list(itertools.pairwise([0, *sizes_up_to(len(learning))]))
    found: list[list[Scored]] = [[] for _ in range(DRAWS)]
    sums: dict[str, Tensor] = {}
    every = list(itertools.product(range(DRAWS), ESTIMATORS, steps))
    for draw, estimator, (start, end) in tqdm(every, desc="Fisher by number of texts"):
        order = pass_order(len(learning), seed, draw)
        part = ground.batches([learning[index] for index in order[start:end]])
        own_seed = 1000 * (seed + draw) + start  # other draws for the texts that are added
        with exchanged_weights(ground.model, anchor):
            more, _ = fisher_sums(
                ground.model,
                part,
                estimator=estimator,
                reduction=ground.callback.reduction,
                seed=own_seed,
            )
        sums = {name: sums[name] + more[name] if start else more[name] for name in more}
        fisher = {name: total / end for name, total in sums.items()}
        scores = forgetting_confidence(
            ground.model,
            batches,
            fisher=fisher,
            anchor=anchor,
            text_step=ground.callback.text_step,
            reduction=ground.callback.reduction,
        )
        found[draw].append(Scored("diagonal", estimator, end, scores.confidence.tolist()))
    return found


def _told(
    ground: Ground,
    texts: Sequence[SelfText],
    exact: Sequence[Scored],
    by_size: Sequence[Sequence[Scored]],
) -> Answer:
    most = max(one.texts for one in by_size[0])
    own = next(s for s in by_size[0] if s.texts == most and s.estimator == "empirical").confidence
    best = exact[-1].confidence if exact else None
    outdated = outdated_texts(texts)
    rate = ground.callback.forgetting_rate
    rows, data = [], []
    for draws in [*([one] for one in exact), *zip(*by_size, strict=True)]:
        first = draws[0]
        scores = [one.confidence for one in draws]
        figures = {
            "with_exact": None
            if best is None
            else fmean(rank_correlation(s, best) for s in scores),
            "with_own": fmean(rank_correlation(s, own) for s in scores),
            "among_draws": None
            if len(scores) == 1
            else fmean(rank_correlation(*pair) for pair in itertools.combinations(scores, 2)),
            "shared_top": fmean(shared_top(s, own, rate) for s in scores),
            "area": None
            if outdated is None
            else fmean(area_under_roc(s, outdated) for s in scores),
        }
        data.append({**vars(first), "draws": len(scores), **figures})
        told = ["" if value is None else f"{value:.2f}" for value in figures.values()]
        rows.append((first.fisher, first.estimator, str(first.texts), *told))
    return Answer(
        title="How good is the approximation of the Fisher information?",
        headings=(
            "Fisher",
            "estimator",
            "learning texts",
            "rank correlation with full, true",
            "with the reference",
            "among draws",
            f"top {100 * rate:.3g} % shared with the reference",
            "area under ROC, outdated",
        ),
        rows=rows,
        note=f"Confidence of {len(texts)} self-generated texts at the automatic alpha. Rank "
        f"correlation: Spearman's, -1 to 1. The reference: what the method estimates, diagonal and "
        f"empirical, of the first order's first {most} texts (fisher_texts of a run: "
        f"{ground.callback.fisher_texts}). Rows with a figure among draws are means over {DRAWS} "
        "orders of the learning texts, the reference's own among them, and where a draw is all "
        "learning texts they are the same ones; "
        f"true labels are drawn {LABEL_DRAWS} times per text in the first rows, once in these.",
        data={"rows": data},
        figure=draw(data),
    )


def outdated_texts(texts: Sequence[SelfText]) -> list[bool] | None:
    """Which texts are about what is outdated, in the embedded world; None elsewhere."""
    if any(text.task != "world_forgetting" for text in texts):
        return None
    file = ASSETS / "data" / "world_forgetting" / "train.jsonl"
    part_of = {row["prompt"]: row["part"] for row in json_lines(file)}
    return [part_of[text.prompt] == "outdated" for text in texts]


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Agreement of each part of the Fisher, and of the diagonal with more and more texts."""
    from matplotlib.figure import Figure

    exact = [row for row in rows if row["draws"] == 1]
    figure = Figure(figsize=(11 if exact else 6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if exact else 1, squeeze=False)[0]
    if exact:
        names = [f"{row['fisher']}, {row['estimator']}" for row in exact]
        bars = axes[0].barh(names, [row["with_exact"] for row in exact], color="#1f77b4")
        axes[0].bar_label(bars, fmt="%.2f", padding=3)
        axes[0].invert_yaxis()
        axes[0].set_xlim(min(0, *(row["with_exact"] for row in exact)) - 0.05, 1.12)
        axes[0].set_xlabel("rank correlation with the full Fisher, drawn labels")
    for estimator, colour in zip(ESTIMATORS, ("#d62728", "#1f77b4"), strict=True):
        own = [row for row in rows if row["draws"] > 1 and row["estimator"] == estimator]
        sizes = [row["texts"] for row in own]
        for figure_name, style in (("with_own", "o-"), ("among_draws", "s--")):
            told = "with the reference" if figure_name == "with_own" else "among draws"
            values = [row[figure_name] for row in own]
            axes[-1].plot(
                sizes, values, style, color=colour, label=f"{estimator}, {told}", clip_on=False
            )
    axes[-1].set_xscale("log", base=2)
    axes[-1].set_xticks(sizes, [str(size) for size in sizes])
    axes[-1].set(xlabel="learning texts behind a diagonal Fisher", ylabel="rank correlation")
    axes[-1].grid(alpha=0.3)
    axes[-1].legend(frameon=False, fontsize=8)
    return figure
