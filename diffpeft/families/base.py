"""What the trainer asks of a family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from diffpeft.families.parts import Configs, Parts, Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# What a denoiser reads beside latents and time, by name, each [b, ...]. Those of a caption, of an example's frame and of its pictures have no name in common.
# Where captions are of several lengths they are filled up with zeros at the end (`prompts.stacked`), and `length` [b] says how many tokens count. Integers stay
# on the host. Latents are [b, c, *size]: of images [b, c, h, w], of clips [b, c, f, h, w].
Conditions = dict[str, "Tensor"]


Prompted = dict[str, Any]  # keyword arguments of a pipeline: tensors, and lists of them


class Frame(NamedTuple):
    """Where the pixels of an example are from: (height, width) of the picture as it was, (top, left) of the crop in the picture as it was scaled,
    (height, width) that is trained on.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


class Sizes(NamedTuple):
    """Pixels: the side of the square that a model was made for, and what a side must be a multiple of. Of a model of clips the frames that its VAE takes for
    one, but for the first, and how many it was made for a second. None where the configs do not tell.
    """

    resolution: int | None
    multiple: int | None
    temporal: int | None = None
    rate: float | None = None

    def known(self) -> tuple[int, int]:
        """Both, of configs that lack nothing."""
        assert self.resolution and self.multiple
        return self.resolution, self.multiple


class CaptionReading(NamedTuple):
    """How captions are read: how many tokens at most (None: what is usual for the model), and which of CLIP's last layers, 1 the last."""

    max_length: int | None = None
    clip_skip: int = 1


USUAL = CaptionReading()


class Noised(NamedTuple):
    """Noised latents, the time as the denoiser reads it, what it shall predict, the signal-to-noise ratio [b], and the kind of prediction.

    x = signal z + sigma n, and snr = (signal / sigma)^2: it says all of a level, whatever the family.
    """

    x: Tensor
    t: Tensor
    target: Tensor
    snr: Tensor
    kind: str  # epsilon, v_prediction, sample, or flow

    @property
    def sigma(self) -> Tensor:
        """The share of the noise in x [b], from 0 to 1. The signal's is 1 - sigma on a flow, and sqrt(1 - sigma^2) elsewhere."""
        return 1 / (1 + self.snr.sqrt()) if self.kind == "flow" else (1 + self.snr).rsqrt()


class Levels(Protocol):
    """The levels of noise that a family has. A level is u in [0, 1), 0 the cleanest; what it comes to may depend on the size of the latents."""

    @property
    def kind(self) -> str:
        """What the denoiser predicts, as in Noised."""

    @property
    def density(self) -> str:
        """How u is drawn where nothing is said: a name in DENSITIES."""

    def sigma(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """The share of noise [b] at levels u [b], for latents [b, c, *size] of this shape."""

    def place(self, sigma: Tensor, shape: Sequence[int]) -> Tensor:
        """The level u [b] that has a share of noise: the inverse of `sigma`."""

    def noised(self, z: Tensor, n: Tensor, u: Tensor) -> Noised:
        """Latents z with noise n, both [b, c, *size], at levels u [b]."""


class Family(Protocol):
    """A pipeline seen from the training side. `denoiser`, `text_encoders` and the VAE name its components.

    The components but the denoiser may leave the device once what they compute is kept: `parts.free`. They come back when they are asked for.
    """

    pipelines: tuple[str, ...]  # the classes that are trained as they are
    denoiser: str
    denoisers: tuple[str, ...]  # all of them, `denoiser` the first
    boundary: (
        float | None
    )  # the share of noise from which on the first of two denoisers is asked, and below it the second
    only: (
        str | None
    )  # the denoiser that all times are of, where that is known: times are on the device, and reading them waits for it
    text_encoders: tuple[str, ...]  # in the order in which `embed` is asked
    adaptable: tuple[str, ...]  # those of them that an adapter is trained on
    presets: Mapping[
        str, str
    ]  # {preset: the regular expression for its layers}, where suffixes that all models share would be others
    unread: Mapping[str, str]  # {component: the regular expression for those of its layers that nothing reads}
    guidance: Mapping[
        str, str
    ]  # {cfg (from a negative prompt) or guidance (that it reads): the keyword of its pipeline, or of its guider}
    drawing_steps: int  # in which it draws well
    controls: tuple[int, int]  # the fewest and the most control images that an example has
    aligned: bool  # whether control images lie over the picture, pixel by pixel, and so have its size
    first_frame: bool  # whether `condition` reads the example's own pixels too
    viewers: tuple[str, ...]  # the components that `encode` and `condition` look at pictures with
    looking: tuple[str, ...]  # those of the text encoders that look at the control images beside a prompt
    beside: tuple[
        str, ...
    ]  # the components that `predict` uses beside the denoiser: they are loaded when they are first needed, and stay
    together: bool  # whether a caption is read by all text encoders at once, under the name of the first

    parts: Parts
    pipe: Pipeline  # the pipeline of `parts`; components that have left the device are None in it
    levels: Levels
    architecture: str  # what ModelSpec calls the model
    base_version: str  # what sd-scripts calls it: ss_base_model_version
    resolution: int
    multiple: int
    temporal: int | None  # frames that the VAE takes for one, but for the first; None: of images
    rate: float | None  # frames a second
    max_length: int  # tokens of a caption that are read

    def __init__(self, parts: Parts, reading: CaptionReading):
        """Raises WrongBaseError for a model that cannot be trained, ConfigError for a way to read captions that it cannot."""

    @classmethod
    def sizes(cls, configs: Configs) -> Sizes:
        """What the configs tell of the sizes of images. They may lack anything."""

    @classmethod
    def channels(cls, latent: int) -> int:
        """How many channels the denoiser reads of latents with so many: other models of its class read more, of images that are edited or filled in."""

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1], of clips [b, 3, f, h, w], -> mean and standard deviation of the latents as the denoiser reads them, fp32. Uses the
        VAE alone.
        """

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """What the denoiser reads of pictures beside the latents that are trained: of control images, each [b, 3, h, w] in [-1, 1] and of a size of its
        own, or of the first frame of the examples' pixels [b, 3, (f,) h, w]. Uses the VAE alone, or an image encoder.

        `counts` [b, 1, *size], with ones for axes along which it does not change, is no condition: it says which places of the latents are predicted, where
        some are known.
        """

    def pictured(self, images: Sequence[Image], size: tuple[int, int]) -> Prompted:
        """The control images of one picture of a size (width, height) in the keywords of the pipeline."""

    def embed(self, encoder: str, prompts: Sequence[str], images: Sequence[Tensor] = ()) -> Conditions:
        """What the denoiser reads of the prompts through one of the text encoders. Uses that alone; all of them together make a caption's conditions.

        `images`: the control images beside the prompts, each [b, 3, h, w] in [-1, 1], for an encoder that looks at them.
        """

    def framed(self, frames: Sequence[Frame]) -> Conditions:
        """What the denoiser reads of where the pixels are from; empty for a family whose does not."""

    def predict(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The denoiser's prediction [b, c, *size] in fp32, of noised latents x [b, c, *size] at times t [b]. Uses the denoiser alone, of several those
        that are for these times.
        """

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """Conditions of prompts, and of as many negative ones for guidance, as the pipeline takes them instead of texts.

        `blank`: nobody asked for negative ones; some models have zeros for these, and some have none.
        """
