"""The site: links lead somewhere, pages made from source have all of it, and it builds strictly."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from baton.cli.main import app
from baton.cluster.spec import load_spec
from baton.core.cluster_spec import ClusterSpec
from baton.core.errors import all_errors
from baton.proto import inference_pb2 as pb
from tests.docs.console import ROOT

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench/RESULTS.md"]
)
MADE = ("reference/", "decisions/index.md", "repo/")
"""What joins the site when it is built."""


def known(page: Path) -> set[str]:
    """Return what a page's headings are called in links."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere(site) -> None:
    repo_pages, wrong = site("repo_pages"), []
    for page in PAGES:
        for link, anchor in repo_pages.links((ROOT / page).read_text()):
            target = ROOT / repo_pages.target_of(page, link)
            if not target.is_file():  # a folder is nothing that a site could show
                wrong.append(f"{page}: {link}")
            elif anchor and target.suffix == ".md" and anchor[1:] not in known(target):
                wrong.append(f"{page}: {link}{anchor}")
    assert not wrong, "\n".join(wrong)


def test_python_on_pages_is_python() -> None:
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            ast.parse(block, page)


def test_yaml_on_pages_is_yaml_and_the_spec_is_one(tmp_path: Path) -> None:
    found = {}
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            found.setdefault(page, []).append(block)
            yaml.safe_load(block)
    [spec] = found["docs/cluster.md"]
    (tmp_path / "cluster.yaml").write_text(spec)
    assert set(load_spec(tmp_path / "cluster.yaml").models[0].pools) == {"prefill", "decode"}


def test_every_page_is_in_the_menu() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/.-]+\.md", text.partition("\nnav:")[2]))
    own = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    lost = {page for page in own if not page.startswith("decisions/")} - listed
    assert not lost, f"mkdocs.yml: nav has no {', '.join(sorted(lost))}"
    assert all((ROOT / "docs" / page).exists() or page.startswith(MADE) for page in listed)
    assert yaml.safe_load(text)["theme"]["font"] is False


def test_links_are_turned_for_the_site(site) -> None:
    for_site = site("repo_pages").for_site
    assert for_site("docs/a.md", "[x](../bench/RESULTS.md#y) [z](b.md)") == (
        "[x](repo/bench/RESULTS.md#y) [z](b.md)"
    )
    assert for_site("CHANGELOG.md", "[x](docs/a.md)") == "[x](../a.md)"
    decided = for_site("docs/a.md", "See decision 0024; `decision 0024`; [decision 0024](b.md).")
    link = "[decision 0024](decisions/0024-identity-and-tls.md)"
    assert decided == f"See {link}; `decision 0024`; [decision 0024](b.md)."
    assert for_site("docs/a.md", "decision 9999") == "decision 9999"


def test_the_page_of_http_has_every_path_and_field(site) -> None:
    made = site("http_reference")
    page = made.http_reference()
    for part in ("`POST /v1/chat/completions`", "`GET /v1/requests/{request_id}`", "`logprobs`"):
        assert part in page
    assert "| `temperature` | number from 0 to 2 |" in page
    assert "| `prompt` (needed) |" in page
    assert made.allowed({"enum": [None]}) == "null"


def test_the_page_of_grpc_has_every_method_message_and_field(site) -> None:
    page = site("grpc_reference").grpc_reference()
    [service] = pb.DESCRIPTOR.services_by_name.values()
    assert {f"### `{m.name}`" for m in service.methods} <= set(page.splitlines())
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        assert f"### `{message.name}`" in page
        assert all(f"| `{field.name}` | {field.number} |" in page for field in message.fields)
    assert "Within baton.v1 nothing is removed" in page
    assert "| `stop` | 9 | repeated string |" in page


def test_the_pages_of_commands_and_settings_have_all_of_them(site) -> None:
    made = site("settings_reference")
    commands, spec = made.command_reference(), made.spec_reference()
    named = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert all(f"## `baton {name.replace('_', '-')}`" in commands for name in named)
    assert "## `baton keys new`" in commands
    assert str(ROOT) not in commands
    assert all(f"| `{name}` |" in spec for name in ClusterSpec.model_fields)
    assert "## AutoscaleConfig" in spec
    assert "| `block_size` | `8`, `16`, `32` | `16` | Tokens per KV block. |" in spec


def test_the_page_of_errors_has_all_of_them(site) -> None:
    page = site("error_reference").error_reference()
    assert all(f"| `{code}` |" in page for code in all_errors())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_it_builds_strictly_and_takes_nothing_from_the_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in tmp_path.rglob("*.html"):
        text = path.read_text()
        assert not re.search(r"(?:src|srcset)=\"https?://", text), path
        assert not re.search(r"<link[^>]+href=\"https?://", text), path
    assert (tmp_path / "repo" / "deploy" / "ray" / "onprem.yaml").is_file()
