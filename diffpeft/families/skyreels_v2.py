"""SkyReels-V2 (Skywork 2025, arXiv:2504.13074), text to video: Wan's texts and blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions
from diffpeft.families.dit import ClipTransformer
from diffpeft.families.prompts import check_ftfy
from diffpeft.families.wan import Wan

if TYPE_CHECKING:
    from torch import Tensor

    from diffpeft.families.parts import Component, Parts


class SkyReelsV2(Wan):
    """The training side of a SkyReelsV2Pipeline."""

    name = "SkyReels-V2"
    pipelines: tuple[str, ...] = ("SkyReelsV2Pipeline",)
    side = 720  # about the area of 544 x 960
    architecture = "skyreels-v2"
    base_version = "skyreels_v2"

    def __init__(self, parts: Parts, reading: CaptionReading):
        ClipTransformer.__init__(self, parts, reading)  # what a WanPipeline says of its denoisers, this one does not
        check_ftfy(parts.pipe)

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is a thousand times the share of noise."""
        return model(hidden_states=x, timestep=1000 * t, encoder_hidden_states=read["text"], return_dict=False)[0]
