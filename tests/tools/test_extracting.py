"""What two models differ by, as an adapter: from folders and single files of every spelling, against the differences that were put in."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffpeft
from diffpeft import CheckpointError, ConfigError, ShapeMismatchError, WrongBaseError, converters
from diffpeft.tools.extracting import extract
from tests.converters import factory

INDEX = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "flux": "FluxPipeline"}
KINDS = {"sd15": "UNet2DConditionModel", "sdxl": "UNet2DConditionModel", "flux": "FluxTransformer2DModel"}
SINGLE = {"text_encoder": {"sd15": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}}


class Model:
    """The layers of a family's factory as a model, before and after: {canonical layer: W}."""

    def __init__(self, family, rank=2, seed=0):
        torch.manual_seed(seed)
        self.family, self.base, self.deltas, self.sites = family, {}, {}, factory.sites(family)
        for site in self.sites:
            for name, part in site.parts.items():
                layer = f"{site.component}.{name}"
                o, columns = part.shape[0], torch.Size(part.shape[1:]).numel()
                self.base[layer] = torch.randn(part.shape, dtype=torch.float64)
                self.deltas[layer] = (torch.randn(o, rank).double() @ torch.randn(rank, columns).double()).reshape(
                    part.shape
                )

    def weights(self, tuned):
        return {k: W + self.deltas[k] if tuned else W for k, W in self.base.items()}

    def folder(self, path, tuned, shards=1, extra=()):
        """A diffusers folder."""
        path.mkdir()
        by_part = {}
        for layer, W in self.weights(tuned).items():
            component, _, name = layer.partition(".")
            by_part.setdefault(component, {})[f"{name}.weight"] = W.clone()
        for component, tensors in by_part.items():
            tensors |= {name: t for name, t in extra if component in ("unet", "transformer")}
            self._component(path / component, component, tensors, shards)
        (path / "model_index.json").write_text(
            json.dumps({"_class_name": INDEX[self.family], **{c: ["diffusers", "X"] for c in by_part}})
        )
        return path

    def _component(self, folder, component, tensors, shards):
        folder.mkdir()
        kind = "CLIPTextModel" if component.startswith("text") else KINDS[self.family]
        (folder / "config.json").write_text(json.dumps({"_class_name": kind}))
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        if shards == 1:
            save_file(tensors, folder / f"{stem}.safetensors")
            return
        places = {}
        for n in range(shards):
            name = f"{stem}-{n + 1:05}-of-{shards:05}.safetensors"
            save_file({k: t for m, (k, t) in enumerate(tensors.items()) if m % shards == n}, folder / name)
            places |= {k: name for m, k in enumerate(tensors) if m % shards == n}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    def file(self, path, tuned, prefix="model.diffusion_model."):
        """The original program's single file."""
        weights, tensors = self.weights(tuned), {}
        for site in self.sites:
            if site.component.startswith("text"):
                if start := SINGLE.get(site.component, {}).get(self.family):
                    tensors[f"{start}{site.original}.weight"] = weights[f"{site.component}.{site.original}"]
                continue
            W = torch.empty(site.shape, dtype=torch.float64)
            for n, (name, _) in enumerate(site.rule.parts):
                W[list(site.rule.rows(n, site.shape[0]))] = weights[f"{site.component}.{name}"]
            tensors[f"{prefix}{site.original}.weight"] = W
        save_file({k: t.contiguous() for k, t in tensors.items()}, path)
        return path


def deltas_of(path, family):
    return converters.read(path, family=family).deltas()


def assert_near(now, expected, rtol=1e-6):
    for layer, delta in now.items():
        assert (delta.flatten() - expected[layer].flatten()).norm() <= rtol * expected[layer].norm(), layer
    assert now


@pytest.mark.parametrize("family", INDEX)
@pytest.mark.parametrize(
    ("before", "after"),
    [("folder", "folder"), ("folder", "file"), ("file", "folder"), ("file", "file"), ("file", "bare")],
)
def test_the_difference_is_kept_whichever_way_the_models_are_stored(before, after, family, tmp_path):
    model = Model(family)
    ways = {
        "folder": lambda path, tuned: model.folder(path, tuned, shards=2 if tuned else 1),
        "file": lambda path, tuned: model.file(path.with_suffix(".safetensors"), tuned),
        "bare": lambda path, tuned: model.file(path.with_suffix(".safetensors"), tuned, ""),
    }
    base, tuned = ways[before](tmp_path / "base", False), ways[after](tmp_path / "tuned", True)
    out = tmp_path / "out.safetensors"
    report = extract(base, tuned, out, rank=2, family=family)
    joint = before != "folder" and after != "folder" and family == "flux"
    expected = {k: d for k, d in model.deltas.items() if "text" not in k or (before, after) == ("folder", "folder")}
    now = deltas_of(out, family)
    assert {k for k in now if "text" not in k} == {k for k in expected if "text" not in k}
    if not joint:
        assert_near(now, model.deltas)
        assert report.residual < 1e-6 and set(report.ranks.values()) <= {2}
    else:
        assert 0 < report.residual < 1  # a joint layer's difference has the ranks of its parts together


@pytest.mark.parametrize("method", ["lora", "lokr", "full"])
def test_what_is_left_out_is_told_by_layer_and_in_total(method, tmp_path):
    model = Model("sd15", rank=6)
    base, tuned = model.folder(tmp_path / "a", False), model.folder(tmp_path / "b", True)
    how = {"rank": 3} if method == "lora" else {}
    report = diffpeft.extract(base, tuned, tmp_path / "c.safetensors", method=method, dtype="fp64", **how)
    now, squares = deltas_of(tmp_path / "c.safetensors", "sd15"), [0.0, 0.0]
    for layer, delta in model.deltas.items():
        error = float((now[layer].flatten() - delta.flatten()).norm())
        assert report.residuals[layer] == pytest.approx(error / float(delta.norm()), rel=1e-5, abs=1e-9)
        squares = [squares[0] + error**2, squares[1] + float(delta.norm()) ** 2]
        if method == "lora":
            least = float(torch.linalg.svdvals(delta.flatten(1))[3:].norm())
            assert error == pytest.approx(least, rel=1e-6, abs=1e-9)
    assert report.residual == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-5, abs=1e-9)
    assert (report.residual < 1e-12) == (method == "full")


def test_energy_takes_as_few_ranks_as_keep_it(tmp_path):
    model = Model("sd15", rank=9)
    base, tuned = model.folder(tmp_path / "a", False), model.folder(tmp_path / "b", True)
    report = diffpeft.extract(base, tuned, tmp_path / "c.safetensors", energy=0.7)
    for layer, rank in report.ranks.items():
        squares = torch.linalg.svdvals(model.deltas[layer].flatten(1)).square()
        shares = squares.cumsum(0) / squares.sum()
        assert shares[rank - 1] >= 0.7 - 1e-6 and (rank == 1 or shares[rank - 2] < 0.7)


def test_equal_layers_are_left_out_and_norms_and_biases_are_counted_or_held(tmp_path):
    model = Model("sd15")
    same = next(iter(model.deltas))
    model.deltas[same].zero_()
    linear = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    norm = "down_blocks.1.resnets.0.norm1"
    before = [(f"{norm}.weight", torch.ones(8)), (f"{norm}.bias", torch.zeros(8)), (f"{linear}.bias", torch.zeros(96))]
    after = [(name, t + torch.arange(len(t))) for name, t in before]
    base = model.folder(tmp_path / "a", False, extra=before)
    tuned = model.folder(tmp_path / "b", True, extra=after)
    report = diffpeft.extract(base, tuned, tmp_path / "c.safetensors")
    assert report.equal == 1 and same not in report.residuals
    assert {*report.not_held} == {f"unet.{norm}.weight", f"unet.{norm}.bias", f"unet.{linear}.bias"}
    report = diffpeft.extract(base, tuned, tmp_path / "d.safetensors", method="full")
    entries = {entry.layer: entry for entry in converters.read(tmp_path / "d.safetensors").entries}
    assert not report.not_held and {*entries[f"unet.{norm}"].tensors} == {"w_norm", "b_norm"}
    assert "diff_b" in entries[f"unet.{linear}"].tensors


def test_open_clip_in_a_single_file_is_the_second_text_encoder(tmp_path):
    model = Model("sdxl")
    torch.manual_seed(5)
    start, d = "conditioner.embedders.1.model.transformer.resblocks.0.", 8
    shapes = {
        "attn.in_proj_weight": (3 * d, d),
        "attn.out_proj.weight": (d, d),
        "mlp.c_fc.weight": (4 * d, d),
        "mlp.c_proj.weight": (d, 4 * d),
    }
    deltas = {name: torch.randn(o, 1) @ torch.randn(1, i) for name, (o, i) in shapes.items()}
    for name, tuned in (("a", False), ("b", True)):
        tensors = load_file(model.file(tmp_path / f"{name}.safetensors", tuned))
        tensors |= {start + key: torch.ones(shape) + (deltas[key] if tuned else 0) for key, shape in shapes.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors", rank=2, dtype="fp32")
    now = deltas_of(tmp_path / "c.safetensors", "sdxl")
    layer = "text_encoder_2.text_model.encoder.layers.0."
    for n, part in enumerate("qkv"):
        expected = deltas["attn.in_proj_weight"][n * d : (n + 1) * d]
        assert torch.allclose(now[f"{layer}self_attn.{part}_proj"].float(), expected, atol=1e-5)
    assert torch.allclose(now[f"{layer}mlp.fc2"].float(), deltas["mlp.c_proj.weight"], atol=1e-5)


def test_what_is_wrong_is_told_and_nothing_is_written(tmp_path):
    model, other = Model("sd15"), Model("flux")
    base, tuned = model.folder(tmp_path / "a", False), model.folder(tmp_path / "b", True)
    flux = other.folder(tmp_path / "flux", True)
    narrow = Model("sd15")
    narrow.base = {k: W[:-1] if k.endswith("fc1") else W for k, W in narrow.base.items()}
    narrow.deltas = {k: D[:-1] if k.endswith("fc1") else D for k, D in narrow.deltas.items()}
    small = narrow.folder(tmp_path / "small", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_bytes(b"no such thing")
    out = tmp_path / "c.safetensors"
    wrong = [
        (WrongBaseError, (base, flux), {}),
        (ShapeMismatchError, (base, small), {}),
        (ConfigError, (base, base), {}),
        (CheckpointError, (base, tmp_path / "empty"), {}),
        (CheckpointError, (base, tmp_path / "text.safetensors"), {}),
        (ConfigError, (base, tuned), {"rank": 2, "energy": 0.5}),
        (ConfigError, (base, tuned), {"rank": 0}),
        (ConfigError, (base, tuned), {"energy": 2}),
        (ConfigError, (base, tuned), {"method": "lora2"}),
        (ConfigError, (base, tuned), {"method": "lokr", "rank": 3}),
        (ConfigError, (base, tuned), {"method": "lokr", "factor": 0}),
    ]
    for error, models, how in wrong:
        with pytest.raises(error):
            diffpeft.extract(*models, out, **how)
        assert not out.exists(), error
    out.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="there already"):
        diffpeft.extract(base, tuned, out)
    assert out.read_bytes() == b"mine"
