r"""Answers a question about the method on the model and the tasks of a configuration.

    python -m lwf_lightning.study.questions fisher --config configs/world.yaml
    python -m lwf_lightning.study.questions self_knowledge --config configs/smollm2_qasc.yaml \
        --set data.data_dir=../shared/data data.forgetting_prompts=48

It writes answer.md, answer.png and answer.json into <output>/<question>-<configuration>, or, with
another seed or changes, into a folder of their own in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lwf_lightning.cli_errors import clear_errors
from lwf_lightning.study.matrix import digest_of
from lwf_lightning.study.questions import ascent, fisher, self_knowledge
from lwf_lightning.study.questions.answer import Answer
from lwf_lightning.study.questions.ground import Ground, load_ground

QUESTIONS: dict[str, Callable[[Ground, int, Path], Answer]] = {
    "self_knowledge": self_knowledge.answer,
    "fisher": fisher.answer,
    "ascent": ascent.answer,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Answers a question."""
    parser = argparse.ArgumentParser(
        prog="python -m lwf_lightning.study.questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("question", choices=sorted(QUESTIONS))
    parser.add_argument("--config", type=Path, required=True, help="configuration of a fit")
    parser.add_argument("--set", nargs="+", default=[], metavar="PATH=VALUE", help="changes to it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/questions"))
    options = parser.parse_args(arguments)
    console = Console()
    with clear_errors():
        ground = load_ground(options.config, read_changes(options.set, options.seed))
        folder = options.output / f"{options.question}-{options.config.stem}"
        answer = QUESTIONS[options.question](ground, options.seed, folder)
        if options.set or options.seed:
            folder /= digest_of([options.seed, sorted(options.set)])
        how = {"question": options.question, "seed": options.seed, "set": options.set}
        answer.save(folder, how)
    console.print(answer.markdown(), soft_wrap=True, highlight=False, markup=False)
    console.print(f"Written: {folder}/answer.md, .png, .json", soft_wrap=True)


def read_changes(given: Sequence[str], seed: int) -> dict[str, Any]:
    """Changes by path, values as YAML has them, and the seed of run, data and module.

    Callbacks keep their own, as in a study.

    Raises:
        ValueError: If one has no ``=``.

    Example:
        >>> read_changes(["model.ahead_steps=4"], seed=1)["model.ahead_steps"]
        4
    """
    changes: dict[str, Any] = {"seed_everything": seed, "data.seed": seed, "model.seed": seed}
    for text in given:
        path, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set: {text!r} is not of the form PATH=VALUE")
        changes[path] = yaml.safe_load(value)
    return changes


if __name__ == "__main__":
    main()
