"""Does ascent reduce what was chosen, without collapse?

The same run with unlearning off, as configured, and ten times as strong, with AscentGuard and
without; all watch the same texts. A run that was interrupted goes on, a finished one stays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from lwf_lightning.callbacks.refresh_data import fisher_batches
from lwf_lightning.data.batch import EncodedText
from lwf_lightning.data.encode import encode_example, encode_prompt
from lwf_lightning.data.sampler import seeded_sample
from lwf_lightning.demo.world import ASSETS
from lwf_lightning.errors import NonFiniteLossError
from lwf_lightning.files import json_lines, whole_file
from lwf_lightning.forgetting.confidence import forgetting_confidence
from lwf_lightning.forgetting.fisher import diagonal_fisher
from lwf_lightning.forgetting.weights import exchanged_weights
from lwf_lightning.ranks import Ranks
from lwf_lightning.study.figures import BLUE, RED
from lwf_lightning.study.matrix import digest_of
from lwf_lightning.study.overlay import class_path, overlaid
from lwf_lightning.study.perform import read_curves
from lwf_lightning.study.questions.answer import Answer
from lwf_lightning.study.questions.ground import Ground
from lwf_lightning.study.questions.material import prose
from lwf_lightning.study.questions.watch import write_watched
from lwf_lightning.tasks.base import Example

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves: TypeAlias = Mapping[str, tuple[list[int], list[float]]]

SETS = {
    "chosen": "chosen texts (D_U)",
    "kept": "other texts of D_self",
    "unseen": "same tasks, unseen prompts",
    "neutral": "neutral texts",
}
TEXTS = 64  # of each set
STRONGER = 10.0
ALONE = "no unlearning"
DIVERGED = "diverged"  # stands among the curves of a run that did
_GUARD = "AscentGuard"
_WATCH = "lwf_lightning.study.questions.watch.WatchUnlearning"


def arms(config: Mapping[str, Any], scale: float) -> dict[str, dict[str, Any]]:
    """The configurations to compare.

    Args:
        config: Of a run that unlearns.
        scale: Its ``unlearning_scale``.
    """
    callbacks = config["trainer"]["callbacks"]
    bare = [one for one in callbacks if not class_path(one).endswith(_GUARD)]
    guarded = [*bare, *(one for one in callbacks if class_path(one).endswith(_GUARD))]
    if guarded == bare:
        guarded.append({"class_path": f"lwf_lightning.{_GUARD}"})
    unguarded = {"trainer.callbacks": bare, "trainer.ascent_guard": False}
    strong = {"model.unlearning_scale": STRONGER * scale}
    changes: dict[str, dict[str, Any]] = {
        ALONE: {"model.schedule": "never"},
        "LWF": {"trainer.callbacks": guarded},
        "LWF, no guard": unguarded,
        "LWF x 10": {"trainer.callbacks": guarded, **strong},
        "LWF x 10, no guard": {**unguarded, **strong},
    }
    return {name: overlaid(config, change) for name, change in changes.items()}


def answer(ground: Ground, seed: int, folder: Path) -> Answer:
    """Runs what has not been run with this configuration and seed, and reports."""
    ground.need_probe()
    folder /= digest_of([ground.config, seed])
    file = folder / "watched.json"
    if not file.exists():
        _watch(ground, seed, file)
    watch = {"file": str(file), "interval": max(1, ground.steps() // 12)}
    found = {}
    for name, config in arms(ground.config, ground.module.hparams["unlearning_scale"]).items():
        config["trainer"]["callbacks"].append({"class_path": _WATCH, "init_args": watch})
        found[name] = _curves(name, config, folder / name.replace(" ", "_").replace(",", ""))
    return told(found)


def _curves(name: str, config: Mapping[str, Any], folder: Path) -> Curves:
    from lwf_lightning.cli import main as command_line

    done = folder / "curves.json"
    if not done.exists():
        config = overlaid(config, {"trainer.default_root_dir": str(folder)})
        file = folder / "run.yaml"
        with whole_file(file) as temporary:
            temporary.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        diverged = False
        try:
            command_line(["fit", "--config", str(file), "--ckpt_path", "last"])
        except SystemExit as stop:
            if not isinstance(stop.__context__, NonFiniteLossError):
                raise
            diverged = True  # it would do so again, and the others are still to come
        log = max(folder.glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
        curves = read_curves(log, ("watch/", "val/", "unlearn/steps"))
        if diverged:
            curves[DIVERGED] = ([], [])
        with whole_file(done) as temporary:
            temporary.write_text(json.dumps(curves), encoding="utf-8")
    read: Curves = json.loads(done.read_text(encoding="utf-8"))
    return read


def _watch(ground: Ground, seed: int, file: Path) -> None:
    """Chooses what to watch; what is chosen to be forgotten is what the runs choose, too."""
    ground.prepare()
    data, callback, model = ground.data, ground.callback, ground.model
    data.elicit_self_knowledge(model)
    knowledge = data.self_knowledge
    texts = [text.encoded() for text in (knowledge.texts if knowledge else [])]
    anchor = ground.anchor(callback.seed)
    size, count, first = callback.batch_size, callback.fisher_texts, callback.seed
    learning = fisher_batches(data, count, size, first, Ranks())
    with exchanged_weights(model, anchor):
        fisher = diagonal_fisher(
            model,
            learning,
            estimator=callback.estimator,
            reduction=callback.reduction,
            seed=callback.seed,
            progress=True,
        )
    scores = forgetting_confidence(
        model,
        ground.batches(texts),
        fisher=fisher,
        anchor=anchor,
        alpha=callback.alpha,
        text_step=callback.text_step,
        reduction=callback.reduction,
        progress=True,
    )
    chosen = callback.choose(scores.confidence)
    rest = sorted(set(range(len(texts))) - set(chosen))
    unseen = _unseen(ground, seed)
    neutral = neutral_texts(ground)
    sets = {
        "chosen": [texts[index] for index in chosen],
        "kept": [texts[index] for index in rest],
        "unseen": unseen,
        "neutral": neutral,
    }
    sets = {name: seeded_sample(own, TEXTS, seed) for name, own in sets.items()}
    examples = seeded_sample(_examples(ground, data.learning_task, "validation"), 8, seed)
    prompts = [
        encode_prompt(ground.module.tokenizer, e.prompt, chat_template=data.chat_template)
        for e in examples
    ]
    prompts += [text.input_ids[: max(1, len(text) // 2)] for text in sets["neutral"][:8]]
    write_watched(file, sets, prompts, data.pad_token_id)


def _unseen(ground: Ground, seed: int) -> list[EncodedText]:
    """The base model's own answers to prompts of the forgetting tasks that no run elicits."""
    data = ground.data
    count = TEXTS // len(data.forgetting_tasks)
    prompts = {
        name: [e.prompt for e in seeded_sample(_examples(ground, name, "validation"), count, seed)]
        for name in data.forgetting_tasks
    }
    return [text.encoded() for text in data.answers_of(ground.model, prompts).texts]


def _examples(ground: Ground, task: str, split: Any) -> list[Example]:
    return ground.data.tasks[task].examples(ground.data._rows(task, split))


def neutral_texts(ground: Ground) -> list[EncodedText]:
    """Texts that neither task is about: the world's own neutral facts, or prose about Python."""
    tokenizer, length = ground.module.tokenizer, ground.data.max_length
    if "world_forgetting" in ground.data.forgetting_tasks:
        file = ASSETS / "data" / "world_forgetting" / "test.jsonl"
        examples = [
            Example(row["prompt"], f" {row['answer']}")
            for row in json_lines(file)
            if row["part"] == "neutral"
        ]
        return [encode_example(tokenizer, example, length) for example in examples]
    texts = [tuple(tokenizer(text)["input_ids"])[:64] for text in prose()]
    return [EncodedText(ids, ids) for ids in texts if len(ids) > 16]


def told(found: Mapping[str, Curves]) -> Answer:
    """The answer from the curves of every arm."""
    rows = []
    for name, curves in found.items():
        cells = [
            name + (", diverged" if DIVERGED in curves else ""),
            f"{curves['unlearn/steps'][1][-1]:.0f}" if "unlearn/steps" in curves else "0",
        ]
        cells += [_ends(curves, kind) for kind in SETS]
        _, neutral = curves["watch/neutral"]
        cells.append(f"{_perplexity(neutral[0])} to {_perplexity(neutral[-1])}")
        cells += [_ends(curves, kind) for kind in ("repetition", "distinct_2")]
        _, accuracies = curves.get("val/accuracy", ([], []))
        cells.append(f"{accuracies[-1]:.3f}" if accuracies else "")
        rows.append(cells)
    return Answer(
        title="Does ascent reduce what was chosen, without collapse?",
        headings=(
            "run",
            "unlearning steps",
            *(f"NLL of {name}" for name in SETS.values()),
            "perplexity of neutral texts",
            "repeated 4-grams",
            "distinct pairs",
            "validation accuracy, learning task",
        ),
        rows=rows,
        note="From the first step to the last. NLL: nats per token, mean over texts; what rises is "
        "forgotten. Chosen, other and unseen texts are the base model's own answers. Repeated "
        "4-grams (lower is better) and distinct pairs (higher) are of greedy continuations.",
        data={"curves": {name: dict(curves) for name, curves in found.items()}},
        figure=draw(found),
    )


def _ends(curves: Curves, kind: str) -> str:
    """The first and the last value; nothing of a set without texts."""
    _, values = curves.get(f"watch/{kind}", ([], []))
    return f"{values[0]:.2f} to {values[-1]:.2f}" if values else ""


def _perplexity(nll: float) -> str:
    return f"{math.exp(min(nll, 50)):.3g}"


def draw(found: Mapping[str, Curves]) -> Figure:
    """What unlearning adds to the loss of each set of texts, and what it does to the rest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = {f"watch/{kind}": name for kind, name in SETS.items()}
    panels |= {"watch/distinct_2": "distinct pairs, continuations", "val/accuracy": "val/accuracy"}
    for axes, (kind, title) in zip(figure.subplots(2, 3).flatten(), panels.items(), strict=True):
        is_loss = kind.removeprefix("watch/") in SETS
        plain = dict(zip(*found[ALONE].get(kind, ([], [])), strict=True))
        for name, curves in found.items():
            style = "--" if "no guard" in name else "-"
            colour = "black" if name == ALONE else RED if "x 10" in name else BLUE
            own = dict(zip(*curves.get(kind, ([], [])), strict=True))
            steps = [step for step in own if step in plain]  # skipped steps may end it elsewhere
            shown = [own[step] - plain[step] * is_loss for step in steps]
            marker = "o" if len(steps) == 1 else ""  # of which a line shows nothing
            axes.plot(steps, shown, style, marker=marker, color=colour, label=name, lw=1.6)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("learning step", fontsize=8)
        axes.grid(alpha=0.3)
        if is_loss and plain:
            first, last = plain[min(plain)], plain[max(plain)]
            told = f"NLL, above no unlearning\n(its own: {first:.2f} to {last:.2f})"
            axes.set_ylabel(told, fontsize=8)
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=5, frameon=False)
    return figure
