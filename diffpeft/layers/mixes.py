"""What layers ask of a mix (`diffpeft.model.mix`): which adapters are active, and how strong each is on a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

Step_co = TypeVar("Step_co", covariant=True)


class ActiveLike(Protocol):
    """Active adapters in activation order, with a number for each layer."""

    @property
    def order(self) -> tuple[str, ...]:
        """The adapters."""

    @property
    def strengths(self) -> Mapping[str, Sequence[float]]:
        """By adapter, of each layer."""


class SingleLike(Protocol):
    """What holds on one layer."""

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that are active, in order."""

    @property
    def strengths(self) -> Mapping[str, object]:
        """How strong adapters are when they are active: a number, or what changes from step to step. 1 if it is not said."""

    @property
    def enabled(self) -> bool:
        """Whether any acts."""


class ChoiceLike(ActiveLike, Protocol):
    """What was set."""

    def single(self, index: int) -> SingleLike:
        """What holds on one layer."""

    @property
    def levels(self) -> Mapping[str, Sequence[object]]:
        """By adapter, of each layer: a number, or what changes from step to step."""

    @property
    def rows(self) -> Sequence[ChoiceLike]:
        """One a prompt; none where all have the same."""


class MomentLike(ActiveLike, Protocol):
    """What layers read of a choice in one step, for one batch."""

    @property
    def of(self) -> ChoiceLike:
        """The choice, which stays from step to step."""

    @property
    def table(self) -> Tensor:
        """The strengths as [active adapter, layer], fp32: what compiled code reads."""

    @property
    def rows(self) -> Sequence[MomentLike]:
        """One a prompt; none where all have the same."""

    @property
    def batch(self) -> int:
        """How many rows the batch has, 0 if that is not known."""

    @property
    def images(self) -> int:
        """How many rows of a batch a prompt has."""


class MixLike(Protocol):
    """The strengths of one component."""

    @property
    def layers(self) -> Sequence[str]:
        """The layer of each column."""

    def standing(self) -> ChoiceLike:
        """The choice that holds here and now."""

    def current(self) -> MomentLike:
        """The moment of it that layers apply."""


class CarrierLike(Protocol[Step_co]):
    """What a module carries of adapters."""

    @property
    def mix(self) -> MixLike:
        """Where their strengths stand."""

    @property
    def index(self) -> int:
        """The column of the module there."""

    @property
    def where(self) -> str:
        """The module's name in its component."""

    def acting(self, moment: MomentLike) -> Sequence[Step_co]:
        """What acts in order."""
