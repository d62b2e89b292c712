"""convert: there and back gives the same keys and bytes, every key is accounted for, what a format cannot hold is expanded or refused."""

from __future__ import annotations

import contextlib
import itertools
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffpeft import CannotConvertError, CheckpointError, ConfigError, UnknownNameError, converters
from diffpeft.cli import cli
from diffpeft.converters import holding
from tests.converters.factory import checkpoint

ALPHAS = {
    "none": None,
    "fp32": torch.tensor(3.0),
    "fp16": torch.tensor(1 / 3, dtype=torch.float16),
    "bf16": torch.tensor(0.3, dtype=torch.bfloat16),
    "int64": torch.tensor(4),
    "one number": torch.tensor([2.0]),
    "0": torch.tensor(0.0),
}
LAYERS = (
    "lora_unet_mid_block_attentions_0_proj_in",
    "lora_unet_down_blocks_0_resnets_0_conv1",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
)


def kohya(path, dtype=torch.float32, alpha=None, dora=False):
    tensors = {}
    for n, layer in enumerate(LAYERS):
        r, ones = n + 2, (1, 1) if n < 2 else ()
        tensors[f"{layer}.lora_up.weight"] = torch.randn(6, r, *ones).to(dtype)
        tensors[f"{layer}.lora_down.weight"] = torch.randn(r, 5, *((3, 3) if n == 1 else ones)).to(dtype)
        if alpha is not None:
            tensors[f"{layer}.alpha"] = alpha.clone()
        if dora:
            tensors[f"{layer}.dora_scale"] = torch.rand(6, 1, *ones).to(dtype)
    tensors["emb_params"] = torch.randn(2, 4)
    meta = {
        "ss_network_module": "networks.lora",
        "ss_output_name": "x",
        "sshs_model_hash": "abc",
        "modelspec.title": "t",
    }
    save_file(tensors, path, meta)
    return tensors, meta


def metadata(path):
    with safe_open(path, "pt") as f:
        return f.metadata()


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_kohya_comes_back_byte_for_byte(alpha, dtype, dora, tmp_path):
    before, meta = kohya(tmp_path / "a.safetensors", dtype, ALPHAS[alpha], dora)
    there = converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    back = converters.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya")
    assert there.level == back.level == "L0"
    assert same(load_file(tmp_path / "c.safetensors"), before)
    assert metadata(tmp_path / "c.safetensors") == {k: v for k, v in meta.items() if not k.startswith("sshs_")}
    assert sorted([*there.mapped, *there.carried]) == sorted(before) and there.carried == ("emb_params",)


def test_diffusers_comes_back_byte_for_byte(tmp_path):
    kohya(tmp_path / "a.safetensors", alpha=torch.tensor(2.0))
    converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    own = {k: v for k, v in metadata(tmp_path / "b.safetensors").items() if k != "diffpeft.provenance"}
    save_file(load_file(tmp_path / "b.safetensors"), tmp_path / "d.safetensors", own)  # a file of somebody else's
    for (a, b), to in zip(itertools.pairwise("dek"), ("kohya", "diffusers"), strict=True):
        assert converters.convert(tmp_path / f"{a}.safetensors", tmp_path / f"{b}.safetensors", to=to).level == "L0"
    assert same(load_file(tmp_path / "d.safetensors"), load_file(tmp_path / "k.safetensors"))
    assert metadata(tmp_path / "k.safetensors") == own


def test_provenance_of_an_adapter_that_was_changed_is_not_used(tmp_path):
    kohya(tmp_path / "a.safetensors", alpha=torch.tensor(4))
    converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    tensors, meta = load_file(tmp_path / "b.safetensors"), metadata(tmp_path / "b.safetensors")
    meta["lora_adapter_metadata"] = meta["lora_adapter_metadata"].replace('lora_alpha": 4.0', 'lora_alpha": 5.0')
    save_file(tensors, tmp_path / "b.safetensors", meta)
    converters.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya")
    assert {t.item() for k, t in load_file(tmp_path / "c.safetensors").items() if k.endswith("alpha")} == {5.0}
    meta["diffpeft.provenance"] = '{"format": "kohya", "layers": [1'
    save_file(tensors, tmp_path / "b.safetensors", meta)
    converters.convert(tmp_path / "b.safetensors", tmp_path / "d.safetensors", to="kohya")
    assert same(load_file(tmp_path / "c.safetensors"), load_file(tmp_path / "d.safetensors"))


def loha(path, layer="lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", size=(30, 20)):
    o, i = size
    tensors = {
        f"{layer}.{role}": torch.randn(*shape)
        for role, shape in {"hada_w1_a": (o, 2), "hada_w1_b": (2, i), "hada_w2_a": (o, 2), "hada_w2_b": (2, i)}.items()
    }
    save_file({**tensors, f"{layer}.alpha": torch.tensor(3.0)}, path)


def test_a_loha_becomes_the_lora_that_it_is_where_it_has_to(tmp_path):
    loha(tmp_path / "a.safetensors")
    report = converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    assert report.level == "L1" and "attn1.to_q" in report.warnings[0]
    (want,) = converters.read(tmp_path / "a.safetensors").deltas().values()
    bundle = converters.read(tmp_path / "b.safetensors")
    (got,) = bundle.deltas().values()
    assert bundle.methods == {"lora"} and bundle.entries[0].tensors["lora_A"].shape == (4, 20)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # fp32 factors


@pytest.mark.parametrize("method", ["tucker", "loha-tucker", "lokr-first", "lokr-tucker"])
def test_a_lora_that_something_becomes_has_the_axes_of_its_layer(method, tmp_path):
    """PEFT loads no second factor of a convolution that has others than [o, r, 1, 1]."""
    adapter = checkpoint("kohya", "sdxl", method, text=False, layers=lambda site: len(site.shape) > 2)
    report = converters.convert(adapter.save(tmp_path), tmp_path / "b.safetensors", to="diffusers")
    assert report.level == "L1"
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "b.safetensors").items()}
    second = [shape for key, shape in shapes.items() if key.endswith("lora_B.weight")]
    assert second and all(len(shape) == 4 and shape[2:] == (1, 1) for shape in second)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
            (3, 20),
        ),  # its rank is not below the layer's
        ("lora_unet_conv_in", (30, 36)),  # a kernel that the file does not show
    ],
)
def test_what_cannot_be_expanded_is_refused_and_leaves_nothing(layer, size, tmp_path):
    loha(tmp_path / "a.safetensors", layer, size)
    with pytest.raises(CannotConvertError, match="kohya"):
        converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"to": "khoya"}, UnknownNameError),
        ({"to": "kohya", "format": "difusers"}, UnknownNameError),
        ({"to": "kohya", "family": "sd14"}, UnknownNameError),
        ({"to": "kohya", "dtype": "fp8"}, ConfigError),
        ({"to": "kohya", "allow": "anything"}, ConfigError),
    ],
)
def test_a_bad_option_is_named(options, error, tmp_path):
    kohya(tmp_path / "a.safetensors")
    with pytest.raises(error):
        converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)
    assert not (tmp_path / "b.safetensors").exists()


def test_the_output_may_not_be_the_input(tmp_path):
    before, _ = kohya(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError):
        converters.convert(tmp_path / "a.safetensors", tmp_path / "a.safetensors", to="diffusers")
    assert same(load_file(tmp_path / "a.safetensors"), before)


@pytest.mark.parametrize("size, to", [((30, 20), "kohya"), ((30, 20), "diffusers"), ((3, 20), "diffusers")])
def test_each_format_is_asked_once_what_it_makes_of_an_adapter(size, to, tmp_path, monkeypatch):
    loha(tmp_path / "a.safetensors", size=size)
    asked: list[str] = []
    arranged = holding.arranged
    monkeypatch.setattr(holding, "arranged", lambda bundle, fmt: asked.append(fmt.name) or arranged(bundle, fmt))
    held = size == (30, 20)
    with contextlib.nullcontext() if held else pytest.raises(CannotConvertError):
        converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to)
    assert asked[0] == to and asked.count(to) == (2 if held and to == "diffusers" else 1)  # again with a LoRA
    assert len({*asked[1:]}) == len(asked[1:]) and (len(asked) > 4) == (not held)  # the others, to say which can


def test_a_component_stays_as_it_is_where_another_cannot(tmp_path):
    loha(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors |= {f"{layer}.lokr_w1_a": torch.randn(4, 1), f"{layer}.lokr_w1_b": torch.randn(1, 4)}
    tensors |= {f"{layer}.lokr_w2": torch.randn(8, 5)}  # halves that PEFT does not make
    save_file(tensors, tmp_path / "a.safetensors")
    want = converters.read(tmp_path / "a.safetensors").deltas()
    report = converters.convert(tmp_path / "a.safetensors", tmp_path / "b", to="peft")
    assert (
        report.level == "L1" and report.warnings[0].startswith("1 layers were computed anew") and "fc1" in str(report)
    )
    bundle = converters.read(tmp_path / "b")
    assert {entry.layer.split(".")[0]: entry.method for entry in bundle.entries} == {
        "unet": "loha",
        "text_encoder": "lora",
    }
    for name, delta in bundle.deltas().items():
        torch.testing.assert_close(delta, want[name], rtol=0, atol=1e-5)  # fp32 factors


def test_a_second_adapter_of_a_kind_on_a_part_of_a_joint_layer_is_not_dropped(tmp_path):
    layers = [f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    tensors = {f"{n}.lora_A.weight": torch.randn(2, 8) for n in layers} | {
        f"{n}.lora_B.weight": torch.randn(8, 2) for n in layers
    }
    bundle = converters.read(tensors, family="flux")
    bundle.entries.append(bundle.entries[0])
    with pytest.raises(CannotConvertError, match="one adapter of a kind on a layer"):
        converters.write(bundle, tmp_path / "b.safetensors", format="kohya")


def test_what_all_layers_of_an_adapter_share_comes_back_and_is_accounted_for(tmp_path):
    layer, source = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", tmp_path / "a"
    source.mkdir()
    tensors = {f"base_model.model.{layer}.vera_lambda_b": torch.randn(320), "base_model.vera_A": torch.randn(8, 320)}
    tensors |= {f"base_model.model.{layer}.vera_lambda_d": torch.randn(8), "base_model.vera_B": torch.randn(320, 8)}
    save_file(tensors, source / "adapter_model.safetensors")
    config = {"peft_type": "VERA", "r": 8, "target_modules": [layer], "peft_version": "0.21.2"}
    (source / "adapter_config.json").write_text(json.dumps(config))
    report = converters.convert(source, tmp_path / "b", to="peft", family="sd15")
    assert report.level == "L0" and {*report.mapped} == {*tensors} and not report.carried
    assert same(load_file(tmp_path / "b" / "adapter_model.safetensors"), tensors)


def test_a_broken_file_leaves_nothing(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError):
        converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="kohya")
    assert not (tmp_path / "b.safetensors").exists()


def test_the_command(tmp_path):
    kohya(tmp_path / "a.safetensors")
    args = [
        "convert",
        str(tmp_path / "a.safetensors"),
        str(tmp_path / "b.safetensors"),
        "--to",
        "diffusers",
        "--dtype",
        "fp16",
    ]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0 and "sd15" in done.output and "L1" in done.output
    assert {t.dtype for k, t in load_file(tmp_path / "b.safetensors").items() if "lora" in k} == {torch.float16}
