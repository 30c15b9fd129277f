"""What makes a site of these pages, which are written for GitHub. mkdocs calls the functions by their names.

- CONTRIBUTING.md and CHANGELOG.md, which lie above this folder, become pages.
- Files outside this folder that a page links, sources and results, are copied into the site; folders become lists.
- A line ``<!-- docstring: flash_xlstm.ops.mlstm.mlstm -->`` is replaced by that docstring; "with members" behind the
  name adds those of the class's public members. ``docstrings`` takes all that a module has in ``__all__``.
- Links, anchors and pictures of the built pages are checked. External links are listed in external_links.txt.
"""

from __future__ import annotations

import ast
import logging
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.flash_xlstm")  # a warning below "mkdocs" fails a strict build

ROOT = Path(__file__).parents[1]
ABOVE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PICTURES_AND_DATA = (".png", ".svg", ".json")  # shown by browsers; other files get the suffix .txt
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
DOCSTRING = re.compile(r"^<!-- docstring: ([\w.]+)( with members)? -->$", re.M)
DOCSTRINGS = re.compile(r"^<!-- docstrings: ([\w.]+) -->$", re.M)
MEMBERS = "\n    options:\n      members:\n      show_if_no_docstring: false\n"


def repository_path(page: str) -> str:
    """Where a page of the site lies in the repository."""
    return next((above for above, uri in ABOVE.items() if uri == page), f"docs/{page}")


def target(page: str, link: str) -> str | None:
    """The path in the repository that a page's link leads to; None for external links and for anchors."""
    path = link.partition("#")[0]
    if "://" in link or not path:
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(page)), path))


def site_path(path: str) -> str:
    """Where a path of the repository lies among the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in ABOVE:
        return ABOVE[path]
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" if path.endswith(PICTURES_AND_DATA) else f"source/{path}.txt"


def listing(folder: str) -> str:
    """A page that lists a folder's files."""
    files = sorted(path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so"))
    lines = [f"- [{path.relative_to(ROOT / folder)}]({posixpath.relpath(path, ROOT / 'docs')})" for path in files]
    return "\n".join([f"---\nsearch: {{exclude: true}}\n---\n\n# {folder}\n", *lines, ""])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for above, uri in ABOVE.items():
        files.append(File.generated(config, uri, content=(ROOT / above).read_text(encoding="utf-8")))
    waiting = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while waiting:
        page, text = waiting.pop()
        for _, link, _ in LINK.findall(text):
            path = target(page, link)
            if path is None or path.startswith("docs/") or not (ROOT / path).exists():
                continue
            uri = site_path(path)
            if files.get_file_from_path(uri):
                continue
            if (ROOT / path).is_dir():
                files.append(File.generated(config, uri, content=listing(path)))
                waiting.append(("", listing(path)))
            else:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def _every(match: re.Match[str]) -> str:
    source = (ROOT / "python" / match[1].replace(".", "/")).with_suffix(".py").read_text()
    names = re.search(r"^__all__ = (\[.*?\])", source, re.M | re.S)
    assert names, match[0]
    return "\n\n".join(f"<!-- docstring: {match[1]}.{name} -->" for name in ast.literal_eval(names[1]))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    at = "" if uri.startswith("source/") else uri  # a listing's links are written as if it lay in docs

    def rewrite(match: re.Match[str]) -> str:
        path = target(at, match[2])
        if path is None:
            return match[0]
        _, hash_, anchor = match[2].partition("#")
        there = posixpath.relpath(site_path(path), posixpath.dirname(uri) or ".")
        return f"{match[1]}{there}{hash_}{anchor}{match[3]}"

    markdown = DOCSTRINGS.sub(_every, LINK.sub(rewrite, markdown))
    return DOCSTRING.sub(lambda match: f"\n::: {match[1]}{MEMBERS if match[2] else ''}\n", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings use the roles of reStructuredText, and its double colon in front of a formula."""
    html = re.sub(r":(?:func|class|mod|meth|attr):<code>", "<code>", html)
    return re.sub(r"::</p>", ":</p>", html)


class Built(HTMLParser):
    """Ids and links of a built page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name == "id":
                self.ids.add(value)
            if value and (name == "src" or (name == "href" and tag == "a")):
                self.links.add(value)


def on_post_build(config: MkDocsConfig) -> None:
    site = Path(config.site_dir)
    pages = {path: Built(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    external: set[str] = set()
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                external.add(link)
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not there.is_file():
                log.warning("%s links %s, which is not there", path.relative_to(site), link)
            elif parts.fragment and there in pages and unquote(parts.fragment) not in pages[there].ids:
                log.warning("%s links %s, an anchor that is not there", path.relative_to(site), link)
    (site / "external_links.txt").write_text("".join(f"{link}\n" for link in sorted(external)), encoding="utf-8")
    log.info("%d pages; %d external links, not fetched, in external_links.txt", len(pages), len(external))
