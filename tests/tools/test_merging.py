"""One file does what several do together: the sum of their changes, in float64 from the formulas of the factory, across formats and methods."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffpeft
from diffpeft import CannotConvertError, ConfigError, ShapeMismatchError, UnknownNameError, WrongBaseError, converters
from tests.converters import factory

SUMS = ("lora", "tucker", "loha", "loha-tucker", "lokr", "lokr-second", "lokr-first", "lokr-both", "full", "norm")
BENT = ("dora", "dora-in", "oft", "boft", "ia3-in", "glora")
# each method with the next, each format with another of its family
PAIRS = [
    (first, second, *formats)
    for n, first in enumerate(SUMS)
    for second, formats in (
        (SUMS[(n + 1) % len(SUMS)], ("kohya", "comfyui", "sdxl")),
        (SUMS[(n + 3) % len(SUMS)], ("comfyui", "kohya", "sd15")),
    )
] + [
    ("lora", "lora", "kohya", "diffusers", "flux"),
    ("loha", "lora", "diffusers", "kohya", "flux"),
    ("lora", "lokr", "comfyui", "diffusers", "flux"),
    ("lora", "lora", "kohya", "diffusers", "sd3"),
]


def total(weights, files):
    sums = {}
    for weight, file in zip(weights, files, strict=True):
        for layer, delta in file.deltas.items():
            sums[layer] = sums.get(layer, 0) + weight * delta
    return sums


def deltas_of(path, family):
    return converters.read(path, family=family).deltas()


def assert_same(now, expected, rtol=1e-10):
    assert now.keys() == expected.keys()
    for layer, delta in expected.items():
        assert (now[layer].flatten() - delta.flatten()).norm() <= rtol * max(delta.norm(), 1e-12), layer


def make(folder, format, family, method, name, seed, **how):
    file = factory.checkpoint(format, family, method, seed=seed, dtype=how.pop("dtype", torch.float64), **how)
    return file, file.save(folder, name)


@pytest.mark.parametrize(("first", "second", "left", "right", "family"), PAIRS)
def test_the_sum_is_exact_whatever_the_methods_and_formats(first, second, left, right, family, tmp_path):
    a, path_a = make(tmp_path, left, family, first, "a", 1)
    b, path_b = make(tmp_path, right, family, second, "b", 2)
    out = tmp_path / "c.safetensors"
    report = diffpeft.merge({path_a: 0.7, path_b: -0.3}, out, dtype="fp64", format="kohya")
    assert_same(deltas_of(out, family), total((0.7, -0.3), (a, b)))
    assert report.error < 1e-14 and report.layers == len(report.errors)


@pytest.mark.parametrize("method", BENT)
def test_what_depends_on_the_weight_is_refused_with_all_layers_and_a_way(method, tmp_path):
    _, path = make(tmp_path, "kohya", "sdxl", method, "a", 1)
    with pytest.raises(CannotConvertError, match="combine") as error:
        diffpeft.merge({path: 0.5}, tmp_path / "c.safetensors")
    assert f"{len(converters.read(path).entries)} layers" in error.value.what
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize("how", ["linear", "svd", "ties", "dare", "dare_ties", "magnitude"])
def test_every_way_is_what_combine_does_on_a_model(how, tmp_path):
    """On a model of one layer, from the same factors."""
    tensors, paths = {}, {}
    model = torch.nn.Module()
    model.to_q = torch.nn.Linear(24, 18).double()
    for name, r in (("a", 3), ("b", 5)):
        torch.manual_seed(r)
        A, B = torch.randn(r, 24, dtype=torch.float64), torch.randn(18, r, dtype=torch.float64)
        key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        tensors[name] = {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors[name], paths[name])
        diffpeft.attach(model, diffpeft.LoraConfig(r=r, lora_alpha=r), name, targets=["to_q"])
        slot = {n: p for n, p in model.named_parameters() if name in n.split(".")[1:]}
        for key_, p in slot.items():
            p.data = (A if "lora_A" in key_ else B).clone()
    if "dare" in how:
        torch.manual_seed(7)
    diffpeft.combine(model, {"a": 0.7, "b": -0.4}, name="c", how=how, density=0.6)
    out = tmp_path / "c.safetensors"
    weights = {paths["a"]: 0.7, paths["b"]: -0.4}
    diffpeft.merge(weights, out, how=how, density=0.6, seed=7, dtype="fp64", family="sd15")
    (delta,) = deltas_of(out, "sd15").values()
    x = torch.eye(24, dtype=torch.float64)
    with diffpeft.adapters(model, {}):
        plain = model.to_q(x)
    with diffpeft.adapters(model, {"c": 1.0}):
        expected = (model.to_q(x) - plain).T.detach()
    assert torch.allclose(delta, expected, atol=1e-5 * expected.norm())


def test_a_cut_is_the_best_of_its_rank_and_its_error_is_told(tmp_path):
    a, path_a = make(tmp_path, "kohya", "sdxl", "lora", "a", 1, ranks=(4,))
    b, path_b = make(tmp_path, "kohya", "sdxl", "loha", "b", 2)
    out = tmp_path / "c.safetensors"
    report = diffpeft.merge({path_a: 1, path_b: 1}, out, how="svd", rank=2, dtype="fp64")
    now = deltas_of(out, "sdxl")
    squares = [0.0, 0.0]
    for layer, delta in total((1, 1), (a, b)).items():
        S = torch.linalg.svdvals(delta.flatten(1))
        error = float((now[layer].flatten() - delta.flatten()).norm())
        assert error == pytest.approx(float(S[2:].norm()), rel=1e-9, abs=1e-12)
        if layer in report.errors:
            assert report.errors[layer] == pytest.approx(
                error / float(S.norm()) if S.norm() else 0, rel=1e-9, abs=1e-12
            )
        squares = [squares[0] + error**2, squares[1] + float(S.norm()) ** 2]
    assert report.error == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-9)


@pytest.mark.parametrize(
    ("dtypes", "expected"), [(("F16", "F16"), "F16"), (("F16", "BF16"), "F32"), (("BF16", "F32"), "F32")]
)
def test_the_dtype_holds_those_of_all_and_the_error_of_rounding_is_told(dtypes, expected, tmp_path):
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    files = [
        make(tmp_path, "kohya", "sd15", "lora", name, n, dtype=kinds[kind], alpha="third", carried=False)
        for n, (name, kind) in enumerate(zip("ab", dtypes, strict=True))
    ]
    out = tmp_path / "c.safetensors"
    report = diffpeft.merge({path: 0.3 for _, path in files}, out)
    with safe_open(out, "pt") as f:
        assert {f.get_slice(key).get_dtype() for key in f.keys() if "alpha" not in key} == {expected}  # noqa: SIM118
    now, exact = deltas_of(out, "sd15"), total((0.3, 0.3), [file for file, _ in files])
    error = math.sqrt(sum(float((now[k].flatten() - exact[k].flatten()).norm()) ** 2 for k in exact))
    norm = math.sqrt(sum(float(d.norm()) ** 2 for d in exact.values()))
    assert report.error == pytest.approx(error / norm, rel=1e-3) and (report.error > 1e-5) == (expected == "F16")


def test_one_file_at_strength_1_keeps_its_bytes(tmp_path):
    _, path = make(
        tmp_path, "kohya", "sd15", "lora", "a", 0, alpha="rank", carried=False, dtype=torch.float16, ranks=(2,)
    )
    diffpeft.merge({path: 1}, tmp_path / "c.safetensors")
    now, before = load_file(tmp_path / "c.safetensors"), load_file(path)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], before[key]) for key in before if "alpha" not in key)


def test_weights_by_block(tmp_path):
    a, path = make(tmp_path, "kohya", "sd15", "lora", "a", 1, alpha="rank")
    out = tmp_path / "c.safetensors"
    diffpeft.merge({path: {"unet": 0.5, "unet.mid_block": -2, "weight": 0.5}}, out, dtype="fp64")
    levels = {layer: -1.0 if "mid_block" in layer else 0.25 if layer.startswith("unet") else 0.5 for layer in a.deltas}
    assert_same(deltas_of(out, "sd15"), {layer: levels[layer] * delta for layer, delta in a.deltas.items()})
    diffpeft.merge({path: {"lbw": "OUTALL"}}, out, dtype="fp64", overwrite=True)
    now = deltas_of(out, "sd15")
    diffpeft.bake(path, tmp_path / "d.safetensors", lbw="OUTALL")
    baked = deltas_of(tmp_path / "d.safetensors", "sd15")
    assert_same(now, {layer: baked.get(layer, torch.zeros_like(delta)) for layer, delta in a.deltas.items()}, 1e-6)
    assert any(bool(delta.any()) for delta in now.values()) and not all(bool(delta.any()) for delta in now.values())


def test_the_parts_of_a_joint_layer_may_have_weights_of_their_own(tmp_path):
    a, path = make(tmp_path, "kohya", "flux", "lora", "a", 1, alpha="rank")
    out = tmp_path / "c.safetensors"
    diffpeft.merge({path: {"transformer.transformer_blocks.0.attn.to_q": 0.0}}, out, dtype="fp64", format="diffusers")
    name = "transformer.transformer_blocks.0.attn.to_q"
    assert_same(deltas_of(out, "flux"), {k: 0 * d if k == name else d for k, d in a.deltas.items()})


def test_trigger_words_of_all_and_what_it_was_made_of_are_in_the_metadata(tmp_path):
    paths = []
    for n, word in enumerate(("zwx", "ohw")):
        file = factory.checkpoint("kohya", "sdxl", "lora", seed=n, carried=False)
        file.metadata = {"modelspec.trigger_phrase": word, "ss_base_model_version": "sdxl_base_v1-0", "ss_steps": "7"}
        paths.append(file.save(tmp_path, word))
    diffpeft.merge([(path, 0.5) for path in paths], tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as f:
        metadata = f.metadata()
    assert metadata["modelspec.trigger_phrase"] == "zwx, ohw" and metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert "ss_steps" not in metadata
    assert json.loads(metadata["diffpeft.merge"]) == {
        "how": "cat",
        "files": [["zwx.safetensors", 0.5], ["ohw.safetensors", 0.5]],
    }


def test_what_is_wrong_is_told_and_nothing_is_written(tmp_path):
    _, a = make(tmp_path, "kohya", "sdxl", "lora", "a", 1)
    _, b = make(tmp_path, "kohya", "flux", "lora", "b", 1)
    narrow = load_file(a)
    key = next(key for key in narrow if key.endswith("lora_up.weight") and "fc1" in key)
    narrow[key] = narrow[key][:-1].contiguous()
    save_file(narrow, tmp_path / "narrow.safetensors")
    out = tmp_path / "c.safetensors"
    wrong = [
        (WrongBaseError, {a: 1, b: 1}, {}),
        (ShapeMismatchError, {a: 1, tmp_path / "narrow.safetensors": 1}, {}),
        (ConfigError, {}, {}),
        (ConfigError, {a: float("nan")}, {}),
        (ConfigError, {a: 1}, {"rank": 0}),
        (ConfigError, {a: 1}, {"density": 0}),
        (ConfigError, {a: 1}, {"how": "average"}),
        (ConfigError, {a: 1}, {"dtype": "fp17"}),
        (UnknownNameError, {a: 1}, {"format": "koya"}),
        (UnknownNameError, {a: {"unet.no_block": 1}}, {}),
        (diffpeft.UnreadableFileError, {tmp_path / "none.safetensors": 1}, {}),
    ]
    for error, weights, how in wrong:
        with pytest.raises(error):
            diffpeft.merge(weights, out, **how)
        assert not out.exists(), error
    out.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="there already"):
        diffpeft.merge({a: 1}, out)
    assert out.read_bytes() == b"mine"


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    _, a = make(tmp_path, "kohya", "sdxl", "lora", "a", 1)

    def interrupted(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffpeft.io.chunks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        diffpeft.merge({a: 0.5}, tmp_path / "c.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
