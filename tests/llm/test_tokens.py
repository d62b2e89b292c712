"""`trainable_token_indices`: rows of embeddings that an adapter trains, alone and with a tied head."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import diffpeft
from diffpeft import (
    AdapterStateError,
    ConfigError,
    LoraConfig,
    MissingKeysError,
    NonFiniteError,
    PeftModel,
    ShapeMismatchError,
    UnknownNameError,
    attach,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from diffpeft.model.fuse import fuse, unfuse
from diffpeft.pipeline.adapters import set_adapters

SAME = dict(rtol=1e-5, atol=1e-5)
ROWS = [9, 3, 5]
IDS = torch.tensor([[3, 5, 9, 20, 3, 50], [1, 2, 7, 9, 60, 4]])
KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(
        LlamaConfig(**sizes, intermediate_size=48, vocab_size=96, tie_word_embeddings=tied, pad_token_id=0)
    ).eval()


def config(lib, rows=ROWS, **more):
    return lib.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], trainable_token_indices=rows, init_lora_weights=False, **more
    )


def values(tensors, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(tensors[key].shape, generator=generator) * 0.3 for key in sorted(tensors)}


def filled(lib, model, seed: int = 1, **more):
    """A wrapped model whose adapter has the values of a seed, and these values."""
    wrapped = lib.get_peft_model(model, config(lib, **more))
    own = values(lib.get_peft_model_state_dict(wrapped), seed)
    lib.set_peft_model_state_dict(wrapped, own)
    return wrapped, own


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def second(wrapped, name="b", rows=(3, 60), seed=2):
    wrapped.add_adapter(name, config(diffpeft, list(rows)))
    own = values(get_peft_model_state_dict(wrapped, adapter_name=name), seed)
    set_peft_model_state_dict(wrapped, own, name)


@pytest.mark.parametrize("rows", [ROWS, {"embed_tokens": ROWS}, {"model.embed_tokens": ROWS, "lm_head": ROWS}])
@pytest.mark.parametrize("tied", [True, False])
def test_keys_and_outputs_are_peft_s(tied, rows):
    rows = {k: v for k, v in rows.items() if tied or k != "lm_head"} if isinstance(rows, dict) else rows
    theirs, own = filled(peft, llama(tied), rows=rows)
    ours = get_peft_model(llama(tied), config(diffpeft, rows))
    assert set(own) == set(get_peft_model_state_dict(ours)) and KEY in own
    result = set_peft_model_state_dict(ours, own)
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(logits(ours), logits(theirs), **SAME)
    assert not torch.allclose(logits(ours), logits(llama(tied)), **SAME)
    for key, tensor in get_peft_model_state_dict(ours).items():
        assert torch.equal(tensor, own[key])


def test_files_go_both_ways(tmp_path):
    theirs, _ = filled(peft, llama())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), **SAME)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs), **SAME)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_peft_s(tied):
    found = []
    for lib in (peft, diffpeft):
        wrapped, _ = filled(lib, llama(tied))
        wrapped.train()
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        grads = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
        assert all(g is not None for g in grads.values())
        found.append((next(g for n, g in grads.items() if "tokens_delta" in n), len(grads), wrapped))
    torch.testing.assert_close(found[1][0], found[0][0], **SAME)
    assert found[0][1] == found[1][1] and found[0][0].abs().sum() > 0
    counts = [wrapped.get_nb_trainable_parameters()[0] for _, _, wrapped in found]
    assert counts[0] == counts[1]


def test_a_fresh_adapter_changes_nothing():
    fields = dict(r=4, target_modules=["q_proj"], trainable_token_indices=ROWS)
    assert torch.equal(logits(get_peft_model(llama(), LoraConfig(**fields))), logits(llama()))


def test_disabled_is_the_base_to_the_last_bit():
    wrapped, _ = filled(diffpeft, llama())
    before = logits(wrapped)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(llama()))
    assert torch.equal(logits(wrapped), before)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_the_same_and_unmerging_the_exact_bytes(tied, dtype):
    wrapped, own = filled(diffpeft, llama(tied).to(dtype))
    base = {k: t.clone() for k, t in llama(tied).to(dtype).state_dict().items()}
    plain = wrapped.get_base_model()
    before = logits(wrapped)
    for _ in range(3):
        wrapped.merge_adapter()
        tables = plain.model.embed_tokens.weight, plain.lm_head.weight
        assert torch.equal(tables[0].detach()[ROWS], own[KEY].to(dtype))
        assert (tables[0] is tables[1]) == tied
        if dtype == torch.float32:
            torch.testing.assert_close(logits(wrapped), before, **SAME)
        with wrapped.disable_adapter():
            assert torch.equal(logits(wrapped), logits(llama(tied).to(dtype)))
        wrapped.unmerge_adapter()
        assert torch.equal(logits(wrapped), before)
    wrapped.merge_adapter()
    gone = wrapped.unload()
    assert all(torch.equal(t, base[k]) for k, t in gone.state_dict().items())


@pytest.mark.parametrize("change", ["step", "load_state_dict", "parameter"])
def test_a_table_that_was_changed_while_merged_is_not_overwritten(change):
    wrapped, _ = filled(diffpeft, llama())
    plain = wrapped.get_base_model()
    wrapped.merge_adapter()
    table = plain.model.embed_tokens
    if change == "step":
        table.weight.data[20, 3] += 1e-3
    elif change == "load_state_dict":
        plain.load_state_dict({"model.embed_tokens.weight": torch.ones(96, 32)}, strict=False)
    else:
        table.weight = nn.Parameter(table.weight.detach() * 1.5)
    now = logits(wrapped)
    for undo in (wrapped.unmerge_adapter, wrapped.unload):
        with pytest.raises(AdapterStateError, match="changed while"):
            undo()
    assert torch.equal(logits(wrapped), now)


def test_merge_and_unload_gives_the_same_and_leaves_no_trace():
    wrapped, _ = filled(diffpeft, llama())
    want, like = logits(wrapped), llama()
    plain = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(plain), want, **SAME)
    _assert_no_trace(plain, like)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_unloading_leaves_no_trace():
    wrapped, _ = filled(diffpeft, llama())
    like = llama()
    plain = wrapped.unload()
    _assert_no_trace(plain, like)
    assert torch.equal(logits(plain), logits(like))


def _assert_no_trace(plain, like):
    assert list(plain.state_dict()) == list(like.state_dict())
    for (name, a), (_, b) in zip(plain.named_modules(), like.named_modules(), strict=True):
        assert type(a) is type(b) and vars(a).keys() == vars(b).keys(), name


def test_several_adapters_act_in_order_and_one_by_one():
    wrapped, _ = filled(diffpeft, llama())
    alone = logits(wrapped)
    second(wrapped)
    assert torch.equal(logits(wrapped), alone)
    wrapped.set_adapter("b")
    other = logits(wrapped)
    want, _ = filled(peft, llama(), seed=2, rows=[3, 60])
    torch.testing.assert_close(other, logits(want), **SAME)
    set_adapters(wrapped.get_base_model(), {"default": 1.0, "b": 1.0})
    both = logits(wrapped)
    wrapped.merge_adapter(["default", "b"])
    torch.testing.assert_close(logits(wrapped), both, **SAME)
    table = wrapped.get_base_model().model.embed_tokens.weight
    assert torch.equal(table[3], get_peft_model_state_dict(wrapped, adapter_name="b")[KEY][0])  # the later one wins
    wrapped.unmerge_adapter()
    wrapped.delete_adapter("b")
    torch.testing.assert_close(logits(wrapped), alone, **SAME)


def test_adapters_that_do_not_commute_are_merged_from_the_first_on():
    wrapped, _ = filled(diffpeft, llama())
    second(wrapped)
    set_adapters(wrapped.get_base_model(), {"default": 1.0, "b": 1.0})
    with pytest.raises(AdapterStateError, match="order"):
        wrapped.merge_adapter(["b"])


def test_a_strength_is_a_step_towards_the_new_rows():
    wrapped, own = filled(diffpeft, llama())
    base = wrapped.get_base_model()
    set_adapters(base, {"default": -0.5})
    before = logits(base)
    old = llama().model.embed_tokens.weight.detach()[ROWS]
    fuse(base)
    torch.testing.assert_close(base.model.embed_tokens.weight.detach()[ROWS], old - 0.5 * (own[KEY] - old), **SAME)
    torch.testing.assert_close(logits(base), before, **SAME)
    unfuse(base)
    assert torch.equal(base.state_dict()["model.embed_tokens.weight"][ROWS], old)
    torch.testing.assert_close(
        base.model.embed_tokens.weight[ROWS], old - 0.5 * (own[KEY] - old), **SAME
    )  # who reads it


def test_rows_of_a_batch_have_adapters_of_their_own():
    wrapped, _ = filled(diffpeft, llama())
    second(wrapped)
    names = ["b", "__base__", "default", "b"]
    ids = torch.cat([IDS, IDS])
    mixed = logits(wrapped, ids, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            want = logits(llama(), ids[row : row + 1])
        else:
            wrapped.set_adapter(name)
            want = logits(wrapped, ids[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], want, **SAME)


def test_copies_and_pickles_keep_the_rows():
    wrapped, _ = filled(diffpeft, llama())
    want = logits(wrapped)
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(logits(other), want)
        assert len([n for n, _ in other.named_parameters() if "tokens_delta" in n]) == 1


def test_a_layer_that_scales_its_output_is_followed():
    class Scaled(nn.Embedding):
        def forward(self, x):
            return super().forward(x) * 4.0

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.proj = Scaled(10, 8, padding_idx=2), nn.Linear(8, 8)

        def forward(self, input_ids):
            return self.proj(self.table(input_ids))

    net = get_peft_model(Net(), LoraConfig(target_modules=["proj"], trainable_token_indices={"table": [2, 4]}))
    delta = next(p for n, p in net.named_parameters() if "tokens_delta" in n)
    nn.init.normal_(delta)
    ids = torch.tensor([[1, 2, 4]])
    want = net.base_model.model.proj(4.0 * torch.stack([Net().table.weight[1], delta[0], delta[1]]))[None]
    got = net(ids)
    torch.testing.assert_close(got, want, **SAME)
    got.sum().backward()
    assert (delta.grad.abs().sum(1) > 0).all()  # that of padding too: it was asked for


@pytest.mark.parametrize("again", [False, True])
def test_tied_tables_with_other_rows_each_are_untied_while_merged(again):
    """PEFT writes both into the one weight."""
    rows = {"embed_tokens": [3, 5], "lm_head": [7]}
    theirs, own = filled(peft, llama(), rows=rows)
    ours, _ = filled(diffpeft, llama(), rows=rows)
    assert sum("token_adapter" in key for key in own) == 2
    want = logits(theirs)
    torch.testing.assert_close(logits(ours), want, **SAME)
    plain, base = ours.get_base_model(), llama().state_dict()
    tied = plain.lm_head._parameters["weight"]
    for _ in range(2):
        ours.merge_adapter()
        torch.testing.assert_close(logits(ours), want, **SAME)
        ours.unmerge_adapter()
        assert plain.lm_head._parameters["weight"] is plain.model.embed_tokens._parameters["weight"] is tied
        assert all(torch.equal(t, base[k]) for k, t in ours.unload().state_dict().items()) if again else True
        if again:
            return
    with pytest.warns(UserWarning, match="no longer tied"):
        gone = ours.merge_and_unload()
    torch.testing.assert_close(logits(gone), want, **SAME)
    assert not gone.config.tie_word_embeddings


def test_hooks_of_accelerate_keep_running():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = llama()
    add_hook_to_module(model.model.embed_tokens, ModelHook())
    wrapped, _ = filled(diffpeft, model)
    want, _ = filled(diffpeft, llama())
    assert torch.equal(logits(wrapped), logits(want))


REFUSED = {
    "a word": (dict(trainable_token_indices="abc"), ConfigError, "abc"),
    "out of range": (dict(trainable_token_indices=[96]), ConfigError, "95"),
    "negative": (dict(trainable_token_indices=[-1]), ConfigError, "trainable_token_indices"),
    "twice": (dict(trainable_token_indices=[4, 4]), ConfigError, "different"),
    "no such module": (dict(trainable_token_indices={"embed_token": [4]}), UnknownNameError, "embed_tokens"),
    "no table": (dict(trainable_token_indices={"input_layernorm": [4]}), ConfigError, "LlamaRMSNorm"),
    "trained whole too": (
        dict(trainable_token_indices={"embed_tokens": [4]}, modules_to_save=["embed_tokens"]),
        ConfigError,
        "modules_to_save",
    ),
}


@pytest.mark.filterwarnings("ignore:.*share their weight")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_has_changed(case):
    fields, error, word = REFUSED[case]
    model = llama()
    with pytest.raises(error, match=word):
        get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"], **fields}))
    _assert_no_trace(model, llama())


def test_other_methods_and_attach_refuse_the_field():
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        attach(llama(), LoraConfig(trainable_token_indices=[1]), targets=["q_proj"])
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        get_peft_model(
            llama(), diffpeft.AdaLoraConfig(target_modules=["q_proj"], trainable_token_indices=[1], total_step=10)
        )


@pytest.mark.filterwarnings("ignore:.*share their weight")
@pytest.mark.parametrize(
    "fields",
    [
        dict(target_modules=["embed_tokens"], init_lora_weights=False),
        dict(target_modules=["k_proj"], modules_to_save=["embed_tokens"]),
        dict(target_modules=["k_proj"], target_parameters=["embed_tokens.weight"], init_lora_weights=False),
    ],
    ids=["a LoRA", "a copy", "the parameter"],
)
def test_another_adapter_may_have_the_table_too(fields):
    """Each alone is what it is where the other is not."""
    wrapped, _ = filled(diffpeft, llama())
    before = logits(wrapped)
    torch.manual_seed(1)
    wrapped.add_adapter("other", LoraConfig(r=2, **fields))
    wrapped.set_adapter("other")
    base = llama()
    torch.manual_seed(1)
    assert torch.equal(logits(wrapped), logits(get_peft_model(base, LoraConfig(r=2, **fields))))
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), before)
    wrapped.delete_adapter("other")
    assert torch.equal(logits(wrapped), before)


def test_one_adapter_may_have_rows_and_a_lora_of_the_table(tmp_path):
    fields = dict(r=2, trainable_token_indices=[4, 7], target_modules=["embed_tokens"], init_lora_weights=False)
    wrapped = get_peft_model(llama(), LoraConfig(**fields))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "tokens_delta" in name:
                p.add_(0.1 * torch.randn_like(p))
    before = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(again), before, rtol=0, atol=0)
    torch.testing.assert_close(logits(again.merge_and_unload()), before)


def test_broken_files_are_named():
    wrapped, own = filled(diffpeft, llama())
    before = logits(wrapped)
    for error, tensor in (
        (ShapeMismatchError, torch.zeros(4, 32)),
        (NonFiniteError, torch.full((3, 32), float("nan"))),
    ):
        with pytest.raises(error, match="tokens_delta"):
            set_peft_model_state_dict(wrapped, {**own, KEY: tensor})
    assert torch.equal(logits(wrapped), before)
    lost = set_peft_model_state_dict(wrapped, {k: t for k, t in own.items() if k != KEY}).missing_keys
    assert lost == ["base_model.model.model.embed_tokens"]


def test_a_part_of_the_tensors_is_named():
    parts = dict(r=2, target_modules=[], target_parameters=["q_proj.weight"])
    wrapped = get_peft_model(llama(), LoraConfig(**parts))
    own = get_peft_model_state_dict(wrapped)
    own.pop(next(key for key in own if key.endswith("lora_B.weight")))
    with pytest.raises(MissingKeysError, match="lora_B"):
        set_peft_model_state_dict(wrapped, own)


# what `trainable_token_indices` cannot name: PEFT's kind of error, and its words
UNFIT = {
    "no module": ({"no": [1]}, ValueError, r"Target modules {'no'} not found in the base model\."),
    "a module that is trained whole": (
        {"embed_tokens": [1]},
        ValueError,
        "The embedding layer is already marked to be trained fully",
    ),
    "a list of modules": ({"layers": [1]}, TypeError, "trainable_token_indices cannot be applied to modules of type"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_has_no_rows_to_train_is_refused_as_in_peft(case):
    rows, kind, said = UNFIT[case]
    copied = ["embed_tokens"] if "whole" in case else None
    for lib in (diffpeft, *([] if "list" in case else [peft])):  # in which a list has no weight
        base = llama()
        with pytest.raises(kind, match=said):
            lib.get_peft_model(
                base, lib.LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows, modules_to_save=copied)
            )
        if lib is diffpeft:
            assert not any("adapters" in name or "copies" in name for name, _ in base.named_modules())


def test_the_tables_whose_names_end_so_are_meant_as_in_peft():
    keys = []
    for lib in (peft, diffpeft):
        net = nn.ModuleDict(
            {
                "emb": nn.Embedding(6, 4),
                "my_emb": nn.Embedding(6, 4),
                "embed": nn.Embedding(6, 4),
                "lin": nn.Linear(4, 4),
            }
        )
        wrapped = lib.get_peft_model(
            net, lib.LoraConfig(target_modules=["lin"], trainable_token_indices={"emb": [1, 3]})
        )
        keys.append({*lib.get_peft_model_state_dict(wrapped)})
    assert keys[0] == keys[1]
