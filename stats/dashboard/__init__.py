"""The dashboard's page: files for a browser, without a build step and without anything from elsewhere."""

from __future__ import annotations

import importlib.resources
from functools import cache
from pathlib import Path

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@cache
def page_files() -> dict[str, tuple[str, bytes]]:
    """Media type and content of each file by its name; the page itself is index.html."""
    folder = importlib.resources.files(__package__) / "static"
    files = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        media_type = MEDIA_TYPES.get(Path(file.name).suffix)
        if media_type is not None:  # not what an editor leaves
            files[file.name] = (media_type, file.read_bytes())
    return files
