"""From a file onto a pipeline and back; and the same files in stock diffusers with peft."""

from __future__ import annotations

import gc
import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffpeft import (
    AdapterStateError,
    CannotConvertError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    MissingKeysError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownKeysError,
    UnknownNameError,
    UnreadableFileError,
    UnsafeFileError,
    WrongBaseError,
    attach,
    converters,
    get_adapters,
    load_lora,
    save_lora,
    set_adapters,
    unload,
)
from diffpeft.model.state import slots_of

# float64, 16 digits; the nets are 30 layers deep with normed activations, and the order of summation differs between implementations
EXACT = dict(rtol=0, atol=1e-10)
FORMATS = ("kohya", "diffusers")  # those of SD1.5's files that stock diffusers reads
every_format = pytest.mark.parametrize("format", FORMATS)

CONV, LINEAR = "unet.conv_in", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
KOHYA = {
    CONV: "lora_unet_conv_in",
    LINEAR: "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    TEXT: "lora_te_text_model_encoder_layers_1_mlp_fc1",
}
SHAPES = {CONV: (16, 4, 3, 3), LINEAR: (32, 32), TEXT: (48, 32)}


def lora(format="kohya", layers=tuple(SHAPES), ranks=(2, 3, 4), dtype=torch.float32, alpha=None):
    """A state dict in a format's spelling."""
    out = {}
    for layer, r in zip(layers, ranks, strict=False):
        o, i, *k = SHAPES[layer]
        A, B = torch.randn(r, i, *k).to(dtype), (torch.randn(o, r, *(1 for _ in k)) * 0.3).to(dtype)
        if format == "kohya":
            out |= {f"{KOHYA[layer]}.lora_down.weight": A, f"{KOHYA[layer]}.lora_up.weight": B}
            out |= {f"{KOHYA[layer]}.alpha": alpha.clone()} if alpha is not None else {}
        else:
            out |= {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B}
    return out


def same(a, b):
    """Same keys, dtypes, shapes and bytes."""
    bits = lambda t: (t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())  # noqa: E731
    assert a.keys() == b.keys()
    assert {k: bits(t) for k, t in a.items()} == {k: bits(t) for k, t in b.items()}


# ---- round trips

ALPHAS = {
    "none": None,
    "fp32": torch.tensor(2.0),
    "fp16": torch.tensor(1.5, dtype=torch.float16),
    "bf16": torch.tensor(3.0, dtype=torch.bfloat16),
    "int64": torch.tensor(4),
    "one number": torch.tensor([2.0]),
    "0": torch.tensor(0.0),
    "negative": torch.tensor(-1.0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.filterwarnings("ignore:.*alpha")
def test_kohya_comes_back_bit_for_bit(dtype, alpha, pipe, tmp_path):
    want = lora("kohya", dtype=dtype, alpha=ALPHAS[alpha])
    save_file(want, tmp_path / "a.safetensors")
    load_lora(pipe, tmp_path / "a.safetensors")
    save_lora(pipe, tmp_path / "b.safetensors", format="kohya")
    same(load_file(tmp_path / "b.safetensors"), want)
    for slot in slots_of(pipe, "a").values():
        assert slot.scale == (1 if ALPHAS[alpha] is None else ALPHAS[alpha].item() / slot.rank)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_diffusers_comes_back_bit_for_bit(dtype, pipe, tmp_path):
    want = lora("diffusers", dtype=dtype)
    report = load_lora(pipe, want, name="a")
    assert (
        report.format == "diffusers" and report.family == "sd15" and report.methods == {"lora"} and not report.carried
    )
    assert report.matched == (CONV, LINEAR, TEXT.replace("text_model.", ""))
    save_lora(pipe, tmp_path / "b.safetensors", format="diffusers")
    same(load_file(tmp_path / "b.safetensors"), want)
    assert {slot.scale for slot in slots_of(pipe, "a").values()} == {1.0}


WHOLE = [name for name, fmt in converters.FORMATS.items() if fmt.writable and not fmt.single and name != "xlabs"]


@pytest.mark.parametrize("there", WHOLE)
@pytest.mark.parametrize("back", WHOLE)
def test_the_deltas_are_the_same_in_every_format(there, back, adapter, pipe, tmp_path, image):
    want = converters.read(adapter(there))
    converters.write(want, tmp_path / "b.safetensors", format=back)
    got = converters.read(tmp_path / "b.safetensors")
    assert got.deltas().keys() == want.deltas().keys()
    assert all(torch.equal(d, want.deltas()[layer]) for layer, d in got.deltas().items())
    load_lora(pipe, want, name="want")
    before = image(pipe)
    unload(pipe)
    load_lora(pipe, tmp_path / "b.safetensors")
    assert torch.equal(image(pipe), before)


@every_format
def test_dtype_casts_factors_only(format, adapter, pipe, tmp_path):
    load_lora(pipe, adapter(format))
    save_lora(pipe, tmp_path / "b.safetensors", format=format, dtype=torch.float16)
    got = load_file(tmp_path / "b.safetensors")
    assert {t.dtype for k, t in got.items() if not k.endswith("alpha")} == {torch.float16}
    assert all(t.dtype == torch.float32 for k, t in got.items() if k.endswith("alpha"))


@every_format
def test_a_cast_that_overflows_is_refused(format, pipe, tmp_path):
    tensors = lora("kohya")
    tensors[f"{KOHYA[CONV]}.lora_up.weight"][0, 0] = 1e5  # the largest fp16 is 65504
    load_lora(pipe, tensors, name="a")
    with pytest.raises(CannotConvertError, match="float16"):
        save_lora(pipe, tmp_path / "b.safetensors", format=format, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@every_format
def test_metadata_comes_back(format, pipe, tmp_path):
    save_file(
        lora("kohya"),
        tmp_path / "a.safetensors",
        metadata={"ss_tag": "é", "modelspec.trigger_phrase": "a, b", "sshs_model_hash": "x"},
    )
    assert load_lora(pipe, tmp_path / "a.safetensors").trigger_words == ("a", "b")
    save_lora(pipe, tmp_path / "b.safetensors", format=format, metadata={"mine": "1"})
    with safe_open(tmp_path / "b.safetensors", "pt") as f:
        got = f.metadata()
    assert (
        got["ss_tag"] == "é"
        and got["mine"] == "1"
        and got["modelspec.trigger_phrase"] == "a, b"
        and "sshs_model_hash" not in got
    )


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_are_frozen_as_stored_unless_they_train(trainable, dtype, pipe):
    load_lora(pipe, lora(dtype=dtype), trainable=trainable)
    found = {(p.requires_grad, p.dtype) for slot in slots_of(pipe, "default").values() for p in slot.parameters()}
    assert found == {(trainable, torch.float32 if trainable else dtype)}


def test_training_does_not_reach_the_dict_that_was_loaded(pipe):
    tensors = lora()
    before = {k: t.clone() for k, t in tensors.items()}
    load_lora(pipe, tensors, trainable=True)
    with torch.no_grad():
        for slot in slots_of(pipe, "default").values():
            for p in slot.parameters():
                p.zero_()
    same(tensors, before)


def test_an_offloaded_adapter_can_be_saved(adapter, pipe, tmp_path):
    from accelerate import cpu_offload

    file = adapter("kohya")
    load_lora(pipe, file)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    save_lora(pipe, tmp_path / "b.safetensors", format="kohya")
    same(load_file(tmp_path / "b.safetensors"), load_file(file))


def test_a_1x1_convolution_takes_linear_factors(pipe):
    layer, base = "unet.mid_block.attentions.0.proj_in", pipe.unet.mid_block.attentions[0].proj_in
    assert isinstance(base, nn.Conv2d)
    A, B = torch.randn(2, 32), torch.randn(32, 2)
    x = torch.randn(1, 32, 2, 2, dtype=torch.float64)
    outs = []
    for shape in ((), (1, 1)):
        load_lora(
            pipe,
            {f"{layer}.lora_A.weight": A.reshape(2, 32, *shape), f"{layer}.lora_B.weight": B.reshape(32, 2, *shape)},
        )
        outs.append(base(x))
        unload(pipe)
    assert torch.equal(*outs)


# ---- stock diffusers


def stock_image(pipe, image, weights, name):
    out = []
    for weight in weights:
        pipe.set_adapters([name], [weight])
        out.append(image(pipe))
    return out


@every_format
def test_what_we_save_gives_the_same_image_in_stock_diffusers(format, adapter, fresh, image):
    unet_only = (
        {"targets": ("conv_in", "attn1.to_q")} if format == "kohya" else {}
    )  # stock 0.42 drops q_proj, and alphas, of text encoders in kohya's spelling
    file, ours, theirs = adapter(format, **unet_only), fresh(), fresh()
    load_lora(ours, file, name="a")
    theirs.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="a")
    wants = stock_image(theirs, image, (1.0, 0.5), "a")
    plain = image(fresh())
    for weight, want in zip((1.0, 0.5), wants, strict=True):
        set_adapters(ours, {"a": weight})
        assert (want - plain).abs().max() > 1e-3
        torch.testing.assert_close(image(ours), want, **EXACT)


PEFT = {
    "plain": dict(r=3, lora_alpha=3),
    "alpha": dict(r=4, lora_alpha=2),
    "patterns": dict(
        r=3,
        lora_alpha=2,
        rank_pattern={"to_q": 2, r"^mid_block\.attentions.0.proj_in": 5},
        alpha_pattern={"to_q": 6, ".*fc1": 5, "conv_in": 7},
    ),
    "rslora": dict(r=4, lora_alpha=2, use_rslora=True, alpha_pattern={"to_k": 5}, rank_pattern={"to_k": 2}),
}


def stock(pipe, fields, text=True, layers=("to_q", "to_k", "conv_in", "proj_in")):
    """Stock adapters on a pipeline, with random values."""
    import peft

    pipe.unet.add_adapter(peft.LoraConfig(**fields, init_lora_weights=False, target_modules=layers), "a")
    if text:
        pipe.text_encoder.add_adapter(
            peft.LoraConfig(**fields, init_lora_weights=False, target_modules=["q_proj", "fc1"]), "a"
        )
    return pipe


def saved_by_stock(pipe, how, folder):
    """The ways in which stock diffusers and its scripts write files."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    if how == "save_lora_adapter":
        pipe.unet.save_lora_adapter(folder, adapter_name="a")
        return
    unet, text = (get_peft_model_state_dict(getattr(pipe, c), adapter_name="a") for c in ("unet", "text_encoder"))
    metadata = {}
    if how == "with metadata":
        for part in (pipe.unet, pipe.text_encoder):
            part.peft_config["default"] = part.peft_config["a"]
        metadata = _collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    if how == "converted":
        unet, text = convert_state_dict_to_diffusers(unet), convert_state_dict_to_diffusers(text)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=unet, text_encoder_lora_layers=text, **metadata)


@pytest.mark.parametrize("fields", PEFT)
@pytest.mark.parametrize("how", ["without metadata", "converted", "with metadata", "save_lora_adapter"])
def test_what_stock_diffusers_saves_gives_the_same_image_here(fields, how, fresh, image, tmp_path):
    layers = (
        ("to_q", "to_k") if how == "converted" else ("to_q", "to_k", "conv_in", "proj_in")
    )  # stock reads no converted file with other layers
    source, theirs, ours = stock(fresh(), PEFT[fields], how != "save_lora_adapter", layers), fresh(), fresh()
    saved_by_stock(source, how, tmp_path)
    if how in ("with metadata", "save_lora_adapter"):  # nothing is lost
        want = image(source)
    else:
        theirs.load_lora_weights(str(tmp_path))
        want = image(theirs)
    assert not load_lora(ours, tmp_path).carried
    torch.testing.assert_close(image(ours), want, **EXACT)
    save_lora(ours, tmp_path / "again.safetensors")
    unload(ours)
    load_lora(ours, tmp_path / "again.safetensors")
    torch.testing.assert_close(image(ours), want, **EXACT)


def test_a_file_for_the_unet_alone_loads_on_the_unet_alone(fresh, tmp_path):
    source, ours = stock(fresh(), PEFT["patterns"], text=False), fresh()
    saved_by_stock(source, "save_lora_adapter", tmp_path)
    load_lora(ours.unet, tmp_path)
    x, t, text = (
        torch.randn(1, 4, 8, 8, dtype=torch.float64),
        torch.tensor([3]),
        torch.randn(1, 5, 32, dtype=torch.float64),
    )
    torch.testing.assert_close(ours.unet(x, t, text).sample, source.unet(x, t, text).sample, **EXACT)


def test_the_embedded_base_gives_the_image_of_stock_diffusers(embedded, image, tmp_path):
    import copy

    from diffusers import StableDiffusionPipeline

    plain = image(embedded)
    attach(embedded, LoraConfig(r=2, init_lora_weights="gaussian"), "a", targets="attn")
    for slot in slots_of(embedded, "a").values():
        nn.init.normal_(slot.lora_B, std=0.05)
    save_lora(embedded, tmp_path / "a.safetensors")
    theirs = StableDiffusionPipeline(
        **{
            name: copy.deepcopy(part) if isinstance(part, nn.Module) else part
            for name, part in embedded.components.items()
        }
    )
    unload(theirs)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="a")
    # float32, 7 digits: two denoising steps and the decoder blow the last digit up by at most 1000
    torch.testing.assert_close(image(embedded), image(theirs), rtol=0, atol=1e-4)
    unload(embedded)
    assert torch.equal(image(embedded), plain)


def test_an_adapter_of_ours_can_be_saved_through_a_converted_dict(adapter, pipe):
    """What other tools hand over in memory: a plain dict."""
    file = adapter("diffusers")
    assert len(load_lora(pipe, load_file(file), name="a").matched) == 4


# ---- the four fates of a key


@every_format
def test_a_layer_that_is_not_there_is_refused_with_the_near_match(format, pipe):
    tensors = {re.sub(r"(mid_block.attentions.)0", r"\g<1>7", k): t for k, t in lora(format).items()}
    with pytest.raises(UnknownKeysError) as caught:
        load_lora(pipe, tensors)
    assert "unet.mid_block.attentions.7.transformer_blocks.0.attn1.to_q" in str(
        caught.value
    ) and f"Did you mean '{LINEAR}'" in str(caught.value)
    assert get_adapters(pipe) == {}


LOST = {
    "kohya": ("lora_unet_mid_block_attentions_7_proj_in", "lora_unet_no_such_layer"),
    "diffusers": ("unet.mid_block.attentions.7.proj_in", "unet.no.such.layer"),
}


@every_format
def test_not_strict_carries_them_with_a_warning_and_saves_them_again(format, pipe, tmp_path):
    want, ends = (
        lora(format),
        {"kohya": ("lora_down.weight", "lora_up.weight"), "diffusers": ("lora_A.weight", "lora_B.weight")}[format],
    )
    lost = {f"{layer}.{end}": torch.randn(2, 2) for layer in LOST[format] for end in ends}
    with pytest.warns(UserWarning, match="no effect") as caught:
        report = load_lora(pipe, want | lost, strict=False)
    assert sorted(report.carried) == sorted(lost) and len(report.matched) == 3
    assert next(iter(lost)) in str(caught[0].message)
    save_lora(pipe, tmp_path / "b.safetensors", format=format)
    same(load_file(tmp_path / "b.safetensors"), want | lost)


@every_format
def test_tensors_of_no_adapter_are_carried_with_a_warning_and_saved_again(format, pipe, tmp_path):
    want = lora(format) | {
        "emb_params": torch.randn(2, 32),
        "bundle_emb.x.string_to_param.*": torch.randn(1, 32),
        "unet.some_counter": torch.tensor(3),
    }
    with pytest.warns(UserWarning, match="emb_params"):
        report = load_lora(pipe, want)
    assert set(report.carried) == set(want) - set(lora(format))
    save_lora(pipe, tmp_path / "b.safetensors", format=format)
    same(load_file(tmp_path / "b.safetensors"), want)


@every_format
def test_what_belongs_to_a_missing_component_is_carried_and_saved_again(format, pipe, tmp_path):
    want = lora(format)
    with pytest.warns(UserWarning, match="no effect"):
        report = load_lora(pipe.unet, want)
    assert len(report.matched) == 2 and len(report.carried) == 2
    save_lora(pipe.unet, tmp_path / "b.safetensors", format=format)
    same(load_file(tmp_path / "b.safetensors"), want)


@pytest.mark.parametrize(
    "key",
    [
        "unet.conv_in.weight",
        "conv_in.weight",
        "unet.conv_in.base_layer.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.bias",
        "text_encoder.encoder.layers.0.mlp.fc1.bias",
        "unet.conv_in.base_layer.lora_A.weight",
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_key_of_the_base_is_always_refused(key, strict, pipe, trace):
    before = trace(pipe.unet, pipe.text_encoder)
    tensors = (
        lora("diffusers")
        | {key: torch.zeros(16, 4, 3, 3)}
        | ({key.replace("lora_A", "lora_B"): torch.zeros(16, 16, 1, 1)} if "lora_A" in key else {})
    )
    with pytest.raises(UnknownKeysError, match=r"conv_in|fc1"):
        load_lora(pipe, tensors, strict=strict)
    assert trace(pipe.unet, pipe.text_encoder) == before


def test_a_warning_that_is_an_error_has_changed_nothing(pipe, trace):
    before = trace(pipe.unet, pipe.text_encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            load_lora(pipe, lora() | {"emb_params": torch.randn(2, 32)})
    assert trace(pipe.unet, pipe.text_encoder) == before


def test_alpha_0_is_said(pipe):
    with pytest.warns(UserWarning, match="alpha"):
        load_lora(pipe, lora("kohya", alpha=torch.tensor(0.0)))


def test_a_rank_beyond_the_layer_is_said(pipe):
    with pytest.warns(UserWarning, match="rank"):
        load_lora(pipe, lora(layers=(LINEAR,), ranks=(40,)), name="a")
    with pytest.warns(UserWarning, match="rank"):
        attach(pipe, LoraConfig(r=40), "b", targets=["attn1.to_q"])


# ---- what is refused


def broken(**changes):
    """A kohya dict in which keys (by their end) are replaced, or left out if None."""
    out = lora("kohya", alpha=torch.tensor(2.0))
    for key in list(out):
        for end, change in changes.items():
            if key == f"{KOHYA[CONV]}.{end.replace('__', '.')}":
                out.pop(key)
                if change is not None:
                    out[key] = change(lora("kohya", alpha=torch.tensor(2.0))[key])
    return out


def filled(value):
    return lambda t: t.index_fill(0, torch.tensor([0]), value) if t.dim() else t.fill_(value)


def renamed(start, to="lora_unet_conv_in"):
    return {k.replace(to, start, 1): t for k, t in lora("kohya").items()}


BAD = {
    "half missing": (broken(lora_up__weight=None), MissingKeysError, "lora_B"),
    "other half missing": (broken(lora_down__weight=None), MissingKeysError, "lora_A"),
    "only an alpha": ({f"{KOHYA[CONV]}.alpha": torch.tensor(1.0)}, MissingKeysError, "lora_A"),
    "NaN": (broken(lora_up__weight=filled(float("nan"))), NonFiniteError, "conv_in"),
    "Inf": (broken(lora_down__weight=filled(float("inf"))), NonFiniteError, "conv_in"),
    "-Inf": (broken(lora_down__weight=filled(-float("inf"))), NonFiniteError, "conv_in"),
    "alpha NaN": (broken(alpha=filled(float("nan"))), NonFiniteError, "alpha"),
    "alpha Inf": (broken(alpha=filled(float("inf"))), NonFiniteError, "alpha"),
    "alpha of two numbers": (broken(alpha=lambda t: torch.ones(2)), CheckpointError, "alpha"),
    "other channels": (broken(lora_down__weight=lambda t: torch.ones(2, 5, 3, 3)), ShapeMismatchError, "conv_in"),
    "other outputs": (broken(lora_up__weight=lambda t: torch.ones(17, 2, 1, 1)), ShapeMismatchError, "conv_in"),
    "other kernel": (broken(lora_down__weight=lambda t: torch.ones(2, 4, 1, 1)), ShapeMismatchError, "conv_in"),
    "kernel the other way": (broken(lora_up__weight=lambda t: torch.ones(16, 2, 3, 3)), ShapeMismatchError, "conv_in"),
    "other ranks": (broken(lora_up__weight=lambda t: torch.ones(16, 3, 1, 1)), ShapeMismatchError, "conv_in"),
    "rank 0": (
        broken(lora_down__weight=lambda t: t[:0], lora_up__weight=lambda t: t[:, :0]),
        ShapeMismatchError,
        "conv_in",
    ),
    "one axis": (broken(lora_down__weight=lambda t: t.flatten()), ShapeMismatchError, "conv_in"),
    "no axis": (broken(lora_down__weight=lambda t: torch.tensor(1.0)), ShapeMismatchError, "conv_in"),
    "integers": (broken(lora_down__weight=lambda t: t.long()), CheckpointError, "floating"),
    "empty": ({}, CheckpointError, "at least one"),
    "no tensors": ({"a": 3}, CheckpointError, "tensors"),
    "no names": ({3: torch.ones(1)}, CheckpointError, "names"),
    "nothing known": ({"a.weight": torch.ones(1)}, UnknownKeysError, "kohya.*diffusers"),
    "nothing that fits": (
        {
            "emb_params": torch.ones(1),
            f"{KOHYA[TEXT].replace('_1_', '_9_')}.lora_down.weight": torch.ones(1, 32),
            f"{KOHYA[TEXT].replace('_1_', '_9_')}.lora_up.weight": torch.ones(48, 1),
        },
        UnknownKeysError,
        "layers.9",
    ),
    "a name twice": (
        lora("diffusers") | {TEXT.replace("text_model.", "") + ".lora_A.weight": torch.ones(1, 32)},
        CheckpointError,
        "same tensor",
    ),
    "another method": ({f"{KOHYA[CONV]}.hada_w1_a": torch.ones(16, 1), **lora()}, CheckpointError, "loha"),
    "another method, whole": ({f"{LINEAR}.ia3_l": torch.ones(32), **lora("diffusers")}, CheckpointError, "ia3"),
    "SDXL by block": (renamed("lora_unet_input_blocks_4_1_proj_in"), WrongBaseError, "sdxl.*sd15"),
    "SDXL by text encoder": (
        renamed("lora_te2_text_model_encoder_layers_0_mlp_fc1", KOHYA[TEXT]),
        WrongBaseError,
        "sdxl.*sd15",
    ),
    "SDXL by depth": (
        {k.replace("transformer_blocks.0", "transformer_blocks.9"): t for k, t in lora("diffusers").items()},
        WrongBaseError,
        "sdxl.*sd15",
    ),
    "Flux": (
        {f"transformer.single_transformer_blocks.0.attn.to_q.lora_{ab}.weight": torch.ones(1, 1) for ab in "AB"},
        WrongBaseError,
        "flux.*sd15",
    ),
    "Flux by kohya": (
        {k: t for k, t in renamed("lora_unet_double_blocks_0_img_attn_qkv").items() if "double" in k},
        WrongBaseError,
        "flux.*sd15",
    ),
    "Flux, and half of it": (
        {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 1)},
        WrongBaseError,
        "flux.*sd15",
    ),
    "SD2 by width": (
        {LINEAR.replace("attn1.to_q", "attn2.to_k") + f".lora_{ab}.weight": torch.ones(1, 1024) for ab in "A"},
        WrongBaseError,
        "sd2.*sd15",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("strict", [True, False])
def test_a_bad_file_is_refused_and_changes_nothing(case, strict, pipe, trace, tmp_path):
    tensors, error, said = BAD[case]
    before = trace(pipe.unet, pipe.text_encoder)
    sources = [tensors]
    if tensors and all(isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in tensors.items()):
        save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "bad.safetensors")
        sources.append(tmp_path / "bad.safetensors")
    for source in sources:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(error, match=said):
                load_lora(pipe, source, strict=strict)
        assert trace(pipe.unet, pipe.text_encoder) == before


def test_values_beyond_the_base_dtype_are_refused(fresh):
    pipe, tensors = fresh(torch.float16), broken(lora_up__weight=filled(1e5))
    with pytest.raises(NonFiniteError, match="float16"):
        load_lora(pipe, tensors)
    load_lora(fresh(torch.bfloat16), tensors)


def test_a_family_can_be_forced(pipe):
    cross = LINEAR.replace("attn1.to_q", "attn2.to_k")
    with pytest.raises(ShapeMismatchError):
        load_lora(
            pipe,
            {f"{cross}.lora_A.weight": torch.ones(1, 1024), f"{cross}.lora_B.weight": torch.ones(32, 1)},
            family="sd15",
        )
    with pytest.raises(UnknownNameError, match="sd15"):
        load_lora(pipe, lora(), family="sd1.5")


def test_a_bundle_with_a_layer_twice_is_refused(pipe):
    bundle = converters.read(lora())
    bundle.entries *= 2
    with pytest.raises(CheckpointError, match="conv_in"):
        load_lora(pipe, bundle)


CONFIGS = {
    "no number": ({"unet.lora_alpha": "many"}, CheckpointError),
    "no table": ("[]", CheckpointError),
    "no JSON": ("{", CheckpointError),
    "a slow pattern": (
        {"unet.lora_alpha": 1, "unet.alpha_pattern": {"(?:|.|.?)" * 60 + "(?:!|x!)": 2}},
        UnsafeFileError,
    ),
    "no pattern": ({"unet.lora_alpha": 1, "unet.alpha_pattern": {"[": 2}}, CheckpointError),
    "a list": ({"unet.alpha_pattern": [1]}, CheckpointError),
    "Inf": ({"unet.lora_alpha": float("inf")}, NonFiniteError),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_damaged_adapter_config_is_refused(case, pipe, tmp_path):
    config, error = CONFIGS[case]
    save_file(
        lora("diffusers"),
        tmp_path / "a.safetensors",
        metadata={"lora_adapter_metadata": config if isinstance(config, str) else json.dumps(config)},
    )
    with pytest.raises(error):
        load_lora(pipe, tmp_path / "a.safetensors")
    assert get_adapters(pipe) == {}


# ---- where files are found


def test_a_missing_file_names_its_neighbour(adapter, pipe):
    file = adapter()
    with pytest.raises(UnreadableFileError, match=r"style\.safetensors"):
        load_lora(pipe, file.with_name("stile.safetensors"))
    with pytest.raises(UnreadableFileError, match="no such file"):
        load_lora(pipe, file.parent / "nowhere" / "style.safetensors")


def test_a_folder_is_its_only_file_or_the_one_that_was_named(adapter, pipe):
    file = adapter()
    assert load_lora(pipe, file.parent).name == file.parent.name[:128]
    unload(pipe)
    shutil.copy(file, file.with_name("other.safetensors"))
    with pytest.raises(CheckpointError, match="filename=") as caught:
        load_lora(pipe, file.parent)
    assert "other.safetensors" in str(caught.value)
    load_lora(pipe, str(file.parent), filename="other.safetensors", name="a")
    shutil.copy(file, file.with_name("pytorch_lora_weights.safetensors"))
    load_lora(pipe, file.parent, name="b")
    with pytest.raises(UnreadableFileError, match="no such file"):
        load_lora(pipe, file.parent, filename="third.safetensors", name="c")


def test_a_hub_id_without_a_network_says_so(pipe):
    with pytest.raises(UnreadableFileError, match="Hub"):
        load_lora(pipe, "nobody/no-such-adapter-here")


@pytest.mark.parametrize("source", [None, 3, ["a"]])
def test_what_is_no_source_is_refused(source, pipe):
    with pytest.raises(CheckpointError, match="cannot load"):
        load_lora(pipe, source)


def test_the_name_is_the_files(adapter, pipe):
    assert load_lora(pipe, adapter(path="my style (v2).safetensors")).name == "my_style__v2_"


def test_save_names_the_adapters_there_are(adapter, pipe, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(ConfigError, match="attach"):
        save_lora(pipe, out)
    file = adapter()
    load_lora(pipe, file, name="a")
    load_lora(pipe, file, name="b")
    for kwargs, error, said in (
        ({}, ConfigError, "a, b"),
        ({"name": "c"}, UnknownNameError, "a, b"),
        ({"name": "a", "format": "koya"}, UnknownNameError, "kohya"),
    ):
        with pytest.raises(error, match=said):
            save_lora(pipe, out, **kwargs)
    assert not out.exists()


@every_format
def test_a_model_that_no_table_names_can_be_saved_in_its_own_names_alone(format, tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    attach(model, LoraConfig(r=1), targets="full")
    if format == "diffusers":
        save_lora(model, tmp_path / "a.safetensors", format=format)
        unload(model)
        report = load_lora(model, tmp_path / "a.safetensors")
        assert (report.matched, report.family) == (("0",), "")
        return
    with pytest.raises(CannotConvertError, match=r"'0'.*These formats can: diffusers, peft, lycoris"):
        save_lora(model, tmp_path / "a.safetensors", format=format)
    assert list(tmp_path.iterdir()) == []


# ---- and off again


def test_loading_and_unloading_leaves_nothing_behind(adapter, pipe, trace):
    file = adapter()
    before = trace(pipe.unet, pipe.text_encoder)

    def cycle():
        load_lora(pipe, file, name="a")
        load_lora(pipe, file, name="b")
        unload(pipe, "a")
        unload(pipe)

    def counts():
        gc.collect()
        return len(gc.get_objects())

    for _ in range(5):
        cycle()
    objects = counts()
    for _ in range(200):
        cycle()
    assert counts() - objects < 100  # a leak would leave at least one object a cycle
    assert trace(pipe.unet, pipe.text_encoder) == before


def test_a_mix_that_stays_does_not_grow(adapter, pipe):
    from diffpeft.model.attach import mix_of

    file = adapter()
    load_lora(pipe, file, name="stays")
    layers = mix_of(pipe.unet).layers
    for _ in range(5):
        load_lora(pipe, file, name="a")
        unload(pipe, "a")
    assert mix_of(pipe.unet).layers == layers


def test_a_file_may_vanish_after_it_was_loaded(adapter, pipe, tmp_path):
    file = adapter()
    want = load_file(file)
    load_lora(pipe.unet, file, name="a")
    file.unlink()
    save_lora(pipe.unet, tmp_path / "b.safetensors", format="kohya")
    same(load_file(tmp_path / "b.safetensors"), want)


def test_pipelines_that_share_models_share_their_adapters(adapter, pipe):
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    load_lora(pipe, adapter(), weight=0.5)
    assert get_adapters(other) == get_adapters(pipe)
    set_adapters(other, {"style": 0.2})
    assert get_adapters(pipe)["style"].strength == 0.2
    unload(other)
    assert get_adapters(pipe) == {}


def test_the_pipeline_object_is_untouched(adapter, pipe):
    before = dict(vars(pipe))
    load_lora(pipe, adapter())
    assert dict(vars(pipe)) == before
    with pytest.raises(AdapterStateError, match="style"):
        load_lora(pipe, adapter())
    unload(pipe)
    assert dict(vars(pipe)) == before


def test_an_adapter_may_be_loaded_without_being_active(pipe, image):
    """A server loads many, and draws with those that it names."""
    plain = image(pipe)
    report = load_lora(pipe, lora(), adapter_name="a", active=False)
    status = get_adapters(pipe)["a"]
    assert report.name == "a" and report.matched
    assert not status.active and status.strength == 0.0
    assert torch.equal(image(pipe), plain)
    load_lora(pipe, lora(), name="b", weight=0.5)
    load_lora(pipe, lora(), name="c", active=False, weight=0.7)
    assert [name for name, status in get_adapters(pipe).items() if status.active] == ["b"]
    set_adapters(pipe, {"a": 1.0})
    assert get_adapters(pipe)["a"].active and not torch.equal(image(pipe), plain)
    unload(pipe)
    assert torch.equal(image(pipe), plain)
