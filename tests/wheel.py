"""What a wheel has to bring along, asked of the environment that it was installed into: `make wheel` runs this file by its path.

It imports no test code, for the source tree is not on its path.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def run(*command: str) -> str:
    """What a command of the environment prints; its errors go through, and end this."""
    print("$", *command, flush=True)
    return subprocess.run([BIN / command[0], *command[1:]], check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    import diffpeft
    from diffpeft import converters

    home = Path(diffpeft.__file__).parent
    assert home.is_relative_to(sys.prefix), f"{home} is not in {sys.prefix}"
    assert "torch" not in sys.modules, "import diffpeft loads torch"
    assert converters.FORMATS and Path(converters.__file__).parent == home / "converters"
    for file in ("py.typed", "assets/README.md", "train/report/page.html.j2", "converters/published.json"):
        assert (home / file).is_file(), f"the wheel has no {file}"
    run("python", "-c", "import converters, diffpeft.converters as ours; assert converters.FORMATS is ours.FORMATS")
    facts = importlib.metadata.metadata("diffpeft")
    assert facts["Version"] == diffpeft.__version__ and facts["Keywords"] and facts.get_all("Classifier")
    assert "# diffpeft" in facts.get_payload(), "the wheel's description is not the README"

    assert diffpeft.__version__ in run("diffpeft", "--version")
    commands = run("diffpeft", "--help")
    if "doctor" in commands:
        print(run("diffpeft", "doctor"))
    print(run("diffpeft", "demo", "--steps", "2", "-o", "demo"))
    adapter = next(Path("demo").glob("*.diffusers.safetensors"))
    assert json.loads(run("diffpeft", "inspect", str(adapter), "--json")), adapter
    run("diffpeft", "generate", "-p", "an emoji of lemon", "--steps", "2", "--lora", str(adapter), "-o", "lemon.png")
    assert Path("lemon.png").read_bytes().startswith(b"\x89PNG")
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
