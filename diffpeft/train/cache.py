"""What does not change while an adapter trains is computed once: latents, and text embeddings of text encoders that are frozen.

Every view of an image and every caption is encoded by itself: what it comes to does not depend on what else a run shows, nor on where it is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from diffpeft.families import Conditions, Family
from diffpeft.families.prompts import stacked
from diffpeft.train.data import Example, View
from diffpeft.train.data.controls import NONE, Controls, shown_with
from diffpeft.train.data.footage import pictures_of
from diffpeft.train.data.masks import masked
from diffpeft.train.data.read import numbers, picture
from diffpeft.train.draw import generator
from diffpeft.train.store import Key, Memory, Store, Tensors, identity_of
from diffpeft.train.team import team

Entries = dict[Key, Tensors]  # of a store


class Moments(NamedTuple):
    """Mean and standard deviation of a view's latents [c, *size], how much each place counts [1, h, w], if there is a mask, and what the denoiser reads of
    pictures beside them, without the batch's axis.
    """

    mean: Tensor
    std: Tensor
    mask: Tensor | None
    conditions: Conditions

    def draw(self, *key: int | str) -> Tensor:
        """A sample [c, h, w] of the posterior, a function of `key`."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator(*key, "posterior"))


class Prompt(NamedTuple):
    """A prompt, and the control images beside it, for text encoders that look at them."""

    text: str
    controls: Controls = NONE


class Latents:
    """The latents of views of images, and what the denoiser reads of their control images. A draw from the posterior costs two small operations, where
    they are kept.
    """

    def __init__(self, family: Family, store: Store | None = None):
        self.family, self.store = family, store or Memory()

    def learn(self, examples: Sequence[Example], views: Iterable[tuple[int, View]], tick: Callable[[], None]) -> None:
        """Compute the latents of views (example, view), each image read once, by one of the processes of the run."""
        if not self.store.keeps:
            return
        by_image: dict[int, list[View]] = {}
        for index, view in views:
            by_image.setdefault(index, []).append(view)

        def computed(image: tuple[int, list[View]]) -> Entries:
            example, views = examples[image[0]], image[1]
            missing = [view for view in views if self._kept(example, view) is None]
            if missing:
                pictures = _pictures(example)
                for view in missing:
                    self._compute(example, view, pictures)
            return entries_of(self.store, [key for view in missing for key in self._keys(example, view)])

        for entries in team().divided(list(by_image.items()), computed):
            for key, tensors in entries.items():
                self.store.put(key, tensors)
            tick()

    def done(self) -> None:
        """Give up the VAE, if latents are kept."""
        if self.store.keeps:
            self.family.parts.free(*self.family.viewers)

    def __call__(self, example: Example, view: View) -> Moments:
        """The latents of a view, which are computed if they are not kept."""
        kept_moments = self._kept(example, view)
        return self._compute(example, view, _pictures(example)) if kept_moments is None else kept_moments

    def controls(self, example: Example, view: View) -> Controls:
        """The control images of an example where it is shown so."""
        return shown_with(example, view, self.family.multiple)

    def _keys(self, example: Example, view: View) -> list[Key]:
        """Under which the latents of a view are kept, and what is read beside them, if anything is."""
        mask = "" if example.mask is None else "alpha"
        if example.mask not in (None, example.path):
            mask = self.store.of_file(example.mask)
        shown, controls = (self.store.of_file(example.path), mask, *_facts(view)), self.controls(example, view)
        keys: list[Key] = [("latents", *shown)]
        if controls.paths or self.family.first_frame:
            read = shown if self.family.first_frame else ()
            keys.append(("conditions", type(self.family).__name__, *read, *keyed(self.store, controls)))
        return keys

    def _kept(self, example: Example, view: View) -> Moments | None:
        """All of a view, if it is kept."""
        entries = [self.store.get(key) for key in self._keys(example, view)]
        if any(tensors is None for tensors in entries):
            return None
        latents, *conditions = (tensors or {} for tensors in entries)
        return Moments(latents["mean"], latents["std"], latents.get("mask"), conditions[0] if conditions else {})

    def _compute(self, example: Example, view: View, pictures: Sequence[Image.Image]) -> Moments:
        shown = torch.stack([numbers(view.of(image)) for image in pictures], 1)  # [3, f, h, w]
        pixels = (shown if view.frames else shown.squeeze(1))[None]
        mean, std = (t[0].cpu() for t in self.family.encode(pixels))
        mask = masked(example, view, (mean.shape[-2], mean.shape[-1]))
        latents, *others = self._keys(example, view)
        self.store.put(latents, {"mean": mean, "std": std} | ({} if mask is None else {"mask": mask}))
        conditions: Conditions = {}
        for key in others:
            read = self.family.condition(pixels, self.controls(example, view).pixels())
            conditions = {name: t[0].cpu() for name, t in read.items()}
            self.store.put(key, conditions)
        return Moments(mean, std, mask, conditions)


def _facts(view: View) -> Key:
    """All of a view."""
    facts: Key = (view.target, view.left, view.top, view.flipped)
    return (*facts, view.frames) if view.frames else facts


def _pictures(example: Example) -> list[Image.Image]:
    """An image, or the frames of a clip."""
    return pictures_of(example.path, example.frames) if example.frames else [picture(example.path)]


def keyed(store: Store, controls: Controls) -> Key:
    """What stands for control images in keys: what their files hold, and how they are shown."""
    pairs = zip(controls.paths, controls.views, strict=True)
    return tuple(fact for path, view in pairs for fact in (store.of_file(path), *_facts(view)))


class Texts:
    """What text encoders make of prompts; of `live` ones (they are being trained) anew each time."""

    def __init__(
        self,
        family: Family,
        live: Collection[str] = (),
        stores: Callable[[str], Store] | None = None,
        device: str | None = None,
    ):
        self.family, self.live, self.device = family, tuple(live), device
        frozen = [encoder for encoder in family.text_encoders if encoder not in self.live]
        self.stores: dict[str, Store] = {encoder: stores(encoder) if stores else Memory() for encoder in frozen}

    def learn(self, prompts: Iterable[str | Prompt]) -> None:
        """Compute what these prompts need, an encoder after the other, and give up those that are not trained."""
        asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        for encoder, store in self.stores.items():
            looks = encoder in self.family.looking  # then no prompt is asked without control images
            if store.keeps:
                seen = dict.fromkeys(self._seen(encoder, prompt) for prompt in asked)
                self._learn(encoder, store, [prompt for prompt in seen if prompt.controls.paths or not looks])
                self.family.parts.free(encoder)

    def _seen(self, encoder: str, prompt: Prompt) -> Prompt:
        """What an encoder sees of a prompt."""
        return prompt if encoder in self.family.looking else Prompt(prompt.text)

    def _key(self, encoder: str, prompt: Prompt) -> Key:
        return (encoder, prompt.text, *keyed(self.stores[encoder], prompt.controls))

    def _learn(self, encoder: str, store: Store, prompts: Sequence[Prompt]) -> None:
        """Compute what an encoder makes of prompts, each by one of the processes of the run."""

        def computed(prompt: Prompt) -> Entries:
            key = self._key(encoder, prompt)
            if store.get(key) is not None:
                return {}
            self._compute(encoder, prompt)
            return entries_of(store, [key])

        for entries in team().divided(prompts, computed):
            for key, row in entries.items():
                store.put(key, {name: t.to(self.device) for name, t in row.items()})

    def __call__(self, prompts: Sequence[str], controls: Sequence[Controls] = ()) -> Conditions:
        """What the denoiser reads of these prompts, each [b, ...]. `controls`: the control images beside each, if there are any."""
        asked = [Prompt(text, beside) for text, beside in zip(prompts, controls or [NONE] * len(prompts), strict=True)]
        conditions: Conditions = {}
        for encoder in self.live:
            conditions |= self.family.embed(encoder, prompts)
        for encoder in self.stores:
            seen = [self._seen(encoder, prompt) for prompt in asked]
            rows = {prompt: self._row(encoder, prompt) for prompt in dict.fromkeys(seen)}
            batch = stacked([rows[prompt] for prompt in seen])
            conditions |= {name: t.to(self.device) if t.is_floating_point() else t for name, t in batch.items()}
        return conditions

    def _row(self, encoder: str, prompt: Prompt) -> Conditions:
        """What an encoder makes of one prompt, without the batch's axis."""
        kept_row = self.stores[encoder].get(self._key(encoder, prompt))
        return self._compute(encoder, prompt) if kept_row is None else kept_row

    @torch.no_grad()
    def _compute(self, encoder: str, prompt: Prompt) -> Conditions:
        read = self.family.embed(encoder, [prompt.text], prompt.controls.pixels())
        row = {name: t[0] for name, t in read.items()}
        self.stores[encoder].put(self._key(encoder, prompt), row)
        return row


def entries_of(store: Store, keys: Sequence[Key]) -> Entries:
    """What a store has under keys, to hand to the other processes of the run, which may find it themselves."""
    if store.shared or team().size == 1:
        return {}
    entries = {key: store.get(key) for key in keys}
    return {key: {name: t.cpu() for name, t in (tensors or {}).items()} for key, tensors in entries.items()}


def text_identity(family: Family, encoder: str, reading: str) -> str:
    """All that embeddings depend on but their prompts: the encoder, or all that read together, `reading` (how much of a caption and off which layer), the
    pipeline and the tokenizers.
    """
    pipe = family.parts.pipe
    kind = f"{type(family).__name__} {type(pipe).__name__} {reading}"
    digest, parts = hashlib.blake2b(kind.encode(), digest_size=16), pipe.components
    for name in sorted(n for n in parts if parts[n] is not None and n.startswith(("tokenizer", "processor"))):
        tokenizer = getattr(pipe, name)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
        rules = {
            rule: value for rule, value in rules.items() if rule not in ("truncation", "padding")
        }  # of the last call
        digest.update(
            f"{name} {tokenizer.model_max_length} {tokenizer.chat_template} {json.dumps(rules, sort_keys=True)}".encode()
        )
    encoders = family.text_encoders if family.together else (encoder,)
    return " ".join([encoder, digest.hexdigest(), *(identity_of(family.parts(name)) for name in encoders)])
