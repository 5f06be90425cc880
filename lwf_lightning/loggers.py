"""The two loggers of a run folder; a resumed run cuts them back to where its checkpoint was."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from lwf_lightning.files import full_disk_named, whole_file

_EVENTS = "events.out.tfevents.*"


class TableLogger(CSVLogger):
    """Lightning's CSV logger that never loses a row of ``metrics.csv``, and can be cut back."""

    def __init__(self, save_dir: str | Path, version: int | str | None = None) -> None:
        """Logs to ``metrics.csv`` in ``<save_dir>/version_<n>``."""
        super().__init__(str(save_dir), name="", version=version)
        self._kept: int | None = None

    def continue_run(self, folder: Path, position: dict[str, Any]) -> None:
        """Goes on in another run's folder, after as many rows as :meth:`position` once said."""
        self._experiment = None
        self._version = folder.name
        self._kept = position.get("rows", 0)

    @property
    def experiment(self) -> Any:
        """The writer of the table."""
        if self._experiment is None and _is_first():
            writer = _TableWriter(self.log_dir)
            if self._kept is not None:
                writer.cut(self._kept)
            self._experiment = cast(Any, writer)
        return super().experiment

    def position(self) -> dict[str, Any]:
        """How many rows there are."""
        self.save()
        return {"rows": self.experiment.rows}

    @rank_zero_only
    def save(self) -> None:
        """Writes what was logged since the last time."""
        with full_disk_named(self.experiment.metrics_file_path):
            super().save()


class _TableWriter(ExperimentWriter):
    """Counts the rows; rewrites the file for a new column whole or not at all."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.rows = 0

    def log_hparams(self, params: dict[str, Any]) -> None:
        self.hparams.update(params)
        _write_hyperparameters(self.log_dir, self.hparams)

    def save(self) -> None:
        new = len(self.metrics)
        super().save()
        self.rows += new

    def cut(self, rows: int) -> None:
        """Keeps the first ``rows`` rows of an earlier process, and the columns that they fill."""
        path = Path(self.metrics_file_path)
        if not path.exists():
            return
        with path.open(newline="", encoding="utf-8") as file:
            kept = [row for _, row in zip(range(rows), csv.DictReader(file), strict=False)]
        self.rows = len(kept)
        self.metrics_keys = sorted({key for row in kept for key, value in row.items() if value})
        if kept:
            self._write(kept)
        else:
            path.unlink()

    def _check_log_dir_exists(self) -> None:
        """Lightning's would delete an earlier process's rows here."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with Path(self.metrics_file_path).open(newline="", encoding="utf-8") as file:
            self._write(list(csv.DictReader(file)))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with (
            whole_file(self.metrics_file_path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


class BoardLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger that can be cut back to where it was."""

    def __init__(self, save_dir: str | Path, version: int | str | None = None) -> None:
        """Logs TensorBoard events to ``<save_dir>/version_<n>``."""
        super().__init__(str(save_dir), name="", version=version)
        self._kept: dict[str, int] | None = None

    def continue_run(self, folder: Path, position: dict[str, Any]) -> None:
        """Goes on in another run's folder, with what :meth:`position` once found there."""
        if self._experiment is not None:
            self._experiment.close()
        self._experiment = None
        self._version = folder.name
        self._kept = position.get("files", {})

    @property
    def experiment(self) -> Any:
        """The SummaryWriter."""
        if self._experiment is None and self._kept is not None and _is_first():
            for file in Path(self.log_dir).glob(_EVENTS):
                size = self._kept.get(file.name, 0)
                if size == 0:
                    file.unlink()
                elif file.stat().st_size > size:
                    with file.open("r+b") as events:
                        events.truncate(size)
        return super().experiment

    def position(self) -> dict[str, Any]:
        """The files of events, and how long they are."""
        self.experiment.flush()
        return {"files": {f.name: f.stat().st_size for f in Path(self.log_dir).glob(_EVENTS)}}

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Logs hyperparameters, once per run."""
        if not self._kept:
            super().log_hyperparams(*args, **kwargs)

    @rank_zero_only
    def save(self) -> None:
        """Writes what was logged since the last time."""
        with full_disk_named(self.log_dir):
            self.experiment.flush()
        if not (Path(self.log_dir) / self.NAME_HPARAMS_FILE).exists():
            _write_hyperparameters(self.log_dir, dict(self.hparams))


def _write_hyperparameters(folder: str, values: dict[str, Any]) -> None:
    with whole_file(Path(folder) / TensorBoardLogger.NAME_HPARAMS_FILE) as temporary:
        save_hparams_to_yaml(temporary, values)


def _is_first() -> bool:
    """Whether this process is the one that logs."""
    return getattr(rank_zero_only, "rank", 0) == 0
