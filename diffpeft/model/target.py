"""Which layers: components of a pipeline, layers of a module, and names, suffixes, patterns and presets that choose among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch.nn as nn

from diffpeft import patterns
from diffpeft.bundle import COMPONENTS
from diffpeft.errors import AdapterStateError, ConfigError, UnknownNameError, WrongKindError, listed, near, shown
from diffpeft.layers.carried import ADAPTERS, COPIES, RECORD, Record, base_class
from diffpeft.layers.hooks import refusal
from diffpeft.layers.sites import site_of
from diffpeft.methods.base import Geometry

COMPILED = "_orig_mod"  # the level that torch.compile puts around a module
FSDP_UNIT = "_fsdp_wrapped_module"  # FSDP 1's
_LEVELS = frozenset({COMPILED, FSDP_UNIT, "_checkpoint_wrapped_module"})  # names go without these

# what models call the projections of their attentions, and the layers of their feed-forwards (gated ones, experts and convolutions too)
_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj", "o_proj"),
    *("to_query", "to_key", "to_value", "self_attn.to_out", "attn1.to_out", "mha.to_out", "attn.out_layer"),
    *(f"{kind}attention.out_layer" for kind in ("self_", "cross_", "av_cross_", "va_cross_")),
)
_FEED_FORWARD = (
    *("ff.net.0.proj", "ff.net.2", "ffn.net.0.proj", "ffn.net.2", "feed_forward.net.0.proj", "feed_forward.net.2"),
    *("mlp.net.0.proj", "mlp.net.2", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    *("fc1", "fc2", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.linear_fc2", "ff.conv_point"),
    *("ffn.0", "ffn.2", "ff.gate", "ff.up", "ff.down", "ff.linear_in", "ff.linear_out"),
    *("ff.linear_1", "ff.linear_2", "ff.out_projection", "feed_forward.in_layer", "feed_forward.out_layer"),
    *(f"feed_forward.{layer}{n}" for n in (1, 2, 3) for layer in ("w", "linear_")),
    *(f"{feed}.w{n}" for n in (1, 2, 3) for feed in ("ffn", "ff_i.shared_experts", "ff_t")),
    *(f"mlp_moe_gen.{layer}_proj" for layer in ("gate", "up", "down")),
    *("ff.conv_inverted", "ff.conv_temp", "img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out"),
    *("audio_ff.net.0.proj", "audio_ff.net.2"),
)
PRESETS: dict[str, tuple[str, ...]] = {
    "attn": _ATTENTION,
    "attn-mlp": (*_ATTENTION, *_FEED_FORWARD, "proj_in", "proj_out"),
    "full": ("*",),
}


def components(target: object) -> dict[str, nn.Module]:
    """{component name: module}: a diffusers pipeline's adaptable components, or the one module that was given, under the name it has in pipelines."""
    if isinstance(target, nn.Module):
        return {_component_name(target): target}
    parts = getattr(target, "components", None)
    modules = {n: m for n, m in parts.items() if isinstance(m, nn.Module)} if isinstance(parts, Mapping) else {}
    adaptable = {name: modules[name] for name in COMPONENTS if name in modules}
    if adaptable.keys() & _DENOISERS - {_PRIOR}:  # then what makes its conditions is as it is
        adaptable.pop(_PRIOR, None)
    if not adaptable.keys() & _DENOISERS and (others := [n for n, m in modules.items() if _is_denoiser(m)]):
        raise ConfigError(
            f"a {type(target).__name__} denoises with {listed(others)}, which adapters for pipelines have no name for",
            remedy=f"Pass the model itself, for example pipe.{others[0]}.",
        )
    if not adaptable:
        raise ConfigError(
            f"cannot adapt a {type(target).__name__}", remedy="Pass a diffusers pipeline or a torch.nn.Module."
        )
    return adaptable


def check_single(model: object, asked: str) -> None:
    """Raise WrongKindError for what is no model where `asked`, a function of PEFT's, is for one: a pipeline, an id, a config."""
    if isinstance(model, nn.Module):
        return
    parts = getattr(model, "components", None)
    models = [name for name, part in parts.items() if isinstance(part, nn.Module)] if isinstance(parts, Mapping) else []
    what, remedy = f"this is a {type(model).__name__}", "Pass a torch.nn.Module."
    if models:
        what = f"this is a pipeline, a {type(model).__name__}"
        remedy = (
            "On a pipeline diffpeft.attach(pipe, config) makes an adapter, and diffpeft.load_lora(pipe, source) loads one; "
            f"or pass one of its models: pipe.{min(models, key=[*COMPONENTS, *models].index)}."
        )
    elif isinstance(model, (str, os.PathLike)):
        remedy = "Load the model first, for example with AutoModelForCausalLM.from_pretrained."
    elif hasattr(model, "peft_type"):
        remedy = "Model and config stand in the other order."
    raise WrongKindError(f"{asked} is for a model, and {what}", remedy=remedy)


_PRIOR = "prior"
_DENOISERS = frozenset({"unet", "transformer", "transformer_2", _PRIOR})
_UNNAMED = ("StableCascadeUNet", "DiffNeXt")  # in the names of denoisers that pipelines call otherwise
# {library: {what is in the name of a class: the component that it is in pipelines}}; the first that fits counts
_COMPONENT_OF = {
    "diffusers": {
        **dict.fromkeys(("ControlNet", "Autoencoder", "Vae", *_UNNAMED), ""),
        "Prior": _PRIOR,
        "UNet": "unet",
        "Transformer": "transformer",
        "DiT": "transformer",
        "UVit": "transformer",
        "TextConnectors": "connectors",
        "TextConditioner": "text_conditioner",
    },
    "transformers": {"CLIPText": "text_encoder", "T5Encoder": "text_encoder"},
}


def _component_name(module: nn.Module) -> str:
    """The component that a model is in pipelines, by its class or one that it is derived from; empty for any other module."""
    for library, name in _library_classes(module):
        for part, component in _COMPONENT_OF[library].items():
            if part in name:
                return component
    return ""


def _is_denoiser(module: nn.Module) -> bool:
    """Whether this is one of diffusers' denoisers, under whatever name a pipeline has it."""
    names = [name for library, name in _library_classes(module) if library == "diffusers"]
    unnamed = any(part in name for name in names for part in _UNNAMED)
    return "ModelMixin" in names and (unnamed or _component_name(module) in _DENOISERS)


def _library_classes(module: nn.Module) -> list[tuple[str, str]]:
    """The library and the name of each class of diffusers or transformers that a module is of."""
    kinds = type(getattr(module, COMPILED, module)).__mro__
    return [(library, k.__name__) for k in kinds if (library := k.__module__.partition(".")[0]) in _COMPONENT_OF]


def layers_of(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module | None]]:
    """{dotted name: (layer, its parent)} of every layer that can carry adapters, each module once. Adapters of ours are not entered."""
    return _layers_in(_walk(model))


def walked(
    model: nn.Module,
) -> tuple[dict[str, tuple[nn.Module, nn.Module | None]], list[tuple[str, nn.Module, Record]]]:
    """`layers_of` and `adapted` of a model by one walk."""
    steps = _walk(model)
    return _layers_in(steps), _adapted_in(steps)


def adapted(model: nn.Module) -> list[tuple[str, nn.Module, Record]]:
    """(dotted name, module, record) of everything that carries something of an adapter, each module once."""
    return _adapted_in(_walk(model))


def _layers_in(steps: Iterable[_Step]) -> dict[str, tuple[nn.Module, nn.Module | None]]:
    return {name: (m, parent) for name, m, parent in steps if site_of(base_class(m)) is not None}


def _adapted_in(steps: Iterable[_Step]) -> list[tuple[str, nn.Module, Record]]:
    return [(name, m, r) for name, m, _ in steps if (r := m.__dict__.get(RECORD)) is not None]


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{dotted name: layer} of the layers that have slots."""
    return {name: module for name, module, record in adapted(model) if record.slots}


def modules_of(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[str, tuple[nn.Module, nn.Module | None]]:
    """{dotted name: (module, its parent)} of the modules that are wanted, each once; nothing of ours is entered."""
    return {name: (module, parent) for name, module, parent in _walk(model) if wanted(module)}


_Step = tuple[str, nn.Module, "nn.Module | None"]  # the dotted name of a module, the module and its parent
_OURS = frozenset({ADAPTERS, COPIES})


def _walk(model: nn.Module) -> list[_Step]:
    """All modules of a model in order, each once; nothing of ours is entered, and of a layer of peft's only the layer that it is around, under its name.

    Walked anew each time: to see that a model is still built as before takes two thirds as long, and a module that somebody has replaced must be seen.
    """
    steps: list[_Step] = []
    seen: set[int] = set()
    todo: list[_Step] = [("", model, None)]
    while todo:
        step = name, module, _ = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        inside = module._modules
        if is_pefts(module):
            inner_layer = inside[INNER]
            assert inner_layer is not None
            todo.append((name, inner_layer, step[2]))
            continue
        steps.append(step)
        if inside and RECORD in module.__dict__:
            inside = {} if inside.keys() <= _OURS else {n: m for n, m in inside.items() if n not in _OURS}
        if inside:
            level = f"{name}." if name else ""
            for inner, child in reversed(inside.items()):
                if child is not None:
                    todo.append((name if inner in _LEVELS else level + inner, child, module))
    return steps


INNER = "base_layer"  # what a layer of peft's calls the layer that it is around


def is_pefts(module: nn.Module) -> bool:
    """Whether a module is a layer of peft's own, around another."""
    return INNER in module._modules and type(module).__module__.partition(".")[0] == "peft"


def within_pefts(model: nn.Module) -> frozenset[int]:
    """The ids of the layers that layers of peft's are around."""
    return frozenset(id(module._modules[INNER]) for module in model.modules() if is_pefts(module))


def targets_of(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module | None]]:
    """`layers_of` without those that methods do not fit, which have only a bias to change."""
    return {name: (m, p) for name, (m, p) in layers_of(model).items() if (s := site_of(base_class(m))) and s.targets}


def spellings(name: str, component: str = "text_encoder") -> tuple[str, ...]:
    """The names that a layer goes by: of a CLIP text encoder's with and without the level `text_model.`, which transformers 5 dropped."""
    if not component.startswith("text_encoder"):
        return (name,)
    if name.startswith("text_model."):
        return name, name.removeprefix("text_model.")
    return (name, f"text_model.{name}") if name.startswith(_IN_CLIP) else (name,)


_IN_CLIP = ("encoder.layers.", "embeddings.", "final_layer_norm")  # what a CLIP's names begin with, below that level


def select(
    parts: Mapping[str, nn.Module], targets: str | Sequence[str] | None, exclude: str | Sequence[str] | None = None
) -> dict[str, dict[str, nn.Module]]:
    """{component: {layer name: layer}} chosen by `targets`: a preset, a regular expression for whole names, or a list of names and suffixes.

    Raises UnknownNameError for an entry that matches nothing anywhere, AdapterStateError for a layer that cannot be adapted.
    """
    if not targets:
        raise ConfigError(
            "no layers were chosen",
            remedy=f"Give targets: a preset ({', '.join(PRESETS)}), a regular expression or a list of names.",
        )
    layers = {component: targets_of(model) for component, model in parts.items()}
    names = [(component, name) for component, modules in layers.items() for name in modules]
    preset = is_preset(targets)
    entries, excluded = _entries(targets), _entries(exclude or ())
    if not preset:
        _check_entries(entries, names)
    chosen: dict[str, dict[str, nn.Module]] = {}
    for component, modules in layers.items():
        chosen[component] = {
            n: m
            for n, (m, parent) in modules.items()
            if _match(_for(m, entries), component, n)
            and not _match(excluded, component, n)
            and _usable(parts[component], n, m, parent, quiet=preset)
        }
        inside = {n: m for n, m in with_inner(chosen[component]).items() if not _match(excluded, component, n)}
        chosen[component] |= inside
    if not any(chosen.values()):
        raise UnknownNameError(
            f"{shown(targets)} chooses no layer that can be adapted", remedy="Loosen targets, or exclude less."
        )
    return chosen


def with_inner(chosen: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Layers, and those inside that are adapted where these are: an attention's output projection goes with it, as in PEFT."""
    inside = {
        inner: chosen[outer].get_submodule(inner[len(outer) :].lstrip(".")) for inner, outer in along(chosen).items()
    }
    return {**chosen, **inside}


def along(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """{layer: the one around it} of the layers that are adapted where others are, and of which configs speak by these."""
    sites = {name: site_of(base_class(module)) for name, module in layers.items()}
    return {
        f"{name}.{inner}" if name else inner: name
        for name, site in sites.items()
        for inner in (site.along if site is not None else ())
    }


def _for(module: nn.Module, entries: str | Sequence[str]) -> str | Sequence[str]:
    """The entries that may choose a module: `*` stands for all layers but embeddings, which have to be named."""
    site = site_of(base_class(module))
    if isinstance(entries, str) or site is None or not site.geometry_of(module).lookup:
        return entries
    return [entry for entry in entries if entry != "*"]


def geometry_of(module: nn.Module) -> Geometry:
    """The geometry of a layer, one of `layers_of`."""
    site = site_of(base_class(module))
    assert site is not None
    return site.geometry_of(module)


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module has without adapters."""
    return base_class(module)


def check_target(model: nn.Module, module: nn.Module, parent: nn.Module | None, name: str) -> None:
    """Raise ConfigError for a module of a model that methods do not fit, AdapterStateError for a layer that cannot be adapted."""
    site = site_of(base_class(module))
    if site is None or not site.targets:
        raise ConfigError(
            f"Target module {shown(name)} is not supported: it is a {base_class(module).__name__}",
            remedy="Adapters go on linear, convolution and embedding layers.",
        )
    if why := site.unfit(module) or unseen(model, name):
        raise ConfigError(why, where=f"layer {shown(name)}", remedy="Exclude it.")
    if why := refusal(module, parent, name):
        raise AdapterStateError(f"layer {shown(name)} cannot be adapted: {why}", remedy="Exclude it.")


# {types of models: (what they are called, layers whose weights their fused kernels read)}; PEFT's table
_READ_BY_KERNELS = {
    frozenset(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")): ("Mamba-based", ("conv1d", "out_proj")),
}


def unseen(model: nn.Module, name: str) -> str:
    """Why adapters on a layer would not be seen by the model, whose kernels read its weight on a GPU; empty if they would."""
    kind, last = getattr(getattr(model, "config", None), "model_type", None), name.rpartition(".")[2]
    for kinds, (family, names) in _READ_BY_KERNELS.items():
        if kind in kinds and last in names:
            return (
                f"Module {shown(last)} is incompatible with {family} models (model_type={kind!r}): "
                "their fused kernel reads its weight and would not see the adapter"
            )
    return ""


def is_preset(targets: object) -> bool:
    """Whether these targets are the name of a preset."""
    return isinstance(targets, str) and targets in PRESETS


def _entries(targets: str | Sequence[str]) -> str | Sequence[str]:
    """The names of a preset, or what is said otherwise: a list, or an expression that compiles."""
    if is_preset(targets):
        return PRESETS[targets]  # type: ignore[index]
    if not isinstance(targets, str):
        return targets
    try:
        patterns.check(targets)
    except ConfigError as error:
        raise ConfigError(error.what, remedy="Or pass a list of layer names.") from error
    return targets


def _match(entries: str | Sequence[str], component: str, name: str) -> bool:
    """A string is a regular expression for the whole name; a list holds whole names and suffixes, and `*` for all."""
    names = spellings(name, component)
    if isinstance(entries, str):
        return any(patterns.fullmatch(entries, n) for n in names)
    return any(entry == "*" or n == entry or n.endswith("." + entry) for entry in entries for n in names)


def _check_entries(entries: str | Sequence[str], names: Sequence[tuple[str, str]]) -> None:
    unmatched = [
        e
        for e in ([entries] if isinstance(entries, str) else entries)
        if not any(_match(entries if isinstance(entries, str) else [e], c, n) for c, n in names)
    ]
    if unmatched:
        known = {".".join(n.split(".")[-k:]) for _, n in names for k in (1, 2, 3)} | {n for _, n in names} | {*PRESETS}
        remedy = near(unmatched[0], known) or f"The presets are {', '.join(PRESETS)}."
        if isinstance(entries, str) and any(_match([entries], c, n) for c, n in names):
            remedy = f"A text is a regular expression for whole names: pass [{shown(entries)}] for names that end so."
        raise UnknownNameError(f"no layer matches {shown(unmatched[0])}", remedy=remedy)


def _usable(model: nn.Module, name: str, module: nn.Module, parent: nn.Module | None, quiet: bool) -> bool:
    """Whether the layer can be adapted. A preset passes over layers that cannot; one that was named raises."""
    why = refusal(module, parent, name) or unseen(model, name)
    if why and not quiet:
        raise AdapterStateError(f"layer {shown(name)} cannot be adapted: {why}", remedy="Exclude it.")
    return not why
