"""A failure or an interrupt at any step of what a PeftModel does: what is there is what was there before, or what the finished operation gives."""

from __future__ import annotations

import copy
import functools
import os
import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from diffpeft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    inject_adapter_in_model,
    prepare_model_for_compiled_hotswap,
    set_peft_model_state_dict,
)
from diffpeft.llm import adalora
from diffpeft.model.attach import mixes_of
from tests.faults import FAULTS, points, stepped
from tests.pipeline.states import lasting

EVERY = bool(os.environ.get("DIFFPEFT_EVERY_POINT"))  # minutes: hundreds of points an operation
IDS = torch.tensor([[3, 4, 5, 9], [5, 1, 2, 7]])
SMALL = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=8)


def base(tied=False, checkpointing=False):
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=12, tie_word_embeddings=tied, pad_token_id=0))
    if checkpointing:
        made.gradient_checkpointing_enable()
    return made


def randomized(peft_model):
    torch.manual_seed(1)
    for p in peft_model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    return peft_model


LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
OTHER = LoraConfig(r=3, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
PLAIN = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
TIED = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
ADALORA = AdaLoraConfig(init_r=3, target_r=1, total_step=5, tinit=1, tfinal=1, target_modules=["q_proj", "v_proj"])
PROMPT = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
PREFIX = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")


def made(config, *others, active=None, **options):
    """A PeftModel with these adapters, called a, b, ... and filled with numbers."""
    peft_model = randomized(get_peft_model(base(**options), copy.deepcopy(config), "a"))
    for name, other in zip("bc", others, strict=False):
        peft_model.add_adapter(name, copy.deepcopy(other))
        peft_model.set_adapter(name)
        randomized(peft_model)
    peft_model.set_adapter("a" if active is None else active)
    return peft_model


def after(make, *calls):
    """Makes what `make` makes, and does these calls on it."""

    def prepared():
        subject = make()
        for call in calls:
            call(subject)
        return subject

    return prepared


def step(peft_model, number):
    """What a training step of AdaLoRA does, but for the optimizer's."""
    peft_model.zero_grad()
    peft_model(input_ids=IDS, labels=IDS).loss.backward()
    peft_model.base_model.update_and_allocate(number)


@functools.cache
def tensors_of(make):
    """Other numbers for the adapter a, in the shapes of its file."""
    return {key: t + 1 for key, t in get_peft_model_state_dict(copy.deepcopy(subject(make)), adapter_name="a").items()}


def summed(kind, **options):
    return lambda m, d: m.add_weighted_adapter(["a", "b"], [0.7, -0.4], "c", kind, **options)


def within(m, d):
    with m.disable_adapter():
        pass


merged = lambda m: m.merge_adapter()  # noqa: E731
off = lambda m: m.base_model.disable_adapter_layers()  # noqa: E731
loras = lambda: made(LORA, OTHER)  # noqa: E731
mixed = lambda: made(LORA, LoHaConfig(r=2, target_modules=["q_proj", "k_proj"]))  # noqa: E731
plain = lambda: made(PLAIN, PLAIN)  # noqa: E731
ia3 = lambda: made(*[IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])] * 2)  # noqa: E731
prompts = lambda: made(PROMPT, PROMPT)  # noqa: E731
tokens = lambda: made(LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]), tied=True)  # noqa: E731
raw = lambda: made(LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"]))  # noqa: E731
biased = lambda: made(LoraConfig(r=2, target_modules=["lm_head"], bias="all"), OTHER)  # noqa: E731
tied = lambda: made(TIED, tied=True)  # noqa: E731
trained = lambda: made(PLAIN)  # noqa: E731
fewer = after(
    lambda: made(ADALORA),
    *(functools.partial(step, number=number) for number in range(1, 5)),
    lambda m: get_peft_model_state_dict(m, adapter_name="a"),  # as PEFT's, it respells the config
)
frozen = after(trained, lambda m: m.set_requires_grad("a", False))

# name: (what comes before, the operation on (model, folder))
OPERATIONS = {
    "set_adapter": (loras, lambda m, d: m.set_adapter("b")),
    "set_adapter, several": (mixed, lambda m, d: m.set_adapter(["b", "a"])),
    "set_adapter, while off": (after(loras, off), lambda m, d: m.set_adapter("b", inference_mode=True)),
    "set_requires_grad": (loras, lambda m, d: m.set_requires_grad(["a", "b"], False)),
    "delete_adapter": (mixed, lambda m, d: m.delete_adapter("a")),
    "delete_adapter, not active": (loras, lambda m, d: m.delete_adapter("b")),
    "delete_adapter, the last": (trained, lambda m, d: m.delete_adapter("a")),
    "merge_adapter": (mixed, lambda m, d: m.merge_adapter()),
    "merge_adapter, one that is not active": (loras, lambda m, d: m.merge_adapter(["b"])),
    "merge_adapter, rows of a tied table": (tokens, lambda m, d: m.merge_adapter()),
    "unmerge_adapter": (after(mixed, merged), lambda m, d: m.unmerge_adapter()),
    "unmerge_adapter, rows of a tied table": (after(tokens, merged), lambda m, d: m.unmerge_adapter()),
    "unload": (mixed, lambda m, d: m.unload()),
    "unload, merged": (after(mixed, merged), lambda m, d: m.unload()),
    "merge_and_unload": (mixed, lambda m, d: m.merge_and_unload()),
    "merge_and_unload, some": (loras, lambda m, d: m.merge_and_unload(adapter_names=["b"])),
    "merge_and_unload, ties": (tied, lambda m, d: m.merge_and_unload(adapter_names=[])),
    "merge_and_unload, parameters": (raw, lambda m, d: m.merge_and_unload(dequantize=True)),
    "disable_adapter_layers": (loras, lambda m, d: m.base_model.disable_adapter_layers()),
    "enable_adapter_layers": (after(loras, off), lambda m, d: m.base_model.enable_adapter_layers()),
    "disable_adapter": (loras, within),
    "disable_adapter, merged": (after(loras, merged), within),
    "add_weighted_adapter": (mixed, summed(None)),
    "add_weighted_adapter, biases": (biased, summed(None)),
    "add_weighted_adapter, cat": (loras, summed("cat")),
    "add_weighted_adapter, dare_ties_svd": (plain, summed("dare_ties_svd", density=0.5)),
    "add_weighted_adapter, (IA)^3": (ia3, summed("linear")),
    "add_adapter": (loras, lambda m, d: m.add_adapter("c", LoraConfig(r=1, target_modules=["v_proj", "o_proj"]))),
    "get_peft_model": (lambda: base(checkpointing=True), lambda m, d: get_peft_model(m, copy.deepcopy(LORA))),
    "get_peft_model, layers repeated": (base, lambda m, d: get_peft_model(m, repeated())),
    "inject_adapter_in_model": (base, lambda m, d: inject_adapter_in_model(copy.deepcopy(OTHER), m)),
    "from_pretrained": (base, lambda m, d: PeftModel.from_pretrained(m, d / "lora", is_trainable=True)),
    "from_pretrained, frozen": (base, lambda m, d: PeftModel.from_pretrained(m, d / "tied")),
    "load_adapter": (trained, lambda m, d: m.load_adapter(d / "lora", "new")),
    "load_adapter, a table of its own": (trained, lambda m, d: m.load_adapter(d / "whole", "new")),
    "load_adapter, there already": (loras, lambda m, d: m.load_adapter(d / "lora", "a")),
    "set_peft_model_state_dict": (trained, lambda m, d: set_peft_model_state_dict(m, tensors_of(trained), "a")),
    "set_peft_model_state_dict, a bare module": (
        lambda: inject_adapter_in_model(copy.deepcopy(OTHER), base(), "a"),
        lambda m, d: set_peft_model_state_dict(
            m, {k: t + 1 for k, t in get_peft_model_state_dict(m, adapter_name="a").items()}, "a"
        ),
    ),
    "set_peft_model_state_dict, fewer ranks": (
        fewer,
        lambda m, d: set_peft_model_state_dict(m, tensors_of(fewer), "a"),
    ),
    "hotswap_adapter": (frozen, lambda m, d: hotswap_adapter(m, d / "plain", "a")),
    "hotswap_adapter, trained": (trained, lambda m, d: hotswap_adapter(m, d / "plain", "a")),
    "hotswap_adapter, a higher rank": (trained, lambda m, d: hotswap_adapter(m, d / "higher", "a")),
    "prepare_model_for_compiled_hotswap": (
        plain,
        lambda m, d: prepare_model_for_compiled_hotswap(m, target_rank=5, config=copy.deepcopy(PLAIN)),
    ),
    "resize_token_embeddings": (tied, lambda m, d: m.resize_token_embeddings(15)),
    "resize_token_embeddings, fewer": (after(plain), lambda m, d: m.resize_token_embeddings(10)),
    "update_and_allocate": (after(lambda: made(ADALORA), lambda m: step(m, 1)), lambda m, d: step(m, 2)),
    "resize of AdaLoRA": (fewer, lambda m, d: adalora.resize(m.get_base_model(), "a", m.peft_config["a"])),
    "prompts: get_peft_model": (base, lambda m, d: get_peft_model(m, copy.deepcopy(PREFIX))),
    "prompts: add_adapter": (prompts, lambda m, d: m.add_adapter("c", copy.deepcopy(PROMPT))),
    "prompts: set_adapter": (prompts, lambda m, d: m.set_adapter("b")),
    "prompts: delete_adapter": (prompts, lambda m, d: m.delete_adapter("a")),
    "prompts: unload": (prompts, lambda m, d: m.unload()),
    "prompts: from_pretrained": (base, lambda m, d: PeftModel.from_pretrained(m, d / "prompt")),
    "prompts: load_adapter": (prompts, lambda m, d: m.load_adapter(d / "prompt", "new")),
    "prompts: load_adapter, there already": (prompts, lambda m, d: m.load_adapter(d / "prompt", "a")),
}
SAME = ("disable_adapter", "disable_adapter, merged")  # those that leave what was there


def repeated():
    return LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], task_type="CAUSAL_LM")


@functools.cache
def subject(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters to load, of other numbers than those that are there."""
    where = tmp_path_factory.mktemp("adapters")
    higher = LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = {"lora": LORA, "plain": PLAIN, "higher": higher, "tied": TIED, "prompt": PROMPT, "whole": PLAIN}
        for name, config in configs.items():
            peft_model = made(config)
            torch.manual_seed(2)
            for p in peft_model.parameters():
                if p.requires_grad:
                    nn.init.normal_(p)
            if name == "whole":  # with the model's tables, which are not those that it will be loaded on
                nn.init.normal_(peft_model.get_base_model().get_input_embeddings().weight)
            peft_model.save_pretrained(where / name, save_embedding_layers=name == "whole")
            for file in (where / name / "a").iterdir():
                file.replace(where / name / file.name)
    return where


def fingerprint(model, trace):
    """What a model, wrapped or not, holds and computes, what its adapters are called, and what is trained."""
    wrapped = isinstance(model, PeftModel)
    inner = model.get_base_model() if wrapped else model
    tuner = model.tuner if wrapped else None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = [m.training for m in model.modules()]
        flags = {id(m): m.training for m in model.modules()}
        logits = model.eval()(input_ids=IDS).logits
        for m in model.modules():
            m.training = flags[id(m)]
    return {
        "output": logits.flatten().tolist(),
        "models": [
            (*row[:3], {k: [n for n in v if not isinstance(n, int)] for k, v in row[3].items()}, *row[4:])
            for row in lasting(trace(model))  # but for the numbers of hooks
        ],
        "training": training,
        "keys": list(model.state_dict()),
        "configs": {name: config.to_dict() for name, config in tuner.peft_config.items()} if wrapped else {},
        "active": (model.active_adapters, getattr(tuner, "_off", None)) if wrapped else (),
        "head": getattr(tuner, "_head", None) is None,
        "mixes": [
            (m.layers, list(m.adapters.items()), dict(m.fused), dict(m.choice.given), m.running())
            for m in mixes_of({"": inner}).values()
        ],
        "model's config": inner.config.to_dict(),
        "ties": dict(getattr(inner, "all_tied_weights_keys", {})),
        "importance": [sorted(map(str, vars(m).get("importance", {}).items())) for m in model.modules()],
        "prompts": [list(tuner.prompt_tokens), tuner.mix.choice.given] if hasattr(tuner, "prompt_tokens") else [],
    }


def cells():
    """Each operation with one fault, by turns; with the other it is slow: what is prepared and committed is the same for both."""
    for n, operation in enumerate(OPERATIONS):
        for m, fault in enumerate(FAULTS):
            marks = () if EVERY or n % 2 == m else pytest.mark.slow
            yield pytest.param(operation, fault, id=f"{operation}-{fault}", marks=marks)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("operation, fault", cells())
def test_what_fails_at_any_step_is_not_begun_or_is_done(operation, fault, trace, folder):
    make, operate = OPERATIONS[operation]
    broken, struck = stepped(
        fault,
        lambda: copy.deepcopy(subject(make)),
        lambda model: operate(model, folder),
        lambda model: fingerprint(model, trace),
        chosen=(lambda n: list(range(1, n + 1))) if EVERY else points,
        changes=operation not in SAME,
    )
    if EVERY:
        print(f"{operation}, {fault}: {len(broken)} of {struck} points are neither begun nor done")
    assert not broken, broken[0]
    assert struck > 5
