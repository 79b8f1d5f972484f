"""Reads a report the way a browser would: tables, ids, references, nesting."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "br", "hr", "img", "input"}
CLOSED_BY_NEXT = {
    "td": {"td", "th", "tr", "tbody", "tfoot", "table"},
    "th": {"td", "th", "tr", "tbody", "tfoot", "table"},
    "tr": {"tr", "tbody", "tfoot", "table"},
    "thead": {"tbody", "tfoot", "table"},
    "tbody": {"tbody", "tfoot", "table"},
    "tfoot": {"table"},
}
"""Elements whose end tag HTML lets out: what ends them."""


@dataclass
class Page(HTMLParser):
    """A parsed page.

    `tables[id]` is a list of rows of text (head first); `problems` are tags that do not nest.
    """

    text: str
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.table: list[list[str]] | None = None
        self.feed(self.text)
        self.close()
        self.problems += [f"<{tag}> never ends" for tag in self.open]

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    @property
    def prose(self) -> str:
        return " ".join(" ".join(self.words).split())

    def column(self, table: str, name: str) -> list[str]:
        head, *rows = self.tables[table]
        at = head.index(name)
        return [row[at] for row in rows]

    def _end(self, tag: str) -> None:
        while self.open and self.open[-1] in CLOSED_BY_NEXT and tag in CLOSED_BY_NEXT[self.open[-1]]:
            self.open.pop()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._end(tag)
        values = dict(attrs)
        self.tags.append((tag, values))
        if values.get("id"):
            self.ids.append(str(values["id"]))
        for name in ("href", "clip-path", "xlink:href"):
            if values.get(name):
                self.references.append(str(values[name]))
        if tag == "table":
            self.table = self.tables.setdefault(str(values.get("id")), [])
        elif tag == "tr" and self.table is not None:
            self.table.append([])
        elif tag in ("td", "th") and self.table is not None:
            self.table[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        self._end(tag)
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> inside {self.open[-3:]}")
            return
        self.open.pop()
        if tag == "table":
            self.table = None

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th") and self.table:
            self.table[-1][-1] += data.strip()
        elif not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)
