"""Multitask prompt tuning: P_t = P * (u_t v_t), a prompt that all tasks share times one of low rank for each.  Wang et al. 2023, arXiv:2303.02861."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffpeft.errors import ConfigError, MissingKeysError, listed
from diffpeft.llm.prompt import EMBEDDINGS
from diffpeft.llm.prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit
from diffpeft.methods.peft_config import PeftType

COLS, ROWS = "prefix_task_cols", "prefix_task_rows"


class MultitaskPromptTuningInit(StrEnum):
    """What the tensors start from: the prompt alone (a text's vectors or random), or a file: the mean of its tasks, one of them, or its prompt alone."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


FROM_FILE = tuple(MultitaskPromptTuningInit)[2:]


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """How to make a prompt for several tasks; the model is called with `task_ids` [batch]. Names, meanings and defaults are PEFT's.

    Args:
        prompt_tuning_init: a MultitaskPromptTuningInit.
        prompt_tuning_init_state_dict_path: the file of the last three, safetensors or torch's.
        prompt_tuning_init_task: the task of EXACT_SOURCE_TASK.
        num_ranks, num_tasks: rank of a task's prompt, number of tasks; 1 task for the two that start from a file's tasks.
    """

    prompt_tuning_init: str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    TYPE: ClassVar[PeftType | None] = PeftType.MULTITASK_PROMPT_TUNING
    INITS: ClassVar[tuple[str, ...]] = (*MultitaskPromptTuningInit, PromptTuningInit.SAMPLE_VOCAB)


class MultitaskPromptEmbedding(PromptEmbedding):
    """`embedding.weight` [tokens, dim], `prefix_task_cols` [tasks, tokens, rank], `prefix_task_rows` [tasks, rank, dim]."""

    def __init__(self, config: MultitaskPromptTuningConfig, word_embeddings: nn.Module) -> None:
        super().__init__(config, word_embeddings)
        tasks, rank = config.num_tasks, config.num_ranks
        assert tasks is not None and rank is not None
        tokens, dim = self.embedding.weight.shape
        self.prefix_task_cols = nn.Parameter(torch.normal(0.0, 0.02, (tasks, tokens, rank)))
        self.prefix_task_rows = nn.Parameter(torch.normal(0.0, 0.02, (tasks, rank, dim)))
        if config.prompt_tuning_init in FROM_FILE and not config.inference_mode:  # then its own file has all of it
            self.load(self.state() | _source(config))

    def forward(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """indices [b, tokens], task_ids [b] -> [b, tokens, dim]."""
        if task_ids is None:
            raise ConfigError("task_ids cannot be None", remedy="Give the number of each row's task, [batch].")
        return self.embedding(indices) * (self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids])

    def prompt(self, batch: int, collapsed: bool = False, task_ids: Tensor | None = None) -> Tensor:
        """The vectors of each row's task, [batch, tokens, dim]; `task_ids` [batch]."""
        return self(self.tokens.expand(batch, -1), task_ids)

    def state(self, collapsed: bool = False) -> dict[str, Tensor]:
        return {name: place.detach().clone() for name, place in self.places().items()}

    def places(self) -> dict[str, Tensor]:
        return {COLS: self.prefix_task_cols, ROWS: self.prefix_task_rows, **super().places()}


def _source(config: MultitaskPromptTuningConfig) -> dict[str, Tensor]:
    """What to take over of the file that the config names."""
    path, init = config.prompt_tuning_init_state_dict_path, config.prompt_tuning_init
    if path is None:
        raise ConfigError(
            "prompt_tuning_init_state_dict_path is None", remedy=f"It needs to be specified with {init} init method."
        )
    wanted = [EMBEDDINGS] if init == MultitaskPromptTuningInit.ONLY_SOURCE_SHARED else [EMBEDDINGS, COLS, ROWS]
    tensors = _read(path)
    if missing := [name for name in wanted if name not in tensors]:
        raise MissingKeysError(f"no {listed(missing)}", where=path, remedy="Is it a file of multitask prompt tuning?")
    source = {name: tensors[name] for name in wanted}
    task = config.prompt_tuning_init_task or 0
    for name in wanted[1:]:
        t = source[name]
        if init == MultitaskPromptTuningInit.EXACT_SOURCE_TASK and not -len(t) <= task < len(t):
            raise ConfigError(f"prompt_tuning_init_task is {task}", where=path, remedy=f"The file has {len(t)} tasks.")
        source[name] = t.mean(0, True) if init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS else t[task][None]
    return source


def _read(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of one that torch wrote (only tensors are read: no code can run)."""
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
