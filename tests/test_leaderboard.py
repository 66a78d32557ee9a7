"""The leaderboard, driven as people drive it: a process of its own on a repository of the test's own."""

import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = 400
SEQ_LEN = 64


def sha256(data):
    return hashlib.sha256(data).hexdigest()


class Repository:
    """A repository with the real records/*.py and no entries, and a maker of run folders by the contract."""

    def __init__(self, root):
        self.root = root
        (root / "records").mkdir(parents=True)
        for file in (ROOT / "records").iterdir():
            if file.suffix in (".py", ".json"):
                shutil.copy(file, root / "records")
        begin, end = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"
        (root / "README.md").write_text(f"# Slowrun\n\nbefore\n{begin}\nold\n{end}\nafter\n")
        rng = np.random.default_rng(0)
        self.tokens = {split: rng.integers(32, 200, DOCUMENTS) for split in ("val", "audit")}
        self.difficulty = {split: rng.normal(4.0, 0.6, DOCUMENTS) for split in ("val", "audit")}

    def __call__(self, *args, ok=True):
        command = [sys.executable, self.root / "records/leaderboard.py", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.root)
        assert done.returncode == (0 if ok else 2), done.stdout + done.stderr
        if not ok:
            assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
        return done.stdout if ok else done.stderr

    def run(
        self,
        name,
        seed=1,
        level=0.0,
        source=b"print('slow')\n",
        track="nano",
        seed_sd=0.001,
        audit_level=None,
        **fields,
    ):
        """A run folder whose documents are `level` nats a token above the corpus's difficulty."""
        folder = self.root / "runs" / name
        folder.mkdir(parents=True)
        rng = np.random.default_rng([seed, sum(name.encode())])
        shift = rng.normal(0, seed_sd)
        docs = {}
        for split, tokens in self.tokens.items():
            at = audit_level if split == "audit" and audit_level is not None else level
            docs[f"{split}_tokens"] = tokens
            docs[f"{split}_bytes"] = tokens * 4
            docs[f"{split}_loss"] = tokens * (
                self.difficulty[split] + at + shift + rng.normal(0, 0.02, DOCUMENTS)
            )
        losses = {
            f"{split}_loss": docs[f"{split}_loss"].sum() / self.tokens[split].sum() for split in self.tokens
        }
        result = {
            "track": track,
            "seed": seed,
            "config": {"seq_len": SEQ_LEN},
            **losses,
            "val_bpb": losses["val_loss"] / math.log(2) / 4,
            "audit_bpb": losses["audit_loss"] / math.log(2) / 4,
            "members": [{"checkpoint": "checkpoints/last.pt", "weight": 1.0, "val_loss": losses["val_loss"]}],
            "parameters": 1_000_000,
            "tokens_seen": 10_000_000,
            "training_flops": 1.9e14,
            "train_seconds": 300.0,
            "wall_seconds": 320.0,
            "gpu_seconds": 300.0,
            "machine": {"device": "cpu", "name": "a CPU", "count": 1, "torch": "2.13.0"},
            "data": {"name": "nano", "train": "1" * 64, "val": "2" * 64, "audit": "3" * 64},
            "source_sha256": sha256(source),
            "val_evaluations": 5,
            "violations": [],
            "date": "2026-11-20",
            "complete": True,
            **fields,
        }
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "train_gpt.py").write_bytes(source)
        header = b"source train_gpt.py %d bytes sha256 %s\n" % (len(source), sha256(source).encode())
        (folder / "log.txt").write_bytes(header + source + b"\nstep 1 of %s\n" % name.encode())
        np.savez(folder / "doc_losses.npz", **docs)
        return folder

    def runs(self, name, seeds=3, **kwargs):
        return [self.run(f"{name}{seed}", seed=seed, **kwargs) for seed in range(1, seeds + 1)]

    def add(self, runs, slug, *more, ok=True):
        return self(
            "add",
            *runs,
            "--slug",
            slug,
            "--title",
            f"title of {slug}",
            "--contributors",
            "ada",
            "grace",
            *more,
            ok=ok,
        )

    def write_readmes(self):
        for readme in (self.root / "records").glob("*/*/README.md"):
            readme.write_text(readme.read_text().replace("(fill in)", "Written."))

    def edit(self, path, change):
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    def entries(self):
        return sorted(
            str(folder.relative_to(self.root / "records")) for folder in (self.root / "records").glob("*/*/")
        )


@pytest.fixture
def repo(tmp_path):
    return Repository(tmp_path / "repo")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A baseline, a record on it, a reproduction of that, a negative result."""
    repo = Repository(tmp_path_factory.mktemp("filled") / "repo")
    repo.add(repo.runs("base"), "start", "--kind", "baseline")
    repo.add(repo.runs("better", level=-0.02, source=b"better\n"), "better")
    repo.add(
        repo.runs("again", level=-0.02, source=b"better\n", train_seconds=9e9),
        "again",
        "--kind",
        "reproduction",
        "--of",
        2,
    )
    repo.add(repo.runs("worse", seeds=1, level=0.01, source=b"worse\n"), "worse", "--kind", "negative")
    return repo


@pytest.fixture
def copy(filled, tmp_path):
    """`filled`, to be spoilt."""
    repo = Repository(tmp_path / "spoilt")
    shutil.copytree(filled.root, repo.root, dirs_exist_ok=True)
    repo.write_readmes()
    return repo


# ---- add -----------------------------------------------------------------------------------------


def test_entries_hold_what_they_should(filled):
    assert filled.entries() == ["nano/01_start", "nano/02_better", "nano/03_again", "nano/04_worse"]
    folder = filled.root / "records/nano/02_better"
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "doc_losses.npz",
        "log_seed1.txt",
        "log_seed2.txt",
        "log_seed3.txt",
        "record.json",
    ]
    record = json.loads((folder / "record.json").read_text())
    results = [json.loads((filled.root / f"runs/better{seed}/result.json").read_text()) for seed in (1, 2, 3)]
    assert record["val_loss"] == pytest.approx(np.mean([result["val_loss"] for result in results]), abs=1e-12)
    for result, run in zip(results, record["runs"]):
        assert result.items() <= run.items()
        assert (folder / run["log"]).read_bytes() == (
            filled.root / f"runs/better{run['seed']}/log.txt"
        ).read_bytes()
    with (
        np.load(folder / "doc_losses.npz") as docs,
        np.load(filled.root / "runs/better2/doc_losses.npz") as second,
    ):
        assert np.array_equal(docs["val_loss"][1], second["val_loss"])
        assert np.array_equal(docs["audit_tokens"], second["audit_tokens"])
    assert (filled.root / "records/nano/04_worse/log.txt").exists()


def test_add_prints_the_verdict(repo):
    repo.add(repo.runs("base"), "start", "--kind", "baseline")
    text = repo.add(repo.runs("better", level=-0.02, source=b"better\n"), "better")
    gain, half, z = map(
        float, re.search(r"gain ([+-]\S+) ± (\S+) against #1, z = (\S+): passes", text).groups()
    )
    assert (
        gain == pytest.approx(0.02, abs=0.004)
        and z == pytest.approx(1.96 * gain / half, rel=0.05)
        and z > 2.33
    )


def test_a_gain_within_the_noise_is_refused_and_says_how_many_seeds_would_decide(repo):
    repo.add(repo.runs("base", seed_sd=0.0), "start", "--kind", "baseline")
    tie = repo.runs("tie", level=-0.003, source=b"tie\n", seed_sd=0.0)
    message = repo.add(tie, "tie", ok=False)
    assert "below 2.33" in message and re.search(
        r"about \d+ more seeds would pass|no number of seeds", message
    )
    repo.add(tie, "tie", "--kind", "negative")
    assert repo.entries() == ["nano/01_start", "nano/02_tie"]


def remove(file):
    return lambda folder: (folder / file).unlink()


def spoil(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes().replace(b"slow", b"slaw"))


def shift_docs(folder, key="val_loss", amount=0.5):
    with np.load(folder / "doc_losses.npz") as arrays:
        docs = dict(arrays)
    docs[key] = docs[key] + amount
    np.savez(folder / "doc_losses.npz", **docs)


@pytest.mark.parametrize(
    "fields, spoiler, message",
    [
        ({}, remove("result.json"), "result.json is missing"),
        ({}, remove("log.txt"), "log.txt is missing"),
        ({}, remove("doc_losses.npz"), "doc_losses.npz is missing"),
        ({}, lambda folder: (folder / "result.json").write_text("{"), "is no JSON"),
        ({}, lambda folder: (folder / "doc_losses.npz").write_text("junk"), "no file of per-document losses"),
        (
            {},
            lambda folder: (folder / "doc_losses.npz").write_bytes(
                (folder / "doc_losses.npz").read_bytes()[:900]
            ),
            "no file of per-document losses",
        ),
        ({}, spoil("log.txt"), "is not the one that the result names"),
        ({}, lambda folder: (folder / "log.txt").write_text("step 1\n"), "doesn't begin with the source"),
        ({"source_sha256": "0" * 64}, None, "is not the one that the result names"),
        ({"val_loss": 3.0}, None, "states val_loss 3.0, its documents give"),
        ({"audit_loss": 3.0}, None, "states audit_loss 3.0, its documents give"),
        ({"val_bpb": 5.0}, None, "its documents allow"),
        ({"val_loss": float("nan")}, None, "val_loss"),
        ({"val_loss": "3.0"}, None, "is not of type 'number'"),
        ({}, shift_docs, "its documents give"),
        ({}, lambda folder: shift_docs(folder, "val_tokens", -500), "impossible val sums"),
        ({"complete": False}, None, "did not finish"),
        ({"violations": ["stopped early"]}, None, "can be no baseline: stopped early"),
        ({"training_flops": 2.1e14}, None, "the cap is 2e+14"),
        (
            {"data": {"name": "shakespeare", "train": "1" * 64, "val": "2" * 64, "audit": "3" * 64}},
            None,
            "trained on shakespeare",
        ),
        ({"track": "marathon"}, None, "'marathon' is not one of"),
        ({"date": "yesterday"}, None, "does not match"),
        ({"config": {}}, None, "'seq_len' is a required property"),
    ],
)
def test_add_refuses_a_bad_run_and_writes_nothing(repo, fields, spoiler, message):
    folder = repo.run("bad", **fields)
    if spoiler:
        spoiler(folder)
    assert message in repo.add([folder], "bad", "--kind", "baseline", ok=False)
    assert not (repo.root / "records/nano").exists() or not list((repo.root / "records/nano").iterdir())


FINEWEB = {"name": "fineweb100M", "train": "1" * 64, "val": "2" * 64, "audit": "3" * 64}
H100S = {"device": "cuda", "name": "NVIDIA H100 80GB HBM3", "count": 8, "torch": "2.13.0"}


@pytest.mark.parametrize(
    "track, fields, message",
    [
        ("limited", {"train_seconds": 3601.0}, "the cap is 60"),
        ("tiny", {"train_seconds": 901.0}, "the cap is 15"),
        ("two_hour", {"train_seconds": 7201.0}, "the cap is 120"),
        ("limited", {"machine": {**H100S, "count": 4}}, "ran on 4x NVIDIA H100"),
        ("limited", {"machine": {**H100S, "name": "NVIDIA B200"}}, "ran on 8x NVIDIA B200"),
        ("unlimited", {"gpu_seconds": 449 * 86400.0}, "449.0 GPU days, the cap is 448"),
    ],
)
def test_caps_of_the_dear_tracks(repo, track, fields, message):
    fair = {"track": track, "data": FINEWEB, "machine": H100S, "train_seconds": 890.0}
    assert message in repo.add(
        [repo.run("over", **{**fair, **fields})], "over", "--kind", "baseline", ok=False
    )
    repo.add([repo.run("fair", **fair)], "fair", "--kind", "baseline")


def test_snapshots_are_filed_with_the_unlimited_track(repo):
    run = repo.run("snapshots", track="unlimited_snapshots", data=FINEWEB)
    repo.add([run], "snapshots", "--kind", "baseline")
    assert repo.entries() == ["unlimited/01_snapshots"]
    repo.write_readmes()
    repo("check")


@pytest.mark.parametrize(
    "second, message",
    [
        ({"seed": 1}, "occurs twice; runs must differ"),
        ({"seed": 2, "source": b"other\n"}, "its source_sha256 is not that of the first run"),
        ({"seed": 2, "config": {"seq_len": 32}}, "its config is not that of the first run"),
        (
            {"seed": 2, "data": {"name": "nano", "train": "4" * 64, "val": "2" * 64, "audit": "3" * 64}},
            "its data is not",
        ),
    ],
)
def test_runs_of_an_entry_differ_in_their_seed_only(repo, second, message):
    assert message in repo.add(
        [repo.run("one"), repo.run("two", **second)], "two", "--kind", "baseline", ok=False
    )


def test_other_refusals_of_add(repo):
    one = repo.run("one")
    assert "1 seed, a nano record needs 3" in repo.add([one], "lone", ok=False)
    assert "--of NUMBER" in repo.add([one], "lone", "--kind", "reproduction", ok=False)
    assert "does not match" in repo.add([one], "Bad_Slug", "--kind", "baseline", ok=False)
    assert "is missing" in repo.add(["nowhere"], "lone", "--kind", "baseline", ok=False)
    assert "--help shows how" in repo("add", one, ok=False)
    repo.add([one], "lone", "--kind", "baseline")
    other = repo.run("other", data={"name": "nano", "train": "1" * 64, "val": "9" * 64, "audit": "3" * 64})
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
    splits = {
        "train": {"sha256": "1" * 64, "documents": 9, "tokens": 9},
        "val": {"sha256": "2" * 64, "documents": DOCUMENTS, "tokens": whole["val"] + 5},
        "audit": {"sha256": "3" * 64, "documents": DOCUMENTS, "tokens": whole["audit"] + 5},
    }
    manifest.write_text(json.dumps({"splits": splits}))
    assert "val was not scored whole" in repo.add([run], "one", "--kind", "baseline", ok=False)
    repo.add([repo.run("two")], "two", "--kind", "baseline")
    splits["train"]["sha256"] = "7" * 64
    manifest.write_text(json.dumps({"splits": splits}))
    assert "its train is not that of" in repo.add(
        [repo.run("three")], "three", "--kind", "negative", ok=False
    )


def test_a_kill_while_filing_leaves_no_half_entry(repo):
    runs = [str(run) for run in repo.runs("base")]
    command = [
        sys.executable,
        repo.root / "records/leaderboard.py",
        "add",
        *runs,
        "--slug",
        "start",
        "--kind",
        "baseline",
    ]
    command += ["--title", "start", "--contributors", "ada"]
    for _ in range(4):
        adding = subprocess.Popen(command, cwd=repo.root, stdout=subprocess.DEVNULL)
        while adding.poll() is None and not list(repo.root.glob("records/nano/.new_*/*/*")):
            time.sleep(0.0005)
        adding.kill()
        adding.wait()
    for entry in (repo.root / "records/nano").glob(
        "[0-9]*"
    ):  # the rename may have won a race against the kill
        assert len(list(entry.iterdir())) == 6
    repo.add(runs, "whole", "--kind", "baseline")
    repo.write_readmes()
    assert "all good" in repo("check")


# ---- check ---------------------------------------------------------------------------------------


def test_check_wants_the_readme_written_and_is_content_then(filled, copy):
    message = filled("check", ok=False)
    assert message.count("error: ") == 4 and "still says (fill in)" in message
    assert "4 entries checked" in copy("check")
    assert "1 entries checked" in copy("check", copy.root / "records/nano/02_better")


@pytest.mark.parametrize(
    "spoiler, message",
    [
        (
            lambda repo, at: repo.edit(at / "record.json", lambda record: record.update(val_loss=3.0)),
            "not the mean of its runs",
        ),
        (
            lambda repo, at: repo.edit(
                at / "record.json", lambda record: record["runs"][0].update(val_loss=3.0)
            ),
            "states val_loss",
        ),
        (
            lambda repo, at: repo.edit(at / "record.json", lambda record: record.update(mood="good")),
            "Additional properties",
        ),
        (
            lambda repo, at: repo.edit(at / "record.json", lambda record: record["runs"].pop()),
            "don't fit each other",
        ),
        (
            lambda repo, at: repo.edit(at / "record.json", lambda record: record["runs"][1].update(seed=1)),
            "a seed occurs twice",
        ),
        (
            lambda repo, at: repo.edit(
                at / "record.json", lambda record: record["runs"][1].update(config={"seq_len": 3})
            ),
            "differ in more than the seed",
        ),
        (
            lambda repo, at: repo.edit(
                at / "record.json", lambda record: record["runs"][1].update(training_flops=3e14)
            ),
            "the cap is",
        ),
        (
            lambda repo, at: repo.edit(
                at / "record.json", lambda record: record["runs"][1].update(complete=False)
            ),
            "did not finish",
        ),
        (lambda repo, at: (at / "log_seed2.txt").write_bytes(b"x"), "was changed since"),
        (lambda repo, at: (at / "log_seed2.txt").unlink(), "is missing"),
        (lambda repo, at: shift_docs(at, amount=0.1), "was changed since"),
        (lambda repo, at: (at / "README.md").unlink(), "README.md is missing"),
        (lambda repo, at: (at / "record.json").unlink(), "record.json is missing"),
        (
            lambda repo, at: at.rename(at.with_name("02_bettr")),
            "by its record.json it is records/nano/02_better",
        ),
        (lambda repo, at: shutil.copytree(at, at.with_name("02_twin")), "have one number"),
        (
            lambda repo, at: shutil.copytree(at.parent, at.parent.with_name("nana")),
            "it is records/nano/02_better",
        ),
    ],
)
def test_check_refuses_a_spoilt_entry(copy, spoiler, message):
    spoiler(copy, copy.root / "records/nano/02_better")
    assert message in copy("check", ok=False)


def test_check_refuses_a_record_that_is_none(copy):
    copy.edit(copy.root / "records/nano/04_worse/record.json", lambda record: record.update(kind="record"))
    assert "1 seed, a nano record needs 3" in copy("check", ok=False)
    copy.edit(
        copy.root / "records/nano/03_again/record.json",
        lambda record: (
            record.update(kind="record", of=None),
            [run.update(train_seconds=1.0) for run in record["runs"]],
        ),
    )
    assert "no record: " in copy("check", copy.root / "records/nano/03_again", ok=False)


# ---- render --------------------------------------------------------------------------------------


def generated(repo):
    return {
        path: path.read_bytes() for path in [repo.root / "README.md", *(repo.root / "records").glob("*.svg")]
    }


def test_render_is_idempotent_deterministic_and_knows_when_it_is_stale(copy):
    assert "out of date" in copy("render", "--check", ok=False)
    copy("render")
    first = generated(copy)
    assert len(first) == 4  # README, progress, efficiency, overfit
    assert "up to date" in copy("render", "--check")
    for path in list(first)[1:]:
        path.unlink()
    copy("render")
    assert generated(copy) == first
    text = first[copy.root / "README.md"].decode()
    assert (
        text.startswith("# Slowrun\n\nbefore\n<!--")
        and text.endswith("-->\nafter\n")
        and "\nold\n" not in text
    )
    (copy.root / "README.md").write_text(text.replace("title of better", "title of best"))
    assert "README.md out of date" in copy("render", "--check", ok=False)


def test_the_tables_say_what_is_known(copy):
    copy("render")
    text = (copy.root / "README.md").read_text()
    table = text[text.index("### limited") : text.index("### two_hour")]
    published = [line for line in table.splitlines() if line.startswith("| p")]
    assert len(published) == 20 and all("published, not verified here" in line for line in published)
    assert "| p20 | 3.195 | 6.13x | – |" in table and "sawtooth weight decay" in table
    nano = text[text.index("### nano") : text.index("### tiny")]
    assert re.search(
        r"\| 2 \| \d\.\d{3} \| – \| \d\.\d{3} \| 3 seeds; \+0\.0\d+ ± 0\.00\d+ against #1, z = ", nano
    )
    assert "(records/nano/02_better/log_seed1.txt)" in nano and "ada, grace" in nano
    assert "#3, reproduction" in nano and "agrees with #2" in nano and "#4, negative" in nano
    looks, gap, error = re.search(
        r"watch: (\d+) looks at val so far.*exceed gains on audit by (\S+) ± (\S+) ", nano
    ).groups()
    assert int(looks) == 5 * (3 + 3 + 3 + 1) and abs(float(gap)) < 2 * float(error)


def test_steps_of_the_published_history_stand_beside_their_gains_here(repo):
    """The published losses of 1, 3, 6 and 10 are 3.402, 3.349, 3.295 and 3.270."""
    for number, level in (1, 0.0), (3, -0.08), (6, -0.2), (10, -0.21):
        kind = "baseline" if number == 1 else "record"
        runs = repo.runs(f"l{number}s", level=level, config={"seq_len": SEQ_LEN, "step": number})
        repo.add(runs, f"limited-{number:02d}", "--kind", kind)
    repo("render")
    text = (repo.root / "README.md").read_text()
    rows = re.findall(r"\| (p\d+ to p\d+) \| (\S+) \| (\S+) ± (\S+) \| title of (\S+) \|", text)
    assert [row[0] for row in rows] == ["p1 to p3", "p3 to p6", "p6 to p10"]
    assert [row[4] for row in rows] == ["limited-03", "limited-06", "limited-10"]
    assert [float(row[1]) for row in rows] == [0.053, 0.054, 0.025]
    for (_, _, gain, half, _), truth in zip(rows, (0.08, 0.12, 0.01)):
        assert abs(float(gain) - truth) < 2 * float(half) < 0.02
    assert "Rank correlation of the 3 steps: 1.00; " in text


def test_the_watch_sees_gains_that_val_alone_shows(repo):
    repo.add(repo.runs("base"), "start", "--kind", "baseline")
    repo.add(repo.runs("peeked", level=-0.03, audit_level=-0.01, source=b"peeked\n"), "peeked")
    repo("render")
    gap, error = re.search(
        r"gains on audit by (\S+) ± (\S+) ", (repo.root / "README.md").read_text()
    ).groups()
    assert float(gap) == pytest.approx(0.02, abs=float(error)) and float(gap) > 2 * float(error)


def test_a_baseline_that_comes_after_a_record_only_stands_beside_the_table(repo):
    repo.add(repo.runs("base"), "start", "--kind", "baseline")
    repo.add(repo.runs("better", level=-0.02, source=b"better\n"), "better")
    repo("render")
    before = generated(repo)
    repo.add(repo.runs("large", level=0.3, source=b"large\n"), "large", "--kind", "baseline")
    repo("render")
    after = generated(repo)
    readme = before.pop(repo.root / "README.md").decode().split("\n")
    added = [line for line in after.pop(repo.root / "README.md").decode().split("\n") if line not in readme]
    assert after == before  # the plots
    assert [line.split(":")[0] for line in added] == [
        "Also filed",
        "- #3, baseline",
        "Overfitting watch",  # more looks
    ]
    assert "against #2" in repo.add(repo.runs("best", level=-0.04, source=b"best\n"), "best")


def test_render_wants_its_markers(repo):
    (repo.root / "README.md").write_text("# no markers\n")
    assert "needs a line" in repo("render", ok=False)
    assert (repo.root / "README.md").read_text() == "# no markers\n"


# ---- compare, power, efficiency ------------------------------------------------------------------


def test_compare_takes_entries_runs_and_sets_of_runs(filled):
    records = filled.root / "records/nano"
    by_entry = filled("compare", records / "02_better", records / "01_start")
    runs = [
        ",".join(str(filled.root / f"runs/{name}{seed}") for seed in (1, 2, 3)) for name in ("better", "base")
    ]
    assert filled("compare", *runs) == by_entry
    gain = float(re.search(r"val: .* A gains (\S+)", by_entry)[1])
    assert gain == pytest.approx(0.02, abs=0.004)
    probabilities = [float(found) for found in re.findall(r"probability (\d\.\d+)", by_entry)]
    assert len(probabilities) == 4 and min(probabilities) > 0.99
    assert len(re.findall(r"^  document ", by_entry, flags=re.MULTILINE)) == 10
    back = filled("compare", filled.root / "runs/base1", filled.root / "runs/better1", "--documents", 1)
    assert float(re.search(r"val: .* A gains (\S+)", back)[1]) < 0 and back.count("  document ") == 2


def test_compare_refuses_other_data(filled, repo):
    run = repo.run("alien", data={"name": "nano", "train": "1" * 64, "val": "9" * 64, "audit": "3" * 64})
    assert "on different data" in filled("compare", run, filled.root / "runs/base1", ok=False)


def test_power_and_efficiency(filled):
    seeds = int(re.search(r"from (\d+) seeds", filled("power", 0.01))[1])
    assert int(re.search(r"from (\d+) seeds", filled("power", 0.005))[1]) > seeds >= 1
    assert "no number of seeds" in filled("power", 0.00001)
    assert "6.13x" in filled("efficiency", 3.195)
    assert "< 2x (outside the table)" in filled("efficiency", 3.9) and "> 20x (outside" in filled(
        "efficiency", 2.5
    )
    assert "no curve for moon" in filled("efficiency", 3.0, "--data", "moon", ok=False)


def test_a_reader_that_has_seen_enough_ends_it_quietly(filled):
    command = [sys.executable, filled.root / "records/leaderboard.py", "efficiency", "3.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGPIPE


@pytest.mark.parametrize("command", [("check",), ("render", "--check")])
def test_the_records_of_this_repository_are_sound_and_rendered(command):
    """So a pull request with a bad record, or with stale tables, fails."""
    done = subprocess.run([sys.executable, ROOT / "records/leaderboard.py", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
