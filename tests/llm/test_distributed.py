"""Two processes train one adapter: DDP, FSDP 1 and FSDP 2 end where one process ends on the whole batch. And the examples' settings."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diffpeft import LoHaConfig, LoraConfig, PeftModel, attach, get_peft_model, get_peft_model_state_dict
from diffpeft.errors import UnknownNameError
from diffpeft.layers.carried import record_of
from diffpeft.layers.slot import Slot
from diffpeft.llm.distributed import fsdp_auto_wrap_policy

EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS = ("ddp", "fsdp1", "fsdp1, own parameters", "fsdp2")
TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 4
x = torch.arange(24).view(4, 6)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=128,
        )
    ).requires_grad_(False)


def build():
    """A tiny Llama with a LoRA and a LoHa on the same layers."""
    model = llama()
    attach(model, LoraConfig(r=4, init_lora_weights=False), targets=TARGETS)
    attach(model, LoHaConfig(r=2, init_weights=False), "other", targets=TARGETS[:1])
    return model


def wrapped():
    """A PeftModel with a LoRA."""
    torch.manual_seed(1)
    return get_peft_model(llama(), LoraConfig(r=4, init_lora_weights=False, target_modules=TARGETS))


def tokens_trained():
    """A PeftModel with a LoRA with biases, and rows of its table."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, init_lora_weights=False, target_modules=TARGETS, bias="all", trainable_token_indices=[1, 2, 5]
    )
    return get_peft_model(llama(), config)


def sharded(model, kind):
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for unit in (*model.model.layers, model):
            fully_shard(unit, mesh=mesh)
        return model
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        use_orig_params=kind != "fsdp1",
        device_id=torch.device("cpu"),
    )


def gathered(model, kind):
    """All parameters, whole, under the names they have in one process."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def clean(name):
        return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")

    if kind.startswith("fsdp1"):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {clean(n): p.detach().clone() for n, p in model.named_parameters()}
    return {
        clean(n): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for n, p in model.named_parameters()
    }


def train(model, batches):
    """The mean over `batches` of this process and of the others' is one over all tokens, as all have as many."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(STEPS):
        for batch in batches:
            (model(input_ids=batch, labels=batch).loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for kind in KINDS:
        model = train(sharded(build(), kind), [x[2 * rank : 2 * rank + 2]])
        torch.save(gathered(model, kind), f"{folder}/{kind}-{rank}.pt")
    for kind in ("fsdp1", "fsdp1, own parameters"):
        model = sharded(wrapped(), kind)
        model(input_ids=x)
        torch.save(get_peft_model_state_dict(model), f"{folder}/of a PeftModel, {kind}-{rank}.pt")
    for only_root in (True, False):  # FSDP reads the table between forwards, when there is a share of it
        model = tokens_trained()
        units = {} if only_root else {"auto_wrap_policy": fsdp_auto_wrap_policy(model)}
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"), **units)
        model(input_ids=x, labels=x).loss.backward()
        torch.save(model(input_ids=x).logits.detach(), f"{folder}/rows of a table, {only_root}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """{kind: [parameters at the end, of each process]}."""
    folder = tmp_path_factory.mktemp("ends")
    mp.spawn(worker, (str(folder),), nprocs=2)
    want = get_peft_model_state_dict(wrapped())
    for kind, rank in itertools.product(("fsdp1", "fsdp1, own parameters"), (0, 1)):
        tensors = torch.load(folder / f"of a PeftModel, {kind}-{rank}.pt")
        assert tensors.keys() == want.keys() and all(torch.equal(tensors[key], t) for key, t in want.items())
    logits = tokens_trained()(input_ids=x).logits
    for only_root, rank in itertools.product((True, False), (0, 1)):
        torch.testing.assert_close(torch.load(folder / f"rows of a table, {only_root}-{rank}.pt"), logits)
    return {kind: [torch.load(folder / f"{kind}-{rank}.pt") for rank in (0, 1)] for kind in KINDS}


@pytest.fixture(scope="module")
def alone():
    """The parameters before and after training in one process."""
    model = build()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, [x])
    return before, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_both_processes_end_with_the_same_weights(ends, kind):
    first, second = ends[kind]
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_change(ends, alone, kind):
    before, _ = alone
    assert ends[kind][0].keys() == before.keys()
    changed = {n for n, p in ends[kind][0].items() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".adapters." in n}


@pytest.mark.parametrize("kind", KINDS)
def test_they_end_where_one_process_ends_on_the_whole_batch(ends, alone, kind):
    before, after = alone
    for name, p in after.items():
        # gradients are sums of the same terms in another order: fp32 keeps 6e-8 of each, over 4 steps and a few dozen terms
        torch.testing.assert_close(ends[kind][0][name], p, rtol=1e-5, atol=1e-6)
        if ".adapters." in name:
            assert (p - before[name]).abs().max() > 1e-4  # far more than that


# -- the policy


def policy_of(model):
    """The modules that are units of their own."""
    policy = fsdp_auto_wrap_policy(model)
    return {n for n, m in model.named_modules() if policy(module=m, recurse=False, nonwrapped_numel=0)}


def test_units_are_blocks_and_slots():
    model = build()
    blocks = {f"model.layers.{i}" for i in (0, 1)}
    slots = {n for n, m in model.named_modules() if isinstance(m, Slot)}
    assert policy_of(model) == blocks | slots and len(slots) == 8


def test_frozen_slots_go_with_their_block():
    model = build()
    for m in model.modules():
        if isinstance(m, Slot):
            m.requires_grad_(False)
    assert policy_of(model) == {"model.layers.0", "model.layers.1"}


def test_the_environment_names_other_blocks(monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP")
    assert {n for n in policy_of(build()) if "adapters" not in n} == {f"model.layers.{i}.mlp" for i in (0, 1)}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMPL")
    with pytest.raises(UnknownNameError, match="LlamaMLP"):
        fsdp_auto_wrap_policy(build())


def test_it_is_pefts_policy_for_a_peft_model():
    import peft
    from peft.utils.other import fsdp_auto_wrap_policy as theirs

    ours = {n.partition(".adapters")[0] for n in policy_of(get_peft_model(llama(), LoraConfig(target_modules=TARGETS)))}
    other = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=TARGETS))
    policy = theirs(other)
    found = {n for n, m in other.named_modules() if policy(module=m, recurse=False, nonwrapped_numel=0)}
    assert ours == {n.partition(".lora_")[0] for n in found}


def test_a_model_that_is_not_sharded_after_all_stays_as_it_was():
    model = build()
    want, hooks = model(x).logits, functools.partial(_hooks, model)
    before = hooks()
    fsdp_auto_wrap_policy(model)
    assert hooks() != before
    assert torch.equal(model(x).logits, want) or torch.allclose(model(x).logits, want, rtol=1e-5, atol=1e-6)
    assert hooks() == before and torch.equal(model(x).logits, want)
    assert all(isinstance(s, Slot) for m in model.modules() if (r := record_of(m)) for s in r.slots.values())


def _hooks(model):
    return sum(len(m._forward_pre_hooks) for m in model.modules())


# -- the examples


def example():
    spec = importlib.util.spec_from_file_location("fsdp_qlora", EXAMPLES / "fsdp_qlora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", *"abcdefgh"])}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def run_example(rank, folder, port):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    losses = example().main(
        [f"{folder}/base", f"{folder}/corpus.txt", "-o", f"{folder}/out", "--cpu"]
        + ["--dtype", "float32", "--rank", "4", "--steps", "20", "--batch", "2", "--length", "16", "--lr", "0.02"]
    )
    Path(folder, f"losses-{rank}.json").write_text(json.dumps(losses))


@pytest.mark.slow  # the processes of the other tests do the same
def test_the_example_trains_in_two_processes_and_saves_one_adapter(tmp_path):
    import socket

    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "corpus.txt").write_text("a b c d e f g h " * 64)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    mp.spawn(run_example, (str(tmp_path), port), nprocs=2)
    first, second = (json.loads((tmp_path / f"losses-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and len(first) == 20 and first[-1] < 0.9 * first[0]
    model = PeftModel.from_pretrained(llama(), tmp_path / "out")
    block = tokenizer()("a b c d e f g h " * 2, return_tensors="pt").input_ids
    assert model(input_ids=block, labels=block).loss < 0.9 * llama()(input_ids=block, labels=block).loss


def test_the_fsdp_settings_are_what_accelerate_takes():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    path = EXAMPLES / "fsdp_qlora.yaml"
    found = yaml.safe_load(path.read_text())
    assert load_config_from_file(str(path)).distributed_type == "FSDP"  # unknown keys are refused
    parser = launch_command_parser()
    known = {a.dest for a in parser._actions}
    assert {*found["fsdp_config"]} <= known
    assert path.read_text().startswith(
        "# accelerate launch --config_file examples/fsdp_qlora.yaml examples/fsdp_qlora.py"
    )
    fsdp = found["fsdp_config"]
    assert (fsdp["fsdp_version"], fsdp["fsdp_auto_wrap_policy"]) == (2, "TRANSFORMER_BASED_WRAP")
    assert (fsdp["fsdp_state_dict_type"], fsdp["fsdp_cpu_ram_efficient_loading"]) == ("FULL_STATE_DICT", False)


def test_the_deepspeed_settings_are_zero_3_with_offload():
    found = json.loads((EXAMPLES / "deepspeed_zero3.json").read_text())
    zero = found["zero_optimization"]
    assert zero.pop("stage") == 3
    assert zero.pop("offload_optimizer") == zero.pop("offload_param") == {"device": "cpu", "pin_memory": True}
    assert zero.pop("stage3_gather_16bit_weights_on_model_save") is True  # or no weights could be saved
    assert (zero.pop("overlap_comm"), zero.pop("contiguous_gradients")) == (True, True)
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    assert zero == dict.fromkeys(sizes, "auto")
    assert found.pop("bf16") == {"enabled": "auto"} and found.pop("zero_optimization") is zero
    batch = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
    assert found == dict.fromkeys(batch, "auto")


def test_accelerate_reads_the_deepspeed_settings():
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(json.loads((EXAMPLES / "deepspeed_zero3.json").read_text()))
    assert config.is_zero3() and config.is_offload()
