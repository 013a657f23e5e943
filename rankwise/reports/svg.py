"""A matplotlib figure as inline SVG that takes colours and letters from the page around it.

Matplotlib must be told a colour while drawing; the page knows only when it is shown whether it is light or dark.  So
every role is drawn in a colour that nothing else uses, and the finished file says `var(--role)` in its place.  Each
picture is drawn twice, wide and narrow, and the stylesheet shows the one that fits: scaling one down would leave
letters that nobody can read on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ROLES = ("ink", "muted", "line", "surface", "tuned", "train", "worse", "series-2", "series-3", "series-4")
_STAND_INS = {role: f"#fe{number:02x}ef" for number, role in enumerate(ROLES, start=1)}

WIDE, NARROW = (760, 300), (350, 260)
SMALL = (370, 170)
FONT_SIZE = 12

# One point of the figure is one unit of the view box, and one pixel on the page.
_POINTS_PER_INCH = 72

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rankwise",
    "font.family": "sans-serif",
    "font.size": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    "axes.edgecolor": _STAND_INS["line"],
    "axes.labelcolor": _STAND_INS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _STAND_INS["line"],
    "grid.linewidth": 0.8,
    "xtick.color": _STAND_INS["line"],
    "xtick.labelcolor": _STAND_INS["muted"],
    "ytick.left": False,
    "ytick.labelcolor": _STAND_INS["muted"],
    "text.color": _STAND_INS["ink"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.solid_joinstyle": "round",
    "figure.constrained_layout.use": True,
    "text.parse_math": False,
}

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_SHAPES = {"svg", "g", "defs", "clipPath", "path", "rect", "use", "text"}


def colour(role: str) -> str:
    """The stand-in to draw a role of the stylesheet with."""
    return _STAND_INS[role]


def picture(name: str, title: str, draw: Callable[[Any], None], *sizes: tuple[int, int]) -> Markup:
    """What `draw` puts on a figure's axes, in each size, as accessible inline SVG.

    Args:
        name: unique on the page; every id inside begins with it.
        title: what a person who cannot see the picture is told.
        draw: receives empty axes.
        sizes: width and height in pixels; the first is shown on wide screens, the last on narrow ones.
    """
    sizes = sizes or (WIDE, NARROW)
    shown = ("wide", "narrow") if len(sizes) > 1 else ("any",)
    return Markup("").join(
        Markup(_inline(f"{name}-{where}", title, where, _drawn(draw, size)))
        for where, size in zip(shown, sizes, strict=True)
    )


def _drawn(draw: Callable[[Any], None], size: tuple[int, int]) -> bytes:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(size[0] / _POINTS_PER_INCH, size[1] / _POINTS_PER_INCH))
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return file.getvalue()


def _inline(prefix: str, title: str, where: str, drawn: bytes) -> str:
    root = ElementTree.fromstring(drawn)
    used = set(re.findall(rb"#([\w-]+)", drawn))
    _tidy(root, prefix, {identity.decode() for identity in used})
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("class", f"plot {where}")
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}-title")
    named = ElementTree.Element("title", id=f"{prefix}-title")
    named.text = title
    root.insert(0, named)
    return _coloured(ElementTree.tostring(root, encoding="unicode"))


def _tidy(element: Any, prefix: str, used: set[str]) -> None:
    """Keeps shapes only; drops the ids that nothing refers to and makes the others the picture's own."""
    element.tag = element.tag.removeprefix(_SVG)
    for child in list(element):
        if child.tag.removeprefix(_SVG) in _SHAPES:
            _tidy(child, prefix, used)
        else:
            element.remove(child)
    identity = element.attrib.pop("id", None)
    if identity in used:
        element.set("id", f"{prefix}-{identity}")
    if link := element.attrib.pop(_LINK, None):
        element.set("href", f"#{prefix}-{link.removeprefix('#')}")
    for attribute in ("clip-path", "style"):
        if attribute in element.attrib:
            element.set(attribute, element.attrib[attribute].replace("url(#", f"url(#{prefix}-"))
    for attribute in ("d", "x", "y"):
        if attribute in element.attrib:
            element.set(attribute, _rounded(element.attrib[attribute]))
    element.tail = None
    if element.tag != "text":
        element.text = None
    else:
        # The page's own letters in place of the list of fonts; and no rotation by nothing.
        element.set("style", re.sub(r"font-family: [^;]*; ", "", element.attrib["style"]))
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]


def _rounded(numbers: str) -> str:
    """A tenth of a pixel is finer than anyone sees, and halves the page."""
    short = re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), numbers)
    return " ".join(short.split())


def _coloured(text: str) -> str:
    for role, stand_in in _STAND_INS.items():
        text = text.replace(stand_in, f"var(--{role})")
    return text
