"""DreamBooth-style training of an adapter on a few images: load, attach, train, save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import converters
import diffpeft
from diffpeft.bundle import Bundle
from diffpeft.errors import ConfigError, listed
from diffpeft.families import Family, family_of, open_family
from diffpeft.model.attach import attach
from diffpeft.model.state import bundle_of, parameters_of, slots_of, trained_parameters
from diffpeft.model.target import PRESETS, select
from diffpeft.pipeline.load import save_lora
from diffpeft.pipeline.open import default_device, default_dtype, open_pipeline
from diffpeft.train import data, draw, prior
from diffpeft.train.cache import Latents, Texts
from diffpeft.train.check import FORMATS, Checked, check, file_of, resized
from diffpeft.train.checkpoints import prune
from diffpeft.train.config import TrainConfig, target_names
from diffpeft.train.groups import set_ranks
from diffpeft.train.job import checked_dtype, job_of, keeper_of
from diffpeft.train.lock import occupied
from diffpeft.train.loop import Events, fit
from diffpeft.train.method import ADAPTERS, CONFIGS
from diffpeft.train.objective import Batch, check_weighted, denoising, sent, with_prior
from diffpeft.train.optimizers import rate_of, row_of
from diffpeft.train.outcome import check_rank, check_room, refuse_idle, refuse_unread, rescued
from diffpeft.train.start import adopt, assist, bake, dismiss
from diffpeft.train.state import fingerprint
from diffpeft.train.watch import Quiet, Watch

Images = tuple[Sequence[data.Example], Latents]  # with their latents, in the same order


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
    """Train an adapter. Writes missing class images and states of the run; `save` writes the adapter.

    `checked` is what `check` said of the config, where that has been asked already.
    Raises ConfigError, DataError, CheckpointError, UnknownNameError, AdapterStateError (another run writes there), DivergedError or
    NothingLearntError; Interrupted after a signal.
    """
    checked = checked or check(config)
    with occupied(config.output()):
        return _trained(config, checked, watch or Quiet())


def _trained(typed: TrainConfig, checked: Checked, watch: Watch) -> TrainRun:
    start, device = time.perf_counter(), default_device()
    dtype = checked_dtype(typed.dtype or default_dtype(device), device)
    watch.phase("loading the model")
    family = _opened(typed, dtype, device)
    config = resolved(typed, checked.name, dtype, family)
    if checked.account.resolution != config.resolution:  # the configs did not tell
        checked = resized(checked, resolution(config, family))
        if checked.account.small:
            watch.note(checked.account.notes()[0])
    examples, name = checked.account.examples, checked.name
    watch.phase("encoding the images")
    latents = Latents(family, examples, resolution(config, family), config.flip, watch.tick)
    config = adapt(config, family, name)
    check_room(config.output(), parameters_of(family.pipe, name), len(FORMATS), config)
    with diffpeft.adapters(family.pipe, {name: 0.0}):
        classes = class_examples(config, family, checked.prior, watch)
    class_latents = Latents(family, classes, resolution(config, family), config.flip, watch.tick)
    run = TrainRun(config, family, name, [], 0.0, checked.account)
    keeper = keeper_of(typed, config, _reads(checked), partial(_exported, run), checked.checkpoint, "train")
    loss = _loss(config, family, (examples, latents), (classes, class_latents))
    with prepared(config, family):
        assist(family.pipe, config.training_adapter, name)
        job = job_of(config, trained_parameters(family.pipe, name), loss, strict=True)
        watch.phase("training")
        if checked.checkpoint is None:
            prune(keeper.out, 0)
        events = Events(step=lambda done, value: watch.step(done, config.steps, value), note=watch.note)
        run.losses = fit(job, keeper, events)
        dismiss(family.pipe, config.training_adapter)
    for slot in slots_of(family.pipe, name).values():
        slot.eval()
    refuse_idle(family.pipe, name, config.allow_unchanged)
    run.seconds = time.perf_counter() - start
    return run


def _reads(checked: Checked) -> dict[str, str]:
    """What a run reads, by fingerprint: names, sizes and captions of its images."""
    examples = [(e.path.name, e.path.stat().st_size, e.caption) for e in checked.account.examples]
    return {"data": fingerprint(examples)}


@contextlib.contextmanager
def prepared(config: TrainConfig, family: Family) -> Iterator[None]:
    """The models as they are while training: with gradient checkpointing, and compiled."""
    models = [getattr(family.pipe, part) for part in (family.denoiser, *_live(config, family))]
    checkpointed = models if config.gradient_checkpointing else []
    for model in checkpointed:
        model.enable_gradient_checkpointing() if hasattr(model, "enable_gradient_checkpointing") else (
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        )
    if config.compile:
        models[0].compile()
    try:
        yield
    finally:
        models[0]._compiled_call_impl = None
        for model in checkpointed:
            model.disable_gradient_checkpointing() if hasattr(model, "disable_gradient_checkpointing") else (
                model.gradient_checkpointing_disable()
            )


def _live(config: TrainConfig, family: Family) -> tuple[str, ...]:
    """The text encoders that are trained."""
    return family.text_encoders if config.train_text_encoder else ()


def _opened(config: TrainConfig, dtype: str, device: str) -> Family:
    """The model to train, without progress bars. Raises CheckpointError and its kin, or ConfigError for a weight that its losses cannot have."""
    family = open_family(open_pipeline(config.model, config.base, dtype=dtype, device=device))
    if config.snr_gamma is not None:
        check_weighted(family.kind)
    bake(family.pipe, config.base_lora)
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
        lr=rate_of(config),
        resolution=resolution(config, family),
        alpha=config.rank if config.alpha is None else config.alpha,
    )


def resolution(config: TrainConfig, family: Family) -> int:
    """The side of the training images; it must suit the model's latents."""
    size = config.resolution or family.resolution
    if size % family.multiple:
        raise ConfigError(f"resolution is {size}", remedy=f"For this model it is a multiple of {family.multiple}.")
    return size


def adapt(config: TrainConfig, family: Family, name: str) -> TrainConfig:
    """Attach an adapter, and freeze the base; the options with what the adapter has of its own.

    A fresh one's initial values follow from the seed; `init_from` brings its values, method, ranks and layers along.
    """
    for module in family.pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    if config.init_from:
        config = replace(config, **adopt(family.pipe, config.init_from, name))
    else:
        _attach(config, family, name)
    for slot in slots_of(family.pipe, name).values():
        slot.train()
    return config


def _attach(config: TrainConfig, family: Family, name: str) -> None:
    settings = CONFIGS[config.method](config)
    parts = [family.denoiser, *_live(config, family)]
    targets = target_names(config.targets, PRESETS)
    preset = isinstance(targets, str) and targets in PRESETS
    chosen = {
        part: targets if part == family.denoiser or preset else "attn" for part in parts
    }  # names are the denoiser's
    layers = {part: select({part: getattr(family.pipe, part)}, chosen[part])[part] for part in parts}
    check_rank(config, [layer for by_name in layers.values() for layer in by_name.values()])
    set_ranks(settings, config, [name for by_name in layers.values() for name in by_name])
    for component in parts:
        attach(
            getattr(family.pipe, component),
            settings,
            name,
            targets=chosen[component],
            generator=draw.generator(config.seed, "init", component),
            **ADAPTERS[config.method],
        )


def class_examples(
    config: TrainConfig, family: Family, plan: prior.ClassImages | None, watch: Watch
) -> list[data.Example]:
    """The class images; missing ones are generated by the base model and kept for the next run."""
    if plan is None:
        return []
    if plan.damaged:
        watch.note(f"damaged, and drawn again: {listed(path.name for path in plan.damaged)}")
    if plan.missing:
        watch.phase(f"generating {len(plan.missing)} class images")
    seed = draw.generator(config.seed, "class").initial_seed() % 2**31
    plan = prior.draw_missing(plan, family, seed, watch.tick)
    return data.captioned(plan.paths(), plan.provenance.prompt)


def _loss(
    config: TrainConfig,
    family: Family,
    instances: Images,
    classes: Images,
) -> Callable[[int, int], Tensor]:
    """The loss [] by step and part. Every draw is a function of seed, step and place in the step.

    A step has batch_size x accumulate places for instance images and as many for class images; each part has its share of both, so that the parts'
    losses add up to the loss of one batch of that size.
    """
    texts = Texts(family, live=config.train_text_encoder)
    device = getattr(family.pipe, family.denoiser).device

    def loss_at(step: int, part: int) -> Tensor:
        batch = _batch(config, step, part, instances, classes)
        batch = replace(batch, latents=sent(batch.latents, device), noise=sent(batch.noise, device))
        losses = denoising(family, batch, texts(batch.prompts), config.snr_gamma)
        return with_prior(losses, batch.is_class, config.prior_weight or prior.WEIGHT) / config.accumulate

    return loss_at


def _batch(config: TrainConfig, step: int, part: int, instances: Images, classes: Images) -> Batch:
    """A part of a step: instance images, and as many class images if there are any."""
    latents, noise, u, prompts, is_class = [], [], [], [], []
    for kind, (examples, cached) in (("instance", instances), ("class", classes)):
        if not examples:
            continue
        start = (step * config.accumulate + part) * config.batch_size
        indices = draw.order(len(examples), start, config.batch_size, config.seed, kind)
        for place, index in enumerate(indices, part * config.batch_size):
            key = (config.seed, step, kind, place)
            latents.append(cached.draw(index, config.flip and draw.uniform(*key, "flip") < 0.5, *key))
            noise.append(torch.randn(latents[-1].shape, generator=draw.generator(*key, "noise")))
            u.append(draw.uniform(*key, "level"))
            prompts.append("" if draw.uniform(*key, "caption") < config.caption_dropout else examples[index].caption)
            is_class.append(kind == "class")
    return Batch(torch.stack(latents), torch.stack(noise), torch.tensor(u), prompts, torch.tensor(is_class))


def save(run: TrainRun) -> list[Path]:
    """Write the adapter, one file for each format that can hold it, into the output folder.

    Each is read again. If one cannot be written, the files go into a temporary folder, which the OSError names.
    Raises NothingLearntError if a file changes less than was learnt.
    """
    out = Path(run.config.out or "")
    with occupied(out):
        files = rescued(lambda folder: _written(run, folder), out, run.name)
    for file in files:
        refuse_unread(run.family.pipe, file, run.name, run.config.allow_unchanged)
    return files


def _exported(run: TrainRun, folder: Path, step: int) -> None:
    """Write the adapter as it is after so many steps into the folder of a checkpoint."""
    _written(run, folder, step)


def _bundle(run: TrainRun) -> Bundle:
    return bundle_of(run.family.pipe, run.name, family_of(run.family.pipe) or "")


def _written(run: TrainRun, folder: Path, step: int | None = None) -> list[Path]:
    """Write the adapter in every format that can hold it; the paths."""
    bundle = _bundle(run)
    formats = [format for format in FORMATS if not converters.refusal(bundle, format)]
    paths = [folder / file_of(run.name, format) for format in formats]
    for format, path in zip(formats, paths, strict=True):
        save_lora(run.family.pipe, path, name=run.name, format=format, metadata=_metadata(run, step))
    return paths


def readers(run: TrainRun, files: Sequence[Path]) -> dict[str, str]:
    """{file: which programs read it}, and {format: why there is no such file}."""
    bundle = _bundle(run)
    read_by = {path.name: f"read by {', '.join(converters.inspect(path).readable_by)}" for path in files}
    refused = {format: refusal for format in FORMATS if (refusal := converters.refusal(bundle, format))}
    return read_by | {f"no {format} file": refusal.what for format, refusal in refused.items()}


def _metadata(run: TrainRun, step: int | None = None) -> dict[str, object]:
    """What other programs show of a file, under sd-scripts' and ModelSpec's names. Paths are cut to their last part. `step`: of a checkpoint."""
    config = run.config
    return {
        "ss_output_name": run.name,
        "ss_network_dim": config.rank,
        "ss_network_alpha": config.alpha,
        "ss_learning_rate": config.lr,
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": config.warmup,
        "ss_steps": len(run.losses) if step is None else step,
        "ss_max_train_steps": config.steps,
        "ss_seed": config.seed,
        "ss_batch_size_per_device": config.batch_size,
        "ss_optimizer": row_of(config.optimizer).path,
        "ss_gradient_accumulation_steps": config.accumulate,
        "ss_sd_model_name": Path(config.model or "").name,
        "ss_min_snr_gamma": config.snr_gamma,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": run.name,
        "modelspec.implementation": "diffusers",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.trigger_phrase": config.instance_prompt or "",
        "diffpeft.version": diffpeft.__version__,
    }
