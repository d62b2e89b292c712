"""Every class of diffusers that takes LoRAs, whether a table names its layers or not: files load, mix, fuse and are saved, and presets find layers.

What a model without a table cannot do is to be written in another program's names.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers.loaders import lora_pipeline
from safetensors.torch import save_file
from torch import nn

from diffpeft import LoraConfig, attach, fuse, load_lora, save_lora, unfuse, unload
from diffpeft.errors import CannotConvertError
from diffpeft.families import family_of
from diffpeft.model.state import slots_of
from diffpeft.model.target import PRESETS, components, targets_of
from tests.pipeline import lorable

STANDING = ("AceStepTransformer1DModel", "AnimaTextConditioner", "Kandinsky5Transformer3DModel", "SD3ControlNetModel")
NAMES = [
    pytest.param(name, marks=() if name in STANDING else pytest.mark.slow) for name in lorable.classes()
]  # a tenth of a second each
# has no feed-forwards, or none that are called so
_ATTENTION_ONLY = {"AnimaTextConditioner", "AutoencoderKL", "AutoencoderKLFlux2", "RFD4ProteinaTransformer"}
_SINGLE = {"diffusers": "a.safetensors", "peft": "a", "lycoris": "b.safetensors", "kohya-diffusers": "c.safetensors"}
R, ALPHA = 2, 1.0


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def net(name):
    return lorable.model(name)


def layers_of(net):
    """{name: layer} of what stock PEFT adapts, too."""
    transposed = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
    found = {n: m for n, (m, _) in targets_of(net).items()}
    odd = [n for n, m in found.items() if isinstance(m, transposed) or getattr(m, "groups", 1) > 1]
    return {n: m for n, m in found.items() if n not in odd and m.weight.numel()}


def factors(net, seed):
    """{layer: (A, B)}."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for layer, module in layers_of(net).items():
        rows, columns, *sides = module.weight.shape
        if isinstance(module, nn.Embedding):
            rows, columns = columns, rows
        A = torch.randn(R, columns, *sides, generator=g, dtype=torch.float64)
        made[layer] = A, torch.randn(rows, R, *(1 for _ in sides), generator=g, dtype=torch.float64)
    return {layer: pair for layer, pair in made.items() if not isinstance(layers_of(net)[layer], nn.Embedding)}


def update(pair):
    A, B = pair
    return (B.flatten(1) @ A.flatten(1)).reshape(B.shape[0], *A.shape[1:])


def file_of(net, pairs, prefix=None):
    """A file in diffusers' format: the model's own names, behind the component's."""
    component = next(iter(components(net)))
    start = prefix if prefix is not None else f"{component}." if component else ""
    return {
        f"{start}{layer}.lora_{ab}.weight": t for layer, pair in pairs.items() for ab, t in zip("AB", pair, strict=True)
    }


def folder_of(pairs, path):
    """As stock PEFT writes it."""
    path.mkdir()
    save_file(
        {
            f"base_model.model.{layer}.lora_{ab}.weight": t
            for layer, pair in pairs.items()
            for ab, t in zip("AB", pair, strict=True)
        },
        path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": sorted(pairs)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def holds(net, adapter, pairs):
    """Whether an adapter is these factors and nothing more."""
    component, slots = next(iter(components(net))), slots_of(net, adapter)
    named = {f"{component}.{layer}" if component else layer: pair for layer, pair in pairs.items()}
    assert slots.keys() == named.keys()
    return all(
        torch.equal(slots[layer].tensors["lora_A"], A) and torch.equal(slots[layer].tensors["lora_B"], B)
        for layer, (A, B) in named.items()
    )


@torch.no_grad()
def test_a_file_and_a_folder_load_mix_fuse_and_unfuse_exactly(net, tmp_path):
    one, two = factors(net, 1), factors(net, 2)
    base = {key: t.clone() for key, t in net.state_dict().items()}
    save_file(file_of(net, one), tmp_path / "one.safetensors")
    report = load_lora(net, tmp_path / "one.safetensors", name="one", weight=0.7)
    assert len(report.matched) == len(one) and not report.carried and holds(net, "one", one)
    load_lora(net, folder_of(two, tmp_path / "two"), name="two", weight=-0.3)
    assert holds(net, "two", two)
    fuse(net)
    for layer in one:
        W = base[f"{layer}.weight"] + 0.7 * update(one[layer]) - 0.3 * ALPHA / R * update(two[layer])
        torch.testing.assert_close(net.get_submodule(layer).weight, W, rtol=0, atol=1e-12, msg=layer)
    unfuse(net)
    unload(net)
    assert all(torch.equal(t, base[key]) for key, t in net.state_dict().items())


def test_what_is_loaded_is_saved_in_the_models_own_names_and_loads_again(net, tmp_path):
    pairs = factors(net, 1)
    load_lora(net, file_of(net, pairs), name="a")
    for format, file in _SINGLE.items():
        if format == "kohya-diffusers" and next(iter(components(net))) not in ("unet", "transformer"):
            continue  # its keys begin with one of the two
        save_lora(net, tmp_path / file, name="a", format=format)
        load_lora(net, tmp_path / file, name="back")
        assert holds(net, "back", pairs)
        unload(net, "back")


def test_only_other_programs_names_are_refused(net, tmp_path):
    if family_of(net):
        pytest.skip("a table names its layers")
    load_lora(net, file_of(net, factors(net, 1)), name="a")
    for format in ("kohya", "comfyui", "onetrainer"):
        with pytest.raises(CannotConvertError, match="unknown family"):
            save_lora(net, tmp_path / "a.safetensors", name="a", format=format)
    assert not list(tmp_path.iterdir())


def test_every_preset_finds_layers(net, name):
    found = {preset: {*attach(net, LoraConfig(r=1), targets=preset, dry_run=True).layers} for preset in PRESETS}
    assert found["attn"] and found["attn"] <= found["attn-mlp"] <= found["full"]
    assert name in _ATTENTION_ONLY or any(re.search("ff|mlp|feed_forward", layer) for layer in found["attn-mlp"])
    assert len(found["full"]) == len([m for m, _ in targets_of(net).values() if not isinstance(m, nn.Embedding)])


def test_stock_diffusers_makes_the_same_of_the_file(net):
    pairs = factors(net, 1)
    net.load_lora_adapter(file_of(net, pairs, prefix="transformer."), prefix="transformer", adapter_name="a")
    for layer, (A, B) in pairs.items():
        theirs = net.get_submodule(layer)
        assert theirs.scaling["a"] == 1
        for side, t in (("lora_A", A), ("lora_B", B)):
            assert torch.equal(getattr(theirs, side)["a"].weight, t), layer


MIXINS = {n: m for n, m in vars(lora_pipeline).items() if getattr(m, "_lora_loadable_modules", None)}


@pytest.mark.parametrize("mixin", MIXINS)
def test_every_component_that_a_pipeline_loads_adapters_on_takes_them(mixin, tmp_path):
    """Also where the pipeline's class says something of its components that no other does."""
    parts = {c: nn.ModuleDict({"to_q": nn.Linear(3, 5)}) for c in MIXINS[mixin]._lora_loadable_modules}
    pipe = type(mixin.replace("LoraLoaderMixin", "Pipeline"), (), {"components": parts})()
    attach(pipe, LoraConfig(r=R), name="a", targets="attn")
    slots = slots_of(pipe, "a")
    assert slots.keys() == {f"{component}.to_q" for component in parts}
    for slot in slots.values():
        nn.init.normal_(slot.tensors["lora_B"])
    wanted = {layer: {role: t.clone() for role, t in slot.tensors.items()} for layer, slot in slots.items()}
    for path in (tmp_path / "a.safetensors", tmp_path / "a"):
        save_lora(pipe, path, name="a")
        load_lora(pipe, path, name="back")
        assert all(
            torch.equal(slots_of(pipe, "back")[layer].tensors[r], t)
            for layer, own in wanted.items()
            for r, t in own.items()
        )
        unload(pipe, "back")
