"""The eight ways of fine-tuning in R&Q's Table 1: what is trained in which epoch.

The paper names them in a table and says no more; this is how they are read here. "Rest" is everything that is
neither router nor expert: embeddings, attention, dense layers, norms.

    name                       experts   rest   routers
    full                       yes       yes    yes
    tune expert                yes       no     no
    tune router                no        no     yes
    tune both                  yes       no     yes
    freeze router              yes       yes    no
    freeze router 1 epoch      yes       yes    from the second epoch on
    tune router 10 %           yes       yes    on every tenth batch
    tune router last 2 epochs  yes       yes    in the last two epochs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from equipoise.errors import InputError

When = Callable[[int, int, int], bool]
"""(epoch, batch, epochs) -> whether the routers are trained; epochs and batches from 0, batches over the whole run."""


def _always(epoch: int, batch: int, epochs: int) -> bool:
    return True


def _never(epoch: int, batch: int, epochs: int) -> bool:
    return False


@dataclass(frozen=True)
class Strategy:
    """One row of the table."""

    name: str
    experts: bool
    rest: bool
    routers: When

    def trains(self, parameter: str, epoch: int, batch: int, epochs: int) -> bool:
        """Whether a parameter, by its name in transformers, is trained at this point."""
        if ".router." in parameter:
            return self.routers(epoch, batch, epochs)
        return self.experts if ".experts." in parameter else self.rest


STRATEGIES = (
    Strategy("full", True, True, _always),
    Strategy("tune expert", True, False, _never),
    Strategy("tune router", False, False, _always),
    Strategy("tune both", True, False, _always),
    Strategy("freeze router", True, True, _never),
    Strategy("freeze router 1 epoch", True, True, lambda epoch, batch, epochs: epoch >= 1),
    Strategy("tune router 10 %", True, True, lambda epoch, batch, epochs: batch % 10 == 0),
    Strategy("tune router last 2 epochs", True, True, lambda epoch, batch, epochs: epoch >= epochs - 2),
)


def strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        InputError: there is none.
    """
    for found in STRATEGIES:
        if found.name == name:
            return found
    raise InputError(f"no strategy {name!r}; choose from {', '.join(s.name for s in STRATEGIES)}")
