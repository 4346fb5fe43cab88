"""The dashboard's page: files for a browser, without a build step and without anything from elsewhere; and the same
page as one file."""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.resources
import re
from functools import cache
from pathlib import Path

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([a-z]+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class) (\w+))", re.MULTILINE)


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


def page_in_a_file(figures: bytes) -> str:
    """The page with its script, its style and `figures`, which recorded.js reads (JSON), in one file. It may ask
    nobody for anything: its own policy says so."""
    page, style, script = _text("index.html"), _text("style.css"), _one_script()
    icon = base64.b64encode(_text("icon.svg").encode()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{_digest(script)}'; style-src 'sha256-{_digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    packed = base64.b64encode(gzip.compress(figures, 6, mtime=0)).decode()
    charset = '<meta charset="utf-8">'
    parts = {
        charset: f'{charset}\n<meta http-equiv="Content-Security-Policy" content="{policy}">',
        'href="static/icon.svg"': f'href="data:image/svg+xml;base64,{icon}"',
        '<link rel="stylesheet" href="static/style.css">': f"<style>{style}</style>",
        '<script type="module" src="static/main.js"></script>': "",
        "</body>": f'<script type="text/plain" id="recorded">{packed}</script>\n'
        f'<script type="module">{script}</script>\n</body>',
    }
    for old, new in parts.items():
        assert page.count(old) == 1, old
        page = page.replace(old, new)
    return page


def _one_script() -> str:
    """All modules as one: each a function that gives what it exports, those that it imports before it."""
    done: dict[str, str] = {}

    def take(name: str) -> None:
        source = _text(f"{name}.js")
        for _, needed in _IMPORT.findall(source):
            if needed not in done:
                take(needed)
        source = _IMPORT.sub(r"const {\1} = \2_js;\n", source)
        names = ", ".join(_EXPORT.findall(source))
        source = _EXPORT.sub("", source)
        assert not re.search(r"^(import|export) ", source, re.MULTILINE), name
        done[name] = f"const {name}_js = (() => {{\n{source}return {{ {names} }};\n}})();\n"

    take("main")
    script = "".join(done.values())
    assert "</script" not in script
    return script


def _text(name: str) -> str:
    return page_files()[name][1].decode()


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
