"""A command that takes options by the names of other trainers too, so that a pasted command line works. They are in no help."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import click

from diffpeft.cli.groups import Grouped
from diffpeft.train.other_names import TABLE
from diffpeft.train.translate import is_alias, key_of

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
    flags = {flag: param for param in params for flag in (*param.opts, *param.secondary_opts)}
    known = {key_of(flag) for flag in flags if flag.startswith("--")}
    names = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
    if not any(is_alias(name, known) or key_of(name) in _FILES for name in names):
        return list(args), []
    ours, theirs = Words(), list[tuple[str, object]]()
    words = iter(_Queue(args))
    for arg in words:
        name, equals, text = arg.partition("=")
        key = key_of(name)
        if not name.startswith("--") or (key not in TABLE and key not in _FILES):
            ours.append(arg)
            if not equals and _takes_value(flags.get(_spelt(name))):
                ours += words.taken(1)
            continue
        reads = TABLE[key].reads if key in TABLE else str
        if equals:
            theirs.append((name, [text, *words.taken()] if reads is list else text))
        elif reads is bool and _takes_value(flags.get(_spelt(name))) and words.has_value():
            ours += [arg, *words.taken(1)]  # a flag there that takes a value here
        elif reads is bool:
            theirs.append((name, True))
        else:
            values = words.taken(None if reads is list else 1)
            if not values and reads is not list:
                raise click.BadOptionUsage(name, f"Option {name!r} requires an argument.")
            theirs.append((name, values if reads is list else values[0]))
    return ours, theirs


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


def _spelt(name: str) -> str:
    """A flag as click has it, where `_` is `-`."""
    return name.replace("_", "-")


def _takes_value(param: click.Parameter | None) -> bool:
    return isinstance(param, click.Option) and not param.is_flag
