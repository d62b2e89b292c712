"""Threads that share a pipeline's models, each with a scheduler and a mix of its own."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch

from diffpeft import LoraConfig, adapters, attach, get_adapters, load_lora, schedule, unload
from tests.contracts.kinds import give, layer

PLAIN = [{"a": 1.0}, {"b": -0.7}]
CHANGING = [{"a": schedule.linear(1.0, -0.5)}, {"b": schedule.steps({0.0: 0.3, 0.5: 1.0}), "a": 0.2}]
ROWS = [[{"a": 1.0}, {"b": 0.5}], [{"b": 0.9}, {"a": schedule.linear(0.0, 1.0)}]]


def twin(pipe):
    """A pipeline on the same models, with a scheduler and a tokenizer of its own: both have state that each call changes."""
    own = {name: copy.deepcopy(getattr(pipe, name)) for name in ("scheduler", "tokenizer")}
    other = type(pipe)(**{**pipe.components, **own}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def images(pipe, mix):
    prompts = ["cat", "dog"] if isinstance(mix, list) else ["cat"]
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    with adapters(pipe, mix):
        return pipe(prompts, generator=generators, num_inference_steps=3, output_type="latent").images


@pytest.mark.parametrize("mixes", [PLAIN, CHANGING, ROWS, [PLAIN[0], CHANGING[1]]])
def test_no_mixed_image_while_a_third_loads_and_unloads(mixes, pipe, adapter, randomize, trace):
    file = adapter()
    for name in ("a", "b"):
        attach(pipe, LoraConfig(r=2), name, targets=["conv_in", "attn1.to_q", "q_proj"])
        randomize(pipe, name)
    before = trace(pipe.unet, pipe.text_encoder)
    wants = [images(pipe, mix) for mix in mixes]
    done, wrong, loads = threading.Event(), [], []

    def generate(own, mix, want):
        try:
            for _ in range(4):
                if not torch.equal(images(own, mix), want):
                    wrong.append(f"a mixed image of {mix}")
        except BaseException as error:
            wrong.append(error)

    def change():
        try:
            while not done.is_set():
                load_lora(pipe, file, name="c")
                unload(pipe, "c")
                loads.append(1)
        except BaseException as error:
            wrong.append(error)

    changer = threading.Thread(target=change)
    threads = [
        threading.Thread(target=generate, args=(twin(pipe), mix, want)) for mix, want in zip(mixes, wants, strict=True)
    ]
    changer.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    changer.join()
    assert not wrong and len(loads) > 1 and list(get_adapters(pipe)) == ["a", "b"]
    assert [t[:2] for t in trace(pipe.unet, pipe.text_encoder)] == [t[:2] for t in before]


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_a_layer_is_used_while_its_last_adapter_comes_and_goes(form):
    """Threads that change places as often as they can."""
    model, x = layer("linear")
    plain, done, wrong, interval = model(x), threading.Event(), [], sys.getswitchinterval()

    def use():
        try:
            while not done.is_set():
                if not torch.equal(model(x), plain):  # a fresh adapter changes nothing
                    wrong.append("another output")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=use) for _ in range(2)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for s in (1.0, schedule.constant(0.0)) * 40:
            give(model, form, "c")
            with adapters(model, {"c": s}):
                pass
            unload(model)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not wrong
