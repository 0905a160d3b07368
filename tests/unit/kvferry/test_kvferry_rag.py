"""`kvferry rag`: which passages a folder has, which of them a question finds, and what is said where there are none."""

import importlib.util
import os
import sys

import pytest

from kvcore.errors import ConfigError
from kvferry import cli
from kvferry.rag.passages import Passage, cut, read_folder
from kvferry.rag.search import PassageSearch

needs_bm25s = pytest.mark.skipif(
    importlib.util.find_spec("bm25s") is None and not os.environ.get("CI"), reason="bm25s is not installed"
)


def test_passages_are_whole_paragraphs_up_to_a_size_and_whole_lines_of_longer_ones():
    text = "one\n\ntwo two\n\n\n\n" + "a line\n" * 4 + "\n\nthree\n"
    assert list(cut(text, 14)) == ["one\n\ntwo two", "a line\na line", "a line\na line", "three"]
    assert list(cut("long " * 10, 14)) == [("long " * 10).strip()]
    assert list(cut(" \n\n ", 14)) == []


def test_a_folders_texts_are_read_in_order_and_each_passage_has_a_name(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("B")
    (tmp_path / "deep" / "a.md").write_text("x" * 10 + "\n\n" + "y" * 10)
    (tmp_path / "c.py").write_text("no text")
    assert read_folder(tmp_path, most_chars=12) == [
        Passage("b.txt 1", "B"),
        Passage("deep/a.md 1", "x" * 10),
        Passage("deep/a.md 2", "y" * 10),
    ]


def test_what_has_no_texts_is_refused_by_name(tmp_path, capsys):
    with pytest.raises(ConfigError, match="nowhere: there is no such folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"there is no text in it: files that end with \.md"):
        read_folder(tmp_path)
    (tmp_path / "a.md").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"a\.md: it cannot be read as UTF-8"):
        read_folder(tmp_path)
    assert cli.main(["rag", "demo", str(tmp_path / "nowhere"), "--question", "q"]) == 2
    assert "there is no such folder" in capsys.readouterr().err


@needs_bm25s
def test_the_best_passages_come_first_and_none_where_no_word_is_in_any():
    texts = ["ferries carry trains", "a ferry for cars and trains and trains", "bridges", "tunnels"]
    search = PassageSearch([Passage(f"t {number}", text) for number, text in enumerate(texts)])
    assert [one.title for one in search.find("Which carry trains?", 3)] == ["t 0", "t 1"]
    assert [one.title for one in search.find("bridges", 9)] == ["t 2"]
    assert search.find("whales", 3) == []


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvferry\[rag\]'"):
        PassageSearch([Passage("t 1", "text")])
