"""What is trained after which operation: as in PEFT, read from both reports of the layers."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import nn

import diffpeft


class Net(nn.Module):
    """Layers, two heads and two tables."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.emb2 = nn.Embedding(10, 8), nn.Embedding(6, 8)
        self.lin0, self.lin1, self.head, self.head2 = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)


METHODS = {
    "lora": ("LoraConfig", {}),
    "loha": ("LoHaConfig", {}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
}
KINDS = {
    "layers": (dict(target_modules=["lin0"]), dict(target_modules=["lin0", "lin1"])),
    "a copy each": (
        dict(target_modules=["lin0"], modules_to_save=["head"]),
        dict(target_modules=["lin0"], modules_to_save=["head"]),
    ),
    "other copies": (
        dict(target_modules=["lin0"], modules_to_save=["head"]),
        dict(target_modules=["lin1"], modules_to_save=["head2"]),
    ),
    "a copy of one": (dict(target_modules=["lin0"]), dict(target_modules=["lin0"], modules_to_save=["head"])),
    "rows each": (
        dict(target_modules=["lin0"], trainable_token_indices={"emb": [1, 2]}),
        dict(target_modules=["lin0"], trainable_token_indices={"emb": [2, 3]}),
    ),
    "other rows": (
        dict(target_modules=["lin0"], trainable_token_indices={"emb": [1]}),
        dict(target_modules=["lin0"], trainable_token_indices={"emb2": [1]}),
    ),
    "the second for inference": (dict(target_modules=["lin0"]), dict(target_modules=["lin0"], inference_mode=True)),
    "the first for inference": (dict(target_modules=["lin0"], inference_mode=True), dict(target_modules=["lin0"])),
}
ALIKE = ["a copy each"]  # kinds of the methods beside LoRA


def add(m, c, _):
    m.add_adapter("b", c)


def load(trainable):
    return lambda m, c, folder: m.load_adapter(folder, "b", is_trainable=trainable)


# what is done to a model with adapter a, given b's config and folder
STEPS = {
    "nothing": [],
    "add": [add],
    "add, set": [add, lambda m, *_: m.set_adapter("b")],
    "add, set, set": [add, lambda m, *_: m.set_adapter("b"), lambda m, *_: m.set_adapter("default")],
    "add, set for inference": [add, lambda m, *_: m.set_adapter("b", inference_mode=True)],
    "load": [load(False)],
    "load to train": [load(True)],
    "load, set": [load(False), lambda m, *_: m.set_adapter("b")],
    "load to train, set, unload": [load(True), lambda m, *_: m.set_adapter("b"), lambda m, *_: m.delete_adapter("b")],
    "add, delete the active": [add, lambda m, *_: m.delete_adapter("default")],
    "add, delete the other": [add, lambda m, *_: m.delete_adapter("b")],
    "add, train both": [add, lambda m, *_: m.set_requires_grad(["default", "b"])],
    "add, train none": [add, lambda m, *_: m.set_requires_grad(["default", "b"], requires_grad=False)],
    "train none, add": [lambda m, *_: m.set_requires_grad("default", False), add],
    "merge": [lambda m, *_: m.merge_adapter(), lambda m, *_: m.unmerge_adapter()],
}


def trained(model):
    """{module: {adapter: whether it is trained there}}, and whether anything else is."""
    by_name = {}
    for status in model.get_layer_status():
        by_name.setdefault(status.name.removesuffix(".token_adapter"), {}).update(status.requires_grad)
    by_name = {name: flags for name, flags in by_name.items() if flags}  # PEFT leaves empty layers where an adapter was
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return by_name, total


def run(lib, method, kind, steps, folder, start="fresh"):
    name, fields = METHODS[method]
    first, second = ({**fields, **own} for own in KINDS[kind])
    config = getattr(lib, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if start == "fresh":
            model = lib.get_peft_model(Net(), config(**first))
        else:
            model = lib.PeftModel.from_pretrained(Net(), folder / "a", is_trainable=start == "to train")
        for step in STEPS[steps]:
            step(model, config(**second), folder / "b")
    return trained(model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{(method, kind): a folder with the adapters a and b}."""
    made = {}
    for method, kind in CASES:
        name, fields = METHODS[method]
        for adapter, own in zip("ab", KINDS[kind], strict=True):
            folder = made.setdefault((method, kind), tmp_path_factory.mktemp("adapters"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peft.get_peft_model(Net(), getattr(peft, name)(**fields, **own)).save_pretrained(folder / adapter)
    return made


CASES = [(method, kind) for method in METHODS for kind in KINDS if method == "lora" or kind in ALIKE]


def peft_is_odd(kind, start, steps):
    """Where PEFT leaves a copy, or rows, of the adapter that becomes active aside, trains rows of one that is frozen, or loads no file."""
    aside = {
        "other copies": ("load to train, set, unload", "add, delete the active"),
        "a copy of one": ("add, delete the active",),
    }
    frozen = "rows" in kind and start == "for inference" and steps == "add, delete the other"
    return steps in aside.get(kind, ()) or frozen or (kind == "other rows" and "load" in steps)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_what_is_trained_is_what_peft_trains(method, kind, folders):
    different = {}
    for start in ("fresh", "for inference"):
        for steps in STEPS:
            if peft_is_odd(kind, start, steps):
                by_name, _ = run(diffpeft, method, kind, steps, folders[method, kind], start)
                active = {flag for flags in by_name.values() for flag in flags.values()}
                assert "irregular" not in active and (len(active) == 1 or "load" in steps)
                continue
            theirs, ours = (run(lib, method, kind, steps, folders[method, kind], start) for lib in (peft, diffpeft))
            if theirs != ours:
                different[start, steps] = (theirs, ours)
    assert not different, different
