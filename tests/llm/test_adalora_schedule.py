"""AdaLoRA's schedule against PEFT's: the same losses, masks, ranks and files from the same weights and data."""

from __future__ import annotations

import copy
import json
import re
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import diffpeft
from diffpeft import AdapterStateError, ConfigError, ShapeMismatchError, UnknownKeysError
from diffpeft.llm import adalora
from diffpeft.methods.adalora import AdaLoraConfig
from diffpeft.model.state import parameters_of, slots_of

SCHEDULE = dict(init_r=4, target_r=2, tinit=4, tfinal=5, deltaT=3, total_step=28, lora_alpha=16, orth_reg_weight=0.3)
TARGETS = ["q_proj", "v_proj", "down_proj"]
ROLES = ("lora_A", "lora_B", "lora_E")
NAME = "default"
SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=128,
)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).double().requires_grad_(False)


def adapted(base, name=NAME, **fields):
    """The model with a fresh adapter, and its config."""
    model, config = copy.deepcopy(base), AdaLoraConfig(**{**SCHEDULE, "target_modules": TARGETS, **fields})
    diffpeft.attach(model, config, name)
    for slot in slots_of(model, name).values():
        slot.to(next(model.parameters()).dtype)
    return model, config


def theirs_like(base, model, name=NAME, **fields):
    """PEFT's model with the tensors of ours."""
    config = peft.AdaLoraConfig(**{**SCHEDULE, "target_modules": TARGETS, **fields}, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(base), config, name)
    theirs.to(next(model.parameters()).dtype)
    for layer, slot in slots_of(model, name).items():
        of_theirs(theirs, layer, "ranknum", name).requires_grad_(False)  # see test_the_scale_is_not_trained
        for role in ROLES:
            of_theirs(theirs, layer, role, name).data.copy_(slot.get_parameter(role))
    return theirs


def of_theirs(theirs, layer, role, name=NAME):
    return getattr(theirs.base_model.model.get_submodule(layer), role)[name]


def data(steps):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, SIZES["vocab_size"], (2, 9), generator=generator) for _ in range(steps)]


def losses(forward, parameters, after, batches, optimizer=torch.optim.AdamW):
    """Train, and say the loss of every step."""
    optimizer, found = optimizer(parameters, lr=0.02), []
    for step, ids in enumerate(batches):
        loss = forward(ids)
        loss.backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def train_ours(model, config, batches, name=NAME, after=lambda step: None):
    def forward(ids):
        return adalora.regularised(model(input_ids=ids, labels=ids), model, {name: config}).loss

    def allocate(step):
        adalora.update_and_allocate(model, name, config, step)
        after(step)

    return losses(forward, parameters_of(model, name), allocate, batches)


def train_theirs(theirs, batches, after=lambda step: None):
    def allocate(step):
        theirs.base_model.update_and_allocate(step)
        after(step)

    own = [p for p in theirs.parameters() if p.requires_grad]
    return losses(lambda ids: theirs(input_ids=ids, labels=ids).loss, own, allocate, batches)


@pytest.fixture(scope="module")
def trained(base):
    """Both after all steps: (model, config, theirs, losses of both, rank patterns of both at each step)."""
    torch.manual_seed(0)
    model, config = adapted(base)
    theirs = theirs_like(base, model)
    patterns, batches = ([], []), data(SCHEDULE["total_step"])
    ours = train_ours(model, config, batches, after=lambda _: patterns[0].append(copy.deepcopy(config.rank_pattern)))
    their_config = theirs.peft_config[NAME]
    other = train_theirs(theirs, batches, lambda _: patterns[1].append(copy.deepcopy(their_config.rank_pattern)))
    return model, config, theirs, (ours, other), patterns


def test_losses_masks_and_tensors_are_pefts(trained):
    model, _, theirs, (ours, other), patterns = trained
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(other), rtol=1e-6, atol=0)
    assert patterns[0] == patterns[1]
    assert patterns[0][4] is None and patterns[0][6] is not None  # tinit, and the first multiple of deltaT after it
    for layer, slot in slots_of(model, NAME).items():
        for role in ROLES:
            torch.testing.assert_close(
                slot.get_parameter(role), of_theirs(theirs, layer, role), rtol=1e-6, atol=1e-9, msg=f"{layer} {role}"
            )


def test_the_ranks_at_the_end_are_target_r_a_layer_and_differ(trained):
    model, config, *_ = trained
    ranks = [sum(mask) for mask in config.rank_pattern.values()]
    assert sum(ranks) == SCHEDULE["target_r"] * len(ranks) and len(set(ranks)) > 1
    for layer, slot in slots_of(model, NAME).items():
        mask = torch.tensor(config.rank_pattern[f"{layer}.lora_E.{NAME}"])
        assert torch.equal(slot.lora_E.flatten() != 0, mask)


def test_in_fp32_and_with_dropout_too(base):
    torch.manual_seed(0)
    single = copy.deepcopy(base).float()
    model, config = adapted(single, lora_dropout=0.3)
    theirs, batches = theirs_like(single, model, lora_dropout=0.3), data(12)
    model.train(), theirs.train()
    torch.manual_seed(5)
    ours = train_ours(model, config, batches)
    torch.manual_seed(5)
    other = train_theirs(theirs, batches)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(other), rtol=1e-5, atol=0)
    assert config.rank_pattern == theirs.peft_config[NAME].rank_pattern is not None


def test_the_penalty_is_pefts_and_has_a_gradient(base):
    model, _ = adapted(base)
    theirs, ids = theirs_like(base, model), data(1)[0]
    with torch.no_grad():
        plain = model(input_ids=ids, labels=ids).loss
        want = (theirs(input_ids=ids, labels=ids).loss - plain) / SCHEDULE["orth_reg_weight"]
    loss = adalora.orthogonal_loss(model, NAME)
    torch.testing.assert_close(loss, want.double(), rtol=1e-5, atol=0)  # a difference of float32
    loss.backward()
    assert all(
        (slot.get_parameter(role).grad is not None) == (role != "lora_E")
        for slot in slots_of(model, NAME).values()
        for role in ROLES
    )


def test_no_penalty_without_a_loss_or_a_trained_adapter(base):
    model, config = adapted(base)
    ids = data(1)[0]
    outputs = model(input_ids=ids)
    assert adalora.regularised(outputs, model, {NAME: config}) is outputs and outputs.loss is None
    config.inference_mode = True
    want = model(input_ids=ids, labels=ids).loss
    assert torch.equal(adalora.regularised(model(input_ids=ids, labels=ids), model, {NAME: config}).loss, want)
    assert adalora.regularised((1, 2), model, {}) == (1, 2)


@pytest.mark.parametrize(
    "fields", [dict(SCHEDULE), dict(SCHEDULE, tinit=0, tfinal=0, deltaT=1), dict(SCHEDULE, tfinal=20, total_step=40)]
)
def test_the_budget_is_pefts(base, fields):
    model, config = adapted(base, **fields)
    allocator = theirs_like(base, model, **fields).base_model.rankallocator
    layers = len(slots_of(model, NAME))
    steps = range(fields["total_step"] + 1)
    assert [adalora.budget(config, layers, n) for n in steps] == [allocator.budget_schedule(n)[0] for n in steps]


def test_files_are_pefts(trained, tmp_path):
    """The pruned state dict and rank_pattern are what PEFT writes, and each loads in the other with the same output."""
    model, config, theirs, *_ = trained
    model, config, theirs = copy.deepcopy(model), copy.deepcopy(config), copy.deepcopy(theirs)
    state = {
        f"base_model.model.{layer}.{role}": slot.get_parameter(role).detach()
        for layer, slot in slots_of(model, NAME).items()
        for role in ROLES
    }
    state = adalora.pruned(state, config, NAME)
    theirs.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: t.shape for k, t in state.items()} == {k: t.shape for k, t in written.items()}
    for key, t in written.items():
        torch.testing.assert_close(state[key], t, rtol=1e-6, atol=1e-9)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.rank_pattern == fields["rank_pattern"]
    assert AdaLoraConfig.from_pretrained(tmp_path).rank_pattern == config.rank_pattern


def test_a_file_loads_as_in_peft(base, trained, tmp_path):
    _, _, theirs, *_ = trained
    copy.deepcopy(theirs).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).double()
    config = AdaLoraConfig.from_pretrained(tmp_path)
    model = copy.deepcopy(base)
    diffpeft.attach(model, config, "other")
    adalora.resize(model, "other", config)
    state = load_file(tmp_path / "adapter_model.safetensors")
    for layer, slot in slots_of(model, "other").items():
        for role in ROLES:
            t = state[f"base_model.model.{layer}.{role}"]
            assert slot.get_parameter(role).shape == t.shape
            slot.to(torch.float64).get_parameter(role).data.copy_(t)
    ids = data(1)[0]
    with torch.no_grad():
        want = theirs(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, loaded(input_ids=ids).logits, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-6, atol=1e-9)


def test_resizing_changes_no_output_and_keeps_who_is_trained(base, trained):
    trained_model, config, *_ = trained
    model, ids = copy.deepcopy(trained_model), data(1)[0]
    want = model(input_ids=ids).logits
    slots = slots_of(model, NAME)
    slots["model.layers.0.self_attn.q_proj"].lora_A.requires_grad_(False)
    adalora.resize(model, NAME, config)
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-12, atol=1e-12)
    for layer, slot in slots.items():
        assert slot.rank == sum(config.rank_pattern[f"{layer}.lora_E.{NAME}"])
    assert [p for p in model.parameters() if p.requires_grad] and not slots[
        "model.layers.0.self_attn.q_proj"
    ].lora_A.requires_grad
    adalora.resize(model, NAME, config)  # again is nothing
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-12, atol=1e-12)


def test_a_layer_may_lose_all_its_triplets(base):
    """PEFT's too: a rank of 0 adds nothing and trains on."""
    model, config = adapted(base)
    layers = list(slots_of(model, NAME))
    config.rank_pattern = {f"{layer}.lora_E": [False] * 4 for layer in layers[:1]}
    config.rank_pattern |= {f"{layer}.lora_E": [True, False, True, False] for layer in layers[1:]}
    adalora.resize(model, NAME, config)
    for slot in slots_of(model, NAME).values():
        nn.init.normal_(slot.lora_E)
    ids = data(1)[0]
    loss = adalora.regularised(model(input_ids=ids, labels=ids), model, {NAME: config}).loss
    loss.backward()
    assert slots_of(model, NAME)[layers[0]].lora_A.shape == (0, 32) and loss.isfinite()
    adalora.update_and_allocate(model, NAME, config, 0)
    diffpeft.fuse(model)
    with torch.no_grad():
        torch.testing.assert_close(
            adalora.regularised(model(input_ids=ids, labels=ids), model, {NAME: config}).loss, loss.detach()
        )


# ---- where PEFT fails, and what is right here


def test_a_training_goes_on_from_a_pruned_file(base, trained):
    """Masks stay masks of init_r triplets, so that the next file loads as well; PEFT's are of those that were left."""
    trained_model, trained_config, *_ = trained
    model, config = copy.deepcopy(trained_model), copy.deepcopy(trained_config)
    before = adalora._masks(config, NAME)
    adalora.resize(model, NAME, config)
    config.target_r, config.tinit = 1, 0
    train_ours(model, config, data(SCHEDULE["total_step"]))
    after = adalora._masks(config, NAME)
    assert {len(mask) for mask in after.values()} == {SCHEDULE["init_r"]}
    assert all(b or not a for layer in after for a, b in zip(after[layer], before[layer], strict=True))
    assert sum(map(sum, after.values())) == len(after)
    fresh, _ = adapted(base)
    adalora.resize(fresh, NAME, config)
    state = {
        f"{layer}.{role}": slot.get_parameter(role) for layer, slot in slots_of(model, NAME).items() for role in ROLES
    }
    with pytest.raises(
        ShapeMismatchError, match="rank_pattern"
    ):  # smaller masks than the tensors were pruned by before
        adalora.pruned(state, config, NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_is_not_trained(dtype):
    """PEFT's ranknum, which no file holds, becomes a trained parameter where the base is not in fp32."""
    plain = nn.Sequential(nn.Linear(16, 12)).to(dtype)
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft.AdaLoraConfig(total_step=3, target_modules=["0"]))
    trained = {n.split(".")[-2] for n, p in theirs.named_parameters() if p.requires_grad}
    assert trained == ({*ROLES} if dtype == torch.float32 else {*ROLES, "ranknum"})
    diffpeft.attach(plain, AdaLoraConfig(total_step=3), targets=["0"])
    assert {n.split(".")[-1] for n, p in plain.named_parameters() if "adapters" in n} == {*ROLES}


def test_a_target_that_is_no_smaller_prunes_nothing(base):
    """PEFT fails: torch.kthvalue of 0."""
    model, config = adapted(base, target_r=4, tinit=0)
    theirs, ids = theirs_like(base, model, target_r=4, tinit=0), data(1)[0]
    train_ours(model, config, data(5))
    assert all(all(mask) for mask in config.rank_pattern.values())
    theirs(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises((RuntimeError, IndexError)):
        theirs.base_model.update_and_allocate(3)


def test_a_weight_without_a_gradient_matters_nothing(base):
    """PEFT fails: None has no product."""
    model, config = adapted(base, tinit=0)
    theirs, ids = theirs_like(base, model, tinit=0), data(1)[0]
    (first, *_), parameters = slots_of(model, NAME).values(), parameters_of(model, NAME)
    for slot in slots_of(model, NAME).values():
        nn.init.normal_(slot.lora_E)
    adalora.regularised(model(input_ids=ids, labels=ids), model, {NAME: config}).loss.backward()
    for p in first.parameters():
        p.grad = None
    adalora.update_and_allocate(model, NAME, config, 3)
    assert not first.lora_E.any() and sum(bool(p.any()) for p in parameters) > 3
    with pytest.raises(TypeError):
        theirs.base_model.update_and_allocate(3)


def test_a_loaded_adapter_gives_a_loss(base, tmp_path):
    """PEFT 0.21.2 looks for the adapter that is trained, and there is none."""
    model, config = adapted(base)
    theirs, ids = theirs_like(base, model), data(1)[0]
    theirs.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        loaded(input_ids=ids, labels=ids)
    config = AdaLoraConfig.from_pretrained(tmp_path)
    assert config.inference_mode and adalora.trained({NAME: config}) is None
    assert adalora.regularised(model(input_ids=ids, labels=ids), model, {NAME: config}).loss.isfinite()


def test_a_layer_may_be_called_as_the_adapter(base):
    """PEFT takes the adapter's name out of the middle of names."""
    model, config = adapted(base, name="self_attn")
    layers = list(slots_of(model, "self_attn"))
    config.rank_pattern = {f"{layer}.lora_E.self_attn": [True] * 4 for layer in layers}
    adalora.pruned({}, config, "self_attn")
    assert list(config.rank_pattern) == [f"{layer}.lora_E" for layer in layers]
    config.rank_pattern = {f"{layer}.lora_E": [True, True, False, False] for layer in layers}
    adalora.resize(model, "self_attn", config)
    assert {slot.rank for slot in slots_of(model, "self_attn").values()} == {2}


# ---- errors


def test_a_copied_model_has_its_own_importance(base):
    model, config = adapted(base)
    batches = data(SCHEDULE["total_step"])
    train_ours(model, config, batches[:3])
    twin, other = copy.deepcopy(model), copy.deepcopy(config)
    train_ours(twin, other, [b.flip(0) for b in batches])
    assert config.rank_pattern is None and other.rank_pattern is not None
    slot, twins = (next(iter(slots_of(m, NAME).values())) for m in (model, twin))
    assert slot.importance["lora_A"][0].any() and not hasattr(twins, "importance")


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda m, c: adalora.update_and_allocate(m, NAME, c, 0), AdapterStateError, "after loss.backward"),
        (lambda m, c: adalora.update_and_allocate(m, "x", c, 0), AdapterStateError, "'x' is no AdaLoRA"),
        (lambda m, c: adalora.update_and_allocate(m, NAME, c, c.last_step), AdapterStateError, "at every step"),
        (lambda m, c: adalora.update_and_allocate(m, NAME, c, c.total_step), AdapterStateError, "no rank_pattern"),
        (lambda m, c: adalora.orthogonal_loss(m, "x"), AdapterStateError, "no AdaLoRA"),
    ],
)
def test_what_cannot_be_done_is_said(base, call, error, said):
    with pytest.raises(error, match=re.escape(said)):
        call(*adapted(base))


@pytest.mark.parametrize(
    ("pattern", "error", "said"),
    [
        ({"model.layers.9.self_attn.q_proj.lora_E": [True] * 4}, UnknownKeysError, "layers.9"),
        ({"model.layers.0.self_attn.q_proj.lora_E": [True] * 3 + [False] * 2}, ShapeMismatchError, "is for 5"),
    ],
)
def test_a_pattern_that_does_not_fit_changes_nothing(base, pattern, error, said):
    model, config = adapted(base)
    good = {"model.layers.1.self_attn.q_proj.lora_E": [True, False, False, False]}
    config.rank_pattern = {**good, **pattern}
    before = {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(error, match=said):
        adalora.resize(model, NAME, config)
    assert {n: p.shape for n, p in model.named_parameters()} == before


def test_only_one_adapter_is_trained():
    one, two = (AdaLoraConfig(total_step=3) for _ in range(2))
    assert adalora.trained({"a": one, "lora": diffpeft.LoraConfig()}) == "a"
    with pytest.raises(ConfigError, match="only 1 trainable adapter"):
        adalora.trained({"a": one, "b": two})
    two.inference_mode = True
    assert adalora.trained({"a": one, "b": two}) == "a"


def test_nothing_is_pruned_before_there_is_a_pattern(base):
    model, config = adapted(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert adalora.pruned({"x": torch.ones(1)}, config, NAME) == {"x": torch.ones(1)}
        adalora.resize(model, NAME, config)
    assert {slot.rank for slot in slots_of(model, NAME).values()} == {4}
