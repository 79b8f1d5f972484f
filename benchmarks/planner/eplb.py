"""DeepSeek's EPLB, re-implemented from its published description (github.com/deepseek-ai/EPLB), for comparison.

The description: *balanced packing* puts n weighted objects into m packs of n/m objects, heaviest first, each into the
lightest pack that has room. *Replication* gives each further slot to the expert with the largest load per replica.
The *hierarchical* policy packs expert groups onto nodes, replicates within each node, and packs the slots of a node
onto its devices; the *global* policy is the same with one group and one node, used when the groups cannot be divided
by the nodes. Loops run over layers and objects in Python. The published program keeps its loads as torch tensors and
compares them one element at a time, which is most of its time: `tensors=True` does the same, `False` plain numbers.

`test_eplb.py` under tests/planning checks the example of its README.
"""

from __future__ import annotations

import numpy as np


def balanced_packing(weight: np.ndarray, packs: int, tensors: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pack of each object and its place in the pack, each [X, n], from weights [X, n]."""
    rows, n = weight.shape
    size = n // packs
    if size == 1:
        return np.tile(np.arange(n), (rows, 1)), np.zeros((rows, n), dtype=np.int64)
    order = np.argsort(-weight, axis=1, kind="stable")
    pack, place = np.full((rows, n), -1), np.full((rows, n), -1)
    if tensors:
        import torch

        numbers = torch.from_numpy(weight)
    else:
        numbers = weight.tolist()
    for i in range(rows):
        load, used = [0.0] * packs, [0] * packs
        for obj in order[i].tolist():
            p = min((j for j in range(packs) if used[j] < size), key=load.__getitem__)
            pack[i, obj], place[i, obj] = p, used[p]
            load[p] = load[p] + numbers[i][obj]
            used[p] += 1
    return pack, place


def replicate(weight: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expert of each slot [X, slots], its number among the expert's slots, and the counts [X, n]."""
    rows, n = weight.shape
    owner = np.tile(np.arange(slots), (rows, 1))
    number = np.zeros((rows, slots), dtype=np.int64)
    count = np.ones((rows, n), dtype=np.int64)
    every = np.arange(rows)
    for s in range(n, slots):
        best = (weight / count).argmax(1)
        owner[:, s] = best
        number[:, s] = count[every, best]
        count[every, best] += 1
    return owner, number, count


def _inverse(permutation: np.ndarray) -> np.ndarray:
    out = np.empty_like(permutation)
    np.put_along_axis(out, permutation, np.tile(np.arange(permutation.shape[1]), (permutation.shape[0], 1)), 1)
    return out


def rebalance(
    weight: np.ndarray, slots: int, groups: int, nodes: int, devices: int, tensors: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Expert of each slot [L, slots] (device d owns columns d*slots/devices and on) and replica counts [L, E]."""
    weight = np.asarray(weight, dtype=np.float64)
    if groups % nodes:
        groups, nodes = 1, 1
    layers, experts = weight.shape
    size, per_node, here = experts // groups, experts // nodes, devices // nodes
    node, place = balanced_packing(weight.reshape(layers, groups, size).sum(2), nodes, tensors)
    first = (node * (groups // nodes) + place) * size
    to_middle = (first[:, :, None] + np.arange(size)).reshape(layers, experts)
    to_expert = _inverse(to_middle)
    local = np.take_along_axis(weight, to_expert, 1).reshape(layers * nodes, per_node)
    owner, _, count = replicate(local, slots // nodes)
    device, at = balanced_packing(np.take_along_axis(local / count, owner, 1), devices // nodes, tensors)
    column = device * (slots // devices) + at
    slot_middle = np.take_along_axis(owner, _inverse(column), 1).reshape(layers, nodes, -1)
    slot_middle = (slot_middle + np.arange(nodes)[:, None] * per_node).reshape(layers, -1)
    table = np.take_along_axis(to_expert, slot_middle, 1)
    counts = np.stack([np.bincount(row, minlength=experts) for row in table])
    assert here * nodes == devices
    return table, counts
