"""What names an adapter on the Hub: ids, links, owner/name/file; nothing is fetched here."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

import diffpeft
from diffpeft import CheckpointError, ConfigError, UnreadableFileError, converters, load_lora, replace
from diffpeft.converters.locating import located, name_in, on_hub
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


TOP = "pytorch_lora_weights.safetensors"
GUESSES = [  # files of a repository, and the one that diffusers takes; None where it takes the first of several
    ([TOP, "x.safetensors"], TOP),
    (["x.safetensors", f"a/{TOP}"], f"a/{TOP}"),
    (["x.safetensors", "scheduler.safetensors", "optimizer.safetensors"], "x.safetensors"),
    (["x.safetensors", "checkpoint-500/model.safetensors", f"checkpoint-500/{TOP}"], "x.safetensors"),
    (["a/x.safetensors"], "a/x.safetensors"),
    (["a.safetensors", "b.safetensors"], None),
    ([f"a/{TOP}", f"b/{TOP}", "x.safetensors"], None),
]


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """A Hub with these files, whose functions take what huggingface_hub's take; the options of every call."""
    calls = []

    def make(*files):
        def download(repo, name, **options):
            calls.append(options)
            if name not in files:
                raise EntryNotFoundError("no such entry")
            return str(tmp_path / name)

        def listing(repo, **options):
            calls.append(options)
            return [*files, "README.md", "image.png"]

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", listing)
        return calls

    return make


@pytest.mark.parametrize("files, taken", GUESSES)
def test_the_file_of_a_repository_is_guessed_as_diffusers_does(files, taken, recorded, tmp_path, monkeypatch):
    from diffusers.loaders import lora_base

    siblings = SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])
    monkeypatch.setattr(lora_base, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(lora_base, "model_info", lambda repo: siblings)
    recorded(*files)
    if taken:
        assert located("owner/name") == tmp_path / taken
        assert lora_base._best_guess_weight_name("owner/name") == taken
    else:
        with pytest.raises(UnreadableFileError, match=r"holds 2 .*filename=, one of ") as error:
            located("owner/name")
        assert lora_base._best_guess_weight_name("owner/name") in str(error.value)


@pytest.mark.parametrize("files, taken", [*GUESSES, (["x-checkpoint.safetensors"], "x-checkpoint.safetensors")])
def test_a_folder_is_guessed_as_a_repository(files, taken, tmp_path):
    files = [file for file in files if "/" not in file]
    for file in files:
        (tmp_path / file).write_text("")
    if taken in files:
        assert located(tmp_path) == tmp_path / taken
        (tmp_path / "up").symlink_to(tmp_path)
        assert located(tmp_path, subfolder="up") == tmp_path / "up" / taken
        assert located(tmp_path, weight_name=taken) == tmp_path / taken


def test_what_is_said_of_a_repository_reaches_the_hub(recorded, tmp_path):
    calls = recorded("sub/style.safetensors", "other.safetensors", "b.safetensors")
    options = {"revision": "v1", "token": "secret", "cache_dir": tmp_path}
    assert located("owner/name", subfolder="sub", **options) == tmp_path / "sub/style.safetensors"
    assert all(call == options or call == {"revision": "v1", "token": "secret"} for call in calls) and len(calls) == 4
    assert located("owner/name", subfolder="sub", weight_name="style.safetensors") == tmp_path / "sub/style.safetensors"
    folder = "https://huggingface.co/owner/name/tree/main/sub"
    assert located(folder) == tmp_path / "sub/style.safetensors"  # the only one in it
    with pytest.raises(UnreadableFileError, match=r"no 'sub/x\.safetensors'.*'sub/style\.safetensors'"):
        located("owner/name", subfolder="sub", filename="x.safetensors")


def test_a_pefts_folder_in_a_repository_comes_with_its_config(recorded, tmp_path):
    recorded("sub/adapter_model.safetensors", "sub/adapter_config.json", "other.safetensors")
    assert located("owner/name", subfolder="sub") == tmp_path / "sub/adapter_model.safetensors"


def test_a_file_that_a_folder_lacks_is_told_with_those_that_it_has(tmp_path):
    (tmp_path / "style.safetensors").write_text("")
    with pytest.raises(UnreadableFileError, match=r"stile\.safetensors.*Did you mean 'style\.safetensors'"):
        located(tmp_path, filename="stile.safetensors")


READERS = {
    "located": lambda source, **where: located(source, **where),
    "detect": converters.detect,
    "inspect": converters.inspect,
    "read": converters.read,
    "convert": lambda source, **where: converters.convert(source, source.parent / "out", to="kohya", **where),
    "embeddings": converters.embeddings,
    "load_lora": lambda source, **where: load_lora(torch.nn.Linear(2, 2), source, **where),
    "replace": lambda source, **where: replace(layer(), "a", source, **where),
}


def layer():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    diffpeft.attach(module, diffpeft.LoraConfig(r=1), "a", targets=["0"])
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("reader", READERS)
def test_everything_that_reads_an_adapter_is_told_the_same_of_it(reader, tmp_path):
    """Its file by either name, but not by both; what comes from the folder shows in the error, as none of these is an adapter."""
    for file in ("a.safetensors", "b.safetensors"):
        save_file({"alpha": torch.ones(1)}, tmp_path / file)
    read = READERS[reader]
    with pytest.raises(ConfigError, match=r"filename= and weight_name= are one argument.*Say filename= alone"):
        read(tmp_path, filename="a.safetensors", weight_name="a.safetensors")
    with pytest.raises(UnreadableFileError, match=r"2 \.safetensors files.*'a\.safetensors', 'b\.safetensors'"):
        read(tmp_path)
    for word in ("filename", "weight_name"):
        with pytest.raises(UnreadableFileError, match=r"no such file.*c\.safetensors"):
            read(tmp_path, **{word: "c.safetensors"}, subfolder=".", revision="v1", token="t", cache_dir=tmp_path)
    with pytest.raises(TypeError, match="weightname"):
        read(tmp_path, weightname="a.safetensors")


def test_both_names_of_an_adapters_name_at_once_are_an_error():
    with pytest.raises(ConfigError, match="name= and adapter_name= are one argument"):
        load_lora(torch.nn.Linear(2, 2), {}, name="a", adapter_name="a")


@pytest.mark.parametrize(
    "source, filename, name",
    [
        ("a/style.v2.safetensors", None, "style.v2"),
        ("owner/name", None, "name"),
        ("owner/name", "x.safetensors", "x"),
        ("https://huggingface.co/owner/name/blob/main/a/my%20style.safetensors?download=true", None, "my style"),
        ("https://huggingface.co/owner/name/tree/main/sub", None, "sub"),
    ],
)
def test_an_adapter_is_called_like_its_file(source, filename, name):
    assert name_in(source, filename) == name
