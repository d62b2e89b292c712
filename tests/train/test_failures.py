"""What once went wrong with training, each with the tests that hold it now; and the cost of an error that needs no model."""

import ast
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from diffpeft.pipeline.open import EMBEDDED
from tests.cli.process import quick
from tests.train.pictures import photos_in

TESTS = Path(__file__).parent.parent
HELD: dict[str, dict[str, tuple[str, ...]]] = {  # {what went wrong: {file: tests}}
    "a run that was stopped left nothing": {
        "cli/test_resume_command.py": ("test_a_run_that_is_terminated_says_how_it_goes_on_and_does",),
        "train/test_resume.py": (
            "test_a_signal_finishes_the_step_saves_and_says_how_to_go_on",
            "test_a_loss_that_is_not_finite_keeps_the_last_good_state",
        ),
    },
    "more class images repeated the seeds of the first": {
        "train/test_prior.py": (
            "test_an_image_is_what_its_own_seed_gives",
            "test_more_images_go_on_where_the_first_ended",
        ),
    },
    "a gap among class images overwrote others": {
        "train/test_prior.py": ("test_a_gap_is_filled_with_the_image_that_was_there_and_the_others_stay",),
    },
    "class images of another prompt were trained on": {
        "train/test_prior.py": ("test_another_prompt_has_another_folder_and_finds_it_again",),
    },
    "16-bit and float pictures became white or black": {
        "train/test_pictures.py": (
            "test_grey_pictures_are_scaled_and_not_cut_off",
            "test_values_of_which_none_is_known_to_be_white_are_refused_by_name",
        ),
    },
    "options that did nothing were taken": {
        "train/test_check.py": (
            "test_an_option_that_would_do_nothing_is_refused",
            "test_class_images_that_would_not_count_are_refused",
        ),
        "train/test_outcome.py": ("test_an_adapter_that_changes_nothing_is_told_from_one_that_does",),
    },
    "names of layers were no targets": {
        "train/test_check.py": ("test_targets_are_names_as_everywhere_or_an_expression",),
        "train/test_outcome.py": ("test_a_name_that_no_layer_has_is_answered_with_one_that_does",),
    },
    "folders and captions as others have them were not read": {
        "train/test_layouts.py": (
            "test_a_layout_is_read_as_it_is_meant",
            "test_nothing_that_is_not_entered_goes_unsaid",
        ),
    },
    "a model that cannot be trained was loaded first": {
        "train/test_check.py": (
            "test_a_pipeline_that_cannot_be_trained_is_told_by_its_class",
            "test_a_unet_that_reads_more_than_an_image_is_told_by_its_channels",
        ),
    },
    "a byte order mark was part of the text": {
        "train/test_check.py": ("test_a_byte_order_mark_and_carriage_returns_are_no_part_of_a_file",),
        "llm/test_sft.py": ("test_a_byte_order_mark_is_no_part_of_the_texts",),
    },
    "files that no program reads were written without a word": {
        "train/test_outcome.py": ("test_the_programs_that_read_a_file_are_told_and_a_format_that_cannot_hold_it",),
    },
    "mistakes waited for torch": {
        "train/test_check.py": ("test_no_mistake_that_needs_no_model_waits_for_torch",),
        "train/test_failures.py": ("test_an_error_that_needs_no_model_takes_less_than_a_second",),
    },
    "nobody was told what the data held": {
        "train/test_account.py": (
            "test_small_extreme_and_animated_pictures_and_copies_are_named",
            "test_captions_that_clip_would_cut_are_counted",
            "test_every_file_that_cannot_be_read_is_named_at_once",
        ),
        "train/test_failures.py": ("test_an_empty_caption_and_pictures_of_odd_sizes_are_told_before_training",),
    },
    "any rank was taken": {
        "train/test_outcome.py": (
            "test_a_rank_above_every_layers_is_refused",
            "test_train_refuses_such_a_rank_before_it_makes_tensors",
        ),
    },
    "there were several displays": {
        "cli/test_cli.py": ("test_train_says_what_it_found_and_who_reads_its_files_on_one_display",)
    },
    "messages were in a programmer's words": {
        "train/test_check.py": ("test_what_a_value_is_and_should_be_is_said_in_words", "test_all_options_are_listed"),
        "train/test_other_trainers.py": ("test_every_option_of_theirs_is_answered",),
    },
    "a class image that was cut off counted": {
        "train/test_prior.py": (
            "test_an_interrupted_drawing_leaves_whole_images_and_is_taken_up_again",
            "test_a_damaged_image_is_drawn_again",
        ),
    },
    "a name was refused after the model was loaded": {
        "train/test_check.py": ("test_a_name_that_no_adapter_can_have_is_refused",),
    },
    "a full disk lost the adapter": {
        "train/test_outcome.py": (
            "test_room_on_the_disk_is_asked_for_before_training",
            "test_an_adapter_that_cannot_be_written_is_saved_elsewhere",
        ),
        "train/test_resume.py": ("test_a_full_disk_keeps_the_state_before",),
    },
    "a finished run was overwritten": {
        "cli/test_resume_command.py": ("test_a_run_that_is_terminated_says_how_it_goes_on_and_does",),
        "train/test_resume.py": ("test_a_second_run_in_a_folder_is_refused_and_a_dead_ones_lock_taken_over",),
        "train/test_failures.py": ("test_what_another_run_wrote_stays",),
    },
    "lists of names were cut in silence": {
        "train/test_check.py": ("test_a_list_of_names_says_how_many_it_leaves_out",),
    },
}


@pytest.mark.parametrize("failure", HELD)
def test_every_failure_is_held_by_tests_that_there_are(failure):
    for file, names in HELD[failure].items():
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not set(names) - functions, file


@pytest.fixture
def line(tmp_path):
    photos_in(tmp_path)
    return ["train", "-m", str(EMBEDDED), "-d", "photos", "-o", "out", "--instance-prompt", "x"]


def test_an_error_that_needs_no_model_takes_less_than_a_second(line, tmp_path):
    (tmp_path / "photos" / "b.png").write_bytes(b"no picture")
    (tmp_path / "job.yaml").write_text("config: {process: [{type: sd_trainer, train: {do_cfg: true}}]}")
    mistakes = {
        "no such folder": [*line, "-d", "photo"],
        "b.png": line,
        "scale_lr": [*line, "--scale_lr"],
        "train.do_cfg": ["train", "job.yaml"],
        "Here that is": ["sft", "--network_dim", "4"],
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for words, args in mistakes.items():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "diffpeft", *args], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode in (2, 3) and words in done.stderr, done.stderr
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert seconds < 1, (words, seconds)  # 0.4 on a quiet core


def test_an_empty_caption_and_pictures_of_odd_sizes_are_told_before_training(line, tmp_path):
    from PIL import Image

    (tmp_path / "photos" / "cat_face.txt").write_text("")
    Image.new("RGB", (1, 1)).save(tmp_path / "photos" / "dot.png")
    Image.new("RGB", (2000, 8)).save(tmp_path / "photos" / "strip.png")
    done = quick(*line, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words, name in (
        ("empty caption file", "cat_face.png"),
        ("scaled up", "dot.png"),
        ("less than a quarter", "strip.png"),
    ):
        assert any(words in text and name in text for text in done.stdout.splitlines()), words


def test_what_another_run_wrote_stays(line, tmp_path):
    (tmp_path / "out").mkdir()
    precious = tmp_path / "out" / "out.kohya.safetensors"
    precious.write_bytes(b"precious")
    for more in ((), ("--dry-run",), ("--name", "other")):
        done = quick(*line, "--steps", "1", "--sample-every", "0", *more, cwd=tmp_path)
        assert (done.returncode == 0) == ("other" in more) and precious.read_bytes() == b"precious"
        assert "other" in more or ("--overwrite" in done.stderr and "out.kohya.safetensors" in done.stderr)
