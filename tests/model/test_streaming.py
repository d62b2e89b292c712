"""Blocks on the host: a device with a memory of its own, and every operation is watched for what it reads."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import diffpeft
from diffpeft import AdapterStateError, TrainConfig
from diffpeft.families import CaptionReading, Frame, open_family
from diffpeft.layers.packed import PACKINGS
from diffpeft.layers.streaming import Direct, remembered, stream, stream_of
from diffpeft.model.attach import attach
from diffpeft.model.placing import Placing, offloaded
from diffpeft.model.state import trained_parameters
from diffpeft.model.units import repeated
from diffpeft.train.method import ADAPTERS, CONFIGS
from tests.families.pipelines import EDITS, KINDS, pipeline

SLOW = pytest.mark.slow
FAMILIES = {family: kind for kind, (family, _) in KINDS.items() if kind not in EDITS}


class FakeDevice(Direct):
    """A device whose memory is what it was brought: who may be read, how much was there at once."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.memories, self.brought, self.most = [], [], 0

    def bring(self, host):
        memory, arrival = super().bring(host)
        self.memories.append(torch.multiprocessing.reductions.StorageWeakRef(memory.untyped_storage()))
        self.brought.append(host.data_ptr())
        self.most = max(self.most, sum(not memory.expired() for memory in self.memories))
        return memory, arrival


class Watched(TorchDispatchMode):
    """Operations: none may read or write the memory of the host but the carrier, which copies it."""

    def __init__(self, streaming):
        super().__init__()
        self.host = {block.host.untyped_storage()._cdata: block.name for block in streaming.blocks}
        self.read = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        views = func in (torch.ops.aten.view.dtype, torch.ops.aten.slice.Tensor, torch.ops.aten.view.default)
        if func is not torch.ops.aten._to_copy.default and not views and "detach" not in str(func):
            self.read += [(func, n) for t in tensors if (n := self.host.get(t.untyped_storage()._cdata))]
        return func(*args, **(kwargs or {}))


def trained(kind, method, share=None, checkpointed=False, few=None):
    """A family with an adapter, after one backward pass: the gradients, the device and what was read of the host."""
    torch.manual_seed(0)
    family = open_family(pipeline(kind, torch.float32), CaptionReading(32 if "hidream" in kind.lower() else None))
    model, device = getattr(family.pipe, family.denoiser).eval(), FakeDevice()
    model.requires_grad_(False)
    Placing("cpu", few, share or 0, device)(model)
    random, unread = torch.Generator().manual_seed(1), family.unread.get(family.denoiser)
    settings = CONFIGS[method](TrainConfig(rank=4))
    attach(model, settings, "a", targets="full", exclude=unread, generator=random, **ADAPTERS[method])
    for p in trained_parameters(model, "a").values():
        p.data += 0.01 * torch.rand(p.shape, generator=torch.Generator().manual_seed(2))
    if checkpointed:
        model.enable_gradient_checkpointing()
        model.train()
    with torch.no_grad():
        latents = family.encode(torch.zeros(1, 3, 64, 64))[0]
        conditions = {n: t for name in family.text_encoders for n, t in family.embed(name, ["x y", "z"]).items()}
        conditions |= family.framed([Frame((64, 64), (0, 0), (64, 64))] * 2)
    x = torch.randn(2, *latents.shape[1:], generator=torch.Generator().manual_seed(3))

    def step():
        loss = family.predict(x, torch.full((2,), 0.5), conditions).square().mean()
        loss.backward()

    streaming = stream_of(model)
    if streaming is None:
        step()
        step()
    else:
        before = [block.host.clone() for block in streaming.blocks]
        with remembered([streaming]), Watched(streaming) as watched:
            step()
            step()
        assert not watched.read, watched.read[:3]
        assert all(torch.equal(a, block.host) for a, block in zip(before, streaming.blocks, strict=True))
    return {n: p.grad for n, p in trained_parameters(model, "a").items()}, device, model


CELLS = [
    *((f, "lora", c) for f in FAMILIES for c in (False, True)),
    *(("flux", m, c) for m in ADAPTERS for c in (False, True) if m != "lora"),
    *((f, "lora", c, kind) for kind in PACKINGS for c in (False, True) for f in ("flux", "sdxl")),
]
QUICK = {
    ("sd15", "lora", True),
    ("flux", "lora", False),
    ("flux", "dora", True),
    ("krea2", "lora", True),
    ("flux", "lora", True, "nf4"),
    ("flux", "lora", False, "fp8"),
}


@pytest.mark.parametrize(
    "family, method, checkpointed, few",
    [pytest.param(*c, *[None] * (4 - len(c)), marks=() if c in QUICK else SLOW) for c in CELLS],
)
def test_gradients_are_the_same_bytes_and_two_blocks_are_there(family, method, checkpointed, few):
    kind = FAMILIES[family]
    wanted, *_ = trained(kind, method, checkpointed=checkpointed, few=few)
    grads, device, model = trained(kind, method, 1.0, checkpointed, few)
    assert wanted and all(torch.equal(wanted[name], grads[name]) for name in wanted)
    assert device.most <= 2
    streaming = stream_of(model)
    assert 0 < len(streaming.blocks) <= len(repeated(model))
    asked = 2 if family == "kandinsky5_video" else 1  # texts of one length together
    assert len(device.brought) <= asked * 4 * len(streaming.blocks) + asked - 1  # twice forwards, twice backwards


def test_the_next_block_is_on_its_way_once_the_order_was_seen():
    """Who comes next is sent for before it is asked for: forwards, backwards, and in the next step."""
    blocks = [nn.Linear(4, 4) for _ in range(5)]
    model = nn.Sequential(nn.Linear(4, 4), *blocks).requires_grad_(False)
    device = FakeDevice()
    streaming = stream(model, {str(i): b for i, b in enumerate(blocks)}, torch.device("cpu"), device)
    x = torch.randn(2, 4, requires_grad=True)
    with remembered([streaming]):
        for _ in range(2):
            model(x).sum().backward()
        order, brought = [block.host.data_ptr() for block in streaming.blocks], len(device.brought)
        model(x)
        ahead = device.brought[brought:]
    assert ahead == order[2:]  # the first two were still there
    assert device.most <= 2


def test_what_somebody_holds_is_not_written_over():
    blocks = [nn.Linear(4, 4) for _ in range(4)]
    model = nn.Sequential(nn.Linear(4, 4), *blocks).requires_grad_(False)
    wanted = blocks[0].weight.clone()
    streaming = stream(model, {str(i): b for i, b in enumerate(blocks)}, torch.device("cpu"), FakeDevice())
    streaming.need(streaming.blocks[0])
    held = blocks[0].weight.data
    model(torch.randn(2, 4))
    assert torch.equal(held, wanted) and not torch.equal(blocks[3].weight, wanted)


def test_shared_weights_and_the_first_stay_on_the_device():
    one, two, three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = one.weight
    model = nn.ModuleList([one, two, three])
    streaming = stream(model, {"0": one, "1": two, "2": three}, torch.device("cpu"), FakeDevice())
    assert [[tuple(p.shape) for p in block.parameters] for block in streaming.blocks] == [
        [(4,)],
        [(4,)],
        [(4, 4), (4,)],
    ]
    assert next(model.parameters()) not in {p for block in streaming.blocks for p in block.parameters}


@pytest.mark.parametrize("share, number", [(0.01, 1), (0.25, 2), (0.5, 4), (0.99, 8), (1.0, 8)])
def test_a_share_is_spread_over_the_blocks(share, number):
    names = list(offloaded({str(i): nn.Linear(1, 1) for i in range(8)}, share))
    assert len(names) == number
    gaps = [int(b) - int(a) for a, b in itertools.pairwise(names)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_streamed_model_says_where_it_computes_and_is_not_fused_into(method):
    family = open_family(pipeline("flux dev", torch.float32))
    model = family.pipe.transformer
    Placing("cpu", offload=1.0)(model)
    attach(model, CONFIGS[method](TrainConfig(rank=4)), "a", targets="attn", generator=torch.Generator())
    assert model.device.type == "cpu"
    with pytest.raises(AdapterStateError, match="offloaded"):
        diffpeft.fuse(model)
