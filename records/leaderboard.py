"""The leaderboard: entries with their evidence, and the tables made of them.

    ./run.sh add RUN [RUN ...] --slug swiglu --title "SwiGLU MLP" --contributors ada
    ./run.sh check                 # every entry; CI runs it
    ./run.sh render                # the tables and plots; --check: are they fresh?
    ./run.sh runs                  # what is in runs/; --sort val: the best first
    ./run.sh compare A B           # is A better than B, how sure is that, and what differs?
    ./run.sh diff A [B]            # what changed in sources and configuration
    ./run.sh reproduce nano/9 --seed 45    # run an entry's own sources again
    ./run.sh power 0.003           # seeds needed to show a gain
    ./run.sh efficiency 3.2        # a loss as a multiple of the data

A RUN is a folder of runs/, by name or path; A and B are runs, runs joined by commas (seeds of one method),
or entries: nano/9, nano/09_preset, or a path. `add` takes runs that differ in their seed only and makes
records/<track>/<NN>_<slug>/ of them, provided that every check passes and, for a record, that the gain over
the standing record passes the gate of stats.py. It holds

    record.json             record.schema.json says what is in it
    README.md               what changed, why, the result, how choices were made, credits
    log.txt                 of several seeds: log_seed<k>.txt
    metrics.jsonl.gz        every step and evaluation; of several seeds: metrics_seed<k>.jsonl.gz
    doc_losses.npz          of val and audit: loss (seeds, documents), tokens and bytes (documents,)
    changes.diff            sources and configuration against the standing record's

Nothing that follows from those is stored: verdicts, tables and plots are computed from the entries each time.
A mistake is one line on stderr and exit code 2, and nothing is left half written.
"""

import argparse
import io
import json
import math
import os
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np

import changes
import entry as entries
import stats
import tables
from checks import CHOICES, FILL_IN, check_entry, check_folder, check_own_harness
from entry import (
    BOARDS,
    RECORDS,
    ROOT,
    SOURCES,
    TRACKS,
    Entry,
    Refused,
    check_schema,
    history,
    locate,
    need,
    printable,
    read_json,
    read_runs,
    sha256,
    unreadable,
)
from verdict import judge, noise_of_track, rivals

README = f"""# {{title}}

{{kind}} of the {{track}} track, by {{contributors}}.
Val loss **{{val_loss:.4f}}**, audit loss {{audit_loss:.4f}}, {{seeds}}.
{{verdict}}

## What changed
{FILL_IN}
{{changes}}
## Why it helps
{FILL_IN}

## Result
{FILL_IN}

{CHOICES}
{FILL_IN} What else was tried, how often anybody looked at val, \
and that nobody looked at audit before the end.

## Credits
{FILL_IN}
"""


# ---- add, check, render ------------------------------------------------------------------------------------

def write(path, data):
    """Whole or not at all, also through a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

def add(args):
    need(not unreadable(), f"{(unreadable() or [''])[0]}; mend it first")
    folders = [locate(name) for name in args.runs]
    run = read_runs(folders, whole=True)
    docs = io.BytesIO()
    np.savez_compressed(docs, **run.docs)
    docs = docs.getvalue()
    means = {key: float(np.mean([one[key] for one in run.runs])) for key in ("val_loss", "audit_loss")}
    number = max((old.number for old in history(run.track)), default=0) + 1
    record = {"track": run.track, "number": number, "slug": args.slug, "kind": args.kind, "of": args.of,
              "title": args.title, "contributors": args.contributors,
              "date": max(one["date"] for one in run.runs), **means, "doc_losses_sha256": sha256(docs),
              "runs": run.runs}
    check_schema("record", record, "record")
    entry = Entry(run.name, record, run.docs, run.files)
    check_entry(entry)
    print_verdict(entry)
    rival = rivals(entry)
    files = {"record.json": (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode(),
             "README.md": readme_of(entry, rival).encode(), "doc_losses.npz": docs, **entry.files}
    if rival:
        files["changes.diff"] = changes.diff(entry, rival[0]).encode()
        print(f"changed against {rival[0].label}:", *changes.summary(entry, rival[0]), sep="\n  ")
    folder = ROOT / entry.place
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new_") as temporary:
        whole = Path(temporary, folder.name)
        whole.mkdir()
        for name, data in files.items():
            write(whole / name, data)
        whole.rename(folder)
    print(f"filed as {entry.place}; now write its README.md, then ./run.sh check and ./run.sh render")

def readme_of(entry, rival):
    record = entry.record
    words = {"kind": entry.kind.capitalize(),
             "contributors": ", ".join(map(tables.escape, record["contributors"])),
             "title": tables.escape(record["title"]), "seeds": entry.seeds,
             "verdict": f"On val {judge(entry)}." if rival else "The first of its track.",
             "changes": f"\nEvery changed line: [changes.diff](changes.diff), against {rival[0].label}.\n"
             if rival else ""}
    return README.format(**{**record, **words})

def print_verdict(entry):
    losses = [run["val_loss"] for run in entry.runs]
    members = [member["val_loss"] for member in entry.runs[0]["members"]]
    print(f"val loss {np.mean(losses):.5f}; its seeds: {', '.join(f'{loss:.5f}' for loss in losses)}")
    if len(members) > 1:
        print(f"{len(members)} members: val loss {np.mean(members):.4f}, sd {np.std(members, ddof=1):.4f}")
    for row in tables.published(entry.track)[-1:]:
        print(f"the last published loss is {row.val_loss} ({row.number}); not verified here, so no gate")
    verdict = judge(entry)
    if verdict:
        print(f"gain {verdict}: {'passes' if verdict.z >= stats.GATE else 'does not pass'} {stats.GATE}")
        print(f"its noise: {verdict.se_doc:.5f} from the documents, {verdict.s:.5f} a seed "
              f"(dof {verdict.dof}), {verdict.n_new} seeds against {verdict.n_old}")

def check(args):
    everything = sorted(path for path in RECORDS.glob("*/[!.]*") if path.is_dir()
                        and path.parent.name[0] not in "._")
    folders = [folder for folder in (list(map(Path, args.paths)) or everything)
               if folder.parent.name != "__pycache__"]
    problems = []

    def attempt(function, *arguments):
        try:
            function(*arguments)
        except Refused as problem:
            problems.append(str(problem))
        except Exception as error:  # what the checks did not foresee is not sound; the others go on
            problems.append(f"{arguments[0]}: cannot be checked: {error!r}")

    attempt(check_own_harness)
    for folder in folders:
        attempt(check_folder, folder)
    need(not problems, "\nerror: ".join(dict.fromkeys(map(printable, problems))))
    print(f"{len(folders)} entries checked, all good")

def render(args):
    need(args.site or not args.runs, "--runs stand on a site; name its folder: --site DIR")
    need(not unreadable(), f"{(unreadable() or [''])[0]}; mend it first")
    stale = {path: data for path, data in tables.rendered().items() if not path.exists()
             or path.read_bytes() != data}
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    need(not (args.check and stale), f"{names} out of date; run ./run.sh render")
    for path, data in stale.items():
        write(path, data)
    print(f"rendered {names}" if stale else "up to date")
    if args.site:
        import website

        website.build(args.site, args.runs)


# ---- Questions ---------------------------------------------------------------------------------------------

def power(args):
    need(math.isfinite(args.gain) and args.gain > 0,
         f"a gain of {args.gain:g} nats; name one above 0, like 0.003")
    need(0 < args.power < 1, f"--power {args.power:g}: a probability between 0 and 1, like 0.8")
    s, dof, se_doc = noise_of_track(args.track)
    seeds = stats.seeds_for(args.gain, se_doc, s, args.power)
    answer = f"from {seeds} seeds of each method on" if seeds else "with no number of seeds"
    print(f"a true gain of {args.gain:g} on track {args.track} passes the gate in {args.power:.0%} of cases "
          f"{answer}; noise: {s:.5f} a seed (dof {dof}), {se_doc:.5f} from the documents")

def efficiency(args):
    need(math.isfinite(args.loss) and args.loss > 0, f"a loss of {args.loss:g}; name one above 0, like 3.2")
    known = ", ".join(read_json(RECORDS / "baseline.json"))
    answer = tables.data_efficiency(args.loss, args.data)
    need(answer != "–", f"records/baseline.json has no curve for {args.data}; it has one for {known}")
    print(f"loss {args.loss:g} on {args.data}: {answer}{' (outside the table)' if answer[0] in '<>' else ''}")

def compare(args):
    import comparison

    comparison.compare(args)

def runs(args):
    import comparison

    comparison.list_runs(args)

def diff(args):
    new = entries.read(args.a)
    if args.b is None:
        standing = rivals(new) if new.filed else entries.stood(history(new.track))[-1:]
        need(standing, f"{new.label} has nothing before it; name a second run or entry")
    old = entries.read(args.b) if args.b else standing[0]
    print(changes.diff(new, old), end="")

def reproduce(args):
    """Puts the entry's own sources beside this repository's launcher and data, and starts them there."""
    entry = entries.read_record(locate(args.entry))
    need(entry.runs[0]["data"]["name"] in {row["dataset"] for row in TRACKS.values()},
         "its dataset is unknown")
    folder = ROOT / "runs" / f".reproduce_{entry.track}_{entry.number}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (dict.fromkeys(SOURCES, b"") | entry.sources()).items():
        write(folder / name, text) if text else (folder / name).unlink(missing_ok=True)
    write(folder / "config.json", json.dumps(entry.runs[0]["config"], indent=1).encode())
    write(folder / "run.sh", (ROOT / "run.sh").read_bytes())  # it works where it lies: a link would lead back
    (folder / "run.sh").chmod(0o755)
    for name in ("records", "data", "cluster", "runs", ".venv", "requirements.txt"):
        (folder / name).unlink(missing_ok=True)
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    name = f"reproduce_{entry.track}_{entry.number}_s{args.seed}"
    command = [str(folder / "run.sh"), entry.runs[0]["track"], "--config", str(folder / "config.json"),
               "--seed", str(args.seed), "--run-name", name, *args.flags]
    print(f"starts the sources of {entry.label} in {folder.relative_to(ROOT)}; its run is runs/{name}. "
          f"When it is done:\n  ./run.sh compare {name} {entry.label}\n"
          f"  ./run.sh add {name} --kind reproduction --of {entry.number} "
          "--slug again --title TITLE --contributors YOU", flush=True)
    os.execv("/bin/bash", ["bash", *command])


# ---- Command line ------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(f"{message}; {self.prog} --help shows how")

def seed(text):
    value = int(text)
    if not 0 <= value < 2**31:
        raise ValueError
    return value

def arguments(argv=None):
    parser = Parser(prog="./run.sh", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(function, help):
        added = commands.add_parser(function.__name__, help=help, description=help)
        added.set_defaults(function=function)
        return added.add_argument

    method = "a run (name or path), runs joined by commas (seeds of one method), or an entry (nano/9 or path)"
    argument = command(add, "file runs as an entry of the leaderboard, if they pass every check")
    argument("runs", nargs="+", metavar="RUN",
             help="run, by name or path; several: the same method, other seeds. "
             "The seeds of a record are 42, 43, 44, …")
    argument("--slug", required=True, help="name of the folder: lower-case words joined by hyphens")
    argument("--title", required=True, help="what changed, in one line; the table shows it")
    argument("--contributors", required=True, nargs="+", metavar="NAME", help="who made it")
    argument("--kind", default="record", choices=("record", "baseline", "reproduction", "negative"),
             help="record (default): passes the gate. baseline: a starting point. reproduction: repeats the "
             "entry --of. negative: did not help, which is worth knowing")
    argument("--of", type=int, metavar="NUMBER", help="the entry that a reproduction repeats")
    argument = command(check, "check entries: evidence, losses, data, harness, caps, verdict, place")
    argument("paths", nargs="*", metavar="PATH", help="folder of an entry (default: all entries)")
    argument = command(render, "rewrite the tables and the plots")
    argument("--site", type=Path, metavar="DIR",
             help="also write the leaderboard as pages that open without a server")
    argument("--runs", nargs="+", default=[], metavar="RUN", help="to be compared with the entries there")
    argument("--check", action="store_true", help="write nothing, fail if they are out of date")
    argument = command(runs, "list what is in runs/, the newest last")
    argument("--sort", choices=("date", "val"), default="date",
             help="by date (default), or by val loss, best first")
    argument = command(compare, "compare two methods: losses, settings, sources, documents, curves")
    argument("a", metavar="A", help=method)
    argument("b", metavar="B", help="the same")
    argument("--documents", type=int, default=5, help="how many documents to list at each end (5)")
    argument("--picture", type=Path, metavar="FILE", help="where to draw the curves (runs/compare_A_B.svg)")
    argument = command(diff, "what changed in sources and configuration, as a diff")
    argument("a", metavar="A", help=method)
    argument("b", metavar="B", nargs="?", help="the same (default: the record that stood before A)")
    argument = command(reproduce, "run an entry's own sources with its configuration and a seed of your own; "
                       "further flags go to the run, like --device-batch 2")
    argument("entry", metavar="ENTRY", help="nano/9, or the path of an entry")
    argument("--seed", type=seed, required=True, help="one that the entry does not have")
    argument = command(power, "how many seeds would show a gain")
    argument("gain", type=float, help="nats per token")
    argument("--track", default="nano", choices=BOARDS, help="whose noise to reckon with (nano)")
    argument("--power", type=float, default=0.8, help="wanted probability of passing the gate (0.8)")
    argument = command(efficiency, "a loss as a multiple of the training data")
    argument("loss", type=float, help="nats per token on val")
    argument("--data", default="fineweb100M", help="dataset (fineweb100M)")
    args, args.flags = parser.parse_known_args(argv)
    need(not args.flags or args.function is reproduce,
         f"unknown: {' '.join(args.flags)}; {parser.prog} COMMAND --help shows what there is")
    return args

def main(argv=None):
    try:
        args = arguments(argv)
        args.function(args)
    except Refused as problem:
        print(f"error: {problem if chr(10) in str(problem) else printable(problem)}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `compare A B | head` ends without a traceback
    main()
