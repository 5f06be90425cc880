"""Every shipped configuration is parsed by the real command line."""

from __future__ import annotations

import itertools
import json
from collections import Counter
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
    listed = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    written = yaml.safe_load(path.read_text())
    runs = Counter(
        (name.rsplit("-", 2)[0], cell) for name, _, cells in listed for cell in cells.split(", ")
    )
    every = itertools.product(written["methods"], written["cells"])
    tuning = written.get("tuning")  # it comes first; what is compared is known only after it
    each = tuning["trials"] * len(tuning["seeds"]) if tuning else len(written["seeds"])
    assert runs == dict.fromkeys(every, each)


@pytest.mark.parametrize("name", ["paper_llama32_1b", "paper_llama3_8b"])
def test_the_paper_s_matrix_is_accepted_and_estimated(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    written = yaml.safe_load((ROOT / "configs" / "studies" / f"{name}.yaml").read_text())
    tasks = ["gsm8k", "qasc", "sst5", "dental", "psychol"]
    pairs = Counter(
        (cell["data.learning_task"], *sorted(cell["data.forgetting_tasks"]))
        for cell in written["cells"].values()
    )
    mixed = [(task, *sorted(other for other in tasks if other != task)) for task in tasks]
    assert pairs == Counter([*itertools.product(tasks, tasks), *mixed])

    for task in tasks:
        row: dict[str, object] = {"question": "How many are three and four?"}
        if task == "gsm8k":
            row["answer"] = "3 + 4 = 7\n#### 7"
        else:
            row |= {"choices": ["seven", "eight"], "label": 0}
        for split in ("train", "validation", "test"):
            file = tmp_path / task / f"{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text(40 * (json.dumps(row) + "\n"))
    cells = {key: written["cells"][key] for key in ("gsm8k-mixed", "qasc-qasc")}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**written, "cells": cells, "seeds": [0]}))
    study_command(["--config", str(file), "--check", "--data_dir", str(tmp_path)])
    told = capsys.readouterr().out
    assert f"\n{len(written['methods']) * len(cells)} runs, every configuration accepted" in told
    # An epoch of 40 rows is one batch of 32: the loader drops the rest.
    assert f"\n| {written['methods']['lwf']['label']} | gsm8k | 1 | 1 | " in told


@pytest.mark.parametrize("path", [*CONFIGS, *STUDIES], ids=lambda path: path.stem)
def test_says_what_it_shows_how_long_it_takes_and_what_it_needs(path: Path) -> None:
    lines = path.read_text().splitlines()
    opening = "\n".join(lines[: next(n for n, line in enumerate(lines) if line[:1] != "#")])
    for word in ("Shows:", "Takes:", "Needs:"):
        assert word in opening
