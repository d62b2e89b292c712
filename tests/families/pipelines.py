"""Tiny random pipelines of every family that can be trained, by the kinds of configs that published models have."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import diffusers
import pytest
import torch
import transformers
from transformers import ProcessorMixin  # by its name here: diffusers loads what it finds beside a class

from tests.families import clips
from tests.families.components import CLIPS_OF_FRAMES, HUNYUAN_VAE, LLM, chat, clip, llm, t5, tokenizer

_UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_XL = {
    **_UNET,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32 + 40,
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
_ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
_DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}


def _vae(**config: Any) -> Any:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **kinds, **config)


def _sd(**scheduler: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=diffusers.UNet2DConditionModel(**_UNET),
        scheduler=diffusers.DDIMScheduler(**_BETAS, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd2(**scheduler: Any) -> Any:
    pipe = _sd(**scheduler)
    pipe.unet = diffusers.UNet2DConditionModel(**{**_UNET, "cross_attention_dim": 1024})
    wide = {**pipe.text_encoder.config.to_dict(), "hidden_size": 1024, "num_hidden_layers": 1}
    pipe.text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**wide))
    return pipe


def _sdxl(vae: dict[str, Any] | None = None, zeros: bool = True, **scheduler: Any) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(**(vae or {"scaling_factor": 0.13025})),
        text_encoder=clip(),
        text_encoder_2=clip(projected=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=diffusers.UNet2DConditionModel(**_XL),
        scheduler=diffusers.DDIMScheduler(**_BETAS, **scheduler),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def _flux(guided: bool, of: str = "FluxPipeline", channels: int = 16, **scheduler: Any) -> Any:
    return getattr(diffusers, of)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, latent_channels=4),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=channels,
            out_channels=16,
            num_layers=1,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guided,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def _flux_fill() -> Any:
    """With a VAE that takes eight pixels for one, as a mask's are taken for granted."""
    from tests.families.followed import _eight

    parts = _flux(True, channels=2 * 16 + 4 * 64, **_DYNAMIC).components
    parts["vae"] = _eight(scaling_factor=0.3611, shift_factor=0.1159)
    return diffusers.FluxFillPipeline(**{name: part for name, part in parts.items() if part is not None})


# -- transformers that read language models ------------------------------------------------------------------------------


def _statistics(vae: Any) -> Any:
    """A VAE with random statistics of its batch norm."""
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def _vae2() -> Any:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    widths = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}
    return _statistics(diffusers.AutoencoderKLFlux2(**widths, **kinds))


def _flux2(guided: bool) -> Any:
    return (diffusers.Flux2Pipeline if guided else diffusers.Flux2KleinPipeline)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**_DYNAMIC),
        vae=_vae2(),
        text_encoder=llm("Qwen3", 31 if guided else 28),
        tokenizer=chat(),
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            guidance_embeds=guided,
            axes_dims_rope=(4, 4, 4, 4),
        ),
    )


def _z_image(**scheduler: Any) -> Any:
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, latent_channels=4),
        text_encoder=llm("Qwen3", 2),
        tokenizer=chat(),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[600, 64, 64],
        ),
    )


class Qwen2VLProcessor(ProcessorMixin):  # type: ignore[misc]
    """transformers' processor of texts and pictures, which cannot be made without torchvision: as much of it as pipelines use."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.image_processor = transformers.Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=64 * 64
        )

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def __call__(self, text: list[str], images: Any = None, videos: Any = None, **options: Any) -> Any:
        seen = {} if images is None else self.image_processor(images, return_tensors="pt")
        text = list(text)
        counts = [int(grid.prod()) // 4 for grid in seen.get("image_grid_thw", ())]
        for n, line in enumerate(text):
            first, *others = line.split("<|image_pad|>")
            text[n] = first + "".join("<|image_pad|>" * (counts.pop(0) if counts else 1) + other for other in others)
        return transformers.BatchFeature({**self.tokenizer(text, **options), **seen})

    def save_pretrained(self, folder: Any, **_: Any) -> None:
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Any, **_: Any) -> Any:
        return cls(transformers.AutoTokenizer.from_pretrained(folder))


def _seeing() -> dict[str, Any]:
    """Qwen2.5-VL with its processor and its tokenizer."""
    tokenizer = chat()
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(marks), strict=True))
    text = {**LLM, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "head_dim": None}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    eyes |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=eyes, **ids)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return {"text_encoder": model, "tokenizer": tokenizer, "processor": Qwen2VLProcessor(tokenizer)}


def _qwen_image(of: str = "QwenImagePipeline", **scheduler: Any) -> Any:
    read = _seeing() if "Edit" in of else {"text_encoder": llm("Qwen3", 2), "tokenizer": chat()}
    return getattr(diffusers, of)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**_DYNAMIC, **scheduler),
        vae=diffusers.AutoencoderKLQwenImage(**CLIPS_OF_FRAMES),
        **read,
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def _longcat_edit() -> Any:
    read = _seeing()
    read["text_processor"] = read.pop("processor")
    return diffusers.LongCatImageEditPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**_DYNAMIC),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, latent_channels=16),
        **read,
        transformer=diffusers.LongCatImageTransformer2DModel(
            num_layers=1,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=64,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 4, 8],
        ),
    )


def _kandinsky5_edit() -> Any:
    from tests.families.followed import _eight, _filled

    read, channels = _seeing(), {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 32}
    widths = {"time_dim": 16, "model_dim": 32, "ff_dim": 48, "axes_dims": (4, 4, 8)}
    blocks = {"patch_size": (1, 2, 2), "num_text_blocks": 1, "num_visual_blocks": 2, "visual_cond": True}
    pipe = diffusers.Kandinsky5I2IPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_eight(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=read["text_encoder"],
        tokenizer=read["processor"],
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(),
        transformer=_filled(diffusers.Kandinsky5Transformer3DModel(**channels, **widths, **blocks)),
    )
    pipe.prompt_template_encode_start_idx = 20
    return pipe


def _chroma() -> Any:
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**_DYNAMIC),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, latent_channels=4),
        text_encoder=t5(),
        tokenizer=chat(),
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
    )


def _sd3(large: bool, **scheduler: Any) -> Any:
    three = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if large else {}
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609, latent_channels=4),
        text_encoder=clip(projected=True, wide=False),
        tokenizer=tokenizer(),
        text_encoder_2=clip(projected=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(d_model=96) if large else None,
        tokenizer_3=chat() if large else None,
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            caption_projection_dim=32,
            joint_attention_dim=96,
            pooled_projection_dim=48,
            pos_embed_max_size=48,
            **three,
        ),
    )


def _lumina2(**scheduler: Any) -> Any:
    pipe = diffusers.Lumina2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, latent_channels=4),
        text_encoder=llm("Gemma2", 2, query_pre_attn_scalar=8),
        tokenizer=chat(),
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=16,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cap_feat_dim=16,
            axes_dim_rope=(4, 4, 8),
            axes_lens=(300, 64, 64),
        ),
    )
    pipe.vae_scale_factor = 2  # it takes 8 for granted
    return pipe


def _pixart(alpha: bool) -> Any:
    return (diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline)(
        scheduler=diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False),
        vae=_vae(scaling_factor=0.13025),
        text_encoder=t5(),
        tokenizer=chat(),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=128 if alpha else 16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=32,
        ),
    )


def _sana(**scheduler: Any) -> Any:
    return diffusers.SanaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=[1, 1],
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            upsample_block_type="interpolate",
            downsample_block_type="stride_conv",
            scaling_factor=0.41407,
        ),
        text_encoder=llm("Gemma2", 2, query_pre_attn_scalar=8),
        tokenizer=chat(),
        transformer=diffusers.SanaTransformer2DModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
        ),
    )


def _auraflow() -> Any:
    return diffusers.AuraFlowPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=_vae(scaling_factor=0.13025),
        text_encoder=t5("UMT5"),
        tokenizer=chat(),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=16,
            in_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=32,
            caption_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=1024,
        ),
    )


def _cogview4() -> Any:
    return diffusers.CogView4Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
        ),
        vae=_vae(scaling_factor=0.5),
        text_encoder=llm("Glm", 2),
        tokenizer=chat("left"),
        transformer=diffusers.CogView4Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            rope_axes_dim=(16, 16),
        ),
    )


def _hidream() -> Any:
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**_DYNAMIC),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, latent_channels=4),
        text_encoder=clip(projected=True),
        tokenizer=tokenizer(),
        text_encoder_2=clip(projected=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(d_model=16),
        tokenizer_3=chat(),
        text_encoder_4=llm("Llama", 2, attn_implementation="eager"),
        tokenizer_4=chat(),
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            caption_channels=[16, 16],
            text_emb_dim=48,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 4, 8),
            max_resolution=(32, 32),
            llama_layers=[0, 1],
        ),
    )
    pipe.default_sample_size = 22.63  # it draws pictures of one area, here that of the tests
    return pipe


def _vl(layers: int) -> Any:
    """Qwen3-VL without much of its eyes."""
    text = {**LLM, "vocab_size": len(tokenizer()), "num_hidden_layers": layers}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    eyes["deepstack_visual_indexes"] = [0]
    return transformers.Qwen3VLModel(transformers.Qwen3VLConfig(text_config=text, vision_config=eyes))


def _krea2(distilled: bool) -> Any:
    return diffusers.Krea2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**_DYNAMIC, max_image_seq_len=6400),
        vae=diffusers.AutoencoderKLQwenImage(**CLIPS_OF_FRAMES),
        text_encoder=_vl(3),
        tokenizer=chat(),
        text_encoder_select_layers=(1, 3),
        is_distilled=distilled,
        transformer=diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=24,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def _ideogram4() -> Any:
    kind = {"in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    kind |= {"intermediate_size": 24, "adaln_dim": 8, "llm_features_dim": 13 * 16, "mrope_section": (4, 2, 2)}
    return diffusers.Ideogram4Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae2(),
        text_encoder=_vl(36),
        tokenizer=chat(),
        transformer=diffusers.Ideogram4Transformer2DModel(**kind),
        unconditional_transformer=diffusers.Ideogram4Transformer2DModel(**kind),
    )


def _ernie_image() -> Any:
    pipe = diffusers.ErnieImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae2(),
        text_encoder=llm("Qwen3", 2),
        tokenizer=chat(),
        transformer=diffusers.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=48,
            in_channels=16,
            out_channels=16,
            text_in_dim=16,
            rope_axes_dim=(4, 4, 8),
        ),
    )
    for parameter in pipe.transformer.parameters():
        if not parameter.any():  # zeros, as models begin
            torch.nn.init.normal_(parameter, std=0.3)
    return pipe


def _wan_transformer(**config: Any) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 32}
    return diffusers.WanTransformer3DModel(**{**sizes, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, **config})


def _wan_vae(temporal: bool) -> Any:
    config = {**CLIPS_OF_FRAMES, "temperal_downsample": [temporal], "scale_factor_temporal": 1 + temporal}
    return diffusers.AutoencoderKLWan(**config, scale_factor_spatial=2)


def _wan(temporal: bool = False, **config: Any) -> Any:
    return diffusers.WanPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=_wan_vae(temporal),
        text_encoder=t5("UMT5"),
        tokenizer=chat(),
        transformer=_wan_transformer(),
        transformer_2=_wan_transformer() if "boundary_ratio" in config else None,
        **config,
    )


def _wan_vae_of_four() -> Any:
    """A VAE that takes four frames for one, as the published ones do."""
    config = {**CLIPS_OF_FRAMES, "dim_mult": [1, 1, 1], "temperal_downsample": [True, True]}
    return diffusers.AutoencoderKLWan(**config, scale_factor_temporal=4, scale_factor_spatial=4)


def _wan_i2v(sees: bool = False, **config: Any) -> Any:
    """Image to video: of 2.1 with CLIP's eyes, of 2.2 with two denoisers, and with the first frame in its place."""
    channels = 4 if config.get("expand_timesteps") else 12
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    eyes |= {"image_size": 16, "patch_size": 8}
    model = functools.partial(
        _wan_transformer, in_channels=channels, **({"image_dim": 16, "added_kv_proj_dim": 24} if sees else {})
    )
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return diffusers.WanImageToVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=_wan_vae_of_four(),
        text_encoder=t5("UMT5"),
        tokenizer=chat(),
        image_encoder=transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**eyes)) if sees else None,
        image_processor=transformers.CLIPImageProcessor(**size) if sees else None,
        transformer=model(),
        transformer_2=model() if "boundary_ratio" in config else None,
        **config,
    )


# {kind: (family, makes a pipeline)} of those that are shown a first frame
FIRST_FRAMES: dict[str, tuple[str, Any]] = {
    "wan i2v, with eyes": ("wan_i2v", lambda: _wan_i2v(sees=True)),
    "wan i2v, two experts": ("wan_i2v", lambda: _wan_i2v(boundary_ratio=0.4)),
    "wan i2v, in its place": ("wan_i2v", lambda: _wan_i2v(expand_timesteps=True)),
}


def _ltx() -> Any:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, False, False, False),
        decoder_spatio_temporal_scaling=(True, False, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=2,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    return diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**_DYNAMIC),
        vae=vae,
        text_encoder=t5(),
        tokenizer=chat(),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
    )


def _ltx_i2v() -> Any:
    parts = _ltx().components
    return diffusers.LTXImageToVideoPipeline(**parts)


def _skyreels_v2_i2v() -> Any:
    """SkyReels-V2 with CLIP's eyes, as Wan 2.1 has them."""
    parts = _wan_i2v(sees=True).components
    parts = {name: part for name, part in parts.items() if name != "transformer_2"}
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 12, "out_channels": 4, "text_dim": 32}
    sizes |= {"freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "image_dim": 16, "added_kv_proj_dim": 24}
    transformer = diffusers.SkyReelsV2Transformer3DModel(**sizes)
    return clips._cleaned(diffusers.SkyReelsV2ImageToVideoPipeline)(**parts | {"transformer": transformer})


FIRST_FRAMES["ltx i2v"] = ("ltx_i2v", _ltx_i2v)
FIRST_FRAMES["skyreels v2 i2v"] = ("skyreels_v2_i2v", _skyreels_v2_i2v)


def _hunyuan_video(**config: Any) -> Any:
    return diffusers.HunyuanVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=diffusers.AutoencoderKLHunyuanVideo(**HUNYUAN_VAE),
        text_encoder=llm("Llama", 3),
        tokenizer=chat(),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=config.pop("in_channels", 4),
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=32,
            rope_axes_dim=(4, 4, 8),
            **config,
        ),
    )


_STATISTICS = {"scaling_factor": 0.5, "latents_mean": [0.1, -1, 2, 0], "latents_std": [1.0, 2, 0.5, 3]}
# {kind: (family, makes a pipeline)}
KINDS: dict[str, tuple[str, Any]] = {
    "sd15": ("sd15", _sd),
    "sd15, x0": ("sd15", lambda: _sd(prediction_type="sample")),
    "sd2, v": ("sd2", lambda: _sd2(prediction_type="v_prediction")),
    "sdxl": ("sdxl", _sdxl),
    "sdxl, v and zero-terminal SNR": ("sdxl", lambda: _sdxl(**_ZERO)),
    "sdxl, latent statistics and blank prompts": ("sdxl", lambda: _sdxl(_STATISTICS, zeros=False)),
    "flux dev": ("flux", lambda: _flux(True, **_DYNAMIC)),
    "flux dev, linear shift": ("flux", lambda: _flux(True, **_DYNAMIC, time_shift_type="linear")),
    "flux schnell": ("flux", lambda: _flux(False, shift=1.0)),
    "flux, fixed shift": ("flux", lambda: _flux(False, shift=3.0)),
    "flux2 dev": ("flux2", lambda: _flux2(True)),
    "flux2 klein": ("flux2", lambda: _flux2(False)),
    "z_image": ("z_image", lambda: _z_image(shift=3.0)),
    "z_image, dynamic shift": ("z_image", lambda: _z_image(**_DYNAMIC)),
    "qwen_image": ("qwen_image", lambda: _qwen_image(base_image_seq_len=256, max_image_seq_len=8192)),
    "chroma": ("chroma", _chroma),
    "sd3": ("sd3", lambda: _sd3(False, shift=3.0)),
    "sd3.5": ("sd3", lambda: _sd3(True, shift=3.0)),
    "lumina2": ("lumina2", lambda: _lumina2(shift=6.0)),
    "lumina2, dynamic shift": ("lumina2", lambda: _lumina2(**_DYNAMIC)),
    "pixart alpha": ("pixart", lambda: _pixart(True)),
    "pixart sigma": ("pixart", lambda: _pixart(False)),
    "sana": ("sana", lambda: _sana(shift=3.0)),
    "auraflow": ("auraflow", _auraflow),
    "cogview4": ("cogview4", _cogview4),
    "hidream": ("hidream", _hidream),
    "krea2": ("krea2", lambda: _krea2(False)),
    "krea2, distilled": ("krea2", lambda: _krea2(True)),
    "ideogram4": ("ideogram4", _ideogram4),
    "ernie_image": ("ernie_image", _ernie_image),
    "wan": ("wan", _wan),
    "wan, time by token": ("wan", lambda: _wan(expand_timesteps=True)),
    "wan, of clips": ("wan", lambda: _wan(temporal=True)),
    "wan, two experts": ("wan", lambda: _wan(boundary_ratio=0.4)),
    "ltx": ("ltx", _ltx),
    "hunyuan_video": ("hunyuan_video", _hunyuan_video),
    "flux kontext": ("flux_kontext", lambda: _flux(True, "FluxKontextPipeline", **_DYNAMIC)),
    "flux control": ("flux_control", lambda: _flux(True, "FluxControlPipeline", 32, **_DYNAMIC)),
    "qwen_image edit": ("qwen_image_edit", lambda: _qwen_image("QwenImageEditPipeline")),
    "qwen_image edit plus": ("qwen_image_edit_plus", lambda: _qwen_image("QwenImageEditPlusPipeline")),
    "flux fill": ("flux_fill", _flux_fill),
    "longcat_image edit": ("longcat_image_edit", _longcat_edit),
    "kandinsky5 edit": ("kandinsky5_edit", _kandinsky5_edit),
    **clips.KINDS,
    "sd3.5, dynamic shift": ("sd3", lambda: _sd3(True, **_DYNAMIC)),
}


EDITS = (
    "flux control",
    "flux fill",
    "qwen_image edit",
    "qwen_image edit plus",
    "longcat_image edit",
    "kandinsky5 edit",
)  # that draw nothing without a control image

# the kinds that stand for those of their kind; the others run in `make test-all`
ALWAYS = ("sd", "flux dev", "flux schnell", "flux,", "z_image", "flux2 klein", "ltx")


def cells(kinds: Iterable[str], always: tuple[str, ...] = ALWAYS) -> list[Any]:
    """Kinds as parameters of tests, slow ones marked."""
    standing = {kind for kind in kinds if kind.startswith(always) and not kind.startswith(("sd3", "z_image,", "ltx2"))}
    return [kind if kind in standing else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def made(kinds: dict[str, tuple[str, Any]], kind: str, dtype: torch.dtype) -> Any:
    """A tiny pipeline of some kinds with the same random weights each time."""
    torch.manual_seed(0)
    pipe = kinds[kind][1]()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype).eval()
            if hasattr(part, "time_embeddings"):  # Kandinsky's, which stay in single precision when they are loaded
                part.time_embeddings.float()
                for name, module in part.named_modules():
                    module.to(torch.promote_types(dtype, torch.float32) if name.endswith("modulation") else None)
    return pipe


def pipeline(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny pipeline with the same random weights each time."""
    from tests.families.followed import FOLLOWED

    return made(KINDS | FOLLOWED, kind, dtype)
