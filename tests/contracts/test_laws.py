"""The laws of all methods that need no kind of layer in particular: models of several, copies, threads, compilation, training.

Those of one form on one kind of layer are in test_cells.py.
"""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import shutil
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import AdapterStateError, adapters, attach, detach, set_adapters, unload
from diffpeft.model import plan as planning
from diffpeft.model.state import parameters_of, slots_of
from diffpeft.model.target import layers_of
from tests.contracts.definition import defined, effective
from tests.contracts.kinds import EXACT, FORMS, LINEAR, METHOD_FORMS, Block, blocks, config, fits, give, layer, put
from tests.contracts.pairs import WAYS, every_form, every_kind, every_method, every_way
from tests.pairwise import params


def everything(model):
    """Targets: each layer by its name."""
    return list(layers_of(model))


@every_kind
def test_adapters_compose_in_activation_order(kind, randomize):
    model, x = layer(kind)
    order = []
    for method, form in METHOD_FORMS.items():
        for name, s in ((f"{method}-1", 0.6), (f"{method}-2", -1.2)) if fits(form, kind) else ():
            give(model, form, name)
            randomize(model, name)
            order.append((name, s))
    for mix in (order, order[::-1], order[3:] + order[:3]):
        set_adapters(model, dict(mix))
        torch.testing.assert_close(model(x), defined(model, x, mix), rtol=1e-11, atol=1e-11)  # eighteen factors deep


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.derivative])
def test_the_fast_path_passes_gradcheck(form, randomize):
    model, x = layer("linear tall")
    give(model, form)
    randomize(model)
    slot = slots_of(model, "default")["0"]
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x.requires_grad_(), *slot.parameters()))


@pytest.mark.parametrize("second", [{"lokr_w2": (2, 2)}, {"lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2)}])
def test_a_first_half_that_is_large_is_linear_in_its_strength(second):
    """Larger than on the layers above: there its two factors are used one after the other."""
    model, x = nn.Sequential(nn.Linear(64, 64)).double().requires_grad_(False), torch.randn(3, 64).double()
    shapes = {"lokr_w1_a": (32, 1), "lokr_w1_b": (1, 32), **second}
    put(model, "lokr", {"0": {role: torch.randn(shape).double() for role, shape in shapes.items()}}, alpha=None)
    for s in (1.0, 0.3):
        set_adapters(model, {"default": s})
        torch.testing.assert_close(model(x), defined(model, x, [("default", s)]), **EXACT)


@every_kind
def test_a_layer_keeps_its_identity(kind):
    model, _ = layer(kind)
    base, parameters = type(model[0]), dict(model.named_parameters())
    give(model)
    assert isinstance(model[0], base) and type(model[0]).__name__ == base.__name__
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in parameters.items())
    names = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A", "lora_B")
    assert set(after) - set(parameters) == {f"0.adapters.default.{name}" for name in names}


@pytest.mark.parametrize(
    "name",
    ["a", "style.v1-2_x", "keys", "training", "_modules", "forward", "...", "-", "9", "lora_A", "lora_", "adapters"],
)
def test_any_allowed_name_is_a_module_name(name, trace):
    model = blocks(1)
    before = trace(model)
    attach(model, config("lora"), name, targets=["up"])
    set_adapters(model, {name: 0.5})
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()
    detach(model, name)
    assert trace(model) == before


def test_requires_grad_of_the_base_is_not_touched(pipe):
    for i, p in enumerate(pipe.unet.parameters()):
        p.requires_grad_(i % 2 == 0)
    before = [p.requires_grad for p in pipe.unet.parameters()]
    attach(pipe, config("lora"), targets="attn")
    assert [p.requires_grad for n, p in pipe.unet.named_parameters() if "adapters" not in n] == before
    unload(pipe)
    assert [p.requires_grad for p in pipe.unet.parameters()] == before


def test_a_layer_may_be_called_by_keyword(randomize):
    model, x = layer(LINEAR)
    attach(model, config("lora"), targets=["0"])
    randomize(model)
    assert torch.equal(model[0](input=x), model[0](x))


# ---- all or nothing


def operations(pipe, file):
    """{name: what it does} of everything that commits; the adapter `old` is attached."""
    return {
        "attach": lambda: attach(pipe, config("lora"), "new", targets=["conv_in", "fc1"]),
        "load_lora": lambda: diffpeft.load_lora(pipe, file, name="new"),
        "unload": lambda: unload(pipe, "old"),
        "detach": lambda: detach(pipe, "old"),
        "fuse": lambda: diffpeft.fuse(pipe),
        "to_lora": lambda: diffpeft.to_lora(pipe, "old", name="new", rank=1),
        "to_lora in place": lambda: diffpeft.to_lora(pipe, "old", rank=1),
        "combine": lambda: diffpeft.combine(pipe, {"old": 0.5}, name="new"),
        "set_adapters": lambda: set_adapters(pipe, {"old": {"unet": 0.3, "text_encoder": 0.6}}),
    }


@pytest.fixture
def adapted(pipe, adapter):
    attach(pipe, config("loha"), "old", targets=["conv_in", "time_emb_proj", "fc1"])
    return pipe, adapter()


OPERATIONS = tuple(operations(None, None))
RAISED = (RuntimeError, KeyboardInterrupt, MemoryError)


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o != "set_adapters"])
@pytest.mark.parametrize("error", RAISED)
def test_an_operation_that_fails_at_any_layer_has_changed_nothing(operation, error, adapted, trace, monkeypatch):
    pipe, file = adapted
    before, mixes, enter = trace(pipe.unet, pipe.text_encoder), diffpeft.get_adapters(pipe), planning.enter
    for n in range(1000):
        calls = iter(range(1000))

        def failing(module, state, calls=calls, n=n):
            if next(calls) == n:
                raise error("injected")
            enter(module, state)

        monkeypatch.setattr(planning, "enter", failing)
        try:
            operations(pipe, file)[operation]()
            break
        except error:
            assert trace(pipe.unet, pipe.text_encoder) == before
            assert diffpeft.get_adapters(pipe) == mixes
    assert n >= 2  # layers were reached


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_interrupt_at_any_line_of_a_commit_leaves_the_old_or_the_new_state(operation, adapted, trace):
    pipe, file = adapted
    codes = {planning.Plan.commit.__code__, planning.enter.__code__}
    old = trace(pipe.unet, pipe.text_encoder), diffpeft.get_adapters(pipe)
    for n in range(0, 5000, 5):  # every fifth line: tests/pipeline/test_faults.py goes through the calls
        lines = itertools.count()

        def tracer(frame, event, arg, lines=lines, n=n):
            if frame.f_code in codes and event == "line" and next(lines) == n:
                raise KeyboardInterrupt
            return tracer if frame.f_code in codes or event == "call" else None

        sys.settrace(tracer)
        try:
            operations(pipe, file)[operation]()
            break
        except KeyboardInterrupt:
            assert (trace(pipe.unet, pipe.text_encoder), diffpeft.get_adapters(pipe)) == old
        finally:
            sys.settrace(None)
    assert n >= 5
    assert diffpeft.get_adapters(pipe) != old[1]


def test_a_dry_run_changes_nothing(pipe, trace):
    before, state = trace(pipe.unet, pipe.text_encoder), torch.get_rng_state()
    report = attach(pipe, config("lora"), targets="attn", dry_run=True)
    assert trace(pipe.unet, pipe.text_encoder) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert attach(pipe, config("lora"), targets="attn") == report


# ---- copies

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch.load(io.BytesIO(_saved(m)), weights_only=False),
}


def _saved(model):
    f = io.BytesIO()
    torch.save(model, f)
    return f.getvalue()


@pytest.mark.parametrize("copied", COPIES)
@every_method
def test_a_copy_of_an_adapted_model_is_one_of_its_own(copied, form, randomize, trace):
    model, x = blocks(), torch.randn(2, 8, dtype=torch.float64)
    plain, want = trace(model), model(x)
    give(model, form, targets=everything(model))
    randomize(model)
    set_adapters(model, {"default": {"0": 0.5}})
    mixed = model(x)
    twin = COPIES[copied](model)
    assert torch.equal(twin(x), mixed)
    set_adapters(twin, {})
    assert torch.equal(twin(x), want) and torch.equal(model(x), mixed)
    with adapters(model, {}):
        set_adapters(twin, {"default": {"0": 0.5}})
        assert torch.equal(twin(x), mixed)  # a block of the original is not the copy's
    unload(twin)
    assert torch.equal(twin(x), want)
    assert [t[:3] for t in trace(twin)] == [t[:3] for t in plain]


def test_a_copied_layer_may_lie_in_a_cycle():
    """accelerate's hooks store a method of the layer on the layer."""
    model = blocks(1)
    attach(model, config("lora"), targets=["up"])
    model[0].up.me = model[0].up.forward
    twin = copy.deepcopy(model)
    assert twin[0].up.me.__self__ is twin[0].up


# ---- other libraries


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerates_offloading_keeps_working(when, randomize):
    from accelerate import cpu_offload

    model, x = blocks(), torch.randn(2, 8, dtype=torch.float64)
    twin = copy.deepcopy(model)
    plain = model(x)
    if when == "before":
        cpu_offload(model, execution_device=torch.device("cpu"))
    attach(model, config("lora"), targets=everything(twin))
    randomize(model)
    attach(twin, config("lora"), targets=everything(twin))
    for name, slot in slots_of(model, "default").items():
        for role, t in slot.tensors.items():
            slots_of(twin, "default")[name].tensors[role].data = t.detach().clone()
    if when == "after":
        cpu_offload(model, execution_device=torch.device("cpu"))
    set_adapters(model, {"default": 0.5})
    set_adapters(twin, {"default": 0.5})
    assert torch.equal(model(x), twin(x))
    assert all(p.is_meta for n, p in model.named_parameters() if "adapters" not in n)
    unload(model)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("removed", ["while adapted", "before attach"])
def test_accelerates_hooks_may_be_removed_at_any_time(removed, randomize):
    """accelerate leaves the forward it stored on the layer, as an instance attribute."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model, x = layer(LINEAR)
    plain = model(x)
    add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu"))
    if removed == "before attach":
        remove_hook_from_module(model[0])
    attach(model, config("lora"), targets=["0"])
    randomize(model)
    if removed == "while adapted":
        remove_hook_from_module(model[0])
    torch.testing.assert_close(model(x), defined(model, x, [("default", 1)]), **EXACT)
    unload(model)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize(
    "options",
    [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}],
    ids=["leaf", "block"],
)
def test_diffusers_group_offloading_may_come_after_the_adapter(options, pipe, randomize):
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.tensor([3]), torch.randn(1, 5, 32, dtype=torch.float64)
    plain = pipe.unet(*x).sample
    attach(pipe.unet, config("lora"), targets=["conv_in", "attn1.to_q"])
    randomize(pipe.unet)
    want = pipe.unet(*x).sample
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), **options)
    assert torch.equal(pipe.unet(*x).sample, want)
    unload(pipe.unet)
    assert torch.equal(pipe.unet(*x).sample, plain)


def test_a_hook_of_diffusers_that_is_not_known_is_refused_by_name(pipe):
    from diffusers.hooks import HookRegistry, ModelHook

    HookRegistry.check_if_exists_or_initialize(pipe.unet.conv_in).register_hook(ModelHook(), "a_new_one")
    with pytest.raises(AdapterStateError, match="hook a_new_one is on it"):
        attach(pipe.unet, config("lora"), targets=["conv_in"])


def test_an_offloaded_model_can_be_copied():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, x = layer(LINEAR)
    attach(model, config("lora"), targets=["0"])
    add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_an_unknown_forward_is_refused(trace):
    model, _ = layer(LINEAR)
    model[0].forward = lambda x: x
    before = trace(model)
    with pytest.raises(AdapterStateError, match="forward"):
        attach(model, config("lora"), targets=["0"])
    assert trace(model) == before


def test_detach_refuses_a_class_on_top_of_ours():
    model, _ = layer(LINEAR)
    attach(model, config("lora"), targets=["0"])
    ours = type(model[0])
    model[0].__class__ = type("Sharded", (ours,), {})
    with pytest.raises(AdapterStateError, match="Sharded"):
        detach(model, "default")
    model[0].__class__ = ours
    detach(model, "default")


# ---- threads


def test_two_threads_never_see_each_others_mix(randomize):
    model, x = blocks(), torch.randn(2, 8, dtype=torch.float64)
    for name in ("a", "b"):
        attach(model, config("lora"), name, targets=everything(model))
        randomize(model, name)
    mixes = ({"a": 0.8}, {"b": -0.6}, {"a": 0.1, "b": 0.2})
    wants = []
    for mix in mixes:
        set_adapters(model, mix)
        wants.append(model(x))
    done, wrong = threading.Event(), []

    def generate(mix, want):
        with adapters(model, mix):
            wrong.extend(mix for _ in range(150) if not torch.equal(model(x), want))

    def change():
        while not done.is_set():
            for s in (0.0, 1.0, -1.0):
                set_adapters(model, {"a": s, "b": s})

    threads = [threading.Thread(target=generate, args=pair) for pair in zip(mixes, wants, strict=True)]
    changer = threading.Thread(target=change)
    changer.start()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    done.set()
    changer.join()
    assert not wrong


def test_blocks_nest_and_an_exception_restores_the_mix(randomize):
    model, x = layer(LINEAR)
    plain = model(x)
    attach(model, config("lora"), "a", targets=["0"])
    randomize(model, "a")
    full = model(x)
    with adapters(model, {"a": 2.0}):
        with pytest.raises(ZeroDivisionError):
            with adapters(model, {}):
                assert torch.equal(model(x), plain)
                1 / 0
        torch.testing.assert_close(model(x) - plain, 2 * (full - plain), **EXACT)
    assert torch.equal(model(x), full)


def test_an_adapter_in_use_by_a_block_is_busy():
    model, _ = layer(LINEAR)
    attach(model, config("lora"), "a", targets=["0"])
    attach(model, config("lora"), "b", targets=["0"])
    with adapters(model, {"a": 0.0}):
        with pytest.raises(AdapterStateError, match="busy"):
            unload(model)
        unload(model, "b")
    unload(model, "a")
    assert diffpeft.get_adapters(model) == {}


# ---- dtypes and compilation


def test_gradients_reach_fp32_adapters_through_a_bf16_base():
    model, x = layer(LINEAR, torch.bfloat16)
    attach(model, config("lora"), targets=["0"])
    model(x).sum().backward()
    assert {p.grad.dtype for p in slots_of(model, "default")["0"].parameters()} == {torch.float32}


# aot_eager makes the backward graph too; what it may find differs by the kind of path: low-rank, rotation, product
QUICK_BACKENDS = {"lora": "aot_eager", "oft": "aot_eager", "lokr": "eager", "boft": "eager", "full": "eager"}


@pytest.mark.parametrize(
    ("form", "backend"), params([(f, b) for f in WAYS for b in ("eager", "aot_eager")], QUICK_BACKENDS.items())
)
def test_compiled_equals_eager_and_strengths_do_not_compile_anew(form, backend, randomize):
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    model, x = blocks(2, torch.float32), torch.randn(2, 8)
    for name in ("a", "b"):
        give(model, form, name, targets=everything(model))
        randomize(model, name, torch.float32)
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def check():
        # fp32 keeps 7 digits; the strength is rounded to fp32 before it is scaled, not after, and rotations take other ways
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)

    check()
    with adapters(model, {"b": 0.3}):
        check()
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    for s in (0.1, 0.7, -2.0, 0.0):
        set_adapters(model, {"a": s, "b": {"0": s / 2}})
        check()
        with adapters(model, {"b": -s}):
            check()
    assert dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@every_way
def test_equal_blocks_share_one_compiled_graph(form, randomize):
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    model = blocks(4, torch.float32)
    give(model, form, targets=everything(model))
    for block in model:
        block.compile(backend="eager", fullgraph=True)
    with torch.no_grad():  # else the first block's input needs no gradient and the others' does
        model(torch.randn(2, 8))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert isinstance(model[0], Block)


@pytest.mark.slow  # it compiles C++
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("form", ["oft"])
def test_inductor_gives_what_eager_code_gives(form, randomize):
    torch._dynamo.reset()
    model, x = blocks(1, torch.float32), torch.randn(2, 8)
    give(model, form, targets=everything(model))
    randomize(model, dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    for s in (1.0, 0.3):
        set_adapters(model, {"default": s})
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@every_method
def test_switching_there_and_back_gives_the_same_bits(form, randomize):
    model, x = layer(LINEAR)
    for name in ("a", "b"):
        give(model, form, name)
        randomize(model, name)
    outputs = []
    for name in ("a", "b", "a"):
        set_adapters(model, {name: 0.7})
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


# ---- training


@every_form
def test_training_a_toy_regression_lowers_the_loss_tenfold(form):
    """The target is a layer with an adapter of the same form, so that every method can reach it."""
    model, _ = layer("linear", torch.float32)
    teacher = copy.deepcopy(model)
    give(teacher, form, bias="none") if "biases" in form else give(teacher, form)
    with torch.no_grad():
        for p in slots_of(teacher, "default")["0"].parameters():
            p += 0.3 * torch.randn_like(p)
    give(model, form, bias="none") if "biases" in form else give(model, form)
    x = torch.randn(256, 6)
    want = teacher(x).detach()
    optimizer = torch.optim.Adam(parameters_of(model, "default"), lr=0.02)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - want).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


@every_form
def test_a_step_changes_the_adapter_and_nothing_else(form):
    model = blocks(2).requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = give(model, form, targets=everything(model))
    own = parameters_of(model, "default")
    assert report.parameters == sum(p.numel() for p in own)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own}
    with torch.no_grad():
        for p in own:
            p += 0.1 * torch.randn_like(p)
    was = [p.clone() for p in own]
    model(torch.randn(3, 8, dtype=torch.float64)).square().sum().backward()
    torch.optim.SGD(own, lr=0.1).step()
    assert all(p.grad is not None for p in own) and any(not torch.equal(a, b) for a, b in zip(own, was, strict=True))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("reentrant", [True, False])
@every_form
def test_gradient_checkpointing_gives_the_same_gradients(form, reentrant, randomize):
    from torch.utils.checkpoint import checkpoint

    model, x = blocks(2), torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    give(model, form, targets=everything(model))
    randomize(model)
    own, grads = parameters_of(model, "default"), []
    for run in (lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=reentrant)):
        y = x
        for block in model:
            y = run(block, y)
        y.square().sum().backward()  # a reentrant checkpoint knows no torch.autograd.grad
        grads.append([p.grad.clone() for p in own])
        model.zero_grad()
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_block_and_gradient_checkpointing_exclude_each_other(pipe):
    """Backward runs the layers again, after the block."""
    give(pipe.unet, "lora", targets=["conv_in"])
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    with pytest.raises(AdapterStateError, match="checkpointing"), adapters(pipe, {"default": 0.5}):
        pass
    with torch.no_grad(), adapters(pipe, {"default": 0.5}):
        pass
    pipe.unet.eval()
    with adapters(pipe, {"default": 0.5}):
        pass


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.dropout])
def test_dropout_is_for_training_only_and_checkpointing_replays_it(form, randomize):
    from torch.utils.checkpoint import checkpoint

    model, x = layer(LINEAR)
    give(model, form, **FORMS[form].dropout)
    randomize(model)
    model.eval()
    want = model(x)
    assert torch.equal(model(x), want)
    torch.testing.assert_close(want, defined(model, x, [("default", 1.0)]), **EXACT)
    model.train()
    runs = [model(x) for _ in range(20)]
    assert any(not torch.equal(run, runs[0]) for run in runs)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(run(x).square().sum(), parameters_of(model, "default"), allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


SOME = 1 - 0.5**6  # of six rows at least one is kept; where none is, PEFT divides zero by zero and gives NaN


# a whole module left out lowers the mean, as in PEFT; the others keep it
@pytest.mark.parametrize(
    ("form", "share"),
    [("lora", 1.0), ("dora", 1.0), ("loha", SOME), ("lokr", SOME), ("loha, tucker", 0.5), ("lokr, both full", 0.5)],
)
def test_what_dropout_expects(form, share, randomize):
    model, x = layer(LINEAR)
    plain = model(x)
    give(model, form, **FORMS[form].dropout)
    randomize(model)
    model.eval()
    full = model(x) - plain
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        runs = torch.stack([model(x) - plain for _ in range(4000)])
    # the mean of 4000 runs is off by a 63rd of their spread; five times that is passed once in a million
    spread = runs.std(0) / 4000**0.5
    assert ((runs.mean(0) - share * full).abs() <= 5 * spread + 1e-12).all()


def test_a_module_under_two_names_is_adapted_once(randomize):
    model, x = layer(LINEAR)
    twice = nn.Sequential(model[0], model[0])
    assert attach(twice, config("lora"), targets=["0"]).layers == ("0",)
    randomize(twice)
    assert torch.equal(twice(x), model[0](model[0](x)))
    unload(twice)
    assert type(model[0]) is nn.Linear


def test_part_of_an_adapted_model_is_no_target_of_its_own(trace):
    """One Mix a component: what is taken off half a model could never be taken off the rest."""
    model = blocks()
    attach(model, config("lora"), "a", targets=everything(model))
    before = trace(model)
    for change in (
        lambda: detach(model[0], "a"),
        lambda: attach(model[0], config("lora"), "b", targets=["up"]),
        lambda: set_adapters(model[0], {}),
    ):
        with pytest.raises(AdapterStateError, match="part"):
            change()
        assert trace(model) == before


@pytest.mark.parametrize("form", ["dora", "oft", "lora"])
def test_nothing_kept_outlives_what_it_was_made_of(form, randomize):
    """A tensor put in place of another may get the memory of one before it."""
    model, x = layer(LINEAR)
    give(model, form)
    randomize(model)
    for p in model.parameters():
        p.requires_grad_(False)
    model.eval()
    for _ in range(20):
        for p in model.parameters():
            p.data = torch.randn_like(p)
        with torch.no_grad():
            torch.testing.assert_close(model(x), defined(model, x, [("default", 1.0)]), **EXACT)
    slot = slots_of(model, "default")["0"]
    slot.load_state_dict({k: torch.randn_like(t) for k, t in slot.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(model(x), defined(model, x, [("default", 1.0)]), **EXACT)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@every_method
def test_an_adapter_that_is_off_is_gone_at_once(form):
    """Its memory must not wait for a garbage collection."""
    model, x = layer(LINEAR)
    gc.disable()
    try:
        for _ in range(2):
            give(model, form)
            give(model, form, "other")
            model(x)
            adapter = weakref.ref(slots_of(model, "default")["0"])
            detach(model, "default")
            assert adapter() is None
            detach(model, "other")
    finally:
        gc.enable()


class Rectified(nn.Linear):
    def forward(self, x):
        return torch.relu(super().forward(x))  # which saves its result for backward


class RectifiedConv(nn.Conv2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: Rectified(6, 4), (3, 6)), (lambda: RectifiedConv(4, 6, 3), (2, 4, 5, 5))]
)
@pytest.mark.parametrize("form", ["lora", "lokr", "loha"])
def test_a_subclass_keeps_its_own_forward_and_its_gradients(form, make, shape, randomize):
    model, x = nn.Sequential(make()).double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    base = model(x)
    give(model, form)
    randomize(model)
    delta = effective(model, [("default", 1.0)])[0] - model[0].weight
    op = torch.nn.functional.linear if delta.dim() == 2 else torch.nn.functional.conv2d
    torch.testing.assert_close(model(x), base + op(x, delta), **EXACT)
    (g,) = torch.autograd.grad(model(x).sum(), x)
    (want,) = torch.autograd.grad((base + op(x, delta)).sum(), x)
    torch.testing.assert_close(g, want, **EXACT)
