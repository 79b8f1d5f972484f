import json
import threading
import time

import numpy as np
import pytest
from script_modules import import_scripts

from equipoise.errors import InputError

paper = import_scripts("paper", "cells", "sections")
Store, fingerprint = paper.cells.Store, paper.cells.fingerprint


def counting(values):
    """Gives the values one after another, and says how often it was asked."""
    asked = []

    def measure():
        asked.append(None)
        value = values[min(len(asked), len(values)) - 1]
        if isinstance(value, Exception):
            raise value
        return value

    return measure, asked


def test_a_cell_is_measured_once(tmp_path):
    measure, asked = counting([{"lis": np.float64(1.5), "counts": np.arange(3)}])
    first = Store(tmp_path).cell("a/b", {"n": 1}, measure)
    again = Store(tmp_path)
    assert first == again.cell("a/b", {"n": 1}, measure) == {"lis": 1.5, "counts": [0, 1, 2]}
    assert len(asked) == 1
    assert (again.read, again.measured) == (1, 0)


@pytest.mark.parametrize("change", [{"name": "b"}, {"inputs": {"n": 2}}, {"code": [paper.sections]}])
def test_what_a_cell_depends_on_is_its_key(tmp_path, change):
    measure, asked = counting([1, 2])
    given = {"name": "a", "inputs": {"n": 1}, "code": []}
    store = Store(tmp_path)
    assert store.cell(given["name"], given["inputs"], measure, given["code"]) == 1
    other = given | change
    assert store.cell(other["name"], other["inputs"], measure, other["code"]) == 2
    assert len(asked) == 2


def test_fresh_measures_anew(tmp_path):
    measure, _ = counting([1, 2])
    assert Store(tmp_path).cell("a", {}, measure) == 1
    assert Store(tmp_path, fresh=True).cell("a", {}, measure) == 2
    assert Store(tmp_path).cell("a", {}, measure) == 2


def test_what_fails_is_said_and_tried_again(tmp_path):
    measure, asked = counting([InputError("no such file: x"), 7])
    store = Store(tmp_path)
    assert store.cell("a", {}, measure) is None
    assert store.failed == {"a": "InputError: no such file: x"}
    (kept,) = tmp_path.glob("a-*.json")
    assert json.loads(kept.read_text())["error"] == "InputError: no such file: x"
    assert Store(tmp_path).cell("a", {}, measure) == 7
    assert len(asked) == 2


@pytest.mark.parametrize(("name", "measured"), [("lis/joint/piqa", True), ("lis/laser", False), ("speed", True)])
def test_only_what_is_asked_for_is_measured(tmp_path, name, measured):
    measure, asked = counting([1])
    store = Store(tmp_path)
    store.only = ("lis/joint", "speed")
    assert store.cell(name, {}, measure) == (1 if measured else None)
    assert len(asked) == measured
    assert not store.failed


def test_arrays_come_back(tmp_path):
    measure, asked = counting([{"counts": np.arange(6).reshape(2, 3)}])
    for _ in range(2):
        found = Store(tmp_path).arrays("routing/x", {"n": 1}, measure)
        np.testing.assert_array_equal(found["counts"], [[0, 1, 2], [3, 4, 5]])
    assert len(asked) == 1


def test_fingerprint_follows_the_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    first = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"abd")
    assert fingerprint(tmp_path) != first
    with pytest.raises(InputError, match="build the model first"):
        fingerprint(tmp_path / "none")


def test_a_table_is_one():
    text = paper.sections.table(["task", "LIS"], [["a", "1.00"], ["b", 2]])
    assert text.splitlines() == ["| task | LIS |", "|---|---:|", "| a | 1.00 |", "| b | 2 |"]


def test_two_runs_in_one_directory_measure_a_cell_once(tmp_path):
    asked = []

    def measure():
        asked.append(None)
        time.sleep(0.2)
        return len(asked)

    found = []
    runs = [threading.Thread(target=lambda: found.append(Store(tmp_path).cell("a", {}, measure))) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert (found, len(asked)) == ([1, 1, 1], 1)


def test_a_closed_store_only_reads(tmp_path):
    measure, asked = counting([1])
    arrays, made = counting([{"x": np.arange(2)}])
    store = Store(tmp_path)
    store.closed = True
    assert store.cell("a", {}, measure) is None
    with pytest.raises(InputError, match=r"does not hold b-\w+\.npz: measure first, with the same options"):
        store.arrays("b", {}, arrays)
    assert not asked + made
    Store(tmp_path).cell("a", {}, measure)
    Store(tmp_path).arrays("b", {}, arrays)
    assert store.cell("a", {}, measure) == 1
    assert store.arrays("b", {}, arrays)["x"].tolist() == [0, 1]


def test_a_cell_says_what_measured_it(tmp_path):
    first = Store(tmp_path, machine="one GPU")
    first.cell("a", {}, lambda: 1)
    later = Store(tmp_path, machine="another")
    later.cell("a", {}, lambda: 1)
    later.cell("b", {}, lambda: 2)
    assert set(first.machines) == {"one GPU"}
    assert later.machines["one GPU"] == first.machines["one GPU"]
    assert set(later.machines) == {"one GPU", "another"}
    assert later.seconds == pytest.approx(sum(later.machines.values()))
