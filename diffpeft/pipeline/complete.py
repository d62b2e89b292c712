"""Models from files with every weight, or an error that names what is missing, where diffusers and transformers would go on with random numbers."""

from __future__ import annotations

import importlib
import json
import traceback
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from diffpeft.errors import CheckpointError, listed
from diffpeft.files import Json

if TYPE_CHECKING:
    from torch import nn

_SAVED_BY = {"transformers_version": "transformers", "_diffusers_version": "diffusers"}


class Loading(TypedDict):
    """What diffusers and transformers report of loading a model, as far as it is asked for."""

    missing_keys: Collection[str]
    mismatched_keys: Collection[tuple[str, Sequence[int], Sequence[int]]]  # (name, stored shape, the model's)


def read_json(path: Path) -> Json:
    """The object in a JSON file; empty if there is none, or if it cannot be read."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):  # loading will say what is wrong
        return {}
    return config if isinstance(config, dict) else {}


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
                remedy=_version_remedy(read_json(Path(str(source)) / "config.json")),
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


def refuse_placeholders(component: str, model: object, source: Path) -> None:
    """Raise CheckpointError for weights without numbers: diffusers leaves those so that a single file does not hold."""
    state_dict = getattr(model, "state_dict", None)
    if state_dict is not None:
        empty = sorted(name for name, t in state_dict().items() if t.is_meta)
        refuse_made_up(model, {"missing_keys": empty, "mismatched_keys": ()}, component, source)


def models_in(error: BaseException) -> list[nn.Module]:
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
