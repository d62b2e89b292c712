import csv
import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import diffpeft
from diffpeft import CheckpointError, ConfigError, DataError, DivergedError, UnknownNameError
from diffpeft.llm import sft, texts
from diffpeft.llm.sft_config import SftConfig
from diffpeft.train.checkpoints import checkpoints_in, sha256
from diffpeft.train.method import CONFIGS
from diffpeft.train.report.live import Live
from tests.llm import chat
from tests.train.stops import StopsAt

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Zwei."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Drei."},
]
LENGTHS = (3, 9, 5, 7, 2, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer():
    return chat.tokenizer()


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def config(folder, tmp_path):
    return SftConfig(
        model=str(folder),
        data=str(chat.write_rows(tmp_path / "rows.jsonl")),
        out=str(tmp_path / "out"),
        overwrite=True,
        rank=4,
        lr=1e-2,
        steps=4,
        batch_size=4,
        samples=1,
    )


class Bare:
    """As much of a PeftModel as the loss needs, without an adapter."""

    def __init__(self, model):
        self.model, self.device = model, model.device

    def get_base_model(self):
        return self.model

    def __call__(self, **batch):
        return self.model(**batch)


def example(length, read=1):
    ids = (torch.arange(length) * 7 + length).remainder(250).tolist()
    return texts.TokenExample(ids, [i >= read for i in range(length)])


def tokens(row, tokenizer, loss="completion", max_length=512):
    return texts.examples([row], tokenizer, max_length=max_length, loss=loss)


def learnt(example, tokenizer):
    return tokenizer.decode([i for i, x in zip(example.ids, example.learnt, strict=True) if x])


# -- what is learnt ----------------------------------------------------------------------------------------------------


def test_the_answers_of_a_chat_are_learnt_as_transformers_marks_them(tokenizer):
    (got,) = tokens({"messages": CHAT}, tokenizer)
    theirs = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert got.ids == theirs["input_ids"] and got.learnt == [bool(x) for x in theirs["assistant_masks"]]
    assert learnt(got, tokenizer) == "Zwei.<|im_end|>\nDrei.<|im_end|>\n"


def test_a_last_question_without_an_answer_is_left_out(tokenizer):
    (short,), (whole,) = tokens({"messages": CHAT[:3]}, tokenizer), tokens({"messages": CHAT[:4]}, tokenizer)
    assert short == whole


def test_of_a_prompt_and_its_completion_the_completion_and_the_end_are_learnt(tokenizer):
    (got,) = tokens({"prompt": "a after", "completion": " b"}, tokenizer)
    assert tokenizer.decode(got.ids) == "a after b<|im_end|>" and learnt(got, tokenizer) == " b<|im_end|>"
    assert got.prompt == tokenizer("a after")["input_ids"]


@pytest.mark.parametrize("row", [{"messages": CHAT}, chat.ROWS[0]], ids=["messages", "prompt"])
def test_with_loss_all_everything_is_learnt(row, tokenizer):
    (got,) = tokens(row, tokenizer, loss="all")
    assert all(got.learnt)


def test_a_text_is_cut_into_pieces_of_which_nothing_is_lost(tokenizer):
    pieces = tokens({"text": "abcdefghijk"}, tokenizer, max_length=5)
    assert tokenizer.decode([i for p in pieces for i in p.ids]) == "abcdefghijk<|im_end|>"
    assert [len(p.ids) for p in pieces] == [5, 5, 2]


def test_a_row_that_is_too_long_is_cut_off_with_a_warning(tokenizer):
    with pytest.warns(UserWarning, match="1 of 1 rows"):
        (got,) = tokens({"prompt": "abc", "completion": "defgh"}, tokenizer, max_length=5)
    assert tokenizer.decode(got.ids) == "abcde" and learnt(got, tokenizer) == "de"


def test_packing_keeps_every_example_and_the_length():
    found = [example(n) for n in LENGTHS]
    sequences = texts.packed(found, 10)
    assert sorted(len(e.ids) for s in sequences for e in s) == sorted(LENGTHS)
    assert all(sum(len(e.ids) for e in s) <= 10 for s in sequences) and len(sequences) == 4


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_transformers_with_and_without_logits_to_keep(model):
    found = [[example(n, read)] for n, read in zip(LENGTHS, (1, 4, 2, 6, 1, 3), strict=True)]
    loss, batch = sft.Loss(Bare(model), pad=0), texts.collated(found, 0)
    theirs = model(**batch).loss
    for loss.can_keep in (True, False):
        torch.testing.assert_close(loss.total(found) / texts.tokens(found), theirs, rtol=1e-5, atol=0)
        alone = torch.stack([loss.total([sequence]) for sequence in found])
        torch.testing.assert_close(loss.each(found), alone, rtol=1e-5, atol=0)


def test_examples_that_share_a_sequence_do_not_see_each_other(model):
    found = [example(n) for n in LENGTHS]
    loss, sequences = sft.Loss(Bare(model), pad=0), texts.packed(found, 10)
    alone = sum(loss.total([[e]]) for e in found)
    torch.testing.assert_close(loss.total(sequences), alone, rtol=1e-5, atol=0)
    joined = texts.collated(sequences, 0)
    del joined["position_ids"]  # what would be seen without them: not the same
    assert abs(model(**joined).loss * texts.tokens(sequences) - alone) > 1e-4 * alone


def test_accumulating_is_a_larger_batch(model):
    found = [[example(n)] for n in LENGTHS]
    loss = sft.Loss(Bare(model), pad=0)
    gradients = []
    for size in (6, 4, 1):
        model.zero_grad()
        for start in range(0, len(found), size):
            (loss.total(found[start : start + size]) / texts.tokens(found)).backward()
        gradients.append(model.lm_head.weight.grad.clone())
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-7)
    model.zero_grad(set_to_none=True)


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CONFIGS)
def test_every_method_learns_and_peft_reads_what_is_written(method, config, folder):
    import peft

    targets = "default" if method == "ia3" else "all-linear"
    run = sft.train(replace(config, method=method, targets=targets, steps=8, batch_size=len(chat.ROWS)))
    assert run.losses[-1] < run.losses[0]
    sft.save(run)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), config.out).eval()(ids)
        base = AutoModelForCausalLM.from_pretrained(folder)(ids)
        ours = run.model(ids)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    assert (ours.logits - base.logits).abs().max() > 1e-3


def test_the_seed_decides_the_bytes(config, tmp_path):
    def weights(seed):
        torch.manual_seed(1000 + len(list(tmp_path.iterdir())))  # the caller's seed does not matter
        sft.save(sft.train(replace(config, seed=seed, dropout=0.5, out=str(tmp_path / "x"))))
        return (tmp_path / "x" / "adapter_model.safetensors").read_bytes()

    first = weights(1)
    assert weights(1) == first and weights(2) != first


def test_the_callers_random_numbers_go_on(config):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    sft.train(replace(config, dropout=0.5, steps=1))
    assert torch.rand(1) == expected


def test_checkpointing_changes_memory_and_not_the_losses(config):
    plain, checkpointed = (sft.train(replace(config, gradient_checkpointing=on)) for on in (False, True))
    assert checkpointed.losses == pytest.approx(plain.losses, rel=1e-6)
    assert checkpointed.model.get_base_model().is_gradient_checkpointing


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantize, layer", [("nf4", "Linear4bit"), ("int8", "Linear8bitLt"), ("fp8", "PackedLinear")])
def test_a_quantised_base_is_trained_on_and_not_changed(quantize, layer, checkpointing, config):
    run = sft.train(replace(config, quantize=quantize, gradient_checkpointing=checkpointing, steps=12))
    assert min(run.losses[-3:]) < run.losses[0]
    base = run.model.get_base_model()
    assert type(base.model.layers[0].self_attn.q_proj).__name__ == layer
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
    _, fresh = sft.open_model(run.config, "cpu")
    layers = (m.model.layers[0].mlp.down_proj.weight for m in (base, fresh))
    assert torch.equal(*layers)


def test_packed_training_learns_too(config):
    run = sft.train(replace(config, packing=True, max_length=40, batch_size=2, steps=8))
    assert run.losses[-1] < run.losses[0]


def test_what_is_held_out_is_measured_and_not_learnt(config, model, tokenizer, tmp_path):
    rows = [{"prompt": "z after", "completion": " q"}]
    held = chat.write_rows(tmp_path / "held.jsonl", rows)
    with_, without = sft.train(replace(config, heldout=str(held))), sft.train(config)
    assert with_.losses == without.losses and without.heldout_loss == {}
    (example,) = texts.examples(rows, tokenizer, max_length=99, loss="completion")
    with torch.no_grad():
        base = model(**texts.collated([[example]], 0)).loss.item()
    assert with_.heldout_loss["before"] == pytest.approx(base, rel=1e-5) and with_.heldout_loss["after"] != base
    assert [a["prompt"] for a in with_.answers] == ["z after"] and with_.answers[0]["expected"] == " q"


def test_the_folder_holds_the_adapter_the_numbers_and_a_report(config, tmp_path):
    run = sft.train(replace(config, heldout=config.data))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["checkpoints", "metrics.csv", "report.html"]
    files = sft.save(run)
    assert [f.name for f in files] == [
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.json",
        "report.html",
    ]
    assert all(f.is_file() for f in files)
    metrics = json.loads(files[2].read_text())
    assert metrics["heldout_loss"] == run.heldout_loss and metrics["losses"] == run.losses and metrics["steps"] == 4
    assert metrics["heldout_loss"]["standard_error"] > 0 and metrics["samples_per_second"] > 0 < metrics["peak_memory"]
    rows = list(csv.DictReader((tmp_path / "out" / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4] and rows[0]["heldout_loss"] == rows[0]["heldout_base"]
    assert float(rows[4]["heldout_loss"]) == pytest.approx(run.heldout_loss["after"], rel=1e-5)
    assert metrics["learnt_tokens"] == 4 * 4 * 3  # steps, rows, a blank and a letter and the end
    page = files[3].read_text()
    assert all(f.name in page for f in fields(SftConfig)) and "a after" in page and "http" not in page
    assert json.loads(files[1].read_text())["task_type"] == "CAUSAL_LM"
    assert all(t.dtype == torch.float32 for t in load_file(files[0]).values())


def test_a_run_is_shown_from_its_first_step_on_and_measuring_changes_nothing(config, tmp_path, monkeypatch):
    pages = []
    renew = Live.renew
    monkeypatch.setattr(Live, "renew", lambda self, changes=None: pages.append(page := renew(self, changes)) or page)
    often = replace(config, heldout=config.data, save_every=2, steps=6, dropout=0.3)
    run = sft.train(often)
    assert [len(page.losses) for page in pages] == [0, 2, 4, 6] and all(page.status.kind == "running" for page in pages)
    measured = [page.measures["heldout_loss"] for page in pages]
    assert measured[0]["before"] == measured[0]["after"] and len({m["after"] for m in measured}) == 4
    assert [m.step for m in pages[-1].heldout] == [0, 2, 4, 6] and len(pages[-1].rates) == 6
    assert pages[0].answers and all(a["after"] == a["before"] for a in pages[0].answers)
    assert run.report == tmp_path / "out" / "report.html" and not run.model.training
    plain = sft.train(replace(often, save_every=0, out=str(tmp_path / "plain")))
    assert plain.losses == run.losses


@pytest.mark.parametrize(
    "text, says",
    [
        ("all-linear", "all-linear"),
        ("default", None),
        (["default"], None),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
        ("q_proj, mlp.up_proj", ["q_proj", "mlp.up_proj"]),
        (r"layers\.[01]\..*_proj", r"layers\.[01]\..*_proj"),
    ],
)
def test_targets_are_pefts(text, says):
    assert sft.targets(text) == says


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no method": ({"method": "lorra"}, None, UnknownNameError, "lora"),
    "no layer": ({"targets": "qq_proj"}, None, ValueError, "qq_proj"),
    "no loss": ({"loss": "answers"}, None, ConfigError, "completion"),
    "gguf in bits": ({"model": "m.gguf", "quantize": "nf4"}, None, ConfigError, "quantize"),
    "no model": ({"model": "./modle"}, None, CheckpointError, "modle"),
    "no file": ({"data": "rwos.jsonl"}, None, DataError, "rwos.jsonl"),
    "no JSON": ({}, '{"text": "a"}\n{"text"', DataError, "line 2"),
    "no form": ({}, '{"txt": "a"}', DataError, "txt"),
    "a list": ({}, "[1]", DataError, "list"),
    "no text": ({}, '{"text": 3}', DataError, "row 1"),
    "no completion": ({}, '{"prompt": "a"}', DataError, "completion"),
    "no answer": ({}, '{"messages": [{"role": "user", "content": "a"}]}', DataError, "answer"),
    "no role": ({}, '{"messages": [{"content": "a"}]}', DataError, "role"),
    "empty": ({}, "\n", DataError, "empty"),
    "cut off": ({"max_length": 2}, '{"prompt": "abc", "completion": "d"}', DataError, "--max-length"),
    "diverged": ({"lr": 1e30, "steps": 9, "max_grad_norm": 1e30}, None, DivergedError, "step"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_nothing_is_written(mistake, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    options, text, error, says = MISTAKES[mistake]
    if text is not None:
        (tmp_path / "rows.jsonl").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=says):
        sft.train(replace(config, **options))
    if error is not DivergedError:
        assert sorted(tmp_path.rglob("*")) == before
        return
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "checkpoints",
        "metrics.csv",
        "report.html",
    ]  # the last good state
    page = (tmp_path / "out" / "report.html").read_text()
    assert "DivergedError" in page and "diffpeft sft --resume" in page


ROW = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}'
FAULTS = {  # {rows: (what is said, and where)}
    ROW + "\n" + ROW.replace('"ho"', "null"): ("message 2.*null", "row 2"),
    "\n\n" + ROW.replace('"hi"', "null"): ("message 1.*null", "line 3, row 1"),
    ROW + "\n" + ROW.replace('"ho"', "3"): ("message 2.*int", "row 2"),
    ROW.replace(', "content": "ho"', ""): ("message 2.*content", "row 1"),
    ROW.replace('"assistant"', "null"): ("message 2.*role", "row 1"),
    '{"messages": null}': ("list of messages", "row 1"),
    '{"messages": []}': ("list of messages", "row 1"),
    '{"messages": ["hi"]}': ("message 1.*object", "row 1"),
    '{"text": null}': ("text.*null", "row 1"),
    '{"prompt": "a", "completion": null}': ("completion.*null", "row 1"),
    '{"text": "a"}\n{"prompt": "a", "completion": "b"}': ("prompt.*text", "row 2"),
    ROW + '\n{"text": "a"}': ("text.*messages", "row 2"),
    '{"text": "a", "prompt": "a", "completion": "b"}': ("both of prompt and of text", "row 1"),
}


@pytest.mark.parametrize("rows", FAULTS)
def test_a_row_that_is_not_as_it_should_be_is_named_before_a_model_is_loaded(rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text(rows)
    says, where = FAULTS[rows]
    with pytest.raises(DataError, match=says) as caught:
        texts.read(tmp_path / "rows.jsonl")
    assert caught.value.where.endswith(where) and caught.value.remedy


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt"])
def test_a_byte_order_mark_is_no_part_of_the_texts(name, tmp_path):
    text = '{"text": "a\u2028b"}\r\n{"text": "c"}\r\n' if name.endswith("l") else "a\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    wanted = [{"text": "a\u2028b"}, {"text": "c"}] if name.endswith("l") else [{"text": "a\n"}]
    assert texts.read(tmp_path / name) == wanted


def test_other_fields_of_a_row_do_not_count(tmp_path):
    row = {"prompt": "hi", "prompt_id": 3, **json.loads(ROW)}  # as in published chat data
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert [texts.form_of(r) for r in texts.read(tmp_path / "rows.jsonl")] == ["messages"]


def test_a_gguf_without_its_reader_says_what_to_install(config, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("diffpeft.llm.sft_check.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install diffpeft\[llm\]"):
        sft.train(replace(config, model=str(tmp_path / "m.gguf")))


def test_a_rank_above_every_layers_is_refused_before_tensors_are_made(config):
    with pytest.raises(ConfigError, match="rank is 100000"):
        sft.train(replace(config, rank=100000))


def test_what_learns_nothing_is_an_error(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sft, "drawn", lambda config, sequences, step: [[texts.TokenExample([1, 2, 3], [False, False, True])]]
    )
    real = sft.Loss.total
    monkeypatch.setattr(sft.Loss, "total", lambda self, sequences: real(self, sequences) * 0)
    with pytest.raises(diffpeft.NothingLearntError):
        sft.train(config)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.html", "metrics.csv"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "NothingLearntError" in page and "--resume" not in page


def test_bytes_that_are_no_text_are_named(config, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        sft.train(config)


@pytest.mark.slow
def test_the_python_of_the_page_runs(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(diffpeft.__file__).parent.parent / "docs" / "llm.md").read_text()
    random = diffpeft.LoraConfig(init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    diffpeft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), random).save_pretrained("other")
    names = {"folder": folder}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        if "as_peft()" in block:  # the first of all, in a process of its own
            subprocess.run([sys.executable, "-c", block], check=True, timeout=120)
        else:
            exec(block, names)
    pirate, lawyer, base = names["logits"]  # a fresh adapter changes nothing
    assert names["model"].active_adapters == ["both"]
    assert torch.allclose(pirate, base) and not torch.allclose(lawyer, base)


# -- going on --------------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_ends_with_the_same_bytes(config, tmp_path):
    config = replace(
        config, overwrite=False, dropout=0.3, accumulate=2, batch_size=2, save_every=2, lr_scheduler="linear"
    )
    straight = sft.train(replace(config, out=str(tmp_path / "straight")))
    with pytest.raises(RuntimeError):
        sft.train(config, StopsAt(4))
    assert [c.step for c in checkpoints_in(tmp_path / "out")] == [2, 3]
    run = sft.train(replace(config, resume="latest"))
    assert run.losses == straight.losses
    one, two = (checkpoints_in(tmp_path / out)[-1].folder for out in ("straight", "out"))
    for name in (
        "state.safetensors",
        "adapter/adapter_model.safetensors",
    ):
        assert sha256(one / name) == sha256(two / name)


def test_an_adapter_is_gone_on_with(config, tmp_path):
    sft.save(sft.train(config))
    before = load_file(tmp_path / "out" / "adapter_model.safetensors")
    run = sft.train(replace(config, init_from=str(tmp_path / "out"), out=str(tmp_path / "more"), steps=1, lr=1e-6))
    sft.save(run)
    after = load_file(tmp_path / "more" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert all(0 < (after[n] - t).abs().max() <= 2e-6 for n, t in before.items())  # one of Adam's steps


def test_a_file_that_does_not_hold_what_was_learnt_is_an_error(config, tmp_path, monkeypatch):
    run, written = sft.train(config), sft._written

    def other(run, out):
        files = written(run, out)
        save_file({n: t * 0 for n, t in load_file(files[0]).items()}, files[0])
        return files

    monkeypatch.setattr(sft, "_written", other)
    with pytest.raises(diffpeft.NothingLearntError, match="does not hold"):
        sft.save(run)
