"""Vanilla fine-tuning, LWF and the clean twin on the embedded world, compared.

``python -m lwf_lightning.demo``: three ordinary runs of the command line, a table and a picture.
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lwf_lightning.cli import main as command_line
from lwf_lightning.demo.report import DemoRun, draw, save_rows, verdict
from lwf_lightning.demo.world import ASSETS
from lwf_lightning.forgetting.planted import confidence_by_part

# Learning rate and steps of each are tuned for it: configs/studies/world_methods.yaml, and of the
# twin benchmarks/world_gap.py.
PLAIN = [
    *("--model.init_args.schedule", "never", "--model.init_args.regularizer", "null"),
    *("--model.init_args.regularizer_options", "null"),
]
RUNS = {
    "vanilla": [
        *("--model.init_args.learning_rate", "2.4e-3", "--trainer.max_steps", "60", *PLAIN),
    ],
    "LWF": [],
    "clean twin": [
        *("--model.init_args.model_name", "world-twin"),
        *("--model.init_args.learning_rate", "6e-4", "--trainer.max_steps", "60", *PLAIN),
    ],
}


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(prog="python -m lwf_lightning.demo", description=__doc__)
    parser.add_argument("--config", default="configs/world.yaml", help="configuration of each run")
    parser.add_argument("--output", default="runs/demo", help="folder of the demo's runs")
    parser.add_argument("--seed", default="0", help="seed of the order of batches")
    arguments = parser.parse_args()
    folder = next(path for n in count() if not (path := Path(arguments.output) / str(n)).exists())
    console = Console()
    runs = []
    for name, options in RUNS.items():
        console.rule(name)
        cli = command_line(
            [
                *("fit", "--config", arguments.config, *options),
                *("--trainer.default_root_dir", str(folder / name.replace(" ", "_").lower())),
                *("--seed_everything", arguments.seed, "--data.init_args.seed", arguments.seed),
            ]
        )
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        figures = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
        runs.append(DemoRun(name, Path(str(cli.trainer.log_dir)), figures))

    scores = confidence_by_part(
        next(run.folder for run in runs if run.name == "LWF"),
        ASSETS / "data" / "world_forgetting" / "train.jsonl",
    )
    picture = folder / "demo.png"
    draw(runs, scores, picture)
    save_rows(runs, folder / "results.jsonl")
    console.print()
    console.print(_table(runs))
    vanilla, lwf, twin = (run.test["test/accuracy"] for run in runs)
    console.print(f"{verdict(vanilla, lwf, twin)} (one seed; see docs/results.md for several).")
    console.print(f"Area under the ROC curve of 'outdated' by confidence: {scores.area:.2f}")
    console.print(f"Run folder: {folder}", soft_wrap=True)
    console.print(f"Picture:    {picture}", soft_wrap=True)


def _table(runs: list[DemoRun]) -> Table:
    table = Table(title="Test accuracy on the embedded world")
    table.add_column("run")
    table.add_column("learning task (higher is better)", justify="right")
    table.add_column("forgetting task (lower: more forgotten)", justify="right")
    for run in runs:
        learning = run.test["test/accuracy"]
        forgetting = run.test["test/accuracy_world_forgetting"]
        table.add_row(run.name, f"{learning:.3f}", f"{forgetting:.3f}")
    return table


if __name__ == "__main__":
    main()
