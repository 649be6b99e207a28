"""What the site takes from outside docs/: pages, files that pages link to, and where links lead.

Links are written so that they work in the repo. On the site a file of docs/ lies at the root, and
any other below `repo/`, at its path in the repo.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "bench/RESULTS.md",
    "demo_model/README.md",
    "deploy/helm/baton/README.md",
)
"""Pages that lie beside what they tell of."""
_DOCS = PurePosixPath("docs")
_LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
_DECISION = re.compile(r"(?<![\w/\[])(?:docs/decisions/|decision )(\d{4})(?!\d|-)")
_CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)


def site_path(repo_path: str) -> str:
    """Return where a file of the repo lies on the site."""
    path = PurePosixPath(repo_path)
    if path.is_relative_to(_DOCS):
        return str(path.relative_to(_DOCS))
    return f"repo/{path}"


def links(text: str) -> Iterator[tuple[str, str]]:
    """Yield target and anchor (with its #, or empty) of each link that stays in the repo."""
    for part in _CODE.split(text)[::2]:
        for found in _LINK.finditer(part):
            yield found[2], found[3] or ""


def target_of(page: str, link: str) -> str:
    """Return the path in the repo that a link on a page of the repo leads to."""
    return os.path.normpath(PurePosixPath(page).parent / link)


def for_site(page: str, text: str) -> str:
    """Return a page with links that lead right on the site; decisions that it names become links.

    `page` is its path in the repo.
    """
    here = PurePosixPath(site_path(page)).parent

    def to(repo_path: str) -> str:
        return os.path.relpath(site_path(repo_path), here)

    def moved(found: re.Match[str]) -> str:
        return f"{found[1]}{to(target_of(page, found[2]))}{found[3] or ''}{found[4]}"

    def decided(found: re.Match[str]) -> str:
        matches = sorted((ROOT / "docs" / "decisions").glob(f"{found[1]}-*.md"))
        if not matches:
            return found[0]
        return f"[decision {found[1]}]({to(f'docs/decisions/{matches[0].name}')})"

    moved_text = _outside_code(text, lambda part: _LINK.sub(moved, part))
    return _outside_code(moved_text, lambda part: _outside_links(part, decided))


def linked_files(pages: dict[str, str]) -> set[str]:
    """Return the files outside docs/, pages left out, that these pages (by path) link to."""
    found = {target_of(page, link) for page, text in pages.items() for link, _ in links(text)}
    return {
        path
        for path in found
        if (ROOT / path).is_file() and path not in PAGES and not path.startswith("docs/")
    }


def decisions_page() -> str:
    """Return the list of all decisions, in Markdown."""
    lines = ["# Decisions", "", "What the next reader would ask about, and why it is so.", ""]
    for path in sorted((ROOT / "docs" / "decisions").glob("*.md")):
        title = path.read_text().partition("\n")[0].lstrip("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) + "\n"


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    parts = _CODE.split(text)
    parts[::2] = [change(part) for part in parts[::2]]
    return "".join(parts)


def _outside_links(text: str, decided: Callable[[re.Match[str]], str]) -> str:
    parts = re.split(r"(\[[^\]\n]*\]\([^)\n]*\))", text)
    parts[::2] = [_DECISION.sub(decided, part) for part in parts[::2]]
    return "".join(parts)
