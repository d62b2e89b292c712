"""Type checkers see what functions take and return."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_typical_programs_type_check_but_for_their_mistakes(tmp_path):
    pytest.importorskip("mypy")
    user = tmp_path / "user.py"
    user.write_text((ROOT / "tests" / "typical.py").read_text())
    strict = ["--strict", "--warn-unused-ignores", "--ignore-missing-imports", str(user)]
    env = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *strict], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert "Found" in done.stdout or "Success" in done.stdout, done.stderr
    assert not [line for line in done.stdout.splitlines() if line.startswith("user.py")]
