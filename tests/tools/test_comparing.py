"""How alike two adapters are, against their updates in float64 as dense matrices, across formats and methods."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from diffpeft import CheckpointError, ConfigError, converters, diff
from diffpeft.cli import cli
from diffpeft.cli.errors import run
from diffpeft.tools import comparing
from tests.converters.factory import FORMATS, METHODS, SINGLE, checkpoint
from tests.converters.test_matrix import SOURCES
from tests.pairwise import pairwise, params

ADDITIVE = [m for m in METHODS if m.partition("-")[0] in ("lora", "tucker", "loha", "lokr", "full", "norm")]
CELLS = [
    (family, "kohya", of_a, "kohya", of_b)
    for family in ("sdxl", "flux")
    for of_a in ADDITIVE
    for of_b in ADDITIVE
    if (of_a == "norm") == (of_b == "norm")
    and not (family == "flux" and any(word in method for word in ("tucker", "norm") for method in (of_a, of_b)))
] + [("flux", a, "lora", b, method) for a in FORMATS for method in ("lora", "loha") for b in SOURCES[method]]
QUICK = [*pairwise(CELLS)[::9], CELLS[0], CELLS[-1]]


def by_hand(a, b):
    """{layer: (cosine, |a|, |b|, |a - b| / |a|)} and of all together, from dense updates."""
    zeros = {layer: torch.zeros_like(delta) for layer, delta in {**b, **a}.items()}
    pairs = {layer: (a.get(layer, zero), b.get(layer, zero)) for layer, zero in zeros.items()}
    pairs |= {"total": tuple(torch.cat([pair[n].flatten() for pair in pairs.values()]) for n in (0, 1))}
    return {
        layer: (
            (x * y).sum() / (x.norm() * y.norm()),
            x.norm(),
            y.norm(),
            (x - y).norm() / x.norm() if (x - y).any() else x.norm() * 0,
        )
        for layer, (x, y) in pairs.items()
    }


def numbers(part):
    return part.cosine, part.norm_a, part.norm_b, part.relative


@pytest.mark.parametrize(("family", "a", "of_a", "b", "of_b"), params(CELLS, QUICK))
def test_numbers_are_those_of_the_dense_updates(family, a, of_a, b, of_b, tmp_path):
    files = [
        checkpoint(format, family, method, text=format not in SINGLE, seed=seed, carried=False)
        for seed, (format, method) in enumerate([(a, of_a), (b, of_b)])
    ]
    report = diff(files[0].save(tmp_path, "a"), files[1].save(tmp_path, "b"))
    expected = by_hand(files[0].deltas, files[1].deltas)
    assert report.layers.keys() | {"total"} == expected.keys() and not report.left_out
    for layer, part in [*report.layers.items(), ("total", report.total)]:
        for now, told in zip(numbers(part), expected[layer], strict=True):
            assert now == pytest.approx(told.item(), rel=1e-9, abs=1e-12, nan_ok=True), layer
    assert {*report.only_a} == files[0].deltas.keys() - files[1].deltas.keys()
    assert {*report.only_b} == files[1].deltas.keys() - files[0].deltas.keys()
    assert sum(part.layers for part in report.blocks.values()) == report.total.layers == len(report.layers)


@pytest.mark.parametrize("to", ["comfyui", "diffusers", "kohya-diffusers"])
def test_a_converted_file_is_the_same(to, tmp_path):
    path = checkpoint("kohya", "flux", dtype=torch.float16).save(tmp_path)
    converters.convert(path, tmp_path / "b.safetensors", to=to)
    report = diff(path, tmp_path / "b.safetensors")
    assert report.total.relative < 1e-14 and report.total.cosine == pytest.approx(1, abs=1e-14)
    assert not report.only_a and not report.only_b


def test_what_is_nearly_alike_keeps_its_digits(tmp_path):
    """|a|^2 + |b|^2 - 2 <a, b> would have none left."""
    A, B, E = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 64), (48, 4), (48, 4)))
    key = "lora_unet_mid_block_attentions_0_proj_in"
    for name, up in (("a", B), ("b", B + 1e-10 * E)):
        save_file({f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": up}, tmp_path / f"{name}.safetensors")
    told = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").total.relative
    assert told == pytest.approx(1e-10 * (E @ A).norm().item() / (B @ A).norm().item(), rel=1e-4)


def test_low_ranks_are_never_multiplied_out(tmp_path, monkeypatch):
    for name in ("a", "b"):
        key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"
        pair = {"lora_down.weight": torch.randn(4, 1280), "lora_up.weight": torch.randn(10240, 4)}
        save_file({f"{key}.{role}": t for role, t in pair.items()}, tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(comparing, "_built", lambda _: pytest.fail("[out, in] was built"))
    assert abs(diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").total.cosine) < 0.1


@pytest.mark.parametrize("method", ["dora", "oft", "boft", "ia3-in", "glora"])
def test_methods_that_need_the_base_are_left_out_and_named(method, tmp_path):
    one = checkpoint("kohya", "wan", method, carried=False)
    lora = checkpoint("kohya", "wan", carried=False)
    name = next(iter(lora.layers))
    one.tensors = {key: t for key, t in one.tensors.items() if key.startswith(f"{name}.")}
    rest = {key: t for key, t in lora.tensors.items() if not key.startswith(f"{name}.")}
    one.tensors |= rest
    report = diff(one.save(tmp_path, "a"), lora.save(tmp_path, "b"))
    assert [*report.left_out.values()] == [f"what {method.partition('-')[0]} does depends on the base's weights"]
    assert report.total.relative == pytest.approx(0, abs=1e-14) and report.total.layers == len(lora.layers) - 1
    with pytest.raises(ConfigError, match="no layer can be compared"):
        diff(checkpoint("kohya", "wan", method).save(tmp_path, "c"), tmp_path / "b.safetensors")


@pytest.mark.parametrize("method", ["dora", "dora-in", "oft", "boft", "ia3-in", "ia3-out", "glora"])
def test_with_the_bases_weights_they_are_compared_too(method, tmp_path):
    family = "flux" if method in ("dora", "oft") else "sdxl"  # with joint layers, and with convolutions
    one, lora = (
        checkpoint("kohya", family, m, text=False, carried=False, seed=n) for n, m in enumerate([method, "lora"])
    )
    component = "transformer" if family == "flux" else "unet"
    (tmp_path / "m" / component).mkdir(parents=True)
    (tmp_path / "m" / "model_index.json").write_text("{}")
    weights = {f"{layer.partition('.')[2]}.weight": W.contiguous() for layer, W in one.base.items()}
    save_file(weights, tmp_path / "m" / component / "diffusion_pytorch_model.safetensors")
    report = diff(one.save(tmp_path, "a"), lora.save(tmp_path, "b"), model=tmp_path / "m", family=family)
    assert not report.left_out
    expected = by_hand(one.deltas, lora.deltas)
    for layer, part in [*report.layers.items(), ("total", report.total)]:
        for now, told in zip(numbers(part), expected[layer], strict=True):
            assert now == pytest.approx(told.item(), rel=1e-6, abs=1e-9, nan_ok=True), layer
    with pytest.raises(CheckpointError, match="no folder of a diffusers pipeline"):
        diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", model=tmp_path, family=family)


def test_adapters_of_different_models_are_told(tmp_path):
    sdxl = checkpoint("kohya", "sdxl", text=False).save(tmp_path, "a")
    with pytest.raises(CheckpointError, match=r"no layer in common.*sdxl.*flux"):
        diff(sdxl, checkpoint("kohya", "flux", text=False).save(tmp_path, "b"))
    key = "lora_unet_mid_block_attentions_0_proj_in"
    for name, n in (("c", 8), ("d", 16)):
        save_file(
            {f"{key}.lora_down.weight": torch.ones(2, n), f"{key}.lora_up.weight": torch.ones(n, 2)},
            tmp_path / f"{name}.safetensors",
        )
    with pytest.raises(CheckpointError, match="other sizes"):
        diff(tmp_path / "c.safetensors", tmp_path / "d.safetensors")


def test_nothing_has_no_direction():
    same = comparing.Likeness(0.0, 0.0, 0.0, 0.0)
    assert math.isnan(same.cosine) and same.relative == 0.0
    assert comparing.Likeness(0.0, 1.0, 0.0, 1.0).relative == math.inf


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffpeft.cli.errors._quieten", lambda: None)
    a = str(checkpoint("kohya", "sd15").save(tmp_path, "a"))
    b = str(checkpoint("kohya", "sd15", text=False, seed=1).save(tmp_path, "b"))
    assert run(cli, ["diff", a, b]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["layers", "cosine", "|a|", "|b|", "|a-b|/|a|"] and "only a has 1 layers" in out[-1]
    assert any(line.startswith("unet.down_blocks.1") for line in out) and any(line.startswith("total") for line in out)
    assert run(cli, ["diff", a, b, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["total"]["layers"] == 7 and table["only_a"] == ["text_encoder.text_model.encoder.layers.0.mlp.fc1"]
