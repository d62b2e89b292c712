"""--push-to-hub without a network: what is told before training, what goes up, and that a failure loses nothing."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

from diffpeft import ConfigError, HubError, LoraConfig, TrainConfig, get_peft_model
from diffpeft.cli import cli
from diffpeft.llm import sft
from diffpeft.llm.sft_config import SftConfig
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import dreambooth
from diffpeft.train.check import check
from diffpeft.train.publish import open_repository, push
from tests.families.pipelines import pipeline
from tests.train.pictures import photos_in
from tests.train.test_saving import run_of


class Hub:
    """A Hub that knows one person, and keeps what it is sent."""

    def __init__(self):
        self.files, self.private, self.role, self.card, self.error = {}, None, "write", None, None

    def whoami(self):
        if self.role is None:
            raise OSError("401 Client Error: Unauthorized\nand a long story")
        return {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": self.role}}}

    def create_repo(self, repo_id, private=None, exist_ok=False):
        assert exist_ok
        self.private = private
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id, folder_path, **options):
        if self.error:
            raise self.error
        root = Path(folder_path)
        self.files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        return f"https://huggingface.co/{repo_id}/commit/1"

    def download(self, repo_id, name, **options):
        if self.card is None:
            raise EntryNotFoundError("none")
        return self.card


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token=None: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return hub


@pytest.fixture
def run(tmp_path):
    run = run_of(pipeline("sd15", torch.float32), tmp_path / "out", push_to_hub="me/dog", formats="kohya,peft")
    for step in (0, 7):
        folder = tmp_path / "out" / "samples" / f"step{step:08d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "p0_s1.png")
    (tmp_path / "out/checkpoints").mkdir()
    (tmp_path / "out/checkpoints/state.json").write_text("{}")
    dreambooth.save(run)
    return run


def test_files_card_and_samples_go_up_and_nothing_else(hub, run):
    run.config.hub_private = True
    assert push(run) == "https://huggingface.co/me/dog/commit/1" and hub.private is True
    assert {*hub.files} == {
        "README.md",
        "a.kohya.safetensors",
        "a.peft/adapter_config.json",
        "a.peft/adapter_model.safetensors",
        "samples/step00000000/p0_s1.png",
        "samples/step00000007/p0_s1.png",
    }
    assert hub.files["a.kohya.safetensors"] == (Path(run.config.out) / "a.kohya.safetensors").read_bytes()
    assert "'me/dog', weight_name='a.kohya.safetensors'" in ModelCard(hub.files["README.md"].decode()).text


def test_a_card_that_is_not_ours_is_kept_there_too(hub, run, tmp_path):
    hub.card = tmp_path / "theirs.md"
    hub.card.write_text("---\nlicense: mit\n---\n\nTheirs.\n")
    push(run)
    card = ModelCard(hub.files["README.md"].decode())
    assert "Theirs." in card.text and card.data.license == "mit" and "text-to-image" in card.data.tags
    hub.card = None
    (tmp_path / "out/README.md").write_text("Mine.\n")
    push(run)
    assert "Mine." in ModelCard(hub.files["README.md"].decode()).text


def test_a_failure_loses_nothing_and_says_how_to_try_again(hub, run):
    hub.error = OSError("the network is gone\nTraceback")
    before = {path: path.read_bytes() for path in Path(run.config.out).rglob("*") if path.is_file()}
    with pytest.raises(HubError, match=r"the network is gone\)") as raised:
        push(run)
    words = shlex.split(raised.value.remedy.partition("Try again with: ")[2])
    assert words[:5] == ["hf", "upload", "me/dog", str(Path(run.config.out).resolve()), "."]
    included = {path for pattern in words[6::2] for path in Path(run.config.out).glob(pattern.replace("s/*", "s/*/*"))}
    assert {"README.md", "a.kohya.safetensors", "p0_s1.png"} <= {path.name for path in included}
    assert words[5::2] == ["--include"] * len(words[6::2])
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["a/b/c", "my dog", "-x", "me/..", "me/" + "x" * 200])
def test_names_that_no_repository_can_have_are_told_at_once(name, hub, tmp_path):
    config = TrainConfig(model="/no/model", data="/no/data", out=str(tmp_path / "out"), push_to_hub=name)
    with pytest.raises(ConfigError, match="push_to_hub is"):
        check(config)


def test_no_token_and_no_network_are_told_at_once(hub, tmp_path, monkeypatch):
    config = TrainConfig(model="/no/model", data="/no/data", out=str(tmp_path / "out"), push_to_hub="me/dog")
    with monkeypatch.context() as m, pytest.raises(ConfigError, match="no token"):
        m.setattr("huggingface_hub.get_token", lambda: None)
        check(config)
    with monkeypatch.context() as m, pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        m.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        check(config)


@pytest.mark.parametrize(
    "repository, role, words",
    [
        ("them/dog", "write", r"me cannot write there.*me, us"),
        ("me/dog", "read", "may only read"),
        ("me/dog", None, r"401 Client Error: Unauthorized\)"),
    ],
)
def test_a_token_that_may_not_write_is_told_before_anything_is_loaded(
    repository, role, words, hub, tmp_path, monkeypatch
):
    hub.role = role
    monkeypatch.setattr(dreambooth, "opened", lambda *args: pytest.fail("the model was opened"))
    photos_in(tmp_path)
    config = TrainConfig(
        str(EMBEDDED), str(tmp_path / "photos"), str(tmp_path / "out"), instance_prompt="x", push_to_hub=repository
    )
    with pytest.raises(HubError, match=words):
        dreambooth.train(config)


def test_ones_own_and_an_organisations_repositories_are_made(hub):
    for repository in ("me/dog", "us/dog", "dog"):
        open_repository(TrainConfig(push_to_hub=repository))
    assert hub.private is None


@pytest.mark.slow
def test_the_command_lists_the_files_even_if_they_do_not_go_up(hub, tmp_path, capfd):
    from diffpeft.cli.errors import run as command

    photos_in(tmp_path)
    hub.error = OSError("gone")
    options = ["--steps", "1", "--rank", "1", "--targets", "to_q", "--save-every", "0", "--push-to-hub", "me/dog"]
    model = ["-m", str(EMBEDDED), "-d", str(tmp_path / "photos"), "-o", str(tmp_path / "out")]
    assert command(cli, ["train", *model, "--instance-prompt", "x", *options]) == 1
    told = capfd.readouterr()
    assert "out.kohya.safetensors" in told.out and "hf upload me/dog" in told.err


def test_a_repository_made_private_needs_a_repository():
    assert CliRunner().invoke(cli, ["train", "--hub-private"]).exit_code != 0
    with pytest.raises(ConfigError, match="hub_private without push_to_hub"):
        TrainConfig("m", "d", "o", hub_private=True).check_values()


def test_sft_uploads_the_adapter_and_its_card(hub, tmp_path):
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), LoraConfig(target_modules=["0"]))
    config = SftConfig(out=str(tmp_path), push_to_hub="me/text")
    run = sft.SftRun(config, model, None, [1.0], {}, [], 1, 0.0, None)
    assert sft.push(run).startswith("https://huggingface.co/me/text")
    assert {*hub.files} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    hub.error = OSError("gone")
    with pytest.raises(HubError, match=r"hf upload me/text .* --include 'adapter_\*'"):
        sft.push(run)
