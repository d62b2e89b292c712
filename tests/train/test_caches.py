"""What is kept is what would have been computed, bit for bit, whatever the options; and only where it fits."""

import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from diffpeft import TrainConfig
from diffpeft.families import open_family
from diffpeft.families.parts import Parts
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import data, dreambooth
from diffpeft.train.assembly import Assembly
from diffpeft.train.cache import Latents, Texts, text_identity
from diffpeft.train.check import check
from diffpeft.train.data import View
from diffpeft.train.store import Disk, Memory, Nowhere, identity_of, pruned
from tests.pairwise import covering

OPTIONS = {
    "flip": (False, True),
    "crop": ("center", "random"),
    "buckets": (True, False),
    "resolution": (64, (32, 64)),
    "caption_dropout": (0.0, 0.5),
    "shuffle_captions": (False, True),
    "mask": (None, "alpha"),
    "class_prompt": (None, "an emoji"),
    "batch_size": (1, 3),
}
ROWS = covering(*OPTIONS.values())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    folder.mkdir()
    (folder.parent / "class").mkdir()
    rng = np.random.default_rng(0)
    for n, size in enumerate([(64, 64), (96, 64), (64, 130)]):
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8))
        image.save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"an emoji, of, number {n}, [trigger]")
    for n in range(2):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder.parent / "class" / f"c{n}.png")
    return folder


STEPS = range(3, 8)


def config(photos, **options):
    prior = (
        {"class_data": str(photos.parent / "class"), "num_class_images": 2}
        if options["class_prompt"] and options.get("prior") != "base"
        else {}
    )
    return TrainConfig(
        sample_every=0,
        **{
            "model": str(EMBEDDED), "data": str(photos), "out": str(photos.parent / "out"), "trigger": "sks", "steps": 2, "rank": 1,
            "targets": "to_q", **options, **prior,
        }
    )  # fmt: skip


def assembled(config, family, store, texts):
    """What the steps of a run are made of: of each batch its tensors, frames and conditions."""
    sizing, checked = dreambooth.sizing_of(config, family), check(config)
    classes = data.captioned(checked.prior.paths(), config.class_prompt) if checked.prior else []
    kinds = {"instance": checked.account.examples, "class": classes}
    batches = [dreambooth.batches_of(config, examples, sizing, kind) for kind, examples in kinds.items()]
    assembly = Assembly(batches, Latents(family, store))
    assembly.learn(STEPS)
    texts.learn(assembly.prompts(STEPS))
    return [(batch, texts(batch.prompts)) for step in STEPS for batch in assembly.at(step)]


def same(a, b):
    """Whether two batches, with their conditions, are the same bit for bit."""
    (a, a_texts), (b, b_texts) = a, b
    tensors = [
        *((getattr(a, n), getattr(b, n)) for n in ("latents", "noise", "u", "is_class")),
        *((a_texts[n], b_texts[n]) for n in a_texts),
    ]
    masks = (a.mask is None) == (b.mask is None) and (a.mask is None or torch.equal(a.mask, b.mask))
    return masks and a.frames == b.frames and a.prompts == b.prompts and all(torch.equal(x, y) for x, y in tensors)


@pytest.fixture
def family(tiny_base):
    return open_family(Parts(tiny_base))


@pytest.mark.parametrize(
    "row",
    [*ROWS[:2], *(pytest.param(row, marks=pytest.mark.slow) for row in ROWS[2:])],
    ids=lambda row: "-".join(map(str, row)),
)
def test_kept_equals_computed_bit_for_bit(row, photos, family, tmp_path, monkeypatch):
    options = dict(zip(OPTIONS, row, strict=True))
    run = config(photos, **options)

    def made(store, live=()):
        with torch.no_grad():
            return assembled(run, family, store("vae"), Texts(family, live, store))

    def disk(component):
        return Disk(tmp_path, lambda: component)

    want = made(lambda component: Nowhere())
    assert all(map(same, want, made(lambda component: Memory())))
    assert all(map(same, want, made(disk)))
    calls = counted(family, monkeypatch)
    assert all(map(same, want, made(disk))) and not calls  # all is read
    assert len(want) >= len(STEPS) and {b.latents.shape[0] for b, _ in want} <= {
        options["batch_size"],
        2 * options["batch_size"],
    }


@pytest.mark.parametrize("live, prior", [(False, "images"), pytest.param(True, "base", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_run_is_the_same_wherever_its_latents_are_kept(live, prior, photos, tmp_path):
    options = {
        "class_prompt": "an emoji", "prior": prior, "mask": "alpha", "shuffle_captions": True, "caption_dropout": 0.5,
        "train_text_encoder": live, "overwrite": True,
    }  # fmt: skip
    disk = {"cache": "disk", "cache_dir": str(tmp_path / "cache")}
    runs = [
        dreambooth.train(config(photos, **options, **where)).losses for where in ({"cache": "none"}, {}, disk, disk)
    ]
    assert runs[0] == runs[1] == runs[2] == runs[3] and len(set(runs[0])) == 2
    assert any((tmp_path / "cache").rglob("*.safetensors"))


# -- the stores ------------------------------------------------------------------------------------------------------------


def test_an_entry_comes_back_bit_for_bit_and_a_damaged_one_is_none(tmp_path):
    store = Disk(tmp_path, lambda: "a model")
    tensors = {"mean": torch.randn(2, 3), "b": torch.randn(4).bfloat16(), "t": torch.randn(3, 5).T}
    key = ("latents", "é", (1, 2), True)
    assert store.get(key) is None
    store.put(key, tensors)
    back = Disk(tmp_path, lambda: "a model").get(key)
    assert back.keys() == tensors.keys() and all(
        torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items()
    )
    assert Disk(tmp_path, lambda: "another").get(key) is None and store.get((*key, 1)) is None
    path = store.path(key)
    path.write_bytes(path.read_bytes()[:-1])
    assert store.get(key) is None
    store.put(key, tensors)
    assert torch.equal(store.get(key)["mean"], tensors["mean"])
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_the_store_that_keeps_nothing_has_nothing():
    store = Nowhere()
    store.put(("a",), {"x": torch.ones(1)})
    assert store.get(("a",)) is None and not store.keeps and Memory().keeps


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    store = Disk(tmp_path, lambda: "")
    for n in range(5):
        store.put((n,), {"x": torch.zeros(1000)})
    size = store.path((0,)).stat().st_size
    assert pruned(tmp_path, 0) == 0  # another run may be using them
    for n in range(5):
        os.utime(store.path((n,)), (0, time.time() - 10000 + n))
    assert store.get((0,)) is not None  # which is a use
    assert pruned(tmp_path, 5 * size) == 0 and pruned(tmp_path, 3 * size) == 2
    assert [store.path((n,)).exists() for n in range(5)] == [True, False, False, True, True]


# -- what keys depend on -----------------------------------------------------------------------------------------------------


def counted(family, monkeypatch):
    """Counts what is encoded."""
    calls = []
    encode, embed = family.encode, family.embed
    monkeypatch.setattr(family, "encode", lambda x: calls.append(tuple(x.shape)) or encode(x))
    monkeypatch.setattr(family, "embed", lambda e, p, images=(): calls.append(tuple(p)) or embed(e, p))
    return calls


def test_a_view_is_encoded_again_if_anything_that_it_depends_on_changes(family, photos, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(photos, tmp_path / "photos")
    calls, folder = counted(family, monkeypatch), tmp_path / "photos"

    whole = View((64, 64))

    def encoded(view=whole, mask=None, name="0.png", model="m"):
        examples = data.survey(folder, "x", trigger="sks", mask=mask).examples
        example = next(e for e in examples if e.name == name)
        before = len(calls)
        Latents(family, Disk(tmp_path / "cache", lambda: model)).learn([example], [(0, view)], lambda: None)
        return len(calls) - before

    assert encoded() == 1 and encoded() == 0
    for changed in (
        {"view": View((64, 64), flipped=True)}, {"view": View((32, 64))}, {"view": View((32, 64), 1)}, {"view": View((64, 32), 0, 1)},
        {"mask": "alpha"}, {"name": "1.png"}, {"model": "n"},
    ):  # fmt: skip
        assert encoded(**changed) == 1 and encoded(**changed) == 0
    (folder / "0.png").rename(folder / "z.png")
    assert encoded(name="z.png") == 0  # the content counts, not the name
    Image.new("RGB", (64, 64)).save(folder / "z.png")
    assert encoded(name="z.png") == 1
    (folder / "masks").mkdir()
    for value, name in ((9, "z.png"), (8, "z.png")):
        Image.new("L", (64, 64), value).save(folder / "masks" / name)
        assert encoded(name="z.png", mask=str(folder / "masks")) == 1


def test_prompts_are_encoded_once_for_an_encoder(family, tmp_path, monkeypatch):
    calls = counted(family, monkeypatch)

    def stores(encoder):
        return Disk(tmp_path, lambda: text_identity(family, encoder, "75 1"))

    for prompts, n in ((["a", "b", "a"], 2), (["b", "c"], 1), (["a", "c"], 0)):
        before = len(calls)
        texts = Texts(family, stores=stores)
        texts.learn(prompts)
        assert len(calls) - before == n
        with torch.no_grad():
            want = torch.cat([family.embed("text_encoder", [p])["text_encoder"] for p in prompts])
            calls[before + n :] = []
        assert torch.equal(texts(prompts)["text_encoder"], want) and len(calls) == before + n


def test_a_model_with_another_bit_or_dtype_or_config_is_another(tiny_base):
    vae = tiny_base.vae
    was, weight = identity_of(vae), next(vae.parameters())
    assert identity_of(vae) == was
    old = weight.data.clone()
    weight.data.flatten()[0] = torch.nextafter(weight.data.flatten()[0], torch.tensor(9.0, dtype=weight.dtype))
    assert identity_of(vae) != was
    weight.data.copy_(old)
    assert identity_of(vae) == was
    scaling = vae.config.scaling_factor
    vae.register_to_config(scaling_factor=scaling * 2)
    assert identity_of(vae) != was
    vae.register_to_config(scaling_factor=scaling, _name_or_path="elsewhere")
    assert identity_of(vae) == was
