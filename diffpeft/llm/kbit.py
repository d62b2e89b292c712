"""Training on quantised models (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): prepare one, start a LoRA from its rounding errors, forget that it was one.

The functions have PEFT's names and arguments. What they do is written out in tests/llm/test_kbit.py, against PEFT.
"""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffpeft import io
from diffpeft.bundle import Handle
from diffpeft.errors import ConfigError, MissingKeysError, OutdatedWarning, UnknownNameError, listed, near
from diffpeft.layers.backends import FOUR_BITS, backend_of, backend_of_weight
from diffpeft.layers.carried import base_class, op_of
from diffpeft.layers.slot import Slot
from diffpeft.llm.checkpointing import require_input_grads
from diffpeft.methods.loftq import half_turn, share
from diffpeft.methods.lora import Lora
from diffpeft.model.plan import Plan, planned
from diffpeft.model.target import adapted, check_single

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
HALVES = (torch.float16, torch.bfloat16)
# quantisation methods of transformers whose kernels want their half-precision parameters left as they are
KEEP_HALVES = frozenset({"gptq", "aqlm", "eetq", "hqq", "torchao"})


Model = TypeVar("Model", bound=nn.Module)


def prepare_model_for_kbit_training(
    model: Model,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, object] | None = None,
    auto_clear_cache: bool = True,
) -> Model:
    """Make a model of transformers ready for adapters to be trained on it, before they are attached, and return it.

    All parameters are frozen. Those in half precision that are not quantised (norms, embeddings, head) become fp32, unless the quantisation method
    wants them as they are. On a quantised model gradient checkpointing is enabled, and for its reentrant form the embeddings' output requires
    gradients, as nothing before the first adapter would.

    Args:
        gradient_checkpointing_kwargs: for `model.gradient_checkpointing_enable`, such as {"use_reentrant": False}.
        auto_clear_cache: give the memory of the former half-precision parameters back to the device.
    """
    check_single(model, "prepare_model_for_kbit_training")
    method = getattr(model, "quantization_method", None)
    method = "hqq" if getattr(model, "hqq_quantized", False) else getattr(method, "value", method)
    in_bits = any(getattr(model, f"is_loaded_in_{n}bit", False) for n in (4, 8))
    model.requires_grad_(False)
    if method not in KEEP_HALVES:
        for p in model.parameters():
            backend = backend_of_weight(p)
            if p.dtype in HALVES and not (backend and backend.packed):
                p.data = p.data.float()
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if use_gradient_checkpointing and (in_bits or method in KEEP_HALVES):
        _checkpoint(model, dict(gradient_checkpointing_kwargs or {}))
    return model


def _checkpoint(model: Any, options: dict[str, object]) -> None:
    """Enable gradient checkpointing, with those of the options that the model takes."""
    if options.get("use_reentrant", True):
        require_input_grads(model)
    if "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        return
    if options:
        warnings.warn(
            f"{type(model).__name__} takes no gradient_checkpointing_kwargs, so {listed(options)} are ignored",
            OutdatedWarning,
            stacklevel=3,
        )
    model.gradient_checkpointing_enable()


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Give the LoRAs on 4-bit layers the values nearest to what quantising cost: B A ~ W - Q, from the full weights W in the model's file (LoftQ).

    Args:
        peft_model: a model with 4-bit layers of bitsandbytes that carry a LoRA.
        model_path: model.safetensors or its folder (also in shards); by default where the model was loaded from.
        callback: called with the model and a layer's name after each layer; where it says False, the layer gets its values back.

    Differs from PEFT where alpha / r is not 1: B A is divided by it, so that what the layer adds is the residual.
    Raises ConfigError if there is no such layer, UnknownNameError or a CheckpointError, before anything has changed.
    """
    model: nn.Module = getattr(peft_model, "get_base_model", lambda: peft_model)()
    layers = _loras_on_4_bits(model, adapter_name)
    handles = _weights_of(_checkpoint_of(model, model_path), layers, getattr(model, "base_model_prefix", ""))
    for name, (module, slot) in layers.items():
        (W,) = io.load([handles[name]])
        new = _made_good(module, slot, W)
        old = {role: slot.get_parameter(role).clone() for role in new}
        _fill(slot, new)
        if callback is not None and not callback(peft_model, name):
            _fill(slot, old)


def _loras_on_4_bits(model: nn.Module, adapter: str) -> dict[str, tuple[nn.Module, Slot]]:
    """{layer: (4-bit layer, the LoRA on it)}."""
    known: set[str] = set()
    layers = {}
    for name, module, record in adapted(model):
        if backend_of(module) is not FOUR_BITS:
            continue
        known |= {*record.slots}
        slot = record.slots.get(adapter)
        # with a frozen term beside it (PiSSA) what B A adds is not B A
        if slot is not None and [p.method for p in slot.parts] == [Lora] and not dict(slot.named_buffers()):
            layers[name] = module, slot
    if known and adapter not in known:
        raise UnknownNameError.of("adapter", adapter, known)
    if not layers:
        raise ConfigError(
            "No bnb LoRA module found on the model",
            remedy="LoftQ by this function is for LoRAs on 4-bit layers of bitsandbytes.",
        )
    return layers


def _made_good(module: nn.Module, slot: Slot, W: Tensor) -> dict[str, Tensor]:
    """{role: tensor} of a LoRA that adds the best approximation of its rank to W - Q, W [o, i]. Computed in fp32 on the layer's device."""
    Q = op_of(module).weight().float()
    A, B = share(*half_turn(W.to(Q) - Q, slot.rank), slot.scale)
    return {"lora_A": A, "lora_B": B}


def _fill(slot: Slot, tensors: Mapping[str, Tensor]) -> None:
    for role, tensor in tensors.items():
        slot.get_parameter(role).copy_(tensor)


def _checkpoint_of(model: nn.Module, path: str | os.PathLike[str] | None) -> dict[str, Handle]:
    """The tensors of the model's safetensors file, or of all its shards."""
    path = Path(_downloaded(model) if path is None else path)
    file = path if path.name.endswith(FILE) else path / FILE
    index = file.parent / INDEX
    if file.is_file():
        return io.header(file)[0]
    if not index.is_file():
        raise FileNotFoundError(
            f"Could not find {file} or {index.name} beside it. model_path is the file or its folder."
        )
    shards = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    return {key: handle for shard in shards for key, handle in io.header(file.parent / shard)[0].items()}


def _downloaded(model: nn.Module) -> str:
    """Where the model was loaded from: a folder, or that of a repository that has been downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name and os.path.isdir(name):
        return name
    try:
        return snapshot_download(name, local_files_only=True)  # type: ignore[arg-type]
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            "The model.safetensors file must be present on disk, but it could not be found", remedy="Pass model_path."
        ) from error
    except (AttributeError, TypeError, HFValidationError) as error:
        raise ConfigError(
            "The provided model does not appear to be a transformers model or is a local model",
            remedy="Pass model_path, the safetensors file or its folder.",
        ) from error


def _weights_of(handles: Mapping[str, Handle], layers: Iterable[str], prefix: str) -> dict[str, Handle]:
    """{layer: its full weight}. A file of the headless model has names without the prefix."""
    keys = {
        layer: next(
            (k for k in (f"{layer}.weight", f"{layer}.weight".removeprefix(f"{prefix}.")) if k in handles), None
        )
        for layer in layers
    }
    missing = [f"{layer}.weight" for layer, key in keys.items() if key is None]
    if missing:
        raise MissingKeysError(
            f"the file has no {listed(missing)}", remedy=near(missing[0], handles) or "It is another model's file."
        )
    return {layer: handles[key] for layer, key in keys.items() if key is not None}


def forget_quantization(model: nn.Module) -> None:
    """`plan_forgotten` of a model whose quantised layers have been replaced."""
    with planned({"": model}) as plan:
        plan_forgotten(plan, model)


def plan_forgotten(plan: Plan, model: nn.Module) -> None:
    """Where a plan replaces quantised layers by plain ones: let a model of transformers say so, so that `save_pretrained` writes what can be loaded.

    With no quantised layer left it is an ordinary model. Else its quantisation config gets the plain layers' names, which loading then leaves alone.
    """
    config = getattr(model, "config", None)
    after = [(name, plan.standing(module)) for name, module in model.named_modules()]
    backend = next((backend for _, module in after if (backend := backend_of(module)) is not None), None)
    if backend is not None:
        plain = [name for name, module in after if base_class(module) is nn.Linear and backend_of(module) is None]
        written = getattr(config, "quantization_config", None)
        if written is not None and not isinstance(written, dict):
            skipped = getattr(written, backend.skipped, None) or []
            plan.set(written, **{backend.skipped: list(dict.fromkeys([*skipped, *plain]))})
        return
    for owner, names in ((model, MARKS), (config, ("quantization_config", "_pre_quantization_dtype"))):
        for name in names:
            if name in getattr(owner, "__dict__", {}):
                plan.entry(owner.__dict__, name)


MARKS = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "is_4bit_serializable",
    "is_8bit_serializable",
)
