"""Observer: who is told what an engine is given and does; this one takes no notice, `vlmfx.engine.recorder` writes it down."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlmfx.engine.launched import Drawn, Failure
from vlmfx.engine.scheduler import StepPlan
from vlmfx.engine.sequence import Request
from vlmfx.errors import VlmfxError
from vlmfx.processing.inputs import ModelInputs


class Observer:
    """Called by the thread that steps the engine, in order."""

    def began(self, request: Request, inputs: ModelInputs) -> None:
        """A request whose inputs are there."""

    def ended(self, number: int, error: VlmfxError | None) -> None:
        """A request was ended from outside: aborted, or by an error such as its deadline's."""

    def forgot(self) -> None:
        """The caches were reset."""

    def planned(self, plan: StepPlan) -> None:
        """A step, before it is launched."""

    def failed(self, failures: Sequence[Failure]) -> None:
        """Requests that failed in the step that was planned last."""

    def read(self, drawn: Sequence[Drawn]) -> None:
        """What a step has drawn, for failed and ended texts, too."""

    def pooled(self, requests: Sequence[Request], vectors: Sequence[Tensor | VlmfxError]) -> None:
        """The vectors of one pass."""
