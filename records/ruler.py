"""The ruler: scores a run again from its checkpoints, and looks whether its predictor plays by the rules.

    python records/ruler.py runs/NAME                    # val, on the CPU
    python records/ruler.py runs/NAME --split audit --device cuda --device-batch 16

It EXECUTES THE CODE OF THE RUN: the run's own copy of train_gpt.py is imported and asked for
`load_predictor(run, device)`, whose `logprobs(tokens)` turns (B, T) int64 into (B, T, vocabulary)
log-probabilities, position t for token t + 1. Look at a stranger's script before you measure it. Nothing else
is taken from it: the ruler reads the tokens itself and checks

  1. the loss: every sequence scored once, in an order of the ruler's own, gives the loss, bits per byte and
     per-document sums that the run states;
  2. that probabilities are probabilities: at every position they sum to 1 over the whole vocabulary;
  3. causality: replacing the tokens after a random position changes nothing at it or before it;
  4. independence: a sequence scores the same alone or in a batch, first or last, before or after others.

Exit code 1 if a rule is broken; bad usage is one line on stderr and exit code 2. Passing is no proof: random
probes don't meet everything, and a script can tell that it is being measured.
"""
import argparse
import hashlib
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
HEADER_BYTES, MAGIC, VERSION = 1024, 20240520, 1
LOSS = 5e-4         # half a unit of the board's last digit; bf16 on another device moves a mean by less
DOCUMENTS = 1e-3    # the same document by document, where differences don't cancel
MASS = 1e-3         # of the sum of probabilities
LEAK = 1e-3         # nats on one target: the same shapes give the same arithmetic, so next to nothing
GROUPING = 1e-3     # nats per token of a sequence: other shapes take other kernels, which round otherwise
PROBES, CUTS = 32, 4


class Refused(Exception):
    """What is wrong and what mends it, in one line for the user."""


def need(condition, message):
    if not condition:
        raise Refused(message)


class Split(NamedTuple):
    """A split cut by the scoring rule: sequences of T + 1 tokens in file order, without overlap."""
    sequences: np.ndarray   # (sequences, T + 1) int64
    documents: np.ndarray   # (sequences, T) document that each target stands in
    bytes: np.ndarray       # (sequences, T) bytes of each target, 0 for BOS
    vocab_size: int
    count: int              # documents in the split


# ---- Reading -------------------------------------------------------------------------------------


def read_json(path, mend):
    need(path.is_file(), f"{path} is missing; {mend}")
    return json.loads(path.read_text())


def read_split(folder, name, seq_len, digest):
    """The tokens of `folder`/`name`.bin, which must be those that the run was scored on."""
    manifest = read_json(folder / "manifest.json", "run `python data/prepare.py NAME`, or give --data")
    path = folder / f"{name}.bin"
    need(path.is_file(), f"{path} is missing; build it with `python data/prepare.py {manifest['name']}`")
    raw = path.read_bytes()
    magic, version, count = np.frombuffer(raw, "<i4", 3)
    need((magic, version) == (MAGIC, VERSION) and len(raw) == HEADER_BYTES + 2 * count,
         f"{path} is no token file or is cut short; rebuild the dataset")
    need(hashlib.sha256(memoryview(raw)[HEADER_BYTES:]).hexdigest() == digest,
         f"{path} holds other tokens than the run was scored on; rebuild the dataset, or give another --data")
    tokens = np.frombuffer(raw, "<u2", count, HEADER_BYTES)
    token_bytes = np.frombuffer((folder / "token_bytes.bin").read_bytes(), np.uint8)
    documents = np.cumsum(tokens == manifest["bos_id"]) - 1  # a BOS belongs to the document that it starts
    whole = count // (seq_len + 1) * (seq_len + 1)
    sequences, in_document, size = (array[:whole].reshape(-1, seq_len + 1)
                                    for array in (tokens.astype(np.int64), documents, token_bytes[tokens]))
    return Split(sequences, in_document[:, 1:], size[:, 1:], manifest["vocab_size"], documents[-1] + 1)


def load_script(path, digest):
    """Imports the run's copy of train_gpt.py under a name of its own."""
    need(path.is_file(), f"{path} is missing; the ruler needs a run folder with its script and checkpoints")
    source = hashlib.sha256(path.read_bytes()).hexdigest()
    need(source == digest, f"{path} is not the source that result.json names")
    spec = importlib.util.spec_from_file_location(f"train_gpt_{digest[:16]}", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up by its name
    spec.loader.exec_module(script)
    return script


# ---- Measuring -----------------------------------------------------------------------------------


class Ruler:
    """Asks a predictor for the log-probabilities of targets, and checks their mass on the way."""

    def __init__(self, predictor, vocab_size, device, progress):
        self.predictor, self.vocab_size, self.device, self.progress = predictor, vocab_size, device, progress
        self.worst_mass = 0.0

    @torch.no_grad()
    def __call__(self, sequences, targets=None):
        """(B, T) float64 log-probabilities of the targets, by default those in `sequences` (B, T + 1)."""
        targets = torch.tensor(sequences[:, 1:] if targets is None else targets, device=self.device)
        tokens = torch.tensor(sequences[:, :-1], device=self.device)
        logprobs = self.predictor.logprobs(tokens)
        need(tuple(logprobs.shape) == (*tokens.shape, self.vocab_size),
             f"logprobs gave {tuple(logprobs.shape)}; the vocabulary has {self.vocab_size} tokens")
        mass = logprobs.float().logsumexp(-1).double().exp()
        off = (mass - 1).abs().nan_to_num(nan=math.inf).max().item()
        self.worst_mass = max(self.worst_mass, off)
        self.progress.update(len(tokens))
        return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double().cpu().numpy()


def score(ruler, split, batch, rng):
    """(loss, bits per byte, per-document nats, per-document tokens), the sequences taken in random order."""
    nats = np.empty(split.documents.shape)
    order = rng.permutation(len(nats))
    for start in range(0, len(order), batch):
        rows = order[start:start + batch]
        nats[rows] = -ruler(split.sequences[rows])
    text = split.bytes > 0
    sums = np.bincount(split.documents.ravel(), nats.ravel(), split.count)
    return (nats.mean(), nats[text].sum() / (math.log(2) * split.bytes.sum(dtype=np.int64)), sums,
            np.bincount(split.documents.ravel(), minlength=split.count))


def worst_leak(ruler, split, batch, rng):
    """Largest change of a target's log-probability when tokens after its position are replaced; nats."""
    worst = 0.0
    rows = rng.choice(len(split.sequences), min(PROBES, len(split.sequences)), replace=False)
    for start in range(0, len(rows), batch):
        original = split.sequences[rows[start:start + batch]]
        before = ruler(original)
        for _ in range(CUTS):
            cuts = rng.integers(0, before.shape[1], len(original))[:, None]  # tokens up to a cut are kept
            after_cut = np.arange(original.shape[1]) > cuts
            changed = np.where(after_cut, rng.integers(0, split.vocab_size, original.shape), original)
            moved = np.abs(ruler(changed, targets=original[:, 1:]) - before)
            worst = max(worst, moved[~after_cut[:, :-1]].max())
    return worst


def worst_grouping(ruler, split, batch, rng):
    """Largest change of a sequence's mean loss from batches to one by one and to other orders; nats."""
    rows = rng.choice(len(split.sequences), min(PROBES, len(split.sequences)), replace=False)

    def means(order, size):  # (len(rows),) whatever the order
        found = np.empty(len(rows))
        for start in range(0, len(rows), size):
            some = order[start:start + size]
            found[some] = ruler(split.sequences[rows[some]]).mean(1)
        return found

    forth = np.arange(len(rows))
    first = means(forth, batch)
    others = (forth, 1), (forth[::-1], batch), (rng.permutation(len(rows)), batch + 1)
    return max(np.abs(means(order, size) - first).max() for order, size in others)


def measure(run, name, data, device, batch, seed):
    """Prints what was measured; returns the rules that were broken, as lines."""
    result = read_json(run / "result.json", "give the folder of a finished run")
    folder = data or ROOT / "data" / result["data"]["name"]
    split = read_split(folder, name, result["config"]["seq_len"], result["data"][name])
    stated = run / "doc_losses.npz"
    need(stated.is_file(), f"{stated} is missing; give the folder of a finished run")
    with np.load(stated) as docs:
        its_sums, its_tokens = docs[f"{name}_loss"], docs[f"{name}_tokens"]
    print(f"executing {run / 'train_gpt.py'}, the code of the run, sha256 {result['source_sha256'][:16]}…")
    predictor = load_script(run / "train_gpt.py", result["source_sha256"]).load_predictor(run, device)
    rng = np.random.default_rng(seed)
    work = len(split.sequences) + min(PROBES, len(split.sequences)) * (1 + CUTS + 4)
    with tqdm(total=work, desc="scoring and probing", unit="seq", disable=None) as progress:
        ruler = Ruler(predictor, split.vocab_size, device, progress)
        loss, bpb, sums, tokens = score(ruler, split, batch, rng)
        leak = worst_leak(ruler, split, batch, rng)
        grouping = worst_grouping(ruler, split, batch, rng)
    same_tokens = np.array_equal(its_tokens, tokens)
    apart = np.abs(its_sums - sums).sum() / tokens.sum() if same_tokens else math.inf
    its_loss, its_bpb = result[f"{name}_loss"], result[f"{name}_bpb"]
    checks = [
        (abs(loss - its_loss) <= LOSS, f"loss: {name} {loss:.6f}, the run states {its_loss:.6f} (± {LOSS})"),
        (abs(bpb - its_bpb) <= LOSS, f"bits per byte: {bpb:.6f}, the run states {its_bpb:.6f} (± {LOSS})"),
        (same_tokens, f"documents: {tokens.sum():,} targets in {split.count:,} documents"),
        (apart <= DOCUMENTS, f"documents: their sums are {apart:.2g} nats a token apart ({DOCUMENTS})"),
        (ruler.worst_mass <= MASS, f"mass: probabilities sum to 1 within {ruler.worst_mass:.2g} ({MASS})"),
        (leak <= LEAK, f"causality: later tokens move a target by at most {leak:.2g} nats ({LEAK})"),
        (grouping <= GROUPING,
         f"independence: grouping and order move a sequence by at most {grouping:.2g} nats ({GROUPING})"),
    ]
    for good, line in checks:
        print(f"{'ok  ' if good else 'FAIL'}  {line}")
    return [line for good, line in checks if not good]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    argument = parser.add_argument
    argument("run", type=Path, metavar="RUN", help="run folder with its script, result and checkpoints")
    argument("--split", default="val", choices=("val", "audit"), help="which split to score (val)")
    argument("--data", type=Path, metavar="DIR", help="dataset folder (data/NAME of this repository)")
    argument("--device", default="cpu", help="where to predict (cpu)")
    argument("--device-batch", type=int, default=2, metavar="B",
             help="sequences at once (2); more is faster on a GPU; B x T x vocabulary floats must fit twice")
    argument("--seed", type=int, default=0, help="of the positions that are probed (0)")
    args = parser.parse_args()
    try:
        broken = measure(args.run, args.split, args.data, args.device, args.device_batch, args.seed)
    except Refused as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
