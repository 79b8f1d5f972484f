"""What an expert is worth, measured on calibration tokens. Load and importance are different things.

`wanda` (R&Q Algorithm 2, arXiv 2602.19938, after Wanda, arXiv 2306.11695): for each weight matrix of an expert
    S[o, i] = |W[o, i]| * ||X[:, i]||_2
with X the inputs that reached the expert; the lowest half of S (what pruning would remove) is averaged per matrix
and then over the expert's matrices. The paper reads a lower score as higher importance.

`error`: what lower precision of this expert alone would cost, in nats a token: the expert's part of what its layer
costs as a whole (`lowered` has D[l]), by the root of
    g[e] = 1/2T sum_t w[t]^2 ||f(x_t) - f_low(x_t)||^2 s[t],
the divergence of the model's predictions to second order, for errors of no particular direction (`sensitivity` has s,
T the tokens observed). The root, because most of what gradients do not see goes with the size of a change, not with its
square. Where D was not measured, `error` is g.

`output_error`: the same error without asking what becomes of it, as a share of the layer's routed output on the same
tokens; all there is where no gradient was measured, and `error` is then this,
    sum_t w[t]^2 ||f(x_t) - f_low(x_t)||^2  /  sum_t ||sum_j w[t, j] f_j(x_t)||^2.

Larger means that lowering its precision costs more. An expert that got no token has 0.

Cost: the experts of the observed batches are computed once more at full and once at low precision.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from equipoise.formats import get_format
from equipoise.models.families import MoELayer, Routing
from equipoise.models.layout import Get, Weight
from equipoise.types import FloatArray, Precision

WANDA_FRACTION = 0.5
"""Fraction of weights pruning would remove: Wanda's usual 50 % sparsity."""


def low_precision(dtype: torch.dtype) -> Precision:
    """The lower precision of R&Q: int8 for 16-bit models, float16 for float32 models."""
    return "float16" if dtype == torch.float32 else "int8"


class ImportanceMeter:
    """Accumulates importance over the batches it observes (see `equipoise.profiling.watch`).

    Args:
        layers: of the model.
        precision: that `error` is measured for.
    """

    def __init__(self, layers: list[MoELayer], precision: str) -> None:
        self.layers = layers
        self.precision = precision
        shape = (len(layers), layers[0].num_experts)
        self._error = np.zeros(shape)
        self._weighted = np.zeros(shape)
        self._energy = np.zeros(len(layers))
        # Squared norms of each weight's inputs, by (layer, expert, weight).
        self._squares: dict[tuple[int, int, str], torch.Tensor] = {}

    @torch.no_grad()
    def observe(
        self,
        row: int,
        layer: MoELayer,
        routing: Routing,
        real: torch.Tensor | None,
        sensitivity: torch.Tensor | None = None,
    ) -> None:
        """Take one forward of one layer into account.

        Args:
            row: of the layer.
            layer: the layer.
            routing: of the batch.
            real: bool [rows], tokens that count; None: all of them.
            sensitivity: float32 [rows], s of each token, where it was measured.
        """
        layout = layer.layout
        index = routing.index if real is None else routing.index.masked_fill(~real[:, None], layer.num_experts)
        hidden = routing.hidden
        total = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        form = get_format(self.precision)
        for e in range(layer.num_experts):
            tokens, place = torch.where(index == e)
            if not len(tokens):
                continue
            x = hidden[tokens]
            weight = routing.weights[tokens, place, None].float()

            def original(name: str, e: int = e) -> torch.Tensor:
                return layout.expert(name, e).detach()

            y, inputs = layout.compute(x, layout.linear(original))
            for name, values in inputs.items():
                norms = values.float().square().sum(0)
                key = (row, e, name)
                self._squares[key] = self._squares[key] + norms if key in self._squares else norms

            def lowered(name: str, rows: torch.Tensor, get: Get = original) -> torch.Tensor:
                w = layout.weight(name)
                product = form.linear(rows, form.encode(get(name), w.out_axis), w.out_axis)
                return product if w.bias is None else product + get(w.bias)

            low, _ = layout.compute(x, lowered)
            squares = (weight * (y.float() - low.float())).square().sum(-1)
            self._error[row, e] += float(squares.sum())
            if sensitivity is not None:
                self._weighted[row, e] += float((squares * sensitivity[tokens]).sum())
            total.index_add_(0, tokens, weight * y.float())
        self._energy[row] += float(total.square().sum())

    def results(self, tokens: int = 0) -> dict[str, npt.NDArray[np.float32]]:
        """Name -> float32 [L, E]: `wanda`, `error` and, where sensitivity was measured, `output_error`.

        Args:
            tokens: T, tokens whose predictions gave the sensitivity; 0: it was not measured.
        """
        energy = np.where(self._energy > 0, self._energy, 1.0)
        wanda = np.zeros_like(self._error)
        for row, layer in enumerate(self.layers):
            for e in range(layer.num_experts):
                wanda[row, e] = self._wanda(row, layer, e)
        found = {"error": (self._error / energy[:, None]).astype(np.float32), "wanda": wanda.astype(np.float32)}
        if tokens:
            found["output_error"] = found["error"]
            found["error"] = (self._weighted / (2 * tokens)).astype(np.float32)
        return found

    @torch.no_grad()
    def _wanda(self, row: int, layer: MoELayer, e: int) -> float:
        """Algorithm 2 for one expert; 0 when it got no token."""
        means = []
        for weight in layer.layout.weights:
            squares = self._squares.get((row, e, weight.name))
            if not weight.quantizable:
                continue
            if squares is None:
                return 0.0
            means += [
                _lowest_mean(matrix, squares.sqrt())
                for matrix in _matrices(weight, lambda name: layer.layout.expert(name, e).detach())
            ]
        return float(np.mean(means))


def shared_out(divergence: FloatArray, error: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """What each layer costs as a whole, parted among its experts by the root of what each was estimated to cost.

    Args:
        divergence: [L], of a layer with all experts lowered.
        error: [L, E], of each expert alone.

    Returns:
        float32 [L, E]; the sum over a layer is its divergence. A layer of which nothing was seen in the predictions, at
        the resolution of the model's dtype, keeps its estimate.
    """
    roots = np.sqrt(np.asarray(error, dtype=np.float64))
    sums = roots.sum(1, keepdims=True)
    parts = np.divide(roots, sums, out=np.zeros_like(roots), where=sums > 0)
    return np.where(divergence[:, None] > 0, divergence[:, None] * parts, error).astype(np.float32)


def _matrices(weight: Weight, get: Get) -> list[torch.Tensor]:
    """The matrices a weight fuses, each [out, in]."""
    w = get(weight.name)
    w = w.transpose(-1, -2) if weight.out_axis == -1 else w
    return [w[rows] for rows in weight.matrices]


def _lowest_mean(matrix: torch.Tensor, norms: torch.Tensor) -> float:
    """Mean of the lowest `WANDA_FRACTION` of |W| * norm, over [out, in]."""
    scores = (matrix.float().abs() * norms).reshape(-1)
    k = max(1, int(len(scores) * WANDA_FRACTION))
    if scores.device.type == "cpu":
        values = scores.numpy()
        values.partition(k - 1)  # a tenth of the time of torch's kthvalue
        return float(values[:k].mean(dtype=np.float64))
    # k-th smallest in linear time; ties at the threshold share its value, so the mean is exact.
    threshold = torch.kthvalue(scores, k).values
    below = scores < threshold
    return float((scores[below].sum() + threshold * (k - below.sum())) / k)
