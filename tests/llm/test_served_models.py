"""Adapters that transformers itself puts on its models, with `peft` served from here: the same numbers, names and files as with peft."""

from __future__ import annotations

import json

import pytest

from tests.llm.served import MODES, process, served

pytest.importorskip("peft")

PROGRAM = """
import json, os, sys, tempfile
import torch, peft
from peft import LoHaConfig, LoraConfig
from safetensors.torch import load_file, save_file
from tests.llm.models import model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
told = []
ids = torch.arange(1, 9)[None]

def numbers(net):
    with torch.no_grad():
        return [round(v, 4) for v in net.eval()(ids).logits[0, -1, :6].tolist()]

def filled(net, name, seed):
    '''Other numbers in an adapter, by its file's keys.'''
    state = peft.get_peft_model_state_dict(net, adapter_name=name)
    torch.manual_seed(seed)
    peft.set_peft_model_state_dict(net, {key: 0.2 * torch.randn(state[key].shape) for key in sorted(state)}, name)

def trained(net):
    return sum(p.numel() for p in net.parameters() if p.requires_grad)

for config, fields in ((LoraConfig, {"lora_alpha": 3}), (LoHaConfig, {"alpha": 3})):
    net = model()
    net.add_adapter(config(r=4, target_modules=["q_proj", "v_proj"], **fields))
    filled(net, "default", 1)
    told.append((numbers(net), net.active_adapters(), list(net.peft_config), trained(net)))
    net.add_adapter(config(r=2, target_modules=["q_proj", "down_proj"], **fields), "other")
    filled(net, "other", 2)
    told.append((numbers(net), net.active_adapters(), list(net.peft_config), trained(net)))
    for step in (
        lambda: net.set_adapter(["default", "other"]),
        net.disable_adapters,
        net.enable_adapters,
        lambda: net.set_adapter("default"),
    ):
        step()
        told.append((numbers(net), net.active_adapters(), trained(net)))
    told.append(sorted((key, list(t.shape)) for key, t in net.get_adapter_state_dict("other").items()))
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        written = load_file(f"{folder}/adapter_model.safetensors")
        said = json.load(open(f"{folder}/adapter_config.json"))
        told.append((sorted(os.listdir(folder)), sorted(written), sorted(said["target_modules"]), said["r"], said["peft_type"]))
        fresh = model()
        info = fresh.load_adapter(folder)
        told.append((numbers(fresh), trained(fresh), sorted(info.missing_keys), sorted(info.unexpected_keys)))
        fresh = model()
        fresh.load_adapter(folder, "style", is_trainable=True)
        told.append((numbers(fresh), fresh.active_adapters(), trained(fresh)))
        fresh.load_adapter(adapter_state_dict=written, peft_config=peft.PeftConfig.from_pretrained(folder), adapter_name="again")
        told.append((numbers(fresh), fresh.active_adapters(), list(fresh.peft_config)))
        told.append(numbers(peft.PeftModel.from_pretrained(model(), folder)))
        model().save_pretrained(f"{folder}/base")
        json.dump({**said, "base_model_name_or_path": f"{folder}/base"}, open(f"{folder}/adapter_config.json", "w"))
        told.append(numbers(AutoModelForCausalLM.from_pretrained(folder)))
    net.delete_adapter("default")
    told.append((numbers(net), net.active_adapters(), list(net.peft_config)))
    net.delete_adapter("other")
    told.append((numbers(net), hasattr(net, "peft_config"), trained(net)))

net = model()
net.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1, 2]))
filled(net, "default", 3)
told.append((numbers(net), trained(net)))
net.disable_adapters()
told.append(numbers(net))
with tempfile.TemporaryDirectory() as folder:
    net.save_pretrained(folder)
    told.append(sorted(load_file(f"{folder}/adapter_model.safetensors")))
    fresh = model()
    fresh.load_adapter(folder)
    told.append(numbers(fresh))
print(json.dumps(told))
"""


@pytest.mark.slow  # a process of its own
def test_transformers_own_adapters():
    expected, found = json.loads(process(PROGRAM)), json.loads(served(PROGRAM, MODES[1]))
    assert len(found) == len(expected) > 30
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == theirs or _near(ours, theirs), (step, ours, theirs)


PIPELINE = """
import tempfile, torch, diffpeft
from diffusers import StableDiffusionPipeline
from diffpeft.pipeline.open import EMBEDDED
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

def opened():
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED, local_files_only=True, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def image(pipe, **options):
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np", **options}
    return torch.tensor(pipe("a face", **options).images[0])

def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)

mine, theirs, maker = opened(), opened(), opened()
base = image(mine)
folder = tempfile.mkdtemp()
for seed, name in enumerate("ab"):
    torch.manual_seed(seed)
    for part, targets in (("unet", ["to_q", "to_v"]), ("text_encoder", ["q_proj", "v_proj"])):
        config = diffpeft.LoraConfig(r=2 + seed, lora_alpha=3, init_lora_weights=False)
        diffpeft.attach(getattr(maker, part), config, name=name, targets=targets)
        for p in (p for n, p in getattr(maker, part).named_parameters() if "lora_B" in n):
            p.data *= 0.1
    diffpeft.save_lora(maker, f"{folder}/{name}.safetensors", name=name, format="diffusers")
    diffpeft.unload(maker)
    diffpeft.load_lora(mine, f"{folder}/{name}.safetensors", name=name)
    theirs.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
assert any(isinstance(m, BaseTunerLayer) for m in theirs.unet.modules()) and list(theirs.unet.peft_config) == ["a", "b"]
for weights in ({"a": 1.0}, {"a": 0.7, "b": -0.4}):
    theirs.set_adapters([*weights], [*weights.values()])
    diffpeft.set_adapters(mine, weights)
    drawn = image(mine)
    assert (drawn - base).abs().max() > 0.02
    same(image(theirs), drawn)
    for scale in (0.5, 0.0) if len(weights) == 1 else (0.5,):  # after 0 diffusers gives text encoders 1, whatever they had
        options = {"cross_attention_kwargs": {"scale": scale}}
        same(image(theirs, **options), image(mine, **options))
    same(image(theirs), drawn)
theirs.disable_lora()
same(image(theirs), base)
theirs.enable_lora()
same(image(theirs), drawn)
theirs.fuse_lora(components=["unet", "text_encoder"])
same(image(theirs), drawn)
theirs.unfuse_lora(components=["unet", "text_encoder"])
same(image(theirs), drawn)
theirs.delete_adapters("b")
diffpeft.unload(mine, "b")
theirs.set_adapters("a")
diffpeft.set_adapters(mine, {"a": 1.0})
same(image(theirs), image(mine))
theirs.unload_lora_weights()
assert torch.equal(image(theirs), base) and not hasattr(theirs.unet, "peft_config")
assert not any(isinstance(m, BaseTunerLayer) for m in [*theirs.unet.modules(), *theirs.text_encoder.modules()])
print("done")
"""


@pytest.mark.slow  # a process of its own
def test_diffusers_own_methods_do_what_ours_do():
    """Loading, weights, scales, switching off, fusing and unloading by a pipeline's methods, which ask peft for all of it."""
    assert served(PIPELINE, MODES[1]).split()[-1] == "done"


def _near(ours: object, theirs: object) -> bool:
    """The same but for the last digit of a number."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(_near(a, b) for a, b in zip(ours, theirs, strict=True))
    return ours == theirs or (isinstance(ours, float) and abs(ours - theirs) < 3e-4)
