"""Which layer a key means: wrappers around a model, a model's own names beside the family's table, files that say less than others."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from diffpeft import converters
from diffpeft.bundle import Handle
from diffpeft.converters import FORMATS, TABLES
from diffpeft.converters.formats.wrappers import unwrapped
from diffpeft.errors import CheckpointError, ConfigError, WrongBaseError
from tests.converters import test_families
from tests.converters.test_sizes import header, source

MODELS = [(at, model) for at, model in enumerate(test_families.MODELS) if model.component == "transformer"]


def factors(layer, rank=2, columns=8, rows=8, roles=("lora_A.weight", "lora_B.weight")):
    return {f"{layer}.{roles[0]}": torch.ones(rank, columns), f"{layer}.{roles[1]}": torch.ones(rows, rank)}


def layers(tensors, **how):
    return [e.layer for e in converters.read(tensors, **how).entries]


# A model's own names and the table


def originally(at):
    """{original layer: (rows, columns) or None for a norm, its parts in diffusers' names} of a family's model."""
    model = test_families.MODELS[at]
    found = {}
    for original, (rule, parts) in test_families.sources(model).items():
        size = (
            None
            if test_families.is_norm(parts[0])
            else (sum(p.weight.shape[0] for p in parts), parts[0].weight.shape[1])
        )
        found[original] = size, [name for name, _ in rule.parts]
    return found


def comfyui(original, size):
    name = f"diffusion_model.{original}"
    if size is None:
        return {f"{name}.{role}": Handle("F32", (8,)) for role in ("diff", "diff_b")}
    return header({original: size}, lambda n: f"diffusion_model.{n}")


@pytest.mark.parametrize("at", [at for at, _ in MODELS], ids=lambda at: test_families.named(test_families.MODELS[at]))
def test_a_file_in_the_original_s_spelling_means_what_the_table_says_whatever_else_the_model_has(at):
    """Also where the model has layers of those names: its own (norms without weights among them) and, at worst, all of the original's."""
    model = test_families.MODELS[at]
    with torch.device("meta"):
        net = getattr(__import__("diffusers"), model.name)(**model.config)
    every = [name for name, _ in net.named_modules() if name]
    whole = {key: h for original, (size, _) in originally(at).items() for key, h in comfyui(original, size).items()}
    told = layers(source(whole), family=model.family)
    for names in (every, [*every, *originally(at)]):
        assert layers(source(whole), family=model.family, names={"transformer": names}) == told
    kinds = {re.sub(r"\d+", "#", original): (original, *found) for original, found in originally(at).items()}
    for original, size, parts in kinds.values():
        (entry,) = converters.read(
            source(comfyui(original, size)), family=model.family, names={"transformer": [*every, *originally(at)]}
        ).entries
        assert [*entry.targets] == [f"transformer.{part}" for part in parts], original
        bare = {key.removeprefix("diffusion_model."): t for key, t in comfyui(original, size).items()}
        if not original.startswith("transformer."):  # which is a component's name
            (entry,) = converters.read(source(bare), family=model.family, names={"transformer": every}).entries
            assert [*entry.targets] == [f"transformer.{part}" for part in parts], original


@pytest.mark.parametrize("at", [at for at, _ in MODELS], ids=lambda at: test_families.named(test_families.MODELS[at]))
def test_a_file_in_diffusers_spelling_means_the_model_s_own_layers(at):
    model = test_families.MODELS[at]
    sizes = {n: tuple(m.weight.shape[:2]) for n, m in test_families.layers(model).items()}
    names = {"transformer": [*sizes, *originally(at)]}
    assert layers(source(header(sizes)), family=model.family, names=names) == [f"transformer.{n}" for n in sizes]


# Wrappers

LAYER, FLAT = "transformer_blocks.3.attn.to_q", "transformer_blocks_3_attn_to_q"
DOTS, FLATS = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
WRAPPED = {  # a layer as programs leave it, and what its tensors end with
    "compiled": (f"transformer._orig_mod.{LAYER}", DOTS),
    "compiled, bare": (f"_orig_mod.{LAYER}", DOTS),
    "compiled block": (LAYER.replace(".3.", ".3._orig_mod."), DOTS),
    "parallel": (f"module.transformer.{LAYER}", DOTS),
    "parallel component": (f"transformer.module.{LAYER}", DOTS),
    "parallel and compiled": (f"transformer.module._orig_mod.{LAYER}", DOTS),
    "FSDP": (f"transformer.{LAYER}".replace(".3.", ".3._fsdp_wrapped_module."), DOTS),
    "checkpointed": (f"transformer.{LAYER}".replace(".3.", ".3._checkpoint_wrapped_module."), DOTS),
    "pipeline": (f"pipe.dit.{LAYER}", ("lora_A.default.weight", "lora_B.default.weight")),
    "PEFT in a component": (f"transformer.base_model.model.{LAYER}", ("lora.down.weight", "lora.up.weight")),
    "PEFT": (f"base_model.model.{LAYER}", DOTS),
    "PEFT twice": (f"base_model.model.base_model.model.{LAYER}", DOTS),
    "PEFT and compiled": (f"base_model.model._orig_mod.{LAYER}", DOTS),
    "ComfyUI and compiled": (f"diffusion_model._orig_mod.{LAYER}", DOTS),
    "kohya and compiled": (f"lora_transformer__orig_mod_{FLAT}", FLATS),
    "kohya and a compiled block": (f"lora_transformer_{FLAT}".replace("_3_", "_3__orig_mod_"), FLATS),
    "kohya and parallel": (f"lora_transformer_module_{FLAT}", FLATS),
    "kohya and PEFT": (f"lora_unet_base_model_model_{FLAT}", FLATS),
    "kohya with two underscores": (f"lora_unet__{FLAT}", FLATS),
    "kohya with one behind": (f"lora_unet_{FLAT}_", FLATS),
    "kohya, then dots": ("lora_unet_transformer_blocks_3.attn.to_q", FLATS),
    "kohya, then only dots": (f"lora_unet_.{LAYER}", FLATS),
    "LyCORIS and compiled": (f"lycoris__orig_mod_{FLAT}", FLATS),
    "LyCORIS, then dots": ("lycoris_transformer_blocks_3.attn.to_q", FLATS),
}


@pytest.mark.parametrize("case", WRAPPED)
@pytest.mark.parametrize("known", [False, True])
def test_wrappers_say_nothing_of_a_layer(case, known):
    name, roles = WRAPPED[case]
    tensors = factors(name, roles=roles)
    how = {"names": {"transformer": [LAYER]}} if known else {"family": "flux"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (entry,) = converters.read(tensors, **how).entries
    assert entry.layer == f"transformer.{LAYER}" and entry.keys == tuple(tensors)


@pytest.mark.parametrize("case", WRAPPED)
def test_a_wrapped_file_comes_back_byte_for_byte(case, tmp_path):
    from safetensors.torch import load_file, save_file

    name, roles = WRAPPED[case]
    tensors = factors(name, roles=roles)
    save_file(tensors, tmp_path / "a.safetensors")
    format = "diffusers" if roles == FLATS else "kohya-diffusers"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=format, family="flux")
        before = converters.read(tmp_path / "a.safetensors", family="flux")
        back = tmp_path / ("c" if before.format == "peft" else "c.safetensors")
        converters.convert(tmp_path / "b.safetensors", back, to=before.format, family="flux")
    again = load_file(back / "adapter_model.safetensors" if back.is_dir() else back)
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], t) for k, t in tensors.items())


@pytest.mark.parametrize("format", [name for name, fmt in FORMATS.items() if fmt.writable])
def test_names_without_wrappers_are_left_alone(format):
    """The names of all families in every format; a module called `module` below another is no wrapper."""
    from diffpeft.converters.formats import KeyParts
    from tests.converters.test_formats import entry

    fmt = FORMATS[format]
    for family, table in TABLES.items():
        if family not in fmt.tables:
            continue
        for component, templates in table.components.items():
            word = fmt.word(component, table)
            for template in templates if word is not None and format != "xlabs" else ():
                key = fmt.join(KeyParts(word, template.format(1, 2, 3), "lora_A"), entry(f"{component}.{template}"))
                assert unwrapped(key) == key
    for key in ("base_model.model.model.module.q_proj.lora_A.weight", "base_model.model.module.fc.lora_A.weight"):
        assert unwrapped(key) == key


# PEFT's names without a config


def test_peft_s_names_alone_have_scale_1_and_it_is_said_or_the_alpha_that_is_given():
    tensors = factors(f"base_model.model.{LAYER}", rank=4)
    with pytest.warns(UserWarning, match=r"adapter_config\.json.*scale 1.*alpha="):
        bundle = converters.read(tensors, family="flux")
    assert [e.alpha for e in bundle.entries] == [None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (entry,) = converters.read(tensors, family="flux", alpha=8).entries
    assert entry.alpha == 8.0
    torch.testing.assert_close(
        converters.read(tensors, family="flux", alpha=8).deltas()[f"transformer.{LAYER}"],
        torch.full((8, 8), 8.0).double(),
    )


def test_an_alpha_that_the_file_tells_is_not_overridden():
    tensors = factors("lora_unet_" + FLAT, roles=FLATS) | {f"lora_unet_{FLAT}.alpha": torch.tensor(3.0)}
    tensors |= factors("lora_unet_" + FLAT.replace("to_q", "to_k"), roles=FLATS)
    alphas = {
        e.layer: converters.rows.io.number(e.alpha) for e in converters.read(tensors, family="flux", alpha=5).entries
    }
    assert alphas == {f"transformer.{LAYER}": 3.0, f"transformer.{LAYER.replace('to_q', 'to_k')}": 5.0}


@pytest.mark.parametrize("alpha", ["8", float("nan"), float("inf"), [8]])
def test_what_is_no_alpha_is_refused(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        converters.read(factors(f"transformer.{LAYER}"), alpha=alpha)


def test_a_rotation_in_peft_s_names_alone_cannot_be_told():
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*oft"):
        converters.read({f"base_model.model.{LAYER}.oft_R.weight": torch.ones(2, 6)}, family="flux")


# Families that are not known


def test_inspecting_and_detecting_a_file_of_an_unknown_family_works():
    tensors = {key: t for n in range(3) for key, t in factors(f"lora_unet_blk_{n}_x", rank=3, roles=FLATS).items()}
    tensors |= {f"lora_unet_blk_{n}_x.alpha": torch.tensor(1.5) for n in range(3)}
    found = converters.inspect(tensors, norms=True)
    assert (found.family, found.format, found.layers, found.methods) == ("", "kohya", 3, ("lora",))
    assert (found.ranks, found.alphas) == ({3: 3}, {1.5: 3})
    assert converters.detect(tensors).family == ""


def test_an_unknown_family_s_error_shows_keys_and_no_void_remedy():
    tensors = {key: t for n in range(4) for key, t in factors(f"diffusion_model.blk.{n}.x").items()}
    with pytest.raises(WrongBaseError) as error:
        converters.read(tensors)
    message = str(error.value)
    assert len(re.findall(r"'diffusion_model\.blk\.\d\.x\.lora_[AB]\.weight'", message)) == 3
    assert "pipeline of an unknown family" not in message and "a dict of tensors" in message
