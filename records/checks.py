"""Everything that makes an entry worth filing. Each check raises Refused at the first thing that is wrong."""

import functools
import math
import re
from datetime import date
from pathlib import Path

import numpy as np

import changes
import evidence
import stats
from entry import (
    BOARDS,
    RECORDS,
    ROOT,
    SOURCES,
    SPLITS,
    TRACKS,
    Refused,
    before,
    board_of,
    history,
    need,
    read_bytes,
    read_json,
    read_record,
    read_text,
    sha256,
)
from flops import check_flops
from verdict import judge, rivals, watched

RULED = ("record", "baseline")  # the kinds that the caps bind; others may take their time on other hardware
FIRST_SEED = 42
FILL_IN = "(fill in)"
CHOICES = "## How choices were made without val"
AS_OTHER = "; file it with --kind negative or reproduction"

HARNESS = "harness.py", "logbook.py"  # what no submission may change


# ---- The harness -------------------------------------------------------------------------------------------

@functools.cache
def merged_harnesses():
    """{sha256: date} of harness.sha256, whose lines are a digest and a date."""
    lines = [line for line in read_text(RECORDS / "harness.sha256").splitlines() if line and line[0] != "#"]
    for line in lines:
        need(re.fullmatch(r"[0-9a-f]{64}  20\d\d-\d\d-\d\d", line),
             f"records/harness.sha256: no digest and date: {line}")
    return dict(line.split() for line in lines)

def check_own_harness():
    """
    This tree's harness.py and logbook.py are among the merged, or the line that would make them so is said.
    """
    for name in filter(lambda name: (ROOT / name).exists(), HARNESS):
        digest = sha256(read_bytes(ROOT / name))
        need(digest in merged_harnesses(),
             f"{name} is no merged version; a change of the rules is a pull request of its own, "
             f"which adds to records/harness.sha256 the line: {digest}  {date.today()}")

def original(entry):
    """The entry that a reproduction repeats, or None."""
    return next((old for old in before(entry) if old.number == entry.record["of"]), None)

def check_harness(entry):
    """Its harness.py is a merged version. Entries from before there was one have none, nor have those who run
    the source of such an entry again."""
    if entry.old:
        return
    run, repeated = entry.runs[0], original(entry)
    if "harness_sha256" not in run:
        need(repeated and "harness_sha256" not in repeated.runs[0]
             and run["source_sha256"] == repeated.runs[0]["source_sha256"],
             f"{entry.name}: ran without harness.py; "
             "only a reproduction of an entry that has none may do that")
        return
    for name in HARNESS:
        need(run.get(SOURCES[name]) in merged_harnesses(),
             f"{entry.name}: its {name} is no merged version (records/harness.sha256); a change of {name} "
             "is a change of the rules and a pull request of its own")


# ---- The evidence ------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=256)
def parsed_log(raw, who):
    return evidence.read_log(raw, who)

def log_of(entry, run):
    return parsed_log(entry.files[run["log"]], f"{entry.name}/{run['log']}")

def check_run(entry, run):
    """The log and the metrics of a run say what its result says."""
    who, log = f"{entry.name}: seed {run['seed']}", log_of(entry, run)
    for name, key in SOURCES.items():
        if name in log.sources:
            need(sha256(log.sources[name]) == run.get(key),
                 f"{entry.name}: the {name} in {run['log']} is not the one that the result names")
    evidence.check_log(log, run, who)
    if entry.old:
        return
    need(run.get("metrics") in entry.files and run.get("checkpoints"),
         f"{who}: its metrics and the digests of its checkpoints are missing; "
         "file the run folder with ./run.sh add")
    need(set(run["checkpoints"]) == {member["checkpoint"] for member in run["members"]},
         f"{who}: the digests are not those of the members' checkpoints")
    evidence.check_metrics(entry.files[run["metrics"]], log, run, who)
    if "harness_sha256" in run:
        for field in ("segments", "steps", "executed_flops"):
            need(field in run, f"{who}: its result has no {field}")
        evidence.check_segments(log, run, who)

def check_unlike(entry):
    """
    No two runs share a log, losses, or the losses of their steps; neither here nor in what was filed before.
    """
    seen = {}
    everything = [old for track in BOARDS for old in history(track) if track != entry.track
                  or old.number < entry.number]
    for one in [*everything, entry]:
        for row, run in enumerate(one.runs):
            marks = [
                ("log", run["log_sha256"]),
                ("val loss", run["val_loss"]),
                ("audit loss", run["audit_loss"]),
                ("losses of documents", one.docs["val_loss"][row].tobytes()),
            ]
            if one is entry or one.track == entry.track:
                marks.append(("training losses", evidence.losses_of_steps(log_of(one, run))))
            for what, value in marks:
                twin = seen.setdefault((what, value), (one, run["seed"]))
                need(one is not entry or twin == (one, run["seed"]),
                     f"{entry.name}: seed {run['seed']} has the {what} of seed {twin[1]} of {twin[0].label}; "
                     "each run is filed once, a reproduction takes seeds of its own")

def check_losses(entry, name):
    """The stated losses are those of the per-document sums."""
    loss, tokens = entry.split(name)
    size = entry.docs[f"{name}_bytes"]
    need(tokens.ndim == 1 and loss.shape == (len(entry.runs), len(tokens)) and tokens.shape == size.shape,
         f"{entry.name}: the {name} arrays of doc_losses.npz don't fit each other")
    possible = np.isfinite(loss).all() and min(loss.min(), tokens.min(), size.min()) >= 0
    possible = possible and max(tokens.max(), size.max()) < 1e9 and 0 < tokens.sum() and 0 < size.sum()
    need(possible and tokens.dtype.kind in "iu" and not loss[:, tokens == 0].any(),
         f"{entry.name}: doc_losses.npz holds impossible {name} sums")
    for run, nats in zip(entry.runs, loss.sum(1)):
        who, stated, bpb = f"{entry.name}: seed {run['seed']}", run[f"{name}_loss"], run[f"{name}_bpb"]
        mean = nats / tokens.sum()
        need(abs(mean - stated) <= 1e-6, f"{who} states {name}_loss {stated}, its documents give {mean:.6f}")
        bound = nats / math.log(2) / size.sum()  # BOS targets have nats but no bytes; ruler.py is exact
        need(bpb <= bound + 1e-6, f"{who} states {name}_bpb {bpb}, its documents allow {bound:.6f}")
    mean = np.mean([run[f"{name}_loss"] for run in entry.runs])
    need(abs(entry.record[f"{name}_loss"] - mean) <= 1e-9,
         f"{entry.name}: its {name}_loss is not the mean of its runs")

def check_data(entry):
    """The track's dataset, scored whole: as the track's first entry has it, and as the manifest has it where
    the dataset is here (a clone without the data can check all the rest)."""
    data, wanted = entry.runs[0]["data"], TRACKS[entry.track]["dataset"]
    rebuild = f"rebuild the dataset with ./run.sh data {wanted}"
    need(data["name"] == wanted, f"{entry.name}: trained on {data['name']}; track {entry.track} is {wanted}")
    for old in before(entry)[:1]:
        need(data == old.runs[0]["data"], f"{entry.name}: other tokens than those of {old.name}; {rebuild}")
        for key in (f"{split}_{what}" for split in SPLITS for what in ("tokens", "bytes")):
            same = entry.docs[key].shape == old.docs[key].shape
            if same and entry.runs[0]["config"]["seq_len"] == old.runs[0]["config"]["seq_len"]:
                same = np.array_equal(entry.docs[key], old.docs[key])
            need(same, f"{entry.name}: its documents are not those of {old.name} ({key})")
    manifest = ROOT / "data" / wanted / "manifest.json"
    splits = read_json(manifest)["splits"] if manifest.exists() else {}
    for name in ("train", "val", "audit") if splits else ():
        need(data[name] == splits[name]["sha256"],
             f"{entry.name}: its {name} is not that of {manifest}; {rebuild}")
    for name in SPLITS if splits else ():
        T, tokens = entry.runs[0]["config"]["seq_len"], entry.split(name).tokens
        whole = splits[name]["tokens"] // (T + 1) * T
        need((tokens.sum(), len(tokens)) == (whole, splits[name]["documents"]),
             f"{entry.name}: {name} was not scored whole: {tokens.sum():,} of {whole:,} tokens")


# ---- The rules ---------------------------------------------------------------------------------------------

def check_caps(entry):
    """What a track allows, on the machines that it names."""
    kind, cap = entry.kind, TRACKS[entry.track]["cap"]
    for run in entry.runs:
        who = f"{entry.name}: seed {run['seed']}"
        need(not run["violations"], f"{who} can be no {kind}: {'; '.join(run['violations'])}{AS_OTHER}")
        for field, most in cap.items():
            said = (f"{run[field] / 60:.1f} H100-minutes" if field == "gpu_seconds"
                    else f"{run[field]:.4g} {field}")
            allowed = f"{most / 60:.0f}" if field == "gpu_seconds" else f"{most:.4g}"
            need(run[field] <= most, f"{who} took {said}, the cap is {allowed}{AS_OTHER}")
        for machine in [run["machine"], *(segment["machine"] for segment in run.get("segments", ()))]:
            need("gpu_seconds" not in cap or "H100" in machine["name"],
                 f"{who} ran on {machine['name']}; the track's cap counts minutes of an H100{AS_OTHER}")

def check_record(entry):
    """What a record owes: seeds, and a gain that passes the gate and that audit shows too."""
    wanted, verdict = TRACKS[entry.track]["seeds"], judge(entry)
    need(len(entry.runs) >= wanted,
         f"{entry.name}: {entry.seeds}, a {entry.track} record needs {wanted}; run another --seed")
    need(verdict, f"{entry.name}: no entry to improve on yet; file it with --kind baseline")
    need(verdict.z >= stats.GATE, f"{entry.name}: no record: {verdict}, below {stats.GATE}; "
         f"{verdict.decided_by()}; or file it with --kind negative")
    gap, se = watched(entry, rivals(entry)[0])
    need(gap <= stats.GATE * se,
         f"{entry.name}: no record: val gains {gap:.4f} more than audit, {stats.GATE} standard errors allow "
         f"{stats.GATE * se:.4f}; what is chosen on val is no gain; or file it with --kind negative")

def check_entry(entry):
    """An Entry that has a record, filed or about to be."""
    record, first, seeds = entry.record, entry.runs[0], [run["seed"] for run in entry.runs]
    try:
        days = [date.fromisoformat(one["date"]) for one in (record, *entry.runs)]
    except ValueError as error:
        raise Refused(f"{entry.name}: {error}") from None
    need(days[0] == max(days[1:]), f"{entry.name}: its date is not that of its last run")
    need(entry.track in BOARDS,
         f"{entry.name}: a run of {entry.track} files no record; the tracks that do are {', '.join(BOARDS)}")
    need(len(set(seeds)) == len(seeds), f"{entry.name}: a seed occurs twice")
    for run in entry.runs:
        need(run["complete"], f"{entry.name}: seed {run['seed']} did not finish; go on with --resume")
        need(all(run.get(key) == first.get(key) for key in ("config", *SOURCES.values(), "data")),
             f"{entry.name}: its runs differ in more than the seed")
        need(board_of(run["track"], entry.name) == entry.track,
             f"{entry.name}: seed {run['seed']} is of track {run['track']}")
    need((original(entry) is not None) == (entry.kind == "reproduction"),
         f"{entry.name}: --kind reproduction, and no other, needs --of NUMBER, an earlier entry of its track")
    check_harness(entry)
    for name in SPLITS:
        check_losses(entry, name)
    check_data(entry)
    for run in entry.runs:
        check_run(entry, run)
    check_unlike(entry)
    if entry.kind in RULED:
        wanted = list(range(FIRST_SEED, FIRST_SEED + len(seeds)))
        need(seeds == wanted,
             f"{entry.name}: its seeds are {', '.join(map(str, seeds))}; those of a {entry.kind} are "
             f"{', '.join(map(str, wanted))}, so that nobody picks them")
        check_caps(entry)
    if "harness_sha256" in first:
        check_flops(entry)
    if entry.kind == "record":
        check_record(entry)

def check_folder(folder):
    """`check_entry`, and what concerns the folder: its place, its number, its files, its README."""
    folder = Path(folder)
    entry = read_record(folder)
    here = folder.resolve()
    need(here.parts[-2:] == Path(entry.place).parts[-2:],
         f"{folder}: by its record.json it is {entry.place}; rename it")
    twins = sorted(twin.name for twin in here.parent.glob(f"{entry.number:02d}_*"))
    need(len(twins) == 1, f"{folder}: {' and '.join(twins)} have one number; renumber the later one")
    readme = read_text(folder / "README.md")
    need(FILL_IN not in readme, f"{folder}/README.md still says {FILL_IN}; write it")
    check_entry(entry)
    rival = rivals(entry) if not entry.old else []
    wanted = {"record.json", "README.md", "doc_losses.npz", *entry.files, *["changes.diff"] * len(rival)}
    found = {path.name for path in folder.iterdir()}
    need(found == wanted,
         f"{folder}: its files are not those of an entry: {', '.join(sorted(found ^ wanted))}")
    if rival:
        need(read_text(folder / "changes.diff") == changes.diff(entry, rival[0]),
             f"{folder}/changes.diff is not the difference from {rival[0].label}; restore it")
    if not entry.old:
        section = readme.partition(f"\n{CHOICES}\n")[2].partition("\n## ")[0]
        need(len(section.split()) >= 3, f"{folder}/README.md needs a section '{CHOICES}'")
