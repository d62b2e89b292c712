"""Model cards: the README.md beside an adapter, which the Hub reads. One that is there is kept and completed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diffpeft.errors import DataWarning, shown
from diffpeft.train.outputs import README

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_VERSIONS = "### Framework versions"


@dataclass(frozen=True)
class CardFacts:
    """What a card says of an adapter.

    Args:
        base: the id or the folder of the base model; None leaves what a card says already.
        tags: for the Hub's search, beside those that a card has.
        pipeline: the Hub's task, where a card says none.
        version: the line that says which version wrote the files, such as `- PEFT 0.18.0`.
        library: the one that reads them.
        more: other fields of the Hub's, which replace those of the card.
    """

    base: str | None
    tags: frozenset[str]
    pipeline: str | None
    version: str
    library: str = "peft"
    more: Mapping[str, object] = field(default_factory=dict)


def completed(folder: Path, facts: CardFacts) -> str | None:
    """The text of the card for a folder: its own with these facts, or a fresh one. None, with a warning, for a README.md that is no card."""
    from huggingface_hub import ModelCard, ModelCardData

    path = folder / README
    try:
        card = ModelCard(path.read_bytes().decode()) if path.is_file() else ModelCard.from_template(ModelCardData())
    except Exception as error:  # of YAML, of the codec
        warnings.warn(
            f"{shown(str(path))} stays as it is: its head is no model card's ({error})", DataWarning, stacklevel=4
        )
        return None
    tell(card, facts)
    card.text = _with_version(card.text, facts.version)
    return str(card)


def tell(card: ModelCard, facts: CardFacts) -> None:
    """Put facts into the head of a card, beside what it says already."""
    card.data["library_name"] = facts.library
    card.data["tags"] = sorted(facts.tags.union(card.data.get("tags") or ()))
    card.data["pipeline_tag"] = card.data.get("pipeline_tag") or facts.pipeline
    card.data["base_model"] = facts.base or card.data.get("base_model")
    for name, value in facts.more.items():
        card.data[name] = value


def _with_version(text: str, version: str) -> str:
    """A card's text with a line of the version, under its heading if there is one."""
    lines = text.splitlines()
    if version in lines:
        return text
    if _VERSIONS in lines:
        lines.insert(lines.index(_VERSIONS) + 2, version)
    else:
        lines += [_VERSIONS, "", version]
    return ("\r\n" if "\r\n" in text else "\n").join(lines)
