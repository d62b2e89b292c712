"""A pipeline from what a user types: a diffusers folder, a single file with the folder of its configs, a Hub id, or nothing for the embedded base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffpeft.errors import CheckpointError, near
from diffpeft.io import refuse_pickle
from diffpeft.pipeline.locate import HUB_ID

EMBEDDED = Path(__file__).parent.parent / "assets" / "tiny-emoji" / "model"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_device() -> str:
    """cuda if there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """What a base computes in where nothing else is said: fp32 on a CPU, else bf16."""
    return "fp32" if device == "cpu" else "bf16"


def check_model(model: str | None, base: str | None) -> None:
    """Raise CheckpointError if `model` can be seen to be no model without loading anything."""
    path = Path(model) if model else EMBEDDED
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise CheckpointError("this folder holds no diffusers pipeline (no model_index.json)", where=path)
    refuse_pickle(path)
    if path.is_file() and not base:
        raise CheckpointError(
            "a single file holds no configs and no tokenizer",
            where=path,
            remedy="Say with --base whose: a diffusers folder or a Hub id.",
        )
    check_exists(str(path), "Pass a diffusers folder, a .safetensors file or a Hub id (owner/name).")


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
        raise CheckpointError("no such model", where=path, remedy=near(model, siblings) or remedy)


def open_pipeline(
    model: str | None = None, base: str | None = None, *, dtype: str = "fp32", device: str = "cpu"
) -> Any:
    """The pipeline behind `model`, on `device`; the embedded base without one. `base` names the configs and the tokenizer of a single file.

    Raises CheckpointError if it cannot be loaded.
    """
    check_model(model, base)
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    source = Path(model) if model else EMBEDDED
    try:
        if source.is_file():
            pipe = StableDiffusionPipeline.from_single_file(
                str(source), config=str(base), dtype=DTYPES[dtype], safety_checker=None
            )
        else:
            pipe = DiffusionPipeline.from_pretrained(source if source.exists() else str(model), dtype=DTYPES[dtype])
    except (MemoryError, NotImplementedError):
        raise
    except Exception as error:  # diffusers and its libraries raise all kinds for a model that cannot be read
        raise not_loaded(error, source) from error
    return pipe.to(device)


def not_loaded(error: Exception, source: object) -> CheckpointError:
    """What a library said of a model that it could not load, as an error of ours."""
    first_line = next(iter(str(error).strip().splitlines()), "")[:300]
    return CheckpointError(
        f"cannot load the model ({type(error).__name__}: {first_line})",
        where=source,
        remedy="Check the path or the id, and the network if it is an id.",
    )
