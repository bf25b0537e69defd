"""Makes CHANGELOG.md a page of the site: it is above docs/, where one looks for it in a repository.

MkDocs calls this, as mkdocs.yml says.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page, with links that lead from there."""
    text = (Path(config.config_file_path).parent / "CHANGELOG.md").read_text()
    page = File.generated(config, "changelog.md", content=text.replace("](docs/", "]("))
    files.append(page)
    return files
