"""Files and directories that appear whole or not at all, in one process; `test_atomic_killed` kills writers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from equipoise.errors import InputError
from equipoise.files import atomic_directory, atomic_file, require_destination


def dead_pid() -> int:
    """The number of a process that has ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_file_appears_only_at_the_end(tmp_path: Path):
    target = tmp_path / "deep" / "plan.json"
    with atomic_file(target) as partial:
        partial.write_text("new")
        assert not target.exists()
        assert partial.parent == target.parent
    assert target.read_text() == "new"
    assert names(target.parent) == ["plan.json"]


def test_file_keeps_the_old_one_when_writing_fails(tmp_path: Path):
    target = tmp_path / "plan.json"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="in the middle"), atomic_file(target) as partial:  # noqa: PT012
        partial.write_text("half")
        raise RuntimeError("in the middle")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["plan.json"]


def test_file_that_was_never_written_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "plan.json"):
        pass
    assert names(tmp_path) == []


def test_file_over_a_directory_is_refused(tmp_path: Path):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(InputError, match="is a directory"), atomic_file(tmp_path / "plan.json"):
        pass


def test_directory_appears_only_at_the_end(tmp_path: Path):
    target = tmp_path / "deep" / "run"
    with atomic_directory(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "a"
    assert names(target.parent) == ["run"]


def test_directory_is_absent_when_writing_fails(tmp_path: Path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "run") as partial:  # noqa: PT012
        (partial / "a").write_text("a")
        raise RuntimeError
    assert names(tmp_path) == []


def test_directory_needs_force(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("old")
    with pytest.raises(InputError, match="exists already"), atomic_directory(tmp_path / "run"):
        pass
    with atomic_directory(tmp_path / "run", force=True) as partial:
        (partial / "b").write_text("new")
        assert names(tmp_path / "run") == ["a"]
    assert names(tmp_path / "run") == ["b"]
    assert names(tmp_path) == ["run"]


def test_directory_that_came_into_being_meanwhile_is_kept(tmp_path: Path):
    with (  # noqa: PT012
        pytest.raises(InputError, match="meanwhile"),
        atomic_directory(tmp_path / "run") as partial,
    ):
        (partial / "mine").write_text("x")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "theirs").write_text("x")
    assert names(tmp_path / "run") == ["theirs"]
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("stage", ["inside", "rename"])
def test_force_keeps_the_old_state_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("old")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if stage == "rename" and Path(source).name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with (  # noqa: PT012
        pytest.raises((OSError, RuntimeError)),
        atomic_directory(tmp_path / "run", force=True) as partial,
    ):
        (partial / "b").write_text("new")
        if stage == "inside":
            raise RuntimeError
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "a").read_text() == "old"


def test_force_replaces_a_link_and_not_what_it_points_to(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "keep").write_text("x")
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with atomic_directory(tmp_path / "run", force=True) as partial:
        (partial / "a").write_text("x")
    assert not (tmp_path / "run").is_symlink()
    assert names(tmp_path / "run") == ["a"]
    assert names(tmp_path / "elsewhere") == ["keep"]


def test_leftovers_of_dead_writers_are_swept(tmp_path: Path):
    dead = dead_pid()
    (tmp_path / f".run.{dead}.partial").mkdir()
    (tmp_path / f".run.{dead}.partial" / "half").write_text("x")
    (tmp_path / f".run.{os.getppid()}.partial").mkdir()
    # None of these belongs to a writer of `run`.
    others = [
        f".run.json.{dead}.partial",
        f".r.{dead}.partial",
        ".run.partial",
        ".run.x.partial",
        f"run.{dead}.partial",
    ]
    for name in others:
        (tmp_path / name).write_text("x")
    with atomic_directory(tmp_path / "run") as partial:
        (partial / "a").write_text("x")
    assert names(tmp_path) == sorted(["run", f".run.{os.getppid()}.partial", *others])


def test_leftovers_of_a_name_that_looks_like_a_pattern(tmp_path: Path):
    dead = dead_pid()
    (tmp_path / f".a[1]*.{dead}.partial").write_text("x")
    (tmp_path / f".a1.{dead}.partial").write_text("x")
    with atomic_file(tmp_path / "a[1]*") as partial:
        partial.write_text("x")
    assert names(tmp_path) == [f".a1.{dead}.partial", "a[1]*"]


def test_what_a_killed_writer_had_moved_aside_is_put_back(tmp_path: Path):
    """Killed between the two renames of a forced replacement: nothing under the final name, both beside it."""
    dead = dead_pid()
    for kind in ("replaced", "partial"):
        (tmp_path / f".run.{dead}.{kind}").mkdir()
        (tmp_path / f".run.{dead}.{kind}" / "what").write_text(kind)
    with pytest.raises(InputError, match="exists already"):
        require_destination(tmp_path / "run", force=False)
    assert (tmp_path / "run" / "what").read_text() == "replaced"
    assert names(tmp_path) == ["run"]


def test_destination_is_refused_before_work(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path, message in [
        (tmp_path / "file", "exists already"),
        (tmp_path / "dangling", "exists already"),
        (tmp_path / "file" / "deeper" / "run", "not a directory"),
        (Path(), "no name"),
        (Path("/"), "no name"),
        (tmp_path / "..", "no name"),
    ]:
        with pytest.raises(InputError, match=message):
            require_destination(path, force=False)
    for path in (Path(), Path("/"), tmp_path / ".."):
        with pytest.raises(InputError, match="no name"):
            require_destination(path, force=True)
    require_destination(tmp_path / "file", force=True)
    require_destination(tmp_path / "new" / "run", force=False)
    assert names(tmp_path) == ["dangling", "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_directory_without_permission_is_refused(tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="may write"):
        require_destination(tmp_path / "locked" / "run", force=False)


def test_replacing_what_is_read_is_refused(tmp_path: Path):
    model = tmp_path / "models" / "one"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    for out in (model, tmp_path / "models", tmp_path / "link"):
        with pytest.raises(InputError, match="would be lost"):
            require_destination(out, force=True, inputs=[model])
    require_destination(model / "balanced", force=True, inputs=[model])
