"""Ideogram 4 (Ideogram 2026): one stream of texts and image patches, thirteen layers of a language model side by side. Its time is 1 - sigma, and it
predicts the way to the image. Its VAE is Flux.2's kind, with the pixels of a patch before the channels. A second transformer is for guidance, and is not
trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpeft.errors import ConfigError
from diffpeft.families.base import Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import Transformer, in_blocks
from diffpeft.families.flow import Flow
from diffpeft.families.flux2 import standardised
from diffpeft.families.latents import factor, moments
from diffpeft.families.patches import PATCH, patchified

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component

_BASE = 512  # pixels, the side of an image that is not shifted


class Ideogram4(Transformer):
    """The training side of an Ideogram4Pipeline."""

    name = "Ideogram 4"
    pipelines: tuple[str, ...] = ("Ideogram4Pipeline",)
    presets = in_blocks(r"layers\.\d+", r"attention\.(to_[qkv]|to_out\.0)", r"feed_forward\.w[123]")
    packing = 2
    drawing_steps = 48
    tokens = most_tokens = 2048
    architecture = "ideogram-4"
    base_version = "ideogram4"

    def levels_of(self, scheduler: Component) -> Flow:
        """The pipeline's levels are those of a logit-normal density whose mean grows with the size of an image, which is a shift."""
        side = PATCH * (factor(self.parts.configs["vae"]) or 1)
        return Flow(None, lambda tokens: 0.5 * math.log(tokens * side**2 / _BASE**2))

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, 4 c, h / 2 f, w / 2 f]."""
        mean, std = (_turned(patchified(z)) for z in moments(self.parts("vae"), pixels))
        return standardised(self.parts("vae"), mean, std)

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """Hidden states [n, 13 width] of the prompt in the chat's template. Raises ConfigError for one that is too long."""
        import torch

        try:
            states, *_, kinds = self.pipe.encode_prompt([prompt], 1, 1, self.max_length, device)
        except ValueError as error:
            raise ConfigError(
                f"a caption has more tokens than the {self.max_length} that are read: {prompt[:60]!r} ...",
                remedy="Shorten it, or say --max-length with more.",
            ) from error
        length = int((kinds[0] == kinds[0, -2]).sum())  # a text ends at the first pixel
        text = states[0, -1 - length : -1].to(
            self.parts(encoder).dtype
        )  # the pipeline makes it fp32, of the same numbers
        return {"text": text, "length": torch.tensor(length)}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Texts stand before the image, filled up at their beginning; both signs are the other way round."""
        import torch

        inputs, n = self._inputs(read, x.shape[2], x.shape[3], x.device)
        tokens = x.flatten(2).mT
        answer = model(
            hidden_states=torch.cat([tokens.new_zeros(len(x), n, tokens.shape[2]), tokens], dim=1),
            timestep=(1 - t).to(x.dtype),
            **inputs,
            return_dict=False,
        )[0]
        return -answer[:, n:].mT.unflatten(2, x.shape[2:])

    def _inputs(self, read: Conditions, rows: int, columns: int, device: torch.device) -> tuple[dict[str, Tensor], int]:
        """What the transformer reads of texts beside an image of so many tokens, and how many of them are the texts'."""
        import torch

        text, lengths = read["text"], read["length"].tolist()
        n = text.shape[1]
        texts = torch.stack([row.roll(n - length, 0) for row, length in zip(text, lengths, strict=True)])
        filling = texts.new_zeros(len(texts), rows * columns, texts.shape[2])
        names = ("position_ids", "segment_ids", "indicator")
        ids = self.pipe._prepare_ids(lengths, rows, columns, n, torch.device("cpu"))
        inputs = {name: sent(value, device) for name, value in zip(names, ids, strict=True)}
        return inputs | {"encoder_hidden_states": torch.cat([texts, filling], dim=1)}, n

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """The pipeline takes texts alone: it is given some that know what they came to. Blank ones are the second transformer's."""
        self.parts("unconditional_transformer")
        read, encode = dict(prompts), type(self.pipe).encode_prompt

        def encode_prompt(
            prompt: Sequence[str], grid_h: int, grid_w: int, max_sequence_length: int, device: torch.device
        ) -> tuple[Tensor, ...]:
            if not isinstance(prompt, _Read):
                return encode(self.pipe, prompt, grid_h, grid_w, max_sequence_length, device)
            states = {name: t.to(device) if t.is_floating_point() else t for name, t in prompt.read.items()}
            inputs, _ = self._inputs(states, grid_h, grid_w, device)
            return tuple(inputs[name] for name in ("encoder_hidden_states", "position_ids", "segment_ids", "indicator"))

        self.pipe.encode_prompt = encode_prompt
        asked = _Read([""] * len(read["text"]))
        asked.read = read
        return {"prompt": asked, "max_sequence_length": read["text"].shape[1], "guidance_schedule": None}


class _Read(list[str]):
    """Texts that have been read."""

    read: Conditions


def _turned(x: Tensor) -> Tensor:
    """Channels (c, pixels of a patch) [b, 4 c, h, w] as (pixels of a patch, c)."""
    return x.unflatten(1, (-1, PATCH**2)).transpose(1, 2).flatten(1, 2)
