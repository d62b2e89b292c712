"""What people do to a pipeline in the wrong order: a right result or a clear error, and in the end the base's own bytes."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffpeft import (
    AdapterStateError,
    ConfigError,
    DiffpeftError,
    LoraConfig,
    NonFiniteError,
    UnknownKeysError,
    UnknownNameError,
    attach,
    combine,
    fuse,
    get_adapters,
    load_lora,
    replace,
    save_lora,
    set_adapters,
    to_lora,
    unfuse,
    unload,
)
from tests.pipeline.states import CONV, adapted, fingerprint, lora, within

NEW, BROKEN = lora(2, 5), {k: t * float("nan") for k, t in lora(2, 5).items()}

# ---- every operation after every other

OPERATIONS = {
    "load": lambda pipe, d: load_lora(pipe, NEW, name="new", weight=0.3),
    "load the same name": lambda pipe, d: load_lora(pipe, NEW, name="a"),
    "load what is broken": lambda pipe, d: load_lora(pipe, BROKEN, name="bad"),
    "activate one": lambda pipe, d: set_adapters(pipe, {"b.c": 0.4}),
    "change a strength": lambda pipe, d: set_adapters(pipe, {"a": 0.2, "b.c": -0.5}),
    "strength NaN": lambda pipe, d: set_adapters(pipe, {"a": float("nan")}),
    "block": lambda pipe, d: within(pipe, {"a": 0.1}),
    "fuse": lambda pipe, d: fuse(pipe),
    "fuse for good": lambda pipe, d: fuse(pipe, keep_base="none"),
    "unfuse": lambda pipe, d: unfuse(pipe),
    "replace": lambda pipe, d: replace(pipe, "a", NEW),
    "unload one": lambda pipe, d: unload(pipe, "a"),
    "unload all": lambda pipe, d: unload(pipe),
    "save": lambda pipe, d: save_lora(pipe, d / "out.safetensors", name="a"),
    "combine": lambda pipe, d: combine(pipe, {"a": 1.0, "b.c": 0.5}, name="both"),
    "to_lora": lambda pipe, d: to_lora(pipe, "b.c", name="flat"),
    "to_lora in place": lambda pipe, d: to_lora(pipe, "b.c", rank=2),
}
ALWAYS = {"load the same name": AdapterStateError, "load what is broken": NonFiniteError, "strength NaN": ConfigError}
# {first: {second that it makes impossible: error}}, beside what is refused always
FUSED = dict.fromkeys(("activate one", "change a strength", "block", "replace", "to_lora in place"), AdapterStateError)
NO_A = ("change a strength", "strength NaN", "block", "replace", "unload one", "save", "combine")
REFUSED = {
    "load": {"load": AdapterStateError},
    "combine": {"combine": AdapterStateError},
    "to_lora": {"to_lora": AdapterStateError},
    "fuse": FUSED,
    "fuse for good": {
        **FUSED,
        **dict.fromkeys(("unfuse", "unload one", "unload all", "combine", "to_lora"), AdapterStateError),
    },
    "unload one": dict.fromkeys(NO_A, UnknownNameError),
    "unload all": {
        **dict.fromkeys((*NO_A, "activate one", "to_lora", "to_lora in place"), UnknownNameError),
        **dict.fromkeys(("fuse", "fuse for good"), AdapterStateError),
    },
}


@pytest.mark.parametrize("first", OPERATIONS)
def test_every_operation_after_every_other(first, fresh, trace, tmp_path):
    pipe, refused = fresh(), {}
    base = trace(pipe.unet, pipe.text_encoder)
    adapted(pipe)
    start = fingerprint(pipe, trace)
    for second in OPERATIONS:
        before = start
        for n, operation in enumerate((first, second)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    OPERATIONS[operation](pipe, tmp_path)
            except DiffpeftError as error:
                refused[operation] = type(error)
                assert fingerprint(pipe, trace) == before, (first, operation)
            else:
                before = {} if n else fingerprint(pipe, trace)
        try:
            unload(pipe)
        except AdapterStateError as error:
            assert "for good" in first + second and "keep_base" in str(error)
            pipe = fresh()
        assert trace(pipe.unet, pipe.text_encoder) == base
        adapted(pipe)
    again = ALWAYS if not first.startswith("unload") else {k: e for k, e in ALWAYS.items() if k != "load the same name"}
    assert refused == {**again, **REFUSED.get(first, {})}


# ---- sequences that other libraries get wrong


def twice(pipe):
    """Fuse what is fused."""
    fuse(pipe)
    with pytest.warns(UserWarning, match="already"):
        fuse(pipe)


def refused(error, call, *args, **kwargs):
    with pytest.raises(error):
        call(*args, **kwargs)


# name: (what is done to a pipeline with `a` and `b.c`, the adapters that are there afterwards)
SEQUENCES = {
    "a name twice": (lambda p: refused(AdapterStateError, load_lora, p, NEW, name="a"), "a b.c"),
    "fuse twice": (twice, "a b.c"),
    "unfuse without fuse": (lambda p: unfuse(p), "a b.c"),
    "fuse, unfuse": (lambda p: (fuse(p), unfuse(p)), "a b.c"),
    "fuse again and again, restore once": (lambda p: (fuse(p, "a"), fuse(p), unfuse(p), unfuse(p)), "a b.c"),
    "delete one that is active": (lambda p: unload(p, "a"), "b.c"),
    "delete one while it is fused": (lambda p: (fuse(p), unload(p, "a")), "b.c"),
    "unload while fused": (lambda p: (fuse(p), unload(p)), ""),
    "another strength while fused": (
        lambda p: (fuse(p), refused(AdapterStateError, set_adapters, p, {"a": 0.1}), unfuse(p)),
        "a b.c",
    ),
    "delete an unknown name": (lambda p: refused(UnknownNameError, unload, p, "c"), "a b.c"),
    "strength NaN": (lambda p: refused(ConfigError, set_adapters, p, {"a": float("nan")}), "a b.c"),
    "strength NaN of one block": (
        lambda p: refused(ConfigError, set_adapters, p, {"a": {"unet": float("inf")}}),
        "a b.c",
    ),
    "load at strength NaN": (lambda p: refused(ConfigError, load_lora, p, NEW, name="c", weight=float("nan")), "a b.c"),
    "a name with dots": (lambda p: load_lora(p, NEW, name="v1.5.0"), "a b.c v1.5.0"),
    "a name of nothing but dots": (lambda p: (load_lora(p, NEW, name="..."), unload(p, "...")), "a b.c"),
    "a name that is a folder above": (lambda p: refused(ConfigError, load_lora, p, NEW, name=".."), "a b.c"),
    "a name that is a path": (lambda p: refused(ConfigError, load_lora, p, NEW, name="../x"), "a b.c"),
    "a second load fails": (lambda p: refused(NonFiniteError, load_lora, p, BROKEN, name="c"), "a b.c"),
    "a second load fails while fused": (lambda p: (fuse(p), refused(NonFiniteError, load_lora, p, BROKEN)), "a b.c"),
    "replace by what is broken": (lambda p: refused(NonFiniteError, replace, p, "a", BROKEN), "a b.c"),
    "attach twice": (
        lambda p: (
            attach(p, LoraConfig(r=2), "c", targets=["conv_in"]),
            refused(AdapterStateError, attach, p, LoraConfig(r=2), "c", targets=["conv_out"]),
        ),
        "a b.c c",
    ),
    "unload twice": (lambda p: (unload(p), unload(p)), ""),
}


@pytest.mark.parametrize("case", SEQUENCES)
def test_a_sequence_ends_well(case, pipe, image, trace):
    """What is there afterwards acts as if it had been loaded in the first place, and comes off without a trace."""
    sequence, left = SEQUENCES[case]
    base = trace(pipe.unet, pipe.text_encoder)
    adapted(pipe)
    if "v1.5.0" in left:
        load_lora(pipe, NEW, name="new")
    for name in set(get_adapters(pipe)) - set(left.replace("v1.5.0", "new").split()):
        unload(pipe, name)
    want = image(pipe)
    unload(pipe)
    adapted(pipe)
    sequence(pipe)
    assert list(get_adapters(pipe)) == left.split()
    torch.testing.assert_close(image(pipe), want, rtol=0, atol=1e-9)  # float64; fused weights are rounded once
    unload(pipe)
    assert trace(pipe.unet, pipe.text_encoder) == base


# ---- weights of the base in an adapter's folder, in PEFT's spelling


@pytest.mark.filterwarnings("ignore:.*target_modules")
@pytest.mark.parametrize("key", ["conv_in.weight", "conv_in.base_layer.weight", "conv_in.base_layer.lora_A.weight"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_key_of_pefts_never_reaches_the_base(key, strict, pipe, trace, tmp_path):
    """PEFT itself puts these tensors into the base, where they stay."""
    before = trace(pipe.unet)
    load_lora(pipe.unet, lora(2, 1, (CONV,)), name="a")
    save_lora(pipe.unet, tmp_path / "a")
    unload(pipe.unet)
    file = tmp_path / "a" / "adapter_model.safetensors"
    extra = {key: torch.zeros(16, 4, 3, 3)}
    if "lora_A" in key:
        extra = {key: torch.zeros(2, 4, 3, 3), key.replace("lora_A", "lora_B"): torch.zeros(16, 2, 1, 1)}
    save_file({**load_file(file), **{f"base_model.model.{k}": t for k, t in extra.items()}}, file)
    with pytest.raises(UnknownKeysError, match="conv_in"):
        load_lora(pipe.unet, tmp_path / "a", strict=strict)
    assert trace(pipe.unet) == before
