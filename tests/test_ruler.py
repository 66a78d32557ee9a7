"""The ruler on real runs of a made-up contestant: an honest one, and one cheat for each rule."""

import hashlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
VOCAB, BOS, T = 48, 47, 24
HONEST = '''
"""A bigram model with the interface that every train_gpt.py offers."""
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class Config:
    seq_len: int = 24

class Predictor:
    def __init__(self, table):
        self.table = table              # (vocabulary, vocabulary) log-probabilities
        self.seen = torch.ones(len(table))
    def logprobs(self, tokens):
        logits = self.table[tokens]
        # CHEAT
        return logits.log_softmax(-1)

def load_predictor(run_dir, device):
    return Predictor(torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True))
'''
CHEATS = {
    "mass": "return logits.log_softmax(-1) + 0.05",
    "causality": "logits[:, :-1] += 0.1 * torch.nn.functional.one_hot(tokens[:, 1:], 48)",
    "independence (grouping)": "logits += 0.3 * (tokens[0].bincount(minlength=48) + 1.0).log()",
    "independence (order)": "logits += self.seen.log(); self.seen += tokens.flatten().bincount(minlength=48)",
}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Documents of a random Markov chain, as the token files say it."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    chain = rng.dirichlet(np.full(VOCAB - 1, 0.1), VOCAB).cumsum(1)
    token_bytes = np.append(rng.integers(1, 8, VOCAB - 1), 0).astype(np.uint8)
    (folder / "token_bytes.bin").write_bytes(token_bytes.tobytes())
    manifest = {"name": "toy", "vocab_size": VOCAB, "bos_id": BOS, "splits": {}}
    for split, count in (("train", 20_000), ("val", 3_010), ("audit", 3_020)):
        tokens = [BOS]
        while len(tokens) < count:
            follow = int(np.searchsorted(chain[tokens[-1]], rng.random()))
            tokens.append(BOS if rng.random() < 0.03 else min(follow, VOCAB - 2))
        raw = np.array(tokens, "<u2").tobytes()
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        (folder / f"{split}.bin").write_bytes(header.tobytes() + raw)
        manifest["splits"][split] = {"tokens": count, "documents": tokens.count(BOS), "sha256": sha256(raw)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def tokens_of(dataset, split):
    return np.frombuffer((dataset / f"{split}.bin").read_bytes()[1024:], "<u2").astype(np.int64)


def make_run(run, dataset, source):
    """A run that scores itself in file order, eight sequences at a time, in plain loops."""
    (run / "checkpoints").mkdir(parents=True)
    train = tokens_of(dataset, "train")
    counts = np.full((VOCAB, VOCAB), 0.1)
    np.add.at(counts, (train[:-1], train[1:]), 1)
    torch.save(
        torch.tensor(np.log(counts / counts.sum(1, keepdims=True)), dtype=torch.float32),
        run / "checkpoints/last.pt",
    )
    (run / "train_gpt.py").write_text(source)
    spec = importlib.util.spec_from_file_location(
        f"contestant_{sha256(source.encode())[:8]}", run / "train_gpt.py"
    )
    sys.modules[spec.name] = contestant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(contestant)
    predictor = contestant.load_predictor(run, "cpu")
    manifest = json.loads((dataset / "manifest.json").read_text())
    token_bytes = np.fromfile(dataset / "token_bytes.bin", np.uint8)
    docs, result = (
        {},
        {
            "config": {"seq_len": T},
            "source_sha256": sha256(source.encode()),
            "data": {
                "name": "toy",
                **{split: facts["sha256"] for split, facts in manifest["splits"].items()},
            },
        },
    )
    for split in ("val", "audit"):
        tokens = tokens_of(dataset, split)
        loss, counted = (
            np.zeros(manifest["splits"][split]["documents"]),
            np.zeros(manifest["splits"][split]["documents"], int),
        )
        text_nats = text_bytes = 0.0
        starts = list(range(0, len(tokens) - T, T + 1))
        for first in range(0, len(starts), 8):
            batch = starts[first : first + 8]
            logprobs = predictor.logprobs(
                torch.tensor(np.array([tokens[start : start + T] for start in batch]))
            )
            for row, start in enumerate(batch):
                for t in range(T):
                    target = tokens[start + t + 1]
                    nats = -logprobs[row, t, target].item()
                    document = int((tokens[: start + t + 2] == BOS).sum()) - 1
                    loss[document] += nats
                    counted[document] += 1
                    if token_bytes[target]:
                        text_nats += nats
                        text_bytes += token_bytes[target]
        docs.update({f"{split}_loss": loss, f"{split}_tokens": counted})
        result.update(
            {
                f"{split}_loss": loss.sum() / counted.sum(),
                f"{split}_bpb": text_nats / math.log(2) / text_bytes,
            }
        )
    np.savez(run / "doc_losses.npz", **docs)
    (run / "result.json").write_text(json.dumps(result))
    return run


@pytest.fixture(scope="module")
def honest(dataset, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "honest", dataset, HONEST)


def measure(run, dataset, *more):
    return subprocess.run(
        [sys.executable, ROOT / "records/ruler.py", run, "--data", dataset, *more],
        capture_output=True,
        text=True,
    )


def edit(run, **fields):
    path = run / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("more", [[], ["--split", "audit", "--device-batch", "5", "--seed", "3"]])
def test_an_honest_run_passes(honest, dataset, more):
    done = measure(honest, dataset, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") == 7 and "FAIL" not in done.stdout
    assert f"executing {honest / 'train_gpt.py'}, the code of the run" in done.stdout
    split = "audit" if more else "val"
    stated = json.loads((honest / "result.json").read_text())
    for pattern, key in ((rf"loss: {split} (\S+),", "loss"), (r"bits per byte: (\S+),", "bpb")):
        assert float(re.search(pattern, done.stdout)[1]) == pytest.approx(stated[f"{split}_{key}"], abs=2e-6)


@pytest.mark.parametrize("rule", CHEATS)
def test_each_cheat_is_caught_by_its_rule(rule, dataset, tmp_path):
    run = make_run(tmp_path / "run", dataset, HONEST.replace("# CHEAT", CHEATS[rule]))
    done = measure(run, dataset)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"FAIL  {rule.split()[0]}" in done.stdout
    if rule in ("mass", "causality"):  # the cheats that stay the same whatever the grouping are told apart
        assert done.stdout.count("FAIL") == 1


def copy_of(honest, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for file in ("train_gpt.py", "result.json", "doc_losses.npz", "checkpoints/last.pt"):
        (run / file).write_bytes((honest / file).read_bytes())
    return run


def test_a_stated_loss_that_the_checkpoints_do_not_give_is_caught(honest, dataset, tmp_path):
    run = copy_of(honest, tmp_path)
    stated = json.loads((run / "result.json").read_text())
    edit(run, val_loss=stated["val_loss"] - 0.001, val_bpb=stated["val_bpb"] - 0.001)
    with np.load(run / "doc_losses.npz") as arrays:
        docs = dict(arrays)
    docs["val_loss"] = np.roll(docs["val_loss"], 1)
    np.savez(run / "doc_losses.npz", **docs)
    done = measure(run, dataset)
    assert done.returncode == 1
    assert [line.split()[1] for line in done.stdout.splitlines() if "FAIL" in line] == [
        "loss:",
        "bits",
        "documents:",
    ]


@pytest.mark.parametrize(
    "spoiler, message",
    [
        (
            lambda run: (run / "train_gpt.py").write_text(HONEST + "# more\n"),
            "is not the source that result.json names",
        ),
        (lambda run: (run / "train_gpt.py").unlink(), "needs a run folder with its script"),
        (lambda run: (run / "result.json").unlink(), "give the folder of a finished run"),
        (lambda run: (run / "doc_losses.npz").unlink(), "doc_losses.npz is missing"),
        (
            lambda run: edit(run, data={"name": "toy", "val": "0" * 64}),
            "holds other tokens than the run was scored on",
        ),
    ],
)
def test_bad_usage_is_one_line(honest, dataset, tmp_path, spoiler, message):
    run = copy_of(honest, tmp_path)
    spoiler(run)
    done = measure(run, dataset)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_no_dataset_is_one_line(honest, tmp_path):
    done = measure(honest, tmp_path)
    assert done.returncode == 2 and "data/prepare.py NAME" in done.stderr and done.stderr.count("\n") == 1
