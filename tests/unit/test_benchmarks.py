"""``python -m benchmarks``: what is run, kept and said; not how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import __main__ as program
from benchmarks import memory_table, overhead, record
from benchmarks.harness import Result, Skipped, ratio_of_medians, take_turns


def benchmark(name, results):
    module = ModuleType(f"benchmarks.{name}")
    module.results = results
    return module


def met(*, quick=False):
    yield Result("sort", "bubble sort", 0.5, 1.0, details={"medians": [1.0, 2.0], "quick": quick})
    yield Skipped("sort", "quantum sort", "there is no quantum computer")


def missing(*, quick=False):
    yield Result("a", "b", 3.0, 2.0, "at least")
    raise ModuleNotFoundError("No module named 'trl'", name="trl")


def broken(*, quick=False):
    yield Result("a", "b", 3.0, 2.0)
    raise RuntimeError("out of\nluck")


@pytest.fixture
def with_benchmarks(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def use(**functions):
        modules = {name: benchmark(name, function) for name, function in functions.items()}
        monkeypatch.setattr(program, "find_benchmarks", lambda: modules)
        monkeypatch.setattr(record, "commit", lambda: "abc")

    return use


def test_ways_take_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = take_turns(ways, rounds=2)
    assert calls == list("ab" * 3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_of_medians_ignores_one_slow_round():
    assert ratio_of_medians([2.0, 2.0, 90.0], [4.0, 4.0, 4.0]) == 0.5


@pytest.mark.parametrize(
    ("figure", "bar", "better", "is_met"),
    [
        (1.0, 1.0, "at most", True),
        (1.1, 1.0, "at most", False),
        (1.0, 1.0, "at least", True),
        (0.9, 1.0, "at least", False),
        (0.9, None, "at least", None),
    ],
)
def test_a_bar_is_met_at_its_value(figure, bar, better, is_met):
    assert Result("a", "b", figure, bar, better).is_met is is_met


def test_results_are_written_with_all_that_they_depend_on(with_benchmarks, tmp_path, capsys):
    with_benchmarks(fast=met)
    file = tmp_path / "results.json"
    assert program.main(["--output", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["machine"]["cores"] >= 1
    assert found["versions"]["torch"]
    entry = found["benchmarks"]["fast"]
    assert entry["commit"] == "abc"
    assert entry["results"][0]["met"] is True
    assert entry["results"][0]["details"]["medians"] == [1.0, 2.0]
    assert "skipped: there is no" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_missing_package_and_a_failure_leave_the_rest_alone(with_benchmarks, tmp_path):
    with_benchmarks(poor=missing, bad=broken, fast=met)
    file = tmp_path / "results.json"
    assert program.main(["--output", str(file)]) == 1
    entries = json.loads(file.read_text())["benchmarks"]
    assert entries["poor"]["results"][1]["skipped"] == "the package trl is not installed"
    assert entries["bad"]["results"][1]["failed"] == "RuntimeError: out of luck"
    assert entries["fast"]["results"][0]["figure"] == 0.5


def test_a_resumed_run_measures_what_is_not_done_at_this_commit(
    with_benchmarks, tmp_path, monkeypatch
):
    runs = []

    def counted(name, results):
        return lambda *, quick=False: (runs.append(name), results())[1]

    with_benchmarks(fast=counted("fast", met), bad=counted("bad", broken))
    output = ["--output", str(tmp_path / "results.json")]
    program.main(output)
    program.main(["--resume", *output])
    assert runs == ["fast", "bad", "bad"]  # what failed is tried again
    monkeypatch.setattr(record, "commit", lambda: "later")
    program.main(["--resume", "--only", "fast", *output])
    assert runs[3:] == ["fast"]
    assert set(json.loads((tmp_path / "results.json").read_text())["benchmarks"]) == {"fast", "bad"}


def test_results_of_another_machine_are_not_mixed_in(with_benchmarks, tmp_path):
    with_benchmarks(fast=met)
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"machine": {"cpu": "abacus"}, "benchmarks": {"old": {}}}))
    program.main(["--output", str(file)])
    assert set(json.loads(file.read_text())["benchmarks"]) == {"fast"}
    before = json.loads((tmp_path / "results.old.json").read_text())
    assert before["benchmarks"] == {"old": {}}


def test_a_run_without_figures_leaves_the_last_ones(with_benchmarks, tmp_path):
    """Data that are not found, or a failure half way, are told beside them, and tried again."""
    file = tmp_path / "results.json"

    def absent(*, quick=False):
        yield Skipped("sort", "", "there are no data")

    for worse in (absent, broken):
        with_benchmarks(fast=met)
        program.main(["--output", str(file)])
        with_benchmarks(fast=worse)
        program.main(["--output", str(file)])
        entry = json.loads(file.read_text())["benchmarks"]["fast"]
        assert entry["results"][0]["figure"] == 0.5
        assert "figure" not in entry["tried_since"]["results"][-1]
        with_benchmarks(fast=met)
        program.main(["--resume", "--output", str(file)])
        assert "tried_since" not in json.loads(file.read_text())["benchmarks"]["fast"]


def test_what_is_skipped_whole_is_not_done(with_benchmarks, tmp_path):
    runs = []

    def absent(*, quick=False):
        runs.append(1)
        yield Skipped("sort", "", "there are no data")

    with_benchmarks(fast=absent)
    for _ in range(2):
        program.main(["--resume", "--output", str(tmp_path / "results.json")])
    assert len(runs) == 2


def test_figures_name_the_commits_that_measured_them(tmp_path):
    points = {"details": {"measured_by": [["old", 1], ["older", 1]]}, "figure": 1.0}
    kept = {"commit": "new", "threads": 2, "results": [points]}
    other = {"commit": "new", "threads": 2, "results": [{"figure": 1.0}]}
    assert record._measured(kept) == {("old", 1), ("older", 1)}
    assert record._measured(other) == {("new", 2)}
    page = tmp_path / "page.md"
    page.write_text("\n".join(record.MARKS))
    record.refresh(page, record.load(record.RESULTS))  # those that are there
    assert "5d79c2f44f3b with 1 threads" in page.read_text()


def test_what_lwf_costs_is_what_it_adds():
    """Not the noise of the learning steps, which both runs have."""
    vanilla = [{overhead.WHOLE: [s, s], overhead.LEARNING: [s, s]} for s in (10.0, 11.0, 10.0)]
    lwf = [
        {overhead.WHOLE: [s + 2, s + 2], overhead.LEARNING: [s, s], overhead.FISHER: [2.0, 2.0]}
        for s in (8.0, 7.0, 9.0)
    ]
    assert overhead._share(overhead.WHOLE, 0, lwf, vanilla) == pytest.approx(1.2)
    assert overhead._share(overhead.FISHER, 1, lwf, vanilla) == pytest.approx(0.2)


@pytest.mark.slow
def test_the_tables_of_large_models_are_those_of_the_documents():
    docs = Path(__file__).parents[2] / "docs"
    for rows, name in (
        (memory_table.large_models(), "performance.md"),
        (memory_table.by_ranks(), "multi-gpu.md"),
    ):
        assert "\n".join(rows) in (docs / name).read_text(), (
            f"python -m benchmarks.memory_table: {name}"
        )


def test_a_quick_run_keeps_nothing(with_benchmarks, tmp_path, capsys):
    with_benchmarks(fast=met, unprepared=lambda: met())
    assert program.main(["--quick", "--output", str(tmp_path / "results.json")]) == 0
    assert list(tmp_path.iterdir()) == []
    assert "no quick version" in " ".join(capsys.readouterr().out.split())


def test_an_unknown_name_is_refused(with_benchmarks, capsys):
    with_benchmarks(fast=met)
    with pytest.raises(SystemExit):
        program.main(["--only", "fats"])
    assert "no benchmark 'fats'; there are fast" in capsys.readouterr().err


def test_the_table_for_the_document_is_made_of_the_file(with_benchmarks, tmp_path, capsys):
    with_benchmarks(fast=met)
    output = ["--output", str(tmp_path / "results.json")]
    program.main(output)
    capsys.readouterr()
    program.main(["--markdown", *output])
    assert (
        "| fast | sort | bubble sort | 0.50 x | at most 1.00 x | met |" in capsys.readouterr().out
    )


def test_a_document_takes_the_figures_that_have_a_bar(with_benchmarks, tmp_path):
    def shown(*, quick=False):
        yield from met()
        yield Result("sort", "nothing", 7.0, None)

    with_benchmarks(fast=shown)
    output = ["--output", str(tmp_path / "results.json")]
    program.main(output)
    page = tmp_path / "page.md"
    page.write_text("before\n" + "old\n".join(record.MARKS) + "after\n")
    for _ in range(2):  # again and again
        program.main(["--markdown", str(page), *output])
        text = page.read_text()
        assert text.startswith("before\n" + record.MARKS[0] + "Commit abc with ")
        assert text.endswith(
            "| skipped: there is no quantum computer |\n" + record.MARKS[1] + "after\n"
        )
        assert text.count("| fast | sort | bubble sort | 0.50 x | at most 1.00 x | met |") == 1
        assert "old" not in text
        assert "nothing" not in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"page\.md must hold <!-- figures: begin -->"):
        program.main(["--markdown", str(page), *output])
    assert page.read_text() == "no marks"


@pytest.mark.slow
def test_the_quick_version_of_every_benchmark_runs():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "benchmarks", "--quick", "--threads", "1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{name}: " in done.stdout for name in program.find_benchmarks())
    assert "no quick version" not in done.stdout
