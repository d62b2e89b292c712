"""A pipeline from what a user types: a diffusers folder, a single file with the folder of its configs, a Hub id, or nothing for the embedded base.

Nothing heavy is imported before something is loaded, so that what can be seen of a model by its configs is seen at once.
"""

from __future__ import annotations

import importlib
import json
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from diffpeft.errors import CheckpointError, ConfigError, listed, near
from diffpeft.files import Json
from diffpeft.io import refuse_pickle
from diffpeft.pipeline.locate import HUB_ID, on_hub

if TYPE_CHECKING:
    import torch
    from torch import nn

EMBEDDED = Path(__file__).parent.parent / "assets" / "tiny-emoji" / "model"
INDEX = "model_index.json"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SAVED_BY = {"transformers_version": "transformers", "_diffusers_version": "diffusers"}


Value = TypeVar("Value")


class Loading(TypedDict):
    """What diffusers and transformers report of loading a model, as far as it is asked for."""

    missing_keys: Collection[str]
    mismatched_keys: Collection[tuple[str, Sequence[int], Sequence[int]]]  # (name, stored shape, the model's)


def dtype_of(name: str) -> torch.dtype:
    """fp32, bf16 or fp16 as torch's dtype."""
    import torch

    return getattr(torch, DTYPES[name])


def default_device() -> str:
    """cuda if there is one, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """What a base computes in where nothing else is said: fp32 on a CPU, else bf16."""
    return "fp32" if device == "cpu" else "bf16"


def check_model(model: str | None, base: str | None) -> None:
    """Raise CheckpointError if `model` can be seen to be no model without loading anything, ConfigError for a `base` that nothing would read."""
    path = Path(model) if model else EMBEDDED
    if path.is_dir() and not (path / INDEX).is_file():
        raise CheckpointError("this folder holds no diffusers pipeline (no model_index.json)", where=path)
    refuse_pickle(path)
    if path.is_file() and not base:
        raise CheckpointError(
            "a single file holds no configs and no tokenizer",
            where=path,
            remedy="Say with --base whose: a diffusers folder or a Hub id.",
        )
    check_exists(str(path), "Pass a diffusers folder, a .safetensors file or a Hub id (owner/name).")
    if base and not path.is_file():
        raise ConfigError(
            "base is for a model that is a single file, and this one has its own configs",
            where=path,
            remedy="Leave --base out.",
        )


def check_exists(model: str, remedy: str) -> None:
    """Raise CheckpointError if `model` is neither a path that exists nor what may be a Hub id."""
    path = Path(model)
    local = (
        path.suffix in (".safetensors", ".gguf")
        or not HUB_ID.fullmatch(model)
        or (path.parent != Path() and path.parent.is_dir())
    )
    if not path.exists() and local:
        siblings = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        place = on_hub(model)
        link = f"Pass its Hub id: {place.repo}." if place and place.filename is None else ""
        raise CheckpointError("no such model", where=path, remedy=link or near(model, siblings) or remedy)


@dataclass(frozen=True)
class Facts:
    """What a pipeline's configs say of it without loading anything. None, where they do not tell."""

    pipeline: str | None = None  # the name of its class
    image_channels: int | None = None  # of the latents that its VAE makes
    input_channels: int | None = None  # that its UNet or transformer reads
    resolution: int | None = None  # pixels, the side of the square that it was made for


def facts(model: str | None) -> Facts:
    """The facts of a diffusers folder or a Hub id. Of a Hub id three small files are fetched, or nothing is known."""
    index = _config(model, INDEX)
    if not index:  # or there is no network, which is asked once
        return Facts()
    denoiser, vae = (_config(model, name) for name in ("unet/config.json", "vae/config.json"))
    levels = len(vae.get("block_out_channels") or ())
    size = denoiser.get("sample_size")
    return Facts(
        pipeline=_typed(index.get("_class_name"), str),
        image_channels=_typed(vae.get("latent_channels"), int),
        input_channels=_typed(denoiser.get("in_channels"), int),
        resolution=size * 2 ** (levels - 1) if isinstance(size, int) and levels else None,
    )


def _typed(value: object, kind: type[Value]) -> Value | None:
    """The value, if it is of this type."""
    return value if isinstance(value, kind) else None


def _config(model: str | None, name: str) -> Json:
    """One of a pipeline's JSON files; empty if there is none, or if it cannot be read."""
    path = (Path(model) if model else EMBEDDED) / name
    try:
        if model and not Path(model).exists() and HUB_ID.fullmatch(model):
            from huggingface_hub import hf_hub_download, try_to_load_from_cache

            cached = try_to_load_from_cache(model, name)
            path = Path(cached if isinstance(cached, str) else hf_hub_download(model, name))
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except Exception:  # loading will say what is wrong
        return {}
    return config if isinstance(config, dict) else {}


def open_pipeline(
    model: str | None = None, base: str | None = None, *, dtype: str = "fp32", device: str = "cpu"
) -> Any:
    """The pipeline behind `model`, on `device`; the embedded base without one. `base` names the configs and the tokenizer of a single file.

    Raises CheckpointError if it cannot be loaded, and if it could be only with weights that no file holds, which the libraries make up.
    """
    check_model(model, base)
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    source = Path(model) if model else EMBEDDED
    kind = dtype_of(dtype)
    try:
        if source.is_file():
            pipe: Any = StableDiffusionPipeline.from_single_file(
                str(source), config=str(base), dtype=kind, safety_checker=None
            )
        else:
            folder = source if source.exists() else Path(DiffusionPipeline.download(str(model)))
            pipe = DiffusionPipeline.from_pretrained(folder, dtype=kind, **_components(folder, kind))
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:  # diffusers and its libraries raise all kinds for a model that cannot be read
        for module in _models_in(error):
            _refuse_placeholders(type(module).__name__, module, source)
        raise not_loaded(error, source) from error
    for component, part in pipe.components.items():
        _refuse_placeholders(component, part, source)
    return pipe.to(device)


def _components(folder: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The models of a pipeline's folder, each loaded by itself and whole. Those of other libraries are left to diffusers."""
    import torch

    models = {}
    for name, entry in _config(str(folder), INDEX).items():
        cls = class_of(*map(str, entry)) if isinstance(entry, list) and len(entry) == 2 else None
        if cls is not None and issubclass(cls, torch.nn.Module) and (folder / name).is_dir():
            models[name] = complete_model(cls, folder / name, name, dtype=dtype)
    return models


def class_of(library: str, name: str) -> Any:
    """A class of transformers, of diffusers, or of one of its pipelines, by the two names that model_index.json gives it."""
    if library not in ("transformers", "diffusers"):
        import diffusers.pipelines

        return getattr(getattr(diffusers.pipelines, library, None), name, None)
    return getattr(importlib.import_module(library), name, None)


def complete_model(cls: Any, source: str | Path, component: str, **options: Any) -> Any:
    """A model of diffusers or transformers by its class's `from_pretrained`, with every weight from its files.

    Both libraries go on with random numbers where a weight is missing, and say so in a log. Raises CheckpointError, which names the component
    and some of the weights.
    """
    theirs = cls.__module__.startswith(
        "transformers"
    )  # its error for another shape names no weight, so it is asked to go on
    model, info = cls.from_pretrained(
        source, output_loading_info=True, **options, **({"ignore_mismatched_sizes": True} if theirs else {})
    )
    refuse_made_up(model, info, component, source)
    return model


def refuse_made_up(model: object, info: Loading, component: str, source: object) -> None:
    """Raise CheckpointError if a library's report of loading a model names weights that are missing or of another shape."""
    shapes = [
        f"{name} is {list(stored)} and not {list(wanted)}" for name, stored, wanted in sorted(info["mismatched_keys"])
    ]
    missing = sorted(info["missing_keys"])
    for names, what in ((missing, "lacks {} of its weights"), (shapes, "has {} of its weights in another shape")):
        if names:
            raise CheckpointError(
                f"{component} ({type(model).__name__}) {what.format(len(names))}: {listed(names, 3)}",
                where=source,
                remedy=_version_remedy(_config(str(source), "config.json")),
            )


def _version_remedy(config: Mapping[str, object]) -> str:
    """What to do about weights that a library does not find: take a version of it that is not older than the one that saved them."""
    from importlib.metadata import version

    from packaging.version import Version

    for key, library in _SAVED_BY.items():
        saved, installed = config.get(key), version(library)
        try:
            if saved and Version(str(saved)) > Version(installed):
                return f"It was saved by {library} {saved}, and {installed} is installed: install the newer one."
        except ValueError:
            continue
    return "The files are incomplete, or another model's: get them again."


def _refuse_placeholders(component: str, model: object, source: Path) -> None:
    """Raise CheckpointError for weights without numbers: diffusers leaves those so that a single file does not hold."""
    state_dict = getattr(model, "state_dict", None)
    if state_dict is not None:
        empty = sorted(name for name, t in state_dict().items() if t.is_meta)
        refuse_made_up(model, {"missing_keys": empty, "mismatched_keys": ()}, component, source)


def _models_in(error: BaseException) -> list[nn.Module]:
    """The models that a library was at work on when it raised, the outermost first: its error for placeholders names neither model nor weight."""
    import torch

    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [value for frame in frames for value in frame.f_locals.values() if isinstance(value, torch.nn.Module)]


def not_loaded(error: Exception, source: object) -> CheckpointError:
    """What a library said of a model that it could not load, as an error of ours."""
    first_line = next(iter(str(error).strip().splitlines()), "")[:300]
    return CheckpointError(
        f"cannot load the model ({type(error).__name__}: {first_line})", where=source, remedy=_remedy(error)
    )


def _remedy(error: BaseException) -> str:
    """What to do about an error of a library: install the package that it misses, else look at the path."""
    if isinstance(error, ImportError):
        text = f"{error} {error.name}".lower()
        extra = next((f"diffpeft[{name}]" for package, name in _EXTRAS.items() if package in text), None)
        package = extra or (error.name or "").partition(".")[0]
        return f"pip install {package}" if package else "Install the package that it names."
    return "Check the path or the id, and the network if it is an id."


_EXTRAS = {"gguf": "llm"}  # {a package that is not always there: our extra that installs it}
