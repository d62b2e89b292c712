"""DoraCaching: whether the norms of DoRAs are kept between forwards."""

from __future__ import annotations

_enabled = False


class DoraCaching:
    """Keep the weight norms of DoRAs between forwards in evaluation, as PEFT's helper of this name does: faster, for a vector a layer.

    A norm is kept while the layer's weight and the adapter's tensors are the same, so what comes out is the same to the last bit. Training does not
    use it, nor a DoRA that acts after another adapter on its layer. It is off by default, and holds for the whole process.

    Example:
        >>> with DoraCaching():
        ...     model.eval()(x)
        >>> DoraCaching()(enabled=True)  # until it is switched off
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self._before: list[bool] = []

    def __enter__(self) -> DoraCaching:
        self._before.append(is_enabled())
        self(self.enabled)
        return self

    def __exit__(self, *error: object) -> None:
        self(self._before.pop())

    def __call__(self, enabled: bool = True) -> None:
        """Switch it on or off for good."""
        global _enabled
        _enabled = enabled


def is_enabled() -> bool:
    """Whether norms are kept now."""
    return _enabled
