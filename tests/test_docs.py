"""The pages: each is listed, decisions are numbered alike, and no link leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import diffpeft

DOCS = Path(diffpeft.__file__).parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def test_every_page_has_a_line_in_the_index():
    lines = (DOCS / "README.md").read_text().splitlines()
    listed = {m[1]: m[2] for line in lines if (m := re.fullmatch(r"\* \[.+\]\((.+?)\): (.{20,}\.)", line))}
    assert {str(page.relative_to(DOCS)) for page in PAGES} - {"README.md"} <= listed.keys()


def test_decisions_have_a_number_each_in_one_style():
    decisions = [page for page in PAGES if page.parent.name == "decisions"]
    assert len({page.name[:3] for page in decisions}) == len(decisions)
    for page in decisions:
        assert re.fullmatch(r"\d{3}-[a-z0-9-]+\.md", page.name)
        assert re.match(rf"# {page.name[:3]}: \S.*\n\n", page.read_text()), page.name


def test_links_of_pages_lead_somewhere():
    for page in [*PAGES, DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_decisions_that_the_code_names_exist():
    names = {page.name for page in PAGES}
    for path in [*DOCS.parent.glob("diffpeft/**/*.py"), *DOCS.parent.glob("converters/**/*.py")]:
        for number, name in re.findall(r"docs/decisions/(\d+)([a-z0-9-]*(?:\.md)?)", path.read_text()):
            assert any(n.startswith(f"{number}-") for n in names) and (not name or number + name in names), path
