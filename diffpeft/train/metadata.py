"""What a run's files say of it, under the names that other programs read: sd-scripts' (`ss_`), ModelSpec's 1.0.1, and our own options.

All of it follows from the options and the data, so that the same run gives the same bytes, also where it was stopped in between: there are no dates and
no session's number. Nothing says where on a machine something was: of paths there is the last part. What does not apply is left out.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io as bytes_io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path

import diffpeft
from diffpeft.converters.families import TABLES
from diffpeft.converters.formats import FORMATS
from diffpeft.converters.formats.base import table_of
from diffpeft.converters.spelling import Draft
from diffpeft.families import family_of
from diffpeft.train.config import PATHS, TrainConfig
from diffpeft.train.data.account import Account, Example
from diffpeft.train.experts import experts_of
from diffpeft.train.groups import entries_of
from diffpeft.train.optimizers import row_of
from diffpeft.train.prompt_account import PromptAccount
from diffpeft.train.resume import FREE
from diffpeft.train.run import TrainRun

THUMBNAIL = 256  # pixels, the longer side at most
TAGS = 1 << 20  # bytes of the table of tags, at most
_LORA = "networks.lora"
_PRECISION = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}
_KINDS = {"epsilon": "epsilon", "v_prediction": "v"}  # what ModelSpec calls them; of flows it says nothing
_OURS = ("ss_", "sshs_", "modelspec.", "trained_words", "diffpeft.options", "diffpeft.version", "diffpeft.experts")


def metadata_of(run: TrainRun, step: int | None = None, thumbnail: Path | None = None) -> dict[str, str]:
    """What every file of a run says. `step`: of a state; `thumbnail`: the picture that shows what was learnt."""
    config = run.config
    words = config.trigger or config.instance_prompt
    told: dict[str, object] = {
        **_network(config),
        **_optimisation(config),
        **_objective(config, run),
        **_progress(config, run.account, run.step if step is None else step),
        **({} if isinstance(run.account, PromptAccount) else _data(config, run.account, run.class_images)),
        **_base(run),
        **_modelspec(run, words, thumbnail),
        "ss_output_name": run.name,
        "trained_words": json.dumps([words], ensure_ascii=False) if words else None,
        "diffpeft.version": diffpeft.__version__,
        "diffpeft.options": json.dumps(_options(config), sort_keys=True, ensure_ascii=False),
    }
    texts = {name: str(value) for name, value in told.items() if value not in (None, "")}
    return {
        name: text.encode(errors="replace").decode() for name, text in texts.items()
    }  # half a pair of surrogates is no text


def finished(draft: Draft, told: Mapping[str, str], format: str, family: str) -> Draft:
    """A file with what its run says in the place of what an earlier run did, and with what depends on its format."""
    by_others = {k: v for k, v in draft.metadata.items() if not k.startswith(_OURS) or k == "ss_network_module"}
    module = by_others.get("ss_network_module")
    by_format = {"modelspec.implementation": _implementation(format, family)}
    if module == _LORA and format == "kohya":
        by_format["ss_network_module"] = _MODULES.get(family, _LORA)
    return Draft(draft.tensors, {**by_others, **told, **by_format}, draft.places, draft.inexact)


# {family: the module of sd-scripts or musubi-tuner for its LoRAs}, where it is not networks.lora
_MODULES = {
    "flux": "networks.lora_flux",
    "chroma": "networks.lora_flux",
    "sd3": "networks.lora_sd3",
    "lumina2": "networks.lora_lumina",
    "hunyuan_image": "networks.lora_hunyuan_image",
    "cosmos": "networks.lora_anima",
    "krea2": "networks.lora_krea2",
    "ideogram4": "networks.lora_ideogram4",
}
# {family: the program whose names the layers have in files with the original ones}
_PROGRAMS = {
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "flux": "https://github.com/black-forest-labs/flux",
    "sd3": "https://github.com/Stability-AI/sd3-ref",
    "hunyuan_image": "https://github.com/Tencent-Hunyuan/HunyuanImage-2.1",
    "cosmos": "https://github.com/nvidia-cosmos/cosmos-predict2",
    "krea2": "https://github.com/krea-ai/krea-2",
    "ideogram4": "https://huggingface.co/Comfy-Org/Ideogram-4",
    "cogview4": "https://github.com/zai-org/CogView4",
}


def _implementation(format: str, family: str) -> str:
    """Whose names the layers in a file have, as sd-scripts says it."""
    original = family in TABLES and FORMATS[format].original(table_of(FORMATS[format], family))
    return _PROGRAMS.get(family, "diffusers") if original else "diffusers"


def _network(config: TrainConfig) -> dict[str, object]:
    """The adapter."""
    algorithm = {"lora": {}, "dora": {"algo": "lora", "dora_wd": "True"}}.get(config.method, {"algo": config.method})
    return {
        "ss_network_dim": config.rank,
        "ss_network_alpha": config.alpha,
        "ss_network_dropout": config.dropout or None,
        "ss_network_args": json.dumps(algorithm) if algorithm else None,
    }


def _optimisation(config: TrainConfig) -> dict[str, object]:
    """How it was optimised."""
    arguments = ",".join(entries_of(config.optimizer_args)).replace(" ", ",")
    return {
        "ss_learning_rate": config.lr,
        "ss_unet_lr": config.lr,
        "ss_text_encoder_lr": config.lr if config.train_text_encoder else None,
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": config.warmup,
        "ss_optimizer": row_of(config.optimizer).path + (f"({arguments})" if arguments else ""),
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_gradient_accumulation_steps": config.accumulate,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_mixed_precision": _PRECISION.get(config.dtype or ""),
        "ss_seed": config.seed,
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": config.examples(),
    }


def _objective(config: TrainConfig, run: TrainRun) -> dict[str, object]:
    """What was minimised."""
    scheduler = getattr(run.family.pipe, "scheduler", None)
    zero = bool(scheduler.config.get("rescale_betas_zero_snr")) if scheduler is not None else False
    return {
        "ss_loss_type": config.loss,
        "ss_huber_c": config.huber_c,
        "ss_huber_schedule": config.huber_schedule,
        "ss_min_snr_gamma": config.snr_gamma,
        "ss_debiased_estimation": True if config.debiased else None,
        "ss_noise_offset": config.noise_offset,
        "ss_zero_terminal_snr": True if zero else None,
        "ss_prior_loss_weight": config.prior_weight,
        "ss_discrete_flow_shift": config.shift,
        "ss_timestep_sampling": config.density,
        "diffpeft.experts": _experts(config, run),
    }


def _experts(config: TrainConfig, run: TrainRun) -> str | None:
    """{denoiser: the shares of noise that it was trained at}, of a model of several."""
    return json.dumps(dict(experts_of(config, run.family).spans)) if run.family.boundary is not None else None


def _progress(config: TrainConfig, account: Account, step: int) -> dict[str, object]:
    """How long: `step` steps are done. An epoch is a pass through the data, and the first one is 1."""
    batches = math.ceil(max(account.pictures, 1) / config.batch_size)
    of_epoch = math.ceil(batches / config.parts())
    return {
        "ss_steps": step,
        "ss_epoch": math.ceil(step / of_epoch),
        "ss_max_train_steps": config.steps,
        "ss_num_epochs": math.ceil(config.steps / of_epoch),
        "ss_num_batches_per_epoch": batches,
    }


def _data(config: TrainConfig, account: Account, class_images: int) -> dict[str, object]:
    """What it was trained on: folders, tags by folder, sizes."""
    folders: dict[str, list[Example]] = {}
    for example in account.examples:
        folders.setdefault(example.path.resolve().parent.name, []).append(example)
    side = account.resolution
    dirs = {name: {"n_repeats": of[0].repeats, "img_count": len(of)} for name, of in folders.items()}
    reg = {Path(config.class_data or "class").name: {"n_repeats": 1, "img_count": class_images}}
    return {
        "ss_num_train_images": sum(example.repeats for example in account.examples),
        "ss_num_reg_images": class_images,
        "ss_dataset_dirs": json.dumps(dirs, ensure_ascii=False),
        "ss_reg_dataset_dirs": json.dumps(reg if class_images else {}, ensure_ascii=False),
        "ss_tag_frequency": json.dumps(_limited({name: _tags(of) for name, of in folders.items()}), ensure_ascii=False),
        "ss_bucket_info": _buckets(account) if config.buckets else None,
        "ss_enable_bucket": config.buckets,
        "ss_resolution": f"({side}, {side})" if side else None,
        "ss_flip_aug": config.flip,
        "ss_random_crop": config.crop == "random",
        "ss_shuffle_caption": config.shuffle_captions,
        "ss_keep_tokens": config.keep_tokens or 0,
        "ss_caption_dropout_rate": config.caption_dropout,
        "ss_max_token_length": config.max_length,
        "ss_clip_skip": config.clip_skip,
        "ss_cache_latents": config.cache != "none",
    }


def _tags(examples: Iterable[Example]) -> dict[str, int]:
    """{part of captions between commas: how many images have it}, as sd-scripts counts them."""
    tags = (tag.strip().lower() for example in examples for tag in example.caption.split(","))
    return dict(Counter(filter(None, tags)))


def _limited(folders: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """The most frequent tags, as many as a header has room for: captions of a large data set would not fit."""
    rows = sorted(
        ((n, name, tag) for name, tags in folders.items() for tag, n in tags.items()), key=lambda row: -row[0]
    )
    ends = accumulate(len(tag.encode(errors="replace")) + 16 for _, _, tag in rows)
    fitting = {(name, tag) for (_, name, tag), end in zip(rows, ends, strict=True) if end <= TAGS}
    return {name: {tag: n for tag, n in tags.items() if (name, tag) in fitting} for name, tags in folders.items()}


def _buckets(account: Account) -> str | None:
    """{number: size and pictures} of the sizes in which pictures are shown, and how far the images' ratios are from theirs."""
    if account.sizing is None:
        return None
    shown = [(e.size, target, e.repeats) for e in account.examples for target in account.sizing.targets(e.size)]
    counts: Counter[tuple[int, int]] = Counter()
    for _, target, repeats in shown:
        counts[target] += repeats
    errors = [abs(w / h - width / height) for (width, height), (w, h), _ in shown]
    rows = enumerate(sorted(counts.items()))
    buckets = {str(i): {"resolution": list(size), "count": count} for i, (size, count) in rows}
    return json.dumps({"buckets": buckets, "mean_img_ar_error": sum(errors) / max(len(errors), 1)})


def _base(run: TrainRun) -> dict[str, object]:
    """The model that it is for."""
    config, version = run.config, run.family.base_version
    files = {"sd_model": config.model, "vae": config.vae}
    hashes: dict[str, object] = {}
    for name, file in files.items():
        if file and Path(file).is_file():
            digest, old = _hashes(Path(file), Path(file).stat().st_mtime_ns)
            hashes |= {f"ss_{name}_hash": old, f"ss_new_{name}_hash": digest}
    return {
        "ss_base_model_version": version,
        "ss_v2": version.startswith("sd_v2"),
        "ss_sd_model_name": _called(config.model),
        "ss_vae_name": _called(config.vae),
        **hashes,
    }


@functools.lru_cache
def _hashes(path: Path, changed: int) -> tuple[str, str]:
    """The SHA-256 of a file, and the short hash of its 64 KiB at 1 MiB by which older programs know models. `changed`: when it was written."""
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        f.seek(0x100000)
        return digest, hashlib.sha256(f.read(0x10000)).hexdigest()[:8]


def _called(path: str | None) -> str | None:
    """The last part of a path; an id of the Hub as it is."""
    return path if path is None or is_id(path) else Path(path).resolve().name


def is_id(model: str) -> bool:
    """Whether this is an id of the Hub, and no file or folder."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model)) and not Path(model).exists()


def _modelspec(run: TrainRun, words: str | None, thumbnail: Path | None) -> dict[str, object]:
    """ModelSpec's names."""
    config, side = run.config, run.account.resolution
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{run.family.architecture}/lora",  # of all methods: what programs look for
        "modelspec.title": run.name,
        "modelspec.description": config.description,
        "modelspec.author": config.author,
        "modelspec.license": config.license,
        "modelspec.resolution": f"{side}x{side}" if side else None,
        "modelspec.prediction_type": _KINDS.get(run.family.levels.kind),
        "modelspec.encoder_layer": config.clip_skip,
        "modelspec.trigger_phrase": words,
        "modelspec.usage_hint": f"Put {words!r} into the prompt." if words else None,
        "modelspec.tags": ", ".join(dict.fromkeys(["lora", config.method, family_of(run.family.pipe) or "diffpeft"])),
        "modelspec.thumbnail": picture_uri(thumbnail) if thumbnail else None,
    }


def picture_uri(path: Path) -> str:
    """A picture as a small JPEG, a data URI."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = bytes_io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _options(config: TrainConfig) -> dict[str, object]:
    """The options that the adapter follows from. Of paths there is the last part."""
    said = {name: value for name, value in config.resolved().items() if name not in FREE and value is not None}
    return {name: _without_folders(value) if name in _PLACES else value for name, value in said.items()}


_PLACES = PATHS | {"base_lora", "training_adapter"}


def _without_folders(value: object) -> object:
    """Paths, or a text with several, cut to the last part of each."""
    if isinstance(value, (list, tuple)):
        return [_without_folders(entry) for entry in value]
    entries = [entry.rstrip("/\\") for entry in str(value).split(",")]
    return ",".join(entry if is_id(entry) else re.split(r"[/\\]", entry)[-1] for entry in entries)
