"""What is generated from the entries: tables of Markdown between two markers, and the plots.

README.md gets one table, the standing record of each track; records/README.md the full tables; README.md of
a track's folder a table of all its entries. What people wrote is escaped: a title makes no link, no tag, no
marker.
"""

import functools
import html
import math
import re
from datetime import date
from typing import NamedTuple

import numpy as np

import stats
import verdict
from entry import BOARDS, RECORDS, ROOT, history, need, read_json, read_text, stood

BEGIN, END = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"
LEGEND = f"""\
Losses are nats per token, means over seeds. Evidence: who stands for it, and the gain on val with its 95 %
interval over documents and seeds; ✓ passes the gate, z >= {stats.GATE}. Made by `./run.sh render`."""

class Row(NamedTuple):
    """
    A line of a track's table, published or filed here; `place` in records/, None where it was only published.
    """

    number: str
    val_loss: float
    audit: str
    evidence: str
    title: str
    date: str
    time: str
    contributors: list
    log: str
    place: str = None

def escape(text):
    """Text of a stranger as Markdown and HTML that shows just this text."""
    text = re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"://|www\.",
                  lambda found: f"&#{ord(found[0][0])};{found[0][1:]}", text, flags=re.IGNORECASE)

def link(text, target):
    return f"[{text}]({target})"

def table_of(headings, rows):
    return ["", f"| {' | '.join(headings)} |", "|" + " - |" * len(headings),
            *(f"| {' | '.join(row)} |" for row in rows), ""]

def published(track):
    book = read_json(RECORDS / "published.json")
    rows = []
    for fact in (fact for fact in book["records"] if fact["track"] == track):
        source = (link("script", f"{book['source']}/blob/{fact['commit']}/{fact['script']}") if fact["commit"]
                  else link("pull request", f"{book['source']}/pull/{fact['pull_request']}"))
        rows.append(Row(f"p{fact['number']}", fact["val_loss"], "–",
                        fact.get("note", "published, not verified here"), escape(fact["description"]),
                        fact["date"], fact["time_text"].split(" (")[0], fact["contributors"], source))
    return rows

def row_of(entry, base=""):
    """An entry's Row; its links start from the folder to which `base` leads back from records/."""
    record, place = entry.record, f"{base}{entry.track}/{entry.folder}"
    minutes = np.mean([run["train_seconds"] for run in entry.runs]) / 60
    log = link("log", f"{place}/{entry.runs[0]['log']}")
    log += "" if entry.old or not verdict.rivals(entry) else ", " + link("changes", f"{place}/changes.diff")
    return Row(f"{entry.number}", record["val_loss"], f"{record['audit_loss']:.3f}", verdict.evidence(entry),
               link(escape(record["title"]), place), record["date"], f"{minutes:.1f} mins",
               record["contributors"], log, f"{entry.track}/{entry.folder}")

def filed(track):
    return [row_of(entry) for entry in stood(history(track))]

def data_efficiency(loss, data):
    """For people: "6.13x"; beyond the table "< 2x" or "> 20x"; a dash where the dataset has no curve."""
    baseline = read_json(RECORDS / "baseline.json").get(data)
    if baseline is None:
        return "–"
    multiple = stats.efficiency(loss, baseline)
    ends = [int(tokens) / baseline["unit_tokens"] for tokens in baseline["losses"]]
    return {0.0: f"< {min(ends):g}x", math.inf: f"> {max(ends):g}x"}.get(multiple, f"{multiple:.2f}x")

def names(row):
    return ", ".join(map(escape, row.contributors))


# ---- Tables ------------------------------------------------------------------------------------------------

def standing_table():
    """The table of README.md: the best published and the best filed of each track."""
    rows = []
    for track, rule in BOARDS.items():
        for row in published(track)[-1:] + filed(track)[-1:]:
            last = (next(entry for entry in history(track) if row.number == f"{entry.number}") if row.place
                    else None)
            said = verdict.standing(last) if last else "published"
            rows.append((link(f"`{track}`", f"records/README.md#{track}"), rule["rule"],
                         f"{row.val_loss:.3f}", data_efficiency(row.val_loss, rule["dataset"]), said,
                         names(row), row.date))
    return table_of(("track", "rule", "val loss", "data efficiency", "evidence", "who", "date"), rows)

def full_table(track):
    """The lines of a track's section in records/README.md."""
    rule = BOARDS[track]
    rows = [(row.number, f"{row.val_loss:.3f}", data_efficiency(row.val_loss, rule["dataset"]), row.audit,
             row.evidence, row.title, row.date, row.time, names(row), row.log)
            for row in published(track) + filed(track)]
    lines = [f"### {track}", "", f"{rule['rule']}."]
    lines += (table_of(("#", "val loss", "data efficiency", "audit loss", "evidence", "description", "date",
                        "time", "contributors", "log"), rows) if rows else [""])
    in_table = {entry.number for entry in stood(history(track))}
    others = [entry for entry in history(track) if entry.number not in in_table]
    lines += ["Also filed:"] if others else []
    for entry in others:
        lines.append(f"- #{entry.number}, {entry.kind}: "
                     f"{link(escape(entry.record['title']), f'{entry.track}/{entry.folder}')}, "
                     f"val loss {entry.record['val_loss']:.3f}; {verdict.evidence(entry)}")
    lines += ([""] if others else []) + [verdict.watch_sentence(track)] if history(track) else []
    lines += steps_table(track, "limited") if track == "nano" else []
    return lines + ([] if rows or others else ["No entry yet."]) + [""]

def steps_table(track, of):
    """What the steps of a published history gain on a smaller track."""
    rows = verdict.steps(track, of)
    if len(rows) < 3:
        return []
    rho, low, high, p = verdict.correlation(rows)
    body = [(f"{new.against} to p{n}", f"{known:+.3f}", f"{new.gain:+.4f} ± {new.half:.4f}", escape(title))
            for n, known, title, new in rows]
    return ["",
            f"Does {track} predict {of}? Published records of {of}, repeated here: the gain of each step.",
            *table_of(("step", "published gain", "gain here", "what"), body),
            f"Rank correlation of the {len(rows)} steps: {rho:.2f}; {low:.2f} to {high:.2f} within the noise "
            f"of documents and seeds. A random order does as well with probability {p:.2g}."]

def entries_table(track):
    """All entries of a track, of every kind, for the README of its folder."""
    rows = []
    for entry in history(track):
        row = row_of(entry, "../")
        rows.append((row.number, entry.kind, f"{row.val_loss:.3f}", row.audit,
                     f"{entry.runs[0]['training_flops']:.2g}", row.time, row.evidence, row.title, names(row),
                     row.log))
    return table_of(("#", "kind", "val loss", "audit loss", "FLOPs", "time", "evidence", "description",
                     "contributors", "log"), rows)


# ---- Files -------------------------------------------------------------------------------------------------

def draw_plots():
    """{file name: bytes}."""
    import plots  # matplotlib takes longer to import than the other commands take to run

    def lines_of(data, value):
        lines = []
        for track in (track for track in BOARDS if BOARDS[track]["dataset"] == data):
            for verified, rows in ((False, published(track)), (True, filed(track))):
                points = [(date.fromisoformat(row.date), value(row.val_loss)) for row in rows]
                points = [(day, height) for day, height in points if 0 < height < math.inf]
                if points:
                    lines.append(plots.Line(track, verified, *map(list, zip(*points))))
        return lines

    titles = {"fineweb100M": "100M tokens of FineWeb", "nano": "nano: 1M tokens"}
    panels = {titles[data]: lines_of(data, float) for data in titles if lines_of(data, float)}
    worth = [line for data, baseline in read_json(RECORDS / "baseline.json").items()
             for line in lines_of(data, functools.partial(stats.efficiency, baseline=baseline))]
    watches = {track: verdict.watch(track) for track in BOARDS if verdict.watch(track)[0]}
    drawn = {"progress.svg": plots.progress(panels), "efficiency.svg": plots.efficiency(worth)}
    return {**drawn, "overfit.svg": plots.overfit(watches)} if watches else drawn

def between_markers(path, lines):
    """The file with these lines between its markers, as bytes."""
    text = read_text(path)
    need(text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END),
         f"{path.relative_to(ROOT)} needs a line {BEGIN} and, below it, a line {END}; "
         "the tables go between them")
    block = re.sub(r"\n{3,}", "\n\n", "\n".join([BEGIN, *lines]).rstrip()) + f"\n{END}"
    head, tail = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    return (head + block + tail).encode()

def rendered():
    """{path: bytes} of everything that is generated."""
    drawn = draw_plots()
    picture = lambda name, folder="": f"![{name}]({folder}{name}.svg)"
    full = [line for track in BOARDS for line in full_table(track)]
    pictures = [picture(name.removesuffix(".svg")) for name in drawn]
    files = {RECORDS / name: data for name, data in drawn.items()}
    files[ROOT / "README.md"] = between_markers(ROOT / "README.md",
                                                [*standing_table(), picture("progress", "records/")])
    files[RECORDS / "README.md"] = between_markers(RECORDS / "README.md", [*pictures, "", LEGEND, "", *full])
    for track in BOARDS:
        if (path := RECORDS / track / "README.md").exists():
            files[path] = between_markers(path, entries_table(track))
    return files
