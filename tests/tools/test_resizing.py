"""Fewer ranks: each layer's the best of its rank by the whole SVD in float64, the size as it was asked for; and another strength, exactly."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffpeft
from diffpeft import CannotConvertError, ConfigError, converters
from diffpeft.tools.resizing import bytes_of
from tests.converters import factory

SUMS = ("lora", "tucker", "loha", "loha-tucker", "lokr", "lokr-second", "lokr-first", "lokr-both", "full")
PLACES = (("kohya", "sdxl"), ("comfyui", "sd15"), ("diffusers", "flux"), ("kohya", "flux"), ("peft", "sdxl"))
CURVED = ("dora", "dora-in", "oft", "boft")


def make(folder, format, family, method, **how):
    how = {"dtype": torch.float64, "ranks": (1, 4, 3), **how}
    file = factory.checkpoint(format, family, method, text=format != "peft", **how)
    return file, file.save(folder)


def out_of(folder, format, name="b"):
    return folder / (name if format == "peft" else f"{name}.safetensors")


def best(delta, rank):
    U, S, Vh = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).reshape(delta.shape), float(
        (S[:rank] ** 2).sum() / (S**2).sum().clamp_min(1e-300)
    )


CELLS = [
    (method, *PLACES[(n + m) % len(PLACES)])
    for n, method in enumerate(SUMS)
    for m in (0, 1)
    if not (method == "full" and PLACES[(n + m) % len(PLACES)][0] in ("diffusers", "peft"))
    and not ("tucker" in method and PLACES[(n + m) % len(PLACES)][1] == "flux")
]


@pytest.mark.parametrize(("method", "format", "family"), CELLS)
def test_each_layer_is_the_best_of_its_rank(method, format, family, tmp_path):
    file, path = make(tmp_path, format, family, method)
    out = out_of(tmp_path, format)
    report = diffpeft.resize(path, out, rank=2, family=family)
    now = converters.read(out, family=family).deltas()
    joint = {target: entry for entry in converters.read(path, family=family).entries for target in entry.targets}
    for layer, delta in file.deltas.items():
        entry = joint[layer]
        if entry.layer in report.unchanged:
            expected = delta
        elif entry.rule is None:
            expected, energy = best(delta, 2)
            assert report.energy[layer] == pytest.approx(energy if delta.any() else 1, abs=1e-9)
        else:
            continue
        assert (now[layer].flatten() - expected.flatten()).norm() <= 1e-9 * max(float(delta.norm()), 1e-9), layer
    assert set(report.after.values()) <= {1, 2} and report.after and not (method == "lora" and report.unchanged)
    assert (len(report.became_lora) > 0) == (method not in ("lora", "tucker"))


def test_a_joint_layer_is_cut_as_one(tmp_path):
    file, path = make(tmp_path, "kohya", "flux", "lora", ranks=(4,))
    diffpeft.resize(path, tmp_path / "b.safetensors", rank=1)
    name = "double_blocks.0.img_attn.qkv"
    parts = [f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    now = converters.read(tmp_path / "b.safetensors").deltas()
    expected, _ = best(torch.cat([file.deltas[part] for part in parts]), 1)
    assert torch.allclose(torch.cat([now[part] for part in parts]), expected), name


@pytest.mark.parametrize("method", ["dora", "dora-in"])
def test_a_dora_keeps_its_magnitudes_and_what_is_under_them_is_cut(method, tmp_path):
    _, path = make(tmp_path, "kohya", "sd15", method, ranks=(4,), alpha="rank")
    diffpeft.resize(path, tmp_path / "b.safetensors", rank=2)
    before, now = load_file(path), load_file(tmp_path / "b.safetensors")
    scales = [key for key in before if key.endswith("dora_scale")]
    assert scales and all(torch.equal(before[key], now[key]) for key in scales)
    for key in scales:
        layer = key.removesuffix("dora_scale")
        B, A = (before[f"{layer}lora_{way}.weight"].flatten(1) for way in ("up", "down"))
        D, C = (now[f"{layer}lora_{way}.weight"].flatten(1) for way in ("up", "down"))
        assert len(C) <= 2 and torch.allclose(D @ C, best(B @ A, 2)[0])


def test_energy_takes_as_few_ranks_as_keep_it(tmp_path):
    file, path = make(tmp_path, "kohya", "sd15", "lora", ranks=(6, 4), alpha="rank")
    report = diffpeft.resize(path, tmp_path / "b.safetensors", energy=0.9)
    for layer, rank in report.after.items():
        shares = [best(file.deltas[layer], n)[1] for n in range(7)]
        assert shares[rank] >= 0.9 - 1e-9 and (rank == 1 or shares[rank - 1] < 0.9)
        assert report.energy[layer] == pytest.approx(shares[rank], abs=1e-9)
    assert len({*report.after.values()}) > 1


def test_what_is_not_longer_keeps_its_bytes(tmp_path):
    _, path = make(tmp_path, "kohya", "sd15", "lora", ranks=(2, 5), dtype=torch.float16)
    diffpeft.resize(path, tmp_path / "b.safetensors", rank=3)
    before, now = load_file(path), load_file(tmp_path / "b.safetensors")
    short = [key for key in before if key.endswith("lora_down.weight") and len(before[key]) == 2]
    assert short and all(torch.equal(before[key], now[key]) for key in short)
    assert {len(t) for key, t in now.items() if key.endswith("lora_down.weight")} == {2, 3}


@pytest.mark.parametrize(
    ("format", "method", "share"), [("kohya", "lora", 0.6), ("peft", "lora", 0.7), ("kohya", "loha", 0.9)]
)
def test_the_file_is_as_large_as_was_asked_for_and_no_layer_could_be_longer(format, method, share, tmp_path):
    _, path = make(tmp_path, format, "sd15", method, ranks=(8,), alpha="rank", dtype=torch.float32)
    wide = diffpeft.resize(path, out_of(tmp_path, format, "wide"), rank=64).size
    report = diffpeft.resize(path, out_of(tmp_path, format), max_size=int(share * wide))
    weights = out_of(tmp_path, format) / "adapter_model.safetensors" if format == "peft" else out_of(tmp_path, format)
    size = os.path.getsize(weights)
    assert share * wide * 0.8 < size <= share * wide and size <= report.size
    assert len({*report.after.values()}) > 1


def test_a_size_that_cannot_be_is_told(tmp_path):
    _, path = make(tmp_path, "kohya", "sd15", "lora")
    with pytest.raises(ConfigError, match=r"with rank 1 everywhere the file has \d+ bytes"):
        diffpeft.resize(path, tmp_path / "b.safetensors", max_size="1KB")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "number"),
    [("50MB", 50 * 10**6), ("48MiB", 48 << 20), ("1.5 GB", 1_500_000_000), ("300", 300), (7, 7), ("2k", 2000)],
)
def test_sizes(text, number):
    assert bytes_of(text) == number


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"rank": 2, "energy": 0.5},
        {"rank": 0},
        {"energy": 0},
        {"energy": 1.1},
        {"max_size": "many"},
        {"max_size": -1},
    ],
)
def test_what_is_no_way_to_resize_is_refused(how, tmp_path):
    _, path = make(tmp_path, "kohya", "sd15", "lora")
    with pytest.raises(ConfigError):
        diffpeft.resize(path, tmp_path / "b.safetensors", **how)
    assert not (tmp_path / "b.safetensors").exists()


def test_what_has_no_ranks_stays_and_a_file_of_nothing_else_is_refused(tmp_path):
    _, path = make(tmp_path, "kohya", "sd15", "oft")
    with pytest.raises(ConfigError, match="no layer has a rank"):
        diffpeft.resize(path, tmp_path / "b.safetensors", rank=2)
    _, lora = make(tmp_path, "kohya", "sd15", "lora", ranks=(4,), layers=lambda site: "to_k" in site.original)
    both = {**load_file(tmp_path / "a.safetensors")}
    torch.manual_seed(0)
    both["lora_unet_mid_block_attentions_0_proj_in.oft_blocks"] = torch.randn(4, 3, 3, dtype=torch.float64)
    save_file(both, tmp_path / "both.safetensors")
    report = diffpeft.resize(tmp_path / "both.safetensors", tmp_path / "b.safetensors", rank=2)
    key = "lora_unet_mid_block_attentions_0_proj_in.oft_blocks"
    assert [*report.unchanged] == ["unet.mid_block.attentions.0.proj_in"]
    assert torch.equal(load_file(tmp_path / "b.safetensors")[key], both[key]) and lora


# PEFT would make other halves of a LoKr
@pytest.mark.parametrize(
    ("method", "format", "family"),
    [cell for cell in CELLS if cell[0] != "tucker" and not (cell[0].startswith("lokr") and cell[1] == "peft")],
)
def test_strength_1_of_the_scaled_is_strength_s(method, format, family, tmp_path):
    file, path = make(tmp_path, format, family, method)
    diffpeft.scale(path, out_of(tmp_path, format), -0.6, family=family)
    now = converters.read(out_of(tmp_path, format), family=family).deltas()
    for layer, delta in file.deltas.items():
        assert torch.allclose(
            now[layer].flatten(), -0.6 * delta.flatten(), rtol=1e-6, atol=1e-6 * float(delta.abs().max())
        )


@pytest.mark.parametrize("method", CURVED)
def test_what_is_none_of_its_kind_at_another_strength_is_refused(method, tmp_path):
    _, path = make(tmp_path, "kohya", "sd15", method)
    with pytest.raises(CannotConvertError, match="Set the strength where the adapter is used"):
        diffpeft.scale(path, tmp_path / "b.safetensors", 0.5)
    for by in (float("nan"), float("inf"), "1", True):
        with pytest.raises(ConfigError):
            diffpeft.scale(path, tmp_path / "b.safetensors", by)
    assert not (tmp_path / "b.safetensors").exists()
