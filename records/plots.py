"""The plots of the leaderboard and of runs, as bytes of SVG: equal input gives equal bytes.

Everything is drawn in a grey and in colours that can be read on white and on black; the ground is
transparent. A line of the leaderboard is a `Line`: open circles stand for published results, full ones for
entries that were filed here.
"""

import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import dates
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#7d8590"
STYLE = {
    "svg.hashsalt": "slowrun",  # ids in the file are made of this instead of chance
    "svg.fonttype": "path",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.color": INK,
}
PALETTE = ("#b0703c", "#2f9e44", "#2f80d1", "#9a6dd7", "#d9589f", "#d9480f")
MARKERS = "osD^vP"
TRACKS = json.loads(Path(__file__).with_name("tracks.json").read_text())
BOARDS = [name for name, row in TRACKS.items() if row["board"] == name]
LOOKS = {track: (PALETTE[n % 6], MARKERS[n % 6]) for n, track in enumerate(BOARDS)}

class Line(NamedTuple):
    """What one track reached by when (`days`: datetime.date)."""

    track: str
    verified: bool
    days: list
    heights: list

def picture(draw, width=9.0, height=4.8, **grid):
    """The bytes of a figure on whose axes `draw` draws; with `grid`, an array of axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots(**grid))
        packed = io.BytesIO()
        figure.savefig(packed, format="svg", metadata={"Date": None, "Creator": None})
    return packed.getvalue()

def apart(heights, low, high, gap):
    """
    Places for labels near their heights, in the same order, at least `gap` from each other, within the axis.
    """
    order = np.argsort(heights, kind="stable")
    places = np.array(heights, float)[order]
    for _ in range(200):
        for n in range(1, len(places)):
            if (lack := gap - (places[n] - places[n - 1])) > 1e-12:
                places[n - 1], places[n] = places[n - 1] - lack / 2, places[n] + lack / 2
        places += max(0, low - places[0]) - max(0, places[-1] - high)
    back = np.empty(len(places))
    back[order] = places
    return back


# ---- The leaderboard ---------------------------------------------------------------------------------------

def label_ends(axes, ends):
    """
    The names of lines right of all ends, inside the axes, none on another; `ends`: [(x, y, text, colour)].
    """
    low, high = axes.get_ylim()
    at = max(x for x, *_ in ends) + 0.04 * np.ptp(axes.get_xlim())
    gap = (high - low) * 0.06
    places = apart([y for _, y, _, _ in ends], low + gap / 2, high - gap / 2, gap)
    for (x, y, text, color), place in zip(ends, places):
        axes.annotate(
            text,
            (x, y),
            (at, place),
            color=color,
            va="center",
            fontweight="bold",
            arrowprops=dict(arrowstyle="-", color=color, alpha=0.35, lw=0.8, shrinkB=5),
        )

def draw_lines(axes, lines):
    """Steps from record to record by date; where a track's dates coincide, by the order of its records."""
    everything = dates.date2num([day for line in lines for day in line.days])
    by_order = np.ptp(everything) < 14  # a history of some days is told by its records, one after another
    ends = []
    for track, verified, days, heights in lines:
        color, marker = LOOKS[track]
        x = np.arange(1, len(days) + 1) if by_order else spread(dates.date2num(days), np.ptp(everything))
        axes.step(x, heights, where="post", color=color, lw=1.6 if verified else 1.1)
        axes.plot(x, heights, marker, ms=4.5, color=color, mfc=color if verified else "none")
        both = verified and sum(line.track == track for line in lines) > 1
        ends.append((x[-1], heights[-1], f"{track}, filed here" if both else track, color))
    last, first = max(x for x, *_ in ends), 0.7 if by_order else everything.min() - 3
    axes.set_xlim(
        first, last + (last - first) * (0.5 if by_order else 0.22)
    )  # to the right is room for the names
    axes.margins(y=0.08)
    if by_order:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("standing records in their order")
    else:
        axes.xaxis.set_major_locator(dates.AutoDateLocator(minticks=4, maxticks=9))
        axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(axes.xaxis.get_major_locator()))
    return ends

def spread(days, span):
    """Days as numbers; records of one day stand beside each other, in their order."""
    days = np.array(days, float)
    for n in range(1, len(days)):
        days[n] = max(days[n], days[n - 1] + span / 200)
    return days

def progress(panels):
    """Loss of the records; `panels`: {title: lines}, the losses of one dataset in each."""

    def draw(all_axes):
        for axes, (title, lines) in zip(all_axes[0], panels.items()):
            label_ends(axes, draw_lines(axes, lines))
            axes.set_title(title)
            axes.set_ylabel("val loss, nats per token")
        all_axes[0][0].set_xlabel("open: published, not verified here; full: filed here")

    width = 9 if len(panels) == 1 else 13
    return picture(draw, width, nrows=1, ncols=len(panels), squeeze=False, width_ratios=[3, 2][: len(panels)])

def efficiency(lines):
    """Data efficiency of the records."""

    def draw(axes):
        ends = draw_lines(axes, lines) if lines else []
        axes.set_ylim(bottom=0)
        if ends:
            label_ends(axes, ends)
        axes.set_title("Data efficiency: how many times the data the reference model needs for this loss")
        axes.yaxis.set_major_formatter("{x:g}x")

    return picture(draw)

def overfit(watches):
    """The overfitting watch; `watches`: {track: (entry numbers, gaps, half-widths of 95 % intervals)}."""

    def draw(axes):
        for place, (track, (numbers, gaps, halves)) in enumerate(watches.items()):
            beside = np.array(numbers) + 0.1 * (place - (len(watches) - 1) / 2)  # no bar hides another
            color, marker = LOOKS[track]
            axes.errorbar(beside, gaps, halves, fmt=marker, ms=4.5, capsize=3, color=color, label=track)
        axes.axhline(0, color=INK, lw=1)
        axes.set_title(
            "Do records overfit val, the text that people look at? A bar that crosses 0 shows none of it"
        )
        axes.set_xlabel("number of the entry in its track")
        axes.set_ylabel("gain on val minus gain on audit,\nnats per token, with 95 % interval")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.08, y=0.15)
        axes.legend(loc="upper left", ncols=len(watches))

    return picture(draw)


# ---- Runs --------------------------------------------------------------------------------------------------

def running_mean(losses):
    """(steps from 1, mean training loss of a fiftieth of the run before each)"""
    width = max(1, len(losses) // 50)
    return np.arange(width, len(losses) + 1), np.convolve(losses, np.ones(width) / width, "valid"), width

def floor_and_roof(val, train):
    """Limits of an axis that shows where the curves end up, not the fall of the first steps."""
    low = min([*val, *train[len(train) // 2 :]])
    return low - 0.1, low + 2.5

def curves(runs):
    """Training and validation loss of runs; {label: (steps, losses, evaluated steps, val losses)}"""

    def draw(axes):
        limits = []
        for n, (label, (_, losses, at, val)) in enumerate(runs.items()):
            color = PALETTE[(2, 5)[n % 2]]
            steps, mean, _ = running_mean(losses)
            axes.plot(steps, mean, color=color, lw=1, alpha=0.7)
            axes.plot(at, val, MARKERS[n % 6], color=color, ms=5, label=label)
            limits.append(floor_and_roof(val, losses))
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        axes.set(xlabel="step", ylabel="nats per token")
        axes.set_title("Validation (points) and training loss (lines)")
        axes.legend(loc="upper right")

    return picture(draw, 8, 4.5)

def curve(metrics, title, final=None):
    """
    loss.svg of a run: the training loss, its running mean, the validation losses as points, which nothing
    joins, for what lay between them was not measured.
    `metrics`: {"step", "eval", "ensemble": [{"at", "loss", …}]}.
    """

    def draw(axes):
        losses = np.array([row["loss"] for row in metrics["step"]])
        val = [row["loss"] for row in metrics["eval"]]
        if len(losses):
            steps, mean, width = running_mean(losses)
            axes.plot(np.arange(1, len(losses) + 1), losses, color=INK, alpha=0.35, lw=0.7, label="training")
            axes.plot(steps, mean, color=PALETTE[2], label=f"mean of {width} steps")
        for kind, color, marker, label in (
            ("eval", PALETTE[5], "o", "validation"),
            ("ensemble", PALETTE[1], "s", "members so far"),
        ):
            if rows := metrics[kind]:
                axes.plot(
                    [row["at"] for row in rows],
                    [row["loss"] for row in rows],
                    marker,
                    color=color,
                    ms=4,
                    label=label,
                )
        if final is not None:
            axes.axhline(final, color=PALETTE[5], ls="--", lw=1, label=f"final predictor {final:.4f}")
        shown = [*val, *losses, *([final] if final is not None else [])]
        if shown and all(map(math.isfinite, shown)):
            axes.set_ylim(floor_and_roof([*val, *([final] if final is not None else [])], losses))
        axes.set(xlabel="step", ylabel="nats per token")
        axes.set_title(title)
        axes.legend(loc="upper right")

    return picture(draw, 7, 4)
