"""Fusing and unfusing: which orders may be fused, what may happen in between, and that nothing ever drifts."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import (
    AdapterStateError,
    ConfigError,
    LoHaConfig,
    LoraConfig,
    NonFiniteError,
    OFTConfig,
    UnknownNameError,
    adapters,
    attach,
    fuse,
    get_adapters,
    set_adapters,
    unfuse,
    unload,
)
from diffpeft.layers.carried import record_of
from diffpeft.model.merge import merge_for_good
from diffpeft.model.weights import Rewritten
from tests.faults import FAULTS, stepped

EXACT = dict(rtol=1e-12, atol=1e-12)  # float64, sums of a few products
CONFIGS = {"lora": LoraConfig(r=2), "loha": LoHaConfig(r=2), "oft": OFTConfig(oft_block_size=2)}


@pytest.fixture
def model(randomize):
    """Three adapters on two layers: two that commute and one that does not, active in this order."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.Conv1d(8, 4, 1).requires_grad_(False)).requires_grad_(False).double()
    net[1] = nn.Linear(8, 4).double().requires_grad_(False)
    for name, config in CONFIGS.items():
        attach(net, config, name, targets=["0", "1"])
        randomize(net, name)
    set_adapters(net, {"lora": 0.5, "loha": -0.7, "oft": 0.8})
    return net


x = torch.randn(3, 6, dtype=torch.float64)


def weights(model):
    return [p.clone() for n, p in model.named_parameters() if "adapters" not in n]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "names", [None, "lora", ["lora"], ["loha"], ["lora", "loha"], ["lora", "loha", "oft"], ["loha", "lora"]]
)
def test_a_prefix_or_what_commutes_may_be_fused(model, names):
    want, before = model(x), weights(model)
    fuse(model, names)
    assert not equal(weights(model), before)
    torch.testing.assert_close(model(x), want, **EXACT)
    fused = {n for n, status in get_adapters(model).items() if status.fused}
    assert fused == ({*CONFIGS} if names is None else {names} if isinstance(names, str) else set(names))
    assert all(status.active for status in get_adapters(model).values())
    unfuse(model)
    assert equal(weights(model), before)
    torch.testing.assert_close(model(x), want, **EXACT)


@pytest.mark.parametrize("names", ["oft", ["lora", "oft"]])
def test_what_does_not_commute_is_refused(model, names):
    before = weights(model)
    with pytest.raises(AdapterStateError, match="commute"):
        fuse(model, names)
    assert equal(weights(model), before)


def test_further_ones_may_be_fused_from_the_same_base(model):
    want, before = model(x), weights(model)
    fuse(model, "lora")
    fuse(model, "loha")
    step = weights(model)
    fuse(model)
    torch.testing.assert_close(model(x), want, **EXACT)
    unfuse(model)
    assert equal(weights(model), before)
    fuse(model, ["lora", "loha"])
    assert equal(weights(model), step)  # one after the other or at once: the same bytes


def test_fused_strengths_must_stay_and_others_may_change(model):
    fuse(model, "lora")
    fused = weights(model)
    for mix in ({"lora": 0.6}, {}, {"oft": 1.0, "lora": 0.5}):  # the last: oft would have to act before lora
        with pytest.raises(AdapterStateError):
            set_adapters(model, mix)
        with pytest.raises(AdapterStateError), adapters(model, mix):
            pass
    for mix in ({"lora": 0.5}, {"lora": 0.5, "oft": 2.0}, {"loha": 1.0, "lora": 0.5}):
        set_adapters(model, mix)
        got, same = model(x), weights(model)
        unfuse(model)
        torch.testing.assert_close(model(x), got, **EXACT)
        assert equal(same, fused)
        fuse(model, "lora")


def test_another_adapter_may_come_while_one_is_fused(model, randomize):
    fuse(model)
    attach(model, LoraConfig(r=1), "new", targets=["0"])
    randomize(model, "new")
    got = model(x)
    unfuse(model)
    torch.testing.assert_close(model(x), got, **EXACT)


def test_unloading_a_fused_adapter_unfuses_first(model):
    twin = copy.deepcopy(model)
    unload(twin)
    base = weights(twin)
    fuse(model)
    unload(model, "loha")
    assert equal(weights(model), base)
    assert not any(status.fused for status in get_adapters(model).values())
    fuse(model)
    unload(model)
    assert equal(weights(model), base) and type(model[0]) is nn.Linear


def test_without_the_base_there_is_no_way_back(model):
    want = model(x)
    fuse(model, keep_base="none")
    torch.testing.assert_close(model(x), want, **EXACT)
    before = weights(model)
    for call in (unfuse, unload):
        with pytest.raises(AdapterStateError, match="keep_base"):
            call(model)
    assert equal(weights(model), before)


def test_nothing_fused_is_nothing_to_unfuse(model):
    before = weights(model)
    unfuse(model)
    unfuse(nn.Linear(2, 2))
    assert equal(weights(model), before)


def test_fusing_twice_is_fusing_once(model):
    fuse(model)
    before = weights(model)
    with pytest.warns(UserWarning, match="already"):
        fuse(model)
    assert equal(weights(model), before)


def test_a_printed_layer_says_what_is_on_it(model):
    set_adapters(model, {"lora": 0.5, "oft": 0.25})
    fuse(model, "lora")
    text = repr(model[0])
    for said in ("lora=fused at 0.5", "oft=0.25", "loha=inactive", "lora, rank=2, scale=4", "bias=True"):
        assert said in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hundred_cycles_leave_the_bytes(dtype, model):
    model.to(dtype)
    before = weights(model)
    for i in range(100):
        set_adapters(model, {"lora": 0.01 * i, "oft": 1 - 0.01 * i, "loha": -0.5})
        fuse(model, None if i % 3 else "lora")
        if i % 6 == 3:
            fuse(model)
        unfuse(model)
    assert equal(weights(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fused_weight_is_rounded_once(dtype, model):
    model.to(dtype)
    wide = copy.deepcopy(model).double()
    fuse(model)
    fuse(wide)
    for a, b in zip(weights(model), weights(wide), strict=True):
        # fp32 keeps 2^-24 of each intermediate value; what lies that close to a tie may be rounded to the other side, one step away
        steps = (a.double() - b.to(dtype).double()).abs() / (b.abs() * torch.finfo(dtype).eps + 1e-12)
        assert (steps > 0).double().mean() < 0.01 and steps.max() <= 1.01


def test_the_parameters_stay_the_same_objects_and_follow_to(model):
    own = [p for n, p in model.named_parameters() if "adapters" not in n]
    before = weights(model)
    fuse(model)
    model.to(torch.float32)
    unfuse(model)
    assert [p for n, p in model.named_parameters() if "adapters" not in n] == own
    assert equal(weights(model), [p.float() for p in before])


def test_an_adapter_that_is_not_finite_is_refused(model):
    before = weights(model)
    with torch.no_grad():
        model[0].adapters["lora"].lora_A[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="0"):
        fuse(model)
    assert equal(weights(model), before)


def test_a_tied_weight_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    attach(model, LoraConfig(r=2, init_lora_weights=False), targets=["head"])
    with pytest.raises(AdapterStateError, match="tied"):
        fuse(model)


def test_an_offloaded_weight_is_refused():
    from accelerate import cpu_offload

    model = nn.Sequential(nn.Linear(4, 4))
    attach(model, LoraConfig(r=2), targets=["0"])
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(AdapterStateError, match="offloaded"):
        fuse(model)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: fuse(m, "lroa"), UnknownNameError),
        (lambda m: fuse(m, keep_base="disk"), ConfigError),
        (lambda m: (set_adapters(m, {"oft": 1.0}), fuse(m, "lora")), AdapterStateError),
        (lambda m: (set_adapters(m, {}), fuse(m)), AdapterStateError),
        (lambda m: fuse(nn.Linear(2, 2)), AdapterStateError),
    ],
)
def test_what_cannot_be_fused_is_said(model, call, error):
    with pytest.raises(error):
        call(model)


def test_a_component_keeps_its_own_strengths(pipe, image, randomize):
    attach(pipe, LoraConfig(r=2), "a", targets=["attn1.to_q", "fc1"])
    randomize(pipe, "a")
    set_adapters(pipe, {"a": {"unet": 0.5, "text_encoder": 0.0}})
    want = image(pipe)
    fuse(pipe)
    torch.testing.assert_close(image(pipe), want, rtol=1e-9, atol=1e-9)
    unfuse(pipe)
    assert torch.equal(image(pipe), want)
    assert diffpeft.get_adapters(pipe)["a"].strength == {"unet": 0.5, "text_encoder": 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [nn.Linear(640, 1300), nn.Conv2d(256, 320, 3, padding=1)], ids=["linear", "conv"])
def test_large_layers_are_fused_some_rows_at_a_time_to_the_same_weights(layer, dtype, monkeypatch):
    net = nn.Sequential(copy.deepcopy(layer)).to(dtype).requires_grad_(False)
    for name, r in (("a", 3), ("b", 5)):
        attach(net, LoraConfig(r=r, lora_alpha=2, init_lora_weights=False), name, targets=["0"])
    set_adapters(net, {"a": -0.7, "b": 1.3})
    found = []
    monkeypatch.setattr("diffpeft.model.weights.BLOCK", 1 << 14)
    for large in (1 << 14, 1 << 40):
        monkeypatch.setattr("diffpeft.model.weights.LARGE", large)
        fuse(net)
        found.append(net[0].weight.clone())
        unfuse(net)
    # sums of fp32 in another order, rounded once: where they lie on different sides of a step they are one step apart
    close = dict(rtol=torch.finfo(dtype).eps, atol=1e-7)
    torch.testing.assert_close(*found, **close)
    assert not torch.allclose(found[0], net[0].weight, **close)


# ---- where fused weights lie


def large(*layers, adapters=("a",)):
    """Layers with adapters of low rank on all of them, those of strength 0 left out."""
    net = nn.Sequential(*copy.deepcopy(layers)).requires_grad_(False)
    torch.manual_seed(2)
    for name in adapters:
        attach(net, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False), name, targets=[*map(str, range(len(net)))])
    set_adapters(net, dict.fromkeys(adapters, -0.7))
    return net


SHAPES = {
    "linear": lambda: nn.Linear(70, 90),
    "conv": lambda: nn.Conv2d(24, 30, 3),
    "channels last": lambda: nn.Conv2d(24, 30, 3).to(memory_format=torch.channels_last),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def by_rows(monkeypatch):
    """Weights of tests are worked out some rows at a time, in an arena of their own."""
    monkeypatch.setattr("diffpeft.model.weights.LARGE", 1)
    monkeypatch.setattr("diffpeft.model.weights.BLOCK", 1000)
    monkeypatch.setattr("diffpeft.model.arena.SMALL", 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_for_good_gives_the_bytes_of_a_fuse_that_keeps_the_base_in_the_same_memory(shape, dtype, by_rows):
    net = large(SHAPES[shape]().to(dtype))
    kept = copy.deepcopy(net)
    fuse(kept)
    weight, at, version = net[0].weight, net[0].weight.data_ptr(), net[0].weight._version
    fuse(net, keep_base="none")
    assert net[0].weight is weight and weight.data_ptr() == at and weight._version > version
    assert torch.equal(weight, kept[0].weight) and weight.stride() == kept[0].weight.stride()


def _too_strong(net):
    adapter = net[1].adapters["a"]
    adapter.lora_A.data.fill_(10)
    adapter.lora_B.data.fill_(torch.finfo(net[0].weight.dtype).max / 2)


UNFIT = {
    "the base is not finite": lambda net: net[1].weight[3, 3].fill_(float("inf")),
    "a factor is not finite": lambda net: net[1].adapters["a"].lora_B.data[1].fill_(float("nan")),
    "too strong": _too_strong,
}


@pytest.mark.parametrize("why", UNFIT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_not_finite_for_good_is_refused_before_anything_is_written(why, dtype, by_rows):
    net = large(nn.Linear(70, 90), nn.Linear(90, 20)).to(dtype)
    UNFIT[why](net)
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(NonFiniteError):
        fuse(net, keep_base="none")
    assert all(torch.equal(p, q) or p.isnan().any() for p, q in zip(net.parameters(), before, strict=True))
    assert not get_adapters(net)["a"].fused


def test_large_numbers_that_stay_finite_are_fused_for_good(by_rows):
    net = large(nn.Linear(70, 90)).half()
    net[0].weight.fill_(60000.0)  # no bound says that it stays finite
    want = copy.deepcopy(net)
    fuse(want)
    fuse(net, keep_base="none")
    assert torch.equal(net[0].weight, want[0].weight) and net[0].weight.isfinite().all()


def _inference(net):
    with torch.inference_mode():
        net[0].weight = nn.Parameter(net[0].weight.clone(), False)


ELSEWHERE = {
    "another process's": lambda net: net.share_memory(),
    "of inference mode": _inference,
    "another tensor's": lambda net: net.register_buffer("view", net[0].weight.data[3:]),
}


@pytest.mark.parametrize("whose", ELSEWHERE)
def test_memory_that_is_not_the_layers_alone_is_not_written(whose, by_rows):
    net = large(nn.Linear(70, 90))
    ELSEWHERE[whose](net)
    old = net[0].weight.data
    before = old.clone()
    fuse(net, keep_base="none")
    assert torch.equal(old, before) and not torch.equal(net[0].weight, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_fusing_for_good_is_not_begun_or_done_whatever_step_fails(fault, by_rows):
    start = large(nn.Linear(40, 30), nn.Linear(30, 40))  # of two blocks, the second shorter

    def state(net):
        return {
            "weights": [net[n].weight.tolist() for n in (0, 1)],
            "layers": [(type(m), list(m.__dict__), record_of(m).fused) for m in net],
            "listed": list(get_adapters(net).items()),
        }

    every = lambda n: list(range(n // 2, n + 1))  # noqa: E731  # from before the commit on
    started = lambda: copy.deepcopy(start)  # noqa: E731
    broken, struck = stepped(fault, started, lambda net: fuse(net, keep_base="none"), state, chosen=every)
    assert not broken, broken[0]
    assert struck > 100


def test_the_memory_of_fused_weights_serves_the_next_fuse_and_goes_with_the_last_adapter(by_rows):
    net = large(nn.Linear(70, 90), nn.Linear(90, 20), adapters=("a", "b"))
    fuse(net)
    arena = lambda: record_of(net[0]).mix.arena  # noqa: E731
    at = [m.weight.data_ptr() for m in net]
    unfuse(net)
    assert at != [m.weight.data_ptr() for m in net] and arena().is_free
    fuse(net, "a")
    assert at == [m.weight.data_ptr() for m in net] and not arena().is_free
    unload(net, "a")
    assert arena().is_free
    last = weakref.ref(arena())
    unload(net)
    assert last() is None


@pytest.mark.parametrize("holds", [lambda net: net.state_dict(), lambda net: net[1].weight.data[3:]])
def test_numbers_that_somebody_holds_are_not_written_over(holds, by_rows):
    net = large(nn.Linear(70, 90), nn.Linear(90, 20))
    fuse(net)
    held = holds(net)
    before = copy.deepcopy(held)
    unfuse(net)
    set_adapters(net, {"a": 0.3})
    fuse(net)
    for a, b in zip(*([t.values() if isinstance(t, dict) else [t] for t in (held, before)]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_of_a_fused_model_has_memory_of_its_own_and_no_more_than_it_needs(copied, by_rows):
    net = large(nn.Linear(70, 90), nn.Linear(90, 20))
    before = [m.weight.clone() for m in net]
    fuse(net)
    other = copied(net)
    assert record_of(other[0]).mix.arena is None
    for m, n in zip(net, other, strict=True):
        assert torch.equal(m.weight, n.weight) and m.weight.data_ptr() != n.weight.data_ptr()
        assert n.weight.untyped_storage().nbytes() == n.weight.numel() * n.weight.itemsize
    for m in (other, net):
        unfuse(m)
        assert all(torch.equal(p.weight, q) for p, q in zip(m, before, strict=True))


def test_in_inference_mode_weights_are_written_where_they_lie_too(by_rows):
    net = large(nn.Linear(70, 90))
    want, at = copy.deepcopy(net), net[0].weight.data_ptr()
    fuse(want)
    with torch.inference_mode():
        fuse(net, keep_base="none")
    assert torch.equal(net[0].weight, want[0].weight) and net[0].weight.data_ptr() == at


def test_memory_is_found_before_anything_is_written_in_place(by_rows, monkeypatch):
    net = large(nn.Linear(40, 30), nn.Linear(30, 100).double(), nn.Linear(100, 70))
    write, empty = Rewritten.go_on, torch.empty

    def go_on(self):
        monkeypatch.setattr(torch, "empty", None)
        write(self)

    monkeypatch.setattr(Rewritten, "go_on", go_on)
    fuse(net, keep_base="none")
    monkeypatch.setattr(torch, "empty", empty)
    assert get_adapters(net)["a"].fused


def test_a_refused_fuse_keeps_no_memory(by_rows):
    net = large(nn.Linear(70, 90))
    net[0].adapters["a"].lora_B.data.fill_(float("inf"))
    with pytest.raises(NonFiniteError):
        fuse(net)
    assert record_of(net[0]).mix.arena is None


def test_an_adapter_at_strength_0_is_fused_into_large_layers_too(by_rows):
    net = large(nn.Linear(70, 90))
    before = net[0].weight.clone()
    set_adapters(net, {"a": 0.0})
    fuse(net)
    assert torch.equal(net[0].weight, before)
    unfuse(net)
    fuse(net, keep_base="none")
    assert torch.equal(net[0].weight, before)


# ---- what is done to the base while adapters are in it


def _step(net, other):
    net[0].weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([net[0].weight], lr=1e-3)
    net(x.to(net[0].weight.dtype)).square().sum().backward()
    optimizer.step()
    net[0].weight.requires_grad_(False)


def _bias(net, other):
    net[1].bias.data[0] += 0.5


CHANGES = {
    "load_state_dict": lambda net, other: net.load_state_dict(other, strict=False),
    "load_state_dict, assigned": lambda net, other: net.load_state_dict(other, strict=False, assign=True),
    "a new parameter": lambda net, other: setattr(net[0], "weight", nn.Parameter(other["0.weight"], False)),
    "a step": _step,
    "one number": lambda net, other: net[0].weight.data[1].mul_(1.5),
    "through data": lambda net, other: setattr(net[0].weight, "data", other["0.weight"]),
    "a bias": _bias,
}
OPERATIONS = {
    "unfuse": unfuse,
    "unload": unload,
    "unload one": lambda net: unload(net, "lora"),
    "fuse more": lambda net: fuse(net),
    "merge for good": merge_for_good,
}


def fused_in_part(model, dtype, randomize):
    """The model in a dtype, with a bias that an adapter changes and all but the last adapter in the weights."""
    attach(model, LoraConfig(r=2, bias="all"), "biased", targets=["0"])
    randomize(model, "biased")
    model.to(dtype)
    set_adapters(model, {"lora": 0.5, "biased": 0.1, "loha": -0.7, "oft": 0.8})
    before = weights(model)
    fuse(model, ["lora", "biased", "loha"])
    return before


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_change_of_the_base_while_it_is_fused_is_noticed(change, operation, dtype, model, randomize):
    fused_in_part(model, dtype, randomize)
    torch.manual_seed(3)
    other = {n: torch.randn_like(p) for n, p in model.named_parameters() if "adapters" not in n}
    CHANGES[change](model, other)
    changed, status = weights(model), get_adapters(model)
    with pytest.raises(AdapterStateError, match="was changed while adapters were fused into it"):
        OPERATIONS[operation](model)
    assert equal(weights(model), changed) and get_adapters(model) == status


HARMLESS = {
    "nothing": lambda net: net,
    "the same numbers": lambda net: (net.load_state_dict(copy.deepcopy(net.state_dict())), net)[1],
    "the same numbers, assigned": lambda net: (net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True), net)[
        1
    ],
    "a copy": copy.deepcopy,
    "a pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "another dtype and back": lambda net: net.to(torch.float64).to(net[0].weight.dtype),
    "a strength of another": lambda net: (
        set_adapters(net, {"lora": 0.5, "biased": 0.1, "loha": -0.7, "oft": 0.1}),
        net,
    )[1],
    "another adapter": lambda net: (attach(net, LoraConfig(r=1), "late", targets=["0"]), net)[1],
    "threads": lambda net: (torch.set_num_threads(2), net)[1],
}


@pytest.mark.parametrize("harmless", HARMLESS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_changes_no_number_does_not_matter(harmless, dtype, model, randomize):
    before = fused_in_part(model, dtype, randomize)
    threads = torch.get_num_threads()
    try:
        net = HARMLESS[harmless](model)
        unfuse(net)
    finally:
        torch.set_num_threads(threads)
    assert equal(weights(net), before)


def test_a_fused_model_may_be_cast(model, randomize):
    before = fused_in_part(model, torch.float32, randomize)
    model.to(torch.bfloat16)
    unfuse(model)
    assert equal(weights(model), [p.to(torch.bfloat16) for p in before])


LARGE = {
    "all, through data": lambda w: w.data.mul_(1.01),
    "a few numbers": lambda w: w[7, 5].mul_(1.5),
    "all of another": lambda w: w.copy_(torch.randn_like(w)),
}


@pytest.mark.parametrize("change", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(96, 128), lambda: nn.Conv2d(32, 32, 3).to(memory_format=torch.channels_last)]
)
def test_a_change_of_a_large_weight_is_noticed(layer, dtype, change, randomize):
    net = nn.Sequential(layer()).to(dtype).requires_grad_(False)
    attach(net, LoraConfig(r=2), targets=["0"])
    randomize(net, dtype=torch.float32)
    before = net[0].weight.clone()
    fuse(net)
    after = net[0].weight.clone()
    unfuse(net)
    assert torch.equal(net[0].weight, before)
    fuse(net)
    LARGE[change](net[0].weight)
    with pytest.raises(AdapterStateError, match="was changed"):
        unfuse(net)
    net[0].weight.copy_(after)
    unfuse(net)
    assert torch.equal(net[0].weight, before)
