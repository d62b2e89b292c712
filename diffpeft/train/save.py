"""Saving what a run learnt: the adapter's files, what they say of the run, and which programs read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import converters
import diffpeft
from diffpeft.bundle import Bundle
from diffpeft.families import family_of
from diffpeft.model.state import bundle_of
from diffpeft.pipeline.load import save_lora
from diffpeft.train.check import FORMATS, file_of
from diffpeft.train.lock import occupied
from diffpeft.train.optimizers import row_of
from diffpeft.train.outcome import refuse_unread, rescued
from diffpeft.train.run import TrainRun
from diffpeft.train.team import team


def save(run: TrainRun) -> list[Path]:
    """Write the adapter, one file for each format that can hold it, into the output folder.

    Each is read again. If one cannot be written, the files go into a temporary folder, which the OSError names.
    Raises NothingLearntError if a file changes less than was learnt. Of several processes the main one writes; where the base is sharded, all call this.
    """
    if not (team().main or team().sharded):
        return []
    out, files = Path(run.config.out or ""), list[Path]()
    if team().main:
        with occupied(out):
            files = rescued(lambda folder: _written(run, folder), out, run.name)
    if team().sharded:  # what a file changes is asked of the whole base
        files = team().gathered(files)[0]
    for file in files:
        refuse_unread(run.family.pipe, file, run.name, run.config.allow_unchanged)
    return files if team().main else []


def exported(run: TrainRun, folder: Path, step: int) -> None:
    """Write the adapter as it is after so many steps into the folder of a checkpoint."""
    _written(run, folder, step)


def _bundle(run: TrainRun) -> Bundle:
    return bundle_of(run.family.pipe, run.name, family_of(run.family.pipe) or "")


def _written(run: TrainRun, folder: Path, step: int | None = None) -> list[Path]:
    """Write the adapter in every format that can hold it; the paths."""
    bundle = _bundle(run)
    formats = [format for format in FORMATS if not converters.refusal(bundle, format)]
    paths = [folder / file_of(run.name, format) for format in formats]
    for format, path in zip(formats, paths, strict=True):
        save_lora(run.family.pipe, path, name=run.name, format=format, metadata=_metadata(run, step))
    return paths


def readers(run: TrainRun, files: Sequence[Path]) -> dict[str, str]:
    """{file: which programs read it}, and {format: why there is no such file}."""
    bundle = _bundle(run)
    read_by = {path.name: f"read by {', '.join(converters.inspect(path).readable_by)}" for path in files}
    refused = {format: refusal for format in FORMATS if (refusal := converters.refusal(bundle, format))}
    return read_by | {f"no {format} file": refusal.what for format, refusal in refused.items()}


def _metadata(run: TrainRun, step: int | None = None) -> dict[str, object]:
    """What other programs show of a file, under sd-scripts' and ModelSpec's names. Paths are cut to their last part. `step`: of a state."""
    config = run.config
    return {
        "ss_output_name": run.name,
        "ss_network_dim": config.rank,
        "ss_network_alpha": config.alpha,
        "ss_learning_rate": config.lr,
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": config.warmup,
        "ss_steps": len(run.losses) if step is None else step,
        "ss_max_train_steps": config.steps,
        "ss_seed": config.seed,
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": config.batch_size * config.parts(),
        "ss_optimizer": row_of(config.optimizer).path,
        "ss_gradient_accumulation_steps": config.accumulate,
        "ss_base_model_version": run.family.base_version,
        "ss_sd_model_name": Path(config.model or "").name,
        "ss_max_token_length": config.max_length,
        "ss_clip_skip": config.clip_skip,
        "ss_min_snr_gamma": config.snr_gamma,
        "ss_noise_offset": config.noise_offset,
        "ss_loss_type": config.loss,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": run.name,
        "modelspec.implementation": "diffusers",
        "modelspec.architecture": f"{run.family.architecture}/lora",
        "modelspec.resolution": f"{run.account.resolution}x{run.account.resolution}",
        "modelspec.prediction_type": {"v_prediction": "v"}.get(run.family.levels.kind, run.family.levels.kind),
        "modelspec.trigger_phrase": config.trigger or config.instance_prompt or "",
        "diffpeft.version": diffpeft.__version__,
    }
