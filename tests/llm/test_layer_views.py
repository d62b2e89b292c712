"""What PEFT's layers are asked for, asked of ours: any sequence of calls on single layers does what it does in PEFT, and what is read is what PEFT says."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import AdapterStateError, UnknownNameError
from diffpeft.tuners import lora
from diffpeft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from diffpeft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from tests.llm.models import model

peft = pytest.importorskip("peft")
tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")

READ = ("active_adapters", "active_adapter", "disable_adapters", "merged", "merged_adapters", "scaling", "r")


class Net(nn.Module):
    """An embedding, linear layers and convolutions, none of them square."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first = nn.Embedding(11, 6), nn.Linear(6, 5)
        self.conv, self.last = nn.Conv2d(1, 3, (3, 2)), nn.Linear(12, 4, bias=False)

    def forward(self, ids):
        x = self.first(self.table(ids))
        return self.last(self.conv(x[:, None]).relu().flatten(2).mean(-1, keepdim=True).expand(-1, -1, 4).flatten(1))


CASES = {  # config, fields, layers of the first and of the second adapter
    "lora": ("LoraConfig", dict(lora_alpha=3), ["table", "first", "conv", "last"], ["first", "last"]),
    "rslora": ("LoraConfig", dict(lora_alpha=5, use_rslora=True), ["first", "conv"], ["first", "last"]),
    "loha": ("LoHaConfig", dict(alpha=3), ["first", "conv", "last"], ["first"]),
    "lokr": ("LoKrConfig", dict(alpha=5), ["first", "conv", "last"], ["first", "last"]),
    "ia3": ("IA3Config", dict(feedforward_modules=["first"]), ["first", "conv", "last"], ["first", "last"]),
    "oft": ("OFTConfig", dict(r=0, oft_block_size=2), ["first", "last"], ["last"]),
}
SCALED = {"lora", "rslora", "loha", "lokr"}
NO_RANK = {"lokr"}  # two whole halves have none, and their scale is in one of them
INPUT = torch.arange(14).reshape(2, 7) % 11


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """PEFT's model and ours with the same two adapters."""
    name, fields, *layers = CASES[kind]
    nets = []
    for lib in (peft, diffpeft):
        net = Net()
        for number, (adapter, targets) in enumerate(zip("ab", layers, strict=True)):
            own = {key: value for key, value in fields.items() if key != "feedforward_modules"}
            if "feedforward_modules" in fields:
                own["feedforward_modules"] = [t for t in targets if t in fields["feedforward_modules"]]
            rank = {} if kind in ("ia3", "oft") else {"r": 2 + number}
            lib.inject_adapter_in_model(getattr(lib, name)(target_modules=targets, **rank, **own), net, adapter)
        nets.append(net)
    torch.manual_seed(1)
    for adapter in "ab":
        state = peft.get_peft_model_state_dict(nets[0], adapter_name=adapter)
        state = {key: 0.3 * torch.randn(t.shape) + (1 if kind == "ia3" else 0) for key, t in state.items()}
        for lib, net in zip((peft, diffpeft), nets, strict=True):
            lib.set_peft_model_state_dict(net, state, adapter)
    return tuple(nets)


def layers_of(net: nn.Module) -> dict[str, nn.Module]:
    kinds = (BaseTunerLayer, tuners_utils.BaseTunerLayer)
    return {name: m for name, m in net.named_modules() if isinstance(m, kinds)}


def compare(kind: str, theirs: nn.Module, ours: nn.Module) -> None:
    torch.testing.assert_close(ours(INPUT), theirs(INPUT), rtol=1e-4, atol=1e-5)
    assert list(layers_of(ours)) == list(layers_of(theirs))
    for (name, a), b in zip(layers_of(theirs).items(), layers_of(ours).values(), strict=True):
        for what in READ if kind in SCALED - NO_RANK else READ[:5]:
            assert (
                dict(getattr(b, what)) == pytest.approx(getattr(a, what))
                if what in ("scaling", "r")
                else (getattr(b, what) == getattr(a, what))
            ), (name, what)
        trained = {n for n, p in a.named_parameters() if p.requires_grad}
        mine = {n for n, p in b.named_parameters() if p.requires_grad}
        assert [any(f".{x}" in n for n in trained) for x in "ab"] == [
            any(f"adapters.{x}." in n for n in mine) for x in "ab"
        ]
        for adapter in a.scaling if kind in SCALED else ():
            torch.testing.assert_close(b.get_delta_weight(adapter), a.get_delta_weight(adapter), rtol=1e-5, atol=1e-6)


def calls(rng: random.Random, kind: str, layer: nn.Module):
    """A call on a layer that PEFT allows in the state that it is in."""
    if layer.merged:
        return "unmerge", (), {}
    some = rng.sample("ab", rng.randint(0, 2))
    possible = [
        ("set_adapter", (some,), {}),
        ("set_adapter", (rng.choice("ab"),), {"inference_mode": rng.random() < 0.5}),
        ("enable_adapters", (rng.random() < 0.6,), {}),
        ("set_requires_grad", (some, rng.random() < 0.5), {}),
    ]
    if not layer.disable_adapters:
        possible += [
            ("merge", (), {}),
            ("merge", (), {"safe_merge": True, "adapter_names": list(layer.active_adapters)}),
        ]
    if kind in SCALED:
        possible += [
            ("set_scale", (rng.choice("ab"), rng.choice((0.5, 2.0, -1.5))), {}),
            ("scale_layer", (rng.choice((0.5, 3.0)),), {}),
            ("unscale_layer", (rng.choice((None, 2.0)),), {}),
        ]
    return rng.choice(possible)


@pytest.mark.parametrize("kind", CASES)
def test_any_calls_on_layers_do_what_they_do_in_peft(kind):
    theirs, ours = pair(kind)
    compare(kind, theirs, ours)
    rng = random.Random(kind)
    for _ in range(60):
        name = rng.choice([*layers_of(theirs)])
        method, arguments, keywords = calls(rng, kind, layers_of(theirs)[name])
        for net in (theirs, ours):
            getattr(net.get_submodule(name), method)(*arguments, **keywords)
        compare(kind, theirs, ours)


@pytest.mark.parametrize("kind", CASES)
def test_deleting_from_each_layer_leaves_no_trace(kind):
    theirs, ours = pair(kind)
    plain = Net()
    for adapter in "ba":
        for net in (theirs, ours):
            for layer in layers_of(net).values():
                layer.delete_adapter(adapter)
        torch.testing.assert_close(ours(INPUT), theirs(INPUT), rtol=1e-4, atol=1e-5)
    assert not layers_of(ours) and list(ours.state_dict()) == list(plain.state_dict())
    assert {n: type(m) for n, m in ours.named_modules()} == {n: type(m) for n, m in plain.named_modules()} | {"": Net}
    assert not diffpeft.get_adapters(ours)


def test_the_base_layer_is_the_layer_without_adapters():
    _, ours = pair("lora")
    x = torch.randn(3, 6)
    for base in (ours.first.base_layer, ours.first.get_base_layer()):
        assert base.weight is ours.first.weight and type(base) is nn.Linear and not hasattr(base, "base_layer")
        torch.testing.assert_close(base(x), Net().first(x), rtol=0, atol=0)
    delta = ours.first.get_delta_weight("b")
    assert not torch.equal(delta, torch.zeros_like(delta))
    torch.testing.assert_close(ours.first(x), Net().first(x) + x @ delta.T, rtol=1e-5, atol=1e-6)


def test_a_change_of_weights_is_told_for_every_method():
    for kind, (*_, targets) in CASES.items():
        _, ours = pair(kind)
        layer = ours.get_submodule(targets[-1])
        before = layer.weight.detach().clone()
        layer.set_adapter("b")
        delta = layer.get_delta_weight("b").detach()
        layer.merge()
        torch.testing.assert_close(before + delta, layer.weight, rtol=1e-5, atol=1e-6)


def test_deltas_have_gradients():
    _, ours = pair("lora")
    ours.first.get_delta_weight("a").square().sum().backward()
    assert ours.first.adapters["a"].lora_A.grad.abs().sum() > 0


def test_views_are_read_only_and_yield_to_what_a_module_has():
    _, ours = pair("lora")
    with pytest.raises(AdapterStateError, match="set_scale"):
        ours.first.scaling = {"a": 2.0}
    with pytest.raises(TypeError):
        ours.first.scaling["a"] = 2.0
    with pytest.raises(UnknownNameError, match="nope"):
        ours.first.set_adapter("nope")

    class Own(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.scaling, self.r = 7.0, nn.Parameter(torch.ones(1))
            self.merged = nn.Linear(1, 1)

        def get_base_layer(self):
            return "mine"

    net = nn.Sequential(Own())
    diffpeft.inject_adapter_in_model(diffpeft.LoraConfig(target_modules=["0"], modules_to_save=["merged"]), net)
    assert net[0].scaling == 7.0 and isinstance(net[0].r, nn.Parameter) and net[0].get_base_layer() == "mine"
    assert isinstance(net[0].merged, nn.Linear) and net[0].active_adapters == ["default"]
    net[0].scaling = 8.0
    assert net[0].scaling == 8.0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_have_views_of_their_own(copied):
    _, ours = pair("lora")
    other = copied(ours)
    other.first.set_adapter("a")
    other.first.set_scale("a", 0.5)
    assert other.first.active_adapters == ["a"] and ours.first.active_adapters == ["b"]
    assert other.first.scaling["a"] == 0.5 * ours.first.scaling["a"]


def test_kinds_of_layers():
    net = model()
    config = diffpeft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1])
    diffpeft.inject_adapter_in_model(config, net)
    kinds = (
        BaseTunerLayer,
        lora.LoraLayer,
        lora.Linear,
        ModulesToSaveWrapper,
        TrainableTokensWrapper,
        AuxiliaryTrainingWrapper,
    )
    found = {name: [kind.__name__ for kind in kinds if isinstance(m, kind)] for name, m in net.named_modules()}
    base = net.model.layers[0].self_attn
    assert isinstance(base.q_proj, nn.Linear) and not isinstance(base.k_proj, BaseTunerLayer)
    assert found["model.layers.0.self_attn.q_proj"] == ["BaseTunerLayer", "LoraLayer", "LoraLinear"]
    assert found["lm_head"] == ["ModulesToSaveWrapper", "AuxiliaryTrainingWrapper"]
    # PEFT has a layer inside of its wrapper of a table, which is one of these
    assert found["model.embed_tokens"] == ["BaseTunerLayer", "TrainableTokensWrapper", "AuxiliaryTrainingWrapper"]
    wrapped = diffpeft.get_peft_model(model(), diffpeft.IA3Config(task_type="CAUSAL_LM"))
    assert isinstance(wrapped.base_model, diffpeft.IA3Model) and isinstance(wrapped.base_model, BaseTuner)
    assert wrapped.base_model.prefix == wrapped.prefix == "ia3_" and not isinstance(
        wrapped.base_model, diffpeft.LoraModel
    )


def test_a_tuner_is_made_as_in_peft():
    config = dict(r=3, target_modules=["first", "last"], init_lora_weights=False)
    tuners = [lib.LoraModel(Net(), lib.LoraConfig(**config), "a") for lib in (peft, diffpeft)]
    state = peft.get_peft_model_state_dict(tuners[0].model, adapter_name="a")
    diffpeft.set_peft_model_state_dict(tuners[1].model, state, "a")
    torch.testing.assert_close(tuners[1](INPUT), tuners[0](INPUT), rtol=1e-5, atol=1e-6)
    assert tuners[1].active_adapters == ["a"] and list(tuners[1].peft_config) == ["a"]


def test_a_second_injection_is_the_only_active_adapter_and_configs_are_listed():
    nets = pair("lora")
    for net in nets:
        assert list(net.peft_config) == ["a", "b"] and net.peft_config["b"].r == 3
        assert net.first.active_adapters == net.table.active_adapters == ["b"]
    ours = nets[1]
    diffpeft.unload(ours, "a")
    assert list(ours.peft_config) == ["b"]
    diffpeft.unload(ours)
    assert "peft_config" not in vars(ours) and vars(ours).keys() == vars(Net()).keys()


@pytest.mark.parametrize("active", ["a", "b", "c"])
def test_copies_and_rows_are_seen_as_in_peft(active):
    """An adapter that has no copy, or no rows, of a module is not active there."""

    def seen(lib):
        net = nn.ModuleDict({"lin": nn.Linear(4, 4), "head": nn.Linear(4, 4), "emb": nn.Embedding(6, 4)})
        fields = dict(r=2, target_modules=["lin"])
        more = {"a": {"modules_to_save": ["head"]}, "b": {}, "c": {"trainable_token_indices": {"emb": [1, 3]}}}
        wrapped = lib.get_peft_model(net, lib.LoraConfig(**fields, **more["a"]), adapter_name="a")
        for name in "bc":
            wrapped.add_adapter(name, lib.LoraConfig(**fields, **more[name]))
        wrapped.set_adapter(active)
        lin, head, rows = (
            net[name] if lib is diffpeft else wrapped.base_model.model[name] for name in ("lin", "head", "emb")
        )
        assert head.modules_to_save.a is head.modules_to_save["a"] and isinstance(head.modules_to_save.a, nn.Linear)
        rows = rows.token_adapter
        base = wrapped.base_model.model["emb"].original_module.weight
        assert torch.equal(rows.trainable_tokens_original["c"], base[[1, 3]])
        assert rows.trainable_tokens_delta.c is rows.trainable_tokens_delta["c"]
        return {
            "active": [list(part.active_adapters) for part in (lin, head)],
            "rows": active in rows.active_adapters and active == "c",
            "copies": list(head.modules_to_save),
            "index": {name: list(index) for name, index in rows.token_indices.items()},
            "deltas": {name: tuple(delta.shape) for name, delta in rows.trainable_tokens_delta.items()},
            "without": [hasattr(part, "token_adapter") for part in (lin, head)],
        }

    assert seen(diffpeft) == seen(peft)


def test_settings_of_layers_outlive_what_comes_and_goes():
    """Another adapter, a block, the whole model's own ways to switch and to merge."""
    _, ours = pair("lora")
    ours.first.set_adapter(["b", "a"])
    ours.first.set_scale("a", 0.5)
    ours.last.enable_adapters(False)
    before, scaling = ours(INPUT).detach(), dict(ours.first.scaling)

    def unchanged():
        assert ours.first.active_adapters[:2] == ["b", "a"] and dict(ours.first.scaling) == scaling
        assert ours.last.disable_adapters and not ours.first.disable_adapters
        torch.testing.assert_close(ours(INPUT), before, rtol=1e-5, atol=1e-6)

    unchanged()
    diffpeft.attach(ours, diffpeft.LoraConfig(r=2), name="c", targets=["conv"])
    unchanged()
    diffpeft.detach(ours, "c")
    unchanged()
    with diffpeft.adapters(ours, {}):
        torch.testing.assert_close(ours(INPUT), Net()(INPUT), rtol=0, atol=0)
    unchanged()
    diffpeft.fuse(ours)
    torch.testing.assert_close(ours(INPUT), before, rtol=1e-4, atol=1e-5)
    diffpeft.unfuse(ours)
    unchanged()
    ours.last.enable_adapters(True)
    assert not torch.allclose(ours(INPUT), before)
    diffpeft.set_adapters(ours, {"a": 1.0})
    assert ours.first.active_adapters == ours.last.active_adapters == ["a"]
