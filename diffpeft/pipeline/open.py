"""A pipeline from what a user types: a diffusers folder, a single file with the folder of its configs, a Hub id, or nothing for the embedded base.

Nothing heavy is imported before something is loaded, so that what can be seen of a model by its configs is seen at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diffpeft import io
from diffpeft.converters.locating import HUB_ID, on_hub
from diffpeft.errors import CheckpointError, ConfigError, DiffpeftError, near
from diffpeft.families.parts import Component, Parts, Pipeline, configs_of
from diffpeft.files import Json
from diffpeft.io import refuse_pickle
from diffpeft.pipeline import few_bits, guardrail
from diffpeft.pipeline.complete import (
    class_of,
    complete_model,
    models_in,
    not_loaded,
    read_json,
    refuse_placeholders,
)
from diffpeft.pipeline.split import assigned, filled

if TYPE_CHECKING:
    import torch
    from torch import nn

EMBEDDED = Path(__file__).parent.parent / "assets" / "tiny-emoji" / "model"
INDEX = "model_index.json"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def dtype_of(name: str) -> torch.dtype:
    """fp32, bf16 or fp16 as torch's dtype."""
    import torch

    return getattr(torch, DTYPES[name])


def default_device() -> str:
    """cuda if there is one, and accelerate's launcher was not told to leave it alone; else cpu."""
    import torch

    told_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    return "cuda" if torch.cuda.is_available() and not told_cpu else "cpu"


def default_dtype(device: str) -> str:
    """What a base computes in where nothing else is said: fp32 on a CPU, else bf16."""
    return "fp32" if device == "cpu" else "bf16"


def check_model(model: str | None, base: str | None, vae: str | None = None, text_encoders: Sequence[str] = ()) -> None:
    """Raise CheckpointError if `model` or a part of it can be seen to be none without loading anything, ConfigError for what nothing would read."""
    path = Path(model) if model else EMBEDDED
    if path.is_dir() and not (path / INDEX).is_file():
        raise CheckpointError("this folder holds no diffusers pipeline (no model_index.json)", where=path)
    refuse_pickle(path)
    if path.is_file() and not base:
        raise CheckpointError(
            "a single file holds no configs and no tokenizer",
            where=path,
            remedy="Say with --base whose: a diffusers folder or a Hub id.",
        )
    check_exists(str(path), "Pass a diffusers folder, a .safetensors file or a Hub id (owner/name).")
    if base and not path.is_file():
        raise ConfigError(
            "base is for a model that is a single file, and this one has its own configs",
            where=path,
            remedy="Leave --base out.",
        )
    for part, file in (("vae", vae), *(("text encoder", encoder) for encoder in text_encoders)):
        _check_part(part, file, path)


def _check_part(part: str, file: str | None, model: Path) -> None:
    """Raise ConfigError for the file of a VAE or a text encoder beside a model that has its own, CheckpointError if it is none."""
    if file is None:
        return
    if not model.is_file():
        raise ConfigError(
            f"a file of the {part} is for a model that is a single file, and this one has its own",
            where=model,
            remedy=f"Leave --{part.replace(' ', '-')} out.",
        )
    if not Path(file).is_file():
        raise CheckpointError(f"no such file of the {part}", where=file, remedy="Pass a .safetensors file.")
    refuse_pickle(Path(file))


def check_exists(model: str, remedy: str) -> None:
    """Raise CheckpointError if `model` is neither a path that exists nor what may be a Hub id."""
    path = Path(model)
    local = (
        path.suffix in (".safetensors", ".gguf")
        or not HUB_ID.fullmatch(model)
        or (path.parent != Path() and path.parent.is_dir())
    )
    if not path.exists() and local:
        siblings = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        place = on_hub(model)
        link = f"Pass its Hub id: {place.repo}." if place and place.filename is None else ""
        raise CheckpointError("no such model", where=path, remedy=link or near(model, siblings) or remedy)


@dataclass(frozen=True)
class Facts:
    """What a pipeline's files say of it without loading anything: the name of its class, the configs of its denoiser and its VAE, and its denoisers."""

    pipeline: str | None = None
    configs: Mapping[str, Json] = field(default_factory=dict)
    denoisers: tuple[str, ...] = ()


def facts(model: str | None) -> Facts:
    """The facts of a diffusers folder or a Hub id. Of a Hub id a few small files are fetched, or nothing is known."""
    index = _config(model, INDEX)
    name = index.get("_class_name")
    names = [part for part in ("unet", "transformer", "vae") if part in index]
    # without an index there is no network, which is asked once
    return Facts(
        name if isinstance(name, str) else None,
        {part: _config(model, f"{part}/config.json") for part in names},
        tuple(part for part, kind in index.items() if denoises(part) and isinstance(kind, list) and any(kind)),
    )


def _config(model: str | None, name: str) -> Json:
    """One of a pipeline's JSON files; empty if there is none, or if it cannot be read."""
    path = (Path(model) if model else EMBEDDED) / name
    if model and not Path(model).exists() and HUB_ID.fullmatch(model):
        try:
            from huggingface_hub import hf_hub_download, try_to_load_from_cache

            cached = try_to_load_from_cache(model, name)
            path = Path(cached if isinstance(cached, str) else hf_hub_download(model, name))
        except Exception:  # loading will say what is wrong
            return {}
    return read_json(path)


def open_pipeline(
    model: str | None = None, base: str | None = None, *, dtype: str = "fp32", device: str = "cpu"
) -> Pipeline:
    """The pipeline behind `model`, on `device`; the embedded base without one. `base` names the configs and the tokenizer of a single file.

    Raises CheckpointError if it cannot be loaded, and if it could be only with weights that no file holds, which the libraries make up.
    """
    return open_parts(model, base, dtype=dtype, device=device).whole().to(device)


def open_parts(
    model: str | None = None,
    base: str | None = None,
    *,
    vae: str | None = None,
    text_encoders: Sequence[str] = (),
    denoiser: str | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
    placed: Callable[[str, nn.Module], nn.Module] | None = None,
) -> Parts:
    """The same, but each model is loaded when it is first asked for.

    `vae` and `text_encoders` are files of these, where `model` is one of a denoiser alone, and `denoiser` says which, if the pipeline has several; `placed`
    puts a model, by its name, where it belongs: on the device. Raises CheckpointError if there is no such pipeline, ConfigError for a file of one of two
    denoisers, if nothing says which; what is wrong with the weights of a model is told when it is loaded.
    """
    check_model(model, base, vae, text_encoders)
    source, kind = Path(model) if model else EMBEDDED, dtype_of(dtype)
    skeletons: dict[str, nn.Module] = {}
    with _told(source, skeletons):
        folder = _folder(source, base)
        skeletons |= {name: _skeleton(cls, folder / name) for name, cls in _models(folder).items()}
        unused = {"safety_checker": None} if source.is_file() and "safety_checker" in skeletons else {}
        unused |= _left_out(folder)
        cls = _pipeline_class(folder)
        pipe = cls.from_pretrained(folder, dtype=kind, **skeletons | unused | guardrail.stand_in(cls))
        configs = configs_of(pipe)
        for name in skeletons:
            setattr(pipe, name, None)
        if source.is_file() and source.suffix != few_bits.GGUF:
            _mark(pipe, source)
    encoders = {name: model for name, model in skeletons.items() if name.startswith("text_encoder")}
    files = assigned(text_encoders, encoders)
    denoiser = denoiser or _denoiser_in(source, skeletons)
    opened = _Files(source, folder, type(pipe), skeletons, kind, device, vae, files, denoiser, placed)
    loaders = {name: functools.partial(opened.load, name) for name in skeletons.keys() - unused.keys()}
    return Parts(pipe, loaders, skeletons, configs)


def weightless(model: str | None = None, base: str | None = None) -> object:
    """A pipeline as far as its configs tell it: its class's name, and its models without numbers. No weights are read.

    Raises CheckpointError if there is no such pipeline.
    """
    check_model(model, base)
    source = Path(model) if model else EMBEDDED
    with _told(source, {}):
        folder = _folder(source, base)
        parts = {name: _skeleton(cls, folder / name) for name, cls in _models(folder).items()}
        kind = _pipeline_class(folder)
    return type(kind.__name__, (), {**parts, "components": parts})()


@contextlib.contextmanager
def _told(source: Path, skeletons: Mapping[str, nn.Module]) -> Iterator[None]:
    """Whatever diffusers and its libraries raise for a model that cannot be read is a CheckpointError, which names what is missing if it can.

    `skeletons` are ours, and lack their weights whatever is wrong.
    """
    try:
        yield
    except (MemoryError, DiffpeftError):
        raise
    except Exception as error:
        for module in models_in(error):
            if any(module is part for skeleton in skeletons.values() for part in skeleton.modules()):
                continue
            refuse_placeholders(type(module).__name__, module, source)
        raise not_loaded(error, source) from error


def _folder(source: Path, base: str | None) -> Path:
    """The folder with the configs of a model, and with its weights if it is no single file. What is on the Hub is fetched."""
    from diffusers import DiffusionPipeline

    if not source.is_file():
        return source if source.exists() else Path(DiffusionPipeline.download(str(source)))
    if Path(str(base)).exists():
        return Path(str(base))
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(base), allow_patterns=["**.json", "**.txt", "**.model"]))


def _models(folder: Path) -> dict[str, type[Component]]:
    """{component: class} of the models in a pipeline's folder. Those of other libraries are left to diffusers."""
    import torch

    entries = {name: e for name, e in read_json(folder / INDEX).items() if isinstance(e, list) and len(e) == 2}
    classes = {name: class_of(*map(str, entry)) for name, entry in entries.items()}
    return {
        name: cls
        for name, cls in classes.items()
        if cls is not None and issubclass(cls, torch.nn.Module) and (folder / name).is_dir()
    }


def _pipeline_class(folder: Path) -> type[Component]:
    """The class of a folder's pipeline. DiffusionPipeline itself would load components that the class may be without, also where they are handed to it."""
    import diffusers

    name = read_json(folder / INDEX).get("_class_name")
    if name and not hasattr(diffusers, str(name)):
        raise CheckpointError(
            f"diffusers {diffusers.__version__} has no {name}",
            where=folder,
            remedy="A newer diffusers may have it: pip install -U diffusers. Pipelines with code of their own cannot be opened.",
        )
    cls: type[Component] = getattr(diffusers, str(name), diffusers.DiffusionPipeline)
    return cls


def _left_out(folder: Path) -> dict[str, None]:
    """The components that a pipeline may have and this one does not, as diffusers is to be told."""
    return {name: None for name, entry in read_json(folder / INDEX).items() if entry == [None, None]}


def _skeleton(cls: type[Component], folder: Path) -> nn.Module:
    """A model without numbers, by its config."""
    import torch

    with torch.device("meta"):
        if hasattr(cls, "config_class"):  # of transformers
            return cls(cls.config_class.from_pretrained(folder))
        return cls.from_config(cls.load_config(folder))


def _mark(pipe: Pipeline, file: Path) -> None:
    """Give a pipeline the scheduler that a single file asks for: marks in it say that it predicts v, and that its last level is pure noise."""
    from diffusers import DDIMScheduler

    names, scheduler = io.header(file)[0], pipe.scheduler
    changes: dict[str, object] = {"prediction_type": "v_prediction"} if _PREDICTS_V in names else {}
    if _ZERO_SNR in names:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if changes:
        knows = changes.keys() <= inspect.signature(type(scheduler).__init__).parameters.keys()
        pipe.scheduler = (type(scheduler) if knows else DDIMScheduler).from_config(scheduler.config, **changes)


_PREDICTS_V, _ZERO_SNR = "v_pred", "ztsnr"  # empty tensors in single files


# what names of other models than the denoiser begin with, in the checkpoint of a whole pipeline
_BESIDE = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder."),
}


def _holds(file: Path, component: str) -> bool:
    """Whether a single file holds another model than the denoiser of its pipeline."""
    kind = next((kind for kind in _BESIDE if component.startswith(kind)), None)
    begin = _BESIDE[kind] if kind else tuple(start for starts in _BESIDE.values() for start in starts)
    return file.suffix != few_bits.GGUF and any(name.startswith(begin) for name in io.header(file)[0])


def _denoiser_in(file: Path, skeletons: Iterable[str]) -> str | None:
    """The denoiser of a pipeline that a single file is of: the first. Raises ConfigError if there are two, for much noise and for little."""
    denoisers = [name for name in skeletons if denoises(name)]
    if file.is_file() and {*denoisers} >= _EXPERTS:
        raise ConfigError(
            "the file holds one denoiser, and its base has two, for much noise and for little",
            where=file,
            remedy="Say whose it is, with --experts high or --experts low where an adapter is trained, or pass the folder that has both.",
        )
    return next(iter(sorted(denoisers, key=len)), None)


_EXPERTS = frozenset({"transformer", "transformer_2"})


def denoises(component: str) -> bool:
    """Whether a component of pipelines is a denoiser, by its name."""
    return not {"unet", "transformer"}.isdisjoint(component.split("_"))


@dataclass(frozen=True)
class _Files:
    """Where the weights of a pipeline are, and how one of its models is loaded."""

    source: Path
    folder: Path
    pipeline: type[Pipeline]
    skeletons: Mapping[str, nn.Module]
    dtype: torch.dtype
    device: str
    vae: str | None
    text_encoders: Mapping[str, str]
    denoiser: str | None  # that a single file is of
    placed: Callable[[str, nn.Module], nn.Module] | None

    def load(self, name: str) -> Component:
        """One model with every weight, where it belongs. Raises CheckpointError if there is none."""
        with _told(self.source, self.skeletons):
            model = self._on_the_host(name).eval()
            return self.placed(name, model) if self.placed else model.to(self.device)

    def _on_the_host(self, name: str) -> Component:
        if not self.source.is_file() or self._is_of_the_base(name):
            return complete_model(type(self.skeletons[name]), self.folder / name, name, dtype=self.dtype)
        if name in self.text_encoders:
            model: Component = filled(self.skeletons[name], self.text_encoders[name], self.dtype)
        else:
            model = self._from_single_file(name)
        refuse_placeholders(name, model, self.source)
        return model

    def _is_of_the_base(self, name: str) -> bool:
        """Whether a model is read out of the base's folder: the single file is another denoiser, or has no such model, and no other file was named for it.

        Raises CheckpointError for a base without its weights.
        """
        named = name == self.denoiser or name in self.text_encoders or (name == "vae" and self.vae)
        if named or (not denoises(name) and _holds(self.source, name)):
            return False
        if not any(path.suffix in (".safetensors", ".bin") for path in (self.folder / name).iterdir()):
            raise CheckpointError(
                f"this file holds no {name}, and its base has no weights of it",
                where=self.source,
                remedy="Pass with --base a folder that has them, or files of the VAE and the text encoders: --vae, --text-encoder.",
            )
        return True

    def _from_single_file(self, name: str) -> Component:
        """A model out of the checkpoint of a whole pipeline, or of a denoiser or a VAE alone."""
        file = self.vae if name == "vae" and self.vae else self.source
        if denoises(name) and few_bits.in_few_bits(file):
            return few_bits.opened(self.skeletons[name], few_bits.read(file), self.dtype, file)
        if few_bits.has_scales(file):
            raise CheckpointError(
                f"the {name} in this file has scales, and cannot be read out of it",
                where=file,
                remedy="Pass files of the VAE and the text encoders: --vae, --text-encoder.",
            )
        if not hasattr(self.pipeline, "from_single_file"):
            return self._from_its_own_file(name, str(file))
        others = {other: model for other, model in self.skeletons.items() if other != name} | _left_out(self.folder)
        pipe = self.pipeline.from_single_file(
            str(file), config=str(self.folder), dtype=self.dtype, **others | {"safety_checker": None}
        )
        return getattr(pipe, name)

    def _from_its_own_file(self, name: str, file: str) -> Component:
        """A model alone, under its own names, or under the original ones if diffusers knows them."""
        skeleton: Component = self.skeletons[name]
        if name.startswith("text_encoder") or skeleton.state_dict().keys() <= io.header(file)[0].keys():
            return filled(skeleton, file, self.dtype)
        return type(skeleton).from_single_file(file, config=str(self.folder), subfolder=name, torch_dtype=self.dtype)
