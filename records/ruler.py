"""The ruler: scores a run again from its checkpoints, and looks whether its predictor plays by the rules.

    ./run.sh ruler RUN                          every check below, on val
    ./run.sh ruler RUN --split audit --device cuda
    ./run.sh eval RUN                           only the score: val and audit, of a run complete or not
    ./run.sh eval RUN --split letter.txt        of a text in UTF-8, or of any llm.c token file

RUN is a folder, or the name of one in runs/. It EXECUTES THE CODE OF THE RUN, its own train_gpt.py (and
harness), in a process that predictor.py confines where that can be done. The ruler keeps the tokens, gives
token ids away, gets float32 log-probabilities back as bytes, and computes everything from them in float64:

  1. the loss: every sequence scored once, in an order of the ruler's own, gives the loss, bits per byte and
     per-document sums that the run states;
  2. mass: at every scored position the probabilities sum to 1 over the whole vocabulary;
  3. causality: at random positions the tokens that follow are replaced, and a second process, which has never
     seen the true ones, must give the true token the same probability as the first did;
  4. independence: a sequence scores the same alone or in a batch, first or last, before or after others.

Each check says what it measured and, in brackets, what it tolerates; a loss can gain no more nats than that.
Tokens count as a dataset's when they have the digests in data/tokens.json, whatever the run says. Exit code 1
if a rule is broken or the predictor fails; bad usage is one line on stderr and exit code 2.

What passing does not prove: that weights or files of the run hold no val tokens (fresh text tells), that the
training was within its cap, or how long it took. Only a re-run shows these.
"""
import argparse
import hashlib
import json
import math
import os
import secrets
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "data"), str(ROOT / "records")]

import shards  # noqa: E402
from predictor import MIXES, WHOLE, Broken, Predictor, confinement  # noqa: E402

SOURCES = {"train_gpt.py": "source_sha256", "harness.py": "harness_sha256", "logbook.py": "logbook_sha256"}
LOSS = 5e-4         # half a unit of the board's last digit; bf16 on another device moves a mean by less
DOCUMENTS = 1e-3    # the same document by document, where differences don't cancel
MASS = 5e-5         # of the sum: float32 keeps a log-probability of 10 within 5e-7, and many members add up
LEAK = 1e-3         # nats on one target: the same shapes give the same arithmetic, so next to nothing
GROUPING = 1e-3     # nats per token of a sequence: other shapes take other kernels, which round otherwise
PROBES = 4096       # positions whose later tokens are replaced, or
COST = 2            # what probing and regrouping cost together, in times the cost of scoring, if that is less
REGROUPED = 32      # sequences that are scored in other company
SURE = 0.997        # with which probability a leak of the stated size would have been seen
ANSWER_BYTES = 1 << 26  # of a batch of log-probabilities, when --device-batch is not given
BLOCK = 1 << 20     # log-probabilities that are summed at a time: bounds the memory of a thread to 8 MB

class Refused(Exception):
    """What is wrong and what mends it, in one line for the user."""

def need(condition, message):
    if not condition:
        raise Refused(message)


# ---- The run -----------------------------------------------------------------------------------------------

class Run(NamedTuple):
    folder: Path
    facts: dict     # what it states: result.json, or as much as there is of an unfinished run
    seq_len: int    # T
    dataset: str    # the name of what its track is scored on

def read_json(path, mend):
    need(path.is_file(), f"{path} is missing; {mend}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_int=lambda digits: int(digits[:30]))
        assert isinstance(value, dict)
    except (ValueError, AssertionError, RecursionError):
        raise Refused(f"{path} is damaged: it holds no JSON object; {mend}") from None
    return value

def stated(facts, *keys, form=(int, float)):
    """A number, or what `form` says, of the run's statement, by its path of keys."""
    value = facts
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    what = f"what the run states is damaged: {'.'.join(keys)} is {json.dumps(value)[:80]}"
    need(isinstance(value, form) and not isinstance(value, bool), what)
    return value

def read_run(name, finished):
    """The run of a name or path. finished: it must have its result.json."""
    places = Path(name), ROOT / "runs" / name, ROOT / name
    folder = next((place for place in places if place.is_dir()), None)
    need(folder, f"there is no run {name}; the runs are in runs/ (./run.sh runs lists them)")
    folder = folder.resolve()
    sources = "result.json", *(() if finished else ("run.json", "checkpoints/predictor.json"))
    file = next((folder / source for source in sources if (folder / source).exists()), folder / "result.json")
    facts = read_json(file, "give the folder of a finished run" if finished else "give the folder of a run")
    seq_len = stated(facts, "config", "seq_len", form=int)
    need(seq_len > 1, f"{file} is damaged: config.seq_len is {seq_len}")
    digests = {source: facts.get(key) for source, key in SOURCES.items()}
    digests |= stated({"sources": {}} | facts, "sources", form=dict)
    for source in SOURCES:
        path = folder / source
        if source == "train_gpt.py" or digests[source]:
            need(path.is_file(), f"{path} is missing; give a run folder with its script and checkpoints")
        if path.is_file() and (finished or digests[source]):
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            need(found == digests[source], f"{path} is not the source that {file.name} names")
    tracks = json.loads((ROOT / "records/tracks.json").read_text())
    track = tracks.get(str(facts.get("track")))  # a run may name its dataset only where no track does
    own = facts["config"].get("dataset") or stated(facts, "data", "name", form=str)
    dataset = track["dataset"] if track else own
    return Run(folder, facts, seq_len, Path(str(dataset)).name)


# ---- The tokens --------------------------------------------------------------------------------------------

class Dataset(NamedTuple):
    folder: Path
    name: str
    vocab_size: int
    bos_id: int
    token_bytes: np.ndarray  # (vocab_size,) uint8
    digests: dict            # sha256 of each split's tokens
    origin: str              # who vouches for them, for people

class Split(NamedTuple):
    """Targets and what is shown before them, each (sequences, T)."""
    name: str
    tokens: np.ndarray      # int64, what the predictor gets
    targets: np.ndarray     # int64, what comes after each
    scored: np.ndarray      # bool: False where a text had to be filled up
    documents: np.ndarray   # the document that each target stands in
    bytes: np.ndarray       # of each target, 0 for BOS
    count: int              # documents

def open_dataset(folder):
    """The dataset in a folder, as data/tokens.json knows it, and else as its own manifest does."""
    manifest = shards.read_manifest(folder)
    name, mend = manifest["name"], f"rm -r {folder}; ./run.sh data {manifest['name']}"
    token_bytes = np.fromfile(folder / "token_bytes.bin", np.uint8)
    measured = {"vocab_size": manifest["vocab_size"], "bos_id": manifest["bos_id"],
                "token_bytes_sha256": hashlib.sha256(token_bytes.tobytes()).hexdigest()}
    pin = json.loads((ROOT / "data/tokens.json").read_text()).get(name)
    for key, value in measured.items():
        need(value == (pin or manifest)[key], f"{folder} has another {key} than {name}; {mend}")
    digests = {split: row["sha256"] for split, row in manifest["splits"].items()}
    known = {split: row["sha256"] for split, row in pin["splits"].items() if row["sha256"]} if pin else {}
    for split, row in (pin["splits"] if pin else {}).items():
        found = manifest["splits"].get(split, {})
        need(found.get("tokens") == row["tokens"] and found["sha256"] == known.get(split, found["sha256"]),
             f"{folder}: its {split} is not {name}'s; {mend}")
    origin = "as data/tokens.json has it" if known else "not pinned: only its own manifest vouches for it"
    return Dataset(folder, name, manifest["vocab_size"], manifest["bos_id"], token_bytes, digests, origin)

def read_split(dataset, name, T):
    """A split of the dataset, or else a file of tokens or of text."""
    path, own = Path(name), dataset.folder / f"{name}.bin"
    if own.is_file() or "/" not in name and not path.exists() and not path.suffix:
        what = "fresh SHA256" if name.startswith("fresh-") else dataset.name
        need(own.is_file(), f"{own} is missing; build it with ./run.sh data {what}, or give --split a file")
        path = own
    wrong = "a folder" if path.is_dir() else "there is no such file"
    need(path.is_file(), f"--split {name}: {wrong}; give val, audit, a token file or a text file.txt")
    if path.suffix == ".txt":
        return read_text(dataset, path, T)
    tokens = np.array(shards.read(path))
    if path == own and name in dataset.digests:
        need(hashlib.sha256(tokens.tobytes()).hexdigest() == dataset.digests[name],
             f"{path} is not {dataset.name}'s {name}; rebuild the dataset")
    beyond = f"{path} holds token {tokens.max()}, beyond the vocabulary of {dataset.name}"
    need(tokens.max() < dataset.vocab_size, beyond)
    whole = len(tokens) // (T + 1) * (T + 1)  # sequences of T + 1 tokens in file order, without overlap
    need(whole, f"{path} is shorter than a sequence of {T + 1} tokens")
    starts = np.cumsum(tokens == dataset.bos_id)  # a BOS belongs to the document that it starts
    document = np.maximum(starts - 1, 0)
    rows, owners = (array[:whole].reshape(-1, T + 1) for array in (tokens.astype(np.int64), document))
    targets = rows[:, 1:]
    return Split(name, rows[:, :-1], targets, np.ones(targets.shape, bool), owners[:, 1:],
                 dataset.token_bytes[targets], int(document[-1]) + 1)

def read_text(dataset, path, T):
    """A text as one document, scored from its first token on in windows of T; the last is filled up."""
    import prepare

    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    need(text, f"{path} is empty")
    tokenizer, token_bytes = prepare.gpt2(dataset.vocab_size)
    known = np.array_equal(token_bytes, dataset.token_bytes)
    need(known, f"the tokenizer of {dataset.name} is not known here; give --split a token file")
    ids = next(prepare.encode(tokenizer, [text])).astype(np.int64)
    windows = -(-(len(ids) - 1) // T)
    fill = np.full(windows * T + 1 - len(ids), dataset.bos_id)
    tokens, targets = (np.concatenate([part, fill]).reshape(windows, T) for part in (ids[:-1], ids[1:]))
    scored = (np.arange(windows * T) < len(ids) - 1).reshape(windows, T)
    return Split(path.name, tokens, targets, scored, np.zeros_like(targets), token_bytes[targets] * scored, 1)


# ---- Measuring ---------------------------------------------------------------------------------------------

class Judge:
    """Asks a predictor, `batch` sequences at a time, for the log-probabilities of targets and their mass."""

    def __init__(self, vocab_size, batch, progress):
        self.vocab_size, self.batch, self.progress = vocab_size, batch, progress
        self.threads = ThreadPoolExecutor(os.cpu_count())

    def __call__(self, predictor, tokens, targets, batch=None, member=WHOLE, mix=None):
        """tokens, targets (n, T) -> float64 (n, T): each target's log-probability."""
        return np.concatenate([row for row, _ in self.rows(predictor, tokens, targets, batch, member, mix)])

    def weighed(self, predictor, tokens, targets, mix=None):
        """The same and the sum of probabilities at every position, (n, T) each."""
        pairs = self.rows(predictor, tokens, targets, None, WHOLE, mix, weigh=True)
        return tuple(map(np.concatenate, zip(*pairs)))

    def rows(self, predictor, tokens, targets, batch, member, mix, weigh=False):
        n, batch = len(tokens), batch or self.batch
        for start in range(0, n, batch):  # the last batch is filled up: so all have one shape
            rows = np.arange(start, start + batch)
            answers = predictor(tokens[np.where(rows < n, rows, 0)], self.vocab_size, member, mix)
            rows = rows[rows < n]
            answers = answers[:len(rows)]
            logp = np.take_along_axis(answers, targets[rows, :, None], -1)[..., 0].astype(np.float64)
            mass = np.stack(list(self.threads.map(masses, answers))) if weigh else np.ones(logp.shape)
            if np.isnan(logp).any() or np.isnan(mass).any():
                raise Broken("logprobs gave NaN")
            self.progress.update(len(rows))
            yield logp, mass

def masses(logprobs):
    """(T, V) float32 -> (T,) float64 sums of probabilities."""
    step = max(1, BLOCK // logprobs.shape[1])
    with np.errstate(over="ignore"):
        return np.concatenate([np.exp(logprobs[at:at + step], dtype=np.float64).sum(1)
                               for at in range(0, len(logprobs), step)])

def totals(split, logp):
    """(loss, bits per byte) of the split's targets; nats per token."""
    text = split.bytes > 0
    bits = -logp[text].sum() / math.log(2)
    return -logp[split.scored].mean(), bits / max(1, split.bytes.sum(dtype=np.int64))

def draw_cuts(rng, n, T, count):
    """
    Rounds of probes, each (rows, cuts): in a round a sequence occurs at most once, at a cut that is later
    than in the rounds before, so that what follows a cut has never been shown. `count` pairs in all, spread
    evenly over the sequences, and at random within them.
    """
    visits = -(-count // n)
    cuts = np.stack([rng.choice(T - 1, visits, replace=False) for _ in range(n)])  # nothing follows the last
    cuts[rng.choice(n, visits * n - count, replace=False), -1] = T
    for column in np.sort(cuts, 1).T:
        rows = rng.permutation(np.flatnonzero(column < T))
        yield rows, column[rows]

def worst_leak(judge, predictor, split, logp, rounds, rng):
    """Largest change of a target's log-probability when the tokens after a cut are replaced; the cuts."""
    worst, pairs = 0.0, 0
    for rows, cuts in rounds:
        tokens = split.tokens[rows]
        kept = np.arange(tokens.shape[1]) <= cuts[:, None]
        other = (tokens + rng.integers(1, judge.vocab_size, tokens.shape)) % judge.vocab_size
        moved = np.abs(judge(predictor, np.where(kept, tokens, other), split.targets[rows]) - logp[rows])
        worst, pairs = max(worst, moved[kept].max()), pairs + len(rows)
    return worst, pairs

def worst_grouping(judge, predictor, split, logp, rows):
    """Largest change of a sequence's mean loss when it is alone, or among others in another order; nats."""
    worst = 0.0
    for some, batch in (rows, 1), (rows[::-1], judge.batch + 1):
        again = judge(predictor, split.tokens[some], split.targets[some], batch)
        worst = max(worst, np.abs((again - logp[some]).mean(1)).max())
    return worst

def read_documents(run, name):
    """What the run states for each document: sums of loss, and tokens."""
    path = run.folder / "doc_losses.npz"
    need(path.is_file(), f"{path} is missing; give the folder of a finished run")
    try:
        with np.load(path) as arrays:
            return arrays[f"{name}_loss"].astype(np.float64), arrays[f"{name}_tokens"].astype(np.int64)
    except (ValueError, KeyError, EOFError, OSError, TypeError, zipfile.BadZipFile) as error:
        raise Refused(f"{path} is damaged ({type(error).__name__}); the run's own is needed") from None

def measure(run, dataset, split, judge, new_predictor, seed):
    """The checks of a split, as (whether it is good, the line that says so)."""
    name, rng = split.name, np.random.default_rng(seed)
    its_loss, its_bpb = (float(stated(run.facts, f"{name}_{key}")) for key in ("loss", "bpb"))
    need(stated(run.facts, "data", name, form=str) == dataset.digests[name],
         f"the run was scored on other tokens than {dataset.folder} holds; give its dataset by --data")
    its_sums, its_tokens = read_documents(run, name)
    n, T = split.targets.shape
    few = min(REGROUPED, -(-n // 4))
    count = min(PROBES, max(1, COST * (n - few)))
    judge.progress.reset(n + count + 2 * few)
    logp, mass, order = np.empty((n, T)), np.empty((n, T)), rng.permutation(n)
    with new_predictor() as predictor:
        logp[order], mass[order] = judge.weighed(predictor, split.tokens[order], split.targets[order])
    with new_predictor() as predictor:  # it has no memory of the tokens that it must not know
        leak, pairs = worst_leak(judge, predictor, split, logp, draw_cuts(rng, n, T, count), rng)
        grouping = worst_grouping(judge, predictor, split, logp, rng.choice(n, few, replace=False))
    loss, bpb = totals(split, logp)
    sums = np.bincount(split.documents.ravel(), -logp.ravel(), split.count)
    tokens = np.bincount(split.documents.ravel(), minlength=split.count)
    same_tokens = np.array_equal(its_tokens, tokens) and its_sums.shape == sums.shape
    apart = np.abs(its_sums - sums).sum() / tokens.sum() if same_tokens else math.inf
    off, share = np.abs(mass - 1).max(), 1 / (1 - (1 - SURE) ** (1 / pairs))
    return [
        (abs(loss - its_loss) <= LOSS, f"loss: {name} {loss:.6f}, the run states {its_loss:.6f} (± {LOSS})"),
        (abs(bpb - its_bpb) <= LOSS, f"bits per byte: {bpb:.6f}, the run states {its_bpb:.6f} (± {LOSS})"),
        (same_tokens, f"documents: {tokens.sum():,} targets in {split.count:,} documents"),
        (apart <= DOCUMENTS, f"documents: their sums are {apart:.2g} nats a token apart ({DOCUMENTS})"),
        (off <= MASS, f"mass: off by at most {off:.2g} ({MASS}) at {mass.size:,} positions, all of them; "
                      f"worth at most {off:.2g} nats"),
        (leak <= LEAK,
         f"causality: later tokens move a target by at most {leak:.2g} nats ({LEAK}) at {pairs:,} positions; "
         f"a leak at 1 position in {share:.0f} or more would have been seen with {SURE:.1%}"),
        (grouping <= GROUPING,
         f"independence: grouping and order move a sequence by at most {grouping:.2g} nats ({GROUPING})"),
    ]

def evaluate(run, dataset, splits, judge, new_predictor, mix):
    """Prints a run's score on each split, and each member's; -> checks, of those that fail."""
    broken = []
    with new_predictor() as predictor:
        members = predictor.members if len(predictor.members) > 1 else []
        for split in splits:
            judge.progress.reset(len(split.tokens) * (1 + len(members)))
            logp, mass = judge.weighed(predictor, split.tokens, split.targets, mix)
            for member, (name, weight) in enumerate(members):
                alone, _ = totals(split, judge(predictor, split.tokens, split.targets, member=member))
                tqdm.write(f"  {alone:.6f}  {split.name} loss of {name}, weight {weight:.3f}")
            loss, bpb = totals(split, logp)
            said = run.facts.get(f"{split.name}_loss") if split.name in dataset.digests else None
            also = f"; result.json states {said:.6f}" if isinstance(said, float) else ""
            tqdm.write(f"{split.name}: loss {loss:.6f}, {bpb:.6f} bits per byte, "
                       f"perplexity {math.exp(loss):.2f}, {split.scored.sum():,} targets{also}")
            if (off := np.abs(mass - 1).max()) > MASS:
                broken.append((False, f"mass: {split.name}'s probabilities don't sum to 1, off by {off:.2g}"))
    return broken


# ---- The command line --------------------------------------------------------------------------------------

def check_device(name):
    if name != "cpu":
        import torch

        try:
            kind = torch.device(name)
            usable = torch.get_device_module(kind)
        except RuntimeError:
            raise Refused(f"--device {name}: there is no such device; give cpu, cuda or cuda:N") from None
        need(usable.is_available() and (kind.index or 0) < usable.device_count(),
             f"--device {name}: this machine, or its torch, has none; give --device cpu")

def positive(form):
    def parse(text):
        value = form(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value
    parse.__name__ = "positive number"
    return parse

def parse_args(argv):
    scoring = argv[:1] == ["eval"]
    name = "./run.sh eval" if scoring else "./run.sh ruler"
    parser = argparse.ArgumentParser(prog=name, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: (_ for _ in ()).throw(Refused(f"{message}; see {parser.prog} --help"))
    argument = parser.add_argument
    argument("run", metavar="RUN", help="run folder, or its name in runs/")
    if scoring:
        argument("--split", metavar="NAME", help="val, audit, fresh-…, a token file or a .txt (val, audit)")
        argument("--mix", choices=MIXES[1:], help="how members are mixed (as the run is configured)")
    else:
        argument("--split", default="val", choices=("val", "audit"), help="which split to score (val)")
        argument("--seed", type=int, help="of the positions that are probed (a new one each time, printed)")
    argument("--data", type=Path, metavar="DIR", help="dataset folder (the one in data/ of the run's track)")
    argument("--device", default="cpu", help="where to predict (cpu)")
    argument("--device-batch", type=positive(int), metavar="B", help="sequences at once (what gives 64 MB)")
    argument("--patience", type=positive(float), default=600, metavar="SECONDS",
             help="that loading, and each answer, may take (600)")
    argument("--memory", type=positive(float), metavar="GB",
             help="that the predictor may take (three quarters of the machine's)")
    argument("--unconfined", action="store_true", help="let the run's code see and do what you may")
    args = parser.parse_args(argv[1:] if scoring else argv)
    args.scoring = scoring
    return args

def look(args):
    """Carries a command out; -> the rules that were broken, as lines."""
    check_device(args.device)
    run = read_run(args.run, finished=not args.scoring)
    dataset = open_dataset(args.data or ROOT / "data" / run.dataset)
    names = [args.split] if args.split else ["val", "audit"]
    splits = [read_split(dataset, name, run.seq_len) for name in names]
    way = None if args.unconfined else confinement(run.folder, dataset.folder)
    need(way or args.unconfined, "unconfined: neither bwrap nor unshare works here, so the run's code could "
                                 "read data/ and do as you may; --unconfined lets it")
    print(f"confined by {way}: the run's code sees neither data/ nor other runs nor a network" if way else
          "UNCONFINED: the run's code can read data/ and do as you may: no proof of a stranger's run")
    sources = ", ".join(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}…"
                        for path in map(run.folder.joinpath, SOURCES) if path.is_file())
    print(f"executing the code of the run, {run.folder}: {sources}")
    shown = ", ".join(f"{split.name} ({len(split.tokens):,} sequences of {run.seq_len})" for split in splits)
    print(f"tokens of {dataset.name}, {dataset.origin}: {shown}")
    if args.data and dataset.name != run.dataset:
        print(f"note: the run's track is scored on {run.dataset}, not on {dataset.name}")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = int(args.memory * 1e9 if args.memory else 0.75 * machine)
    batch = args.device_batch or max(1, ANSWER_BYTES // (4 * run.seq_len * dataset.vocab_size))
    batch = min(batch, max(len(split.tokens) for split in splits))
    new_predictor = lambda: Predictor(run.folder, dataset.folder, args.device, way, args.patience, memory)
    if not args.scoring:
        seed = secrets.randbits(32) if args.seed is None else args.seed
        print(f"probing positions drawn with --seed {seed}", flush=True)
    with tqdm(desc="scoring", unit="seq", disable=None, leave=False) as progress:
        judge = Judge(dataset.vocab_size, batch, progress)
        try:
            if args.scoring:
                checks = evaluate(run, dataset, splits, judge, new_predictor, args.mix)
            else:
                checks = measure(run, dataset, splits[0], judge, new_predictor, seed)
        except Broken as problem:
            checks = [(False, f"predictor: {problem}")]
    for good, line in checks:
        print(f"{'ok  ' if good else 'FAIL'}  {line}")
    return [line for good, line in checks if not good]

def main(argv):
    """Runs a command line; -> its exit code."""
    try:
        return 1 if look(parse_args(argv)) else 0
    except (Refused, shards.DataError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
