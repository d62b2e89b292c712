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


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    }
)
@click.version_option(version=__version__, prog_name="diffpeft")
@click.option("--debug", is_flag=True, expose_value=False, help=DEBUG)
def cli() -> None:
    """Adapters for diffusion models: train them, draw with them.

    \b
    diffpeft demo                              learn a style on the embedded base, offline, in minutes
    diffpeft train -m MODEL -d IMAGES -o OUT   learn from your own images
    diffpeft data check IMAGES                 say what training would take from them
    diffpeft slider -m MODEL --erase X -o OUT  learn a slider from prompts alone, or erase a concept
    diffpeft sft -m MODEL -d TEXTS -o OUT      fine-tune a language model
    diffpeft average RUN -o OUT                average an adapter over a run's states
    diffpeft generate -p PROMPT --lora FILE    draw with an adapter
    diffpeft fuse -m MODEL --lora FILE -o OUT  put adapters into a model's weights for good
    diffpeft list DIR                          say what the adapters in a folder are, a line each
    diffpeft inspect FILE                      say what an adapter file is
    diffpeft convert IN OUT --to FORMAT        write it in another format
    diffpeft merge A:0.7 B:-0.3 -o OUT         write one adapter that does what several do
    diffpeft extract --base M --tuned M -o OUT write what a fine-tuned model has learnt
    diffpeft resize IN OUT --max-size 50MB     write an adapter of fewer ranks
    diffpeft scale IN OUT BY                   put a strength into it
    diffpeft prune IN OUT --blocks PATTERN     leave blocks or layers out
    diffpeft bake IN OUT --blocks PATTERN=W    put weights by block into it
    diffpeft edit FILE --set KEY=TEXT          change its metadata, trigger words, picture
    diffpeft diff A B                          say how alike two adapters are, by block
    diffpeft verify FILE -m MODEL              say whether an adapter fits a model
    diffpeft doctor                            say what is installed, and what is in the way

    Every command takes --debug. Shells complete commands, options, files and values: docs/completion.md.
    """


for command in (
    demo,
    train,
    data,
    slider,
    sft,
    average,
    generate,
    fuse,
    list_,
    inspect,
    convert,
    prune,
    bake,
    edit,
    diff,
    verify,
    doctor,
    merge,
    extract,
    resize,
    scale,
):
    cli.add_command(command)


def _with_debug(command: click.Command) -> None:
    """Give a command, and those below it, the option that `run` takes from anywhere among the arguments."""
    for inner in getattr(command, "commands", {}).values():
        inner.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, help=DEBUG))
        _with_debug(inner)


_with_debug(cli)


def main() -> None:
    """The console script."""
    sys.exit(run(cli))
