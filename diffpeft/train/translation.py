"""Options of another trainer that are being turned into ours: what was said, what is set, what changes nothing and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffpeft.errors import ConfigError, listed, shown
from diffpeft.files import Json
from diffpeft.train.other_names import words

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")  # as people and shells write them


@dataclass
class Translation:
    """What another trainer's options come to.

    Args:
        where: the file that they stand in; empty for the command line.
        theirs: {option of theirs that goes with others: value}.
        values: {option of ours: value}, and `names` {option of ours: what it was called there}.
        implied: options of ours that follow from what theirs does where nothing is said.
        notes: what people should know, a line each.
        idle: {why an option changes nothing here: the options}.
        refused: {option: why}.
    """

    where: object = ""
    theirs: Json = field(default_factory=dict)
    values: Json = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    implied: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    idle: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def put(self, ours: str, value: object, name: str) -> None:
        """Set an option of ours. Raises ConfigError if another option set it to something else."""
        if ours in self.values and self.values[ours] != value and ours not in self.implied:
            raise ConfigError(
                f"{self.names[ours]} is {shown(self.values[ours])} and {name} is {shown(value)}: both are {ours}",
                where=self.where,
                remedy="Leave one of them out.",
            )
        self.implied.discard(ours)
        self.values[ours], self.names[ours] = value, name

    def imply(self, ours: str, value: object, name: str) -> None:
        """Set an option of ours that nobody set, because theirs does so."""
        if ours not in self.values:
            self.put(ours, value, name)
            self.implied.add(ours)

    def said(self, *names: str) -> list[tuple[str, object]]:
        """Those of these options that were said, with their values."""
        return [(name, self.theirs[name]) for name in names if name in self.theirs]

    def numbers(self, *names: str) -> list[float]:
        """All numbers of these options, which may have several each. Raises ConfigError."""
        return [self.number(name, word) for name, value in self.said(*names) for word in words(value)]

    def number(self, name: str, word: object) -> float:
        """A number that stands among words. Raises ConfigError."""
        try:
            return float(str(word))
        except ValueError:
            raise ConfigError(f"{name} is {shown(word)}", where=self.where, remedy="It is a number.") from None

    def leave(self, why: str, *names: str) -> None:
        """Name options as such that change nothing."""
        if said := [name for name in names if name in self.theirs]:
            self.idle.setdefault(why, []).extend(said)

    def check(self) -> None:
        """Raise ConfigError for all options that are refused, at once."""
        if not self.refused:
            return
        several = len(self.refused) > 1
        raise ConfigError(
            f"{listed(self.refused)} would change the result, and cannot be had here",
            where=self.where,
            remedy=" ".join(f"{name}: {why}" if several else why for name, why in self.refused.items()),
        )

    def remarks(self) -> list[str]:
        """All that people should know, a line each."""
        if not self.idle:
            return self.notes
        kinds = (f"{', '.join(dict.fromkeys(names))} ({why})" for why, names in self.idle.items())
        return [*self.notes, f"without effect here: {'; '.join(kinds)}"]


def key_of(name: str) -> str:
    """An option's name as the table has it."""
    return name.strip("-").replace("-", "_").lower()
