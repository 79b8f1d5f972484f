import json

import numpy as np
import pytest
from streaming_cases import regimes

from equipoise.cli.main import run
from equipoise.files import save_profile
from equipoise.streaming import load_stream
from equipoise.types import Profile


@pytest.fixture
def ids_trace(tmp_path):
    """300 tokens of per-token ids, 2 layers, 6 experts, 2 a token."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((300, 2, 6)) * np.array([1, 1, 2, 2, 3, 3]), axis=2)[:, :, :2]
    return trace(tmp_path / "ids.npz", ids=ids), ids


def trace(path, *, ids=None, series=None, **more):
    if ids is not None:
        counts = np.stack([np.bincount(ids[:, l].ravel(), minlength=6) for l in range(ids.shape[1])])  # noqa: E741
        more |= {"topk_ids": ids.astype(np.int16)}
    else:
        counts = series.sum(0)
        more |= {"series": series}
    save_profile(Profile(counts.astype(np.int64), np.arange(len(counts)), {"top_k": 2}, **more), path)
    return path


def series_trace(path, **more):
    return trace(path, series=regimes([0, 1, 2], windows=4).sum(1).astype(np.int64), **more)


def last(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_windows_and_parts_are_the_tokens_in_order(ids_trace):
    path, ids = ids_trace
    stream = load_stream([path, path], 50)
    both = np.concatenate([ids, ids])
    assert stream.parts.shape == (12, 8, 2, 6)
    for n in range(12):
        for l in range(2):  # noqa: E741
            whole = np.bincount(both[n * 50 : n * 50 + 50, l].ravel(), minlength=6)
            assert np.array_equal(stream.windows[n, l], whole)
            first = np.bincount(both[n * 50 : n * 50 + 6, l].ravel(), minlength=6)
            assert np.array_equal(stream.parts[n, 0, l], first)
    assert stream.names == ((0, "ids"), (6, "ids"))


def test_a_series_through_the_command_with_results_and_picture(tmp_path, capsys):
    path, out = series_trace(tmp_path / "s.npz"), tmp_path / "results.json"
    assert run(["stream", "--trace", str(path), "--replicas", "2", "--out", str(out)]) == 0
    line = last(capsys)
    assert line["steps"] == 11
    assert set(line["lis"]) == set(line["moves"]) == set(line["moved_bytes"])
    assert set(line["lis"]) == {"raw", "static", "long", "short", "adaptive", "oracle"}
    written = json.loads(out.read_text())
    assert written["lis"] == line["lis"]
    assert len(written["by_step"]) == 11
    for name, mean in line["lis"].items():
        assert np.mean([s["lis"][name] for s in written["by_step"]]) == pytest.approx(mean)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert run(["stream", "--trace", str(path), "--replicas", "2", "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_sizes_make_the_bytes(tmp_path, capsys):
    plain = series_trace(tmp_path / "s.npz")
    sized = series_trace(tmp_path / "b.npz", expert_bytes={"original": np.full((2, 8), 70)})
    for arguments, factor in ((["--trace", str(plain)], 1), (["--trace", str(sized)], 70),
                              (["--trace", str(plain), "--expert-bytes", "9"], 9)):  # fmt: skip
        assert run(["stream", *arguments, "--replicas", "2", "--policies", "short"]) == 0
        line = last(capsys)
        assert line["moved_bytes"]["short"] == factor * line["moves"]["short"] > 0


def test_no_share_no_moves(tmp_path, capsys):
    path = series_trace(tmp_path / "s.npz")
    for share, moved in (("0", False), ("1", True)):
        assert run(["stream", "--trace", str(path), "--replicas", "2", "--follow-share", share]) == 0
        assert bool(last(capsys)["moves"]["adaptive"]) is moved


def test_wrong_input_is_one_line_and_two(tmp_path, capsys, ids_trace):
    path, _ = ids_trace
    steps = series_trace(tmp_path / "s.npz")
    counts = tmp_path / "counts.npz"
    save_profile(Profile(np.ones((2, 8), dtype=np.int64), np.arange(2), {}), counts)
    cases = [
        ([], "--trace"),
        (["--trace", "absent.npz"], "no such profile"),
        (["--trace", str(counts)], "no series"),
        (["--trace", str(steps), "--window", "8"], "leave --window out"),
        (["--trace", str(path), "--window", "0"], "at least 1"),
        (["--trace", str(path), "--window", "512"], "less than one window"),
        (["--trace", str(path), "--window", "120"], "at least 3"),
        (["--trace", str(path), "--trace", str(steps)], "only traces of one model"),
        (["--trace", str(steps), "--policies", "short,best"], "'best' is not one of"),
        (["--trace", str(steps), "--out", "results.txt"], ".json"),
        (["--trace", str(steps), "--expert-bytes", "0"], "expert-bytes"),
        (["--trace", str(steps), "--move-bytes", "-1"], "move_bytes"),
        (["--trace", str(steps), "--follow-share", "nan"], "follow_share"),
    ]
    for arguments, word in cases:
        assert run(["stream", *arguments, "--replicas", "2"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert word in error
        assert error.count("\n") == 1
    assert run(["stream", "--trace", str(steps), "--replicas", "-1"]) == 2
    assert "must not be negative" in capsys.readouterr().err
