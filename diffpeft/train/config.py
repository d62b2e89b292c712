"""The options of a training run. One list: the command line, the TOML file and the report are made from it. Imports no torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from diffpeft.errors import ConfigError, near, shown
from diffpeft.readable import Readable
from diffpeft.train import machines

RESERVED = 2**30  # bytes of a GPU's memory for PyTorch itself, fragments, workspaces of kernels, and the screen
_UNITS = {"G": 2**30, "M": 2**20}


def option(
    default: object,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    needs: str = "",
    required: bool = False,
    several: str = "",
    data_only: bool = False,
) -> Any:
    """A field with what the command line says of it, the values that are allowed, and the option without which it would do nothing.

    `several` says how several values are typed: `repeated`, each after the option's name, or `commas`. `data_only`: a run without data has no such option.
    """
    limits = {"at least": at_least, "above": above, "below": below, "at most": at_most}
    return field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "limits": limits,
            "needs": needs,
            "required": required,
            "several": several,
            "data_only": data_only,
        },
    )


@dataclass(repr=False)
class Options(Readable):
    """The options that every training run has, and the checks of all."""

    LR: ClassVar[float] = 1e-4  # the learning rate, where neither user nor optimiser says one
    COMMAND: ClassVar[str] = "train"  # whose options they are
    PRESETS: ClassVar[tuple[str, ...]] = ("attn", "attn-mlp", "full")  # of layers, that `targets` may be
    HAS_DATA: ClassVar[bool] = True  # else it has no options that are `data_only`

    model: str | None = option(None, "A folder with a model, or a Hub id.", required=True)
    data: str | Sequence[str] | None = option(None, "What to train on.", required=True)
    out: str | None = option(None, "The folder for what is written.", required=True)
    dtype: str | None = option(
        None,
        "What the base computes in; default fp32 on a CPU, else bf16. fp16 needs a GPU, and its loss is scaled. The adapter is fp32.",
        choices=("fp32", "bf16", "fp16"),
    )
    method: str = option("lora", "The adapter method.")
    rank: int = option(16, "Rank of the adapter.", at_least=1)
    alpha: float | None = option(None, "The adapter's scale is alpha / rank; default: the rank.", above=0)
    targets: str | Sequence[str] = option("full", "Which layers.")
    dropout: float = option(
        0.0, "Probability with which an input feature of the adapter is dropped.", at_least=0, below=1
    )
    rank_pattern: str | Sequence[str] | None = option(
        None, "Other ranks for some layers: up_blocks.1=32,mid_block=8. Their scale stays that of the others."
    )
    init_from: str | None = option(
        None, "An adapter to go on with, instead of a fresh one: its method, ranks and layers."
    )
    optimizer: str = option(
        "adamw", "adamw, adamw8bit, adafactor, prodigy, lion, schedulefree, or a class by its path: torch.optim.SGD."
    )
    optimizer_args: str | Sequence[str] | None = option(None, "What it is made with: 'betas=0.9,0.99 eps=1e-8'.")
    lr: float | None = option(
        None,
        "Learning rate; default: 1e-4 for images, 2e-4 for texts; prodigy 1, lion 3e-5, schedulefree 1e-3.",
        above=0,
    )
    lr_scheduler: str = option(
        "constant",
        "How it goes on after the warm-up.",
        choices=("constant", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    )
    lr_cycles: int | None = option(None, "How often cosine_with_restarts starts; default: 1.", at_least=1)
    lr_power: float | None = option(None, "The power of polynomial; default: 1.", above=0)
    lr_pattern: str | Sequence[str] | None = option(
        None, "Factors for the learning rate of some layers: up_blocks=0.5,mid_block=2."
    )
    lora_plus_ratio: float | None = option(
        None, "LoRA+: how much faster than A the factors B learn; the paper has 16.", above=0
    )
    warmup: int = option(0, "Steps in which the learning rate rises.", at_least=0)
    steps: int = option(500, "Optimiser steps.", at_least=1)
    num_processes: int | None = option(
        None,
        "Processes to start, each on a GPU of its own if there are any; a step has as many more examples.",
        at_least=1,
    )
    fsdp: bool = option(
        False, "Shard the frozen base over the processes (FSDP 2), instead of holding it whole in each."
    )
    batch_size: int = option(1, "Examples a pass.", at_least=1)
    accumulate: int = option(1, "Passes a step, whose gradients are added up.", at_least=1)
    weight_decay: float = option(0.01, "The optimiser's weight decay.", at_least=0)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.", above=0)
    ema: float | None = option(
        None,
        "Save and draw with an average of the adapter over the steps, with this decay; 0.99 is usual.",
        above=0,
        below=1,
    )
    gradient_checkpointing: bool = option(False, "Compute activations twice instead of keeping them.")
    quantize: str | None = option(
        None,
        "Hold the base in few bits (QLoRA): nf4 (needs bitsandbytes), int8 or fp8. The adapter stays fp32.",
        choices=("nf4", "int8", "fp8"),
    )
    seed: int = option(0, "Everything random follows from it.", at_least=0)
    save_every: int = option(
        500, "Steps between two states that a run can go on from; 0: only when it is stopped.", at_least=0
    )
    keep: int = option(2, "How many of them stay.", at_least=1)
    resume: str | None = option(
        None,
        "Go on from a state: --resume alone from the latest in --out, or from a folder. Other options need not be repeated.",
    )
    overwrite: bool = option(False, "Begin anew where another run's files are, and replace them.")
    allow: str | Sequence[str] | None = option(
        None,
        "With --resume, names of options that may have other values than the run was started with.",
        needs="resume",
    )
    log: str | Sequence[str] = option(
        "csv",
        "Where the numbers of each step go, with commas: csv (OUT/metrics.csv), tensorboard, wandb or another tracker of accelerate's; none.",
    )
    log_every: int = option(1, "Steps between two rows of them.", at_least=1)
    allow_unchanged: str | Sequence[str] | None = option(
        None, "Layers that may end without a change, by names or patterns; any other is an error."
    )
    push_to_hub: str | None = option(
        None, "A repository of the Hub, me/dog, that files, model card and samples are uploaded to at the end."
    )
    hub_private: bool = option(False, "Make that repository a private one.", needs="push_to_hub")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """What the options are called."""
        return tuple(f.name for f in fields(cls) if cls.HAS_DATA or not f.metadata["data_only"])

    def validate(self) -> None:
        """Raise ConfigError for the first option that is missing, has a value that is not allowed, or would change nothing."""
        for f in fields(self):
            if getattr(self, f.name) is None and f.metadata["required"]:
                raise ConfigError(f"--{f.name} is missing", remedy=f"Pass --{f.name}. {f.metadata['help']}")
        self.check_values()

    def check_values(self) -> None:
        """Raise ConfigError for the first option with a value that is not allowed, or that would change nothing."""
        for f in fields(self):
            value, meta = getattr(self, f.name), f.metadata
            if value is None:
                continue
            _check_type(f.name, value, str(f.type))
            _check_value(f.name, value, meta)
            if meta["needs"] and value is not False and getattr(self, meta["needs"]) in (None, False):
                raise ConfigError(
                    f"{f.name} without {meta['needs']}, and so it would do nothing",
                    remedy=f"Pass --{_flag(meta['needs'])} too, or leave --{_flag(f.name)} out.",
                )
        for name, needed in (("lr_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
            if getattr(self, name) is not None and self.lr_scheduler != needed:
                raise ConfigError(
                    f"{name} with lr_scheduler {self.lr_scheduler}, and so it would do nothing",
                    remedy=f"Pass --lr-scheduler {needed}, or leave --{_flag(name)} out.",
                )
        if self.quantize == "nf4" and not find_spec("bitsandbytes"):
            raise ConfigError(
                "quantize nf4 is computed by bitsandbytes, which is not installed",
                remedy="pip install bitsandbytes, or pass int8 or fp8, which need nothing.",
            )
        if self.warmup > self.steps and getattr(self, "epochs", None) is None:
            raise ConfigError(
                f"warmup is {self.warmup} and steps is {self.steps}: the learning rate would never be reached",
                remedy="Warm up in a part of the steps.",
            )

    def resolved(self) -> dict[str, object]:
        """Every option by its name."""
        values = asdict(self)
        return {name: values[name] for name in self.names()}

    def parts(self) -> int:
        """The passes of a step, over all processes of the run."""
        return self.accumulate * machines.world().size

    def examples(self) -> int:
        """The examples of a step, over all its passes."""
        return self.batch_size * self.parts()

    def output(self) -> Path:
        """The folder for what is written. Raises ConfigError if it cannot be; makes nothing."""
        out = Path(self.out or "").resolve()
        existing = next(folder for folder in (out, *out.parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError("the output folder cannot be written", where=existing, remedy="Pass another --out.")
        return out

    def name_by_output(self) -> str:
        """What an adapter is called that has no other name: as the output folder, with letters that every program takes."""
        return re.sub(r"[^A-Za-z0-9._-]", "_", self.output().name)[:128].strip(".") or "adapter"


@dataclass(repr=False)
class TrainConfig(Options):
    """A DreamBooth-style training run. Defaults are the community's for Stable Diffusion 1.5."""

    EVERY: ClassVar[tuple[float, ...]] = (1.0,)  # strengths that each sample is drawn at, beside the base's
    FIRST: ClassVar[tuple[float, ...]] = (0.5,)  # and the first one besides

    model: str | None = option(
        None, "A diffusers folder, a single .safetensors file (with --base), or a Hub id.", required=True
    )
    base: str | None = option(None, "The folder or Hub id with the configs and the tokenizer of a single-file model.")
    vae: str | None = option(None, "The file of the VAE, where the single file is a denoiser alone.", needs="base")
    text_encoder: str | Sequence[str] | None = option(
        None, "The files of the text encoders, with commas, where the single file has none.", needs="base"
    )
    data: str | Sequence[str] | None = option(
        None,
        "A folder of images, with those below it, or a .jsonl or .csv of file_name and text; NAME.txt or NAME.caption beside NAME.png is its caption. "
        "May be repeated; DIR:3 counts three times.",
        required=True,
        several="repeated",
        data_only=True,
    )
    heldout: str | float | None = option(
        None,
        "Images that are measured on and not trained on: a share of the data (0.1), how many of it (3), or a folder of others.",
        data_only=True,
    )
    heldout_every: int | None = option(
        None,
        "Steps between two measurements; default: ten in a run, less where they would take more than a fifth of its time.",
        at_least=1,
        needs="heldout",
        data_only=True,
    )
    best: str | None = option(
        None,
        "Which step's adapter a run ends with: that of the lowest held-out loss (the default with --heldout), or the last.",
        choices=("heldout", "last"),
        needs="heldout",
        data_only=True,
    )
    instance_prompt: str | None = option(None, "The caption of images without a caption of their own.", data_only=True)
    trigger: str | None = option(
        None, "The word for what is learnt: [trigger] in captions and prompts stands for it.", data_only=True
    )
    mask: str | None = option(
        None,
        "What counts in an image: alpha (its transparency), or a folder of masks with the images' names; white counts.",
        data_only=True,
    )
    control: str | Sequence[str] | None = option(
        None,
        "Folders of control images with the pictures' names, with commas, for models of edits. Default: control, control2 ... beside a folder target.",
        data_only=True,
    )
    class_prompt: str | None = option(
        None, "Switches prior preservation on: what the class is called, without the new word.", data_only=True
    )
    prior: str | None = option(
        None,
        "How the model's idea of the class is kept: on class images (the default with --class-prompt), or by the base's own predictions for the "
        "training images under other prompts, which needs none.",
        choices=("images", "base"),
        data_only=True,
    )
    prior_prompts: str | None = option(
        None,
        "With --prior base, how often which prompts are asked: class:2,blank:1,caption:1; caption is an image's own without the trigger. "
        "Default: those that there are, equally often.",
        needs="prior",
        data_only=True,
    )
    class_data: str | None = option(
        None,
        "A folder of class images; missing ones are generated into it. Default: OUT/class.",
        needs="class_prompt",
        data_only=True,
    )
    num_class_images: int | None = option(
        None, "How many class images there shall be; default: 100.", at_least=1, needs="class_prompt", data_only=True
    )
    resolution: int | Sequence[int] | None = option(
        None,
        "Side of the square that training images have the area of, in pixels; default: what the model was made for. "
        "With several, as in 512,768, an image is used in each that does not enlarge it.",
        at_least=8,
        several="commas",
    )
    buckets: bool = option(
        True, "Keep the shapes of images, by sd-scripts' buckets; else all are cropped to squares.", data_only=True
    )
    frames: int | Sequence[int] | None = option(
        None,
        "Train on clips of so many frames, with a model of videos: of video files, folders of numbered frames and animated images. With several, as in "
        "1,17,33, a clip is used in each that it is long enough for.",
        at_least=1,
        several="commas",
        data_only=True,
    )
    fps: float | None = option(
        None,
        "Frames a second that clips are shown at; default: what the model was made for.",
        above=0,
        needs="frames",
        data_only=True,
    )
    extract: str | None = option(
        None,
        "What of longer clips is used: head (the default), middle, uniform (frames spread over all of it), or chunks (one clip after the other).",
        choices=("head", "middle", "uniform", "chunks"),
        needs="frames",
        data_only=True,
    )
    flip: bool = option(False, "Mirror images at random.", data_only=True)
    crop: str = option(
        "center", "What of an image is used where it is too long.", choices=("center", "random"), data_only=True
    )
    caption_dropout: float = option(
        0.0, "Probability of an empty caption, which guidance needs.", at_least=0, at_most=1, data_only=True
    )
    shuffle_captions: bool = option(
        False, "Put the parts of captions between commas in another order each time.", data_only=True
    )
    keep_tokens: int | None = option(
        None,
        "How many parts of a caption stay in front when they are shuffled; default: 0.",
        at_least=0,
        needs="shuffle_captions",
        data_only=True,
    )
    cache: str = option(
        "ram",
        "Where latents and text embeddings are kept: for this run, for others too, or nowhere (all is encoded at each step).",
        choices=("ram", "disk", "none"),
    )
    cache_dir: str | None = option(None, "The folder of --cache disk; default: OUT/cache. Runs may share one.")
    cache_limit: float = option(
        20.0, "GiB that the folder of --cache disk may grow to; what was not used for longest goes first.", above=0
    )
    targets: str | Sequence[str] = option(
        "attn",
        "Which layers: attn, attn-mlp, full, names with commas (to_q,to_v), or a regular expression for whole names.",
    )
    max_length: int | None = option(
        None,
        "Tokens of a caption that are read; CLIP reads longer ones in chunks: 75 (the default), 150, 225 ...",
        at_least=1,
    )
    clip_skip: int | None = option(
        None, "Read captions off an earlier layer of CLIP: 1 is the last, 2 the one before it.", at_least=1
    )
    train_text_encoder: bool = option(False, "Adapt the text encoder too.")
    epochs: int | None = option(
        None,
        "Instead of --steps: how often all pictures are passed through, each time in whole steps.",
        at_least=1,
        data_only=True,
    )
    batch_size: int = option(1, "Images a pass (as many class images come on top).", at_least=1)
    base_lora: str | Sequence[str] | None = option(
        None, "Adapters that the base is trained with, FILE:STRENGTH with commas; what is learnt is without them."
    )
    training_adapter: str | None = option(
        None, "An adapter, FILE:STRENGTH, that is on while training and off in what is drawn, measured and saved."
    )
    offload: float = option(
        0.0,
        "Share of the denoiser's blocks that live in the host's memory, and come to the device when they are needed: 0 to 1.",
        at_least=0,
        at_most=1,
    )
    memory: str | None = option(
        None,
        "Fit the run into a GPU of this memory (8GB, 12GB, 16GB, 24GB ...): picks --quantize, --offload and --gradient-checkpointing where they are not "
        "said, as --dry-run estimates.",
    )
    compile: bool = option(False, "Compile the denoiser: slow first steps, and faster ones then.")
    snr_gamma: float | None = option(None, "Weight the loss by min-SNR with this gamma; 5 is usual.", above=0)
    debiased: bool = option(False, "Weight the loss as errors of the noise over the root of the signal-to-noise ratio.")
    loss: str = option("l2", "How far a prediction is from its target.", choices=("l2", "huber", "smooth_l1"))
    huber_c: float | None = option(None, "Where squares go over to absolute values; default: 0.1.", above=0)
    huber_schedule: str | None = option(
        None, "Whether that depends on the noise; default: constant.", choices=("constant", "snr")
    )
    noise_offset: float | None = option(
        None,
        "Noise has a random mean for each channel, of this size: darker and brighter pictures; 0.05 is usual.",
        above=0,
        data_only=True,
    )
    density: str | None = option(
        None,
        "How levels of noise are drawn; default: uniform, and logit_normal for flows.",
        choices=("uniform", "logit_normal", "mode"),
    )
    density_mean: float | None = option(None, "Of logit_normal; above 0 is noisier; default: 0.", needs="density")
    density_std: float | None = option(None, "Of logit_normal; default: 1.", above=0, needs="density")
    density_scale: float | None = option(None, "Of mode; default: 1.29.", at_least=-1, at_most=1.75, needs="density")
    experts: str | None = option(
        None,
        "Of a model with two denoisers (Wan 2.2), which are trained: both (the default; every pair of steps has one of each), high (the one for much "
        "noise) or low.",
        choices=("both", "high", "low"),
        data_only=True,
    )
    shift: float | None = option(
        None, "Shifts levels towards noise, in the place of the model's own; above 1 is noisier.", above=0
    )
    sigma_range: str | Sequence[float] | None = option(None, "Train only where the share of noise lies between: 0.5,1.")
    base_range: str | Sequence[float] | None = option(
        None,
        "Learn the base's own predictions where the share of noise lies between: with 0.98,1 a style leaves compositions as they are.",
        data_only=True,
    )
    base_weight: float | None = option(
        None, "How much they count; default: 1.", above=0, needs="base_range", data_only=True
    )
    prior_weight: float | None = option(None, "Weight of the prior preservation; default: 1.", above=0, data_only=True)
    name: str | None = option(None, "Name of the adapter; default: the output folder's.")
    sample_prompt: str | Sequence[str] | None = option(
        None,
        "A prompt that is drawn while training, beside the instance prompt or a caption, which is always; may be repeated. sd-scripts' flags may "
        "follow it: --n not this --w 512 --h 768 --d 7 --l 7.5 --g 3.5 --s 30.",
        several="repeated",
    )
    sample_prompts: str | None = option(
        None, "A file of such prompts, a line each (# for remarks), or a .toml or .json of them."
    )
    sample_every: int | None = option(
        None,
        "Steps between two times that they are drawn; also at the beginning and the end. 0: never. Default: as --save-every.",
        at_least=0,
    )
    sample_steps: int | None = option(
        None, "Denoising steps of a sample; default: 25, or 4 for a model that was made for few.", at_least=1
    )
    sample_guidance: float | None = option(None, "Guidance scale of samples; default: the pipeline's own.", at_least=0)
    sample_seed: int = option(42, "Seed of the noise that samples begin with, the same each time.", at_least=0)
    sample_first: bool = option(True, "Draw before the first step too: how the base does it.")
    sample_start: float | None = option(
        None,
        "Share of a sample's denoising steps that the base takes alone, for an adapter that the noisiest levels are not trained of (--sigma-range).",
        above=0,
        below=1,
    )
    sample_model: str | None = option(
        None,
        "Another checkpoint of the model's family that samples are drawn with: the one that the adapter will be used on. "
        "It is loaded beside the model each time.",
    )
    formats: str | Sequence[str] = option(
        "diffusers,kohya",
        "What the adapter is saved as: diffusers, kohya, comfyui, kohya-diffusers, lycoris, onetrainer, xlabs, peft (a folder), with commas.",
    )
    save_dtype: str | None = option(
        None,
        "The dtype of the files; default: fp32, and bf16 for models of more than a billion parameters. States are fp32.",
        choices=("fp32", "bf16", "fp16"),
    )
    author: str | None = option(None, "Who made it: in the files and the model card.")
    description: str | None = option(None, "What it is: in the files and the model card.")
    license: str | None = option(None, "Its licence, as the Hub calls it: in the files and the model card.")

    def check_values(self) -> None:
        """Beside what all runs check: options that only go with others, and the range of noise."""
        super().check_values()
        self.base_span()
        self.check_samples()
        if self.memory is not None:
            self.memory_left()
        if self.class_prompt is None and self.prior != "base":
            for name in ("prior", "prior_weight"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} without class_prompt or prior base, and so it would do nothing",
                        remedy=f"Pass --class-prompt or --prior base, or leave --{_flag(name)} out.",
                    )
        if self.epochs is not None and self.steps != TrainConfig.steps:
            raise ConfigError("steps with epochs: both say how long to train", remedy="Leave one of them out.")
        if self.compile and self.offload:
            raise ConfigError(
                "compile with offload: compiled code has weights that stay where they are",
                remedy="Leave one of them out.",
            )
        if self.debiased and self.snr_gamma is not None:
            raise ConfigError("debiased with snr_gamma: both weight the loss", remedy="Leave one of them out.")
        for name, of, needed in _ONLY_WITH:
            if getattr(self, name) is not None and getattr(self, of) not in needed:
                raise ConfigError(
                    f"{name} with {of} {getattr(self, of)}, and so it would do nothing",
                    remedy=f"Pass --{_flag(of)} {needed[0]}, or leave --{_flag(name)} out.",
                )

    def check_samples(self) -> None:
        """Raise ConfigError for what would be said of samples that are never drawn."""
        said = {f.name for f in fields(self) if f.name.startswith("sample_") and getattr(self, f.name) != f.default}
        if self.sample_every == 0 and (idle := sorted(said - {"sample_every"})):
            raise ConfigError(
                f"{idle[0]} with sample_every 0, and so it would do nothing",
                remedy=f"Pass another --sample-every, or leave --{_flag(idle[0])} out.",
            )

    def memory_bytes(self) -> int:
        """The memory that was asked for. Raises ConfigError for what is none."""
        said = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM])i?B?", str(self.memory), re.IGNORECASE)
        if said is None or not float(said[1]):
            raise ConfigError(
                f"memory is {shown(self.memory)}",
                remedy="It is a GPU's: 8GB, 12GB, 16GB or 24GB, or another number of GB or MB.",
            )
        return int(float(said[1]) * _UNITS[said[2].upper()])

    def memory_left(self) -> int:
        """The memory that was asked for without what is reserved. Raises ConfigError if that is none."""
        size = self.memory_bytes() - RESERVED
        if size <= 0:
            raise ConfigError(
                f"memory {self.memory} is too little: {RESERVED // 2**30} GiB is left for PyTorch itself, fragments and the screen",
                remedy="It is a GPU's: 8GB, 12GB, 16GB or 24GB, or another number of GB or MB.",
            )
        return size

    def without_experts(self) -> ConfigError:
        """The error of a run that names denoisers, of a model that has one."""
        return ConfigError(
            f"experts is {self.experts}, and this model has one denoiser for all noise", remedy="Leave --experts out."
        )

    def span(self) -> tuple[float, float]:
        """The lowest and the highest share of noise that is trained at. Raises ConfigError."""
        return _range("sigma_range", self.sigma_range) or (0.0, 1.0)

    def base_span(self) -> tuple[float, float] | None:
        """The lowest and the highest share of noise at which the base's own predictions are learnt; None: nowhere. Raises ConfigError."""
        span, (low, high) = _range("base_range", self.base_range), self.span()
        if span is None or (max(span[0], low) < min(span[1], high) and not (span[0] <= low and high <= span[1])):
            return span
        outside = "lies outside of" if span[1] <= low or high <= span[0] else "leaves nothing to learn of"
        raise ConfigError(
            f"base_range {span[0]:g},{span[1]:g} {outside} the noise that is trained at, {low:g},{high:g}",
            remedy="Pass another --base-range or --sigma-range.",
        )

    def sides(self, resolution: int | None) -> tuple[int, ...]:
        """The resolutions that were asked for, or else what the model was made for; none if that is not known."""
        sides = self.resolution or resolution or ()
        return (sides,) if isinstance(sides, int) else tuple(sides)

    def counts(self) -> tuple[int, ...]:
        """The numbers of frames that clips have; none where single images are trained on."""
        return (self.frames,) if isinstance(self.frames, int) else tuple(self.frames or ())

    def main_prompts(self) -> dict[str, str]:
        """{prompt that is always drawn: the option that it is from}."""
        return {} if self.instance_prompt is None else {self.instance_prompt: "--instance-prompt"}

    def text_encoders(self) -> list[str]:
        """The files of text encoders, which stand in a list, or in one text with commas."""
        files = self.text_encoder.split(",") if isinstance(self.text_encoder, str) else self.text_encoder or ()
        return [file.strip() for file in files]


def _range(name: str, said: str | Sequence[float] | None) -> tuple[float, float] | None:
    """Two shares of noise, as an option says them; None if it says none. Raises ConfigError."""
    if said is None:
        return None
    try:
        low, high = (float(end) for end in (said.split(",") if isinstance(said, str) else said))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise ConfigError(
            f"{name} is {shown(said)}", remedy="It is two numbers from 0 to 1, the lower one first: 0.5,1."
        )
    return low, high


# (option, the option that it belongs to, the values of it that it belongs to)
_ONLY_WITH = (
    ("huber_c", "loss", ("huber", "smooth_l1")),
    ("huber_schedule", "loss", ("huber", "smooth_l1")),
    ("density_mean", "density", ("logit_normal",)),
    ("density_std", "density", ("logit_normal",)),
    ("density_scale", "density", ("mode",)),
    ("prior_prompts", "prior", ("base",)),
    ("class_data", "prior", ("images", None)),
    ("num_class_images", "prior", ("images", None)),
    ("cache_dir", "cache", ("disk",)),
)
AnyOptions = TypeVar("AnyOptions", bound=Options)
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {  # {declared type: what is accepted, in words}
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a finite number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text in quotes"),
}


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _check_type(name: str, value: object, declared: str) -> None:
    """Raise ConfigError for a value that is not of the declared type, or no finite number."""
    entries = next((kind for kind in _KINDS if f"Sequence[{kind}]" in declared), None)
    if isinstance(value, (list, tuple)) and entries:
        for entry in value:
            _check_type(name, entry, entries)
        return
    kinds, words = _accepted(declared)
    if (
        not isinstance(value, kinds)
        or (isinstance(value, bool) and bool not in kinds)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        said = shown(value) if isinstance(value, str) else str(value)  # '2' is a text, 2.0 a number
        raise ConfigError(f"{name} is {said}", remedy=f"It is {words}.")


def _accepted(declared: str) -> tuple[tuple[type, ...], str]:
    """What a declared type accepts, and in words."""
    known = [_KINDS[kind] for kind in declared.split(" | ") if kind in _KINDS]
    return tuple(kind for accepted, _ in known for kind in accepted), ", or ".join(words for _, words in known)


def _check_value(name: str, value: object, meta: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value that is empty, not among the choices, or beyond a limit; of several values, for any."""
    values = (value or [""]) if isinstance(value, (list, tuple)) else [value]
    for text in values:
        if isinstance(text, str) and not text.strip():
            raise ConfigError(f"{name} is empty", remedy=f"Give it a value, or leave --{_flag(name)} out.")
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(
            f"{name} is {shown(value)}",
            remedy=f"{near(str(value), meta['choices'])} Allowed: {', '.join(meta['choices'])}.".strip(),
        )
    limits = {words: limit for words, limit in meta["limits"].items() if limit is not None}
    if any(not _WITHIN[words](number, limit) for words, limit in limits.items() for number in values):
        bounds = " and ".join(f"{words} {limit:g}" for words, limit in limits.items())
        raise ConfigError(f"{name} is {value}", remedy=f"It is {bounds}.")


_WITHIN = {
    "at least": lambda value, limit: value >= limit,
    "above": lambda value, limit: value > limit,
    "below": lambda value, limit: value < limit,
    "at most": lambda value, limit: value <= limit,
}


def target_names(targets: str | Iterable[str], presets: Iterable[str]) -> str | list[str]:
    """What `targets` stand for: a preset as it is, names as a list (whole names and last parts), a regular expression as it is.

    Names stand in a list, or in one text with commas. Raises ConfigError for a preset among names.
    """
    presets = tuple(presets)
    names = [name.strip() for name in (targets.split(",") if isinstance(targets, str) else targets)]
    if isinstance(targets, str) and (targets in presets or not all(re.fullmatch(r"\w[\w.]*", name) for name in names)):
        return targets
    if mixed := [name for name in names if name in presets]:
        if len(names) == 1:
            return mixed[0]
        raise ConfigError(
            f"targets names {shown(mixed[0])} among layers",
            remedy="A preset stands alone: leave it out, or the others.",
        )
    return names


PATHS = {  # the options that are paths
    "model",
    "base",
    "vae",
    "text_encoder",
    "data",
    "out",
    "class_data",
    "heldout",
    "mask",
    "init_from",
    "cache_dir",
    "sample_prompts",
    "sample_model",
}
# {what diffusers' examples or transformers' Trainer call an option: what we do, and how ours differs}: those that other_names.TABLE does not translate
OTHER_NAMES: dict[str, str] = {
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup, in steps",
    "huber_delta": "huber_c",
    "validation_file": "heldout",
    "val_split": "heldout",
    "validation_data_dir": "heldout",
    "eval_data_dir": "heldout",
    "eval_every": "heldout_every",
    "eval_steps": "heldout_every",
    "load_best_model_at_end": "best, which is heldout or last",
    "keep_best": "best, which is heldout or last",
    "logging_steps": "log_every",
    "eval_file": "heldout",
    "optim": "optimizer",
    "optim_args": "optimizer_args",
    "num_cycles": "lr_cycles",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "bf16": "dtype, which is fp32, bf16 or fp16",
    "max_seq_length": "max_length",
    "load_in_4bit": "quantize, which is nf4, int8 or fp8",
    "load_in_8bit": "quantize, which is nf4, int8 or fp8",
    "qlora": "quantize, which is nf4, int8 or fp8",
}
