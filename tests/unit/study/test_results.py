"""Records survive crashes and several writers."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from lwf_lightning.files import locked
from lwf_lightning.study.results import append_record, read_records


def _append_many(path: Path, writer: int) -> None:
    for number in range(50):
        append_record(path, {"run": f"{writer}-{number}", "text": "x" * 500})


def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(path, n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_records(path)) == 150


def test_a_line_cut_short_is_replaced_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_record(path, {"run": "a"})
    with path.open("a") as file:
        file.write('{"run": "b", "fig')
    assert [record["run"] for record in read_records(path)] == ["a"]
    append_record(path, {"run": "c"})
    assert [record["run"] for record in read_records(path)] == ["a", "c"]


def test_a_long_cut_line_is_removed_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_record(path, {"run": "a"})
    with path.open("a") as file:
        file.write("y" * 200_000)
    append_record(path, {"run": "b"})
    assert [record["run"] for record in read_records(path)] == ["a", "b"]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"run": "a"}\nnonsense\n{"run": "b"}\n')
    with pytest.raises(ValueError, match=r"results\.jsonl: line 2 is damaged"):
        read_records(path)


def test_the_newest_record_of_a_run_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for value in (1, 2):
        append_record(path, {"run": "a", "value": value})
    assert read_records(path) == [{"run": "a", "value": 2}]
    assert read_records(tmp_path / "none.jsonl") == []


def test_a_claimed_run_is_left_alone(tmp_path: Path) -> None:
    claim = tmp_path / "claim.lock"
    with locked(claim, wait=False) as first, locked(claim, wait=False) as second:
        assert first
        assert not second
    with locked(tmp_path / "claim.lock", wait=False) as third:
        assert third


def test_a_last_line_without_an_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"run": "a"}\n\n{"run": "b", "text": "' + "x" * 70_000 + '"}')  # an editor's
    assert [record["run"] for record in read_records(path)] == ["a", "b"]
    append_record(path, {"run": "c"})
    assert [record["run"] for record in read_records(path)] == ["a", "b", "c"]


def test_a_first_line_cut_short_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"run": "a"')
    append_record(path, {"run": "b"})
    assert path.read_text() == '{"run": "b"}\n'
