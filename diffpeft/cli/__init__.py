"""The command line. Commands are thin: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys

import click

from diffpeft import __version__
from diffpeft.cli.average import average
from diffpeft.cli.bake import bake
from diffpeft.cli.convert import convert
from diffpeft.cli.data import data
from diffpeft.cli.demo import demo
from diffpeft.cli.diff import diff
from diffpeft.cli.doctor import doctor
from diffpeft.cli.edit import edit
from diffpeft.cli.errors import run
from diffpeft.cli.extract import extract
from diffpeft.cli.fuse import fuse
from diffpeft.cli.generate import generate
from diffpeft.cli.inspect import inspect
from diffpeft.cli.list import list_
from diffpeft.cli.merge import merge
from diffpeft.cli.prune import prune
from diffpeft.cli.resize import resize, scale
from diffpeft.cli.sft import sft
from diffpeft.cli.slider import slider
from diffpeft.cli.train import train
from diffpeft.cli.verify import verify

DEBUG = "Show tracebacks and what libraries print."

# {heading: {command: (what is typed after its name, what it does)}}
SECTIONS: dict[str, dict[click.Command, tuple[str, str]]] = {
    "Learn": {
        demo: ("", "learn a style on the embedded base, offline, in minutes"),
        train: ("-m MODEL -d IMAGES -o OUT", "learn from your own images"),
        data: ("check IMAGES", "say what training would take from them"),
        slider: ("-m MODEL --erase X -o OUT", "learn a slider from prompts alone, or erase a concept"),
        sft: ("-m MODEL -d TEXTS -o OUT", "fine-tune a language model"),
        average: ("RUN -o OUT", "average an adapter over a run's states"),
    },
    "Draw": {
        generate: ("-p PROMPT --lora FILE", "draw with adapters"),
        fuse: ("-m MODEL --lora FILE -o OUT", "put adapters into a model's weights for good"),
    },
    "Look at adapter files": {
        list_: ("DIR", "say what the adapters in a folder are, a line each"),
        inspect: ("FILE", "say what an adapter file is"),
        diff: ("A B", "say how alike two adapters are, by block"),
        verify: ("FILE -m MODEL", "say whether an adapter fits a model"),
    },
    "Write adapter files": {
        convert: ("IN OUT --to FORMAT", "write one in another format"),
        merge: ("A:0.7 B:-0.3 -o OUT", "write one that does what several do"),
        extract: ("--base M --tuned M -o OUT", "write what a fine-tuned model has learnt"),
        resize: ("IN OUT --max-size 50MB", "write one of fewer ranks"),
        scale: ("IN OUT BY", "put a strength into one"),
        prune: ("IN OUT --blocks PATTERN", "leave blocks or layers out"),
        bake: ("IN OUT --blocks PATTERN=W", "put weights by block into one"),
        edit: ("FILE --set KEY=TEXT", "change its metadata, trigger words, picture"),
    },
    "Help": {
        doctor: ("", "say what is installed, and what is in the way"),
    },
}


class Sections(click.Group):
    """A group whose help lists its commands under headings, each with what is typed after it."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, with what commands do in one column."""
        typed = {c: f"{c.name} {usage}".rstrip() for rows in SECTIONS.values() for c, (usage, _) in rows.items()}
        width = max(map(len, typed.values()))
        for heading, rows in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([(typed[c].ljust(width), what) for c, (_, what) in rows.items()], col_max=width)


@click.group(
    cls=Sections,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
@click.version_option(version=__version__, prog_name="diffpeft")
@click.option("--debug", is_flag=True, expose_value=False, help=DEBUG)
def cli() -> None:
    """Adapters for diffusion models: train them, draw with them, work on their files.

    Each command has an example in its own help: diffpeft train --help. Each takes --debug.
    Shells complete commands, options, files and values: docs/completion.md.
    """


for _command in (c for rows in SECTIONS.values() for c in rows):
    cli.add_command(_command)


def _with_debug(command: click.Command) -> None:
    """Give a command, and those below it, the option that `run` takes from anywhere among the arguments."""
    for inner in getattr(command, "commands", {}).values():
        inner.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, help=DEBUG))
        _with_debug(inner)


_with_debug(cli)


def main() -> None:
    """The console script."""
    sys.exit(run(cli))
