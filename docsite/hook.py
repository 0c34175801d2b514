"""What MkDocs does beside turning docs/ into pages: the repository's own documents, links, and the reference.

- Documents that lie elsewhere in the repository become pages (``DOCUMENTS``), where they stand: nothing is copied.
- Links to files of the repository lead to their pages, or, if they have none, to the repository. So every Markdown file
  is written with links that work on a code host.
- ``<!-- reference: NAME -->`` in a page is where :mod:`reference` puts what it makes from the code.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

import reference
from markdown_text import outside_code

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent

DOCUMENTS = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "deploy/README.md": "deploy.md",
}
"""Of the repository, and the page that each becomes."""

_PAGES = {"README.md": "index.md", "docs": "index.md", "README.md#numbers": "benchmarks.md", **DOCUMENTS}
"""Where links to these lead."""

_MARK = re.compile(r"^<!-- reference: ([\w-]+) -->$", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's documents."""
    from mkdocs.structure.files import File

    for document, page in DOCUMENTS.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / document)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the reference, and lead links to where their files are on the site."""
    uri = page.file.src_uri
    document = next((name for name, own in DOCUMENTS.items() if own == uri), f"docs/{uri}")
    if uri == "benchmarks.md":
        markdown += "\n" + _section((ROOT / "README.md").read_text(), "## Numbers")
    markdown = linked(markdown, document, uri, str(config.extra["source"]), {file.src_uri for file in files})
    made = '<div class="reference" markdown>\n\n{}\n\n</div>'
    return _MARK.sub(lambda mark: made.format(reference.PARTS[mark[1]]()), markdown)


def on_page_content(html: str, **_: object) -> str:
    """Leave out what says in docstrings of what kind a name is (`:func:`)."""
    return re.sub(r":(?:func|class|meth|mod):(?=<code>)", "", html)


def linked(markdown: str, document: str, uri: str, source: str, pages: set[str]) -> str:
    """Markdown whose relative links lead to pages of the site, or to the repository.

    Args:
        document: the file that it is from, in the repository.
        uri: of its page, in the site's own directory.
        source: address of the repository.
        pages: of the site.
    """
    here = posixpath.dirname(uri)

    def lead(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        if re.match(r"[\w+.-]+:", target):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(document), target))
        page = _PAGES.get(path + anchor) or _PAGES.get(path, path.removeprefix("docs/"))
        if page in pages and (path in _PAGES or path.startswith("docs/")):
            return posixpath.relpath(page, here or ".") + anchor
        if path.startswith("..") or not (ROOT / path).exists():
            return link[0]  # which MkDocs complains of
        return f"{source}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}{anchor}"

    return outside_code(markdown, lambda text: _LINK.sub(lead, text))


def _section(markdown: str, heading: str) -> str:
    """A section of second level, with its heading."""
    (section,) = re.findall(rf"^{re.escape(heading)}$.*?(?=^## |\Z)", markdown, re.MULTILINE | re.DOTALL)
    return str(section)
