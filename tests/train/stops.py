"""A run that fails in the middle."""


class StopsAt:
    """A Watch with which the step of this number fails, before its update."""

    def __init__(self, step):
        self.last = step

    def __getattr__(self, name):
        return lambda *args, **figures: None

    def step(self, done, total, loss):
        if done == self.last:
            raise RuntimeError("stopped")
