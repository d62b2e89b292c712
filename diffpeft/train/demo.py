"""The main job on the embedded base: learn a drawing style from 96 pictures, and measure it on names that were not among them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import diffpeft
from diffpeft.io import replacing
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import data, dreambooth
from diffpeft.train.config import TrainConfig
from diffpeft.train.metrics import heldout_loss, patch_distance, patch_features, shape_kept
from diffpeft.train.outputs import METRICS, PAGE
from diffpeft.train.report import PictureRow, Pictures
from diffpeft.train.sample import STRENGTHS, Grid, grid, pictures
from diffpeft.train.samples import begun

IMAGES = EMBEDDED.parent / "demo"
TITLE = "diffpeft demo: a drawing style learnt from 96 pictures"
NAME, SEEDS, STEPS, GUIDANCE = "openmoji", (1000, 2000), 25, 4.0
START = 0.2  # the share of the denoising steps that the base takes alone: there it is decided what stands where


def config(out: str, method: str = "lora", steps: int = 900) -> TrainConfig:
    """The options of the demo: what suits a style, many small pictures and a tiny model. How they were chosen: docs/demo.md."""
    return TrainConfig(
        model=str(EMBEDDED),
        data=str(IMAGES / "train"),
        out=out,
        name=NAME,
        method=method,
        steps=steps,
        rank=16,
        targets="full",
        lr=1e-3,
        lr_scheduler="cosine",
        warmup=min(20, steps // 2),
        batch_size=8,
        flip=True,
        caption_dropout=0.2,
        snr_gamma=5.0,
        sigma_range="0,0.985",
        sample_start=START,
        save_every=0,
        sample_prompt="an emoji of lemon",
        sample_every=max(steps // 4, 50),
        sample_steps=STEPS,
        sample_guidance=GUIDANCE,
        overwrite=True,
    )


@dataclass
class Heldout:
    """The names that are measured on, and how they truly look in both styles, [n, 64, 64, 3]."""

    prompts: list[str]
    target: np.ndarray
    original: np.ndarray
    paths: list[Path]


def heldout() -> Heldout:
    """The 16 names that are not trained on, with their pictures in both styles."""
    examples = data.find(IMAGES / "heldout" / "target", None)
    target, original = (
        np.stack([np.asarray(Image.open(IMAGES / "heldout" / style / e.path.name).convert("RGB")) for e in examples])
        for style in ("target", "original")
    )
    return Heldout([e.caption for e in examples], target, original, [e.path for e in examples])


def demo(out: str, method: str, steps: int, watch: dreambooth.Watch, overwrite: bool = True) -> list[Path]:
    """Train, measure, draw, write; the paths of the files written. Without `overwrite` an earlier demo there is a ConfigError."""
    start = time.perf_counter()
    run = dreambooth.train(replace(config(out, method, steps), overwrite=overwrite), watch)
    pipe = run.family.parts.whole()
    truth = heldout()
    watch.phase("drawing held-out prompts")
    drawn = {
        strength: [_drawn(run, truth, strength, seed, watch) for seed in (SEEDS if strength in (0, 1) else SEEDS[:1])]
        for strength in STRENGTHS
    }
    watch.phase("measuring")
    ratios = [shape_kept(*pair) for pair in zip(drawn[0.0], drawn[1.0], strict=True)]
    metrics = {
        **_distances(pipe.vae, drawn, truth),
        "heldout_loss": _paired(run, truth, watch),
        "shape_kept": {"before": 1.0, "after": float(np.mean(ratios))},
    }
    names = [p.removeprefix("an emoji of ") for p in truth.prompts]
    picture = grid(
        names,
        [f"strength {s:g}" for s in STRENGTHS],
        [drawn[s][0] for s in STRENGTHS],
        truth.target,
    )
    watch.phase("writing")
    cells = zip(*(drawn[s][0] for s in STRENGTHS), truth.target, strict=True)
    shown = Pictures(
        [*(f"strength {s:g}" for s in STRENGTHS), "true target"],
        [PictureRow(name, pictures) for name, pictures in zip(names, cells, strict=True)],
    )
    return _write(run, picture, shown, metrics, time.perf_counter() - start)


def _drawn(run: dreambooth.TrainRun, truth: Heldout, strength: float, seed: int, watch: dreambooth.Watch) -> np.ndarray:
    with torch.no_grad(), diffpeft.adapters(run.family.pipe, {run.name: begun(strength, START)}):
        seeds = range(seed, seed + len(truth.prompts))
        return pictures(run.family.pipe, truth.prompts, seeds, steps=STEPS, guidance=GUIDANCE, tick=watch.tick)


def _distances(vae: nn.Module, drawn: dict[float, list[np.ndarray]], truth: Heldout) -> dict[str, dict[str, float]]:
    """The patch distance of what was drawn to the true pictures of both styles, the mean over the seeds."""
    true = {
        "distance_to_target": patch_features(vae, truth.target),
        "distance_to_original": patch_features(vae, truth.original),
    }
    features = {
        when: [patch_features(vae, images) for images in drawn[strength]]
        for when, strength in (("before", 0.0), ("after", 1.0))
    }
    return {
        name: {when: float(np.mean([patch_distance(f, style) for f in maps])) for when, maps in features.items()}
        for name, style in true.items()
    }


def _paired(run: dreambooth.TrainRun, truth: Heldout, watch: dreambooth.Watch) -> dict[str, float]:
    """The denoising loss on held-out target pictures, with the same noise and noise levels at strength 0 and 1."""
    pixels = data.stacked(truth.paths, run.family.resolution)
    out = {}
    for when, strength in (("before", 0.0), ("after", 1.0)):
        with diffpeft.adapters(run.family.pipe, {run.name: strength}):
            out[when] = heldout_loss(run.family, pixels, truth.prompts, seed=run.config.seed, tick=watch.tick)
    return out


def _write(
    run: dreambooth.TrainRun, picture: Grid, shown: Pictures, metrics: dict[str, dict[str, float]], seconds: float
) -> list[Path]:
    """Write the adapter, the grid of pictures, the measurements and the report; the paths."""
    out = Path(run.config.out or "")
    files = [*dreambooth.save(run), out / "before_after.png", out / METRICS, out / PAGE]
    with replacing(out / "before_after.png") as f:
        picture.image.save(f, "PNG", optimize=True)
    table = {
        **run.usage.table(run.config.examples()),
        **metrics,
        "shape_kept": metrics["shape_kept"]["after"],
        "seconds": round(seconds, 1),
        "steps": len(run.losses),
        "method": run.config.method,
        "data": run.account.table(),
        "grid": {"strengths": list(STRENGTHS), "boxes": picture.boxes},
    }
    with replacing(out / METRICS) as f:
        f.write(json.dumps(table, indent=1).encode())
    assert run.live
    run.live.renew({"title": TITLE, "files": files, "before_after": shown, "measures": metrics})
    return files
