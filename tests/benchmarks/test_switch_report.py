import json

import pytest
from switch_modules import scripts

from equipoise import InputError

report = scripts.report


def test_a_table_and_its_notes_are_replaced_and_nothing_else():
    before = "text\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n- old\n  goes on\n- older\n\nMore:\n\n- stays\n"
    after = report.replaced(before, "| a | b |\n|---|---|\n| 3 | 4 |\n| 5 | 6 |", ["new"])
    assert after == "text\n\n| a | b |\n|---|---|\n| 3 | 4 |\n| 5 | 6 |\n\n- new\n\nMore:\n\n- stays\n"
    assert report.replaced(after, "| a | b |\n|---|---|\n| 3 | 4 |\n| 5 | 6 |", ["new"]) == after


def test_a_list_is_added_where_there_is_none_and_kept_when_not_given():
    table = "| a |\n|---|\n| 2 |"
    assert report.replaced("| a |\n|---|\n| 1 |\n\nwords\n", table, ["x"]) == f"{table}\n\n- x\n\nwords\n"
    assert report.replaced("| a |\n|---|\n| 1 |\n\n- x\n", table) == f"{table}\n\n- x\n"
    assert report.replaced("| a |\n|---|\n| 1 |", table, ["x"]) == f"{table}\n\n- x\n"


@pytest.mark.parametrize("document", ["nothing", "| a |\n|---|\n\n| a |\n|---|\n"])
def test_the_table_must_be_there_once(document):
    with pytest.raises(InputError, match="not one"):
        report.replaced(document, "| a |\n|---|")


def test_the_readme_has_the_tables_of_the_artifacts_and_the_results(monkeypatch, tmp_path, capsys):
    """The command on a copy changes nothing: the document is what was measured."""
    copy = tmp_path / "README.md"
    copy.write_text(report.README.read_text(encoding="utf-8"), encoding="utf-8")
    results = report.README.parent / "results" / "table1.json"
    monkeypatch.setattr("sys.argv", ["report.py", "--json", str(results), "--readme", str(copy)])
    report.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["changed"] is False
    assert copy.read_text(encoding="utf-8") == report.README.read_text(encoding="utf-8")


def test_a_split_model_names_the_run_before_it():
    about = {"steps": 2, "split": {"steps": 1, "split": {}}}
    assert [run["steps"] for run in report._runs(about)] == [1, 2]
