"""Blocks of `adapters(...)` in asyncio tasks, generators and threads: each ends by itself, and nobody sees another's mix."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import itertools
import pickle
import sys
import threading
import time

import pytest
import torch
from torch import nn

from diffpeft import (
    AdapterStateError,
    LoraConfig,
    adapters,
    attach,
    fuse,
    get_adapters,
    load_lora,
    schedule,
    set_adapters,
    unfuse,
    unload,
)
from diffpeft.model import lock
from diffpeft.model import mix as mixing
from diffpeft.model.attach import mix_of
from tests.contracts.kinds import give


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(6, 6)

    def forward(self, x, timestep=None):
        return self.l(x)


@pytest.fixture
def net(randomize):
    made = Net().double().requires_grad_(False)
    for name in ("a", "b"):
        attach(made, LoraConfig(r=2), name, targets=["l"])
        randomize(made, name)
    set_adapters(made, {"a": 0.3})
    return made


X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def given(net, mix, call=None):
    with adapters(net, mix):
        return (call or net)(X)


@pytest.fixture(params=("eager", "compiled"))
def run(request, net):
    """The model as it is, or compiled, whose code reads no context. Operations take what is called."""
    torch._dynamo.reset()
    yield net if request.param == "eager" else torch.compile(net, backend="eager")
    torch._dynamo.reset()


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)  # compiled code gathers fp32 strengths


@pytest.mark.parametrize("order", itertools.permutations(range(3)), ids=str)
def test_blocks_end_in_any_order(order, net, run):
    mixes = [{"a": 5.0}, {"b": -1.0}, {"a": 2.0, "b": 0.5}]
    plain, wants = net(X), [given(net, mix) for mix in mixes]
    blocks = [adapters(run, mix) for mix in mixes]
    for block in blocks:
        block.__enter__()
    left = [0, 1, 2]
    for ended in order:
        close(run(X), wants[left[-1]])
        blocks[ended].__exit__(None, None, None)
        left.remove(ended)
    close(run(X), plain)
    set_adapters(run, {"a": 0.0})
    close(run(X), nn.functional.linear(X, net.l.weight, net.l.bias))
    unload(run)  # nothing is busy


def test_tasks_do_not_see_each_other(net, run):
    mixes = [{"a": 5.0}, {"b": -1.0}, {"a": 2.0, "b": 0.5}]
    plain, wants = net(X), [given(net, mix) for mix in mixes]

    async def draw(i):
        with adapters(run, mixes[i]):
            for turn in range(4):
                await asyncio.sleep(0.001 * ((i + turn) % 3))
                close(run(X), wants[i])

    async def look():
        for _ in range(8):
            await asyncio.sleep(0.001)
            close(run(X), plain)

    async def main():
        await asyncio.gather(*(draw(i) for i in range(3)), look())

    asyncio.run(main())
    close(run(X), plain)
    assert not mix_of(net).running()
    unload(run)


def test_a_task_hands_its_mix_to_a_thread_that_has_its_context(net, run):
    want, plain = given(net, {"b": 2.0}), net(X)
    found = {}

    def note(name):
        found[name] = run(X)

    async def main():
        with adapters(run, {"b": 2.0}):
            found["to_thread"] = await asyncio.to_thread(run, X)
            context = contextvars.copy_context()
            for name, target in (("copied", lambda: context.run(note, "copied")), ("plain", lambda: note("plain"))):
                thread = threading.Thread(target=target, name=name)
                thread.start()
                thread.join()

    asyncio.run(main())
    close(found["to_thread"], want)
    close(found["copied"], want)
    close(found["plain"], plain)


def test_generators_end_their_blocks_by_themselves(net):
    def draws(mix):
        with adapters(net, mix):
            while True:
                yield net(X)

    plain, one, two = net(X), draws({"a": 5.0}), draws({"b": -1.0})
    first, second = next(one), next(two)
    close(first, given(net, {"a": 5.0}))
    one.close()
    close(next(two), second)
    two.close()
    close(net(X), plain)


def test_a_block_that_ends_elsewhere_is_over_everywhere(net):
    plain, block = net(X), adapters(net, {"a": 5.0})
    block.__enter__()
    contextvars.Context().run(block.__exit__, None, None, None)
    close(net(X), plain)
    assert not mix_of(net).running() and not hasattr(mixing._here, "choices")


def test_steps_that_a_loop_tells_end_by_themselves(net):
    set_adapters(net, {"a": schedule.linear(1.0, 0.0)})
    one, two = schedule.step(0.25), schedule.step(0.5)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    close(net(X), given(net, {"a": 0.5}))
    two.__exit__(None, None, None)
    with pytest.raises(AdapterStateError, match="nothing tells"):
        net(X)


# ---- operations in threads


@contextlib.contextmanager
def switching(interval=1e-6):
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(*jobs):
    """Runs jobs in a thread each; what they raised."""
    raised = []

    def guarded(job):
        try:
            job()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    with switching():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return raised


def test_fusing_in_threads_keeps_every_byte(net):
    before = net.l.weight.clone()

    def turns():
        for _ in range(40):
            fuse(net)
            unfuse(net)

    raised = together(turns, turns, turns)
    # a thread may find all fused by another: said, and nothing changed
    assert all(isinstance(error, AdapterStateError) for error in raised)
    unfuse(net)
    assert torch.equal(net.l.weight, before)


def test_loads_in_threads_lose_nothing(pipe, adapter, trace):
    file, before = adapter(), trace(pipe.unet, pipe.text_encoder)

    def loads(i):
        def job():
            for n in range(6):
                load_lora(pipe, file, name=f"{i}.{n}")
                if n % 2:
                    unload(pipe, f"{i}.{n - 1}")
                set_adapters(pipe, {f"{i}.{n}": 0.5})

        return job

    assert not together(*(loads(i) for i in range(4)))
    assert set(get_adapters(pipe)) == {f"{i}.{n}" for i in range(4) for n in (1, 3, 5)}
    unload(pipe)
    assert trace(pipe.unet, pipe.text_encoder) == before


def test_of_one_name_one_load_comes_through(pipe, adapter):
    file, done = adapter(), []
    raised = together(*(lambda: done.append(load_lora(pipe, file, name="x")) for _ in range(6)))
    assert len(done) == 1 and len(raised) == 5 and {type(e) for e in raised} == {AdapterStateError}


def test_pipelines_that_share_a_part_wait_without_end_for_nothing(fresh, adapter):
    file, one, other = adapter(), fresh(), fresh()
    other.text_encoder = one.text_encoder

    def loads(pipe, name):
        def job():
            for n in range(5):
                load_lora(pipe, file, name=f"{name}{n}")
                unload(pipe, f"{name}{n}")

        return job

    started = time.monotonic()
    assert not together(loads(one, "a"), loads(other, "b"))
    assert time.monotonic() - started < 60 and not get_adapters(one)


def test_forwards_do_not_wait(net):
    with lock.exclusive({"": net}):
        thread = threading.Thread(target=net, args=(X,))
        thread.start()
        thread.join(10)
        assert not thread.is_alive()


def test_locks_are_not_on_the_models(net):
    with lock.exclusive({"": net}):
        other = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    close(other(X), net(X))
    n = len(lock._locks)
    del other
    give(Net(), "lora", targets=["l"])
    assert len(lock._locks) <= n + 1
