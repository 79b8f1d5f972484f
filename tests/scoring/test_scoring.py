import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import InputError
from equipoise.planning import plan
from equipoise.scoring import score
from equipoise.types import Profile


def trace(series, **meta):
    series = np.asarray(series, dtype=np.int64)
    return Profile(counts=series.sum(0), layer_ids=np.arange(series.shape[1]), meta=meta, series=series)


def test_figures_by_hand():
    made = plan(trace([[[60, 20, 10, 10]]]), replicas=1, ranks=2)
    # Expert 0 gets the replica: slots 30, 30, 20, 10, 10; the ranks hold its two copies and 20 against 10 + 10.
    found = score(made, trace([[[60, 20, 10, 10]], [[20, 60, 10, 10]]]))
    assert found.windows == 2
    assert found.lis_raw[:, 0] == pytest.approx([2.4, 2.4])
    assert found.lis[:, 0] == pytest.approx([4 * 30 / 100, 4 * 60 / 100])
    assert found.lis_oracle[:, 0] == pytest.approx([1.2, 1.2])
    assert found.slot_imbalance[:, 0] == pytest.approx([30 / 20, 60 / 20])
    assert found.rank_imbalance_raw[:, 0] == pytest.approx([80 / 50, 80 / 50])
    assert found.rank_imbalance[:, 0] == pytest.approx([1.0, 70 / 50])
    means = found.means()
    assert means["lis"] == pytest.approx((1.2 + 2.4) / 2)
    assert means["windows"] == 2


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=6, max_size=6), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(1, 3),
)
def test_no_plan_beats_the_oracle_and_the_raw_model_is_the_identity(rows, spare, ranks):
    profile = trace(np.array(rows)[:, None])
    made = plan(profile, replicas=spare, ranks=ranks)
    found = score(made, profile)
    assert (found.lis >= found.lis_oracle - 1e-9).all()
    assert (found.lis_raw >= found.lis_oracle - 1e-9).all()
    if spare == 0:
        assert found.lis == pytest.approx(found.lis_raw)
    idle = np.array(rows).sum(1) == 0
    assert (found.lis[idle] == 1).all()


def test_a_profile_without_windows_is_one_window():
    profile = trace([[[5, 1, 1, 1]], [[1, 5, 1, 1]]])
    whole = Profile(counts=profile.counts, layer_ids=profile.layer_ids, meta={})
    assert score(plan(profile), whole).windows == 1


def test_another_model_is_refused():
    made = plan(trace([[[5, 1, 1, 1]]]))
    with pytest.raises(InputError, match="4 experts"):
        score(made, trace([[[5, 1, 1]]]))
    with pytest.raises(InputError, match="layers"):
        score(made, trace([[[5, 1, 1, 1], [1, 1, 1, 1]]]))
