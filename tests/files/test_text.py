"""Text files in, documents out; anything else is one clear line."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import InputError
from equipoise.files.text import TextRecord, read_rows, read_texts


def test_jsonl_gz_and_txt_in_order(tmp_path):
    a, b, c = tmp_path / "a.jsonl", tmp_path / "b.b.jsonl.gz", tmp_path / "c.txt"
    a.write_text('{"text": "one"}\n\n{"text": "two", "domain": "code", "title": 3}\n{"text": "  "}', "utf-8")
    b.write_bytes(gzip.compress('{"text": "drei ü"}\n'.encode()))
    c.write_bytes(b"\xef\xbb\xbffour\n\nfive\n")
    assert read_texts([a, b, str(c)]) == [
        TextRecord("one", "a"),
        TextRecord("two", "code"),
        TextRecord("drei ü", "b.b"),
        TextRecord("four\n\nfive\n", "c"),
    ]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1))
def test_what_json_writes_is_read_back(tmp_path_factory, texts):
    """Line separators inside strings (U+2028, U+0085) do not cut a line, escaped or not."""
    path = tmp_path_factory.mktemp("text") / "x.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_bytes("\n".join(lines).encode())
    assert [record.text for record in read_texts([path])] == texts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b"", "empty"),
        ("x.jsonl", b'\n{"text": " "}\n', "empty"),
        ("x.txt", b" \n", "empty"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2 has no field 'text' (its fields: body)"),
        ("x.jsonl", b'{"text": 5}', "line 1: field 'text' is a int"),
        ("x.jsonl", b'{"text": "a", "domain": 5}', "'domain'"),
        ("x.jsonl", b'"text"', "not a JSON object"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("x.jsonl", b"[" * 100_000, "not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2 is not UTF-8"),
        ("x.jsonl", b'{"text": "\\ud800"}', "surrogate"),
        ("x.txt", b"a\nb\xe4\n", "line 2 is not UTF-8"),
        ("x.jsonl.gz", b'{"text": "a"}', "gzip"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-12], "gzip"),
        ("x.csv", b"text\na\n", "no known kind"),
    ],
)
def test_wrong_files_are_refused_in_one_line_that_names_them(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_texts([path])
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_directory_and_none(tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(InputError, match="no such data file"):
        read_texts([tmp_path / "gone.jsonl"])
    with pytest.raises(InputError, match="directory"):
        read_texts([tmp_path / "d.jsonl"])
    with pytest.raises(InputError, match="at least one"):
        read_texts([])


def test_rows_keep_their_line_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('[1]\n\n{"a": 2}\n')
    assert list(read_rows(path)) == [(1, [1]), (3, {"a": 2})]
