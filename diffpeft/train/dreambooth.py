"""DreamBooth-style training of an adapter on a few images: load, attach, train, save."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import converters
import diffpeft
from diffpeft.errors import ConfigError, DataError, UnknownNameError
from diffpeft.families import Family, family_of, open_family
from diffpeft.model.attach import attach
from diffpeft.model.state import bundle_of, parameters_of, slots_of
from diffpeft.model.target import PRESETS
from diffpeft.pipeline.load import save_lora
from diffpeft.pipeline.open import check_model, default_device, default_dtype, open_pipeline
from diffpeft.train import data, draw
from diffpeft.train.cache import Latents, Texts
from diffpeft.train.config import TrainConfig
from diffpeft.train.loop import Schedule, fit
from diffpeft.train.method import CONFIGS
from diffpeft.train.objective import Batch, denoising, with_prior
from diffpeft.train.sample import pictures
from diffpeft.train.watch import Quiet, Watch

FORMATS = ("diffusers", "kohya")


@dataclass
class Run:
    """A finished training run: every option as it was used, the pipeline with the adapter on it, the losses by step, the seconds it took."""

    config: TrainConfig
    family: Family
    name: str
    losses: list[float]
    seconds: float


def train(config: TrainConfig, watch: Watch | None = None) -> Run:
    """Train an adapter. Writes nothing but missing class images; `save` writes the adapter.

    Raises ConfigError, DataError, CheckpointError, UnknownNameError or DivergedError.
    """
    watch = watch or Quiet()
    start = time.perf_counter()
    (name, examples), device = check(config), default_device()
    dtype = config.dtype or default_dtype(device)
    watch.phase("loading the model")
    family = open_family(open_pipeline(config.model, config.base, dtype=dtype, device=device))
    size, alpha = resolution(config, family), config.rank if config.alpha is None else config.alpha
    config = replace(config, name=name, dtype=dtype, resolution=size, alpha=alpha)
    watch.phase("encoding the images")
    latents = Latents(family, examples, size, config.flip, watch.tick)
    adapt(config, family, name)
    with diffpeft.adapters(family.pipe, {name: 0.0}):
        classes = class_examples(config, family, watch)
    class_latents = Latents(family, classes, size, config.flip, watch.tick)
    loss_at = _loss(config, family, (examples, latents), (classes, class_latents))
    watch.phase("training")
    losses = fit(
        parameters_of(family.pipe, name),
        loss_at,
        Schedule(config.lr, config.steps, config.warmup, config.lr_scheduler),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        on_step=lambda done, loss: watch.step(done, config.steps, loss),
    )
    for slot in slots_of(family.pipe, name).values():
        slot.eval()
    return Run(config, family, name, losses, time.perf_counter() - start)


def check(config: TrainConfig) -> tuple[str, list[data.Example]]:
    """All checks that need no model; the adapter's name and the images. Raises ConfigError and its kin."""
    config.validate()
    if config.method not in ADAPTERS:
        raise UnknownNameError.of("method", config.method, ADAPTERS)
    out = config.output()
    if config.class_data and Path(config.class_data).is_file():
        raise DataError(
            "the folder of class images is a file", where=config.class_data, remedy="Pass a folder, which may be empty."
        )
    examples = data.find(config.data, config.instance_prompt)  # type: ignore[arg-type]
    check_model(config.model, config.base)
    return config.name or re.sub(r"[^A-Za-z0-9._-]", "_", out.name) or "adapter", examples


def resolution(config: TrainConfig, family: Family) -> int:
    """The side of the training images; it must suit the model's latents."""
    size = config.resolution or family.resolution
    if size % family.multiple:
        raise ConfigError(f"resolution is {size}", remedy=f"For this model it is a multiple of {family.multiple}.")
    return size


# The methods that can be trained, with keywords of attach: rotations turn the output, as in the files that image programs read.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {},
    "loha": {},
    "lokr": {},
    "oft": {"side": "output"},
    "boft": {"side": "output"},
}


def adapt(config: TrainConfig, family: Family, name: str) -> None:
    """Attach a fresh adapter; its initial values follow from the seed. The base is frozen."""
    for module in family.pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    settings = CONFIGS[config.method](config)
    components = [family.denoiser, *(family.text_encoders if config.train_text_encoder else ())]
    for component in components:
        targets = (
            config.targets if component == family.denoiser or config.targets in PRESETS else "attn"
        )  # an expression is for the denoiser
        attach(
            getattr(family.pipe, component),
            settings,
            name,
            targets=targets,
            generator=draw.generator(config.seed, "init", component),
            **ADAPTERS[config.method],
        )
    for slot in slots_of(family.pipe, name).values():
        slot.train()


def class_examples(config: TrainConfig, family: Family, watch: Watch) -> list[data.Example]:
    """The class images; missing ones are generated by the base model and kept for the next run."""
    if not config.class_prompt:
        return []
    folder = Path(config.class_data) if config.class_data else Path(config.out or "") / "class"
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(p for p in folder.iterdir() if p.suffix.lower() in data.ENDINGS)
    missing = config.num_class_images - len(there)
    if missing > 0:
        watch.phase(f"generating {missing} class images")
        guidance, seed = 4.0, draw.generator(config.seed, "class").initial_seed() % 2**31
        for first in range(0, missing, 8):
            count = min(8, missing - first)
            images = pictures(
                family.pipe, [config.class_prompt] * count, seed + first, steps=25, guidance=guidance, tick=watch.tick
            )
            for i, image in enumerate(images):
                Image.fromarray(image).save(folder / f"class-{len(there) + first + i:04d}.png")
    return data.find(folder, config.class_prompt)[: config.num_class_images]


def _loss(
    config: TrainConfig,
    family: Family,
    instances: tuple[list[data.Example], Latents],
    classes: tuple[list[data.Example], Latents],
) -> Callable[[int], Tensor]:
    """The loss by step. Every draw is a function of seed, step and place in the batch."""
    texts = Texts(family, live=config.train_text_encoder)
    device = getattr(family.pipe, family.denoiser).device

    def loss_at(step: int) -> Tensor:
        batch = _batch(config, step, instances, classes)
        batch = Batch(batch.latents.to(device), batch.noise.to(device), batch.u, batch.prompts, batch.is_class)
        losses = denoising(family, batch, texts(batch.prompts), config.snr_gamma)
        return with_prior(losses, batch.is_class.to(losses.device), config.prior_weight)

    return loss_at


def _batch(
    config: TrainConfig,
    step: int,
    instances: tuple[list[data.Example], Latents],
    classes: tuple[list[data.Example], Latents],
) -> Batch:
    latents, noise, u, prompts, is_class = [], [], [], [], []
    for kind, (examples, cached) in (("instance", instances), ("class", classes)):
        if not examples:
            continue
        for place, index in enumerate(
            draw.order(len(examples), step * config.batch_size, config.batch_size, config.seed, kind)
        ):
            key = (config.seed, step, kind, place)
            latents.append(cached.draw(index, config.flip and draw.uniform(*key, "flip") < 0.5, *key))
            noise.append(torch.randn(latents[-1].shape, generator=draw.generator(*key, "noise")))
            u.append(draw.uniform(*key, "level"))
            prompts.append("" if draw.uniform(*key, "caption") < config.caption_dropout else examples[index].caption)
            is_class.append(kind == "class")
    return Batch(torch.stack(latents), torch.stack(noise), torch.tensor(u), prompts, torch.tensor(is_class))


def save(run: Run) -> list[Path]:
    """Write the adapter, one file for each format that can hold it, into the output folder."""
    bundle = bundle_of(run.family.pipe, run.name, family_of(run.family.pipe) or "")
    formats = [format for format in FORMATS if not converters.refusal(bundle, format)]
    paths = [Path(run.config.out or "") / f"{run.name}.{format}.safetensors" for format in formats]
    for format, path in zip(formats, paths, strict=True):
        save_lora(run.family.pipe, path, name=run.name, format=format, metadata=_metadata(run))
    return paths


def _metadata(run: Run) -> dict[str, Any]:
    """What other programs show of a file, under sd-scripts' and ModelSpec's names. Paths are cut to their last part."""
    config = run.config
    return {
        "ss_output_name": run.name,
        "ss_network_dim": config.rank,
        "ss_network_alpha": config.alpha,
        "ss_learning_rate": config.lr,
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": config.warmup,
        "ss_steps": len(run.losses),
        "ss_max_train_steps": config.steps,
        "ss_seed": config.seed,
        "ss_batch_size_per_device": config.batch_size,
        "ss_optimizer": "AdamW",
        "ss_sd_model_name": Path(config.model or "").name,
        "ss_min_snr_gamma": config.snr_gamma,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": run.name,
        "modelspec.implementation": "diffusers",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.trigger_phrase": config.instance_prompt or "",
        "diffpeft.version": diffpeft.__version__,
    }
