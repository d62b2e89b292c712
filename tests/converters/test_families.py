"""The tables of layer names, held against diffusers' own converters of whole checkpoints.

Row tracing: every original weight that our rules name gets rows of numbers that no other row has, diffusers converts the checkpoint, and the
numbers that come out under each of diffusers' names must be those that our rule says. A wrong name, share or order cannot pass.

Not traced, because the diffusers package has no converter for them: PixArt, CogVideoX, CogView4, HunyuanImage, Ovis-Image and the norms of Sana 1.5
(read in diffusers' conversion scripts), LongCat-Image (read in ComfyUI, which calls its layers as Flux.1's) and those whose names are the same on
both sides. HiDream's and ERNIE-Image's converters rename nothing. Of all these and of text encoders only the names are checked, against the models
themselves. The prefixes of text encoders are read, not traced. diffusers' converters of adapters are asked for those that know fewer layers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import lora_conversion_utils as lora_files
from diffusers.loaders import single_file_utils as single_files
from torch import Tensor, nn

from diffpeft.converters.families import TABLES, Rule, Table, text
from diffpeft.converters.families.base import SWAPPED
from tests.pipeline import lorable


class Checkpoint(dict):
    """A checkpoint in which whatever is not a Linear, a Conv or a norm (tables) is there, with anything in it."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, *(default or (torch.zeros(2, 1),)))


@dataclass(frozen=True)
class Model:
    """A model of a family, small in depth, and who converts its original checkpoint. Some converters only know the published widths."""

    family: str
    name: str
    config: dict[str, Any]
    converter: str = ""
    component: str = "transformer"
    norm: str = "weight"  # how the original calls the weight of a norm
    without: str = "$^"  # the layers that are none of the original's, by what is in their names
    twins: Mapping[str, str] = field(
        default_factory=dict, compare=False
    )  # {name's start: another} of blocks that diffusers' class lacks
    convert: Callable[[Checkpoint], dict[str, Tensor]] | None = field(default=None, compare=False)


def _unet(family: str, down: str, without: str = "$^", **config: Any) -> Model:
    """`down`: a letter a level, `a` with attention."""
    types = {"a": "CrossAttnDownBlock2D", "-": "DownBlock2D"}, {"a": "CrossAttnUpBlock2D", "-": "UpBlock2D"}
    config = {
        "block_out_channels": (32, 64, 64, 64)[: len(down)],
        "down_block_types": tuple(types[0][level] for level in down),
        "up_block_types": tuple(types[1][level] for level in reversed(down)),
        "cross_attention_dim": 16,
        **config,
    }

    def convert(checkpoint: Checkpoint) -> dict[str, Tensor]:
        prefixed = {f"model.diffusion_model.{key}": rows for key, rows in checkpoint.items()}
        return single_files.convert_ldm_unet_checkpoint(prefixed, {"layers_per_block": 2, **config})

    return Model(family, "UNet2DConditionModel", config, component="unet", without=without, convert=convert)


def _ltx2(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The map of adapters, which knows LTX-2.3; that of checkpoints only knows LTX-2.0."""
    found = lora_files._convert_non_diffusers_ltx2_lora_to_diffusers(
        {f"diffusion_model.{key}": rows for key, rows in checkpoint.items()}
    )
    return {key.removeprefix("transformer."): rows for key, rows in found.items()}


def _minimax_h3(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return single_files.convert_minimax_h3_transformer_checkpoint_to_diffusers(checkpoint, {})


def _small(family: str, name: str, converter: str = "", **options: Any) -> Model:
    """A model of the size in lorable.py."""
    return Model(family, name, lorable.config(name), converter, **options)


ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "use_linear_projection": True,
}
KOLORS = {"encoder_hid_dim_type": "text_proj"}
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}
DEEP = {"num_layers": 2, "num_single_layers": 2}
SOUND = {"audio_num_attention_heads": 2, "audio_attention_head_dim": 16, "audio_cross_attention_dim": 32}
GATES = dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True)
IMAGE = {"image_dim": 32, "added_kv_proj_dim": 32}
CROSS = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
MODELS = (
    _unet("sd15", "aaa-"),
    _unet("sd2", "aaa-", use_linear_projection=True),
    _unet("sdxl", "-aa", transformer_layers_per_block=(1, 2, 3), **ADDED),
    _unet("sdxl", "-aa", without="encoder_hid_proj", encoder_hid_dim=24, **KOLORS, **ADDED),
    _unet("sdxl_refiner", "-aa-", transformer_layers_per_block=2, **ADDED),
    Model(
        "sd3",
        "SD3Transformer2DModel",
        {"num_layers": 3, "dual_attention_layers": (0,), "qk_norm": "rms_norm", **SMALL},
        "sd3_transformer",
    ),
    Model("flux", "FluxTransformer2DModel", {**DEEP, "guidance_embeds": True}, "flux_transformer", norm="scale"),
    Model("chroma", "ChromaTransformer2DModel", {**DEEP, "approximator_layers": 2}, "chroma_transformer", norm="scale"),
    Model("flux2", "Flux2Transformer2DModel", {**DEEP, **SMALL}, "flux2_transformer", norm="scale"),
    Model("wan", "WanTransformer3DModel", {"num_layers": 2, **IMAGE, **SMALL}, "wan_transformer"),
    Model(
        "wan", "WanVACETransformer3DModel", {"num_layers": 2, "vace_layers": [0], **IMAGE, **SMALL}, "wan_transformer"
    ),
    Model("qwen_image", "QwenImageTransformer2DModel", {"num_layers": 2, **SMALL}),
    Model(
        "z_image",
        "ZImageTransformer2DModel",
        {"dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 12, 12], "siglip_feat_dim": 32},
        "z_image_transformer",
    ),
    Model("lumina2", "Lumina2Transformer2DModel", {"num_layers": 2}, "lumina2"),
    Model("hunyuan_video", "HunyuanVideoTransformer3DModel", DEEP, "hunyuan_video_transformer"),
    Model(
        "pixart",
        "PixArtTransformer2DModel",
        {
            "num_layers": 2,
            "caption_channels": 32,
            "cross_attention_dim": 32,
            "use_additional_conditions": True,
            **SMALL,
        },
    ),
    Model("sana", "SanaTransformer2DModel", {"num_layers": 2, **CROSS, **SMALL}, "sana_transformer"),
    Model("sana", "SanaTransformer2DModel", {"num_layers": 2, "qk_norm": "rms_norm_across_heads", **CROSS, **SMALL}),
    Model(
        "auraflow",
        "AuraFlowTransformer2DModel",
        {"num_mmdit_layers": 2, "num_single_dit_layers": 2, "caption_projection_dim": 32, **SMALL},
        "auraflow_transformer",
    ),
    Model(
        "ltx", "LTXVideoTransformer3DModel", {"num_layers": 2, "cross_attention_dim": 32, **SMALL}, "ltx_transformer"
    ),
    Model(
        "ltx2",
        "LTX2VideoTransformer3DModel",
        {"num_layers": 2, "cross_attention_dim": 32, **SMALL, **SOUND, **GATES},
        convert=_ltx2,
    ),
    Model(
        "mochi",
        "MochiTransformer3DModel",
        {"num_layers": 48, "pooled_projection_dim": 32, "text_embed_dim": 32, **SMALL},
        "mochi_transformer",
    ),
    Model("cogvideox", "CogVideoXTransformer3DModel", {"num_layers": 2, "ofs_embed_dim": 32, **SMALL}),
    Model(
        "hidream",
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "caption_channels": [32, 32], "llama_layers": [0, 1], **DEEP, **SMALL},
        "hidream_transformer",
    ),
    _small("wan", "WanAnimateTransformer3DModel"),
    _small("hunyuan_video15", "HunyuanVideo15Transformer3DModel"),
    _small("framepack", "HunyuanVideoFramepackTransformer3DModel"),
    _small("kandinsky5", "Kandinsky5Transformer3DModel"),
    _small("sana_video", "SanaVideoTransformer3DModel"),
    _small("skyreels_v2", "SkyReelsV2Transformer3DModel"),
    _small("helios", "HeliosTransformer3DModel"),
    _small("chrono_edit", "ChronoEditTransformer3DModel", "wan_transformer"),
    _small("wan_animate2", "WanAnimate2Transformer3DModel", "wan_animate_2_transformer"),
    _small("minimax_h3", "MiniMaxH3Transformer3DModel", convert=_minimax_h3),
    _small("flux3", "Flux3Transformer2DModel", "flux3_transformer", norm="scale"),
    _small("ace_step", "AceStepTransformer1DModel"),
    Model(
        "krea2",
        "Krea2Transformer2DModel",
        {"num_layers": 2},
        "krea2_transformer",
        norm="scale",
    ),
    Model(
        "cosmos",
        "CosmosTransformer3DModel",
        {"num_layers": 2, "use_crossattn_projection": True, "img_context_dim_in": 32, **SMALL},
        "cosmos_transformer",
    ),
    Model("ideogram4", "Ideogram4Transformer2DModel", {"num_layers": 2}),
    Model(
        "ernie_image",
        "ErnieImageTransformer2DModel",
        {"num_layers": 2},
        "ernie_image_transformer",
    ),
    Model("cogview4", "CogView4Transformer2DModel", {"num_layers": 2, **SMALL}),
    Model(
        "hunyuan_image",
        "HunyuanImageTransformer2DModel",
        {**DEEP, "guidance_embeds": True, "use_meanflow": True, "text_embed_2_dim": 16, **SMALL},
    ),
    Model(
        "qwen_image21",
        "QwenImage21Transformer2DModel",
        {"num_layers": 2, "context_in_dim": 32, **SMALL},
        "qwen_image21_transformer",
    ),
    Model(
        "omnigen2",
        "Lumina2Transformer2DModel",
        {"num_layers": 2},
        twins={"x_embedder": "ref_image_patch_embedder", "noise_refiner.": "ref_image_refiner."},
    ),
    Model("longcat_image", "LongCatImageTransformer2DModel", {**DEEP, **SMALL}),
    Model("ovis_image", "OvisImageTransformer2DModel", {**DEEP, **SMALL}, without=r"net\.0\.proj"),
    Model("bria", "BriaTransformer2DModel", {**DEEP, **SMALL}),
    Model("bria_fibo", "BriaFiboTransformer2DModel", {**DEEP, **SMALL}),
    Model(
        "bria_fibo2",
        "BriaFibo2Transformer2DModel",
        {"n_layers": 2, "n_heads": 2, "dim": 64, "injection_layer_ids": (1,), "perceiver_num_layers": 2},
    ),
    Model("prx", "PRXTransformer2DModel", {"depth": 2, "resolution_embeds": True}),
    Model("prx", "PRXTransformer2DModel", {"depth": 2, "bottleneck_size": 8}),
    Model("glm_image", "GlmImageTransformer2DModel", {"num_layers": 2, **SMALL}),
    Model(
        "nucleus_image",
        "NucleusMoEImageTransformer2DModel",
        {"num_layers": 5, "num_experts": 2},
    ),
)
TRACED = [model for model in MODELS if model.converter or model.convert]


def named(model: Model) -> str:
    return f"{model.family}-{model.name}"


@functools.cache
def _modules(name: str, at: int) -> dict[str, nn.Module]:
    with torch.device("meta"):
        own = weighted(getattr(diffusers, name)(**MODELS[at].config))
    twins = MODELS[at].twins.items()
    return own | {n.replace(old, new, 1): m for old, new in twins for n, m in own.items() if n.startswith(old)}


def modules(model: Model) -> dict[str, nn.Module]:
    """The Linear and Conv layers and the norms of a model without weights."""
    return _modules(model.name, MODELS.index(model))


def layers(model: Model) -> dict[str, nn.Module]:
    """As `modules`, without the norms: what can have a LoRA."""
    return {name: module for name, module in modules(model).items() if not is_norm(module)}


def weighted(model: nn.Module) -> dict[str, nn.Module]:
    kinds = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds) or is_norm(module)}


def is_norm(module: nn.Module) -> bool:
    """Whether this scales its channels, in whatever class."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1


def aspect(*parts: nn.Module) -> int | None:
    """Rows a column of the layer that these are the parts of; a norm has no columns."""
    return None if is_norm(parts[0]) else sum(part.weight.shape[0] for part in parts) // parts[0].weight.shape[1]


@functools.cache
def rules(at: int) -> dict[str, Rule]:
    """{original module: its rule} of a model, from diffusers' names."""
    model = MODELS[at]
    found = {
        name: TABLES[model.family].to_original(model.component, name, aspect(module))
        for name, module in modules(model).items()
    }
    assert not [name for name, rule in found.items() if (rule is None) != bool(re.search(model.without, name))]
    return {rule.original: rule for rule, _ in filter(None, found.values())}


def sources(model: Model) -> dict[str, tuple[Rule, list[nn.Module]]]:
    """{original module: its rule, diffusers' modules that it is split into}."""
    own = modules(model)
    return {
        original: (rule, [own[name] for name, _ in rule.parts]) for original, rule in rules(MODELS.index(model)).items()
    }


def originals(model: Model) -> dict[str, tuple[Rule, list[nn.Module]]]:
    """As `sources`, without the norms."""
    return {original: found for original, found in sources(model).items() if not is_norm(found[1][0])}


def parameters(model: Model, original: str, part: nn.Module) -> dict[str, str]:
    """{diffusers' name of a parameter: its key in the original checkpoint}."""
    names = {"weight": model.norm if is_norm(part) else "weight", "bias": "bias"}
    return {kind: f"{original}.{name}" for kind, name in names.items() if getattr(part, kind, None) is not None}


def traced(model: Model) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The original checkpoint with a number of its own in every row, and what diffusers' converter makes of it."""
    checkpoint, at = Checkpoint(), 0
    for original, (_, parts) in sources(model).items():
        for kind, key in parameters(model, original, parts[0]).items():
            rows = sum(part.weight.shape[0] for part in parts)
            columns = () if kind == "bias" or is_norm(parts[0]) else (1,)
            checkpoint[key] = torch.arange(at, at + rows).reshape(-1, *columns)
            at += rows
    convert = model.convert
    if convert is None:
        tried = [f"convert_{model.converter}{end}_to_diffusers" for end in ("", "_checkpoint")]
        convert = next(getattr(single_files, name) for name in tried if hasattr(single_files, name))
    return dict(checkpoint), convert(checkpoint)


@pytest.mark.parametrize("model", TRACED, ids=named)
def test_diffusers_own_converter_moves_every_row_as_the_rules_say(model):
    before, after = traced(model)
    weights = {int(rows[0]) for key, rows in before.items() if not key.endswith(".bias")}
    assert before and len(weights) == len(sources(model))
    for original, (rule, parts) in sources(model).items():
        for part, (name, _) in enumerate(rule.parts):
            keys = parameters(model, original, parts[part])
            assert keys.keys() == parameters(model, original, parts[0]).keys()
            for kind, key in keys.items():
                rows = before[key]
                assert torch.equal(after[f"{name}.{kind}"], rows[list(rule.rows(part, len(rows)))]), name


@pytest.mark.parametrize("model", TRACED, ids=named)
def test_the_rules_lead_back_from_diffusers_rows_to_the_original(model):
    before, after = traced(model)
    table, rebuilt = TABLES[model.family], {key: torch.full_like(rows, -1) for key, rows in before.items()}
    for name, module in modules(model).items():
        if re.search(model.without, name):
            continue
        rule, part = table.to_original(model.component, name, aspect(module))
        for kind, key in parameters(model, rule.original, module).items():
            rebuilt[key][list(rule.rows(part, len(rebuilt[key])))] = after[f"{name}.{kind}"]
    assert all(torch.equal(rebuilt[key], before[key]) for key in before)


@pytest.mark.parametrize("model", MODELS, ids=named)
def test_every_layer_of_the_model_is_in_the_table_and_every_part_of_a_rule_in_the_model(model):
    table, own = TABLES[model.family], modules(model)
    assert not [name for name in own if not table.knows(model.component, name)]
    parts = [name for rule in rules(MODELS.index(model)).values() for name, _ in rule.parts]
    assert sorted(parts) == sorted(name for name in own if not re.search(model.without, name))


@pytest.mark.parametrize("model", MODELS, ids=named)
def test_the_shares_of_a_rule_are_the_rows_that_the_layers_have(model):
    for rule, parts in sources(model).values():
        total = sum(part.weight.shape[0] for part in parts)
        split = [list(rule.rows(part, total)) for part in range(len(parts))]
        assert [len(rows) for rows in split] == [part.weight.shape[0] for part in parts]
        assert sorted(row for rows in split for row in rows) == list(range(total))


@pytest.mark.parametrize("model", MODELS, ids=named)
def test_names_go_to_the_other_program_and_back(model):
    table = TABLES[model.family]
    for original, (rule, parts) in sources(model).items():
        assert table.to_diffusers(model.component, original, aspect(*parts)) == rule
        for part, (name, _) in enumerate(rule.parts):
            assert table.to_original(model.component, name, aspect(parts[part])) == (rule, part)


@pytest.mark.parametrize("model", MODELS, ids=named)
def test_flat_names_have_one_reading(model):
    table = TABLES[model.family]
    for names, dotted in ((modules(model), table.dotted), (sources(model), table.original_dotted)):
        flat = {name.replace(".", "_"): name for name in names}
        assert len(flat) == len(names)
        assert {short: dotted(model.component, short) for short in flat} == flat
        assert all(dotted(model.component, f"{short}_x") is None for short in flat)


@pytest.mark.parametrize("family", TABLES)
def test_no_rule_is_of_a_layer_that_no_model_has(family):
    models = [model for model in MODELS if model.family == family]
    own = "\n".join(name for model in models for name in modules(model))
    for rule in TABLES[family].rules[models[0].component]:
        for template, _ in rule.parts:
            if template.endswith("conv_shortcut"):  # which resnets change the width is not the numbering's affair
                continue
            assert re.search(f"^{re.escape(template)}$".replace(r"\{\}", r"\d+"), own, re.MULTILINE), template


def test_flat_sdxl_names_are_read_as_diffusers_reads_them_in_adapters():
    """Some of what is not in a block, too: diffusers passes it through. Norms it does not know there."""
    model = next(model for model in MODELS if model.family == "sdxl")
    table, names = TABLES["sdxl"], list(originals(model))
    factors = {
        f"lora_unet_{name.replace('.', '_')}.lora_{end}.weight": torch.full((1, 1), n)
        for n, name in enumerate(names)
        for end in ("down", "up")
    }
    blocks = lora_files._maybe_map_sgm_blocks_to_diffusers(factors, SimpleNamespace(layers_per_block=2))
    found, _ = lora_files._convert_non_diffusers_lora_to_diffusers(blocks)
    read = {names[int(n)]: _own_name(key) for key, n in found.items() if key.endswith(".up.weight")}
    assert read == {name: table.to_diffusers("unet", name).parts[0][0] for name in names}


# {family: diffusers' converter of adapters, the layers that it knows}
ADAPTERS = {
    "krea2": (lora_files._convert_non_diffusers_krea2_lora_to_diffusers, r".*"),
    "cosmos": (lora_files._convert_non_diffusers_anima_lora_to_diffusers, r"(?!.*_img|img_).*"),
    "ideogram4": (lora_files._convert_non_diffusers_ideogram4_lora_to_diffusers, r"layers\..*"),
}


@pytest.mark.parametrize("family", ADAPTERS)
def test_diffusers_moves_the_rows_of_adapters_as_the_rules_say(family):
    convert, known = ADAPTERS[family]
    model = next(model for model in MODELS if model.family == family)
    factors, told, at = {}, {}, 0
    for original, (rule, parts) in originals(model).items():
        rows = torch.arange(at, at := at + sum(part.weight.shape[0] for part in parts)).reshape(-1, 1)
        if re.fullmatch(known, original):
            told |= {name: rows[list(rule.rows(part, len(rows)))] for part, (name, _) in enumerate(rule.parts)}
            factors |= {f"diffusion_model.{original}.lora_{ab}.weight": t for ab, t in (("A", rows[:1]), ("B", rows))}
    found = convert(factors)
    read = {key.removeprefix("transformer."): rows for key, rows in found.items() if ".lora_B." in key}
    assert read.keys() == {f"{name}.lora_B.weight" for name in told}
    assert all(torch.equal(read[f"{name}.lora_B.weight"], rows) for name, rows in told.items())


def test_anima_s_conditioner_is_where_diffusers_has_it():
    table = TABLES["cosmos"]
    with torch.device("meta"):
        own = weighted(diffusers.AnimaTextConditioner(num_layers=2, model_dim=32))
    assert all(table.knows("text_conditioner", name) for name in own)
    names = {re.sub(r"blocks\.\d+", "blocks.{}", name) for name in own}
    assert names == {*table.components["text_conditioner"]}
    keys = {f"diffusion_model.llm_adapter.{name}.lora_A.weight": torch.ones(1) for name in own}
    read = lora_files._convert_non_diffusers_anima_lora_to_diffusers(keys)
    assert {*read} == {f"text_conditioner.{name}.lora_A.weight" for name in own}


def test_the_names_of_cosmos_1_lead_to_the_same_layers():
    """They are read; what is written is Cosmos Predict 2's. diffusers looks for them in a checkpoint that it has emptied: in one that stays it finds them."""

    class Lasting(dict[str, Tensor]):
        def pop(self, key: str, *default: Any) -> Any:
            return self[key]

    model = next(model for model in MODELS if model.family == "cosmos")
    table, checkpoint, wanted = TABLES["cosmos"], Lasting(), {}
    for at, (name, module) in enumerate(modules(model).items()):
        rules = table.all_originals("transformer", name, aspect(module))
        if re.search(r"_img|crossattn_proj|img_context", name):  # which Cosmos 1 has not
            continue
        checkpoint[f"net.{rules[-1][0].original}.weight"] = wanted[f"{name}.weight"] = torch.full((1,), at)
    found = single_files.convert_cosmos_transformer_checkpoint_to_diffusers(checkpoint)
    assert found == wanted


def test_the_names_that_comfyui_has_for_hunyuan_image_lead_to_the_same_layers():
    table = TABLES["hunyuan_image"]
    model = next(model for model in MODELS if model.family == "hunyuan_image")
    respelt = {
        "double_blocks.1.img_attn.qkv": "double_blocks.1.img_attn_qkv",
        "double_blocks.1.txt_mlp.2": "double_blocks.1.txt_mlp.fc2",
        "double_blocks.0.img_mod.lin": "double_blocks.0.img_mod.linear",
        "single_blocks.1.modulation.lin": "single_blocks.1.modulation.linear",
        "txt_in.individual_token_refiner.blocks.0.self_attn.qkv": "txt_in.individual_token_refiner.blocks.0.self_attn_qkv",
        "txt_in.t_embedder.in_layer": "txt_in.t_embedder.mlp.0",
        "time_in.out_layer": "time_in.mlp.2",
    }
    for theirs, original in respelt.items():
        assert table.is_original("transformer", theirs) and table.is_original("transformer", original)
        assert table.to_diffusers("transformer", theirs).parts == table.to_diffusers("transformer", original).parts
        assert table.original_dotted("transformer", original.replace(".", "_")) == original
        assert table.original_dotted("transformer", theirs.replace(".", "_")) in (theirs, original)
    for name, module in modules(model).items():
        (first, part), *others = table.all_originals("transformer", name, aspect(module))
        assert all(rule.parts == first.parts and at == part for rule, at in others)


@pytest.mark.parametrize(
    ("family", "numbers"), [("sd15", (1, 2, 2)), ("sd2", (1, 2, 2)), ("sdxl", (2, 2)), ("sdxl_refiner", (1, 2, 2))]
)
def test_the_upsampler_comes_after_the_attention(family, numbers):
    """Known from the published checkpoints: diffusers' converter takes either number, so tracing does not tell."""
    for level, number in enumerate(numbers):
        rule = TABLES[family].to_diffusers("unet", f"output_blocks.{3 * level + 2}.{number}.conv")
        assert rule.parts == ((f"up_blocks.{level}.upsamplers.0.conv", 1),)
        assert TABLES[family].to_diffusers("unet", f"output_blocks.{3 * level + 2}.{3 - number}.conv") is None


def _own_name(key: str) -> str:
    """The layer of a key as diffusers once wrote it, with the attention's processor between."""
    layer = re.sub(r"^unet\.|[._]lora\.up\.weight$|processor\.", "", key)
    return f"{layer}.0" if layer.endswith("to_out") else layer


def test_the_last_sd3_block_is_told_by_its_shape():
    table, name = TABLES["sd3"], "joint_blocks.23.context_block.adaLN_modulation.1"
    assert table.to_diffusers("transformer", name) is None
    assert table.to_diffusers("transformer", name, 6).chunks == (0,)
    assert table.to_diffusers("transformer", name, 2).chunks == SWAPPED


def test_each_cogvideox_norm_has_the_shift_scale_and_gate_of_both_streams():
    """The order of the original's twelve chunks is read, not traced."""
    spelt = [f"{s} {what} {n}" for s in ("video", "text") for n in (1, 2) for what in ("shift", "scale", "gate")]
    rule = TABLES["cogvideox"].to_diffusers("transformer", "mixins.adaln_layer.adaLN_modulations.3.1")
    for part, (name, _) in enumerate(rule.parts):
        wanted = [f"{s} {what} {part + 1}" for s in ("video", "text") for what in ("shift", "scale", "gate")]
        assert name == f"transformer_blocks.3.norm{part + 1}.linear"
        assert [spelt[row] for row in rule.rows(part, 12)] == wanted


def test_rows_that_do_not_divide_into_the_shares_are_refused():
    rule = TABLES["flux"].to_diffusers("transformer", "single_blocks.0.linear1")
    assert rule.rows(3, 14) == range(6, 14)
    with pytest.raises(ValueError, match=r"15 rows of single_blocks\.0\.linear1"):
        rule.rows(0, 15)


@pytest.mark.parametrize("family", TABLES)
def test_names_of_nothing_are_unknown(family):
    table = TABLES[family]
    for component in (*table.components, "vae"):
        for name in ("", "nothing.0", "transformer_blocks.x.attn"):
            assert table.to_diffusers(component, name) is None
            assert table.to_original(component, name) is None
            assert table.original_dotted(component, name) is None
            assert not table.knows(component, name)


CONFIG = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG |= {"num_key_value_heads": 2, "vocab_size": 9, "pad_token_id": 0}
T5 = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 9, "feed_forward_proj": "gated-gelu"}
QWEN_VL = {"text_config": CONFIG, "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2}}
SEEING = {"text_config": {**CONFIG, "head_dim": 16}, "vision_config": {**CONFIG, "image_size": 28, "patch_size": 14}}
SEES = "model.language_model"
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
QWEN3_VL = {"text_config": {**CONFIG, "head_dim": 16}, "vision_config": {**VISION, "deepstack_visual_indexes": []}}
ENCODERS = (
    (text.CLIP, "CLIPTextModelWithProjection", "CLIPTextConfig", CONFIG),
    (text.T5, "T5EncoderModel", "T5Config", T5),
    (text.T5, "UMT5EncoderModel", "UMT5Config", T5),
    (text.GEMMA2, "Gemma2Model", "Gemma2Config", CONFIG),
    (text.LLAMA, "LlamaModel", "LlamaConfig", CONFIG),
    (text.QWEN3, "Qwen3Model", "Qwen3Config", CONFIG),
    (text.inside("model", text.LLAMA), "LlamaForCausalLM", "LlamaConfig", CONFIG),
    (text.inside("model", text.QWEN3), "Qwen3ForCausalLM", "Qwen3Config", CONFIG),
    (text.inside(SEES, text.LLAMA), "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", QWEN_VL),
    (text.inside(SEES, text.LLAMA), "Mistral3ForConditionalGeneration", "Mistral3Config", SEEING),
    (text.inside(SEES, text.QWEN3), "Qwen3VLForConditionalGeneration", "Qwen3VLConfig", QWEN3_VL),
    (text.inside("language_model", text.QWEN3), "Qwen3VLModel", "Qwen3VLConfig", QWEN3_VL),
    (text.inside("language_model", text.LLAMA), "Mistral3Model", "Mistral3Config", SEEING),
    (text.inside("model", text.LLAMA), "SmolLM3ForCausalLM", "SmolLM3Config", CONFIG),
    (text.GLM, "GlmModel", "GlmConfig", {**CONFIG, "head_dim": 16}),
    (text.inside(SEES, text.GEMMA3), "Gemma3ForConditionalGeneration", "Gemma3Config", SEEING),
)


@pytest.mark.parametrize(
    ("templates", "name", "config", "options"), ENCODERS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_text_encoders_have_the_names_that_transformers_has(templates, name, config, options):
    """Heads and vision towers aside."""
    towers = "visual", "vision_tower", "multi_modal_projector"
    aside = "lm_head", *towers, *(f"model.{tower}" for tower in towers)
    with torch.device("meta"):
        own = weighted(getattr(transformers, name)(getattr(transformers, config)(**options)))
    names = {layer for layer in own if not layer.startswith(aside)}
    table = Table({"text_encoder": templates})
    assert not [layer for layer in names if not table.knows("text_encoder", layer)]
    assert all(table.to_diffusers("text_encoder", layer).parts == ((layer, 1),) for layer in names)
    assert {re.sub(r"(layers|block)\.\d+", r"\1.{}", layer) for layer in names} == set(templates)


@pytest.mark.parametrize("family", TABLES)
def test_text_encoders_are_components_and_their_prefixes_tell_them_apart(family):
    encoders = TABLES[family].encoders
    prefixes = [prefix for encoder in encoders.values() for prefix in encoder.kohya]
    comfyui = [encoder.comfyui for encoder in encoders.values() if encoder.comfyui]
    assert encoders and all(name.startswith(("text_encoder", "text_conditioner")) for name in encoders)
    assert len(set(prefixes)) == len(prefixes) and len(set(comfyui)) == len(comfyui)
    assert set(TABLES[family].components) == {*TABLES[family].rules, *encoders}
