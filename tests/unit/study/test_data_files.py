"""Records of runs whose data files were changed since are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lwf_lightning.study.data_files import data_digests, told_of_changed
from lwf_lightning.tasks import TaskFields


def test_records_whose_data_were_changed_are_named(make_data, data_folder, tmp_path: Path) -> None:
    shutil.copytree(data_folder / "learn", tmp_path / "mine")
    fields = TaskFields(choices="choices", label="label", folder=str(tmp_path / "mine"))
    data = make_data(custom_tasks={"learn": fields, "forget": TaskFields()})
    found = data_digests(data)
    folders = (tmp_path / "mine", data_folder / "forget")
    splits = ("train", "validation", "test")
    assert list(found) == [str(folder / f"{split}.jsonl") for folder in folders for split in splits]
    records = [{"run": "a", "data": found}, {"run": "b"}]
    assert told_of_changed(records) == []
    changed = tmp_path / "mine" / "test.jsonl"
    changed.write_text(changed.read_text() + "\n")
    (told,) = told_of_changed(records)
    assert told.startswith(f"Warning: {changed} changed since 1 runs were recorded")
    assert ": a. To do" in told
    shutil.rmtree(tmp_path / "mine")  # a study may be looked at elsewhere
    assert told_of_changed(records) == []


def test_a_task_of_the_hub_has_no_files(make_data) -> None:
    assert data_digests(make_data(source="hub")) == {}


def test_files_below_the_current_folder_are_named_from_there(
    make_data, data_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(data_folder, tmp_path / "mine"))
    found = data_digests(make_data(data_dir=str(Path.cwd())))
    assert "learn/train.jsonl" in found
    assert not any(Path(name).is_absolute() for name in found)
    assert told_of_changed([{"run": "a", "data": found}]) == []
    Path("learn/train.jsonl").write_text("")
    assert "learn/train.jsonl changed" in told_of_changed([{"run": "a", "data": found}])[0]
