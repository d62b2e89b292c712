"""What other trainers call an option: sd-scripts' train_network.py and its kin, diffusers' train_dreambooth_lora*.py, ai-toolkit's job files. Imports no torch.

One table. A row says which option that is here and how its value is turned; or that it changes nothing here; or that it would change the result and
cannot be done, with what can. What several of their options say together (the optimiser and its arguments, rates of the parts, layers) is put
together in `translate`, under the name of the row's `part`. Where their default is another than ours and was not typed, ours holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

Turn = Callable[[object], object] | Mapping[str, object]


class OtherName(NamedTuple):
    """An option of another trainer.

    Args:
        ours: the option that it is here; empty where there is none.
        reads: what its value is: bool for a flag, list for several words.
        turn: the value here by the value there, or what makes it; ValueError says what it must be.
        off: values with which it changes nothing, there and here.
        part: which part of `translate` puts it together with others.
        idle: why it changes nothing here.
        remedy: why it is refused, and what can be done.
    """

    ours: str = ""
    reads: type = str
    turn: Turn | None = None
    off: tuple[object, ...] = ()
    part: str = ""
    idle: str = ""
    remedy: str = ""


def _idle(why: str, reads: type, names: str) -> dict[str, OtherName]:
    """Options that change nothing here."""
    return {name: OtherName(reads=reads, idle=why) for name in names.split()}


def _refused(remedy: str, reads: type, names: str, *off: object) -> dict[str, OtherName]:
    """Options that would change the result, and cannot be had."""
    return {name: OtherName(reads=reads, remedy=remedy, off=off) for name in names.split()}


def _part(part: str, ours: str, reads: type, names: str, *off: object) -> dict[str, OtherName]:
    """Options that are put together with others; `ours` is the one that a hint names."""
    return {name: OtherName(ours, reads, part=part, off=off) for name in names.split()}


def _same(ours: str, reads: type, names: str, *off: object, turn: Turn | None = None) -> dict[str, OtherName]:
    """Options that are called otherwise here."""
    return {name: OtherName(ours, reads, turn, off) for name in names.split()}


def _length(value: object) -> object:
    """CLIP's 77 places hold 75 tokens, besides a beginning and an end."""
    return 75 if value == 77 else value


def _square(value: object) -> object:
    """512,768 or 512x768 -> 640: the side of the square with that area, as a multiple of 64."""
    words = value if isinstance(value, (list, tuple)) else str(value).lower().replace("x", ",").split(",")
    try:
        sides = [int(word) for word in words]
    except ValueError:
        sides = []
    if not 1 <= len(sides) <= 2:
        raise ValueError("It is a side, or width and height: 512,768.")
    if len(set(sides)) == 1:
        return sides[0]
    return max(round(math.sqrt(sides[0] * sides[1]) / 64), 1) * 64


def _folders(value: object) -> object:
    """A folder, or a list of them."""
    folders = [str(word) for word in words(value)]
    return folders[0] if len(folders) == 1 else folders


def _several(value: object) -> object:
    """Sides of squares, as ai-toolkit says them: a number, or a list."""
    sides = [int(str(side)) for side in words(value)]
    return sides[0] if len(sides) == 1 else sides


def _trackers(value: object) -> object:
    """csv, which there always is, and those that are named."""
    return f"csv,{'tensorboard,wandb' if value == 'all' else value}" if value != "none" else "csv"


DTYPES = {"no": "fp32", "fp32": "fp32", "float32": "fp32", "float": "fp32", "fp16": "fp16", "float16": "fp16"}
DTYPES |= {"bf16": "bf16", "bfloat16": "bf16"}
_READ_BOTH = "Captions are read from .txt and .caption files: rename them."
_ONE_RATE = "The learning rate is what --lr says: multiply it."
_DROPPING = "Whole captions are dropped with --caption-dropout."
_CAPTIONS = "Write it into the captions."
_LESS_MEMORY = "saves memory there; here the base stays as --dtype says"
_AS_STEPS = "here it is a number of steps"
_BUCKETS = "The buckets are sd-scripts' usual ones: sides in steps of 64, from 256."
_LAYERS = "Choose layers with --targets, and their ranks with --rank-pattern."
_SCHEDULE = "A schedule takes --warmup, --lr-cycles and --lr-power."
_SCHEDULER = "The model's scheduler config says it: change it there."

TABLE: dict[str, OtherName] = {
    # what is trained, and where it goes
    **_same("model", str, "pretrained_model_name_or_path model_name_or_path base_model model.name_or_path"),
    **_same("out", str, "output_dir"),
    **_same("name", str, "output_name"),
    **_same("dtype", str, "mixed_precision train.dtype", None, turn=DTYPES),
    **_same("vae", str, "vae ae model.vae_path"),
    **_part("files", "text_encoder", str, "clip_l clip_g t5xxl text_encoder_path"),
    **_same("seed", int, "seed train.seed"),
    **_same("overwrite", bool, "overwrite_output_dir"),
    **_same("training_adapter", str, "assistant_lora_path model.assistant_lora_path"),
    **_part("base", "base_lora", list, "base_weights base_weights_multiplier"),
    **_same("init_from", str, "network_weights lora_weights network.pretrained_lora_path"),
    # data
    **_part("data", "data", str, "train_data_dir instance_data_dir image_dir dataset_name dataset train_file"),
    **_part("data", "data", int, "dataset_repeats repeats num_repeats"),
    **_same("instance_prompt", str, "instance_prompt class_tokens default_caption"),
    **_same("trigger", str, "trigger_word process.trigger_word"),
    **_same("resolution", str, "resolution", turn=_square),
    **_same("resolution", list, "datasets.resolution", turn=_several),
    **_same("buckets", bool, "enable_bucket"),
    **_same("frames", list, "target_frames num_frames", turn=lambda counts: counts),
    **_same("extract", str, "frame_extraction", turn={"head": "head", "chunk": "chunks"}),
    **_same("data", str, "video_directory"),
    **_same("flip", bool, "flip_aug random_flip flip_x"),
    **_part("crop", "crop", bool, "random_crop center_crop"),
    **_part("mask", "mask", bool, "alpha_mask masked_loss"),
    **_part("mask", "mask", str, "conditioning_data_dir"),
    **_same("control", list, "control_path control_directory", None, turn=_folders),
    **_same("caption_dropout", float, "caption_dropout_rate"),
    **_same("shuffle_captions", bool, "shuffle_caption shuffle_tokens"),
    **_part("shuffle", "keep_tokens", int, "keep_tokens", 0),
    **_same(
        "max_length",
        int,
        "max_token_length max_sequence_length tokenizer_max_length t5xxl_max_token_length",
        None,
        turn=_length,
    ),
    **_same("clip_skip", int, "clip_skip", 0),
    **_part(
        "cache",
        "cache",
        bool,
        "cache_latents cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk",
    ),
    # the class
    **_part("prior", "class_prompt", bool, "with_prior_preservation"),
    **_part("prior", "class_data", str, "class_data_dir reg_data_dir"),
    **_part("prior", "prior_weight", float, "prior_loss_weight train.reg_weight"),
    **_same("class_prompt", str, "class_prompt"),
    **_same("num_class_images", int, "num_class_images"),
    **_part("preserve", "prior", bool, "train.blank_prompt_preservation"),
    **_part("preserve", "prior", float, "train.blank_prompt_preservation_multiplier"),
    # the adapter
    **_part("network", "method", str, "network_module network.type"),
    **_part("network", "method", list, "network_args"),
    **_part("network", "method", bool, "use_dora"),
    **_same("rank", int, "network_dim lora_rank lora_r r dim network.linear network.rank"),
    **_same("alpha", float, "network_alpha lora_alpha network.linear_alpha network.alpha"),
    **_same("dropout", float, "network_dropout lora_dropout network.dropout", 0),
    **_part("network", "method", int, "network.conv"),
    **_part("network", "method", float, "network.conv_alpha"),
    **_same("targets", str, "lora_layers target_modules"),
    **_part(
        "trained", "train_text_encoder", bool, "train_text_encoder network_train_unet_only train.train_text_encoder"
    ),
    # optimiser and rate
    **_part(
        "rates",
        "lr",
        float,
        "learning_rate unet_lr train.lr train.unet_lr text_encoder_lr1 text_encoder_lr2 train.text_encoder_lr",
    ),
    **_part("rates", "lr", list, "text_encoder_lr"),
    **_part("optimizer", "optimizer", str, "optimizer_type optimizer train.optimizer"),
    **_part("optimizer", "optimizer", bool, "use_8bit_adam use_lion_optimizer"),
    **_part("optimizer", "optimizer_args", list, "optimizer_args"),
    **_part("optimizer", "optimizer", dict, "train.optimizer_params"),
    **_part("optimizer", "optimizer", float, "adam_beta1 adam_beta2 adam_epsilon prodigy_beta3"),
    **_same("weight_decay", float, "adam_weight_decay"),
    **_same("max_grad_norm", float, "max_grad_norm max_norm train.max_grad_norm"),
    **_part("schedule", "lr_scheduler", str, "lr_scheduler train.lr_scheduler"),
    **_part("schedule", "warmup", float, "lr_warmup_steps"),
    **_part("schedule", "lr_power", float, "lr_scheduler_power lr_power"),
    **_part("schedule", "lr_cycles", int, "lr_scheduler_num_cycles lr_num_cycles"),
    **_part("schedule", "lr_scheduler", dict, "train.lr_scheduler_params"),
    **_same("lora_plus_ratio", float, "loraplus_lr_ratio"),
    **_part("length", "steps", int, "max_train_steps num_train_steps", 0),
    **_part("length", "epochs", int, "max_train_epochs num_train_epochs", 0),
    **_same("steps", int, "train.steps"),
    **_same("batch_size", int, "train_batch_size train.batch_size"),
    **_same(
        "accumulate", int, "gradient_accumulation_steps train.gradient_accumulation_steps train.gradient_accumulation"
    ),
    **_same("gradient_checkpointing", bool, "gradient_checkpointing train.gradient_checkpointing"),
    **_same("compile", bool, "torch_compile"),
    **_same("quantize", bool, "fp8_base fp8_base_unet fp8_scaled", False, turn=lambda _: "fp8"),
    **_part("bits", "quantize", bool, "model.quantize", False),
    **_part("bits", "quantize", str, "model.qtype"),
    **_part("host", "offload", bool, "model.layer_offloading", False),
    **_part("host", "offload", float, "model.layer_offloading_transformer_percent"),
    **_part("average", "ema", bool, "use_ema"),
    **_part("average", "ema", float, "ema_decay"),
    **_part("average", "ema", dict, "train.ema_config"),
    # the objective
    **_same("snr_gamma", float, "snr_gamma min_snr_gamma train.min_snr_gamma train.snr_gamma", 0),
    **_same("debiased", bool, "debiased_estimation_loss"),
    **_same("noise_offset", float, "noise_offset offset_noise train.noise_offset", 0),
    **_part("loss", "loss", str, "loss_type huber_schedule train.loss_type"),
    **_part("loss", "loss", float, "huber_c"),
    **_part("levels", "density", str, "weighting_scheme timestep_sampling train.timestep_type"),
    **_part(
        "levels", "density", float, "logit_mean logit_std mode_scale sigmoid_scale discrete_flow_shift training_shift"
    ),
    # states, samples, files
    **_same("save_every", int, "checkpointing_steps save_every_n_steps save.save_every", 0),
    **_same("keep", int, "checkpoints_total_limit save.max_step_saves_to_keep", 0),
    **_same("resume", str, "resume_from_checkpoint", ""),
    **_same("sample_prompt", str, "validation_prompt", ""),
    **_same("sample_prompt", list, "sample.prompts"),
    **_same("sample_prompts", str, "sample_prompts"),
    **_same("sample_every", int, "sample_every_n_steps validation_steps sample.sample_every", 0),
    **_same("sample_first", bool, "train.skip_first_sample", turn=lambda on: not on),
    **_same("sample_seed", int, "sample.seed"),
    **_same("sample_steps", int, "sample.sample_steps"),
    **_same("sample_guidance", float, "sample.guidance_scale"),
    **_same("log", str, "report_to log_with", "", "None", turn=_trackers),
    **_same("heldout", float, "validation_split", 0),
    **_same("heldout_every", int, "validate_every_n_steps", 0),
    **_same("save_dtype", str, "save_precision save.dtype", turn=DTYPES),
    **_part("hub", "push_to_hub", bool, "push_to_hub save.push_to_hub save.hf_private"),
    **_part("hub", "push_to_hub", str, "hub_model_id huggingface_repo_id save.hf_repo_id huggingface_repo_visibility"),
    **_same("author", str, "metadata_author"),
    **_same("description", str, "metadata_description"),
    **_same("license", str, "metadata_license"),
    # what changes nothing here
    **_idle(
        "attention is PyTorch's own",
        bool,
        "xformers sdpa mem_eff_attn enable_xformers_memory_efficient_attention split_attn enable_npu_flash_attention",
    ),
    **_idle("the model's scheduler says it", bool, "v2 v_parameterization model.is_v_pred"),
    **_idle("the model says it", bool, "model.is_flux model.is_xl model.is_v2"),
    **_idle("the model says it", str, "model.arch train.noise_scheduler sample.sampler sample_sampler model_type"),
    **_idle(
        "a step waits for no loading",
        int,
        "max_data_loader_n_workers dataloader_num_workers vae_batch_size sample_batch_size text_encoder_batch_size sample.num_workers",
    ),
    **_idle(
        "a step waits for no loading",
        bool,
        "persistent_data_loader_workers pre_compute_text_embeddings train.cache_text_embeddings train.unload_text_encoder",
    ),
    **_idle(
        _LESS_MEMORY,
        bool,
        "lowram highvram full_fp16 full_bf16 no_half_vae fused_backward_pass "
        "cpu_offload_checkpointing offload set_grads_to_none allow_tf32 disable_mmap_load_safetensors "
        "split_mode low_vram model.low_vram model.quantize_te "
        "upcast_before_saving",
    ),
    **_idle(_LESS_MEMORY, str, "model.qtype_te prior_generation_precision dynamo_backend model.dtype"),
    **_idle("here it is a share of the blocks, --offload 0.5", int, "blocks_to_swap"),
    **_idle(
        _AS_STEPS,
        int,
        "save_every_n_epochs save_n_epoch_ratio save_last_n_epochs save_last_n_epochs_state sample_every_n_epochs validation_epochs",
    ),
    **_idle("states are kept by their number, --keep", int, "save_last_n_steps save_last_n_steps_state"),
    **_idle("the state is saved with each checkpoint", bool, "save_state save_state_on_train_end"),
    **_idle("each prompt is drawn once", int, "num_validation_images"),
    **_idle("the base is drawn before the first step too", bool, "sample_at_first"),
    **_idle(
        "what the run does is in its report",
        str,
        "logging_dir log_prefix log_tracker_name log_tracker_config wandb_run_name wandb_api_key tracker_name "
        "process.performance_log_every logging.project_name logging.run_name",
    ),
    **_idle("what the run does is in its report", bool, "log_config logging.use_wandb logging.verbose"),
    **_idle("what the run does is in its report", int, "logging.log_every"),
    **_idle(
        "the file has the metadata that other programs show",
        str,
        "training_comment metadata_merged_from metadata_preprocessor metadata_is_negative_embedding metadata_title metadata_tags "
        "metadata_usage_hint metadata_trigger_phrase metadata_thumbnail",
    ),
    **_idle("the file has the metadata that other programs show", bool, "no_metadata"),
    **_idle("a file of that kind is written", bool, "output_kohya_format use_safetensors"),
    **_idle("processes are --num-processes", int, "local_rank ddp_timeout num_cpu_threads_per_process"),
    **_idle("processes are --num-processes", bool, "ddp_gradient_as_bucket_view ddp_static_graph"),
    **_idle("files are fetched to the usual place", str, "tokenizer_cache_dir hub_token huggingface_token"),
    **_idle("the data is looked at with diffpeft data check", bool, "debug_dataset cache_info skip_cache_check"),
    **_idle("it is the device of this machine", str, "process.device model.vae_device model.te_device"),
    **_idle("ranks are those of the file", bool, "dim_from_weights"),
    **_idle(
        "samples have the size of the training",
        int,
        "sample.width sample.height sample.sample_start_step sample.num_frames sample.fps",
    ),
    **_idle("each sample has the same noise each time", bool, "sample.walk_seed"),
    **_idle("what is not wanted stands behind a prompt: --n TEXT", str, "sample.neg"),
    **_idle("adapters are stored as safetensors", str, "save.save_format"),
    **_idle(
        "the text encoders are embedded with their masks as their pipeline does",
        bool,
        "text_encoder_use_attention_mask",
    ),
    **_idle("the denoiser is always trained", bool, "train.train_unet network.transformer_only"),
    **_idle("samples are drawn to the end", str, "final_validation_prompt"),
    **_idle("samples are drawn to the end", bool, "skip_final_inference"),
    **_idle("the held-out loss has draws of its own", int, "validation_seed max_validation_steps"),
    **_idle(_AS_STEPS, int, "validate_every_n_epochs"),
    **_idle("uploads are made at the end", bool, "async_upload save_state_to_huggingface"),
    **_idle("processes are --num-processes", int, "zero_stage"),
    **_idle("--print-config prints the options", bool, "output_config"),
    **_idle(_LESS_MEMORY, bool, "zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients"),
    **_idle(
        _LESS_MEMORY,
        str,
        "offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path",
    ),
    **_idle(_LESS_MEMORY, str, "bnb_quantization_config_path"),
    # what would change the result, and cannot be done
    **_refused("Choose --density, --shift and --snr-gamma.", bool, "do_edm_style_training", False),
    **_refused("Images are scaled with a Lanczos filter.", str, "image_interpolation_mode", "lanczos"),
    **_refused("A model that reads images or classes cannot be trained.", str, "class_labels_conditioning", "", "None"),
    **_refused("A model that reads images or classes cannot be trained.", list, "validation_images"),
    **_refused("Predictions are taken as they are, raw.", int, "precondition_outputs", 0, 1),
    **_refused(
        "Train the denoiser alone, or with the text encoders: --train-text-encoder.",
        bool,
        "network_train_text_encoder_only",
        False,
    ),
    **_refused(_ONE_RATE, bool, "scale_lr", False),
    **_refused("Noise has an offset by channel: --noise-offset.", float, "adaptive_noise_scale ip_noise_gamma", 0),
    **_refused("Noise has an offset by channel: --noise-offset.", int, "multires_noise_iterations", 0),
    **_refused("Noise has an offset by channel: --noise-offset.", float, "multires_noise_discount", 0, 0.3),
    **_refused("Noise has an offset by channel: --noise-offset.", str, "noise_offset_type", "Original"),
    **_refused(
        "Noise has an offset by channel: --noise-offset.",
        bool,
        "noise_offset_random_strength ip_noise_gamma_random_strength train.dynamic_noise_offset",
        False,
    ),
    **_refused(_SCHEDULER, bool, "zero_terminal_snr", False),
    **_refused("Weights of the loss are --snr-gamma and --debiased.", bool, "scale_v_pred_loss_like_noise_pred", False),
    **_refused("Weights of the loss are --snr-gamma and --debiased.", float, "v_pred_like_loss", 0),
    **_refused("Train a range of noise with --sigma-range.", int, "min_timestep train.min_denoising_steps", 0),
    **_refused(
        "Train a range of noise with --sigma-range.", int, "max_timestep train.max_denoising_steps", 0, 999, 1000
    ),
    **_idle("the rate is the file's own, and clips are shown at the model's or at --fps", float, "source_fps"),
    **_idle("every pair of steps has one of each expert", int, "train.switch_boundary_every switch_boundary_every"),
    **_refused(
        "Where the experts change over is in the model's config; one alone is --experts high or low.",
        float,
        "timestep_boundary",
    ),
    **_refused("Pass a diffusers folder with both experts; one alone is --experts high or low.", str, "dit_high_noise"),
    **_refused("Weights in captions are not read.", bool, "weighted_captions", False),
    **_refused(
        _CAPTIONS,
        str,
        "caption_prefix caption_suffix secondary_separator keep_tokens_separator token_warmup_min",
        "",
        1,
        "1",
    ),
    **_refused(_CAPTIONS, float, "token_warmup_step", 0),
    **_refused(_CAPTIONS, bool, "enable_wildcard", False),
    **_refused("Captions are shuffled between commas.", str, "caption_separator", ",", ", "),
    **_refused(
        _READ_BOTH, str, "caption_extension caption_extention caption_ext", "", ".txt", "txt", ".caption", "caption"
    ),
    **_refused(_DROPPING, float, "caption_tag_dropout_rate token_dropout_rate", 0),
    **_refused(_DROPPING, int, "caption_dropout_every_n_epochs", 0),
    **_refused(
        "Change the images before training.",
        bool,
        "color_aug flip_y standardize_images train.standardize_images",
        False,
    ),
    **_refused("Change the images before training.", str, "face_crop_aug_range", "", "None"),
    **_refused("Images are scaled with a Lanczos filter.", str, "resize_interpolation", "", "lanczos"),
    **_refused(_BUCKETS, int, "min_bucket_reso", 256),
    **_refused(_BUCKETS, int, "max_bucket_reso", 1024, 2048),
    **_refused(_BUCKETS, int, "bucket_reso_steps", 64),
    **_refused(
        "With several, as in --resolution 512,768, an image is used in each that does not enlarge it.",
        bool,
        "bucket_no_upscale",
        False,
    ),
    **_refused(
        "--data takes .jsonl and .csv files of file_name, text and control.",
        str,
        "in_json dataset_class metadata_file image_column caption_column dataset_config_name cond_image_column conditioning_image_column",
        "",
        "image",
        "text",
        "cond_image",
        "conditioning_image",
    ),
    **_refused("Buckets are sd-scripts': leave it out.", str, "aspect_ratio_buckets", ""),
    **_refused("A run weighs them all alike.", float, "network_multiplier network_weight loss_multiplier", 1),
    **_refused(
        "Part of the Hub cannot be chosen: fetch it, and pass the folder to --model.",
        str,
        "revision variant non_ema_revision tokenizer_name",
        "",
        "None",
    ),
    **_refused(
        "A VAE's file is --vae, beside a --model that is a single file.", str, "pretrained_vae_model_name_or_path", ""
    ),
    **_refused("Huber's curve is set with --huber-c.", float, "huber_scale", 1),
    **_refused("Adapters keep their size: choose a lower --lr.", float, "scale_weight_norms", 0),
    **_refused("Only safetensors are written.", str, "save_model_as", "", "safetensors"),
    **_refused(
        "Training tells the model a guidance of 1; samples have --sample-guidance.", float, "guidance_scale", 1, 0
    ),
    **_refused("Predictions are taken as they are, raw.", str, "model_prediction_type", "", "raw"),
    **_refused(
        "T5's embeddings are read without a mask, as the pipeline reads them.", bool, "apply_t5_attn_mask", False
    ),
    **_refused("A run goes on with --resume.", int, "initial_epoch initial_step", 0),
    **_refused("A run goes on with --resume.", bool, "skip_until_initial_step resume_from_huggingface", False),
    **_refused("Train with --num-processes, or on one device.", bool, "deepspeed use_deepspeed", False),
    "lr_scheduler_type": OtherName("lr_scheduler", off=("", "None"), remedy=_SCHEDULE),
    **_refused(_SCHEDULE, str, "lr_scheduler_args", "", "None"),
    **_refused(_SCHEDULE, float, "lr_decay_steps lr_scheduler_timescale lr_scheduler_min_lr_ratio", 0),
    **_refused(
        "The text encoders' weight decay is that of all: --weight-decay.",
        float,
        "adam_weight_decay_text_encoder",
        0.001,
    ),
    **_refused(
        "Prodigy is made with --optimizer-args.",
        str,
        "prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup",
        True,
        "True",
        "true",
    ),
    **_refused("Biases are not trained.", str, "lora_bias", "none", "false", "False"),
    **_refused(_LAYERS, str, "lora_blocks exclude_modules", ""),
    **_refused(_LAYERS, dict, "network.network_kwargs", {}),
    **_refused(_LAYERS, bool, "network.all_layers", False),
    **_refused("LoKr's factor follows from the rank.", int, "network.lokr_factor", -1, 0),
    **_refused("LoKr's second matrix has the rank that --rank says.", bool, "network.lokr_full_rank", False),
    **_refused(
        "Keep the base with --prior base and --class-prompt.",
        bool,
        "train.diff_output_preservation train.inverted_mask_prior train.do_prior_divergence",
        False,
    ),
    **_refused(
        "--density and --shift say how noise is drawn.", bool, "train.linear_timesteps train.linear_timesteps2", False
    ),
    **_refused("--density and --shift say how noise is drawn.", str, "train.content_or_style", "", "balanced"),
    **_refused(
        "Only control images beside the pictures can be trained on: --control DIR.",
        str,
        "inpaint_path clip_image_path controlnet_model_name_or_path",
        "",
        "None",
    ),
    **_refused("Masks are --mask DIR.", str, "mask_path unconditional_path", "", "None"),
    **_refused(
        "Adapters are uploaded by hand; tell others the repository.",
        str,
        "huggingface_path_in_repo huggingface_repo_type",
        "",
        "model",
    ),
}


def hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    """What an option of another program is called here; empty if that is not known, or not one of `known`. `--` makes it a flag."""
    from diffpeft.train.config import OTHER_NAMES

    key = name.strip("-").replace("-", "_").lower()
    row = TABLE.get(key, OtherName())
    ours, comma, remark = (row.ours or OTHER_NAMES.get(key, "")).partition(",")
    spelt = prefix + ours.replace("_", "-") if prefix else ours
    return f"Here that is {spelt}{comma}{remark}." if ours in set(known) else ""


def words(value: object) -> Sequence[object]:
    """A list as it is, and one value as a list."""
    return value if isinstance(value, (list, tuple)) else [value]
