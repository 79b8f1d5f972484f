"""Matplotlib figures as inline SVG that follow the page's colours, light or dark.

A picture is drawn with the light colours of `ROLES`; afterwards each colour is replaced by the CSS variable of
its role, so that the page decides what it looks like. Text stays text (the browser's font, searchable, sharp).
What matplotlib adds for stand-alone files is taken out: doctype, metadata, name spaces, the style sheet that
would leak into the page, and ids, which are kept only where something refers to them and then made unique to
the picture. The result refers to nothing outside itself.

A picture that cannot follow by colour alone, like the pixels of a heat map, is drawn twice, with artists whose
gid starts with `ONLY_LIGHT` or `ONLY_DARK`; the page's style sheet shows one of them.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

ROLES: dict[str, tuple[str, str]] = {
    "surface": ("#fcfcfb", "#1a1a19"),
    "page": ("#f4f4f1", "#0d0d0d"),
    "ink": ("#0b0b0b", "#ffffff"),
    "ink-2": ("#52514e", "#c3c2b7"),
    "muted": ("#858379", "#8f8d83"),
    "grid": ("#e3e2db", "#2e2e2b"),
    "axis": ("#c1c0b5", "#4a4a46"),
    "before": ("#e0622c", "#e5763f"),
    "after": ("#2a78d6", "#4a95ec"),
    "original": ("#7b8794", "#8d98a5"),
    "int8": ("#1a9c70", "#22a97b"),
    "int8_weight_only": ("#0f7a55", "#5fd0a8"),
    "float16": ("#5b4bc4", "#978cf0"),
    "replicated": ("#2a78d5", "#4a95ec"),
    "quantized": ("#1a9c71", "#22a97b"),
    "both": ("#5b4bc5", "#978cf0"),
}
"""Role -> (light, dark). The light colours must differ from each other: they are how a role is found again."""

LIGHT = {role: light for role, (light, _) in ROLES.items()}
ONLY_LIGHT, ONLY_DARK = "only-light", "only-dark"

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a domain may be called "$5"
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": LIGHT["ink"],
    "axes.labelsize": 8.5,
    "axes.labelcolor": LIGHT["ink-2"],
    "axes.edgecolor": LIGHT["axis"],
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["axis"],
    "ytick.color": LIGHT["axis"],
    "xtick.labelcolor": LIGHT["ink-2"],
    "ytick.labelcolor": LIGHT["ink-2"],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": LIGHT["ink-2"],
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}

_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_REFERENCE = re.compile(r"#([\w.:-]+)")


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib settings of the report for as long as the block runs."""
    with mpl.rc_context(_RC), warnings.catch_warnings():
        # The browser draws the text with its own fonts; what DejaVu lacks matters to no one.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def inline(figure: Figure, key: str, label: str) -> str:
    """The figure as an `<svg>` element.

    Args:
        figure: drawn inside `style()`, with the colours of `LIGHT`.
        key: prefix of its ids, unique in the page.
        label: what a screen reader says.
    """
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    _clean(root, key)
    width = root.get("width", "").removesuffix("pt")
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    root.set("style", f"max-width:{float(width) * 1.5:.0f}px")
    return _roles(ElementTree.tostring(root, encoding="unicode"))


def _clean(root: ElementTree.Element, key: str) -> None:
    """Drop what only a stand-alone file needs, in place."""
    used: set[str] = set()
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        for name in ("href", "clip-path"):
            value = element.get(name, "")
            if not value.startswith("data:"):
                used.update(_REFERENCE.findall(value))
    for parent in root.iter():
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        _clean_attributes(element, key, used)
        if element.tag != "text":
            element.text = None
        element.tail = None
        _share_style(element)


def _share_style(group: ElementTree.Element) -> None:
    """Give the style that all marks of a series have to the series: thousands of marks, one style."""
    styles = {child.get("style") for child in group}
    if len(group) > 1 and {child.tag for child in group} == {"use"} and len(styles) == 1:
        group.set("style", str(styles.pop()))
        for child in group:
            del child.attrib["style"]


def _clean_attributes(element: ElementTree.Element, key: str, used: set[str]) -> None:
    name = element.attrib.pop("id", "")
    if name in used:
        element.set("id", f"{key}-{name}")
    for only in (ONLY_LIGHT, ONLY_DARK):
        if name.startswith(only):
            element.set("class", only)
    for attribute, value in list(element.attrib.items()):
        if attribute in ("href", "clip-path"):
            if value.startswith("data:"):
                element.set(attribute, "".join(value.split()))
            else:
                element.set(attribute, _REFERENCE.sub(rf"#{key}-\1", value))
        elif attribute in ("d", "x", "y"):
            # A hundredth of a point is finer than any screen; a transform keeps its digits, it is multiplied.
            rounded = _NUMBER.sub(lambda found: f"{float(found[0]):.2f}", value)
            element.set(attribute, " ".join(rounded.split()))
        elif attribute == "transform" and value.startswith("rotate(-0 "):
            del element.attrib[attribute]  # no rotation, in many bytes
        elif attribute == "style" and element.tag == "text":
            element.set(attribute, re.sub(r"font-family: [^;]*;? ?", "", value))


def _roles(svg: str) -> str:
    for role, (light, _) in ROLES.items():
        svg = re.sub(re.escape(light) + r"\b", f"var(--{role})", svg, flags=re.IGNORECASE)
    return svg


def printable(text: str, longest: int = 28) -> str:
    """Text fit for an SVG label: no control characters (XML has no way to say them), not too long."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return clean if len(clean) <= longest else clean[: longest - 1] + "…"
