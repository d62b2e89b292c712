"""VeRA against its definition and PEFT, and the tensors that its layers share: one of each, wherever the model goes."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import diffpeft
from diffpeft import converters
from diffpeft.layers.slot import Bank
from diffpeft.methods import Geometry, Spec
from diffpeft.methods.vera import Vera, VeraConfig
from diffpeft.model.state import bundle_of, slots_of

PROJECTIONS = ("vera_A", "vera_B")


class Net(nn.Module):
    """Layers of several widths: PEFT's kinds, and convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.gpt = nn.Linear(12, 8), nn.Linear(8, 20, bias=False), Conv1D(5, 20)
        self.wide, self.grouped = nn.Conv2d(3, 4, (3, 2), padding=1), nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x, image):
        return self.gpt(self.two(torch.tanh(self.one(x)))), self.grouped(torch.tanh(self.wide(image)))


LINEAR, CONV = ["one", "two", "gpt"], ["wide", "grouped"]
INPUT = torch.randn(3, 12), torch.randn(2, 3, 5, 5)


@pytest.fixture
def net():
    return Net().requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Specified to not save|fan_in_fan_out")
        yield


def theirs(net, **fields):
    model = peft.get_peft_model(copy.deepcopy(net), peft.VeraConfig(**{"r": 6, "target_modules": LINEAR, **fields}))
    for key, p in model.named_parameters():
        if "lambda" in key:
            nn.init.normal_(p, std=0.5)
    return model.eval()


def banks(model):
    return [m for m in model.modules() if isinstance(m, Bank)]


def close(a, b, atol=1e-6):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize("key", [0, 77])
def test_the_projections_are_pefts_bit_for_bit(net, key):
    model = theirs(net, projection_prng_key=key)
    diffpeft.attach(net, VeraConfig(r=6, projection_prng_key=key), "a", targets=LINEAR)
    (bank,) = banks(net)
    for role in PROJECTIONS:
        assert torch.equal(bank.tensors[role], getattr(model.base_model, role)["default"])


@pytest.mark.parametrize("saved", [True, False])
def test_files_go_both_ways(net, saved, tmp_path):
    model = theirs(net, save_projection=saved, projection_prng_key=3)
    model.save_pretrained(tmp_path / "a")
    bundle = converters.read(tmp_path / "a", names={"": [*LINEAR]})
    assert bool(bundle.shared) == saved and not bundle.carried
    diffpeft.load_lora(net, tmp_path / "a", name="a")
    with torch.no_grad():
        close(net(*INPUT), model(*INPUT))
        diffpeft.save_lora(net, tmp_path / "b", name="a")
        plain = copy.deepcopy(net)
        diffpeft.unload(plain)
        close(peft.PeftModel.from_pretrained(plain, str(tmp_path / "b")).eval()(*INPUT), model(*INPUT))
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert {f"base_model.{role}" for role in PROJECTIONS} <= a.keys() if saved else not any("vera_A" in k for k in a)
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert config["save_projection"] is saved and config["projection_prng_key"] == 3 and config["r"] == 6


@pytest.mark.parametrize("saved", [True, False])
def test_the_facade_is_pefts(net, saved, tmp_path):
    models = []
    for library in (peft, diffpeft):
        config = library.VeraConfig(r=4, target_modules=LINEAR, save_projection=saved, init_weights=False)
        torch.manual_seed(0)
        models.append(library.get_peft_model(copy.deepcopy(net), config).train())
        optimizer = torch.optim.SGD([p for p in models[-1].parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            models[-1](*INPUT)[0].square().mean().backward()
            optimizer.step(), optimizer.zero_grad()
        models[-1].save_pretrained(tmp_path / library.__name__)
    close(models[0](*INPUT), models[1](*INPUT), 1e-5)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "diffpeft"))
    assert a.keys() == b.keys()
    close(a.values(), (b[key] for key in a), 1e-5)
    again = diffpeft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "peft")
    close(again(*INPUT), models[0](*INPUT))
    state = diffpeft.get_peft_model_state_dict(models[1])
    assert state.keys() == peft.get_peft_model_state_dict(models[0]).keys()
    assert not diffpeft.set_peft_model_state_dict(again, state).unexpected_keys


def test_other_projections_can_be_put_in_place(net, tmp_path):
    diffpeft.attach(net, VeraConfig(r=4, init_weights=False, projection_prng_key=9), "x", targets=LINEAR)
    diffpeft.save_lora(net, tmp_path / "x", name="x")
    want = net(*INPUT)
    diffpeft.unload(net)
    diffpeft.attach(net, VeraConfig(r=4, init_weights=False), "y", targets=LINEAR)
    diffpeft.save_lora(net, tmp_path / "y", name="y")
    diffpeft.unload(net)
    facade = diffpeft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "y")
    diffpeft.set_peft_model_state_dict(facade, load_file(tmp_path / "x/adapter_model.safetensors"))
    close(facade(*INPUT), want)
    diffpeft.load_lora(net, tmp_path / "y", name="y")
    bank = one(net, "y")
    before = [t.data_ptr() for t in bank.tensors.values()]
    with pytest.raises(diffpeft.ShapeMismatchError):  # the file would say another seed than its projections are of
        diffpeft.replace(net, "y", tmp_path / "x")
    diffpeft.attach(net, VeraConfig(r=4, init_weights=False), "z", targets=LINEAR)
    diffpeft.set_adapters(net, {"z": 1.0})
    again = net(*INPUT)
    diffpeft.save_lora(net, tmp_path / "z", name="z")
    diffpeft.unload(net, ["z"])
    diffpeft.replace(net, "y", tmp_path / "z")
    diffpeft.set_adapters(net, {"y": 1.0})
    close(net(*INPUT), again)
    assert before == [t.data_ptr() for t in one(net, "y").tensors.values()]


def test_slots_that_wait_for_their_numbers_have_projections(net, tmp_path):
    model = theirs(net)
    config = diffpeft.VeraConfig(r=6, target_modules=LINEAR)
    empty = diffpeft.get_peft_model(copy.deepcopy(net), config, low_cpu_mem_usage=True)
    diffpeft.set_peft_model_state_dict(empty, peft.get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    close(empty(*INPUT), model(*INPUT))
    report = diffpeft.attach(net, VeraConfig(r=6), "a", targets=LINEAR, dry_run=True)
    assert report.parameters == 3 * 6 + 8 + 20 + 5 and not banks(net)


def test_the_definition_on_every_layer(net):
    diffpeft.attach(net, VeraConfig(r=5, init_weights=False), "a", targets=LINEAR + CONV)
    (bank,) = banks(net)
    A, B = (bank.tensors[role].double() for role in PROJECTIONS)
    assert A.shape == (5, 20) and B.shape == (20, 5)  # the widest and the tallest: 20 columns of gpt, 18 of the kernels
    for name, slot in slots_of(net, "a").items():
        (part,) = slot.parts
        g = part.spec.geometry
        b, d = slot.vera_lambda_b.double(), slot.vera_lambda_d.double()
        want = (torch.diag(b) @ B[: g.out] @ torch.diag(d) @ A[:, : g.columns]).reshape(g.shape)
        p = {role: t.double() for role, t in slot.tensors_of(part).items()}
        torch.testing.assert_close(
            Vera.delta(Vera.prepare(p, part.spec, False), part.spec), want, rtol=0, atol=1e-12, msg=name
        )


@pytest.fixture
def adapted(net):
    diffpeft.attach(net, VeraConfig(r=5, init_weights=False), "a", targets=LINEAR + CONV)
    return net


def one(model, name="a"):
    """The model's only bank, which all slots refer to."""
    (bank,) = banks(model)
    assert all(slot.bank is bank for slot in slots_of(model, name).values())
    assert sum(any(role in key for role in PROJECTIONS) for key in model.state_dict()) == 2
    return bank


MOVES = {
    "to bf16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: (f := io.BytesIO(), torch.save(m, f), f.seek(0), torch.load(f, weights_only=False))[-1],
    "fuse and unfuse": lambda m: (diffpeft.fuse(m), diffpeft.unfuse(m), m)[-1],
}


@pytest.mark.parametrize("move", MOVES)
def test_shared_tensors_stay_one(adapted, move):
    before = adapted(*INPUT)
    moved = MOVES[move](adapted)
    bank = one(moved)
    dtype = {"to bf16": torch.bfloat16, "double": torch.float64}.get(move, torch.float32)
    assert {t.dtype for t in bank.tensors.values()} == {dtype}
    x, image = (t.to(dtype) for t in INPUT)
    close([t.float() for t in moved(x, image)], before, 0.1 if dtype == torch.bfloat16 else 1e-5)


def test_offloaded_it_computes_the_same(adapted):
    from accelerate import cpu_offload

    before = adapted(*INPUT)
    cpu_offload(adapted, execution_device=torch.device("cpu"))
    close(adapted(*INPUT), before)


def test_detaching_leaves_no_trace(net):
    keys, classes = list(net.state_dict()), [type(m) for m in net.modules()]
    for name in "ab":
        diffpeft.attach(net, VeraConfig(r=3), name, targets=["two", "wide"])
    assert len(banks(net)) == 2
    diffpeft.detach(net, "a")
    assert len(banks(net)) == 1
    diffpeft.detach(net, "b")
    assert list(net.state_dict()) == keys and [type(m) for m in net.modules()] == classes


def test_it_mixes_and_becomes_a_lora(adapted):
    diffpeft.attach(adapted, diffpeft.LoraConfig(r=2, init_lora_weights=False), "b", targets=LINEAR + CONV)
    diffpeft.set_adapters(adapted, {"a": 0.7, "b": -0.4})
    want = adapted(*INPUT)
    diffpeft.fuse(adapted)
    close(adapted(*INPUT), want, 1e-5)
    diffpeft.unfuse(adapted)
    lost = diffpeft.to_lora(adapted, "a", name="c")
    assert max(lost.values()) < 1e-5
    diffpeft.combine(adapted, {"a": 0.7, "b": -0.4}, name="d", how="cat")
    for mix in ({"c": 0.7, "b": -0.4}, {"d": 1.0}):
        diffpeft.set_adapters(adapted, mix)
        close(adapted(*INPUT), want, 1e-4)


def test_a_bundle_has_them_once_and_gives_the_deltas(adapted):
    bundle = bundle_of(adapted, "a", "")
    (shared,) = bundle.shared.values()
    assert all(entry.shared is shared for entry in bundle.entries) and {*shared} == {*PROJECTIONS}
    deltas = bundle.deltas()
    base = {e.layer: e.shape for e in bundle.entries}
    assert {layer: tuple(d.shape) for layer, d in deltas.items()} == base


def test_what_is_too_small_or_missing_is_refused(net, tmp_path):
    model = theirs(net)
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(path)
    from safetensors.torch import save_file

    for change, why in (
        ({"base_model.vera_A": tensors["base_model.vera_A"][:, :11].contiguous()}, "too small"),
        ({"base_model.vera_B": tensors["base_model.vera_B"][:, :5].contiguous()}, "rank"),
        ({"base_model.vera_A": None}, "vera_A missing"),
    ):
        save_file({k: t for k, t in {**tensors, **change}.items() if t is not None}, path)
        with pytest.raises(diffpeft.CheckpointError, match=why):
            diffpeft.load_lora(net, tmp_path / "a")
    with pytest.raises(diffpeft.CannotConvertError):
        converters.convert(tmp_path / "a", tmp_path / "b.safetensors", to="lycoris")
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


def test_layers_of_a_kind_that_the_seed_decides():
    spec = Spec(Geometry(4, 6), None, {"projection_prng_key": 5})
    p = {"vera_lambda_b": torch.zeros(4), "vera_lambda_d": torch.zeros(3)}
    a, b = (Vera.bank([(p, spec)]) for _ in range(2))
    assert all(torch.equal(a[role], b[role]) for role in PROJECTIONS) and a["vera_A"].shape == (3, 6)
