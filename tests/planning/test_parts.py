import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import InputError
from equipoise.files.profile_npz import check_profile
from equipoise.planning.parts import parse_range, take, window_counts
from equipoise.types import Profile

IDS = np.random.default_rng(0).integers(0, 5, (23, 2, 3))
COUNTS = np.stack([np.bincount(IDS[:, i].ravel(), minlength=5) for i in range(2)])
TRACE = Profile(counts=COUNTS, layer_ids=np.arange(2), meta={"top_k": 3}, topk_ids=IDS)
STEPS = np.arange(60).reshape(6, 2, 5)
SERIES = Profile(counts=STEPS.sum(0), layer_ids=np.arange(2), meta={}, series=STEPS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:10%", (0, 2)), ("10%:", (2, 23)), (":", (0, 23)), ("3:7", (3, 7)), (":5", (0, 5)), ("50%:100%", (11, 23))],
)
def test_ranges(text, expected):
    assert parse_range(text, 23, "tokens") == expected


@given(st.integers(1, 10**7), st.integers(1, 99))
def test_the_two_sides_of_a_percentage_are_the_whole(total, percent):
    cut = int(percent * total / 100 + 1e-9)
    if 0 < cut < total:
        assert parse_range(f"0:{percent}%", total, "x") == (0, cut)
        assert parse_range(f"{percent}%:", total, "x") == (cut, total)


@pytest.mark.parametrize("text", ["", "3", "a:b", "5:5", "7:3", "0:24", "-2:4", "0:0.5", "1:2:3", "0:0%"])
def test_wrong_ranges_are_refused(text):
    with pytest.raises(InputError, match="tokens"):
        parse_range(text, 23, "tokens")


@pytest.mark.parametrize(("tokens", "window"), [("0:10", None), ("5:", 4), (None, 7), (None, 100)])
def test_tokens_and_windows(tokens, window):
    part = check_profile(take(TRACE, tokens=tokens, window=window))
    start, stop = parse_range(tokens or ":", 23, "tokens")
    ids = IDS[start:stop]
    if window is None:
        expected = [ids]
    else:
        w = min(window, len(ids))
        expected = [ids[i : i + w] for i in range(0, len(ids) - w + 1, w)]
        assert len(part.series) == len(expected)
    recount = np.stack([np.stack([np.bincount(c[:, i].ravel(), minlength=5) for i in range(2)]) for c in expected])
    assert np.array_equal(part.counts, recount.sum(0))
    if window is not None:
        assert np.array_equal(part.series, recount)
    assert np.array_equal(window_counts(part.topk_ids, 5, len(part.topk_ids))[0], part.counts)


def test_steps():
    part = check_profile(take(SERIES, steps="50%:"))
    assert np.array_equal(part.series, STEPS[3:])
    assert take(SERIES) is SERIES


@pytest.mark.parametrize(
    ("profile", "arguments", "message"),
    [
        (TRACE, {"steps": "0:1"}, "use --tokens"),
        (SERIES, {"tokens": "0:1"}, "use --steps"),
        (SERIES, {"window": 5}, "use --steps"),
        (TRACE, {"window": 0}, "at least 1"),
        (TRACE, {"steps": "0:1", "window": 3}, "one kind"),
    ],
)
def test_what_a_profile_has_not_is_refused(profile, arguments, message):
    with pytest.raises(InputError, match=message):
        take(profile, **arguments)
