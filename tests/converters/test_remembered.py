"""What a kind of file fits is remembered: by all that it depends on, and by nothing else."""

from __future__ import annotations

import torch

from diffpeft import converters, io
from diffpeft.converters import detection
from diffpeft.converters.opening import Opened, opened

UNET = {
    f"down_blocks.0.attentions.0.transformer_blocks.0.attn2.{layer}.{role}.weight": torch.zeros(shape)
    for layer in ("to_q", "to_k")
    for role, shape in (("lora_A", (4, 768)), ("lora_B", (320, 4)))
}


def fit_of(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> detection.Fit:
    """As a file would have them."""
    handles, _, where = opened(tensors)
    return converters.fitting(Opened(handles, metadata, where))


def test_another_file_of_the_same_kind_is_remembered_and_fits_the_same():
    detection._fit.cache_clear()
    first = fit_of(UNET, {"ss_output_name": "a"})
    second = fit_of({key: t + 1 for key, t in UNET.items()}, {"ss_output_name": "b", "title": "another"})
    assert detection._fit.cache_info()[:2] == (1, 1)  # hits, misses
    assert second.families == first.families and second.parts == first.parts and second.known == first.known
    tensors, metadata, _ = second.opened
    assert metadata["title"] == "another" and all((io.load([h])[0] == 1).all() for h in tensors.values())


def test_all_that_an_answer_depends_on_is_asked_again():
    kinds = [
        (UNET, {}),
        (UNET, {"modelspec.architecture": "stable-diffusion-v2"}),
        (UNET, {"ss_base_model_version": "sdxl_base_v1-0"}),
        (UNET, {detection.FORMAT: "peft"}),
        ({key.replace("attn2", "attn1"): t for key, t in UNET.items()}, {}),
        ({key: torch.zeros([1024 if n == 768 else n for n in t.shape]) for key, t in UNET.items()}, {}),
        (dict(reversed(UNET.items())), {}),
    ]
    fresh = []
    for tensors, metadata in kinds:
        detection._fit.cache_clear()
        fresh.append(fit_of(tensors, metadata))
    detection._fit.cache_clear()
    for _ in range(2):
        for (tensors, metadata), alone in zip(kinds, fresh, strict=True):
            fits = fit_of(tensors, metadata)
            assert (fits.format, fits.families, fits.ambiguous, fits.looks_like, fits.known) == (
                alone.format,
                alone.families,
                alone.ambiguous,
                alone.looks_like,
                alone.known,
            )
            assert list(fits.parts.items()) == list(alone.parts.items())
    assert fresh[0].families != fresh[5].families  # the widths tell the family


def test_every_metadatum_that_detection_looks_into_is_among_those_that_are_asked():
    class Noting(dict):
        """A dict that notes what is asked of it."""

        def __init__(self):
            self.asked: set[str] = set()

        def get(self, key, default=None):
            self.asked.add(key)
            return super().get(key, default)

        def __getitem__(self, key):
            self.asked.add(key)
            return super().__getitem__(key)

    handles, _, _ = opened(UNET)
    parts = detection._most(handles, [*converters.FORMATS])
    formats, layers, counts = detection._likeliest(parts, handles, noting := Noting())
    own = detection._Own(layers, noting, converters.FORMATS[formats[0]].tables)
    detection._decided(counts, layers, noting, formats, own, None)
    assert noting.asked and noting.asked <= {*detection._TOLD}
