"""Do the texts that a model generates itself represent the forgetting task?

For each forgetting task its prompts are answered greedily, as the method does, and by sampling 1, 4
and 8 answers each; all are compared with the gold answers to the same prompts.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch

from lwf_lightning.data.batch import IGNORE_INDEX, EncodedText
from lwf_lightning.data.encode import encode_example, encode_prompt
from lwf_lightning.data.rows import DataError
from lwf_lightning.data.sampler import pass_order
from lwf_lightning.generation import generate_answers, keep_end, prompt_limit, unwrapped
from lwf_lightning.study.questions.answer import Answer
from lwf_lightning.study.questions.ground import Ground
from lwf_lightning.tasks.base import Example, Task, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

SAMPLES = (1, 4, 8)
GREEDY, GOLD = "greedy", "gold"


@dataclass(frozen=True)
class Texts:
    """The answers of one kind to the prompts of a task, some per prompt.

    Attributes:
        covered: Share of prompts for which one of the answers is the gold answer.
        empty: Share of answers without a word.
        distinct: Different answers, as a share of all.
        losses: Mean negative log-likelihood under the base model of each answer, nats per token.
        distance_1: Distance of the distribution of words from that of the gold answers.
        distance_2: The same of pairs of words.
    """

    covered: float
    empty: float
    distinct: float
    losses: list[float]
    distance_1: float
    distance_2: float


@contextmanager
def sampling(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Lets greedy decoding sample: the highest logit after Gumbel noise is a draw from softmax.

    Args:
        model: A ``transformers`` causal LM, with or without an adapter.
        seed: Seed of the noise.
    """
    from lwf_lightning.decoding import decodes_exactly  # imports transformers: seconds
    from lwf_lightning.fallback import generates_exactly

    generator = torch.Generator().manual_seed(seed)

    def disturb(_: Any, __: Any, output: Any) -> Any:
        waiting = torch.empty(output.logits.shape).exponential_(generator=generator)
        output.logits = output.logits.float() - waiting.log().to(output.logits.device)
        return output

    base = unwrapped(model)
    decodes_exactly(base, 0)  # their trials come now: with noise no way would pass
    generates_exactly(base)
    hook = base.register_forward_hook(disturb)
    try:
        yield
    finally:
        hook.remove()


def ngram_distance(
    first: Sequence[Sequence[Hashable]], second: Sequence[Sequence[Hashable]], size: int
) -> float:
    """Total variation distance between the n-grams of two sets of texts: 0 same, 1 none shared.

    Small sets differ by chance.

    Args:
        first: Texts as tokens or words.
        second: Others.
        size: Tokens of an n-gram. A text with fewer tokens counts as one n-gram.

    Example:
        >>> ngram_distance([["a", "b"]], [["a", "c"]], 1)
        0.5
    """
    one, other = (_ngrams(texts, size) for texts in (first, second))
    totals = one.total(), other.total()
    if not all(totals):
        return 1.0
    shares = [abs(one[g] / totals[0] - other[g] / totals[1]) for g in one.keys() | other.keys()]
    return sum(shares) / 2


def _ngrams(texts: Sequence[Sequence[Hashable]], size: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(
        tuple(text[start : start + size])
        for text in texts
        if text
        for start in range(max(1, len(text) - size + 1))
    )


def measure(
    task: Task, examples: Sequence[Example], answers: Sequence[Sequence[str]], losses: list[float]
) -> Texts:
    """Compares answers with the gold ones.

    Args:
        task: Says how a generated answer is read.
        examples: The prompts with their gold answers.
        answers: Generated answers to each prompt, at least one.
        losses: Of all answers.
    """
    given = [answer for own in answers for answer in own]
    hits = [
        any(task.read_answer(answer) == example.reference for answer in own)
        for example, own in zip(examples, answers, strict=True)
    ]
    words = [plain(answer).split() for answer in given]
    gold = [plain(example.answer).split() for example in examples]
    return Texts(
        covered=fmean(hits),
        empty=fmean(not own for own in words),
        distinct=len({tuple(own) for own in words}) / len(words),
        losses=losses,
        distance_1=ngram_distance(words, gold, 1),
        distance_2=ngram_distance(words, gold, 2),
    )


def answer(ground: Ground, seed: int, folder: Path) -> Answer:
    """Generates, samples and compares."""
    ground.prepare()
    by_task: dict[str, list[Example]] = defaultdict(list)
    left_out = 0
    for name, example in ground.data.forgetting_examples:
        if example.answer:
            fits = _gold(ground, example) is not None
            left_out += not fits
            by_task[name] += [example] if fits else []
    if left_out:
        warnings.warn(
            f"{left_out} prompts are left out: their gold answer does not fit "
            "data.init_args.max_length, or holds the tokenizer's end-of-text token",
            stacklevel=2,
        )
    found = {
        name: _kinds(ground, ground.data.tasks[name], examples, seed)
        for name, examples in by_task.items()
        if examples
    }
    if not found:
        raise ValueError("no forgetting task has gold answers to compare with")
    rows = [
        (
            name,
            kind,
            f"{texts.covered:.2f}",
            f"{texts.empty:.2f}",
            f"{texts.distinct:.2f}",
            *(f"{of(texts.losses):.2f}" if texts.losses else "" for of in (median, fmean)),
            f"{texts.distance_1:.2f}",
            f"{texts.distance_2:.2f}",
        )
        for name, kinds in found.items()
        for kind, texts in kinds.items()
    ]
    data = {
        name: {"prompts": len(by_task[name]), **{kind: vars(t) for kind, t in kinds.items()}}
        for name, kinds in found.items()
    }
    return Answer(
        title="Do self-generated texts represent the forgetting task?",
        headings=(
            "forgetting task",
            "answers",
            "prompts with the gold answer",
            "empty",
            "distinct",
            "NLL, median",
            "NLL, mean",
            "distance of words",
            "of pairs",
        ),
        rows=rows,
        note="Shares of prompts (gold answer among the answers, higher is better) and of answers "
        "(empty; different ones). NLL: of the answer under the base model, nats per token; "
        "distance: total variation between the words (pairs of words) of all answers and of the "
        "gold ones, 0 to 1, lower is nearer. The row gold compares a random half of the gold "
        "answers with the other: half as many texts, to other prompts, so that it is no floor.",
        data=data,
        figure=draw(found),
    )


def _kinds(ground: Ground, task: Task, examples: list[Example], seed: int) -> dict[str, Texts]:
    data, tokenizer = ground.data, ground.module.tokenizer
    limit = prompt_limit(unwrapped(ground.model), data.max_new_tokens, data.max_length)
    prompts = [
        keep_end(
            encode_prompt(tokenizer, example.prompt, chat_template=data.chat_template),
            limit,
            tokenizer.bos_token_id,
        )
        for example in examples
    ]

    def generated(times: int, description: str) -> list[list[tuple[int, ...]]]:
        ids = generate_answers(
            ground.model,
            tokenizer,
            [prompt for prompt in prompts for _ in range(times)],
            max_new_tokens=data.max_new_tokens,
            batch_size=data.elicit_batch_size,
            stop=task.stop,
            progress=True,
            description=f"{task.name}, {description}",
        )
        return [ids[start : start + times] for start in range(0, len(ids), times)]

    def told(kind: Sequence[Sequence[tuple[int, ...]]]) -> Texts:
        texts = [[_text(tokenizer, ids) for ids in own] for own in kind]
        encoded = [
            EncodedText((*prompt, *ids), ((IGNORE_INDEX,) * len(prompt)) + ids)
            for prompt, own in zip(prompts, kind, strict=True)
            for ids in own
            if ids
        ]
        return measure(task, examples, texts, ground.losses(encoded))

    kinds = {GREEDY: told(generated(1, GREEDY))}
    with sampling(ground.model, seed):
        samples = generated(max(SAMPLES), "sampling")
    for count in SAMPLES:
        name = f"{count} sample{'s' if count > 1 else ''}"
        kinds[name] = told([own[:count] for own in samples])
    gold = [text for example in examples if (text := _gold(ground, example))]
    words = [plain(example.answer).split() for example in examples]
    mixed = [words[row] for row in pass_order(len(words), seed, 0)]  # files are often sorted
    kinds[GOLD] = Texts(
        covered=1.0,
        empty=0.0,
        distinct=len({tuple(own) for own in words}) / len(words),
        losses=ground.losses(gold),
        distance_1=ngram_distance(mixed[::2], mixed[1::2], 1),
        distance_2=ngram_distance(mixed[::2], mixed[1::2], 2),
    )
    return kinds


def _gold(ground: Ground, example: Example) -> EncodedText | None:
    """A prompt with its gold answer; None where nothing could be learned from it."""
    data = ground.data
    try:
        return encode_example(ground.module.tokenizer, example, data.max_length, data.chat_template)
    except DataError:
        return None


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def draw(found: dict[str, dict[str, Texts]]) -> Figure:
    """Likelihood of each kind of text, and how many gold answers it holds; a column per task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.5, 3.6 * len(found) + 0.6), 6), layout="constrained")
    every = figure.subplots(2, len(found), squeeze=False, sharey="row")
    for column, (name, kinds) in enumerate(found.items()):
        labels = list(kinds)
        top, bottom = every[:, column]
        top.boxplot(
            [kinds[kind].losses for kind in labels], tick_labels=labels, whis=(5, 95), sym=""
        )
        top.set_title(name)
        places = range(len(labels))
        bottom.bar([p - 0.2 for p in places], [kinds[k].covered for k in labels], 0.4)
        bottom.bar([p + 0.2 for p in places], [kinds[k].distance_1 for k in labels], 0.4)
        bottom.set_xticks(places, labels)
        bottom.set_ylim(0, 1.02)
        for axes in (top, bottom):
            axes.tick_params(axis="x", rotation=35, labelsize=8)
            axes.grid(axis="y", alpha=0.3)
    every[0, 0].set_ylabel("NLL under the base model,\nnats per token\n(whiskers 5 to 95 %)")
    every[1, 0].set_ylabel("share")
    figure.legend(
        every[1, 0].containers,
        ["prompts with the gold answer", "distance of words from gold"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure
