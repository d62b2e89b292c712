"""Adapters into the weights of a saved pipeline: its files are copied, and in the copies the weights that adapters change are written over.

Names, headers and every other byte stay as they are. Memory holds the adapters and the weights of one layer: the models are built without weights,
only to know their layers, and `load_lora` puts the adapters on them with all its checks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import converters
from converters.rows import Unfit, split
from diffpeft import io
from diffpeft.bundle import COMPONENTS, Handle, dotted, parted
from diffpeft.errors import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
    ShapeMismatchError,
    UnreadableFileError,
    listed,
    shown,
)
from diffpeft.families import family_of
from diffpeft.layers.carried import Record, effective
from diffpeft.methods.linalg import is_finite, wide_dtype
from diffpeft.model.target import adapted, layers_of, spellings
from diffpeft.pipeline.load import load_lora
from diffpeft.pipeline.locate import located
from diffpeft.pipeline.open import check_model

INDEX = "model_index.json"
# weights, or the index of weights in several files: what stands behind the second dot is the variant
_WEIGHTS = re.compile(
    r"[^.]+?(?:\.(?P<a>\w+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<b>\w+))?\.safetensors(?:\.index(?:\.(?P<c>\w+))?\.json)?"
)
# other programs' copies of the same weights, which would not have the adapters in them
_OTHERS = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|msgpack|h5|onnx|onnx_data|pb|gguf|safetensors)(\.index.*\.json)?")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Stored:
    """One component's folder: the files that stand in the copy, and the tensors in those with weights."""

    files: Sequence[Path]
    tensors: Mapping[str, Handle]

    def tensor(self, name: str) -> Handle | None:
        """A parameter's bytes; CLIP's names with or without `text_model.`."""
        return next((self.tensors[spelt] for spelt in spellings(name) if spelt in self.tensors), None)


@dataclass(frozen=True)
class _Change:
    """One layer that adapters change."""

    name: str
    module: Any
    record: Record
    weight: Handle
    bias: Handle | None


def bake(
    model: str | os.PathLike[str],
    adapters: Sequence[tuple[Any, float]],
    out: str | os.PathLike[str],
    *,
    variant: str | None = None,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Write the pipeline in folder `model` to folder `out`, whole or not at all, with `adapters` (source, strength) in its weights, in this order.

    The weights are those that `fuse` gives in the stored dtype, to the bit. `variant`: use `*.VARIANT.safetensors`, as diffusers does; components
    that have none keep their plain files. `told(done, total)` is called after each layer. -> {component: how many layers changed}.

    Raises what `load_lora` and `fuse` raise, ConfigError for a place to write that cannot be, CheckpointError for a pipeline that is not of files
    that can be read safely. Then nothing was written.
    """
    model, out = Path(model), Path(out)
    _check_places(model, out)
    index = _json(model / INDEX)
    names = [n for n, kind in index.items() if _is_component(n, kind) and (model / n).is_dir()]
    stored = {name: _stored(model / name, variant) for name in names}
    if variant and not any(_variant(file) == variant for own in stored.values() for file in own.files):
        raise CheckpointError(f"no file is of the variant {shown(variant)}", where=model, remedy="Leave out variant.")
    parts = {n: _weightless(model, n, index[n], stored[n]) for n in COMPONENTS if n in stored and stored[n].tensors}
    # a pipeline as load_lora sees it: its class's name and its components
    target = type(str(index.get("_class_name")), (), {**parts, "components": parts})()
    for n, (source, weight) in enumerate(adapters):
        source = located(source)
        _show_weights(source, target, parts, stored)
        load_lora(target, source, name=f"lora-{n}", weight=weight)
    changes = {name: _changes(name, part, stored[name]) for name, part in parts.items()}
    with io.folder(out) as folder:
        beside = [p for p in sorted(model.iterdir()) if p.is_file() and p.name[0] != "." and not _others(p)]
        for file in [*beside, *(file for own in stored.values() for file in own.files)]:
            _copy(file, folder / file.relative_to(model))
        _write([change for own in changes.values() for change in own], model, folder, told)
    return {name: len(own) for name, own in changes.items() if own}


def _write(changes: Sequence[_Change], model: Path, folder: Path, told: Callable[[int, int], None]) -> None:
    """Compute each layer and write its tensors over those in the copies, which have them at the same bytes."""
    with contextlib.ExitStack() as stack:
        files: dict[Path, Any] = {}
        for done, change in enumerate(changes, 1):
            for handle, tensor in _computed(change):
                assert handle.path is not None
                if handle.path not in files:
                    copy = folder / handle.path.relative_to(model)
                    files[handle.path] = stack.enter_context(open(copy, "r+b"))
                files[handle.path].seek(handle.start)
                for chunk in io.chunks(io.handle(tensor)):
                    files[handle.path].write(chunk)
            told(done, len(changes))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())


def _is_component(name: str, kind: Any) -> bool:
    """Whether an entry of model_index.json names a component: a plain name, a library and a class."""
    pair = isinstance(kind, list) and len(kind) == 2 and all(isinstance(part, str) for part in kind)
    return pair and re.fullmatch(r"\w+", name) is not None


def _check_places(model: Path, out: Path) -> None:
    if model.is_file() and model.suffix == ".safetensors":
        raise CheckpointError(
            "this is a single file, and only a diffusers folder can be fused into",
            where=model,
            remedy="Make one: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER).",
        )
    check_model(str(model), None)
    if not model.is_dir():
        raise CheckpointError(
            "the model is not on this machine", where=model, remedy=f"Get it: hf download {model} --local-dir FOLDER."
        )
    if out.resolve() == model.resolve() or model.resolve() in out.resolve().parents:
        raise ConfigError("the output would be in the model itself", where=out, remedy="Name another folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("the output is there already", where=out, remedy="Name a new folder, or empty this one.")


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableFileError(f"cannot read it ({error})", where=file) from error
    if not isinstance(found, dict):
        raise UnreadableFileError("it is no table", where=file)
    return found


def _variant(file: Path) -> str | None:
    """The variant of a file of weights, "" for none; None for other files."""
    found = _WEIGHTS.fullmatch(file.name)
    return found and (found["a"] or found["b"] or found["c"] or "")


def _others(file: Path) -> bool:
    return bool(_OTHERS.fullmatch(file.name))


def _stored(folder: Path, variant: str | None) -> Stored:
    """What of a component's folder goes into the copy: all but weights of other variants and in other containers."""
    every = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    variants: dict[str, list[Path]] = {}
    for file in every:
        if (found := _variant(file)) is not None and file.parent == folder:
            variants.setdefault(found, []).append(file)
    chosen = variants.get(variant or "") or variants.get("")
    if variants and not chosen:
        raise CheckpointError(
            f"the weights are there only as {listed(variants)}", where=folder, remedy=f"Say --variant {min(variants)}."
        )
    for file in [] if variants else every:
        io.refuse_pickle(file)
    files = [file for file in every if not _others(file)] + (chosen or [])
    return Stored(files, _tensors(chosen or [], folder))


def _tensors(files: Iterable[Path], folder: Path) -> dict[str, Handle]:
    tensors: dict[str, Handle] = {}
    wanted: set[str] = set()
    files = list(files)
    for file in files:
        if file.suffix == ".json":
            wanted |= {*map(str, _json(file).get("weight_map", {}).values())}
            continue
        own = io.header(file)[0]
        if twice := own.keys() & tensors.keys():
            raise CheckpointError("two files hold the same tensors", where=f"{folder}: {listed(sorted(twice)[:3])}")
        tensors |= own
    if lost := wanted - {file.name for file in files}:
        raise UnreadableFileError("files of weights are missing", where=f"{folder}: {listed(sorted(lost))}")
    return tensors


def _weightless(model: Path, name: str, kind: Sequence[str], stored: Stored) -> nn.Module:
    """A component built from its config. Its parameters have the stored dtypes and their shapes, and all their numbers are one zero."""
    import diffusers
    import transformers

    library, cls = kind
    found: Any = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), cls, None)
    if found is None:
        raise CheckpointError(f"{name} is a {shown(f'{library}.{cls}')}, which is not known here", where=model / INDEX)
    try:
        with torch.device("meta"):
            if library == "diffusers":
                module = found.from_config(found.load_config(model / name))
            else:
                module = found(found.config_class.from_pretrained(model / name))
                module.tie_weights()
    except (MemoryError, NotImplementedError):
        raise
    except Exception as error:  # as in open_pipeline: these libraries raise all kinds
        raise CheckpointError(
            f"cannot build {name} from its config ({type(error).__name__}: {error})", where=model / name
        ) from error
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay so
    for prefix, own in module.named_modules():
        for key, p in own._parameters.items():
            if p is not None and p not in made:
                handle = stored.tensor(dotted(prefix, key))
                (zero,) = io.load([Handle(handle.dtype if handle else "F32", ())])
                made[p] = nn.Parameter(zero.expand(p.shape), requires_grad=False)
            own._parameters[key] = None if p is None else made[p]
    return module.eval()


def _show_weights(source: Any, target: Any, parts: Mapping[str, nn.Module], stored: Mapping[str, Stored]) -> None:
    """Give the weights to those layers of which load_lora works out what an adapter of their fused layer does."""
    own = family_of(target)
    if own not in converters.fitting(source).families:
        return  # load_lora says so
    names = {component: [*layers_of(part)] for component, part in parts.items()}
    for entry in converters.read(source, family=own, names=names).entries:
        try:
            split(entry)
        except Unfit:
            for component, layer in map(parted, entry.targets):
                handle = stored[component].tensor(f"{layer}.weight") if component in parts else None
                if handle and layer in names[component]:
                    weight: Any = parts[component].get_submodule(layer).weight
                    weight.data = io.load([handle])[0]


def _changes(component: str, model: nn.Module, stored: Stored) -> list[_Change]:
    """The layers that adapters change. Raises for those whose weights are not in the files as the layer has them."""
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners[p] = owners.get(p, 0) + 1
    out = []
    for layer, module, record in adapted(model):
        any_module: Any = module
        name, own = dotted(component, layer), {}
        if not _steps(record):
            continue
        for key in ("weight", "bias"):
            parameter = getattr(any_module, key, None)
            own[key] = None if parameter is None else _found(name, key, parameter, stored.tensor(dotted(layer, key)))
            if parameter is not None and owners[parameter] > 1:
                raise AdapterStateError(f"layer {shown(name)} cannot be fused: its {key} is tied to another layer's")
        assert own["weight"] is not None
        out.append(_Change(name, module, record, own["weight"], own["bias"]))
    return out


def _found(layer: str, key: str, parameter: Tensor, handle: Handle | None) -> Handle:
    if handle is None:
        raise CheckpointError(f"the files have no {key} of layer {shown(layer)}", remedy="Save the pipeline anew.")
    if handle.shape != tuple(parameter.shape):
        raise ShapeMismatchError(
            f"{key} of {shown(layer)} is {handle.shape}, and by the config {tuple(parameter.shape)}",
            where=handle.path or "",
        )
    if handle.dtype not in _FLOATS:
        raise AdapterStateError(
            f"layer {shown(layer)} cannot be fused: its {key} is stored as {handle.dtype}, and rounding it again would lose more than the adapter adds",
            remedy="Fuse into the model in bf16, fp16 or fp32, and quantise it then.",
        )
    return handle


def _steps(record: Record) -> list[tuple[Any, float]]:
    """The adapters of a layer in order, as `fuse` takes them."""
    choice = record.mix.choice
    return [
        (record.slots[n], s) for n in choice.order if n in record.slots and (s := choice.strengths[n][record.index])
    ]


def _computed(change: _Change) -> list[tuple[Handle, Tensor]]:
    """The tensors of a layer with the adapters in them, computed in fp32 or better and rounded once: `fuse` on what is stored."""
    weight, bias = io.load([change.weight])[0], io.load([change.bias])[0] if change.bias else None
    dtype = wide_dtype(weight.dtype)
    stored = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    with torch.no_grad():
        whole = effective(change.module, _steps(change.record), dtype, stored)
    W, b = whole["weight"], whole.get("bias")
    if b is not None and bias is None:
        raise AdapterStateError(f"layer {shown(change.name)} cannot be fused: an adapter adds a bias, and it has none")
    out = [(change.weight, W.to(weight.dtype))]
    if change.bias and b is not None and bias is not None and b is not bias:
        out.append((change.bias, b.to(bias.dtype)))
    if not all(is_finite(t) for _, t in out):
        raise NonFiniteError(
            f"layer {shown(change.name)} would get weights that are not finite",
            remedy="An adapter is broken, or too strong for the dtype.",
        )
    return out


def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)
    with open(to, "rb") as f:
        os.fsync(f.fileno())
