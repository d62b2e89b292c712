"""Tiny random pipelines of models of clips."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers

from tests.families.components import CLIPS_OF_FRAMES, HUNYUAN_VAE, chat, clip, llm, t5
from tests.families.components import tokenizer as embedded_tokenizer


def _eyes() -> dict[str, Any]:
    """SigLIP without much of it."""
    size = {"height": 16, "width": 16}
    config = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "image_encoder": transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**config, image_size=16, patch_size=8)
        ),
        "feature_extractor": transformers.SiglipImageProcessor(size=size),
    }


def hunyuan_video15(shown: bool = False, **guider: Any) -> Any:
    """HunyuanVideo 1.5, or one that is shown the first frame."""
    tokenizer = chat()
    pipe = (diffusers.HunyuanVideo15ImageToVideoPipeline if shown else diffusers.HunyuanVideo15Pipeline)(
        **(_eyes() if shown else {}),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(16,) * 5, layers_per_block=1, scaling_factor=0.7
        ),
        text_encoder=llm("Qwen3", 3),
        tokenizer=tokenizer,
        text_encoder_2=t5(),
        tokenizer_2=chat(),
        guider=diffusers.ClassifierFreeGuidance(**guider),
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=32,
            image_embed_dim=12,
            rope_axes_dim=(4, 4, 8),
            target_size=48,
        ),
    )
    words = tokenizer.apply_chat_template(
        [{"role": "system", "content": pipe.system_message}], return_dict=True
    ).input_ids
    pipe.prompt_template_encode_start_idx = len(words) - 1  # without what ends it
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 40, 12
    return pipe


def ltx2(newer: bool) -> Any:
    """LTX-2, or LTX-2.3 with projections for each stream."""
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=2,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    streams = {"video_hidden_dim": 32, "audio_hidden_dim": 16, "per_modality_projections": newer}
    later = {"gated_attn": True, "cross_attn_mod": True, "use_prompt_embeddings": False} if newer else {}
    later |= {f"audio_{name}": True for name in ("gated_attn", "cross_attn_mod") if newer}
    width = 16 if newer else 8
    return diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024
        ),
        vae=vae,
        audio_vae=diffusers.AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
        ),
        vocoder=diffusers.pipelines.ltx2.LTX2Vocoder(
            in_channels=16,
            hidden_channels=16,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3]],
        ),
        text_encoder=llm("Qwen3", 2),
        tokenizer=chat("left"),
        connectors=diffusers.pipelines.ltx2.LTX2TextConnectors(
            caption_channels=16,
            text_proj_in_factor=3,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=width,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=8,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=8,
            **streams,
        ),
        transformer=diffusers.LTX2VideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            vae_scale_factors=(2, 4, 4),
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=2,
            caption_channels=16,
            **later,
        ),
    )


def cogvideox(newer: bool, shown: bool = False) -> Any:
    """CogVideoX 1.0 with places that are added, or 1.5 with places that turn and patches of two frames; or one that is shown the first frame."""
    kind: dict[str, Any] = (
        {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False} if newer else {}
    )
    kind |= {"ofs_embed_dim": 8} if shown and newer else {}
    return (diffusers.CogVideoXImageToVideoPipeline if shown else diffusers.CogVideoXPipeline)(
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
            snr_shift_scale=1.0 if newer else 3.0,
        ),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8,) * 4,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.7,
            invert_scale_latents=shown and newer,
        ),
        text_encoder=t5(),
        tokenizer=chat(),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=8 if shown else 4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=32,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            max_text_seq_length=40,
            **kind,
        ),
    )


def mochi() -> Any:
    return diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
        ),
        text_encoder=t5(),
        tokenizer=chat(),
        transformer=diffusers.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            pooled_projection_dim=16,
            text_embed_dim=32,
            time_embed_dim=8,
        ),
    )


def sana_video() -> Any:
    return diffusers.SanaVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0),
        vae=diffusers.AutoencoderKLWan(**CLIPS_OF_FRAMES, scale_factor_temporal=1, scale_factor_spatial=2),
        text_encoder=llm("Gemma2", 2, query_pre_attn_scalar=8),
        tokenizer=chat(),
        transformer=diffusers.SanaVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
        ),
    )


def kandinsky5() -> Any:
    tokenizer = chat()
    pipe = diffusers.Kandinsky5T2VPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=diffusers.AutoencoderKLHunyuanVideo(**HUNYUAN_VAE),
        text_encoder=llm("Qwen3", 2),
        tokenizer=tokenizer,
        text_encoder_2=clip(),
        tokenizer_2=embedded_tokenizer(),
        transformer=diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=32,
            time_dim=16,
            model_dim=32,
            ff_dim=48,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 4, 8),
            visual_cond=True,
        ),
    )
    for parameter in pipe.transformer.parameters():
        if not parameter.any():  # zeros, as models begin
            torch.nn.init.normal_(parameter, std=0.3)
    template = pipe.prompt_template.partition("{}")[0]
    pipe.prompt_template_encode_start_idx = len(tokenizer(template).input_ids) - 1  # without what ends it
    return pipe


def _cleaned(kind: type) -> type:
    """A pipeline's class where ftfy, by which it cleans captions, is installed or does nothing."""
    module = sys.modules[kind.__module__]
    if not hasattr(module, "ftfy"):
        module.ftfy = SimpleNamespace(fix_text=lambda text: text)
    return kind


def skyreels_v2(forced: bool = False) -> Any:
    """SkyReels-V2, or one of diffusion forcing, which reads the rate of frames."""
    flow = {"use_flow_sigmas": True, "flow_shift": 8.0, "prediction_type": "flow_prediction"}
    kind = diffusers.SkyReelsV2DiffusionForcingPipeline if forced else diffusers.SkyReelsV2Pipeline
    return _cleaned(kind)(
        scheduler=diffusers.UniPCMultistepScheduler(**flow)
        if forced
        else diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0),
        vae=diffusers.AutoencoderKLWan(**CLIPS_OF_FRAMES, scale_factor_temporal=1, scale_factor_spatial=2),
        text_encoder=t5("UMT5"),
        tokenizer=chat(),
        transformer=diffusers.SkyReelsV2Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            inject_sample_info=forced,
        ),
    )


def easyanimate() -> Any:
    return diffusers.EasyAnimatePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLMagvit(
            latent_channels=4,
            block_out_channels=[8] * 4,
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
        ),
        text_encoder=llm("Qwen3", 2),
        tokenizer=chat(),
        transformer=diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            num_layers=2,
            mmdit_layers=2,
            time_embed_dim=8,
            text_embed_dim=16,
        ),
    )


class Guardrail:
    """NVIDIA's, which finds nothing wrong."""

    def to(self, device: Any) -> None:
        """It is everywhere."""

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def _scaling() -> type:
    """The transformer's class where torchvision, by which it scales a mask of zeros, is installed or does what it is asked."""
    from diffusers.models.transformers import transformer_cosmos as module

    if not hasattr(module, "transforms"):
        module.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=lambda x, size, interpolation: torch.nn.functional.interpolate(x, size)),
            InterpolationMode=SimpleNamespace(NEAREST="nearest"),
        )
    return module.CosmosTransformer3DModel


def cosmos(name: str = "TextToImage", **transformer: Any) -> Any:
    """Cosmos 2, or 2.5 with Qwen2.5-VL."""
    newer = name.startswith("_5")
    clips = name != "TextToImage"
    flow = {"use_karras_sigmas": not newer}
    return getattr(diffusers, f"Cosmos2{name}Pipeline")(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**flow),
        vae=diffusers.AutoencoderKLWan(
            **{**CLIPS_OF_FRAMES, "temperal_downsample": [clips]},
            scale_factor_temporal=1 + clips,
            scale_factor_spatial=2,
        ),
        text_encoder=llm("Qwen3", 2) if newer else t5(),
        tokenizer=chat(),
        safety_checker=Guardrail(),
        transformer=_scaling()(
            in_channels=4 + clips,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            text_embed_dim=16 if newer else 32,
            adaln_lora_dim=8,
            max_size=(32, 64, 128),
            rope_scale=(1.0, 3.0, 3.0),
            extra_pos_embed_type=None,
            use_crossattn_projection=newer,
            crossattn_proj_in_channels=32,
            encoder_hidden_states_channels=16,
        ),
    )


def _shown(name: str, pipe: Any) -> Any:
    """A pipeline of the same components that is shown the first frame."""
    shown = getattr(diffusers, f"{name}Pipeline")(**pipe.components)
    if hasattr(pipe, "prompt_template_encode_start_idx"):
        shown.prompt_template_encode_start_idx = pipe.prompt_template_encode_start_idx
    return shown


def skyreels_v1() -> Any:
    """HunyuanVideo with the first frame in channels of its own."""
    from tests.families.pipelines import _hunyuan_video

    return _shown("HunyuanSkyreelsImageToVideo", _hunyuan_video(in_channels=8, guidance_embeds=True))


# {kind: (family, makes a pipeline)}
KINDS: dict[str, tuple[str, Any]] = {
    "hunyuan_video15": ("hunyuan_video15", lambda: hunyuan_video15(guidance_scale=1.0)),
    "ltx2": ("ltx2", lambda: ltx2(False)),
    "ltx2, 2.3": ("ltx2", lambda: ltx2(True)),
    "cogvideox": ("cogvideox", lambda: cogvideox(False)),
    "cogvideox 1.5": ("cogvideox", lambda: cogvideox(True)),
    "mochi": ("mochi", mochi),
    "sana_video": ("sana_video", sana_video),
    "kandinsky5 video": ("kandinsky5_video", kandinsky5),
    "skyreels_v2": ("skyreels_v2", skyreels_v2),
    "easyanimate": ("easyanimate", easyanimate),
    "cosmos": ("cosmos", cosmos),
    "cosmos 2.5": ("cosmos25", lambda: cosmos("_5_PredictBase")),
}
# of LTX-2, shown the first frame in its place, beside sound
WITH_SOUND: dict[str, tuple[str, Any]] = {
    "ltx2 i2v": ("ltx2_i2v", lambda: diffusers.LTX2ImageToVideoPipeline(**ltx2(False).components)),
    "ltx2 i2v, 2.3": ("ltx2_i2v", lambda: diffusers.LTX2ImageToVideoPipeline(**ltx2(True).components)),
}
# shown the first frame in its place, which their pipelines put there
IN_PLACE: dict[str, tuple[str, Any]] = {
    "cosmos i2v": ("cosmos_i2v", lambda: cosmos("VideoToWorld")),
    "sana_video i2v": ("sana_video_i2v", lambda: _shown("SanaImageToVideo", sana_video())),
    "kandinsky5 i2v": ("kandinsky5_i2v", lambda: _shown("Kandinsky5I2V", kandinsky5())),
}
# of models that are shown the first frame
FIRST_FRAMES: dict[str, tuple[str, Any]] = {
    "hunyuan_video15 i2v": ("hunyuan_video15_i2v", lambda: hunyuan_video15(shown=True, guidance_scale=1.0)),
    "skyreels v1 i2v": ("skyreels_v1_i2v", skyreels_v1),
    "cogvideox i2v": ("cogvideox_i2v", lambda: cogvideox(False, shown=True)),
    "cogvideox 1.5 i2v": ("cogvideox_i2v", lambda: cogvideox(True, shown=True)),
}
