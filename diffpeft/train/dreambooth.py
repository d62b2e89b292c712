"""DreamBooth-style training of an adapter on a few images: load, attach, train, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import converters
import diffpeft
from diffpeft.bundle import Bundle
from diffpeft.errors import ConfigError, listed
from diffpeft.families import Family, family_of, open_family
from diffpeft.families.densities import DENSITIES
from diffpeft.model.attach import attach
from diffpeft.model.state import bundle_of, parameters_of, slots_of
from diffpeft.model.target import PRESETS, components, select
from diffpeft.pipeline.load import save_lora
from diffpeft.pipeline.open import default_device, default_dtype, open_parts
from diffpeft.train import data, draw, prior
from diffpeft.train.assembly import Assembly
from diffpeft.train.cache import Latents, Texts, text_identity
from diffpeft.train.check import Checked, check, resized, sides_of
from diffpeft.train.config import TrainConfig, target_names
from diffpeft.train.data.batches import Batches, Showing
from diffpeft.train.loop import LearningRate, fit
from diffpeft.train.method import ADAPTERS, CONFIGS
from diffpeft.train.objective import Batch, check_weighted, denoising, with_prior
from diffpeft.train.outcome import check_rank, check_room, refuse_unlearnt, rescued
from diffpeft.train.store import Disk, Memory, Nowhere, Store, fingerprint, pruned
from diffpeft.train.watch import Quiet, Watch

FORMATS = ("diffusers", "kohya")


@dataclass
class TrainRun:
    """A finished training run: every option as it was used, the pipeline with the adapter on it, the losses by step, the seconds it took.

    `account` says what the data held.
    """

    config: TrainConfig
    family: Family
    name: str
    losses: list[float]
    seconds: float
    account: data.Account


def train(config: TrainConfig, watch: Watch | None = None, checked: Checked | None = None) -> TrainRun:
    """Train an adapter. Writes nothing but missing class images; `save` writes the adapter.

    `checked` is what `check` said of the config, where that has been asked already.
    Raises ConfigError, DataError, CheckpointError, UnknownNameError, DivergedError or NothingLearntError.
    """
    watch = watch or Quiet()
    start = time.perf_counter()
    checked, device = checked or check(config), default_device()
    dtype = config.dtype or default_dtype(device)
    watch.phase("looking at the model")
    family = _opened(config, dtype, device)
    config, sizing = resolved(config, checked.name, dtype, family), sizing_of(config, family)
    checked, name = _resized(checked, sizing, watch), checked.name
    chosen_layers(config, family)
    assembly, texts = _encoded(config, family, checked, sizing, watch)
    watch.phase("loading the model")
    adapt(config, family, name)
    check_room(config.output(), parameters_of(family.pipe, name), len(FORMATS))
    loss_at = _loss(config, family, assembly, texts)
    watch.phase("training")
    losses = fit(
        parameters_of(family.pipe, name),
        loss_at,
        LearningRate(config.lr, config.steps, config.warmup, config.lr_scheduler),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        on_step=lambda done, loss: watch.step(done, config.steps, loss),
    )
    for slot in slots_of(family.pipe, name).values():
        slot.eval()
    refuse_unlearnt(components(family.pipe).values(), name)
    return TrainRun(config, family, name, losses, time.perf_counter() - start, checked.account)


def _opened(config: TrainConfig, dtype: str, device: str) -> Family:
    """The model to train, none of it loaded yet, without progress bars.

    Raises CheckpointError and its kin, or ConfigError for a weight that its losses cannot have.
    """
    parts = open_parts(
        config.model, config.base, vae=config.vae, text_encoders=config.text_encoders(), dtype=dtype, device=device
    )
    family = open_family(parts)
    if config.snr_gamma is not None:
        check_weighted(family.levels.kind)
    family.pipe.set_progress_bar_config(disable=True)
    return family


def resolved(config: TrainConfig, name: str, dtype: str, family: Family) -> TrainConfig:
    """The options with what their defaults come to."""
    if config.class_prompt is not None:
        config = replace(
            config,
            num_class_images=config.num_class_images or prior.IMAGES,
            prior_weight=config.prior_weight or prior.WEIGHT,
        )
    return replace(
        config,
        name=name,
        dtype=dtype,
        resolution=config.resolution or family.resolution,
        alpha=config.rank if config.alpha is None else config.alpha,
    )


def sizing_of(config: TrainConfig, family: Family) -> data.Sizing:
    """How the sizes of training pictures follow from those of images; they must suit the model's latents."""
    sides = sides_of(config, family.resolution)
    for side in sides:
        if side % family.multiple:
            raise ConfigError(f"resolution is {side}", remedy=f"For this model it is a multiple of {family.multiple}.")
    return data.Sizing(sides, config.buckets, family.multiple)


def _resized(checked: Checked, sizing: data.Sizing, watch: Watch) -> Checked:
    """The account with the sizes that the model can have; what the configs did not tell is said."""
    sized = resized(checked, sizing)
    before = checked.account.lines()
    for line in sized.account.lines():
        if line not in before:
            watch.note(line)
    return sized


def batches_of(config: TrainConfig, examples: Sequence[data.Example], sizing: data.Sizing, kind: str) -> Batches:
    """The batches of a kind of examples, by step."""
    showing = Showing(
        config.flip, config.crop, config.caption_dropout, config.shuffle_captions, config.keep_tokens or 0
    )
    return Batches(examples, sizing, config.batch_size, config.seed, kind, showing)


def _live(config: TrainConfig, family: Family) -> tuple[str, ...]:
    """The text encoders that are trained."""
    return family.adaptable if config.train_text_encoder else ()


def _encoded(
    config: TrainConfig, family: Family, checked: Checked, sizing: data.Sizing, watch: Watch
) -> tuple[Assembly, Texts]:
    """The batches of a run, and its texts: all that its steps will need is computed, and what computed it is given up."""
    steps, stores = range(config.steps), _stores(config, family)
    texts = Texts(family, _live(config, family), stores, default_device())
    watch.phase("encoding the captions")
    instances = batches_of(config, checked.account.examples, sizing, "instance")
    prior_prompts = [checked.prior.provenance.prompt] if checked.prior else []
    texts.learn(["", *instances.needed(steps)[1], *prior_prompts])
    classes = class_examples(config, family, checked.prior, watch, texts)
    assembly = Assembly([instances, batches_of(config, classes, sizing, "class")], Latents(family, stores("vae")))
    texts.learn(assembly.captions(steps))
    watch.phase("encoding the images")
    assembly.learn(steps, watch.tick)
    if config.cache == "disk" and (n := pruned(_cache_dir(config), config.cache_limit * 2**30)):
        watch.note(f"{n} entries of the cache that were not used for long are gone: it would take more than its limit")
    return assembly, texts


def _cache_dir(config: TrainConfig) -> Path:
    return Path(config.cache_dir) if config.cache_dir else config.output() / "cache"


def _stores(config: TrainConfig, family: Family) -> Callable[[str], Store]:
    """Where what a component computes is kept."""

    def store_of(component: str) -> Store:
        if config.cache != "disk":
            return Memory() if config.cache == "ram" else Nowhere()
        if component == "vae":
            return Disk(_cache_dir(config), lambda: fingerprint(family.parts("vae")))
        return Disk(_cache_dir(config), lambda: text_identity(family, component))

    return store_of


def chosen_layers(config: TrainConfig, family: Family) -> dict[str, str | list[str]]:
    """{component that is trained: which of its layers}. Loads nothing.

    Raises UnknownNameError for names that no layer has, ConfigError for a rank that is above both sides of all of them.
    """
    parts = [family.denoiser, *_live(config, family)]
    targets = target_names(config.targets, PRESETS)
    preset = isinstance(targets, str) and targets in PRESETS
    chosen = {
        part: targets if part == family.denoiser or preset else "attn" for part in parts
    }  # names are the denoiser's
    layers = {part: select({part: family.parts.outline(part)}, chosen[part])[part] for part in parts}
    check_rank(config, [layer for by_name in layers.values() for layer in by_name.values()])
    return chosen


def adapt(config: TrainConfig, family: Family, name: str) -> None:
    """Attach a fresh adapter; its initial values follow from the seed. The base is frozen."""
    chosen = chosen_layers(config, family)
    models = {part: family.parts(part) for part in chosen}
    for module in family.pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    for component, model in models.items():
        attach(
            model,
            CONFIGS[config.method](config),
            name,
            targets=chosen[component],
            generator=draw.generator(config.seed, "init", component),
            **ADAPTERS[config.method],
        )
    for slot in slots_of(family.pipe, name).values():
        slot.train()


def class_examples(
    config: TrainConfig, family: Family, plan: prior.ClassImages | None, watch: Watch, texts: Texts
) -> list[data.Example]:
    """The class images; missing ones are generated by the base model and kept for the next run."""
    if plan is None:
        return []
    if plan.damaged:
        watch.note(f"damaged, and drawn again: {listed(path.name for path in plan.damaged)}")
    if plan.missing:
        watch.phase(f"generating {len(plan.missing)} class images")
    seed = draw.generator(config.seed, "class").initial_seed() % 2**31
    plan = prior.draw_missing(plan, family, seed, watch.tick, texts)
    return data.captioned(plan.paths(), plan.provenance.prompt)


def _loss(config: TrainConfig, family: Family, assembly: Assembly, texts: Texts) -> Callable[[int], Tensor]:
    """The loss [] by step. Every draw is a function of seed, step and place in the batch."""
    device, density = family.parts(family.denoiser).device, DENSITIES[family.levels.density]

    def loss_of(batch: Batch) -> Tensor:
        batch = replace(batch.to(device), u=density(batch.u))
        losses = denoising(family, batch, texts(batch.prompts), config.snr_gamma)
        return with_prior(losses, batch.is_class.to(losses.device), config.prior_weight or prior.WEIGHT)

    def loss_at(step: int) -> Tensor:
        return torch.stack([loss_of(batch) for batch in assembly.at(step)]).sum()

    return loss_at


def save(run: TrainRun) -> list[Path]:
    """Write the adapter, one file for each format that can hold it, into the output folder.

    If that cannot be written, the files go into a temporary folder, which the OSError names.
    """
    return rescued(lambda folder: _written(run, folder), Path(run.config.out or ""), run.name)


def _bundle(run: TrainRun) -> Bundle:
    return bundle_of(run.family.pipe, run.name, family_of(run.family.pipe) or "")


def _written(run: TrainRun, folder: Path) -> list[Path]:
    """Write the adapter in every format that can hold it; the paths."""
    bundle = _bundle(run)
    formats = [format for format in FORMATS if not converters.refusal(bundle, format)]
    paths = [folder / f"{run.name}.{format}.safetensors" for format in formats]
    for format, path in zip(formats, paths, strict=True):
        save_lora(run.family.pipe, path, name=run.name, format=format, metadata=_metadata(run))
    return paths


def readers(run: TrainRun, files: Sequence[Path]) -> dict[str, str]:
    """{file: which programs read it}, and {format: why there is no such file}."""
    bundle = _bundle(run)
    read_by = {path.name: f"read by {', '.join(converters.inspect(path).readable_by)}" for path in files}
    refused = {format: refusal for format in FORMATS if (refusal := converters.refusal(bundle, format))}
    return read_by | {f"no {format} file": refusal.what for format, refusal in refused.items()}


def _metadata(run: TrainRun) -> dict[str, object]:
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
        "ss_base_model_version": run.family.base_version,
        "ss_sd_model_name": Path(config.model or "").name,
        "ss_min_snr_gamma": config.snr_gamma,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": run.name,
        "modelspec.implementation": "diffusers",
        "modelspec.architecture": f"{run.family.architecture}/lora",
        "modelspec.resolution": f"{run.account.resolution}x{run.account.resolution}",
        "modelspec.prediction_type": {"v_prediction": "v"}.get(run.family.levels.kind, run.family.levels.kind),
        "modelspec.trigger_phrase": config.instance_prompt or "",
        "diffpeft.version": diffpeft.__version__,
    }
