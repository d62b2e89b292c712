"""AdaLoRA's schedule: which triplets keep their number, and the pull towards orthonormal factors.  Zhang et al. 2023, arXiv:2303.10512.

A weight's importance is I = |p dL/dp|. Its mean over steps, S <- beta1 S + (1 - beta1) I, times the mean of how far I is from it,
U <- beta2 U + (1 - beta2) |I - S|, is its score S U; a triplet's score is that of its number plus the means of those of its row of A and its
column of B. Over all layers together the best triplets are kept, so many as the budget of the step allows; the numbers of the others become 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.converters.formats.peft import PREFIX
from diffpeft.errors import AdapterStateError, ConfigError, ShapeMismatchError, UnknownKeysError, listed, shown
from diffpeft.layers.slot import Slot
from diffpeft.methods.adalora import AdaLora, AdaLoraConfig
from diffpeft.model.journal import ABSENT
from diffpeft.model.plan import Plan, planned
from diffpeft.model.state import slots_in

A, B, E = AdaLora.roles
RANK_AXIS = {A: 0, B: 1, E: 0}
IMPORTANCE = "importance"  # where a slot has {role: (S, U)} while it is trained
Masks = Mapping[str, list[bool]]
Means = dict[str, tuple[Tensor, Tensor]]  # of one slot: S and U by role


def trained(configs: Mapping[str, object]) -> str | None:
    """The adapter whose ranks a training changes. Raises ConfigError if there are several: PEFT has one too."""
    names = [name for name, c in configs.items() if isinstance(c, AdaLoraConfig) and not c.inference_mode]
    if len(names) > 1:
        raise ConfigError(
            f"AdaLoraModel supports only 1 trainable adapter, not {listed(names)}",
            remedy="Give all but one inference_mode=True.",
        )
    return names[0] if names else None


def update_and_allocate(model: nn.Module, adapter_name: str, config: AdaLoraConfig, global_step: int) -> None:
    """Measure what matters, and at the steps that `config` says prune the rest. To be called after backward() and before zero_grad().

    Which triplets are kept goes into config.rank_pattern. From step total_step - tfinal on they stay the same.
    """
    slots, last = _slots(model, adapter_name), config.last_step
    with planned({"": model}) as plan:
        if global_step < last:
            means = _measured(slots, config)
            for layer, slot in slots.items():
                plan.set(slot, **{IMPORTANCE: means[layer]})
            if config.tinit < global_step and global_step % config.deltaT == 0:
                _plan_pruned(plan, slots, means, adapter_name, config, budget(config, len(slots), global_step))
        elif global_step == last:
            measured = {layer: slot.__dict__.get(IMPORTANCE) for layer, slot in slots.items()}
            _plan_pruned(plan, slots, measured, adapter_name, config, budget(config, len(slots), global_step))
            for slot in slots.values():
                plan.set(slot, **{IMPORTANCE: ABSENT})
        else:
            _plan_masked(plan, slots, _masks(config, adapter_name))


def budget(config: AdaLoraConfig, layers: int, step: int) -> int:
    """How many triplets all layers together may have: from init_r to target_r a layer along a cubic curve."""
    start, target = config.init_r * layers, config.target_r * layers
    if step <= config.tinit:
        return start
    left = 1 - (step - config.tinit) / (config.last_step - config.tinit)
    return int((start - target) * max(left, 0) ** 3 + target)


def orthogonal_loss(model: nn.Module, adapter_name: str) -> Tensor:
    """The mean over all A and B of |A A^T - 1| and |B^T B - 1|, Frobenius norms. A scalar."""
    terms = [term for slot in _slots(model, adapter_name).values() for term in slot(_skewness)]
    return torch.stack([term.to(terms[0]) for term in terms]).mean()


def regularised(outputs: Any, model: nn.Module, configs: Mapping[str, Any]) -> Any:
    """A model's outputs, to whose loss, if there is one, orth_reg_weight * orthogonal_loss of the trained adapter has been added."""
    name, loss = trained(configs), getattr(outputs, "loss", None)
    if name is not None and isinstance(loss, Tensor):
        penalty = configs[name].orth_reg_weight * orthogonal_loss(model, name)
        outputs.loss = (loss + penalty.to(loss.device)).to(loss.dtype)
    return outputs


def pruned(state: Mapping[str, Tensor], config: AdaLoraConfig, adapter_name: str) -> dict[str, Tensor]:
    """A state dict (of a PeftModel or a bare module) as a file holds it: without the triplets that config.rank_pattern leaves out.

    As in PEFT, the names in config.rank_pattern, which is to be written beside it, lose the adapter's name.
    """
    if config.rank_pattern is None:
        return dict(state)
    masks = _masks(config, adapter_name)
    config.rank_pattern = {f"{layer}.{E}": mask for layer, mask in masks.items()}
    smaller = dict(state)
    for key, t in state.items():
        layer, _, role = key.removesuffix(f".{adapter_name}").removeprefix(PREFIX).rpartition(".")
        if role in RANK_AXIS and layer in masks:
            smaller[key] = _kept(t, masks[layer], role, layer)
    return smaller


def resize(model: nn.Module, adapter_name: str, config: AdaLoraConfig) -> None:
    """Give every layer the triplets that config.rank_pattern keeps, as new parameters. Raises as `plan_resized`, before anything changes."""
    with planned({"": model}) as plan:
        plan_resized(plan, model, adapter_name, config)


def plan_resized(plan: Plan, model: nn.Module, name: str, config: AdaLoraConfig) -> dict[str, dict[str, nn.Parameter]]:
    """Plan to give every layer the triplets that config.rank_pattern keeps: before the tensors of a file that has one are put in.

    The scale stays as it was. -> {layer: {role: the new parameter}} of those that are planned. Raises UnknownKeysError for layers that the adapter
    does not have, ShapeMismatchError for masks of another size.
    """
    if config.rank_pattern is None:
        return {}
    slots, masks = _slots(model, name), _masks(config, name)
    if unknown := set(masks) - set(slots):
        raise UnknownKeysError(
            f"rank_pattern names layers that adapter {shown(name)} has not",
            where=listed(sorted(unknown)),
            remedy="The file is of another model, or its target_modules were changed.",
        )
    resized: dict[str, dict[str, nn.Parameter]] = {layer: {} for layer in masks}
    for layer, mask in masks.items():
        for role in RANK_AXIS:
            before = slots[layer].get_parameter(role)
            smaller = _kept(before, mask, role, layer).detach()
            resized[layer][role] = nn.Parameter(smaller, requires_grad=before.requires_grad)
            plan.entry(slots[layer]._parameters, role, resized[layer][role])
    return resized


def _slots(model: nn.Module, name: str) -> dict[str, Slot]:
    """{layer: slot} of an adapter, without those that only change a bias."""
    slots = {layer: slot for layer, slot in slots_in(model, name).items() if E in slot._parameters}
    if not slots:
        raise AdapterStateError(
            f"{shown(name)} is no AdaLoRA of this model", remedy="Give the name of an adapter made with AdaLoraConfig."
        )
    return slots


@torch.no_grad()
def _measured(slots: Mapping[str, Slot], config: AdaLoraConfig) -> dict[str, Means]:
    """{layer: S and U of every weight}, moved by what this step's gradient says; a weight without one (an expert not asked) has importance 0."""
    if all(slot.get_parameter(role).grad is None for slot in slots.values() for role in RANK_AXIS):
        raise AdapterStateError(
            "there are no gradients to tell what matters",
            remedy="Call update_and_allocate after loss.backward() and before optimizer.zero_grad().",
        )
    return {layer: {role: _moved(slot, role, config) for role in RANK_AXIS} for layer, slot in slots.items()}


def _moved(slot: Slot, role: str, config: AdaLoraConfig) -> tuple[Tensor, Tensor]:
    """S and U of one weight after this step."""
    p = slot.get_parameter(role)
    now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
    before = slot.__dict__.get(IMPORTANCE, {}).get(role, (torch.zeros_like(p), torch.zeros_like(p)))
    S, U = (t.to(p) for t in before)
    S = config.beta1 * S + (1 - config.beta1) * now
    return S, config.beta2 * U + (1 - config.beta2) * (now - S).abs()


def _score(means: Means | None) -> Tensor:
    """A number for each triplet [r]."""
    if means is None:
        raise AdapterStateError(
            "no gradients were measured before the step that prunes",
            remedy="Call update_and_allocate at every step, or make tfinal smaller.",
        )
    by = {role: S * U for role, (S, U) in means.items()}
    return by[E].flatten() + (by[A].mean(1) + by[B].mean(0))


def _plan_pruned(
    plan: Plan,
    slots: Mapping[str, Slot],
    means: Mapping[str, Means | None],
    name: str,
    config: AdaLoraConfig,
    allowed: int,
) -> None:
    """Plan to keep the `allowed` best triplets (fewer where several have the same score), and to write down which."""
    scores = {layer: _score(means[layer]) for layer in slots}
    every = torch.cat([score.cpu() for score in scores.values()])
    excess = len(every) - allowed
    bar = every.kthvalue(excess)[0].item() if excess > 0 else -1.0
    masks = {layer: (~(score <= bar)).tolist() for layer, score in scores.items()}
    _plan_masked(plan, slots, masks)
    before = {} if config.rank_pattern is None else _masks(config, name)
    pattern = {f"{layer}.{E}.{name}": _unfolded(mask, before.get(layer, mask)) for layer, mask in masks.items()}
    plan.set(config, rank_pattern=pattern)


def _plan_masked(plan: Plan, slots: Mapping[str, Slot], masks: Masks) -> None:
    """Plan to put 0 where a mask says no; a layer that was made smaller has only those that it says yes to."""
    for layer in slots.keys() & masks.keys():
        p, mask = slots[layer].get_parameter(E), masks[layer]
        if len(mask) == len(p) and not all(mask):
            out = ~torch.tensor(mask, dtype=torch.bool, device=p.device)[:, None]
            plan.fill(p, p.detach().masked_fill(out, 0.0))


def _unfolded(mask: list[bool], before: list[bool]) -> list[bool]:
    """A mask of the triplets that an earlier mask kept, as one of all triplets."""
    if len(mask) == len(before):
        return mask
    inner = iter(mask)
    return [keep and next(inner) for keep in before]


def _kept(t: Tensor, mask: list[bool], role: str, layer: str) -> Tensor:
    """The triplets of a factor that a mask keeps; the factor itself if it has no others."""
    size, axis = t.shape[RANK_AXIS[role]], RANK_AXIS[role]
    if size == sum(mask):
        return t
    if size != len(mask):
        raise ShapeMismatchError(
            f"{role} has {size} triplets, rank_pattern is for {len(mask)}",
            where=layer,
            remedy="init_r or rank_pattern was changed.",
        )
    return t.index_select(axis, torch.tensor(mask, dtype=torch.bool, device=t.device).nonzero().flatten())


def _masks(config: AdaLoraConfig, name: str) -> dict[str, list[bool]]:
    """{layer: which triplets are kept}, with or without the adapter's name in the pattern's."""
    if config.rank_pattern is None:
        raise AdapterStateError(
            "the config has no rank_pattern",
            remedy="Call update_and_allocate at every step, the step total_step - tfinal included.",
        )
    return {key.removesuffix(f".{name}").removesuffix(f".{E}"): mask for key, mask in config.rank_pattern.items()}


def _skewness(slot: Slot) -> list[Tensor]:
    """|A A^T - 1| and |B^T B - 1|."""
    a, b = slot.get_parameter(A), slot.get_parameter(B)
    return [(gram - torch.eye(len(gram)).to(gram)).norm() for gram in (a @ a.t(), b.t() @ b)]
