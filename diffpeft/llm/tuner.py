"""Tuner: what stands between a PeftModel and the user's model, with the methods that PEFT's `base_model` has."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from diffpeft import patterns
from diffpeft.converters.formats.peft import CONFIG, PREFIX
from diffpeft.converters.opening import Opened
from diffpeft.errors import (
    AdapterStateError,
    AdapterStateWarning,
    CheckpointError,
    CheckpointWarning,
    ConfigError,
    UnknownNameError,
    WrongKindError,
    inside,
    near,
)
from diffpeft.layers.parameters import ParameterFactors
from diffpeft.layers.slot import Slot
from diffpeft.llm import adalora, attentions, discrepancies
from diffpeft.llm.checkpointing import plan_no_hook
from diffpeft.llm.conversion import unconvertible
from diffpeft.llm.injection import targeting
from diffpeft.llm.kbit import plan_forgotten
from diffpeft.llm.mismatched import fitting
from diffpeft.llm.patches import patches_of
from diffpeft.llm.prompts import Arguments, Prepare
from diffpeft.llm.renames import mapped
from diffpeft.llm.state import (
    Incompatible,
    config_of,
    plan_overwritten,
    plan_read,
    read,
    spelt,
    tensors_in,
    wholes_of,
)
from diffpeft.llm.targets import chosen, resolved
from diffpeft.llm.tying import check_tying, ties_of, twinned
from diffpeft.llm.weighted import SumOptions, plan_weighted
from diffpeft.methods import LoKrConfig, LoraConfig
from diffpeft.methods.adalora import AdaLoraConfig
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.activation import fused_of, order_of, plan_frozen, plan_trained, refuse_clashing, trained_of
from diffpeft.model.attach import Addition, method_of, mixes_of, plan_attached, plan_listed, plan_removed
from diffpeft.model.fuse import plan_fused, plan_unfused, unfuse
from diffpeft.model.merge import plan_merged
from diffpeft.model.mix import Choice, Strength, check_name, claim, forced
from diffpeft.model.plan import Plan, planned
from diffpeft.model.precision import AUTOCAST, PLAIN, Precision
from diffpeft.model.replication import plan_replicated, same_spans
from diffpeft.model.resize import Place, head_of, plan_resized, refuse_replaced
from diffpeft.model.state import slots_in
from diffpeft.model.target import adapted, kind_of
from diffpeft.model.ties import loosen, twins_of
from diffpeft.pipeline.adapters import adapters, plan_mix

BASE = "__base__"  # in a mixed batch: no adapter
WENT = "Adapter {} was active which is now deleted. Setting active adapter to {}."
OFF = Choice(enabled=False)  # the mix of a `disable_adapter` block, where batches are of the base too


@dataclass(frozen=True)
class LoadOptions:
    """How the adapter in a folder is loaded: to be trained or not, active or not, in which dtype, with its keys renamed, whatever their sizes."""

    trainable: bool
    active: bool
    precision: Precision = AUTOCAST
    key_mapping: Mapping[str, str] | None = None
    ignore_mismatched: bool = False


def inject(
    model: nn.Module, config: PeftConfig, name: str, precision: Precision = PLAIN, component: str = ""
) -> PeftConfig:
    """Add a fresh adapter to a bare model as the active one; the resolved config. The first freezes the base, and none changes what else is trained.

    `component` is what a pipeline that has the model calls it.

    Raises ConfigError, UnknownNameError or AdapterStateError, in which case nothing has changed.
    """
    parts = {component: model}
    with planned(parts) as plan:
        merged = {n: strength for mix in mixes_of(parts).values() for n, strength in mix.fused.items()}
        plan_mix(plan, model, parts, merged)  # what is in the weights stays in them; the new one comes after it
        config = plan_injected(plan, model, config, name, active=True, precision=precision, component=component)
        plan_listed(plan, model, name, config)
    return config


def plan_injected(
    plan: Plan,
    model: nn.Module,
    config: PeftConfig,
    name: str,
    *,
    active: bool,
    precision: Precision = PLAIN,
    component: str = "",
) -> PeftConfig:
    """Plan what `inject` does; the resolved config. Raises what it raises."""
    check_name(name)
    if config.is_prompt_learning:
        raise ConfigError(f"{type(config).__name__} adds tokens and not layers", remedy="Use get_peft_model.")
    with patterns.limited(ConfigError):
        config = resolved(model, config)
        config.validate()
        with _replicated(plan, model, config, lambda: found_configs(model)):
            _plan_fresh(plan, model, config, name, active, precision, component)
        plan_frozen(plan, model)
    return config


def _plan_fresh(
    plan: Plan, model: nn.Module, config: PeftConfig, name: str, active: bool, precision: Precision, component: str
) -> None:
    layers, ties = twinned(chosen(model, config), model, config)
    attentions.refuse_dora(layers, config)
    wholes, patches = wholes_of(model, config), patches_of(model, config, layers)
    check_tying(model, config, wholes, layers)
    discrepancies.warn(model, config, layers, patches)
    precision.settle_patches(patches)

    def finish(modules: Mapping[str, nn.Module], slots: dict[str, Slot]) -> dict[str, Slot]:
        precision.settle(modules, attentions.doubled(slots))
        return slots | twins_of(modules, ties, slots)

    addition = Addition(
        name,
        config,
        method_of(config, {}),
        strength=1.0 if active else None,
        trainable=active and not config.inference_mode,
        quiet=True,
        wholes=wholes,
        ties=ties_of(model, config, wholes),
        patches=patches,
        options={"scaled": True} if isinstance(config, LoKrConfig) else {},
        finish=finish,
        metadata={CONFIG: config.to_json()},
        as_in_peft=True,
    )
    plan_attached(plan, {component: model}, {component: layers}, addition)


@contextmanager
def _replicated(
    plan: Plan, model: nn.Module, config: PeftConfig, others: Callable[[], Mapping[str, PeftConfig]]
) -> Iterator[None]:
    """For planning on: the model with its layers repeated as a config says, unless they are so by one of the other adapters'."""
    spans = config.layer_replication
    if not spans or any(same_spans(other.layer_replication, spans) for other in others().values()):
        yield
        return
    plan_replicated(plan, model, spans)
    with plan.tentative():
        yield


class Tuner(nn.Module):
    """The user's model with adapters on it. What it does not have itself is the model's.

    Args:
        model: it is adapted in place.
        peft_config: of the first adapter, or of several by their names; none: the adapters come later.
        adapter_name: the first adapter's name.
        low_cpu_mem_usage: make its tensors on the meta device, until they are loaded.
        state_dict: adapt the layers that its keys name.
    """

    prefix: ClassVar[str] = ""  # what the names of the method's tensors begin with
    uses_shared_state: ClassVar[bool] = False  # whether its adapters need a PeftModel: none does here

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self.last_merge_report: dict[str, float] = {}
        self._off: Mapping[str, Strength] | None = None  # the mix that disable_adapter_layers has put aside
        self._resting: list[nn.Parameter] = []  # what was trained then
        self._lent: tuple[str, ...] = ()  # adapters that are active only because they are merged
        self._head: Place | None = None  # where the model's head is, if adapters are on it
        configs = peft_config if isinstance(peft_config, Mapping) else {adapter_name: peft_config}
        with planned(self._parts) as plan:
            for name, config in configs.items():
                config = config if state_dict is None else targeting(model, config, state_dict)
                self.plan_injected(plan, name, config, active=True, precision=Precision(False, low_cpu_mem_usage))

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, object]:
        """A model's config as a dict; of a model that has none `{"model_type": "custom"}`, as in PEFT."""
        config = getattr(model, "config", {"model_type": "custom"})
        if hasattr(config, "to_dict"):
            return dict(config.to_dict())
        return dict(asdict(config) if is_dataclass(config) else config)  # type: ignore[arg-type]

    @property
    def _parts(self) -> dict[str, nn.Module]:
        """What operations lock and change."""
        return {"": self.model}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: object, **kwargs: Any) -> Any:
        """The model's; AdaLoRA adds its penalty to a loss."""
        refuse_replaced(self._head)
        return adalora.regularised(self.model(*args, **kwargs), self.model, self.peft_config)

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA's schedule: call it in each training step between backward and zero_grad. Raises AdapterStateError if no such adapter is trained."""
        name = adalora.trained(self.peft_config)
        config = None if name is None else self.peft_config[name]
        if name is None or not isinstance(config, AdaLoraConfig):
            raise AdapterStateError(
                "no adapter of AdaLoRA is trained", remedy="Use get_peft_model with an AdaLoraConfig."
            )
        adalora.update_and_allocate(self.model, name, config, global_step)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in order."""
        names = order_of(self.model) if self._off is None else list(self._off)
        return [name for name in names if name not in self._lent]

    @property
    def active_adapter(self) -> Any:
        """The active adapter's name, or a list if there are several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def targeted_module_names(self) -> list[str]:
        """The layers that carry adapters, in the order in which they came."""
        slots = [(layer, slot) for name in self.peft_config for layer, slot in slots_in(self.model, name).items()]
        return list(dict.fromkeys(layer for layer, slot in slots if slot.parts))  # others have a bias that is trained

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The parameters that carry adapters themselves (`target_parameters`)."""
        carried = [(where, p) for where, _, record in adapted(self.model) for p in record.patches.values()]
        patches = [(where, patch) for where, patch in carried if isinstance(patch, ParameterFactors)]
        return list(dict.fromkeys(f"{where}.{name}" for where, patch in patches for name in patch.names))

    @property
    def enabled(self) -> bool:
        """Whether active adapters act: neither switched off nor, in this thread, inside a block that does without."""
        return self._off is None and not any(mix.standing() is OFF for mix in mixes_of(self._parts).values())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` takes an adapter: one that adds to linear layers."""
        name = adapter_name if adapter_name in self.peft_config else next(iter(self.active_adapters), adapter_name)
        return not unconvertible(self.model, name)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters active, in this order; they are trained (unless `inference_mode`), the others are not.

        Adapters that are merged are taken out of the weights, with a warning; those that are switched off stay so.
        """
        names = named(adapter_name)
        known(names, self.peft_config)
        refuse_clashing(self.model, names)
        with planned(self._parts) as plan:
            if fused_of(self.model):
                warnings.warn(
                    "Adapter cannot be set when the model is merged. Unmerging the model first.",
                    AdapterStateWarning,
                    stacklevel=2,
                )
                self._plan_unmerged(plan)
            self._plan_active(plan, names, self.peft_config, inference_mode)

    def _plan_active(
        self, plan: Plan, names: Sequence[str], configs: Iterable[str], inference_mode: bool = False
    ) -> None:
        """Plan to make adapters the active ones of all of these, as soon as they are switched on, and those that are trained."""
        strengths: dict[str, Strength] = dict.fromkeys(names, 1.0)
        if self._off is None:
            plan_mix(plan, self.model, self._parts, strengths)
        else:
            plan.set(self, _off=strengths, _resting=[])
        plan_trained(plan, self.model, {name: name in names and not inference_mode for name in configs})

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether adapters are trained, active or not."""
        names = named(adapter_names)
        known(names, self.peft_config)
        with planned(self._parts) as plan:
            plan_trained(plan, self.model, dict.fromkeys(names, requires_grad))

    def inject_adapter(self, model: nn.Module, adapter_name: str, **_: object) -> None:
        """Put the adapter whose config is in `peft_config` on the model, inactive."""
        with planned(self._parts) as plan:
            self.plan_injected(plan, adapter_name, self.peft_config[adapter_name], active=False)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove an adapter, or several. If none is active then, the first that is left becomes so, with a warning."""
        names = named(adapter_name)
        known(names, self.peft_config, "does not exist")
        if merged := [name for name in names if name in fused_of(self.model)]:
            raise AdapterStateError(
                f"Cannot delete adapter(s) {sorted(merged)} while they are merged", remedy="Please unmerge them first."
            )
        active = self.active_adapters
        remaining = [name for name in self.peft_config if name not in names]
        with planned(self._parts) as plan:
            plan_removed(plan, self._parts, {*names})
            for name in names:
                plan.entry(self.peft_config, name)
            plan.set(self, _head=head_of(self.model, plan))
            if self._off is not None:
                plan.set(self, _off={name: strength for name, strength in self._off.items() if name not in names})
            if active and {*active} <= {*names} and remaining:
                warnings.warn(WENT.format(", ".join(active), remaining[0]), AdapterStateWarning, stacklevel=3)
                self._plan_active(plan, remaining[:1], remaining)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str | None = None,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Put adapters together as a new one, inactive and frozen. Without a type: as their exact weighted sum, whatever the methods.

        Args:
            combination_type: PEFT's algorithm of this name instead: svd, linear, cat, ties, ties_svd, dare_linear, dare_ties, dare_linear_svd,
                dare_ties_svd, magnitude_prune, magnitude_prune_svd (LoRA); linear ((IA)^3).
            svd_rank: of the types that end in svd; default: the largest rank among the adapters.
            svd_clamp: the quantile of the factors' entries that these are cut at.
            svd_full_matrices, svd_driver: torch.linalg.svd's.
            density: the share of entries that ties, dare and magnitude_prune keep.
            majority_sign_method: how TIES elects a sign: by the "total" of the values or the "frequency" of the signs.
        """
        with patterns.limited(ConfigError), planned(self._parts) as plan:
            config = plan_weighted(
                plan,
                self.model,
                self.peft_config,
                adapters,
                weights,
                adapter_name,
                combination_type,
                SumOptions(svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method),
            )
            plan.entry(self.peft_config, adapter_name, config)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Put active adapters into the weights. What would not be finite is refused, with or without `safe_merge`."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        known(names, self.peft_config)
        merged = fused_of(self.model)
        todo = [name for name in names if name not in merged]
        if merged:
            warnings.warn(
                f"Already following adapters were merged {','.join(merged)}. You are now additionally merging {','.join(todo)}."
                if todo
                else "All adapters are already merged, nothing to do.",
                AdapterStateWarning,
                stacklevel=2,
            )
        if todo and self._off is None:  # what is switched off acts in no way
            active = order_of(self.model)
            inactive = [name for name in todo if name not in active]
            with planned(self._parts) as plan:
                if inactive:
                    refuse_clashing(self.model, [*active, *inactive])
                    plan_mix(plan, self.model, self._parts, dict.fromkeys([*active, *inactive], 1.0))
                    plan.set(self, _lent=(*self._lent, *inactive))
                plan_fused(plan, self._parts, todo, untie=True)

    def unmerge_adapter(self) -> None:
        """Take the adapters out of the weights again, to the last bit."""
        if not fused_of(self.model):
            warnings.warn("Already unmerged. Nothing to do.", AdapterStateWarning, stacklevel=2)
        with planned(self._parts) as plan:
            self._plan_unmerged(plan)

    def _plan_unmerged(self, plan: Plan) -> None:
        """Plan to take the adapters out of the weights, and to leave those active that were."""
        plan_unfused(plan, self._parts)
        if self._lent:
            plan_mix(plan, self.model, self._parts, {name: 1.0 for name in self.active_adapters})
            plan.set(self, _lent=())

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """The plain model with the active (or named) adapters in its weights, and the modules that they train whole in their places.

        `dequantize` makes plain layers of quantised ones. `last_merge_report` has the relative error of each layer afterwards.
        """
        names = None if adapter_names is None else list(adapter_names)
        if names is None and self._off is not None:
            names = list(self._off)
        known(names or (), self.peft_config)
        refuse_clashing(self.model, names or ())
        with planned(self._parts) as plan:
            report = plan_merged(plan, self._parts, names, dequantize=dequantize, untie=True)
            loosen(plan, self.model)
            plan_no_hook(plan, self.model)
            plan.set(self, peft_config={}, _head=None, last_merge_report=report)
            if dequantize:
                plan_forgotten(plan, self.model)
        return self.model

    def unload(self) -> nn.Module:
        """The model without any adapter, as it was."""
        with planned(self._parts) as plan:
            plan_removed(plan, self._parts, None)
            plan_no_hook(plan, self.model)
            plan.set(self, _head=None)
            for name in self.peft_config:
                plan.entry(self.peft_config, name)
        return self.model

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off until `enable_adapter_layers`, and train nothing of them."""
        if self._off is None:
            with planned(self._parts) as plan:
                mixes = list(mixes_of(self._parts).values())
                self._plan_unmerged(plan)
                trained = trained_of(self.model)
                off = {name: strength for mix in mixes for name, strength in plan.view(mix).choice.given.items()}
                plan.set(self, _off=off, _resting=trained)
                plan_mix(plan, self.model, self._parts, {})
                for mix in mixes:
                    plan.set(mix, choice=OFF)
                plan.require_grad(trained, False)

    def enable_adapter_layers(self) -> None:
        """Switch on what was active before `disable_adapter_layers`, and train what was trained."""
        if self._off is not None:
            with planned(self._parts) as plan:
                plan_mix(plan, self.model, self._parts, self._off)
                plan.require_grad(self._resting, True)
                plan.set(self, _off=None, _resting=[])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone, for this thread inside this block; adapters that are merged are taken out for everybody and put back after it."""
        merged = fused_of(self.model)
        try:
            if merged:
                unfuse(self.model)
            off = claim({mix.key: OFF for mix in mixes_of(self._parts).values()})
            with adapters(self.model, {}), forced(off):
                yield
        finally:
            self._put_back(merged)

    def _put_back(self, merged: Sequence[str]) -> None:
        """Put adapters into the weights again, also if that is interrupted."""
        todo = [name for name in merged if name not in fused_of(self.model)]
        if not todo:
            return
        try:
            with planned(self._parts) as plan:
                plan_fused(plan, self._parts, todo, untie=True)
        except BaseException:
            self._put_back(merged)
            raise

    def rows(
        self, adapter_names: Sequence[str], copies: int = 1, batch: int | None = None
    ) -> AbstractContextManager[None]:
        """A mixed batch: row i has the adapter `adapter_names[i // copies]`, or none where that is `__base__`. `batch`: how many rows there are.

        Raises, in PEFT's order: AdapterStateError in training, WrongKindError or UnknownNameError for the names, ConfigError for a batch of another size,
        AdapterStateError for merged adapters.
        """
        if self.model.training:
            raise AdapterStateError(
                "Cannot pass `adapter_names` when the model is in training mode.", remedy="Call model.eval() first."
            )
        if isinstance(adapter_names, str):
            raise WrongKindError("Got adapter names of type <class 'str'>, expected a list of str.")
        if unknown := sorted({*adapter_names} - {BASE, *self.peft_config}):
            raise UnknownNameError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}",
                remedy=near(unknown[0], self.peft_config) or f"There are {', '.join(self.peft_config)}.",
            )
        if batch not in (None, len(adapter_names)):
            raise ConfigError(
                "Length of `adapter_names` should be the same as the number of inputs, "
                f"but got {len(adapter_names)} and {batch} respectively.",
                remedy="Give one name a row.",
            )
        if fused_of(self.model):
            raise AdapterStateError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if not self.enabled:
            return nullcontext()
        return adapters(self.model, [{} if n == BASE else {n: 1.0} for n in adapter_names], images_per_prompt=copies)

    def resize_token_embeddings(self, *args: object, **kwargs: Any) -> Any:
        """The model's, with the adapters on its embeddings: new rows of whole copies are the model's, and a LoRA changes no new token.

        Raises AdapterStateError while adapters are merged, and for methods that cannot get other rows.
        """
        model: Any = self.model
        total = kwargs.get("new_num_tokens", args[0] if args else None)
        with planned(self._parts) as plan:
            return plan_resized(plan, model, lambda: model.resize_token_embeddings(*args, **kwargs), total)

    @property
    def inner(self) -> nn.Module:
        """The user's model."""
        return self.model

    def call(self, args: Any, kwargs: dict[str, object]) -> Any:
        """The model's output."""
        return self(*args, **kwargs)

    def prepared(self, prepare: Prepare, args: Sequence[object], kwargs: Arguments) -> Arguments:
        """The arguments of a step of generation that a model prepares. `task_ids` are for prompts."""
        kwargs.pop("task_ids", None)
        return prepare(*args, **kwargs)

    def generated(self, args: Any, kwargs: dict[str, object]) -> Any:
        """What the model generates."""
        refuse_replaced(self._head)
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def tensors(self, name: str, gathered: Mapping[str, Tensor] | None, embeddings: bool | str) -> dict[str, Tensor]:
        """{PEFT's key: tensor} of one adapter's file."""
        return spelt(self.model, name, self.peft_config[name], prefix=PREFIX, gathered=gathered, embeddings=embeddings)

    def with_ranks(self, name: str, config: PeftConfig) -> PeftConfig:
        """A config with the ranks that the adapter's tensors have, where it was told those that there is room for."""
        if all(slot.stored_rank is None for slot in slots_in(self.model, name).values()):
            return config
        config, made = copy.copy(config), config_of(self.model, name)
        assert isinstance(config, LoraConfig) and isinstance(made, LoraConfig)
        config.r, config.rank_pattern = made.r, made.rank_pattern
        return config

    def plan_overwritten(self, plan: Plan, name: str, tensors: Mapping[str, Tensor]) -> Incompatible:
        """Plan to put a file's tensors into an adapter that is there."""
        with patterns.limited(ConfigError, name):
            return plan_overwritten(plan, self.model, name, self.peft_config[name], tensors)

    def plan_injected(
        self, plan: Plan, name: str, config: PeftConfig, *, active: bool, precision: Precision = AUTOCAST
    ) -> None:
        """Plan to add a fresh adapter."""
        self._check_beside({**self.peft_config, name: config})
        config = plan_injected(plan, self.model, config, name, active=active, precision=precision)
        self._plan_known(plan, name, config)

    def _check_beside(self, configs: Mapping[str, PeftConfig]) -> None:
        """Raise ConfigError for adapters that cannot be on one model."""
        adalora.trained(configs)

    def _plan_known(self, plan: Plan, name: str, config: PeftConfig) -> None:
        """Plan what this remembers of an adapter that has been planned."""
        plan.entry(self.peft_config, name, config)
        plan.set(self, _head=head_of(self.model, plan))

    def plan_loaded(self, plan: Plan, name: str, config: PeftConfig, folder: Opened, how: LoadOptions) -> list[str]:
        """Plan to add the adapter in a folder. -> the keys of layers that it should have and has not, which is warned of."""
        where = folder.where
        with patterns.limited(CheckpointError, where), inside(where, config=True):
            source = mapped(tensors_in(folder), how.key_mapping) if how.key_mapping else folder
            if how.ignore_mismatched:
                tensors = tensors_in(source) if isinstance(source, Opened) else source
                source, _ = fitting(tensors, self._fresh(name, config), kind_of(self.model).__name__)
            return self._plan_loaded(plan, name, config, source, how)

    def _fresh(self, name: str, config: PeftConfig) -> dict[str, Tensor]:
        """{PEFT's key: tensor} of a fresh adapter, and of the model's embeddings. The model stays as it is."""
        trial = Plan()
        config = plan_injected(trial, self.model, copy.deepcopy(config), name, active=False)
        with trial.tentative():
            return spelt(self.model, name, config, prefix=PREFIX, embeddings=True)

    def _plan_loaded(
        self, plan: Plan, name: str, config: PeftConfig, source: Opened | dict[str, Tensor], how: LoadOptions
    ) -> list[str]:
        adalora.trained({**self.peft_config, name: config})
        config = resolved(self.model, config)
        config.validate()
        with _replicated(plan, self.model, config, lambda: self.peft_config):
            layers = chosen(self.model, config)
            file = read(self.model, source, config, trainable=how.trainable, chosen=layers)
            check_tying(self.model, config, file.wholes, file.slots)
            discrepancies.warn(self.model, config, layers, file.patches)
            if file.missing:
                warnings.warn(
                    f"Found missing adapter keys while loading the checkpoint: {list(file.missing)}.",
                    CheckpointWarning,
                    stacklevel=5,
                )
            strength = 1.0 if how.active else None
            plan_read(
                plan,
                self.model,
                name,
                config,
                file,
                trainable=how.trainable,
                strength=strength,
                precision=how.precision,
            )
        plan_frozen(plan, self.model)
        self._plan_known(plan, name, config)
        return list(file.missing)


def named(names: str | Sequence[str]) -> list[str]:
    """One name or several, as a list."""
    return [names] if isinstance(names, str) else list(names)


def known(names: Iterable[str], configs: Mapping[str, PeftConfig], told: str = "not found") -> None:
    """Raise UnknownNameError for a name that no adapter has; PEFT's words, which differ by what is done."""
    for name in names:
        if name not in configs:
            raise UnknownNameError(f"Adapter {name} {told}", remedy=f"There are {', '.join(configs) or 'none'}.")


def found_configs(model: nn.Module) -> dict[str, PeftConfig]:
    """{name: config} of the adapters that are on a model already, and were made from one."""
    adapters_of = (adapter for mix in mixes_of({"": model}).values() for adapter in mix.adapters.values())
    return {adapter.name: config_of(model, adapter.name) for adapter in adapters_of if CONFIG in adapter.metadata}
