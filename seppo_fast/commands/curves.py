"""Draws curves of a run as inline SVG with matplotlib: no scripts, the page's colours, gaps at non-finite values."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape

_SIZE = (5.6, 2.7)  # inches of 72 units
_MOST_POINTS = 1500  # per line; longer runs are averaged
# Placeholder colours that become CSS variables, whose values differ between the page's light and dark mode.
_THEME = {
    "#010101": "--first", "#020202": "--second", "#030303": "--third", "#040404": "--fourth", "#050505": "--warn",
    "#060606": "--line", "#070707": "--dim",
}  # fmt: skip
_FIRST, _SECOND, _THIRD, _FOURTH, _WARN, _LINE, _DIM = _THEME
# Each line also has its own dashes, because not everyone can distinguish the colours.
_STYLES = ((_FIRST, "-"), (_SECOND, (0, (4, 2))), (_THIRD, (0, (1, 2))), (_FOURTH, (0, (6, 2, 1, 2))))

STYLE = """
figure.curve > svg { width: 100%; height: auto; display: block; }
.key { white-space: nowrap; } .key svg { width: 1.4em; height: 0.7em; vertical-align: middle; }
.line-0 { stroke: var(--first); } .line-1 { stroke: var(--second); stroke-dasharray: 5 3; }
.line-2 { stroke: var(--third); stroke-dasharray: 2 2.5; } .line-3 { stroke: var(--fourth); stroke-dasharray: 8 2 2 2; }
"""


def curve(
    title: str,
    updates: Sequence[int],
    lines: Mapping[str, Sequence[float | None]],
    *,
    intervals: Sequence[tuple[int, int]] = (),
    skipped: Sequence[int] = (),
) -> str:
    """Returns a `<figure>` with one to four lines over updates.

    Args:
        title: the title of the figure.
        updates: the x values, ascending, at least one.
        lines: the y values of each line, by name; None, NaN and infinities are gaps.
        intervals: the first and last update of each shaded interval.
        skipped: the updates that are marked as skipped.
    """
    assert len(lines) <= len(_STYLES), "a figure has more lines than there are styles"
    drawn = {name: _thinned(updates, values) for name, values in lines.items()}
    keys = "".join(
        f' <span class="key"><svg viewBox="0 0 20 10"><line class="line-{index}" x1="0" y1="5" x2="20" y2="5" '
        f'stroke-width="3"/></svg> {escape(name)}</span>'
        for index, name in enumerate(lines)
        if len(lines) > 1
    )
    caption = f"<figcaption><strong>{escape(title)}</strong>{keys}</figcaption>"
    if not any(y is not None for points in drawn.values() for _, y in points):
        return f'<figure class="curve">{caption}<p class="dim">no finite value</p></figure>'
    label = escape(f"{title}, updates {updates[0]} to {updates[-1]}")
    svg = _svg(title, list(drawn.values()), intervals, skipped).replace(
        "<svg ", f'<svg role="img" aria-label="{label}" ', 1
    )
    return f'<figure class="curve">{caption}{svg}</figure>'


def _svg(
    title: str,
    lines: Sequence[list[tuple[float, float | None]]],
    intervals: Sequence[tuple[int, int]],
    skipped: Sequence[int],
) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Text stays text instead of paths; the fixed salt makes ids, and so the output, reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "path.simplify": False}):
        figure = Figure(figsize=_SIZE, dpi=72)
        axes = figure.add_axes((0.14, 0.14, 0.84, 0.83))
        axes.set_frame_on(False)
        axes.grid(color=_LINE, linewidth=0.8)
        axes.tick_params(length=0, labelsize=8, labelcolor=_DIM)
        axes.set_xlabel("update", fontsize=8, color=_DIM, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
        for first, last in intervals:
            axes.axvspan(first, max(last, first + 0.5), facecolor=_WARN, alpha=0.16, linewidth=0, gid="spell")
        for update in skipped:
            axes.axvline(update, color=_WARN, linewidth=1.2, linestyle=(0, (2, 2)), gid="skipped")
        for points, (colour, dashes) in zip(lines, _STYLES, strict=False):
            for piece in _pieces(points):
                xs, ys = zip(*piece, strict=True)
                axes.plot(
                    xs,
                    ys,
                    color=colour,
                    linestyle=dashes,
                    linewidth=1.4,
                    solid_capstyle="round",
                    dash_capstyle="round",
                    gid="line",
                )
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _themed(file.getvalue())


def _themed(svg: str) -> str:
    """Strips an SVG to the picture in the page's colours; ids become classes, because ids must be unique on a page."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>.*?</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' clip-path="[^"]*"| font-family: [^;]*;|<g id="[^"]*"/>', "", svg)
    svg = re.sub(r'<g id="(line|spell|skipped)">', r'<g class="\1">', svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r' xmlns:xlink="[^"]*"| version="[^"]*"| width="[^"]*pt"| height="[^"]*pt"', "", svg)
    for colour, name in _THEME.items():
        svg = svg.replace(colour, f"var({name})")
    return re.sub(r"\s*\n\s*", "\n", svg)


def _thinned(updates: Sequence[int], values: Sequence[float | None]) -> list[tuple[float, float | None]]:
    """Returns points (x, y); for long runs, neighbours are averaged so that at most `_MOST_POINTS` remain."""
    finite = [value if value is not None and math.isfinite(value) else None for value in values]
    size = math.ceil(len(updates) / _MOST_POINTS)
    points: list[tuple[float, float | None]] = []
    for start in range(0, len(updates), size):
        some = [value for value in finite[start : start + size] if value is not None]
        xs = updates[start : start + size]
        points.append((sum(xs) / len(xs), sum(some) / len(some) if some else None))
    return points


def _pieces(points: Sequence[tuple[float, float | None]]) -> Iterator[list[tuple[float, float]]]:
    """Yields runs of points between gaps; a lone point is doubled, so that its round line caps show it."""
    piece: list[tuple[float, float]] = []
    for x, y in [*points, (0.0, None)]:
        if y is not None:
            piece.append((x, y))
        elif piece:
            yield piece if len(piece) > 1 else piece * 2
            piece = []
