"""`Telemetry`: what is read while a model serves.

    with eq.StreamingBalancer(model) as balancer, eq.Telemetry(model, balancer=balancer) as telemetry:
        model.generate(**batch)
        telemetry.read()["lis"]

With a balancer it reads the windows that the balancer follows anyway, and costs nothing until it is read. Without one
it follows the model itself, at the cost of `watch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from equipoise.errors import InputError
from equipoise.profiling.live_windows import LiveWindows
from equipoise.telemetry.readings import read

if TYPE_CHECKING:
    from equipoise.rerouting.install import Laser
    from equipoise.runtime.balancer import StreamingBalancer


class Telemetry:
    """Readings of one serving model. A context manager.

    Args:
        model: with MoE layers, balanced or not.
        balancer: that follows it.
        laser: what `eq.laser(model)` gave.
        window: tokens a window of load; the balancer's own where there is one.

    Raises:
        InputError: the balancer is another model's, or a window contradicts its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        balancer: StreamingBalancer | None = None,
        laser: Laser | None = None,
        window: int | None = None,
    ) -> None:
        if balancer is not None and balancer.model is not model:
            raise InputError("telemetry: the balancer follows another model")
        if balancer is not None and window not in (None, balancer.window):
            raise InputError(f"telemetry: window {window} contradicts the balancer's {balancer.window}: leave it out")
        self.balancer, self.laser = balancer, laser
        self._own = LiveWindows(model, 512 if window is None else window) if balancer is None else None
        self.windows = self._own or balancer.windows  # type: ignore[union-attr]

    def __enter__(self) -> Telemetry:
        """Begin to follow the model, where no balancer does."""
        if self._own is not None:
            self._own.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop following; the last readings stay."""
        if self._own is not None:
            self._own.__exit__()

    def read(self) -> dict[str, Any]:
        """A plain dict, see `equipoise.telemetry.readings.read`."""
        return read(self.windows, self.balancer, self.laser)
