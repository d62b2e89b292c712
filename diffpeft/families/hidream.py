"""HiDream-I1 (HiDream 2025, arXiv:2505.22705): what two CLIPs pool, T5's hidden states and those of every layer of Llama 3, and experts of which each token
asks two. It predicts the way to the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffpeft.families.base import Conditions, Prompted
from diffpeft.families.dit import Transformer, in_blocks
from diffpeft.families.flow import USUAL, Flow

if TYPE_CHECKING:
    from torch import Tensor

    from diffpeft.families.parts import Component

_CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class HiDream(Transformer):
    """The training side of a HiDreamImagePipeline. Experts are left out: not every step asks each of them."""

    name = "HiDream"
    pipelines: tuple[str, ...] = ("HiDreamImagePipeline",)
    text_encoders: tuple[str, ...] = (*_CLIPS, "text_encoder_3", "text_encoder_4")
    presets = in_blocks(
        r"(double|single)_stream_blocks\.\d+\.block",
        r"attn1\.(to_[qkv]|to_out|to_[qkv]_t|to_out_t)",
        r"(ff_t|ff_i\.shared_experts)\.w[123]",
    )
    unread: Mapping[str, str] = MappingProxyType({"transformer": r".*\.experts\..*"})
    tokens = most_tokens = 128
    architecture = "hidream-i1"
    base_version = "hidream_i1"

    def levels_of(self, scheduler: Component) -> Flow:
        """The pipeline takes the largest number of tokens for that of an image: where it shifts by size, the shift is the same for all."""
        config = self.parts.configs[self.denoiser]
        rows, columns = config["max_resolution"]
        most = rows * columns // config["patch_size"] ** 2
        return Flow.of(scheduler, self.patch, lambda _: USUAL(most))

    def embed(self, encoder: str, prompts: Sequence[str], images: Sequence[Tensor] = ()) -> Conditions:
        """What a CLIP pools [b, width], T5's hidden states [b, n, width], or those of Llama's layers [b, layers, n, width]."""
        import torch

        pipe, model, texts = self.pipe, self.parts(encoder), list(prompts)
        with torch.no_grad():
            if encoder in _CLIPS:
                tokenizer = getattr(pipe, _CLIPS[encoder])
                pooled = pipe._get_clip_prompt_embeds(tokenizer, model, texts, self.max_length, model.device)
                return {encoder: pooled}
            if encoder == "text_encoder_3":
                return {"t5": pipe._get_t5_prompt_embeds(texts, self.max_length, model.device, model.dtype)}
            states = pipe._get_llama3_prompt_embeds(texts, self.max_length, model.device, model.dtype)
        return {"llama": states.transpose(0, 1).contiguous()}

    def velocity(self, model: Component, x: Tensor, t: Tensor, read: Conditions) -> Tensor:
        """Time is a thousand times the share of noise, and the sign is the other way round. Experts that are chosen hand gradients on in training alone."""
        import torch

        for module in model.modules() if torch.is_grad_enabled() else ():
            if hasattr(module, "moe_infer"):
                module.training = True  # its own: no module in it drops anything
        texts = {f"encoder_hidden_states_{name}": states for name, states in _texts(read).items()}
        answer = model(hidden_states=x, timesteps=1000 * t, pooled_embeds=_pooled(read), **texts, return_dict=False)[0]
        return -answer

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As a HiDreamImagePipeline takes prompts."""
        return {
            f"{sign}{name}": value
            for sign, read in (("", prompts), ("negative_", negative))
            for name, value in (
                ("pooled_prompt_embeds", _pooled(read)),
                *((f"prompt_embeds_{name}", states) for name, states in _texts(read).items()),
            )
        }


def _pooled(read: Conditions) -> Tensor:
    """What both CLIPs pool side by side [b, width + width]."""
    import torch

    return torch.cat([read[name] for name in _CLIPS], dim=-1)


def _texts(read: Conditions) -> dict[str, Tensor]:
    """T5's hidden states [b, n, width], and Llama's [layers, b, n, width]."""
    return {"t5": read["t5"], "llama3": read["llama"].transpose(0, 1)}
