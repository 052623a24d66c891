"""Curves of a run as inline SVG by matplotlib: no scripts, the page's colours, gaps where a value was not finite."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape

_SIZE = (5.6, 2.7)  # inches of 72 units
_MOST_POINTS = 1500  # a line of the page; longer runs are shown by means
# Colours that stand for the page's, which differ by day and by night.
_THEME = {
    "#010101": "--first", "#020202": "--second", "#030303": "--third", "#040404": "--fourth", "#050505": "--warn",
    "#060606": "--line", "#070707": "--dim",
}  # fmt: skip
_FIRST, _SECOND, _THIRD, _FOURTH, _WARN, _LINE, _DIM = _THEME
# Each has dashes of its own too: colours alone are not seen by all.
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
    """A `<figure>` of one to four lines over updates.

    Args:
        title: of the figure.
        updates: x, ascending; at least one.
        lines: y by name; None, NaN and infinities are gaps.
        intervals: first and last update of what is shaded.
        skipped: updates that are marked.
    """
    assert len(lines) <= len(_STYLES), "each line has a style of its own"
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

    # Text stays text; the salt makes ids that repeat from run to run of this command.
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
    """The picture alone, in the page's colours; what was an id becomes a class, since a page has each id once."""
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
    """Points (x, y), of long runs the means of as many neighbours as needed."""
    finite = [value if value is not None and math.isfinite(value) else None for value in values]
    size = math.ceil(len(updates) / _MOST_POINTS)
    points: list[tuple[float, float | None]] = []
    for start in range(0, len(updates), size):
        some = [value for value in finite[start : start + size] if value is not None]
        xs = updates[start : start + size]
        points.append((sum(xs) / len(xs), sum(some) / len(some) if some else None))
    return points


def _pieces(points: Sequence[tuple[float, float | None]]) -> Iterator[list[tuple[float, float]]]:
    """Runs of points between gaps; one that stands alone comes twice, a line without length that a round end shows."""
    piece: list[tuple[float, float]] = []
    for x, y in [*points, (0.0, None)]:
        if y is not None:
            piece.append((x, y))
        elif piece:
            yield piece if len(piece) > 1 else piece * 2
            piece = []
