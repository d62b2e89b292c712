"""Runs whose base is in few bits, or partly on the host."""

import pytest
import torch

from diffpeft import TrainConfig
from diffpeft.layers.streaming import stream_of
from diffpeft.train import dreambooth
from diffpeft.train.save import save
from tests.families.pipelines import pipeline
from tests.train.pictures import photos_in

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    photos_in(folder)
    for kind in ("flux dev", "sdxl"):
        pipeline(kind, torch.float32).save_pretrained(folder / kind)
    return folder


def trained(folder, kind="flux dev", **options):
    usual = {
        "model": str(folder / kind),
        "data": str(folder / "photos"),
        "out": str(folder / "out"),
        "instance_prompt": "x",
        "resolution": 64,
        "steps": 3,
        "rank": 4,
        "lr": 1e-2,
        "overwrite": True,
        "log": "none",
        "sample_every": 0,
    }
    run = dreambooth.train(TrainConfig(**usual | options))
    return run, {path.name: path.read_bytes() for path in save(run)}


def tensors(files):
    from safetensors.torch import load

    (name,) = (name for name in files if "kohya" not in name)
    return load(files[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, options",
    [
        ("flux dev", {"method": "dora"}),
        pytest.param("flux dev", {"heldout": "1", "sample_every": 2, "sample_steps": 2}, marks=SLOW),
        pytest.param("sdxl", {"gradient_checkpointing": True, "class_prompt": "y", "num_class_images": 1}, marks=SLOW),
        pytest.param("flux dev", {"method": "lokr", "prior": "base", "base_range": "0.9,1"}, marks=SLOW),
        pytest.param("flux dev", {"base_lora": "BASE", "quantize": "int8"}, marks=SLOW),
    ],
)
def test_the_adapter_is_the_same_bytes_wherever_blocks_live(folder, kind, options):
    if "base_lora" in options:
        trained(folder, out=str(folder / "before"), name="before", formats="diffusers")
        options = options | {"base_lora": f"{folder / 'before' / 'before.diffusers.safetensors'}:0.5"}
    _, alone = trained(folder, kind, **options)
    for offload in (0.4,):
        run, files = trained(folder, kind, offload=offload, **options)
        assert stream_of(getattr(run.family.pipe, run.family.denoiser)).blocks
        changed = {name for name, data in files.items() if data != alone[name]}
        assert not changed or equal_tensors(files, alone)  # what a file says of the run may differ


def equal_tensors(files, others):
    a, b = tensors(files), tensors(others)
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())
