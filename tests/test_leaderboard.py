"""
The leaderboard as people and cheats use it, on a repository of the test's own; a process only where it
matters.
"""

import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from test_run import link_venv, run_sh

ROOT = Path(__file__).resolve().parent.parent
MODULES = [path.stem for path in (ROOT / "records").glob("*.py")]
DOCUMENTS, SEQ_LEN, STEPS = 400, 64, 6
HARNESS, LOGBOOK = b"# the harness\n", b"# the logbook\n"
DATA = {"name": "nano", "train": "1" * 64, "val": "2" * 64, "audit": "3" * 64}
CPU = {"device": "cpu", "name": "a CPU", "count": 1, "torch": "2.13.0"}
H100S = {"device": "cuda", "name": "NVIDIA H100 80GB HBM3", "count": 8, "torch": "2.13.0"}
FINEWEB = DATA | {"name": "fineweb100M"}
START = math.log(4096)  # the loss of weights that know nothing
FLOPS = 1.9e14
SOURCE = b"""FLOPS = %r

class Config:
    def __init__(self, **fields):
        vars(self).update(fields)

class Schedule:
    def training_flops(self, vocab_size):
        return FLOPS

def member_schedule(c, tokens, team, member, max_steps=None):
    return Schedule()
"""
SOURCE, DEARER = SOURCE % FLOPS, SOURCE % (1.1 * FLOPS)

def sha256(data):
    return hashlib.sha256(data).hexdigest()

class Repository:
    """A repository with the real records/*.py and no entries, and a maker of run folders by the contract."""

    def __init__(self, root):
        self.root, self.records = root, root / "records"
        self.records.mkdir(parents=True)
        for file in (ROOT / "records").iterdir():
            if file.suffix in (".py", ".json"):
                shutil.copy(file, self.records)
        # To count an entry's FLOPs again takes a process each time; real_flops() brings that back.
        (self.records / "flops.py").write_text("def check_flops(entry):\n    pass\n")
        (root / "data").mkdir()
        shutil.copy(ROOT / "data/tokens.json", root / "data")
        (self.records / "before_harness.sha256").write_text("")
        (self.records / "harness.sha256").write_text(
            "# merged\n" + "".join(f"{sha256(text)}  2026-11-28\n" for text in (HARNESS, LOGBOOK))
        )
        for readme in (root / "README.md", self.records / "README.md"):
            begin, end = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"
            readme.write_text(f"# Slowrun\n\nbefore\n{begin}\nold\n{end}\nafter\n")
        rng = np.random.default_rng(0)
        self.tokens = {split: rng.integers(32, 200, DOCUMENTS) for split in ("val", "audit")}
        self.difficulty = {split: rng.normal(4.0, 0.6, DOCUMENTS) for split in ("val", "audit")}

    def real_flops(self):
        shutil.copy(ROOT / "records/flops.py", self.records)

    def __call__(self, *args, ok=True):
        """What a command prints: on stdout, or where it is refused on stderr."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with (imported(self.records) as module, contextlib.redirect_stdout(out),
              contextlib.redirect_stderr(err)):
            before = os.getcwd()
            os.chdir(self.root)
            try:
                module("leaderboard").main(list(map(str, args)))
            except SystemExit as end:
                code = end.code
            finally:
                os.chdir(before)
        assert code == (0 if ok else 2), out.getvalue() + err.getvalue()
        if not ok:
            assert err.getvalue().startswith("error: ")
        return out.getvalue() if ok else err.getvalue()

    def run(self, name, seed=42, level=0.0, source=SOURCE, track="nano", seed_sd=0.001, audit_level=None,
            harness=HARNESS, config=(), start=START, **fields):
        """A run folder whose documents are `level` nats a token above the corpus's difficulty."""
        folder = self.root / "runs" / name
        (folder / "checkpoints").mkdir(parents=True)
        rng = np.random.default_rng([seed, sum(name.encode())])
        shift = rng.normal(0, seed_sd)
        docs, losses = {}, {}
        for split, tokens in self.tokens.items():
            at = audit_level if split == "audit" and audit_level is not None else level
            nats = tokens * (self.difficulty[split] + at + shift + rng.normal(0, 0.02, DOCUMENTS))
            docs |= {f"{split}_tokens": tokens, f"{split}_bytes": tokens * 4, f"{split}_loss": nats}
            losses[f"{split}_loss"] = nats.sum() / tokens.sum()
            losses[f"{split}_bpb"] = losses[f"{split}_loss"] / math.log(2) / 4
        machine, seconds = fields.get("machine", CPU), fields.get("train_seconds", 300.0)
        config = {"seq_len": SEQ_LEN, "batch_tokens": 640, "n_layer": 2, **dict(config)}
        weights = f"weights of {name}".encode()
        result = {"track": track, "seed": seed, "config": config, **losses,
                  "members": [{"checkpoint": "last.pt", "weight": 1.0, "val_loss": losses["val_loss"]}],
                  "parameters": 1_000_000, "tokens_seen": STEPS * 640, "steps": STEPS,
                  "training_flops": FLOPS, "executed_flops": 1.05 * fields.get("training_flops", FLOPS),
                  "train_seconds": seconds, "wall_seconds": seconds + 20,
                  "gpu_seconds": seconds * machine["count"],
                  "segments": [{"seconds": seconds, "ranks": machine["count"], "machine": machine}],
                  "machine": machine, "data": DATA, "source_sha256": sha256(source),
                  "harness_sha256": sha256(harness), "logbook_sha256": sha256(LOGBOOK), "val_evaluations": 4,
                  "violations": [], "date": "2026-11-28", "complete": True, **fields}
        train = 4 + rng.random(STEPS)
        rows = [{"kind": "eval", "member": 0, "step": 0, "epoch": 0, "loss": start, "at": 0}]
        text = f"slowrun {track}, seed {seed}: {machine['count']} x {machine['name']}, "
        text += f"float32 (no bfloat16 units), torch {machine['torch']}\npython 3.11\n"
        text += f"config {json.dumps(config)}\nplan   …\n"
        text += "       prepared in 9 s; matrix products take 1.050 of the FLOPs stated\n"
        text += f"start  val {start:.4f} before training\n"
        for step, loss in enumerate(train):
            at = seconds * (step + 1) / STEPS
            rows.append({"kind": "step", "member": 0, "step": step, "loss": loss, "seconds": round(at, 3),
                         "at": step})
            text += f"step   {step + 1:5d}/{STEPS}  train {loss:.4f}  {at:.1f} s\n"
            if step % 3 == 2:
                val = losses["val_loss"] + (step < 5) * 0.1
                rows.append({"kind": "eval", "member": 0, "step": step + 1, "epoch": step // 3 + 1,
                             "loss": val, "at": step + 1})
                text += (f"epoch  {step // 3 + 1:3d}/2  step {step + 1:5d}  train {loss:.4f}  val {val:.4f}  "
                         f"1.0 bpb  {at / 60:.1f} min  1,000 tok/s\n")
        rows.append({"kind": "final", "step": STEPS, **losses, "at": STEPS})
        r = result
        text += (
            (
                f"\nval loss     {r['val_loss']:.4f}   ({r['val_bpb']:.4f} bits per byte)\n"
                f"audit loss   {r['audit_loss']:.4f}   ({r['audit_bpb']:.4f} bits per byte)\n"
                f"  member     {losses['val_loss']:.4f}   val loss of last.pt, weight 1.000\n"
                f"training     {r['train_seconds'] / 60:.1f} min of {r['wall_seconds'] / 60:.1f} min in all\n"
                f"compute      {r['training_flops']:.4g} FLOPs, {r['tokens_seen']:,} tokens, "
                "1,000,000 parameters\n"
                f"run          runs/{name}/  (loss.svg, result.json, log.txt)\n"
            )
            if all(isinstance(r[key], float) for key in ("val_loss", "audit_loss"))
            else ""
        )
        head = b"".join(b"source %s %d bytes sha256 %s\n%s\n" % (file, len(body), sha256(body).encode(), body)
                        for file, body in ((b"train_gpt.py", source), (b"harness.py", harness),
                                           (b"logbook.py", harness and LOGBOOK)) if body)
        if not harness:
            for key in ("harness_sha256", "logbook_sha256", "segments", "steps", "executed_flops"):
                del result[key]
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "run.json").write_text(json.dumps({"track": track, "seed": seed, "config": config,
                                                     "started": seed}))
        (folder / "train_gpt.py").write_bytes(source)
        (folder / "log.txt").write_bytes(head + text.encode())
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "checkpoints/last.pt").write_bytes(weights)
        (folder / "checkpoints/last.json").write_text(
            json.dumps({"checkpoint": "last.pt", "sha256": sha256(weights)})
        )
        np.savez(folder / "doc_losses.npz", **docs)
        return folder

    def runs(self, name, seeds=3, first=42, **kwargs):
        return [self.run(f"{name}{seed}", seed=seed, **kwargs) for seed in range(first, first + seeds)]

    def add(self, runs, slug, *more, ok=True, by=("ada", "grace")):
        return self("add", *runs, "--slug", slug, "--title", f"title of {slug}", "--contributors", *by, *more,
                    ok=ok)

    def write_readmes(self):
        for readme in self.records.glob("*/[0-9]*/README.md"):
            readme.write_text(readme.read_text().replace("(fill in)", "It is written what was done here."))

    def edit(self, path, change):
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    def entries(self):
        return sorted(str(folder.relative_to(self.records)) for folder in self.records.glob("*/*/"))

@contextlib.contextmanager
def imported(records):
    """
    Within it, module(name) is that of the repository, fresh: what it remembers of files is not of another
    test.
    """
    kept = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(records))
    try:
        yield __import__
    finally:
        sys.path.remove(str(records))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(kept)

def edit_log(folder, change):
    path = folder / "log.txt"
    path.write_bytes(change(path.read_bytes()))

def edit_metrics(folder, change):
    """change(rows) edits the list in place."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

def edit_result(folder, **fields):
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

def shift_docs(folder, key="val_loss", amount=0.5):
    with np.load(folder / "doc_losses.npz") as arrays:
        docs = dict(arrays)
    docs[key] = docs[key] + amount
    np.savez(folder / "doc_losses.npz", **docs)

@pytest.fixture
def repo(tmp_path):
    return Repository(tmp_path / "repo")

@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A baseline, a record on it, somebody's reproduction of that, a negative result."""
    repo = Repository(tmp_path_factory.mktemp("filled") / "repo")
    repo.add(repo.runs("base"), "start", "--kind", "baseline")
    repo.add(repo.runs("better", level=-0.02, source=SOURCE + b"# better\n"), "better")
    again = repo.runs("again", first=52, level=-0.02, source=SOURCE + b"# better\n", train_seconds=9e6)
    repo.add(again, "again", "--kind", "reproduction", "--of", 2, by=["hopper"])
    worse = repo.runs("worse", seeds=1, level=0.01, source=SOURCE + b"# worse\n")
    repo.add(worse, "worse", "--kind", "negative")
    return repo

@pytest.fixture
def copy(filled, tmp_path):
    """`filled`, to be spoilt."""
    root = tmp_path / "spoilt"
    shutil.copytree(filled.root, root)
    repo = Repository.__new__(Repository)
    repo.__dict__ |= filled.__dict__ | {"root": root, "records": root / "records"}
    repo.write_readmes()
    return repo


# ---- add ---------------------------------------------------------------------------------------------------

def test_entries_hold_what_they_should(filled):
    assert filled.entries() == ["nano/01_start", "nano/02_better", "nano/03_again", "nano/04_worse"]
    folder = filled.records / "nano/02_better"
    of_seeds = [f"{name}_seed{seed}{end}" for name, end in (("log", ".txt"), ("metrics", ".jsonl.gz"))
                for seed in (42, 43, 44)]
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["README.md", "changes.diff", "doc_losses.npz", "record.json", *of_seeds]
    )
    record = json.loads((folder / "record.json").read_text())
    results = [
        json.loads((filled.root / f"runs/better{seed}/result.json").read_text()) for seed in (42, 43, 44)
    ]
    assert record["val_loss"] == pytest.approx(np.mean([result["val_loss"] for result in results]), abs=1e-12)
    for result, run in zip(results, record["runs"]):
        source = filled.root / f"runs/better{run['seed']}"
        assert result.items() <= run.items()
        assert (folder / run["log"]).read_bytes() == (source / "log.txt").read_bytes()
        rows = gzip.decompress((folder / run["metrics"]).read_bytes()).decode()
        assert rows == (source / "metrics.jsonl").read_text()
        assert run["checkpoints"] == {"last.pt": sha256((source / "checkpoints/last.pt").read_bytes())}
    second = filled.root / "runs/better43/doc_losses.npz"
    with np.load(folder / "doc_losses.npz") as docs, np.load(second) as second:
        assert np.array_equal(docs["val_loss"][1], second["val_loss"])
        assert np.array_equal(docs["audit_tokens"], second["audit_tokens"])
    assert (filled.records / "nano/04_worse/log.txt").exists()

def test_changes_stand_beside_the_entry_and_are_printed_in_short(filled, repo):
    text = (filled.records / "nano/02_better/changes.diff").read_text()
    assert "+# better" in text and "# nano/2 against nano/1" in text
    assert not (filled.records / "nano/01_start/changes.diff").exists()
    assert "[changes.diff](changes.diff)" in (filled.records / "nano/02_better/README.md").read_text()
    repo.add(repo.runs("base"), "start", "--kind", "baseline")
    said = repo.add(repo.runs("deep", level=-0.02, config={"n_layer": 4}), "deep")
    assert "the same sources" in said and "n_layer: 2 -> 4" in said

def test_add_prints_the_verdict_and_puts_seeds_in_order(repo):
    repo.add(repo.runs("base"), "start", "--kind", "baseline")
    text = repo.add(repo.runs("better", level=-0.02, source=SOURCE + b"# better\n")[::-1], "better")
    gain, half, z = map(float, re.search(r"gain ([+-]\S+) ± (\S+) against #1, z = (\S+): passes",
                                         text).groups())
    assert (gain == pytest.approx(0.02, abs=0.004) and z == pytest.approx(1.96 * gain / half, rel=0.05)
            and z > 2.33)
    record = json.loads((repo.records / "nano/02_better/record.json").read_text())
    assert [run["seed"] for run in record["runs"]] == [42, 43, 44]

def test_a_gain_within_the_noise_is_refused_and_says_how_many_seeds_would_decide(repo):
    repo.add(repo.runs("base", seed_sd=0.0), "start", "--kind", "baseline")
    tie = repo.runs("tie", level=-0.003, source=SOURCE + b"# tie\n", seed_sd=0.0)
    message = repo.add(tie, "tie", ok=False)
    assert "below 2.33" in message and re.search(r"about \d+ more seeds would pass|no number of seeds",
                                                 message)
    repo.add(tie, "tie", "--kind", "negative")
    assert repo.entries() == ["nano/01_start", "nano/02_tie"]

def remove(file):
    return lambda folder: (folder / file).unlink()

@pytest.mark.parametrize(
    "fields, spoiler, message",
    [
        ({}, remove("result.json"), "ended before its first state"),
        ({}, remove("log.txt"), "log.txt is missing"),
        ({}, remove("metrics.jsonl"), "metrics.jsonl is missing"),
        ({}, remove("doc_losses.npz"), "doc_losses.npz is missing"),
        ({}, lambda folder: (folder / "result.json").write_text("{"), "is no JSON"),
        ({}, lambda folder: (folder / "result.json").write_text('{"a": 1, "a": 2}'), "a key occurs twice"),
        ({}, lambda folder: (folder / "result.json").write_text("[" * 100_000), "is no JSON"),
        ({}, lambda folder: (folder / "metrics.jsonl").write_text("{}\n"), "has a row that no run writes"),
        ({}, lambda folder: (folder / "metrics.jsonl").write_text("[1]\n3"), "has a row that no run writes"),
        ({}, lambda folder: (folder / "doc_losses.npz").write_text("junk"), "no file of per-document losses"),
        (
            {},
            lambda folder: (folder / "doc_losses.npz").write_bytes(
                (folder / "doc_losses.npz").read_bytes()[:900]
            ),
            "no file of per-document losses",
        ),
        (
            {},
            lambda folder: edit_log(folder, lambda log: log.replace(b"Schedule", b"schedule")),
            "not the one whose digest",
        ),
        ({}, lambda folder: (folder / "log.txt").write_text("step 1\n"), "doesn't begin with the source"),
        ({}, lambda folder: edit_log(folder, lambda log: log[: len(log) - 400]), "final table"),
        ({"source_sha256": "0" * 64}, None, "is not the one that the result names"),
        ({"val_loss": 3.0}, None, "states val_loss 3.0, its documents give"),
        ({"audit_loss": 3.0}, None, "states audit_loss 3.0, its documents give"),
        ({"val_bpb": 5.0}, None, "its documents allow"),
        ({"val_loss": float("nan")}, None, "is no finite number"),
        ({"val_loss": "3.0"}, None, "is not of type 'number'"),
        ({}, shift_docs, "its documents give"),
        ({}, lambda folder: shift_docs(folder, "val_tokens", -500), "impossible val sums"),
        ({"complete": False}, None, "did not finish"),
        ({"violations": ["stopped early"]}, None, "can be no baseline: stopped early"),
        ({"training_flops": 2.1e14}, None, "the cap is 2e+14"),
        ({"data": DATA | {"name": "shakespeare"}}, None, "trained on shakespeare"),
        ({"track": "marathon"}, None, "is of track marathon, which does not exist"),
        ({"track": "smoke"}, None, "a run of smoke files no record"),
        ({"date": "yesterday"}, None, "does not match"),
        ({"date": "2026-02-31"}, None, "day is out of range"),
        ({"config": {}}, None, "'seq_len' is a required property"),
    ],
)
def test_add_refuses_a_bad_run_and_writes_nothing(repo, fields, spoiler, message):
    config = fields.pop("config", None)
    folder = repo.run("bad", **fields)
    if config is not None:
        edit_result(folder, config=config)
    if spoiler:
        spoiler(folder)
    assert message in repo.add([folder], "bad", "--kind", "baseline", ok=False)
    assert not (repo.records / "nano").exists() or not list((repo.records / "nano").iterdir())


# ---- Cheats ------------------------------------------------------------------------------------------------

def lower_everything_but_the_log(folder):
    """What passed when the log was not read: a better result and documents that agree with it."""
    with np.load(folder / "doc_losses.npz") as arrays:
        docs = {key: values * 0.9 if key.endswith("_loss") else values for key, values in arrays.items()}
    np.savez(folder / "doc_losses.npz", **docs)
    result = json.loads((folder / "result.json").read_text())
    edit_result(
        folder,
        **{
            f"{split}_{what}": 0.9 * result[f"{split}_{what}"]
            for split in ("val", "audit")
            for what in ("loss", "bpb")
        },
        members=[{"checkpoint": "last.pt", "weight": 1.0, "val_loss": 0.9 * result["val_loss"]}],
    )

def lower_the_log_too(folder):
    """… and its final table; the metrics still know."""
    before = json.loads((folder / "result.json").read_text())
    lower_everything_but_the_log(folder)
    for split in ("val", "audit"):
        for what in ("loss", "bpb"):
            was = before[f"{split}_{what}"]
            edit_log(
                folder, lambda log: log[:-700] + log[-700:].replace(b"%.4f " % was, b"%.4f " % (0.9 * was))
            )

def segments(*parts, **more):
    return lambda folder: edit_result(folder, segments=[{"seconds": s, "ranks": n, "machine": CPU}
                                                        for s, n in parts], **more)

@pytest.mark.parametrize(
    "cheat, message",
    [
        (lower_everything_but_the_log, "val_loss is"),
        (lower_the_log_too, "the final score is"),
        (lambda at: edit_result(at, training_flops=1.0e14), "training_flops is 1.9e+14 in log.txt"),
        (
            lambda at: edit_result(
                at,
                train_seconds=100.0,
                gpu_seconds=100.0,
                segments=[{"seconds": 100.0, "ranks": 1, "machine": CPU}],
            ),
            "train minutes is 5.0",
        ),
        (lambda at: edit_result(at, tokens_seen=640), "tokens_seen is 3840"),
        (lambda at: edit_result(at, parameters=5), "parameters is 1000000"),
        (lambda at: edit_result(at, seed=43), "the run is nano, seed 42"),
        (
            lambda at: edit_result(at, config={"seq_len": SEQ_LEN, "batch_tokens": 640, "n_layer": 1}),
            "the configuration (n_layer) is another one",
        ),
        (lambda at: edit_result(at, machine=CPU | {"name": "a toaster"}), "the machine is 1 x a CPU"),
        (
            lambda at: edit_result(at, members=[{"checkpoint": "last.pt", "weight": 1.0, "val_loss": 2.0}]),
            "the list of members is another one",
        ),
        (
            lambda at: edit_log(at, lambda log: log.replace(b"step       3/6", b"stop       3/6")),
            "steps are missing in",
        ),
        (lambda at: edit_metrics(at, lambda rows: rows.pop(3)), "the number of steps is 5"),
        (lambda at: edit_metrics(at, lambda rows: rows[3].update(step=7)), "steps of member 0 are missing"),
        (
            lambda at: edit_metrics(at, lambda rows: rows[3].update(loss=1.0)),
            "step 3 of its metrics is not in its log",
        ),
        (
            lambda at: edit_metrics(at, lambda rows: rows[4].update(loss=1.0)),
            "epoch 1 of its metrics is not in its log",
        ),
        (lambda at: edit_metrics(at, lambda rows: rows[3].update(seconds=1.0)), "go backwards"),
        (
            lambda at: edit_metrics(
                at, lambda rows: [row.update(seconds=0.1 * row["seconds"]) for row in rows[1:4]]
            ),
            "is not in its log",
        ),
        (lambda at: edit_metrics(at, lambda rows: rows.pop(4)), "the number of evaluations is 3"),
        (lambda at: edit_result(at, val_evaluations=2), "the number of evaluations is 4"),
        (lambda at: edit_metrics(at, lambda rows: rows[-1].update(val_loss=3.0)), "the final score is 3.0"),
        (lambda at: (at / "checkpoints/last.pt").write_bytes(b"other weights"), "does not have the digest"),
        (remove("checkpoints/last.json"), "last.json is missing"),
        (lambda at: edit_result(at, segments=[]), "segments"),
        (segments((-300.0, 1)), "less than the minimum of 0"),
        (segments((400.0, 1), (-100.0, 1)), "less than the minimum of 0"),
        (segments((200.0, 1)), "its segments make 200.0 seconds"),
        (segments((300.0, 4)), "its segments make 1200.0 seconds of all ranks"),
        (
            segments((100.0, 2), (200.0, 1), gpu_seconds=400.0),
            "no start in its log is that of a segment on 2 x a CPU",
        ),
    ],
)
def test_a_result_that_its_log_or_metrics_contradict(repo, cheat, message):
    folder = repo.run("bad")
    cheat(folder)
    assert message in repo.add([folder], "bad", "--kind", "baseline", ok=False)
    assert not list(repo.records.glob("nano/*"))

@pytest.mark.parametrize("start, message", [(8.2, "at least 8.3078"), (5.0, "at least 8.3078"),
                                            (9.5, "at most 9.3178"), (8.4, None)])
def test_a_start_that_untrained_weights_cannot_have(repo, start, message):
    said = repo.add([repo.run("warm", start=start)], "warm", "--kind", "baseline", ok=message is None)
    assert (message or "filed") in said

def test_a_lost_part_of_the_result(repo):
    for key in ("segments", "steps", "executed_flops"):
        run = repo.run(key)
        result = json.loads((run / "result.json").read_text())
        del result[key]
        (run / "result.json").write_text(json.dumps(result))
        assert f"its result has no {key}" in repo.add([run], "lost", "--kind", "baseline", ok=False)

@pytest.mark.parametrize("source, message", [
    (DEARER, "states 1.9e+14 training FLOPs, its source counts 2.09e+14"),
    (SOURCE.replace(b"return FLOPS", b"return []"), "its source does not count its FLOPs: TypeError"),
    (SOURCE.replace(b"return FLOPS", b"return float('nan')"), "is no finite number"),
    (SOURCE, None),
    (b"import socket; socket.create_connection(('127.0.0.1', 1))\n" + SOURCE, "does not count its FLOPs"),
])
def test_flops_are_counted_again_by_the_source(repo, source, message):
    run = repo.run("dear", source=source)
    repo.real_flops()
    assert (message or "filed") in repo.add([run], "dear", "--kind", "baseline", ok=message is None)

def test_executed_flops_are_those_of_the_log(repo):
    run = repo.run("dear", executed_flops=0.5 * FLOPS)
    assert "executed_flops is ['1.050']" in repo.add([run], "dear", "--kind", "baseline", ok=False)

@pytest.mark.slow
def test_a_real_run_is_filed_and_checked(tmp_path):
    """Trained, filed, checked and rendered by the commands that README names, in a clone."""
    skipped = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis")
    clone = shutil.copytree(ROOT, tmp_path / "a clone", ignore=skipped)
    link_venv(clone)
    flags = "--n-layer 2 --n-head 1 --n-embd 32 --replay 1-1 --epochs 1 --max-steps 2 --no-compile"
    number = len(list((clone / "records/nano").glob("*/record.json"))) + 1
    filing = "--kind negative --slug short --title four-steps --contributors ada"
    for command in (f"nano {flags} --run-name short", f"add short {filing}", "check ENTRY", "render",
                    f"reproduce nano/{number} --seed 43 --max-steps 1 --val-tokens 9999 --no-compile"):
        entry = clone / f"records/nano/{number:02d}_short"
        outcome = run_sh(clone, *(entry if word == "ENTRY" else word for word in command.split()))
        assert outcome.codes == [0], (command, outcome.stderr)
        for readme in clone.glob("records/nano/*_short/README.md"):
            readme.write_text(readme.read_text().replace("(fill in)", "It is a test of the commands."))
    assert (clone / f"runs/reproduce_nano_{number}_s43/result.json").exists()
    assert f"{number:02d}_short" in (clone / "records/README.md").read_text()

def test_one_run_is_not_three_seeds(repo):
    """The same run under other seeds: as it is, with its log edited, and with its losses shaken."""
    first = repo.run("one", seed=42)

    def disguised(seed, *, log, shake):
        folder = shutil.copytree(first, repo.root / f"runs/one{seed}{log}{shake}")
        edit_result(folder, seed=seed)
        if log:
            edit_log(folder, lambda text: text.replace(b"seed 42", b"seed %d" % seed))
        if shake:
            shift_docs(folder, amount=1e-9)
            with np.load(folder / "doc_losses.npz") as docs:
                edit_result(folder, val_loss=docs["val_loss"].sum() / docs["val_tokens"].sum())
            result = json.loads((folder / "result.json").read_text())
            edit_metrics(folder, lambda rows: rows[-1].update(val_loss=result["val_loss"]))
        return folder

    for how, message in (
        ({"log": False, "shake": False}, "the run is nano, seed 42"),
        ({"log": True, "shake": False}, "seed 43 has the val loss of seed 42"),
        ({"log": True, "shake": True}, "of seed 42"),
    ):
        runs = [first, disguised(43, **how), disguised(44, **how)]
        assert message in repo.add(runs, "three", "--kind", "baseline", ok=False)

def test_nobody_files_a_run_again(filled, copy):
    assert "of nano/4" in copy.add([copy.root / "runs/worse42"], "fresh", "--kind", "negative", ok=False)
    stolen = [copy.root / f"runs/better{seed}" for seed in (42, 43, 44)]
    said = copy.add(stolen, "mine", "--kind", "reproduction", "--of", 2, by=["thief"], ok=False)
    assert "of seed 42 of nano/2; each run is filed once" in said

def test_runs_are_shown_on_a_site_alone(repo):
    assert "name its folder: --site DIR" in repo("render", "--runs", "mine", ok=False)

def test_seeds_of_a_record_are_not_picked(repo):
    message = repo.add(repo.runs("lucky", first=43), "lucky", "--kind", "baseline", ok=False)
    assert "its seeds are 43, 44, 45; those of a baseline are 42, 43, 44" in message
    repo.add(repo.runs("dull", first=43), "dull", "--kind", "negative")

def test_a_harness_that_was_not_merged(repo):
    edited = repo.runs("kind", seeds=1, harness=b"# a kinder harness\n")
    assert "a change of the rules and a pull request of its own" in repo.add(
        edited, "kind", "--kind", "baseline", ok=False
    )
    bare = repo.runs("bare", seeds=1, harness=b"")
    assert "ran without harness.py" in repo.add(bare, "bare", "--kind", "negative", ok=False)

def test_nobody_poses_as_filed_before_there_was_a_harness(copy):
    """Without its evidence an entry is refused, unless the list names the very bytes of its record.json."""
    at = copy.records / "nano/04_worse"

    def strip(record):
        new = "metrics metrics_sha256 checkpoints harness_sha256 logbook_sha256 segments steps"
        for key in new.split():
            del record["runs"][0][key]

    copy.edit(at / "record.json", strip)
    assert "ran without harness.py" in copy("check", at, ok=False)
    listed = copy.records / "before_harness.sha256"
    listed.write_text(f"{'0' * 64}  nano/04_worse/record.json\n")
    assert "ran without harness.py" in copy("check", at, ok=False)
    listed.write_text(f"{sha256((at / 'record.json').read_bytes())}  nano/03_again/record.json\n")
    assert "ran without harness.py" in copy("check", at, ok=False)

def test_check_says_the_line_that_accepts_the_tree_s_own_harness(copy):
    (copy.root / "harness.py").write_bytes(HARNESS)
    assert "all good" in copy("check")
    (copy.root / "harness.py").write_bytes(b"# new rules\n")
    line = copy("check", ok=False).rstrip().rpartition("the line: ")[2]
    assert line.startswith(f"{sha256(b'# new rules' + bytes([10]))}  20")
    with open(copy.records / "harness.sha256", "a") as file:
        file.write(line + "\n")
    assert "all good" in copy("check")

def test_a_gain_that_audit_does_not_show_is_no_record(repo):
    repo.add(repo.runs("base"), "start", "--kind", "baseline")
    peeked = repo.runs("peeked", level=-0.03, audit_level=-0.01, source=SOURCE + b"# peeked\n")
    assert "more than audit" in repo.add(peeked, "peeked", ok=False)
    repo.add(peeked, "peeked", "--kind", "negative")

def test_invented_seeds_do_not_shrink_the_noise(repo):
    """Ninety runs that agree by invention count for nothing, until somebody else has reproduced them."""
    repo.add(repo.runs("base", seed_sd=0.004), "start", "--kind", "baseline")

    def noise():
        return re.search(r"noise: (\S+) a seed \(dof (\d+)\)", repo("power", 0.01)).groups()

    honest = noise()
    many = repo.runs("many", seeds=30, level=0.01, source=SOURCE + b"# many\n", seed_sd=1e-6)
    repo.add(many, "many", "--kind", "negative", by=["mallory"])
    assert noise() == honest and honest[1] == "2"
    own = repo.runs("own", first=90, level=0.01, source=SOURCE + b"# many\n", seed_sd=1e-6)
    repo.add(own, "own", "--kind", "reproduction", "--of", 2, by=["eve", "mallory"])
    assert noise() == honest
    other = repo.runs("other", first=95, level=0.01, source=SOURCE + b"# many\n", seed_sd=1e-6)
    repo.add(other, "other", "--kind", "reproduction", "--of", 2, by=["hopper"])
    assert noise()[1] == str(2 + 29 + 3)  # one method in two entries


# ---- Caps --------------------------------------------------------------------------------------------------

FAIR = {"data": FINEWEB, "machine": H100S, "start": math.log(50257)}

@pytest.mark.parametrize(
    "track, fields, message",
    [
        ("limited", {"train_seconds": 3601.0}, "480.1 H100-minutes, the cap is 480"),
        ("tiny", {"train_seconds": 901.0}, "the cap is 120"),
        ("two_hour", {"train_seconds": 7201.0}, "the cap is 960"),
        (
            "limited",
            {"train_seconds": 890.0, "machine": {**H100S, "name": "NVIDIA B200"}},
            "ran on NVIDIA B200",
        ),
        ("unlimited", {"train_seconds": 449 * 86400.0 / 8}, "the cap is 645120"),
    ],
)
def test_caps_of_the_dear_tracks(repo, track, fields, message):
    over = repo.run("over", **FAIR | {"track": track} | fields)
    assert message in repo.add([over], "over", "--kind", "baseline", ok=False)
    repo.add([repo.run("fair", **FAIR, track=track, train_seconds=890.0)], "fair", "--kind", "baseline")

def test_one_h100_for_eight_hours_is_eight_for_one(repo):
    lone = repo.run("lone", track="limited", **FAIR | {"machine": H100S | {"count": 1}},
                    train_seconds=28700.0)
    repo.add([lone], "lone", "--kind", "baseline")

def test_the_cap_is_on_the_sum_of_segments(repo):
    """Half on eight, half on four; each start stands in the log."""
    four = H100S | {"count": 4}
    run = repo.run(
        "moved",
        track="limited",
        **FAIR,
        train_seconds=4500.0,
        gpu_seconds=1500.0 * 8 + 3000.0 * 4,
        segments=[
            {"seconds": 3000.0, "ranks": 4, "machine": four},
            {"seconds": 1500.0, "ranks": 8, "machine": H100S},
        ],
    )
    first = b"slowrun limited, seed 42: 4 x NVIDIA H100 80GB HBM3, bfloat16 (in hardware), torch 2.13.0\n"
    edit_log(run, lambda log: log.replace(b"slowrun limited", first + b"slowrun limited", 1))
    repo.add([run], "moved", "--kind", "baseline")

def test_snapshots_are_filed_with_the_unlimited_track(repo):
    repo.add([repo.run("snapshots", track="unlimited_snapshots", **FAIR)], "snapshots", "--kind", "baseline")
    assert repo.entries() == ["unlimited/01_snapshots"]
    repo.write_readmes()
    repo("check")

@pytest.mark.parametrize(
    "second, message",
    [
        ({"seed": 42}, "occurs twice; runs must differ"),
        ({"seed": 43, "source": b"other\n"}, "its source_sha256 is not that of the first run"),
        ({"seed": 43, "config": {"seq_len": 32}}, "its config is not that of the first run"),
        ({"seed": 43, "harness": b"other\n"}, "its harness_sha256 is not"),
        ({"seed": 43, "data": DATA | {"train": "4" * 64}}, "its data is not"),
    ],
)
def test_runs_of_an_entry_differ_in_their_seed_only(repo, second, message):
    runs = [repo.run("one"), repo.run("two", **second)]
    assert message in repo.add(runs, "two", "--kind", "baseline", ok=False)

def test_other_refusals_of_add(repo):
    one = repo.run("one")
    assert "1 seed, a nano record needs 3" in repo.add([one], "lone", ok=False)
    assert "--of NUMBER" in repo.add([one], "lone", "--kind", "reproduction", ok=False)
    assert "does not match" in repo.add([one], "Bad_Slug", "--kind", "baseline", ok=False)
    assert "there is no run or entry nowhere" in repo.add(["nowhere"], "lone", "--kind", "baseline", ok=False)
    assert "--help shows how" in repo("add", one, ok=False)
    repo.add(["one"], "lone", "--kind", "baseline")  # by name
    other = repo.run("other", data=DATA | {"val": "9" * 64})
    assert "other tokens than" in repo.add([other], "other", "--kind", "baseline", ok=False)

def test_the_manifest_decides_where_there_is_one(repo):
    run = repo.run("one")
    manifest = repo.root / "data/nano/manifest.json"
    manifest.parent.mkdir(parents=True)
    # a tail shorter than a sequence is not scored
    whole = {
        split: -(-int(repo.tokens[split].sum()) // SEQ_LEN) * (SEQ_LEN + 1) for split in ("val", "audit")
    }
    for split in repo.tokens:  # make the number of scored tokens one that whole sequences give
        repo.tokens[split][0] += -int(repo.tokens[split].sum()) % SEQ_LEN
    splits = {"train": {"sha256": "1" * 64, "documents": 9, "tokens": 9}} | {
        split: {"sha256": DATA[split], "documents": DOCUMENTS, "tokens": whole[split] + 5} for split in whole
    }
    manifest.write_text(json.dumps({"splits": splits}))
    assert "val was not scored whole" in repo.add([run], "one", "--kind", "baseline", ok=False)
    repo.add([repo.run("two")], "two", "--kind", "baseline")
    splits["train"]["sha256"] = "7" * 64
    manifest.write_text(json.dumps({"splits": splits}))
    assert "its train is not that of" in repo.add([repo.run("three")], "three", "--kind", "negative",
                                                  ok=False)

def test_a_kill_while_filing_leaves_no_half_entry(repo):
    runs = [str(run) for run in repo.runs("base")]
    command = [sys.executable, repo.records / "leaderboard.py", "add", *runs, "--slug", "start", "--kind",
               "baseline", "--title", "start", "--contributors", "ada"]
    for _ in range(3):
        adding = subprocess.Popen(command, cwd=repo.root, stdout=subprocess.DEVNULL)
        while adding.poll() is None and not list(repo.root.glob("records/nano/.new_*/*/*")):
            time.sleep(0.0005)
        adding.kill()
        adding.wait()
        for entry in (repo.records / "nano").glob(
            "[0-9]*"
        ):  # the rename may have won a race against the kill
            assert len(list(entry.iterdir())) == 9
            shutil.rmtree(entry)
    repo.add(runs, "whole", "--kind", "baseline")
    repo.write_readmes()
    assert "all good" in repo("check")


# ---- Hostile entries ---------------------------------------------------------------------------------------

HOSTILE = ["<script>alert(1)</script>", "[free](javascript:alert(1))", "x --><!-- leaderboard:end --> gone",
           "a `b` *c* _d_", "see https://evil.example and www.evil.example", "![x](http://e.example/x.png)"]

def test_a_title_shows_as_text_and_nothing_else(repo):
    for seed, title in enumerate(HOSTILE, 42):
        kind = "baseline" if seed == 42 else "negative"
        names = ["--contributors", "<b>eve</b>", "[x](y)", "--kind", kind]
        repo("add", repo.run(f"bad{seed}", seed=seed), "--slug", f"bad-{seed}", "--title", title, *names)
    repo("render")
    pages = [repo.root / "README.md", repo.records / "README.md", *repo.records.glob("nano/*/README.md")]
    assert len(pages) == 2 + len(HOSTILE)
    link = r"<script|<b>|(?<!\\)\]\(javascript|(?<!\\)\]\(y|[^\\]\]\(http://e|https?://evil|[^;]www\.evil"
    for page in pages:
        text = page.read_text()
        assert not re.search(link, text) and text.count("<!-- leaderboard:end -->") == (page in pages[:2])

@pytest.mark.parametrize("title", ["two\nlines", "bell\x07", "over\u202eflow", "a | cell", "\x1b[31mred",
                                   "end\n", "zero\u200bwidth"])
def test_titles_and_names_hold_no_control_characters(repo, title):
    run = repo.run("one")
    for given in (["--title", title, "--contributors", "ada"], ["--title", "title", "--contributors", title]):
        said = repo("add", run, "--slug", "one", "--kind", "baseline", *given, ok=False)
        assert "does not match" in said and said.rstrip("\n").isprintable()

def bomb(path):
    """Arrays that say they have 2^60 numbers."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**60,)})
    names = [f"{split}_{what}.npy" for split in ("val", "audit") for what in ("loss", "tokens", "bytes")]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            file.writestr(name, header.getvalue())

def pickled(path):
    names = [f"{split}_{what}" for split in ("val", "audit") for what in ("loss", "tokens", "bytes")]
    np.savez(path, **{name: np.array([{"a": 1}], dtype=object) for name in names})

@pytest.mark.parametrize(
    "spoiler, message",
    [
        (lambda at: bomb(at / "doc_losses.npz"), "does not have the size that its shape says"),
        (lambda at: pickled(at / "doc_losses.npz"), "holds no plain array of numbers"),
        (lambda at: np.savez(at / "doc_losses.npz", val_loss=np.ones(3)), "no file of per-document losses"),
        (lambda at: os.truncate(at / "doc_losses.npz", 65 * 2**20), "at most 64 are read"),
        (
            lambda at: ((at / "log.txt").rename(at / "moved"), (at / "log.txt").symlink_to("moved")),
            "is a link",
        ),
        (
            lambda at: edit_result(at, members=[{"checkpoint": "../../x", "weight": 1.0, "val_loss": 1.0}]),
            "does not match",
        ),
        (lambda at: edit_result(at, training_flops=float("1e400")), "is no finite number"),
        (lambda at: edit_result(at, machine=CPU | {"name": "a\x1b[2JCPU"}), "does not match"),
    ],
)
def test_files_are_measured_before_they_are_read(repo, spoiler, message):
    folder = repo.run("bad")
    spoiler(folder)
    assert message in repo.add([folder], "bad", "--kind", "baseline", ok=False)


# ---- check -------------------------------------------------------------------------------------------------

def test_check_wants_the_readme_written_and_is_content_then(filled, copy):
    message = filled("check", ok=False)
    assert message.count("error: ") == 4 and "still says (fill in)" in message
    assert "4 entries checked" in copy("check")
    assert "1 entries checked" in copy("check", copy.records / "nano/02_better")
    readme = copy.records / "nano/02_better/README.md"
    readme.write_text(readme.read_text().replace("## How choices were made without val", "## Choices"))
    assert "needs a section '## How choices were made without val'" in copy("check", ok=False)

def edit_record(change):
    return lambda repo, at: repo.edit(at / "record.json", change)

@pytest.mark.parametrize(
    "spoiler, message",
    [
        (edit_record(lambda record: record.update(val_loss=3.0)), "not the mean of its runs"),
        (edit_record(lambda record: record["runs"][0].update(val_loss=3.0)), "states val_loss"),
        (edit_record(lambda record: record.update(mood="good")), "Additional properties"),
        (edit_record(lambda record: record["runs"].pop()), "don't fit each other"),
        (edit_record(lambda record: record["runs"][1].update(seed=42)), "a seed occurs twice"),
        (
            edit_record(lambda record: record["runs"][1].update(config={"seq_len": 3})),
            "differ in more than the seed",
        ),
        (
            edit_record(lambda record: record["runs"][1].update(training_flops=3e14)),
            "training_flops is 1.9e+14",
        ),
        (edit_record(lambda record: record["runs"][1].update(complete=False)), "did not finish"),
        (edit_record(lambda record: record["runs"][1].update(log="log_seed42.txt")), "belongs to two runs"),
        (
            edit_record(lambda record: record["runs"][1].update(checkpoints={"x.pt": "0" * 64})),
            "not those of the members",
        ),
        (edit_record(lambda record: record["runs"][1].pop("metrics")), "its metrics and the digests"),
        (
            edit_record(lambda record: record.update(date="2026-11-29")),
            "its date is not that of its last run",
        ),
        (edit_record(lambda record: record.update(title="title of better\n")), "does not match"),
        (lambda repo, at: (at / "record.json").write_text("[]"), "is not of type 'object'"),
        (lambda repo, at: (at / "log_seed43.txt").write_bytes(b"x"), "was changed since"),
        (lambda repo, at: (at / "metrics_seed43.jsonl.gz").write_bytes(b"x"), "was changed since"),
        (lambda repo, at: (at / "log_seed43.txt").unlink(), "is missing"),
        (lambda repo, at: shift_docs(at, amount=0.1), "was changed since"),
        (lambda repo, at: (at / "README.md").unlink(), "README.md is missing"),
        (lambda repo, at: (at / "record.json").unlink(), "record.json is missing"),
        (
            lambda repo, at: (at / "run.sh").write_text("rm -r ~"),
            "its files are not those of an entry: run.sh",
        ),
        (
            lambda repo, at: (at / "changes.diff").write_text("nothing changed\n"),
            "is not the difference from nano/1",
        ),
        (
            lambda repo, at: (at / "changes.diff").unlink(),
            "its files are not those of an entry: changes.diff",
        ),
        (
            lambda repo, at: at.rename(at.with_name("02_bettr")),
            "by its record.json it is records/nano/02_better",
        ),
        (lambda repo, at: shutil.copytree(at, at.with_name("02_twin")), "have one number"),
        (
            lambda repo, at: shutil.copytree(at.parent, at.parent.with_name("nana")),
            "it is records/nano/02_better",
        ),
        (lambda repo, at: (at.rename(repo.root / "aside"), at.symlink_to(repo.root / "aside")), "is a link"),
    ],
)
def test_check_refuses_a_spoilt_entry(copy, spoiler, message):
    spoiler(copy, copy.records / "nano/02_better")
    said = copy("check", ok=False)
    assert message in said and len(said.splitlines()) <= 6

def test_every_entry_is_checked_though_one_crashes(copy):
    """An error that nobody foresaw is a line of its own."""
    with imported(copy.records) as module:
        leaderboard = module("leaderboard")
        real = leaderboard.check_folder

        def check_folder(folder):
            if folder.name == "01_start":
                raise RecursionError("deep")
            real(folder)

        leaderboard.check_folder = check_folder
        (copy.records / "nano/04_worse/README.md").write_text("(fill in)")
        err = io.StringIO()
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit):
            leaderboard.main(["check"])
    assert ("01_start: cannot be checked: RecursionError" in err.getvalue()
            and "04_worse/README.md" in err.getvalue())

def test_check_refuses_a_record_that_is_none(copy):
    copy.edit(copy.records / "nano/04_worse/record.json", lambda record: record.update(kind="record"))
    assert "1 seed, a nano record needs 3" in copy("check", ok=False)
    copy.edit(copy.records / "nano/04_worse/record.json", lambda record: record.update(kind="negative"))
    tie = [copy.root / f"runs/tie{seed}" for seed in (42, 43, 44)]
    copy.runs("tie", level=-0.02, source=SOURCE + b"# tie\n")
    copy.add(tie, "tie", "--kind", "negative")
    copy.edit(copy.records / "nano/05_tie/record.json", lambda record: record.update(kind="record"))
    copy.write_readmes()
    assert "no record: " in copy("check", copy.records / "nano/05_tie", ok=False)


# ---- render ------------------------------------------------------------------------------------------------

def generated(repo):
    pages = [repo.root / "README.md", repo.records / "README.md", *repo.records.glob("nano/README.md")]
    return {path: path.read_bytes() for path in [*pages, *repo.records.glob("*.svg")]}

def test_render_is_idempotent_deterministic_and_knows_when_it_is_stale(copy):
    begin, end = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"
    (copy.records / "nano/README.md").write_text(f"# Nano\n\n{begin}\n{end}\n")
    assert "out of date" in copy("render", "--check", ok=False)
    copy("render")
    first = generated(copy)
    assert len(first) == 6  # three pages; progress, efficiency, overfit
    assert "up to date" in copy("render", "--check")
    for path in list(first)[3:]:
        path.unlink()
    copy("render")
    assert generated(copy) == first
    text = first[copy.root / "README.md"].decode()
    assert (text.startswith("# Slowrun\n\nbefore\n<!--") and text.endswith("-->\nafter\n")
            and "\nold\n" not in text)
    for page in list(first)[:3]:
        page.write_bytes(first[page].replace(b"hopper" if b"hopper" in first[page] else b"ada", b"nobody"))
        assert f"{page.relative_to(copy.root)} out of date" in copy("render", "--check", ok=False)
        page.write_bytes(first[page])

def test_the_tables_say_what_is_known(copy):
    copy("render")
    front = (copy.root / "README.md").read_text()
    assert re.search(r"\[`nano`\]\(records/README.md#nano\) \|.*\| – \| reproduced 1/1 \| ada, grace \|",
                     front)
    assert re.search(r"#limited\) \|.*\| 3\.183 \| 6\.44x \| published \| dangxingyu \| 2026-09-05 \|", front)
    text = (copy.records / "README.md").read_text()
    table = text[text.index("### limited") : text.index("### two_hour")]
    published = [line for line in table.splitlines() if line.startswith("| p")]
    assert len(published) == 21 and all("published, not verified here" in line for line in published)
    assert "| p20 | 3.195 | 6.13x | – |" in table and "sawtooth weight decay" in table
    assert ("/pull/98)" in published[-1] and "merged script was not seen" in published[-1]
            and "3.2005" in published[-1])
    nano = text[text.index("### nano") : text.index("### tiny")]
    assert re.search(
        r"\| 2 \| \d\.\d{3} \| – \| \d\.\d{3} \| reproduced 1/1; 3 seeds; \+0\.0\d+ ± 0\.00\d+ against #1",
        nano,
    )
    assert ("(nano/02_better/log_seed42.txt), [changes](nano/02_better/changes.diff)" in nano
            and "ada, grace" in nano)
    assert "#3, reproduction" in nano and "agrees with #2" in nano and "#4, negative" in nano
    looks, gap, error = re.search(
        r"watch: (\d+) looks at val so far.*exceed gains on audit by (\S+) ± (\S+) ", nano
    ).groups()
    assert int(looks) == 4 * (3 + 3 + 3 + 1) and abs(float(gap)) < 2 * float(error)

def test_steps_of_the_published_history_stand_beside_their_gains_here(repo):
    """The published losses of 1, 3, 6 and 10 are 3.402, 3.349, 3.295 and 3.270."""
    for number, level in (1, 0.0), (3, -0.08), (6, -0.2), (10, -0.21):
        kind = "baseline" if number == 1 else "record"
        runs = repo.runs(f"l{number}s", level=level, config={"step": number})
        repo.add(runs, f"limited-{number:02d}", "--kind", kind)
    repo("render")
    text = (repo.records / "README.md").read_text()
    rows = re.findall(r"\| (p\d+ to p\d+) \| (\S+) \| (\S+) ± (\S+) \| title of (\S+) \|", text)
    assert [row[0] for row in rows] == ["p1 to p3", "p3 to p6", "p6 to p10"]
    assert [row[4] for row in rows] == ["limited-03", "limited-06", "limited-10"]
    assert [float(row[1]) for row in rows] == [0.053, 0.054, 0.025]
    for (_, _, gain, half, _), truth in zip(rows, (0.08, 0.12, 0.01)):
        assert abs(float(gain) - truth) < 2 * float(half) < 0.02
    assert "Rank correlation of the 3 steps: 1.00; " in text

def test_a_baseline_that_comes_after_a_record_only_stands_beside_the_table(repo):
    repo.add(repo.runs("base"), "start", "--kind", "baseline")
    repo.add(repo.runs("better", level=-0.02, source=SOURCE + b"# better\n"), "better")
    repo("render")
    before = generated(repo)
    repo.add(repo.runs("large", level=0.3, source=SOURCE + b"# large\n"), "large", "--kind", "baseline")
    repo("render")
    after = generated(repo)
    page = repo.records / "README.md"
    lines = before.pop(page).decode().split("\n")
    added = [line for line in after.pop(page).decode().split("\n") if line not in lines]
    assert after == before  # the front page, the plots
    assert [line.split(":")[0] for line in added] == [
        "Also filed",
        "- #3, baseline",
        "Overfitting watch",
    ]  # more looks
    assert "against #2" in repo.add(repo.runs("best", level=-0.04, source=SOURCE + b"# best\n"), "best")

def test_render_wants_its_markers(repo):
    (repo.root / "README.md").write_text("# no markers\n")
    assert "needs a line" in repo("render", ok=False)
    assert (repo.root / "README.md").read_text() == "# no markers\n"


# ---- compare, diff, runs, reproduce ------------------------------------------------------------------------

def test_compare_takes_entries_runs_and_sets_of_runs(filled, tmp_path):
    by_entry = filled("compare", "nano/2", "records/nano/01_start", "--picture", tmp_path / "a.svg")
    runs = [",".join(f"{name}{seed}" for seed in (42, 43, 44)) for name in ("better", "base")]
    by_runs = filled("compare", *runs, "--picture", tmp_path / "b.svg")
    assert by_runs.splitlines()[2:-1] == by_entry.splitlines()[2:-1] and (
        tmp_path / "b.svg"
    ).read_text().endswith("svg>\n")
    assert float(re.search(r"val: .* A gains (\S+)", by_entry)[1]) == pytest.approx(0.02, abs=0.004)
    probabilities = [float(found) for found in re.findall(r"probability (\d\.\d+)", by_entry)]
    assert len(probabilities) == 4 and min(probabilities) > 0.99
    assert (
        "train_gpt.py: +1 -0 lines" in by_entry
        and len(re.findall(r"^ +\d+: .* a token", by_entry, re.M)) == 10
    )
    back = filled("compare", "runs/base42", filled.root / "runs/better42", "--documents", 1)
    assert float(re.search(r"val: .* A gains (\S+)", back)[1]) < 0 and len(re.findall(" a token", back)) == 2
    assert Path(re.search("both curves: (.*)", back)[1]).read_text().endswith("svg>\n")

def test_compare_takes_smoke_and_refuses_what_cannot_be_compared(repo):
    repo.run("first", track="smoke", config={"n_layer": 1})
    repo.run("second", track="smoke")
    assert "n_layer: 2 -> 1" in repo("compare", "first", "second")
    repo.run("alien", data=DATA | {"val": "9" * 64})
    assert "on different data" in repo("compare", "first", "alien", ok=False)
    for name, spoiler, message in (
        ("cut", lambda at: (at / "result.json").write_text("{"), "is no JSON"),
        ("dead", remove("result.json"), "ended before its first state"),
        (
            "half",
            lambda at: ((at / "result.json").unlink(), (at / "state/step_0000007").mkdir(parents=True)),
            "--resume half",
        ),
        ("nometrics", lambda at: (at / "metrics.jsonl").write_text("{"), "is no JSON"),
    ):
        spoiler(repo.run(name))
        assert message in repo("compare", name, "first", ok=False)
    assert "there is no run or entry none" in repo("compare", "none", "first", ok=False)

def test_diff_of_any_two(filled, repo):
    text = filled("diff", "nano/2")
    assert text == (filled.records / "nano/02_better/changes.diff").read_text()
    assert "-# better" in filled("diff", "base42", "better42")
    assert "has nothing before it" in filled("diff", "nano/1", ok=False)

def test_runs_lists_what_is_there(repo):
    assert "no runs yet" in repo("runs")
    source = (b"A = dict(n_layer=2)\nTRACKS = {'nano': A | dict(batch_tokens=640), 'x': {}}\n"
              b"class Config:\n    seq_len: int = 64\n")
    repo.run("late", seed=7, source=source, config={"n_layer": 9})
    repo.run("early", seed=3, source=source, level=-0.1, track="nano")
    (repo.run("dead", seed=5) / "result.json").unlink()
    (repo.run("broken", seed=4) / "run.json").write_text("{")
    lines = repo("runs").splitlines()
    assert [line.split()[0] for line in lines] == ["early", "dead", "late", "broken"]
    assert "n_layer=9" in lines[2] and "complete" in lines[2] and "n_layer" not in lines[0]
    assert "died before a state" in lines[1] and "cannot be read" in lines[3] and "is no JSON" in lines[3]
    assert [line.split()[0] for line in repo("runs", "--sort", "val").splitlines()] == [
        "early",
        "late",
        "dead",
        "broken",
    ]

def test_reproduce_runs_the_entry_s_own_sources(copy):
    """The launcher is replaced by one that tells what it would have started, and where."""
    (copy.root / "run.sh").write_text(
        '#!/bin/bash\ncd "$(dirname "$0")"\necho "$@"; cat train_gpt.py harness.py logbook.py config.json\n'
        "ls -d records/tracks.json runs/better42; exit 7\n"
    )
    command = [sys.executable, copy.records / "leaderboard.py", "reproduce", "nano/2", "--seed", "99",
               "--device-batch", "4"]
    done = subprocess.run(list(map(str, command)), cwd=copy.root, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert ("nano --config" in done.stdout
            and "--seed 99 --run-name reproduce_nano_2_s99 --device-batch 4" in done.stdout)
    assert "better\n# the harness\n# the logbook\n" in done.stdout and '"batch_tokens": 640' in done.stdout
    assert "records/tracks.json\nruns/better42" in done.stdout
    assert "unknown: --what" in copy("check", "--what", ok=False)
    assert "reproduce" in copy("reproduce", "nano/2", "--seed", "-1", ok=False)


# ---- power, efficiency -------------------------------------------------------------------------------------

def test_power_and_efficiency(filled):
    seeds = int(re.search(r"from (\d+) seeds", filled("power", 0.01))[1])
    assert int(re.search(r"from (\d+) seeds", filled("power", 0.005))[1]) > seeds >= 1
    assert "no number of seeds" in filled("power", 0.00001)
    assert "6.13x" in filled("efficiency", 3.195)
    assert "< 2x (outside the table)" in filled("efficiency", 3.9)
    assert "> 20x (outside" in filled("efficiency", 2.5)
    assert "no curve for moon" in filled("efficiency", 3.0, "--data", "moon", ok=False)

@pytest.mark.parametrize(
    "args",
    [
        ("power", "nan"),
        ("power", "0"),
        ("power", "-1"),
        ("power", "inf"),
        ("power", "0.01", "--power", "2"),
        ("power", "0.01", "--power", "0"),
        ("power", "0.01", "--power", "nan"),
        ("power", "x"),
        ("power", "0.01", "--track", "x"),
        ("efficiency", "nan"),
        ("efficiency", "-1"),
        ("efficiency", "0"),
        ("efficiency", "inf"),
        (),
        ("dance",),
    ],
)
def test_mistakes_are_one_line(filled, args):
    assert len(filled(*args, ok=False).splitlines()) == 1

def test_a_reader_that_has_seen_enough_ends_it_quietly(filled):
    command = [sys.executable, filled.records / "leaderboard.py", "efficiency", "3.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGPIPE

@pytest.mark.parametrize("command", [("check",), ("render", "--check")])
def test_the_records_of_this_repository_are_sound_and_rendered(command):
    """So a pull request with a bad record, or with stale tables, fails."""
    done = subprocess.run([sys.executable, ROOT / "records/leaderboard.py", *command], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
