"""Going on with a run, and beginning one: which options may differ, what an output folder holds already. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from diffpeft.errors import ConfigError, UnknownNameError, listed, shown
from diffpeft.files import Json
from diffpeft.train import machines, optimizers
from diffpeft.train.checkpoints import SavedState, checkpoints_in, chosen
from diffpeft.train.config import Options
from diffpeft.train.groups import entries_of

# What changes no byte of the adapter: these may differ when a run goes on. All others are the run's, but for those of RULES and of --allow.
FREE = {
    "out": "the folder was moved, or the run goes on in another",
    "name": "the name of the files",
    "resume": "the state itself",
    "overwrite": "what is not asked of a run that goes on",
    "allow": "these exceptions",
    "allow_unchanged": "what is an error at the end",
    "formats": "what the adapter is saved as",
    "save_dtype": "how exact its files are; the state is not rounded",
    "author": "what the files say of it",
    "description": "what the files say of it",
    "license": "what the files say of it",
    "push_to_hub": "where the files go besides",
    "hub_private": "and who sees them there",
    "save_every": "how often the state is saved",
    "keep": "how many states stay",
    "cache": "where is kept what would be computed again to the same bits",
    "cache_dir": "in which folder",
    "cache_limit": "and how much of it",
    "heldout": "what is measured on",
    "heldout_every": "how often",
    "best": "which state the run ends with",
    "log": "where the numbers go",
    "log_every": "how many of them",
    "samples": "how many answers are shown",
    "num_processes": "who computes the passes of a step, of which there must be as many: accumulate x num_processes",
    "fsdp": "whether each process holds the whole base",
    "memory": "what it was to fit into; what was picked for that is the run's",
    "offload": "where the base's blocks are between two uses",
    "sample_prompt": "what is drawn meanwhile",
    "sample_prompts": "and from which file",
    "sample_every": "how often",
    "sample_steps": "how finely",
    "sample_guidance": "under how much guidance",
    "sample_seed": "from which noise",
    "sample_first": "whether at the beginning",
    "sample_start": "from which denoising step on the adapter is on",
    "sample_model": "and with which model",
}
PASSES = "Counted are the passes of all processes: one with --accumulate 2 goes on with a run of two."
STEPS = "More steps are possible with --lr-scheduler constant, whose past does not depend on its end."


def names_of(value: str | Sequence[str] | None) -> list[str]:
    """Names with commas, or a list of them."""
    return [name.replace("-", "_") for name in entries_of(value)]


def plain(options: Mapping[str, object]) -> Json:
    """Options as JSON has them: tuples are lists."""
    table: Json = json.loads(json.dumps(options))
    return table


def remembered(kind: type[Options], typed: Mapping[str, object]) -> Json:
    """The options that were typed, and for those that were not the ones of the run that goes on, if one does."""
    if not typed.get("resume"):
        return dict(typed)
    out = Path(str(typed["out"])) if typed.get("out") else None
    checkpoint = chosen(str(typed["resume"]), out)
    known = set(kind.names())
    stored = {name: value for name, value in checkpoint.options.items() if name in known and value is not None}
    started = ("num_processes",) if machines.world().size > 1 else ()  # by a launcher, as many as they are
    for name in ("resume", "overwrite", "allow", *started, *(("steps",) if typed.get("epochs") else ())):
        stored.pop(name, None)
    return stored | {"out": str(checkpoint.run)} | dict(typed)


def may_differ(name: str, options: Options) -> bool:
    """Whether an option may have another value than the run was started with."""
    if name == "steps":
        return options.lr_scheduler == "constant" or name in names_of(options.allow)
    return name in FREE or name in names_of(options.allow)


def check_same(options: Options, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise ConfigError for options that differ from those of the run that goes on and may not. Options that one of both lacks are the defaults."""
    known = set(options.names())
    for name in names_of(options.allow):
        if name not in known:
            raise UnknownNameError.of("option", name, known, where="--allow")
    before, now = _by_passes(before), _by_passes(now)
    changed = [n for n in now if n in before and before[n] != now[n] and not may_differ(n, options)]
    if changed:
        texts = [f"{name} was {shown(before[name])} and is {shown(now[name])}" for name in changed]
        raise ConfigError(
            f"the run was started with other options: {', '.join(texts)}",
            remedy=f"Leave them out, or say that you mean it: --allow {','.join(changed)}."
            + (f" {STEPS}" if "steps" in changed else "")
            + (f" {PASSES}" if "accumulate" in changed else ""),
        )


def _by_passes(options: Mapping[str, object]) -> Json:
    """Options with the passes that all processes together make of a step, instead of those of each."""
    accumulate, processes = options.get("accumulate"), options.get("num_processes") or 1
    if not isinstance(accumulate, int) or not isinstance(processes, int):
        return dict(options)
    return {**options, "accumulate": accumulate * processes}


def begin(options: Options, out: Path, files: Iterable[str]) -> SavedState | None:
    """The state to go on from, None for a run that begins anew. `files` are the names of what a run writes.

    Raises what optimizers.check raises, and ConfigError for options that cannot differ, and for an output folder with another run's files, unless
    they may be overwritten.
    """
    optimizers.check(options)
    machines.check(options)
    if options.resume:
        checkpoint = chosen(options.resume, out)
        typed = {name: value for name, value in plain(options.resolved()).items() if value is not None}
        before = {name: value for name, value in checkpoint.options.items() if value is not None}
        before["num_processes"] = checkpoint.facts().get("resolved", {}).get("num_processes") or 1
        typed["num_processes"] = machines.world().size
        check_same(options, before, typed)
        if checkpoint.step > options.steps:
            raise ConfigError(
                f"the run has {checkpoint.step} steps already, and steps is {options.steps}",
                where=checkpoint.folder,
                remedy="Pass more --steps.",
            )
        return checkpoint
    if not options.overwrite:
        _refuse_finished(out, files)
    return None


def _refuse_finished(out: Path, files: Iterable[str]) -> None:
    """Raise ConfigError if a folder holds the state or the files of a run."""
    there = [name for name in files if (out / name).exists()]
    checkpoints = checkpoints_in(out)
    if not there and not checkpoints:
        return
    what = f"the state of a run after {checkpoints[-1].step} steps" if checkpoints else listed(there)
    go_on = f"--resume {out} goes on, " if checkpoints else ""
    raise ConfigError(
        f"the output folder holds {what}",
        where=out,
        remedy=f"{go_on}--overwrite begins anew and replaces it, or pass another --out.",
    )
