"""What mkdocs calls: pages made from source, and pages from outside docs/, join the site."""

from typing import Any

from error_reference import error_reference
from grpc_reference import grpc_reference
from http_reference import http_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from repo_pages import PAGES, ROOT, decisions_page, for_site, linked_files, site_path
from settings_reference import command_reference, spec_reference

_MADE = {
    "decisions/index.md": decisions_page,
    "reference/commands.md": command_reference,
    "reference/spec.md": spec_reference,
    "reference/http.md": http_reference,
    "reference/grpc.md": grpc_reference,
    "reference/errors.md": error_reference,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in docs/: pages made from source, pages beside code, and linked files."""
    for path, make in _MADE.items():
        files.append(File.generated(config, path, content=make()))
    texts = {
        f"docs/{file.src_uri}": file.content_string
        for file in files.documentation_pages()
        if file.generated_by is None
    }
    for path in PAGES:
        texts[path] = (ROOT / path).read_text()
        files.append(File.generated(config, site_path(path), content=for_site(path, texts[path])))
    for path in sorted(linked_files(texts)):
        file = File.generated(config, site_path(path), abs_src_path=str(ROOT / path))
        files.append(file)
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn the links of a page of docs/ to where they lead on the site."""
    if page.file.generated_by is not None:
        return markdown
    return for_site(f"docs/{page.file.src_uri}", markdown)
