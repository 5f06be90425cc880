"""``cli.py study --check``: every run parsed by the real command line, and what it will take."""

from __future__ import annotations

import json
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lwf_lightning.cli import LWFCLI
from lwf_lightning.cli_errors import OneLineErrorParser, one_line
from lwf_lightning.datamodule import LWFDataModule
from lwf_lightning.memory_report import size
from lwf_lightning.module import LWFModule
from lwf_lightning.study.config import Study
from lwf_lightning.study.expected import DECODING_PASSES, Expected, expected, model_of
from lwf_lightning.study.matrix import Run
from lwf_lightning.study.overlay import overlaid
from lwf_lightning.study.tables import markdown_table
from lwf_lightning.trainer import LWFTrainer

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from lightning.pytorch.cli import LightningArgumentParser


HEADINGS = (
    "method",
    "learning task",
    "runs",
    "steps",
    "time of a run",
    "time in all",
    "memory (fullest phase)",
)
_OF_THE_MODEL = ("model_name", "dtype", "lora", "trust_remote_code")


class _ParsingCLI(LWFCLI):
    """The command line's parser, with nothing run: a trainer would ask for its devices."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the configuration, whatever stands on this process's command line."""
        self.config = parser.parse_object(args)

    def take(self, config: Namespace) -> None:
        """Has modules made from now on know these as their arguments."""
        self.config = config
        vars(self).pop("config_dump", None)  # Lightning makes it once

    def _set_seed(self) -> None:
        """Leaves the random state as it is."""

    def instantiate_classes(self) -> None:
        """Leaves that to :class:`ConfigReader`."""


@dataclass(frozen=True)
class Checked:
    """A run and the prediction for it."""

    run: Run
    task: str
    expected: Expected


class ConfigReader:
    """Reads configurations as ``fit`` does; neither devices nor models are asked for."""

    def __init__(self) -> None:
        self._cli: Any = None

    def read(self, config: Mapping[str, Any]) -> Namespace:
        """Parses a configuration and makes its module and datamodule.

        Returns:
            ``model``, ``data`` and ``trainer``, callbacks instantiated.

        Raises:
            ValueError: If it is not accepted; names the flag.
        """
        try:
            if self._cli is None:  # it parses one configuration as it is made
                self._cli = _parsing_cli(config)
            # Parsing writes into what it is given.
            self._cli.take(self._cli.parser.parse_object(overlaid(config, {})))
            return self._cli.parser.instantiate_classes(self._cli.config)  # type: ignore[no-any-return]
        except (ArgumentError, ValueError, TypeError) as error:
            raise ValueError(one_line(str(error))) from error


def _parsing_cli(config: Mapping[str, Any]) -> _ParsingCLI:
    return _ParsingCLI(
        LWFModule,
        LWFDataModule,
        trainer_class=LWFTrainer,
        parser_class=OneLineErrorParser,
        parser_kwargs={"exit_on_error": False},
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        run=False,
        args=overlaid(config, {}),
    )


def parsed(runs: Iterable[Run]) -> Iterator[tuple[Run, Namespace]]:
    """Reads every run's configuration.

    Yields:
        Each run with what :meth:`ConfigReader.read` made of it.

    Raises:
        ValueError: If a configuration is not accepted; names the run, and the flag.
    """
    reader = ConfigReader()
    for run in runs:
        try:
            yield run, reader.read(run.config)
        except ValueError as error:
            raise ValueError(f"{run.identity}: {error}") from error


def check(study: Study, runs: Sequence[Run], data_dir: str | None = None) -> Iterator[Checked]:
    """Checks runs one by one; those that differ in their seed alone are predicted once.

    Args:
        study: The study.
        runs: Its runs.
        data_dir: Folder that holds one folder per task, instead of where the study takes them.

    Raises:
        ValueError: If a configuration is not accepted, or texts or a model's architecture
            cannot be found.
    """
    known: dict[str, Expected] = {}
    models: dict[str, Any] = {}  # on the meta device; making one takes as long as all the rest
    for run, config in parsed(runs):
        same = overlaid(run.config, {"seed_everything": 0, "data.seed": 0, "model.seed": 0})
        key = json.dumps(same, sort_keys=True, default=str)
        if key not in known:
            if data_dir is not None:
                config.data.data_dir, config.data.source = data_dir, "local"
            which = json.dumps([config.model.hparams[name] for name in _OF_THE_MODEL], default=str)
            if which not in models:
                models[which] = model_of(config.model)
            known[key] = expected(config.model, config.data, config.trainer, models[which])
        yield Checked(run, config.data.learning_task, known[key])


def table(study: Study, checked: Iterable[Checked], flops: float) -> list[str]:
    """A row per method and learning task: time and memory of a run, and time in all."""
    rows: dict[tuple[str, str], list[Checked]] = {}
    for one in checked:
        rows.setdefault((one.run.method, one.task), []).append(one)
    cells = []
    for (method, task), own in rows.items():
        hours = [one.expected.work.hours(one.expected.parameters, flops) for one in own]
        top = max((one.expected for one in own), key=lambda found: found.memory)
        steps = [one.expected.steps for one in own]
        row = [study.label(method), task, str(len(own)), _span(str(min(steps)), str(max(steps)))]
        row += [
            _span(_time(min(hours)), _time(max(hours))),
            _time(sum(hours)),
            f"{size(top.memory)} ({top.phase})",
        ]
        cells.append(row)
    return markdown_table(HEADINGS, cells)


def summary(checked: Sequence[Checked], flops: float) -> list[str]:
    """Totals, and what they assume."""
    runs = sum(one.expected.work.hours(one.expected.parameters, flops) for one in checked)
    # The first run to need a pool elicits it for all.
    elicited: dict[str, Expected] = {}
    for one in checked:
        elicited.setdefault(one.expected.pool, one.expected)
    once = sum(own.elicitation.hours(own.parameters, flops) for own in elicited.values())
    pools = len([pool for pool in elicited if pool])
    return [
        f"{len(checked)} runs, every configuration accepted: {_time(runs)} of one device, and "
        f"{_time(once)} to elicit self-knowledge from {pools} pool(s) of prompts, each once.",
        f"Times assume {flops:.3g} FLOP/s sustained (--flops), 6 FLOP per weight and token "
        f"trained on, 2 per token only read, and {DECODING_PASSES} passes a second in generation "
        "with every answer as long as it may be; activations computed again are left out. Memory "
        "is that of one device, without what its allocator keeps. For models of the Hub 4 "
        "characters count as a token.",
    ]


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _time(hours: float) -> str:
    """Hours as a person says them.

    Example:
        >>> _time(0.0001), _time(0.05), _time(12.34)
        ('0.36 s', '3 min', '12.3 h')
        >>> _time(1234), _time(9.6 / 3600)
        ('1230 h', '9.6 s')
    """
    longest = (one for one in (("h", 1.0), ("min", 1 / 60)) if hours >= one[1])
    unit, length = next(longest, ("s", 1 / 3600))
    return f"{float(f'{hours / length:.3g}'):.10g} {unit}"
