"""What a shell completes: names of files, and the words that an option may have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import click
from click.shell_completion import BashComplete, add_completion_class

from diffpeft.train.config import Options
from diffpeft.train.method import CONFIGS
from diffpeft.train.optimizers import OPTIMIZERS

Completes = Callable[[click.Context, click.Parameter, str], list[str]]
_MEMORY = ("8GB", "12GB", "16GB", "24GB")
_LOGS = ("csv", "tensorboard", "wandb", "none")


@add_completion_class
class WithFiles(BashComplete):
    """bash's completion, which offers files where an option has no words to offer, as bash does for programs that it knows nothing of."""

    source_template = BashComplete.source_template.replace("-o nosort -F", "-o nosort -o bashdefault -o default -F")


def completed(words: Collection[str]) -> Completes:
    """What a shell completes to one of these words."""
    return lambda ctx, param, begun: [word for word in words if word.startswith(begun)]


dtype_names = completed(("fp64", "fp32", "fp16", "bf16"))  # what `converters` takes


def listed_words(words: Collection[str]) -> Completes:
    """The same for several words with commas: the last one is completed."""

    def complete(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
        before, comma, last = begun.rpartition(",")
        used = before.split(",")
        return [f"{before}{comma}{word}" for word in words if word.startswith(last) and word not in used]

    return complete


def family_names(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """What a shell completes to a family."""
    from diffpeft import converters

    return completed(list(converters.TABLES))(ctx, param, begun)


def format_names(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """What a shell completes to formats that are written, with commas."""
    from diffpeft.train.formats import WRITABLE

    return listed_words(WRITABLE)(ctx, param, begun)


def completions(kind: type[Options]) -> Mapping[str, Completes]:
    """{field of options: what a shell completes it to}, of those that have words but no choices."""
    return {
        "method": completed(list(CONFIGS)),
        "optimizer": completed(list(OPTIMIZERS)),
        "targets": listed_words(kind.PRESETS),
        "allow": listed_words(sorted(kind.names())),
        "log": listed_words(_LOGS),
        "memory": completed(_MEMORY),
        "formats": format_names,
    }
