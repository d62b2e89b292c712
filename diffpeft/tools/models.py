"""The weights of a saved model as canonical layers, from headers alone: of a diffusers folder, one component of it, or a single file.

How a file's names are told apart is what the converters know of adapters: a model is read as an adapter would be that has every layer of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from diffpeft import converters, io
from diffpeft.bundle import COMPONENTS, Entry, Handle, dotted, parted
from diffpeft.converters.families import TABLES
from diffpeft.converters.opening import Opened
from diffpeft.errors import CheckpointError, DiffpeftError, inside
from diffpeft.families import family_of
from diffpeft.pipeline.bake import component_files
from diffpeft.pipeline.complete import read_json

INDEX, CONFIG = "model_index.json", "config.json"
# tables of vectors: an adapter of one is of another kind, and few programs read it
_TABLES = re.compile(
    r"(?:token_embedding|position_embedding|embed_tokens|shared|relative_attention_bias|embedding_table|lm_head|output_layer)$"
)
_PREFIXES = {  # of a single file: what adapters' names start with
    "model.diffusion_model.": "diffusion_model.",
    "cond_stage_model.transformer.": "text_encoders.clip_l.transformer.",
    "conditioner.embedders.0.transformer.": "text_encoders.clip_l.transformer.",
}
_OPEN_CLIPS = {  # of the encoders that are OpenCLIP's in a single file
    "conditioner.embedders.1.model.": "text_encoders.clip_g.transformer.text_model.",
    "conditioner.embedders.0.model.": "text_encoders.clip_g.transformer.text_model.",  # of SDXL's refiner
    "cond_stage_model.model.": "text_encoders.clip_h.transformer.text_model.",
}
_OPEN_CLIP = {
    "transformer.resblocks.": "encoder.layers.",
    ".ln_": ".layer_norm",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
}
_JOINT = re.compile(r"(.*)\.attn\.in_proj_(weight|bias)")
_OTHERS = ("first_stage_model.", "vae.", "model_ema.", "cond_stage_model.", "conditioner.")


class ModelLayer(NamedTuple):
    """A layer of a model: as an entry without tensors, its weight [out, in / groups, *kernel], and its bias [out]."""

    entry: Entry
    weight: Handle
    bias: Handle | None


@dataclass(frozen=True)
class Weights:
    """A model: {layer: its weights}, {layer: those of a norm}, the parameters that are neither by their names, and its family.

    `original`: whether its names are the original program's.
    """

    family: str
    layers: dict[str, ModelLayer]
    norms: dict[str, ModelLayer]
    others: dict[str, Handle] = field(default_factory=dict)
    original: bool = False


def weights_of(model: str | os.PathLike[str], *, variant: str | None = None, family: str | None = None) -> Weights:
    """The weights of a model: a diffusers folder, the folder of one component, or a .safetensors file. Nothing but headers is read.

    `variant`: use `*.VARIANT.safetensors`. `family` overrides what is detected. Raises CheckpointError for what is no model of these.
    """
    path = Path(model)
    if path.is_dir():
        tensors, told = _of_folder(path, variant)
        spelt = {"": tensors}
    else:
        tensors, told = dict(io.header(path)[0]), None
        spelt = _of_file(tensors)
    with inside(str(model)):
        return _read(spelt, family or told, str(model))


def _of_folder(path: Path, variant: str | None) -> tuple[dict[str, Handle], str | None]:
    """The tensors of a folder by `component.name`, and its family as far as its configs tell it."""
    if (path / INDEX).is_file():
        index = read_json(path / INDEX)
        folders = {name: path / name for name in COMPONENTS if (path / name).is_dir() and name in index}
        pipeline = str(index.get("_class_name"))
    elif (path / CONFIG).is_file():
        folders, pipeline = {_component(path): path}, ""
    else:
        raise CheckpointError(
            "this folder holds no model (no model_index.json, no config.json)",
            where=path,
            remedy="Give a diffusers folder, the folder of one of its components, or a .safetensors file.",
        )
    tensors = {
        dotted(component, key): handle
        for component, folder in folders.items()
        for key, handle in component_files(folder, variant).tensors.items()
    }
    models = {c: _named(folder) for c, folder in folders.items() if not c.startswith("text_encoder")}
    return tensors, family_of(type(pipeline, (), {"components": models})())


def _component(folder: Path) -> str:
    """Which component a folder of one is, by its class."""
    kind = str(read_json(folder / CONFIG).get("_class_name", ""))
    return "unet" if "UNet" in kind else "transformer" if kind else "text_encoder"


def _named(folder: Path) -> object:
    """An object of the class that a component's config names, with as much of the config as tells families apart."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    named = type(str(config.get("_class_name", "")), (), {})()
    named.config = SimpleNamespace(cross_attention_dim=config.get("cross_attention_dim"))
    return named


def _of_file(tensors: Mapping[str, Handle]) -> dict[str, dict[str, Handle]]:
    """{what the names may start with: the tensors of a single file under the names of adapters}; bare names may be either program's."""
    named: dict[str, Handle] = {}
    bare: dict[str, Handle] = {}
    for key, handle in tensors.items():
        spelt = _spelt(key, handle)
        if spelt is None:
            bare[key] = handle
        named |= spelt or {}
    if any(key.startswith("diffusion_model.") for key in named) or not bare:
        return {"": named}
    if any(parted(key)[0] for key in bare):
        return {"": {**named, **bare}}
    starts = ("diffusion_model.", "transformer.", "unet.", "text_encoder.")
    return {start: {**named, **{start + key: handle for key, handle in bare.items()}} for start in starts}


def _spelt(key: str, handle: Handle) -> dict[str, Handle] | None:
    """A parameter of a single file under the names of adapters, none of what no adapter is for; None for a name that says no component."""
    for prefix, start in _PREFIXES.items():
        if key.startswith(prefix):
            return {start + key.removeprefix(prefix): handle}
    for prefix, start in _OPEN_CLIPS.items():
        if key.startswith(prefix) and "resblocks" in key:
            return _of_open_clip(start, key.removeprefix(prefix), handle)
    if key.startswith("text_encoders."):
        return {key: handle}
    return {} if key.startswith(_OTHERS) else None


def _of_open_clip(start: str, key: str, handle: Handle) -> dict[str, Handle]:
    """A parameter of OpenCLIP in transformers' names: q, k and v apart."""
    if joint := _JOINT.fullmatch(key):
        rows = handle.shape[0] // 3
        layer = joint[1].replace("transformer.resblocks.", "encoder.layers.")
        return {
            f"{start}{layer}.self_attn.{part}_proj.{joint[2]}": io.rows(handle, [(n * rows, (n + 1) * rows)])
            for n, part in enumerate("qkv")
        }
    for old, new in _OPEN_CLIP.items():
        key = key.replace(old, new)
    return {start + key: handle}


def _read(spelt: Mapping[str, Mapping[str, Handle]], family: str | None, where: str) -> Weights:
    """The spelling whose names are known."""
    refusals: list[DiffpeftError] = []
    for tensors in spelt.values():
        try:
            return _as_adapter(tensors, family, where)
        except DiffpeftError as error:
            refusals.append(error)
    raise CheckpointError(
        f"no family known here has the layers of this model ({refusals[0].what})",
        where=where,
        remedy=refusals[0].remedy if "family=" in refusals[0].remedy else "Say --family, if it is one that is known.",
    ) from refusals[0]


def _as_adapter(tensors: Mapping[str, Handle], family: str | None, where: str) -> Weights:
    """The weights of a model, its layers named as those of an adapter that has all of them."""
    matrices = {key.removesuffix(".weight"): h for key, h in tensors.items() if _is_layer(key, h)}
    if not matrices:
        raise CheckpointError(
            "there is no weight of a layer in it", where=where, remedy="Give the file of a model, not of an adapter."
        )
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, handle in matrices.items():
        component, layer = parted(name)
        if component:
            shapes.setdefault(component, {})[layer] = handle.shape
    names = shapes if family and shapes else None
    bundle = converters.read(Opened(_pairs(matrices), {}, where), family=family, names=names)
    layers = {}
    for entry in bundle.entries:
        name = entry.keys[0].rpartition(".lora_")[0]
        bare = replace(entry, tensors={}, keys=(), alpha=None)
        layers[entry.layer] = ModelLayer(bare, matrices[name], tensors.get(f"{name}.bias"))
    norms, others = _norms(tensors, bundle.family, matrices)
    return Weights(bundle.family, layers, norms, others, bundle.format != "diffusers")


def _is_layer(key: str, handle: Handle) -> bool:
    return key.endswith(".weight") and len(handle.shape) > 1 and not _TABLES.search(key.removesuffix(".weight"))


def _pairs(matrices: Mapping[str, Handle]) -> dict[str, Handle]:
    """The tensors of an adapter of rank 1 on all of these layers: zeros that nobody reads."""
    pairs = {}
    for name, handle in matrices.items():
        o, *columns = handle.shape
        pairs[f"{name}.lora_A.weight"] = Handle("F32", (1, *columns))
        pairs[f"{name}.lora_B.weight"] = Handle("F32", (o, 1, *(1 for _ in columns[1:])))
    return pairs


def _norms(
    tensors: Mapping[str, Handle], family: str, matrices: Iterable[str]
) -> tuple[dict[str, ModelLayer], dict[str, Handle]]:
    """The norms by canonical layer, and the parameters that are of no layer here."""
    taken = {f"{name}.{kind}" for name in matrices for kind in ("weight", "bias")}
    norms: dict[str, ModelLayer] = {}
    others = {key: handle for key, handle in tensors.items() if key not in taken}
    for key in [key for key in others if key.endswith(".weight") and len(others[key].shape) == 1]:
        name = key.removesuffix(".weight")
        if layer := _norm_layer(name, family):
            bias = others.pop(f"{name}.bias", None)
            norms[layer] = ModelLayer(Entry("norm", layer, {}), others.pop(key), bias)
    return norms, others


def _norm_layer(name: str, family: str) -> str | None:
    """The canonical name of a norm; None if no table has it."""
    component, layer = parted(name)
    if component:
        return name
    table = TABLES.get(family)
    if table is None:
        return None
    for encoder, told in table.encoders.items():
        if told.comfyui and name.startswith(told.comfyui):
            return dotted(encoder, name.removeprefix(told.comfyui))
    denoiser = next(iter(table.rules), "")
    rule = table.to_diffusers(denoiser, layer.removeprefix("diffusion_model."))
    return dotted(denoiser, rule.parts[0][0]) if rule and rule.renames else None


def parts_of_layer(layer: ModelLayer) -> dict[str, ModelLayer]:
    """A joint layer as the layers of its parts, their rows cut out."""
    rule, total = layer.entry.rule, layer.weight.shape[0]
    if rule is None:
        return {layer.entry.layer: layer}
    parts = {}
    for part, target in enumerate(layer.entry.targets):
        ranges = rule.ranges(part, total)
        bias = None if layer.bias is None else io.rows(layer.bias, ranges)
        entry = replace(layer.entry, layer=target, rule=None)
        parts[target] = ModelLayer(entry, io.rows(layer.weight, ranges), bias)
    return parts


def common_layers(base: Weights, tuned: Weights) -> tuple[dict[str, tuple[ModelLayer, ModelLayer]], list[str]]:
    """{layer: (the base's, the tuned one's)}, joint ones only where both have them so; and the layers that one of them lacks."""
    if base.layers.keys() != tuned.layers.keys():
        sides = [
            {name: part for layer in model.layers.values() for name, part in parts_of_layer(layer).items()}
            for model in (base, tuned)
        ]
    else:
        sides = [base.layers, tuned.layers]
    of_base, of_tuned = sides
    pairs = {name: (layer, of_tuned[name]) for name, layer in of_base.items() if name in of_tuned}
    return pairs, sorted(of_base.keys() ^ of_tuned.keys())
