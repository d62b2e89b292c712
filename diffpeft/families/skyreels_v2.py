"""SkyReels-V2 (Skywork 2025, arXiv:2504.13074), to video from a text or an image: Wan's texts and blocks. Models of diffusion forcing read a time for each
frame, which here is the same for all, as their pipeline has it unless it is told otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.dit import ClipTransformer
from diffpeft.families.packages import check_imported
from diffpeft.families.wan import Wan, WanImageToVideo

if TYPE_CHECKING:
    from torch import Tensor

    from diffpeft.families.parts import Component, Parts


_FORCING = "SkyReelsV2DiffusionForcingPipeline"
_SLOW = 16  # frames a second: 0 for the model, which has 1 for every other rate


class SkyReelsV2(Wan):
    """The training side of a SkyReelsV2Pipeline or a SkyReelsV2DiffusionForcingPipeline."""

    name = "SkyReels-V2"
    pipelines: tuple[str, ...] = ("SkyReelsV2Pipeline", _FORCING)
    frames_a_second = 24
    side = 720  # about the area of 544 x 960
    architecture = "skyreels-v2"
    base_version = "skyreels_v2"

    def __init__(self, parts: Parts, reading: CaptionReading):
        ClipTransformer.__init__(self, parts, reading)  # what a WanPipeline says of its denoisers, this one does not
        check_imported(type(parts.pipe), "ftfy", "ftfy", "the pipeline cleans captions")
        self.forced = type(parts.pipe).__name__ == _FORCING

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is a thousand times the share of noise. Where the model reads the rate of frames, it takes one clip after the other."""
        import torch

        if not self.forced:
            return model(x, 1000 * t, read["text"], return_dict=False)[0]
        time = 1000 * t[:, None].expand(-1, x.shape[2])
        per = 1 if model.config.inject_sample_info else len(x)
        clips = zip(x.split(per), time.split(per), read["text"].split(per), strict=True)
        forced = {"enable_diffusion_forcing": True, "fps": [int(self.rate != _SLOW)] * per, "return_dict": False}
        return torch.cat([model(*clip, **forced)[0] for clip in clips])

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As both pipelines take prompts, for single frames; one does not do without a text, which may be none."""
        rate = {"fps": self.rate} if self.forced else {}
        return super().prompted(prompts, negative, blank) | {"prompt": None} | rate


class SkyReelsV2ImageToVideo(SkyReelsV2, WanImageToVideo):
    """The training side of a SkyReelsV2ImageToVideoPipeline, which reads what Wan 2.1 does of the first frame."""

    pipelines: tuple[str, ...] = ("SkyReelsV2ImageToVideoPipeline",)
    viewers: tuple[str, ...] = ("vae", "image_encoder")
    architecture = "skyreels-v2-i2v"
    sees = True

    def condition(self, pixels: Tensor, controls: Sequence[Tensor]) -> Conditions:
        """The first frame's latents, and what CLIP sees of it."""
        return self.known_beside(pixels)

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is a thousand times the share of noise."""
        return WanImageToVideo.velocity(self, model, x, t, read)
