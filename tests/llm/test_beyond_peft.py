"""What PEFT refuses and works here: each adapter acts as if it were alone, and its folder is PEFT's."""

from __future__ import annotations

from contextlib import nullcontext

import peft
import pytest
import torch
from torch import nn

import diffpeft

pytestmark = pytest.mark.filterwarnings("ignore")
SAME = dict(rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.down(self.up(self.lin(x)).tanh())


X = torch.linspace(-1, 1, 18).reshape(3, 6)
LORA = dict(r=2, init_lora_weights=False)
PAIRS = {  # a pair of adapters that PEFT does not have side by side
    "biases": ("LoraConfig", dict(LORA, target_modules=["up"], bias="all"), dict(LORA, target_modules=["up"], bias="lora_only")),
    "all biases, and a LoRA without": (
        "LoraConfig",
        dict(LORA, target_modules=["lin"], bias="all"),
        dict(LORA, target_modules=["up", "down"]),
    ),
    "biases of BOFT": (
        "BOFTConfig",
        *(dict(boft_block_size=3, target_modules=["lin"], init_weights=False, bias=b) for b in ("all", "boft_only")),
    ),
    "parameters": (
        "LoraConfig",
        *(dict(LORA, target_modules=[], target_parameters=[name]) for name in ("up.weight", "lin.weight")),
    ),
    "VeRA of other seeds": (
        "VeraConfig",
        *(dict(r=4, target_modules=["lin"], init_weights=False, projection_prng_key=key) for key in (1, 2)),
    ),
    "VeRA of a larger rank": ("VeraConfig", *(dict(r=r, target_modules=["lin"], init_weights=False) for r in (2, 5))),
    "VeRA of larger layers": (
        "VeraConfig",
        *(dict(r=2, target_modules=[name], init_weights=False) for name in ("lin", "down")),
    ),
    "VeRA, one saved alone": (
        "VeraConfig",
        *(dict(r=2, target_modules=["lin"], init_weights=False, save_projection=saved) for saved in (True, False)),
    ),
}  # fmt: skip


def trained(model, seed):
    """Other numbers in what is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model.eval()


@pytest.mark.parametrize("pair", PAIRS)
def test_adapters_that_peft_keeps_apart_act_as_if_each_were_alone(pair, tmp_path):
    name, *fields = PAIRS[pair]
    theirs = peft.get_peft_model(Net(), getattr(peft, name)(**fields[0]))
    with pytest.raises(ValueError) if "without" not in pair else nullcontext():
        theirs.add_adapter("b", getattr(peft, name)(**fields[1]))
    alone = {}
    for adapter, config, seed in (("a", fields[0], 1), ("b", fields[1], 2)):
        model = trained(diffpeft.get_peft_model(Net(), getattr(diffpeft, name)(**config), adapter_name=adapter), seed)
        alone[adapter] = model(X)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(Net(), tmp_path / adapter).eval()
        torch.testing.assert_close(again(X), alone[adapter], **SAME)
    both = diffpeft.PeftModel.from_pretrained(Net(), tmp_path / "a", adapter_name="a")
    both.load_adapter(tmp_path / "b", "b")
    for adapter in ("b", "a"):
        both.set_adapter(adapter)
        torch.testing.assert_close(both(X), alone[adapter], **SAME)
    assert not torch.allclose(alone["a"], alone["b"], **SAME)
    rows = both(X, adapter_names=["a", "b", "__base__"])
    torch.testing.assert_close(rows, torch.stack([alone["a"][0], alone["b"][1], Net()(X)[2]]), **SAME)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("pattern", [{"rank_pattern": {"up": 3}}, {"alpha_pattern": {"up": 5}}], ids=str)
def test_inits_from_the_weight_are_saved_with_patterns_and_rslora_too(init, pattern, tmp_path):
    """PEFT cannot restore the base's weights then; here they were never changed."""
    fields = dict(r=2, init_lora_weights=init, use_rslora=True, target_modules=["lin", "up"], **pattern)
    model = trained(diffpeft.get_peft_model(Net(), diffpeft.LoraConfig(**fields)), 1)
    model.save_pretrained(tmp_path)
    for lib in (peft, diffpeft):
        torch.testing.assert_close(lib.PeftModel.from_pretrained(Net(), tmp_path).eval()(X), model(X), **SAME)


@pytest.mark.parametrize("name", ["a", "lora", "default"])
def test_any_name_of_an_adapter_will_do(name, tmp_path):
    """PEFT loses an adapter that is called as a part of its tensors' names."""
    model = diffpeft.get_peft_model(
        Net(), diffpeft.LoraConfig(**LORA, target_modules=["lin"]), adapter_name=name
    ).eval()
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    again = diffpeft.PeftModel.from_pretrained(Net(), folder, adapter_name=name).eval()
    torch.testing.assert_close(again(X), model(X), **SAME)


def test_an_adapter_is_loaded_in_the_place_of_one_that_was_injected_under_its_name(tmp_path):
    """As where transformers has loaded the adapter of a folder already. The other layers of the old one are without adapters; those of others stay."""
    wrapped = diffpeft.get_peft_model(Net(), diffpeft.LoraConfig(**LORA, target_modules=["lin"])).eval()
    wrapped.save_pretrained(tmp_path)
    base = diffpeft.inject_adapter_in_model(diffpeft.LoraConfig(**LORA, target_modules=["lin", "up"]), Net())
    diffpeft.inject_adapter_in_model(diffpeft.LoraConfig(**LORA, target_modules=["down"]), base, "other")
    again = diffpeft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(X), wrapped(X), **SAME)
    assert (
        again.active_adapters == ["default"]
        and len(diffpeft.get_peft_model_state_dict(base, adapter_name="other")) == 2
    )
    before = [name for name, _ in base.named_parameters()]
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(diffpeft.CheckpointError):
        diffpeft.PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_parameters()] == before
