"""LTX-2 (Lightricks 2026, arXiv:2601.03233), text to video: clips [b, c, f, h, w] and, beside them, audio that is not trained. Texts are all layers of Gemma,
which connectors that belong to the model turn into what both streams read.

Examples have no sound. The streams are set apart, as the model knows it from training: nothing of the audio reaches the video, and layers of audio are not
chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import ClipTransformer, counted
from diffpeft.families.ltx import LTX

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component, Parts


_HEARD = ("audio_vae", "vocoder")  # what the pipeline draws sound with


class LTX2(ClipTransformer):
    """The training side of an LTX2Pipeline of LTX-2, 2.3 or 2.5."""

    name = "LTX-2"
    pipelines: tuple[str, ...] = ("LTX2Pipeline",)
    presets = LTX.presets
    unread: Mapping[str, str] = MappingProxyType({"transformer": r"(.*\.)?(audio_|video_to_audio_|av_cross_attn_).*"})
    beside: tuple[str, ...] = ("connectors",)
    patch = 1
    side = 640  # about the area of 512 x 768
    tokens = most_tokens = 1024
    architecture = "ltx-2"
    base_version = "ltx2"

    def __init__(self, parts: Parts, reading: CaptionReading):
        super().__init__(parts, reading)
        parts.pipe.tokenizer.padding_side = "left"  # as the pipeline sets it where it reads texts

    def read(self, encoder: str, prompt: str, device: torch.device) -> Conditions:
        """All of Gemma's hidden states [n, width layers] of as many tokens as a prompt has."""
        import torch

        states, mask = self.pipe._get_gemma_prompt_embeds([prompt], max_sequence_length=self.max_length, device=device)
        text = states[0][mask[0].bool()]
        return {"text": text, "length": torch.tensor(len(text))}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """One token a pixel of x; time is a thousand times the share of noise."""
        frames, height, width = x.shape[2:]
        text, audio_text, mask = self._connected(read)
        answer, _ = model(
            hidden_states=x.flatten(2).mT,
            audio_hidden_states=x.new_zeros(len(x), 1, model.config.audio_in_channels),
            encoder_hidden_states=text,
            audio_encoder_hidden_states=audio_text,
            timestep=1000 * t,
            sigma=1000 * t,
            encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask,
            num_frames=frames,
            height=height,
            width=width,
            fps=self.rate,
            audio_num_frames=1,
            isolate_modalities=True,
            use_cross_timestep=True,
            return_dict=False,
        )
        return answer.mT.unflatten(2, x.shape[2:])

    def _connected(self, read: Conditions) -> tuple[Tensor, Tensor, Tensor]:
        """What both streams read of texts, and which tokens count. One text at a time: all layers of many long ones are gigabytes."""
        import torch

        connectors = self.parts("connectors")
        states, masks = self._filled(read)
        rows = zip(states.split(1), sent(masks, states.device).split(1), strict=True)
        with torch.no_grad():
            answers = [connectors(row, mask, padding_side="left") for row, mask in rows]
        text, audio_text, mask = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return text, audio_text, mask

    def _filled(self, read: Conditions) -> tuple[Tensor, Tensor]:
        """Texts [b, tokens, width] with all filling before them, and which tokens are none [b, tokens], on the host."""
        import torch

        rows = zip(read["text"], read["length"].tolist(), strict=True)
        states = [torch.nn.functional.pad(text[:n], (0, 0, self.max_length - n, 0)) for text, n in rows]
        return torch.stack(states), counted(read["length"], self.max_length).flip(1).long()

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As an LTX2Pipeline takes prompts, for single frames. It draws with components that training does without, which are small and stay."""
        for name in (*self.beside, *_HEARD):
            self.parts(name)
        keywords: Prompted = {"num_frames": 1, "frame_rate": self.rate}
        for prefix, read in (("", prompts), ("negative_", negative)):
            keywords[f"{prefix}prompt_embeds"], keywords[f"{prefix}prompt_attention_mask"] = self._filled(read)
        return keywords
