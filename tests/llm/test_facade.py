"""PeftModel under PEFT's names: nothing public is missing; what stands around a model, its configs, its card and its way to the Hub."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import DynamicCache

import diffpeft
from diffpeft import ConfigError, LoraConfig, PeftModel, get_peft_model
from diffpeft.llm.tuner import Tuner
from tests.llm.models import TASKS, batch, model, output, run

CLASSES = [name for name in peft.__all__ if name.startswith("PeftModel")] + ["PeftMixedModel", "PeftConfig"]
# {class: {public name that is not here: why}}
ABSENT = {
    "PeftMixedModel": {
        "set_modules_to_save": "add_adapter does it",
        "merge_and_unload": "the tuner's, which the model hands on",
    },
    "BaseTuner": {
        "tuner_layer_cls": "layers keep their classes",
        "target_module_mapping": "peft.utils.constants has the tables",
        "get_model_config": "of a model of transformers, model.config.to_dict() is that",
        "subtract_mutated_init": "inits never change the base, and save_pretrained writes a LoRA of twice the rank",
    },
}


def public(cls) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_") and not hasattr(nn.Module, name)}


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_name_of_a_class_is_here_or_has_a_reason(name):
    theirs, ours = getattr(peft, name), getattr(diffpeft, name)
    missing = {n for n in public(theirs) if not hasattr(ours, n)}
    assert missing == {*ABSENT.get(name, ())}, missing
    for method in sorted(public(theirs) - missing):
        if not inspect.isroutine(getattr(theirs, method)):
            continue
        wanted, taken = (inspect.signature(getattr(cls, method)).parameters for cls in (theirs, ours))
        rest = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        named = (n for n, p in wanted.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        lacking = {n for n in named if n not in taken}
        assert rest or not lacking, (method, lacking)


def test_every_public_name_of_a_tuner_is_there_or_has_a_reason():
    tuner = get_peft_model(model(), LoraConfig(target_modules=["q_proj"])).base_model
    theirs = public(BaseTuner) | public(peft.LoraModel)
    assert {n for n in theirs if not hasattr(tuner, n)} == {*ABSENT["BaseTuner"]}
    assert isinstance(tuner, Tuner) and tuner.prefix == "lora_"


# What is asked of a model


class Custom(nn.Module):
    """No model of transformers, but one with an input embedding."""

    def __init__(self):
        super().__init__()
        self.table, self.lin = nn.Embedding(8, 4), nn.Linear(4, 3)

    def get_input_embeddings(self):
        return self.table

    def forward(self, x):
        return self.lin(self.table(x))


@pytest.mark.parametrize("lib", [peft, diffpeft])
def test_inputs_ask_for_gradients_where_activations_may_be_computed_again(lib):
    plain = model()
    wrapped = lib.get_peft_model(plain, lib.LoraConfig(target_modules=["q_proj"]))
    embeddings = plain.get_input_embeddings()
    ids = batch()["input_ids"]
    assert not embeddings(ids).requires_grad
    wrapped.prepare_model_for_gradient_checkpointing(wrapped)
    assert embeddings(ids).requires_grad
    custom = Custom()  # does not say whether it checkpoints
    wrapped = lib.get_peft_model(custom, lib.LoraConfig(target_modules=["lin"]))
    assert custom.table(ids % 8).requires_grad
    if lib is diffpeft:
        wrapped.unload()
        assert not custom.table._forward_hooks


def test_checkpointing_by_reentrant_calls_trains():
    wrapped = get_peft_model(model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).train()
    wrapped.prepare_model_for_gradient_checkpointing(wrapped)
    wrapped.gradient_checkpointing_enable({"use_reentrant": True})
    wrapped(**batch()).logits.sum().backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_what_a_model_says_of_its_adapters(kind):
    for lib in (peft, diffpeft):
        config = lib.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        if kind == "prompt":
            config = lib.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        wrapped = lib.get_peft_model(model().to(torch.bfloat16), config)
        assert wrapped.base_model_torch_dtype == torch.bfloat16
        assert wrapped.has_active_enabled_adapter
        with wrapped.disable_adapter():
            assert not wrapped.has_active_enabled_adapter
        assert wrapped.has_active_enabled_adapter
        assert wrapped.supports_lora_conversion() == (kind == "lora")


def test_targets_have_their_names():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for lib in (peft, diffpeft):
        layers = lib.get_peft_model(nn.Sequential(*net), lib.LoraConfig(target_modules=["1"], bias="all"))
        assert layers.targeted_module_names == ["1"] and layers.targeted_parameter_names == []
        own = lib.get_peft_model(nn.Sequential(*net), lib.LoraConfig(target_parameters=["0.weight", "1.weight"]))
        assert own.targeted_parameter_names == ["0.weight", "1.weight"]


# Prompts

PROMPTS = {
    "prompt": lambda lib: lib.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p": lambda lib: lib.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "prefix": lambda lib: lib.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "tasks": lambda lib: lib.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, task_type="CAUSAL_LM"),
}


def pair(kind):
    """The same prompt in both libraries, and its tasks."""
    theirs = peft.get_peft_model(model(), PROMPTS[kind](peft)).eval()
    ours = get_peft_model(model(), PROMPTS[kind](diffpeft)).eval()
    own = dict(theirs.prompt_encoder.named_parameters())
    with torch.no_grad():
        for name, p in ours.prompt_encoder.named_parameters():
            p.copy_(own[name])
    return ours, theirs, torch.tensor([0, 1]) if kind == "tasks" else None


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_are_pefts(kind):
    ours, theirs, tasks = pair(kind)
    mine, want = (m.get_prompt_embedding_to_save("default") for m in (ours, theirs))
    torch.testing.assert_close(mine, want)
    mine, want = (m.get_prompt(2, task_ids=tasks) for m in (ours, theirs))
    if kind != "prefix":
        return torch.testing.assert_close(mine, want)
    assert mine.get_seq_length() == want.get_seq_length() == 3
    for a, b in zip(mine.layers, want.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys)
        torch.testing.assert_close(a.values, b.values)


def test_adapters_on_layers_have_no_prompt():
    with pytest.raises(diffpeft.AdapterStateError, match="LORA has no prompts"):
        get_peft_model(model(), LoraConfig(target_modules=["q_proj"])).get_prompt(2)


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_step_that_is_prepared_gives_the_next_token(kind):
    ours, theirs, tasks = pair(kind)
    extra = {} if tasks is None else {"task_ids": tasks}
    ids = batch()["input_ids"]
    with torch.no_grad():
        want = theirs(**batch(), **extra).logits[:, -1]
        step = ours.prepare_inputs_for_generation(
            ids, attention_mask=torch.ones_like(ids), past_key_values=DynamicCache(), is_first_iteration=True, **extra
        )
        torch.testing.assert_close(ours.base_model(**step).logits[:, -1], want, rtol=1e-4, atol=1e-5)


def test_a_model_that_prepares_the_text_alone_gets_its_prompt():
    ours, _, _ = pair("prompt")
    ids = batch()["input_ids"]
    ours.base_model_prepare_inputs_for_generation = lambda *args, **kwargs: {
        "input_ids": ids,
        "attention_mask": torch.ones(2, 1, 7, 7),
        "past_key_values": DynamicCache(),
    }
    step = ours.prepare_inputs_for_generation(ids)
    assert step["input_ids"] is None and step["inputs_embeds"].shape[1] == 3 + 7 and step["attention_mask"] is None


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_four_axes_is_widened(kind, dtype):
    ours, _, tasks = pair(kind)
    extra = {} if tasks is None else {"task_ids": tasks}
    keep = torch.ones(2, 7, dtype=torch.long)
    keep[1, 2] = 0
    square = torch.ones(7, 7).tril().bool() & keep[:, None, None].bool()
    square |= torch.eye(7).bool()  # a row that sees nothing has no softmax
    mask = square if dtype is torch.bool else torch.where(square, 0.0, torch.finfo(dtype).min)
    places = torch.arange(7).expand(2, 7)
    ids = batch()["input_ids"]
    with torch.no_grad():
        if kind != "prefix":
            mine, want = (ours(ids, attention_mask=m, **extra).logits for m in (mask, keep))
        else:
            mine, want = (ours(ids, attention_mask=m, position_ids=places).logits for m in (mask, keep))
    kept = [i for i in range(len(mine[1])) if i != mine.shape[1] - 7 + 2]
    torch.testing.assert_close(mine[:, kept], want[:, kept], rtol=1e-4, atol=1e-5)


def test_a_translator_generates_from_arguments_by_name():
    for lib in (peft, diffpeft):
        wrapped = lib.get_peft_model(model("t5"), lib.LoraConfig(target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
        with pytest.raises(TypeError):
            wrapped.generate(batch("t5")["input_ids"])


@pytest.mark.parametrize("kind", ["llama", "t5", "bert-cls"])
def test_arguments_without_names_are_pefts(kind):
    """The third is `inputs_embeds`, whatever the model calls its third."""
    target = {"llama": "q_proj", "t5": "q", "bert-cls": "query"}[kind]
    outputs = []
    for lib in (peft, diffpeft):
        torch.manual_seed(0)
        config = lib.LoraConfig(target_modules=[target], task_type=TASKS[kind], init_lora_weights=False)
        wrapped = lib.get_peft_model(model(kind), config).eval()
        embeds = wrapped.get_input_embeddings()(batch(kind)["input_ids"])
        rest = (batch(kind)["decoder_input_ids"],) if kind == "t5" else ()
        with torch.no_grad():
            outputs.append(output(wrapped(None, batch(kind)["attention_mask"], embeds, *rest)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


# Configs


def settled(config) -> dict:
    return {name: value for name, value in config.to_dict().items() if name in ("target_modules", "modules_to_save")}


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_a_models_config_is_the_object_that_was_given(kind, tmp_path):
    kinds = {
        "lora": lambda: LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        "prompt": lambda: diffpeft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    first, second = kinds[kind](), kinds[kind]()
    wrapped = get_peft_model(model(), first)
    assert wrapped.peft_config["default"] is first
    wrapped.add_adapter("other", second)
    assert wrapped.peft_config["other"] is second
    if kind == "lora":  # what the model settles is in it, as in PEFT
        assert "q_proj" in {name.rpartition(".")[2] for name in first.target_modules}
        assert settled(first) == settled(second)
    first.inference_mode = True
    assert wrapped.peft_config["default"].inference_mode
    wrapped.save_pretrained(tmp_path, selected_adapters=["default"])
    third = kinds[kind]()
    loaded = PeftModel.from_pretrained(model(), tmp_path, config=third)
    assert loaded.peft_config["default"] is third and third.inference_mode


def test_a_config_is_left_alone_by_what_fails():
    config = LoraConfig(target_modules="all-linear", modules_to_save=["nowhere", "lm_head"], r=0)
    before = config.to_dict()
    with pytest.raises(ConfigError):
        get_peft_model(model(), config)
    assert {**config.to_dict(), "base_model_name_or_path": None} == {**before, "base_model_name_or_path": None}


# A second get_peft_model


def test_a_second_adapter_takes_the_place_of_one_of_its_name_with_a_warning():
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    want, x = net[0].weight.clone(), torch.randn(3, 6)
    first = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
    first.add_adapter("other", LoraConfig(target_modules=["0"], init_lora_weights=False))
    plain = nn.functional.linear(nn.functional.linear(x, want, net[0].bias), net[1].weight, net[1].bias)
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        second = get_peft_model(net, LoraConfig(target_modules=["1"]))
    torch.testing.assert_close(second(x), plain)  # fresh, and alone
    assert second.active_adapters == ["default"] and {*second.peft_config} == {"default", "other"}
    assert second.targeted_module_names == ["1", "0"] and second.peft_config["default"].target_modules == {"1"}
    second.set_adapter("other")
    assert not torch.allclose(second(x), plain)
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        third = get_peft_model(second, LoraConfig(target_modules="base_model.model.0"), "third")
    assert third.active_adapters == ["third"] and third.get_base_model() is net
    torch.testing.assert_close(third(x), plain)
    third.unload()
    assert type(net[0]) is nn.Linear and torch.equal(net[0].weight, want)


# Model cards


def card(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("named", [True, False])
def test_a_card_says_what_pefts_does(task, named, tmp_path):
    cards = []
    for lib in (peft, diffpeft):
        base = model()
        base.add_model_tags(["mine"])
        if named:
            base.name_or_path = base.config._name_or_path = "someone/base"
        config = lib.LoraConfig(target_modules=["q_proj"], task_type=task)
        folder = tmp_path / lib.__name__
        lib.get_peft_model(base, config).save_pretrained(folder, save_embedding_layers=False)
        cards.append(card(folder))
    theirs, ours = (c.data.to_dict() for c in cards)
    if not named:  # PEFT says `base_model:adapter:` there, which is no id
        theirs["tags"].remove("base_model:adapter:")
        assert theirs.pop("base_model", "") == ""
    assert ours == theirs and cards[0].text.strip() == cards[1].text.strip()


def test_a_card_that_is_there_is_kept_and_completed(tmp_path):
    text = "---\nlicense: mit\ntags:\n- poems\nmeta: hello\n---\n\n# Mine\n\nWords.\n"
    (tmp_path / "README.md").write_text(text)
    wrapped = get_peft_model(model(), LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path)
    kept = card(tmp_path)
    assert kept.data["license"] == "mit" and kept.data["meta"] == "hello" and kept.data["library_name"] == "peft"
    assert kept.data["tags"] == ["lora", "poems", "transformers"] and "base_model" not in kept.data.to_dict()
    assert "# Mine\n\nWords." in kept.text and "- PEFT 0.21.2" in kept.text
    before = (tmp_path / "README.md").read_text()
    wrapped.create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == before


@pytest.mark.parametrize("head", ["---\n- a list\n---\n", "---\na: [\n---\n", "\xff"])
def test_a_readme_that_is_no_card_stays_and_is_named(head, tmp_path):
    (tmp_path / "README.md").write_bytes(head.encode("latin-1"))
    with pytest.warns(UserWarning, match="stays as it is"):
        get_peft_model(model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == head.encode("latin-1")
    assert (tmp_path / "adapter_model.safetensors").exists()


# The Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one repository, which has a card."""
    sent, cards = {}, tmp_path / "card.md"
    cards.write_text("---\nlicense: mit\n---\n\nTheirs.\n")

    class Api:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            sent.update(repo=repo_id, private=private)
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **options):
            sent["files"] = {path.name: path.read_text() for path in Path(folder_path).glob("[Ra]*[dn]")}
            sent["options"] = {name: value for name, value in options.items() if value is not None}
            return "done"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: str(cards))
    return sent


def test_a_repositorys_card_is_kept_and_completed(hub):
    wrapped = get_peft_model(model(), LoraConfig(target_modules=["q_proj"]))
    options = dict(commit_message="hello", revision="b", create_pr=True, private=True, token="t", tags=["poems"])
    assert wrapped.push_to_hub("me/adapter", max_shard_size="5GB", **options) == "done"
    pushed = ModelCard(hub["files"]["README.md"])
    assert pushed.data["license"] == "mit" and "Theirs." in pushed.text
    assert pushed.data["tags"] == ["lora", "poems", "transformers"]
    assert (hub["repo"], hub["private"], hub["token"]) == ("me/adapter", True, "t")
    assert hub["options"] == {"commit_message": "hello", "revision": "b", "create_pr": True}


def test_configs_go_to_the_hub(hub):
    assert LoraConfig(r=5).push_to_hub("me/config") == "done"
    assert json.loads(hub["files"]["adapter_config.json"])["r"] == 5


# AutoPeftModel

AUTOS = {
    "llama": "CausalLM",
    "t5": "Seq2SeqLM",
    "bert-cls": "SequenceClassification",
    "bert-tokens": "TokenClassification",
}
AUTOS |= {"bert-qa": "QuestionAnswering", "bert": "FeatureExtraction"}
QUERY = {"llama": "q_proj", "t5": "q"}


@pytest.mark.parametrize("kind", AUTOS)
def test_an_adapter_without_a_task_type_loads_with_every_auto_class(kind, tmp_path):
    model(kind).save_pretrained(tmp_path / "base")
    base = type(model(kind)).from_pretrained(tmp_path / "base").eval()
    config = LoraConfig(target_modules=[QUERY.get(kind, "query")], init_lora_weights=False)
    wrapped = get_peft_model(base, config).eval()
    wrapped.save_pretrained(tmp_path / "one" / "sub")
    made = json.loads((tmp_path / "one" / "sub" / "adapter_config.json").read_text())
    assert made["task_type"] is None and made["auto_mapping"]["parent_library"].startswith("transformers")
    want = run(wrapped, kind)
    for name, options in (
        (f"AutoPeftModelFor{AUTOS[kind]}", {"subfolder": "sub"}),
        ("AutoPeftModel", {"subfolder": "sub", "cache_dir": str(tmp_path)}),
    ):
        loaded = getattr(diffpeft, name).from_pretrained(tmp_path / "one", **options)
        torch.testing.assert_close(run(loaded, kind), want, rtol=1e-4, atol=1e-5)


def test_a_library_beside_the_allowed_ones_is_named_and_may_be_allowed(tmp_path):
    model().save_pretrained(tmp_path / "base")
    base = type(model()).from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields["auto_mapping"] = {"parent_library": "os", "base_model_class": "system"}
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="wants to import 'os' which is not in the import allowlist"):
        diffpeft.AutoPeftModel.from_pretrained(tmp_path / "a")
    fields["auto_mapping"] = {"parent_library": "tests.llm.models", "base_model_class": "LlamaForCausalLM"}
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="import allowlist"):
        diffpeft.AutoPeftModel.from_pretrained(tmp_path / "a")
    loaded = diffpeft.AutoPeftModel.from_pretrained(tmp_path / "a", import_allowlist=["tests.llm"])
    assert type(loaded.get_base_model()).__name__ == "LlamaForCausalLM"


def test_rows_beyond_a_tokenizers_stay(tmp_path):
    from tests.llm.chat import tokenizer

    words, base = tokenizer(), model()
    base.resize_token_embeddings(len(words) + 21)
    base.save_pretrained(tmp_path / "base")
    base = type(model()).from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])).save_pretrained(
        tmp_path / "a"
    )
    words.save_pretrained(tmp_path / "a")
    loaded = diffpeft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    assert loaded.get_input_embeddings().weight.shape[0] == len(words) + 21


@pytest.mark.parametrize(
    "fields", [{"r": 64, "alpha": 5}, {"r": 2, "alpha": 5}, {"r": 64, "alpha": 5, "decompose_both": True}]
)
def test_a_fresh_lokr_is_as_strong_as_pefts(fields):
    """Of two whole halves too: PEFT multiplies these by alpha / r."""
    outputs, files = [], []
    for lib in (peft, diffpeft):
        torch.manual_seed(0)
        base = model()
        torch.manual_seed(1)
        config = lib.LoKrConfig(target_modules=["q_proj"], init_weights=False, **fields)
        wrapped = lib.get_peft_model(base, config).eval()
        outputs.append(run(wrapped))
        files.append(lib.get_peft_model_state_dict(wrapped))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(files[1][key], t) for key, t in files[0].items())
