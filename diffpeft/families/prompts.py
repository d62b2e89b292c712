"""Prompts as tokens, and what a family's encoders make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from diffpeft.errors import ConfigError
from diffpeft.families.devices import sent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.base import CaptionReading, Conditions, Family
    from diffpeft.families.parts import Component


def tokens(tokenizer: Component, prompts: Sequence[str], length: int, device: torch.device) -> Tensor:
    """Token ids [b, length] of prompts, filled up or cut off."""
    ids = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return sent(ids, device)


def chunks(tokenizer: Component, prompts: Sequence[str], number: int, device: torch.device) -> Tensor:
    """Token ids [b number, length] of prompts, each in so many chunks as long as the encoder reads, with a beginning and an end of their own."""
    import torch

    texts = tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids
    per, ids = length_of(tokenizer), []
    for text in texts:
        for start in range(0, per * number, per):
            chunk = [tokenizer.bos_token_id, *text[start : min(start + per, per * number)], tokenizer.eos_token_id]
            ids.append(chunk + [tokenizer.pad_token_id] * (per + 2 - len(chunk)))
    return sent(torch.tensor(ids), device)


def length_of(tokenizer: Component) -> int:
    """The tokens of a text that fit beside its beginning and its end."""
    return tokenizer.model_max_length - 2


def chunks_of(tokenizer: Component, reading: CaptionReading) -> int:
    """How many chunks captions are read in. Raises ConfigError for a length that is not so many whole ones."""
    per = length_of(tokenizer)
    length = per if reading.max_length is None else reading.max_length
    if length % per:
        raise ConfigError(
            f"max_length is {length}",
            remedy=f"This model reads captions in chunks of {per}: {per}, {2 * per}, {3 * per} ...",
        )
    return length // per


def after(layer: int, total: int) -> str:
    """The regular expression for the layers of a CLIP after one of so many, 1 the last."""
    return rf".*layers\.({'|'.join(str(n) for n in range(total - layer + 1, total))})\..*"


def refuse_skip(reading: CaptionReading, why: str) -> None:
    """Raise ConfigError for a clip_skip that would do nothing."""
    if reading.clip_skip != 1:
        raise ConfigError(f"clip_skip is {reading.clip_skip}, and {why}", remedy="Leave --clip-skip out.")


def length_within(reading: CaptionReading, usual: int, most: int, model: str) -> int:
    """How many tokens of captions are read. Raises ConfigError for more than a model reads, and for a clip_skip, which is for CLIP."""
    refuse_skip(reading, f"{model} reads no CLIP, or always the same layer of it")
    length = usual if reading.max_length is None else reading.max_length
    if length > most:
        raise ConfigError(f"max_length is {length}", remedy=f"{model} reads {most} tokens at most.")
    return length


def stacked(rows: Sequence[Conditions]) -> Conditions:
    """Conditions [b, ...] of those of single prompts [...]. Shorter ones are filled up with zeros at the end."""
    import torch

    batch = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True) if values[0].ndim else torch.stack(values)
        for name, values in batch.items()
    }


def by_length(lengths: Tensor, x: Tensor, answer: Callable[[Tensor, int], Tensor]) -> Tensor:
    """What a denoiser that reads no mask says of latents x [b, c, *size]: examples whose texts have a length are asked for together.

    Args:
        lengths: of the texts [b], on the host.
        answer: the prediction for rows, whose texts have so many tokens.
    """
    import torch

    rows_of = [(sent((lengths == length).nonzero()[:, 0], x.device), length) for length in lengths.unique().tolist()]
    out = torch.empty_like(x)
    for rows, length in rows_of:
        out = out.index_copy(0, rows, answer(rows, length))
    return out


def embedded(family: Family, prompts: Sequence[str]) -> Conditions:
    """What the denoiser reads of prompts, through all text encoders."""
    return {name: t for encoder in family.text_encoders for name, t in family.embed(encoder, prompts).items()}
