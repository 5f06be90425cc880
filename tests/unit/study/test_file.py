"""What is wrong in a study's file is named before it is parsed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lwf_lightning.study.command import main
from lwf_lightning.study.file import check_file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("methods: {lwf: {}, other: {}, lwf: {label: L}}", r"methods\.lwf stands there twice"),
        ("cells: [{a: 1}, {b: {c: 1, c: 2}}]", r"cells\.b\.c stands there twice"),
        (
            "methods: {vanilla: {}, lwf: {chnages: {a: 1}}}",
            r"methods\.lwf has no 'chnages', only changes, space, .*; did you mean 'changes'\?",
        ),
        (
            "methods: {vanilla: {}, lwf: {space: {a.b: 6.0e-4}}}",
            r"methods\.lwf\.space: a\.b is no list to choose from: write \[0\.0006\]",
        ),
        ("common_space: {a: 1}", r"common_space: a is no list to choose from: write \[1\]"),
    ],
)
def test_what_is_wrong_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"study\.yaml: {message}"):
        check_file(path)


@pytest.mark.parametrize(
    "content", ["a: &b {c: 1}\nd: {<<: *b, c: 2}", "a: [1", "- 1", "methods: {a: }", ""]
)
def test_what_the_parser_reads_or_refuses_is_left_to_it(content: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(content)
    check_file(path)
    check_file(tmp_path / "none.yaml")


def test_the_command_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("methods: {vanilla: {}, vanilla: {}}")
    with pytest.raises(SystemExit):
        main(["--config", str(path)])
    assert capsys.readouterr().err.startswith(f"error: {path}: methods.vanilla stands there twice")
