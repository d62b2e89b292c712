"""Whole runs of two processes: what they learn, hold, compute and write is what one process with twice the passes does."""

import json
import time

import pytest
import torch

from diffpeft import DataError
from diffpeft.layers.slot import Slot
from diffpeft.llm import sft
from diffpeft.llm.sft_config import SftConfig
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import cache, dreambooth, paired, prior, state
from diffpeft.train.checkpoints import checkpoints_in, sha256
from diffpeft.train.config import TrainConfig
from diffpeft.train.method import ADAPTERS
from diffpeft.train.shards import local_bytes
from diffpeft.train.team import team
from tests.families import pipelines
from tests.llm import chat
from tests.train.pictures import photos_in, shown_beside
from tests.train.together import processes

STEPS = 2
CASES = {
    "lora": {},
    "text encoder": {"train_text_encoder": True, "gradient_checkpointing": True},
    "class images": {"class_prompt": "an emoji", "num_class_images": 3},
    "base": {"prior": "base", "class_prompt": "an emoji", "ema": 0.9, "flip": True, "caption_dropout": 0.3},
    "disk": {"cache": "disk", "crop": "random"},
    "none": {"cache": "none"},
    "samples": {"sample_every": 1, "sample_steps": 2, "save_every": 1},
    "heldout": {"heldout": 1, "heldout_every": STEPS, "batch_size": 2},
}
CASES |= {name: {"method": name, "lr": 1e-3} for name in ADAPTERS if name not in CASES}
# one of each family; captions are read by an encoder that is trained where there is one that can be
KINDS = tuple({family: kind for kind, (family, _) in reversed(pipelines.KINDS.items())}.values())
CASES |= {kind: {"model": kind, "resolution": 32, "train_text_encoder": kind in ("sd2, v", "sdxl")} for kind in KINDS}
CASES["hidream"]["max_length"] = 64  # as many as the tiny one has places
SHARDED = {*KINDS, "text encoder", "base", "samples", "heldout", *ADAPTERS}


def config(photos, out, **options):
    values = {
        "model": str(EMBEDDED),
        "sample_every": 0,
        "data": str(photos),
        "out": str(out),
        "instance_prompt": "an emoji of sks",
    }
    return TrainConfig(**{**values, "steps": STEPS, "rank": 2, "accumulate": 2 // team().size, **options})


def ran(folder, name, *, counts, **options):
    """Train and save; how many forwards of VAE and text encoder this process made, and the bytes of the base that it holds."""
    counts.clear()
    if (kind := options.get("model")) in KINDS:
        options |= {"model": str(folder / kind), **shown_beside(kind, folder / "photos")}
    run = dreambooth.train(config(folder / "photos", folder / name, **options))
    files = dreambooth.save(run)
    denoiser = getattr(run.family.pipe, run.family.denoiser)
    base, adapter = local_bytes(denoiser), 0
    for module in denoiser.modules():
        adapter += local_bytes(module) if isinstance(module, Slot) else 0
    heldout = [loss.after for loss in run.heldout]
    return {
        "losses": run.losses,
        "heldout": heldout,
        "files": [path.name for path in files],
        "base": base - adapter,
        **counts,
    }


class Counted:
    """Counts what is computed for the caches, and the class images drawn, by this process."""

    def __init__(self, monkeypatch):
        self.counts = {}
        for owner, name in ((cache.Latents, "_compute"), (cache.Texts, "_compute"), (prior, "replacing")):
            monkeypatch.setattr(
                owner, name, self.counted(f"{owner.__name__.rpartition('.')[2]}.{name}", getattr(owner, name))
            )

    def counted(self, name, function):
        def call(*args, **keywords):
            self.counts[name] = self.counts.get(name, 0) + 1
            return function(*args, **keywords)

        return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    photos_in(folder)
    return folder


def together(folder, names, counts):
    """Two processes that do some of the cases, DDP and sharded, in one life; what each noted."""

    def job():
        noted = {}
        for name in names:
            noted[name] = ran(folder, f"two-{name}", counts=counts, **CASES[name])
            if name in SHARDED:
                options = CASES[name] | {"fsdp": True}
                noted[f"sharded {name}"] = ran(folder, f"sharded-{name}", counts=counts, **options)
                team().sharded = False
        (folder / f"noted-{team().rank}.json").write_text(json.dumps(noted))

    codes = processes(folder, job, seconds=240)
    assert codes == [0, 0], [path.read_text() for path in folder.glob("error-*")]
    return [json.loads((folder / f"noted-{rank}.json").read_text()) for rank in (0, 1)]


def tensors_of(folder, name):
    checkpoint = checkpoints_in(folder / name)[-1]
    return state.read_parts(checkpoint.folder / state.FILE)


def same(folder, name, other):
    first, second = (checkpoints_in(folder / each)[-1] for each in (name, other))
    return sha256(first.folder / state.FILE) == sha256(second.folder / state.FILE)


NAMES = [pytest.param([name], marks=() if name == "lora" else pytest.mark.slow, id=name) for name in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("names", NAMES)
def test_two_processes_are_one_with_twice_the_passes(names, folder, monkeypatch):
    counted = Counted(monkeypatch)
    monkeypatch.setattr(paired, "ROWS", 1)  # few predictions
    (name,) = names
    if name in KINDS:
        pipelines.pipeline(name, torch.float32).save_pretrained(folder / name)
    alone = ran(folder, f"one-{name}", counts=counted.counts, **CASES[name])
    first, second = together(folder, names, counted.counts)
    assert first[name]["losses"] == second[name]["losses"] == alone["losses"]
    assert first[name]["heldout"] == second[name]["heldout"] == alone["heldout"]
    assert first[name]["files"] and second[name]["files"] == []
    assert same(folder, f"two-{name}", f"one-{name}")
    if name == "class images":
        images = [
            {p.name: p.read_bytes() for p in (folder / run / "class").iterdir()}
            for run in ("one-" + name, "two-" + name)
        ]
        assert images[0] == images[1] and len(images[0]) == 4
        assert sorted([first[name]["prior.replacing"], second[name]["prior.replacing"]]) == [1, 3]  # and class.json
    if CASES[name].get("cache") != "none":
        for kind in ("Latents._compute", "Texts._compute"):
            computed = [each[name].get(kind, 0) for each in (first, second)]
            assert sum(computed) == alone.get(kind, 0) and (alone.get(kind, 0) < 2 or min(computed) > 0)
    if name in SHARDED:
        kept = [each[f"sharded {name}"] for each in (first, second)]
        # the gathered weights are the same numbers at other addresses, for which kernels add up in another order
        assert kept[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5) and kept[0]["losses"] == kept[1]["losses"]
        assert (
            kept[0]["heldout"] == pytest.approx(alone["heldout"], rel=1e-5) and kept[0]["heldout"] == kept[1]["heldout"]
        )
        assert kept[0]["files"] == [file.replace("two", "sharded") for file in first[name]["files"]]
        shares = [each["base"] for each in kept]
        assert sum(shares) == alone["base"] and max(shares) < 0.6 * alone["base"]  # rows are not always even
        before, after = tensors_of(folder, f"one-{name}"), tensors_of(folder, f"sharded-{name}")
        for key, t in before[state.ADAPTER].items():
            torch.testing.assert_close(after[state.ADAPTER][key], t, rtol=1e-4, atol=2e-5)


# -- texts -----------------------------------------------------------------------------------------------------------------


def texts_config(folder, out, **options):
    values = {"model": str(folder / "model"), "data": str(folder / "rows.jsonl"), "heldout": str(folder / "rows.jsonl")}
    values |= {"overwrite": True, "rank": 2, "lr": 1e-2, "batch_size": 2, "samples": 1, "targets": "q_proj,v_proj"}
    return SftConfig(**{**values, "out": str(folder / out), "steps": 3, "accumulate": 2 // team().size, **options})


def test_a_language_model_too(tmp_path):
    chat.write_model(tmp_path / "model")
    chat.write_rows(tmp_path / "rows.jsonl")
    alone = sft.train(texts_config(tmp_path, "alone"))
    sft.save(alone)

    def job():
        noted = {}
        for name, fsdp in (("two", False), ("sharded", True)):
            run = sft.train(texts_config(tmp_path, name, fsdp=fsdp))
            files = sft.save(run)
            noted[name] = {"losses": run.losses, "heldout": run.heldout_loss, "files": [path.name for path in files]}
            noted[name]["bytes"] = local_bytes(run.model.get_base_model())
        (tmp_path / f"noted-{team().rank}.json").write_text(json.dumps(noted))

    codes = processes(tmp_path / "pair", job)
    assert codes == [0, 0], [path.read_text() for path in (tmp_path / "pair").glob("error-*")]
    first, second = (json.loads((tmp_path / f"noted-{rank}.json").read_text()) for rank in (0, 1))
    assert first["two"]["losses"] == second["two"]["losses"] == alone.losses
    assert same(tmp_path, "two", "alone")
    assert first["two"]["heldout"] == alone.heldout_loss and second["two"]["files"] == []
    assert {"adapter_model.safetensors", "report.html"} <= set(first["two"]["files"])
    assert first["sharded"]["losses"] == pytest.approx(alone.losses, rel=1e-5)  # as above
    assert first["sharded"]["heldout"] == pytest.approx(alone.heldout_loss, rel=1e-4)
    for noted in (first, second):
        assert noted["sharded"]["bytes"] < 0.6 * noted["two"]["bytes"]


# -- what goes wrong before the first step -----------------------------------------------------------------------------------


def test_a_picture_that_one_process_cannot_read_ends_both_with_its_error(folder, tmp_path, monkeypatch):
    original = cache.picture

    def picture(path):
        if team().rank == 1:
            raise DataError("cannot read it", where=path)
        return original(path)

    monkeypatch.setattr(cache, "picture", picture)
    start = time.monotonic()

    def job():
        try:
            dreambooth.train(config(folder / "photos", tmp_path / "out"))
        except Exception as error:
            from diffpeft.train import machines

            told = [type(error).__name__, machines.speaks(getattr(error, "exit_code", 1)), machines.shared_code(1)]
            (tmp_path / f"told-{team().rank}.json").write_text(json.dumps(told))

    assert processes(tmp_path / "pair", job) == [0, 0] and time.monotonic() - start < 60
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert told == [["LostProcessError", False, DataError.exit_code], ["DataError", True, DataError.exit_code]]
