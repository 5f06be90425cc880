"""Every shipped configuration is parsed by the real command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lwf_lightning.cli import main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_says_what_it_shows_how_long_it_takes_and_what_it_needs(path: Path) -> None:
    opening = path.read_text().split("\nseed_everything", 1)[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    for word in ("Shows:", "Takes:", "Needs:"):
        assert word in opening
