"""Where the links within a folder of HTML pages lead."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names |= {value for key, value in attrs if key in ("id", "name") and value}
        if tag in ("a", "link", "img", "script"):
            self.links += [value for key in ("href", "src") if (value := given.get(key))]
        elif tag == "meta" and given.get("http-equiv") == "refresh":
            self.links.append(str(given["content"]).partition("url=")[2])


def dead_links(pages: Path) -> list[str]:
    """Links of a folder's pages to files or headings that are not there, as ``page: link``."""
    read = {path.resolve(): _Page(path) for path in pages.rglob("*.html")}
    dead = []
    for path, page in read.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = read[target].names if target in read else {""} if target.exists() else set()
            if unquote(parts.fragment) not in known:
                dead.append(f"{path.relative_to(pages.resolve())}: {link}")
    return dead


def reached(first: Path) -> set[Path]:
    """The pages that a reader comes to from the first one."""
    found: set[Path] = set()
    left = [first.resolve()]
    while left:
        path = left.pop()
        if path in found or path.suffix != ".html":
            continue
        found.add(path)
        links = (urlsplit(link) for link in _Page(path).links)
        left += [(path.parent / unquote(one.path)).resolve() for one in links if one.path and not one.scheme]
    return found
