"""The leaderboard: entries that prove themselves, and the tables made of them.

    python records/leaderboard.py add RUN [RUN ...] --slug swiglu --title "SwiGLU MLP" --contributors ada
    python records/leaderboard.py check            # every entry; CI runs it
    python records/leaderboard.py render           # README.md's tables, the plots; --check: are they fresh?
    python records/leaderboard.py compare A B      # is A better than B, and how sure is that?
    python records/leaderboard.py power 0.003      # seeds needed to show a gain
    python records/leaderboard.py efficiency 3.2   # a loss as a multiple of the data

A RUN is a run folder of train_gpt.py: result.json, log.txt with the embedded source, doc_losses.npz. `add`
takes runs that differ in their seed only and makes records/<track>/<NN>_<slug>/ of them, provided that every
check passes and, for a record, that the gain over the standing record passes the gate of stats.py. It holds

    record.json       record.schema.json says what is in it
    README.md         what changed, why, the result, credits
    log.txt           of several seeds: log_seed<k>.txt
    doc_losses.npz    of val and audit: loss (seeds, documents), tokens and bytes (documents,)

Nothing that follows from those is stored: verdicts, tables and plots are computed from the entries each time.
A mistake is one line on stderr and exit code 2, and nothing is left half written.
"""
import argparse
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

import jsonschema
import numpy as np

import stats

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent


class Track(NamedTuple):
    data: str                   # the dataset it trains on
    rule: str                   # its cap, for people
    seeds: int                  # runs that a record needs
    minutes: float = math.inf   # caps: training time,
    flops: float = math.inf     # counted training FLOPs,
    gpu_days: float = math.inf  # training time times GPUs
    node: bool = False          # only on 8xH100: a cap in minutes means nothing without the machine


TRACKS = {
    "nano": Track("nano", "1M tokens, at most 2e14 training FLOPs on any machine", seeds=3, flops=2e14),
    "tiny": Track("fineweb100M", "100M tokens, 15 minutes on 8xH100", seeds=3, minutes=15, node=True),
    "limited": Track("fineweb100M", "100M tokens, 1 hour on 8xH100", seeds=1, minutes=60, node=True),
    "two_hour": Track("fineweb100M", "100M tokens, 2 hours on 8xH100", seeds=1, minutes=120, node=True),
    "nano_unlimited": Track("nano", "1M tokens, any compute", seeds=1),
    "unlimited": Track("fineweb100M", "100M tokens, at most 64 H100 for 7 days", seeds=1, gpu_days=64 * 7),
}
BOARDS = {"unlimited_snapshots": "unlimited"}  # presets of train_gpt.py that run for another track
RULED = ("record", "baseline")  # the kinds that the caps bind; others may take their time on other hardware
BEGIN, END = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"
LEGEND = f"""Losses are nats per token, means over seeds. Evidence is the gain on val with its 95 % interval
over documents and seeds; ✓ passes the gate, z >= {stats.GATE}. Made by `records/leaderboard.py render`."""
HEADINGS = ("#", "val loss", "data efficiency", "audit loss", "evidence", "description", "date", "time",
            "contributors", "log")
FILL_IN = "(fill in)"
README = """# {title}

{kind} of the {track} track, by {contributors}.
Val loss **{val_loss:.4f}**, audit loss {audit_loss:.4f}, {seeds}.
{verdict}

## What changed
{fill_in}

## Why it helps
{fill_in}

## Result
{fill_in} What else was tried, and how the choices were made without val and audit.

## Credits
{fill_in}
"""


class Refused(Exception):
    """What is wrong and what mends it, in one line for the user."""


def need(condition, message):
    if not condition:
        raise Refused(message)


# ---- Entries -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Runs of one method with different seeds: an entry of the leaderboard, or what may become one."""
    name: str     # its folder, for messages
    record: dict  # record.json; of run folders only `track` and `runs`
    docs: dict    # doc_losses.npz
    logs: dict    # file name -> bytes

    @property
    def runs(self):
        return self.record["runs"]

    @property
    def track(self):
        return self.record["track"]

    @property
    def number(self):
        return self.record["number"]

    @property
    def seeds(self):
        return f"{len(self.runs)} seed{'s' * (len(self.runs) > 1)}"

    @property
    def place(self):
        """Where it belongs, from the root of the repository."""
        return f"records/{self.track}/{self.number:02d}_{self.record['slug']}"

    def split(self, name):
        return stats.Split(self.docs[f"{name}_loss"], self.docs[f"{name}_tokens"])


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def read_bytes(path):
    need(path.is_file(), f"{path} is missing; name a finished run folder, or restore the entry")
    return path.read_bytes()


def read_json(path):
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise Refused(f"{path} is no JSON: {error}") from None


def read_docs(path):
    keys = [f"{split}_{what}" for split in ("val", "audit") for what in ("loss", "tokens", "bytes")]
    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise Refused(f"{path} is no file of per-document losses: {error}") from None


def check_schema(name, value, definition):
    schema = read_json(RECORDS / "record.schema.json")
    if definition == "result":
        schema = {"$ref": "#/$defs/result", "$defs": schema["$defs"]}
    for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
        where = ".".join(str(step) for step in ["", *error.absolute_path])
        raise Refused(f"{name}{where}: {error.message[:200]} (records/record.schema.json)")


def read_runs(folders):
    """The Entry that run folders make: runs of one script and one config, each with another seed."""
    results, docs, logs = [], [], {}
    for folder in map(Path, folders):
        result = read_json(folder / "result.json")
        check_schema(folder / "result.json", result, "result")
        log = "log.txt" if len(folders) == 1 else f"log_seed{result['seed']}.txt"
        need(log not in logs, f"{folder}: seed {result['seed']} occurs twice; runs must differ in their seed")
        logs[log] = read_bytes(folder / "log.txt")
        results.append({**result, "log": log, "log_sha256": sha256(logs[log])})
        docs.append(read_docs(folder / "doc_losses.npz"))
        for field in ("track", "config", "source_sha256", "data"):
            need(result[field] == results[0][field],
                 f"{folder}: its {field} is not that of the first run; only the seed may differ")
        need(all(np.array_equal(docs[-1][key], docs[0][key]) for key in docs[0] if not key.endswith("_loss")),
             f"{folder}: other tokens were scored than in the first run")
    for key in ("val_loss", "audit_loss"):
        docs[0][key] = np.stack([one[key] for one in docs])
    track = BOARDS.get(results[0]["track"], results[0]["track"])
    return Entry(",".join(map(str, folders)), {"track": track, "runs": results}, docs[0], logs)


def read_record(folder):
    record = read_json(folder / "record.json")
    check_schema(folder / "record.json", record, "record")
    logs = {run["log"]: read_bytes(folder / run["log"]) for run in record["runs"]}
    docs = folder / "doc_losses.npz"
    need(sha256(read_bytes(docs)) == record["doc_losses_sha256"], f"{docs} was changed since; restore it")
    return Entry(str(folder), record, read_docs(docs), logs)


def read(argument):
    """The Entry that is meant on the command line: the folder of one, or run folders joined by commas."""
    filed = Path(argument, "record.json").exists()
    return read_record(Path(argument)) if filed else read_runs(argument.split(","))


def folders_of(track):
    return sorted((RECORDS / track).glob("[0-9][0-9]_*"))


@functools.cache
def history(track):
    """The track's entries, oldest first."""
    return [read_record(folder) for folder in folders_of(track)]


def before(entry):
    return [old for old in history(entry.track) if old.number < entry.number]


def stood(entries):
    """Those that the others had to beat, each until the next: the records, before them the baselines."""
    kinds = [entry.record["kind"] for entry in entries]
    start = kinds.index("record") if "record" in kinds else len(kinds)
    return [entry for place, entry in enumerate(entries)
            if kinds[place] == "record" or kinds[place] == "baseline" and place < start]


# ---- Verdicts ------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """How a method compares with another on val; see stats.py for the terms."""
    against: str
    gain: float
    se_doc: float
    s: float
    dof: int
    n_new: int
    n_old: int

    @property
    def noise(self):
        return self.se_doc, self.s, self.n_new, self.n_old

    @property
    def half(self):
        """Half the width of the 95 % interval over documents and seeds."""
        return stats.WIDE * stats.total_se(*self.noise)

    @property
    def z(self):
        return stats.gate(self.gain, *self.noise)

    def __str__(self):
        return f"{self.gain:+.4f} ± {self.half:.4f} against {self.against}, z = {self.z:.1f}"

    def decided_by(self):
        more = stats.more_seeds(self.gain, *self.noise)
        return "no number of seeds would pass" if more is None else f"about {more} more seeds would pass"


def seed_noise(entries):
    """(s, degrees of freedom); runs of one script and config are one method, whichever entry has them."""
    methods = {}
    for run in (run for entry in entries for run in entry.runs):
        method = run["source_sha256"], json.dumps(run["config"], sort_keys=True)
        methods.setdefault(method, {})[run["log_sha256"]] = run["val_loss"]
    return stats.seed_noise([list(losses.values()) for losses in methods.values()])


def verdict_of(new, old, against, split="val", pool=()):
    """The Verdict on two Entries; `pool`: further ones to learn the noise of seeds from."""
    gain, se_doc = stats.paired_gain(new.split(split), old.split(split))
    return Verdict(against, gain, se_doc, *seed_noise([*pool, old, new]), len(new.runs), len(old.runs))


def judge(entry):
    """The Verdict against the entry that it reproduces, or else the record that stood when it was filed; None
    for the first of a track. What was filed later plays no part, so a verdict never changes."""
    earlier = before(entry)
    reproduced = [old for old in earlier if old.number == entry.record["of"]]
    rivals = reproduced or stood(earlier)[-1:]
    return verdict_of(entry, rivals[0], f"#{rivals[0].number}", pool=earlier) if rivals else None


def evidence(entry):
    """A phrase on how sure an entry is."""
    verdict = judge(entry)
    if verdict is None:
        return f"{entry.seeds}; the first of its track"
    if entry.record["kind"] == "reproduction":
        agrees = "agrees" if abs(verdict.gain) <= verdict.half else "disagrees"
        return f"{entry.seeds}; {agrees} with {verdict.against}: {verdict}"
    return f"{entry.seeds}; {verdict} {'✓' if verdict.z >= stats.GATE else '✗'}"


# ---- Checks --------------------------------------------------------------------------------------


def check_log(entry, run):
    log = entry.logs[run["log"]]
    need(sha256(log) == run["log_sha256"], f"{entry.name}/{run['log']} was changed since; restore it")
    header = re.match(rb"source train_gpt\.py (\d+) bytes sha256 ([0-9a-f]{64})\n", log)
    need(header, f"{entry.name}: {run['log']} doesn't begin with the source of train_gpt.py; run it again")
    source = log[header.end():][:int(header[1])]
    need(sha256(source) == header[2].decode() == run["source_sha256"],
         f"{entry.name}: the source in {run['log']} is not the one that the result names")


def check_losses(entry, name):
    """The stated losses are those of the per-document sums."""
    loss, tokens = entry.split(name)
    size = entry.docs[f"{name}_bytes"]
    need(loss.shape == (len(entry.runs), len(tokens)) and tokens.shape == size.shape,
         f"{entry.name}: the {name} arrays of doc_losses.npz don't fit each other")
    possible = np.isfinite(loss).all() and min(loss.min(), tokens.min(), size.min()) >= 0
    need(possible and not loss[:, tokens == 0].any(),
         f"{entry.name}: doc_losses.npz holds impossible {name} sums")
    for run, nats in zip(entry.runs, loss.sum(1)):
        who, stated, bpb = f"{entry.name}: seed {run['seed']}", run[f"{name}_loss"], run[f"{name}_bpb"]
        mean = nats / tokens.sum()
        need(abs(mean - stated) <= 1e-6, f"{who} states {name}_loss {stated}, its documents give {mean:.6f}")
        bound = nats / math.log(2) / size.sum()  # BOS targets have nats but no bytes; ruler.py is exact
        need(bpb <= bound + 1e-6, f"{who} states {name}_bpb {bpb}, its documents allow {bound:.6f}")


def check_data(entry):
    """The track's dataset, scored whole: as the track's first entry has it, and as the manifest has it where
    the dataset is here (a clone without the data can check all the rest)."""
    data, wanted = entry.runs[0]["data"], TRACKS[entry.track].data
    rebuild = f"rebuild the dataset with `python data/prepare.py {wanted}`"
    need(data["name"] == wanted, f"{entry.name}: trained on {data['name']}; track {entry.track} is {wanted}")
    for old in before(entry)[:1]:
        need(data == old.runs[0]["data"], f"{entry.name}: other tokens than those of {old.name}; {rebuild}")
    manifest = ROOT / "data" / wanted / "manifest.json"
    splits = read_json(manifest)["splits"] if manifest.exists() else {}
    for name in ("train", "val", "audit") if splits else ():
        need(data[name] == splits[name]["sha256"],
             f"{entry.name}: its {name} is not that of {manifest}; {rebuild}")
    for name in ("val", "audit") if splits else ():
        T, tokens = entry.runs[0]["config"]["seq_len"], entry.split(name).tokens
        whole = splits[name]["tokens"] // (T + 1) * T
        need((tokens.sum(), len(tokens)) == (whole, splits[name]["documents"]),
             f"{entry.name}: {name} was not scored whole: {tokens.sum():,} of {whole:,} tokens")


def check_rules(entry):
    """The caps, and the evidence that a record owes."""
    track, kind = TRACKS[entry.track], entry.record["kind"]
    mend = "; file it with --kind negative or reproduction"
    for run in entry.runs:
        who, machine, minutes = f"{entry.name}: seed {run['seed']}", run["machine"], run["train_seconds"] / 60
        gpu_days = run["gpu_seconds"] / 86400
        need(not run["violations"], f"{who} can be no {kind}: {'; '.join(run['violations'])}{mend}")
        need(minutes <= track.minutes,
             f"{who} trained {minutes:.2f} minutes, the cap is {track.minutes}{mend}")
        need(run["training_flops"] <= track.flops,
             f"{who} took {run['training_flops']:.3g} training FLOPs, the cap is {track.flops:.3g}{mend}")
        need(gpu_days <= track.gpu_days,
             f"{who} took {gpu_days:.1f} GPU days, the cap is {track.gpu_days}{mend}")
        need(not track.node or (machine["count"] == 8 and "H100" in machine["name"]),
             f"{who} ran on {machine['count']}x {machine['name']}, the track's minutes are of 8xH100{mend}")
    if kind == "record":
        need(len(entry.runs) >= track.seeds,
             f"{entry.name}: {entry.seeds}, a {entry.track} record needs {track.seeds}; run another --seed")
        verdict = judge(entry)
        need(verdict, f"{entry.name}: no entry to improve on yet; file it with --kind baseline")
        need(verdict.z >= stats.GATE, f"{entry.name}: no record: {verdict}, below {stats.GATE}; "
                                      f"{verdict.decided_by()}; or file it with --kind negative")


def check_entry(entry):
    """Everything that makes an entry worth filing; raises Refused at the first thing that is wrong."""
    record, first = entry.record, entry.runs[0]
    need(len({run["seed"] for run in entry.runs}) == len(entry.runs), f"{entry.name}: a seed occurs twice")
    for run in entry.runs:
        need(run["complete"], f"{entry.name}: seed {run['seed']} did not finish; go on with --resume")
        need(all(run[field] == first[field] for field in ("config", "source_sha256", "data")),
             f"{entry.name}: its runs differ in more than the seed")
        need(BOARDS.get(run["track"], run["track"]) == entry.track,
             f"{entry.name}: seed {run['seed']} is of track {run['track']}")
        check_log(entry, run)
    for name in ("val", "audit"):
        check_losses(entry, name)
        mean = np.mean([run[f"{name}_loss"] for run in entry.runs])
        need(abs(record[f"{name}_loss"] - mean) <= 1e-9,
             f"{entry.name}: its {name}_loss is not the mean of its runs")
    check_data(entry)
    named = record["of"] in [old.number for old in before(entry)]
    need(named == (record["kind"] == "reproduction"),
         f"{entry.name}: --kind reproduction, and no other, needs --of NUMBER, an earlier entry of its track")
    if record["kind"] in RULED:
        check_rules(entry)


def check_folder(folder):
    """`check_entry`, and what concerns the folder: its place, its number, its README."""
    entry = read_record(folder)
    here = folder.resolve()
    need(here.parts[-2:] == Path(entry.place).parts[-2:],
         f"{folder}: by its record.json it is {entry.place}; rename it")
    twins = sorted(twin.name for twin in here.parent.glob(f"{entry.number:02d}_*"))
    need(len(twins) == 1, f"{folder}: {' and '.join(twins)} have one number; renumber the later one")
    readme = read_bytes(folder / "README.md").decode()
    need(FILL_IN not in readme, f"{folder}/README.md still says {FILL_IN}; write it")
    check_entry(entry)


# ---- Tables and plots ----------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of a track's table, published or filed here."""
    number: str
    val_loss: float
    audit: str
    evidence: str
    title: str
    date: str
    time: str
    contributors: list
    log: str


def published(track):
    book = read_json(RECORDS / "published.json")
    return [Row(f"p{fact['number']}", fact["val_loss"], "–", "published, not verified here",
                fact["description"], fact["date"], fact["time_text"].split(" (")[0], fact["contributors"],
                f"[script]({book['source']}/blob/{fact['commit']}/{fact['script']})")
            for fact in book["records"] if fact["track"] == track]


def filed(track):
    rows = []
    for entry in stood(history(track)):
        record = entry.record
        minutes = np.mean([run["train_seconds"] for run in entry.runs]) / 60
        rows.append(Row(f"{entry.number}", record["val_loss"], f"{record['audit_loss']:.3f}",
                        evidence(entry), f"[{record['title']}]({entry.place})", record["date"],
                        f"{minutes:.1f} mins", record["contributors"],
                        f"[log]({entry.place}/{entry.runs[0]['log']})"))
    return rows


def data_efficiency(loss, data):
    """For people: "6.13x"; beyond the table "< 2x" or "> 20x"; a dash where the dataset has no curve."""
    baseline = read_json(RECORDS / "baseline.json").get(data)
    if baseline is None:
        return "–"
    multiple = stats.efficiency(loss, baseline)
    ends = [int(tokens) / baseline["unit_tokens"] for tokens in baseline["losses"]]
    return {0.0: f"< {min(ends):g}x", math.inf: f"> {max(ends):g}x"}.get(multiple, f"{multiple:.2f}x")


def watch(track):
    """(entry numbers, gaps, half-widths): by how much gains on val since the track's first entry exceed those
    on audit, for each later one that stood."""
    first, *later = stood(history(track)) or [None]
    numbers, gaps, halves = [], [], []
    for entry in later:
        pairs = [one.split(name) for name in ("val", "audit") for one in (entry, first)]
        gap, se = stats.overfit_gap(*pairs)
        numbers.append(entry.number)
        gaps.append(gap)
        halves.append(stats.WIDE * se)
    return numbers, gaps, halves


def watch_sentence(track):
    looks = sum(run["val_evaluations"] for entry in history(track) for run in entry.runs)
    numbers, gaps, halves = watch(track)
    return f"Overfitting watch: {looks} looks at val so far, by the runs filed here; " + (
        f"gains on val exceed gains on audit by {gaps[-1]:.4f} ± {halves[-1]:.4f} (95 %)."
        if numbers else "no second entry yet whose gains on val and audit could be compared.")


def steps(track, of):
    """[(number, published gain, title, Verdict)]: the entries here that repeat a published record of the track
    `of`, as their slugs `<of>-<number>` say, each beside the one before it."""
    losses = {row.number: row.val_loss for row in published(of)}
    repeats = {int(match[1]): entry for entry in history(track)
               if (match := re.fullmatch(rf"{of}-(\d+)", entry.record["slug"]))}
    return [(n, losses[f"p{m}"] - losses[f"p{n}"], new.record["title"],
             verdict_of(new, old, f"p{m}", pool=history(track)))
            for (m, old), (n, new) in itertools.pairwise(sorted(repeats.items()))]


def steps_table(track, of):
    """What the steps of a published history gain on a smaller track."""
    rows = steps(track, of)
    if len(rows) < 3:
        return []
    known, gains, halves = zip(*((known, verdict.gain, verdict.half) for _, known, _, verdict in rows))
    rho, low, high, p = stats.rank_correlation(known, gains, np.array(halves) / stats.WIDE)
    return ["", f"Does {track} predict {of}? Published records of {of}, repeated here: the gain of each step.",
            "", "| step | published gain | gain here | what |", "| - | - | - | - |",
            *(f"| {new.against} to p{n} | {known:+.3f} | {new.gain:+.4f} ± {new.half:.4f} | {title} |"
              for n, known, title, new in rows), "",
            f"Rank correlation of the {len(rows)} steps: {rho:.2f}; {low:.2f} to {high:.2f} within the noise "
            f"of documents and seeds. A random order does as well with probability {p:.2g}."]


def table(track):
    """The lines of a track's section."""
    lines = [f"### {track}", "", f"{TRACKS[track].rule}.", ""]
    rows = published(track) + filed(track)
    if rows:
        lines += [f"| {' | '.join(HEADINGS)} |", "| - " * len(HEADINGS) + "|"]
    for row in rows:
        multiple = data_efficiency(row.val_loss, TRACKS[track].data)
        cells = (row.number, f"{row.val_loss:.3f}", multiple, row.audit, row.evidence, row.title, row.date,
                 row.time, ", ".join(row.contributors), row.log)
        lines.append(f"| {' | '.join(cells)} |")
    in_table = {entry.number for entry in stood(history(track))}
    others = [entry for entry in history(track) if entry.number not in in_table]
    lines += ["", "Also filed:"] if others else []
    lines += [f"- #{entry.number}, {entry.record['kind']}: [{entry.record['title']}]({entry.place}), "
              f"val loss {entry.record['val_loss']:.3f}; {evidence(entry)}" for entry in others]
    lines += ["", watch_sentence(track)] if history(track) else []
    lines += steps_table(track, "limited") if track == "nano" else []
    return lines + ([] if rows or others else ["No entry yet."]) + [""]


def draw_plots():
    """{file name: bytes}."""
    import plots  # matplotlib takes longer to import than the other commands take to run

    def lines_of(data, value):
        lines = []
        for track in (track for track in TRACKS if TRACKS[track].data == data):
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
    watches = {track: watch(track) for track in TRACKS if watch(track)[0]}
    drawn = {"progress.svg": plots.progress(panels), "efficiency.svg": plots.efficiency(worth)}
    return {**drawn, "overfit.svg": plots.overfit(watches)} if watches else drawn


def rendered():
    """{path: bytes} of everything that is generated."""
    readme = read_bytes(ROOT / "README.md").decode()
    need(readme.count(BEGIN) == readme.count(END) == 1 and readme.index(BEGIN) < readme.index(END),
         f"README.md needs a line {BEGIN} and, below it, a line {END}; the tables go between them")
    drawn = draw_plots()
    lines = [f"![{name.split('.')[0]}](records/{name})" for name in drawn]
    lines += ["", LEGEND, ""]
    lines += [line for track in TRACKS for line in table(track)]
    block = "\n".join([BEGIN, *lines]).rstrip() + f"\n{END}"
    around = re.split(f"{BEGIN}.*{END}", readme, flags=re.DOTALL)
    files = {RECORDS / name: data for name, data in drawn.items()}
    return {ROOT / "README.md": block.join(around).encode(), **files}


# ---- Commands ------------------------------------------------------------------------------------


def write(path, data):
    """Whole or not at all, also through a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def add(args):
    entry = read_runs(args.runs)
    docs = io.BytesIO()
    np.savez_compressed(docs, **entry.docs)
    docs = docs.getvalue()
    means = {key: float(np.mean([run[key] for run in entry.runs])) for key in ("val_loss", "audit_loss")}
    number = max((old.number for old in history(entry.track)), default=0) + 1
    record = {"track": entry.track, "number": number, "slug": args.slug, "kind": args.kind, "of": args.of,
              "title": args.title, "contributors": args.contributors,
              "date": max(run["date"] for run in entry.runs), **means,
              "doc_losses_sha256": sha256(docs), "runs": entry.runs}
    check_schema("record", record, "record")
    entry = Entry(entry.name, record, entry.docs, entry.logs)
    check_entry(entry)
    print_verdict(entry)
    words = {"kind": args.kind.capitalize(), "contributors": ", ".join(args.contributors),
             "seeds": entry.seeds,
             "verdict": f"On val {judge(entry)}." if judge(entry) else "The first of its track."}
    readme = README.format(**{**record, **words}, fill_in=FILL_IN)
    files = {"record.json": (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode(),
             "README.md": readme.encode(), "doc_losses.npz": docs, **entry.logs}
    folder = ROOT / entry.place
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new_") as temporary:
        whole = Path(temporary, folder.name)
        whole.mkdir()
        for name, data in files.items():
            write(whole / name, data)
        whole.rename(folder)
    print(f"filed as {entry.place}; now write its README.md, then run "
          "`python records/leaderboard.py check` and `… render`")


def print_verdict(entry):
    losses = [run["val_loss"] for run in entry.runs]
    members = [member["val_loss"] for member in entry.runs[0]["members"]]
    print(f"val loss {np.mean(losses):.5f}; its seeds: {', '.join(f'{loss:.5f}' for loss in losses)}")
    if len(members) > 1:
        print(f"{len(members)} members: val loss {np.mean(members):.4f}, sd {np.std(members, ddof=1):.4f}")
    for row in published(entry.track)[-1:]:
        print(f"the last published loss is {row.val_loss} ({row.number}); not verified here, so no gate")
    verdict = judge(entry)
    if verdict:
        print(f"gain {verdict}: {'passes' if verdict.z >= stats.GATE else 'does not pass'} {stats.GATE}")
        print(f"its noise: {verdict.se_doc:.5f} from the documents, {verdict.s:.5f} a seed "
              f"(dof {verdict.dof}), {verdict.n_new} seeds against {verdict.n_old}")


def check(args):
    everything = sorted(path for path in RECORDS.glob("*/[!.]*") if path.is_dir())  # the misplaced ones too
    folders = list(map(Path, args.paths)) or everything
    problems = []
    for folder in folders:
        try:
            check_folder(folder)
        except Refused as problem:
            problems.append(str(problem))
    need(not problems, "\nerror: ".join(dict.fromkeys(problems)))
    print(f"{len(folders)} entries checked, all good")


def render(args):
    stale = {path: data for path, data in rendered().items()
             if not path.exists() or path.read_bytes() != data}
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    need(not (args.check and stale), f"{names} out of date; run `python records/leaderboard.py render`")
    for path, data in stale.items():
        write(path, data)
    print(f"rendered {names}" if stale else "up to date")


def compare(args):
    new, old = read(args.a), read(args.b)
    need(new.runs[0]["data"] == old.runs[0]["data"], "A and B were scored on different data; no comparison")
    for name in ("val", "audit"):
        a, b = new.split(name), old.split(name)
        verdict = verdict_of(new, old, "B", name, pool=history(new.track) + history(old.track))
        draws = stats.bootstrap_gain(a, b)
        low, high = np.quantile(draws, (0.025, 0.975))
        print(f"{name}: A {stats.mean_loss(a):.5f}, B {stats.mean_loss(b):.5f}, A gains {verdict.gain:+.5f}")
        print(f"  over documents ± {stats.WIDE * verdict.se_doc:.5f}, bootstrap [{low:+.5f}, {high:+.5f}]; "
              f"A is better with probability {np.mean(draws > 0):.4f}")
        print(f"  and over seeds ± {verdict.half:.5f} (s = {verdict.s:.5f}, dof {verdict.dof}), "
              f"z = {verdict.z:.2f}; A is better with probability {stats.NORMAL.cdf(verdict.z):.4f}")
    a, b = new.split("val"), old.split("val")
    scored = np.flatnonzero((a.tokens > 0) & (b.tokens > 0))
    moved = (b.loss.mean(0) / np.maximum(b.tokens, 1) - a.loss.mean(0) / np.maximum(a.tokens, 1))[scored]
    total = moved * a.tokens[scored]
    order = np.argsort(total)
    print(f"A is better on {np.mean(moved > 0):.1%} of {len(scored):,} val documents; those that moved most:")
    for place in [*order[::-1][:args.documents], *order[:args.documents]]:
        print(f"  document {scored[place]:>6}: {total[place]:+9.2f} nats, {moved[place]:+.4f} a token")


def power(args):
    entries = history(args.track)
    s, dof = seed_noise(entries)
    verdicts = [verdict for verdict in map(judge, entries) if verdict]
    se_doc = verdicts[-1].se_doc if verdicts else stats.TYPICAL_SE_DOC
    seeds = stats.seeds_for(args.gain, se_doc, s, args.power)
    answer = f"from {seeds} seeds of each method on" if seeds else "with no number of seeds"
    print(f"a true gain of {args.gain:g} on track {args.track} passes the gate in {args.power:.0%} of cases "
          f"{answer}; noise: {s:.5f} a seed (dof {dof}), {se_doc:.5f} from the documents")


def efficiency(args):
    known = ", ".join(read_json(RECORDS / "baseline.json"))
    answer = data_efficiency(args.loss, args.data)
    need(answer != "–", f"records/baseline.json has no curve for {args.data}; it has one for {known}")
    print(f"loss {args.loss:g} on {args.data}: {answer}{' (outside the table)' if answer[0] in '<>' else ''}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(f"{message}; {self.prog} --help shows how")


def arguments():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(function, help):
        added = commands.add_parser(function.__name__, help=help, description=help)
        added.set_defaults(function=function)
        return added.add_argument

    argument = command(add, "file runs as an entry of the leaderboard, if they pass every check")
    argument("runs", nargs="+", metavar="RUN", help="run folder; several: the same method with other seeds")
    argument("--slug", required=True, help="name of the folder: lower-case words joined by hyphens")
    argument("--title", required=True, help="what changed, in one line; the table shows it")
    argument("--contributors", required=True, nargs="+", metavar="NAME", help="who made it")
    argument("--kind", default="record", choices=("record", "baseline", "reproduction", "negative"),
             help="record (default): passes the gate. baseline: a starting point. reproduction: repeats the "
                  "entry --of. negative: did not help, which is worth knowing")
    argument("--of", type=int, metavar="NUMBER", help="the entry that a reproduction repeats")
    argument = command(check, "check entries: schema, digests, losses, data, caps, verdict, place")
    argument("paths", nargs="*", metavar="PATH", help="folder of an entry (default: all entries)")
    argument = command(render, "rewrite README.md's tables and the plots")
    argument("--check", action="store_true", help="write nothing, fail if they are out of date")
    argument = command(compare, "compare two methods document by document")
    argument("a", metavar="A", help="folder of an entry or of a run, or runs (seeds) joined by commas")
    argument("b", metavar="B", help="the same")
    argument("--documents", type=int, default=5, help="how many documents to list at each end (5)")
    argument = command(power, "how many seeds would show a gain")
    argument("gain", type=float, help="nats per token")
    argument("--track", default="nano", choices=TRACKS, help="whose noise to reckon with (nano)")
    argument("--power", type=float, default=0.8, help="wanted probability of passing the gate (0.8)")
    argument = command(efficiency, "a loss as a multiple of the training data")
    argument("loss", type=float, help="nats per token on val")
    argument("--data", default="fineweb100M", help="dataset (fineweb100M)")
    return parser.parse_args()


def main():
    try:
        args = arguments()
        args.function(args)
    except Refused as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `compare A B | head` ends without a traceback
    main()
