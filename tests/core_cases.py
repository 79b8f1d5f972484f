"""Plans and profiles for the tests of the core rooms: small, valid, and strategies that make many of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equipoise.errors import InputError
from equipoise.types import Budget, LayerPlan, ModelIdentity, Plan, Profile, Slot

IDENTITY = ModelIdentity("a/b", "mixtral", 2, 4, 2, "bfloat16")


def example_plan() -> Plan:
    """Two layers of 4 experts: replicas, both precisions, unequal shares, two ranks."""
    first = (Slot(0, share=0.75), Slot(0, "int8", 1, 0.25), Slot(1, "int8"), Slot(2), Slot(3, "original", 1))
    second = tuple(Slot(e) for e in range(4))
    layers = (LayerPlan(0, "m.0.experts", 4, first), LayerPlan(1, "m.1.experts", 4, second))
    return Plan(IDENTITY, "ab" * 32, "joint", 7, Budget(800, 800, 800), 2, layers, {"lis": 1.25})


def example_profile() -> Profile:
    """Two layers of 4 experts, three windows, both importances, sizes of two precisions."""
    series = np.array([[[3, 1, 0, 2], [1, 1, 2, 2]], [[4, 0, 0, 2], [0, 3, 2, 1]], [[6, 0, 0, 0], [2, 2, 1, 1]]])
    return Profile(
        counts=series.sum(0),
        layer_ids=np.array([0, 1]),
        meta={"model": "a/b", "model_type": "mixtral", "top_k": 2, "dtype": "bfloat16", "tokens": 9, "data": "x.txt"},
        layer_names=("m.0.experts", "m.1.experts"),
        series=series,
        importance={
            "error": np.array([[0.5, 0.1, 0.0, 0.2], [0.1, 0.1, 0.2, 0.3]], dtype=np.float32),
            "wanda": np.array([[1.5, 1.1, 0.0, 1.2], [2.1, 0.1, 1.2, 0.3]], dtype=np.float32),
        },
        expert_bytes={"original": np.full((2, 4), 200), "int8": np.full((2, 4), 104)},
    )


@st.composite
def layer_slots(draw: st.DrawFn, experts: int, ranks: int = 1, most: int = 4) -> tuple[Slot, ...]:
    """Valid slots of one layer: 1 to `most` an expert, even or unequal shares, any precision."""
    slots = []
    for expert in range(experts):
        count = draw(st.integers(1, most))
        parts = [1] * count if draw(st.booleans()) else [draw(st.integers(0, 20)) for _ in range(count)]
        parts[draw(st.integers(0, count - 1))] += not any(parts)  # others may stand by
        for part in parts:
            precision: Any = draw(st.sampled_from(["original", "int8", "float16"]))
            slots.append(Slot(expert, precision, draw(st.integers(0, ranks - 1)), part / sum(parts)))
    return tuple(sorted(slots, key=lambda s: (s.expert, s.precision != "original")))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Valid plans."""
    experts, layers = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    ranks = draw(st.integers(1, experts))
    spent = draw(st.integers(0, 10**15))
    limit = spent + draw(st.integers(0, 10**6))
    words = st.text(max_size=12)
    made = tuple(LayerPlan(3 * i, draw(words), experts, draw(layer_slots(experts, ranks))) for i in range(layers))
    figures = st.dictionaries(words, st.floats(allow_nan=False, allow_infinity=False), max_size=3)
    return Plan(
        model=ModelIdentity(draw(words), draw(words), layers, experts, draw(st.integers(0, 4)), draw(words)),
        profile_sha256=draw(words),
        preset=draw(words),
        seed=draw(st.integers(0, 2**40)),
        budget=Budget(draw(st.integers(0, 10**15)), limit, spent),
        ranks=ranks,
        layers=made,
        predicted=draw(figures),
    )


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Valid profiles, with and without each optional array."""
    layers, experts, steps = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    shape = (layers, experts)
    series = draw(hnp.arrays(np.int64, (steps, *shape), elements=st.integers(0, 2**40)))
    counts, topk = series.sum(0), None
    with_series = draw(st.booleans())
    if not with_series and draw(st.booleans()):
        topk = draw(hnp.arrays(np.uint8, (draw(st.integers(1, 5)), layers, 2), elements=st.integers(0, experts - 1)))
        counts = np.stack([np.bincount(topk[:, row].ravel(), minlength=experts) for row in range(layers)])
    floats = hnp.arrays(np.float32, shape, elements=st.floats(-(2.0**100), 2.0**100, width=32))
    sizes = hnp.arrays(np.int64, shape, elements=st.integers(1, 2**40))
    # numpy strings end at their last character that is not NUL.
    name = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=6)
    return Profile(
        counts=counts,
        layer_ids=np.arange(layers) * draw(st.integers(1, 3)),
        meta={"model": draw(name), "top_k": draw(st.integers(0, experts)), "tokens": draw(st.integers(0, 10**9))},
        layer_names=tuple(f"{draw(name)}{i}" for i in range(layers)) if draw(st.booleans()) else (),
        series=series if with_series else None,
        topk_ids=topk,
        importance=draw(st.dictionaries(st.sampled_from(["error", "wanda", "own"]), floats, max_size=2)),
        expert_bytes=draw(st.dictionaries(st.sampled_from(["original", "int8", "float16"]), sizes, max_size=3)),
    )


def same_profile(a: Profile, b: Profile) -> bool:
    """Whether two profiles are equal in every array and word."""

    def same(x: Any, y: Any) -> bool:
        return (x is None) == (y is None) and (x is None or (x.dtype == y.dtype and np.array_equal(x, y)))

    meta = {k: v for k, v in b.meta.items() if k not in ("format", "version")}
    return (
        same(a.counts, b.counts)
        and same(a.layer_ids, b.layer_ids)
        and same(a.series, b.series)
        and same(a.topk_ids, b.topk_ids)
        and a.layer_names == b.layer_names
        and {k: v for k, v in a.meta.items() if k not in ("format", "version")} == meta
        and a.importance.keys() == b.importance.keys()
        and all(same(a.importance[k], b.importance[k]) for k in a.importance)
        and a.expert_bytes.keys() == b.expert_bytes.keys()
        and all(same(a.expert_bytes[k], b.expert_bytes[k]) for k in a.expert_bytes)
    )


def one_line(refusal: InputError, start: str = "") -> None:
    """A refusal is one line, and begins with what it is about."""
    assert str(refusal).startswith(start)
    assert "\n" not in str(refusal)
