"""What a run does with its options: passes, checkpointing, other ranks and rates, what it starts from, and how it goes on. On the embedded base."""

import json
import threading
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import diffpeft
from diffpeft import AdapterStateError, ConfigError, NothingLearntError, TrainConfig, UnknownNameError
from diffpeft.llm.sft_config import SftConfig
from diffpeft.model.loraplus import loraplus_groups
from diffpeft.model.state import slots_of, trained_parameters
from diffpeft.pipeline.open import EMBEDDED, open_pipeline
from diffpeft.train import dreambooth, optimizers
from diffpeft.train.checkpoints import checkpoints_in, sha256
from diffpeft.train.config import Options
from diffpeft.train.groups import groups_of, rank_patterns
from diffpeft.train.lock import occupied
from diffpeft.train.outcome import idle_layers, refuse_idle, refuse_unread
from diffpeft.train.resume import FREE, begin, check_same, may_differ, remembered
from diffpeft.train.start import weighted
from tests.train.pictures import photos_in
from tests.train.stops import StopsAt


@pytest.fixture
def config(tmp_path):
    folder = photos_in(tmp_path)
    return TrainConfig(
        sample_every=0,
        model=str(EMBEDDED),
        data=str(folder),
        out=str(tmp_path / "out"),
        name="a",
        instance_prompt="an emoji of sks",
        targets="to_q,to_v",
        steps=2,
        rank=2,
        lr=1e-3,
        save_every=0,
        overwrite=True,
    )


def tensors(run):
    return {name: p.detach().clone() for name, p in trained_parameters(run.family.pipe, "a").items()}


def trained(config):
    return tensors(dreambooth.train(config))


# -- passes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.slow
def test_passes_of_a_step_are_one_batch(prior, config, tmp_path):
    options = {"class_prompt": "an emoji", "num_class_images": 2, "class_data": str(config.data)} if prior else {}
    config = replace(config, flip=True, caption_dropout=0.3, noise_offset=0.1, **options)
    whole, parts = (dreambooth.train(replace(config, batch_size=b, accumulate=a)) for b, a in ((4, 1), (2, 2)))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for name, t in tensors(whole).items():  # fp32, added up in another order, through Adam's division by its own size
        torch.testing.assert_close(tensors(parts)[name], t, rtol=1e-2, atol=2e-5)


def test_activations_that_are_computed_twice_give_the_same_numbers(config):
    config = replace(config, train_text_encoder=True)
    once, twice = trained(config), trained(replace(config, gradient_checkpointing=True))
    for name, t in once.items():
        torch.testing.assert_close(twice[name], t, rtol=1e-3, atol=1e-6)  # Adam's first steps are signs


def compiled(model):
    """As torch leaves a module that it has compiled, without compiling: dynamo takes half a minute for a UNet."""

    def call(*args, **keywords):
        calls.append(type(model).__name__)
        return model._call_impl(*args, **keywords)

    calls = []
    model.__dict__["_compiled_call_impl"] = call
    model.__dict__["compiled_calls"] = calls


real = nn.Module.compile


@pytest.mark.parametrize(
    "compile_", [compiled, pytest.param(lambda model: real(model, backend="eager"), marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_compiled_denoiser_gives_the_same_numbers_and_is_left_as_it_was(compile_, config, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", compile_)
    run = dreambooth.train(replace(config, steps=2, compile=True))
    assert run.family.pipe.unet._compiled_call_impl is None
    if compile_ is compiled:
        assert run.family.pipe.unet.compiled_calls == [type(run.family.pipe.unet).__name__] * 2
    for name, t in trained(config).items():
        torch.testing.assert_close(tensors(run)[name], t, rtol=1e-3, atol=1e-6)


def test_fp16_needs_a_gpu(config):
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="fp16"):
            dreambooth.train(replace(config, dtype="fp16"))


# -- ranks and rates -------------------------------------------------------------------------------------------------------


def test_layers_have_the_ranks_and_scales_that_were_asked_for(config):
    run = dreambooth.train(replace(config, steps=1, alpha=1.0, rank_pattern="up_blocks=4,mid_block=1"))
    slots = slots_of(run.family.pipe, "a")
    ranks = {4 if ".up_blocks." in layer else 1 if ".mid_block." in layer else 2: set() for layer in slots}
    for layer, slot in slots.items():
        ranks[4 if ".up_blocks." in layer else 1 if ".mid_block." in layer else 2].add(slot.rank)
        assert slot.parts[0].spec.alpha / slot.rank == 0.5
    assert ranks == {4: {4}, 2: {2}, 1: {1}}


LAYERS = ["down_blocks.0.attn1.to_q", "up_blocks.1.attn1.to_q", "up_blocks.10.attn1.to_q"]


@pytest.mark.parametrize(
    "said, means",
    [
        ("up_blocks=4", [None, 4, 4]),
        ("up_blocks.1=4", [None, 4, None]),
        (r"up_blocks\.\d\d\..*=8,to_q=3", [3, 3, 8]),
        (["up_blocks.1=4", "to_q=2"], [2, 4, 2]),
    ],
)
def test_a_name_stands_for_all_layers_in_it(said, means):
    ranks = rank_patterns(Options(rank_pattern=said), LAYERS)
    assert [diffpeft.patterns.first(ranks, (layer,), None) for layer in LAYERS] == means


@pytest.mark.parametrize("option", ["rank_pattern", "lr_pattern"])
@pytest.mark.parametrize(
    "said, error",
    [("up_block=4", UnknownNameError), ("up_blocks", ConfigError), ("to_q=0", ConfigError), ("(=2", ConfigError)],
)
def test_a_pattern_that_means_nothing_is_refused(option, said, error):
    parameters = {f"{layer}.lora_A": nn.Parameter(torch.zeros(1)) for layer in LAYERS}
    options = Options(**{option: said})
    with pytest.raises(error):
        rank_patterns(options, LAYERS) if option == "rank_pattern" else groups_of(options, parameters, 1.0)


def test_rotations_have_one_rank(config):
    with pytest.raises(ConfigError, match="rank_pattern with oft"):
        dreambooth.train(replace(config, method="oft", rank_pattern="up_blocks=4"))


def test_groups_have_the_factors_of_patterns_and_of_loraplus():
    unet = open_pipeline().unet.requires_grad_(False)
    diffpeft.attach(unet, diffpeft.LoraConfig(r=2), "a", targets=["to_q"])
    parameters = trained_parameters(unet, "a")
    options = Options(lora_plus_ratio=16.0, lr_pattern="up_blocks=0.5", lr=1e-3)
    factors = {id(p): group["factor"] for group in groups_of(options, parameters, 1e-3) for p in group["params"]}
    for name, p in parameters.items():
        assert factors[id(p)] == (0.5 if "up_blocks" in name else 1) * (16 if name.endswith("lora_B") else 1)
    theirs = {id(p): g["lr"] for g in loraplus_groups(unet, 1e-3, 16.0) for p in g["params"]}
    ours = groups_of(replace(options, lr_pattern=None), parameters, 1e-3)
    assert {id(p): g["lr"] for g in ours for p in g["params"]} == theirs


def test_loraplus_that_would_change_nothing_is_refused(config):
    with pytest.raises(ConfigError, match="lora_plus_ratio with loha"):
        dreambooth.train(replace(config, method="loha", lora_plus_ratio=16.0))


# -- optimisers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({"optimizer": "adamm"}, UnknownNameError, "adamw"),
        ({"optimizer": "torch.optim.Adamm"}, UnknownNameError, "Adamm"),
        ({"optimizer": "no.such.Class"}, UnknownNameError, "no.such.Class"),
        ({"optimizer": "pathlib.Path"}, ConfigError, "torch's kind"),
        ({"optimizer": "torch.optim.LBFGS"}, ConfigError, "several times"),
        ({"optimizer_args": "beta=0.9"}, UnknownNameError, "betas"),
        ({"optimizer_args": "betas"}, ConfigError, "name=value"),
        ({"optimizer_args": "betas=2,3"}, ConfigError, "betas|beta"),
        ({"optimizer": "prodigy", "lr_pattern": "to_q=2"}, ConfigError, "one learning rate"),
        ({"optimizer": "prodigy", "lora_plus_ratio": 16.0}, ConfigError, "one learning rate"),
    ],
)
def test_an_optimiser_that_cannot_be_is_refused(options, error, says):
    options = Options(**options)
    with pytest.raises(error, match=says):
        optimizers.check(options)
        optimizers.make(options, [{"params": [nn.Parameter(torch.zeros(1))]}])


def test_an_optimiser_gets_its_arguments_its_rate_and_its_decay():
    parameters = [{"params": [nn.Parameter(torch.zeros(1))]}]
    made = optimizers.make(Options(optimizer_args="betas=0.8,0.9 eps=1e-6", weight_decay=0.2), parameters)
    assert made.defaults["betas"] == (0.8, 0.9) and made.defaults["eps"] == 1e-6
    assert made.defaults["weight_decay"] == 0.2 and made.defaults["lr"] == 1e-4
    assert optimizers.make(Options(optimizer="torch.optim.Rprop"), parameters).defaults["lr"] == 1e-4  # has no decay
    assert [optimizers.rate_of(Options(optimizer=name)) for name in ("prodigy", "adamw")] == [1.0, 1e-4]
    assert optimizers.rate_of(SftConfig()) == 2e-4 and optimizers.rate_of(SftConfig(lr=3.0)) == 3.0


# -- what a run starts from ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A LoHa on other layers than the config's, in a file."""
    pipe, path = open_pipeline(), tmp_path_factory.mktemp("other") / "other.safetensors"
    torch.manual_seed(5)
    diffpeft.attach(pipe.unet, diffpeft.LoHaConfig(r=3, alpha=3), "o", targets=["attn1.to_k"])
    for slot in slots_of(pipe, "o").values():
        for p in slot.parameters():
            nn.init.normal_(p, std=0.1)
    diffpeft.save_lora(pipe, path, name="o", format="kohya")
    return path


def test_an_adapter_is_gone_on_with_its_method_ranks_and_layers(config, other):
    run = dreambooth.train(replace(config, init_from=str(other), steps=1, lr=1e-5))
    pipe = open_pipeline()
    diffpeft.load_lora(pipe, other, name="a")
    start = slots_of(pipe, "a")
    assert slots_of(run.family.pipe, "a").keys() == start.keys()
    assert (run.config.method, run.config.rank, run.config.alpha) == ("loha", 3, 3.0)
    for name, t in tensors(run).items():
        layer, _, role = name.rpartition(".")
        assert 0 < (t - start[layer].tensors[role]).abs().max() < 5e-5


def test_base_loras_are_in_the_base_and_not_in_the_file(config, other):
    run = dreambooth.train(replace(config, base_lora=f"{other}:0.5", steps=1))
    pipe = open_pipeline()
    diffpeft.load_lora(pipe, other, name="o", weight=0.5)
    diffpeft.fuse(pipe)
    assert set(diffpeft.get_adapters(run.family.pipe)) == {"a"}
    diffpeft.unload(run.family.pipe)
    changed = [
        n
        for n, p in open_pipeline().unet.named_parameters()
        if not torch.equal(p, run.family.pipe.unet.get_parameter(n))
    ]
    assert changed and all(n.endswith("attn1.to_k.weight") for n in changed)
    for n in changed:
        torch.testing.assert_close(run.family.pipe.unet.get_parameter(n), pipe.unet.get_parameter(n), rtol=0, atol=0)


@pytest.mark.slow
def test_a_training_adapter_is_on_while_training_and_gone_afterwards(config, other):
    with_, without = dreambooth.train(replace(config, training_adapter=f"{other}:2")), dreambooth.train(config)
    assert with_.losses[0] != without.losses[0]
    assert set(diffpeft.get_adapters(with_.family.pipe)) == {"a"} == set(diffpeft.get_adapters(without.family.pipe))
    diffpeft.unload(with_.family.pipe)
    base = open_pipeline().unet.state_dict()
    assert all(torch.equal(base[n], p) for n, p in with_.family.pipe.unet.state_dict().items())


@pytest.mark.parametrize(
    "said, means",
    [
        ("a.safetensors", [("a.safetensors", 1.0)]),
        ("a.safetensors:0.5, b:-2", [("a.safetensors", 0.5), ("b", -2.0)]),
        (r"C:\a.safetensors", [(r"C:\a.safetensors", 1.0)]),
        (["a:1e-1"], [("a", 0.1)]),
    ],
)
def test_files_have_strengths(said, means):
    assert weighted("base_lora", said) == means


def test_a_strength_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="base_lora"):
        weighted("base_lora", "a.safetensors:much")


# -- what was learnt -------------------------------------------------------------------------------------------------------


def test_a_layer_that_learnt_nothing_is_an_error_unless_it_was_said(config, tmp_path):
    run = dreambooth.train(config)
    layers = list(slots_of(run.family.pipe, "a"))
    nn.init.zeros_(slots_of(run.family.pipe, "a")[layers[3]].lora_B)
    assert idle_layers(run.family.pipe, "a") == [layers[3]]
    with pytest.raises(NothingLearntError, match=f"1 of its layers: '{layers[3]}'"):
        refuse_idle(run.family.pipe, "a")
    refuse_idle(run.family.pipe, "a", layers[3].partition(".")[2])


def test_a_file_that_changes_less_than_was_learnt_is_an_error(config, tmp_path):
    run = dreambooth.train(config)
    (file, *_) = dreambooth.save(run)
    refuse_unread(run.family.pipe, file, "a")
    slot = next(iter(slots_of(run.family.pipe, "a").values()))
    learnt = slot.lora_B.detach().clone()
    nn.init.zeros_(slot.lora_B)
    diffpeft.save_lora(run.family.pipe, file, name="a", format="diffusers")
    with torch.no_grad():
        slot.lora_B.copy_(learnt)
    with pytest.raises(NothingLearntError, match="1 layers"):
        refuse_unread(run.family.pipe, file, "a")
    assert set(diffpeft.get_adapters(run.family.pipe)) == {"a"}


# -- going on --------------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_ends_with_the_same_bytes(config, tmp_path):
    config = replace(config, overwrite=False, dropout=0.3, ema=0.9, train_text_encoder=True, steps=4, save_every=2)
    straight = dreambooth.train(replace(config, out=str(tmp_path / "straight")))
    files = [sha256(f) for f in dreambooth.save(straight)]
    with pytest.raises(RuntimeError):
        dreambooth.train(config, StopsAt(4))
    assert [c.step for c in checkpoints_in(tmp_path / "out")] == [2, 3]
    (tmp_path / "out" / "checkpoints" / "a-step00000003" / "manifest.json").unlink()
    run = dreambooth.train(replace(config, resume="latest"))
    assert run.losses == straight.losses and [sha256(f) for f in dreambooth.save(run)] == files
    one, two = (checkpoints_in(tmp_path / out)[-1].folder for out in ("straight", "out"))
    assert sha256(one / "state.safetensors") == sha256(two / "state.safetensors")
    assert {p.name for p in two.iterdir()} >= {"a.diffusers.safetensors", "a.kohya.safetensors"}
    assert load_file(two / "a.kohya.safetensors").keys() == load_file(dreambooth.save(run)[1]).keys()
    with pytest.raises(ConfigError, match="data changed"):
        (tmp_path / "photos" / "airplane.txt").write_text("another caption")
        dreambooth.train(replace(config, resume="latest"))


@pytest.fixture
def state(config, tmp_path):
    """An output folder with the state of a run of the config; of its tensors nothing is asked."""
    folder = tmp_path / "out" / "checkpoints" / "a-step00000001"
    folder.mkdir(parents=True)
    facts = {"options": config.resolved(), "resolved": config.resolved(), "step": 1}
    (folder / "state.json").write_text(json.dumps(facts))
    (folder / "manifest.json").write_text(json.dumps({"files": {"state.json": sha256(folder / "state.json")}}))
    return folder


OTHER_VALUES = {"int": 7, "float": 0.77, "str": "other"}


@pytest.mark.parametrize("kind", [TrainConfig, SftConfig])
def test_which_options_may_differ_when_a_run_goes_on_is_a_table(kind):
    options = kind(resume="latest", lr_scheduler="cosine")
    for field in fields(kind):
        before, type_ = options.resolved()[field.name], str(field.type).partition(" ")[0]
        now = not before if type_ == "bool" else OTHER_VALUES[type_]
        pair = {field.name: before}, {field.name: now}
        if field.name in FREE:
            check_same(options, *pair)
            continue
        with pytest.raises(ConfigError, match=f"{field.name} was.*--allow {field.name}"):
            check_same(options, *pair)
        check_same(replace(options, allow=field.name.replace("_", "-")), *pair)
    assert {f.name for f in fields(kind)} - {*FREE}
    with pytest.raises(UnknownNameError, match="rnak"):
        check_same(replace(options, allow="rnak"), {}, {})


def test_the_documentation_names_the_options_that_may_differ():
    page = (EMBEDDED.parents[3] / "docs" / "train.md").read_text()
    assert all(f"`--{name.replace('_', '-')}`" in page for name in FREE)


def test_more_steps_are_possible_only_with_a_schedule_whose_past_stays(config, state, tmp_path):
    out = tmp_path / "out"
    assert begin(replace(config, resume="latest", steps=9), out, []).step == 1
    stored = json.loads((state / "state.json").read_text())
    assert may_differ("steps", config) and not may_differ("steps", replace(config, lr_scheduler="cosine"))
    assert stored["options"]["steps"] == 2


def test_options_that_are_not_typed_are_those_of_the_run(config, state, tmp_path):
    for resume, out in (("latest", str(tmp_path / "out")), (str(tmp_path / "out"), None), (str(state), None)):
        values = remembered(TrainConfig, {"resume": resume, "keep": 5, **({"out": out} if out else {})})
        assert TrainConfig(**values) == replace(config, resume=resume, keep=5, overwrite=False)
    assert remembered(TrainConfig, {"rank": 3}) == {"rank": 3}
    with pytest.raises(ConfigError, match="holds no checkpoints"):
        remembered(TrainConfig, {"resume": str(tmp_path / "photos")})


def test_another_runs_files_are_not_overwritten_without_a_word(config, state, tmp_path):
    out, fresh = tmp_path / "out", replace(config, overwrite=False)
    with pytest.raises(ConfigError, match=r"after 1 steps.*--resume .*--overwrite"):
        begin(fresh, out, ["a.kohya.safetensors"])
    other = tmp_path / "other"
    other.mkdir()
    assert begin(fresh, other, ["a.kohya.safetensors"]) is None
    (other / "a.kohya.safetensors").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"'a.kohya.safetensors'.*--overwrite"):
        begin(fresh, other, ["a.kohya.safetensors"])
    assert begin(replace(config, overwrite=True), other, ["a.kohya.safetensors"]) is None


def test_a_second_run_in_a_folder_is_refused_before_anything_is_loaded(config, monkeypatch):
    def second():
        try:
            dreambooth.train(config)
        except AdapterStateError as error:
            errors.append(error)

    errors = []
    monkeypatch.setattr(dreambooth, "_trained", None)
    with occupied(config.output()):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "another run" in errors[0].what
