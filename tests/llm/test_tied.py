"""Whole copies of embedding and head (`modules_to_save`) where these share a weight, through merging, saving and loading. PEFT's answers stand beside."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import diffpeft
from diffpeft import CheckpointError, ConfigError, LoraConfig, PeftModel, get_peft_model
from tests.llm.models import batch, output
from tests.llm.models import model as made

SAME = dict(rtol=1e-4, atol=1e-5)  # float32; merging rounds once
WHICH = {
    "embed": ["embed_tokens"],
    "head": ["lm_head"],
    "both": ["embed_tokens", "lm_head"],
}
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:.*no longer tied")


def llama(tied: bool):
    model = made("llama")
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    return model


def run(model, kind="llama"):
    with torch.no_grad():
        return output(model(**batch(kind)))


def spread(wrapped, name="default", seed=1):
    """Give all that is trained values of a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted(wrapped.named_parameters(), key=lambda row: row[0]):
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=generator) * 0.3
    return wrapped


def config(lib, which, **more):
    return lib.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=list(WHICH[which]), task_type="CAUSAL_LM", **more
    )


def tables(model):
    """The parameters that embedding and head hold themselves."""
    return [m._parameters["weight"] for m in (model.get_input_embeddings(), model.get_output_embeddings())]


@pytest.fixture(params=[(which, tied) for which in WHICH for tied in (True, False)], ids=str)
def case(request):
    """A wrapped model with trained copies, its logits, and those of PEFT with the same tensors."""
    which, tied = request.param
    wrapped = spread(get_peft_model(llama(tied), config(diffpeft, which)))
    theirs = peft.get_peft_model(llama(tied), config(peft, which))
    peft.set_peft_model_state_dict(theirs, diffpeft.get_peft_model_state_dict(wrapped))
    want = run(wrapped)
    torch.testing.assert_close(run(theirs), want, **SAME)
    assert not torch.allclose(want, run(llama(tied)), **SAME)
    return wrapped, want, theirs, which, tied


def test_merged_for_good_the_logits_stay_and_a_saved_model_loads(case, tmp_path):
    wrapped, want, theirs, _, tied = case
    plain = wrapped.merge_and_unload()
    torch.testing.assert_close(run(plain), want, **SAME)
    torch.testing.assert_close(run(theirs.merge_and_unload()), want, **SAME)
    one, other = tables(plain)
    assert one is not other and plain.config.tie_word_embeddings is False
    assert list(plain.state_dict()) == list(llama(tied).state_dict())
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(run(AutoModelForCausalLM.from_pretrained(tmp_path)), want, **SAME)
    assert "lm_head.weight" not in plain.all_tied_weights_keys


def test_untying_is_said_and_only_where_it_happens(case):
    wrapped, _, _, _, tied = case
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped.merge_and_unload()
    assert any("no longer tied" in str(w.message) for w in caught) == tied


@pytest.mark.parametrize("way", ["merge_adapter", "fuse"])
def test_merged_and_taken_out_again_bytes_and_tie_are_as_they_were(case, way):
    wrapped, want, _, _, tied = case
    plain, like = wrapped.get_base_model(), llama(tied)
    for _ in range(2):
        wrapped.merge_adapter() if way == "merge_adapter" else diffpeft.fuse(plain)
        torch.testing.assert_close(run(wrapped), want, **SAME)
        wrapped.unmerge_adapter() if way == "merge_adapter" else diffpeft.unfuse(plain)
        assert torch.equal(run(wrapped), want)
        one, other = tables(plain)
        assert (one is other) == tied and plain.config.tie_word_embeddings == tied
    with wrapped.disable_adapter():
        assert torch.equal(run(wrapped), run(like))
    gone = wrapped.unload()
    assert list(gone.state_dict()) == list(like.state_dict())
    assert all(torch.equal(t, like.state_dict()[k]) for k, t in gone.state_dict().items())


def test_saved_adapters_load_here_and_in_peft(case, tmp_path):
    wrapped, want, theirs, _, tied = case
    wrapped.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        torch.testing.assert_close(run(PeftModel.from_pretrained(llama(tied), tmp_path / folder)), want, **SAME)
    torch.testing.assert_close(run(peft.PeftModel.from_pretrained(llama(tied), tmp_path / "ours")), want, **SAME)


def test_an_interrupt_of_the_merge_changes_nothing(case, monkeypatch):
    wrapped, want, _, _, tied = case
    plain = wrapped.get_base_model()

    def broken(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("diffpeft.model.plan.settle", broken)
        with pytest.raises(KeyboardInterrupt):
            wrapped.merge_and_unload()
    one, other = tables(plain)
    assert torch.equal(run(wrapped), want) and (one is other) == tied and plain.config.tie_word_embeddings == tied
    assert list(wrapped.peft_config) == ["default"]


def test_what_needs_no_untying_stays_tied():
    wrapped = get_peft_model(llama(True), config(diffpeft, "both"))
    nn.init.normal_(wrapped.base_model.model.model.layers[0].self_attn.q_proj.adapters.default.lora_B)
    want = run(wrapped)
    plain = wrapped.merge_and_unload()
    one, other = tables(plain)  # both copies are as they were made
    assert one is other and plain.config.tie_word_embeddings
    torch.testing.assert_close(run(plain), want, **SAME)


def test_a_layer_whose_tie_a_copy_undoes_can_be_merged():
    fields = dict(r=4, target_modules=["lm_head"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="share their weight"):
        wrapped = spread(get_peft_model(llama(True), LoraConfig(**fields)))
    want = run(wrapped)
    torch.testing.assert_close(run(wrapped.merge_and_unload()), want, **SAME)


@pytest.mark.parametrize(("kind", "names"), [("gpt2", ["wte", "lm_head"]), ("t5", ["lm_head"]), ("gpt2", ["lm_head"])])
def test_other_models_survive_too(kind, names, tmp_path):
    """A T5 keeps `tie_word_embeddings`: its encoder and decoder stay tied, and the field means more there."""
    targets = {"gpt2": ["c_attn"], "t5": ["q"]}[kind]
    wrapped = spread(get_peft_model(made(kind), LoraConfig(r=4, target_modules=targets, modules_to_save=names)))
    want = run(wrapped, kind)
    plain = wrapped.merge_and_unload()
    torch.testing.assert_close(run(plain, kind), want, **SAME)
    assert plain.config.tie_word_embeddings == (kind == "t5")
    plain.save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    torch.testing.assert_close(run(auto.from_pretrained(tmp_path), kind), want, **SAME)


def test_copies_and_pickles_of_a_model_with_copies():
    wrapped = spread(get_peft_model(llama(True), config(diffpeft, "both")))
    want = run(wrapped)
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(run(other), want)
        one, tied = tables(other.get_base_model())
        assert one is tied
        torch.testing.assert_close(run(other.merge_and_unload()), want, **SAME)


# ensure_weight_tying

ENSURED = {
    "embed": dict(modules_to_save=["embed_tokens"]),
    "head": dict(modules_to_save=["lm_head"]),
    "both": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "lora, embed": dict(target_modules=["q_proj", "embed_tokens"]),
    "lora, head": dict(target_modules=["q_proj", "lm_head"]),
    "lora, both": dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
}


def ensured(lib, which, **more):
    fields = {"r": 4, "target_modules": ["q_proj"], **copy.deepcopy(ENSURED[which]), **more}
    return lib.LoraConfig(ensure_weight_tying=True, task_type="CAUSAL_LM", **fields)


def counted(wrapped):
    return sorted(tuple(p.shape) for p in wrapped.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:.*share their weight", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("which", ENSURED)
def test_tied_copies_and_loras_are_trained_and_saved_as_in_peft(which, tmp_path):
    models = {}
    for lib in (peft, diffpeft):
        wrapped = models[lib] = lib.get_peft_model(llama(True), ensured(lib, which))
        own = lib.get_peft_model_state_dict(wrapped) if lib is diffpeft else own_of(wrapped)
        generator = torch.Generator().manual_seed(1)
        keys = [k for k in sorted(own) if ("embed" in k or "q_proj" in k) and "base_layer" not in k]
        values = {k: torch.randn(own[k].shape, generator=generator) * 0.3 for k in keys}
        for key, tensor in list(values.items()):
            turned = {"lora_embedding_A": "lora_B", "lora_embedding_B": "lora_A"}
            for end, other in turned.items():
                if key.endswith(end):
                    values[f"base_model.model.lm_head.{other}.weight"] = tensor.T.contiguous()
        if "base_model.model.model.embed_tokens.weight" in values:
            values["base_model.model.lm_head.weight"] = values["base_model.model.model.embed_tokens.weight"]
        lib.set_peft_model_state_dict(wrapped, values)
        optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            wrapped(**batch(), labels=batch()["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    ours, theirs = models[diffpeft], models[peft]
    assert counted(ours) == counted(theirs)
    want = run(theirs)
    torch.testing.assert_close(run(ours), want, **SAME)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert {*first} >= {*second} and {k.replace("base_layer.", "") for k in first} >= {*second} - {*first}
    for folder in ("ours", "theirs"):
        again = PeftModel.from_pretrained(llama(True), tmp_path / folder)
        torch.testing.assert_close(run(again), want, **SAME)
    torch.testing.assert_close(run(peft.PeftModel.from_pretrained(llama(True), tmp_path / "ours")), want, **SAME)
    assert_trained_on_as_in_peft(tmp_path / "theirs")
    shared, base = tables(ours.get_base_model())[0], llama(True).state_dict()
    for _ in range(2):  # PEFT adds a tied LoRA twice
        ours.merge_adapter()
        torch.testing.assert_close(run(ours), want, **SAME)
        ours.unmerge_adapter()
        assert all(table is shared for table in tables(ours.get_base_model()))
        assert torch.equal(shared, base["lm_head.weight"])
    plain = ours.merge_and_unload()
    one, other = tables(plain)
    assert one is other and plain.config.tie_word_embeddings
    torch.testing.assert_close(run(plain), want, **SAME)


def assert_trained_on_as_in_peft(folder):
    found = []
    for lib in (peft, diffpeft):
        wrapped = lib.PeftModel.from_pretrained(llama(True), folder, is_trainable=True)
        wrapped.eval()(**batch(), labels=batch()["input_ids"]).loss.backward()
        torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1).step()
        found.append(run(wrapped))
    torch.testing.assert_close(found[1], found[0], **SAME)


def own_of(wrapped):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model_state_dict(wrapped)


def test_a_file_whose_tied_weights_differ_is_refused(tmp_path):
    wrapped = get_peft_model(llama(True), ensured(diffpeft, "both"))
    tensors = diffpeft.get_peft_model_state_dict(wrapped)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"] + 1
    want = run(wrapped)
    with pytest.raises(CheckpointError, match="ensure_weight_tying"):
        diffpeft.set_peft_model_state_dict(wrapped, tensors)
    assert torch.equal(run(wrapped), want)


@pytest.mark.parametrize(
    ("tied", "fields", "said"),
    [
        (False, dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True), "no tied modules were found"),
        (True, dict(ensure_weight_tying=True), "no tied modules are added"),
        (True, dict(modules_to_save=["embed_tokens"]), "is not set to True"),
    ],
)
def test_what_is_said_of_ties_is_what_peft_says(tied, fields, said):
    for lib in (peft, diffpeft):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lib.get_peft_model(llama(tied), lib.LoraConfig(r=4, target_modules=["q_proj"], **fields))
        assert any(said in str(w.message) for w in caught), lib


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("state", ["tied", "said not to be", "loose"])
@pytest.mark.parametrize("kind", ["LoraConfig", "LoraConfig, ensured", "LoKrConfig"])
def test_what_is_said_and_done_about_ties_is_as_in_peft(kind, state, how, names):
    """The ties that count are those that the model's config says."""
    config_class, _, ensured_ = kind.partition(", ")
    # PEFT has no LoKr on embeddings
    meant = [n for n in names if how == "modules_to_save" or kind != "LoKrConfig" or n != "embed_tokens"]
    ensure = {"ensure_weight_tying": True} if ensured_ else {}
    phrases = ("no tied modules were found", "is not set to True", "no implementation exists to tie", "no tied modules")
    said, tied = [], []
    for lib in (peft, diffpeft):
        base = llama(state != "loose")
        base.config.tie_word_embeddings = state == "tied"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fields = {"target_modules": ["q_proj"], how: [*(["q_proj"] if how == "target_modules" else []), *meant]}
            wrapped = lib.get_peft_model(base, getattr(lib, config_class)(r=4, **fields, **ensure))
        told = " ".join(str(w.message) for w in caught)
        said.append([phrase for phrase in phrases if phrase in told])
        tensors = lib.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        tied.append(sum("lm_head" in key or "embed_tokens" in key for key in tensors))
    assert said[0] == said[1] and tied[0] == tied[1]


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_merge_unties_layers_that_adapters_are_on(names, tmp_path):
    """PEFT would change the other layer too."""
    with pytest.warns(UserWarning, match="merging unties"):
        wrapped = get_peft_model(llama(True), LoraConfig(r=4, target_modules=names, init_lora_weights=False)).eval()
    plain, want = wrapped.get_base_model(), run(wrapped)
    assert not torch.allclose(want, run(llama(True)), **SAME)
    for _ in range(2):
        wrapped.merge_adapter()
        one, other = tables(plain)
        assert one is not other
        torch.testing.assert_close(run(wrapped), want, **SAME)
        with wrapped.disable_adapter():
            assert torch.equal(run(wrapped), run(llama(True)))
        torch.testing.assert_close(run(wrapped), want, **SAME)
        wrapped.unmerge_adapter()
        one, other = tables(plain)
        assert one is other and torch.equal(run(wrapped), want)
    for start in ("plain", "merged"):
        if start == "merged":
            wrapped.merge_adapter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            merged = copy.deepcopy(wrapped).merge_and_unload()
        assert any("no longer tied" in str(w.message) for w in caught) and not merged.config.tie_word_embeddings
        torch.testing.assert_close(run(merged), want, **SAME)
        merged.save_pretrained(tmp_path / start)
        torch.testing.assert_close(run(AutoModelForCausalLM.from_pretrained(tmp_path / start)), want, **SAME)


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["q_proj"]])
def test_a_tie_that_only_the_config_knows_of_is_taken_out_of_it_by_a_merge(names):
    """So transformers leaves a model whose files have other weights for embedding and head."""
    configs = []
    for lib in (peft, diffpeft):
        base = llama(False)
        base.config.tie_word_embeddings = True
        wrapped = lib.get_peft_model(base, lib.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        with pytest.warns(UserWarning, match="Setting.*tie_word_embeddings"):
            configs.append(wrapped.merge_and_unload().config.tie_word_embeddings)
    assert configs == [False, False]


def test_fuse_still_refuses_to_untie():
    wrapped = get_peft_model(llama(True), LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    with pytest.raises(diffpeft.AdapterStateError, match="tied"):
        diffpeft.fuse(wrapped.get_base_model())


@pytest.mark.filterwarnings("ignore:.*share their weight")
def test_what_cannot_be_tied_is_refused():
    for fields in (dict(use_dora=True), dict(init_lora_weights="pissa")):
        model = llama(True)
        with pytest.raises(ConfigError, match="ensure_weight_tying"):
            get_peft_model(model, ensured(diffpeft, "lora, embed", **fields))
        assert list(model.state_dict()) == list(llama(True).state_dict())
    rows = {"embed_tokens": [1], "lm_head": [2]}
    for lib in (peft, diffpeft):
        with pytest.raises(ValueError, match="different token indices"):
            lib.get_peft_model(llama(True), ensured(lib, "embed", modules_to_save=None, trainable_token_indices=rows))
    with pytest.raises(ConfigError, match="ensure_weight_tying"):
        diffpeft.attach(llama(True), LoraConfig(ensure_weight_tying=True), targets=["q_proj"])


@pytest.mark.filterwarnings("ignore:.*share their weight")
@pytest.mark.parametrize("fields", [dict(target_modules=["q", "shared"]), dict(modules_to_save=["lm_head"])])
def test_all_that_is_tied_gets_the_same(fields):
    """A T5 has one weight in four places."""
    config = LoraConfig(r=4, ensure_weight_tying=True, **{"target_modules": ["q"], **fields})
    wrapped = spread(get_peft_model(made("t5"), config)).eval()
    want = run(wrapped, "t5")
    wrapped.merge_adapter()
    torch.testing.assert_close(run(wrapped, "t5"), want, **SAME)
    wrapped.unmerge_adapter()
    plain = wrapped.merge_and_unload()
    torch.testing.assert_close(run(plain, "t5"), want, **SAME)
    shared = plain.shared.weight
    assert shared is plain.lm_head.weight is plain.encoder.embed_tokens.weight is plain.decoder.embed_tokens.weight
