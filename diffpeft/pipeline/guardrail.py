"""NVIDIA's guardrail, which the pipelines of Cosmos ask of every text and picture, and are not made without. Training draws nothing and does without it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from diffpeft.errors import ConfigError
from diffpeft.families.parts import Component

PACKAGE = "cosmos_guardrail"
_PIPELINES = (
    *("CosmosTextToWorld", "CosmosVideoToWorld", "Cosmos2TextToImage", "Cosmos2VideoToWorld"),
    *("Cosmos2_5_PredictBase", "Cosmos2_5_Transfer"),
)


def is_lacking(pipeline: str | None) -> bool:
    """Whether a pipeline, by the name of its class, is not made without the guardrail, which is not installed."""
    asks = pipeline is not None and pipeline.removesuffix("Pipeline") in _PIPELINES
    return asks and importlib.util.find_spec(PACKAGE) is None


def refused(pipeline: str, where: str | Path = "") -> ConfigError:
    """The error of a picture that would be drawn without it."""
    return ConfigError(
        f"a {pipeline} draws nothing without NVIDIA's guardrail, which its licence asks for and which is not installed",
        where=where,
        remedy=f"pip install {PACKAGE}, or train without pictures: --sample-every 0.",
    )


def stand_in(pipeline: type[Component]) -> dict[str, Component]:
    """What a pipeline is made with where its guardrail is lacking: one that is of its class, and whoever asks it gets an error."""
    name = pipeline.__name__
    if not is_lacking(name):
        return {}

    def asked(*_: object) -> None:
        raise refused(name)

    base = sys.modules[pipeline.__module__].CosmosSafetyChecker
    return {"safety_checker": type("Unguarded", (base,), {"__init__": lambda self: None, "to": asked})()}
