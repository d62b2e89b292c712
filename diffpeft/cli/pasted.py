"""A command that takes options by the names of other trainers too, so that a pasted command line works. They are in no help."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import click

from diffpeft.cli.groups import Grouped
from diffpeft.train.other_names import TABLE
from diffpeft.train.translate import is_alias
from diffpeft.train.translation import key_of

PASTED = "diffpeft.pasted"  # where the context has them: [(option, value)]
_FILES = ("config_file", "dataset_config")  # options of sd-scripts that name files of options
Words = list[str]
_OPTION = re.compile(r"--[\w.-]+(=.*)?", re.DOTALL)


class Pasted(Grouped):
    """A command of our options, from whose arguments those of other trainers are taken before click reads the others.

    Once one of theirs is there, options that both have are read as theirs (`--resolution 512,768` is a width and a height), and theirs may have
    several words (`--network_args a=1 b=2`).
    """

    def parse_args(self, ctx: click.Context, args: Words) -> Words:
        """Take theirs, and leave the others to click."""
        ours, theirs = split(args, self.params)
        ctx.meta[PASTED] = theirs
        return super().parse_args(ctx, ours)


def split(args: Sequence[str], params: Sequence[click.Parameter]) -> tuple[Words, list[tuple[str, object]]]:
    """Arguments as those for click and (option, value) of other trainers."""
    reader = _Reader(params)
    if not reader.has_theirs(args):
        return list(args), []
    words = _Queue(args)
    for word in words:
        reader.take(word, words)
    return reader.ours, reader.theirs


class _Reader:
    """Puts each argument, with its values, to click's or to another trainer's."""

    def __init__(self, params: Sequence[click.Parameter]):
        self.flags = {flag: param for param in params for flag in (*param.opts, *param.secondary_opts)}
        self.known = {key_of(flag) for flag in self.flags if flag.startswith("--")}
        self.ours, self.theirs = Words(), list[tuple[str, object]]()

    def has_theirs(self, args: Sequence[str]) -> bool:
        """Whether one of the options is another trainer's alone."""
        names = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
        return any(is_alias(name, self.known) or key_of(name) in _FILES for name in names)

    def take(self, word: str, words: _Queue) -> None:
        """Take an argument, and of those after it what belongs to it."""
        name, equals, text = word.partition("=")
        key = key_of(name)
        if not name.startswith("--") or (key not in TABLE and key not in _FILES):
            self.ours += [word] if equals else [word, *words.taken(int(self._takes_value(name)))]
            return
        reads = TABLE[key].reads if key in TABLE else str
        if reads is bool and not equals and self._takes_value(name) and words.has_value():
            self.ours += [word, *words.taken(1)]  # a flag there that takes a value here
        elif reads is list:
            self.theirs.append((name, [*([text] if equals else []), *words.taken()]))
        else:
            self.theirs.append((name, text if equals else reads is bool or _one(name, words)))

    def _takes_value(self, name: str) -> bool:
        param = self.flags.get(name.replace("_", "-"))
        return isinstance(param, click.Option) and not param.is_flag


def _one(name: str, words: _Queue) -> str:
    """The value of an option. Raises BadOptionUsage if there is none."""
    if not words.has_value():
        raise click.BadOptionUsage(name, f"Option {name!r} requires an argument.")
    return words.taken(1)[0]


class _Queue(Iterator[str]):
    """Arguments, one after the other, of which the next values can be taken."""

    def __init__(self, args: Sequence[str]):
        self.args = list(args)

    def __next__(self) -> str:
        if not self.args:
            raise StopIteration
        return self.args.pop(0)

    def __iter__(self) -> _Queue:
        return self

    def has_value(self) -> bool:
        """Whether the next word is no option."""
        return bool(self.args) and not _OPTION.fullmatch(self.args[0])

    def taken(self, most: int | None = None) -> Words:
        """What comes before the next option, at most so many."""
        values = Words()
        while self.has_value() and (most is None or len(values) < most):
            values.append(self.args.pop(0))
        return values
