"""Each question from its command line to its three files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lwf_lightning.study.questions import ascent
from lwf_lightning.study.questions.__main__ import QUESTIONS, main


@pytest.fixture
def config(tmp_path: Path, make_config: Callable[..., Any]) -> Path:
    fisher = {"probe_steps": 2, "probe_batch_size": 4, "batch_size": 8, "save_tensors": False}
    written = make_config(
        trainer={"max_steps": 3},
        callbacks={"FisherCallback": fisher, "ValidateFirst": {}},
        model={"unlearning_interval": 1},
        data={"batch_size": 8, "max_new_tokens": 3, "cache_dir": str(tmp_path / "cache")},
    )
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(written))
    return file


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered(
    question: str,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = ascent.arms
    monkeypatch.setattr(ascent, "arms", lambda *given: dict([*every(*given).items()][:2]))
    asked = [question, "--config", str(config), "--output", str(tmp_path / "out"), "--seed", "3"]
    main([*asked, "--set", "data.learning_texts=20"])
    (written,) = (tmp_path / "out" / f"{question}-tiny").rglob("answer.md")
    folder = written.parent
    assert folder.parent.name == f"{question}-tiny"  # that of the configuration as it is stays free
    table = (folder / "answer.md").read_text()
    assert table in capsys.readouterr().out
    record = json.loads((folder / "answer.json").read_text())
    assert (record["seed"], record["set"]) == (3, ["data.learning_texts=20"])
    assert record["versions"]["torch"]
    assert (folder / "answer.png").read_bytes().startswith(b"\x89PNG")
    folder = folder.parent
    if question == "ascent":  # finished runs are not repeated
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.csv")}
        main([*asked, "--set", "data.learning_texts=20"])
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.csv")}
        assert len(before) == 2


def test_what_is_wrong_is_said_in_a_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in (
        (["--config", "none.yaml"], "error: --config: none.yaml does not exist"),
        (["--config", str(config), "--set", "data.seed"], "'data.seed' is not of the form"),
        (["--config", str(config), "--set", "model.ahead=1"], "Option 'ahead' is not accepted"),
        (["--config", str(config), "--set", "trainer.callbacks=[]"], "names no FisherCallback"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main(["fisher", *given])
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
