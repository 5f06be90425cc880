"""The command line, a LightningCLI."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lwf_lightning.cli_errors import OneLineErrorParser, clear_errors, plain_warnings
from lwf_lightning.datamodule import LWFDataModule
from lwf_lightning.files import whole_file
from lwf_lightning.module import LWFModule
from lwf_lightning.trainer import LWFTrainer

if TYPE_CHECKING:
    import lightning as L


# Lightning's own text is of a trainer that has just fitted, and of words that mean nothing here.
_CKPT_PATH_OF_FIT = (
    "A checkpoint to go on from, file or sharded one's folder; ``last`` goes on with the newest "
    "run of this configuration in its own folder, or begins one."
)
_CKPT_PATH = (
    "A checkpoint, a file or a sharded one's folder; ``last`` for that of the newest run of this "
    "configuration. Without it the subcommand evaluates the base model."
)


class SaveFitConfig(SaveConfigCallback):
    """Saves the configuration of a fit only; validate or score would overwrite a fit's."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Writes ``config.yaml`` into the run folder, whole; a resumed run's last one stays."""
        if stage != "fit":
            return
        folder = Path(str(trainer.log_dir))  # on every process: it waits for the others
        if trainer.is_global_zero:
            config = self.config.clone()
            # Where this run went on from is no part of it: the file begins the same run anew.
            config.pop("ckpt_path", None)
            with whole_file(folder / self.config_filename) as temporary:
                self.parser.save(
                    config, str(temporary), skip_none=False, overwrite=True, multifile=False
                )


class LWFCLI(LightningCLI):
    """LightningCLI with ``elicit``, ``score``, ``estimate`` and ``export`` of LWFTrainer."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ours; the named arguments come from the CLI itself."""
        names = ("elicit", "score", "estimate", "export")
        ours = {name: {"model", "datamodule"} for name in names}
        return {**LightningCLI.subcommands(), **ours}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of LightningCLI; runs the subcommand that they name."""
        given = sys.argv[1:] if kwargs.get("args") is None else kwargs["args"]
        first = given[0] if isinstance(given, list) and given else None
        self._named = first if first in self.subcommands() else None
        super().__init__(*args, **kwargs)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Leaves the others than the named one empty: to look up all their options takes time."""
        if self._named not in (None, subcommand):
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest == "ckpt_path" and subcommand in LightningCLI.subcommands():
                action.help = _CKPT_PATH_OF_FIT if subcommand == "fit" else _CKPT_PATH
        return parser

    def after_fit(self) -> None:
        """Says where the run is."""
        if folder := self.trainer.log_dir:  # asked for on every process
            rank_zero_info(f"The run is in {folder}")

    def _parse_ckpt_path(self) -> None:
        """Keeps the configuration: hyperparameters in a checkpoint would silently override it."""


def main(args: list[str] | None = None) -> LWFCLI:
    """Runs the command line.

    Args:
        args: Arguments instead of ``sys.argv[1:]``.
    """
    _quieten_lightning()
    with clear_errors(), plain_warnings():
        return LWFCLI(
            LWFModule,
            LWFDataModule,
            trainer_class=LWFTrainer,
            parser_class=OneLineErrorParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveFitConfig,
            seed_everything_default=0,
            args=args,
        )


def _quieten_lightning() -> None:
    """Keeps out of the log what only advertises, and warnings that no user can act on.

    Those are about Lightning's own code, about arguments that a demo or a study passes on purpose,
    and about an option of PEFT that jsonargparse fills in.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message="`loftq_config` specified but will be ignored")


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in str(record.msg)
