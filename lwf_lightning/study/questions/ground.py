"""What a question is asked of: the model and the tasks of an ordinary configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import yaml
from torch import Tensor

from lwf_lightning.callbacks.fisher import FisherCallback
from lwf_lightning.callbacks.refresh_data import probe_batches
from lwf_lightning.data.batch import Batch, EncodedText, batches_of
from lwf_lightning.data.sampler import batches_per_pass
from lwf_lightning.forgetting.anchor import probe_anchor
from lwf_lightning.generation import evaluation_mode
from lwf_lightning.losses import per_text_loss
from lwf_lightning.study.check import ConfigReader
from lwf_lightning.study.length import batches_of_epoch, steps_of
from lwf_lightning.study.overlay import overlaid

if TYPE_CHECKING:
    from lwf_lightning.datamodule import LWFDataModule
    from lwf_lightning.module import LWFModule


@dataclass(frozen=True)
class Ground:
    """A model at its base weights, and its tasks, set up as a fit would set them up.

    Attributes:
        config: The whole configuration, as a fit takes it.
        module: The module; it holds ``model`` once :meth:`prepare` has run.
        data: The datamodule.
        callback: The configuration's FisherCallback.
    """

    config: dict[str, Any]
    module: LWFModule
    data: LWFDataModule
    callback: FisherCallback

    def prepare(self) -> None:
        """Loads the model and the texts."""
        self.module.configure_model()
        self.data.tokenizer = self.module.tokenizer
        self.data.setup("fit")

    @property
    def model(self) -> torch.nn.Module:
        """The language model."""
        return cast(torch.nn.Module, self.module.model)

    def batches(self, texts: Sequence[EncodedText]) -> list[Batch]:
        """Texts in batches of the callback's size, in order."""
        return list(batches_of(texts, self.callback.batch_size, self.data.pad_token_id))

    def losses(self, texts: Sequence[EncodedText]) -> list[float]:
        """Mean negative log-likelihood of each text's labelled tokens, in nats per token."""
        with torch.no_grad(), evaluation_mode(self.model):
            parts = [per_text_loss(self.model, batch) for batch in self.batches(texts)]
        return [float(value) for part in parts for value in part]

    def steps(self) -> int:
        """Learning steps of a fit; the texts are set up where its length goes by them."""
        settings = {"max_steps": -1, "max_epochs": None, **self.config["trainer"]}
        if settings["max_epochs"] is None and settings["max_steps"] > 0:
            return int(settings["max_steps"])
        if not self.data.learning_encoded:
            self.prepare()
        texts = len(self.data.learning_encoded)
        batches = batches_per_pass(texts, self.data.batch_size)
        return steps_of(settings, batches_of_epoch(settings, batches))

    def need_probe(self) -> None:
        """Refuses what has no weights that solve the learning task before a run.

        Raises:
            ValueError: If the callback's anchor is ``online``.
        """
        if self.callback.anchor != "probe":
            raise ValueError(
                f"FisherCallback.anchor: this question scores by a probe, got "
                f"{self.callback.anchor!r}: --set trainer.callbacks.FisherCallback.anchor=probe "
                "trainer.callbacks.FisherCallback.refresh_interval=null"
            )

    def anchor(self, seed: int) -> dict[str, Tensor]:
        """theta*_L: the probe that the callback would make."""
        rate = self.callback.probe_learning_rate or self.module.hparams["learning_rate"]
        steps, size = self.callback.probe_steps, self.callback.probe_batch_size
        batches = probe_batches(self.data, steps, size, seed)
        return probe_anchor(self.model, batches, learning_rate=rate, progress=True)


def load_ground(path: Path, changes: Mapping[str, Any]) -> Ground:
    """Parses a configuration as ``fit`` does; nothing is loaded yet.

    Args:
        path: A configuration with an LWFModule, an LWFDataModule and a FisherCallback.
        changes: Path -> value, see :func:`~lwf_lightning.study.overlay.overlaid`.

    Raises:
        ValueError: If the file is missing, or the configuration is not accepted.
    """
    if not path.is_file():
        raise ValueError(f"--config: {path} does not exist")
    config = overlaid(yaml.safe_load(path.read_text(encoding="utf-8")), changes)
    made = ConfigReader().read(config)
    found = [one for one in made.trainer.callbacks or [] if isinstance(one, FisherCallback)]
    if not found:
        raise ValueError(f"--config: {path} names no FisherCallback among trainer.callbacks")
    return Ground(config, made.model, made.data, found[0])
