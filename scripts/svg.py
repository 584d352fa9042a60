"""A few elements of SVG as text, in colours that can be read on white and on black."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

INK, FAINT, BLUE, ORANGE = "#7a828e", "#9aa2ad", "#3b82f6", "#d97706"


def document(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """The file: a transparent picture; the title is what a screen reader says."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}" role="img">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>\n"])


def text(x: float, y: float, words: str, **style: str | int) -> str:
    """Words with their base line at y; anchor="middle" or "end" says which part of them is at x."""
    anchor = style.pop("anchor", "start")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{_attributes(style)}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, color: str = INK, **style: str | float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{_attributes(style)}/>'


def arrow(x1: float, y1: float, x2: float, y2: float, color: str = INK) -> str:
    """A vertical or horizontal line with a head at its second end."""
    length = abs(x2 - x1) + abs(y2 - y1)
    dx, dy = (x2 - x1) / length * 6, (y2 - y1) / length * 6
    head = [(x2, y2), (x2 - dx - dy / 2, y2 - dy - dx / 2), (x2 - dx + dy / 2, y2 - dy + dx / 2)]
    return line(x1, y1, x2 - dx, y2 - dy, color) + area(head, color)


def area(points: Sequence[tuple[float, float]], color: str, opacity: float = 1) -> str:
    """A filled polygon."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polygon points="{path}" fill="{color}" fill-opacity="{opacity:g}"/>'


def box(
    x: float, y: float, width: float, height: float, words: str, color: str = INK, *, is_faint: bool = False
) -> str:
    """A rounded box with words in its middle; a faint one is of a value that is not used."""
    dashes = ' stroke-dasharray="3 3"' if is_faint else ""
    frame = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4" fill="{color}" '
        f'fill-opacity="{0 if is_faint else 0.15}" stroke="{color}"{dashes}/>'
    )
    return frame + text(x + width / 2, y + height / 2 + 4, words, anchor="middle", fill=FAINT if is_faint else color)


def _attributes(style: dict[str, str | int] | dict[str, str | float]) -> str:
    return "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
