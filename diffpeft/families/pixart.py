"""PixArt-alpha and -sigma (Chen et al. 2023, arXiv:2310.00426): a transformer on latents that predicts epsilon and a variance, which is not read.
Alpha's largest model reads the size of the image beside the caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Frame, Levels, Prompted, Sizes
from diffpeft.families.devices import sent
from diffpeft.families.discrete import Discrete
from diffpeft.families.dit import Transformer, in_blocks, masked_prompts
from diffpeft.families.latents import factor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component, Configs, Parts

_TOKENS = {"PixArtAlphaPipeline": 120}  # of T5 that are read


class PixArt(Transformer):
    """The training side of a PixArtAlphaPipeline or a PixArtSigmaPipeline."""

    name = "PixArt"
    pipelines: tuple[str, ...] = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
    presets = in_blocks(r"transformer_blocks\.\d+", r"attn[12]\.(to_[qkv]|to_out\.0)", r"ff\.net\.(0\.proj|2)")
    tokens = most_tokens = 300

    def __init__(self, parts: Parts, reading: CaptionReading):
        kind = type(parts.pipe).__name__
        self.tokens = self.most_tokens = _TOKENS.get(kind, self.tokens)
        super().__init__(parts, reading)
        self.architecture = "pixart-alpha" if kind in _TOKENS else "pixart-sigma"
        self.base_version = self.architecture.replace("-", "_")
        config = parts.configs[self.denoiser]
        self.sized: bool = kind in _TOKENS and config["sample_size"] == 128

    def levels_of(self, scheduler: Component) -> Levels:
        """Discrete ones."""
        return Discrete(scheduler)

    @classmethod
    def sizes(cls, configs: Configs) -> Sizes:
        """Whole tokens of the size that the transformer was made for."""
        size, pixels = configs.get(cls.denoiser, {}).get("sample_size"), factor(configs.get("vae", {}))
        return Sizes(size * pixels if size and pixels else None, pixels * cls.patch if pixels else None)

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """T5's hidden states [n, width], and which are no filling [n]. The pipelines clean captions where they have the libraries for it."""
        from diffusers.utils import is_bs4_available, is_ftfy_available

        cleaned = is_bs4_available() and is_ftfy_available()
        text, mask, *_ = self.pipe.encode_prompt(
            [prompt], False, device=device, clean_caption=cleaned, max_sequence_length=self.max_length
        )
        return {"text": text[0], "mask": mask[0]}

    def framed(self, frames: Sequence[Frame]) -> Conditions:
        """Height and width [b, 2], and height over width [b, 1], of what is trained; nothing for models that read none."""
        import torch

        if not self.sized:
            return {}
        sizes = torch.tensor([frame.target for frame in frames], dtype=torch.float32)
        return {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Epsilon: the first half of what the transformer says."""
        answer = model(
            x,
            encoder_hidden_states=read["text"],
            encoder_attention_mask=sent(read["mask"], x.device),
            timestep=t,
            added_cond_kwargs={"resolution": read.get("resolution"), "aspect_ratio": read.get("aspect_ratio")},
            return_dict=False,
        )[0]
        return answer[:, : x.shape[1]]

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As the pipelines take prompts; the negative ones are said beside them, and sizes are those that are asked for."""
        return masked_prompts(prompts, negative) | {"negative_prompt": None, "use_resolution_binning": False}
