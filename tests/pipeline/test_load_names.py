"""Which component, family and layer an adapter is for: what a file says of itself, what a pipeline has, and what nobody knows."""

from __future__ import annotations

import re
import warnings

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import diffpeft
from diffpeft import LoHaConfig, LoKrConfig, LoraConfig, attach, converters, get_adapters, load_lora, save_lora, unload
from diffpeft.bundle import COMPONENTS
from diffpeft.converters import TABLES
from diffpeft.errors import CannotConvertError, ConfigError, ShapeMismatchError, UnknownKeysError, WrongBaseError
from diffpeft.families import family_of
from diffpeft.model.state import slots_of
from diffpeft.model.target import components, spellings
from tests.pipeline.denoisers import SAVED, UNNAMED, model

WIDTHS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = {**WIDTHS, "vocab_size": 50, "projection_dim": 16, "bos_token_id": 0, "eos_token_id": 1}
T5 = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 50}


def clip(projection=False):
    torch.manual_seed(3)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(transformers.CLIPTextConfig(**CLIP)).requires_grad_(False)


def t5():
    return transformers.T5EncoderModel(transformers.T5Config(**T5)).requires_grad_(False)


class Pipe:
    """As a pipeline of diffusers: its components, and a class whose name tells the family."""

    def __init__(self, **parts):
        self.components = parts
        self.__dict__.update(parts)


def pipe_of(name, **parts):
    return type(name, (Pipe,), {})(**parts)


PIPES = {
    "sd15": lambda: pipe_of("StableDiffusionPipeline", unet=model("sd15", torch.float32), text_encoder=clip()),
    "sdxl": lambda: pipe_of("StableDiffusionXLPipeline", text_encoder=clip(), text_encoder_2=clip(True)),
    "sd3": lambda: pipe_of(
        "StableDiffusion3Pipeline",
        transformer=model("sd3", torch.float32),
        text_encoder=clip(True),
        text_encoder_2=clip(True),
        text_encoder_3=t5(),
    ),
    "flux": lambda: pipe_of(
        "FluxPipeline", transformer=model("flux", torch.float32), text_encoder=clip(), text_encoder_2=t5()
    ),
}
TARGETS = ["to_q", "q_proj", "SelfAttention.q"]


def adapted(pipe, config=None, targets=TARGETS):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [
            t
            for t in targets
            if any(f".{n}".endswith(f".{t}") for m in components(pipe).values() for n, _ in m.named_modules())
        ]
        attach(pipe, config or LoraConfig(r=2), name="a", targets=parts)
    for slot in slots_of(pipe, "a").values():
        for p in slot.parameters():
            nn.init.normal_(p)
    return {layer: {r: t.clone() for r, t in slot.tensors.items()} for layer, slot in slots_of(pipe, "a").items()}


def same(pipe, name, wanted):
    found = slots_of(pipe, name)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[layer].tensors[r], t) for layer, own in wanted.items() for r, t in own.items())


# Components


@pytest.mark.parametrize("family", PIPES)
def test_a_folder_of_several_components_loads_where_it_came_from(family, tmp_path):
    pipe = PIPES[family]()
    wanted = adapted(pipe)
    save_lora(pipe, tmp_path / "a", name="a", format="peft")
    unload(pipe)
    load_lora(pipe, tmp_path / "a", name="back")
    same(pipe, "back", wanted)


@pytest.mark.parametrize("family", PIPES)
@pytest.mark.parametrize("as_file", [False, True])
def test_each_component_s_own_folder_or_file_adapts_that_component(family, as_file, tmp_path):
    pipe = PIPES[family]()
    wanted = adapted(pipe)
    save_lora(pipe, tmp_path / "a", name="a", format="lycoris" if as_file else "peft")
    unload(pipe)
    for component in {layer.partition(".")[0] for layer in wanted}:
        own = {layer: t for layer, t in wanted.items() if layer.startswith(f"{component}.")}
        load_lora(pipe, tmp_path / "a" / (f"{component}.safetensors" if as_file else component), name="b")
        same(pipe, "b", own)
        unload(pipe)


TWO = {  # {family: its pipeline, the second of its denoisers}
    "wan": ("WanPipeline", "transformer_2"),
    "minimax_h3": ("MiniMaxH3ModularPipeline", "transformer_ref"),
}


@pytest.mark.parametrize("format", ["kohya", "comfyui", "kohya-diffusers", "lycoris", "peft"])
@pytest.mark.parametrize("family", TWO)
def test_two_denoisers_of_one_shape_have_a_file_each(family, format, tmp_path):
    """Wan 2.2's experts for high and low noise: programs with one word for both keep them in two files."""
    name, second = TWO[family]
    pipe = pipe_of(name, **{c: model(family, torch.float32) for c in ("transformer", second)})
    wanted = adapted(pipe, targets=["to_out.0", "ff.net.2"])
    assert {layer.partition(".")[0] for layer in wanted} == {"transformer", second}
    if format != "peft":
        with pytest.raises(CannotConvertError, match=f"one component, not transformer and {second}"):
            save_lora(pipe, tmp_path / "a.safetensors", name="a", format=format)
    save_lora(pipe, tmp_path / "a", name="a", format=format)
    unload(pipe)
    load_lora(pipe, tmp_path / "a", name="back")
    same(pipe, "back", wanted)
    unload(pipe)
    end = "" if format == "peft" else ".safetensors"
    apart = {c: {k: t for k, t in wanted.items() if k.startswith(f"{c}.")} for c in ("transformer", second)}
    for component, own in apart.items():
        (tmp_path / "a" / f"{component}{end}").rename(tmp_path / f"low {component}{end}")
        load_lora(
            pipe, tmp_path / f"low {component}{end}", name="b"
        )  # what it says of itself counts, not what it is called
        same(pipe, "b", own)
        unload(pipe)
        load_lora(
            getattr(pipe, component), tmp_path / f"low {component}{end}", name="b"
        )  # or the model that it is loaded on
        same(pipe, "b", own)
        unload(pipe)


def test_files_of_other_programs_go_to_the_denoiser_that_they_are_loaded_on(tmp_path):
    """musubi-tuner's two files of a run, which say nothing of which is which."""
    pipe = pipe_of("WanPipeline", **{c: model("wan", torch.float32) for c in ("transformer", "transformer_2")})
    high = lora("lora_unet_blocks_0_self_attn_q", 32, 32, rank=2)
    save_file(
        {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for k, t in high.items()},
        tmp_path / "high.safetensors",
    )
    for component in ("transformer", "transformer_2"):
        load_lora(getattr(pipe, component), tmp_path / "high.safetensors", name=component)
        assert [*slots_of(pipe, component)] == [f"{component}.blocks.0.attn1.to_q"]
    (tmp_path / "high.safetensors").rename(tmp_path / "transformer_2.safetensors")
    load_lora(pipe, tmp_path / "transformer_2.safetensors", name="named")
    assert [*slots_of(pipe, "named")] == ["transformer_2.blocks.0.attn1.to_q"]


def test_the_folder_s_name_tells_where_the_metadata_do_not(tmp_path):
    pipe = PIPES["sd3"]()
    adapted(pipe)
    save_lora(pipe, tmp_path / "a", name="a", format="peft")
    unload(pipe)
    for component in ("text_encoder", "text_encoder_2"):
        file = tmp_path / "a" / component / "adapter_model.safetensors"
        save_file(load_file(file), file, {"format": "pt"})
        for source in (tmp_path / "a" / component, file):
            report = load_lora(pipe, source, name="b")
            assert {layer.partition(".")[0] for layer in report.matched} == {component}
            unload(pipe)


@pytest.mark.parametrize("family", ["chroma", "flux"])
def test_a_folder_whose_files_fit_several_families_is_the_pipeline_s(family, tmp_path):
    """Attention alone is called and sized alike in both; each has its own second text encoder."""
    name = {"chroma": "ChromaPipeline", "flux": "FluxPipeline"}[family]
    pipe = pipe_of(name, transformer=model(family, torch.float32), text_encoder=t5() if family == "chroma" else clip())
    wanted = adapted(pipe)
    save_lora(pipe, tmp_path / "a", name="a", format="peft")
    for component in ("transformer", "text_encoder"):  # as stock PEFT would write them
        file = tmp_path / "a" / component / "adapter_model.safetensors"
        save_file(load_file(file), file, {"format": "pt"})
    unload(pipe)
    assert family in converters.fitting(tmp_path / "a").families
    load_lora(pipe, tmp_path / "a", name="b")
    same(pipe, "b", wanted)


def test_a_folder_of_an_unknown_model_and_its_text_encoder_is_unknown_and_loads(tmp_path):
    pipe = pipe_of("KandinskyPipeline", transformer=model("kandinsky6", torch.float32), text_encoder=clip())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attach(pipe, LoraConfig(r=2), name="a", targets=["to_query", "q_proj"])
    wanted = {layer: {r: t.clone() for r, t in s.tensors.items()} for layer, s in slots_of(pipe, "a").items()}
    save_lora(pipe, tmp_path / "a", name="a", format="peft")
    unload(pipe)
    assert converters.fitting(tmp_path / "a").families == ()
    assert load_lora(pipe, tmp_path / "a", name="b").family == ""
    same(pipe, "b", wanted)


def test_an_adapter_of_a_component_that_the_pipeline_lacks_adapts_no_other(tmp_path):
    pipe, small = PIPES["sd3"](), PIPES["flux"]()
    adapted(pipe)
    save_lora(pipe, tmp_path / "a", name="a", format="peft")
    parts = {**small.components, "text_encoder_2": clip(True)}
    del parts["text_encoder"]
    lacking = pipe_of("StableDiffusion3Pipeline", **{**pipe.components, "text_encoder_2": None})
    unload(pipe)
    with pytest.raises(UnknownKeysError, match="text_encoder_2"):
        load_lora(lacking, tmp_path / "a" / "text_encoder_2", name="b")
    assert get_adapters(lacking) == {}
    alone = clip(True)  # one model is what it was given for
    assert load_lora(alone, tmp_path / "a" / "text_encoder_2", name="b").matched


@pytest.mark.parametrize("family", PIPES)
def test_stock_peft_finds_every_key_of_a_text_encoder_s_folder(family, tmp_path):
    import peft

    pipe = PIPES[family]()
    wanted = adapted(pipe)
    save_lora(pipe, tmp_path / "a", name="a", format="peft")
    unload(pipe)
    for component in [c for c in components(pipe) if c.startswith("text_encoder")]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            theirs = peft.PeftModel.from_pretrained(getattr(pipe, component), str(tmp_path / "a" / component))
        assert not [w for w in said if "adapter keys" in str(w.message)]
        own = {k: t for k, t in wanted.items() if k.startswith(f"{component}.")}
        loaded = [p for n, p in theirs.named_parameters() if "lora_" in n]
        assert len(loaded) == 2 * len(own)
        assert {tuple(p.flatten().tolist()) for p in loaded} == {
            tuple(t.flatten().tolist()) for own_ in own.values() for t in own_.values()
        }


@pytest.mark.parametrize("family", PIPES)
def test_stock_peft_s_names_come_from_the_family_where_no_model_told_them(family, tmp_path):
    """A kohya or diffusers file converted without a model."""
    pipe = PIPES[family]()
    wanted = adapted(pipe)
    save_lora(pipe, tmp_path / "a.safetensors", name="a", format="diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converters.convert(tmp_path / "a.safetensors", tmp_path / "b", to="peft", family=family)
    for component in {layer.partition(".")[0] for layer in wanted}:
        keys = load_file(tmp_path / "b" / component / "adapter_model.safetensors")
        names = {k.removeprefix("base_model.model.").partition(".lora_")[0] for k in keys}
        assert names <= {n for n, _ in getattr(pipe, component).named_modules()}


def test_components_that_diffusers_loads_adapters_on_are_all_seen():
    import diffusers.loaders.lora_pipeline as mixins

    told = {c for m in vars(mixins).values() for c in getattr(m, "_lora_loadable_modules", ())}
    assert told <= {*COMPONENTS}


def test_an_adapter_of_ltx2_s_connectors_goes_out_and_in(tmp_path):
    connectors = nn.ModuleDict({"video": nn.ModuleDict({"to_q": nn.Linear(4, 4)})})
    pipe = pipe_of("LTX2Pipeline", transformer=model("ltx2", torch.float32), connectors=connectors)
    wanted = adapted(pipe)
    assert "connectors.video.to_q" in wanted
    save_lora(pipe, tmp_path / "a.safetensors", name="a")
    unload(pipe)
    assert load_lora(pipe, tmp_path / "a.safetensors", name="b").family == "ltx2"
    same(pipe, "b", wanted)


def test_a_prior_is_adapted_where_it_is_the_denoiser():
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8)
    alone = pipe_of("KandinskyPriorPipeline", prior=prior, text_encoder=clip(True))
    attach(alone, LoraConfig(r=1), name="a", targets=["to_q"])
    assert {layer.partition(".")[0] for layer in slots_of(alone, "a")} == {"prior"} == {*components(prior)}
    unload(alone)
    assert "prior" not in components(pipe_of("StableUnCLIPPipeline", prior=prior, unet=model("sd15", torch.float32)))


def test_a_pipeline_whose_denoiser_has_another_name_is_refused_by_that_name():
    net = diffusers.StableCascadeUNet.__new__(diffusers.StableCascadeUNet)
    nn.Module.__init__(net)
    with pytest.raises(ConfigError, match=r"'decoder'.*pipe\.decoder"):
        attach(
            pipe_of("StableCascadeDecoderPipeline", decoder=net, text_encoder=clip(True)),
            LoraConfig(r=1),
            targets="attn",
        )


DENOISERS = {
    name: kind
    for name in sorted(dir(diffusers))
    if re.search("Transformer|UNet|DiT", name)
    and not re.search("ControlNet|Vae|Prior|StableCascade|Pipeline|Modular", name)
    and isinstance(kind := getattr(diffusers, name), type)
    and issubclass(kind, diffusers.ModelMixin)
}


@pytest.mark.parametrize("name", DENOISERS)
def test_every_denoiser_of_diffusers_has_the_name_that_pipelines_give_it(name):
    bare = DENOISERS[name].__new__(DENOISERS[name])
    nn.Module.__init__(bare)
    assert [*components(bare)] == ["unet" if "UNet" in name else "transformer"]
    derived = type("Mine", (DENOISERS[name],), {})
    own = derived.__new__(derived)
    nn.Module.__init__(own)
    assert [*components(own)] == [*components(bare)]


def test_other_modules_have_none():
    for module in (
        nn.Linear(1, 1),
        nn.Transformer(2, 1, 1, 1, 2),
        diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
    ):
        assert [*components(module)] == [""]


# Families


@pytest.mark.parametrize("family", [*SAVED, *UNNAMED])
def test_a_model_s_class_tells_its_family_or_none(family):
    net = model(family, torch.float32)
    own = family if family in SAVED else None
    assert family_of(net) == own
    if not hasattr(net.config, "cross_attention_dim") or family not in ("sd15", "sd2", "sdxl", "sdxl_refiner"):
        assert (
            family_of(pipe_of("FluxPipeline", transformer=net)) == own
        )  # the model counts, not what the pipeline is called


TRUE = {
    "CogView4Pipeline": "cogview4",
    "Cosmos2TextToImagePipeline": "cosmos",
    "CosmosVideoToWorldPipeline": "cosmos",
    "Cosmos3OmniPipeline": None,
    "Krea2Pipeline": "krea2",
    "Ideogram4Pipeline": "ideogram4",
    "ErnieImagePipeline": "ernie_image",
    "LongCatImagePipeline": "longcat_image",
    "OvisImagePipeline": "ovis_image",
    "BriaFiboPipeline": "bria_fibo",
    "BriaFibo2Pipeline": "bria_fibo2",
    "PRXPipeline": "prx",
    "GlmImagePipeline": "glm_image",
    "NucleusMoEImagePipeline": "nucleus_image",
    "FluxControlPipeline": "flux",
    "LTX2Pipeline": "ltx2",
    "BriaPipeline": "bria",
    "SkyReelsV2Pipeline": "skyreels_v2",
    "HeliosPipeline": "helios",
    "HunyuanVideo15Pipeline": "hunyuan_video15",
    "HunyuanVideoFramepackPipeline": "framepack",
    "HunyuanImagePipeline": "hunyuan_image",
    "SanaVideoPipeline": "sana_video",
    "SanaImageToVideoPipeline": "sana_video",
    "Flux3ModularPipeline": "flux3",
    "QwenImage21Pipeline": "qwen_image21",
    "VisualClozePipeline": "flux",
    "LucyEditPipeline": "wan",
    "WanVACEPipeline": "wan",
    "FluxKontextPipeline": "flux",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "LatentConsistencyModelPipeline": "sd15",
}
_TYPES = {"VisualClozePipeline": "FluxTransformer2DModel", "LucyEditPipeline": "WanTransformer3DModel"}


@pytest.mark.parametrize("name", TRUE)
def test_a_pipeline_is_of_the_family_of_its_denoiser(name):
    kind = _TYPES.get(name) or next(
        (
            found
            for cls in [getattr(diffusers, name, None)]
            if cls
            for p in __import__("inspect").signature(cls.__init__).parameters.values()
            for found in re.findall(
                r"\w+(?:Transformer\dDModel|UNet2DConditionModel)\b|UNet2DConditionModel", str(p.annotation)
            )
        ),
        None,
    )
    if kind is None:
        pytest.skip("this version of diffusers does not have it")
    bare = getattr(diffusers, kind).__new__(getattr(diffusers, kind))
    nn.Module.__init__(bare)
    object.__setattr__(bare, "_internal_dict", diffusers.configuration_utils.FrozenDict({"cross_attention_dim": 768}))
    part = "unet" if "UNet" in kind else "transformer"
    assert family_of(pipe_of(name, **{part: bare})) == TRUE[name]


@pytest.mark.parametrize("blocks, wrong", [((10, 20), True), ((8, 38), False)], ids=["another model's", "this one's"])
def test_a_model_of_unusual_depth_takes_files_that_fill_it_and_none_of_another_model(blocks, wrong):
    """Files with the sizes of LongCat-Image and of Bria's FIBO, whose layers are called as Flux's."""
    with torch.device("meta"):
        net = diffusers.FluxTransformer2DModel(**({} if wrong else {"num_layers": 8}))
    layers = [f"transformer_blocks.{n}.attn.to_q" for n in range(blocks[0])]
    layers += [f"single_transformer_blocks.{n}.attn.to_q" for n in range(blocks[1])]
    tensors = {k: t for layer in layers for k, t in lora(f"transformer.{layer}", 3072, 3072, rank=1).items()}
    assert converters.detect(tensors).family == ("longcat_image" if wrong else "bria_fibo")
    if wrong:
        with pytest.raises(WrongBaseError, match=r"longcat_image.*flux"):
            load_lora(net, tensors)
    else:
        assert len(load_lora(net, tensors).matched) == len(layers)


# Models without a table

OWN = ("diffusers", "peft", "kohya-diffusers", "lycoris")


@pytest.mark.parametrize("family", UNNAMED)
@pytest.mark.parametrize("config", [LoraConfig(r=2), LoHaConfig(r=2), LoKrConfig(r=2)], ids=lambda c: type(c).__name__)
def test_a_model_without_a_table_is_saved_in_its_own_names(family, config, tmp_path):
    net = model(family, torch.float32)
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)][:9]
    attach(net, config, name="a", targets=names)
    for slot in slots_of(net, "a").values():
        for p in slot.parameters():
            nn.init.normal_(p)
    wanted = {layer: {r: t.clone() for r, t in s.tensors.items()} for layer, s in slots_of(net, "a").items()}
    for format in (*OWN, None):
        path = tmp_path / str(format) / ("a" if format == "peft" else "a.safetensors")
        path.parent.mkdir()
        if format == "diffusers" and not isinstance(config, LoraConfig):
            with pytest.raises(CannotConvertError, match="lycoris"):
                save_lora(net, path, name="a", format=format)
            continue
        save_lora(net, path, name="a", format=format)
        unload(net)
        report = load_lora(net, path, name="a")
        assert report.family == "" and len(report.matched) == len(names)
        same(net, "a", wanted)
    for format in ("kohya", "comfyui", "onetrainer", "xlabs"):
        with pytest.raises(CannotConvertError, match=r"unknown family|not for|processors|names for"):
            save_lora(net, tmp_path / "no.safetensors", name="a", format=format)
    assert not (tmp_path / "no.safetensors").exists()


def test_what_was_loaded_from_a_file_is_saved_as_the_same(tmp_path):
    net = model("cogview3", torch.float32)
    attach(net, LoraConfig(r=2), name="a", targets=["to_q"])
    save_lora(net, tmp_path / "a.safetensors", name="a", metadata={"mine": "yes"})
    unload(net)
    load_lora(net, tmp_path / "a.safetensors", name="a")
    save_lora(net, tmp_path / "b.safetensors", name="a")
    a, b = (load_file(tmp_path / f"{n}.safetensors") for n in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_known_model_s_layers_that_the_table_lacks_are_saved_too(tmp_path):
    net = model("flux", torch.float32)
    net.mine = nn.Linear(4, 4)
    attach(net, LoraConfig(r=2), name="a", targets=["mine", "to_q"])
    save_lora(net, tmp_path / "a.safetensors", name="a")
    unload(net)
    assert "transformer.mine" in load_lora(net, tmp_path / "a.safetensors", name="a").matched
    with pytest.raises(CannotConvertError, match=r"transformer\.mine"):
        save_lora(net, tmp_path / "b.safetensors", name="a", format="kohya")


@pytest.mark.parametrize("config", [LoHaConfig(r=3, alpha=2), LoKrConfig(r=2, alpha=2, decompose_factor=4)])
def test_a_dora_over_another_method_on_joint_layers_is_saved_or_refused_with_the_layers(config, tmp_path):
    net = model("flux", torch.float32)
    attach(net, config, name="a", targets=["to_q", "to_k", "to_v"], dora="out")
    for format in ("comfyui", "kohya", "diffusers", "onetrainer"):
        with pytest.raises(CannotConvertError, match=r"to_q.*kohya-diffusers"):
            save_lora(net, tmp_path / "a.safetensors", name="a", format=format)
    assert not [*tmp_path.iterdir()]
    save_lora(net, tmp_path / "a.safetensors", name="a")
    assert converters.detect(tmp_path / "a.safetensors").format == "kohya-diffusers"


# Messages


def lora(layer, rows, columns, rank=2):
    return {f"{layer}.lora_A.weight": torch.ones(rank, columns), f"{layer}.lora_B.weight": torch.ones(rows, rank)}


def test_a_control_lora_is_called_one():
    net = model("flux", torch.float32)
    tensors = (
        lora("img_in", 32, 8) | {"img_in.lora_B.bias": torch.ones(32)} | lora("double_blocks.0.img_attn.proj", 32, 32)
    )
    with pytest.raises(ShapeMismatchError, match=r"control LoRA.*x_embedder.*8 channels.*4"):
        load_lora(net, tensors)


@pytest.mark.parametrize(
    "family, layer", [("flux", "double_blocks.0.img_attn.qkv"), ("z_image", "layers.0.attention.qkv")]
)
@pytest.mark.parametrize("rows, columns", [(95, 32), (96, 31), (48, 32), (192, 64)])
@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "dora"])
def test_tensors_that_do_not_fit_joint_layers_are_named(family, layer, rows, columns, method):
    net, key = model(family, torch.float32), f"diffusion_model.{layer}"
    tensors = {
        "lora": lora(key, rows, columns),
        "dora": {**lora(key, rows, columns), f"{key}.dora_scale": torch.ones(1, columns)},
        "loha": {
            f"{key}.hada_w{n}_{x}": torch.ones(*((rows, 2) if x == "a" else (2, columns))) for n in (1, 2) for x in "ab"
        },
        "lokr": {f"{key}.lokr_w1": torch.ones(1, 1), f"{key}.lokr_w2": torch.ones(rows, columns)},
    }[method]
    if family == "z_image" and (rows, columns) == (192, 64):
        return  # these are its own
    with pytest.raises(ShapeMismatchError) as error:
        load_lora(net, tensors)
    said = str(error.value)
    assert re.search(r"attn\.to_[qkv]|attention\.to_[qkv]|qkv", said) and "a dict of tensors" in said
    assert re.search(r"\(\w+, \d+\)|\(\d+, \d+\)", said) and "is invalid" not in said


def test_a_file_of_an_unknown_family_shows_its_keys_and_no_void_remedy(tmp_path):
    net = model("flux", torch.float32)
    save_file(
        {k: t for n in range(4) for k, t in lora(f"transformer.blk.{n}.x", 4, 4).items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(WrongBaseError) as error:
        load_lora(net, tmp_path / "x.safetensors")
    said = str(error.value)
    assert said.count("transformer.blk.") == 3 and "x.safetensors" in said and "pipeline of an unknown" not in said


def test_a_file_that_is_partly_the_pipeline_s_is_blamed_for_its_keys():
    net = model("flux", torch.float32)
    tensors = lora("transformer.transformer_blocks.0.attn.to_q", 32, 32) | lora("transformer.blk.0.x", 4, 4)
    with pytest.raises(UnknownKeysError, match=r"blk\.0\.x"):
        load_lora(net, tensors)


@pytest.mark.parametrize("name", ["text_model.blocks.0.attn1.to_q", "blocks.0.attn1.to_q"])
def test_near_matches_offer_neither_what_was_typed_nor_clip_s_level(name):
    net = model("wan", torch.float32)
    with pytest.raises(UnknownKeysError) as error:
        load_lora(net, lora(f"transformer.{name}x", 32, 32) | lora("transformer.blocks.0.attn2.to_q", 32, 32))
    meant = re.findall(r"Did you mean (.*?)\?", str(error.value))
    assert meant and "text_model" not in meant[0] and f"{name}x'" not in meant[0]
    with pytest.raises(diffpeft.UnknownNameError) as error:
        attach(net, LoraConfig(r=1), targets=["text_model.blocks.0.attn1.to_q"])
    assert "text_model" not in str(error.value).partition("Did you mean")[2]


def test_two_spellings_are_clip_s_alone():
    assert spellings("mid_block.attentions.0", "unet") == ("mid_block.attentions.0",)
    assert spellings("encoder.layers.0.mlp.fc1", "text_encoder_2") == (
        "encoder.layers.0.mlp.fc1",
        "text_model.encoder.layers.0.mlp.fc1",
    )
    assert spellings("text_model.final_layer_norm", "text_encoder") == (
        "text_model.final_layer_norm",
        "final_layer_norm",
    )
    assert spellings("encoder.block.0.layer.0.SelfAttention.q", "text_encoder_3") == (
        "encoder.block.0.layer.0.SelfAttention.q",
    )
    assert spellings("model.layers.0.self_attn.q_proj", "text_encoder") == ("model.layers.0.self_attn.q_proj",)


def test_the_alpha_of_a_single_file_in_peft_s_names():
    net = model("flux2", torch.float32)
    tensors = lora("base_model.model.double_blocks.1.img_attn.proj", 32, 32)
    with pytest.warns(UserWarning, match="scale 1.*alpha="):
        load_lora(net, tensors, name="a")
    load_lora(net, tensors, name="b", alpha=1)
    (a,), (b,) = slots_of(net, "a").values(), slots_of(net, "b").values()
    assert (a.parts[0].alpha, b.parts[0].alpha) == (None, 1.0)


@pytest.mark.parametrize("format", OWN)
def test_layers_whose_names_end_or_begin_like_wrappers_come_back(format, tmp_path):
    net = nn.ModuleDict(
        {n: nn.ModuleDict({"fc_": nn.Linear(4, 4), "module": nn.Linear(4, 4)}) for n in ("module", "pipe")}
    )
    net.transformer = nn.Linear(4, 4)
    pipe = pipe_of("MyPipeline", transformer=net)
    attach(pipe, LoraConfig(r=2), name="a", targets="full")
    for slot in slots_of(pipe, "a").values():
        for p in slot.parameters():
            nn.init.normal_(p)
    wanted = {layer: {r: t.clone() for r, t in s.tensors.items()} for layer, s in slots_of(pipe, "a").items()}
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    save_lora(pipe, path, name="a", format=format)
    unload(pipe)
    load_lora(pipe, path, name="b")
    assert len(wanted) == 5
    same(pipe, "b", wanted)


def test_every_family_has_a_denoiser_in_these_tests():
    assert {*SAVED} == {*TABLES} - {"omnigen2"}  # of which diffusers has no class
