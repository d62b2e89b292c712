"""An adapter's tensors out of a PeftModel inside DDP, FSDP 1 and torch.compile, one in another: those that it has alone."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import diffpeft
from diffpeft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tests.llm.models import batch, model

CPU = torch.device("cpu")
KINDS = {
    "lora": lambda: LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]),
    "biases": lambda: LoraConfig(r=4, init_lora_weights=False, target_modules=["query"], bias="all"),
    "copies and embeddings": lambda: LoraConfig(
        r=4, init_lora_weights=False, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]
    ),
    "rows": lambda: LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], trainable_token_indices=[1, 3]),
    "shared": lambda: diffpeft.VeraConfig(r=4, init_weights=False, target_modules=["q_proj"]),
    "prompt": lambda: diffpeft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8),
}


def made(kind):
    torch.manual_seed(0)
    return get_peft_model(model("bert-cls" if kind == "biases" else "llama"), KINDS[kind]()).eval()


def sharded(model, own=True, units=False):
    policy = diffpeft.fsdp_auto_wrap_policy(model) if units else None
    if not own and not units:
        model.requires_grad_(True)  # a unit is trained whole, or not at all
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=own, device_id=CPU)


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPS = {
    "ddp": DistributedDataParallel,
    "compiled": compiled,
    "ddp, compiled": lambda m: compiled(DistributedDataParallel(m)),
    "fsdp": sharded,
    "fsdp, flat": lambda m: sharded(m, own=False),
    "fsdp, in units": lambda m: sharded(m, units=True),
    "fsdp, flat in units": lambda m: sharded(m, own=False, units=True),
    "fsdp, compiled": lambda m: compiled(sharded(m)),
    "compiled, in fsdp": lambda m: sharded(compiled(m)),
}


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_tensors_are_those_of_the_model_alone(wrap):
    for kind in KINDS:
        want = get_peft_model_state_dict(made(kind))
        if (wrap, kind) == (
            "fsdp, flat in units",
            "rows",
        ):  # trained rows are gathered with the frozen table, and a flat unit is one or the other
            with pytest.raises(ValueError, match="uniform"):
                WRAPS[wrap](made(kind))
            continue
        wrapped = WRAPS[wrap](made(kind))
        if "compiled" not in wrap:  # FSDP 1 looks for its units when it is called
            with torch.no_grad():
                wrapped(**batch("bert-cls" if kind == "biases" else "llama"))
        tensors = get_peft_model_state_dict(wrapped)
        assert tensors.keys() == want.keys(), kind
        assert all(torch.equal(tensors[key], t) for key, t in want.items()), kind
        alone = made(kind)
        with torch.no_grad():
            for p in alone.parameters():
                p.copy_(p.clone().zero_() if p.requires_grad else p)
        if kind != "prompt":  # whose file holds finished vectors
            set_peft_model_state_dict(alone, tensors)
            again = get_peft_model_state_dict(alone)
            assert all(torch.equal(again[key], t) for key, t in want.items()), kind


@pytest.mark.parametrize("wrap", ["ddp", "compiled", "ddp, compiled"])
def test_tensors_go_back_in_through_what_does_not_shard(wrap):
    wrapped = WRAPS[wrap](made("lora"))
    twice = {key: 2 * t for key, t in get_peft_model_state_dict(wrapped).items()}
    set_peft_model_state_dict(wrapped, twice)
    assert all(torch.equal(t, twice[key]) for key, t in get_peft_model_state_dict(wrapped).items())


def test_into_units_nothing_is_loaded():
    with pytest.raises(diffpeft.AdapterStateError, match="units of FSDP 1"):
        set_peft_model_state_dict(sharded(made("lora")), get_peft_model_state_dict(made("lora")))


def test_a_bare_module_too():
    bare = made("lora").get_base_model()
    want = get_peft_model_state_dict(bare)
    for wrap in ("ddp", "fsdp"):
        for (key, t), (name, own) in zip(
            sorted(get_peft_model_state_dict(WRAPS[wrap](bare)).items()), sorted(want.items()), strict=True
        ):
            assert key == name and torch.equal(t, own)
        bare = made("lora").get_base_model()


def test_what_is_around_a_model_is_taken_off_by_its_class_alone():
    from diffpeft.llm.distributed import unwrapped

    inner = made("lora")
    for first, second in itertools.permutations((DistributedDataParallel, compiled)):
        assert unwrapped(second(first(inner))) is inner
    inner.module = torch.nn.Linear(2, 2)  # a model may have one of its own
    assert unwrapped(inner) is inner
