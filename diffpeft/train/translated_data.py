"""What other trainers' options say together of the model, the data, captions, masks and the prior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from diffpeft.errors import listed
from diffpeft.train.other_names import words
from diffpeft.train.translation import Translation


def _files(to: Translation) -> None:
    """The files of text encoders."""
    if files := to.said("clip_l", "clip_g", "t5xxl", "text_encoder_path"):
        to.put("text_encoder", [str(value) for _, value in files], files[0][0])


def _base(to: Translation) -> None:
    """Adapters in the base, and their strengths."""
    strengths = to.numbers("base_weights_multiplier")
    for name, value in to.said("base_weights"):
        files = [str(file) for file in words(value)]
        strengths += [1.0] * (len(files) - len(strengths))
        to.put("base_lora", [f"{file}:{weight:g}" for file, weight in zip(files, strengths, strict=False)], name)


def _data(to: Translation) -> None:
    """Folders, and how often they count."""
    folders = to.said("train_data_dir", "instance_data_dir", "image_dir", "dataset_name", "dataset", "train_file")
    repeats = to.said("dataset_repeats", "repeats", "num_repeats")
    times = f":{repeats[0][1]}" if repeats and repeats[0][1] != 1 else ""
    for name, folder in folders:
        if name == "dataset_name" and not Path(str(folder)).exists():
            to.refused[name] = "Fetch it, and pass its folder to --data."
    if folders:
        to.put("data", [f"{folder}{times}" for _, folder in folders], folders[0][0])
    else:
        to.leave("there is no folder", *(name for name, _ in repeats))


def _crop(to: Translation) -> None:
    for name, value in to.said("random_crop", "center_crop"):
        if value:
            to.put("crop", name.partition("_")[0], name)


def _mask(to: Translation) -> None:
    """The transparency, or a folder."""
    for name, folder in to.said("conditioning_data_dir"):
        if to.theirs.get("masked_loss"):
            to.put("mask", folder, name)
        else:
            to.leave("there is no --masked_loss", name)
    if to.theirs.get("alpha_mask"):
        to.put("mask", "alpha", "alpha_mask")


def _shuffle(to: Translation) -> None:
    for name, number in to.said("keep_tokens"):
        if to.values.get("shuffle_captions"):
            to.put("keep_tokens", number, name)
        else:
            to.leave("captions are not shuffled", name)


def _cache(to: Translation) -> None:
    """Latents and texts are always kept; on the disk if it is said."""
    if any(value for name, value in to.theirs.items() if name.endswith("_to_disk")):
        to.put("cache", "disk", next(name for name, value in to.theirs.items() if name.endswith("_to_disk") and value))


def _prior(to: Translation) -> None:
    """Class images: diffusers' are drawn where the class is called, sd-scripts' are there."""
    for name, folder in to.said("reg_data_dir"):
        _reg(to, name, Path(str(folder)))
    of_diffusers = to.theirs.keys() & {"class_data_dir", "instance_data_dir"}
    if of_diffusers and not to.theirs.get("with_prior_preservation"):
        to.leave("there is no --with_prior_preservation", "class_data_dir")
        for ours in to.values.keys() & {"class_prompt", "num_class_images"}:
            to.idle.setdefault("there is no --with_prior_preservation", []).append(to.names.pop(ours))
            del to.values[ours]
    elif to.theirs.get("with_prior_preservation") and "class_prompt" not in to.values:
        to.refused["with_prior_preservation"] = "Say with --class-prompt what the class is called."
    else:
        for name, folder in to.said("class_data_dir"):
            to.put("class_data", folder, name)
    for name, weight in to.said("prior_loss_weight", "train.reg_weight"):
        if "class_prompt" in to.values:
            to.put("prior_weight", weight, name)
        else:
            to.leave("there are no class images", name)


def _reg(to: Translation, name: str, folder: Path) -> None:
    """sd-scripts' folder of regularisation images: a parent of one that says what they are called."""
    from diffpeft.train.data.layout import REPEATED, images_in  # Pillow comes along, and help needs none

    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    called = {path: match[2] for path in inside if (match := REPEATED.fullmatch(path.name))}
    if len(called) == 1:
        ((folder, prompt),) = called.items()
        to.imply("class_prompt", prompt, name)
    elif len(called) > 1:
        to.refused[name] = f"One class a run: pass the folder of one with --class-data; here are {listed(called)}."
        return
    if "class_prompt" not in to.values:
        to.refused[name] = "Say with --class-prompt what its images show."
    to.put("class_data", str(folder), name)
    if number := len(images_in(folder)) if folder.is_dir() else 0:
        to.put("num_class_images", number, name)


def _preserve(to: Translation) -> None:
    """ai-toolkit's blank prompt preservation is our prior of the base under the blank prompt."""
    for name, on in to.said("train.blank_prompt_preservation"):
        if on:
            to.put("prior", "base", name)
            to.put("prior_prompts", "blank", name)
            for weight_name, weight in to.said("train.blank_prompt_preservation_multiplier"):
                to.put("prior_weight", weight, weight_name)


PARTS: Sequence[Callable[[Translation], None]] = (
    _files,
    _base,
    _data,
    _crop,
    _mask,
    _shuffle,
    _cache,
    _prior,
    _preserve,
)
