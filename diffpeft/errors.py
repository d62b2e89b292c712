"""What can go wrong, as types, each with the exit code that the command line gives it.

DiffpeftError                       1
|-- CheckpointError (ValueError)    4   a file or state dict is not usable
|   |-- UnreadableFileError         4   not a whole safetensors file
|   |-- UnsafeFileError             4   reading it could run code
|   |-- UnknownKeysError            4   tensors that belong to no layer here
|   |-- MissingKeysError            4   half of a factor pair is not there
|   |-- ShapeMismatchError (RuntimeError) 4
|   |-- NonFiniteError              4   NaN or Inf, or too large for the base's dtype
|   |-- AmbiguousFormatError        4   fits several formats or families
|   `-- WrongBaseError              4   made for another model family
|-- CannotConvertError              4   the target format cannot hold this
|-- UnknownNameError (ValueError)   2   adapter, method, format, layer pattern ...
|   `-- NoMatchingPeftModuleError   2   (ConfigError, PeftError) no layer is one that a config asks for
|-- PeftError                       1   PEFT's root, of what it has a type for: NoMatchingPeftModuleError
|-- AdapterStateError (ValueError)  4   duplicate name, not attached, busy
|   |-- MixedBatchError (TypeError)   4   rows of a batch have different adapters where they cannot
|   |-- NoWeightError (NotImplementedError) 4 what an adapter adds is no change of a weight
|   `-- UnfitError (RuntimeError)   4   a layer whose weight cannot take an adapter in
|-- ConfigError (ValueError)        2   a field, its value, what is allowed
|   |-- WrongKindError (TypeError)  2   a value of a kind that the field cannot have
|   `-- NotBuiltError (NotImplementedError) 2   a value that nothing is built for
|-- DataError                       3   a data set
|-- HubError                        1   the Hub cannot be reached, or does not take what it is sent
|-- DivergedError                   5   training produced a loss that is not finite
|-- NothingLearntError              6   training changed nothing
`-- LostProcessError                7   another process of the run has ended

DiffpeftWarning (UserWarning)
|-- CheckpointWarning                   a file has something that is not used
|-- ConfigWarning                       a setting that means nothing here
|   |-- UnusedPatternWarning (RuntimeWarning) names of layers that there are none of
|   `-- OutdatedWarning (FutureWarning) a setting that is said elsewhere by now
|-- AdapterStateWarning                 nothing to do
|-- DataWarning                         rows or files that are left out
`-- PeftWarning                         PEFT's kind

Every error says what is wrong, where, and what to do about it; `str()` is these three in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, TypeVar

Value = TypeVar("Value")

MAX_NAME, MAX_LISTED = 200, 20
MAX_LINE, MAX_KNOWN = 1650, 1400  # characters of a line of a message, and of the names that are known in it


def shown(name: object) -> str:
    """`name` as it may appear in a message: quoted, control characters escaped, cut at 200 characters."""
    text = repr(str(name))
    return text if len(text) <= MAX_NAME else text[:MAX_NAME] + "...'"


def listed(names: Iterable[object], most: int = MAX_LISTED) -> str:
    """At most `most` names, quoted, and how many more there are."""
    return joined(map(shown, names), most)


def joined(texts: Iterable[str], most: int = MAX_LISTED) -> str:
    """At most `most` texts as they are, and how many more there are."""
    texts = list(texts)
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def near(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?` for the closest known names, or nothing. Never the name itself: it did not do."""
    known = [k for k in known if k != name]
    matches = difflib.get_close_matches(name[:MAX_NAME], known, n=2, cutoff=0.6)
    return f"Did you mean {' or '.join(map(shown, matches))}?" if matches else ""


def known_names(known: Iterable[str]) -> str:
    """All that is known, in order, as far as a message has room for it, and how many more there are."""
    names, shown_names, room = sorted(known), list[str](), MAX_KNOWN
    for name in names:
        room -= len(name) + 2
        if room < 0 and shown_names:
            break
        shown_names.append(name)
    more = len(names) - len(shown_names)
    return (", ".join(shown_names) or "none") + (f" and {more} more" if more else "")


def one_of(**names: Value | None) -> Value | None:
    """The value of an argument that has several names. Raises ConfigError if more than one of them was used."""
    used = [name for name, value in names.items() if value is not None]
    if len(used) > 1:
        raise ConfigError(
            f"{' and '.join(f'{name}=' for name in used)} are one argument", remedy=f"Say {used[0]}= alone."
        )
    return names[used[0]] if used else None


def _printable(text: object) -> str:
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return line if len(line) <= MAX_LINE else line[:MAX_LINE] + "..."


class DiffpeftError(Exception):
    """The root of all errors of this package. `what`, `where` and `remedy` are one line each; the last two may be empty."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: object = "", remedy: str = ""):
        super().__init__(what)
        self.what, self.where, self.remedy = _printable(what), _printable(where), _printable(remedy)

    def __str__(self) -> str:
        return " ".join(
            part if part[-1] in ".?!" else part + "." for part in (self.what, self.where, self.remedy) if part
        )


@contextmanager
def inside(where: object, config: bool = False) -> Iterator[None]:
    """Errors about a file (`config`: about settings and names in it too) that are raised in this block name it, in front of what in it they name."""
    try:
        yield
    except (CheckpointError, ConfigError, UnknownNameError) as error:
        if not config and not isinstance(error, CheckpointError):
            raise
        place = _printable(where)
        if place not in error.where:
            error.where = f"{place}: {error.where}" if error.where else place
        raise


class CheckpointError(DiffpeftError, ValueError):
    """A file or state dict is not usable."""

    exit_code = 4


class UnreadableFileError(CheckpointError):
    """Not a whole safetensors file."""


class UnsafeFileError(CheckpointError):
    """Reading it could run code (a pickle), so it is not read."""


class UnknownKeysError(CheckpointError):
    """Tensors that belong to no layer of the model, or to the base model itself."""


class MissingKeysError(CheckpointError):
    """A layer has one factor of a pair without the other."""


class ShapeMismatchError(CheckpointError, RuntimeError):
    """Tensors do not fit each other or the layer they name."""


class NonFiniteError(CheckpointError):
    """NaN or infinite values, or values beyond the range of the base's dtype."""


class AmbiguousFormatError(CheckpointError):
    """The names fit several formats or families with different maps."""


class WrongBaseError(CheckpointError):
    """The file was made for another model family."""


class CannotConvertError(DiffpeftError):
    """The target format cannot hold this adapter."""

    exit_code = 4


class UnknownNameError(DiffpeftError, ValueError):
    """An adapter, method, format or layer pattern that does not exist."""

    exit_code = 2

    @classmethod
    def of(cls, kind: str, name: object, known: Iterable[str], where: object = "") -> UnknownNameError:
        """The usual wording: no `kind` `name`, the near matches, all that is known."""
        known = sorted(known)
        remedy = f"{near(str(name), known)} Known: {known_names(known)}."
        return cls(f"no {kind} {shown(name)}", where=where, remedy=remedy.strip())

    @classmethod
    def check(cls, kind: str, name: str | None, known: Iterable[str]) -> None:
        """Raise for a name that is none of the known; None says nothing and is well."""
        if name is not None and name not in known:
            raise cls.of(kind, name, known)


class PeftError(DiffpeftError):
    """The root of PEFT's own types of errors."""


class DiffpeftWarning(UserWarning):
    """The root of all warnings of this package: `warnings.simplefilter("ignore", diffpeft.DiffpeftWarning)` silences them, and "error" raises them."""


class CheckpointWarning(DiffpeftWarning):
    """A file or state dict has something that is not used, or is read in another way than it says."""


class ConfigWarning(DiffpeftWarning):
    """A setting that means nothing here, or something else than it seems to."""


class UnusedPatternWarning(ConfigWarning, RuntimeWarning):
    """A setting names layers that there are none of; PEFT has RuntimeWarnings there."""


class OutdatedWarning(ConfigWarning, FutureWarning):
    """A setting that is said elsewhere by now."""


class AdapterStateWarning(DiffpeftWarning):
    """There is nothing to do, or something else has to be done first."""


class DataWarning(DiffpeftWarning):
    """Something of a data set, or of a file beside it, is left out or left alone."""


class PeftWarning(DiffpeftWarning):
    """PEFT's kind of warning."""


class AdapterStateError(DiffpeftError, ValueError):
    """The adapter or layer is in a state that does not allow this."""

    exit_code = 4


class MixedBatchError(AdapterStateError, TypeError):
    """The rows of a batch have different adapters on a module that cannot be divided by rows."""


class NoWeightError(AdapterStateError, NotImplementedError):
    """What an adapter adds to a layer's output is no change of the layer's weight."""


class UnfitError(AdapterStateError, RuntimeError):
    """A layer whose weight cannot take an adapter in."""


class ConfigError(DiffpeftError, ValueError):
    """A setting has a value that is not allowed."""

    exit_code = 2


class WrongKindError(ConfigError, TypeError):
    """A setting, or what it names, is of a kind that is not allowed."""


class NotBuiltError(ConfigError, NotImplementedError):
    """A setting has a value that nothing is built for."""


class NoMatchingPeftModuleError(UnknownNameError, ConfigError, PeftError):
    """A config chooses no layer of the model."""


class DataError(DiffpeftError):
    """The data set is missing, empty or damaged."""

    exit_code = 3


class HubError(DiffpeftError):
    """The Hub cannot be reached, or does not take what it is sent."""


class DivergedError(DiffpeftError):
    """The training loss is not finite."""

    exit_code = 5


class NothingLearntError(DiffpeftError):
    """After training the adapter changes nothing."""

    exit_code = 6


class LostProcessError(DiffpeftError):
    """Another process of a run has ended, and the run with it."""

    exit_code = 7
