"""Everything that can be said of a run before a large library is loaded: its options, its data, and what its model's configs tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from diffpeft import io
from diffpeft.drawing.prompts import SamplePrompt, check_sizes
from diffpeft.errors import ConfigError, DiffpeftError, UnknownNameError, WrongBaseError, inside, shown
from diffpeft.families import FAMILIES, is_of, trainable
from diffpeft.families.base import Sizes
from diffpeft.pipeline import few_bits, guardrail
from diffpeft.pipeline.open import Facts, check_model, denoises, facts
from diffpeft.train import data, prior
from diffpeft.train.checkpoints import SavedState
from diffpeft.train.config import TrainConfig
from diffpeft.train.data import Account, pairing
from diffpeft.train.data.clips import cut
from diffpeft.train.data.framing import Framing
from diffpeft.train.data.split import beside, part_of, split
from diffpeft.train.data.tokens import tokenizers_of, too_long
from diffpeft.train.formats import HALVES, asked, files_of
from diffpeft.train.method import ADAPTERS
from diffpeft.train.prior_prompts import prior_prompts
from diffpeft.train.publish import check_hub
from diffpeft.train.resume import begin
from diffpeft.train.sample_prompts import (
    check_controls,
    prompts_of,
    typed_prompts,
    with_controls,
)
from diffpeft.train.slider_config import SliderConfig, refused_with_controls
from diffpeft.train.trackers import logs_of

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Checkpoint(NamedTuple):
    """What a checkpoint is of: the model's name, and the ids of the families that it may be."""

    name: str
    families: tuple[str, ...]


# {a layer of an original checkpoint: what the file is}; the first that is there tells
_CHECKPOINTS = {
    "distilled_guidance_layer.": Checkpoint("Chroma", ("chroma",)),
    "double_blocks.": Checkpoint("Flux", ("flux", "flux2")),
    "joint_blocks.": Checkpoint("Stable Diffusion 3", ("sd3",)),
    "conditioner.embedders.": Checkpoint("Stable Diffusion XL", ("sdxl",)),
    "cond_stage_model.": Checkpoint("Stable Diffusion 1 or 2", ("sd15", "sd2")),
}
# {the layer of it that reads the latents: the component}; its second axis has the channels
_FIRST_LAYERS = {
    "model.diffusion_model.input_blocks.0.0.weight": "unet",
    "model.diffusion_model.img_in.weight": "transformer",
    "img_in.weight": "transformer",
}


@dataclass(frozen=True)
class Checked:
    """A run that may begin: the adapter's name, the account of its images, its class images, if it has any, and the state that it goes on from.

    `config` are its options, with the steps that its epochs come to; `origins` says where those that were said are from.
    """

    name: str
    account: Account
    prior: prior.ClassImages | None
    state: SavedState | None
    config: TrainConfig
    origins: Mapping[str, str] = field(default_factory=dict)
    prompts: tuple[SamplePrompt, ...] = ()  # that are drawn meanwhile


def check(config: TrainConfig, origins: Mapping[str, str] | None = None) -> Checked:
    """All checks that need no model. `origins`: where options are from. Raises ConfigError, UnknownNameError, DataError or CheckpointError."""
    config.validate()
    logs_of(config)
    if config.method not in ADAPTERS:
        raise UnknownNameError.of("method", config.method, ADAPTERS)
    out = config.output()
    name = _name(config)
    asked(config)
    check_hub(config)
    files = files_of(name)
    if not config.resume:  # told before the data is read
        begin(config, out, files)
    check_model(config.model, config.base, config.vae, config.text_encoders())
    known = sizes_of(config)
    prior_prompts(config)
    _check_prior(config)
    _check_slider(config)
    check_sizes(typed_prompts(config), known.multiple)
    _check_sample_model(config)
    _check_experts(config)
    _check_held(config)
    account = surveyed(config, known)
    config = with_steps(config, account)
    state, planned = begin(config, out, files) if config.resume else None, prior.planned(config)
    account = replace(_with_cut(account, config), steps=(config.steps, config.examples()))
    prompts = prompts_of(config, [example.caption for example in account.examples])
    prompts = with_controls(prompts, (*account.heldout, *account.examples))
    if (wanted := wanted_controls(config)) is not None:
        check_controls(prompts, wanted.fewest, wanted.most)
    if prompts:
        _check_guardrail(config)
    return Checked(name, account, planned, state, config, origins or {}, tuple(prompts))


def _check_guardrail(config: TrainConfig) -> None:
    """Raise ConfigError for a model that draws nothing without a package which is not installed."""
    drawing = config.sample_model or config.base or config.model
    pipeline = facts(drawing).pipeline
    if pipeline is not None and guardrail.is_lacking(pipeline):
        raise guardrail.refused(pipeline, str(drawing))


def with_steps(config: TrainConfig, account: Account) -> TrainConfig:
    """The options with the steps that their epochs come to, as sd-scripts counts them: steps for all pictures, rounded up, for each epoch."""
    if config.epochs is None:
        return config
    steps = -(-account.pictures // config.examples()) * config.epochs
    config = replace(config, steps=steps, epochs=None)
    config.check_values()
    return config


def _with_cut(account: Account, config: TrainConfig) -> Account:
    """The account with the captions that the model's tokenizers would cut, where these can be had."""
    source = source_of(config)
    tokenizers = tokenizers_of(source)
    if not tokenizers:
        return account
    most = config.max_length or _usual_tokens(source)
    cut, most = too_long([*account.texts.values()], tokenizers, most)
    names = tuple(name for name, is_cut in zip(account.texts, cut, strict=True) if is_cut)
    return replace(account, cut=names, tokens=most)


def _usual_tokens(source: str) -> int | None:
    """How many tokens of captions a model's family reads, where its tokenizers would read more; None where they say it."""
    known = facts(source)
    family = trainable(known.pipeline, known.configs, source) if known.pipeline else None
    usual = getattr(FAMILIES[family], "tokens", None) if family else None
    return usual or None


def account_of(config: TrainConfig, steps: bool) -> Account:
    """The account of data alone: of a config that may lack a model and an output. `steps`: whether its steps were asked for.

    Raises ConfigError, DataError or CheckpointError.
    """
    config.check_values()
    known = Sizes(None, None)
    if config.model:
        check_model(config.model, config.base, config.vae, config.text_encoders())
        known = sizes_of(config)
    account = surveyed(config, known)
    account = _with_cut(account, config) if config.model else account
    config = with_steps(config, account)
    return replace(account, steps=(config.steps, config.examples()) if steps else None)


def surveyed(config: TrainConfig, known: Sizes) -> Account:
    """The account of a run's data. `known` is what configs tell of the model's sizes. Raises DataError or ConfigError."""
    sides = config.sides(known.resolution)
    sizing = data.Sizing(sides, config.buckets, known.multiple or 1) if sides else None
    if isinstance(config, SliderConfig):
        return config.account(sizing)
    _refuse_own_output(config)
    framing = framing_of(config, known)
    part = part_of(config.heldout) if config.heldout is not None else None
    others = [str(part)] if isinstance(part, Path) else []
    account = data.survey(
        config.data or (),
        config.instance_prompt,
        sizing,
        trigger=config.trigger,
        mask=config.mask,
        control=config.control,
        skip=[Path(folder) for folder in (config.out, config.class_data, config.cache_dir, *others) if folder],
        clips=framing is not None,
    )
    account = account if part is None else _with_heldout(account, part, config)
    if (wanted := wanted_controls(config)) is not None:
        pairing.check(account, wanted)
    return account if framing is None else cut(account, framing)


def wanted_controls(config: TrainConfig) -> pairing.Wanted | None:
    """The control images that the model reads, where its configs tell its family."""
    source = source_of(config)
    known = facts(source) if config.model else None
    if known is None or not known.pipeline:
        return None
    family = FAMILIES[trainable(known.pipeline, known.configs, source)]
    return pairing.Wanted(*family.controls, family.aligned)


def framing_of(config: TrainConfig, known: Sizes) -> Framing | None:
    """How clips are cut out of footage; None for images. `known` is what configs tell of the model. Raises ConfigError for a model of images."""
    counts = config.counts()
    if not counts:
        return None
    if known.multiple and known.temporal is None:
        raise ConfigError(
            f"frames is {','.join(map(str, counts))}, and this model is one of images", remedy="Leave --frames out."
        )
    return Framing(counts, config.fps or known.rate, config.extract or "head", known.temporal or 1)


def _refuse_own_output(config: TrainConfig) -> None:
    """Raise ConfigError if the images are to be read from the folder that the run writes into."""
    out = Path(config.out).resolve() if config.out else None
    if out and any(source.path.resolve() == out for source in data.sources_of(config.data or ())):
        raise ConfigError(
            "the output folder is the folder of the images",
            where=out,
            remedy="Pass another --out, which may be inside: pictures that a run writes are not for the next to train on.",
        )


def _with_heldout(account: Account, part: float | int | Path, config: TrainConfig) -> Account:
    """The account with images that are held out. Raises DataError or ConfigError."""
    if not isinstance(part, Path):
        return split(account, part, config.seed)
    control = [str(folder) for folder in pairing.folders_of(None, data.sources_of([part]))] or config.control
    others = data.survey(
        [part],
        config.instance_prompt,
        trigger=config.trigger,
        mask=config.mask,
        control=control,
        strict=False,
        clips=bool(config.counts()),
    )
    entered = {name: n for name, n in account.folders.items() if Path(account.folder, name).resolve() != part.resolve()}
    return beside(replace(account, folders=entered), others)


def _name(config: TrainConfig) -> str:
    """The adapter's name, which begins the names of its files."""
    if config.name is None:
        return config.name_by_output()
    if not _NAME.fullmatch(config.name) or not config.name.strip("."):
        raise ConfigError(
            f"name is {shown(config.name)}", remedy="It is 1 to 128 letters, digits, dots, underscores and hyphens."
        )
    return config.name


def sizes_of(config: TrainConfig) -> Sizes:
    """What the configs tell of the sizes of the model's images. Raises WrongBaseError if it cannot be trained."""
    path, source = Path(str(config.model)), source_of(config)
    known = facts(source)
    family = trainable(known.pipeline, known.configs, source) if known.pipeline else None
    if path.is_file():
        _check_checkpoint(path, family, known)
    return FAMILIES[family].sizes(known.configs) if family else Sizes(None, None)


def source_of(config: TrainConfig) -> str:
    """The folder or the Hub id that has the configs of a run's model."""
    return str((config.base if Path(str(config.model)).is_file() else config.model) or "")


def _check_experts(config: TrainConfig) -> None:
    """Raise ConfigError for experts of a model whose files have one denoiser."""
    known = facts(source_of(config)) if config.experts is not None else Facts()
    if known.pipeline and not HALVES.keys() <= {*known.denoisers}:
        raise config.without_experts()


def held_by(config: TrainConfig) -> str:
    """The library that holds a model's denoiser in few bits, as the files of its folder say; empty where none does."""
    known = Facts() if Path(str(config.model)).is_file() else facts(source_of(config))
    said = (configs.get("quantization_config") for part, configs in known.configs.items() if denoises(part))
    return next((str(kind.get("quant_method", "another library")) for kind in said if isinstance(kind, dict)), "")


def _check_held(config: TrainConfig) -> None:
    """Raise ConfigError for a denoiser that is in few bits in its files, and shall be held otherwise."""
    file = Path(str(config.model))
    if config.quantize and file.is_file() and few_bits.in_few_bits(file):
        raise ConfigError(
            f"quantize is {config.quantize}, and this file holds its denoiser in few bits, which stay so",
            where=file,
            remedy="Leave --quantize out, or pass the file of the model as it was published.",
        )
    otherwise = [name for name in ("quantize", "offload") if getattr(config, name)]
    if otherwise and (kind := held_by(config)):
        raise ConfigError(
            f"{otherwise[0]} is {getattr(config, otherwise[0])}, and this model's files hold its denoiser in few bits ({kind}), "
            "which stay so, and on the device",
            where=config.model or "",
            remedy=f"Leave --{otherwise[0]} out, or take the model as it was published, with --quantize.",
        )


def _check_prior(config: TrainConfig) -> None:
    """Raise ConfigError for class images of a model that draws nothing without a control image."""
    wanted = wanted_controls(config)
    if wanted and wanted.fewest and config.class_prompt is not None and config.prior != "base":
        raise ConfigError(
            "class images with a model that draws nothing without a control image",
            remedy="Pass --prior base: the model is asked for the training images, with their control images.",
        )


def _check_slider(config: TrainConfig) -> None:
    """Raise WrongBaseError for a slider of a model that draws nothing from prompts alone."""
    if isinstance(config, SliderConfig) and (wanted := wanted_controls(config)) is not None and wanted.fewest:
        raise refused_with_controls(source_of(config))


def _check_sample_model(config: TrainConfig) -> None:
    """Raise CheckpointError if the model that samples are drawn with is none, WrongBaseError if it is of another family than the one that is trained."""
    if config.sample_model is None:
        return
    single, mine = Path(config.sample_model).is_file(), facts(config.base or str(config.model))
    with inside("--sample-model", config=True):
        check_model(config.sample_model, config.base or config.model if single else None)
        theirs = mine if single else facts(config.sample_model)
        if mine.pipeline and theirs.pipeline:
            family = trainable(mine.pipeline, mine.configs, str(config.model))
            if (other := trainable(theirs.pipeline, theirs.configs, config.sample_model)) != family:
                raise WrongBaseError(
                    f"the sample model is of the family {other}, and the model that is trained of {family}",
                    where=config.sample_model,
                    remedy="Pass a checkpoint of the same family.",
                )


def _check_checkpoint(path: Path, family: str | None, base: Facts) -> None:
    """Raise WrongBaseError if the names and shapes in a single file are those of another model than its base's, or of one that cannot be trained."""
    try:
        handles, _ = io.header(path)
    except DiffpeftError:  # loading it will say what is wrong
        return
    kind = next((kind for part, kind in _CHECKPOINTS.items() if any(part in key for key in handles)), None)
    if kind:
        _refuse_other(kind, family, base, path)
    for layer, component in _FIRST_LAYERS.items():
        if base.pipeline and layer in handles and len(handles[layer].shape) > 1:
            read = {**base.configs.get(component, {}), "in_channels": handles[layer].shape[1]}
            trainable(base.pipeline, {**base.configs, component: read}, path)


def _refuse_other(kind: Checkpoint, family: str | None, base: Facts, path: Path) -> None:
    """Raise WrongBaseError if a checkpoint is of a model that cannot be trained, or of another than its base's family, where that is known."""
    if FAMILIES.keys().isdisjoint(kind.families):
        raise WrongBaseError(
            f"this is a checkpoint of {kind.name}, which cannot be trained",
            where=path,
            remedy=f"The families that can are {', '.join(FAMILIES)}.",
        )
    if family and not is_of(family, kind.families):
        raise WrongBaseError(
            f"this is a checkpoint of {kind.name}, and its base is a {base.pipeline}",
            where=path,
            remedy=f"Pass with --base a folder or a Hub id of {kind.name}.",
        )


def resized(checked: Checked, sizing: data.Sizing) -> Checked:
    """The same with other sizes of training pictures."""
    return replace(checked, account=replace(checked.account, sizing=sizing))
