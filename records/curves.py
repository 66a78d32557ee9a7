"""The losses of a run, step by step: from its metrics, or from the log of one that was filed without them."""

import re

import evidence
from entry import Refused, parse_json, read_text, sources_of

NUMBER = r"\d+\.\d+"
LINE = re.compile(rf"step +\d+/\d+ +train (?P<train>{NUMBER}) +(?P<seconds>{NUMBER}) s$"
                  rf"|epoch .* val (?P<eval>{NUMBER}) "
                  rf"|member .* members so far (?P<ensemble>{NUMBER})$")

def of_log(text):
    """{"step": [(seconds, loss)], "eval" and "ensemble": [(steps before it, loss)]} of a run, over all its
    members. A run that was killed and resumed wrote some steps twice; the later ones count."""
    curve = {"step": [], "eval": [], "ensemble": []}
    for match in filter(None, map(LINE.match, text.splitlines())):
        kind = match.lastgroup
        if kind != "seconds":
            curve[kind].append((len(curve["step"]), float(match[kind])))
            continue
        row = float(match["seconds"]), float(match["train"])
        while curve["step"] and curve["step"][-1][0] >= row[0]:
            curve["step"].pop()
        for points in curve["eval"], curve["ensemble"]:
            while points and points[-1][0] > len(curve["step"]):
                points.pop()
        curve["step"].append(row)
    return curve

def of_metrics(rows):
    """The same of the rows of metrics.jsonl."""
    curve = {"step": [], "eval": [], "ensemble": []}
    for row in rows:
        if row["kind"] == "step":
            curve["step"].append((row["seconds"], row["loss"]))
        elif row["kind"] in curve:
            curve[row["kind"]].append((row["at"], row["loss"]))
    return curve

def of_run(entry, place=0):
    """The same of an entry's run, by its place among them."""
    run, folders = entry.runs[place], entry.extra.get("folders")
    try:
        if "metrics" in run:
            return of_metrics(evidence.rows_of(entry.files[run["metrics"]], run["metrics"]))
        if folders and (path := folders[place] / "metrics.jsonl").exists():
            return of_metrics(parse_json(line, path) for line in read_text(path).splitlines())
    except (KeyError, TypeError):
        raise Refused(f"{entry.label}: its metrics are damaged") from None
    return of_log(sources_of(entry.files[run["log"]], entry.name)[1])
