"""DreamBooth-style training of an adapter on a few images: load, attach, train, save."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

import diffpeft
from diffpeft import patterns
from diffpeft.errors import ConfigError, listed
from diffpeft.families import CaptionReading, Family, Generic, open_family
from diffpeft.families.base import Sizes
from diffpeft.layers.streaming import remembered, stream_of
from diffpeft.model.attach import attach
from diffpeft.model.placing import Placing
from diffpeft.model.state import slots_of, trained_parameters
from diffpeft.model.target import PRESETS, select
from diffpeft.pipeline.open import default_device, default_dtype, denoises, open_parts
from diffpeft.train import data, draw, machines, origins, prior
from diffpeft.train.assembly import Assembly
from diffpeft.train.cache import Latents, Texts, text_identity
from diffpeft.train.check import Checked, check, framing_of, resized
from diffpeft.train.config import TrainConfig, target_names
from diffpeft.train.data.batches import Batches, Showing
from diffpeft.train.data.footage import frames_in
from diffpeft.train.experts import asked_alone, experts_of, trained_alone
from diffpeft.train.groups import set_ranks
from diffpeft.train.job import checked_dtype, job_of, keeper_of
from diffpeft.train.journal import BY_BAND, HELDOUT, Logbook
from diffpeft.train.levels import Sampling
from diffpeft.train.lock import occupied
from diffpeft.train.loop import Events, Keeper, fit
from diffpeft.train.method import ADAPTERS, CONFIGS
from diffpeft.train.objective import (
    BASE_WEIGHT,
    BaseRange,
    Batch,
    Objective,
    check_weighted,
    denoising,
    preserved,
    with_prior,
)
from diffpeft.train.outcome import check_rank, refuse_idle
from diffpeft.train.paired import HeldoutPictures
from diffpeft.train.prior_prompts import prior_prompts
from diffpeft.train.progress import shown
from diffpeft.train.publish import open_repository
from diffpeft.train.resolve import resolved
from diffpeft.train.run import TrainRun
from diffpeft.train.save import check_saving, exported, file_dtype
from diffpeft.train.save import readers as readers
from diffpeft.train.save import save as save
from diffpeft.train.shards import shard
from diffpeft.train.showing import Drawing, begun_with, drawing_of, showing, told
from diffpeft.train.slider import SliderLoss, canvases
from diffpeft.train.slider_config import SliderConfig
from diffpeft.train.start import adopt, assist, bake, dismiss, without
from diffpeft.train.state import fingerprint
from diffpeft.train.store import Disk, Memory, Nowhere, Store, identity_of, pruned
from diffpeft.train.team import meet, team
from diffpeft.train.usage import Stopwatch
from diffpeft.train.watch import Quiet, Watch
from diffpeft.train.watching import judge_of, logbook_of, tabulated, with_measuring


def train(config: TrainConfig, watch: Watch | None = None, checked: Checked | None = None) -> TrainRun:
    """Train an adapter. Writes missing class images and states of the run; `save` writes the adapter.

    `checked` is what `check` said of the config, where that has been asked already.
    Raises ConfigError, DataError, CheckpointError, UnknownNameError, AdapterStateError (another run writes there), DivergedError or
    NothingLearntError; Interrupted after a signal.
    """
    checked = checked or check(config)
    with occupied(config.output()), meet().together(), shown(watch) as told:
        return _trained(checked.config, checked, told if team().main else Quiet())


def _trained(typed: TrainConfig, checked: Checked, watch: Watch) -> TrainRun:
    clock, device = Stopwatch(), default_device()
    dtype = checked_dtype(typed.dtype or machines.precision() or default_dtype(device), device)
    if team().main:
        open_repository(typed)
    watch.phase("looking at the model")
    family = noted(opened(typed, dtype, device), watch)
    sizing, name = sizing_of(typed, family), checked.name
    checked = sized(checked, sizing, watch)
    config = settled(typed, checked, family, dtype)
    chosen = {} if config.init_from else chosen_layers(config, family)
    texts = Texts(family, _live(config, family), _stores(config, family), device)
    drawing = drawing_of(config, family, begun_with(checked.prompts, family, checked.account), chosen, texts, device)
    said = origins.origins_of(typed, config, checked.origins)
    if team().main:
        origins.record(config.output(), config, said, checked.account.table())
    done = checked.state.step if checked.state else 0
    with contextlib.closing(logbook_of(config, name, done, clock, watch)) as log:
        encoded = _encoded(config, family, checked, sizing, texts, drawing, watch)
        watch.phase("loading the model")
        config, unread = adapt(config, family, name), unread_layers(family, name)
        said = origins.origins_of(typed, config, checked.origins)
        run = TrainRun(config, family, name, [], 0.0, checked.account, said)
        run.class_images = len(checked.prior.paths()) if checked.prior else 0
        check_saving(run)
        keeper = keeper_of(typed, config, name, _reads(checked), partial(exported, run), checked.state, typed.COMMAND)
        with prepared(config, family):
            assist(family.pipe, config.training_adapter, name)
            _share_out(config, family, name)
            _fitted(run, keeper, encoded, unread, log, watch, clock)
            dismiss(family.pipe, config.training_adapter)
    for slot in slots_of(family.pipe, name).values():
        slot.eval()
    with told(run):
        refuse_idle(family.pipe, name, config.allow_unchanged, unread)
    run.usage = clock.usage()
    run.seconds = run.usage.seconds
    return run


def _share_out(config: TrainConfig, family: Family, name: str) -> None:
    """Let each process hold its share of the denoiser, if the run says so; the adapter stays whole, and so do text encoders: transformers knows by their
    classes, which FSDP changes, what they shall return.
    """
    if machines.sharding(config):
        trained = set(trained_parameters(family.pipe, name).values())
        for denoiser in experts_of(config, family).spans:
            shard(family.parts(denoiser), trained)


def _fitted(
    run: TrainRun,
    keeper: Keeper,
    encoded: Encoded,
    unread: Collection[str],
    log: Logbook,
    watch: Watch,
    clock: Stopwatch,
) -> None:
    """Take the steps of a run, or those that are left. Raises what `fit` raises."""
    config, family = run.config, run.family
    parameters = trained_parameters(family.pipe, run.name)
    begins = experts_of(config, family).begins(config.seed)
    strict = {
        where: begins.get(where.partition(".")[0], (0, 1))
        for where in parameters
        if where.rpartition(".")[0] not in unread and not (family.boundary and isinstance(config, SliderConfig))
    }
    loss = encoded.loss(config)
    job = job_of(config, parameters, loss, strict=strict)
    judge = judge_of(run, encoded.heldout, encoded.texts, sampling_of(config, family), objective_of(config), log, watch)
    if judge is not None:
        keeper = replace(keeper, judge=judge, facts={**keeper.facts, "heldout": judge.key})
    tabulated(log, config, job.optimizer, [*HELDOUT, *BY_BAND] if judge else [])
    watch.phase("training")
    shown = showing(run, encoded.drawing, keeper, job.schedule.at, log, watch, clock)
    with told(run):
        run.losses = fit(job, keeper, shown.events(replace(Events.of(watch, config.steps), log=log)), clock)
        if isinstance(loss, SliderLoss):
            loss.settle()
        run.best = judge.verdict(config.steps) if judge else None
        shown.end()


def _reads(checked: Checked) -> dict[str, str]:
    """What a run reads, by fingerprint: captions and repeats of its images, names and sizes of their files, masks and control images."""
    examples = checked.account.examples
    files = [(e, [p for p in (e.path, e.mask, *(c.path for c in e.controls)) if p]) for e in examples]
    facts = [(e.caption, e.repeats, *((p.name, _bytes(p)) for p in paths), *e.frames) for e, paths in files]
    return {"data": fingerprint(facts)}


def _bytes(path: Path) -> int:
    """How large a file is, or all files of a clip's folder."""
    return sum(file.stat().st_size for file in frames_in(path)) if path.is_dir() else path.stat().st_size


@contextlib.contextmanager
def prepared(config: TrainConfig, family: Family) -> Iterator[None]:
    """The models as they are while training: with gradient checkpointing, and compiled."""
    denoisers = [getattr(family.pipe, part) for part in experts_of(config, family).spans]
    models = [*denoisers, *(getattr(family.pipe, part) for part in _live(config, family))]
    checkpointed = models if config.gradient_checkpointing else []
    for model in checkpointed:
        model.enable_gradient_checkpointing() if hasattr(model, "enable_gradient_checkpointing") else (
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        )
    if config.compile:
        for denoiser in denoisers:
            denoiser.compile()
    streams = [streaming for denoiser in denoisers if (streaming := stream_of(denoiser)) is not None]
    try:
        with remembered(streams) if streams else contextlib.nullcontext():
            yield
    finally:
        for denoiser in denoisers:
            denoiser._compiled_call_impl = None
        for model in checkpointed:
            model.disable_gradient_checkpointing() if hasattr(model, "disable_gradient_checkpointing") else (
                model.gradient_checkpointing_disable()
            )


def opened(config: TrainConfig, dtype: str, device: str) -> Family:
    """The model to train, none of it loaded yet, without progress bars.

    Raises CheckpointError and its kin, or ConfigError for a weight that its losses cannot have.
    """
    placing = Placing(device, config.quantize, config.offload)

    def placed(name: str, model: torch.nn.Module) -> torch.nn.Module:
        if denoises(name):
            return placing(model)
        frozen = name.startswith("text_encoder") and name not in _live(config, family)
        return Placing(device, offload=float(frozen and config.offload > 0))(model)

    parts = open_parts(
        config.model,
        config.base,
        vae=config.vae,
        text_encoders=config.text_encoders(),
        denoiser=trained_alone(config.experts),
        dtype=dtype,
        device="cpu" if config.base_lora else device,
        placed=None if config.base_lora else placed,
    )
    family = open_family(parts, CaptionReading(config.max_length, config.clip_skip or 1))
    family.denoiser = next(iter(experts_of(config, family).spans))  # the first that is trained
    if config.snr_gamma is not None or config.debiased:
        check_weighted(family.levels.kind)
    if config.base_lora:
        _bake(family, config.base_lora, placed)
    family.pipe.set_progress_bar_config(disable=True)
    family.rate = config.fps or family.rate
    return family


def _bake(
    family: Family, adapters: str | Sequence[str], placed: Callable[[str, torch.nn.Module], torch.nn.Module]
) -> None:
    """Put adapters into the weights of a model for this run, on the host, before they are in few bits; then its parts go where they belong."""
    bake(family.parts.whole(), adapters)
    family.parts.pin(*family.denoisers, *family.text_encoders)
    for name, module in family.pipe.components.items():
        if isinstance(module, torch.nn.Module):
            placed(name, module)


def noted(family: Family, watch: Watch) -> Family:
    """The family; where it is none of its own, that is said."""
    if type(family) is Generic:
        kind = type(family.pipe).__name__
        watch.note(f"a {kind} has no family of its own: it is trained as its pipeline asks its denoiser")
    return family


def settled(typed: TrainConfig, checked: Checked, family: Family, dtype: str) -> TrainConfig:
    """The options of a run with what their defaults come to, for this model and this data."""
    config = resolved(typed, checked.name, dtype, family.resolution, family.max_length)
    config = replace(config, save_dtype=config.save_dtype or file_dtype(family))
    return with_measuring(config, checked.account)


def sizing_of(config: TrainConfig, family: Family) -> data.Sizing:
    """How the sizes of training pictures follow from those of images; they must suit the model's latents."""
    sides = config.sides(family.resolution)
    for side in sides:
        if side % family.multiple:
            raise ConfigError(f"resolution is {side}", remedy=f"For this model it is a multiple of {family.multiple}.")
    framing_of(config, Sizes(family.resolution, family.multiple, family.temporal, family.rate))
    return data.Sizing(sides, config.buckets, family.multiple)


def sized(checked: Checked, sizing: data.Sizing, watch: Watch) -> Checked:
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
    return Batches(examples, sizing, config.examples(), config.seed, kind, showing)


def _live(config: TrainConfig, family: Family) -> tuple[str, ...]:
    """The text encoders that are trained."""
    return family.adaptable if config.train_text_encoder else ()


class Encoded(NamedTuple):
    """What a run computes before its steps: what makes its loss, its texts, the pictures that it is measured on, if there are such, and what it draws."""

    loss: Callable[[TrainConfig], Callable[[int, int], Tensor]]
    texts: Texts
    heldout: HeldoutPictures | None
    drawing: Drawing


def _encoded(
    config: TrainConfig,
    family: Family,
    checked: Checked,
    sizing: data.Sizing,
    texts: Texts,
    drawing: Drawing,
    watch: Watch,
) -> Encoded:
    """All that the steps and samples of a run will need is computed, and what computed it is given up."""
    if isinstance(config, SliderConfig):
        return _of_prompts(config, family, checked, sizing, texts, drawing, watch)
    steps, stores = range(config.steps), _stores(config, family)
    watch.phase("encoding the captions")
    instances = batches_of(config, checked.account.examples, sizing, "instance")
    drawn_prompts = [checked.prior.provenance.prompt] if checked.prior else []
    latents, offset = Latents(family, stores("vae")), config.noise_offset or 0.0
    heldout = None
    if checked.account.heldout:
        heldout = HeldoutPictures(checked.account.heldout, sizing, config.seed, latents, offset)
    assembly = Assembly([instances], latents, offset, prior_prompts(config))
    measured = heldout.prompts if heldout else []
    texts.learn(["", *assembly.prompts(steps), *drawn_prompts, *measured, *drawing.read_by(family)])
    drawing.learn(family)
    classes = class_examples(config, family, checked.prior, watch, texts)
    assembly = replace(assembly, kinds=[instances, batches_of(config, classes, sizing, "class")])
    texts.learn(assembly.prompts(steps))
    watch.phase("encoding the images")
    if heldout:
        heldout.learn(watch.tick)
    assembly.learn(steps, watch.tick)
    if config.cache == "disk" and team().main and (n := pruned(_cache_dir(config), config.cache_limit * 2**30)):
        watch.note(f"{n} entries of the cache that were not used for long are gone: it would take more than its limit")
    return Encoded(partial(_loss, family=family, assembly=assembly, texts=texts), texts, heldout, drawing)


def _of_prompts(
    config: SliderConfig,
    family: Family,
    checked: Checked,
    sizing: data.Sizing,
    texts: Texts,
    drawing: Drawing,
    watch: Watch,
) -> Encoded:
    """The same for a run without images."""
    watch.phase("encoding the prompts")
    texts.learn(["", *checked.account.texts.values(), *drawing.read_by(family)])
    drawing.learn(family)
    drawn_on = canvases(family, sizing.resolutions)
    experts, objective = experts_of(config, family), objective_of(config)
    samplings = {name: sampling_of(config, family, span) for name, span in experts.spans.items()}

    def loss(adapted: TrainConfig) -> SliderLoss:
        device = family.parts(next(iter(experts.spans))).device
        return SliderLoss(
            config, family, texts, drawn_on, lambda step: samplings[experts.at(config.seed, step)], objective, device
        )

    return Encoded(loss, texts, None, drawing)


def _cache_dir(config: TrainConfig) -> Path:
    return Path(config.cache_dir) if config.cache_dir else config.output() / "cache"


def _stores(config: TrainConfig, family: Family) -> Callable[[str], Store]:
    """Where what a component computes is kept."""

    def store_of(component: str) -> Store:
        if config.cache != "disk":
            return Memory() if config.cache == "ram" else Nowhere()
        if component == "vae":
            return Disk(_cache_dir(config), lambda: identity_of(family.parts("vae")))
        reading = f"{config.max_length} {config.clip_skip}"
        return Disk(_cache_dir(config), lambda: text_identity(family, component, reading))

    return store_of


class ChosenLayers(TypedDict):
    """Which layers of a component are trained, as `attach` and `select` take it."""

    targets: str | list[str]
    exclude: str | None


def chosen_layers(config: TrainConfig, family: Family) -> dict[str, ChosenLayers]:
    """{component that is trained: which of its layers}. Loads nothing.

    Raises UnknownNameError for names that no layer has, ConfigError for a rank that is above both sides of all of them.
    """
    denoisers = experts_of(config, family).spans
    parts = [*denoisers, *_live(config, family)]
    targets = target_names(config.targets, PRESETS)
    preset = isinstance(targets, str) and targets in PRESETS
    by_part = {part: targets if preset else "attn" for part in parts}  # names are the denoiser's
    by_part |= dict.fromkeys(denoisers, family.presets.get(str(targets), targets))
    chosen = {part: ChosenLayers(targets=by_part[part], exclude=family.unread.get(part)) for part in parts}
    layers = {part: select({part: family.parts.outline(part)}, **chosen[part])[part] for part in parts}
    check_rank(config, [layer for by_name in layers.values() for layer in by_name.values()])
    set_ranks(CONFIGS[config.method](config), config, [name for by_name in layers.values() for name in by_name])
    return chosen


def adapt(config: TrainConfig, family: Family, name: str) -> TrainConfig:
    """Attach an adapter, and freeze the base; the options with what the adapter has of its own.

    A fresh one's initial values follow from the seed; `init_from` brings its values, method, ranks and layers along.
    """
    models = {part: family.parts(part) for part in (*experts_of(config, family).spans, *_live(config, family))}
    for module in family.pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    if config.init_from:
        config = replace(config, **adopt(family.pipe, config.init_from, name, models))
    else:
        _attach(config, family, name, models)
    for slot in slots_of(family.pipe, name).values():
        slot.train()
    return config


def _attach(config: TrainConfig, family: Family, name: str, models: Mapping[str, torch.nn.Module]) -> None:
    """Attach a fresh adapter to these components."""
    chosen, settings = chosen_layers(config, family), CONFIGS[config.method](config)
    layers = [layer for part, model in models.items() for layer in select({part: model}, **chosen[part])[part]]
    set_ranks(settings, config, layers)
    for component, model in models.items():
        generator = draw.generator(config.seed, "init", component)
        attach(model, settings, name, **chosen[component], generator=generator, **ADAPTERS[config.method])


def unread_layers(family: Family, name: str) -> set[str]:
    """The adapted layers of the text encoders that nothing reads: an adapter that a run begins with may have some."""
    places = {layer: layer.partition(".") for layer in slots_of(family.pipe, name)}
    return {
        layer
        for layer, (component, _, inner) in places.items()
        if component in family.unread and patterns.fullmatch(family.unread[component], inner)
    }


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


def _loss(config: TrainConfig, family: Family, assembly: Assembly, texts: Texts) -> Callable[[int, int], Tensor]:
    """The loss [] by step and part. Every draw is a function of seed, step and place in the step.

    A step has batch_size x parts places for instance images and as many for class images; a part has its share of both, so that the parts' losses
    add up to the loss of one batch of that size.
    """
    experts = experts_of(config, family)
    device = family.parts(next(iter(experts.spans))).device
    samplings = {name: sampling_of(config, family, span) for name, span in experts.spans.items()}
    objective, weight = objective_of(config), config.prior_weight or prior.WEIGHT
    base = partial(diffpeft.adapters, family.pipe, without(config.name or "", config.training_adapter))
    span = config.base_span()
    base_range = None if span is None else BaseRange(*span, config.base_weight or BASE_WEIGHT, texts, base)

    def loss_of(batch: Batch, sampling: Sampling) -> Tensor:
        batch = replace(batch.to(device), u=sampling(batch.u, batch.latents.shape))
        losses = denoising(family, batch, texts(batch.prompts, batch.controls), objective, base_range)
        loss = with_prior(losses, batch.is_class, weight)
        if batch.prior_prompts is not None:
            loss = loss + weight * preserved(family, batch, texts, base).mean()
        return loss / config.parts()

    def loss_at(step: int, part: int) -> Tensor:
        expert = experts.at(config.seed, step)
        with asked_alone(family, expert if base_range is None else None):  # the base's own range may be of another
            batches = assembly.at(step, part, config.parts())
            return torch.stack([loss_of(batch, samplings[expert]) for batch in batches]).sum()

    return loss_at


def objective_of(config: TrainConfig) -> Objective:
    """What is minimised."""
    c, schedule = config.huber_c or Objective.huber_c, config.huber_schedule or Objective.huber_schedule
    return Objective(config.loss, c, schedule, config.snr_gamma, config.debiased)


def sampling_of(config: TrainConfig, family: Family, span: tuple[float, float] | None = None) -> Sampling:
    """How levels of noise are drawn, in a part of the range or in all that is trained at."""
    said = {"mean": config.density_mean, "std": config.density_std, "scale": config.density_scale}
    parameters = {name: number for name, number in said.items() if number is not None}
    return Sampling(family.levels, config.density, parameters, config.shift, span or experts_of(config, family).span)
