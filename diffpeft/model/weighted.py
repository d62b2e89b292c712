"""Adapters into one, on the layers of a model: LoRAs by PEFT's algorithms, (IA)^3 factors, biases and copies of modules as weighted sums.

PEFT's algorithms are for LoRAs, of dW_i = s_i B_i A_i: `cat` puts factors side by side; `svd` cuts the sum to a rank; `linear` adds sqrt(w_i s_i) A_i
and sqrt(w_i s_i) B_i, which is not the sum: it has the products of every A_i with every B_j. TIES (arXiv:2306.01708), DARE (arXiv:2311.03099) and
pruning by magnitude leave out entries first, of the factors, or (`_svd`) of dW_i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.converters.formats.attention import times
from diffpeft.errors import ConfigError, shown
from diffpeft.layers.carried import Copy, Record, bare, bare_copy, op_of, record_of
from diffpeft.layers.hooks import present
from diffpeft.layers.slot import BIAS, Slot, pieces_of
from diffpeft.layers.tokens import Tokens
from diffpeft.methods import LoraConfig
from diffpeft.methods.base import Geometry
from diffpeft.methods.ia3 import FACTORS
from diffpeft.methods.linalg import kaiming
from diffpeft.methods.lora import PAIR, Lora, is_across
from diffpeft.methods.merging import merged
from diffpeft.model.patches import Patched
from diffpeft.model.plan import Plan
from diffpeft.model.target import adapted
from diffpeft.model.weights import based

Weighted = Sequence[tuple[str, float]]  # adapters and their weights
Factors = tuple[Tensor, Tensor]  # A [r, i, *k], B [o, r, *1], or both as matrices
Values = Callable[[str, Slot], Mapping[str, Tensor]]  # of a layer and its fresh slot: tensors by role


@dataclass(frozen=True)
class Recipe:
    """How the LoRAs of a layer become one: see `Tuner.add_weighted_adapter`."""

    what: str
    how: str
    rank: int
    density: float
    majority_sign: str
    clamp: float | None = None
    full_matrices: bool = True
    driver: str | None = None


@dataclass(frozen=True)
class Source:
    """One LoRA on one layer, and the weight that the user gives it."""

    weight: float
    scale: float
    A: Tensor
    B: Tensor


def layers_with(model: nn.Module, adapters: Iterable[str]) -> dict[str, nn.Module]:
    """{name: layer} of those that carry one of the adapters, in the order of the model."""
    names = {*adapters}
    return {layer: module for layer, module, record in adapted(model) if names & record.slots.keys()}


def slots_on(module: nn.Module) -> Mapping[str, Slot]:
    """{adapter: slot} of one layer."""
    record = record_of(module)
    return {} if record is None else record.slots


def filled(values: Values) -> Callable[[Mapping[str, nn.Module], dict[str, Slot]], dict[str, Slot]]:
    """For `Addition.finish`: fresh slots get these values."""

    def finish(modules: Mapping[str, nn.Module], slots: dict[str, Slot]) -> dict[str, Slot]:
        for layer, slot in slots.items():
            for role, value in values(layer, slot).items():
                slot.get_parameter(role).data = value
        return slots

    return finish


# LoRA


def merged_loras(model: nn.Module, weighted: Weighted, recipe: Recipe) -> Values:
    """The values of a LoRA that is made of others by a recipe. Raises ConfigError."""
    layers = layers_with(model, [adapter for adapter, _ in weighted])
    factors = {
        layer: _MADE[recipe.what](recipe, _sources(module, weighted, times(layer, layers), recipe), op_of(module))
        for layer, module in layers.items()
    }

    def values(layer: str, slot: Slot) -> Mapping[str, Tensor]:
        A, B = (role for role in PAIR if role in slot.tensors)
        return dict(zip((A, B), _padded(factors[layer], slot.tensors[A], slot.tensors[B]), strict=True))

    return values


def _sources(module: nn.Module, weighted: Weighted, by: int, recipe: Recipe) -> list[Source]:
    """Those of the adapters that are on a layer, in their order, in fp32 or better; `by` how many times they act in PEFT."""
    slots = slots_on(module)
    return [_source(slots[adapter], weight, by, recipe) for adapter, weight in weighted if adapter in slots]


def _source(slot: Slot, weight: float, by: int, recipe: Recipe) -> Source:
    (part,) = slot.parts

    def read() -> Source:
        p = {role: t.detach() for role, t in slot.tensors_of(part).items()}
        apart = recipe.what == "factors" and is_across(p)  # then nothing asks what their product is
        pair = (p["lora_A"], p["lora_B"]) if apart else Lora.factors(p, part.spec)
        A, B = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in pair)
        return Source(weight, Lora.scale(p, part.spec) / by, A, B)

    return present(slot, read)


def _of_factors(recipe: Recipe, sources: Sequence[Source], op: object) -> Factors:
    """Both factors merged on their own, half of each weight in either, its sign in A."""
    if len({s.A.shape for s in sources}) > 1:
        raise ConfigError(
            "All adapters must have the same r value when using combination_type linear, ties, dare_ties or dare_linear",
            where=f"on a layer r is {', '.join(str(len(s.A)) for s in sources)}",
            remedy="Leave combination_type out for the exact sum, or take 'cat' or 'svd'.",
        )
    scaled = [s.weight * s.scale for s in sources]
    halves = [math.sqrt(abs(w)) for w in scaled]
    signed = [math.copysign(half, w) for half, w in zip(halves, scaled, strict=True)]
    args = recipe.density, recipe.majority_sign
    A = merged(recipe.how, [s.A for s in sources], signed, *args)
    return A, merged(recipe.how, [s.B for s in sources], halves, *args)


def _of_sides(recipe: Recipe, sources: Sequence[Source], op: object) -> Factors:
    """Factors side by side, the weights in A."""
    return torch.cat([s.weight * s.scale * s.A for s in sources]), torch.cat([s.B for s in sources], 1)


def _of_deltas(recipe: Recipe, sources: Sequence[Source], op: Any) -> Factors:
    """The deltas merged, in the layer's own order (so DARE draws for their entries), and cut to the rank."""
    shape = op.geometry.shape
    deltas = [op.stored((s.scale * (s.B.flatten(1) @ s.A.flatten(1))).reshape(shape)) for s in sources]
    delta = merged(recipe.how, deltas, [s.weight for s in sources], recipe.density, recipe.majority_sign)
    # of full matrices only the first columns are used: they tell, if anything, in the signs that clamping sees
    full = recipe.full_matrices and recipe.clamp is not None
    U, S, Vh = torch.linalg.svd(op.canonical(delta).flatten(1), full_matrices=full, driver=recipe.driver)
    k = min(recipe.rank, len(S))
    A, B = Vh[:k], U[:, :k] * S[:k]
    if recipe.clamp is None:
        return A, B
    top = float(torch.quantile(torch.cat([B.flatten(), A.flatten()]), recipe.clamp))
    return torch.clamp(A, -top, top), torch.clamp(B, -top, top)


_MADE = {"factors": _of_factors, "sides": _of_sides, "deltas": _of_deltas}


def _padded(factors: Factors, likeA: Tensor, likeB: Tensor) -> Factors:
    """Factors in the shapes of a slot's, with zeros up to its rank."""
    if tuple(t.shape for t in factors) == (likeA.shape, likeB.shape):
        return factors
    k = len(factors[0])
    A, B = torch.zeros_like(likeA, dtype=factors[0].dtype), torch.zeros_like(likeB, dtype=factors[1].dtype)
    A[:k] = factors[0].reshape(k, *A.shape[1:])
    B[:, :k] = factors[1].reshape(len(B), k, *B.shape[2:])
    return A, B


def draw_on(model: nn.Module, adapters: Iterable[str], config: LoraConfig, rank: int) -> None:
    """Draw from torch's default generator what PEFT draws for a fresh adapter, so that DARE's numbers are the same after it."""
    for module in layers_with(model, adapters).values():
        _draw(config, op_of(module).geometry, rank)


def _draw(config: LoraConfig, g: Geometry, r: int) -> None:
    """The same for one layer."""
    init, ones = config.init_lora_weights, [1] * len(g.kernel)
    if g.lookup:
        torch.randn(r, g.in_), torch.randn(g.out, r)
        if init:
            torch.empty(g.out, r).normal_()
        return
    kaiming(r, g.in_, *g.kernel), kaiming(g.out, max(1, r // g.groups), *ones)
    if config.lora_bias:
        torch.empty(g.out).uniform_()
    if init is True:
        kaiming(r, g.in_, *g.kernel)
    elif init == "gaussian":
        torch.empty(r, g.in_, *g.kernel).normal_()
    elif init == "orthogonal":
        torch.randn(r, r), torch.randn(g.in_, r // 2), torch.randn(r // 2, g.out)


# (IA)^3


def same_sides(model: nn.Module, adapters: Sequence[str]) -> bool:
    """Whether on every layer the factors are all of the inputs or all of the outputs."""
    return all(
        len({slots[adapter].tensors[FACTORS].shape for adapter in adapters if adapter in slots}) == 1
        for slots in map(slots_on, layers_with(model, adapters).values())
    )


def summed_factors(model: nn.Module, weighted: Weighted, origin: float) -> Values:
    """l = o + sum_i w_i (l_i - o): with the identity, 1, as origin the exact sum, with 0 what PEFT calls linear."""
    layers = layers_with(model, [adapter for adapter, _ in weighted])

    def values(layer: str, slot: Slot) -> Mapping[str, Tensor]:
        slots = slots_on(layers[layer])
        pairs = [(w, slots[adapter].tensors[FACTORS].detach()) for adapter, w in weighted if adapter in slots]
        if pairs[0][1].shape != slot.tensors[FACTORS].shape:
            raise ConfigError(f"feedforward_modules of the adapters do not say one side for layer {shown(layer)}")
        return {FACTORS: origin + sum((w * (l - origin) for w, l in pairs), torch.zeros_like(pairs[0][1]))}

    return values


# Biases and copies


def with_biases(slots: Mapping[str, Slot]) -> tuple[str, Mapping[str, Slot]]:
    """Changes of the bias as PEFT has them, and the slots with them so.

    "": there are none; "lora_bias": a bias of B on every layer; where that cannot be they stay changes of the layer's own: "lora_only", or "all".
    """
    if not any(BIAS in slot.tensors for slot in slots.values()):
        return "", slots
    if not all(slot.parts for slot in slots.values()):
        return "all", slots
    if any(slot.parts[0].spec.geometry.lookup for slot in slots.values()):
        return "lora_only", slots
    return "lora_bias", {layer: _with_bias(slot) for layer, slot in slots.items()}


def _with_bias(slot: Slot) -> Slot:
    (piece,) = pieces_of(slot)
    tensors = {role: t.detach() for role, t in piece.tensors.items()}
    shift = slot.tensors.get(BIAS, tensors["lora_B"].new_zeros(piece.spec.geometry.out)).detach()
    other = Slot([replace(piece, tensors={**tensors, "lora_B_bias": shift})], trainable=False)
    return other.train(slot.training)


def plan_summed_copies(plan: Plan, model: nn.Module, name: str, weights: Mapping[str, float]) -> None:
    """Plan to give a new adapter W + w (W_i - W) of each module that one of the adapters has a copy W_i of; W_i itself where that came with its file."""
    for _, module, before in adapted(model):
        still = any(before.copies[adapter].still for adapter in weights.keys() & before.copies.keys())
        for adapter in weights.keys() & before.copies.keys():
            total = bare_copy(before.copies[adapter].module).requires_grad_(False)
            for p, base in zip(total.parameters(), bare(module).parameters(), strict=True):
                p.data = p if before.copies[adapter].still else base.detach().to(p).lerp(p, weights[adapter])
            record = plan.record_of(module) or before
            plan.carry(module, record.changed(copies={**record.copies, name: Copy(total, still)}))


def copied_by(model: nn.Module, adapters: Iterable[str]) -> list[str]:
    """The modules that one of the adapters has a copy of."""
    names = {*adapters}
    return [where for where, _, record in adapted(model) if names & record.copies.keys()]


def summed_rows(model: nn.Module, weights: Mapping[str, float]) -> Patched:
    """W + w (W_i - W) for the rows W_i of tables that one of the adapters trains: {module: (itself, a fresh patch)}, one patch for modules that shared one."""
    made: dict[tuple[int, ...], Tokens] = {}
    summed: Patched = {}
    carrying = [(where, module, record, _rows_in(record, weights)) for where, module, record in adapted(model)]
    # those whose rows are another module's too come after it
    for where, module, record, patches in sorted(carrying, key=lambda row: any(n in row[2].hidden for n in row[3])):
        if not patches:
            continue
        key = tuple(map(id, patches.values()))
        if key not in made:
            made[key] = _sum_of_rows(based(module, record)["weight"], patches, weights)
        summed[where] = module, made[key]
    return summed


def _rows_in(record: Record, adapters: Iterable[str]) -> dict[str, Tokens]:
    """The rows that these adapters train of a module."""
    patches = {name: record.patches.get(name) for name in adapters}
    return {name: patch for name, patch in patches.items() if isinstance(patch, Tokens)}


def _sum_of_rows(W: Tensor, patches: Mapping[str, Tokens], weights: Mapping[str, float]) -> Tokens:
    index = sorted({row for patch in patches.values() for row in patch.rows.tolist()})
    at = {row: n for n, row in enumerate(index)}
    base = W[torch.tensor(index, device=W.device)].float()
    total = base.clone()
    for name, patch in patches.items():
        places = torch.tensor([at[row] for row in patch.rows.tolist()], device=W.device)
        total[places] += weights[name] * (patch.delta.detach().to(base) - base[places])
    return Tokens(index, total)
