"""The website: the leaderboard as pages that open from a disk, with no server and no network.

    ./run.sh render --site DIR             writes it; DIR is a new folder, or one that holds an earlier site
    ./run.sh render --site DIR --runs A B  with runs of one's own, to be compared with entries and each other

    index.html             every entry and every published record, to be sorted and filtered
    <track>-<NN>.html      an entry: evidence, curve, README, what differs from the entry it is measured by
    compare.html#A,B       any two entries or runs: their curves on one axis, the losses of their documents
    data/<track>-<NN>.js   what the charts show of an entry; data/documents-<digest>.js: how documents begin
    assets/                the style, the script and the library that draws, from records/website/

The pages are whole without a script, but for the charts and the comparison. A browser lets a page that
comes from a disk fetch nothing, so data are scripts that call `slowrun.put`. Nothing that an entry says is
trusted: the templates escape, READMEs lose their HTML, and a Content-Security-Policy lets no script run but
those files.

Charts are uPlot 1.6.32 (MIT, from npm, as it was released, its licence beside it): 51 kB without
dependencies, a fraction of Chart.js or of Observable Plot with its D3. It draws on a canvas, which says
nothing to who can't see it, so each chart has its summary and its numbers in text beside it.
"""
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import jinja2
import numpy as np
from markdown_it import MarkdownIt
from markupsafe import Markup

import changes
import curves
import stats
from entry import Refused, history, locate, need, read_json, read_runs, stood
from verdict import evidence as how_sure
from verdict import judge, rivals
from words import beginnings

RECORDS = Path(__file__).resolve().parent
ASSETS = RECORDS / "website"
POINTS = 300          # of a curve: more than a screen tells apart
LINES = 1000          # of a diff: more than anybody reads on a page
GENERATOR = '<meta name="generator" content="slowrun">'  # by this a folder is known to be a site


# ---- Curves ------------------------------------------------------------------------------------------------

def thinned(curve):
    """What the chart draws: POINTS means of equally many steps, each where its last step is; losses to four
    decimals. Steps are counted over all members."""
    seconds, losses = np.array(curve["step"] or np.empty((0, 2))).T
    ends = np.unique(np.linspace(0, len(losses), POINTS + 1).astype(int)[1:])
    ends = ends[ends > 0]
    means = [losses[start:end].mean() for start, end in zip([0, *ends], ends)]
    points = {kind: [[at, float(np.round(seconds[at - 1], 1)) if at else 0, round(loss, 4)]
                     for at, loss in curve[kind] if at <= len(losses)] for kind in ("eval", "ensemble")}
    return {"step": ends.tolist(), "seconds": np.round(seconds[ends - 1], 1).tolist(),
            "train": np.round(means, 4).tolist(), **points}

def curves_of(entry):
    """One for each run, in their order."""
    return [{"name": f"seed {run['seed']}", **thinned(curves.of_run(entry, place))}
            for place, run in enumerate(entry.runs)]


# ---- Documents ---------------------------------------------------------------------------------------------

def documents(entry):
    """Val losses of the documents, nats per token, means over the seeds; null where no token was scored."""
    loss, tokens = entry.split("val")
    means = np.round(loss.mean(0) / np.maximum(tokens, 1), 4)
    return {"digest": entry.runs[0]["data"]["val"][:12], "tokens": tokens.tolist(),
            "loss": [mean if count else None for mean, count in zip(means.tolist(), tokens.tolist())]}


# ---- Entries -----------------------------------------------------------------------------------------------

def key(entry):
    """Names its page and its data: nano-09; of a run, which has no page, run-NAME."""
    return f"{entry.track}-{entry.number:02d}" if entry.filed else f"run-{entry.label}"

def name_of(entry):
    return f"{entry.track} #{entry.number}" if entry.filed else entry.label

def number(value):
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

def mean(entry, field):
    return float(np.mean([run[field] for run in entry.runs]))

def facts(entry):
    """[(what, value)] for people."""
    first = entry.runs[0]
    machine = first["machine"]
    val, audit = (f"{mean(entry, f'{split}_loss'):.4f} nats per token, {mean(entry, f'{split}_bpb'):.4f} "
                  "bits per byte" for split in ("val", "audit"))
    return [
        ("val loss", val),
        ("audit loss", audit),
        ("parameters", number(first["parameters"])),
        ("tokens seen", number(first["tokens_seen"])),
        ("training FLOPs", f"{first['training_flops']:.3g}"),
        ("training", f"{mean(entry, 'train_seconds') / 60:.1f} minutes, "
                     f"{mean(entry, 'gpu_seconds') / 3600:.3g} device hours"),
        ("machine", f"{machine['count']} x {machine['name']}, torch {machine['torch']}"),
        ("looks at val", number(sum(run["val_evaluations"] for run in entry.runs))),
    ]

def shown(value):
    return value if isinstance(value, str) else json.dumps(value)

def configuration(entry, rival):
    """[(field, value, the rival's value, do they differ)], those that differ first."""
    here, there = (shown_config(one) for one in (entry, rival))
    rows = [(field, here.get(field, "–"), there.get(field, "–")) for field in {**here, **there}]
    rows = [(*row, rival is not None and row[1] != row[2]) for row in rows]
    return sorted(rows, key=lambda row: not row[3])

def shown_config(entry):
    return {field: shown(value) for field, value in entry.runs[0]["config"].items()} if entry else {}

def readme(entry):
    """README.md as HTML: without its title and its own HTML, and with links only to the web. An image, which
    would be loaded from there, is a link too."""
    path = Path(entry.name, "README.md")
    text = path.read_text(errors="replace") if path.exists() else ""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "html_inline"])
    markdown.validateLink = lambda url: re.match("https?://", url) is not None
    return Markup(markdown.render(re.sub(r"\A# .*\n", "", text)).replace("<table>", '<table class="plain">'))

def page_of(entry):
    """What the template of an entry shows."""
    rival, verdict = (rivals(entry) or [None])[0], judge(entry)
    return {"entry": entry, "record": entry.record, "key": key(entry), "rival": rival, "verdict": verdict,
            "rival_key": rival and key(rival), "evidence": how_sure(entry), "facts": facts(entry),
            "configuration": configuration(entry, rival), "readme": readme(entry),
            "changes": changes.diff(entry, rival).splitlines() if rival else [], "lines": LINES}

def data_of(entry):
    """What the script needs of an entry, to draw it and to compare it."""
    return {"key": key(entry), "name": name_of(entry), "val": round(mean(entry, "val_loss"), 5),
            "seeds": len(entry.runs), "facts": facts(entry), "config": shown_config(entry),
            "runs": curves_of(entry), "documents": documents(entry)}


# ---- The table ---------------------------------------------------------------------------------------------

def boards():
    """{board: its rule}, in the order of tracks.json."""
    tracks = read_json(RECORDS / "tracks.json")
    return {name: row["rule"] for name, row in tracks.items() if row["board"] == name}

def row_of(entry, stands):
    record, verdict = entry.record, judge(entry)
    minutes = mean(entry, "train_seconds") / 60
    return {"track": entry.track, "kind": record["kind"], "number": f"{entry.number}", "order": entry.number,
            "stands": stands, "verdict": verdict, "passes": verdict and verdict.z >= stats.GATE,
            "val_loss": record["val_loss"], "audit": record["audit_loss"], "title": record["title"],
            "date": record["date"], "minutes": minutes, "time": f"{minutes:.1f} min",
            "contributors": ", ".join(record["contributors"]), "link": f"{key(entry)}.html"}

def published_row(fact, source, stands):
    """Published numbers sort below those of entries."""
    return {"track": fact["track"], "kind": "published", "number": f"p{fact['number']}",
            "order": fact["number"] - 100, "stands": stands, "verdict": None, "passes": None,
            "val_loss": fact["val_loss"], "audit": None, "title": fact["description"],
            "date": fact["date"], "minutes": fact["minutes"],
            "time": fact["time_text"].split(" (")[0].replace("mins", "min"),
            "contributors": ", ".join(fact["contributors"]),
            "link": f"{source}/blob/{fact['commit']}/{fact['script']}"}

def rows_of(board, entries):
    """The board's rows, newest first; the one that is to be beaten `stands`."""
    book = read_json(RECORDS / "published.json")
    known = [fact for fact in book["records"] if fact["track"] == board]
    standing = stood(entries)[-1:]
    rows = [row_of(entry, entry in standing) for entry in reversed(entries)]
    return rows + [published_row(fact, book["source"], not standing and fact is known[-1])
                   for fact in reversed(known)]


# ---- The site ----------------------------------------------------------------------------------------------

def script(name, value):
    return f"slowrun.put({json.dumps(name)}, {json.dumps(value, separators=(',', ':'), allow_nan=False)});\n"

def files(runs=()):
    """{path in the site: text} of all that is generated; `runs` are names or paths."""
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True,
                                   lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    templates.globals["generator"] = Markup(GENERATOR)
    tables = {board: history(board) for board in boards()}
    entries = [entry for table in tables.values() for entry in table]
    rows = [row for board, table in tables.items() for row in rows_of(board, table)]
    compared = [*entries, *(read_runs([locate(name)], whole=True) for name in runs)]
    choices = [(key(entry), f"{name_of(entry)}: {entry.record.get('title', f'a run of {entry.track}')}")
               for entry in compared]
    texts = {"index.html": templates.get_template("index.html").render(rows=rows, boards=boards()),
             "compare.html": templates.get_template("compare.html").render(choices=choices)}
    for entry in entries:
        texts[f"{key(entry)}.html"] = templates.get_template("entry.html").render(page_of(entry))
    for entry in compared:
        texts[f"data/{key(entry)}.js"] = script(key(entry), data_of(entry))
    for data in {entry.runs[0]["data"]["val"]: entry.runs[0]["data"] for entry in compared}.values():
        name = f"documents-{data['val'][:12]}"
        texts[f"data/{name}.js"] = script(name, beginnings(data))
    return texts

def build(directory, runs=()):
    """Writes the site into `directory`, whole or not at all; what is there must be a site, or nothing."""
    target = Path(directory).resolve()
    page = target / "index.html"
    ours = page.is_file() and GENERATOR in page.read_text(errors="replace")
    need(ours or not target.exists() or target.is_dir() and not any(target.iterdir()),
         f"{directory} is not empty and holds no site; name a new folder")
    texts = files(runs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
            fresh, old = Path(temporary, "new"), Path(temporary, "old")
            for name, text in texts.items():
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                (fresh / name).write_text(text, encoding="utf-8")
            shutil.copytree(ASSETS, fresh / "assets", ignore=shutil.ignore_patterns("*.html"))
            if target.exists():
                target.rename(old)
            fresh.rename(target)
    except OSError as error:
        raise Refused(f"cannot write {directory}: {error.strerror}; name another folder") from None
    print(f"wrote {directory}: open {target / 'index.html'} in a browser")

if __name__ == "__main__":
    try:
        need(len(sys.argv) > 1, "name the folder to write: ./run.sh render --site DIR")
        build(sys.argv[1], sys.argv[2:])
    except Refused as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
