"""Options of other trainers as ours: each through its row of `other_names.TABLE`, and what several of theirs say together through a part here.

Nothing is left out in silence: what changes nothing here is named in a note, and what would change the result and cannot be had is refused, by name.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffpeft.errors import ConfigError, UnknownNameError, listed, shown
from diffpeft.files import Json
from diffpeft.train.config import Options
from diffpeft.train.optimizers import OPTIMIZERS
from diffpeft.train.other_names import TABLE, OtherName, words

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", dict: "a table", str: "a text"}


@dataclass
class Translation:
    """What another trainer's options come to.

    Args:
        where: the file that they stand in; empty for the command line.
        theirs: {option of theirs that goes with others: value}.
        values: {option of ours: value}, and `names` {option of ours: what it was called there}.
        implied: options of ours that follow from what theirs does where nothing is said.
        notes: what people should know, a line each.
        idle: {why an option changes nothing here: the options}.
        refused: {option: why}.
    """

    where: object = ""
    theirs: Json = field(default_factory=dict)
    values: Json = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    implied: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    idle: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def put(self, ours: str, value: object, name: str) -> None:
        """Set an option of ours. Raises ConfigError if another option set it to something else."""
        if ours in self.values and self.values[ours] != value and ours not in self.implied:
            raise ConfigError(
                f"{self.names[ours]} is {shown(self.values[ours])} and {name} is {shown(value)}: both are {ours}",
                where=self.where,
                remedy="Leave one of them out.",
            )
        self.implied.discard(ours)
        self.values[ours], self.names[ours] = value, name

    def imply(self, ours: str, value: object, name: str) -> None:
        """Set an option of ours that nobody set, because theirs does so."""
        if ours not in self.values:
            self.put(ours, value, name)
            self.implied.add(ours)

    def said(self, *names: str) -> list[tuple[str, object]]:
        """Those of these options that were said, with their values."""
        return [(name, self.theirs[name]) for name in names if name in self.theirs]

    def numbers(self, *names: str) -> list[float]:
        """All numbers of these options, which may have several each. Raises ConfigError."""
        return [self.number(name, word) for name, value in self.said(*names) for word in words(value)]

    def number(self, name: str, word: object) -> float:
        """A number that stands among words. Raises ConfigError."""
        try:
            return float(str(word))
        except ValueError:
            raise ConfigError(f"{name} is {shown(word)}", where=self.where, remedy="It is a number.") from None

    def leave(self, why: str, *names: str) -> None:
        """Name options as such that change nothing."""
        if said := [name for name in names if name in self.theirs]:
            self.idle.setdefault(why, []).extend(said)

    def check(self) -> None:
        """Raise ConfigError for all options that are refused, at once."""
        if not self.refused:
            return
        several = len(self.refused) > 1
        raise ConfigError(
            f"{listed(self.refused)} would change the result, and cannot be had here",
            where=self.where,
            remedy=" ".join(f"{name}: {why}" if several else why for name, why in self.refused.items()),
        )

    def remarks(self) -> list[str]:
        """All that people should know, a line each."""
        if not self.idle:
            return self.notes
        kinds = (f"{', '.join(dict.fromkeys(names))} ({why})" for why, names in self.idle.items())
        return [*self.notes, f"without effect here: {'; '.join(kinds)}"]


def key_of(name: str) -> str:
    """An option's name as the table has it."""
    return name.strip("-").replace("-", "_").lower()


def is_alias(name: str, known: Collection[str]) -> bool:
    """Whether this is another trainer's option, and none of ours."""
    return key_of(name) in TABLE and key_of(name) not in known


def translated(pairs: Iterable[tuple[str, object]], known: Collection[str], where: object = "") -> Translation:
    """Options of another trainer, by their names, as ours, of which `known` are the names.

    Raises UnknownNameError for a name that nobody has, ConfigError for values that are none, for two that disagree, and for options that cannot be had.
    """
    to = Translation(where)
    for name, value in pairs:
        _place(to, name, value, known)
    for part in _PARTS:
        part(to)
    to.check()
    for ours in to.values:
        if ours not in known:
            raise UnknownNameError.of("option", to.names[ours], known, where=where)
    return to


def _place(to: Translation, name: str, value: object, known: Collection[str]) -> None:
    """Put one option where its row says."""
    key = key_of(name)
    row = TABLE.get(key)
    if row is None:
        if key not in known:
            raise UnknownNameError.of("option", name, known, where=to.where)
        return to.put(key, value, name)
    if row.reads is bool and key in known and isinstance(value, str) and value.lower() not in (*_TRUE, *_FALSE):
        return to.put(key, value, name)  # a flag there that takes a value here
    value = _read(row, name, value, to.where)
    if value not in (None, "", []) and not any(value == off and type(value) is type(off) for off in _both(row.off)):
        _placed(to, row, name, value)


def _placed(to: Translation, row: OtherName, name: str, value: object) -> None:
    """Put a value that may change something where its row says."""
    key = key_of(name)
    if row.idle:
        if value not in (False, 0):
            to.idle.setdefault(row.idle, []).append(name.lstrip("-"))
    elif row.remedy:
        to.refused[name] = row.remedy
    elif not row.part:
        to.put(row.ours, _turned(row, name, value, to), name)
    elif to.theirs.setdefault(key, value) != value:
        raise ConfigError(f"{name} is {shown(to.theirs[key])} and {shown(value)}", where=to.where)


def _both(off: Iterable[object]) -> Iterable[object]:
    """Whole numbers as such and as floats."""
    for value in off:
        yield value
        if isinstance(value, int) and not isinstance(value, bool):
            yield float(value)


def _read(row: OtherName, name: str, value: object, where: object) -> object:
    """A value as what it is said to be: texts of a command line are read. Raises ConfigError."""
    try:
        if value is None or row.reads is list:
            return None if value is None else list(words(value))
        if row.reads is bool:
            return _boolean(value)
        if row.reads in (int, float):
            number = float(value)  # type: ignore[arg-type]
            if isinstance(value, bool) or (row.reads is int and number != int(number)):
                raise ValueError
            return row.reads(number)
        if row.reads is dict and not isinstance(value, Mapping):
            raise ValueError
        return value if isinstance(value, (list, dict)) else str(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"{name} is {shown(value)}", where=where, remedy=f"It is {_WORDS.get(row.reads, 'a list')}."
        ) from None


def _boolean(value: object) -> bool:
    text = str(value).lower()
    if text not in (*_TRUE, *_FALSE):
        raise ValueError
    return text in _TRUE


def _turned(row: OtherName, name: str, value: object, to: Translation) -> object:
    """A value as it is here. Raises ConfigError for one that there is none for."""
    if row.turn is None:
        return value
    if isinstance(row.turn, Mapping):
        if str(value) not in row.turn:
            raise ConfigError(f"{name} is {shown(value)}", where=to.where, remedy=f"It is {listed(row.turn)}.")
        return row.turn[str(value)]
    try:
        turned = row.turn(value)
    except ValueError as error:
        raise ConfigError(f"{name} is {shown(value)}", where=to.where, remedy=str(error)) from None
    if row.ours == "resolution" and str(turned) not in str(value):
        to.notes.append(f"{name} {value} is {turned} here: the side of the square with that area, in steps of 64")
    return turned


# The parts: each reads what theirs say together


def _files(to: Translation) -> None:
    """The files of text encoders."""
    if files := to.said("clip_l", "clip_g", "t5xxl", "text_encoder_path"):
        to.put("text_encoder", [str(value) for _, value in files], files[0][0])


def _base(to: Translation) -> None:
    """Adapters in the base, and their strengths."""
    strengths = to.numbers("base_weights_multiplier")
    for name, value in to.said("base_weights"):
        files = [str(file) for file in words(value)]
        strengths += [1.0] * (len(files) - len(strengths))
        to.put("base_lora", [f"{file}:{weight:g}" for file, weight in zip(files, strengths, strict=False)], name)


def _data(to: Translation) -> None:
    """Folders, and how often they count."""
    folders = to.said("train_data_dir", "instance_data_dir", "image_dir", "dataset_name", "dataset", "train_file")
    repeats = to.said("dataset_repeats", "repeats", "num_repeats")
    times = f":{repeats[0][1]}" if repeats and repeats[0][1] != 1 else ""
    for name, folder in folders:
        if name == "dataset_name" and not Path(str(folder)).exists():
            to.refused[name] = "Fetch it, and pass its folder to --data."
    if folders:
        to.put("data", [f"{folder}{times}" for _, folder in folders], folders[0][0])
    else:
        to.leave("there is no folder", *(name for name, _ in repeats))


def _crop(to: Translation) -> None:
    for name, value in to.said("random_crop", "center_crop"):
        if value:
            to.put("crop", name.partition("_")[0], name)


def _mask(to: Translation) -> None:
    """The transparency, or a folder."""
    for name, folder in to.said("conditioning_data_dir"):
        if to.theirs.get("masked_loss"):
            to.put("mask", folder, name)
        else:
            to.leave("there is no --masked_loss", name)
    if to.theirs.get("alpha_mask"):
        to.put("mask", "alpha", "alpha_mask")


def _shuffle(to: Translation) -> None:
    for name, number in to.said("keep_tokens"):
        if to.values.get("shuffle_captions"):
            to.put("keep_tokens", number, name)
        else:
            to.leave("captions are not shuffled", name)


def _cache(to: Translation) -> None:
    """Latents and texts are always kept; on the disk if it is said."""
    if any(value for name, value in to.theirs.items() if name.endswith("_to_disk")):
        to.put("cache", "disk", next(name for name, value in to.theirs.items() if name.endswith("_to_disk") and value))


def _prior(to: Translation) -> None:
    """Class images: diffusers' are drawn where the class is called, sd-scripts' are there."""
    for name, folder in to.said("reg_data_dir"):
        _reg(to, name, Path(str(folder)))
    of_diffusers = to.theirs.keys() & {"class_data_dir", "instance_data_dir"}
    if of_diffusers and not to.theirs.get("with_prior_preservation"):
        to.leave("there is no --with_prior_preservation", "class_data_dir")
        for ours in to.values.keys() & {"class_prompt", "num_class_images"}:
            to.idle.setdefault("there is no --with_prior_preservation", []).append(to.names.pop(ours))
            del to.values[ours]
    elif to.theirs.get("with_prior_preservation") and "class_prompt" not in to.values:
        to.refused["with_prior_preservation"] = "Say with --class-prompt what the class is called."
    else:
        for name, folder in to.said("class_data_dir"):
            to.put("class_data", folder, name)
    for name, weight in to.said("prior_loss_weight", "train.reg_weight"):
        if "class_prompt" in to.values:
            to.put("prior_weight", weight, name)
        else:
            to.leave("there are no class images", name)


def _reg(to: Translation, name: str, folder: Path) -> None:
    """sd-scripts' folder of regularisation images: a parent of one that says what they are called."""
    from diffpeft.train.data.layout import REPEATED, images_in  # Pillow comes along, and help needs none

    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    called = {path: match[2] for path in inside if (match := REPEATED.fullmatch(path.name))}
    if len(called) == 1:
        ((folder, prompt),) = called.items()
        to.imply("class_prompt", prompt, name)
    elif len(called) > 1:
        to.refused[name] = f"One class a run: pass the folder of one with --class-data; here are {listed(called)}."
        return
    if "class_prompt" not in to.values:
        to.refused[name] = "Say with --class-prompt what its images show."
    to.put("class_data", str(folder), name)
    if number := len(images_in(folder)) if folder.is_dir() else 0:
        to.put("num_class_images", number, name)


def _preserve(to: Translation) -> None:
    """ai-toolkit's blank prompt preservation is our prior of the base under the blank prompt."""
    for name, on in to.said("train.blank_prompt_preservation"):
        if on:
            to.put("prior", "base", name)
            to.put("prior_prompts", "blank", name)
            for weight_name, weight in to.said("train.blank_prompt_preservation_multiplier"):
                to.put("prior_weight", weight, weight_name)


_ALGORITHMS = {  # LyCORIS's, and those of ai-toolkit
    "lora": "lora",
    "locon": "lora",
    "dora": "dora",
    "loha": "loha",
    "lokr": "lokr",
    "diag-oft": "oft",
    "boft": "boft",
}
_MODULES = {
    "networks.lora",
    "networks.lora_flux",
    "networks.lora_fa",
    "networks.loha",
    "networks.lokr",
    "lycoris.kohya",
}
# {argument of a network: values with which it changes nothing}
_NEUTRAL = {
    "verbose": ("true", "false"),
    "factor": ("-1",),
    "decompose_both": _FALSE,
    "use_tucker": _FALSE,
    "use_cp": _FALSE,
    "use_scalar": _FALSE,
    "rs_lora": _FALSE,
    "bypass_mode": (*_FALSE, "none"),
    "train_norm": _FALSE,
    "rank_dropout": ("0", "0.0", "none"),
    "module_dropout": ("0", "0.0", "none"),
    "full_matrix": _FALSE,
}
_PRESETS = {"attn-mlp": "attn-mlp", "attn-only": "attn", "unet-transformer-only": "attn-mlp", "full": None}


def _network(to: Translation) -> None:
    """The method, its layers and what it is made with."""
    arguments = _arguments(to)
    module = str(to.theirs.get("network_module", ""))
    if module == "networks.lora_fa":
        to.refused["network_module"] = "LoRA-FA freezes A: train a --method lora."
    elif module and module not in _MODULES:
        to.refused["network_module"] = f"It is one of {', '.join(sorted(_MODULES))}; methods are --method."
    _method(to, arguments, module)
    for name in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio"):
        if name in arguments:
            to.put("lora_plus_ratio", to.number(name, arguments.pop(name)), name)
    if dropout := to.number("dropout", arguments.pop("dropout", 0)):
        to.put("dropout", dropout, "network_args")
    _layers(to, arguments, module)
    for name in arguments:
        to.refused[f"network_args {name}"] = "Layers are chosen with --targets, their ranks with --rank-pattern."


def _method(to: Translation, arguments: dict[str, str], module: str) -> None:
    """The method that an algorithm is, with magnitudes or without."""
    algorithm = str(arguments.pop("algo", None) or to.theirs.get("network.type") or module.rpartition(".")[2]).lower()
    method = _ALGORITHMS.get(algorithm, "lora" if module or not algorithm else None)
    dora = to.theirs.get("use_dora") or arguments.pop("dora_wd", "false").lower() in _TRUE
    if method is None or (algorithm not in _ALGORITHMS and "algo=" in str(to.theirs.get("network_args"))):
        to.refused[f"algorithm {algorithm}"] = f"Methods are {', '.join(sorted(set(_ALGORITHMS.values())))}."
    elif dora and method not in ("lora", "dora"):
        to.refused["dora_wd"] = "Magnitudes go with LoRA alone: --method dora."
    elif dora or method != "lora":
        to.put(
            "method", "dora" if dora else method, "network_args" if "network_args" in to.theirs else "network_module"
        )


def _pairs(to: Translation) -> list[tuple[str, str]]:
    """The arguments of a network: name=value, each a word."""
    pairs = [str(word).partition("=") for _, value in to.said("network_args") for word in words(value)]
    return [(name.strip(), value.strip()) for name, _, value in pairs]


def _arguments(to: Translation) -> dict[str, str]:
    """Those of them that may change something."""
    return {name: value for name, value in _pairs(to) if value.lower() not in _NEUTRAL.get(name, ())}


def _layers(to: Translation, arguments: dict[str, str], module: str) -> None:
    """Which layers: sd-scripts' networks have attention and feed-forward layers, and with conv_dim convolutions too, of another rank."""
    preset = arguments.pop("preset", "full")
    if preset not in _PRESETS:
        to.refused[f"preset {preset}"] = "Layers are chosen with --targets."
    conv = to.number("conv_dim", arguments.pop("conv_dim", 0) or to.theirs.get("network.conv") or 0)
    alpha = arguments.pop("conv_alpha", None) or to.theirs.get("network.conv_alpha")
    if conv:
        _convolutions(to, conv, alpha)
    elif module or "network.type" in to.theirs or _PRESETS.get(preset):
        to.imply("targets", _PRESETS.get(preset) or "attn-mlp", "network_module" if module else "network.type")


def _convolutions(to: Translation, rank: float, alpha: object) -> None:
    """All layers, and a pattern for the rank of convolutions if it is another; their scale is that of all."""
    usual = to.values.get("rank") or Options.rank
    scale = (to.values.get("alpha") or usual) / usual
    to.imply("targets", "full", "conv_dim")
    if rank != usual:
        to.imply("rank_pattern", [rf"conv\w*={rank:g}"], "conv_dim")
    if alpha is not None and to.number("conv_alpha", alpha) != rank * scale:
        to.refused["conv_alpha"] = f"Convolutions have the scale of the other layers: conv_alpha {rank * scale:g}."


def _trained(to: Translation) -> None:
    """Whether text encoders are trained: sd-scripts trains them unless it is told not to."""
    rates = to.numbers("text_encoder_lr")
    for name, value in to.said("train_text_encoder", "train.train_text_encoder"):
        to.put("train_text_encoder", value, name)
    if to.theirs.get("network_train_unet_only"):
        to.put("train_text_encoder", False, "network_train_unet_only")
    elif "network_module" in to.theirs:
        cached = any(name.startswith("cache_text_encoder") and value for name, value in to.theirs.items())
        both = not cached and not (rates and not any(rates))
        to.imply("train_text_encoder", both, "network_module")
        if both and "train_text_encoder" in to.implied:
            to.notes.append(
                "the text encoders are trained too, as in sd-scripts, unless --network_train_unet_only or --no-train-text-encoder is said"
            )


def _rates(to: Translation) -> None:
    """The rate of the denoiser, and those of text encoders as factors of it."""
    usual = to.said("learning_rate", "train.lr")
    special = to.said("unet_lr", "train.unet_lr")
    for name, rate in (special or usual)[:1]:
        to.put("lr", rate, name)
    said = to.said("text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2", "train.text_encoder_lr")
    if not to.values.get("train_text_encoder"):
        to.leave("the text encoders are not trained", *(name for name, _ in said))
        return
    rates = to.numbers(*(name for name, _ in said or usual[:1]))
    lr = to.values.get("lr") or OPTIMIZERS.get(to.values.get("optimizer", ""), OPTIMIZERS["adamw"]).lr or Options.LR
    if rates and set(rates) != {lr}:
        factors = [f"{rate / lr:g}" for rate in rates[:2]]
        both = [f"text_encoder={factors[0]}", f"text_encoder_2={factors[-1]}"]
        one = [rf"text_encoder(_2)?\..+={factors[0]}"]
        to.imply("lr_pattern", both if len(set(factors)) > 1 else one, (said or usual)[0][0])


_OPTIMIZERS = {  # by name in small letters; those of ours stay
    **{name: name for name in OPTIMIZERS},
    "prodigyopt": "prodigy",
    "adamwschedulefree": "schedulefree",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "pagedlion8bit": "bitsandbytes.optim.PagedLion8bit",
    "pagedadamw": "bitsandbytes.optim.PagedAdamW",
    "pagedadamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "pagedadamw32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "adam": "torch.optim.Adam",
    "adam8bit": "bitsandbytes.optim.Adam8bit",
}


def _optimizer(to: Translation) -> None:
    """The optimiser; one of 8 bits is AdamW's."""
    for name, value in to.said("optimizer_type", "optimizer", "train.optimizer"):
        text = str(value)
        if (ours := _OPTIMIZERS.get(text.lower(), text if "." in text else None)) is None:
            to.refused[name] = f"Choose one of {', '.join(OPTIMIZERS)}, or a class by its path."
        else:
            to.put("optimizer", ours, name)
    for name, ours in (("use_8bit_adam", "adamw8bit"), ("use_lion_optimizer", "lion")):
        if to.theirs.get(name):
            if to.values.get("optimizer") == "adamw":
                del to.values["optimizer"]
            to.put("optimizer", ours, name)
    if pairs := [*_made_with(to)]:
        to.put("optimizer_args", pairs, "optimizer_args")


def _made_with(to: Translation) -> Iterable[str]:
    """What the optimiser is made with, as name=value."""
    yield from (str(word) for _, value in to.said("optimizer_args") for word in words(value))
    yield from (f"{key}={value}" for _, table in to.said("train.optimizer_params") for key, value in _items(table))
    betas = [to.theirs.get(name, usual) for name, usual in (("adam_beta1", 0.9), ("adam_beta2", 0.999))]
    if betas != [0.9, 0.999]:
        yield f"betas={betas[0]:g},{betas[1]:g}"
    yield from (f"eps={to.theirs[name]:g}" for name, value in to.said("adam_epsilon") if value != 1e-8)
    yield from (f"beta3={value}" for _, value in to.said("prodigy_beta3"))


def _items(table: object) -> Iterable[tuple[str, object]]:
    return table.items() if isinstance(table, Mapping) else ()


def _schedule(to: Translation) -> None:
    """The schedule and its numbers, as far as it reads them: a constant one has no warm-up there."""
    schedule = None
    for name, value in to.said("lr_scheduler", "train.lr_scheduler"):
        schedule = str(value)
        to.put("lr_scheduler", schedule.removesuffix("_with_warmup"), name)
    for name, value in to.said("lr_warmup_steps"):
        if schedule == "constant":
            to.leave("a constant rate has no warm-up", *((name,) if value else ()))
        else:
            share = to.number(name, value)
            steps = to.theirs.get("max_train_steps") or Options.steps
            to.put("warmup", int(share * steps if 0 < share < 1 else share), name)
    for names, ours, of in (
        (("lr_scheduler_num_cycles", "lr_num_cycles"), "lr_cycles", "cosine_with_restarts"),
        (("lr_scheduler_power", "lr_power"), "lr_power", "polynomial"),
    ):
        for name, value in to.said(*names):
            if schedule == of:
                to.put(ours, value, name)
            elif value != 1:
                to.leave(f"the schedule is not {of}", name)
    for name, table in to.said("train.lr_scheduler_params"):
        if table:
            to.refused[name] = "A schedule takes --warmup, --lr-cycles and --lr-power."


def _length(to: Translation) -> None:
    """Steps or epochs. sd-scripts' epochs win over steps, diffusers' steps over epochs."""
    steps, epochs = to.said("max_train_steps", "num_train_steps"), to.said("max_train_epochs", "num_train_epochs")
    if "max_train_epochs" in to.theirs:
        to.leave("epochs are said", *(name for name, _ in steps))
        steps = []
    elif steps:
        to.leave("steps are said", *(name for name, _ in epochs))
        epochs = []
    for name, value in steps:
        to.put("steps", value, name)
    for name, value in epochs:
        to.put("epochs", value, name)


def _average(to: Translation) -> None:
    """The moving average, which is on where its decay is said."""
    for name, table in to.said("train.ema_config"):
        to.theirs |= {key: value for key, value in _items(table) if key in ("use_ema", "ema_decay")}
        if dict(_items(table)).get("use_ema"):
            to.put("ema", to.number(name, to.theirs.get("ema_decay", 0.999)), name)
        return
    decays = to.said("ema_decay")
    if to.theirs.get("use_ema", bool(decays)):
        to.put("ema", decays[0][1] if decays else 0.9999, decays[0][0] if decays else "use_ema")


_LOSSES = {"l2": "l2", "mse": "l2", "huber": "huber", "pseudo_huber": "huber", "smooth_l1": "smooth_l1"}


def _loss(to: Translation) -> None:
    """How far a prediction is off; numbers of a curve that is not chosen change nothing."""
    loss = "l2"
    for name, value in to.said("loss_type", "train.loss_type"):
        loss = _LOSSES.get(str(value), "")
        if not loss:
            to.refused[name] = "Losses are l2, huber and smooth_l1."
        elif loss != "l2":
            to.put("loss", loss, name)
    curve = to.said("huber_c", "huber_schedule")
    if loss == "l2":
        to.leave("the loss is l2", *(name for name, _ in curve))
        return
    for name, value in curve:
        to.put(name, value, name)


# {how levels are drawn there: (our density, our shift; None: the model's)}
_SAMPLINGS: dict[str, tuple[str, float | None]] = {
    "uniform": ("uniform", 1.0),
    "sigmoid": ("logit_normal", 1.0),
    "shift": ("logit_normal", 3.0),
    "flux_shift": ("logit_normal", None),
}
_AI_TOOLKIT = {"sigmoid": ("logit_normal", 1.0), "linear": ("uniform", 1.0), "shift": ("uniform", None)}
_SCHEMES = {"none": "uniform", "uniform": "uniform", "logit_normal": "logit_normal", "mode": "mode"}


def _levels(to: Translation) -> None:
    """How levels of noise are drawn."""
    sampling = str(to.theirs.get("timestep_sampling", "sigma"))
    for name, table in (("timestep_sampling", _SAMPLINGS), ("train.timestep_type", _AI_TOOLKIT)):
        said = to.theirs.get(name)
        if said in table:
            _drawn(to, name, *table[str(said)])
        elif said not in (None, "sigma"):
            to.refused[name] = "Levels are drawn as --density and --shift say."
    scheme = to.said("weighting_scheme")
    for name, value in scheme:
        if sampling != "sigma":
            to.leave("timestep_sampling says it", name)
        elif density := _SCHEMES.get(str(value)):
            to.put("density", density, name)
        else:
            to.refused[name] = "Weights of the loss are --snr-gamma and --debiased."
    _curve(to)


def _drawn(to: Translation, name: str, density: str, shift: float | None) -> None:
    """The density, its width and the shift."""
    to.put("density", density, name)
    if shift is not None:
        shifts = to.said("discrete_flow_shift", "training_shift") if to.theirs[name] == "shift" else []
        to.put("shift", shifts[0][1] if shifts else shift, shifts[0][0] if shifts else name)
    for width_name, width in to.said("sigmoid_scale"):
        if density == "logit_normal" and width != 1:
            to.put("density_std", width, width_name)


def _curve(to: Translation) -> None:
    """The numbers of the density that is chosen. diffusers' mean has the other sign: its levels begin with noise."""
    density = to.values.get("density") if "weighting_scheme" in to.theirs else None
    for name, ours, of, sign in (
        ("logit_mean", "density_mean", "logit_normal", -1),
        ("logit_std", "density_std", "logit_normal", 1),
        ("mode_scale", "density_scale", "mode", 1),
    ):
        for _, value in to.said(name):
            if density == of:
                to.put(ours, sign * to.number(name, value) + 0.0, name)
            else:
                to.leave("the density is another", name)
    sampling = to.theirs.get("timestep_sampling", "sigma")
    for name, value in to.said("discrete_flow_shift", "training_shift"):
        if sampling == "sigma":
            to.put("shift", value, name)
        elif sampling != "shift":
            to.leave(f"timestep_sampling {sampling} has its own", name)


def _hub(to: Translation) -> None:
    """Where files are uploaded to: a repository that is named."""
    wanted = [name for name, on in to.said("push_to_hub", "save.push_to_hub") if on]
    repositories = to.said("huggingface_repo_id", *(("hub_model_id", "save.hf_repo_id") if wanted else ()))
    for name, repository in repositories[:1]:
        to.put("push_to_hub", repository, name)
        if to.theirs.get("huggingface_repo_visibility") == "private" or to.theirs.get("save.hf_private"):
            to.put("hub_private", True, name)
    if wanted and not repositories:
        to.leave("say where to: --push-to-hub me/NAME", *wanted)


# {what ai-toolkit calls a kind of numbers, by how it begins: what is nearest here}
_KINDS_OF_NUMBERS = {
    "qfloat8": "fp8",
    "float8": "fp8",
    "qint8": "int8",
    "int8": "int8",
    "uint8": "int8",
    "uint7": "int8",
    "uint6": "int8",
}


def _bits(to: Translation) -> None:
    """The base in few bits."""
    if not to.said("model.quantize"):
        return to.leave("the base is not quantised", "model.qtype")
    kind = str(to.theirs.get("model.qtype", "qfloat8"))
    few = next((ours for theirs, ours in _KINDS_OF_NUMBERS.items() if kind.startswith(theirs)), "nf4")
    to.put("quantize", few, "model.quantize")


def _host(to: Translation) -> None:
    """Blocks on the host, where nothing is said all of them."""
    if not to.said("model.layer_offloading"):
        return to.leave("nothing is offloaded", "model.layer_offloading_transformer_percent")
    share = to.theirs.get("model.layer_offloading_transformer_percent", 1.0)
    to.put("offload", share, "model.layer_offloading")


_PARTS: Sequence[Callable[[Translation], None]] = (
    _files,
    _base,
    _data,
    _crop,
    _mask,
    _shuffle,
    _cache,
    _prior,
    _preserve,
    _network,
    _trained,
    _optimizer,
    _rates,
    _schedule,
    _length,
    _average,
    _bits,
    _host,
    _loss,
    _levels,
    _hub,
)
