"""One adapted layer against the same layer of PEFT and LyCORIS: same tensors, same dtype, one process, one thread, turn by turn.

Timed are forward and backward with a frozen base and a gradient for the input, in CPU milliseconds (medians). Before anything is timed the outputs
are compared, so that no one is fast by computing something else. Adapters have the base's dtype on all sides; PEFT's own default, fp32 adapters
on a 16-bit base, would make it slower.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lycoris.modules as lycoris
import peft
import torch
from torch import Tensor, nn

import diffpeft

RANK = 16


def seconds(job: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    job()
    return time.process_time() - start


@dataclass(frozen=True)
class Case:
    """A layer and its input. `words` say what it is: goals are chosen by them."""

    name: str
    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dtype: torch.dtype
    words: frozenset[str]


def types() -> tuple[tuple[torch.dtype, str], ...]:
    """The dtypes that this processor multiplies in hardware: without that, bf16 products take up to 100 times as long and hide all else."""
    both = (torch.float32, "fp32"), (torch.bfloat16, "bf16")
    return both if torch.ops.mkldnn._is_mkldnn_bf16_supported() else both[:1]


def cases(quick: bool) -> list[Case]:
    """All cases, or one of each kind."""
    linear = [("1280x1280", 1280, 1280, 1024), ("640x640", 640, 640, 4096)]
    conv = [("conv 320", 320, 32)]
    if not quick:
        linear += [("2048x2048", 2048, 2048, 1024), ("1280x10240", 1280, 10240, 1024)]
        conv += [("conv 1280", 1280, 16)]
    layers: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
        (name, lambda i=i, o=o: nn.Linear(i, o), (1, n, i)) for name, i, o, n in linear
    ] + [(name, lambda c=c: nn.Conv2d(c, c, 3, padding=1), (1, c, side, side)) for name, c, side in conv]
    return [
        Case(name, layer, shape, dtype, frozenset({word, name, *name.split()}))
        for name, layer, shape in layers
        for dtype, word in types()
    ]


Goal = tuple[tuple[set[str], float], ...]  # the first whose words a case has is meant


@dataclass(frozen=True)
class Contest:
    """One method: our config and keywords, the peers, and for each peer the goals."""

    name: str
    config: Any
    peers: dict[str, Any]
    goals: dict[str, Goal]
    keywords: dict[str, Any] = field(default_factory=dict)
    same: bool = True  # whether a peer computes the same on a convolution


def always(limit: float) -> Goal:
    return ((set(), limit),)


def lycoris_layer(cls: Any, **fields: Any) -> Callable[[nn.Module], nn.Module]:
    """A module of LyCORIS in place of a layer."""
    return lambda layer: cls("layer", layer, **fields)


def peft_layer(config: Any) -> Callable[[nn.Module], nn.Module]:
    """PEFT's layer in place of a layer."""
    return lambda layer: peft.inject_adapter_in_model(config, nn.Sequential(layer))[0]


THIN = dict(lora_dim=RANK, alpha=RANK)
LORA = ((({"conv"}, 1.0)), (set(), 0.9))
DORA = (({"conv"}, 1.0), ({"fp32"}, 0.8), ({"2048x2048"}, 0.45), ({"1280x10240"}, 0.45), (set(), 0.8))
LOHA_4 = (({"conv", "fp32"}, 0.65), ({"conv"}, 0.4), ({"640x640"}, 0.5), (set(), 0.45))
LOHA_16 = (
    *LOHA_4[:2],
    ({"fp32"}, 0.62),
    ({"1280x1280"}, 0.6),
    ({"640x640"}, 0.6),
    (set(), 0.5),
)
LOKR = (({"conv"}, 0.55), ({"640x640"}, 0.6), (set(), 0.5))
BYPASS = (({"conv"}, 1.0), (set(), 0.9))


def contests(case: Case) -> Iterator[Contest]:
    """The methods. The goals are the project's; a peer without one is there to be seen."""
    to = ["0"]

    def loha(r: int, goal: Goal) -> Contest:
        theirs = peft.LoHaConfig(r=r, alpha=r, target_modules=to, init_weights=False)
        peers = {"peft": peft_layer(theirs), "lycoris": lycoris_layer(lycoris.LohaModule, lora_dim=r, alpha=r)}
        return Contest(
            f"LoHa {r}", diffpeft.LoHaConfig(r=r, alpha=r, init_weights=False), peers, {"peft": goal, "lycoris": goal}
        )

    thin = dict(r=RANK, lora_alpha=RANK, target_modules=to)
    yield Contest(
        "LoRA",
        diffpeft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=False),
        {
            "peft": peft_layer(peft.LoraConfig(**thin, init_lora_weights=False)),
            "lycoris": lycoris_layer(lycoris.LoConModule, **THIN, bypass_mode=True),
        },
        {"peft": LORA},
    )
    yield Contest(
        "DoRA",
        diffpeft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=False, use_dora=True),
        {
            "peft": peft_layer(peft.LoraConfig(**thin, use_dora=True, init_lora_weights=False)),
            "lycoris": lycoris_layer(lycoris.LoConModule, **THIN, weight_decompose=True),
        },
        {"peft": DORA},
    )
    yield loha(4, LOHA_4)
    yield loha(RANK, LOHA_16)
    yield Contest(
        "LoKr",
        diffpeft.LoKrConfig(r=RANK, alpha=RANK, init_weights=False),
        {
            "peft": peft_layer(peft.LoKrConfig(r=RANK, alpha=RANK, target_modules=to, init_weights=False)),
            "lycoris": lycoris_layer(lycoris.LokrModule, **THIN, bypass_mode=True),
        },
        {"peft": LOKR, "lycoris": BYPASS},
    )
    exact = dict(oft_block_size=32, use_cayley_neumann=False, init_weights=False)
    yield Contest(
        "OFT",
        diffpeft.OFTConfig(**exact),
        {"peft": peft_layer(peft.OFTConfig(r=0, target_modules=to, **exact))},
        {"peft": always(1.0)},
        same=False,  # PEFT's own folds patches that overlap
    )
    theirs = lycoris.DiagOFTModule(
        "layer", case.layer(), lora_dim=32
    ).block_size  # 20 where 32 gives fewer than 32 blocks
    yield Contest(
        f"OFT, output side, {theirs}",
        diffpeft.OFTConfig(**{**exact, "oft_block_size": theirs}),
        {"lycoris": lycoris_layer(lycoris.DiagOFTModule, lora_dim=32)},
        {"lycoris": always(0.75)},
        dict(side="output"),
    )
    small = dict(boft_block_size=8, init_weights=False)
    if case.name != "conv 1280":  # PEFT would need matrices of 11520 x 11520
        yield Contest(
            "BOFT",
            diffpeft.BOFTConfig(**small),
            {"peft": peft_layer(peft.BOFTConfig(target_modules=to, **small))},
            {"peft": always(0.4)},
        )
    # LyCORIS cannot do 1280 with blocks of 8: it wants a power of two of them
    m, _, b, _ = lycoris.ButterflyOFTModule("layer", case.layer(), lora_dim=10).oft_blocks.shape
    yield Contest(
        f"BOFT, output side, {m} x {b}",
        diffpeft.BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, init_weights=False),
        {"lycoris": lycoris_layer(lycoris.ButterflyOFTModule, lora_dim=10)},
        {"lycoris": always(0.7)},
        dict(side="output"),
    )


def ours(contest: Contest, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The layer with our adapter on it."""
    model = nn.Sequential(layer)
    diffpeft.attach(model, contest.config, targets=["0"], **contest.keywords)
    return model.to(dtype)


def theirs(
    peer: str, make: Callable[[nn.Module], nn.Module], layer: nn.Module, tensors: dict[str, Tensor]
) -> nn.Module:
    """The layer with a peer's adapter with these tensors on it."""
    dtype = layer.weight.dtype
    module = make(layer)
    named = {"lora_down": "lora_A", "lora_up": "lora_B", "dora_scale": "lora_magnitude_vector"}
    for name, parameter in module.named_parameters():
        word = next((part for part in name.split(".") if part in {**tensors, **named}), "")
        parameter.requires_grad_(bool(word))
        if word:
            parameter.data = tensors[named.get(word, word)].detach().clone().view(parameter.shape)
    if peer == "lycoris":
        module.apply_to()
    module.to(dtype)
    return layer if peer == "lycoris" else module


def step(model: nn.Module, x: Tensor, g: Tensor) -> Callable[[], None]:
    """Forward and backward."""
    wanted = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        for t in (x, *wanted):
            t.grad = None
        model(x).backward(g)

    return run


def medians(jobs: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """CPU milliseconds of each, turn by turn, for about `budget` seconds in all."""
    once = sum(seconds(job) for job in jobs.values())
    rounds = min(max(int(budget / once), 5), 41)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            times[name].append(seconds(job))
    return {name: 1000 * statistics.median(t) for name, t in times.items()}


def memory_profile() -> torch.profiler.profile:
    """Records the allocator's own events in a with-block."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def most_alive(recorded: torch.profiler.profile) -> int:
    """Most bytes of tensors alive at once in a block that was recorded, beside those alive before."""
    live = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def peak(job: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once during a call, beside those alive before."""
    job()
    gc.collect()
    with memory_profile() as recorded:
        job()
    return most_alive(recorded)


def agree(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Refuse to compare times of different results."""
    off = ((a.float() - b.float()).norm() / b.float().norm()).item()
    assert off < (1e-4 if dtype == torch.float32 else 3e-2), f"outputs differ by {off:.1e}"


def verdict(ratio: float, goal: float | None) -> str:
    if goal is None:
        return f"{ratio:5.2f}              "
    return f"{ratio:5.2f} {'<=' if ratio <= goal else '> '} {goal:.2f} {'met   ' if ratio <= goal else 'MISSED'}"


def limit(goals: Goal, case: Case) -> float:
    return next(number for words, number in goals if words <= case.words)


def compare(case: Case, contest: Contest, budget: float, memory: bool) -> None:
    """One line of the table."""
    torch.manual_seed(0)
    layer = case.layer().requires_grad_(False).to(case.dtype)
    x = torch.randn(case.shape).to(case.dtype).requires_grad_()
    base, mine = copy.deepcopy(layer), ours(contest, copy.deepcopy(layer), case.dtype)
    tensors = {name.rpartition(".")[2]: p for name, p in mine.named_parameters() if "adapters" in name}
    models = {"base": base, "ours": mine}
    models |= {peer: theirs(peer, make, copy.deepcopy(layer), tensors) for peer, make in contest.peers.items()}
    y = mine(x)
    for peer in contest.peers:
        if contest.same or "conv" not in case.words:
            agree(y.detach(), models[peer](x).detach(), case.dtype)
    g = torch.randn_like(y)
    jobs = {name: step(model, x, g) for name, model in models.items()}
    ms = medians(jobs, budget)
    row = f"{case.name:11} {'fp32' if 'fp32' in case.words else 'bf16'} {contest.name:24}"
    row += f"{ms['ours']:9.1f} {ms['base']:9.1f} {ms['ours'] / ms['base']:6.2f}"
    for peer in ("peft", "lycoris"):
        if peer in ms:
            fair = contest.same or "conv" not in case.words
            goal = limit(contest.goals[peer], case) if fair and peer in contest.goals else None
            row += f"   {peer} {ms[peer]:8.1f} {verdict(ms['ours'] / ms[peer], goal)}"
    if memory:
        a, b = peak(jobs["ours"]), peak(jobs["peft"])
        row += f"   peak {a / 2**20:.1f} / {b / 2**20:.1f} MiB {verdict(a / b, None if 'conv' in case.words else 0.7)}"
    print(row, flush=True)


def infer(case: Case, budget: float) -> None:
    """Forward without gradient with 1, 3 and 5 frozen LoRAs."""
    torch.manual_seed(0)
    layer = case.layer().requires_grad_(False).to(case.dtype)
    x = torch.randn(case.shape).to(case.dtype)
    config = diffpeft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=False)
    jobs: dict[str, Callable[[], object]] = {"base": lambda: layer(x)}
    for k in (1, 3, 5):
        mine, other = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(copy.deepcopy(layer))
        named = [f"a{i}" for i in range(k)]
        for name in named:
            diffpeft.attach(mine, config, name, targets=["0"])
            theirs = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False)
            peft.inject_adapter_in_model(theirs, other, adapter_name=name)
        diffpeft.set_adapters(mine, dict.fromkeys(named, 0.8))
        other[0].set_adapter(named)
        for name in named:
            other[0].scaling[name] = 0.8
        mine.to(case.dtype).requires_grad_(False)
        other.to(case.dtype).requires_grad_(False)
        for (_, a), (_, b) in zip(_factors(mine), _factors(other), strict=True):
            b.data = a.data.clone().view(b.shape)
        agree(mine(x), other(x), case.dtype)
        jobs |= {f"ours {k}": lambda m=mine: m(x), f"peft {k}": lambda m=other: m(x)}
    with torch.no_grad():
        ms = medians(jobs, budget)
    for k in (1, 3, 5):
        a, b = ms[f"ours {k}"], ms[f"peft {k}"]
        print(
            f"{case.name:11} {'fp32' if 'fp32' in case.words else 'bf16'} forward, {k} LoRA {'s' if k > 1 else ' '}"
            f"         {a:9.1f} {ms['base']:9.1f} base {verdict(a / ms['base'], 1.1)}   peft {b:8.1f} {verdict(a / b, None)}",
            flush=True,
        )


def _factors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of adapters, A before B, in the order of their names."""
    found = [("_A" not in name, name, p) for name, p in model.named_parameters() if "lora_" in name]
    return [(name, p) for _, name, p in sorted(found, key=lambda item: item[:2])]


def main(quick: bool = False, only: str = "") -> None:
    """The tables. `only`: those contests whose line would contain this word."""
    if len(types()) == 1:
        print("This processor has no bf16 products: only fp32 is measured.")
    print("shape       type method                    ours ms   base ms  /base   peer       ms ratio, goal", flush=True)
    for case in cases(quick):
        for contest in contests(case):
            if only.lower() in contest.name.lower():
                compare(case, contest, 1.0 if quick else 3.0, contest.name == "LoRA")
                gc.collect()
        if only.lower() in "forward":
            infer(case, 1.0 if quick else 3.0)
