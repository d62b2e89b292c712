"""Families whose pipelines say all of a training step: what stands here is what they cannot say, as names for people and which layers are worth training."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffpeft.families.base import CaptionReading, Sizes
from diffpeft.families.dit import in_blocks
from diffpeft.families.flux import Flux
from diffpeft.families.generic import Generic
from diffpeft.families.kandinsky5_video import Kandinsky5Video

if TYPE_CHECKING:
    from torch import Tensor

    from diffpeft.families.parts import Component, Configs, Parts


class Followed(Generic):
    """One of these."""

    @classmethod
    def sizes(cls, configs: Configs, pipe: Component | None = None) -> Sizes:
        """Whole tokens of the size that the model was made for."""
        return Sizes(cls.side, super().sizes(configs).multiple)


class HunyuanImage(Followed):
    """HunyuanImage 2.1 (Tencent 2025): a VAE that takes 32 pixels for one, Qwen2.5-VL's hidden states, and ByT5's of what stands in quotation marks."""

    name = "HunyuanImage"
    pipelines: tuple[str, ...] = ("HunyuanImagePipeline",)
    presets = Flux.presets
    unread: Mapping[str, str] = MappingProxyType(
        {"transformer": r"context_embedder_2\..*"}
    )  # most captions quote nothing
    side = 2048
    architecture = "hunyuan-image-2.1"
    base_version = "hunyuan_image"

    def _guidance(self) -> Mapping[str, str]:
        """Distilled models read one; that of the others is of the pipeline's guider."""
        guided = self.parts.configs[self.denoiser]["guidance_embeds"]
        return {"guidance": "distilled_guidance_scale"} if guided else {}


class Bria(Followed):
    """Bria 3 (Bria 2025): Flux.1's blocks, and T5's hidden states."""

    name = "Bria"
    pipelines: tuple[str, ...] = ("BriaPipeline",)
    presets = Flux.presets
    packing = 2
    tokens = 128
    architecture = "bria-3"
    base_version = "bria"


class BriaFibo(Followed):
    """FIBO (Bria 2025): every block reads another layer of SmolLM3. Latents are Wan 2.2's."""

    name = "FIBO"
    pipelines: tuple[str, ...] = ("BriaFiboPipeline",)
    presets = Flux.presets
    tokens = 3000
    architecture = "bria-fibo"
    base_version = "bria_fibo"


class OvisImage(Followed):
    """Ovis-Image (AIDC 2025): Flux.1's blocks, and Ovis's hidden states."""

    name = "Ovis-Image"
    pipelines: tuple[str, ...] = ("OvisImagePipeline",)
    presets = Flux.presets
    packing = 2
    tokens = 256
    architecture = "ovis-image"
    base_version = "ovis_image"


class LongCatImage(Followed):
    """LongCat-Image (Meituan 2025): Flux.1's blocks, and Qwen2.5-VL's hidden states. Prompts are not rewritten: captions are read as they are."""

    name = "LongCat-Image"
    pipelines: tuple[str, ...] = ("LongCatImagePipeline",)
    presets = Flux.presets
    packing = 2
    architecture = "longcat-image"
    base_version = "longcat_image"


class Kandinsky5(Followed):
    """Kandinsky 5 Image (Sber 2025): Qwen2.5-VL's hidden states, and what CLIP pools."""

    name = "Kandinsky 5"
    pipelines: tuple[str, ...] = ("Kandinsky5T2IPipeline",)
    presets = Kandinsky5Video.presets
    architecture = "kandinsky-5-image"
    base_version = "kandinsky5"

    def __init__(self, parts: Parts, reading: CaptionReading):
        parts.pipe.resolutions = Everything()  # it has seven, and draws others in the nearest
        super().__init__(parts, reading)


class Everything(tuple[object, ...]):
    """Whatever is asked for is in it."""

    def __contains__(self, value: object) -> bool:
        return True


class PRX(Followed):
    """PRX (Photoroom 2025): one stream of image patches beside T5Gemma's hidden states."""

    name = "PRX"
    pipelines: tuple[str, ...] = ("PRXPipeline",)
    presets = in_blocks(r"blocks\.\d+", r"attention\.(img_qkv_proj|txt_kv_proj|to_out\.0)", r"(gate|up|down)_proj")
    side = 512
    tokens = 256
    architecture = "prx"
    base_version = "prx"


class NucleusImage(Followed):
    """Nucleus-Image (Nucleus 2026): blocks of experts, and a late layer of Qwen3-VL. Experts and what chooses them are left out."""

    name = "Nucleus-Image"
    pipelines: tuple[str, ...] = ("NucleusMoEImagePipeline",)
    presets = in_blocks(
        r"transformer_blocks\.\d+",
        r"attn\.(to_[qkv]|to_out\.0|add_[kv]_proj)",
        r"encoder_proj|img_mlp\.(shared_expert\.)?net\.(0\.proj|2)",
    )
    unread: Mapping[str, str] = MappingProxyType({"transformer": r".*\.(gate|experts\..*)"})
    packing = 2
    tokens = 1024
    architecture = "nucleus-image"
    base_version = "nucleus_image"


class QwenImage21(Followed):
    """Qwen-Image 2.1 (Alibaba 2026): one stream of latent pixels and Qwen3-VL's hidden states. Its VAE reads how opaque a picture is: all of it."""

    name = "Qwen-Image 2.1"
    pipelines: tuple[str, ...] = ("QwenImage21Pipeline",)
    presets = in_blocks(r"transformer_blocks\.\d+", r"attn\.(to_[qkv]|to_out\.0)", r"img_mlp\.(gate_layer|proj|out)")
    architecture = "Qwen-Image-2.1"
    base_version = "qwen_image_2_1"

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents [b, c, 1, h / f, w / f]."""
        import torch

        return super().encode(torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1))


class BriaFibo2(Followed):
    """FIBO 2 (Bria 2026): eighteen layers of Qwen3-VL in six bundles."""

    name = "FIBO 2"
    pipelines: tuple[str, ...] = ("BriaFibo2Pipeline",)
    presets = in_blocks(r"layers\.\d+", r"(cross_)?attention\.(to_[qkv]|to_out\.0)", r"feed_forward\.w[123]")
    architecture = "bria-fibo-2"
    base_version = "bria_fibo2"


class Kolors(Followed):
    """Kolors (Kuaishou 2024): SDXL's UNet and sizes, and ChatGLM's hidden states."""

    name = "Kolors"
    pipelines: tuple[str, ...] = ("KolorsPipeline",)
    tokens = 256
    architecture = "kolors"
    base_version = "kolors"


FOLLOWED: dict[str, type[Followed]] = {
    "hunyuan_image": HunyuanImage,
    "bria": Bria,
    "bria_fibo": BriaFibo,
    "ovis_image": OvisImage,
    "longcat_image": LongCatImage,
    "kandinsky5": Kandinsky5,
    "prx": PRX,
    "nucleus_image": NucleusImage,
    "qwen_image21": QwenImage21,
    "bria_fibo2": BriaFibo2,
    "kolors": Kolors,
}
