"""Tiny language models with random weights, and what the tests of this folder have in common."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 96
_LLAMA = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=VOCABULARY,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_BERT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    num_labels=3,
)
_MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0
        )
    ),
    "bert-cls": lambda: BertForSequenceClassification(BertConfig(**_BERT)),
    "bert-tokens": lambda: BertForTokenClassification(BertConfig(**_BERT)),
    "bert-qa": lambda: BertForQuestionAnswering(BertConfig(**_BERT | {"num_labels": 2})),
    "bert": lambda: BertModel(BertConfig(**_BERT)),
}
TASKS = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "t5": "SEQ_2_SEQ_LM",
    "bert-cls": "SEQ_CLS",
    "bert-tokens": "TOKEN_CLS",
    "bert-qa": "QUESTION_ANS",
    "bert": "FEATURE_EXTRACTION",
}


def model(kind: str = "llama", seed: int = 0):
    """A model in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return _MAKERS[kind]().eval()


def batch(kind: str = "llama", rows: int = 2, length: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs for a model."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return found | ({"decoder_input_ids": ids[:, :4]} if kind == "t5" else {})


def output(found) -> torch.Tensor:
    """The tensor that matters in a model's output."""
    names = ("logits", "start_logits", "last_hidden_state")
    return next(getattr(found, name) for name in names if getattr(found, name, None) is not None)


def run(it, kind: str = "llama", **kwargs) -> torch.Tensor:
    """What a model gives for the batch, without gradients."""
    with torch.no_grad():
        return output(it(**batch(kind), **kwargs))
