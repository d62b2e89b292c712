"""Images that are not trained on, to measure with: some of the data, chosen by the seed, or a folder of their own. Copies of what is trained on are none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from diffpeft.errors import ConfigError
from diffpeft.train.data.account import Account, Example

_REMEDY = "It is a share of the images (0.1), how many of them (3), or a folder of others."


def part_of(said: str | float) -> float | int | Path:
    """What `--heldout` says: a share from 0 to 1, a number of images, or a folder. Raises ConfigError for other numbers."""
    if isinstance(said, str) and not said.strip().replace(".", "", 1).isdigit():
        return Path(said)
    number = float(said)
    if 0 < number < 1:
        return number
    if number >= 1 and number == int(number) and (not isinstance(said, str) or said.strip().isdigit()):
        return int(number)
    raise ConfigError(f"heldout is {said}", remedy=_REMEDY)


def split(account: Account, part: float | int, seed: int) -> Account:
    """The account without a share or a number of its images, which are held out. Copies of one image count as one, and go together.

    Which they are follows from the seed and their names, so that few change where images are added. Raises ConfigError where none would be left to train on.
    """
    groups = sorted(_copies(account.examples), key=lambda group: _place(seed, group[0].name))
    count = part if isinstance(part, int) else max(round(part * len(groups)), 1)
    if count >= len(groups):
        raise ConfigError(
            f"heldout is {part:g}, and there are {len(groups)} different images: none would be left to train on",
            where=account.folder,
            remedy="Pass a smaller number, or a folder of other images.",
        )
    held = {example.path for group in groups[:count] for example in group}
    order = {example.path: at for at, example in enumerate(account.examples)}
    return replace(
        account,
        examples=tuple(example for example in account.examples if example.path not in held),
        heldout=tuple(sorted((group[0] for group in groups[:count]), key=lambda example: order[example.path])),
    )


def beside(account: Account, others: Account) -> Account:
    """The account with the images of another as those that are held out, each once, without copies of what is trained on.

    Raises ConfigError where nothing is left.
    """
    trained = {example.look for example in account.examples}
    groups = [group for group in _copies(others.examples) if group[0].look not in trained]
    if not groups:
        raise ConfigError(
            "every image there is trained on too", where=others.folder, remedy="Pass a folder of other images."
        )
    return replace(
        account,
        heldout=tuple(group[0] for group in groups),
        heldout_from=others.where,
        copies=len(others.examples) - len(groups),
    )


def _copies(examples: Iterable[Example]) -> list[Sequence[Example]]:
    """The images in groups that show the same pixels."""
    groups: dict[object, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.look, []).append(example)
    return list(groups.values())


def _place(seed: int, name: str) -> bytes:
    return hashlib.blake2b(repr((seed, "heldout", name)).encode(), digest_size=8).digest()
