"""Training an adapter on a few images: data, objective, loop, pictures, report.

The package can be called: `diffpeft.train(TrainConfig(...))` does what the command `diffpeft train` does.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffpeft.train.config import TrainConfig
    from diffpeft.train.run import TrainRun
    from diffpeft.train.watch import Watch


class TrainPackage(ModuleType):
    """This package, which can be called."""

    def __call__(self, config: TrainConfig, watch: Watch | None = None) -> TrainRun:
        """Train an adapter and write its files, figures and page, in this process: `run.files`, `run.report`, `run.best`, `run.losses`.

        The adapter stays on the run's pipeline, `run.family.pipe`. `watch` is told how it gets on; nothing is printed. Signals end the run
        as they end the command, with `Interrupted`.

        Raises what `diffpeft.train.dreambooth.train` and `save` raise.

        Example:
            run = diffpeft.train(diffpeft.TrainConfig(model="base", data="photos", out="out", instance_prompt="a photo of sks dog"))
            print(run.files, run.best)
        """
        from diffpeft.train import budget, dreambooth
        from diffpeft.train.check import check

        config, checked = budget.fitted(check(config), watch)
        run = dreambooth.train(config, watch, checked)
        dreambooth.save(run)
        return run


sys.modules[__name__].__class__ = TrainPackage
