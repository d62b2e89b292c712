"""How `make docs` makes a site of these pages, which are written for a reader of the repository too.

* the navigation is the lists of README.md, under their headings;
* links to what lies outside docs/ lead to a copy of it;
* the API reference has a page for each group of public names, where `diffpeft._HOMES` says they are defined;
* equations in ```math fences become MathML, which browsers draw without a script;
* lists and tables may follow a paragraph at once, as on GitHub;
* a paragraph that begins with bold words gets them as a heading, so that it is in the page's table of contents.
"""

from __future__ import annotations

import inspect
import posixpath
import re
import sys
from html import escape
from pathlib import Path

from latex2mathml.converter import convert as mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import diffpeft

ROOT = Path(__file__).parent.parent
INDEX = ROOT / "docs" / "README.md"
BOLD = re.compile(r"\*\*([^*]+)\.\*\*,? ")
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^\s*(```|~~~)")
ITEM = re.compile(r"^\s*([*-]|\d+\.) ")
# the first part of a home's name that is in a row, by rows: where a public name is described
API = {
    "pipelines": ("Pipelines", "diffpeft.pipeline", "Load, mix, save and unload adapters of a diffusers pipeline."),
    "diffusers": (
        "Taking over a pipeline",
        "diffpeft.takeover",
        "diffusers' own methods of adapters, done by diffpeft.",
    ),
    "models": ("Models", "diffpeft.model", "Attach, fuse and combine adapters on any `torch.nn.Module`."),
    "training": ("Training", "diffpeft.train", "What the command `diffpeft train` does, from Python."),
    "tools": ("Tools on files", "diffpeft.tools", "What the commands on adapter files do, from Python."),
    "configs": ("Configs", "diffpeft.llm.config", "One for each method, with PEFT's names and defaults."),
    "language-models": ("Language models", "diffpeft.llm", "PEFT's names."),
    "bundles": ("Adapters between file and model", "diffpeft.bundle", "What every file becomes."),
    "errors": (
        "Errors and warnings",
        "diffpeft.errors",
        "All errors are `DiffpeftError`s, and what Python calls them.",
    ),
    "other": ("Other names", "diffpeft", "The rest."),
}
MODULES = {"train": "training", "schedule": "schedules"}  # public modules whose page is called otherwise


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Equations, and the navigation."""
    config.mdx_configs["pymdownx.superfences"] = {
        "custom_fences": [{"name": "math", "class": "math", "format": equation}]
    }
    config.nav = [*navigation(INDEX.read_text()), {"API": [{"Overview": "api/index.md"}, *api_navigation()]}]
    return config


def equation(source: str, language: str, css_class: str, options: object, md: object, **kwargs: object) -> str:
    """A ```math fence as MathML, with what was typed as its text for who cannot see it."""
    rows = "".join(mathml(line, display="block") for line in source.strip().split("\\\\\n"))
    return f'<div class="math" role="math" aria-label="{escape(source.strip(), quote=True)}">{rows}</div>'


def navigation(index: str) -> list[dict[str, list[dict[str, str] | str]]]:
    """README.md's headings, each with the pages that its list names; a page that is called by a number there has its own title."""
    sections: list[dict[str, list[dict[str, str] | str]]] = []
    for line in index.splitlines():
        if heading := re.fullmatch(r"## (.+)", line):
            sections.append({heading[1]: [] if sections else [{"All pages": "README.md"}]})
        elif entry := re.match(r"\* \[(.+?)\]\((.+?)\):", line):
            (pages,) = sections[-1].values()
            pages.append(inside(entry[2]) if entry[1].isdigit() else {entry[1]: inside(entry[2])})
    return sections


def inside(link: str) -> str:
    """Where on the site something is that docs/README.md links to: `../CONTRIBUTING.md` is at project/CONTRIBUTING.md."""
    return f"project/{link.removeprefix('../')}" if link.startswith("../") else link


# -- API ---------------------------------------------------------------------------------------------------------------


def group(home: str) -> str:
    """The row of API that describes names of this home."""
    return next((name for name, (_, start, _) in API.items() if home == start or home.startswith(f"{start}.")), "other")


def api_pages() -> dict[str, str]:
    """Page by file name: a heading and a directive of mkdocstrings for each public name; and one for each public module."""
    homes: dict[str, dict[str, str]] = {}
    for name, home in sorted(diffpeft._HOME.items(), key=lambda item: item[0].lower()):
        homes.setdefault(group(home), {})[name] = defined(home, name)
    pages = {}
    for key, (title, _, sentence) in API.items():
        if key in homes:
            names = "".join(described(name, path) for name, path in homes[key].items())
            pages[key] = f"# {title}\n\n{sentence} All of these are attributes of `diffpeft`.\n\n{names}"
    for name, module in diffpeft._MODULES.items():
        key = MODULES.get(name, name)
        options = "    options:\n      members: true\n      show_root_heading: true\n"
        pages[key] = pages.get(key, f"# {key.capitalize()}\n\n") + f"::: {module}\n{options}\n"
    return pages


def defined(home: str, name: str) -> str:
    """The full name where something is defined, for a home may hand on what it imports."""
    value = getattr(diffpeft, name)
    module = getattr(value, "__module__", None) or home
    return f"{module if module.startswith('diffpeft') else home}.{name}"


def described(name: str, path: str) -> str:
    """A directive of mkdocstrings, which reads source files; of what these make while they are imported, what it says itself."""
    if is_written(name, path):
        return f"::: {path}\n\n"
    return f"## {name}\n\n{inspect.getdoc(getattr(diffpeft, name)) or ''}\n\n"


def is_written(name: str, path: str) -> bool:
    """Whether a name stands in the source file of its module as a class, a function or a variable."""
    source = Path(sys.modules[path.rpartition(".")[0]].__file__ or "").read_text()
    return bool(re.search(rf"^(?:class|(?:async )?def) {name}\b|^{name}\b.*=", source, re.M))


def api_navigation() -> list[dict[str, str]]:
    return [{API[key][0] if key in API else key.capitalize(): f"api/{key}.md"} for key in api_pages()]


def api_index() -> str:
    """A line for each public name, which leads to it."""
    lines = [
        "# API\n\nThe public names of `diffpeft`, which are imported on first use: `import diffpeft` loads no torch.\n"
    ]
    for name, home in sorted(diffpeft._HOME.items(), key=lambda item: item[0].lower()):
        sentence = (getattr(diffpeft, name).__doc__ or "").strip().split("\n")[0]
        path = defined(home, name)
        target = f"[{path}]" if is_written(name, path) else f"({group(home)}.md#{name.lower()})"
        lines.append(f"* [`{name}`]{target}{': ' + sentence if sentence else ''}")
    return "\n".join(lines)


# -- files -------------------------------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The API's pages, and copies of what the pages link to outside docs/."""
    for key, text in {**api_pages(), "index": api_index()}.items():
        files.append(File.generated(config, f"api/{key}.md", content=text))
    todo = {page.src_uri: page.content_string for page in files.documentation_pages()}
    while todo:
        uri, text = todo.popitem()
        for match in LINK.finditer(text):
            path = outside(uri, match[2])
            if path is None or files.get_file_from_path(f"project/{path}"):
                continue
            if not (ROOT / path).is_file():
                raise PluginError(f"{uri}: the link {match[2]} leads to no file")
            files.append(File.generated(config, f"project/{path}", abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                todo[f"project/{path}"] = (ROOT / path).read_text()
    return files


def outside(uri: str, link: str) -> str | None:
    """The path from the repository's top of what a page links to, if it lies outside docs/."""
    source = uri.removeprefix("project/") if uri.startswith("project/") else f"docs/{uri}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return None if path.startswith("docs/") else path


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to the copies, and blank lines where Python's Markdown wants them."""
    uri = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        path = outside(uri, match[2])
        target = f"project/{path}" if path else posixpath.normpath(posixpath.join(posixpath.dirname(uri), match[2]))
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(uri) or '.')}{match[3] or ''}{match[4]}"

    if uri.startswith("project/"):
        markdown = re.sub(r"(\]\()(?!\w+:|#|\.\./)([^)\s#]+)", lambda m: m[1] + from_project(uri, m[2]), markdown)
    return spaced(headed(LINK.sub(moved, markdown)))


def headed(markdown: str) -> str:
    """A heading for each paragraph that begins with bold words, one below the heading that it is under."""
    lines, fenced, level, before = [], False, 1, ""
    for line in markdown.splitlines():
        fenced ^= bool(FENCE.match(line))
        if not fenced and (heading := re.match(r"(#+) ", line)):
            level = len(heading[1])
        bold = None if fenced or before.strip() else BOLD.match(line)
        lines += [f"{'#' * (level + 1)} {bold[1]}", "", sentence(line[bold.end() :])] if bold else [line]
        before = line
    return "\n".join(lines)


def sentence(text: str) -> str:
    """With a capital, unless it begins with code."""
    return text[:1].upper() + text[1:]


def from_project(uri: str, link: str) -> str:
    """A link of a copied page, whose file lies at the top of the repository: into docs/, or beside it."""
    depth = "../" * uri.count("/")
    return depth + link.removeprefix("docs/") if link.startswith("docs/") else link


def spaced(markdown: str) -> str:
    """A blank line before each list and table that follows a paragraph at once."""
    lines, fenced, before = [], False, ""
    for line in markdown.splitlines():
        if FENCE.match(line):
            fenced = not fenced
        starts = (ITEM.match(line) and not ITEM.match(before) and not before.startswith(" ")) or (
            line.startswith("|") and not before.startswith("|")
        )
        if starts and before.strip() and not fenced:
            lines.append("")
        lines.append(line)
        before = line
    return "\n".join(lines) + "\n"


def on_post_build(config: MkDocsConfig) -> None:
    """Nothing is fetched from elsewhere: a page that would is named."""
    fetched = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^\"'> ]+")
    faults = []
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        tags = [tag for tag in fetched.findall(path.read_text()) if 'rel="canonical"' not in tag]
        faults += [f"{path.name}: {tag}" for tag in tags]
    styles = re.compile(r"(?:@import\s+|url\()[\"']?(?:https?:)?//[^\"')]+")
    for path in sorted(Path(config.site_dir).rglob("*.css")):
        faults += [f"{path.name}: {rule}" for rule in styles.findall(path.read_text())]
    if faults:
        raise PluginError("these are fetched from elsewhere:\n" + "\n".join(faults))
