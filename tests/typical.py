"""What people type, as type checkers read it: `mypy` finds nothing in it but the mistakes that are marked. Nobody runs it."""

from pathlib import Path
from typing import Any, assert_type

import torch

import diffpeft
from diffpeft import (
    AdapterStatus,
    Bundle,
    LoadReport,
    LoraConfig,
    PeftModel,
    TaskType,
    TrainConfig,
    converters,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from diffpeft.readable import Residuals


def draws(pipe: Any) -> None:
    report = diffpeft.load_lora(pipe, "style.safetensors", adapter_name="style", weight=0.8)
    assert_type(report, LoadReport)
    assert_type(report.trigger_words, tuple[str, ...])
    diffpeft.load_lora(pipe, "owner/name", weight_name="a.safetensors", subfolder="x", token=True, active=False)
    diffpeft.load_lora(pipe, Path("a"), cache_dir=Path("b"), revision=None)
    diffpeft.load_lora(pipe, {"a": torch.ones(1)}, name="b")
    diffpeft.load_lora(pipe, "a", wieght=0.8)  # type: ignore[call-arg]
    diffpeft.load_lora(pipe, "a", weight="0.8")  # type: ignore[arg-type]

    diffpeft.set_adapters(pipe, {"style": 0.8, "person": {"unet": 0.5, "text_encoder": 0}})
    mixes = [{"a": 1.0}, {"b": {"unet": 0.5}}]
    diffpeft.set_adapters(pipe, mixes, images_per_prompt=2)
    mix = {"a": 1.0, "b": {"unet": 0.5}}
    diffpeft.set_adapters(pipe, mix)
    numbers = {"a": 1, "b": 2}
    diffpeft.set_adapters(pipe, numbers)
    blocks = {"a": {"unet.up_blocks": 1.0, "text_encoder": diffpeft.schedule.linear(1.0, 0.2)}}
    diffpeft.set_adapters(pipe, blocks)
    planned = {"a": 0.5, "b": diffpeft.schedule.steps({0.0: 1.0, 0.5: 0.3})}
    with diffpeft.adapters(pipe, planned):
        pass
    with diffpeft.adapters(pipe, mixes):
        pass
    texts = {"a": "0.8"}
    diffpeft.set_adapters(pipe, texts)  # type: ignore[arg-type]
    diffpeft.set_adapters(pipe, {"a": "0.8"})  # type: ignore[dict-item]
    diffpeft.set_adapters(pipe, 0.8)  # type: ignore[call-overload]

    assert_type(diffpeft.get_adapters(pipe), dict[str, AdapterStatus])
    assert_type(diffpeft.replace(pipe, "style", "b", weight_name="c"), LoadReport)
    diffpeft.replace(pipe, "style", "b", weightname="c")  # type: ignore[call-arg]
    assert_type(diffpeft.to_lora(pipe, "a", rank=4), Residuals)
    residuals: dict[str, float] = diffpeft.combine(pipe, {"a": 0.7, "b": -0.3}, name="c")
    del residuals
    diffpeft.fuse(pipe, ["style"])
    diffpeft.unload(pipe)


def trains(unet: torch.nn.Module) -> None:
    report = diffpeft.attach(unet, LoraConfig(r=8, target_modules=["to_q"]), name="a")
    assert_type(report.layers, tuple[str, ...])
    run = diffpeft.train(TrainConfig(model="base", data="photos", out="out", steps=10))
    assert_type(run.files, list[Path])
    assert_type(run.report, Path | None)
    TrainConfig(step=10)  # type: ignore[call-arg]


class Net(torch.nn.Module):
    size = 3


def tunes(net: Net) -> None:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8)
    model = get_peft_model(net, config)
    assert_type(model, PeftModel)
    assert_type(PeftModel.from_pretrained(net, "a"), PeftModel)
    assert_type(prepare_model_for_kbit_training(net), Net)
    assert_type(inject_adapter_in_model(config, net), Net)
    model.save_pretrained("out")
    get_peft_model(net)  # type: ignore[call-arg]


def converts() -> None:
    assert_type(converters.read("a"), Bundle)
    assert_type(converters.detect("a", weight_name="b").family, str)
    assert_type(converters.convert("a", "b", to="kohya").warnings, tuple[str, ...])
    converters.inspect("a", norm=True)  # type: ignore[call-arg]
