"""prune and bake, by format and method: what each layer is then, against the definition in float64; and what they refuse."""

from __future__ import annotations

import fnmatch
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffpeft import CannotConvertError, ConfigError, UnknownNameError, bake, converters, prune
from diffpeft.cli import cli
from diffpeft.cli.errors import run
from diffpeft.tools.editing import edit
from tests.converters.factory import FORMATS, METHODS, SINGLE, checkpoint
from tests.converters.test_matrix import SOURCES, WHERE
from tests.pairwise import pairwise, params

CURVED = {"dora", "dora-in", "oft", "oft-rescaled", "boft"}
ROUNDED = {"ia3-in", "ia3-out", "full", "norm", "lokr"}  # without a scale, so that tensors are multiplied
CELLS = [
    (format, method, family)
    for method in METHODS
    for family in WHERE[method][:3]
    for format in FORMATS
    if format in SOURCES[method]
]
QUICK = [*pairwise(CELLS)[::5], ("peft", "lora", "sdxl"), ("diffusers", "lora", "sdxl")]


def made(format, method, family, tmp_path, **options):
    single = format in SINGLE
    return checkpoint(format, family, method, text=not single, **options)


def saved(file, tmp_path):
    return file.save(tmp_path), tmp_path / ("out" if file.format == "peft" else "out.safetensors")


def is_close(now, was):
    return torch.allclose(now, was, rtol=0, atol=2e-6 * max(was.abs().max().item(), 1e-6))


def refused(bundle):
    """Whether a PEFT folder has what PEFT itself would not make again: a LoKr whose kernels are columns."""
    return bundle.format == "peft" and converters.refusal(bundle, "peft") is not None


@pytest.mark.parametrize(("format", "method", "family"), params(CELLS, QUICK))
def test_a_pruned_file_is_the_file_less_the_layers(format, method, family, tmp_path):
    file = made(format, method, family, tmp_path)
    path, out = saved(file, tmp_path)
    before = converters.read(path)
    if len(before.entries) == 1:
        pytest.skip("nothing would be left")
    if refused(before):
        with pytest.raises(CannotConvertError, match="peft cannot hold"):
            prune(path, out, blocks=before.entries[0].targets)
        return
    gone = before.entries[0].targets
    report = prune(path, out, blocks=gone)
    assert {*report.dropped} == {*gone} and report.layers == len({*file.deltas} - {*gone})
    after = converters.read(out)
    deltas = after.deltas(file.base)
    assert deltas.keys() == file.deltas.keys() - {*gone}
    assert all(is_close(deltas[layer], file.deltas[layer]) for layer in deltas)
    left = [key for key in before.order if key not in before.entries[0].keys]
    assert {*after.order} == {*left} and [*after.carried] == [*before.carried]
    if format != "peft":
        tensors, old = load_file(out), load_file(path)
        assert all(torch.equal(tensors[key], old[key]) for key in left)
        assert after.metadata == before.metadata or format == "diffusers"


@pytest.mark.parametrize(("format", "method", "family"), params(CELLS, QUICK))
def test_a_baked_file_is_the_file_at_these_weights(format, method, family, tmp_path):
    file = made(format, method, family, tmp_path)
    path, out = saved(file, tmp_path)
    before = converters.read(path)
    by_entry = {entry.layer: w for entry, w in zip(before.entries, [0.7, -1.3, 1.0, 0.0] * 9, strict=False)}
    weights = {target: by_entry[entry.layer] for entry in before.entries for target in entry.targets}
    if method in CURVED or refused(before):
        with pytest.raises(CannotConvertError, match=r"at another strength|peft cannot hold"):
            bake(path, out, weights)
        assert not out.exists()
        return
    report = bake(path, out, weights)
    assert report.weights == weights and {*report.dropped} == {layer for layer, w in weights.items() if not w}
    deltas = converters.read(out).deltas(file.base)
    assert deltas.keys() == {layer for layer in file.deltas if weights[layer]}
    for layer, now in deltas.items():
        assert is_close(now, weights[layer] * file.deltas[layer]), layer
    if format in ("kohya", "comfyui") and method not in ROUNDED:  # factors keep their bytes, but for signs
        tensors, old = load_file(out), load_file(path)
        factors = [key for key in tensors if key in old and tensors[key].ndim > 1 and not key.endswith("diff_b")]
        assert all(torch.equal(tensors[key].abs(), old[key].abs()) for key in factors)


def kohya(tmp_path, **metadata):
    file = checkpoint("kohya", "sd15", text=True)
    file.metadata = {"ss_network_module": "networks.lora", **metadata}
    return file, file.save(tmp_path), tmp_path / "out.safetensors"


@pytest.mark.parametrize(
    ("blocks", "layers", "dropped"),
    [
        (["text_encoder"], [], ["text_encoder.*"]),
        (["unet.down_blocks"], [], ["unet.down_blocks.*"]),
        (["unet.*_blocks.*.resnets"], [], ["unet.*_blocks.*.resnets.*"]),
        (["IN04"], [], ["unet.down_blocks.1.attentions.0*", "unet.down_blocks.1.resnets.0*"]),
        (["BASE", "M00"], [], ["text_encoder.*", "unet.mid_block*"]),
        ([], ["to_k"], ["*.to_k"]),
        ([], ["ff.net.0.proj", "linear_1"], ["*.ff.net.0.proj", "*.linear_1"]),
        ([], [r".*attn2\.to_[kq]"], ["*attn2.to_k"]),
    ],
)
def test_patterns_mean_what_they_mean_elsewhere(blocks, layers, dropped, tmp_path):
    file, path, out = kohya(tmp_path)
    expected = {layer for layer in file.deltas if any(fnmatch.fnmatch(layer, way) for way in dropped)}
    assert expected
    assert {*prune(path, out, blocks=blocks, layers=layers).dropped} == expected


def test_presets_are_those_of_prompt_tags(tmp_path):
    file, path, out = kohya(tmp_path)
    weights = bake(path, out, lbw="INALL").weights
    assert all(weights[layer] == float("unet.up_blocks" not in layer and "mid" not in layer) for layer in file.deltas)
    numbers = [1.0, *[0.5] * 6, 0.0, *[2.0] * 9]
    weights = bake(path, out, {"unet.time_embedding": 0.3}, lbw=numbers, overwrite=True).weights
    where = {
        "text_encoder": 1.0,
        "unet.down_blocks": 0.5,
        "unet.mid_block": 0.0,
        "unet.up_blocks": 0.0,
        "unet.time": 0.3,
    }
    assert {layer: weights[layer] for layer in file.deltas} == {
        layer: next(w for start, w in where.items() if layer.startswith(start)) for layer in file.deltas
    }


MISTAKES = {
    "a block that is near one": (lambda p, o: prune(p, o, blocks=["unet.midblock"]), UnknownNameError, "unet.mid_block"),
    "a layer that is near one": (lambda p, o: prune(p, o, layers=["to_kk"]), UnknownNameError, "to_k"),
    "no pattern": (lambda p, o: prune(p, o), ConfigError, "--blocks"),
    "everything": (lambda p, o: prune(p, o, blocks=["unet", "text_encoder"]), ConfigError, "nothing of the adapter"),
    "no expression": (lambda p, o: prune(p, o, layers=["("]), ConfigError, "regular expression"),
    "a preset that there is not": (lambda p, o: bake(p, o, lbw="OUTAL"), UnknownNameError, "OUTALL"),
    "too few numbers": (lambda p, o: bake(p, o, lbw=[1, 0]), ConfigError, "12 or 17|17 or 25|has"),
    "no weights": (lambda p, o: bake(p, o), ConfigError, "no weights"),
    "a weight that is none": (lambda p, o: bake(p, o, {"unet": float("nan")}), ConfigError, "finite"),
    "a pattern for nothing": (lambda p, o: bake(p, o, {"transformer": 0.5}), UnknownNameError, "matches none"),
    "all at 0": (lambda p, o: bake(p, o, {"unet": 0, "text_encoder": 0}), ConfigError, "nothing of the adapter"),
    "a wrong family": (lambda p, o: prune(p, o, blocks=["unet"], family="flux"), Exception, "flux"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_and_nothing_is_written(case, tmp_path):
    _, path, out = kohya(tmp_path)
    do, error, told = MISTAKES[case]
    with pytest.raises(error, match=told):
        do(path, out)
    assert not out.exists()


def test_a_part_of_a_joint_layer_is_refused_with_the_way_out(tmp_path):
    path = checkpoint("kohya", "flux", carried=False).save(tmp_path)
    with pytest.raises(CannotConvertError, match=r"3 layers in one.*Convert the file to diffusers"):
        prune(path, tmp_path / "out.safetensors", layers=["to_q"])
    with pytest.raises(CannotConvertError, match="layers in one"):
        bake(path, tmp_path / "out.safetensors", {"transformer.transformer_blocks.0.attn.to_k": 0.5})


def test_hashes_are_renewed(tmp_path):
    _, path, out = kohya(tmp_path)
    edit(path, hashed=True)
    for do in (lambda: prune(path, out, blocks=["text_encoder"]), lambda: bake(path, out, lbw="INALL", overwrite=True)):
        do()
        with safe_open(out, "pt") as now, safe_open(path, "pt") as was:
            told, before = now.metadata(), was.metadata()
        assert told["sshs_model_hash"] != before["sshs_model_hash"]
        assert not edit(out, hashed=True).changed  # they are those of the file


def test_a_peft_folder_still_says_what_it_is_for(tmp_path):
    file = checkpoint("peft", "wan", "lora", alpha="third")
    path, out = file.save(tmp_path), tmp_path / "out"
    bake(path, out, {"transformer": 0.5})
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/some-model"
    prune(path, out, layers=["to_q"], overwrite=True)
    config = json.loads((out / "adapter_config.json").read_text())
    assert not any(name.endswith("to_q") for name in config["target_modules"])


def test_formats_that_are_only_read_are_written_by_their_own_keys(tmp_path):
    """The old spelling of diffusers, which has no alphas: factors are multiplied."""
    tensors = {}
    for layer in ("to_q_lora", "to_k_lora"):
        key = f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.{layer}"
        tensors |= {f"{key}.down.weight": torch.randn(4, 320), f"{key}.up.weight": torch.randn(320, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"x": "y"})
    before = converters.read(tmp_path / "a.safetensors")
    assert before.format == "diffusers-old"
    bake(tmp_path / "a.safetensors", tmp_path / "b.safetensors", {"unet": -0.25})
    after = converters.read(tmp_path / "b.safetensors")
    assert after.order == before.order and after.metadata == before.metadata
    for layer, delta in before.deltas().items():
        assert is_close(after.deltas()[layer], -0.25 * delta)
    prune(tmp_path / "a.safetensors", tmp_path / "c.safetensors", layers=["to_q"])
    assert {*load_file(tmp_path / "c.safetensors")} == {key for key in tensors if "to_k" in key}


def test_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffpeft.cli.errors._quieten", lambda: None)
    _, path, out = kohya(tmp_path)
    assert run(cli, ["prune", str(path), str(out), "--blocks", "text_encoder", "--layers", "linear_1"]) == 0
    assert "left out 2 of 7 layers: text_encoder.text_model" in capsys.readouterr().out
    args = ["bake", str(path), str(out), "--blocks", "lbw=INALL", "--blocks", "unet.mid_block=0.25", "--overwrite"]
    assert run(cli, args) == 0
    told = capsys.readouterr().out
    assert "1 layers of weight 0.25" in told and "left out 1 layers of weight 0" in told
    assert run(cli, ["bake", str(path), str(out), "--blocks", "unet", "--overwrite"]) == 2
