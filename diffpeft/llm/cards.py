"""Model cards: the README.md beside an adapter, which the Hub reads. One that is there is kept and completed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diffpeft.errors import shown

README = "README.md"
_VERSIONS = "### Framework versions"


@dataclass(frozen=True)
class CardFacts:
    """What a card says of an adapter.

    Args:
        base: the id or the folder of the base model; None leaves what a card says already.
        tags: for the Hub's search, beside those that a card has.
        pipeline: the Hub's task, where a card says none.
        version: of PEFT, whose dialect the files are in.
    """

    base: str | None
    tags: frozenset[str]
    pipeline: str | None
    version: str


def tags_of(model: object, method: str, base: str | None) -> frozenset[str]:
    """The tags of an adapter of a method on a model, which may have some itself."""
    from transformers import PreTrainedModel

    inherited: Iterable[str] = getattr(model, "model_tags", None) or ()
    derived = {
        "transformers": isinstance(model, PreTrainedModel),
        "lora": method == "LORA",
        f"base_model:adapter:{base}": base,
    }
    return frozenset({*inherited, *(tag for tag, holds in derived.items() if holds)})


def completed(folder: Path, facts: CardFacts) -> str | None:
    """The text of the card for a folder: its own with these facts, or a fresh one. None, with a warning, for a README.md that is no card."""
    from huggingface_hub import ModelCard, ModelCardData

    path = folder / README
    try:
        card = ModelCard(path.read_bytes().decode()) if path.is_file() else ModelCard.from_template(ModelCardData())
    except Exception as error:  # of YAML, of the codec
        warnings.warn(f"{shown(str(path))} stays as it is: its head is no model card's ({error})", stacklevel=4)
        return None
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted(facts.tags.union(card.data.get("tags") or ()))
    card.data["pipeline_tag"] = card.data.get("pipeline_tag") or facts.pipeline
    card.data["base_model"] = facts.base or card.data.get("base_model")
    card.text = _with_version(card.text, f"- PEFT {facts.version}")
    return str(card)


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
