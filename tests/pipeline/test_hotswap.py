"""replace: the tensors of an adapter become another's, in place; max_rank gives room."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from diffpeft import (
    AdapterStateError,
    ConfigError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownNameError,
    adapters,
    converters,
    fuse,
    get_adapters,
    load_lora,
    replace,
    save_lora,
    set_adapters,
    unload,
)

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.conv_in"
TEXT = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
SHAPES = {LINEAR: ((32,), 32), CONV: ((4, 3, 3), 16), TEXT: ((32,), 48)}


def lora(ranks, seed, alpha=None, layers=SHAPES, dora=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, r in zip(layers, ranks, strict=True):
        inside, out = SHAPES[layer]
        tensors[f"{layer}.lora_A.weight"] = torch.randn(r, *inside, generator=g).to(dtype)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(out, r, *(1,) * (len(inside) - 1), generator=g).to(dtype)
        if alpha is not None:
            tensors[f"{layer}.alpha"] = torch.tensor(alpha)
        if dora:
            tensors[f"{layer}.dora_scale"] = torch.rand(out, 1, *(1,) * (len(inside) - 1), generator=g) + 0.5
    return tensors


SECOND = {
    "the same rank": lora((4, 4, 4), 1),
    "lower ranks": lora((1, 2, 3), 1),
    "another scale": lora((4, 3, 2), 1, alpha=3.0),
    "fewer layers": lora((2,), 1, layers=(CONV,)),
    "half precision": lora((4, 2, 4), 1, dtype=torch.float16),
}


@pytest.mark.parametrize("case", SECOND)
def test_the_new_adapter_does_what_it_does_when_it_is_loaded(case, pipe, image, tmp_path):
    load_lora(pipe, SECOND[case], name="b", weight=0.7)
    want = image(pipe)
    unload(pipe)
    load_lora(pipe, lora((4, 4, 4), 0), name="a", weight=0.7)
    before, first = {n: p.data_ptr() for n, p in pipe.unet.named_parameters()}, image(pipe)
    report = replace(pipe, "a", SECOND[case])
    assert {n: p.data_ptr() for n, p in pipe.unet.named_parameters()} == before
    assert report.name == "a" and len(report.matched) == len(
        {k.partition(".lora")[0] for k in SECOND[case] if "lora_A" in k}
    )
    got = image(pipe)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert not torch.allclose(got, first, atol=1e-4) and get_adapters(pipe)["a"].strength == 0.7
    save_lora(pipe, tmp_path / "a.safetensors", format="kohya")
    load_lora(pipe, SECOND[case], name="b")
    save_lora(pipe, tmp_path / "b.safetensors", name="b", format="kohya")
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_back_again_is_the_first_to_the_bit(pipe, image):
    load_lora(pipe, lora((4, 4, 4), 0, alpha=2.0), name="a")
    first = image(pipe)
    replace(pipe, "a", lora((3, 2, 1), 1, alpha=1.0))
    replace(pipe, "a", lora((4, 4, 4), 0, alpha=2.0))
    assert torch.equal(image(pipe), first)


def test_max_rank_gives_room_and_does_not_show(pipe, image, tmp_path):
    small, large = lora((1, 2, 3), 0, alpha=1.5), lora((9, 9, 9), 1)
    load_lora(pipe, small, name="a")
    want = image(pipe)
    unload(pipe)
    load_lora(pipe, small, name="a", max_rank=9)
    torch.testing.assert_close(image(pipe), want, rtol=0, atol=1e-5)
    assert get_adapters(pipe)["a"].ranks == (1, 2, 3)
    save_lora(pipe, tmp_path / "a.safetensors", format="kohya")
    shapes = {k: t.shape for k, t in load_file(tmp_path / "a.safetensors").items()}
    assert shapes["lora_unet_conv_in.lora_down.weight"] == (2, 4, 3, 3)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["lora_unet_conv_in.alpha"], torch.tensor(1.5))
    replace(pipe, "a", large)
    assert get_adapters(pipe)["a"].ranks == (9,)
    unload(pipe)
    load_lora(pipe, large, name="a")
    want = image(pipe)
    unload(pipe)
    load_lora(pipe, small, name="a", max_rank=9)
    replace(pipe, "a", large)
    torch.testing.assert_close(image(pipe), want, rtol=0, atol=1e-4)


def test_dora_is_replaced_too(pipe, image):
    new = lora((2, 3, 1), 1, alpha=2.0, dora=True)
    load_lora(pipe, new, name="b")
    want = image(pipe)
    unload(pipe)
    load_lora(pipe, lora((4, 4, 4), 0, dora=True), name="a", max_rank=6)
    replace(pipe, "a", new)
    torch.testing.assert_close(image(pipe), want, rtol=0, atol=1e-4)


WRONG = {
    "a higher rank": (lora((4, 5, 4), 1), ShapeMismatchError, "max_rank"),
    "a layer that the first lacks": (
        lora((1, 1, 1), 1)
        | {
            LINEAR.replace("to_q", "to_k") + f".lora_{ab}.weight": torch.ones(*s)
            for ab, s in (("A", (1, 32)), ("B", (32, 1)))
        },
        ShapeMismatchError,
        "to_k",
    ),
    "another method": (
        {f"{CONV}.hada_w{n}_{ab}": torch.ones(*((16, 2) if ab == "a" else (2, 36))) for n in "12" for ab in "ab"},
        ShapeMismatchError,
        "loha",
    ),
    "DoRA for LoRA": (lora((1, 1, 1), 1, dora=True), ShapeMismatchError, "dora"),
    "NaN": ({k: t * float("nan") for k, t in lora((1, 1, 1), 1).items()}, NonFiniteError, "finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_changes_nothing(case, pipe, image):
    tensors, error, said = WRONG[case]
    load_lora(pipe, lora((4, 4, 4), 0), name="a")
    before = image(pipe)
    with pytest.raises(error, match=said):
        replace(pipe, "a", tensors)
    assert torch.equal(image(pipe), before)


def test_what_cannot_be_replaced_now_says_so(pipe):
    new = lora((1, 1, 1), 1)
    with pytest.raises(UnknownNameError):
        replace(pipe, "a", new)
    load_lora(pipe, lora((4, 4, 4), 0), name="a")
    with pytest.raises(UnknownNameError, match="a"):
        replace(pipe, "aa", new)
    fuse(pipe)
    with pytest.raises(AdapterStateError, match="unfuse"):
        replace(pipe, "a", new)
    unload(pipe)
    load_lora(pipe, lora((4, 4, 4), 0), name="a")
    with torch.no_grad(), adapters(pipe, {"a": 0.5}), pytest.raises(AdapterStateError, match="block"):
        replace(pipe, "a", new)
    load_lora(pipe, lora((4, 4, 4), 0), name="t", trainable=True)
    with pytest.raises(AdapterStateError, match="trainable"):
        replace(pipe, "t", new)
    for options in ({"max_rank": 0}, {"max_rank": 8, "trainable": True}):
        with pytest.raises(ConfigError, match="max_rank"):
            load_lora(pipe, new, name="z", **options)
    with pytest.raises(ShapeMismatchError, match="max_rank"):
        load_lora(pipe, lora((4, 4, 4), 0), name="z", max_rank=3)


def test_a_failing_write_is_undone(pipe, image, monkeypatch):
    load_lora(pipe, lora((4, 4, 4), 0), name="a")
    before, copy_, calls = image(pipe), torch.Tensor.copy_, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return copy_(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(MemoryError):
        replace(pipe, "a", lora((1, 1, 1), 1))
    monkeypatch.undo()
    assert torch.equal(image(pipe), before)


@torch.no_grad()
def test_compiled_code_stays_as_it_is(pipe):
    load_lora(pipe, lora((4, 4, 4), 0, alpha=2.0), name="a", weight=0.5)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    run = torch.compile(pipe.unet, backend=backend)
    x, text = torch.randn(1, 4, 8, 8).to(pipe.unet.dtype), torch.randn(1, 5, 32).to(pipe.unet.dtype)
    run(x, torch.tensor(3), text)
    n = len(graphs)
    replace(pipe, "a", lora((2, 3, 1), 1, alpha=5.0))
    got = run(x, torch.tensor(3), text).sample
    assert len(graphs) == n
    set_adapters(pipe, {"a": 0.5})
    torch.testing.assert_close(got, pipe.unet(x, torch.tensor(3), text).sample, rtol=0, atol=1e-5)


def test_metadata_and_words_are_the_new_files(pipe, tmp_path):
    bundle = converters.read(lora((1, 1, 1), 1))
    bundle.metadata["modelspec.trigger_phrase"] = "sks"
    load_lora(pipe, lora((4, 4, 4), 0), name="a")
    assert replace(pipe, "a", bundle).trigger_words == ("sks",)
    save_lora(pipe, tmp_path / "a.safetensors")
    assert converters.inspect(tmp_path / "a.safetensors").trigger_words == ("sks",)
