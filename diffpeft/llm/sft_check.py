"""Everything that can be said of a fine-tuning run before a large library is loaded: its options, its texts, and what its model looks like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from diffpeft.errors import CheckpointError, ConfigError, UnknownNameError
from diffpeft.llm import texts
from diffpeft.llm.sft_config import SftConfig
from diffpeft.pipeline.open import check_exists
from diffpeft.train.checkpoints import SavedState
from diffpeft.train.method import CONFIGS
from diffpeft.train.publish import check_hub
from diffpeft.train.resume import begin
from diffpeft.train.trackers import logs_of

GGUF = ".gguf"
FILES = ("adapter_model.safetensors", "adapter_config.json")  # what a run writes


@dataclass(frozen=True)
class CheckedTexts:
    """A run that may begin: the rows to train on, those to measure on, and the state that it goes on from."""

    rows: list[texts.Row]
    heldout: list[texts.Row]
    state: SavedState | None = None
    origins: Mapping[str, str] = field(default_factory=dict)  # where options are from


def check(config: SftConfig, origins: Mapping[str, str] | None = None) -> CheckedTexts:
    """All checks that need no model. `origins`: where options are from."""
    config.validate()
    if config.method not in CONFIGS:
        raise UnknownNameError.of("method", config.method, CONFIGS)
    logs_of(config)
    check_hub(config)
    checkpoint = begin(config, config.output(), FILES)
    model = str(config.model)
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise CheckpointError("this folder holds no language model (no config.json)", where=model)
    check_exists(model, "Pass a folder with a language model, a .gguf file or a Hub id (owner/name).")
    if Path(model).suffix == GGUF and not find_spec("gguf"):
        raise CheckpointError(
            "a .gguf file is read with the gguf package", where=model, remedy="pip install diffpeft[llm]"
        )
    if Path(model).suffix == GGUF and config.quantize:
        raise ConfigError(
            "quantize with a .gguf file", remedy="Save the model as a folder first, or leave --quantize out."
        )
    heldout = texts.read(config.heldout) if config.heldout else []
    return CheckedTexts(texts.read(str(config.data)), heldout, checkpoint, origins or {})
