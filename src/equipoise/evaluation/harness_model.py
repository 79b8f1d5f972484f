"""The harness's own Hugging Face model around one that is loaded already, with this package's progress bars.

Nothing of how prompts are tokenized, batched or scored is changed. It counts the prompts that the harness cuts on
the left because they do not fit the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

if TYPE_CHECKING:
    from equipoise.cli.console import Track
    from equipoise.models import LoadedModel


class _Answered(CacheHook):
    """The harness tells its cache of each answer; there is no cache here, only a bar that moves on."""

    def __init__(self, model: HarnessModel) -> None:
        super().__init__(None)
        self.model = model

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        if attr != "loglikelihood_rolling":  # those are all told at the end; their windows are counted instead
            self.model.advance()


class HarnessModel(HFLM):
    """`HFLM` for a `LoadedModel`."""

    def __init__(self, loaded: LoadedModel, batch_size: int, track: Track | None = None) -> None:
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
        self.cut = 0
        self._track = track
        self._bar: Iterator[int] | None = None
        self.set_cache_hook(_Answered(self))

    def advance(self) -> None:
        """One answer more."""
        if self._bar is not None:
            next(self._bar, None)

    @contextmanager
    def _progress(self, total: int | None, what: str) -> Iterator[None]:
        # A bar moves when its next item is asked for, hence one item more than there are steps.
        steps = iter(range(10**9)) if total is None else iter(range(total + 1))
        self._bar = self._track(steps, total, what) if self._track else None
        self.advance()
        try:
            yield
        finally:
            self._bar = None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness."""
        with self._progress(len(requests), "answers"):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As the harness; how many windows there will be is not known before."""
        with self._progress(None, "windows of text"):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As the harness."""
        room = self.max_length - (self.max_gen_toks if self.backend == "causal" else 0)
        self.cut += sum(len(self.tok_encode(request.args[0])) > room for request in requests)
        with self._progress(len(requests), "generated answers"):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        rolling = override_bs is not None
        if not rolling:
            extra = 1 if self.backend == "causal" else 0  # the last token is predicted, not read
            for _, context, continuation in requests:
                size = len(context) + (len(continuation) if self.backend == "causal" else 0)
                self.cut += size > self.max_length + extra
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            requests, disable_tqdm=True, override_bs=override_bs
        )
        if rolling:
            for _ in requests:
                self.advance()
        return answers
