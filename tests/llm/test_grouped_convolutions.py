"""PEFT's LoRA of convolutions with groups: a branch beside the layer, with PEFT's own numbers, and no weight to be merged into."""

from __future__ import annotations

import copy
import json
import re
import warnings

import peft
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import AdapterStateError, LoraConfig, PeftModel, converters, get_peft_model, set_adapters
from diffpeft.errors import CannotConvertError, NoWeightError, ShapeMismatchError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS = {
    "four groups": (lambda: nn.Conv2d(8, 16, 3, groups=4, padding=1), (2, 8, 5, 6)),
    "strided": (lambda: nn.Conv2d(8, 8, (3, 2), groups=2, stride=(2, 1), bias=False), (2, 8, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "pointwise": (lambda: nn.Conv2d(8, 16, 1, groups=4), (2, 8, 3, 3)),
    "circular": (lambda: nn.Conv1d(8, 4, 3, groups=2, padding=2, padding_mode="circular"), (2, 8, 9)),
    "three axes": (lambda: nn.Conv3d(4, 8, (1, 2, 3), groups=2, padding=(0, 1, 1)), (1, 4, 3, 4, 5)),
}
FORMS = {
    "plain": {},
    "stabilised": {"use_rslora": True, "lora_alpha": 3},
    "biased": {"lora_bias": True},
    "dora": {"use_dora": True, "lora_alpha": 5},
}
# sums of 72 products in float32; plain ones run the same kernels, but PEFT multiplies by the scale afterwards
CLOSE = dict(rtol=1e-5, atol=2e-6)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_form = pytest.mark.parametrize("form", FORMS)


def made(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    return nn.Sequential(make(), nn.Tanh()).eval(), torch.randn(shape)


def fields(form: str, **more) -> dict:
    return {"r": 8, "target_modules": ["0"], "init_lora_weights": False, **FORMS[form], **more}


def wrapped(library, kind, form="plain", name="default", **more):
    model, x = made(kind)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(model, library.LoraConfig(**fields(form, **more)), name).eval()
    for key, p in model.named_parameters():
        if "magnitude" in key:
            p.data *= 1.3
    return model, x


@every_kind
@every_form
def test_files_and_outputs_are_theirs(kind, form, tmp_path):
    if form == "biased" and kind == "strided":
        pytest.skip("a layer without a bias")
    theirs, x = wrapped(peft, kind, form)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(made(kind)[0], tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    assert not torch.allclose(theirs(x), made(kind)[0](x), atol=1e-2)
    ours.save_pretrained(tmp_path / "ours")
    converters.convert(tmp_path / "theirs", tmp_path / "again", to="peft")
    for folder in ("ours", "again"):
        assert (tmp_path / folder / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    configs = [json.loads((tmp_path / folder / CONFIG).read_text()) for folder in ("again", "theirs")]
    assert configs[0] == configs[1]


@every_kind
@every_form
def test_a_fresh_one_is_theirs(kind, form, tmp_path):
    ours, x = wrapped(diffpeft, kind, form)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(made(kind)[0], tmp_path).eval()
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    start, _ = wrapped(diffpeft, kind, form, init_lora_weights=True)
    if form != "dora":
        assert torch.equal(start(x), made(kind)[0](x))
    conv = made(kind)[0][0]
    shapes = {
        key[-13:-7]: tuple(t.shape) for key, t in diffpeft.get_peft_model_state_dict(ours).items() if ".weight" in key
    }
    ones = (1,) * len(conv.kernel_size)
    assert shapes["lora_A"] == (8, conv.in_channels, *conv.kernel_size)
    assert shapes["lora_B"] == (conv.out_channels, 8 // conv.groups, *ones)


def test_gradients_are_theirs():
    grads = []
    for library in (peft, diffpeft):
        model, x = wrapped(library, "four groups")
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for mine, other in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@every_form
def test_no_weight_is_changed_by_it(form):
    model, x = wrapped(diffpeft, "four groups", form)
    before, want = copy.deepcopy(model.state_dict()), model(x)
    base = model.get_base_model()
    operations = {
        "merge_and_unload": lambda: model.merge_and_unload(),
        "merge_adapter": lambda: model.merge_adapter(),
        "fuse": lambda: diffpeft.fuse(base),
        "fuse for good": lambda: diffpeft.fuse(base, keep_base="none"),
        "to_lora": lambda: diffpeft.to_lora(base, "default"),
        "combine": lambda: diffpeft.combine(base, {"default": 1.0}, name="sum"),
        "sum": lambda: model.add_weighted_adapter(["default"], [1.0], "sum"),
    }
    for name, operation in operations.items():
        with pytest.raises(
            NotImplementedError, match="Merging is not supported for _ConvNd layers with groups > 1!"
        ) as error:
            operation()
        assert isinstance(error.value, NoWeightError) and isinstance(error.value, AdapterStateError), name
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert torch.equal(model(x), want)


def test_strengths_and_mixed_batches():
    model, x = wrapped(diffpeft, "four groups", name="a")
    model.add_adapter("b", LoraConfig(**fields("plain", r=4)))
    base, plain = model.get_base_model(), made("four groups")[0]
    conv = lambda m: m[0](x)  # noqa: E731
    change = {}
    for name in ("a", "b"):
        set_adapters(base, {name: 1.0})
        change[name] = conv(base) - conv(plain)
    set_adapters(base, {"a": 0.0})
    assert torch.equal(conv(base), conv(plain))
    set_adapters(base, {"a": -0.5, "b": 2.0})
    torch.testing.assert_close(conv(base), conv(plain) - 0.5 * change["a"] + 2 * change["b"], **CLOSE)
    model.set_adapter("a")
    rows = model.eval()(torch.cat([x, x]), adapter_names=["a", "b", "__base__", "a"])
    want = [conv(plain)[0] + change["a"][0], conv(plain)[1] + change["b"][1], conv(plain)[0]]
    for row, y in enumerate(want):
        torch.testing.assert_close(rows[row], y.tanh(), **CLOSE)


def test_another_adapter_beside_it_is_fused():
    model, x = made("four groups")
    with pytest.warns(
        UserWarning, match=r"LoRA adapter added to ConvNd layer with groups > 1\. Merging is not supported\."
    ):
        diffpeft.inject_adapter_in_model(LoraConfig(**fields("plain")), model, "branch")
    diffpeft.attach(model, LoraConfig(r=2, init_lora_weights=False), "plain", targets=["0"])
    want = model(x)
    diffpeft.fuse(model, ["plain"])
    torch.testing.assert_close(model(x), want, **CLOSE)
    diffpeft.unfuse(model)
    diffpeft.detach(model, "branch")
    diffpeft.to_lora(model, "plain")


@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune"])
def test_sums_of_factors_are_theirs(kind, tmp_path):
    theirs, x = wrapped(peft, "four groups", name="a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_adapter("b", peft.LoraConfig(**fields("plain")))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(made("four groups")[0], tmp_path / "a", adapter_name="a")
    ours.load_adapter(tmp_path / "b", "b")
    for model in (theirs, ours):
        density = {} if kind == "linear" else {"density": 0.5}
        model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "sum", combination_type=kind, **density)
        model.set_adapter("sum")
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **CLOSE)
    for kind in ("cat", "svd"):
        with pytest.raises(NoWeightError):
            ours.add_weighted_adapter(["a", "b"], [0.7, 0.4], kind, combination_type=kind)


@pytest.mark.parametrize("form", ["plain", "dora"])
def test_a_rank_that_groups_do_not_divide_is_refused_in_their_words(form):
    text = (
        "Targeting a Conv2d with groups=4 and rank 6. Currently, support is limited to conv layers where the rank is divisible by groups. "
        "Either choose a different rank or do not target this specific layer."
    )
    for library in (peft, diffpeft):
        with pytest.raises(ValueError, match=re.escape(text)):
            wrapped(library, "four groups", form, r=6)


def test_files_for_other_groups_and_formats_without_it_are_refused(tmp_path):
    model, _ = wrapped(diffpeft, "four groups")
    model.save_pretrained(tmp_path / "a")
    for other in (nn.Conv2d(8, 16, 3, groups=2), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=4)):
        with pytest.raises(ShapeMismatchError):
            diffpeft.load_lora(nn.Sequential(other), tmp_path / "a", name="a")
    base = made("four groups")[0]
    diffpeft.load_lora(base, tmp_path / "a", name="a")
    with pytest.raises(CannotConvertError, match="branch"):
        diffpeft.save_lora(base, tmp_path / "x.safetensors", name="a", format="lycoris")
    diffpeft.save_lora(base, tmp_path / "x.safetensors", name="a", format="diffusers")
    again = made("four groups")[0]
    diffpeft.load_lora(again, tmp_path / "x.safetensors", name="b")
    assert torch.equal(again(made("four groups")[1]), base(made("four groups")[1]))


def test_attach_and_older_files_keep_the_form_that_is_a_change_of_the_weight(tmp_path):
    """A [r, in / groups, *k], B [out, r, *1]: any rank, and it merges."""
    model, x = made("four groups")
    diffpeft.attach(model, LoraConfig(r=3, init_lora_weights=False), targets=["0"])
    want = model(x)
    diffpeft.save_lora(model, tmp_path / "a", name="default", format="peft")
    ours = PeftModel.from_pretrained(made("four groups")[0], tmp_path / "a")
    torch.testing.assert_close(ours(x), want, **CLOSE)
    torch.testing.assert_close(ours.merge_and_unload()(x), want, **CLOSE)


def test_layers_that_peft_has_none_for_keep_that_form_too():
    for conv in (nn.ConvTranspose2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=2, dilation=2)):
        model = get_peft_model(nn.Sequential(conv), LoraConfig(target_modules=["0"], r=3, init_lora_weights=False))
        x = torch.randn(1, 8, 9, 9)
        torch.testing.assert_close(model(x), copy.deepcopy(model).merge_and_unload()(x), **CLOSE)


@pytest.mark.parametrize("ranks", [(4, 8), (8, 4)])
def test_adapters_of_other_ranks_take_each_others_place(ranks, tmp_path):
    outputs = []
    for r in ranks:
        model, x = wrapped(diffpeft, "four groups", r=r)
        with torch.no_grad():
            outputs.append(model(x))
        model.save_pretrained(tmp_path / str(r))
    swapped = PeftModel.from_pretrained(made("four groups")[0], tmp_path / str(ranks[0])).eval()
    with pytest.raises(
        ValueError, match=r"Conv2d LoRA adapter with groups=4 to target rank 9, but .* is not divisible by 4"
    ):
        diffpeft.prepare_model_for_compiled_hotswap(swapped, target_rank=9)
    diffpeft.prepare_model_for_compiled_hotswap(swapped, target_rank=8)
    for r, want in zip((ranks[0], *reversed(ranks)), (outputs[0], *reversed(outputs)), strict=True):
        diffpeft.hotswap_adapter(swapped, tmp_path / str(r), "default")
        torch.testing.assert_close(swapped(x), want, **CLOSE)
    base = made("four groups")[0]
    diffpeft.load_lora(base, tmp_path / "4", name="a", max_rank=8)
    diffpeft.replace(base, "a", tmp_path / "8")
    torch.testing.assert_close(base(x), outputs[ranks.index(8)], **CLOSE)
    diffpeft.save_lora(base, tmp_path / "again", name="a", format="peft")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "8" / WEIGHTS).read_bytes()
