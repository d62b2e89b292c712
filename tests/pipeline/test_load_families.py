"""load_lora on denoisers of every kind: files in original names, fused and turned layers among them, do what their updates in the weights do."""

from __future__ import annotations

import copy
import json
import re
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffpeft import UnknownKeysError, WrongBaseError, converters, fuse, load_lora, save_lora, unfuse, unload
from diffpeft.converters import TABLES
from tests.pipeline.denoisers import CALLED_TOO, MODELS, model, output

PLAIN = (nn.Linear, nn.Conv2d, nn.Conv3d)


@pytest.fixture(params=[*MODELS, *(pytest.param(family, marks=pytest.mark.slow) for family in CALLED_TOO)])
def family(request):
    return request.param


@pytest.fixture
def net(family):
    return model(family)


def component(net):
    return "unet" if type(net).__name__.startswith("UNet") else "transformer"


def originals(net, family):
    """{original layer: its rule} of the linear layers and convolutions."""
    found = {}
    for name, layer in net.named_modules():
        if isinstance(layer, PLAIN):
            ratio = layer.weight.shape[0] // layer.weight.shape[1]
            rule, _ = TABLES[family].to_original(component(net), name, ratio)
            found[rule.original] = rule
    return found


def weights(net, rule):
    return [net.get_submodule(name).weight for name, _ in rule.parts]


def kohya(net, family, make):
    """A file of what `make(rows, weight of the first part)` {suffix: tensor} gives for each original layer, and {layer: its rows' order}."""
    g = torch.Generator().manual_seed(3)
    tensors = {}
    for original, rule in originals(net, family).items():
        own = weights(net, rule)
        for suffix, tensor in make(sum(map(len, own)), own[0], g).items():
            tensors[f"lora_unet_{original.replace('.', '_')}.{suffix}"] = tensor.float()
    return tensors


def lora(rows, W, g, r=4):
    new = lambda *shape: torch.randn(*shape, generator=g) / 4  # noqa: E731
    ones = (1,) * (W.ndim - 2)
    return {
        "lora_down.weight": new(r, *W.shape[1:]),
        "lora_up.weight": new(rows, r, *ones),
        "alpha": torch.tensor(2.0),
    }


def loha(rows, W, g):
    new = lambda *shape: torch.randn(*shape, generator=g) / 4  # noqa: E731
    i = W[0].numel()
    return {f"hada_w{n}_{ab}": new(*((rows, 3) if ab == "a" else (3, i))) for n in "12" for ab in "ab"} | {
        "alpha": torch.tensor(1.5)
    }


def lokr(rows, W, g):
    """Halves that lie across the parts of a fused layer."""
    new = lambda *shape: torch.randn(*shape, generator=g) / 4  # noqa: E731
    first = 2 - rows % 2
    return {"lokr_w1": new(first, 2), "lokr_w2": new(rows // first, W.shape[1] // 2, *W.shape[2:])}


def dora(rows, W, g):
    ones = (1,) * (W.ndim - 2)
    return lora(rows, W, g) | {"dora_scale": torch.rand(rows, 1, *ones, generator=g) + 0.5}


def dora_in(rows, W, g):
    ones = (1,) * (W.ndim - 2)
    return lora(rows, W, g) | {"dora_scale": torch.rand(1, W.shape[1], *ones, generator=g) + 0.5}


def full(rows, W, g):
    new = lambda *shape: torch.randn(*shape, generator=g) / 4  # noqa: E731
    return {"diff": new(rows, *W.shape[1:])}


KINDS = {"lora": lora, "loha": loha, "lokr": lokr, "dora": dora, "dora by input": dora_in, "full": full}


def merged(net, family, tensors):
    """A copy with the updates in its weights, by the definitions in float64 on the fused weights."""
    out = copy.deepcopy(net)
    own = component(net)
    base = {f"{own}.{name}": m.weight for name, m in net.named_modules() if isinstance(m, PLAIN)}
    deltas = converters.read(tensors, family=family).deltas(base)
    with torch.no_grad():
        for layer, delta in deltas.items():
            out.get_submodule(layer.removeprefix(own + ".")).weight += delta
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_in_original_names_does_what_its_updates_in_the_weights_do(kind, net, family):
    tensors = kohya(net, family, KINDS[kind])
    before, want = output(net, family), output(merged(net, family, tensors), family)
    report = load_lora(net, tensors, name="a")
    assert report.family == family and not report.carried
    assert len(report.matched) == sum(isinstance(m, PLAIN) for m in net.modules())
    got = output(net, family)
    assert not torch.allclose(want, before)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * float(want.abs().max()))  # DoRA's magnitudes are float32
    unload(net)
    assert torch.equal(output(net, family), before)


@pytest.mark.parametrize("format", ["kohya", "comfyui", "kohya-diffusers", "diffusers", "lycoris"])
def test_every_format_of_the_same_adapter_loads_alike(format, net, family, tmp_path):
    tensors = kohya(net, family, lora)
    save_file(tensors, tmp_path / "a.safetensors")
    converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=format, family=family)
    load_lora(net, tensors, name="a")
    want = output(net, family)
    unload(net)
    load_lora(net, tmp_path / "b.safetensors", name="b")
    assert torch.equal(output(net, family), want)
    save_lora(net, tmp_path / "c.safetensors", name="b", format="kohya")
    unload(net)
    load_lora(net, tmp_path / "c.safetensors", name="c")
    torch.testing.assert_close(output(net, family), want, rtol=0, atol=1e-9)  # rows of unequal parts stand in blocks


@torch.no_grad()
def test_fusing_gives_the_same_and_unfusing_the_bytes(net, family):
    load_lora(net, kohya(net, family, dora), name="a", weight=0.7)
    want, bytes_ = output(net, family), {n: p.clone() for n, p in net.named_parameters() if "adapters" not in n}
    fuse(net)
    torch.testing.assert_close(output(net, family), want, rtol=0, atol=1e-9)
    unfuse(net)
    assert all(torch.equal(p, bytes_[n]) for n, p in net.named_parameters() if n in bytes_)
    assert torch.equal(output(net, family), want)


def test_norms_and_biases_are_loaded(net, family):
    own, table = component(net), TABLES[family]
    tensors: dict[str, Tensor] = {}
    for name, m in net.named_modules():
        w = getattr(m, "weight", None)
        if isinstance(w, nn.Parameter) and w.ndim == 1 and table.knows(own, name):
            tensors[f"{own}.{name}.diff"] = torch.full(w.shape, 0.25)
            if getattr(m, "bias", None) is not None:
                tensors[f"{own}.{name}.diff_b"] = torch.full(w.shape, 0.5)
        elif isinstance(m, nn.Linear) and m.bias is not None:
            tensors[f"{own}.{name}.diff_b"] = torch.full(m.bias.shape, -0.125)
    want_net = copy.deepcopy(net)
    with torch.no_grad():
        for key, t in tensors.items():
            layer, _, role = key.removeprefix(own + ".").rpartition(".")
            getattr(want_net.get_submodule(layer), "bias" if role == "diff_b" else "weight").add_(t)
    load_lora(net, tensors, name="a", family=family)
    # Wan's norms work in float32
    torch.testing.assert_close(
        output(net, family), output(want_net, family), rtol=0, atol=1e-9 if family != "wan" else 1e-6
    )


def test_another_familys_file_is_refused_by_name(net, family):
    other = "flux" if family != "flux" else "wan"
    tensors = kohya(model(other), other, lora)
    before = output(net, family)
    with pytest.raises(WrongBaseError, match=rf"{other}.*{family}"):
        load_lora(net, tensors)
    assert torch.equal(output(net, family), before)


def test_a_layer_too_many_is_refused_or_carried(net, family):
    tensors = kohya(net, family, lora)
    key = next(k for k in tensors if "_blocks_1_" in k or "_layers_1_" in k or "output_blocks_1_" in k)
    layer = key.partition(".")[0]
    extra = {
        k.replace(
            layer,
            re.sub(r"_(blocks|layers)_1_", r"_\1_9_", layer)
            if "output" not in layer
            else "lora_unet_output_blocks_8_1_proj_in",
        ): t
        for k, t in tensors.items()
        if k.startswith(layer + ".")
    }
    with pytest.raises(UnknownKeysError):
        load_lora(net, tensors | extra)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        report = load_lora(net, tensors | extra, strict=False)
    assert report.carried


@pytest.mark.parametrize("stock", MODELS)
def test_stock_diffusers_makes_the_same_of_a_file_in_its_own_names(stock, tmp_path):
    ours, theirs = model(stock), model(stock)
    own = component(ours)
    save_file(kohya(ours, stock, lora), tmp_path / "a.safetensors")
    converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers", family=stock)
    load_lora(ours, tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as f:
        alphas = json.loads(f.metadata()["lora_adapter_metadata"])  # which load_lora_weights of a pipeline hands on
    theirs.load_lora_adapter(load_file(tmp_path / "b.safetensors"), prefix=own, metadata=alphas)
    torch.testing.assert_close(output(ours, stock), output(theirs, stock), rtol=0, atol=1e-9)
