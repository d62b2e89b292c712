"""Programs in a process of their own in which `peft` is served from here, with peft installed and without."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

_HIDDEN = """
from importlib.machinery import PathFinder
find, distributions = PathFinder.find_spec, PathFinder.find_distributions
hidden = lambda name: name.partition(".")[0] == "peft"
PathFinder.find_spec = staticmethod(lambda name, *where: None if hidden(name) else find(name, *where))
PathFinder.find_distributions = staticmethod(lambda *of: (d for d in distributions(*of) if d.metadata["Name"] != "peft"))
"""
MODES = ("peft is installed", "peft is absent")


def process(program: str, mode: str = MODES[0]) -> str:
    """What a program prints; its last lines in an AssertionError if it fails."""
    code = (_HIDDEN if mode == MODES[1] else "") + textwrap.dedent(program)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr[-4000:]
    return done.stdout


def served(program: str, mode: str = MODES[0]) -> str:
    """The same of a program that has `peft` served."""
    return process("import diffpeft\ndiffpeft.as_peft()\n" + textwrap.dedent(program), mode)
