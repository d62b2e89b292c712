"""Tiny random pipelines of families whose pipelines say all of a training step, and of models that have no family."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

from tests.families.clips import _cleaned
from tests.families.components import CLIPS_OF_FRAMES, LLM, chat, clip, llm, t5, tokenizer
from tests.families.pipelines import _DYNAMIC as DYNAMIC
from tests.families.pipelines import _XL as XL
from tests.families.pipelines import _vae as vae_of
from tests.families.pipelines import _vae2
from tests.families.pipelines import _vl as vl

_FLUX = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
_FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "latent_channels": 4}


def _flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def _vl25(layers: int) -> Any:
    """Qwen2.5-VL without much of its eyes."""
    text = {**LLM, "vocab_size": len(tokenizer()), "num_hidden_layers": layers}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=eyes)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _vl3(layers: int) -> Any:
    """Qwen3-VL without much of its eyes, with a head."""
    return transformers.Qwen3VLForConditionalGeneration(vl(layers).config)


def _filled(model: Any, everything: bool = False) -> Any:
    """A model whose numbers are random where they are zeros, as models begin, or what was in the memory: everywhere, if that is said."""
    for parameter in model.parameters():
        if everything or not parameter.any() or not parameter.isfinite().all() or parameter.ndim == 3:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def _eight(**config: Any) -> Any:
    """A VAE that takes eight pixels for one, as pipelines take for granted."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return diffusers.AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, **kinds, **config)


def _hunyuan_image(guided: bool = False) -> Any:
    return diffusers.HunyuanImagePipeline(
        scheduler=_flow(shift=4.0),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=32,
            scaling_factor=0.75,
        ),
        text_encoder=_vl25(4),
        tokenizer=chat(),
        text_encoder_2=t5(),
        tokenizer_2=chat(),
        transformer=diffusers.HunyuanImageTransformer2DModel(
            **_FLUX,
            in_channels=8,
            out_channels=8,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=16,
            text_embed_2_dim=32,
            rope_axes_dim=(8, 8),
            guidance_embeds=guided,
        ),
        guider=None if guided else diffusers.AdaptiveProjectedMixGuidance(),
    )


def _bria() -> Any:
    return diffusers.BriaPipeline(
        scheduler=_flow(**DYNAMIC),
        vae=vae_of(**_FLUX_VAE),
        text_encoder=t5(),
        tokenizer=chat(),
        transformer=diffusers.BriaTransformer2DModel(
            **_FLUX, in_channels=16, joint_attention_dim=32, axes_dims_rope=[4, 4, 8]
        ),
    )


def _ovis_image() -> Any:
    return diffusers.OvisImagePipeline(
        scheduler=_flow(**DYNAMIC),
        vae=vae_of(**_FLUX_VAE),
        text_encoder=llm("Qwen3", 2),
        tokenizer=chat(),
        transformer=diffusers.OvisImageTransformer2DModel(
            **_FLUX, in_channels=16, out_channels=16, joint_attention_dim=16, axes_dims_rope=(4, 4, 8)
        ),
    )


def _longcat_image() -> Any:
    return diffusers.LongCatImagePipeline(
        scheduler=_flow(**DYNAMIC),
        vae=vae_of(**{**_FLUX_VAE, "latent_channels": 16}),
        text_encoder=_vl25(2),
        tokenizer=chat(),
        text_processor=chat(),
        transformer=diffusers.LongCatImageTransformer2DModel(
            **_FLUX, in_channels=64, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8]
        ),
    )


def _kandinsky5() -> Any:
    return diffusers.Kandinsky5T2IPipeline(
        scheduler=_flow(shift=3.0),
        vae=_eight(**_FLUX_VAE),
        text_encoder=_vl25(2),
        tokenizer=chat(),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(),
        transformer=_filled(
            diffusers.Kandinsky5Transformer3DModel(
                in_visual_dim=4,
                in_text_dim=16,
                in_text_dim2=32,
                time_dim=16,
                out_visual_dim=4,
                patch_size=(1, 2, 2),
                model_dim=32,
                ff_dim=48,
                num_text_blocks=1,
                num_visual_blocks=2,
                axes_dims=(4, 4, 8),
            )
        ),
    )


def _prx() -> Any:
    return _cleaned(diffusers.PRXPipeline)(
        scheduler=_flow(shift=3.0),
        vae=vae_of(**_FLUX_VAE),
        text_encoder=t5(),
        tokenizer=chat(),
        transformer=_filled(
            diffusers.PRXTransformer2DModel(
                in_channels=4, context_in_dim=32, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8]
            )
        ),
    )


def _nucleus_image() -> Any:
    return diffusers.NucleusMoEImagePipeline(
        scheduler=_flow(**DYNAMIC),
        vae=diffusers.AutoencoderKLQwenImage(**CLIPS_OF_FRAMES),
        text_encoder=_vl3(9),
        processor=chat(),
        transformer=_filled(
            diffusers.NucleusMoEImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=5,
                num_attention_heads=2,
                num_key_value_heads=1,
                attention_head_dim=16,
                joint_attention_dim=16,
                axes_dims_rope=(4, 4, 8),
                mlp_ratio=6.0,
                num_experts=2,
                moe_intermediate_dim=16,
                capacity_factors=2.0,
            )
        ),
    )


def _bria_fibo() -> Any:
    ids = {"vocab_size": 128001, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return diffusers.BriaFiboPipeline(
        scheduler=_flow(**DYNAMIC),
        vae=diffusers.AutoencoderKLWan(
            **CLIPS_OF_FRAMES
            | {
                "dim_mult": [1] * 4,
                "temperal_downsample": [False] * 3,
                "patch_size": 2,
                "in_channels": 12,
                "out_channels": 12,
            },
            scale_factor_temporal=1,
            scale_factor_spatial=16,
        ),
        text_encoder=transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**LLM, num_hidden_layers=2, **ids)),
        tokenizer=chat(),
        transformer=diffusers.BriaFiboTransformer2DModel(
            **_FLUX, in_channels=4, joint_attention_dim=32, axes_dims_rope=[4, 4, 8], text_encoder_dim=16
        ),
    )


def _lumina() -> Any:
    return diffusers.LuminaPipeline(
        scheduler=_flow(shift=3.0),
        vae=_eight(scaling_factor=0.13025),
        text_encoder=llm("Gemma", 2),
        tokenizer=chat(),
        transformer=_filled(
            diffusers.LuminaNextDiT2DModel(
                sample_size=16,
                in_channels=4,
                hidden_size=32,
                num_layers=2,
                num_attention_heads=2,
                num_kv_heads=2,
                multiple_of=16,
                cross_attention_dim=16,
            )
        ),
    )


def _hunyuan_dit() -> Any:
    return diffusers.HunyuanDiTPipeline(
        scheduler=diffusers.DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
        vae=_eight(scaling_factor=0.13025),
        text_encoder=transformers.BertModel(
            transformers.BertConfig(
                vocab_size=len(tokenizer()),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=32,
            )
        ),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=chat(),
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            hidden_size=32,
            cross_attention_dim=32,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
            text_len=77,
            text_len_t5=256,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class Processor:
    """A processor of texts alone."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, text: Any, images: Any = None, **kwargs: Any) -> Any:
        return self.tokenizer(text, **kwargs)

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
        return [self.tokenizer.apply_chat_template(messages, **kwargs)]


def _qwen_image21() -> Any:
    levels = {"dim_mult": [1, 1, 1, 1, 1], "temperal_downsample": [False] * 4, "num_res_blocks": 1}
    widths = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 4}
    statistics = {name: CLIPS_OF_FRAMES[name] for name in ("latents_mean", "latents_std")}
    return diffusers.QwenImage21Pipeline(
        scheduler=_flow(**DYNAMIC),
        vae=diffusers.AutoencoderKLQwenImage21(**levels, **widths, **statistics),
        text_encoder=_vl3(2),
        processor=Processor(chat()),
        transformer=diffusers.QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            context_in_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def _bria_fibo2() -> Any:
    return diffusers.BriaFibo2Pipeline(
        scheduler=_flow(**DYNAMIC),
        vae=_vae2(),
        text_encoder=_vl3(36),
        processor=chat(),
        transformer=_filled(
            diffusers.BriaFibo2Transformer2DModel(
                in_channels=4,
                dim=32,
                n_layers=6,
                n_refiner_layers=1,
                n_heads=2,
                cap_feat_dim=48,
                injection_layer_ids=(1, 2, 3, 4, 5),
                perceiver_num_layers=1,
                min_num_gist_tokens=8,
                max_num_gist_tokens=16,
                gist_step=8,
                gist_min_text_len=8,
                gist_max_text_len=64,
                axes_dims=(4, 4, 8),
                axes_lens=(256, 64, 64),
            )
        ),
    )


class Placed(Processor):
    """A tokenizer that says places, as ChatGLM's."""

    def __call__(self, text: Any, images: Any = None, **kwargs: Any) -> Any:
        tokens = super().__call__(text, **kwargs)
        tokens["position_ids"] = torch.arange(tokens.input_ids.shape[1]).expand(tokens.input_ids.shape)
        return tokens


def _kolors() -> Any:
    from diffusers.pipelines.kolors.pipeline_kolors import (
        KolorsPipeline,  # diffusers hides it where a tokenizer is missing
    )
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    return KolorsPipeline(
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear", steps_offset=1, num_train_timesteps=1100
        ),
        vae=vae_of(scaling_factor=0.13025),
        text_encoder=_filled(
            ChatGLMModel(
                ChatGLMConfig(
                    num_layers=2,
                    padded_vocab_size=len(tokenizer()),
                    hidden_size=32,
                    ffn_hidden_size=48,
                    kv_channels=8,
                    num_attention_heads=4,
                    original_rope=True,
                )
            ),
            everything=True,
        ),
        tokenizer=Placed(chat("left")),
        unet=diffusers.UNet2DConditionModel(
            **XL | {"cross_attention_dim": 16, "projection_class_embeddings_input_dim": 6 * 8 + 32},
            encoder_hid_dim=32,
            encoder_hid_dim_type="text_proj",
        ),
    )


FOLLOWED: dict[str, tuple[str, Any]] = {
    "hunyuan_image": ("hunyuan_image", _hunyuan_image),
    "hunyuan_image, distilled": ("hunyuan_image", lambda: _hunyuan_image(True)),
    "bria": ("bria", _bria),
    "bria_fibo": ("bria_fibo", _bria_fibo),
    "ovis_image": ("ovis_image", _ovis_image),
    "longcat_image": ("longcat_image", _longcat_image),
    "kandinsky5": ("kandinsky5", _kandinsky5),
    "prx": ("prx", _prx),
    "nucleus_image": ("nucleus_image", _nucleus_image),
    "qwen_image21": ("qwen_image21", _qwen_image21),
    "bria_fibo2": ("bria_fibo2", _bria_fibo2),
    "kolors": ("kolors", _kolors),
    "generic, a flow": ("generic", _lumina),
    "generic, levels by betas": ("generic", _hunyuan_dit),
}

FP32 = ("kandinsky5",)  # whose layers compute times in it
