"""Schedules as functions, and on modules without a pipeline."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import sys
import threading

import pytest
import torch

import diffpeft
from diffpeft import (
    AdapterStateError,
    ConfigError,
    adapters,
    fuse,
    get_adapters,
    load_lora,
    schedule,
    set_adapters,
    unload,
)
from diffpeft.model.attach import detach, mix_of
from diffpeft.model.plan import Plan
from diffpeft.model.root import ROOT
from tests.contracts.kinds import FORMS, LINEAR, METHOD_FORMS, blocks, config, give, layer
from tests.contracts.pairs import every_form
from tests.pairwise import params

EXACT = dict(rtol=0, atol=1e-10)  # float64: the same sums in the same order, or in another one on sizes of 16


@pytest.mark.parametrize(
    "made, at",
    [
        (schedule.linear(1.0, 0.2), {0: 1.0, 0.25: 0.8, 0.5: 0.6, 1: 0.2}),
        (schedule.linear(1.0, 0.2, start=0.0, end=0.6), {0: 1.0, 0.3: 0.6, 0.6: 0.2, 0.9: 0.2}),
        (schedule.linear(-1, 1, start=0.5, end=0.75), {0: -1, 0.5: -1, 0.625: 0.0, 0.75: 1, 1: 1}),
        (schedule.cosine(1.0, 0.0), {0: 1.0, 0.25: (1 + math.sqrt(0.5)) / 2, 0.5: 0.5, 1: 0.0}),
        (schedule.cosine(0.0, 2.0, start=0.2, end=0.4), {0.1: 0.0, 0.3: 1.0, 0.4: 2.0}),
        (schedule.constant(0.7), {0: 0.7, 0.5: 0.7, 1: 0.7}),
        (schedule.steps({0.0: 1.0, 0.5: 0.3}), {0: 1.0, 0.49: 1.0, 0.5: 0.3, 1: 0.3}),
        (schedule.steps({0.5: 0.3, 0.2: -1.0}), {0: -1.0, 0.2: -1.0, 0.5: 0.3}),
    ],
)
def test_values(made, at):
    for fraction, want in at.items():
        assert made.at(fraction) == pytest.approx(want, abs=1e-15)
    assert pickle.loads(pickle.dumps(made)) == made == copy.deepcopy(made) and hash(made) == hash(copy.copy(made))
    with pytest.raises(AttributeError):
        made.first = made.points = 0


def test_ends_are_held_to_the_last_bit():
    made = schedule.linear(0.1, 0.7, start=0.1, end=0.3)
    assert made.at(0.1) == 0.1 and made.at(0.3) == 0.7 and schedule.cosine(0.1, 0.7, end=0.3).at(0.3) == 0.7


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedule.linear(math.nan, 1.0),
        lambda: schedule.linear(1.0, math.inf),
        lambda: schedule.linear(1.0, True),
        lambda: schedule.linear("1", 0.0),
        lambda: schedule.linear(1.0, 0.0, start=0.5, end=0.5),
        lambda: schedule.linear(1.0, 0.0, start=-0.1),
        lambda: schedule.cosine(1.0, 0.0, end=1.1),
        lambda: schedule.cosine(1.0, 0.0, start=math.nan),
        lambda: schedule.constant(None),
        lambda: schedule.steps({}),
        lambda: schedule.steps({1.5: 1.0}),
        lambda: schedule.steps({0.0: math.nan}),
        lambda: schedule.steps([1.0]),
        lambda: schedule.step(math.nan).__enter__(),
    ],
)
def test_a_bad_schedule_is_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_it_is_a_public_name():
    assert diffpeft.schedule is schedule and "schedule" in dir(diffpeft) and "schedule" in diffpeft.__all__


# ---- on a module


def adapted(form, randomize, kind=LINEAR, names=("a",)):
    model, x = layer(kind)
    for name in names:
        give(model, form, name)
        randomize(model, name)
    return model, x


@every_form
def test_a_step_has_the_output_of_its_strength(form, randomize):
    model, x = adapted(form, randomize, names=("a", "b"))
    made = schedule.linear(1.5, -1.5)
    for first in ({"a": made, "b": 0.4}, {"b": schedule.steps({0.5: 0.0, 0.0: 1.0}), "a": made}):
        for fraction in (0.0, 0.25, 0.5, 0.75):
            set_adapters(model, {n: s if isinstance(s, float) else s.at(fraction) for n, s in first.items()})
            want = model(x)
            set_adapters(model, first)
            with schedule.step(fraction):
                assert torch.equal(model(x), want)
                assert torch.equal(model[0](x), want)  # by itself, too


@every_form
def test_strength_0_is_the_base_bit_for_bit(form, randomize):
    model, x = layer(LINEAR)
    plain = model(x)
    give(model, form, "a")
    randomize(model, "a")
    set_adapters(model, {"a": schedule.steps({0.0: 1.0, 0.5: 0.0})})
    with schedule.step(0.5):
        assert torch.equal(model(x), plain)
    with schedule.step(0.0):
        assert not torch.equal(model(x), plain)


def test_without_a_pipeline_a_step_must_be_told(randomize):
    model, x = adapted("lora", randomize)
    set_adapters(model, {"a": schedule.linear(1.0, 0.0)})
    for call in (model, model[0]):
        with pytest.raises(AdapterStateError, match=r"schedule\.step"):
            call(x)
    assert "linear(1, 0" in repr(model)  # it can be looked at


def test_a_step_is_told_to_one_thread(randomize):
    model, x = adapted("lora", randomize)
    set_adapters(model, {"a": schedule.linear(1.0, 0.0)})
    seen = []

    def other():
        try:
            model(x)
        except AdapterStateError as error:
            seen.append(error)

    with schedule.step(0.5):
        with schedule.step(0.1):
            inner = model(x)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(seen) == 1 and not torch.equal(model(x), inner)


def test_schedules_by_block(randomize):
    model, x = blocks(2), torch.randn(2, 8, dtype=torch.float64)
    give(model, "lora", "a", targets=["0.up", "1.up"])
    randomize(model, "a")
    set_adapters(model, {"a": {"0": 0.5, "1": 0.25}})
    want = model(x)
    set_adapters(model, {"a": {"0": schedule.linear(0.0, 1.0), "1": schedule.constant(0.25)}})
    with schedule.step(0.5):
        assert torch.equal(model(x), want)


def test_status_says_what_was_set_and_nothing_is_left(randomize, trace):
    model, _ = adapted("lora", randomize, names=("a", "b"))
    normal = trace(model)
    made = schedule.linear(1.0, 0.0)
    for after in (
        lambda: set_adapters(model, {"b": 1.0}),
        lambda: set_adapters(model, [{}]),
        lambda: set_adapters(model, {"a": schedule.constant(1.0)}) or set_adapters(model, {"a": 1.0}),
    ):
        set_adapters(model, {"a": made})
        assert get_adapters(model)["a"].strength == made and get_adapters(model)["a"].active
        assert ROOT in model.__dict__ and isinstance(model, torch.nn.Sequential)
        after()
        assert trace(model) == normal
    with adapters(model, {"a": made}):
        with adapters(model, {"a": made}):
            assert ROOT in model.__dict__
        assert ROOT in model.__dict__
    assert trace(model) == normal
    set_adapters(model, {"a": made, "b": 1.0})
    detach(model, "a")
    set_adapters(model, {"b": made})
    assert ROOT in model.__dict__
    unload(model)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 6)).double().requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    assert trace(model) == trace(plain)


def test_an_interrupt_leaves_the_old_or_the_new_roots(randomize, trace):
    model, _ = adapted("lora", randomize)
    codes, mix = {Plan.commit.__code__}, {"a": schedule.linear(1.0, 0.0)}
    for old, new in (({"a": 1.0}, mix), (mix, {"a": 1.0})):
        set_adapters(model, old)
        before = [t[:4] for t in trace(model)]
        for n in range(100):
            lines = itertools.count()

            def tracer(frame, event, arg, lines=lines, n=n):
                if frame.f_code in codes and event == "line" and next(lines) == n:
                    raise KeyboardInterrupt
                return tracer

            sys.settrace(tracer)
            try:
                set_adapters(model, new)
                break
            except KeyboardInterrupt:
                assert [t[:4] for t in trace(model)] == before and get_adapters(model)["a"].strength == old["a"]
            finally:
                sys.settrace(None)
        assert n > 5 and [t[:4] for t in trace(model)] != before


def test_detaching_the_scheduled_adapter_leaves_no_root(randomize):
    model, x = adapted("lora", randomize, names=("a", "b"))
    set_adapters(model, {"b": 1.0})
    want = model(x)
    set_adapters(model, {"a": schedule.linear(1.0, 0.0), "b": 1.0})
    detach(model, "a")
    assert ROOT not in model.__dict__ and torch.equal(model(x), want)


def test_adapters_that_come_later_keep_the_schedule(randomize):
    model, x = adapted("lora", randomize)
    set_adapters(model, {"a": schedule.linear(1.0, 0.0)})
    give(model, "lora", "b")
    assert set(mix_of(model).choice.given) == {"a", "b"}
    with schedule.step(0.5):
        got = model(x)
    set_adapters(model, {"a": 0.5, "b": 1.0})
    assert torch.equal(got, model(x))


def test_fusing_a_schedule_is_refused_and_another_adapter_can_be_fused(randomize):
    model, x = adapted("lora", randomize, names=("a", "b"))
    made = {"b": 0.5, "a": schedule.linear(1.0, 0.0)}
    set_adapters(model, made)
    with schedule.step(0.25):
        want = model(x)
        for names in (None, "a"):
            with pytest.raises(AdapterStateError, match="a number first"):
                fuse(model, names)
        fuse(model, "b")
        torch.testing.assert_close(model(x), want, **EXACT)
        set_adapters(model, {"b": 0.5, "a": schedule.linear(1.0, 0.0)})
        with pytest.raises(AdapterStateError, match="fused"):
            set_adapters(model, {"b": schedule.constant(0.5)})
        unload(model)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_work(twin, randomize):
    model, x = adapted("lora", randomize)
    set_adapters(model, {"a": schedule.linear(1.0, 0.0)})
    with schedule.step(0.5):
        want = model(x)
    other = twin(model)
    unload(model)
    with schedule.step(0.5):
        assert torch.equal(other(x), want)
    unload(other)
    assert type(other) is torch.nn.Sequential


def test_load_lora_takes_a_number(pipe, adapter):
    with pytest.raises(ConfigError, match="set_adapters"):
        load_lora(pipe, adapter(), weight=schedule.constant(1.0))


# ---- compiled


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Net(torch.nn.Module):
    """A model whose class is not torch's, as those of pipelines."""

    def __init__(self):
        super().__init__()
        self.inner = blocks(2, torch.float32)

    def forward(self, x):
        return self.inner(x)


def in_place(model):
    model.compile(backend="aot_eager", fullgraph=True)
    return model


COMPILED = {
    "wrapped": lambda m: torch.compile(m, backend="aot_eager", fullgraph=True),
    "in place": in_place,
    "blocks": lambda m: [b.compile(backend="aot_eager", fullgraph=True) for b in m.inner] and m,
}


WAYS = [(how, first) for how in COMPILED for first in ("compile", "set")]


# LoRA in every way, the others in one each
CELLS = [("lora", *way) for way in WAYS]
CELLS += [(form, *WAYS[i % len(WAYS)]) for i, form in enumerate(METHOD_FORMS.values()) if form != "lora"]


# compiled code differs by the kind of path: low-rank, rotation, product
@pytest.mark.parametrize(
    ("form", "how", "first"), params(CELLS, [cell for cell in CELLS if cell[0] in ("lora", "oft", "loha")])
)
def test_steps_do_not_compile_anew(form, how, first, randomize, dynamo):
    model, x = Net(), torch.randn(2, 8)
    give(model, form, "a", targets=["inner.0.up", "inner.1.up", "inner.0.down"])
    randomize(model, "a", torch.float32)
    twin = copy.deepcopy(model)
    mix = {"a": schedule.linear(1.0, -0.5)}
    compiled = COMPILED[how](model) if first == "compile" else None
    set_adapters(model if compiled is None else compiled, mix)
    compiled = COMPILED[how](model) if compiled is None else compiled
    seen, count = [], None
    with torch.no_grad():
        for i in range(4):
            set_adapters(twin, {"a": mix["a"].at(i / 4)})
            with schedule.step(i / 4):
                seen.append(compiled(x))
            # fp32 keeps 7 digits; rotations take another way in compiled code
            torch.testing.assert_close(seen[-1], twin(x), rtol=1e-4, atol=1e-4)
            count = graphs() if count is None else count
    assert graphs() == count > 0 and not torch.equal(seen[0], seen[-1])
    unload(compiled)
    assert ROOT not in model.__dict__ and ROOT not in compiled.__dict__
    torch.testing.assert_close(compiled(x), model.inner(x), rtol=1e-5, atol=1e-5)


def test_every_form_is_run():
    assert set(METHOD_FORMS.values()) <= set(FORMS) and config("lora").r == 2
