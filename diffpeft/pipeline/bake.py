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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from diffpeft import converters, io
from diffpeft.bundle import COMPONENTS, Handle, dotted, parted
from diffpeft.converters.locating import located
from diffpeft.converters.rows import Unfit, split
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
from diffpeft.files import Json
from diffpeft.layers.carried import Record, effective
from diffpeft.layers.sites import parameter_names
from diffpeft.methods.linalg import is_finite, wide_dtype
from diffpeft.model.target import adapted, layers_of, spellings
from diffpeft.pipeline.complete import class_of
from diffpeft.pipeline.load import load_lora
from diffpeft.pipeline.open import check_model

Adapters = Sequence[tuple[str | os.PathLike[str] | Mapping[str, Tensor], float]]  # what is fused, and how strong
INDEX = "model_index.json"
# weights, or the index of weights in several files: what stands behind the second dot is the variant
_WEIGHTS = re.compile(
    r"[^.]+?(?:\.(?P<a>\w+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<b>\w+))?\.safetensors(?:\.index(?:\.(?P<c>\w+))?\.json)?"
)
# other programs' copies of the same weights, which would not have the adapters in them
_OTHERS = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|msgpack|h5|onnx|onnx_data|pb|gguf|safetensors)(\.index.*\.json)?")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class ComponentFiles:
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
    module: nn.Module
    record: Record
    weight: Handle
    bias: Handle | None


def bake(
    model: str | os.PathLike[str],
    adapters: Adapters,
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
    stored = {name: component_files(model / name, variant) for name in names}
    if variant and not any(_variant(file) == variant for part in stored.values() for file in part.files):
        raise CheckpointError(f"no file is of the variant {shown(variant)}", where=model, remedy="Leave out variant.")
    changes = _planned(model, index, stored, adapters)
    with io.folder(out) as folder:
        for file in _copied(model, stored.values()):
            _copy(file, folder / file.relative_to(model))
        _write([change for of_part in changes.values() for change in of_part], model, folder, told)
    return {name: len(of_part) for name, of_part in changes.items() if of_part}


def _planned(
    model: Path,
    index: Mapping[str, Any],
    stored: Mapping[str, ComponentFiles],
    adapters: Adapters,
) -> dict[str, list[_Change]]:
    """{component: the layers that the adapters change}."""
    parts = {n: _weightless(model, n, index[n], stored[n]) for n in COMPONENTS if n in stored and stored[n].tensors}
    # a pipeline as load_lora sees it: its class's name and its components
    target = type(str(index.get("_class_name")), (), {**parts, "components": parts})()
    for n, (source, weight) in enumerate(adapters):
        file = located(source)
        _show_weights(file, target, parts, stored)
        load_lora(target, file, name=f"lora-{n}", weight=weight)
    return {name: _changes(name, part, stored[name]) for name, part in parts.items()}


def _copied(model: Path, stored: Iterable[ComponentFiles]) -> Iterator[Path]:
    """The files that stand in the copy: those beside the components, and those of each component."""
    for file in sorted(model.iterdir()):
        if file.is_file() and file.name[0] != "." and not _is_foreign(file):
            yield file
    for part in stored:
        yield from part.files


def _write(changes: Sequence[_Change], model: Path, folder: Path, told: Callable[[int, int], None]) -> None:
    """Compute each layer and write its tensors over those in the copies, which have them at the same bytes."""
    with contextlib.ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
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


def _is_component(name: str, kind: object) -> bool:
    """Whether an entry of model_index.json names a component: a plain name, a library and a class."""
    pair = isinstance(kind, list) and len(kind) == 2 and all(isinstance(part, str) for part in kind)
    return pair and re.fullmatch(r"\w+", name) is not None


def _check_places(model: Path, out: Path) -> None:
    """Raise CheckpointError for what is no folder of a pipeline, ConfigError for an output that would overwrite something."""
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


def _json(file: Path) -> Json:
    """The table in a JSON file. Raises UnreadableFileError."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableFileError(f"cannot read it ({error})", where=file) from error
    if not isinstance(table, dict):
        raise UnreadableFileError("it is no table", where=file)
    return table


def _variant(file: Path) -> str | None:
    """The variant of a file of weights, "" for none; None for other files."""
    match = _WEIGHTS.fullmatch(file.name)
    return match and (match["a"] or match["b"] or match["c"] or "")


def _is_foreign(file: Path) -> bool:
    """Whether a file is another program's copy of the weights."""
    return bool(_OTHERS.fullmatch(file.name))


def component_files(folder: Path, variant: str | None) -> ComponentFiles:
    """What of a component's folder goes into the copy: all but weights of other variants and in other containers."""
    every = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    variants = _by_variant(file for file in every if file.parent == folder)
    chosen = variants.get(variant or "") or variants.get("")
    if variants and not chosen:
        raise CheckpointError(
            f"the weights are there only as {listed(variants)}", where=folder, remedy=f"Say --variant {min(variants)}."
        )
    if not variants:
        for file in every:
            io.refuse_pickle(file)
    files = [file for file in every if not _is_foreign(file)] + (chosen or [])
    return ComponentFiles(files, _tensors(chosen or [], folder))


def _by_variant(files: Iterable[Path]) -> dict[str, list[Path]]:
    """{variant, "" for none: its files}; other files than those of weights are left out."""
    variants: dict[str, list[Path]] = {}
    for file in files:
        if (variant := _variant(file)) is not None:
            variants.setdefault(variant, []).append(file)
    return variants


def _tensors(files: Iterable[Path], folder: Path) -> dict[str, Handle]:
    """The tensors of files of weights, those named by an index among them. Raises CheckpointError for tensors that two files hold."""
    tensors: dict[str, Handle] = {}
    wanted: set[str] = set()
    files = list(files)
    for file in files:
        if file.suffix == ".json":
            wanted |= {*map(str, _json(file).get("weight_map", {}).values())}
            continue
        handles = io.header(file)[0]
        if twice := handles.keys() & tensors.keys():
            raise CheckpointError("two files hold the same tensors", where=f"{folder}: {listed(sorted(twice), 3)}")
        tensors |= handles
    if missing := wanted - {file.name for file in files}:
        raise UnreadableFileError("files of weights are missing", where=f"{folder}: {listed(sorted(missing))}")
    return tensors


def _weightless(model: Path, name: str, kind: Sequence[str], stored: ComponentFiles) -> nn.Module:
    """A component built from its config. Its parameters have the stored dtypes and their shapes, and all their numbers are one zero."""
    library, class_name = kind
    cls: Any = class_of(library, class_name) if library in ("diffusers", "transformers") else None
    if cls is None:
        what = f"{library}.{class_name}"
        raise CheckpointError(f"{name} is a {shown(what)}, which is not known here", where=model / INDEX)
    try:
        with torch.device("meta"):
            if library == "diffusers":
                module = cls.from_config(cls.load_config(model / name))
            else:
                module = cls(cls.config_class.from_pretrained(model / name))
                module.tie_weights()
    except (MemoryError, NotImplementedError):
        raise
    except Exception as error:  # as in open_pipeline: these libraries raise all kinds
        raise CheckpointError(
            f"cannot build {name} from its config ({type(error).__name__}: {error})", where=model / name
        ) from error
    _replace_parameters(module, stored)
    return module.eval()


def _replace_parameters(model: nn.Module, stored: ComponentFiles) -> None:
    """One zero of the stored dtype, spread out, in the place of each parameter. Tied parameters stay so."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None and p not in made:
                handle = stored.tensor(dotted(prefix, key))
                (zero,) = io.load([Handle(handle.dtype if handle else "F32", ())])
                made[p] = nn.Parameter(zero.expand(p.shape), requires_grad=False)
            module._parameters[key] = None if p is None else made[p]


def _show_weights(
    source: Path | Mapping[str, Tensor],
    target: object,
    parts: Mapping[str, nn.Module],
    stored: Mapping[str, ComponentFiles],
) -> None:
    """Give the weights to those layers of which load_lora works out what an adapter of their joint layer does."""
    family = family_of(target)
    if family not in converters.fitting(source).families:
        return  # load_lora says so
    names = {component: [*layers_of(part)] for component, part in parts.items()}
    for entry in converters.read(source, family=family, names=names).entries:
        try:
            split(entry)
        except Unfit:
            for component, layer in map(parted, entry.targets):
                handle = stored[component].tensor(f"{layer}.weight") if component in parts else None
                if handle and layer in names[component]:
                    weight = parts[component].get_submodule(layer)._parameters["weight"]
                    assert weight is not None
                    weight.data = io.load([handle])[0]


def _changes(component: str, model: nn.Module, stored: ComponentFiles) -> list[_Change]:
    """The layers that adapters change. Raises for those whose weights are not in the files as the layer has them."""
    owners = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    changes = []
    for layer, module, record in adapted(model):
        if not record.steps(record.mix.choice):
            continue
        name, handles = dotted(component, layer), dict[str, Handle]()
        weight, bias = parameter_names(module)
        for key, parameter in module._parameters.items():
            if key not in (weight, bias) or parameter is None:
                continue
            handles[key] = _fitting(name, key, parameter, stored.tensor(dotted(layer, key)))
            if owners[parameter] > 1:
                raise AdapterStateError(f"layer {shown(name)} cannot be fused: its {key} is tied to another layer's")
        changes.append(_Change(name, module, record, handles[weight], handles.get(bias)))
    return changes


def _fitting(layer: str, key: str, parameter: Tensor, handle: Handle | None) -> Handle:
    """What the files hold of a layer's parameter. Raises if that is not there, of another shape, or rounded too coarsely."""
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


def _computed(change: _Change) -> list[tuple[Handle, Tensor]]:
    """The tensors of a layer with the adapters in them, computed in fp32 or better and rounded once: `fuse` on what is stored."""
    weight, bias = io.load([change.weight])[0], io.load([change.bias])[0] if change.bias else None
    dtype = wide_dtype(weight.dtype)
    names = parameter_names(change.module)
    stored = {name: t for name, t in zip(names, (weight, bias), strict=True) if t is not None}
    with torch.no_grad():
        computed = effective(change.module, change.record.steps(change.record.mix.choice), dtype, stored)
    W, b = (computed.get(name) for name in names)
    assert W is not None
    if b is not None and bias is None:
        raise AdapterStateError(f"layer {shown(change.name)} cannot be fused: an adapter adds a bias, and it has none")
    tensors = [(change.weight, W.to(weight.dtype))]
    if change.bias and b is not None and bias is not None and b is not bias:
        tensors.append((change.bias, b.to(bias.dtype)))
    if not all(is_finite(t) for _, t in tensors):
        raise NonFiniteError(
            f"layer {shown(change.name)} would get weights that are not finite",
            remedy="An adapter is broken, or too strong for the dtype.",
        )
    return tensors


def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)
    with open(to, "rb") as f:
        os.fsync(f.fileno())
