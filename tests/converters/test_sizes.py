"""Which model a file is for, where names alone do not tell: headers of files for every published model, made from diffusers' own classes.

A layout is the usual targets of some training program on all blocks. No tensor has a byte that is ever read.
"""

from __future__ import annotations

import re

import pytest

from diffpeft import converters
from diffpeft.bundle import Handle
from diffpeft.converters import TABLES
from diffpeft.converters.opening import Opened
from diffpeft.converters.sizes import published
from diffpeft.errors import WrongBaseError
from tests.converters.published import MODELS, PATH, extents, originals, spellings, text

RANK = 16
TARGETS = {
    "attention": r".*\.(to_q|to_k|to_v|to_out\.0|to_out|qkv|out_layer)",
    "queries and values": r".*\.(to_q|to_v)",
    "attention and feed-forward": r".*\.(to_q|to_k|to_v|to_out\.0|to_out|add_._proj|to_add_out|net\.0\.proj|net\.2|proj_mlp|w1|w2|w3)",
    "all linear layers": r".*",
}
OURS = [name for name, model in MODELS.items() if model.family]
OTHERS = [name for name, model in MODELS.items() if not model.family]
# models that are another's twins: in names and sizes of what is usually trained there is no difference
TWINS = {
    "AnyFlow": "wan",
    "AnyFlow FAR": "wan",
    "Bria": "flux",
    "ConsisID": "cogvideox",
    "DiT": "pixart",
    "EasyAnimate": "mochi",
    "Motif Video": "hunyuan_video",
    # with a table, but the other is better known
    "ChronoEdit 14B": "wan",
    "FramePack": "hunyuan_video",
    "Helios": "wan",
    "Sana Video": "sana",
    "SkyReels V2 (default)": "wan",  # in another size
    "SkyReels V2 1.3B": "wan",
    "SkyReels V2 14B": "wan",
}


def named(name: str, targets: str, spelling=extents) -> dict[str, tuple[int, int]]:
    return {n: size for n, size in spelling(name).items() if size and re.fullmatch(TARGETS[targets], n)}


def header(
    layers: dict[str, tuple[int, int]], spelt=lambda n: f"transformer.{n}", roles=("lora_A.weight", "lora_B.weight")
):
    """The tensors of a LoRA on these layers, without bytes."""
    found = {}
    for layer, (rows, columns) in layers.items():
        found[f"{spelt(layer)}.{roles[0]}"] = Handle("BF16", (RANK, columns))
        found[f"{spelt(layer)}.{roles[1]}"] = Handle("BF16", (rows, RANK))
    return found


def source(handles) -> Opened:
    """As a file that was opened."""
    return Opened(handles, {}, "a header")


def fitted(handles, asked=None):
    return converters.fitting(source(handles), asked)


def is_told(name, handles, found):
    """Whether a file is of a model's family, or of its twin's and, where it is asked for, of its own."""
    family = MODELS[name].family
    twin = found.families[:1] == (TWINS.get(name),) and family in fitted(handles, family).families
    return not found.looks_like and (family in found.families or twin)


def test_the_file_of_sizes_is_what_diffusers_classes_say():
    """`python -m tests.converters.published` writes it."""
    assert PATH.read_text(encoding="utf-8") == text()


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", OURS)
def test_a_published_model_s_own_layers_tell_its_family(name, targets):
    layers = named(name, targets)
    if not layers:
        pytest.skip("it has none of these")
    handles = header(layers)
    found = fitted(handles)
    assert is_told(name, handles, found)
    assert not found.ambiguous  # whoever else is named reads them alike


@pytest.mark.parametrize("targets", ["attention", "all linear layers"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_model_without_a_table_is_taken_for_no_other(name, targets):
    layers = named(name, targets)
    if not layers:
        pytest.skip("it has none of these")
    found = fitted(header(layers))
    if found.families:
        assert found.families[0] == TWINS.get(name)
    else:
        assert name in found.looks_like


DOWN_UP = ("lora_down.weight", "lora_up.weight")
SPELT = {  # format: how it spells a layer, and a LoRA's factors
    "kohya": (lambda n: f"lora_unet_{n.replace('.', '_')}", DOWN_UP),
    "kohya-diffusers": (lambda n: f"lora_transformer_{n.replace('.', '_')}", DOWN_UP),
    "comfyui": (lambda n: f"diffusion_model.{n}", ("lora_A.weight", "lora_B.weight")),
    "lycoris": (lambda n: f"lycoris_{n.replace('.', '_')}", DOWN_UP),
    "peft": (lambda n: f"base_model.model.{n}", ("lora_A.weight", "lora_B.weight")),
    "bare": (lambda n: n, DOWN_UP),
}
# joint layers that trainers usually take, in the original programs' names
JOINT = (
    r".*\d\..*(qkv(_\w)?|proj(_\w)?|mlp\.\d|mlp\.fc\d|linear1|linear2|self_attn\.\w|cross_attn\.\w|ffn\.\d|w[12][qkvo]"
    r"|query_key_value|dense.*|to_\w+(\.0)?|out_layer|\w_proj|attention\.out|feed_forward\.w\d|attn\.w[qkvo]|mlp\.(gate|up|down))"
)


def originally(name):
    return {n: size for n, size in originals(name).items() if size and re.fullmatch(JOINT, n)}


@pytest.mark.parametrize("spelling", ["kohya", "comfyui", "bare"])
@pytest.mark.parametrize("name", OURS)
def test_the_original_s_names_tell_the_family_too(name, spelling):
    if spelling == "bare" and MODELS[name].family in ("cogvideox", "cogview4"):
        pytest.skip("its names begin with `transformer.`, which is a component's")
    spelt, roles = SPELT[spelling]
    handles = header(originally(name), spelt, roles)
    found = fitted(handles)
    assert is_told(name, handles, found) and not found.ambiguous


ANIMA = r"blocks\.\d+\.(self_attn|cross_attn|mlp)\..*"
HUNYUAN = r"(double|single)_blocks\..*(qkv|proj|mlp.*|linear\d)"
BLOCKS = r"(layers|blocks|transformer_blocks|\w+\.\w+_blocks)\..*"
KANDINSKY = r".*((self|cross)_attention\.(to_.*|out_layer)|feed_forward\..*)"
TRAINERS = {  # what a trainer adapts by default: (model, which of the original's spellings, layers, format)
    "sd-scripts, Anima": ("Cosmos Predict2 2B", 0, ANIMA, "kohya"),
    "ai-toolkit, Anima": ("Cosmos Predict2 2B", 0, r".*", "comfyui"),
    "diffusion-pipe, Cosmos Predict 2": ("Cosmos Predict2 2B", 0, r"blocks\..*", "comfyui"),
    "diffusion-pipe, Cosmos": ("Cosmos 7B", 1, r"blocks\..*attn.*|blocks\..*layer\d", "comfyui"),
    "musubi-tuner, Krea 2": ("Krea 2", 0, r".*", "kohya"),
    "ai-toolkit, Krea 2": ("Krea 2", 0, r".*", "comfyui"),
    "musubi-tuner, Ideogram 4": ("Ideogram 4", 0, r"layers\.\d+\.(attention|feed_forward)\..*", "kohya"),
    "ai-toolkit, Ideogram 4": ("Ideogram 4", 0, BLOCKS, "comfyui"),
    "ai-toolkit, ERNIE-Image": ("ERNIE-Image", 0, BLOCKS, "comfyui"),
    "sd-scripts, HunyuanImage": ("HunyuanImage 2.1", 0, HUNYUAN, "kohya"),
    "sd-scripts, HunyuanImage, converted": ("HunyuanImage 2.1", 1, HUNYUAN, "kohya"),
    "diffusion-pipe, HunyuanImage": ("HunyuanImage 2.1", 1, HUNYUAN, "comfyui"),
    "ai-toolkit, OmniGen2": ("OmniGen 2", 0, r".*(layers|refiner)\..*", "comfyui"),
    "ai-toolkit, Nucleus": ("Nucleus", 0, BLOCKS, "comfyui"),
    "ai-toolkit, PRX": ("PRX", 0, r"blocks\..*", "comfyui"),
    "SimpleTuner, LongCat-Image": ("LongCat-Image", -1, r".*attn\.(to|add)_.*", "bare"),
    "SimpleTuner, LongCat-Image, LyCORIS": ("LongCat-Image", -1, r".*(attn|ff).*", "lycoris"),
    "musubi-tuner, Wan": ("Wan 14B", 0, r"blocks\..*(attn|ffn).*", "kohya"),
    "ai-toolkit, Wan": ("Wan 14B I2V", 0, r"blocks\..*(attn|ffn).*", "comfyui"),
    "musubi-tuner, HunyuanVideo 1.5": ("HunyuanVideo 1.5", 0, r"double_blocks\..*", "kohya"),
    "musubi-tuner, HunyuanVideo 1.5, converted": ("HunyuanVideo 1.5", 2, r"double_blocks\..*", "kohya"),
    "diffusion-pipe, HunyuanVideo 1.5": ("HunyuanVideo 1.5", 2, r"double_blocks\..*", "comfyui"),
    "diffusion-pipe, HunyuanVideo 1.5, as it is": ("HunyuanVideo 1.5", 0, r"double_blocks\..*", "comfyui"),
    "musubi-tuner, Kandinsky 5": ("Kandinsky 5 Lite", 0, KANDINSKY, "kohya"),
    "ComfyUI, Kandinsky 5": ("Kandinsky 5 Image Lite", 0, r".*", "comfyui"),
    "SimpleTuner, Kandinsky 5": ("Kandinsky 5 Pro", -1, r".*_attention\.(to_.*|out_layer)", "diffusers"),
    "ai-toolkit, MiniMax H3": ("MiniMax H3", 0, r"(blocks|token_refiner)\..*", "comfyui"),
    "musubi-tuner, MiniMax H3": ("MiniMax H3", 0, r".*", "kohya"),
    "generate.py, MiniMax H3": ("MiniMax H3", 0, r"blocks\..*(qkv|out)_proj", "bare"),
    "ai-toolkit, Flux.3": ("FLUX.3", 0, r".*blocks\..*", "comfyui"),
    "ACE-Step": ("ACE-Step", 0, r"layers\..*attn\.\w_proj", "peft"),
    "ACE-Step, LyCORIS": ("ACE-Step", 0, r"layers\..*attn\.\w_proj", "lycoris"),
    "ACE-Step, ComfyUI": ("ACE-Step", 1, r"decoder\.layers\..*", "comfyui"),
    "SimpleTuner, ACE-Step": ("ACE-Step", -1, r"layers\..*", "diffusers"),
    "Wan Animate 2": ("Wan Animate 2", 0, r"blocks\..*", "comfyui"),
    "OneTrainer, Krea 2": ("Krea 2", -1, BLOCKS, "diffusers"),
    "OneTrainer, Ideogram 4": ("Ideogram 4", -1, BLOCKS, "diffusers"),
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_trainers_save_is_of_its_family_and_of_no_other(trainer):
    name, way, layers, spelling = TRAINERS[trainer]
    all_layers = spellings(name)[way + 1]
    adapted = {n: size for n, size in all_layers.items() if size and re.fullmatch(layers, n)}
    spelt, roles = SPELT.get(spelling, (lambda n: f"transformer.{n}", DOWN_UP))
    found = fitted(header(adapted, spelt, roles))
    assert adapted and found.families == (MODELS[name].family,) and not found.ambiguous


def test_anima_s_conditioner_is_in_the_same_file():
    original = originals("Cosmos Predict2 2B")
    adapted = {n: size for n, size in original.items() if size and re.fullmatch(ANIMA, n)}
    adapted |= {f"llm_adapter.blocks.{n}.cross_attn.o_proj": (1024, 1024) for n in range(6)}
    for spelling in ("kohya", "comfyui"):
        bundle = converters.read(source(header(adapted, *SPELT[spelling])))
        assert bundle.family == "cosmos" and {e.layer.partition(".")[0] for e in bundle.entries} == {
            "transformer",
            "text_conditioner",
        }
        assert len(bundle.entries) == len(adapted)


@pytest.mark.parametrize("spelling", ["kohya", "comfyui", "bare"])
@pytest.mark.parametrize("name", [name for name in OTHERS if MODELS[name].like])
def test_a_model_without_a_table_is_taken_for_no_other_in_the_original_s_names(name, spelling):
    spelt, roles = SPELT[spelling]
    found = fitted(header(originally(name), spelt, roles))
    assert found.families[0] == TWINS.get(name) if found.families else name in found.looks_like


@pytest.mark.parametrize("name", MODELS)
def test_a_spelling_changes_nothing(name):
    """Where a family's table is not asked: the same layers in diffusers' names are of the same family in every format."""
    layers = named(name, "attention") or named(name, "all linear layers")
    spelt, roles = SPELT[[s for s in SPELT if s != "kohya"][[*MODELS].index(name) % 5]]
    found, plain = fitted(header(layers, spelt, roles)), fitted(header(layers))
    assert not plain.ambiguous
    assert (found.families[:1], found.looks_like) == (plain.families[:1], plain.looks_like)


@pytest.mark.parametrize("channels", [128, 384], ids=["control", "fill"])
@pytest.mark.parametrize("way", [0, 1])
def test_flux_with_a_wider_input_is_flux(way, channels):
    layers = {
        n: (size if n not in ("x_embedder", "img_in") else (size[0], channels)) for n, size in linear(way).items()
    }
    found = fitted(header(layers, *(SPELT["comfyui"] if way else ())))
    assert found.families == ("flux",) and not found.ambiguous


def linear(way):
    """Flux's layers but for norms, in one program's names."""
    return {n: size for n, size in spellings("FLUX.1")[way].items() if size}


def test_unusual_sizes_are_still_their_family_where_names_decide():
    for name in OURS:
        handles = header({n: (7 * o, 7 * i) for n, (o, i) in named(name, "all linear layers").items()})
        found = fitted(handles)
        assert is_told(name, handles, found) or (found.ambiguous and not found.looks_like), name


def test_a_file_of_a_model_without_a_table_is_refused_by_name_and_not_converted(tmp_path):
    layers = {n: size for n, size in named("CogView3 Plus", "attention").items()}
    empty = source(header(layers, *SPELT["comfyui"]))
    assert converters.detect(empty).family == "" == converters.inspect(empty).family
    for ask in (converters.read, lambda source: converters.convert(source, tmp_path / "x.safetensors", to="kohya")):
        with pytest.raises(WrongBaseError, match=r"CogView3 Plus.*diffusion_model\.transformer_blocks"):
            ask(empty)
    assert not [*tmp_path.iterdir()]


def test_what_is_known_of_sizes_covers_every_family_of_transformers():
    unets = {"sd15", "sd2", "sdxl", "sdxl_refiner"}
    assert {model.family for model in published()} == {*TABLES, ""} - unets
