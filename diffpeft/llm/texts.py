"""Texts to train on: rows of a JSONL file, or a plain text, as tokens of which each is learnt or only read.

A row is `{"messages": [{"role", "content"}, ...]}`, told with the tokenizer's chat template; `{"prompt", "completion"}`, joined as they are; or `{"text"}`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpeft.errors import DataError, DataWarning, listed, near, shown

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the label of a token that is not learnt
Segment = tuple[str, bool]  # a piece of a text, and whether it is learnt
Row = Mapping[str, Any]
Tokenizer = Any  # of transformers
_PLAIN = (".txt", ".text", ".md")


@dataclass(frozen=True)
class TokenExample:
    """Token ids, and for each whether it is learnt; both [t]."""

    ids: list[int]
    learnt: list[bool]

    @property
    def tokens(self) -> int:
        """How many tokens are learnt. The first one has nothing before it."""
        return sum(self.learnt[1:])

    @property
    def labels(self) -> list[int]:
        """What is learnt at each token [t]: itself, or nothing. The first one has nothing before it."""
        return [i if n and learnt else IGNORED for n, (i, learnt) in enumerate(zip(self.ids, self.learnt, strict=True))]

    def pieces(self, length: int, *, all_: bool) -> list[TokenExample]:
        """All pieces of `length` tokens, or the first one only."""
        starts = range(0, len(self.ids), length) if all_ else (0,)
        return [TokenExample(self.ids[i : i + length], self.learnt[i : i + length]) for i in starts]

    @property
    def prompt(self) -> list[int]:
        """The ids before the first one that is learnt."""
        return self.ids[: self.learnt.index(True)] if True in self.learnt else self.ids


def read(path: str | Path) -> list[Row]:
    """The rows of a JSONL file; of a plain text one row. Raises DataError, which names the line."""
    path = Path(path)
    text = _text(path)
    if path.suffix.lower() in _PLAIN:
        rows: list[Row] = [{"text": text}] if text.strip() else []
    else:
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [_row(line, f"{path}, line {n}, row {row}") for row, (n, line) in enumerate(lines, 1)]
    if not rows:
        raise DataError("the file is empty", where=path, remedy="Each line is a row: " + _ROWS)
    form = form_of(rows[0])
    for n, row in enumerate(rows, 1):
        if form_of(row) != form:
            raise DataError(
                f"a row of {form_of(row)} among rows of {form}",
                where=f"{path}, row {n}",
                remedy="A file has rows of one kind: put the others into a file of their own.",
            )
    return rows


def _text(path: Path) -> str:
    """The text of a file in UTF-8. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise DataError(
            f"cannot read the data: {why}",
            where=path,
            remedy=(not path.exists() and near(path.name, siblings)) or "Pass a .jsonl or a .txt file.",
        ) from error


def _row(line: str, where: str) -> Row:
    """The row of a line. Raises DataError for what is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"this is no JSON ({error})", where=where, remedy="Each line is a row: " + _ROWS) from error
    if fault := _row_fault(row):
        raise DataError(f"a row {fault}", where=where, remedy="A row is " + _ROWS)
    return row


def _row_fault(row: object) -> str:
    """What is wrong with a row; empty if nothing is."""
    if not isinstance(row, dict):
        return f"with {type(row).__name__}"
    complete = [form for form, keys in FORMS.items() if all(key in row for key in keys)]
    if len(complete) > 1:
        return f"that is both of {' and of '.join(complete)}"
    form = form_of(row)
    if not form:
        return f"with {listed(row) or 'nothing'}"
    fault = _message_fault(row) if form == "messages" else _text_fault(row, *FORMS[form])
    return f"of {form} {fault}" if fault else ""


# {a form of row: what it has}
FORMS: dict[str, tuple[str, ...]] = {"messages": ("messages",), "prompt": ("prompt", "completion"), "text": ("text",)}


def form_of(row: Row) -> str:
    """Which form a row has: one that is complete, else one that is begun; empty if it has none. Other fields do not count."""
    complete = (form for form, keys in FORMS.items() if all(key in row for key in keys))
    return next(complete, next((form for form in FORMS if form in row), ""))


def _message_fault(row: Row) -> str:
    """What is wrong with a row of messages; empty if nothing is."""
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return "without a list of messages"
    for n, message in enumerate(messages, 1):
        parts = isinstance(message, dict) and isinstance(
            message.get("content"), list
        )  # of text and more: the template's
        keys = ("role",) if parts else ("role", "content")
        fault = _text_fault(message, *keys) if isinstance(message, dict) else "that is no object"
        if fault:
            return f"whose message {n} is one {fault}"
    return "" if any(message["role"] == "assistant" for message in messages) else "without an answer of the assistant"


def _text_fault(row: Row, *keys: str) -> str:
    """What is wrong with a row whose `keys` are to be texts; empty if nothing is."""
    for key in keys:
        if key not in row:
            return f"without {shown(key)}"
        if not isinstance(row[key], str):
            return f"with {shown(key)} that is {'null' if row[key] is None else 'a ' + type(row[key]).__name__} and no text"
    return ""


def _messages(row: Row, tokenizer: Tokenizer) -> list[Segment]:
    """The answers of the assistant are learnt; what the template puts around the others is read."""
    messages, done, segments = row["messages"], "", []
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=True) if n else ""
        after = tokenizer.apply_chat_template(messages[: n + 1], tokenize=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError("the chat template changes earlier messages")
        segments += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return segments


# {a form of row: its segments}
SEGMENTS: dict[str, Callable[[Row, Tokenizer], list[Segment]]] = {
    "messages": _messages,
    "prompt": lambda row, _: [(row["prompt"], False), (row["completion"], True)],
    "text": lambda row, _: [(row["text"], True)],
}
_ROWS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}.'


def examples(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int, loss: str, where: object = ""
) -> list[TokenExample]:
    """Rows as tokens. Texts are cut into pieces of `max_length`, other rows are cut off there.

    Args:
        loss: "completion": what the model is to answer is learnt; "all": prompts too.

    Raises DataError for a row that is not as it should be, or of which nothing that is learnt remains.
    """
    made: list[TokenExample] = []
    cut = 0
    for n, row in enumerate(rows, 1):
        example = _example(row, tokenizer, loss, f"{where}, row {n}")
        is_text, long = form_of(row) == "text", len(example.ids) > max_length
        pieces = [piece for piece in example.pieces(max_length, all_=is_text) if piece.tokens]
        if not pieces:
            raise DataError(
                f"a row in which nothing is learnt{' before it is cut off' if long else ''}",
                where=f"{where}, row {n}",
                remedy="Raise --max-length." if long else "Give it an answer.",
            )
        made += pieces
        cut += long and not is_text
    if cut:
        warnings.warn(
            f"{cut} of {len(rows)} rows are longer than {max_length} tokens and were cut off", DataWarning, stacklevel=2
        )
    return made


def _example(row: Row, tokenizer: Tokenizer, loss: str, where: str) -> TokenExample:
    """A row's tokens. Raises DataError for a row that the tokenizer or its template cannot take."""
    form = form_of(row)
    try:
        return tokenised(SEGMENTS[form](row, tokenizer), tokenizer, chat=form == "messages", loss=loss)
    except Exception as error:  # templates raise what they like
        raise DataError(
            f"cannot use a row of {form} ({type(error).__name__}: {str(error)[:200]})",
            where=where,
            remedy="A row is " + _ROWS,
        ) from error


def tokenised(segments: Sequence[Segment], tokenizer: Tokenizer, *, chat: bool, loss: str) -> TokenExample:
    """Segments as one text's tokens, so that they are those of generation; a token is learnt if it reaches into a segment that is.

    A chat template writes the special tokens itself; elsewhere the tokenizer's beginning goes before, and the end is learnt.
    """
    text, spans, at = "".join(s for s, _ in segments), [], 0
    for segment, answer in segments:
        spans += [(at, at + len(segment))] if answer or loss == "all" else []
        at += len(segment)
    got = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)
    ids = list(got["input_ids"])
    learnt = [any(a < stop and b > start for a, b in spans) for start, stop in got["offset_mapping"]]
    end = tokenizer.eos_token_id
    if not chat and end is not None:
        if ids[-1:] != [end]:
            ids, learnt = [*ids, end], [*learnt, True]
        learnt[-1] = True
    return TokenExample(ids, learnt)


def packed(examples: Sequence[TokenExample], length: int) -> list[list[TokenExample]]:
    """Examples put together into sequences of at most `length` tokens: the longest first, each where there is room first."""
    sequences: list[list[TokenExample]] = []
    free: list[int] = []
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        place = next((i for i, room in enumerate(free) if room >= len(example.ids)), len(free))
        if place == len(free):
            sequences.append([])
            free.append(length)
        sequences[place].append(example)
        free[place] -= len(example.ids)
    return sequences


def collated(sequences: Sequence[Sequence[TokenExample]], pad: int) -> dict[str, Tensor]:
    """Sequences of examples as a batch, padded on the right: input_ids and labels [b, t], attention_mask or position_ids [b, t].

    Where examples share a sequence, positions start again with each, by which transformers keeps them apart.
    """
    import torch

    width = max(sum(len(e.ids) for e in sequence) for sequence in sequences)
    shared = any(len(sequence) > 1 for sequence in sequences)
    rows = [_columns(sequence, width, pad) for sequence in sequences]
    names = ("input_ids", "labels", "position_ids" if shared else "attention_mask")
    return {name: torch.tensor([row[name] for row in rows]) for name in names}


def _columns(sequence: Sequence[TokenExample], width: int, pad: int) -> dict[str, list[int]]:
    """One sequence's ids, labels, positions and mask, each [width]."""
    ids = [i for e in sequence for i in e.ids]
    labels = [label for e in sequence for label in e.labels]
    positions = [n for e in sequence for n in range(len(e.ids))]
    padding = width - len(ids)
    return {
        "input_ids": ids + [pad] * padding,
        "labels": labels + [IGNORED] * padding,
        "position_ids": positions + list(range(padding)),
        "attention_mask": [1] * len(ids) + [0] * padding,
    }


def tokens(sequences: Iterable[Sequence[TokenExample]]) -> int:
    """How many tokens are learnt."""
    return sum(e.tokens for sequence in sequences for e in sequence)
