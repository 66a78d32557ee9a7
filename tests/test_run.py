"""train_gpt.py in real processes, on a made-up dataset that a tiny model learns in seconds.

Most of the time of such a run is `import torch`. So beside the runs through run.sh and torchrun, a nursery
imports it once and forks: each child runs the script as `__main__`, with torchrun's variables where there
are several ranks, and ends by itself with its own exit code. Runs that serve many tests are session fixtures.
"""

import ast
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import pty
import re
import shutil
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from tqdm import tqdm

import harness
import logbook
import shards
from common import refused as refused_here
from conftest import slow

ROOT = Path(__file__).resolve().parent.parent

SOURCES = {name: (ROOT / name).read_text() for name in ("train_gpt.py", "harness.py", "logbook.py")}
SOURCE = SOURCES["train_gpt.py"]
VOCAB, BOS, T = 200, 199, 32
# Every technique of the recipe, at the least size: the head gate reads 12 channels, the value gate 32.
TINY = f"""--seq-len {T} --n-layer 2 --n-head 2 --n-embd 32 --window-stages 1,0.25,1 --replay 1-1
    --replay-passes 2 --replay-from-epoch 2 --cycles 1 --average 2 --lr-scale 1 --dtype float32""".split()
SHORT = [*TINY, *f"--dataset short --epochs 2 --batch-tokens {8 * T} --no-compile".split()]


# ---- Runs --------------------------------------------------------------------------------------------------

OURS = ("PET_", "TORCHELASTIC_", "NPROC", "PYTHON", "WANDB", "RANK", "LOCAL_RANK", "WORLD_SIZE")
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
ENVIRONMENT |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}  # as run.sh has it

class Outcome(NamedTuple):
    codes: list     # exit code of each rank
    stdout: str     # of all ranks
    stderr: str

@pytest.fixture(scope="session")
def nursery():
    command = [sys.executable, ROOT / "tests/nursery.py"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=-1, stdout=-1, text=True, bufsize=1) as process:
        yield process
        process.stdin.close()

@pytest.fixture(scope="session")
def train(nursery, tmp_path_factory):
    """train(project, *arguments, ranks=1, stdout=a file or terminal, script, **environment) -> Outcome."""

    def train(project, *arguments, ranks=1, stdout=None, script="train_gpt.py", **environment):
        with socket.create_server(("localhost", 0)) as free:
            cluster = {"WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": free.getsockname()[1]}
        output, processes = tmp_path_factory.mktemp("output"), []
        for rank in range(ranks):
            place = cluster | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
            variables = {key: str(value) for key, value in (environment | place).items()}
            processes.append((variables, stdout or f"{output}/{rank}.out", f"{output}/{rank}.err"))
        print(json.dumps([f"{project}/{script}", list(map(str, arguments)), processes]), file=nursery.stdin)
        codes = json.loads(nursery.stdout.readline())
        texts = ("".join(path.read_text() for path in output.glob(glob)) for glob in ("*.out", "*.err"))
        return Outcome(codes, *texts)

    return train

def run_sh(project, *arguments, **environment):
    """The same by run.sh, from another directory."""
    command = ["/bin/bash", f"{project}/run.sh", *map(str, arguments)]
    environment = ENVIRONMENT | environment
    result = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=200)
    return Outcome([result.returncode], result.stdout, result.stderr)

def make_dataset(folder, name, seed=0, **sizes):
    """Documents of 5 to 90 tokens from one Markov chain, in which most tokens have one likely successor."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    successors = rng.integers(0, BOS, (VOCAB, 3))
    for split, size in sizes.items():
        tokens = []
        while len(tokens) < size:
            tokens.append(BOS)
            for _ in range(rng.integers(5, 91)):
                tokens.append(successors[tokens[-1], rng.choice(3, p=[0.8, 0.15, 0.05])])
        writer = shards.ShardWriter(folder / f"{split}.bin")
        writer.append(np.array(tokens[:size], dtype="<u2"))
        writer.close()
    token_bytes = rng.integers(1, 8, VOCAB).astype(np.uint8)
    token_bytes[BOS] = 0
    manifest = {"name": name, "source": "a Markov chain", "revision": "1", "tokenizer": "none"}
    manifest |= {"vocab_size": VOCAB, "bos_id": BOS, "splits": sizes}
    shards.write_folder_end(folder, manifest, token_bytes)

def link_venv(clone):
    """Makes this interpreter the clone's .venv."""
    python = clone / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", clone / ".venv")

def make_project(folder, source=SOURCE):
    """A clone that has what a run needs."""
    link_venv(folder)
    for name in "run.sh", "requirements.txt":
        shutil.copy(ROOT / name, folder)
    (folder / "records").mkdir()
    for name in "harness.py", "logbook.py", "records/tracks.json", "records/plots.py":
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "cluster", folder / "cluster", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "train_gpt.py").write_text(source)
    (folder / "runs").mkdir()
    return folder

@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """nano is long enough to be learned; an epoch of short is five steps of 8 sequences."""
    folder = make_project(tmp_path_factory.mktemp("project") / "a clone")
    make_dataset(folder / "data/nano", "nano", train=20_000, val=3_080, audit=2_500)
    make_dataset(folder / "data/short", "short", train=1_300, val=620, audit=500)
    return folder

def metrics(run, kind):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]

def result_of(run):
    return json.loads((run / "result.json").read_text())

def leftovers(folder):
    return list(folder.rglob("*.tmp*"))

@pytest.fixture(scope="session")
def learned(project):
    """(Outcome, run folder) of ./run.sh smoke: set-up, torchrun, two gloo ranks, the clone's data/nano."""
    flags = ["--no-compile", "--batch-tokens", 32 * T, "--epochs", "3", "--run-name", "learned"]
    outcome = run_sh(project, "smoke", *TINY, *flags, NPROC="2")
    assert outcome.codes == [0], outcome.stderr
    return outcome, project / "runs/learned"


# ---- A whole run -------------------------------------------------------------------------------------------

def test_it_learns(project, learned):
    """A lookup of unigrams is what a model does that has learned nothing of the order."""
    train, val = (shards.read(project / f"data/nano/{split}.bin") for split in ("train", "val"))
    counts = np.bincount(train, minlength=VOCAB) + 1
    unigram = -np.log(counts / counts.sum())[val].mean()
    result, evals = result_of(learned[1]), metrics(learned[1], "eval")
    assert abs(evals[0]["loss"] - math.log(VOCAB)) < 0.1
    assert result["val_loss"] < unigram - 1 and result["audit_loss"] < unigram - 1
    assert all(before["loss"] > after["loss"] for before, after in zip(evals, evals[1:]))

def test_run_folder_is_complete(learned):
    run = learned[1]
    files = "log.txt metrics.jsonl result.json doc_losses.npz loss.svg checkpoints"
    assert {*SOURCES, *files.split()} <= {path.name for path in run.iterdir()}
    assert leftovers(run) == []
    assert all((run / name).read_text() == source for name, source in SOURCES.items())
    assert ElementTree.parse(run / "loss.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    for member in result_of(run)["members"]:
        weights = torch.load(run / "checkpoints" / member["checkpoint"], weights_only=True)
        assert all(w.isfinite().all() for w in weights.values())

def test_result_json(project, learned):
    result = result_of(learned[1])
    keys = """track seed config val_loss val_bpb audit_loss audit_bpb members parameters tokens_seen
        training_flops train_seconds wall_seconds gpu_seconds segments steps machine data source_sha256
        harness_sha256 logbook_sha256 val_evaluations violations date complete"""
    assert set(keys.split()) <= result.keys()
    assert {"track": "smoke", "seed": 42, "violations": [], "complete": True}.items() <= result.items()
    assert {"device": "cpu", "count": 2, "torch": torch.__version__}.items() <= result["machine"].items()
    manifest = shards.verify(project / "data/nano")
    digests = {split: row["sha256"] for split, row in manifest["splits"].items()}
    assert result["data"] == {"name": "nano", **digests}
    for key, source in zip(("source_sha256", "harness_sha256", "logbook_sha256"), SOURCES.values()):
        assert result[key] == hashlib.sha256(source.encode()).hexdigest()
    assert result["steps"] == len(metrics(learned[1], "step"))
    [segment] = result["segments"]
    assert segment == {"seconds": result["train_seconds"], "ranks": 2, "machine": result["machine"]}
    assert result["tokens_seen"] == len(metrics(learned[1], "step")) * 32 * T
    assert 0 < result["train_seconds"] < result["wall_seconds"] < 200
    assert result["gpu_seconds"] == 2 * result["train_seconds"]
    weights = torch.load(learned[1] / "checkpoints" / result["members"][0]["checkpoint"], weights_only=True)
    assert result["parameters"] == sum(w.numel() for w in weights.values())
    assert result["config"]["n_embd"] == 32 and result["config"]["lr_matrix"] == 0.04
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])

def test_metrics(learned):
    run = learned[1]
    steps, evals, [final] = (metrics(run, kind) for kind in ("step", "eval", "final"))
    sequences = result_of(run)["tokens_seen"] // T
    assert [row["step"] for row in steps] == [row["at"] for row in steps] == list(range(sequences // 32))
    assert {row["member"] for row in steps + evals} == {0}
    assert [row["epoch"] for row in evals] == [0, 1, 2, 3]
    assert evals[-1]["step"] == len(steps)
    assert all(row["split"] == "val" for row in evals)
    for key in "val_loss", "val_bpb", "audit_loss", "audit_bpb":
        assert final[key] == result_of(run)[key]
    assert result_of(run)["val_evaluations"] == len(evals) + 1  # the final predictor is one more look

def test_log(learned):
    """Its sources are the whole experiment; after them come environment, config, steps and evaluations."""
    outcome, run = learned
    rest = b"\n" + (run / "log.txt").read_bytes()
    for name, text in SOURCES.items():
        source, sha256 = text.encode(), hashlib.sha256(text.encode()).hexdigest()
        head = f"\nsource {name} {len(source)} bytes sha256 {sha256}\n".encode() + source
        assert rest.startswith(head)
        rest = rest[len(head):]
    lines = rest.decode()
    assert lines.startswith("\n") and torch.__version__ in lines and '"n_embd": 32' in lines
    assert all(line in lines for line in outcome.stdout.splitlines())
    missing = [row["step"] for row in metrics(run, "step") if f"{row['loss']:.4f}" not in lines]
    assert missing == [], f"{len(missing)} steps are not in log.txt"

def test_console(learned):
    """Plain lines where no terminal is; then the table of what matters, and where the run lies."""
    outcome, run = learned
    result, out = result_of(run), outcome.stdout
    assert outcome.stderr == "" and "\r" not in out and "\x1b" not in out
    assert len(re.findall(r"^epoch ", out, re.M)) == 3
    table = out.split("\n\n")[-1]
    for member in result["members"]:
        assert member["checkpoint"] in table and f"{member['val_loss']:.4f}" in table
    for key in "val_loss", "audit_loss", "val_bpb", "audit_bpb":
        assert f"{result[key]:.4f}" in table
    assert "runs/learned" in table and f"{result['parameters']:,}" in table and "record" not in table


# ---- Scoring, counted again --------------------------------------------------------------------------------

def load(run):
    """The module of a run's own train_gpt.py; of its harness.py the tree has the same."""
    spec = importlib.util.spec_from_file_location(f"contestant_{run.name}", run / "train_gpt.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.fixture(scope="session")
def contestant(learned):
    return load(learned[1])

def logprobs(contestant, run, sequences):
    """(n, T) float64: of each sequence's targets, three sequences at a time."""
    predictor, out = contestant.load_predictor(run, "cpu"), []
    for part in torch.from_numpy(sequences.astype(np.int64)).split(3):
        out.append(predictor.logprobs(part[:, :-1]).double().gather(2, part[:, 1:, None])[..., 0])
    return torch.cat(out).numpy()

def cut(project, split):
    """(n, T+1): the non-overlapping sequences of a split in file order."""
    tokens = np.array(shards.read(project / f"data/nano/{split}.bin"))
    return np.stack([tokens[i:i + T + 1] for i in range(0, len(tokens) - T, T + 1)])

def test_probabilities_sum_to_one(contestant, learned, project):
    predictor = contestant.load_predictor(learned[1], "cpu")
    tokens = torch.from_numpy(cut(project, "val")[:5, :-1].astype(np.int64))
    out = predictor.logprobs(tokens)
    assert out.shape == (5, T, VOCAB) and out.dtype == torch.float32
    assert (out.double().exp().sum(-1) - 1).abs().max() < 2e-6
    assert predictor.logprobs(tokens[:, :7]).shape == (5, 7, VOCAB)
    torch.testing.assert_close(predictor.logprobs(tokens[:, :7]), out[:, :7], rtol=0, atol=1e-5)

@pytest.mark.parametrize("split", ["val", "audit"])
def test_score_is_that_of_a_plain_count(contestant, learned, project, split):
    """The split's loss, bits per byte and documents, by a loop over the file's tokens."""
    run, sequences = learned[1], cut(project, split)
    assert len(sequences) % 2  # two ranks cannot share them equally
    tokens = shards.read(project / f"data/nano/{split}.bin")
    token_bytes = np.fromfile(project / "data/nano/token_bytes.bin", dtype=np.uint8)
    nats = -logprobs(contestant, run, sequences)
    document, documents = -1, {"loss": Counter(), "tokens": Counter(), "bytes": Counter()}
    for position, token in enumerate(tokens):
        document += token == BOS
        row, column = divmod(position, T + 1)
        if row < len(sequences) and column:
            documents["loss"][document] += nats[row, column - 1]
            documents["tokens"][document] += 1
            documents["bytes"][document] += int(token_bytes[token])
    saved, result = np.load(run / "doc_losses.npz"), result_of(run)
    assert len(saved[f"{split}_loss"]) == document + 1
    for name, dtype, tolerance in ("loss", np.float64, 1e-5), ("tokens", np.int64, 0), ("bytes", np.int64, 0):
        expected = [documents[name][d] for d in range(document + 1)]
        assert saved[f"{split}_{name}"].dtype == dtype
        np.testing.assert_allclose(saved[f"{split}_{name}"], expected, rtol=tolerance, atol=tolerance)
    has_bytes = token_bytes[sequences[:, 1:]] > 0
    bits = nats[has_bytes].sum() / math.log(2) / sum(documents["bytes"].values())
    assert result[f"{split}_loss"] == pytest.approx(nats.mean(), rel=2e-6)
    assert result[f"{split}_bpb"] == pytest.approx(bits, rel=2e-6)
    total = saved[f"{split}_loss"].sum() / saved[f"{split}_tokens"].sum()
    assert result[f"{split}_loss"] == pytest.approx(total, rel=1e-12)
    assert saved[f"{split}_tokens"].sum() == sequences[:, 1:].size

def test_predictor_is_the_weighted_mean_of_its_members_probabilities(contestant, learned, project, tmp_path):
    run, sequences = learned[1], cut(project, "val")
    members = result_of(run)["members"]
    assert [m["checkpoint"] for m in members] == ["epoch_0002.pt", "epoch_0003.pt"]
    assert [m["weight"] for m in members] == pytest.approx([1 / 3, 2 / 3])
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/checkpoints/predictor.json"
    spec, probabilities = json.loads(path.read_text()), 0
    for member, row in zip(members, spec["members"]):
        path.write_text(json.dumps(spec | {"members": [row | {"weight": 1.0}]}))
        logp = logprobs(contestant, tmp_path / "run", sequences)
        assert member["val_loss"] == pytest.approx(-logp.mean(), rel=2e-6)
        probabilities += member["weight"] * np.exp(logp)
    last = metrics(run, "eval")[-1]["loss"]
    assert members[-1]["val_loss"] == pytest.approx(last, rel=1e-9)  # the same model, twice scored
    assert result_of(run)["val_loss"] == pytest.approx(-np.log(probabilities).mean(), rel=2e-6)


# ---- Ranks, device batches, compilation --------------------------------------------------------------------

NOISE = ["--dropout", "0.2", "--stochastic-depth", "0.5", "--lr-scale", "0.25"]

@pytest.fixture(scope="session")
def shared_out(project, train):
    """shared_out(ranks, device batch) -> run folder: two epochs, with much dropout and stochastic depth."""

    @functools.cache
    def shared_out(ranks, device_batch):
        name = f"ranks{ranks}_batch{device_batch}"
        flags = [*NOISE, "--device-batch", device_batch, "--run-name", name]
        outcome = train(project, *SHORT, *flags, ranks=ranks)
        assert set(outcome.codes) == {0}, outcome.stderr
        return project / "runs" / name

    return shared_out

def losses(run):
    """Of every step, every evaluation and the final predictor."""
    result = result_of(run)
    final = [result[key] for key in ("val_loss", "audit_loss", "val_bpb", "audit_bpb")]
    return np.array([row["loss"] for kind in ("step", "eval") for row in metrics(run, kind)] + final)

@pytest.mark.parametrize("ranks, device_batch", [slow(1, 1), (2, 4), slow(4, 2)])
def test_ranks_and_device_batch_change_nothing(shared_out, ranks, device_batch):
    run, reference = shared_out(ranks, device_batch), shared_out(1, 4)
    assert len(metrics(run, "step")) == round(2 * (1_300 // (T + 1)) / 8)
    np.testing.assert_allclose(losses(run), losses(reference), rtol=5e-6)
    before = [metrics(folder, "eval")[0]["loss"] for folder in (run, reference)]
    assert before[0] == pytest.approx(before[1], rel=1e-7)  # scoring alone, before training

def test_two_ranks_that_sum_the_same_two_parts_are_bit_equal(shared_out):
    """One rank's two micro-batches are those of the two ranks, and a + b = b + a."""
    assert (losses(shared_out(1, 4)) == losses(shared_out(2, 4))).all()

@pytest.mark.parametrize("flags", ["--dropout 0", slow("--stochastic-depth 0")])
def test_noise_that_differs_would_show(project, shared_out, train, flags):
    """Or the tests above would compare less than they say."""
    name = "noise" + flags.replace(" ", "")
    assert train(project, *SHORT, *NOISE, *flags.split(), "--run-name", name).codes == [0]
    difference = losses(project / "runs" / name) / losses(shared_out(1, 4)) - 1
    assert abs(difference[5:]).max() > 1e-4  # twenty times the tolerance


# ---- Bad input ---------------------------------------------------------------------------------------------

@pytest.fixture
def refused(project, train):
    """refused(*flags) -> the one line of a user's mistake, which leaves nothing behind."""

    def refused(*flags, ranks=1):
        before = sorted((project / "runs").iterdir())
        outcome = train(project, *flags, ranks=ranks)
        assert outcome.codes[0] == 2, outcome.stderr
        assert outcome.stdout == "" and re.fullmatch(r"error: [^\n]+\n", outcome.stderr), outcome.stderr
        assert sorted((project / "runs").iterdir()) == before
        return outcome.stderr

    return refused

# What test_training.py finds refused in its own process is refused by a real one, too: in one line, before
# there is a run. Here stand one of them of each kind, and what only a process with its data or ranks can see.
@pytest.mark.parametrize("flags, said", [
    ("--track nan0", "nano"),
    ("nano", "nano"),
    ("--epochs three", "int"),
    slow("--n-head 3", "--n-embd 32"),
    ("--device-batch 3", "8 sequences"),
    ("--seq-len 2048 --batch-tokens 2048", "--seq-len"),
    slow("--run-name ..", "--run-name"),
    slow("--seed 12345678901234567890", "2^31"),
    slow("--run-name " + 300 * "x", "100 letters"),
    ("--optimizer pydoc:pipepager", "no installed distribution"),
    slow("--optimizer torch.nn:Linear", "no subclass of torch.optim.Optimizer"),
    ("--resume x --run-name y", "--run-name y"),
    ("--ranks-per-member 2", "1 ranks"),
])
def test_bad_flag(refused, flags, said):
    assert said in refused(*SHORT, *flags.split())

def test_bad_config_file(refused, tmp_path):
    (tmp_path / "config.json").write_text('{"n_layers": 2}')
    assert "n_layers" in refused("--config", tmp_path / "config.json")

def test_batch_that_the_ranks_cannot_share(refused):
    assert "3 ranks" in refused(*SHORT, ranks=3)

def test_used_run_name(refused, learned):
    before = {path: path.stat().st_mtime_ns for path in learned[1].rglob("*")}
    assert "--run-name" in refused(*SHORT, "--run-name", "learned")
    assert {path: path.stat().st_mtime_ns for path in learned[1].rglob("*")} == before

def poke(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)

def beyond_vocabulary(folder):
    """A dataset that is as its manifest says, but for the vocabulary."""
    poke(folder / "train.bin", shards.HEADER_BYTES + 20, int(VOCAB).to_bytes(2, "little"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"] = shards.describe(shards.read(folder / "train.bin"), BOS)
    (folder / "manifest.json").write_text(json.dumps(manifest))

@pytest.mark.parametrize("damage, said", [
    (lambda folder: shutil.rmtree(folder), "there is no dataset"),
    (lambda folder: (folder / "manifest.json").unlink(), "there is no dataset"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json"),
    (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json"),
    (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json"),
    (lambda folder: (folder / "val.bin").write_bytes(struct.pack("<256i", 20240520, 1, *254 * [0])),
     "holds no tokens"),
    (lambda folder: (folder / "audit.bin").unlink(), "audit.bin is missing"),
    (lambda folder: os.truncate(folder / "val.bin", 1500), "truncated"),
    (lambda folder: os.truncate(folder / "val.bin", 100), "val.bin"),
    (lambda folder: poke(folder / "train.bin", 0, b"\0"), "magic"),
    (lambda folder: poke(folder / "audit.bin", shards.HEADER_BYTES + 2, b"\1"), "digest"),
    (beyond_vocabulary, f"{VOCAB}"),
    (lambda folder: (folder / "token_bytes.bin").unlink(), "token_bytes.bin"),
    (lambda folder: poke(folder / "token_bytes.bin", 3, b"\xff"), "token_bytes.bin"),
])
def test_bad_dataset(capsys, project, tmp_path, damage, said):
    shutil.copytree(project / "data/short", tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(SystemExit) as end:
        harness.Dataset(tmp_path / "data", "./run.sh data short")
    out, error = capsys.readouterr()
    assert end.value.code == 2 and out == "" and re.fullmatch(r"error: [^\n]+\n", error)
    assert said in error and "./run.sh data short" in error

def test_a_run_ends_where_its_dataset_is_bad(refused, project, tmp_path):
    shutil.copytree(project / "data/short", tmp_path / "data")
    poke(tmp_path / "data/audit.bin", shards.HEADER_BYTES + 2, b"\1")
    error = refused(*SHORT, "--data", tmp_path / "data")
    assert "digest" in error and "./run.sh data short" in error

def test_quick_looks(project, train):
    """At the first tokens of val and audit alone, and between the epochs."""
    flags = "--val-tokens 200 --eval-every 2 --save-every 0 --run-name look".split()
    outcome = train(project, *SHORT, *flags)
    assert outcome.codes == [0] and outcome.stderr == "", outcome.stderr
    run, sequences = project / "runs/look", 200 // (T + 1)
    docs = np.load(run / "doc_losses.npz")
    assert docs["val_tokens"].sum() == docs["audit_tokens"].sum() == sequences * T
    assert [row["step"] for row in metrics(run, "eval")] == [0, 2, 4, 5, 6, 8, 10]
    assert len(re.findall(r"^look +\d/2 +step +\d+ +val", outcome.stdout, re.M)) == 4
    assert "scored on the first --val-tokens only" in result_of(run)["violations"]

def test_tokens_that_are_edited_while_it_runs_make_no_record(tmp_path):
    make_dataset(tmp_path / "nano", "nano", train=1_300, val=620, audit=500)
    data = harness.Dataset(tmp_path / "nano", "")
    assert data.changed() == []
    with open(tmp_path / "nano/val.bin", "r+b") as file:
        file.seek(1100)
        file.write(b"\x01\x00\x02\x00")
    assert data.changed() == ["val"]
    result = {"training_flops": 1e9, "executed_flops": 1.2e9, "data": {"name": "nano", "val_tokens": 9}}
    assert harness.violations("nano", result, False, data.changed(), False) == [
        "scored on the first --val-tokens only",
        "tokens were edited while it ran: val",
        "its products take 1.2e+09 FLOPs, over 1.05 of what it states",
    ]

def test_a_state_that_takes_long_is_waited_for_in_sight():
    shown, keeper = io.StringIO(), SimpleNamespace(team=None)
    bar = lambda **what: tqdm(file=shown, mininterval=0, **what)
    with futures.ThreadPoolExecutor(1) as pool:
        keeper.writing = pool.submit(time.sleep, 1.3)
        keeper.done, keeper.wait = functools.partial(logbook.Keeper.done, keeper), keeper.writing.result
        harness.Run.wait_for_state(SimpleNamespace(keeper=keeper, progress_bar=bar))
        assert keeper.writing.done()
    assert "saving the state: 00:01" in shown.getvalue()

@pytest.mark.parametrize("number, advice", [
    ("ENOSPC", "make room there"), ("EFBIG", "raise ulimit -f"), ("EMFILE", "raise ulimit -n"),
    ("EROFS", "mount it for writing"), ("EACCES", "see to its permissions"),
])
def test_trouble_of_the_machine_is_one_line(capsys, number, advice):
    def main(stop):
        raise OSError(getattr(errno, number), "Words of the system", "runs/a/log.txt")

    with mock.patch.object(logbook, "StopSignal"):
        said = refused_here(capsys, lambda: logbook.launch(main))
    assert said == f"error: cannot write runs/a/log.txt: Words of the system; {advice}\n"

@pytest.mark.parametrize("batch, advice", [(12, "--device-batch 6"), (1, "--checkpointing")])
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
])
def test_out_of_memory_names_the_batch_to_try(capsys, batch, advice, error):
    def main(stop):
        stop.device_batch = batch
        raise error

    with mock.patch.object(logbook, "StopSignal"):
        said = refused_here(capsys, lambda: logbook.launch(main))
    assert said.startswith(f"error: out of memory with --device-batch {batch}; try {advice}")

@pytest.mark.slow
def test_mistake_is_told_even_if_the_first_rank_is_the_last_to_see_it(project, tmp_path):
    """torchrun ends the other ranks when one has failed; the one that speaks must not be among them."""
    late = "import os, time\nif os.environ.get('LOCAL_RANK') == '0':\n    time.sleep(2)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    outcome = run_sh(project, "smoke", *TINY, "--n-head", "3", NPROC="2", PYTHONPATH=str(tmp_path))
    assert outcome.codes == [2] and outcome.stdout == ""
    assert re.fullmatch(r"error: --n-head 3 [^\n]+\n", outcome.stderr), outcome.stderr


# ---- Trouble on the way ------------------------------------------------------------------------------------

@pytest.fixture(params=["32k", "350k"], ids=["at the start", "at the first checkpoint"])
def full_disk(request, project):
    """A clone whose runs/ lie on a disk that cannot hold the source, or that can, but no checkpoint."""
    folder = project.parent / f"small disk {request.param}"
    make_project(folder)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder / "runs")]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder / "runs"], check=True)

def test_full_disk(project, full_disk, train):
    outcome = train(full_disk, *SHORT, "--data", project / "data/short", "--run-name", "full")
    assert outcome.codes == [2], outcome.stderr
    assert re.fullmatch(r"error: [^\n]*space[^\n]*\n", outcome.stderr)
    run = full_disk / "runs/full"
    assert leftovers(run) == [] and list(run.glob("checkpoints/*")) == []
    assert not (run / "result.json").exists()
    if (run / "train_gpt.py").exists():
        assert (run / "train_gpt.py").read_text() == SOURCE
    if (run / "metrics.jsonl").exists():
        assert len(metrics(run, "step")) > 0

@pytest.mark.parametrize("batch, lr_embed, lr_scale", [(8, 100, 1), slow(39, 1000, 10)])
def test_non_finite_loss(project, train, batch, lr_embed, lr_scale):
    """The embedding explodes. With 39 sequences an epoch is one step: it ends just after the one that
    did it, and no checkpoint may be made then."""
    name = f"explodes{batch}"
    flags = ["--epochs", "9", "--batch-tokens", batch * T, "--lr-embed", lr_embed, "--lr-scale", lr_scale]
    outcome = train(project, *SHORT, *flags, "--run-name", name)
    assert outcome.codes == [3], outcome.stderr
    error = re.fullmatch(r"error: .* is (?:nan|inf) at step (\d+)\b.* (\S+\.pt)\b.*\n", outcome.stderr)
    assert error, outcome.stderr
    run = project / "runs" / name
    steps, checkpoints = metrics(run, "step"), sorted((run / "checkpoints").glob("*.pt"))
    assert int(error[1]) in (len(steps), len(steps) - 1)
    assert all(math.isfinite(row["loss"]) for row in steps + metrics(run, "eval"))
    assert Path(error[2]).name == checkpoints[-1].name
    for path in checkpoints:
        assert all(w.isfinite().all() for w in torch.load(path, weights_only=True).values()), path
    assert not (run / "result.json").exists() and leftovers(run) == []


# ---- Kernels of a GPU --------------------------------------------------------------------------------------

@pytest.mark.parametrize("wanted, major, installed, used", [
    (None, 9, "FA3 FA4", "FA3"), (None, 9, "FA4", "FA4"), (None, 10, "FA3 FA4", "FA4"),
    (None, 8, "FA4", "FA2"), (None, 9, "", "FA2"), ("FA2", 9, "FA3 FA4", "FA2"), ("FA4", 9, "FA3 FA4", "FA4"),
    ("FA3", 10, "FA3", "--attention FA3"), ("FA4", 9, "", "--attention FA4"),
])
def test_which_flash_kernels_serve(capsys, wanted, major, installed, used):
    def activate(name):
        if name not in installed:
            raise ImportError(name)

    with (mock.patch("torch.nn.attention.activate_flash_attention_impl", activate),
          mock.patch("torch.cuda.get_device_capability", lambda: (major, 0))):
        if used.startswith("--"):
            assert used in refused_here(capsys, lambda: logbook.activate_flash(wanted))
        else:
            assert logbook.activate_flash(wanted) == used


# ---- Weights & Biases --------------------------------------------------------------------------------------

@pytest.mark.slow
def test_wandb_offline(project, train, tmp_path):
    pytest.importorskip("wandb")
    flags = ["--max-steps", "2", "--wandb", "--run-name", "wandb"]
    outcome = train(project, *SHORT, *flags, WANDB_MODE="offline", HOME=tmp_path)
    assert outcome.codes == [0], outcome.stderr
    assert list((project / "runs/wandb").rglob("offline-run-*/*.wandb"))
    assert "wandb is off" not in outcome.stdout and result_of(project / "runs/wandb")["complete"]

@pytest.mark.parametrize("module", [
    "raise ImportError('no such luck')\n",
    "def init(**settings):\n    raise RuntimeError('no such luck')\n",
    "class init:\n    __init__ = lambda self, **_: None\n    log = lambda *_, **__: open('no such luck')\n",
], ids=["missing", "init", "log"])
def test_wandb_never_costs_a_run(project, train, tmp_path, module):
    folder = make_project(tmp_path / "clone")
    (folder / "wandb.py").write_text(module)
    flags = ["--data", project / "data/short", "--max-steps", "2", "--wandb", "--run-name", "broken"]
    outcome = train(folder, *SHORT, *flags)
    assert outcome.codes == [0] and outcome.stderr == ""
    assert outcome.stdout.count("wandb") == outcome.stdout.count("no such luck") == 1
    assert result_of(folder / "runs/broken")["complete"]


# ---- Terminal, help, import --------------------------------------------------------------------------------

def test_progress_bar_on_a_terminal(project, train):
    terminal, stdout = pty.openpty()
    fcntl.ioctl(stdout, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows and columns
    shown = []

    def watch():
        try:
            while text := os.read(terminal, 10_000):
                shown.append(text.decode(errors="replace"))
        except OSError:  # nobody has it open any more
            pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    outcome = train(project, *SHORT, "--run-name", "terminal", stdout=os.ttyname(stdout))
    os.close(stdout)
    watcher.join()
    os.close(terminal)
    text = "".join(shown)
    assert outcome.codes == [0] and outcome.stderr == ""
    assert re.search(r"\r[^\r\n]*10/10[^\r\n]*step", text) and re.search(r"\r[^\r\n]*loss \d", text)
    assert re.search(r"^epoch +1/2 ", text.replace("\r", "\n"), re.M) and "val loss" in text

def test_help_teaches(project, train, contestant):
    outcome = train(project, "--help")
    assert outcome.codes == [0] and outcome.stderr == ""
    words = set(re.findall(r"--[\w-]+", outcome.stdout))
    fields = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(contestant.Config)}
    others = "--track --config --seed --run-name --data --device-batch --dtype --max-steps --wandb --resume"
    others += " --ranks-per-member --checkpointing --plan"
    assert fields | set(others.split()) <= words | {"--track"}
    text = " ".join(outcome.stdout.split())
    assert all(track in text for track in contestant.TRACKS)
    for name, (_, _allowed, meaning) in logbook.comments(contestant.Config).items():
        assert meaning and " ".join(meaning.split()) in text, f"{name} has no comment that says what it is"
    assert "[0, 0.9] = 0.1" in text and len(outcome.stdout.splitlines()) <= 120
    tiny = train(project, "--track", "tiny", "--help")
    assert "n-layer X" in tiny.stdout and re.search(r"--epochs .* = 15\n", tiny.stdout)

def test_importing_has_no_side_effects(project):
    script = """
import os, torch
before = set(os.environ), torch.get_rng_state().tolist(), torch.get_default_dtype()
import train_gpt
assert before == (set(os.environ), torch.get_rng_state().tolist(), torch.get_default_dtype())
assert not torch.distributed.is_initialized()
import threading
assert threading.active_count() == 1
"""
    before = sorted(project.rglob("*"))
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=project, env=ENVIRONMENT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert sorted(project.rglob("*")) == before


# ---- Caps and violations -----------------------------------------------------------------------------------

def test_run_over_its_cap_is_no_record(project, train, tmp_path):
    folder = make_project(tmp_path / "clone")
    tracks = json.loads((folder / "records/tracks.json").read_text())
    tracks["smoke"]["cap"] = {"training_flops": 1e6}
    (folder / "records/tracks.json").write_text(json.dumps(tracks))
    flags = ["--track", "smoke", "--data", project / "data/short", "--max-steps", "2", "--run-name", "over"]
    outcome = train(folder, *SHORT, *flags)
    assert outcome.codes == [0], outcome.stderr
    cap, early, data = result_of(folder / "runs/over")["violations"]
    assert "training_flops" in cap and "1e+06" in cap
    assert "--max-steps" in early and "short" in data
    assert all(f"no record    {reason}" in outcome.stdout for reason in (cap, early, data))


# ---- The source --------------------------------------------------------------------------------------------

def test_the_contestant_imports_harness_and_logbook_and_nothing_else_of_the_repository():
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names <= {"torch", "numpy", "harness", "logbook"}

def test_every_track_has_its_rules(contestant):
    tracks = json.loads((ROOT / "records/tracks.json").read_text())
    assert contestant.TRACKS.keys() == tracks.keys()
    for name, row in contestant.TRACKS.items():
        assert tracks[name]["dataset"] == row.get("dataset", contestant.Config.dataset)
