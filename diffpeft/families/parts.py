"""The components of a pipeline, each loaded when it is first asked for and given up when it is told: a run needs the room of one at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

Pipeline = Any  # of diffusers
Component = Any  # a model, a tokenizer or a scheduler, of diffusers or transformers
Configs = Mapping[str, Mapping[str, Any]]  # {component: its config as diffusers has it}


class Parts:
    """A pipeline, and what loads those of its models that are not there.

    Args:
        pipe: the pipeline; models that are not loaded are None in it.
        loaders: {component: makes it}. One without a loader is there for good.
        skeletons: {component: a model like it, without numbers} of those that have one.
        configs: {component: its config}; default: those of the models that are there.
    """

    def __init__(
        self,
        pipe: Pipeline,
        loaders: Mapping[str, Callable[[], Component]] = MappingProxyType({}),
        skeletons: Mapping[str, Component] = MappingProxyType({}),
        configs: Configs | None = None,
    ):
        self.pipe, self._loaders, self._skeletons = pipe, dict(loaders), dict(skeletons)
        self.configs: Configs = configs_of(pipe) if configs is None else configs

    def __call__(self, name: str) -> Component:
        """A component, which is loaded if it is not there, with frozen parameters. Raises CheckpointError if it cannot be."""
        if getattr(self.pipe, name, None) is None and name in self._loaders:
            component = self._loaders[name]()
            if hasattr(component, "requires_grad_"):
                component.requires_grad_(False)
            setattr(self.pipe, name, component)
        return getattr(self.pipe, name)

    def has(self, name: str) -> bool:
        """Whether the pipeline has this component, loaded or not: some are left out of a model."""
        return name in self._loaders or getattr(self.pipe, name, None) is not None

    def outline(self, name: str) -> Component:
        """A component if it is there, else one with its layers and shapes and no numbers. Loads nothing."""
        return getattr(self.pipe, name, None) or self._skeletons[name]

    def pin(self, *names: str) -> None:
        """Have these components for good, as they are now: they were changed, and loading them again would undo it."""
        for name in names:
            self._loaders.pop(name, None)

    def free(self, *names: str) -> None:
        """Give up these components, as far as they can be loaded again."""
        for name in names:
            if name in self._loaders:
                setattr(self.pipe, name, None)
        gc.collect()  # a model is a circle of references
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def whole(self) -> Pipeline:
        """The pipeline with every component."""
        for name in self._loaders:
            self(name)
        return self.pipe


def configs_of(pipe: Pipeline) -> Configs:
    """{component: its config} of those that diffusers configures."""
    configs = {name: getattr(part, "config", None) for name, part in pipe.components.items()}
    return {name: config for name, config in configs.items() if isinstance(config, Mapping)}
