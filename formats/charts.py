"""Charts of pages as SVG, in colours for light and for dark ones; whatever a label says is shown as it is."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_SIZE_INCHES = (4.6, 2.9)


@dataclass(frozen=True)
class Theme:
    """Colours of a page that a chart must be readable on; the background is the page's own. `shades`: a colour map."""

    text: str
    grid: str
    lines: tuple[str, ...]
    shades: tuple[str, str]

    def line(self, index: int) -> str:
        """The colour of the line of this number."""
        return self.lines[index % len(self.lines)]

    def dashes(self, index: int) -> str:
        """Its kind of line: those that share a colour differ in it, and in their markers."""
        return ("-", "--", "-.", ":")[index // len(self.lines) % 4]

    def marker(self, index: int) -> str:
        """The shape of its points."""
        return "osD^"[index // len(self.lines) % 4]


# Okabe and Ito's colours, which people with any colour vision can tell apart, lightened for dark pages.
LIGHT = Theme(
    "#3d4450",
    "#d9dde3",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9"),
    ("#f3f6fa", "#0063a6"),
)
DARK = Theme(
    "#b8c0cc",
    "#39414d",
    ("#6cb8f0", "#ff9b57", "#4fd3a8", "#ef9fcb", "#e6c84f", "#9fd8ff"),
    ("#222831", "#7cc0f5"),
)


@dataclass(frozen=True)
class Chart:
    """One chart, as SVG for both kinds of page, and its description for those who do not see it."""

    name: str
    title: str
    description: str
    light_svg: bytes
    dark_svg: bytes


def draw_chart(
    name: str,
    title: str,
    description: str,
    paint: Callable[[Axes, Theme], None],
    size_inches: tuple[float, float] = _SIZE_INCHES,
) -> Chart:
    """Have a chart painted for both kinds of page."""
    light, dark = (_draw(name, paint, theme, size_inches) for theme in (LIGHT, DARK))
    return Chart(name, title, description, light, dark)


def _draw(name: str, paint: Callable[[Axes, Theme], None], theme: Theme, size_inches: tuple[float, float]) -> bytes:
    # an own Figure and canvas: nothing of matplotlib's global state is read or changed but for this block
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path", "font.size": 10}):
        figure = Figure(figsize=size_inches, layout="constrained", facecolor="none")
        canvas = FigureCanvasSVG(figure)
        axes = figure.subplots()
        paint(axes, theme)
        stream = io.BytesIO()
        canvas.print_figure(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def style_axes(axes: Axes, theme: Theme) -> None:
    """A light grid, a line at the bottom only, the page's colour of text."""
    axes.set_facecolor("none")
    axes.tick_params(which="both", colors=theme.text, length=0)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.grid)
    axes.xaxis.label.set_color(theme.text)
    axes.yaxis.label.set_color(theme.text)


def add_legend(axes: Axes, theme: Theme) -> None:
    """A legend without a frame."""
    axes.legend(frameon=False, labelcolor=theme.text, fontsize=9)


def plain(text: str, longest: int = 40) -> str:
    """Text that matplotlib does not take for a formula or for something to hide, shortened to `longest` letters."""
    text = " ".join(text.split())
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return text.replace("$", r"\$").lstrip("_") or " "


def plain_apart(labels: Sequence[str], longest: int = 40) -> list[str]:
    """Each label as `plain` shows it; whole, however long, where labels that differ would look the same."""
    looks = {label: plain(label, longest) for label in labels}
    times = Counter(looks.values())
    return [looks[label] if times[looks[label]] == 1 else plain(label, len(label)) for label in labels]
