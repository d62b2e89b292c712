"""Bundled embeddings as files of their own."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from diffpeft import converters
from diffpeft.cli import cli

LORA = {f"lora_unet_conv_in.lora_{d}.weight": torch.ones(s) for d, s in (("down", (1, 4, 3, 3)), ("up", (8, 1, 1, 1)))}
CASES = {
    "one encoder": ({"bundle_emb.<cat>.clip_l": (2, 768)}, {"_cat_": {"emb_params": (2, 768)}}),
    "A1111": ({"bundle_emb.cat.string_to_param.*": (2, 768)}, {"cat": {"emb_params": (2, 768)}}),
    "two encoders": (
        {"bundle_emb.a.b.clip_l": (2, 768), "bundle_emb.a.b.clip_g": (2, 1280)},
        {"a.b": {"clip_l": (2, 768), "clip_g": (2, 1280)}},
    ),
    "two that are one file name": (
        {"bundle_emb.a b.t5": (1, 4096), "bundle_emb.a/b.t5": (1, 4096)},
        {"a_b": {"t5": (1, 4096)}, "a_b-1": {"t5": (1, 4096)}},
    ),
    "of outputs": ({"bundle_emb.x.clip_l_out": (1, 768)}, {"x": {"clip_l_out": (1, 768)}}),
    "none": ({"emb_params": (1, 768)}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_embedding_gets_a_file(case, tmp_path):
    shapes, want = CASES[case]
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    save_file({**LORA, **tensors}, tmp_path / "x.safetensors")
    paths = converters.write_embeddings(tmp_path / "x.safetensors", tmp_path / "out")
    assert {p.stem: {k: tuple(t.shape) for k, t in load_file(p).items()} for p in paths} == want
    written = [t for p in paths for t in load_file(p).values()]
    assert all(any(torch.equal(t, own) for own in tensors.values()) for t in written)


def test_the_command_writes_them_too(tmp_path):
    save_file({**LORA, "bundle_emb.cat.clip_l": torch.ones(1, 768)}, tmp_path / "x.safetensors")
    args = ["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors"), "--to", "diffusers"]
    done = CliRunner().invoke(cli, [*args, "--embeddings", str(tmp_path / "words")])
    assert done.exit_code == 0, done.output
    assert torch.equal(load_file(tmp_path / "words/cat.safetensors")["emb_params"], torch.ones(1, 768))
    assert "bundle_emb.cat.clip_l" in load_file(tmp_path / "y.safetensors")


def test_no_file_is_overwritten_whatever_the_adapter_calls_its_words(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"a model")
    (out / "link.safetensors").symlink_to(out / "nowhere")
    words = ("model", "link", "../x", "é" * 300, "a b", "a.b", "a/b")
    vectors = {f"bundle_emb.{word}.clip_l": torch.randn(1, 8) for word in words}
    save_file({**LORA, **vectors}, tmp_path / "x.safetensors")
    paths = converters.write_embeddings(tmp_path / "x.safetensors", out)
    assert (out / "model.safetensors").read_bytes() == b"a model" and not (out / "nowhere").exists()
    assert len({*paths}) == len(words) and {p.parent for p in paths} == {out}
    assert {p.stem for p in paths} >= {"model-1", "link-1", ".._x", "a_b", "a_b-1", "a.b"}
    written = sorted(load_file(p)["emb_params"].tolist() for p in paths)
    assert written == sorted(t.tolist() for t in vectors.values())
    assert converters.write_embeddings(tmp_path / "x.safetensors", out) == paths  # the same again: nothing new
    assert len([*out.iterdir()]) == len(words) + 2
