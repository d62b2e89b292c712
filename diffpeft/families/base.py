"""What the trainer asks of a family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Frame(NamedTuple):
    """Where the pixels of an example are from: (height, width) of the picture as it was, (top, left) of the crop in the picture as it was scaled,
    (height, width) that is trained on.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


class Noised(NamedTuple):
    """Noised latents, the model's time, what the model shall predict, the signal-to-noise ratio [b], and the kind of prediction."""

    x: Tensor
    t: Tensor
    target: Tensor
    snr: Tensor
    kind: str  # epsilon, v_prediction, sample, or what else a family's models predict


class Family(Protocol):
    """A pipeline seen from the training side. `denoiser` and `text_encoders` name its components."""

    pipelines: tuple[str, ...]  # the classes that are trained as they are
    denoiser: str
    text_encoders: tuple[str, ...]
    pipe: Any
    kind: str  # what the denoiser predicts, as in Noised
    resolution: int  # pixels, the side of the square that the model was made for
    multiple: int  # pixels, what a side must be a multiple of

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents, fp32."""

    def embed(self, prompts: list[str]) -> Tensor:
        """What the denoiser reads of the prompts, [b, ...]."""

    def noised(self, z: Tensor, n: Tensor, u: Tensor) -> Noised:
        """Latents z with noise n at noise levels u [b] in [0, 1), 0 the cleanest."""

    def predict(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The denoiser's prediction [b, c, h, w] in fp32, of noised latents x [b, c, h, w] at times t [b], with what it reads of the prompts."""
