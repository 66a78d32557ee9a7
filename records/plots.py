"""The plots of the leaderboard, as bytes of SVG: equal input gives equal bytes.

A line is a `Line`; open circles stand for published results, full ones for entries that were verified here.
"""
import io
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import dates
from matplotlib.figure import Figure

matplotlib.rcParams.update({
    "svg.hashsalt": "slowrun",  # ids in the file are made of this instead of chance
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.25,
})
COLORS = {
    "nano": "#8c564b", "tiny": "#2ca02c", "limited": "#1f77b4",
    "two_hour": "#9467bd", "nano_unlimited": "#e377c2", "unlimited": "#d62728",
}


class Line(NamedTuple):
    """What one track reached by when (`days`: datetime.date)."""
    track: str
    verified: bool
    days: list
    heights: list


def svg(figure):
    packed = io.BytesIO()
    figure.savefig(packed, format="svg", metadata={"Date": None, "Creator": None})
    return packed.getvalue()


def draw(axes, lines):
    for track, verified, days, heights in lines:
        color = COLORS[track]
        axes.step(days, heights, where="post", color=color, lw=1.6 if verified else 1.1)
        axes.plot(days, heights, "o", ms=4.5, color=color, mfc=color if verified else "white")
        label = f"{track}, verified" if verified else track
        axes.annotate(label, (days[-1], heights[-1]), (8, 0), textcoords="offset points", color=color,
                      va="center", fontweight="bold", fontsize=9)
    days = dates.date2num([day for line in lines for day in line.days])
    span = max(np.ptp(days), 14)  # a history of one day is a vertical line, not an axis of years
    axes.set_xlim(days.max() - 1.05 * span, days.max() + 0.3 * span)  # labels stand right of the ends
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(axes.xaxis.get_major_locator()))
    axes.set_xlabel("open circles: published, not verified here; full: filed here", loc="left", fontsize=8)


def progress(panels):
    """Loss against date; `panels`: {title: lines}, the losses of one dataset in each."""
    figure = Figure(figsize=(9 if len(panels) == 1 else 13, 4.8), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[3, 2][:len(panels)])[0]
    for axes, (title, lines) in zip(all_axes, panels.items()):
        draw(axes, lines)
        axes.set_title(title)
        axes.set_ylabel("val loss, nats per token")
    return svg(figure)


def efficiency(lines):
    """Data efficiency against date."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    draw(axes, lines)
    axes.set_title("Data efficiency: how many times the data the reference model needs for this loss")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}x")
    return svg(figure)


def overfit(watches):
    """The overfitting watch; `watches`: {track: (entry numbers, gaps, half-widths of 95 % intervals)}."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    for place, (track, (numbers, gaps, halves)) in enumerate(watches.items()):
        beside = np.array(numbers) + 0.06 * place  # so that the bars of two tracks don't hide each other
        axes.errorbar(beside, gaps, halves, fmt="o-", ms=4.5, capsize=3, color=COLORS[track], label=track)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_title("Overfitting watch: gain on val beyond the gain on audit, since the track's first entry")
    axes.set_xlabel("entry")
    axes.set_ylabel("nats per token (bars: 95 %)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, loc="upper left")
    return svg(figure)
