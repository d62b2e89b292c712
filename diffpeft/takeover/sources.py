"""The file that diffusers' arguments mean, found by diffusers' own rules; diffpeft reads it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

Source = str | os.PathLike[str] | Mapping[str, Tensor]
_HUB = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
_ENDINGS = (".safetensors", ".bin")  # in the order in which they are looked for


def located(source: Source, options: Mapping[str, object]) -> Path | Mapping[str, Tensor]:
    """The .safetensors file, or the tensors of a pickled one (which is read without running anything in it).

    Args:
        options: `weight_name`, `subfolder`, `use_safetensors`, `local_files_only` and what else diffusers' loaders take of the Hub.

    Raises what diffusers raises: OSError for what is not there, ValueError for what is no name of a repository.
    """
    if isinstance(source, Mapping):
        return source
    path = _path_of(os.fspath(source), options)
    if path.suffix == ".safetensors":
        return path
    from diffusers.models.modeling_utils import load_state_dict

    tensors: Mapping[str, Tensor] = load_state_dict(str(path))
    return tensors


def _path_of(source: str, options: Mapping[str, object]) -> Path:
    """The first of the files that may be meant."""
    if os.path.isfile(source):
        return Path(source)
    named = options.get("weight_name")
    if named is not None:
        return _fetched(source, str(named), options)
    endings = _ENDINGS if options.get("use_safetensors") is None else _ENDINGS[:1]
    for ending in endings[:-1]:
        try:
            return _fetched(source, _guessed(source, ending, options), options)
        except OSError:
            continue
    return _fetched(source, _guessed(source, endings[-1], options), options)


def _guessed(source: str, ending: str, options: Mapping[str, object]) -> str:
    """The only file of a folder or repository with an ending, or diffusers' name for one."""
    from diffusers.loaders import lora_base

    offline = bool(options.get("local_files_only"))
    guess = lora_base._best_guess_weight_name(source, file_extension=ending, local_files_only=offline)
    return str(guess or f"pytorch_lora_weights{ending}")


def _fetched(source: str, name: str, options: Mapping[str, object]) -> Path:
    """A file of a folder or repository, here."""
    from diffusers.utils import _get_model_file

    fetch: Callable[..., str] = _get_model_file
    of_hub = {option: options.get(option) for option in _HUB}
    return Path(fetch(source, weights_name=name, user_agent={"framework": "pytorch"}, **of_hub))
