"""The examples and the README's commands run, or at least say what the code understands."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import diffpeft
from diffpeft.llm.sft_config import SftConfig
from diffpeft.methods import METHODS
from diffpeft.pipeline.open import open_pipeline
from diffpeft.train.config import TrainConfig
from diffpeft.train.config_files import from_toml
from diffpeft.train.slider_config import SliderConfig
from tests.llm.models import model

ROOT = Path(__file__).parent.parent


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = sys.modules[path.stem] = importlib.util.module_from_spec(
        spec
    )  # there dataclasses look for what annotations name
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda p: p.name)
def test_a_config_is_one_that_its_command_takes_which_stands_first(path):
    _, program, name, file = path.read_text().splitlines()[0].split()
    assert (program, file) == ("diffpeft", f"examples/{path.name}")
    options = from_toml(path, {}, {"train": TrainConfig, "sft": SftConfig, "slider": SliderConfig}[name])
    options.validate()
    for data in (options.data, getattr(options, "heldout", None)):
        assert data is None or not data.endswith(".jsonl") or (ROOT / data).is_file()


@pytest.mark.slow
def test_a_server_gives_each_request_what_it_asks_for(tmp_path):
    """Requests of a batch, adapters that come and go, one that is broken: each picture is the one that its request gives alone."""
    pipe = open_pipeline()
    for name in ("a", "b"):
        diffpeft.attach(pipe.unet, diffpeft.LoraConfig(r=2, init_lora_weights=False), name, targets=["attn1.to_q"])
        diffpeft.save_lora(pipe, tmp_path / f"{name}.safetensors", name=name)
        diffpeft.unload(pipe)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    server = module(ROOT / "examples" / "server.py")
    requests = [server.Request("a cat", mix, seed) for seed, mix in enumerate([{"a": 1.0}, {"b": -1.0, "a": 0.5}, {}])]

    def drawn(batch):
        painter = server.Painter(tmp_path, batch=batch, steps=2, budget=0)
        answers = [painter.draw(request) for request in [*requests, server.Request("a cat", {"broken": 1.0})]]
        with pytest.raises(KeyError, match=r"no adapter 'c'\. There are: a, b, broken"):
            painter.draw(server.Request("a cat", {"c": 1.0}))
        with pytest.raises(diffpeft.DiffpeftError):
            answers.pop().result()
        pictures = np.stack([np.asarray(answer.result(), dtype=int) for answer in answers])
        painter.close()
        assert len(painter.loaded) == 1 and [*diffpeft.get_adapters(painter.pipe)] == [*painter.loaded]
        return pictures

    together, alone = drawn(batch=4), drawn(batch=1)
    assert abs(together - alone).max() <= 1  # of 255: products of several rows are rounded otherwise
    assert abs(alone[0] - alone[2]).max() > 20


@pytest.mark.slow
def test_the_servers_pages_are_pngs_and_its_errors_say_why(tmp_path):
    testclient = pytest.importorskip(
        "fastapi.testclient", reason="the server is an example, and FastAPI none of the requirements"
    )
    server = module(ROOT / "examples" / "server.py")
    painter = server.Painter(tmp_path, batch=1, steps=1)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    client = testclient.TestClient(server.app(painter))
    assert client.get("/adapters").json() == {"adapters": ["broken"], "loaded": []}
    assert client.post("/draw", json={"prompt": "a cat"}).content.startswith(b"\x89PNG")
    for mix, status in (({"c": 1.0}, 404), ({"broken": 1.0}, 422)):
        assert client.post("/draw", json={"prompt": "a cat", "mix": mix}).status_code == status
    painter.close()


def test_the_readme_is_short_and_begins_with_its_picture():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 150 and lines[2].startswith("![")


def test_the_readme_has_the_two_commands_alone_on_a_line_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert "\nmake demo\n" in text and "\nmake test\n" in text
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


def snippets():
    jobs = ("methods", "adapters", "diffusers", "servers", "from-webui", "own-method")
    pages = ["README.md", *(f"docs/{name}.md" for name in jobs)]
    for page in [*pages, *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/methods/*.md"))]:
        for i, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)):
            slow = pytest.mark.slow if "methods/" in page else ()  # the contracts attach every method
            yield pytest.param(block, id=f"{page}-{i}", marks=slow)


@pytest.mark.parametrize("block", snippets())
def test_the_pages_python_runs(block, fresh, tmp_path, monkeypatch):
    """Each block on a pipeline of its own, on which the adapters that it speaks of are loaded unless it loads them itself."""
    monkeypatch.chdir(tmp_path)
    pipe = fresh(torch.float32)
    for name in ("style", "person"):
        config = diffpeft.LoraConfig(r=2, init_lora_weights=False)
        diffpeft.attach(pipe, config, name, targets=["attn1.to_q", "up_blocks.0.attentions.0.proj_in", "fc1"])
        diffpeft.save_lora(pipe, f"{name}.safetensors", name=name)
        if "load_lora" in block:
            diffpeft.unload(pipe)
    quick = block.replace('pipe("a castle")', 'pipe("a castle", num_inference_steps=1)')
    names = {"pipe": pipe, "unet": pipe.unet, "diffpeft": diffpeft, "torch": torch}
    methods = dict(METHODS)
    try:
        exec(quick, names | ({"base_model": model()} if "base_model" in block else {}))
    finally:  # a page may add one
        for method in METHODS.keys() - methods:
            del METHODS[method]
