"""--push-to-hub: what can be wrong is told before training starts; afterwards files, card and samples go up, and a failure loses nothing."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffpeft.errors import ConfigError, HubError
from diffpeft.train.config import Options
from diffpeft.train.hub import pushed
from diffpeft.train.outputs import README, SAMPLES

if TYPE_CHECKING:
    from diffpeft.train.run import TrainRun


def check_hub(options: Options) -> None:
    """Raise ConfigError for a name that no repository can have, and where there is no token or the Hub is switched off. Asks nobody."""
    if options.push_to_hub is None:
        return
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(options.push_to_hub)
    except HFValidationError as error:
        raise ConfigError(
            f"push_to_hub is {options.push_to_hub!r}, which is no name of a repository ({error})",
            remedy="It is yours and the repository's: me/dog.",
        ) from error
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError(
            "push_to_hub, and HF_HUB_OFFLINE is set", remedy="Unset it, or leave --push-to-hub out and upload later."
        )
    if not huggingface_hub.get_token():
        raise ConfigError(
            "push_to_hub, and there is no token for the Hub",
            remedy="hf auth login, or set HF_TOKEN to one that may write.",
        )


def open_repository(options: Options) -> None:
    """Make the repository, if it is not there. Raises HubError for a token that is not accepted or may not write there, or if the Hub cannot be reached."""
    if options.push_to_hub is None:
        return
    from huggingface_hub import HfApi

    api, repository = HfApi(), options.push_to_hub
    remedy = "Pass another --push-to-hub, or leave it out and upload later."
    try:
        me = api.whoami()
        spaces = {str(me["name"]), *(str(org["name"]) for org in me.get("orgs", ()))}
        role = me.get("auth", {}).get("accessToken", {}).get("role")
        owner = repository.partition("/")[0] if "/" in repository else str(me["name"])
        if owner not in spaces:
            raise HubError(
                f"{me['name']} cannot write there", where=repository, remedy=f"Yours are: {', '.join(sorted(spaces))}."
            )
        if role == "read":
            raise HubError("the token may only read", where=repository, remedy="hf auth login with one that may write.")
        api.create_repo(repository, private=options.hub_private or None, exist_ok=True)
    except HubError:
        raise
    except Exception as error:  # of the network, of the Hub, of what it answers
        raise HubError(
            f"the repository cannot be used ({_first_line(error)})", where=repository, remedy=remedy
        ) from error


def push(run: TrainRun) -> str:
    """Upload the files of a run, its card and its samples; the address. A card that the repository has and that is not ours is kept.

    Raises HubError, which says how they are uploaded by hand.
    """
    patterns = [path.name if path.is_file() else f"{path.name}/*" for path in run.files] + [f"{SAMPLES}/*"]
    return upload(lambda folder: _copied(run, folder), run.config, patterns, f"{run.name}, {run.step} steps")


def upload(write: Callable[[Path], object], options: Options, patterns: Sequence[str], message: str) -> str:
    """Upload what `write` writes into a folder; the address. `patterns` are the same files in the output folder. Raises HubError."""
    repository, out = str(options.push_to_hub), options.output()
    try:
        return str(pushed(write, repository, private=options.hub_private or None, commit_message=message))
    except Exception as error:  # of the network, of the Hub: whatever it is, nothing is lost
        words = ["hf", "upload", repository, str(out), ".", *(word for p in patterns for word in ("--include", p))]
        raise HubError(
            f"the files were not uploaded ({_first_line(error)})",
            where=repository,
            remedy=f"They are in {out}. Try again with: {shlex.join(words)}",
        ) from error


def _copied(run: TrainRun, folder: Path) -> None:
    """Put the files of a run into a folder, which may have a card."""
    from diffpeft.train.card import OURS, write_card
    from diffpeft.train.save import readers_of

    out = run.config.output()
    adapters = [path for path in run.files if path.name != README]
    for path in (*adapters, out / SAMPLES):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.is_file():
            shutil.copyfile(path, folder / path.name)
    card = out / README
    if card.is_file() and not (folder / README).is_file() and OURS.encode() not in card.read_bytes():
        shutil.copyfile(card, folder / README)
    write_card(run, folder, {path.name: readers_of(path) for path in adapters}, run.config.push_to_hub)


def _first_line(error: Exception) -> str:
    """What an error says, without the rest of a long story."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
