"""What names an adapter on the Hub: ids, links, owner/name/file; nothing is fetched here."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from diffpeft import CheckpointError, UnreadableFileError
from diffpeft.pipeline.locate import located, on_hub
from diffpeft.pipeline.open import check_model

LINKS = {
    "owner/name": ("owner/name", None, None),
    "owner/name/style.safetensors": ("owner/name", None, "style.safetensors"),
    "owner/name/sub/my style.safetensors": ("owner/name", None, "sub/my style.safetensors"),
    "https://huggingface.co/owner/name": ("owner/name", None, None),
    "https://huggingface.co/owner/name/": ("owner/name", None, None),
    "https://huggingface.co/owner/name/blob/main/style.safetensors": ("owner/name", "main", "style.safetensors"),
    "https://huggingface.co/owner/name/resolve/main/a/b.safetensors?download=true": (
        "owner/name",
        "main",
        "a/b.safetensors",
    ),
    "http://hf.co/owner/name.v1/resolve/refs%2Fpr%2F3/my%20style.safetensors": (
        "owner/name.v1",
        "refs/pr/3",
        "my style.safetensors",
    ),
    "huggingface.co/owner/name/blob/abc123/x.safetensors": ("owner/name", "abc123", "x.safetensors"),
    "https://huggingface.co/owner/name/tree/main": ("owner/name", "main", None),
    "https://huggingface.co/owner/name/tree/main/sub": ("owner/name", "main", "sub/pytorch_lora_weights.safetensors"),
    "https://huggingface.co/owner/name#files": ("owner/name", None, None),
}
NOT_HUB = (
    "style.safetensors", "owner/style.safetensors", "./owner/name/x.safetensors", "/owner/name/x.safetensors", "a b/c",
    "https://example.com/owner/name/x.safetensors", "https://huggingface.co/datasets/owner/name", "https://huggingface.co/owner",
    "https://huggingface.co/spaces/owner/name/blob/main/x.safetensors", "C:\\a\\b.safetensors", "owner/name/x.bin",
)  # fmt: skip


@pytest.mark.parametrize("text, place", LINKS.items())
def test_a_link_is_a_repository_a_revision_and_a_file(text, place):
    assert on_hub(text) == place
    assert on_hub(str(Path(text))) == place  # a path makes one slash of two


@pytest.mark.parametrize("text", NOT_HUB)
def test_what_is_no_place_on_the_hub_stays_a_path(text):
    assert on_hub(text) is None
    with pytest.raises(UnreadableFileError, match=r"filename=|Check|Did"):
        located(text)


def test_a_folder_of_the_owners_name_makes_it_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert on_hub("owner/name/x.safetensors") is None


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with these files; what is asked for is written down."""
    asked = []

    def make(*files):
        def download(repo, name, revision=None):
            asked.append((repo, name, revision))
            if name not in files:
                raise EntryNotFoundError("no such entry")
            return str(tmp_path / name)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision=None: [*files, "README.md"])
        return asked

    return make


def test_a_link_fetches_its_file_at_its_revision(hub, tmp_path):
    asked = hub("a/style.safetensors", "other.safetensors")
    link = "https://huggingface.co/owner/name/blob/v2/a/style.safetensors"
    assert located(link) == tmp_path / "a/style.safetensors"
    assert asked == [("owner/name", "a/style.safetensors", "v2")]
    located(link, revision="v3", filename="other.safetensors")  # what is said beside it wins
    assert asked[-1] == ("owner/name", "other.safetensors", "v3")


@pytest.mark.parametrize(
    "files, taken",
    [
        (["pytorch_lora_weights.safetensors", "x.safetensors"], "pytorch_lora_weights.safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter_model.safetensors"),
        (["my style.safetensors"], "my style.safetensors"),
    ],
)
def test_of_a_repository_the_usual_file_is_taken_or_the_only_one(files, taken, hub, tmp_path):
    hub(*files)
    assert located("owner/name") == tmp_path / taken


def test_a_repository_with_several_files_lists_them(hub):
    hub("a.safetensors", "b.safetensors")
    with pytest.raises(UnreadableFileError, match=r"filename=, one of 'a\.safetensors', 'b\.safetensors'"):
        located("owner/name")
    hub()
    with pytest.raises(UnreadableFileError, match=r"0 \.safetensors"):
        located("owner/name")


def test_a_file_that_is_not_there_is_told_with_those_that_are(hub):
    hub("a.safetensors")
    with pytest.raises(UnreadableFileError, match=r"b\.safetensors.*a\.safetensors"):
        located("owner/name/b.safetensors")


def test_without_the_hub_the_message_says_filename(monkeypatch):
    def missing(*args, **options):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    with pytest.raises(UnreadableFileError, match="filename="):
        located("https://huggingface.co/owner/name/blob/main/x.safetensors")


def test_a_link_instead_of_a_models_id_is_answered_with_the_id():
    with pytest.raises(CheckpointError, match="Pass its Hub id: owner/name"):
        check_model("https://huggingface.co/owner/name", None)
