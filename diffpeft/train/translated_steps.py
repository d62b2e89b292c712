"""What other trainers' options say together of steps: optimisers, rates, schedules, losses, levels of noise, memory, and where it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from diffpeft.train.config import Options
from diffpeft.train.optimizers import OPTIMIZERS
from diffpeft.train.other_names import words
from diffpeft.train.translation import Translation


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


PARTS: Sequence[Callable[[Translation], None]] = (
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
