"""What was attached to a model comes back from every format that can hold it: methods x families x formats, saved from the model and loaded again.

Each family is saved in each format with some of the methods, so that every pair of (method, family), (method, format) and (family, format) is here. Stock
diffusers and stock PEFT read what is written for them.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import diffpeft
from diffpeft import attach, load_lora, save_lora, unload
from diffpeft.converters import FORMATS
from diffpeft.errors import CannotConvertError, ConfigError
from diffpeft.families import family_of
from diffpeft.model.state import bundle_of, slots_of
from diffpeft.model.target import targets_of
from tests.pipeline.denoisers import SAVED, UNNAMED, model

METHODS = {
    "lora": (diffpeft.LoraConfig(r=3, lora_alpha=5), {}),
    "loha": (diffpeft.LoHaConfig(r=2, alpha=3), {}),
    "lokr": (diffpeft.LoKrConfig(r=2, alpha=3, decompose_factor=4), {}),
    "dora": (diffpeft.LoraConfig(r=3, lora_alpha=5), {"dora": "out"}),
    "dora by input": (diffpeft.LoraConfig(r=3, lora_alpha=5), {"dora": "in"}),
    "dora over loha": (diffpeft.LoHaConfig(r=3, alpha=2), {"dora": "out"}),
    "dora over lokr": (diffpeft.LoKrConfig(r=2, alpha=2, decompose_factor=4), {"dora": "out"}),
    "oft by input": (diffpeft.OFTConfig(r=0, oft_block_size=4), {"side": "input"}),
    "oft by output": (diffpeft.OFTConfig(r=0, oft_block_size=4), {"side": "output"}),
    "boft by output": (diffpeft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1), {"side": "output"}),
    "ia3": (diffpeft.IA3Config(), {}),
}
FAMILIES = [*SAVED, *UNNAMED]
WRITTEN = [name for name, fmt in FORMATS.items() if fmt.writable]
KINDS = r".*(to_q|to_k|to_v|to_out|to_out\.0|qkv|add_q_proj|net\.2|linear_2|proj_out|proj_mlp|w2|to_query|in_layer)"


@functools.cache
def base(family):
    return model(family, torch.float32)


@pytest.fixture
def net(family):
    """Of the family; what a failed test has attached does not stay."""
    yield base(family)
    unload(base(family))


def chosen(net) -> list[str]:
    """A few layers: of every kind of name the first, and those that are one with it in the original program."""
    found: dict[str, str] = {}
    for name in targets_of(net):
        if re.fullmatch(KINDS, name) and isinstance(net.get_submodule(name), nn.Linear):
            found.setdefault(re.sub(r"\d+", "#", name), name)
    return [*found.values()][:12]


def attached(net, method):
    """A trained adapter on the model: numbers that are not what it starts with."""
    config, options = METHODS[method]
    config = copy.copy(config)
    if method == "ia3":
        config.target_modules, config.feedforward_modules = chosen(net), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attach(net, config, name="a", targets=chosen(net), **options)
    generator = torch.Generator().manual_seed(7)
    for slot in slots_of(net, "a").values():
        for p in slot.parameters():
            p.data += torch.randn(p.shape, generator=generator) / 5


def deltas(net):
    """{layer: what the adapter does to its weight, in float64}."""
    own = next(iter(slots_of(net, "a"))).partition(".")[0]
    weights = {f"{own}.{n}": m.weight.detach() for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    return bundle_of(net, "a", family_of(net) or "").deltas(weights)


def methods_of(family, format):
    """Two of the methods, others for each family and format."""
    at = 2 * WRITTEN.index(format) + 3 * FAMILIES.index(family)
    return [[*METHODS][(at + n) % len(METHODS)] for n in range(2)]


def test_every_pair_is_in_the_matrix():
    cells = [(family, format, m) for family in FAMILIES for format in WRITTEN for m in methods_of(family, format)]
    assert {(family, m) for family, _, m in cells} == {(family, m) for family in FAMILIES for m in METHODS}
    assert {(format, m) for _, format, m in cells} == {(format, m) for format in WRITTEN for m in METHODS}


def saved(net, path, format):
    """Whether the adapter was saved; if not, the reason names a layer, and nothing is left."""
    try:
        save_lora(net, path, name="a", format=format)
    except (CannotConvertError, ConfigError) as why:
        assert "transformer" in str(why) or "unet" in str(why)
        assert not path.exists() and not [*path.parent.iterdir()]
        return False
    return True


def same(before, after):
    assert before.keys() <= after.keys()
    assert not any(after[layer].any() for layer in after.keys() - before.keys())  # parts of a joint layer that has some
    for layer, delta in before.items():  # factors are float32, some formats scale them once
        torch.testing.assert_close(after[layer], delta, rtol=0, atol=3e-6 * max(1.0, delta.abs().max().item()))


LARGE = ("hunyuan_image", "hunyuan_video15")  # even in the smallest size


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) if f in LARGE else f for f in FAMILIES])
def test_what_was_saved_comes_back(family, net, tmp_path):
    trace = {k: t.clone() for k, t in net.state_dict().items()}
    done = 0
    for format in WRITTEN:
        for method in methods_of(family, format):
            attached(net, method)
            before = deltas(net)
            path = tmp_path / f"{format} {method}" / ("a" if format == "peft" else "a.safetensors")
            path.parent.mkdir()
            written = saved(net, path, format)
            unload(net)
            if not written:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = load_lora(net, path, name="a")
            assert report.family == (family if family in SAVED else "")
            same(before, deltas(net))
            unload(net)
            done += 1
    assert done >= (4 if family in SAVED else 2)  # others have only the formats with their own names
    assert trace.keys() == net.state_dict().keys()
    assert all(torch.equal(t, trace[k]) for k, t in net.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["a.safetensors", pytest.param("a", marks=pytest.mark.slow)])
def test_without_a_format_everything_can_be_saved_or_the_refusal_says_where(family, net, name, tmp_path):
    for method in [*METHODS][FAMILIES.index(family) % 3 :: 3]:
        path = tmp_path / method / name
        path.parent.mkdir()
        attached(net, method)
        before = deltas(net)
        try:
            save_lora(net, path, name="a")
        except CannotConvertError as why:
            unload(net)
            assert name == "a" or method == "oft by input" or method == "ia3", why
            assert re.search(r"These formats can: \w+", str(why)), why
            continue
        unload(net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_lora(net, path, name="a")
        same(before, deltas(net))
        unload(net)


# Other programs read it

THEIRS = ["kandinsky5", "cogview4", "cosmos", "bria", "sd15", "sd3", "flux", "wan", "ltx2"]


def merged(net):
    """{layer: weight} with the adapter's update, by the definition in float64."""
    own = next(iter(slots_of(net, "a"))).partition(".")[0]
    return {
        layer.removeprefix(f"{own}."): net.get_submodule(layer.removeprefix(f"{own}.")).weight.detach().double() + delta
        for layer, delta in deltas(net).items()
    }


def as_expected(theirs, wanted):
    for layer, weight in wanted.items():
        got = theirs.get_submodule(layer).weight.detach().double()
        torch.testing.assert_close(got, weight, rtol=0, atol=1e-5 * max(1.0, weight.abs().max().item()), msg=layer)


@pytest.mark.parametrize("family", THEIRS)
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "oft by input"])
def test_stock_peft_reads_the_folder(family, net, method, tmp_path):
    import peft

    plain = copy.deepcopy(net)
    attached(net, method)
    save_lora(net, tmp_path / "a", name="a", format="peft")
    wanted = merged(net)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "a"))
    assert not [w for w in said if "adapter keys" in str(w.message)]
    as_expected(theirs.merge_and_unload(), wanted)


@pytest.mark.parametrize("family", THEIRS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_stock_diffusers_reads_the_file(family, net, method, tmp_path):
    plain = copy.deepcopy(net)
    attached(net, method)
    save_lora(net, tmp_path / "a.safetensors", name="a", format="diffusers")
    wanted, component = merged(net), next(iter(slots_of(net, "a"))).partition(".")[0]
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    plain.load_lora_adapter(load_file(tmp_path / "a.safetensors"), prefix=component, metadata=told)
    plain.fuse_lora()
    plain.unload_lora()
    as_expected(plain, wanted)
