"""The console's files as they are served, and what they may not hold."""

import re

import pytest

from baton.api.console.route import STATIC

FILES = sorted(path.name for path in STATIC.iterdir())
MOST_BYTES = 60_000
CONTRAST = 4.5
"""Of text, by WCAG 2.2 AA."""
PAIRS = [
    *[(text, ground) for text in ("text", "dim", "accent") for ground in ("bg", "card", "hover")],
    ("accent", "chosen"),
    ("on-accent", "accent"),
    ("good", "good-bg"),
    ("warn", "warn-bg"),
    ("bad", "bad-bg"),
    ("bad", "card"),
]


@pytest.mark.parametrize("name", FILES)
async def test_every_file_is_served_and_kept_to_itself(http, name):
    answer = await http.get(f"/console/{name}")
    assert answer.status_code == 200
    assert answer.content == (STATIC / name).read_bytes()
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = await http.get(f"/console/{name}", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_the_page_is_at_console_with_and_without_a_slash(http):
    moved = await http.get("/console")
    assert moved.is_redirect
    page = await http.get(str(moved.next_request.url))
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.content == (STATIC / "index.html").read_bytes()


@pytest.mark.parametrize("path", ["route.py", "..%2froute.py", "static", "a/b", "%2e%2e/route.py"])
async def test_nothing_else_is_served(http, path):
    assert (await http.get(f"/console/{path}")).status_code == 404


def test_it_is_small_and_names_nothing_elsewhere():
    texts = [(STATIC / name).read_text() for name in FILES]
    assert sum(len(text.encode()) for text in texts) < MOST_BYTES
    for text in texts:
        urls = set(re.findall(r"https?://[^\s\"']+", text))
        assert urls <= {"http://www.w3.org/2000/svg"}, "that is a name and is not fetched"
        assert not re.search(r"innerHTML\s*=(?!=)|insertAdjacent|document\.write|eval\(", text)


def test_colours_have_enough_contrast_in_both_themes():
    style = (STATIC / "style.css").read_text()
    light, dark, chosen_dark = re.findall(r":root[^{]*\{(\s*color-scheme[^}]*)\}", style)
    assert dark.split() == chosen_dark.split(), "dark by the system and by the button are the same"
    for theme in (light, dark):
        colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+);", theme))
        for one, other in PAIRS:
            found = contrast(colours[one], colours[other])
            assert found >= CONTRAST, f"{one} on {other}: {found:.2f}"


def contrast(one: str, other: str) -> float:
    """Return WCAG's contrast ratio of two colours."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
