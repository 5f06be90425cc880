"""Every shipped configuration is parsed by the real command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lwf_lightning.cli import main
from lwf_lightning.study.command import main as study_command

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(path.read_text())
    for part in ("model", "data"):
        for name, value in written[part]["init_args"].items():
            if not isinstance(value, dict):
                assert printed[part]["init_args"][name] == value


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_runs_of_a_study_are_listed(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    study_command(["--config", str(path), "--output", str(ROOT / "runs" / "none"), "--list"])
    listed = capsys.readouterr().out.splitlines()
    written = yaml.safe_load(path.read_text())
    assert len(listed) == len(written["methods"]) * len(written["cells"]) * len(written["seeds"])


@pytest.mark.parametrize("path", [*CONFIGS, *STUDIES], ids=lambda path: path.stem)
def test_says_what_it_shows_how_long_it_takes_and_what_it_needs(path: Path) -> None:
    lines = path.read_text().splitlines()
    opening = "\n".join(lines[: next(n for n, line in enumerate(lines) if line[:1] != "#")])
    for word in ("Shows:", "Takes:", "Needs:"):
        assert word in opening
