"""Many times over: nothing grows and nothing drifts."""

from __future__ import annotations

import gc
import os
import warnings

import pytest
import torch

from diffpeft import CheckpointError, converters, fuse, load_lora, set_adapters, unfuse, unload
from tests.pipeline.states import CONV, LINEAR, TEXT, lora

CYCLES = int(os.environ.get("SOAK_CYCLES", "100"))  # 1000 for the whole of it
ROUNDS = 3  # a leak grows in each of them; what libraries and other threads of the process keep once does not
RSS_GROWTH = (
    5 << 20
)  # the allocator keeps freed pieces; an adapter of 170 kB that stayed in each of 200 cycles would be seven times this


def good(pipe, file):
    load_lora(pipe, file, name="a")
    load_lora(pipe, file, name="b")
    unload(pipe, "a")
    unload(pipe)


def fused(pipe, file):
    load_lora(pipe, file, name="a")
    fuse(pipe)
    unload(pipe)


def failing(pipe, file):
    with pytest.raises(CheckpointError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_lora(pipe, {**lora(2, 0), f"{CONV}.lora_A.weight": torch.full((2, 4, 3, 3), float("nan"))})


def measured():
    """Objects alive, open files, resident bytes."""
    gc.collect()
    with open("/proc/self/statm") as f:
        pages = int(f.read().split()[1])
    return len(gc.get_objects()), len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")


def leaks_nothing(growth):
    """Whether so many more objects, open files and bytes are no leak, which would be one object a cycle or more."""
    objects, files, memory = growth
    return objects < CYCLES // 2 and files <= 0 and memory < RSS_GROWTH


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize("cycle", [good, fused, failing])
def test_loading_and_unloading_leaks_nothing(cycle, fresh, trace, tmp_path):
    pipe, file = fresh(), tmp_path / "a.safetensors"
    large = {
        f"{layer}.lora_{ab}.weight": torch.randn(shape)
        for layer, o, i in ((LINEAR, 32, 32), (TEXT, 48, 32))
        for ab, shape in (("A", (300, i)), ("B", (o, 300)))
    }
    converters.write(converters.read(large), file, format="kohya")
    before = trace(pipe.unet, pipe.text_encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rank
        for _ in range(10):
            cycle(pipe, file)
        grown = []
        for _ in range(ROUNDS):
            objects, files, memory = measured()
            for _ in range(CYCLES):
                cycle(pipe, file)
            now = measured()
            grown.append((now[0] - objects, now[1] - files, now[2] - memory))
            if leaks_nothing(grown[-1]):
                break
    assert leaks_nothing(grown[-1]), grown
    assert trace(pipe.unet, pipe.text_encoder) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ten_adapters_in_turn_leave_the_bytes_of_the_base(dtype, fresh):
    """Adding and subtracting would move a third of the weights."""
    pipe = fresh(dtype)
    models = (pipe.unet, pipe.text_encoder)
    before = [(n, p.detach().clone()) for m in models for n, p in m.named_parameters()]
    for n in range(10):
        load_lora(pipe, lora(2, n, dora=n % 3 == 0), name=str(n))
    own = [(name, p) for m in models for name, p in m.named_parameters() if ".adapters." not in f".{name}"]
    for n in range(100):
        set_adapters(pipe, {str(n % 10): 0.1 * (n % 7) - 0.35, str((n + 3) % 10): 1.0})
        fuse(pipe)
        assert any(not torch.equal(p, q) for (_, p), (_, q) in zip(own, before, strict=True))
        unfuse(pipe)
        assert all(a == b and torch.equal(p, q) for (a, p), (b, q) in zip(own, before, strict=True))
