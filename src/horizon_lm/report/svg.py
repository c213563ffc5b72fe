"""Self-contained SVG: themes, colours, escaped text, and the frame of a drawing.

A drawing is 900 units wide. It uses no scripts, links or fonts from elsewhere. Below 560 pixels its text
grows and its details hide; the mark (SIMULATED and so on) moves below the title. With theme `auto` it follows
the reader's colour scheme.

The colours start from those of Okabe and Ito (Color Universal Design, 2008); a test simulates three kinds of
colour blindness and compares all that may lie next to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from horizon_lm.text import one_line, redact

THEMES = ("auto", "light", "dark")
WIDTH = 900.0
MARGIN = 24.0
FONT = "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"

# Role -> colour on a light and on a dark page.
_PAGE = {
    "page": ("#ffffff", "#0d1117"),
    "edge": ("#d8dee4", "#30363d"),
    "track": ("#f3f5f7", "#171d25"),
    "grid": ("#e4e8ec", "#252c35"),
    "text": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#9da7b1"),
}
# Colour class -> fill on a light and on a dark page. Those of ops are named after their kinds.
FILLS = {
    "U": ("#4fa8cf", "#5db4da"),
    "J": ("#c0679a", "#d684b1"),
    "Q": ("#d5c990", "#ebdfa2"),
    "F": ("#2767a8", "#468bd2"),
    "X": ("#9fa659", "#b3ba6c"),
    "L": ("#75386a", "#9b4f88"),
    "E": ("#75386a", "#9b4f88"),
    "R": ("#1f5d73", "#2f7288"),
    "C": ("#a5cdf0", "#b5d8f6"),
    "B": ("#e07b26", "#ee9140"),
    "T": ("#83365f", "#93456f"),
    "V": ("#eab8d4", "#f2c9df"),
    "P": ("#c1765c", "#9b533b"),
    "S": ("#9ad9c1", "#a9e3cd"),
    "G": ("#a9dff0", "#b9e8f6"),
    "D": ("#e3b92f", "#ecc94f"),
    "N": ("#0c4636", "#17604b"),
    "O": ("#27966f", "#33ab82"),
    "A": ("#27966f", "#33ab82"),
    "W": ("#7d8792", "#8d97a2"),
    "free": ("#f3f5f7", "#171d25"),
}
_DARK_TEXT, _LIGHT_TEXT = "#14181d", "#ffffff"
# Class -> size in units, on a wide and on a narrow page, and more declarations.
_TEXTS = {
    "title": (18.0, 23.0, "font-weight:600"),
    "line": (13.0, 18.0, ""),
    "row": (13.5, 17.0, ""),
    "big": (15.0, 19.0, "font-weight:600"),
    "small": (11.5, 15.0, ""),
    "tick": (12.0, 17.0, ""),
    "key": (13.0, 14.0, ""),
    "in": (11.0, 11.0, ""),
    "pill": (11.5, 11.5, "font-weight:600;letter-spacing:.06em"),
    "mark": (13.0, 18.0, "font-weight:600"),
}
_NARROW = 560  # pixels
_SLIM, _BROAD = frozenset("il.,:;'|!()[]tfjrI ·"), frozenset("mwMW@%—")


@dataclass(frozen=True)
class Caption:
    """Words above a drawing. lines: at most two are shown. mark: MEASURED, SIMULATED or PLANNED."""

    title: str
    lines: Sequence[str] = ()
    mark: str = ""


@dataclass
class Canvas:
    """Elements of a drawing, from back to front. fills: colour classes in use."""

    elements: list[str] = field(default_factory=list)
    fills: set[str] = field(default_factory=set)

    def rect(self, x: float, y: float, width: float, height: float, kind: str, radius: float = 0) -> None:
        """kind: a class of `FILLS`, or a role of the page."""
        self.fills.add(kind)
        rounded = f' rx="{num(radius)}"' if radius else ""
        self.elements.append(
            f'<rect class="{kind}" x="{num(x)}" y="{num(y)}" width="{num(width)}" '
            f'height="{num(height)}"{rounded}/>'
        )

    def text(self, x: float, y: float, words: str, kind: str, *, anchor: str = "", more: str = "") -> None:
        """kind: a class of `_TEXTS`; more: other classes; anchor: middle or end."""
        placed = f' text-anchor="{anchor}"' if anchor else ""
        classes = f"{kind} {more}".strip()
        self.elements.append(
            f'<text class="{classes}" x="{num(x)}" y="{num(y)}"{placed}>{safe(words)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        path = f"M{num(x1)} {num(y1)}L{num(x2)} {num(y2)}"
        self.elements.append(f'<path class="rule" d="{path}"/>')

    def raw(self, element: str, kind: str) -> None:
        """Add a finished element of class `kind`."""
        self.fills.add(kind)
        self.elements.append(element)


def draw_caption(canvas: Canvas, caption: Caption) -> float:
    """Draw title, lines and mark; return the height that they take."""
    pill, lines = 0.0, caption.lines[:2]
    last = 36.0 + 23 * len(lines)
    if caption.mark:
        pill = text_width(caption.mark, 11.5) * 1.12 + 22
        x = WIDTH - MARGIN - pill
        canvas.elements.append(
            f'<rect class="pill-edge wide" x="{num(x)}" y="19" width="{num(pill)}" height="22" rx="11"/>'
        )
        canvas.text(x + pill / 2, 34, caption.mark, "pill", anchor="middle", more="soft wide")
        canvas.text(WIDTH - MARGIN, last, caption.mark, "mark", anchor="end", more="soft narrow")
    canvas.text(MARGIN, 36, clipped(caption.title, 18, WIDTH - 2 * MARGIN - pill - 16), "title")
    y = 36.0
    for words in lines:
        y += 23
        room = WIDTH - 2 * MARGIN - (1.6 * pill if y == last else 0)  # 1.6: the narrow page's larger letters
        canvas.text(MARGIN, y, clipped(words, 17, room), "line", more="soft")
    return y + 20


def draw_legend(canvas: Canvas, y: float, entries: Iterable[tuple[str, str]]) -> float:
    """Draw (colour class, words) in rows from `y` down; return the y below them."""
    x = MARGIN
    for kind, words in entries:
        width = 20 + text_width(words, 15)
        if x > MARGIN and x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + 26
        canvas.rect(x, y, 13, 13, kind, 3)
        canvas.text(x + 19, y + 11, words, "key")
        x += width + 12
    return y + 26


def document(canvas: Canvas, height: float, caption: Caption, description: str, theme: str) -> str:
    """Return the SVG. description: the drawing in words, for readers who do not see it.

    Raises ValueError for a theme that is not in THEMES.
    """
    title = ", ".join([caption.title, *([caption.mark.lower()] if caption.mark else [])])
    size = f"{num(WIDTH)} {num(height)}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{num(WIDTH)}" '
            f'height="{num(height)}" role="img" aria-labelledby="t d">',
            f'<title id="t">{safe(title)}</title>',
            f'<desc id="d">{safe(description)}</desc>',
            f"<style>{_style(theme, canvas.fills)}</style>",
            f'<rect class="frame" x=".5" y=".5" width="{num(WIDTH - 1)}" height="{num(height - 1)}" '
            'rx="10"/>',
            *canvas.elements,
            "</svg>\n",
        ]
    )


def _style(theme: str, fills: set[str]) -> str:
    """Return the rules of a theme."""
    if theme not in THEMES:
        raise ValueError(f"theme {theme!r}; hint: one of {', '.join(THEMES)}")
    rules = [f"text{{font-family:{FONT};font-variant-numeric:tabular-nums}}"]
    rules += [f".{name}{{font-size:{num(wide)}px;{more}}}" for name, (wide, _, more) in _TEXTS.items()]
    rules += [".narrow{display:none}", _colours(theme == "dark", fills)]
    if theme == "auto":
        rules.append(f"@media (prefers-color-scheme:dark){{{_colours(True, fills)}}}")
    grown = "".join(f".{name}{{font-size:{num(size)}px}}" for name, (_, size, _) in _TEXTS.items())
    rules.append(f"@media (max-width:{_NARROW}px){{{grown}.wide{{display:none}}.narrow{{display:inline}}}}")
    return "".join(rules)


def _colours(is_dark: bool, fills: set[str]) -> str:
    page = {name: pair[is_dark] for name, pair in _PAGE.items()}
    rules = [
        f".frame{{fill:{page['page']};stroke:{page['edge']}}}",
        f"text{{fill:{page['text']}}}.soft{{fill:{page['soft']}}}",
        f".track{{fill:{page['track']}}}.rule{{stroke:{page['grid']};fill:none}}",
        f".pill-edge{{fill:none;stroke:{page['edge']}}}",
        f".free{{fill:{page['track']};stroke:{page['edge']}}}",
    ]
    for kind in sorted(fills & FILLS.keys() - {"free"}):
        fill = FILLS[kind][is_dark]
        rules.append(f".{kind}{{fill:{fill}}}.on-{kind}{{fill:{text_on(fill)}}}")
    return "".join(rules)


# ---- words and numbers ------------------------------------------------------------------------


def safe(words: str) -> str:
    """Redact, make printable and escape."""
    return escape(one_line(redact(words)))


def num(value: float) -> str:
    """Format a coordinate to a hundredth of a unit."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def text_width(words: str, size: float) -> float:
    """Estimate the width of words in the usual sans-serif fonts."""
    ems = (0.31 if c in _SLIM else 0.87 if c in _BROAD else 0.65 if c.isupper() else 0.59 for c in words)
    return size * sum(ems)


def clipped(words: str, size: float, width: float) -> str:
    """Cut words that are wider than `width` and end them with an ellipsis."""
    words = one_line(redact(words))
    if text_width(words, size) <= width:
        return words
    kept = words
    while kept and text_width(kept + "…", size) > width:
        kept = kept[:-1]
    return kept.rstrip() + "…"


# ---- colours ----------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of `#rrggbb`."""
    r, g, b = (linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def linear(value: float) -> float:
    """Linear light of an sRGB component, both from 0 to 1."""
    return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Contrast of two colours (WCAG 2), from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def text_on(fill: str) -> str:
    """Return the text colour with more contrast."""
    return max((_DARK_TEXT, _LIGHT_TEXT), key=lambda colour: contrast(colour, fill))
