"""PEFT's functions are for one model: what is none is refused, with the function that is meant."""

from types import SimpleNamespace

import pytest
from torch import nn

import diffpeft
from diffpeft import ConfigError, LoraConfig, PeftModel

CONFIG = LoraConfig(r=1, target_modules=["0"])
CALLS = {
    "get_peft_model": lambda model: diffpeft.get_peft_model(model, CONFIG),
    "inject_adapter_in_model": lambda model: diffpeft.inject_adapter_in_model(CONFIG, model),
    "PeftModel": lambda model: PeftModel(model, CONFIG),
    "PeftModel.from_pretrained": lambda model: PeftModel.from_pretrained(model, "owner/name"),
    "get_peft_model_state_dict": diffpeft.get_peft_model_state_dict,
    "set_peft_model_state_dict": lambda model: diffpeft.set_peft_model_state_dict(model, {}),
    "prepare_model_for_kbit_training": diffpeft.prepare_model_for_kbit_training,
}
PIPE = SimpleNamespace(
    components={"vae": nn.Linear(1, 1), "text_encoder": nn.Linear(1, 1), "unet": nn.Linear(1, 1), "scheduler": None}
)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "model, said",
    [
        (PIPE, r"a pipeline.*diffpeft\.attach\(pipe, config\).*diffpeft\.load_lora\(pipe, source\).*pipe\.unet"),
        ("gpt2", "a str.*Load the model first"),
        (CONFIG, "a LoraConfig.*in the other order"),
        (None, "a NoneType.*torch.nn.Module"),
    ],
)
def test_what_is_no_model_is_refused_with_what_is_meant(call, model, said):
    with pytest.raises(ConfigError, match=rf"^{call} is for a model, and this is {said}") as error:
        CALLS[call](model)
    assert isinstance(error.value, TypeError)


def test_a_model_is_taken():
    assert isinstance(diffpeft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), CONFIG), PeftModel)
