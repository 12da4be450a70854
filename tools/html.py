"""Documents as HTML, a file each that needs no other: ``python -m tools.html build/html docs README.md``."""

from __future__ import annotations

import base64
import html
import os
import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}td,th{border:1px solid #ccc;padding:.2rem .5rem}"
    "pre{background:#f6f6f6;padding:.7rem;overflow-x:auto}code{font-size:.92em}"
)
KINDS = {".svg": "image/svg+xml", ".png": "image/png"}


def page(document: Path, target: Path) -> str:
    """Write a Markdown file as HTML: its pictures within it, headings with names, links to other documents to their HTML."""

    def picture(found: re.Match[str]) -> str:
        return f'<img src="{_data(document.parent / found[1])}"'

    def heading(found: re.Match[str]) -> str:
        return f'<{found[1]} id="{_anchor(found[2])}">{found[2]}</{found[1]}>'

    def link(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2] or ""
        if path.endswith(".md"):
            return f'<a href="{path.removesuffix(".md")}.html{anchor}"'
        return (
            f'<a href="{os.path.relpath(document.parent / path, target.parent)}{anchor}"'  # a file that is no document
        )

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(document.read_text(encoding="utf-8"))
    body = re.sub(r'<img src="([^":]+)"', picture, body)
    body = re.sub(r"<(h\d)>(.*?)</\1>", heading, body)
    body = re.sub(r'<a href="([^":#]+)(#[^"]*)?"', link, body)
    title = html.escape(document.stem)
    return f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>\n{body}</html>\n'


def _data(picture: Path) -> str:
    return f"data:{KINDS[picture.suffix]};base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _anchor(heading: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", html.unescape(re.sub(r"<[^>]+>", "", heading)).lower()).replace(" ", "-")


def main(arguments: list[str]) -> int:
    """Write the pages of Markdown files below this folder, and of those in folders, to the first folder."""
    out, *given = map(Path, arguments)
    for document in [path for one in given for path in (sorted(one.rglob("*.md")) if one.is_dir() else [one])]:
        target = out / document.resolve().relative_to(Path.cwd()).with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(document, target), encoding="utf-8")
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
