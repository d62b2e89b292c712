import hashlib
import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffpeft import ConfigError
from diffpeft.model.state import slots_of
from diffpeft.train import dreambooth
from diffpeft.train.checkpoints import writing
from diffpeft.train.posthoc import average, deviation, exponent, weights
from tests.families.pipelines import pipeline
from tests.train.test_saving import run_of


@pytest.mark.parametrize("g", [0.0, 1.0, 6.94, 16.97, 200.0])
def test_the_deviation_is_that_of_the_weights_power(g):
    s = torch.linspace(0, 1, 200001, dtype=torch.float64)
    density = (g + 1) * s**g
    mean = torch.trapezoid(density * s, s)
    assert deviation(g) == pytest.approx(torch.trapezoid(density * (s - mean) ** 2, s).sqrt().item(), rel=1e-4)
    assert exponent(deviation(g)) == pytest.approx(g, abs=1e-6)


def test_the_papers_widths():
    assert exponent(0.10) == pytest.approx(6.94, abs=0.01) and exponent(0.05) == pytest.approx(16.97, abs=0.01)


@pytest.mark.parametrize("width", [0.0, -1.0, 0.29])
def test_a_width_that_no_average_has_is_refused(width):
    with pytest.raises(ConfigError, match="width"):
        exponent(width)


@pytest.mark.parametrize("width", [0.02, 0.1, 0.2886])
def test_the_weights_are_the_integral_over_the_steps_since_the_state_before(width):
    steps, g = [100, 250, 300, 700], exponent(width)
    s = torch.linspace(0, 700, 70001, dtype=torch.float64)
    density = (g + 1) * s**g / 700 ** (g + 1)
    ends = [0, *steps]
    want = [
        torch.trapezoid(density[a * 100 : b * 100 + 1], s[a * 100 : b * 100 + 1]).item()
        for a, b in itertools.pairwise(ends)
    ]
    assert weights(steps, width) == pytest.approx(want, abs=1e-4) and sum(weights(steps, width)) == pytest.approx(1)


def test_the_files_of_states_are_averaged_tensor_by_tensor(tmp_path):
    torch.manual_seed(0)
    alpha, number, states = torch.tensor(4.0), torch.tensor([3]), []
    for step in (10, 20, 30):
        states.append({"w": torch.randn(3, 2), "h": torch.randn(2).half(), "alpha": alpha, "number": number})
        with writing(tmp_path / "run", "a", step) as folder:
            (folder / "adapter").mkdir()
            save_file(states[-1], folder / "adapter" / "a.safetensors", {"ss_steps": str(step)})
            (folder / "adapter" / "a.json").write_text(str(step))
            save_file({"x": torch.zeros(1)}, folder / "state.safetensors")
    files = average(tmp_path / "run", tmp_path / "out", 0.15)
    assert [str(f.relative_to(tmp_path / "out")) for f in files] == ["adapter/a.json", "adapter/a.safetensors"]
    tensors, shares = load_file(files[1]), weights([10, 20, 30], 0.15)
    for name in ("w", "h"):
        want = sum(share * state[name].double() for share, state in zip(shares, states, strict=True)).to(
            states[0][name].dtype
        )
        assert torch.equal(tensors[name], want)
    assert torch.equal(tensors["alpha"], alpha) and torch.equal(tensors["number"], number)
    assert files[0].read_text() == "30"
    with safe_open(files[1], "pt") as f:
        assert f.metadata()["ss_steps"] == "30"
        assert json.loads(f.metadata()["diffpeft.average"]) == {"steps": [10, 20, 30], "width": 0.15}


def test_one_state_is_no_average(tmp_path):
    with writing(tmp_path, "a", 5) as folder:
        (folder / "a.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="1 states"):
        average(tmp_path, tmp_path / "out", 0.1)


def test_an_average_has_hashes_of_its_own(tmp_path):
    for step in (10, 20):
        with writing(tmp_path / "run", "a", step) as folder:
            save_file({"w": torch.full((3,), float(step))}, folder / "a.safetensors", {"sshs_model_hash": "old"})
    (file,) = average(tmp_path / "run", tmp_path / "out", 0.15)
    content = file.read_bytes()
    with safe_open(file, "pt") as f:
        digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
        assert f.metadata()["sshs_model_hash"] == digest


def test_a_runs_states_are_averaged_in_each_of_its_formats(tmp_path):
    """A file and a folder of the same run give the same average."""
    run = run_of(pipeline("sd15", torch.float32), tmp_path, formats="kohya,peft", targets="to_q", save_dtype="bf16")
    for step in (10, 20):
        for slot in slots_of(run.family.pipe, "a").values():
            torch.nn.init.normal_(slot.tensors["lora_B"])
        with writing(tmp_path / "run", "a", step) as folder:
            dreambooth.exported(run, folder, step)
    average(tmp_path / "run", tmp_path / "out", 0.15)
    flat = {
        t.flatten()[0].item() for key, t in load_file(tmp_path / "out/a.kohya.safetensors").items() if "lora_up" in key
    }
    peft = load_file(tmp_path / "out/a.peft/adapter_model.safetensors")
    assert flat == {t.flatten()[0].item() for key, t in peft.items() if "lora_B" in key}
    assert {t.dtype for t in peft.values()} == {torch.bfloat16}
