"""`layer_replication`: layers that are repeated with shared weights and adapters of their own."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import diffpeft
from diffpeft import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    PeftModel,
    UnknownNameError,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*share their weight")
SAME = dict(rtol=1e-5, atol=1e-5)
IDS = torch.tensor([[3, 5, 9, 20, 3, 50], [1, 2, 7, 9, 60, 4]])
SPANS = [[0, 2], [1, 3], [2, 3]]
_SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=96)
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2)), ["q_proj", "down_proj"]),
    "bert": (lambda: BertModel(BertConfig(**_SIZES)), ["query"]),
    "qwen2": (
        lambda: Qwen2ForCausalLM(
            Qwen2Config(**_SIZES, num_key_value_heads=2, use_sliding_window=True, max_window_layers=1, sliding_window=4)
        ),
        ["q_proj"],
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=96, n_positions=64)),
        ["c_attn"],
    ),
}
WITH_PEFT = ["llama", "bert"]  # the others: PEFT knows no list of layers, or forgets the layers' types


def made(kind):
    torch.manual_seed(0)
    return MODELS[kind][0]().eval()


def config(lib, kind, spans=SPANS, **more):
    return lib.LoraConfig(
        **{"r": 4, "target_modules": MODELS[kind][1], "init_lora_weights": False, "layer_replication": spans, **more}
    )


def filled(lib, kind, seed=1):
    wrapped = lib.get_peft_model(made(kind), config(lib, kind))
    generator = torch.Generator().manual_seed(seed)
    own = lib.get_peft_model_state_dict(wrapped)
    own = {key: torch.randn(own[key].shape, generator=generator) * 0.3 for key in sorted(own)}
    lib.set_peft_model_state_dict(wrapped, own)
    return wrapped, own


def out(model):
    with torch.no_grad():
        found = model(input_ids=IDS)
    return found[0]


def stack(model):
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = getattr(own, "model", getattr(own, "transformer", own))
    return inner.layers if hasattr(inner, "layers") else inner.h if hasattr(inner, "h") else inner.encoder.layer


@pytest.mark.parametrize("kind", WITH_PEFT)
def test_layers_keys_and_outputs_are_peft_s(kind):
    theirs, own = filled(peft, kind)
    ours = get_peft_model(made(kind), config(diffpeft, kind))
    assert set(get_peft_model_state_dict(ours)) == set(own) and len(stack(ours)) == 5
    set_peft_model_state_dict(ours, own)
    torch.testing.assert_close(out(ours), out(theirs), **SAME)
    assert ours.config.num_hidden_layers == 5 and len({id(layer) for layer in stack(ours)}) == 5
    assert not torch.allclose(out(ours), out(made(kind)), **SAME)
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(out(ours), out(theirs), **SAME)


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_shared_and_adapters_are_not(kind):
    wrapped, own = filled(diffpeft, kind)
    plain = sum(p.numel() for p in made(kind).parameters())
    assert sum(p.numel() for p in wrapped.parameters()) - sum(t.numel() for t in own.values()) == plain
    assert len({key.split(".lora_")[0] for key in own}) == 5 * len(MODELS[kind][1])
    want = [0, 1, 1, 2, 2]
    base = [dict(layer.named_parameters()) for layer in stack(made(kind))]
    for layer, i in zip(stack(wrapped), want, strict=True):
        mine = {n: p for n, p in layer.named_parameters() if "adapters" not in n}
        assert mine.keys() == base[i].keys() and all(torch.equal(p, base[i][n]) for n, p in mine.items())
    assert torch.isfinite(out(wrapped)).all()


def test_keys_and_values_of_a_cache_are_not_mixed_up():
    for kind in ("llama", "qwen2", "gpt2"):
        wrapped, _ = filled(diffpeft, kind)
        ids = IDS[:1]
        with torch.no_grad():
            whole = wrapped.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
            )
            for _ in range(5):
                ids = torch.cat([ids, wrapped(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(whole, ids), kind


def test_files_go_both_ways(tmp_path):
    theirs, _ = filled(peft, "llama")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(made("llama"), tmp_path / "theirs")
    torch.testing.assert_close(out(ours), out(theirs), **SAME)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(made("llama"), tmp_path / "ours")
    torch.testing.assert_close(out(again), out(theirs), **SAME)


def test_gradients_are_peft_s():
    found = []
    for lib in (peft, diffpeft):
        wrapped, _ = filled(lib, "llama")
        wrapped.train()(input_ids=IDS, labels=IDS).loss.backward()
        grads = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
        assert len(grads) == 20 and all(g is not None for g in grads.values())
        found.append(sorted(float(g.norm()) for g in grads.values()))
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-4, atol=1e-7)


def test_a_second_adapter_says_the_same_or_nothing():
    wrapped, _ = filled(diffpeft, "llama")
    before = out(wrapped)
    wrapped.add_adapter("same", config(diffpeft, "llama", [tuple(span) for span in SPANS]))
    wrapped.add_adapter("none", config(diffpeft, "llama", None))
    assert len(stack(wrapped)) == 5 and torch.equal(out(wrapped), before)
    with pytest.raises(ConfigError, match="layer_replication"):
        wrapped.add_adapter("other", config(diffpeft, "llama", [[0, 1]]))
    assert [*wrapped.peft_config] == ["default", "same", "none"] and len(stack(wrapped)) == 5


def test_taking_the_adapter_off_leaves_the_deeper_model():
    wrapped, _ = filled(diffpeft, "llama")
    with wrapped.disable_adapter():
        want = out(wrapped)
    plain = wrapped.unload()
    assert len(stack(plain)) == 5 and torch.equal(out(plain), want)
    assert not any("adapters" in name for name, _ in plain.named_parameters())


def test_a_merge_gives_layers_that_share_weights_weights_of_their_own():
    """PEFT adds what all of them learnt to the one weight that they share."""
    wrapped, _ = filled(diffpeft, "llama")
    before, parameters = out(wrapped), len(list(wrapped.get_base_model().parameters()))
    for _ in range(2):
        wrapped.merge_adapter()
        torch.testing.assert_close(out(wrapped), before, **SAME)
        wrapped.unmerge_adapter()
        assert torch.equal(out(wrapped), before) and len(list(wrapped.get_base_model().parameters())) == parameters
    plain = wrapped.merge_and_unload()
    torch.testing.assert_close(out(plain), before, **SAME)
    assert not any("adapters" in name for name, _ in plain.named_parameters())
    with pytest.raises(AdapterStateError, match="tied"):  # `fuse` unties nothing
        diffpeft.fuse(filled(diffpeft, "llama")[0].get_base_model())


def test_a_model_without_a_wrapper_has_it_too():
    plain = inject_adapter_in_model(config(diffpeft, "llama"), made("llama"))
    wrapped, own = filled(diffpeft, "llama")
    set_peft_model_state_dict(plain, {k.removeprefix("base_model.model."): t for k, t in own.items()})
    torch.testing.assert_close(out(plain), out(wrapped), **SAME)


def test_tokens_and_modules_go_with_it():
    more = dict(trainable_token_indices=[3, 9], modules_to_save=["lm_head"])
    both = []
    for lib in (peft, diffpeft):
        wrapped = lib.get_peft_model(made("llama"), config(lib, "llama", **more))
        own = lib.get_peft_model_state_dict(wrapped)
        generator = torch.Generator().manual_seed(4)
        own = {key: torch.randn(own[key].shape, generator=generator) * 0.3 for key in sorted(own)}
        lib.set_peft_model_state_dict(wrapped, own)
        both.append((sorted(own), out(wrapped)))
    assert both[0][0] == both[1][0]
    torch.testing.assert_close(both[1][1], both[0][1], **SAME)


@pytest.mark.parametrize("spans", [[[0, 4]], [[2, 1]], [[1, 1]], [[-1, 2]], [[0]], [["a", 2]], [3]])
def test_spans_outside_the_model_are_refused(spans):
    model = made("llama")
    old = model.model.layers
    with pytest.raises(ConfigError, match="layer_replication"):
        get_peft_model(model, config(diffpeft, "llama", spans))
    assert model.model.layers is old


def test_models_without_a_known_list_of_layers_are_refused():
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96)
    for model in (T5ForConditionalGeneration(T5Config(**sizes)), nn.Sequential(nn.Linear(4, 4))):
        with pytest.raises(ConfigError, match="could not locate the layers"):
            get_peft_model(model, LoraConfig(target_modules=["q", "0"], layer_replication=SPANS))


@pytest.mark.parametrize("kind", MODELS)
def test_a_failure_leaves_the_model_as_it_was(kind, tmp_path):
    model = made(kind)
    before, old = out(model), stack(model)
    fields = model.config.to_dict()
    with pytest.raises(UnknownNameError):
        get_peft_model(model, config(diffpeft, kind, target_modules=["nothing"]))
    wrapped, _ = filled(diffpeft, kind)
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(model, tmp_path)
    assert stack(model) is old and model.config.to_dict() == fields
    assert torch.equal(out(model), before)
