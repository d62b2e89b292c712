"""An exception at any step of any operation: what is there is what was there before, or what the finished operation gives, never between."""

from __future__ import annotations

import pytest

from diffpeft import (
    LoHaConfig,
    attach,
    combine,
    converters,
    detach,
    fuse,
    load_lora,
    replace,
    save_lora,
    schedule,
    set_adapters,
    to_lora,
    unfuse,
    unload,
)
from tests.faults import stepped
from tests.pipeline.states import adapted, fingerprint, lora, within

fused = lambda pipe: fuse(pipe)  # noqa: E731
in_place = lambda pipe: (unload(pipe, "b.c"), load_lora(pipe, lora(2, 4), name="low"))  # noqa: E731  # of low rank, both


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Weights of tests are written some rows at a time as well."""
    monkeypatch.setattr("diffpeft.model.weights.LARGE", 1)
    monkeypatch.setattr("diffpeft.model.weights.BLOCK", 256)


# name: (what comes before, the operation on (pipe, folder))
OPERATIONS = {
    "load_lora": (None, lambda pipe, d: load_lora(pipe, d / "new.safetensors", name="new")),
    "load_lora, trainable": (None, lambda pipe, d: load_lora(pipe, d / "new.safetensors", name="new", trainable=True)),
    "set_adapters": (None, lambda pipe, d: set_adapters(pipe, {"b.c": 0.1, "a": {"unet": 0.3, "text_encoder": 0.6}})),
    "set_adapters, scheduled": (None, lambda pipe, d: set_adapters(pipe, {"a": schedule.linear(1.0, 0.2)})),
    "adapters": (None, lambda pipe, d: within(pipe, {"b.c": 0.3})),
    "adapters, one mix a prompt": (None, lambda pipe, d: within(pipe, [{"a": 0.3}, {}])),
    "fuse": (None, lambda pipe, d: fuse(pipe)),
    "fuse a prefix": (None, lambda pipe, d: fuse(pipe, "a")),
    "fuse for good": (None, lambda pipe, d: fuse(pipe, keep_base="none")),
    "fuse for good, where the weights lie": (in_place, lambda pipe, d: fuse(pipe, keep_base="none")),
    "unfuse": (fused, lambda pipe, d: unfuse(pipe)),
    "replace": (None, lambda pipe, d: replace(pipe, "a", d / "new.safetensors")),
    "unload one": (None, lambda pipe, d: unload(pipe, "a")),
    "unload all": (None, lambda pipe, d: unload(pipe)),
    "unload one that is fused": (fused, lambda pipe, d: unload(pipe, "a")),
    "attach": (None, lambda pipe, d: attach(pipe, LoHaConfig(r=2), "new", targets=["conv_in", "conv_out", "fc1"])),
    "detach": (None, lambda pipe, d: detach(pipe, "b.c")),
    "combine": (None, lambda pipe, d: combine(pipe, {"a": 0.7, "b.c": -0.3}, name="new")),
    "to_lora": (None, lambda pipe, d: to_lora(pipe, "b.c", name="new", rank=2)),
    "to_lora in place": (None, lambda pipe, d: to_lora(pipe, "b.c", rank=2)),
    "save_lora": (None, lambda pipe, d: save_lora(pipe, d / "out.safetensors", name="a", format="kohya")),
    "save_lora, a folder": (None, lambda pipe, d: save_lora(pipe.unet, d / "out", name="a")),
}


@pytest.fixture
def folder(tmp_path):
    """What the operations read, and older files where they write."""
    bundle = converters.read(lora(2, 3))
    bundle.metadata["modelspec.trigger_phrase"] = "sks"
    converters.write(bundle, tmp_path / "new.safetensors", format="kohya")
    (tmp_path / "out.safetensors").write_bytes(b"old")
    return tmp_path


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def cells():
    """Each operation with both faults. In `make test` every other one fails: what is prepared and committed is the same for all."""
    for n, operation in enumerate(OPERATIONS):
        for fault in ("fails", "is interrupted"):
            quick = n % 2 == 0 and fault == "fails"
            yield pytest.param(operation, fault, id=f"{operation}-{fault}", marks=() if quick else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("operation, fault", cells())
def test_what_fails_at_any_step_is_not_begun_or_is_done(operation, fault, fresh, trace, folder):
    (prepare, operate), old = OPERATIONS[operation], files(folder)

    def started():
        pipe = adapted(fresh())
        if prepare:
            prepare(pipe)
        return pipe

    def state(pipe):
        return {**fingerprint(pipe, trace), "files": files(folder)}

    def restored():
        for file in files(folder).keys() - old.keys():
            (folder / file).unlink()
        for file, data in old.items():
            (folder / file).write_bytes(data)
        for part in [p for p in folder.iterdir() if p.is_dir()]:
            part.rmdir()

    changes = not operation.startswith("adapters")
    broken, struck = stepped(fault, started, lambda pipe: operate(pipe, folder), state, restored, changes=changes)
    assert not broken, broken[0]
    assert struck > 10
