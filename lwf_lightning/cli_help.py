"""The command line's own help and its answer to a wrong subcommand, before anything is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

SUBCOMMANDS = {
    "fit": "fine-tune on the learning task while the forgetting tasks are unlearned",
    "validate": "accuracy on the validation split of each task",
    "test": "accuracy on the test split of each task",
    "predict": "the model's own answers beside the right ones, into predictions.jsonl",
    "elicit": "the base model's answers to the forgetting prompts (D_self), as JSONL",
    "score": "D_self with the forgetting confidence of each text, as JSONL",
    "estimate": "the memory that a run of this configuration takes, before anything is loaded",
    "export": "the model of a checkpoint, sharded or not, as transformers and peft load it",
    "study": "methods compared over tasks and seeds: tables, figures and one HTML page",
}
"""What each does, in the order of :meth:`~lwf_lightning.cli.LWFCLI.subcommands`; a study is no fit
of its own and comes last."""

HELP = """\
usage: python cli.py SUBCOMMAND [options]

Learning With Forgetting: fine-tune a language model while it forgets what stands in the way.

subcommands:
{subcommands}

examples:
  python cli.py fit --config configs/world.yaml        a tiny model: under a minute on a CPU
  python cli.py fit --config configs/world.yaml --model.init_args.learning_rate 1e-3
  python cli.py score --config configs/world.yaml --output scores.jsonl

more:
  python cli.py fit --help                                     all options of a subcommand
  python cli.py fit --model.help lwf_lightning.LWFModule       those of the model
  python cli.py fit --data.help lwf_lightning.LWFDataModule    those of the data
  python cli.py fit --config FILE --print_config               the configuration with its defaults
  configs/ for whole configurations, docs/ for the method, tasks, metrics and memory
"""


def help_text() -> str:
    """What ``--help`` prints."""
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {does}" for name, does in SUBCOMMANDS.items()]
    return HELP.format(subcommands="\n".join(lines))


def answer_at_once(arguments: Sequence[str]) -> None:
    """Exits with the help or an error where the first argument asks for no more than that.

    Lightning takes seconds to import, which a typing mistake should not cost.

    Args:
        arguments: Those of the command line, without the program's name.

    Raises:
        SystemExit: With status 0 after the help that was asked for, else with 2.
    """
    if not arguments:
        sys.stderr.write(help_text())
        raise SystemExit(2)
    first = arguments[0]
    if first in ("-h", "--help"):
        sys.stdout.write(help_text())
        raise SystemExit(0)
    if not first.startswith("-") and first not in SUBCOMMANDS:
        close = get_close_matches(first, SUBCOMMANDS, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        fail(f"there is no subcommand {first!r}{meant}", "all subcommands: python cli.py --help")


def fail(message: str, tip: str = "", *, status: int = 2) -> NoReturn:
    """Prints an error and perhaps a tip to stderr, and exits."""
    sys.stderr.write(f"error: {message}\n" + (f"{tip}\n" if tip else ""))
    raise SystemExit(status)
