"""Command lines and files of other trainers: what their READMEs recommend is taken, and nothing of it is left out in silence."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffpeft import ConfigError, TrainConfig, UnknownNameError
from diffpeft.cli.pasted import split
from diffpeft.cli.train import train
from diffpeft.llm.sft_config import SftConfig
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train.config import OTHER_NAMES
from diffpeft.train.config_files import from_toml, said_by, said_in
from diffpeft.train.other_names import TABLE, hint
from diffpeft.train.translate import _PARTS
from diffpeft.train.translation import key_of
from tests.cli.process import quick
from tests.train.pictures import photos_in

KNOWN = {f.name for f in fields(TrainConfig)}

# the options of sd-scripts' train_network.py, sdxl_train_network.py and flux_train_network.py
SD_SCRIPTS = """
v2 v_parameterization pretrained_model_name_or_path tokenizer_cache_dir optimizer_type use_8bit_adam use_lion_optimizer learning_rate max_grad_norm
optimizer_args lr_scheduler_type lr_scheduler_args lr_scheduler lr_warmup_steps lr_decay_steps lr_scheduler_num_cycles lr_scheduler_power
fused_backward_pass lr_scheduler_timescale lr_scheduler_min_lr_ratio output_dir output_name huggingface_repo_id huggingface_repo_type
huggingface_path_in_repo huggingface_token huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload save_precision
save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs save_last_n_epochs_state save_last_n_steps save_last_n_steps_state
save_state save_state_on_train_end resume train_batch_size max_token_length mem_eff_attn torch_compile dynamo_backend xformers sdpa vae
max_train_steps max_train_epochs max_data_loader_n_workers persistent_data_loader_workers seed gradient_checkpointing gradient_accumulation_steps
mixed_precision full_fp16 full_bf16 fp8_base ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph clip_skip logging_dir log_with log_prefix
log_tracker_name wandb_run_name log_tracker_config wandb_api_key log_config noise_offset noise_offset_random_strength multires_noise_iterations
ip_noise_gamma ip_noise_gamma_random_strength multires_noise_discount adaptive_noise_scale zero_terminal_snr min_timestep max_timestep loss_type
huber_schedule huber_c huber_scale lowram highvram sample_every_n_steps sample_at_first sample_every_n_epochs sample_prompts sample_sampler
output_config prior_loss_weight conditioning_data_dir masked_loss cache_text_encoder_outputs cache_text_encoder_outputs_to_disk
text_encoder_batch_size disable_mmap_load_safetensors weighting_scheme logit_mean logit_std mode_scale blocks_to_swap train_data_dir cache_info
shuffle_caption caption_separator caption_extension caption_extention keep_tokens keep_tokens_separator secondary_separator enable_wildcard
caption_prefix caption_suffix color_aug flip_aug face_crop_aug_range random_crop debug_dataset resolution cache_latents vae_batch_size
cache_latents_to_disk skip_cache_check enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale resize_interpolation
token_warmup_min token_warmup_step alpha_mask dataset_class caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate
reg_data_dir in_json dataset_repeats save_model_as use_safetensors cpu_offload_checkpointing no_metadata unet_lr text_encoder_lr fp8_base_unet
network_weights network_module network_dim network_alpha network_dropout network_args network_train_unet_only network_train_text_encoder_only
training_comment dim_from_weights scale_weight_norms base_weights base_weights_multiplier no_half_vae skip_until_initial_step initial_epoch
initial_step validation_seed validation_split validate_every_n_steps validate_every_n_epochs max_validation_steps clip_l t5xxl ae
controlnet_model_name_or_path t5xxl_max_token_length apply_t5_attn_mask guidance_scale timestep_sampling sigmoid_scale model_prediction_type
discrete_flow_shift model_type split_mode min_snr_gamma scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss
weighted_captions metadata_title metadata_author metadata_description metadata_license metadata_tags metadata_usage_hint metadata_thumbnail
metadata_merged_from metadata_trigger_phrase metadata_preprocessor metadata_is_negative_embedding deepspeed zero_stage offload_optimizer_device
offload_optimizer_nvme_path offload_param_device offload_param_nvme_path zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients
"""
# those of diffusers' train_dreambooth_lora.py, _sdxl and _flux
DIFFUSERS = """
pretrained_model_name_or_path pretrained_vae_model_name_or_path tokenizer_name revision variant dataset_name dataset_config_name instance_data_dir
image_column caption_column repeats class_data_dir instance_prompt class_prompt max_sequence_length validation_prompt num_validation_images
validation_epochs final_validation_prompt with_prior_preservation prior_loss_weight num_class_images output_dir output_kohya_format seed resolution
center_crop random_flip train_text_encoder train_batch_size sample_batch_size num_train_epochs max_train_steps checkpointing_steps
checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate text_encoder_lr scale_lr lr_scheduler
snr_gamma lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers optimizer use_8bit_adam adam_beta1 adam_beta2 prodigy_beta3 prodigy_decouple
adam_weight_decay adam_weight_decay_text_encoder lora_layers adam_epsilon prodigy_use_bias_correction prodigy_safeguard_warmup max_grad_norm
push_to_hub hub_token hub_model_id logging_dir allow_tf32 cache_latents report_to mixed_precision upcast_before_saving prior_generation_precision
local_rank enable_xformers_memory_efficient_attention enable_npu_flash_attention rank lora_alpha lora_dropout use_dora do_edm_style_training
image_interpolation_mode aspect_ratio_buckets tokenizer_max_length text_encoder_use_attention_mask pre_compute_text_embeddings validation_images
class_labels_conditioning guidance_scale weighting_scheme logit_mean logit_std mode_scale offload skip_final_inference bnb_quantization_config_path
"""


def said(line, **files):
    """What a command line says."""
    ours, theirs = split(shlex.split(line), train.params)
    assert not ours, ours
    return said_by(theirs, KNOWN)


# -- the table -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [SD_SCRIPTS, DIFFUSERS], ids=["sd-scripts", "diffusers"])
def test_every_option_of_theirs_is_answered(names):
    assert not {name for name in names.split() if name not in TABLE and name not in KNOWN}


def test_a_row_says_one_thing_and_names_options_of_ours():
    known = KNOWN | {f.name for f in fields(SftConfig)}
    parts = {part.__name__.strip("_") for part in _PARTS}
    for name, row in TABLE.items():
        ways = [bool(row.idle), bool(row.remedy), bool(row.ours and not row.remedy)]
        assert sum(ways) == 1, name
        assert row.ours in known | {""}, name
        assert row.part in parts | {""} and not (row.part and row.turn), name
        assert key_of(name) == name
        assert not (row.remedy or row.idle) or not (row.remedy or row.idle).endswith(" "), name
        assert not row.remedy or row.remedy.endswith("."), name
    assert not OTHER_NAMES.keys() & TABLE.keys()
    assert not (OTHER_NAMES.keys() & known)


def test_hints_come_of_the_same_table():
    assert hint("--learning-rate", KNOWN, "--") == "Here that is --lr." and hint("nothing", KNOWN) == ""
    assert hint("lora_r", {"rank"}) == "Here that is rank."


# -- what their READMEs recommend ----------------------------------------------------------------------------------------

DIFFUSERS_SD = """--pretrained_model_name_or_path=m --instance_data_dir=dog --output_dir=o --instance_prompt="a photo of sks dog"
 --resolution=512 --train_batch_size=1 --gradient_accumulation_steps=1 --checkpointing_steps=100 --learning_rate=1e-4 --report_to="wandb"
 --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=500 --validation_prompt="A photo of sks dog in a bucket" --seed="0" --push_to_hub"""
PRIOR = """--pretrained_model_name_or_path=m --instance_data_dir=dog --class_data_dir=dogs --output_dir=o --with_prior_preservation
 --prior_loss_weight=1.0 --instance_prompt="a photo of sks dog" --class_prompt="a photo of dog" --resolution=512 --train_batch_size=1
 --sample_batch_size=1 --gradient_accumulation_steps=2 --gradient_checkpointing --use_8bit_adam --learning_rate=5e-6 --lr_scheduler="constant"
 --lr_warmup_steps=0 --num_class_images=200 --max_train_steps=800"""
DIFFUSERS_FLUX = """--pretrained_model_name_or_path=f --instance_data_dir=dog --output_dir=o --mixed_precision="bf16" --train_text_encoder
 --instance_prompt="a photo of sks dog" --resolution=512 --train_batch_size=1 --guidance_scale=1 --gradient_accumulation_steps=4
 --optimizer="prodigy" --learning_rate=1. --report_to="wandb" --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=500
 --validation_prompt="A photo of sks dog in a bucket" --validation_epochs=25 --seed="0" --push_to_hub"""
SD_SCRIPTS_SDXL = """--pretrained_model_name_or_path="sdxl" --train_data_dir=d --output_dir="o" --output_name="my_sdxl_lora" --save_model_as=safetensors
 --network_module=networks.lora --network_dim=32 --network_alpha=16 --learning_rate=1e-4 --unet_lr=1e-4 --text_encoder_lr1=1e-5
 --text_encoder_lr2=1e-5 --optimizer_type="AdamW8bit" --lr_scheduler="constant" --max_train_epochs=10 --save_every_n_epochs=1
 --mixed_precision="bf16" --gradient_checkpointing --cache_text_encoder_outputs --cache_latents"""
SD_SCRIPTS_FLUX = """--pretrained_model_name_or_path="flux.safetensors" --clip_l="clip.safetensors" --t5xxl="t5.safetensors" --ae="ae.safetensors"
 --train_data_dir=d --output_dir="o" --output_name="f" --save_model_as=safetensors --network_module=networks.lora_flux --network_dim=16
 --network_alpha=1 --learning_rate=1e-4 --optimizer_type="AdamW8bit" --lr_scheduler="constant" --sdpa --max_train_epochs=10 --save_every_n_epochs=1
 --mixed_precision="fp16" --gradient_checkpointing --guidance_scale=1.0 --timestep_sampling="flux_shift" --model_prediction_type="raw"
 --blocks_to_swap=18 --cache_text_encoder_outputs --cache_latents"""
LYCORIS = """--pretrained_model_name_or_path m --train_data_dir=d --output_dir o --resolution=512,768 --network_module lycoris.kohya --network_args
 "algo=lokr" "conv_dim=8" conv_alpha=4 dropout=0.1 factor=-1 --network_dim 16 --network_alpha 8 --unet_lr 1e-4 --text_encoder_lr 5e-5 --xformers
 --max_data_loader_n_workers 4 --min_snr_gamma=5 --noise_offset 0 --enable_bucket --shuffle_caption --keep_tokens 1 --caption_extension .txt
 --lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 3 --lr_warmup_steps 0.1 --max_train_steps 1000 --cache_latents_to_disk
 --optimizer_args weight_decay=0.1 betas=0.9,0.99 --flip_aug"""
CASES = {
    "diffusers": (
        DIFFUSERS_SD,
        {
            "model": "m",
            "data": ["dog"],
            "out": "o",
            "instance_prompt": "a photo of sks dog",
            "resolution": "512",
            "batch_size": 1,
            "accumulate": 1,
        }
        | {"save_every": 100, "lr": 1e-4, "lr_scheduler": "constant", "steps": 500, "seed": 0, "log": "csv,wandb"}
        | {"sample_prompt": "A photo of sks dog in a bucket"},
        ["push_to_hub"],
    ),
    "prior": (
        PRIOR,
        {
            "model": "m",
            "data": ["dog"],
            "out": "o",
            "instance_prompt": "a photo of sks dog",
            "resolution": "512",
            "batch_size": 1,
            "accumulate": 2,
        }
        | {"class_prompt": "a photo of dog", "class_data": "dogs", "prior_weight": 1.0, "num_class_images": 200}
        | {
            "optimizer": "adamw8bit",
            "lr": 5e-6,
            "lr_scheduler": "constant",
            "steps": 800,
            "gradient_checkpointing": True,
        },
        ["sample_batch_size"],
    ),
    "diffusers flux": (
        DIFFUSERS_FLUX,
        {
            "model": "f",
            "data": ["dog"],
            "out": "o",
            "instance_prompt": "a photo of sks dog",
            "resolution": "512",
            "batch_size": 1,
            "accumulate": 4,
        }
        | {
            "dtype": "bf16",
            "optimizer": "prodigy",
            "lr": 1.0,
            "lr_scheduler": "constant",
            "steps": 500,
            "seed": 0,
            "log": "csv,wandb",
        }
        | {"train_text_encoder": True, "sample_prompt": "A photo of sks dog in a bucket"},
        ["push_to_hub", "validation_epochs"],
    ),
    "sd-scripts sdxl": (
        SD_SCRIPTS_SDXL,
        {
            "model": "sdxl",
            "data": ["d"],
            "out": "o",
            "name": "my_sdxl_lora",
            "rank": 32,
            "alpha": 16.0,
            "lr": 1e-4,
            "epochs": 10,
            "dtype": "bf16",
        }
        | {"optimizer": "adamw8bit", "lr_scheduler": "constant", "gradient_checkpointing": True, "targets": "attn-mlp"}
        | {"train_text_encoder": False},
        ["save_every_n_epochs", "text_encoder_lr1", "text_encoder_lr2"],
    ),
    "sd-scripts flux": (
        SD_SCRIPTS_FLUX,
        {
            "model": "flux.safetensors",
            "text_encoder": ["clip.safetensors", "t5.safetensors"],
            "vae": "ae.safetensors",
            "data": ["d"],
            "out": "o",
        }
        | {
            "name": "f",
            "rank": 16,
            "alpha": 1.0,
            "lr": 1e-4,
            "optimizer": "adamw8bit",
            "lr_scheduler": "constant",
            "epochs": 10,
            "dtype": "fp16",
        }
        | {
            "gradient_checkpointing": True,
            "targets": "attn-mlp",
            "train_text_encoder": False,
            "density": "logit_normal",
        },
        ["sdpa", "save_every_n_epochs", "blocks_to_swap"],
    ),
    "lycoris": (
        LYCORIS,
        {
            "model": "m",
            "data": ["d"],
            "out": "o",
            "resolution": 640,
            "method": "lokr",
            "rank": 16,
            "alpha": 8.0,
            "dropout": 0.1,
            "targets": "full",
        }
        | {
            "rank_pattern": [r"conv\w*=8"],
            "lr": 1e-4,
            "lr_pattern": [r"text_encoder(_2)?\..+=0.5"],
            "train_text_encoder": True,
            "snr_gamma": 5.0,
        }
        | {
            "buckets": True,
            "shuffle_captions": True,
            "keep_tokens": 1,
            "lr_scheduler": "cosine_with_restarts",
            "lr_cycles": 3,
            "warmup": 100,
        }
        | {"steps": 1000, "cache": "disk", "optimizer_args": ["weight_decay=0.1", "betas=0.9,0.99"], "flip": True},
        ["xformers", "max_data_loader_n_workers", "512,768 is 640", "text encoders are trained"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_recommended_command_line_is_taken(case):
    line, expected, noted = CASES[case]
    to = said(line)
    assert {name: str(value) for name, value in to.values.items()} == {n: str(v) for n, v in expected.items()}
    notes = " ".join(to.notes)
    assert all(text in notes for text in noted), notes
    assert len([text for text in to.notes if "without effect" in text]) <= 1
    TrainConfig(**to.values | ({"base": "b"} if "vae" in to.values else {})).validate()
    assert to.origins.keys() == to.values.keys()


def test_a_text_encoder_is_trained_as_there():
    network = "--network_module networks.lora --learning_rate 1e-4 "
    assert said(network).values["train_text_encoder"] is True
    for more in (
        "--network_train_unet_only",
        "--cache_text_encoder_outputs",
        "--text_encoder_lr 0",
        "--text_encoder_lr 0 0",
    ):
        values = said(network + more).values
        assert values["train_text_encoder"] is False and "lr_pattern" not in values
    two = said(network + "--unet_lr 2e-4 --text_encoder_lr 1e-4 5e-5").values
    assert (two["lr"], two["lr_pattern"]) == (2e-4, ["text_encoder=0.5", "text_encoder_2=0.25"])
    assert said(network + "--unet_lr 2e-4").values["lr_pattern"] == [r"text_encoder(_2)?\..+=0.5"]
    assert "train_text_encoder" not in said("--instance_data_dir d --learning_rate 1e-4 --text_encoder_lr 5e-6").values


@pytest.mark.parametrize(
    "line, values",
    [
        ("--mixed_precision no", {"dtype": "fp32"}),
        ("--output_dir o --resolution 1024,1024", {"out": "o", "resolution": 1024}),
        ("--output_dir o --resolution 512x768", {"out": "o", "resolution": 640}),
        ("--optimizer_type Lion", {"optimizer": "lion"}),
        ("--optimizer_type PagedAdamW8bit", {"optimizer": "bitsandbytes.optim.PagedAdamW8bit"}),
        ("--optimizer_type torch.optim.SGD", {"optimizer": "torch.optim.SGD"}),
        (
            "--use_8bit_adam --adam_beta2 0.99 --adam_epsilon 1e-6",
            {"optimizer": "adamw8bit", "optimizer_args": ["betas=0.9,0.99", "eps=1e-06"]},
        ),
        ("--optimizer AdamW --use_8bit_adam --adam_beta1 0.9", {"optimizer": "adamw8bit"}),
        ("--lr_warmup_steps 10 --lr_scheduler constant_with_warmup", {"warmup": 10, "lr_scheduler": "constant"}),
        ("--lr_warmup_steps 10 --lr_scheduler constant", {"lr_scheduler": "constant"}),
        (
            "--lr_scheduler polynomial --lr_power 2 --lr_num_cycles 3 --seed 1 --output_dir o",
            {"lr_scheduler": "polynomial", "lr_power": 2.0, "seed": 1, "out": "o"},
        ),
        ("--max_train_steps 5 --max_train_epochs 2", {"epochs": 2}),
        ("--max_train_steps 5 --num_train_epochs 2", {"steps": 5}),
        ("--train_data_dir d --dataset_repeats 3", {"data": ["d:3"]}),
        (
            "--weighting_scheme logit_normal --logit_mean 0.5 --logit_std 2",
            {"density": "logit_normal", "density_mean": -0.5, "density_std": 2.0},
        ),
        ("--weighting_scheme mode --mode_scale 1 --logit_mean 0.5", {"density": "mode", "density_scale": 1.0}),
        ("--weighting_scheme none", {"density": "uniform"}),
        (
            "--timestep_sampling shift --discrete_flow_shift 3.1 --sigmoid_scale 2",
            {"density": "logit_normal", "shift": 3.1, "density_std": 2.0},
        ),
        ("--timestep_sampling sigmoid --discrete_flow_shift 3.1", {"density": "logit_normal", "shift": 1.0}),
        ("--discrete_flow_shift 3.1", {"shift": 3.1}),
        (
            "--loss_type huber --huber_c 0.2 --huber_schedule snr",
            {"loss": "huber", "huber_c": 0.2, "huber_schedule": "snr"},
        ),
        ("--loss_type l2 --huber_c 0.2 --huber_schedule exponential", {}),
        ("--base_weights a b --base_weights_multiplier 0.5", {"base_lora": ["a:0.5", "b:1"]}),
        ("--alpha_mask", {"mask": "alpha"}),
        ("--masked_loss --conditioning_data_dir m", {"mask": "m"}),
        ("--use_dora", {"method": "dora"}),
        (
            "--network_args algo=locon dora_wd=True conv_dim=4 --network_dim 4",
            {"method": "dora", "rank": 4, "targets": "full"},
        ),
        (
            "--network_module lycoris.kohya --network_args preset=attn-only --network_train_unet_only",
            {"targets": "attn", "train_text_encoder": False},
        ),
        ("--loraplus_lr_ratio 16", {"lora_plus_ratio": 16.0}),
        (
            "--huggingface_repo_id me/x --huggingface_repo_visibility private",
            {"push_to_hub": "me/x", "hub_private": True},
        ),
        ("--push_to_hub --hub_model_id me/x", {"push_to_hub": "me/x"}),
        ("--report_to all --save_precision float", {"log": "csv,tensorboard,wandb", "save_dtype": "fp32"}),
        ("--instance_data_dir d --class_prompt x --class_data_dir c --num_class_images 3", {"data": ["d"]}),
        ("--random_crop", {"crop": "random"}),
        (
            "--min_snr_gamma 0 --multires_noise_discount 0.3 --bucket_reso_steps 64 --max_timestep 1000 --caption_extension .txt",
            {},
        ),
    ],
)
def test_a_value_is_turned_as_it_is_meant(line, values):
    assert said(line).values == values


@pytest.mark.parametrize(
    "line",
    [
        "--scale_lr",
        "--color_aug",
        "--multires_noise_iterations 6",
        "--caption_tag_dropout_rate 0.1",
        "--bucket_no_upscale",
        "--revision main",
        "--guidance_scale 3.5",
        "--model_prediction_type sigma_scaled",
        "--optimizer_type DAdaptation",
        "--network_module networks.dylora",
        "--network_args algo=glokr",
        "--network_args block_dims=1,2",
        "--network_args conv_dim=8 conv_alpha=1",
        "--weighting_scheme cosmap",
        "--loss_type l1",
        "--save_model_as ckpt",
        "--dataset_name owner/images",
        "--with_prior_preservation",
        "--network_train_text_encoder_only",
    ],
)
def test_what_would_change_the_result_and_cannot_be_had_is_refused_by_name(line):
    name = line.split()[0] if "=" not in line else line.split()[-1].partition("=")[2 if "algo" in line else 0]
    with pytest.raises(ConfigError, match=re.escape(key_of(name)) if "=" not in line else name) as caught:
        said(line)
    assert caught.value.remedy


def test_all_refusals_are_told_at_once_and_everything_without_effect_in_one_line():
    with pytest.raises(ConfigError, match=r"scale_lr.*color_aug") as caught:
        said("--scale_lr --color_aug --learning_rate 1")
    assert "--lr" in caught.value.remedy and "images" in caught.value.remedy
    names = [name for name, row in TABLE.items() if row.idle and row.reads is bool and "." not in name]
    (note,) = said(" ".join(f"--{name}" for name in names)).notes
    assert all(name in note for name in names)


@pytest.mark.parametrize(
    "line, error",
    [
        ("--network_dim x", "network_dim is 'x'"),
        ("--network_dim 1.5", "network_dim is '1.5'"),
        ("--text_encoder_lr a b --network_module networks.lora", "text_encoder_lr is 'a'"),
        ("--network_args dropout=x", "dropout is 'x'"),
        ("--mixed_precision fp8", "mixed_precision is 'fp8'"),
        ("--network_dim 4 --lora_rank 8", "both are rank"),
        ("--network_dim 4 --output_dir o --resolution a,b", "resolution is 'a,b'"),
    ],
)
def test_a_value_that_is_none_is_named(line, error):
    with pytest.raises(ConfigError, match=error):
        said(line)


def test_our_options_beside_theirs_stay_clicks_and_both_names_must_agree(tmp_path):
    ours, theirs = split(
        shlex.split(
            "c.toml --network_dim=4 -m x --instance-prompt '--a b' --network_args a=1 b=2 --no-buckets --lr 1 --resume --xformers"
        ),
        train.params,
    )
    assert ours == ["c.toml", "-m", "x", "--no-buckets", "--lr", "1", "--resume"]
    assert dict(theirs) == {
        "--network_dim": "4",
        "--instance-prompt": "--a b",
        "--network_args": ["a=1", "b=2"],
        "--xformers": True,
    }
    assert split(["--lr", "1", "--resolution", "512,768"], train.params) == (
        ["--lr", "1", "--resolution", "512,768"],
        [],
    )
    base = ["train", "-m", "m", "-d", "d", "-o", "o", "--print-config"]
    same = quick(*base, "--rank", "4", "--network_dim", "4", cwd=tmp_path)
    assert same.returncode == 0 and "rank = 4" in same.stdout, same.stderr
    other = quick(*base, "--rank", "4", "--network_dim", "8", cwd=tmp_path)
    assert other.returncode == 2 and "rank is '4' and --network_dim is '8'" in other.stderr
    implied = quick(
        *base, "--targets", "attn", "--network_module", "networks.lora", "--no-train-text-encoder", cwd=tmp_path
    )
    assert (
        implied.returncode == 0
        and 'targets = "attn"' in implied.stdout
        and "train_text_encoder = false" in implied.stdout
    )
    missing = quick(*base, "--network_dim", cwd=tmp_path)
    assert missing.returncode == 2 and "requires an argument" in missing.stderr


def test_a_pasted_line_trains_what_our_options_train(tmp_path):
    photos_in(tmp_path)
    theirs = """--instance_data_dir photos --output_dir theirs --instance_prompt "a photo" --resolution=64 --train_batch_size=2
     --learning_rate=1e-3 --lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=2 --seed="3" --rank=2 --output_name=a
     --optimizer_args weight_decay=0.1 --allow_tf32 --text_encoder_lr 1e-4 --train_text_encoder"""
    ours = """-d photos -o ours --instance-prompt "a photo" --resolution 64 --batch-size 2 --lr 1e-3 --steps 2 --seed 3 --rank 2 --name a
     --optimizer-args weight_decay=0.1 --train-text-encoder --lr-pattern text_encoder=0.1"""
    for line in (f"--pretrained_model_name_or_path '{EMBEDDED}' {theirs}", f"-m '{EMBEDDED}' {ours}"):
        done = quick("train", *shlex.split(line), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    files = [load_file(tmp_path / folder / "a.kohya.safetensors") for folder in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    account = (tmp_path / "theirs" / "config.toml").read_text()
    assert "# alias --learning_rate" in account and "# command line" in account


def test_regularisation_images_are_those_that_are_there(tmp_path):
    photos = photos_in(tmp_path)
    (tmp_path / "reg").mkdir()
    photos.rename(tmp_path / "reg" / "1_a dog")
    values = said(f"--reg_data_dir '{tmp_path / 'reg'}' --prior_loss_weight 0.5").values
    assert values == {
        "class_prompt": "a dog",
        "class_data": str(tmp_path / "reg" / "1_a dog"),
        "num_class_images": 3,
        "prior_weight": 0.5,
    }
    assert said("--prior_loss_weight 0.5").values == {}
    with pytest.raises(ConfigError, match="reg_data_dir"):
        said(f"--reg_data_dir '{tmp_path / 'reg' / '1_a dog'}'")


# -- their files -------------------------------------------------------------------------------------------------------------

JOB = """
---
job: extension
config:
  name: "my first lora"
  process:
    - type: 'sd_trainer'
      training_folder: "output"
      performance_log_every: 1000
      device: cuda:0
      trigger_word: "p3r5on"
      network: {type: "lora", linear: 32, linear_alpha: 16}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}
      datasets:
        - folder_path: "/images"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [ 512, 768, 1024 ]
        - folder_path: "/more"
          num_repeats: 3
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [512, 768, 1024]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 1
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: "flowmatch"
        optimizer: "adamw8bit"
        optimizer_params: {weight_decay: 1e-4}
        lr: 1e-4
        skip_first_sample: true
        timestep_type: sigmoid
        content_or_style: balanced
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
      model: {name_or_path: "black-forest-labs/FLUX.1-dev", is_flux: true, quantize: true}
      sample:
        sampler: "flowmatch"
        sample_every: 250
        width: 1024
        height: 1024
        prompts: ["a woman", "[trigger] at the beach"]
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 20
meta: {name: "[name]", version: '1.0'}
"""


def test_a_job_of_ai_toolkit_is_read(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    to = said_in(path, TrainConfig)
    assert to.values == {
        "out": str(Path("output/my first lora")),
        "name": "my_first_lora",
        "trigger": "p3r5on",
        "rank": 32,
        "alpha": 16.0,
        "targets": "attn-mlp",
        "save_dtype": "fp16",
        "save_every": 250,
        "keep": 4,
        "data": ["/images", "/more:3"],
        "caption_dropout": 0.05,
        "shuffle_captions": False,
        "cache": "disk",
        "resolution": [512, 768, 1024],
        "batch_size": 1,
        "steps": 2000,
        "accumulate": 1,
        "train_text_encoder": False,
        "gradient_checkpointing": True,
        "optimizer": "adamw8bit",
        "optimizer_args": ["weight_decay=1e-4"],
        "lr": 1e-4,
        "density": "logit_normal",
        "shift": 1.0,
        "ema": 0.99,
        "dtype": "bf16",
        "quantize": "fp8",
        "model": "black-forest-labs/FLUX.1-dev",
        "sample_first": False,
        "sample_every": 250,
        "sample_prompt": ["a woman", "[trigger] at the beach"],
        "sample_seed": 42,
        "sample_guidance": 4.0,
        "sample_steps": 20,
    }
    notes = " ".join(to.notes)
    said_names = re.findall(r"^\s+([a-z_]+):", JOB, re.M)
    assert len(said_names) > 30 and all(n in notes for n in ("sample.width", "process.device", "sample.walk_seed"))
    assert to.origins["rank"] == "file job.yaml: network.linear" and to.origins["out"] == "file job.yaml"
    from_toml(path, {}).validate()


@pytest.mark.parametrize(
    "old, new, error",
    [
        ("content_or_style: balanced", "content_or_style: style", "train.content_or_style"),
        ("content_or_style: balanced", "do_cfg: true", "train.do_cfg"),
        ("content_or_style: balanced", "loss_type: wavelet", "train.loss_type"),
        ("timestep_type: sigmoid", "timestep_type: weighted", "train.timestep_type"),
        ("num_repeats: 3", "flip_x: true", "differ in 'flip_x'"),
        ("num_repeats: 3", "inpaint_path: /c", "inpaint_path"),
        ('type: "lora"', 'type: "lorm"', "lorm"),
        ("'sd_trainer'", "'extract'", "process.type"),
        ("linear: 32", "linear: x", "network.linear is 'x'"),
        ("lr: 1e-4\n        skip", "lr: [\n        skip", "no YAML"),
    ],
)
def test_what_a_job_says_and_cannot_be_had_is_refused_with_file_and_key(tmp_path, old, new, error):
    assert old in JOB
    (tmp_path / "job.yaml").write_text(JOB.replace(old, new))
    with pytest.raises((ConfigError, UnknownNameError), match=error) as caught:
        said_in(tmp_path / "job.yaml", TrainConfig)
    assert "job.yaml" in str(caught.value)


@pytest.mark.parametrize("said, want", [("/c", "/c"), ("[/c, /d]", ["/c", "/d"]), ("null", None)])
def test_the_control_images_of_a_job(said, want, tmp_path):
    (tmp_path / "job.yaml").write_text(JOB.replace("shuffle_tokens: false", f"control_path: {said}"))
    assert said_in(tmp_path / "job.yaml", TrainConfig).values.get("control") == want


def test_what_a_job_says_and_is_off_changes_nothing(tmp_path):
    (tmp_path / "job.yaml").write_text(JOB.replace("content_or_style: balanced", "do_cfg: false"))
    assert "do_cfg" not in str(said_in(tmp_path / "job.yaml", TrainConfig))


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.system ['true']", "- a", "", "a: [", "&a [*a]"])
def test_a_yaml_file_that_is_no_job_is_refused(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        said_in(tmp_path / "a.yaml", TrainConfig)


ARGUMENTS = """
# as the GUI of sd-scripts writes them
pretrained_model_name_or_path = "m.safetensors"
train_data_dir = "d"
output_dir = "o"
output_name = "last"
resolution = "512,512"
network_module = "networks.lora"
network_dim = 8
network_alpha = 4
network_args = []
network_train_unet_only = true
learning_rate = 0.0001
lr_scheduler = "constant_with_warmup"
lr_scheduler_args = []
lr_warmup_steps = 10
max_train_steps = 100
noise_offset = 0
adaptive_noise_scale = 0
multires_noise_discount = 0.3
noise_offset_type = "Original"
bucket_no_upscale = false
bucket_reso_steps = 64
min_bucket_reso = 256
max_bucket_reso = 2048
caption_extension = ".txt"
caption_dropout_every_n_epochs = 0
caption_tag_dropout_rate = 0
keep_tokens = 0
save_last_n_steps = 0
max_train_epochs = 0
vae = ""
reg_data_dir = ""
sample_prompts = ""
xformers = true
loss_type = "l2"
huber_c = 0.1
huber_schedule = "snr"
optimizer_args = ["weight_decay=0.1"]

[sections_are_for_people]
mixed_precision = "bf16"
"""
DATASETS = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1
enable_bucket = true

[[datasets]]
resolution = 512
batch_size = 4

  [[datasets.subsets]]
  image_dir = 'hoge'
  class_tokens = 'hoge girl'

  [[datasets.subsets]]
  image_dir = 'fuga'
  class_tokens = 'hoge girl'
  num_repeats = 10
"""


def test_arguments_of_sd_scripts_are_read_from_a_file(tmp_path):
    (tmp_path / "a.toml").write_text(ARGUMENTS)
    to = said_in(tmp_path / "a.toml", TrainConfig)
    assert to.values == {
        "model": "m.safetensors",
        "data": ["d"],
        "out": "o",
        "name": "last",
        "resolution": 512,
        "rank": 8,
        "alpha": 4.0,
        "targets": "attn-mlp",
        "train_text_encoder": False,
        "lr": 1e-4,
        "lr_scheduler": "constant",
        "warmup": 10,
        "steps": 100,
        "dtype": "bf16",
        "optimizer_args": ["weight_decay=0.1"],
    }
    (note,) = to.notes
    assert "xformers" in note and "huber" in note


def test_data_sets_of_sd_scripts_are_read_alone_by_option_and_from_a_file(tmp_path):
    (tmp_path / "d.toml").write_text(DATASETS)
    expected = {
        "data": ["hoge", "fuga:10"],
        "instance_prompt": "hoge girl",
        "resolution": 512,
        "batch_size": 4,
        "shuffle_captions": True,
        "keep_tokens": 1,
        "buckets": True,
    }
    assert said_in(tmp_path / "d.toml", TrainConfig).values == expected
    (tmp_path / "a.toml").write_text('output_dir = "o"\ndataset_config = "d.toml"\n')
    assert said_in(tmp_path / "a.toml", TrainConfig).values == expected | {"out": "o"}
    done = quick("train", "-m", "m", "--output_dir=o", "--dataset_config=d.toml", "--print-config", cwd=tmp_path)
    assert done.returncode == 0 and "fuga:10" in done.stdout and "batch_size = 4" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "old, new, error",
    [
        ("num_repeats = 10", "flip_aug = true", "differ in 'flip_aug'"),
        ("num_repeats = 10", "color_aug = true", "color_aug"),
        ("num_repeats = 10", "is_reg = true", None),
        ("image_dir = 'fuga'", "", "image_dir"),
        ("keep_tokens = 1", "secondary_separator = ';'", "secondary_separator"),
        ("keep_tokens = 1", "no_such_thing = 1", "no_such_thing"),
    ],
)
def test_what_a_data_set_says_and_cannot_be_had_is_named(tmp_path, old, new, error):
    (tmp_path / "d.toml").write_text(DATASETS.replace(old, new))
    if error is None:
        values = said_in(tmp_path / "d.toml", TrainConfig).values
        assert (values["data"], values["class_data"], values["class_prompt"]) == (["hoge"], "fuga", "hoge girl")
        return
    with pytest.raises((ConfigError, UnknownNameError), match=error):
        said_in(tmp_path / "d.toml", TrainConfig)


def test_resolutions_of_data_sets_with_the_same_folders_are_several(tmp_path):
    more = DATASETS[DATASETS.index("[[datasets]]") :].replace("resolution = 512", "resolution = [768, 768]")
    (tmp_path / "d.toml").write_text(DATASETS + more)
    assert said_in(tmp_path / "d.toml", TrainConfig).values["resolution"] == [512, 768]
    (tmp_path / "d.toml").write_text(DATASETS + more.replace("hoge'", "other'"))
    with pytest.raises(ConfigError, match="resolution differs"):
        said_in(tmp_path / "d.toml", TrainConfig)


@pytest.mark.parametrize(
    "said, ours",
    [
        ("quantize: true, qtype: uint4", {"quantize": "nf4"}),
        ("quantize: true, qtype: 'uint3|a/b.safetensors'", {"quantize": "nf4"}),
        ("quantize: true, qtype: qint8", {"quantize": "int8"}),
        ("quantize: false, qtype: qfloat8", {}),
        ("layer_offloading: true", {"offload": 1.0}),
        (
            "layer_offloading: true, layer_offloading_transformer_percent: 0.7, quantize: true",
            {"offload": 0.7, "quantize": "fp8"},
        ),
        ("layer_offloading: false, layer_offloading_transformer_percent: 0.7", {}),
    ],
)
def test_memory_is_saved_as_ai_toolkit_says(said, ours, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB.replace("quantize: true", said))
    to = said_in(path, TrainConfig)
    assert {name: to.values[name] for name in ("quantize", "offload") if name in to.values} == ours
