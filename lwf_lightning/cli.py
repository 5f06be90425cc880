"""The command line, a LightningCLI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from lwf_lightning.cli_errors import OneLineErrorParser, clear_errors
from lwf_lightning.datamodule import LWFDataModule
from lwf_lightning.module import LWFModule
from lwf_lightning.trainer import LWFTrainer

if TYPE_CHECKING:
    import lightning as L


class SaveFitConfig(SaveConfigCallback):
    """Saves the configuration of a fit only; validate or score would overwrite a fit's."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """See SaveConfigCallback."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class LWFCLI(LightningCLI):
    """LightningCLI with the subcommands ``elicit`` and ``score`` of :class:`LWFTrainer`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ours; the named arguments come from the CLI itself."""
        ours = {name: {"model", "datamodule"} for name in ("elicit", "score")}
        return {**LightningCLI.subcommands(), **ours}

    def _parse_ckpt_path(self) -> None:
        """Keeps the configuration: hyperparameters in a checkpoint would silently override it."""


def main(args: list[str] | None = None) -> LWFCLI:
    """Runs the command line.

    Args:
        args: Arguments instead of ``sys.argv[1:]``.
    """
    with clear_errors():
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
