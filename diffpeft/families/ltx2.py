"""LTX-2 (Lightricks 2026, arXiv:2601.03233), to video from a text or an image: clips [b, c, f, h, w] and, beside them, audio that is not trained. Texts are
all layers of Gemma, which connectors that belong to the model turn into what both streams read.

Examples have no sound. The streams are set apart, as the model knows it from training: nothing of the audio reaches the video, and layers of audio are not
chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Conditions, Prompted
from diffpeft.families.devices import sent
from diffpeft.families.dit import ClipTransformer, FirstInPlace, counted
from diffpeft.families.frames import started
from diffpeft.families.ltx import LTX

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
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
        return self.answer(model, x, 1000 * t, 1000 * t, read)

    def answer(self, model: Component, x: Tensor, time: Tensor, noise: Tensor, read: Conditions) -> Tensor:
        """What the transformer says of latents x [b, c, f, h, w] at times [b], or [b, n] by token; the noise [b] is that of the clip."""
        frames, height, width = x.shape[2:]
        text, audio_text, mask = self._connected(read)
        answer, _ = model(
            hidden_states=x.flatten(2).mT,
            audio_hidden_states=x.new_zeros(len(x), 1, model.config.audio_in_channels),
            encoder_hidden_states=text,
            audio_encoder_hidden_states=audio_text,
            timestep=time,
            audio_timestep=noise,
            sigma=noise,
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


class LTX2ImageToVideo(FirstInPlace, LTX2):
    """The training side of an LTX2ImageToVideoPipeline: the first frame of a clip is known, and stands in its place at no noise."""

    pipelines: tuple[str, ...] = ("LTX2ImageToVideoPipeline",)

    def pictured(self, images: Sequence[Image], size: tuple[int, int]) -> Prompted:
        """The first frame, which the pipeline would compress as a video: it is trained on as it is."""
        return {"image": images[0], "image_crf": 0} if images else {}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is by token, and 0 for the first frame."""
        if "first" not in read:
            return super().velocity(model, x, t, read)
        clip, times = started(x, read["first"], 1000 * t)
        return self.answer(model, clip, times, 1000 * t, read)
