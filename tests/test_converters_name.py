"""`diffpeft.converters` is the name; `converters` is a shorter one where it is free. A user's own module of that name breaks nothing."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import converters as short
from diffpeft import converters

ROOT = Path(__file__).parent.parent
THEIRS = {
    "a module": {"converters.py": "MARK = 'theirs'"},
    "a package": {"converters/__init__.py": "MARK = 'theirs'", "converters/engine.py": ""},
    "a folder": {"converters/notes.txt": ""},
}
SCRIPT = """
import sys
from diffpeft import converters
assert converters.inspect("a.safetensors").format == "diffusers"
assert converters.__name__ == "diffpeft.converters"
import converters as theirs
assert theirs is not converters and getattr(theirs, "MARK", "theirs") == "theirs", theirs
print("well")
"""


def test_both_names_are_of_the_same_modules():
    assert short is converters
    inner = [module.name for module in pkgutil.walk_packages(converters.__path__, "diffpeft.converters.")]
    assert len(inner) > 50
    for name in inner:
        assert importlib.import_module(name.removeprefix("diffpeft.")) is importlib.import_module(name)
    from converters.detection import Detection

    assert Detection is converters.Detection and Detection.__module__ == "diffpeft.converters.detection"


def adapter(folder: Path) -> None:
    tensors = {
        f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{ab}.weight": torch.ones(shape)
        for ab, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    save_file(tensors, folder / "a.safetensors")


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def ran(folder: Path, site: Path, *args: str, stdin: str = "") -> str:
    """What Python prints, started in `folder` with diffpeft in `site`."""
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], cwd=folder, env=env, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What a wheel of this checkout holds."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "diffpeft", folder / "source" / "diffpeft", symlinks=True)
    for name in ("converters", "alias"):
        shutil.copytree(ROOT / name, folder / "source" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        folder / "source",
    ]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def sites(wheel, tmp_path_factory):
    """{layout: a folder to import diffpeft from}. `without links` is a checkout as a system without them has it, where a link is a text."""
    bare = tmp_path_factory.mktemp("bare")
    for name in ("diffpeft", "converters"):
        shutil.copytree(ROOT / name, bare / name, symlinks=True)
    (bare / "diffpeft" / "converters").unlink()
    (bare / "diffpeft" / "converters").write_text("../converters")
    return {"a checkout": ROOT, "a wheel": wheel, "without links": bare}


LAYOUTS = ("a checkout", "a wheel", "without links")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_short_name_is_ours_where_it_is_free(layout, sites, tmp_path):
    code = """
import converters.engine, converters.families.base
import diffpeft.converters, diffpeft.converters.engine
from converters.detection import Detection
assert converters is diffpeft.converters and converters.engine is diffpeft.converters.engine
assert Detection is diffpeft.converters.Detection
import sys; assert "torch" not in sys.modules
print(diffpeft.converters.__file__)
"""
    assert str(sites[layout]) in ran(tmp_path, sites[layout], "-c", code)


@pytest.mark.slow
@pytest.mark.parametrize("theirs", THEIRS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_users_own_converters_break_nothing(layout, theirs, sites, tmp_path):
    """Python puts the folder of a script, and with -c, -m and in notebooks the folder it is started in, first on the path."""
    adapter(tmp_path)
    put(tmp_path, THEIRS[theirs])
    script = SCRIPT if theirs != "a folder" else SCRIPT.partition("import converters as theirs")[0] + "print('well')"
    (tmp_path / "script.py").write_text(script)
    assert ran(tmp_path, sites[layout], "script.py") == "well\n"
    assert ran(tmp_path, sites[layout], "-c", script) == "well\n"
    assert "well" in ran(tmp_path, sites[layout], "-i", "-q", "-", stdin=script + "\n")  # a cell after the other
    inspected = ran(tmp_path, sites[layout], "-m", "diffpeft", "inspect", "a.safetensors")
    assert "diffusers" in inspected
    console = "import sys; from diffpeft.cli import main; sys.argv = ['diffpeft', 'inspect', 'a.safetensors']; main()"
    assert ran(tmp_path, sites[layout], "-c", console) == inspected


TYPED = """
from collections.abc import Mapping
from typing import assert_type

import converters as short
from diffpeft import Entry, converters

assert_type(converters.inspect("a").ranks, Mapping[int, int])
assert_type(converters.detect("a").family, str)
assert_type(short.read("a").entries, list[Entry])
converters.convert("a", "b", too="kohya")
"""


@pytest.mark.slow
def test_mypy_sees_the_types_of_an_installed_wheel(wheel, tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(TYPED)
    env = os.environ | {"PYTHONPATH": "", "MYPYPATH": ""}
    site = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(site)], check=True)
    (packages,) = site.glob("lib/*/site-packages")
    for name in ("diffpeft", "converters"):
        (packages / name).symlink_to(wheel / name)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", str(site / "bin" / "python"), "user.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert 'Unexpected keyword argument "too"' in done.stdout and "Found 1 error" in done.stdout, done.stdout
