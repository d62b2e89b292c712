"""Real adapter files to be damaged: every form of every method in every format that holds it, and the files of other programs and families."""

from __future__ import annotations

import json
import random
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from diffpeft import converters, get_peft_model, io, save_lora, unload
from diffpeft.llm import config as llm
from tests.contracts import kinds
from tests.converters import factory
from tests.llm import models

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYERS = (
    "conv_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "mid_block.resnets.0.conv1",
)
FAMILIES = ("sdxl", "flux", "sd3", "wan", "hunyuan_video")
Row = tuple[str, list[Any], bytes]  # dtype, shape, bytes


@dataclass
class Seed:
    """An adapter's file taken apart, so that it can be put together wrongly; `config` is that of a PEFT folder."""

    name: str
    rows: dict[str, Row]
    metadata: dict[str, Any] = field(default_factory=dict)
    config: str | None = None

    def copy(self) -> Seed:
        """One that may be changed."""
        return Seed(
            self.name, {k: (d, list(s), b) for k, (d, s, b) in self.rows.items()}, dict(self.metadata), self.config
        )

    def bytes(self) -> bytes:
        """The safetensors file."""
        table: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        end = 0
        for key, (dtype, shape, data) in self.rows.items():
            table[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
            end += len(data)
        text = json.dumps(table).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in self.rows.values())

    def write(self, folder: Path, name: str, data: bytes) -> Path:
        """The file, or the folder with its two, under a name of its own."""
        if self.config is None:
            (folder / f"{name}.safetensors").write_bytes(data)
            return folder / f"{name}.safetensors"
        (folder / name).mkdir()
        (folder / name / WEIGHTS).write_bytes(data)
        (folder / name / CONFIG).write_text(self.config, encoding="utf-8", errors="surrogatepass")
        return folder / name


def unet() -> UNet2DConditionModel:
    """A random UNet of Stable Diffusion's kind, small."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def taken_apart(path: Path, name: str) -> Seed:
    """A file or a PEFT folder as a seed."""
    handles, metadata = io.header(path / WEIGHTS if path.is_dir() else path)
    rows = {key: (h.dtype, list(h.shape), io.raw(h)) for key, h in handles.items()}
    config = (path / CONFIG).read_text() if path.is_dir() else None
    return Seed(name, rows, dict(metadata), config)


PROMPTS = {
    "prompt": lambda: llm.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: llm.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": lambda: llm.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "multitask": lambda: llm.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2),
}
LINEARS = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
LANGUAGE = PROMPTS | {
    "lora": lambda: llm.LoraConfig(r=4, modules_to_save=["lm_head"], rank_pattern={"q_proj": 2}, **LINEARS),
    "lora, biases": lambda: llm.LoraConfig(r=4, bias="all", lora_bias=True, use_rslora=True, **LINEARS),
    "lora, rows": lambda: llm.LoraConfig(r=4, trainable_token_indices=[3, 5], **LINEARS),
    "lora, deeper": lambda: llm.LoraConfig(r=4, layer_replication=[(0, 2), (0, 2)], **LINEARS),
    "dora": lambda: llm.LoraConfig(r=4, use_dora=True, **LINEARS),
    "adalora": lambda: llm.AdaLoraConfig(init_r=4, total_step=9, **LINEARS),
    "loha": lambda: llm.LoHaConfig(r=2, **LINEARS),
    "lokr": lambda: llm.LoKrConfig(r=2, **LINEARS),
    "oft": lambda: llm.OFTConfig(oft_block_size=4, **LINEARS),
    "boft": lambda: llm.BOFTConfig(boft_block_size=4, **LINEARS),
    "ia3": lambda: llm.IA3Config(feedforward_modules=["up_proj"], **LINEARS),
}


def language_seeds() -> list[Seed]:
    """PEFT folders of a language model, of each method."""
    found = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, config in LANGUAGE.items():
            get_peft_model(models.model("llama"), config()).save_pretrained(Path(folder, name))
            found.append(taken_apart(Path(folder, name), f"language model, {name}"))
    return found


def seeds(few: bool = False) -> list[Seed]:
    """All of them; `few`: one form of each method, and one other family."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*_attached(Path(folder), few), *_others(Path(folder), few)]


def _attached(folder: Path, few: bool) -> list[Seed]:
    """What is on layers of a UNet, saved as every format that holds it."""
    found, model = [], unet()
    for form in kinds.METHOD_FORMS.values() if few else kinds.FORMS:
        layers = [n for n in LAYERS if "conv" in n] if "tucker" in form else [n for n in LAYERS if n != "conv_in"]
        with torch.no_grad():
            kinds.give(model, form, "a", layers)
            for name, p in model.named_parameters():
                if ".adapters." in name:
                    p.copy_(torch.randn_like(p) * 0.1)
        for format in converters.FORMATS:
            path = folder / f"{len(found)}{'' if format == 'peft' else '.safetensors'}"
            try:
                save_lora(model, path, name="a", format=format)
            except converters.writing.CannotConvertError:
                continue
            found.append(taken_apart(path, f"{form}, {format}"))
        unload(model)
    return found


def _others(folder: Path, few: bool) -> list[Seed]:
    """Files as other programs write them."""
    found = []
    rng = random.Random(0)
    for family in FAMILIES[1:2] if few else FAMILIES:
        for format in factory.FORMATS:
            for method in rng.sample(sorted(factory.METHODS), 1 if few else 4):
                if method == "norm" and family not in factory.NORMS:
                    continue
                at = folder / f"other{len(found)}"
                at.mkdir()
                try:
                    path = factory.checkpoint(format, family, method, text=format not in factory.SINGLE).save(at)
                except (KeyError, ValueError, AssertionError):
                    continue  # no such file
                found.append(taken_apart(path, f"{family}, {method}, {format}"))
    return found
