"""Where routers start: clusters of each layer's FFN inputs, with a say in how much they follow the domain of the text.

    z       = leading principal components, each of variance 1, of the FFN input less (1 - gamma) of its domain's mean
    cluster = spherical k-means of z, with a penalty on large clusters
    router  = softmax regression of the clusters on the FFN input itself, without a bias (a Mixtral router has none)
    scale   = so that the first of two selected experts has on average the weight `sharpness`

With gamma = 1, from the middle of the network on, a cluster is nearly a domain, and the text of one domain goes to
two experts of eight; with gamma = 0 clusters are of token kinds only. In between an expert has both a kind of token
and a kind of text, so that its difference has something of its own to learn.

N tokens, H hidden size, E experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch

Matrix = npt.NDArray[np.float32]


def start_router(
    inputs: Matrix,
    labels: npt.NDArray[np.int64],
    experts: int,
    rng: np.random.Generator,
    gamma: float = 0.8,
    components: int = 32,
    sharpness: float = 0.7,
) -> Matrix:
    """The router of one layer.

    Args:
        inputs: float32 [N, H], FFN inputs.
        labels: int64 [N], domain of each.
        experts: E.
        rng: of the start of k-means.
        gamma: how much of the domains' means stays.
        components: principal components.
        sharpness: mean weight of the first of the two selected experts, in (0.5, 1).

    Returns:
        float32 [E, H].
    """
    z = features(inputs, labels, gamma, components)
    router = regress(inputs, cluster(z, experts, rng), experts)
    return (router * _scale(inputs @ router.T, sharpness)).astype(np.float32)


def features(inputs: Matrix, labels: npt.NDArray[np.int64], gamma: float, components: int) -> Matrix:
    """`z` above, rows of length 1: float32 [N, components]."""
    centred = inputs - inputs.mean(0)
    _, codes = np.unique(labels, return_inverse=True)
    means = np.stack([centred[codes == code].mean(0) for code in range(codes.max() + 1)])
    mixed = centred - (1 - gamma) * means[codes]
    size = inputs.shape[1]
    _, directions = scipy.linalg.eigh(np.cov(mixed.T), subset_by_index=(size - components, size - 1))
    z = mixed @ directions
    z /= z.std(0)
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def cluster(
    z: Matrix, experts: int, rng: np.random.Generator, rounds: int = 40, penalty: float = 0.2
) -> npt.NDArray[np.int64]:
    """Spherical k-means with a pull towards even sizes: int64 [N], the cluster of each row."""
    centres = z[rng.choice(len(z), experts, replace=False)]
    size = np.full(experts, len(z) / experts)
    own = np.zeros(len(z), dtype=np.int64)
    for _ in range(rounds):
        own = (z @ centres.T - penalty * np.log(np.maximum(size, 1) * experts / len(z))).argmax(1)
        size = 0.5 * size + 0.5 * np.bincount(own, minlength=experts)
        for expert in range(experts):
            total = z[own == expert].sum(0) if (own == expert).any() else z[rng.integers(len(z))]
            centres[expert] = total / max(float(np.linalg.norm(total)), 1e-12)
    return own


def regress(inputs: Matrix, wanted: npt.NDArray[np.int64], experts: int, steps: int = 150) -> Matrix:
    """Softmax regression without a bias, weakly regularised: float32 [E, H]."""
    x = torch.from_numpy(inputs)
    scale = x.pow(2).mean().sqrt()
    x, y = x / scale, torch.from_numpy(wanted)
    weight = torch.zeros(experts, x.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight.T, y) + 1e-3 * weight.pow(2).sum()
        loss.backward()
        optimizer.step()
    return np.asarray((weight.detach() / scale).numpy())


def _scale(logits: Matrix, sharpness: float) -> float:
    """Factor on the logits [N, E] at which the two largest share their weight as `sharpness` says."""
    top = np.sort(logits, 1)[:, -2:]
    gap = (top[:, 1] - top[:, 0]).astype(np.float64)
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        if (1 / (1 + np.exp(-middle * gap))).mean() < sharpness:
            low = middle
        else:
            high = middle
    return float(high)
