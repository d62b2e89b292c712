"""What other trainers' options say together of the adapter: their networks, algorithms and layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diffpeft.train.config import Options
from diffpeft.train.other_names import words
from diffpeft.train.translation import FALSE, TRUE, Translation

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
    "decompose_both": FALSE,
    "use_tucker": FALSE,
    "use_cp": FALSE,
    "use_scalar": FALSE,
    "rs_lora": FALSE,
    "bypass_mode": (*FALSE, "none"),
    "train_norm": FALSE,
    "rank_dropout": ("0", "0.0", "none"),
    "module_dropout": ("0", "0.0", "none"),
    "full_matrix": FALSE,
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
    dora = to.theirs.get("use_dora") or arguments.pop("dora_wd", "false").lower() in TRUE
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


PARTS: Sequence[Callable[[Translation], None]] = (
    _network,
    _trained,
)
