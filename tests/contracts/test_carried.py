"""Several things of several adapters on one module: slots, a copy of the whole module, rows of a table, a parameter itself.

Law: they act in activation order, W_k = W_{k-1} + s_k (f_k(W_{k-1}) - W_{k-1}); a copy's f is its own weight, and it is there or not. The oracle is
that sum in float64, worked out here; each adapter alone is one of the cells.
"""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import LoHaConfig, LoraConfig, OFTConfig
from diffpeft.layers.carried import effective, record_of
from diffpeft.layers.parameters import ParameterFactors, Stack
from diffpeft.layers.tokens import Tokens
from diffpeft.model.attach import Addition, method_of, plan_attached
from diffpeft.model.fuse import fuse, unfuse
from diffpeft.model.merge import merge_for_good
from diffpeft.model.plan import planned
from diffpeft.pipeline.adapters import adapters, set_adapters, unload

ROWS = [3, 0, 7]
SLOTS = {
    "lora": LoraConfig(r=2, lora_alpha=3, init_lora_weights=False),
    "dora": LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, use_dora=True),
    "loha": LoHaConfig(r=2, alpha=3, init_weights=False),
    "oft": OFTConfig(oft_block_size=2, init_weights=False),
}
KINDS = (*SLOTS, "copy", "rows", "factors")
MODULES = {
    "embedding": lambda: nn.Embedding(10, 6),
    "head": lambda: nn.Linear(6, 10, bias=False),
    "linear": lambda: nn.Linear(6, 10),
}
LACKING = {("embedding", "oft"), ("embedding", "loha")}  # methods that have no form there
PAIRS = [
    (where, one, other)
    for where in MODULES
    for one, other in itertools.permutations(KINDS, 2)
    if not {(where, one), (where, other)} & LACKING and not {one, other} <= {*SLOTS}
]


def build(where):
    torch.manual_seed(0)
    return nn.Sequential(MODULES[where]()).double().requires_grad_(False)


def data(where):
    return torch.tensor([[3, 1, 0], [7, 7, 2]]) if where == "embedding" else torch.randn(2, 3, 6, dtype=torch.float64)


def add(model, where, kind, name):
    """An adapter of a kind on the model's only module."""
    torch.manual_seed(hash_of(kind))
    wholes, patches, chosen, config = {}, {}, {}, LoraConfig(r=2)
    if kind in SLOTS:
        chosen, config = {"0": model[0]}, SLOTS[kind]
    elif kind == "copy":
        wholes = {"0": model[0]}
    elif kind == "rows":
        patches = {"0": (model[0], Tokens(ROWS, torch.randn(len(ROWS), 6, dtype=torch.float64)))}
    else:
        stack, r = Stack.of(model[0], "weight"), 2
        A, B = torch.randn(r, stack.in_, dtype=torch.float64), torch.randn(stack.out, r, dtype=torch.float64)
        patches = {"0": (model[0], ParameterFactors((stack,), {"weight": (A, B)}, {"weight": 0.7}))}
    method = method_of(config, {})
    with planned({"": model}) as plan:
        addition = Addition(name, config, method, wholes=wholes, patches=patches, quiet=True)
        plan_attached(plan, {"": model}, {"": chosen}, addition)
    if kind == "copy":
        for p in record_of(model[0]).copies[name].module.parameters():
            p.data = torch.randn_like(p)
    if kind in SLOTS:
        slot = record_of(model[0]).slots[name].double()
        for p in slot.parameters():
            p.data = p.data + 0.3 * torch.randn_like(p)


def hash_of(kind):
    return KINDS.index(kind) + 1


def expected(model, order):
    """{name: parameter} of the module with the adapters of `order` {name: strength} in it, one after the other."""
    module, record = model[0], record_of(model[0])
    now = {n: p.detach().double() for n, p in module._parameters.items() if p is not None}
    for name, s in order.items():
        if name in record.copies:
            now = {n: p.detach().double() for n, p in record.copies[name].module.named_parameters()} if s else now
        elif name in record.slots:
            then = effective(module, [(record.slots[name], 1.0)], torch.float64, now)
            now = {n: now[n] + s * (then[n].detach() - now[n]) for n in now}
        elif isinstance(patch := record.patches[name], Tokens):
            W = now["weight"].clone()
            W[ROWS] += s * (patch.delta.detach() - W[ROWS])
            now["weight"] = W
        else:
            now["weight"] = now["weight"] + s * 0.7 * patch.lora_B.weight.detach() @ patch.lora_A.weight.detach()
    return now


def run(module, x, parameters):
    return torch.func.functional_call(copy.deepcopy(module), parameters, (x,))


close = dict(rtol=1e-11, atol=1e-11)  # float64; another order of sums
MIXES = ({"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}, {"b": 0.6, "a": -0.7}, {"a": 0.0, "b": 1.0}, {})


@pytest.mark.filterwarnings("ignore:.*smaller than the rank")
@pytest.mark.parametrize(("where", "one", "other"), PAIRS, ids=["-".join(cell) for cell in PAIRS])
def test_what_one_module_carries_acts_in_order(where, one, other, trace):
    plain, model, x = build(where), build(where), data(where)
    before = trace(model)
    add(model, where, one, "a")
    add(model, where, other, "b")
    for mix in MIXES:
        want = run(plain[0], x, expected(model, mix))
        with adapters(model, mix), torch.no_grad():
            torch.testing.assert_close(model(x), want, **close, msg=str(mix))
        set_adapters(model, mix)
        torch.testing.assert_close(model(x), want, **close, msg=str(mix))
    with torch.no_grad(), adapters(model, [{"a": 1.0}, {"b": 0.5}]):
        rows = [run(plain[0], x[i : i + 1], expected(model, m)) for i, m in enumerate(({"a": 1.0}, {"b": 0.5}))]
        torch.testing.assert_close(model(x), torch.cat(rows), **close)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    set_adapters(model, {"a": 1.0, "b": 1.0})
    want = model(x).detach()
    for twin in twins:
        set_adapters(twin, {"a": 1.0, "b": 1.0})
        assert torch.equal(twin(x), want)
    if not {one, other} & {"copy"}:
        fuse(model)
        torch.testing.assert_close(model(x), want, **close)
        unfuse(model)
        assert torch.equal(model(x), want)
    merge_for_good(twins[0])
    torch.testing.assert_close(twins[0](x), want, **close)
    assert type(twins[0][0]) is type(plain[0]) and {*twins[0].state_dict()} == {*plain.state_dict()}
    unload(model, "a")
    torch.testing.assert_close(model(x), run(plain[0], x, expected(model, {"b": 1.0})), **close)
    unload(model)
    assert trace(model) == before


@pytest.mark.filterwarnings("ignore:.*smaller than the rank")
@pytest.mark.parametrize(("where", "one", "other"), PAIRS, ids=["-".join(cell) for cell in PAIRS])
def test_what_one_module_carries_is_trained(where, one, other):
    """The gradient of each tensor is that of the definition, seen by a small step."""
    model, x = build(where), data(where)
    add(model, where, one, "a")
    add(model, where, other, "b")
    set_adapters(model, {"a": 1.0, "b": 0.5})
    weights = torch.randn(x.shape[:2] + (model(x).shape[-1],), dtype=torch.float64)
    (model(x) * weights).sum().backward()
    record = record_of(model[0])
    for name in "ab":
        for p in [p for own in record.modules(name) for p in own.parameters()]:
            if p.grad is None:
                assert name == "a" and other == "copy"  # a copy takes the place of all before it
                continue
            step, data_ = 1e-6 * torch.randn_like(p), p.data
            ends = []
            for sign in (1, -1):
                p.data = data_ + sign * step
                with torch.no_grad():
                    ends.append((run(build(where)[0], x, expected(model, {"a": 1.0, "b": 0.5})) * weights).sum())
            p.data = data_
            if {one, other} & {"dora"}:
                continue  # its norm is taken for a constant by definition
            torch.testing.assert_close((p.grad * step).sum(), (ends[0] - ends[1]) / 2, rtol=1e-5, atol=1e-11)


@pytest.mark.parametrize(("one", "other"), [("copy", "lora"), ("copy", "factors")])
def test_a_copy_before_what_is_fused_is_refused(one, other):
    model = build("linear")
    add(model, "linear", one, "a")
    add(model, "linear", other, "b")
    set_adapters(model, {"a": 1.0, "b": 1.0})
    with pytest.raises(diffpeft.AdapterStateError, match="does not commute"):
        fuse(model, "b")
