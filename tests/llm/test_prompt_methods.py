"""Prompt methods against PEFT: the same weights give the same outputs, losses, gradients, tokens and files."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
import warnings

import peft
import pytest
import torch
import transformers
from peft.utils.other import _prepare_prompt_learning_config
from torch import nn

from diffpeft.errors import (
    ConfigError,
    DiffpeftError,
    MissingKeysError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownNameError,
)
from diffpeft.llm.multitask_prompt_tuning import MultitaskPromptTuningConfig
from diffpeft.llm.p_tuning import PromptEncoderConfig
from diffpeft.llm.prefix_tuning import PrefixTuningConfig, _devices
from diffpeft.llm.prompt import complete
from diffpeft.llm.prompt_tuning import PromptTuningConfig
from diffpeft.llm.prompts import PROMPTS, Prompts
from diffpeft.methods.peft_config import PeftConfig

N = 3
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 128,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 128,
    "num_labels": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 128,
    "n_positions": 40,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "vocab_size": 128,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 128,
    "max_position_embeddings": 40,
    "dropout": 0.0,
}
GEMMA = {**LLAMA, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "Bert": BERT,
    "Roberta": BERT,
    "Llama": LLAMA,
    "GPT2": GPT2,
    "T5": T5,
    "Bart": BART,
    "Gemma2": GEMMA,
    "Gemma3Text": GEMMA,
}
MODELS = {  # name: (config, class, task)
    "llama": ("Llama", "LlamaForCausalLM", "CAUSAL_LM"),
    "gpt2": ("GPT2", "GPT2LMHeadModel", "CAUSAL_LM"),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", "CAUSAL_LM"),
    "gemma3": ("Gemma3Text", "Gemma3ForCausalLM", "CAUSAL_LM"),
    "t5": ("T5", "T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    "bart": ("Bart", "BartForConditionalGeneration", "SEQ_2_SEQ_LM"),
    "bert-seq": ("Bert", "BertForSequenceClassification", "SEQ_CLS"),
    "roberta-seq": ("Roberta", "RobertaForSequenceClassification", "SEQ_CLS"),
    "llama-seq": ("Llama", "LlamaForSequenceClassification", "SEQ_CLS"),
    "bert-token": ("Bert", "BertForTokenClassification", "TOKEN_CLS"),
    "roberta-token": ("Roberta", "RobertaForTokenClassification", "TOKEN_CLS"),
    "bert-qa": ("Bert", "BertForQuestionAnswering", "QUESTION_ANS"),
    "llama-qa": ("Llama", "LlamaForQuestionAnswering", "QUESTION_ANS"),
    "bert-features": ("Bert", "BertModel", "FEATURE_EXTRACTION"),
    "llama-features": ("Llama", "LlamaModel", "FEATURE_EXTRACTION"),
}
METHODS = {  # name: (our config, PEFT's, fields)
    "prompt": (PromptTuningConfig, peft.PromptTuningConfig, {}),
    "vocab": (PromptTuningConfig, peft.PromptTuningConfig, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": (PromptEncoderConfig, peft.PromptEncoderConfig, {"encoder_hidden_size": 20}),
    "lstm": (
        PromptEncoderConfig,
        peft.PromptEncoderConfig,
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 20, "encoder_num_layers": 3},
    ),
    "prefix": (PrefixTuningConfig, peft.PrefixTuningConfig, {}),
    "projection": (
        PrefixTuningConfig,
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 20},
    ),
    "multitask": (MultitaskPromptTuningConfig, peft.MultitaskPromptTuningConfig, {"num_tasks": 3, "num_ranks": 2}),
}
QA_OUT = ("start_logits", "end_logits")


def base(model: str) -> tuple[nn.Module, str]:
    kind, cls, task = MODELS[model]
    torch.manual_seed(0)
    fields = CONFIGS[kind] | ({"num_labels": 2} if task == "QUESTION_ANS" else {})
    return getattr(transformers, cls)(getattr(transformers, f"{kind}Config")(**fields)).eval(), task


def pair(model: str, method: str, **fields):
    """(our Prompts, our config, PEFT's model) with the same weights, the encoders' far from their start."""
    torch.manual_seed(0)
    ours, task = base(model)
    theirs = copy.deepcopy(ours)
    own, other, options = METHODS[method]
    options = {"task_type": task, "num_virtual_tokens": N, **options, **fields}
    config, prompts = own(**copy.deepcopy(options)), Prompts(ours, task)
    torch.manual_seed(1)
    encoder = prompts.add("default", config)
    torch.manual_seed(1)
    reference = peft.get_peft_model(theirs, other(**copy.deepcopy(options)))
    for (name, p), (other_name, q) in zip(
        encoder.named_parameters(), reference.prompt_encoder["default"].named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(p, q), f"{name}: not the same start from the same seed"
        with torch.no_grad():
            p += 0.3 * torch.randn_like(p)
            q.copy_(p)
    return prompts.eval(), config, reference.eval()


def inputs(model: str, labels: bool = True, left: bool = False) -> dict:
    """A batch of 3 rows of 7 tokens, two of them padded."""
    generator = torch.Generator().manual_seed(3)
    task = MODELS[model][2]
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :2] = mask[2, :3] = 0
    mask = mask if left else mask.flip(1)
    ids = torch.randint(3, 128, (3, 7), generator=generator)
    given = {"input_ids": ids * mask, "attention_mask": mask}
    targets = {
        "CAUSAL_LM": {"labels": ids.masked_fill(mask == 0, -100)},
        "SEQ_2_SEQ_LM": {"labels": torch.tensor([[5, 9, 4, -100], [6, 7, 8, 9], [3, 5, -100, -100]])},
        "SEQ_CLS": {"labels": torch.tensor([0, 2, 1])},
        "TOKEN_CLS": {"labels": (ids % 3).masked_fill(mask == 0, -100)},
        "QUESTION_ANS": {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 4, 3])},
        "FEATURE_EXTRACTION": {},
    }[task]
    return given | (targets if labels else {})


def outputs(out) -> list[torch.Tensor]:
    names = ("loss", "logits", "last_hidden_state", "pooler_output", *QA_OUT)
    return [t for name in names if (t := getattr(out, name, None)) is not None]


def task_ids(method: str) -> dict:
    return {"task_ids": torch.tensor([2, 0, 1])} if method == "multitask" else {}


def close(a, b, **tolerance) -> None:
    torch.testing.assert_close(a, b, **({"rtol": 1e-5, "atol": 1e-6} | tolerance))


def peft_fails(model: str, method: str) -> bool:
    """PEFT does not lengthen the labels of tokens."""
    return MODELS[model][2] == "TOKEN_CLS" and method not in ("prefix", "projection")


CELLS = [
    (model, method)
    for model, (_, _, task) in MODELS.items()
    for method in METHODS
    if not (method == "multitask" and task in ("QUESTION_ANS", "FEATURE_EXTRACTION"))  # PEFT loses their task_ids
    and not (method in ("vocab", "lstm") and model not in ("llama", "t5"))  # other ways to the same calls
]


def same_keys_and_file(prompts, config, reference) -> None:
    head = ("classifier", "score", "qa_outputs")

    def shapes(state):
        return {k: tuple(t.shape) for k, t in state.items() if not any(part in k for part in head)}

    assert shapes(prompts.state_dict()) == shapes(reference.state_dict())
    file = {k: t for k, t in peft.get_peft_model_state_dict(reference).items() if not k.startswith("base_model")}
    state = prompts.state("default", config)
    assert list(state) == list(file)
    for name in file:
        close(state[name], file[name])


@pytest.mark.parametrize(("model", "method"), CELLS)
def test_keys_file_outputs_loss_and_gradients_are_those_of_peft(model, method):
    prompts, config, reference = pair(model, method)
    same_keys_and_file(prompts, config, reference)
    prompts.train(), reference.train()
    given = inputs(model, labels=not peft_fails(model, method)) | task_ids(method)
    ours, theirs = prompts("default", config, (), given), reference(**given)
    found, expected = outputs(ours), outputs(theirs)
    assert found and len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    for out, which in ((found, prompts), (expected, reference)):
        (out[0].sum() if out[0].dim() == 0 else out[0].square().mean()).backward()
        assert which.prompt_encoder["default"].embedding.weight.grad.any()
    trained = {name for name, p in prompts.named_parameters() if p.grad is not None}
    assert trained and all(name.startswith("prompt_encoder.default.") for name in trained)
    grads = dict(reference.named_parameters())
    for name, p in prompts.prompt_encoder.named_parameters():
        close(p.grad, grads[f"prompt_encoder.{name}"].grad, atol=1e-6)
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize("model", ["bert-token", "roberta-token"])
def test_labels_of_tokens_where_peft_fails(model):
    prompts, config, reference = pair(model, "prompt")
    given = inputs(model)
    with pytest.raises(ValueError, match="batch_size"):
        reference(**given)
    found = prompts("default", config, (), given)
    rows = found.logits[:, N:].flatten(0, 1)
    close(found.loss, nn.functional.cross_entropy(rows, given["labels"].flatten(), ignore_index=-100))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_a_file_of_peft_gives_the_same_output_in_inference_mode(model, method):
    _, config, reference = pair(model, method)
    loaded, frozen = Prompts(base(model)[0], MODELS[model][2]), copy.deepcopy(config)
    frozen.inference_mode = True
    loaded.add("other", frozen)
    file = peft.get_peft_model_state_dict(reference)
    extra = {"base_model.x": torch.zeros(1)}
    assert set(loaded.load_state("other", frozen, {**file, **extra})) == set(file)
    given = inputs(model) | task_ids(method)
    close(loaded("other", frozen, (), given).logits, reference(**given).logits)
    for name, t in loaded.state("other", frozen).items():
        assert torch.equal(t, file[name])


GENERATIONS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
}


def generated(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        return model(**{"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6, **options})


GENERATED = [
    (model, method, how)
    for model in ("llama", "gpt2", "gemma2", "gemma3", "t5", "bart")
    for method in ("prompt", "mlp", "prefix", "projection", "multitask")
    for how in GENERATIONS
    if how == "greedy" or (model in ("llama", "gpt2", "gemma3", "t5") and method in ("prompt", "prefix", "multitask"))
]


@pytest.mark.parametrize(("model", "method", "how"), GENERATED)
def test_generated_tokens_are_those_of_peft(model, method, how):
    prompts, config, reference = pair(model, method)
    given = inputs(model, labels=False, left=True) | task_ids(method) | GENERATIONS[how]

    def run(**kwargs):
        return generated(lambda **kw: prompts.generate("default", config, (), kw), **kwargs)

    if how == "no cache" and method == "prefix" and model in ("llama", "gemma3"):
        with pytest.raises(RuntimeError, match="must match the size"):  # PEFT's second step
            generated(reference.generate, **given)
        assert torch.equal(run(**given), run(**given | {"use_cache": True}))
        return
    assert torch.equal(run(**given), generated(reference.generate, **given))


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (model, method)
        for model in ("llama", "gpt2", "gemma3", "t5")
        for method in ("prompt", "mlp", "prefix", "multitask")
        if (model, method) != ("t5", "multitask")  # as in PEFT, generation has the encoder's half of the prompt only
    ],
)
def test_generation_follows_the_forward_pass(model, method):
    prompts, config, _ = pair(model, method)
    given = inputs(model, labels=False, left=True) | task_ids(method)
    found = generated(lambda **kwargs: prompts.generate("default", config, (), kwargs), **given)
    decodes = MODELS[model][2] == "SEQ_2_SEQ_LM"
    start = 1 if decodes else given["input_ids"].shape[1]
    for length in range(start, found.shape[1]):
        before = found[:, :length]
        if decodes:
            step = given | {"decoder_input_ids": before}
        else:
            mask = torch.cat((given["attention_mask"], torch.ones(3, length - start, dtype=torch.long)), 1)
            step = given | {"input_ids": before, "attention_mask": mask}
            if method in ("prefix", "projection"):  # generation counts positions of the text without its padding
                step["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        logits = prompts("default", config, (), step).logits[:, -1]
        logits[:, prompts.base_model.generation_config.eos_token_id] = -torch.inf
        assert torch.equal(logits.argmax(-1), found[:, length]), length


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_generation_goes_on_from_a_cache(method):
    prompts, config, _ = pair("llama", method)
    ids = inputs("llama")["input_ids"][1:2]

    def run(ids, **options):
        return generated(lambda **kw: prompts.generate("default", config, (), kw), input_ids=ids, **options)

    told = {"return_dict_in_generate": True, "output_logits": True}
    whole, half = run(ids, **told), {"max_new_tokens": 3, "min_new_tokens": 3, **told}
    first = run(ids, **half)
    rest = run(first.sequences, past_key_values=first.past_key_values, **half)
    assert torch.equal(rest.sequences, whole.sequences)
    close(torch.stack(first.logits + rest.logits), torch.stack(whole.logits))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_generation_in_chunks_and_with_a_static_cache(method):
    prompts, config, _ = pair("llama", method)
    given = inputs("llama", labels=False, left=True)

    def run(**options):
        return generated(lambda **kw: prompts.generate("default", config, (), kw), **given, **options)

    whole = run()
    assert torch.equal(run(prefill_chunk_size=3), whole)
    assert torch.equal(run(cache_implementation="static", disable_compile=True), whole)


def test_generation_from_embeddings_of_the_text():
    prompts, config, _ = pair("llama", "prompt")
    given = inputs("llama", labels=False, left=True)
    whole = generated(lambda **kw: prompts.generate("default", config, (), kw), **given)
    given["inputs_embeds"] = prompts.word_embeddings(given.pop("input_ids"))
    found = generated(lambda **kw: prompts.generate("default", config, (), kw), **given)
    assert torch.equal(found, whole[:, 7:])


@pytest.mark.parametrize(("model", "method"), [("llama", "prompt"), ("llama", "prefix"), ("t5", "prefix")])
def test_generation_leaves_the_model_alone(model, method):
    prompts, config, _ = pair(model, method)
    inner = prompts.base_model
    before = dict(vars(inner))
    given = inputs(model, labels=False)
    generated(lambda **kw: prompts.generate("default", config, (), kw), **given)
    assert vars(inner) == before
    handle = inner.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generated(lambda **kw: prompts.generate("default", config, (), kw), **given)
    handle.remove()
    assert vars(inner) == before


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_threads_generate_with_different_adapters(method):
    prompts, config, _ = pair("llama", method)
    other = copy.deepcopy(config)
    prompts.add("other", other)
    with torch.no_grad():
        prompts.encoder("other").embedding.weight.normal_(std=3)
    given = inputs("llama", labels=False)

    def run(name):
        with torch.no_grad():
            options = {**given, "max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
            return prompts.generate(name, config, (), options)

    alone = {name: run(name) for name in ("default", "other")}
    assert not torch.equal(alone["default"], alone["other"])
    found: dict[str, list] = {"default": [], "other": []}

    def worker(name):
        for _ in range(3):
            found[name].append(run(name))

    threads = [threading.Thread(target=worker, args=(name,)) for name in found]
    [t.start() for t in threads], [t.join() for t in threads]
    for name, results in found.items():
        assert len(results) == 3 and all(torch.equal(out, alone[name]) for out in results)


@pytest.mark.parametrize("model", ["bert-seq", "roberta-seq", "llama-seq"])
@pytest.mark.parametrize(
    ("labels", "count"), [(torch.tensor([0.5, 2.0, 1.0]), 1), (torch.tensor([[1.0, 0.0, 1.0]] * 3), 3)]
)
def test_losses_of_regression_and_of_many_labels(model, labels, count):
    kind, cls, task = MODELS[model]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**CONFIGS[kind], "num_labels": count})
    ours = getattr(transformers, cls)(config).eval()
    theirs = copy.deepcopy(ours)
    prompts, own = Prompts(ours, task), PrefixTuningConfig(task_type=task, num_virtual_tokens=N)
    torch.manual_seed(1)
    prompts.add("default", own)
    torch.manual_seed(1)
    reference = peft.get_peft_model(theirs, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=N)).eval()
    given = inputs(model, labels=False) | {"labels": labels}
    close(prompts("default", own, (), given).loss, reference(**given).loss)


@pytest.mark.parametrize("model", ["bert-seq", "bert-token", "bert-qa", "llama"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_tuples_hidden_states_and_positional_arguments(model, method):
    prompts, config, reference = pair(model, method)
    given = inputs(model, labels=model != "bert-token")
    options = {"output_hidden_states": True, "return_dict": False}
    rest = {k: t for k, t in given.items() if k not in ("input_ids", "attention_mask")}
    args = (given["input_ids"], given["attention_mask"])
    ours = prompts("default", config, args, {**rest, **options})
    theirs = reference(*args, **rest, **options)
    assert type(ours) is tuple
    close(ours[0], theirs[0])
    states = [part for part in ours if type(part) is tuple][-1]
    expected = reference(*args, **rest, **{**options, "return_dict": None}).hidden_states  # PEFT's tuples lack some
    [close(a, b) for a, b in zip(states, expected, strict=True)]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("model", ["llama", "bert-seq", "bert-qa", "t5"])
def test_embeddings_instead_of_ids(model, method):
    prompts, config, reference = pair(model, method)
    given = inputs(model)
    given["inputs_embeds"] = prompts.word_embeddings(given.pop("input_ids")).detach()
    close(prompts("default", config, (), given).loss, reference(**given).loss)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("model", ["llama", "bert-seq", "bert-token", "bert-qa"])
def test_positions_and_token_types(model, method):
    prompts, config, reference = pair(model, method)
    given = inputs(model, labels=model != "bert-token") | {"position_ids": torch.arange(7).repeat(3, 1)}
    if model != "llama":
        given["token_type_ids"] = (torch.arange(7) > 3).long().repeat(3, 1)
    messages = {
        "Position ids": method == "prompt",
        "Token type ids": model == "bert-qa",
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = prompts("default", config, (), given)
    for text, expected in messages.items():
        assert any(text in str(w.message) for w in caught) is expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(outputs(ours)[-1], outputs(reference(**given))[-1])
    types = {"token_type_ids": torch.zeros(3, 7, dtype=torch.long)}
    if model in ("bert-seq", "bert-token"):
        assert not torch.allclose(ours.logits, prompts("default", config, (), given | types).logits)


def test_decoder_inputs_of_several_tasks():
    prompts, config, reference = pair("t5", "multitask")
    given = inputs("t5", labels=False) | task_ids("multitask")
    labels = torch.tensor([[5, 9, 4], [6, 7, 8], [3, 5, 2]])
    decoder = {"decoder_input_ids": torch.tensor([[0, 5, 9], [0, 6, 7], [0, 3, 5]])}
    expected = reference(**given, labels=labels).logits
    close(prompts("default", config, (), given | decoder).logits, expected)
    with pytest.raises(ConfigError, match="decoder"):
        prompts("default", config, (), given)
    prompts.base_model.config.pad_token_id = None
    with pytest.raises(ConfigError, match="pad_token_id"):
        prompts("default", config, (), given | {"labels": labels})


@pytest.mark.parametrize("method", ["prompt", "prefix", "multitask"])
def test_decoder_masks(method):
    prompts, config, reference = pair("t5", method)
    given = inputs("t5") | task_ids(method)
    whole = prompts("default", config, (), given).logits
    given["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 1]])
    ours = prompts("default", config, (), given)
    theirs = reference(**given)
    close(ours.logits, theirs.logits), close(ours.loss, theirs.loss)
    assert not torch.allclose(ours.logits, whole)


def test_dropout_before_a_head():
    _, cls, task = MODELS["bert-seq"]
    torch.manual_seed(0)
    inner = getattr(transformers, cls)(transformers.BertConfig(**BERT, classifier_dropout=0.5))
    other = copy.deepcopy(inner)
    prompts, config = Prompts(inner, task), PrefixTuningConfig(task_type=task, num_virtual_tokens=N)
    torch.manual_seed(1)
    prompts.add("default", config)
    torch.manual_seed(1)
    reference = peft.get_peft_model(other, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=N))
    prompts.train(), reference.train()
    given = inputs("bert-seq")
    torch.manual_seed(2)
    ours = prompts("default", config, (), given).logits
    torch.manual_seed(2)
    close(ours, reference(**given).logits)
    assert not torch.allclose(ours, prompts.eval()("default", config, (), given).logits)


def test_tasks_whose_task_ids_peft_loses():
    prompts, config, _ = pair("bert-qa", "multitask")
    given = inputs("bert-qa")
    with pytest.raises(ConfigError, match="task_ids"):
        prompts("default", config, (), given)
    one, two = (prompts("default", config, (), given | {"task_ids": torch.tensor([i] * 3)}).loss for i in (0, 1))
    assert torch.isfinite(one) and not torch.allclose(one, two)


@pytest.mark.parametrize("method", METHODS)
def test_configs_have_the_fields_and_defaults_of_peft(method):
    own, other, options = METHODS[method]
    left_out = {"peft_version"}
    names = [f.name for f in dataclasses.fields(other) if f.name not in left_out]
    assert {f.name for f in dataclasses.fields(own)} - left_out == set(names)
    for fields in ({}, {"num_virtual_tokens": 4, "modules_to_save": ["a"], **options}):
        ours, theirs = own(**fields).to_dict(), other(**fields).to_dict()
        assert {k: ours[k] for k in names} == {k: theirs[k] for k in names}
    assert own().is_prompt_learning and PROMPTS[own().peft_type]
    read = PeftConfig.from_peft_type(**ours)
    assert type(read) is own and read == own(**fields)


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        ("PromptTuningConfig", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}),
        ("PromptTuningConfig", {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "a"}),
        ("PromptTuningConfig", {"tokenizer_kwargs": {"a": 1}}),
        ("MultitaskPromptTuningConfig", {"prompt_tuning_init": "TEXT"}),
        ("PrefixTuningConfig", {"task_type": "nonsense"}),
    ],
)
def test_configs_refuse_what_peft_refuses(cls, fields):
    own = {c.__name__: c for c, _, _ in METHODS.values()}[cls]
    with pytest.raises(ValueError):
        getattr(peft, cls)(**fields)
    with pytest.raises(ConfigError):
        own(**fields)


@pytest.mark.parametrize(
    ("model", "own", "match"),
    [
        ("llama", PromptTuningConfig(prompt_tuning_init="SAMPLEVOCAB", num_virtual_tokens=2), "SAMPLE_VOCAB"),
        ("llama", PromptEncoderConfig(encoder_reparameterization_type="GRU", num_virtual_tokens=2), "MLP, LSTM"),
        ("llama", PrefixTuningConfig(init_weights="ones", num_virtual_tokens=2), "zero"),
        ("llama", PromptTuningConfig(), "num_virtual_tokens"),
        ("llama", MultitaskPromptTuningConfig(prompt_tuning_init="EXACT_SOURCE_TASK", num_virtual_tokens=2), "path"),
    ],
)
def test_what_cannot_be_made_is_refused_and_nothing_added(model, own, match):
    prompts = Prompts(*base(model))
    keys = list(prompts.state_dict())
    with pytest.raises(ConfigError, match=match):
        prompts.add("default", own)
    assert list(prompts.state_dict()) == keys and not prompts.prompt_tokens
    assert all(p.requires_grad for p in prompts.parameters())


def test_errors_of_use():
    inner, task = base("llama")
    with pytest.raises(ConfigError, match="task_type"):
        Prompts(inner, None)
    prompts, config = Prompts(inner, task), PromptTuningConfig(num_virtual_tokens=2)
    prompts.add("default", config)
    with pytest.raises(ConfigError, match="already exists"):
        prompts.add("default", config)
    with pytest.raises(UnknownNameError, match="default"):
        prompts("defualt", config, (), inputs("llama"))
    with pytest.raises(ConfigError, match="input_ids or inputs_embeds"):
        prompts("default", config, (), {"attention_mask": torch.ones(1, 2)})
    inner.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        prompts.add("other", PrefixTuningConfig(num_virtual_tokens=2))
    prompts.delete("default")
    assert not any("prompt_encoder" in key for key in prompts.state_dict()) and not prompts.prompt_tokens
    with pytest.raises(DiffpeftError, match="does not generate"):
        features = Prompts(*base("bert-features"))
        features.generate("x", config)
    distil = transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=48, vocab_size=128)
    )
    for inner, task in ((distil, "SEQ_CLS"), (distil.distilbert, "FEATURE_EXTRACTION")):
        prompts, config = Prompts(inner, task), PrefixTuningConfig(num_virtual_tokens=2)
        prompts.add("default", config)
        with pytest.raises(ConfigError, match="past key values"):
            prompts("default", config, (), inputs("bert-seq", labels=False))
    with pytest.raises(ConfigError, match="Linear has no get_input_embeddings"):
        sizes = dict(num_virtual_tokens=2, num_layers=1, token_dim=2, num_attention_heads=1)
        Prompts(nn.Linear(2, 2), "CAUSAL_LM").add("default", PromptTuningConfig(**sizes))


def test_files_that_do_not_fit():
    prompts, config, reference = pair("llama", "projection")
    with pytest.raises(ShapeMismatchError, match="inference_mode"):
        prompts.load_state("default", config, peft.get_peft_model_state_dict(reference))
    with pytest.raises(MissingKeysError, match="prompt_embeddings"):
        prompts.load_state("default", config, {})
    prompts, config, _ = pair("llama", "mlp")
    with pytest.warns(UserWarning, match="inference_mode"):
        prompts.load_state("default", config, prompts.state("default", config))
    prompts, config, _ = pair("llama", "multitask")
    file = prompts.state("default", config)
    before = copy.deepcopy(prompts.state_dict())
    wrong = {name: t + 1 for name, t in file.items()} | {"prompt_embeddings": torch.zeros(2, 2)}
    with pytest.raises(ShapeMismatchError):
        prompts.load_state("default", config, wrong)
    with pytest.raises(NonFiniteError):
        prompts.load_state("default", config, {**wrong, "prompt_embeddings": torch.full((N, 32), torch.nan)})
    assert all(torch.equal(t, before[k]) for k, t in prompts.state_dict().items())


SIZED = {
    **{kind: getattr(transformers, f"{kind}Config")(**fields) for kind, fields in CONFIGS.items()},
    "Qwen2": transformers.Qwen2Config(
        hidden_size=64, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=3
    ),
    "Gemma3": transformers.Gemma3Config(text_config=GEMMA),
    "Opt": transformers.OPTConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=3),
    "Bloom": transformers.BloomConfig(hidden_size=64, n_head=4, n_layer=3),
    "mapping": {"n_layer": 2, "n_embd": 12, "n_head": 3, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("kind", SIZED)
@pytest.mark.parametrize("method", ["prompt", "mlp", "prefix", "multitask"])
def test_sizes_are_read_as_peft_reads_them(kind, method):
    own, other, _ = METHODS[method]
    for fields in ({}, {"token_dim": 24, "num_attention_heads": 2, "num_layers": 1}):
        ours = complete(own(num_virtual_tokens=2, **fields), SIZED[kind])
        theirs = _prepare_prompt_learning_config(other(num_virtual_tokens=2, **fields), SIZED[kind])
        names = ["token_dim", "num_layers", "num_attention_heads"]
        names += ["encoder_hidden_size"] if hasattr(ours, "encoder_hidden_size") else []
        assert {n: getattr(ours, n) for n in names} == {n: getattr(theirs, n) for n in names}
        again = dataclasses.replace(ours)
        assert complete(again, SIZED[kind]) == ours


def test_a_model_config_without_sizes():
    with pytest.raises(ConfigError, match="num_layers"):
        complete(PromptTuningConfig(num_virtual_tokens=2), {"hidden_size": 2})
    with pytest.raises(ValueError, match="num_layers"):
        _prepare_prompt_learning_config(peft.PromptTuningConfig(num_virtual_tokens=2), {"hidden_size": 2})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    words = {word: i for i, word in enumerate(["<unk>", "is", "this", "good", "or", "bad"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("n", [2, 5, 12])
@pytest.mark.parametrize("method", ["prompt", "multitask"])
def test_a_prompt_starts_from_a_text(tokenizer, method, n, monkeypatch):
    own, other, options = METHODS[method]
    options = {
        **options,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": n,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "this is good or bad",
        "tokenizer_name_or_path": tokenizer,
        "tokenizer_kwargs": {"trust_remote_code": True, "padding_side": "left"},
    }
    inner, task = base("llama")
    reference = peft.get_peft_model(copy.deepcopy(inner), other(**copy.deepcopy(options)))
    real, asked = transformers.AutoTokenizer.from_pretrained, []
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda *args, **kwargs: asked.append(kwargs) or real(*args, **kwargs),
    )
    found = Prompts(inner, task).add("default", own(**options)).embedding.weight
    assert asked == [{"padding_side": "left"}]  # a file cannot ask for code to be run
    assert torch.equal(found, reference.prompt_encoder["default"].embedding.weight)
    assert torch.equal(found[0], inner.get_input_embeddings().weight[2]) and found.requires_grad


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_several_tasks_start_from_a_file(tmp_path, init, suffix):
    from safetensors.torch import save_file

    source, config, _ = pair("llama", "multitask")
    path = str(tmp_path / f"source.{suffix}")
    (save_file if suffix == "safetensors" else torch.save)(source.state("default", config), path)
    options = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": N,
        "num_ranks": 2,
        "prompt_tuning_init": init,
        "prompt_tuning_init_state_dict_path": path,
        "prompt_tuning_init_task": 1,
    }
    inner, task = base("llama")
    torch.manual_seed(4)
    reference = peft.get_peft_model(copy.deepcopy(inner), peft.MultitaskPromptTuningConfig(**options))
    torch.manual_seed(4)
    found = Prompts(inner, task).add("default", MultitaskPromptTuningConfig(**options))
    for name, t in reference.prompt_encoder["default"].state_dict().items():
        assert torch.equal(found.state_dict()[name], t), name
    (tmp_path / f"source.{suffix}").unlink()
    frozen = MultitaskPromptTuningConfig(**options, inference_mode=True)
    Prompts(base("llama")[0], task).add("default", frozen)  # its own file has it all


def test_a_prefix_of_zeros_and_a_bfloat16_model():
    inner, task = base("llama")
    prompts, config = Prompts(inner.bfloat16(), task), PrefixTuningConfig(num_virtual_tokens=2, init_weights="zero")
    encoder = prompts.add("default", config)
    assert not encoder.embedding.weight.any() and encoder.embedding.weight.dtype == torch.float32
    assert prompts("default", config, (), inputs("llama")).logits.dtype == torch.bfloat16
    projected = PrefixTuningConfig(num_virtual_tokens=2, init_weights="zero", prefix_projection=True)
    assert not prompts.add("other", projected).prompt(1).any()
    soft = PromptTuningConfig(num_virtual_tokens=2)
    prompts.add("soft", soft)
    assert prompts("soft", soft, (), inputs("llama")).logits.dtype == torch.bfloat16


def test_dropout_of_the_lstm_is_not_saved():
    prompts, config, _ = pair("llama", "lstm", encoder_dropout=0.5)
    prompts.train()
    one, two = (prompts.state("default", config)["prompt_embeddings"] for _ in range(2))
    assert torch.equal(one, two) and prompts.encoder("default").training
    assert not torch.equal(*(prompts.prompt("default", config, 1) for _ in range(2)))


def test_copies_and_pickles():
    prompts, config, _ = pair("gpt2", "prefix")
    given = inputs("gpt2")
    expected = prompts("default", config, (), given).logits
    for other in (copy.deepcopy(prompts), pickle.loads(pickle.dumps(prompts))):
        close(other("default", config, (), given).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shared", [0, 2])
def test_a_prefix_for_layers_of_several_kinds(shared):
    fields = {**GEMMA, "num_hidden_layers": 4, "layer_types": GEMMA["layer_types"] * 2, "num_kv_shared_layers": shared}
    fields |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
    torch.manual_seed(0)
    inner = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**fields)).eval()
    other = copy.deepcopy(inner)
    prompts, config = Prompts(inner, "CAUSAL_LM"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
    torch.manual_seed(1)
    prompts.add("default", config)
    torch.manual_seed(1)
    reference = peft.get_peft_model(other, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N))
    given = inputs("llama", labels=False, left=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = prompts("default", config, (), given).logits
    left_out = [w for w in caught if "leaves out the layers [2, 3]" in str(w.message)]
    assert len(left_out) == bool(shared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(ours, reference.eval()(**given).logits)
    narrow = PrefixTuningConfig(num_virtual_tokens=N, token_dim=8, num_attention_heads=1, num_layers=4)
    prompts.add("narrow", narrow)
    narrow.token_dim, narrow.num_attention_heads = 8, 1  # as a file for another model would have it
    prompts.prompt_encoder["narrow"] = type(prompts.encoder("narrow"))(narrow)
    with pytest.raises(ConfigError, match="no layer's keys fit"):
        prompts("narrow", narrow, (), given)


def test_a_prefix_goes_where_its_layer_runs():
    model = nn.Module()
    assert _devices(model, 2) == [None, None]
    model.hf_device_map = {"": 0}
    assert _devices(model, 2) == [0, 0]
    model.hf_device_map = {"model.embed": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2.mlp": 1}
    assert _devices(model, 3) == [0, 0, 1]
