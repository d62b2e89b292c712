"""What is written into a picture of how it was drawn, in A1111's words."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import diffpeft
from diffpeft.drawing.infotext import infotext, lora_hash, model_hash
from diffpeft.drawing.samplers import label_of, scheduler_for
from diffpeft.drawing.shots import Shot
from diffpeft.pipeline.open import EMBEDDED, denoises

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffpeft.families.parts import Pipeline


@dataclass(frozen=True)
class PictureAccount:
    """What all pictures of a run have in common.

    Args:
        model: its name, for people.
        hash: of the file of the model, or of its denoiser; None if that is none, or several.
        loras: {name of an adapter: the hash of its file}.
    """

    pipe: Pipeline
    model: str
    hash: str | None
    loras: Mapping[str, str]

    @classmethod
    def of(cls, pipe: Pipeline, model: str | None, loras: Mapping[str, Path]) -> PictureAccount:
        """Reads the files once, for their hashes."""
        name = "tiny-emoji" if model is None else Path(model).stem if Path(model).is_file() else Path(model).name
        file = _weights(Path(model) if model else EMBEDDED)
        hashes = {name: lora_hash(path) for name, path in loras.items() if path.is_file()}
        return cls(pipe, name or str(model), model_hash(file) if file else None, hashes)

    def text(self, shot: Shot, image: Image, **more: object) -> str:
        """What is written into a picture. `more`: settings that stand after the usual ones."""
        scheduler = scheduler_for(self.pipe, shot.scheduler) if shot.scheduler else self.pipe.scheduler
        names = [name for name, _ in shot.adapters or () if name in self.loras]
        settings = {
            "Steps": shot.steps,
            **label_of(scheduler),
            **_scales(self.pipe, shot),
            "Seed": shot.seed,
            "Size": f"{image.width}x{image.height}",
            "Model hash": self.hash,
            "Model": self.model,
            "Denoising strength": strength_of(self.pipe, shot),
            "RNG": "CPU",
            "Lora hashes": ", ".join(f"{name}: {self.loras[name]}" for name in names) or None,
            **more,
            "Version": f"diffpeft {diffpeft.__version__}",
        }
        return infotext(shot.text, shot.negative, settings)


def strength_of(pipe: Pipeline, shot: Shot) -> float | None:
    """How much of a picture is drawn anew; None where all of it is drawn."""
    keyword = inspect.signature(type(pipe).__call__).parameters.get("strength")
    return (shot.strength or keyword.default) if keyword is not None and shot.images else None


def _scales(pipe: Pipeline, shot: Shot) -> dict[str, object]:
    """How much it was led. Where that and what the model is told are two numbers, the second has the name that Forge gave it."""
    takes, guider = inspect.signature(type(pipe).__call__).parameters, getattr(pipe, "guider", None)

    def usual(keyword: str) -> object:
        return takes[keyword].default if keyword in takes else getattr(guider, keyword, None)

    guidance = usual("guidance_scale") if shot.guidance is None else shot.guidance
    if "true_cfg_scale" not in takes:
        return {"CFG scale": guidance if shot.cfg is None else shot.cfg}
    cfg = usual("true_cfg_scale") if shot.cfg is None else shot.cfg
    return {"CFG scale": cfg, "Distilled CFG Scale": guidance}


def _weights(model: Path) -> Path | None:
    """The one file that tells a model: its own, or its denoiser's; None if there are several."""
    if model.is_file():
        return model
    parts = [path for path in model.glob("*/") if denoises(path.name)] if model.is_dir() else []
    files = [file for path in parts for file in path.glob("*.safetensors")]
    return files[0] if len(files) == 1 else None
