"""Modules that are trained whole, as code sees them that reads their tensors or the modules inside."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten
from transformers.utils import ModelOutput

import diffpeft
from diffpeft import AdapterStateError, LoraConfig, get_peft_model

SAME = dict(rtol=1e-6, atol=1e-6)


class Reader(nn.Module):
    """A model that never calls its head: it reads it, in a way of its own."""

    def __init__(self, way: str):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.body = way, nn.Linear(6, 6)
        self.head = {
            "weight": lambda: nn.Linear(6, 4),
            "buffer": lambda: nn.BatchNorm1d(6),
            "items": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
            "attribute": lambda: nn.Sequential(),
        }[way]()
        if way == "attribute":
            self.head.dense = nn.Linear(6, 4)

    def forward(self, x):
        x = self.body(x)
        if self.way == "weight":
            return F.linear(x, self.head.weight, self.head.bias)
        if self.way == "buffer":
            return x * self.head.running_var + self.head.weight
        if self.way == "attribute":
            return F.linear(x, self.head.dense.weight)
        for i, part in enumerate(self.head):
            x = part(x) + 0 * self.head[i].__class__.__name__.startswith("x")
        return x


WAYS = ["weight", "buffer", "items", "attribute"]
x = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))


def wrapped_of(lib, way, names=("default",)):
    fields = dict(r=2, target_modules=["body"], modules_to_save=["head"])
    made = lib.get_peft_model(Reader(way), lib.LoraConfig(**fields), adapter_name=names[0])
    for name in names[1:]:
        made.add_adapter(name, lib.LoraConfig(**fields))
    return made


def copies(wrapped, name="default"):
    return wrapped.get_base_model().head._modules["copies"][name]


def spread(wrapped, names=("default",)):
    for k, name in enumerate(names):
        for p in copies(wrapped, name).parameters():
            p.data += k + 1.0
        for b in copies(wrapped, name).buffers():
            b.data = b + k + 1
    return wrapped


def with_copy(way, wrapped, name="default"):
    """The plain model with a copy in the head's place."""
    model = Reader(way)
    model.head = copies(wrapped, name)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_who_reads_a_module_reads_the_acting_copy(way):
    wrapped, base = spread(wrapped_of(diffpeft, way)), Reader(way)
    torch.testing.assert_close(wrapped(x), with_copy(way, wrapped)(x), **SAME)
    assert not torch.allclose(wrapped(x), base(x))
    wrapped(x).sum().backward()
    assert sum(float(p.grad.abs().sum()) for p in copies(wrapped).parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in base_of(wrapped).values())
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(x), base(x))
    assert torch.equal(wrapped.unload()(x), base(x))


def base_of(wrapped):
    return {k: p for k, p in wrapped.get_base_model().head.named_parameters() if not k.startswith("copies.")}


CONTAINERS = {
    "dict": lambda: nn.ModuleDict({"a": nn.Linear(6, 4)}),
    "list": lambda: nn.ModuleList([nn.Linear(6, 4)]),
    "parameters": lambda: nn.ParameterList([nn.Parameter(torch.zeros(3))]),
    "parameters by name": lambda: nn.ParameterDict({"a": nn.Parameter(torch.zeros(3))}),
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("second", [False, True])
def test_a_container_has_no_copies(kind, second):
    for lib in (peft, diffpeft):
        model = Reader("weight")
        model.head = CONTAINERS[kind]()
        config = lib.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
        if second:
            model = lib.get_peft_model(model, lib.LoraConfig(r=2, target_modules=["body"]))
        with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
            model.add_adapter("b", config) if second else lib.get_peft_model(model, config)
        if lib is diffpeft:
            assert not any("copies" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("names", [["head"], ["ead"], ["body.head"], ["1.head", "x"], ["no"]])
def test_the_modules_whose_names_end_so_are_trained_whole_as_in_peft(names):
    def made():
        torch.manual_seed(0)
        inner = nn.ModuleDict({"head": nn.Linear(4, 4), "forehead": nn.Linear(4, 4), "headless": nn.Linear(4, 4)})
        return nn.ModuleDict(
            {"body": inner, "1": copy.deepcopy(inner), "body_head": nn.Linear(4, 4), "w": nn.Linear(4, 4)}
        )

    keys = []
    for lib in (peft, diffpeft):
        wrapped = lib.get_peft_model(made(), lib.LoraConfig(r=2, target_modules=["w"], modules_to_save=list(names)))
        keys.append({*lib.get_peft_model_state_dict(wrapped)})
    assert keys[0] == keys[1]


def test_gradients_are_peft_s():
    found = []
    for lib in (peft, diffpeft):
        wrapped = wrapped_of(lib, "weight")
        wrapped(x).square().sum().backward()
        grads = [p.grad for n, p in wrapped.named_parameters() if p.requires_grad and "head" in n]
        found.append(grads)
    assert len(found[0]) == len(found[1]) == 2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **SAME)


@pytest.mark.parametrize("way", WAYS)
def test_each_adapter_has_its_own_and_rows_cannot_differ_in_what_is_read(way):
    names = ("a", "b")
    wrapped = spread(wrapped_of(diffpeft, way, names), names).eval()
    for name in names:
        wrapped.set_adapter(name)
        torch.testing.assert_close(wrapped(x), with_copy(way, wrapped, name).eval()(x), **SAME)
    same = wrapped(x, adapter_names=["a"] * 3)
    torch.testing.assert_close(same, with_copy(way, wrapped, "a").eval()(x), **SAME)
    assert torch.equal(wrapped(x, adapter_names=["__base__"] * 3), Reader(way).eval()(x))
    with pytest.raises(AdapterStateError, match="batch for each adapter"):
        wrapped(x, adapter_names=["a", "b", "__base__"])


def test_what_rows_differ_in_still_tells_its_shape_dtype_and_device():
    class Asking(Reader):
        def forward(self, x):
            weight = self.head.weight
            assert (weight.dtype, weight.device.type, weight.shape, len(weight)) == (x.dtype, "cpu", (4, 6), 4)
            return self.head(self.body(x).to(self.head.weight.dtype))

    fields = dict(r=2, target_modules=["body"], modules_to_save=["head"])
    wrapped = get_peft_model(Asking("weight"), LoraConfig(**fields)).eval()
    copies(wrapped).weight.data += 1
    got = wrapped(x, adapter_names=["default", "__base__", "default"])
    assert torch.equal(got[1], Asking("weight")(x)[1])
    torch.testing.assert_close(got[::2], wrapped(x)[::2], **SAME)


def test_keys_dtypes_copies_and_pickles_know_nothing_of_it():
    wrapped = spread(wrapped_of(diffpeft, "weight"))
    plain, like = wrapped.get_base_model(), Reader("weight")
    own = {k: t for k, t in plain.state_dict().items() if "copies" not in k and "adapters" not in k}
    assert {k: t.tolist() for k, t in own.items()} == {k: t.tolist() for k, t in like.state_dict().items()}
    names = [n for n, _ in plain.named_parameters()]
    assert {"head.weight", "head.bias", "head.copies.default.weight"} <= {*names} and len(names) == len({*names})
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(other(x), wrapped(x))
        assert other.get_base_model().head.weight is copies(other).weight
    plain.load_state_dict({**plain.state_dict(), "head.weight": torch.zeros(4, 6)})
    assert plain.head._parameters["weight"].abs().sum() == 0 and copies(wrapped).weight.abs().sum() > 0
    wrapped.to(torch.float64)
    assert plain.head._parameters["weight"].dtype == plain.head.weight.dtype == torch.float64
    assert wrapped(x.double()).dtype == torch.float64


def test_compiled_code_reads_the_copy_too():
    wrapped = spread(wrapped_of(diffpeft, "weight"))
    compiled = torch.compile(wrapped.get_base_model(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wrapped(x), **SAME)
    with wrapped.disable_adapter():
        torch.testing.assert_close(compiled(x), Reader("weight")(x), **SAME)


def test_multi_head_attention_reads_the_copy_of_its_projection():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.proj, self.attention = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            y = self.proj(x)
            return self.attention(y, y, y)[0]

    found = []
    for lib in (peft, diffpeft):
        fields = dict(r=2, target_modules=["proj"], modules_to_save=["attention.out_proj"])
        wrapped = lib.get_peft_model(Net(), lib.LoraConfig(**fields))
        wrapped(x[None]).square().sum().backward()
        found.append([p.grad for n, p in wrapped.named_parameters() if p.requires_grad and "out_proj" in n])
    assert all(g is not None for grads in found for g in grads)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **SAME)


Pair = collections.namedtuple("Pair", "y z")


@dataclasses.dataclass
class Record:
    y: torch.Tensor
    z: object = None


@dataclasses.dataclass
class Output(ModelOutput):
    y: torch.Tensor | None = None
    z: object = None


class Giving(nn.Module):
    """A module that gives what a function makes of its two results."""

    def __init__(self, make):
        super().__init__()
        self.a, self.b, self.make = nn.Linear(6, 6), nn.Linear(6, 4), make

    def forward(self, x):
        return self.make(self.a(x), self.b(x))


GIVEN = {
    "a tuple": lambda y, z: (y, z),
    "a list": lambda y, z: [y, z],
    "a named tuple": Pair,
    "a dict": lambda y, z: {"y": y, "z": z},
    "a data class": Record,
    "an output of transformers": lambda y, z: Output(y=y, z=(z, None)),
    "nested": lambda y, z: (y, {"z": [z, None, 3, "x"]}),
}
NOT_GIVEN = {
    "a number": lambda y, z: (y, z.mean()),
    "other rows": lambda y, z: (y, z[:1].repeat(7, 1)),
    "an object": lambda y, z: (y, object()),
    "numbers that differ": lambda y, z: (y, float(z.sum())),
}


def mixed(make, module=None):
    """A model that trains a module whole in two adapters, and what it holds: outputs of the parts, if they have names."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.proj, self.part = nn.Linear(6, 6), module or Giving(make)

        def forward(self, x):
            return self.part(self.proj(x))

    wrapped = get_peft_model(Net(), LoraConfig(target_modules=["proj"], modules_to_save=["part"]), "a")
    wrapped.add_adapter("b", LoraConfig(target_modules=["proj"], modules_to_save=["part"]))
    for name, p in wrapped.named_parameters():
        if "copies" in name or "adapters" in name:
            nn.init.normal_(p)
    return wrapped.double().eval()


NAMES = ["a", "b", "__base__", "b"]
ROWS = torch.randn(4, 6, dtype=torch.float64)


@pytest.mark.parametrize("make", GIVEN.values(), ids=GIVEN)
def test_a_batch_with_an_adapter_a_row_is_mixed_in_whatever_holds_tensors(make):
    wrapped = mixed(make)
    together = wrapped(ROWS, adapter_names=NAMES)
    alone = [wrapped(ROWS[row : row + 1], adapter_names=[name]) for row, name in enumerate(NAMES)]
    assert type(together) is type(alone[0])
    leaves, shape = tree_flatten(together)
    for row, other in enumerate(alone):
        others, its_shape = tree_flatten(other)
        assert its_shape == shape
        for leaf, its in zip(leaves, others, strict=True):
            if isinstance(leaf, Record):
                leaf, its = torch.cat([leaf.y, leaf.z], 1), torch.cat([its.y, its.z], 1)
            if isinstance(leaf, torch.Tensor):
                torch.testing.assert_close(leaf[row : row + 1], its, **SAME)
            else:
                assert leaf == its


@pytest.mark.parametrize("make", NOT_GIVEN.values(), ids=NOT_GIVEN)
def test_what_has_no_rows_is_refused_in_peft_s_words(make):
    with pytest.raises(
        TypeError, match="Mixed batching is only supported for the following modules: Linear, Embedding"
    ):
        mixed(make)(ROWS, adapter_names=NAMES)
    assert mixed(make)(ROWS, adapter_names=["a"] * 4)  # nothing to divide


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.GRU(6, 5, batch_first=True),
        lambda: nn.LSTM(6, 5),
        lambda: nn.RNN(6, 5, num_layers=2, batch_first=True),
        lambda: SequenceFirst(6, 2),
    ],
)
def test_modules_whose_states_have_rows_elsewhere_are_refused(module, number):
    """Each of two rows is as long as the states of one layer are: an axis of the right length need not be that of the rows."""
    wrapped = mixed(None, module())
    x = torch.randn(number, 3, 6).double()
    with pytest.raises(
        TypeError, match=r"supported for the following modules: Linear, Embedding, Conv1d, Conv2d, Conv3d\."
    ):
        wrapped(x, adapter_names=(["a", "b"] * 2)[:number])


class SequenceFirst(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)
