"""Every operation after every other: what a pipeline does is what the definitions give for the adapters that are on, or an error has changed nothing."""

from __future__ import annotations

import random

import pytest
import torch

from diffpeft import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    UnknownNameError,
    adapters,
    converters,
    fuse,
    get_adapters,
    load_lora,
    replace,
    set_adapters,
    unfuse,
    unload,
)

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.conv_in"
NAMES = ("a", "b.c", "d")


def files():
    """Adapters of several methods, two for each of the names."""
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64) / 4  # noqa: E731
    loras = [
        {
            f"{LINEAR}.lora_A.weight": new(r, 32),
            f"{LINEAR}.lora_B.weight": new(32, r),
            f"{CONV}.lora_A.weight": new(r, 4, 3, 3),
            f"{CONV}.lora_B.weight": new(16, r, 1, 1),
        }
        for r in (4, 2)
    ]
    doras = [
        {**lora, f"{LINEAR}.dora_scale": new(32, 1).abs() + 0.5, f"{CONV}.dora_scale": new(16, 1, 1, 1).abs() + 0.5}
        for lora in loras
    ]
    kron = {f"{LINEAR}.lokr_w1": new(4, 4), f"{LINEAR}.lokr_w2": new(8, 8)}
    turned = {f"{LINEAR}.oft_blocks": new(4, 8, 8) / 4}
    return {"a": loras, "b.c": doras, "d": [kron, turned]}


class World:
    """A pipeline, and by the definitions what its weights should be."""

    def __init__(self, pipe, image):
        self.pipe, self.image, self.files = pipe, image, files()
        self.base = {
            LINEAR: pipe.unet.get_submodule(LINEAR[5:]).weight.detach().clone(),
            CONV: pipe.unet.conv_in.weight.detach().clone(),
        }
        self.loaded: dict[str, dict] = {}
        self.mix: dict[str, float] = {}
        self.fused: dict[str, float] = {}

    def weights(self):
        """The weight of each layer, one adapter after the other."""
        W = dict(self.base)
        for name, s in self.mix.items():
            for layer, delta in converters.read(self.loaded[name]).deltas(W).items():
                W[layer] = W[layer] + s * delta
        return W

    def check(self):
        """What the layers compute is what the definitions say; what is listed is what is there."""
        for layer, W in self.weights().items():
            module = self.pipe.unet.get_submodule(layer[5:])
            x = torch.randn(2, *((32,) if layer == LINEAR else (4, 5, 5)), dtype=torch.float64)
            with torch.no_grad():
                want = (
                    torch.nn.functional.linear(x, W, module.bias)
                    if layer == LINEAR
                    else torch.nn.functional.conv2d(x, W, module.bias, padding=1)
                )
                torch.testing.assert_close(module(x), want, rtol=0, atol=1e-9)
        status = get_adapters(self.pipe)
        assert status.keys() == self.loaded.keys()
        assert {n for n, s in status.items() if s.active} == self.mix.keys()
        assert {n for n, s in status.items() if s.fused} == self.fused.keys()

    def load(self, rng):
        """One more, at some strength."""
        name, s = rng.choice(NAMES), rng.choice((1.0, 0.5, -0.7))
        file = rng.choice(self.files[name])
        load_lora(self.pipe, file, name=name, weight=s)
        self.loaded[name], self.mix[name] = file, s

    def set(self, rng):
        """Another mix."""
        names = rng.sample(list(self.loaded), rng.randint(0, len(self.loaded)))
        mix = {name: rng.choice((0.0, 1.0, 0.3)) for name in names} | {
            n: self.fused[n] for n in self.fused if rng.random() < 0.7
        }
        set_adapters(self.pipe, mix)
        self.mix = mix

    def fuse(self, rng):
        """All, or one."""
        names = None if rng.random() < 0.5 else [rng.choice(NAMES)]
        fuse(self.pipe, names)
        self.fused |= {n: s for n, s in self.mix.items() if names is None or n in names}

    def unfuse(self, rng):
        """All."""
        unfuse(self.pipe)
        self.fused = {}

    def unload(self, rng):
        """One."""
        name = rng.choice(NAMES)
        unload(self.pipe, name)
        self.loaded.pop(name)
        self.mix.pop(name, None)
        self.fused = {} if name in self.fused else self.fused

    def replace(self, rng):
        """By the other file of the name."""
        name = rng.choice(NAMES)
        file = rng.choice(self.files[name])
        replace(self.pipe, name, file)
        self.loaded[name] = file

    def block(self, rng):
        """A mix for a block, which is what holds before and after."""
        with torch.no_grad(), adapters(self.pipe, dict(self.mix)):
            self.check()


OPERATIONS = ("load", "set", "fuse", "unfuse", "unload", "replace", "block")


@pytest.mark.filterwarnings("ignore:nothing to do")
@pytest.mark.parametrize("seed", range(12))
def test_a_walk_through_all_operations(seed, pipe, image, trace):
    rng, world = random.Random(seed), World(pipe, image)
    before, done, refused = trace(pipe.unet, pipe.text_encoder), [], 0
    for _ in range(50):
        operation = rng.choice(OPERATIONS)
        done.append(operation)
        try:
            getattr(world, operation)(rng)
        except (AdapterStateError, UnknownNameError, ConfigError, CheckpointError) as error:
            refused += 1
            assert str(error)
        try:
            world.check()
        except AssertionError as error:
            raise AssertionError(f"after {done}") from error
    assert refused < 45
    unload(pipe)
    assert trace(pipe.unet, pipe.text_encoder) == before
