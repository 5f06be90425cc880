from __future__ import annotations

import re

import pytest

from lwf_lightning.data.rows import DataError, Row, read_rows, task_rows


def fails(message: str):
    return pytest.raises(DataError, match=re.escape(message))


def write(tmp_path, content: bytes):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    return path


def test_reads_objects_and_passes_over_blank_lines(tmp_path):
    path = write(tmp_path, '{"a": "Grüße\u2028x"}\r\n\n{"a": "2"}\n\n'.encode())
    rows = read_rows(path)
    assert [row.fields for row in rows] == [{"a": "Grüße\u2028x"}, {"a": "2"}]
    assert [row.source for row in rows] == [f"{path}:row 1", f"{path}:row 3"]


def test_reads_a_byte_order_mark(tmp_path):
    assert read_rows(write(tmp_path, b'\xef\xbb\xbf{"a": 1}'))[0].fields == {"a": 1}


def test_line_that_is_not_utf8_is_named(tmp_path):
    path = write(tmp_path, b'{"a": "x"}\n{"a": "\xe9"}\n')
    with fails(f"{path}:row 2 is not UTF-8 (byte 8 of the line)"):
        read_rows(path)


def test_utf16_file_is_named(tmp_path):
    path = write(tmp_path, '{"a": "x"}\n'.encode("utf-16"))
    with fails(f"{path}:row 1 is not UTF-8"):
        read_rows(path)


def test_broken_json_line_is_named(tmp_path):
    path = write(tmp_path, b'{"a": "x"}\n{"a": "x"\n')
    with fails(f"{path}:row 2 is not JSON: Expecting ',' delimiter at character 10"):
        read_rows(path)


def test_row_that_is_no_object_is_named(tmp_path):
    path = write(tmp_path, b"[1, 2]\n")
    with fails(f"{path}:row 1 must be a JSON object with named fields, got list"):
        read_rows(path)


def test_empty_file_is_named(tmp_path):
    path = write(tmp_path, b"\n\n")
    with fails(f"{path} holds no rows"):
        read_rows(path)


def test_missing_file_lists_what_is_there(tmp_path):
    write(tmp_path, b"{}")
    with fails("validation.jsonl does not exist; ") as error:
        read_rows(tmp_path / "validation.jsonl")
    assert str(error.value).endswith(f"{tmp_path} holds: train.jsonl")


def test_missing_folder_names_the_flag_and_what_is_there(tmp_path):
    (tmp_path / "qasc").mkdir()
    with fails("data.init_args.data_dir") as error:
        task_rows(tmp_path / "gsm8k", "train")
    assert "holds: qasc" in str(error.value)
    with fails("data.init_args.data_dir") as error:
        task_rows(tmp_path / "nowhere" / "gsm8k", "train")
    assert f"neither does {tmp_path / 'nowhere'} exist" in str(error.value)


ROW = Row(
    {
        "text": " a ",
        "blank": " \n",
        "number": 3,
        "null": None,
        "texts": [" a", "b"],
        "one": ["a"],
        "mixed": ["a", 1],
        "holed": ["a", " "],
        "true": True,
        "minus": -1,
        "half": "a \ud83d",
        "halves": ["a", "b\udc00"],
    },
    "f.jsonl:row 7",
)


def test_values_are_stripped():
    assert ROW.text("text") == "a"
    assert ROW.texts("texts") == ("a", "b")
    assert ROW.index("number", below=4) == 3


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: ROW.text("gone"), "field 'gone' is missing; the row has: text, blank, number"),
        (lambda: ROW.text("blank"), "field 'blank' is empty"),
        (lambda: ROW.text("number"), "field 'number' must be text, got int"),
        (lambda: ROW.text("null"), "field 'null' must be text, got null"),
        (lambda: ROW.texts("text"), "field 'text' must be a list of texts, got str"),
        (lambda: ROW.texts("one"), "field 'one' must hold at least 2 texts, got 1"),
        (lambda: ROW.texts("mixed"), "field 'mixed' must hold texts, item 1 is int"),
        (lambda: ROW.texts("holed"), "field 'holed' holds an empty text, item 1"),
        (lambda: ROW.text("half"), r"field 'half' holds half of a character, '\ud83d' at 3: cut"),
        (lambda: ROW.texts("halves"), r"field 'halves' holds half of a character, '\udc00' at 2"),
        (lambda: ROW.index("text", below=4), "field 'text' must be a whole number, got str"),
        (lambda: ROW.index("true", below=4), "field 'true' must be a whole number, got bool"),
        (lambda: ROW.index("number", below=3), "field 'number' must be 0 to 2, got 3"),
        (lambda: ROW.index("minus", below=3), "field 'minus' must be 0 to 2, got -1"),
    ],
)
def test_bad_values_name_row_and_field(read, message):
    with fails(f"f.jsonl:row 7: {message}"):
        read()
