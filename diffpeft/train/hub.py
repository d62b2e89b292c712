"""What is written into a folder, onto the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from diffpeft.train.outputs import README


def pushed(
    save: Callable[[Path], object],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: object = None,
    tags: Iterable[str] | None = None,
) -> object:
    """Upload what `save` writes into a folder to a repository, which is made if it is not there. A model card that the repository has is kept and completed.

    Args:
        max_shard_size: changes nothing: an adapter is one file.
        tags: more of them, for the model card.
        commit_message, commit_description, private, token, revision, create_pr: the Hub's.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        _fetch_card(repository, folder, revision, token)
        save(Path(folder))
        _tag(Path(folder, README), tags)
        return api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _fetch_card(repository: str, folder: str, revision: str | None, token: bool | str | None) -> None:
    """Bring the model card of a repository into a folder, if there is one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        path = hf_hub_download(repository, README, revision=revision, token=token)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return  # a fresh repository, a branch that is to be made, or no network, which the upload will say
    Path(folder, README).write_bytes(Path(path).read_bytes())


def _tag(path: Path, tags: Iterable[str] | None) -> None:
    """Add tags to a model card, if there is one."""
    from huggingface_hub import ModelCard

    if tags is None or not path.is_file():
        return
    card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), *tags})
    path.write_text(str(card), encoding="utf-8")
