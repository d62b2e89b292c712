"""Small files that would be much work or much memory: refused with a typed error, in two seconds and 64 MB."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
import warnings

import pytest
import torch

from diffpeft import LoraConfig, PeftModel, PromptTuningConfig, converters, get_peft_model, load_lora
from diffpeft.errors import DiffpeftError
from tests.llm import models
from tests.robustness.seeds import unet

SECONDS, MEGABYTES, PATIENCE = 2.0, 64, 20
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROWS = {f"{LAYER}.lora_A.weight": [2, 32], f"{LAYER}.lora_B.weight": [32, 2]}
GIGA = 1 << 30


def made(path, rows=ROWS, metadata=None, more=b"", sparse=False):
    """A file of F32 zeros; `more` stands in the header beside the rows, and the bytes are not written if `sparse`."""
    table, end = {"__metadata__": metadata} if metadata else {}, 0
    for key, shape in rows.items():
        size = 4 * torch.Size(shape).numel()
        table[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(table).encode()[:-1] + more + b"}"
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end) if sparse else f.write(bytes(end))
    return path


def folder(path, config, **options):
    """A PEFT folder; a config that is a number is a file of so many bytes that nobody wrote."""
    path.mkdir()
    key = f"base_model.model.{LAYER.removeprefix('unet.')}"
    made(path / WEIGHTS, {f"{key}.lora_A.weight": [2, 32], f"{key}.lora_B.weight": [32, 2]}, **options)
    if isinstance(config, int):
        with open(path / CONFIG, "wb") as f:
            f.truncate(config)
    else:
        text = config if isinstance(config, str) else json.dumps({"peft_type": "LORA", "r": 2, **config})
        (path / CONFIG).write_text(text)
    return path


def axes(numbers):
    return b',"y":{"dtype":"F32","shape":[%s],"data_offsets":[0,0]}' % b",".join(numbers)


def record(shape):
    key = next(iter(ROWS))
    return {"format": "kohya", "keys": {key: [[LAYER], "alpha", shape, "F32", "00"]}, "metadata": {}, "names": []}


RANK = {f"{LAYER}.lora_A.weight": [GIGA // 32, 32], f"{LAYER}.lora_B.weight": [32, GIGA // 32]}
FILES = {
    "many axes": lambda p: made(p, more=axes([b"9" * 18] * 400_000)),
    "axes of many digits": lambda p: made(p, more=axes([b"9" * 4000] * 3000)),
    "many axes of one": lambda p: made(p, more=axes([b"1"] * 500_000)),
    "17 axes": lambda p: made(p, more=axes([b"0"] * 17)),
    "an empty tensor of much": lambda p: made(p, more=axes([b"0", b"9" * 18, b"9" * 18])),
    "an axis beyond 2^63": lambda p: made(p, more=axes([b"0", b"9223372036854775808"])),
    "a million keys of metadata": lambda p: made(p, metadata={f"k{n}": "" for n in range(10**6)}),
    "many keys of metadata": lambda p: made(p, metadata={f"k{n}": "" for n in range(100_000)}),
    "many rows": lambda p: made(p, more=b"".join(b',"%d":{}' % n for n in range(500_000))),
    "many lists": lambda p: made(p, more=b',"y":[' + b"[]," * 2_000_000 + b"[]]"),
    "much depth": lambda p: made(p, more=b',"y":' + b"[" * 2_000_000),
    "an alpha of 4 GB": lambda p: made(p, {**ROWS, f"{LAYER}.alpha": [GIGA]}, sparse=True),
    "a rank of 33 million": lambda p: made(p, RANK, sparse=True),
    "a carried tensor of 4 GB": lambda p: made(p, {**ROWS, "something": [GIGA]}, sparse=True),
    "a config in the metadata": lambda p: made(p, metadata={"lora_adapter_metadata": "[" + "[]," * 3_000_000 + "[]]"}),
    "a rank in the metadata": lambda p: made(
        p, metadata={"lora_adapter_metadata": '{"unet.r": 1e999, "unet.lora_alpha": 1}'}
    ),
    "a table in the metadata": lambda p: made(
        p, metadata={"lora_adapter_metadata": json.dumps({f"unet.{n}": n for n in range(200_000)})}
    ),
    "a record with a shape": lambda p: made(
        p, metadata={"diffpeft.provenance": json.dumps(record([10**18] * 100_000))}
    ),
    "blocks in a record": lambda p: made(
        p, metadata={"diffpeft.provenance": '{"format": "", "blocks": {"x": {"0": [1e999, -1, 0]}}}'}
    ),
}
FOLDERS = {
    "a config of 8 GB": lambda p: folder(p, 8 * GIGA),
    "a config of 3 MB of lists": lambda p: folder(p, '{"a": [%s[]]}' % ("[]," * 1_000_000)),
    "many targets": lambda p: folder(p, {"target_modules": [f"x{n}" for n in range(65_000)]}),
    "many patterns": lambda p: folder(p, {"rank_pattern": {f"x{n}.*y": 2 for n in range(60_000)}}),
    "a pattern that tries all ways": lambda p: folder(p, {"alpha_pattern": {"(.|.)" * 40 + "!": 2}}),
    "a rank of 10^9": lambda p: folder(p, {"r": 10**9}),
    "layers without end": lambda p: folder(p, {"layer_replication": [[0, 2]] * 2000}),
    "layers by the thousand": lambda p: folder(p, {"layer_replication": [[0, 2]] * 250}),
    "an alpha without end": lambda p: folder(p, '{"peft_type": "LORA", "r": 2, "lora_alpha": 1%s}' % ("0" * 400)),
    "a version of many digits": lambda p: folder(p, {"peft_version": "9" * 5000 + ".1"}),
    "terms without end": lambda p: folder(p, {"peft_type": "OFT", "num_cayley_neumann_terms": 1e999}),
}
HARMLESS = {  # small work: they need not be refused
    "an alpha of 4 GB": ("detect", "inspect"),
    "a rank of 33 million": ("detect", "inspect", "read"),
    "a carried tensor of 4 GB": ("detect", "inspect", "read"),
    "a config in the metadata": ("detect", "inspect"),
    "a rank in the metadata": ("detect", "inspect"),
    "a table in the metadata": ("detect", "inspect", "read", "convert", "load"),
    "a record with a shape": ("detect", "inspect", "read", "convert", "load"),
    "blocks in a record": ("detect", "inspect", "read", "convert", "load"),
    "a pattern that tries all ways": ("detect", "inspect", "read", "convert", "load"),
    "layers by the thousand": ("detect", "inspect", "read", "convert", "load"),
}


def measured(jobs):
    """{name: (what came of it, seconds, MB more than before)} of jobs in a process of their own; one that does not end is the last."""
    r, w = os.pipe()
    if (pid := os.fork()) == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, job in jobs.items():
                signal.alarm(PATIENCE)
                os.write(w, (json.dumps([name, *_measured(job)]) + "\n").encode())
        os._exit(0)
    os.close(w)
    with open(r) as f:
        found = {name: rest for name, *rest in map(json.loads, f)}
    os.waitpid(pid, 0)
    return {name: found.get(name, ("hangs, or another did", float(PATIENCE), 0.0)) for name in jobs}


def _measured(job):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        job()
        said = "ok"
    except DiffpeftError as error:
        said = f"typed {str(error)[:200]}"
    except BaseException as error:
        said = f"RAW {type(error).__name__}: {str(error)[:200]}"
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return said, time.process_time() - start, used


@pytest.fixture(scope="module")
def model():
    return unet()


def wrong(said, seconds, used, allowed):
    """Why a result is none that is allowed; empty if it is."""
    if not said.startswith("typed") and not (said == "ok" and allowed):
        return said
    return f"{seconds:.1f} s" if seconds > SECONDS else f"{used:.0f} MB" if used > MEGABYTES else ""


@pytest.mark.parametrize("case", [*FILES, *FOLDERS])
def test_a_small_file_is_little_work(case, model, tmp_path):
    path = {**FILES, **FOLDERS}[case](tmp_path / ("x" if case in FOLDERS else "x.safetensors"))
    jobs = {
        "detect": lambda: converters.detect(path),
        "inspect": lambda: converters.inspect(path),
        "read": lambda: converters.read(path),
        "convert": lambda: converters.convert(path, tmp_path / "y.safetensors", to="kohya"),
        "load": lambda: load_lora(model, path, name="a"),
    }
    easy = HARMLESS.get(case, ("detect", "inspect") if case in FOLDERS and case != "a config of 8 GB" else ())
    found = {name: wrong(*result, name in easy) for name, result in measured(jobs).items()}
    assert not {name: why for name, why in found.items() if why}


CONFIGS = {
    "tokens without end": {"num_virtual_tokens": 10**9},
    "a million tokens": {"num_virtual_tokens": 1 << 20},
    "much width": {"token_dim": 1 << 20},
    "many transformers": {"num_transformer_submodules": 64},
    "a rank of 10^9": {"r": 10**9},
    "a rank of 65536": {"r": 1 << 16},
    "layers without end": {"layer_replication": [[0, 2]] * 2000},
    "many layers": {"layer_replication": [[0, 2]] * 257},
    "targets": {"target_modules": "(.|.)" * 40 + "!"},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_small_config_of_a_language_model_is_little_work(case, tmp_path):
    prompts = not {"num_virtual_tokens", "token_dim", "num_transformer_submodules"}.isdisjoint(CONFIGS[case])
    config = (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        if prompts
        else LoraConfig(r=2, target_modules=["q_proj"])
    )
    get_peft_model(models.model(), config).save_pretrained(tmp_path)
    file = tmp_path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | CONFIGS[case]))
    base = models.model()
    (result,) = measured({"from_pretrained": lambda: PeftModel.from_pretrained(base, tmp_path)}).values()
    assert not wrong(*result, False)
