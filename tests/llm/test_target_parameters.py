"""`target_parameters`: LoRA on parameters themselves, such as the experts of a mixture in one tensor."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import diffpeft
from diffpeft import (
    AdapterStateError,
    ConfigError,
    LoraConfig,
    NonFiniteError,
    PeftModel,
    ShapeMismatchError,
    UnknownNameError,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from diffpeft.model.fuse import fuse, unfuse
from diffpeft.pipeline.adapters import set_adapters

SAME = dict(rtol=1e-5, atol=1e-5)
IDS = torch.tensor([[3, 5, 9, 20, 3, 50], [1, 2, 7, 9, 60, 4]])
_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class Toy(nn.Module):
    """A parameter of two axes, one of three, and a layer."""

    def __init__(self, turned: bool = False, experts: int = 3):
        super().__init__()
        self.part = _Part(turned, experts)
        self.lin = nn.Linear(8, 8)

    def forward(self, input_ids):
        return self.lin(self.part(torch.nn.functional.one_hot(input_ids % 8, 8).to(self.lin.weight.dtype)))


class _Part(nn.Module):
    def __init__(self, turned: bool, experts: int):
        super().__init__()
        self.is_transposed = turned
        self.flat = nn.Parameter(torch.randn(8, 8))
        self.stack = nn.Parameter(torch.randn(experts, *((8, 12) if turned else (12, 8))))

    def forward(self, x):
        stack = self.stack if self.is_transposed else self.stack.mT
        return ((x @ self.flat.T) @ stack[x.shape[1] % len(stack)])[..., :8]


def toy(**more):
    torch.manual_seed(0)
    return Toy(**more).eval()


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(**_SIZES, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    ).eval()


def gpt_oss():
    torch.manual_seed(0)
    own = dict(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8)
    return GptOssForCausalLM(GptOssConfig(**_SIZES, **own)).eval()


CASES = {
    "mixtral": (mixtral, dict(target_modules=[], target_parameters=EXPERTS)),
    "mixtral, one": (mixtral, dict(target_modules=[], target_parameters=EXPERTS[1:])),
    "mixtral, no modules": (mixtral, dict(target_parameters=EXPERTS[:1])),
    "mixtral, attention too": (mixtral, dict(target_modules=["q_proj"], target_parameters=EXPERTS[:1])),
    "mixtral, router": (mixtral, dict(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])),
    "mixtral, patterns": (
        mixtral,
        dict(
            target_modules=[],
            target_parameters=EXPERTS,
            rank_pattern={"experts.down_proj": 2},
            alpha_pattern={"layers.1.mlp.experts.gate_up_proj": 3},
        ),
    ),
    "gpt-oss": (gpt_oss, dict(target_modules=["q_proj"], target_parameters=EXPERTS)),
    "toy": (toy, dict(target_modules=["lin"], target_parameters=["part.flat", "stack"])),
    "toy, rslora": (toy, dict(target_modules=[], target_parameters=["flat"], use_rslora=True)),
    "toy, turned": (lambda: toy(turned=True), dict(target_modules=[], target_parameters=["stack", "flat"])),
}


def values(tensors, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(tensors[key].shape, generator=generator) * 0.3 for key in sorted(tensors)}


def config(lib, fields):
    return lib.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **fields})


def filled(lib, case, seed=1):
    make, fields = CASES[case]
    wrapped = lib.get_peft_model(make(), config(lib, fields))
    own = values(lib.get_peft_model_state_dict(wrapped), seed)
    lib.set_peft_model_state_dict(wrapped, own)
    return wrapped, own


def out(model, **more):
    with torch.no_grad():
        found = model(input_ids=IDS, **more)
    return getattr(found, "logits", found)


def second(wrapped, case, seed=2):
    wrapped.add_adapter("b", config(diffpeft, CASES[case][1]))
    set_peft_model_state_dict(wrapped, values(get_peft_model_state_dict(wrapped, adapter_name="b"), seed), "b")


@pytest.mark.parametrize("case", CASES)
def test_keys_outputs_and_merged_outputs_are_peft_s(case):
    theirs, own = filled(peft, case)
    ours = get_peft_model(CASES[case][0](), config(diffpeft, CASES[case][1]))
    assert {k: t.shape for k, t in get_peft_model_state_dict(ours).items()} == {k: t.shape for k, t in own.items()}
    result = set_peft_model_state_dict(ours, own)
    assert not result.missing_keys and not result.unexpected_keys
    want, base = out(theirs), out(CASES[case][0]())
    torch.testing.assert_close(out(ours), want, **SAME)
    assert not torch.allclose(want, base, **SAME)
    assert all(torch.equal(t, own[k]) for k, t in get_peft_model_state_dict(ours).items())
    with ours.disable_adapter():
        assert torch.equal(out(ours), base)
    before = out(ours)
    ours.merge_adapter()
    torch.testing.assert_close(out(ours), want, **SAME)
    ours.unmerge_adapter()
    assert torch.equal(out(ours), before)
    torch.testing.assert_close(out(ours.merge_and_unload()), want, **SAME)


@pytest.mark.parametrize("case", ["mixtral", "mixtral, attention too", "gpt-oss", "toy"])
def test_files_go_both_ways(case, tmp_path):
    make, _ = CASES[case]
    theirs, _ = filled(peft, case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(make(), tmp_path / "theirs")
    torch.testing.assert_close(out(ours), out(theirs), **SAME)
    ours.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(out(peft.PeftModel.from_pretrained(make(), tmp_path / "ours")), out(theirs), **SAME)


@pytest.mark.parametrize("case", ["mixtral", "gpt-oss", "toy"])
def test_gradients_are_peft_s(case):
    found = []
    for lib in (peft, diffpeft):
        wrapped, _ = filled(lib, case)
        made = wrapped.train()(input_ids=IDS)
        getattr(made, "logits", made).square().mean().backward()
        grads = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
        assert all(g is not None and g.abs().sum() > 0 for g in grads.values())
        found.append(
            {n.replace(".copies", "").replace(".adapters", "").replace(".default", ""): g for n, g in grads.items()}
        )
    norms = [sorted(float(g.norm()) for g in own.values()) for own in found]
    torch.testing.assert_close(torch.tensor(norms[1]), torch.tensor(norms[0]), rtol=1e-4, atol=1e-7)


def test_one_expert_in_three_axes_is_exact_whichever_way_it_lies():
    """PEFT takes it for a matrix and fails where it is turned."""
    for turned in (False, True):
        net = get_peft_model(
            toy(turned=turned, experts=1), config(diffpeft, dict(target_modules=[], target_parameters=["stack"]))
        )
        own = get_peft_model_state_dict(net)
        A, B = (own[f"base_model.model.part.lora_{n}.weight"] for n in "AB")
        delta = 6 / 4 * (B @ A)
        before = net.base_model.model.part.stack.detach().clone()
        net.merge_adapter()
        want = before[0] + (delta.T if turned else delta)
        torch.testing.assert_close(net.base_model.model.part.stack.detach()[0], want, **SAME)


@pytest.mark.parametrize("fields", [{}, {"init_lora_weights": "gaussian"}])
def test_a_fresh_adapter_changes_nothing(fields):
    wrapped = get_peft_model(mixtral(), LoraConfig(target_modules=[], target_parameters=EXPERTS, **fields))
    assert torch.equal(out(wrapped), out(mixtral()))
    assert all((t.abs().sum() > 0) == ("lora_A" in key) for key, t in get_peft_model_state_dict(wrapped).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_the_exact_bytes(dtype):
    base = {k: t.clone() for k, t in mixtral().to(dtype).state_dict().items()}
    wrapped = get_peft_model(mixtral().to(dtype), config(diffpeft, CASES["mixtral"][1]))
    plain = wrapped.get_base_model()
    for _ in range(3):
        wrapped.merge_adapter()
        assert not torch.equal(
            plain.model.layers[0].mlp.experts.down_proj, base["model.layers.0.mlp.experts.down_proj"]
        )
        wrapped.unmerge_adapter()
        assert all(torch.equal(dict(plain.named_parameters())[k], base[k]) for k, _ in mixtral().named_parameters())
    wrapped.merge_adapter()
    assert all(torch.equal(t, base[k]) for k, t in wrapped.unload().state_dict().items())


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_taking_it_off_leaves_no_trace(how):
    wrapped, _ = filled(diffpeft, "mixtral, attention too")
    plain, like = getattr(wrapped, how)(), mixtral()
    assert list(plain.state_dict()) == list(like.state_dict())
    for (name, a), (_, b) in zip(plain.named_modules(), like.named_modules(), strict=True):
        assert type(a) is type(b) and vars(a).keys() == vars(b).keys(), name
    if how == "unload":
        assert torch.equal(out(plain), out(like))


def test_several_adapters_add_up_in_any_order():
    wrapped, _ = filled(diffpeft, "mixtral")
    alone = out(wrapped)
    second(wrapped, "mixtral")
    assert torch.equal(out(wrapped), alone)
    wrapped.set_adapter("b")
    torch.testing.assert_close(out(wrapped), out(filled(peft, "mixtral", 2)[0]), **SAME)
    base = wrapped.get_base_model()
    set_adapters(base, {"default": 0.5, "b": -1.0})
    both = out(base)
    fuse(base, "b")  # the second of two: they commute
    torch.testing.assert_close(out(base), both, **SAME)
    fuse(base)
    torch.testing.assert_close(out(base), both, **SAME)
    unfuse(base)
    assert torch.equal(out(base), both)
    wrapped.set_adapter("default")
    wrapped.delete_adapter("b")
    assert torch.equal(out(wrapped), alone)


def test_two_active_adapters_are_peft_s_sum():
    ours, _ = filled(diffpeft, "mixtral")
    second(ours, "mixtral")
    ours.set_adapter(["default", "b"])
    theirs, _ = filled(peft, "mixtral")
    theirs.add_adapter("b", config(peft, CASES["mixtral"][1]))
    peft.set_peft_model_state_dict(theirs, values(peft.get_peft_model_state_dict(theirs, adapter_name="b"), 2), "b")
    theirs.base_model.set_adapter(["default", "b"])
    torch.testing.assert_close(out(ours), out(theirs), **SAME)


def test_a_second_adapter_may_have_other_parameters():
    wrapped, _ = filled(diffpeft, "mixtral")
    wrapped.add_adapter("b", config(diffpeft, CASES["mixtral, one"][1]))
    own = get_peft_model_state_dict(wrapped, adapter_name="b")
    assert not any("base_layer" in key for key in own)  # what PEFT's file of this adapter alone has
    set_peft_model_state_dict(wrapped, values(own, 1), "b")
    wrapped.set_adapter("b")
    torch.testing.assert_close(out(wrapped), out(filled(peft, "mixtral, one")[0]), **SAME)


def test_rows_of_a_batch_have_adapters_of_their_own():
    wrapped, _ = filled(diffpeft, "mixtral")
    second(wrapped, "mixtral")
    mixed = out(wrapped, adapter_names=["b", "__base__"])
    wrapped.set_adapter("b")
    torch.testing.assert_close(mixed[0], out(wrapped)[0], **SAME)
    torch.testing.assert_close(mixed[1], out(mixtral())[1], **SAME)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_experts_sees_it(implementation):
    wrapped, _ = filled(diffpeft, "mixtral")
    want = out(filled(diffpeft, "mixtral")[0])
    wrapped.get_base_model().set_experts_implementation(implementation)
    torch.testing.assert_close(out(wrapped), want, **SAME)


def test_training_lowers_the_loss_and_changes_the_adapter_alone():
    wrapped, _ = filled(diffpeft, "mixtral")
    wrapped.train()
    before = {n: p.detach().clone() for n, p in wrapped.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = wrapped(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    changed = {n for n, p in wrapped.named_parameters() if not torch.equal(p, before[n])}
    assert losses[-1] < losses[0] and changed == {n for n, p in wrapped.named_parameters() if p.requires_grad}


def test_a_copy_is_a_model_of_its_own():
    wrapped, _ = filled(diffpeft, "mixtral")
    want, other = out(wrapped), copy.deepcopy(wrapped)
    assert torch.equal(out(other), want)
    other.merge_adapter()
    other.unload()
    assert torch.equal(out(wrapped), want)


def test_a_model_without_a_wrapper_has_it_too():
    plain = inject_adapter_in_model(config(diffpeft, CASES["mixtral"][1]), mixtral())
    wrapped, own = filled(diffpeft, "mixtral")
    set_peft_model_state_dict(plain, {k.removeprefix("base_model.model."): t for k, t in own.items()})
    torch.testing.assert_close(out(plain), out(wrapped), **SAME)
    with pytest.raises(ConfigError, match="target_parameters"):
        inject_adapter_in_model(config(diffpeft, CASES["mixtral"][1]), mixtral(), state_dict=own)


REFUSED = {
    "no list": (dict(target_parameters="mlp.experts.down_proj"), "list of strings"),
    "dropout": (dict(lora_dropout=0.1), "lora_dropout"),
    "dora": (dict(use_dora=True), "use_dora"),
    "a bias": (dict(lora_bias=True), "lora_bias"),
    "another init": (dict(init_lora_weights="pissa"), "init_lora_weights"),
    "one axis": (dict(target_parameters=["input_layernorm.weight"]), r"input_layernorm.weight.*\(32,\)"),
    "a target too": (dict(target_modules=["q_proj"], target_parameters=["q_proj.weight"]), "target_modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    fields, word = REFUSED[case]
    model = mixtral()
    with pytest.raises(ConfigError, match=word):
        get_peft_model(model, LoraConfig(**{"target_modules": [], "target_parameters": EXPERTS, **fields}))
    assert all(type(a) is type(b) for a, b in zip(model.modules(), mixtral().modules(), strict=True))


def test_unknown_names_are_named():
    with pytest.raises(UnknownNameError, match="gate_up_proj"):
        get_peft_model(mixtral(), LoraConfig(target_modules=[], target_parameters=["experts.gate_up_prj"]))
    with pytest.warns(UserWarning, match="gate_up_prj.*Did you mean"):
        get_peft_model(mixtral(), LoraConfig(target_modules=[], target_parameters=[*EXPERTS, "experts.gate_up_prj"]))
    with pytest.raises(ConfigError, match="top-level module is not supported"):
        net = toy().part
        get_peft_model(net, LoraConfig(target_modules=[], target_parameters=["flat"]))


def test_other_methods_refuse_it():
    with pytest.raises(ConfigError, match="target_parameters"):
        get_peft_model(
            mixtral(), diffpeft.AdaLoraConfig(target_modules=["q_proj"], target_parameters=EXPERTS, total_step=10)
        )


def test_broken_tensors_change_nothing():
    wrapped, own = filled(diffpeft, "mixtral")
    before = out(wrapped)
    key = next(iter(own))
    for error, tensor in ((ShapeMismatchError, own[key][:-1]), (NonFiniteError, own[key] / 0)):
        with pytest.raises(error, match="lora_"):
            set_peft_model_state_dict(wrapped, {**own, key: tensor})
    assert torch.equal(out(wrapped), before)


def test_a_merge_that_is_not_finite_is_refused():
    wrapped, _ = filled(diffpeft, "mixtral")
    before = wrapped.get_base_model().state_dict()["model.layers.0.mlp.experts.down_proj"].clone()
    next(p for n, p in wrapped.named_parameters() if "layers.1" in n and p.requires_grad).data.fill_(float("inf"))
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.experts"):
            merge()
    assert torch.equal(wrapped.get_base_model().state_dict()["model.layers.0.mlp.experts.down_proj"], before)


def test_a_parameter_that_another_module_holds_is_untied_while_merged():
    model = mixtral()
    experts = [model.model.layers[i].mlp.experts for i in (0, 1)]
    experts[1].down_proj = experts[0].down_proj
    fields = dict(target_modules=[], target_parameters=["layers.0.mlp.experts.down_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, LoraConfig(**fields))
    shared, before = experts[0]._parameters["down_proj"], experts[0]._parameters["down_proj"].detach().clone()
    want = wrapped(input_ids=IDS).logits
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(input_ids=IDS).logits, want, **SAME)
    assert torch.equal(experts[1]._parameters["down_proj"], before)
    wrapped.unmerge_adapter()
    assert all(e._parameters["down_proj"] is shared for e in experts) and torch.equal(shared, before)


def test_weighted_adapters_refuse_it():
    wrapped, _ = filled(diffpeft, "mixtral")
    second(wrapped, "mixtral")
    with pytest.raises(ConfigError, match=r"does not support targeting nn\.Parameter"):
        wrapped.add_weighted_adapter(["default", "b"], [0.5, 0.5], "both")


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        filled(diffpeft, "mixtral")


# Batches with an adapter a row


def qwen():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    own = dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=8, intermediate_size=48)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **own)).eval()


def llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    own = dict(
        intermediate_size=48, intermediate_size_mlp=48, num_local_experts=2, head_dim=8, interleave_moe_layer_step=1
    )
    return Llama4ForCausalLM(Llama4TextConfig(**_SIZES, **own)).eval()


class Sorted(nn.Module):
    """A mixture whose only expert sees as many tokens as there are, in an order of their own, or as `order` says."""

    def __init__(self, order="sorted"):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.block = nn.Embedding(96, 8), _Block(order)

    def forward(self, input_ids):
        return self.block(self.table(input_ids))


class _Block(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order, self.experts = order, _Expert()

    def forward(self, x):
        flat = x.flatten(0, 1)
        at = {"sorted": flat.sum(-1).argsort(), "rows": torch.arange(len(flat))}[self.order]
        out, total = self.experts(flat[at])
        assert total is None
        return out[at.argsort()].view(x.shape)


class _Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.weight.T, None


MIXED = {
    "mixtral": (mixtral, EXPERTS),
    "mixtral, router": (mixtral, ["mlp.gate.weight", *EXPERTS]),
    "qwen": (qwen, EXPERTS),
    "gpt-oss": (gpt_oss, EXPERTS),
    "one below the other": (lambda: Sorted("rows"), ["experts.weight"]),
    "llama4": (llama4, ["experts.gate_up_proj", "experts.down_proj"]),
    "sorted": (Sorted, ["experts.weight"]),
}
OWN_ORDER = ("llama4", "sorted")  # whose experts see the tokens in another order than the batch has them


@pytest.mark.parametrize("length", [6, 1])
@pytest.mark.parametrize("case", MIXED)
def test_each_row_has_its_adapter_or_the_batch_is_refused(case, length):
    make, targets = MIXED[case]
    fields = dict(target_modules=[], target_parameters=targets)
    wrapped = get_peft_model(make(), config(diffpeft, fields), adapter_name="a").eval()
    wrapped.add_adapter("b", config(diffpeft, fields))
    ids, names = torch.cat([IDS, IDS.flip(0)])[:, :length], ["a", "__base__", "b", "a"]

    def run(**more):
        with torch.no_grad():
            found = wrapped(input_ids=more.pop("ids", ids), **more)
        return getattr(found, "logits", found)

    if case in OWN_ORDER:
        with pytest.raises(AdapterStateError, match=r"experts.*batch for each adapter"):
            run(adapter_names=names)
        with (
            pytest.raises(AdapterStateError, match="batch for each adapter"),
            diffpeft.adapters(wrapped.get_base_model(), [{"a": 1.0}, {"b": 1.0}]),
        ):
            run(ids=ids[:2])
    else:
        mixed = run(adapter_names=names)
        for row, name in enumerate(names):
            want = run(ids=ids[row : row + 1], adapter_names=[name])
            torch.testing.assert_close(mixed[row : row + 1], want, **SAME)
    wrapped.set_adapter("a")
    torch.testing.assert_close(run(adapter_names=["a"] * 4), run(), **SAME)  # nothing to divide
    assert not [m for m in wrapped.modules() if m._forward_pre_hooks]


# ---- parameters that are parametrised


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, W):
        return 2 * W + 1


class Twice(nn.Linear):
    """A linear layer with a second parameter of its own."""

    def __init__(self):
        super().__init__(6, 4)
        self.other = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return super().forward(x) * 0.5 + F.linear(x, self.other)


def parametrised(how):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lin = Twice()
            if how == "spectral norm":
                nn.utils.parametrizations.spectral_norm(self.lin)
            elif how == "weight norm":
                nn.utils.parametrizations.weight_norm(self.lin)
            else:
                nn.utils.parametrize.register_parametrization(self.lin, "weight", Doubled())

        def forward(self, x):
            return self.lin(x)

    return Net().double()


@pytest.mark.parametrize("how", ["a module", "spectral norm", "weight norm"])
@pytest.mark.parametrize("targets", [["lin.weight"], ["lin.weight", "lin.other"]])
def test_a_parametrised_parameter_is_adapted_after_its_parametrisation(how, targets, tmp_path):
    x = torch.randn(3, 6, dtype=torch.float64)
    fields = dict(r=2, lora_alpha=6, target_parameters=targets, init_lora_weights=False)
    state = parametrised(how).state_dict()
    wrapped = get_peft_model(parametrised(how), LoraConfig(**fields)).double()
    assert all(
        torch.equal(t, wrapped.get_base_model().state_dict()[key]) for key, t in state.items()
    )  # it was not read
    theirs = parametrised(how) if how == "weight norm" else None  # for which peft 0.21.2 has no original to put back
    theirs = theirs or peft.get_peft_model(parametrised(how), peft.LoraConfig(**fields)).double()
    if how != "weight norm":
        assert not set_peft_model_state_dict(wrapped, peft.get_peft_model_state_dict(theirs)).unexpected_keys
    for training in (True, False):
        wrapped.train(training), theirs.train(training)
        want = theirs(x)
        if how == "weight norm":
            patch = wrapped.get_base_model().lin.copies.default
            for name, by in {"weight": 0.5, "other": 1.0}.items():
                if f"lin.{name}" in targets:
                    want = want + by * F.linear(x, patch.changed(name, torch.zeros(4, 6).double(), 1.0))
        # peft reads a weight more often, and each time in training spectral norm's vectors take a step
        torch.testing.assert_close(wrapped(x), want, rtol=1e-6, atol=1e-6 if how == "spectral norm" else 1e-10)
    assert not torch.allclose(wrapped(x), parametrised(how).eval()(x))
    wrapped(x).square().sum().backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    with wrapped.disable_adapter():
        again = parametrised(how)
        again.load_state_dict({key: wrapped.get_base_model().state_dict()[key] for key in state})
        torch.testing.assert_close(wrapped(x), again.eval()(x))
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(again, tmp_path).double().eval()
    torch.testing.assert_close(loaded(x), wrapped(x), rtol=1e-6, atol=1e-6)  # files are float32
    assert torch.equal(copy.deepcopy(wrapped)(x), wrapped(x))


def test_a_parametrised_parameter_is_not_merged():
    model = get_peft_model(
        parametrised("a module"), LoraConfig(r=2, target_parameters=["lin.weight"], init_lora_weights=False)
    )
    want = model.double()(torch.ones(1, 6).double())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterStateError, match="its weight is parametrised"):
            merge()
    assert torch.equal(model(torch.ones(1, 6).double()), want)
    plain = model.unload()
    assert type(plain.lin).__name__ == "ParametrizedTwice" and "copies" not in plain.lin._modules


def test_rows_of_a_parametrised_table_are_refused_and_others_are_not_looked_at():
    def make():
        model = nn.Sequential(OrderedDict(emb=nn.Embedding(5, 4), lin=nn.Linear(4, 4), out=nn.Linear(4, 3)))
        nn.utils.parametrizations.spectral_norm(model.out)
        return model

    fields = dict(r=2, target_modules=["lin"], trainable_token_indices={"emb": [1]})
    assert get_peft_model(make(), LoraConfig(**fields))(torch.tensor([1, 2])).shape == (2, 3)
    model = make()
    nn.utils.parametrizations.spectral_norm(model.emb)
    with pytest.raises(AdapterStateError, match="parametrised, and has no rows"):
        get_peft_model(model, LoraConfig(**fields))
