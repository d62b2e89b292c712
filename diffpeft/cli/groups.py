"""The options of a long command under headings, in its help."""

from __future__ import annotations

import click

GROUPS = {  # {heading: options}; those that are in none stand last
    "Model": (
        "model",
        "base",
        "vae",
        "text_encoder",
        "dtype",
        "quantize",
        "offload",
        "memory",
        "base_lora",
        "training_adapter",
    ),
    "Data": (
        "data",
        "instance_prompt",
        "trigger",
        "control",
        "resolution",
        "frames",
        "fps",
        "extract",
        "buckets",
        "crop",
        "flip",
        "mask",
        "caption_dropout",
        "shuffle_captions",
        "keep_tokens",
        "max_length",
        "clip_skip",
        "packing",
        "class_prompt",
        "class_data",
        "num_class_images",
        "prior_weight",
        "prior",
        "prior_prompts",
        "cache",
        "cache_dir",
        "cache_limit",
    ),
    "Concept": ("target", "positive", "negative", "erase", "preserve", "guidance", "draw_steps"),
    "Adapter": (
        "method",
        "rank",
        "alpha",
        "rank_pattern",
        "dropout",
        "targets",
        "experts",
        "train_text_encoder",
        "init_from",
        "allow_unchanged",
    ),
    "Objective": (
        "loss",
        "huber_c",
        "huber_schedule",
        "snr_gamma",
        "debiased",
        "noise_offset",
        "density",
        "density_mean",
        "density_std",
        "density_scale",
        "shift",
        "sigma_range",
        "base_range",
        "base_weight",
    ),
    "Steps": (
        "steps",
        "epochs",
        "batch_size",
        "accumulate",
        "num_processes",
        "fsdp",
        "optimizer",
        "optimizer_args",
        "lr",
        "lr_scheduler",
        "lr_cycles",
        "lr_power",
        "lr_pattern",
        "lora_plus_ratio",
        "warmup",
        "weight_decay",
        "max_grad_norm",
        "ema",
        "gradient_checkpointing",
        "compile",
        "seed",
    ),
    "Watch": (
        "sample_prompt",
        "sample_prompts",
        "sample_every",
        "sample_steps",
        "sample_guidance",
        "sample_seed",
        "sample_first",
        "sample_start",
        "sample_model",
        "samples",
        "heldout",
        "heldout_every",
        "best",
        "log",
        "log_every",
    ),
    "Output and state": ("out", "name", "overwrite", "save_every", "keep", "resume", "allow"),
    "Save": (
        "formats",
        "save_dtype",
        "author",
        "description",
        "license",
        "push_to_hub",
        "hub_private",
    ),
    "Before a run": ("print_config", "dry_run", "as_json"),
}
OTHERS = "Other options"
HEADINGS = {name: heading for heading, names in GROUPS.items() for name in names}


class Grouped(click.Command):
    """A command whose help has its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write them, each heading's in the order of its list."""
        rows: dict[str, list[tuple[str, str]]] = {heading: [] for heading in (*GROUPS, OTHERS)}
        order = list(HEADINGS)
        names = {p.name: p for p in self.get_params(ctx)}
        for name in sorted(names, key=lambda name: order.index(name) if name in order else len(order)):
            if (record := names[name].get_help_record(ctx)) is not None:
                rows[HEADINGS.get(name or "", OTHERS)].append(record)
        for heading, records in rows.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
