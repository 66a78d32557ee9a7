"""
The harness: what no submission may change. It verifies the tokens, keeps the score, the clock and the caps,
and holds the run that train_gpt.py, the contestant, trains in. Command line, log and states: logbook.py.

A record is refused whose harness is not one of the merged versions: a change of these two files is a change
of the rules, in a pull request of its own. A run writes runs/<name>/:

    train_gpt.py and these     the sources that ran           log.txt          sources, settings, console
    metrics.jsonl              every step and evaluation      checkpoints/     the members of the predictor
    result.json                the score and what it took     doc_losses.npz   loss per document
    loss.svg                   training and validation loss   state/           what --resume goes on from

Shapes: B sequences of T tokens. Losses are nats.
"""
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import deque
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import logbook
from logbook import ROOT, digest, fail, on_main, rules, sha256, write_atomic, write_json

SOURCE = Path(__file__).read_bytes()  # read first: the log holds what ran, whatever is edited meanwhile


# ---- Data and score ----------------------------------------------------------------------------------------

class Dataset:
    """A folder of tokens: memory-mapped, verified against its manifest. `splits` holds uint16 arrays."""

    def __init__(self, folder, command):
        self.folder, self.remedy = Path(folder), f"make the dataset with: {command}"
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
            self.name, self.vocab_size = manifest["name"], manifest["vocab_size"]
            self.bos_id = manifest["bos_id"]
            self.digests = {split: manifest["splits"][split]["sha256"] for split in ("train", "val", "audit")}
            token_bytes = np.fromfile(self.folder / "token_bytes.bin", dtype=np.uint8)
            if digest(token_bytes) != manifest["token_bytes_sha256"]:
                raise ValueError("token_bytes.bin does not have its digest")
        except FileNotFoundError as error:
            fail(f"there is no dataset in {folder} (no {Path(error.filename).name}); {self.remedy}")
        except NotADirectoryError:
            fail(f"--data {folder} is a file; name the dataset's folder")
        except (ValueError, KeyError, TypeError) as error:
            fail(f"{folder}: manifest.json or token_bytes.bin is damaged ({error}); {self.remedy}")
        self.token_bytes = token_bytes.astype(np.int64)
        self.splits = {split: self.open(self.folder / f"{split}.bin", sha256)
                       for split, sha256 in self.digests.items()}

    def open(self, path, sha256):
        """The llm.c format: 256 int32 of header (magic, version, tokens), then uint16 tokens."""
        if not path.exists():
            fail(f"{path} is missing; {self.remedy}")
        header, held = np.fromfile(path, dtype="<i4", count=256), path.stat().st_size // 2 - 512
        if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
            fail(f"{path} is not a token file (wrong magic or version); {self.remedy}")
        if held != header[2] or path.stat().st_size % 2:
            fail(f"{path} is truncated: its header says {header[2]} tokens, it holds {held}; {self.remedy}")
        if not held:
            fail(f"{path} holds no tokens; {self.remedy}")
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
        if digest(tokens) != sha256:
            fail(f"{path} does not have the digest of its manifest; {self.remedy}")
        if tokens.max() >= self.vocab_size:
            fail(f"{path} holds token {tokens.max()}, beyond its vocabulary; {self.remedy}")
        if tokens[0] != self.bos_id:
            fail(f"{path} does not start with a document; {self.remedy}")
        return tokens

    def set_aside(self, tokens):
        """Moves whole documents, so many tokens or a little more, from the front of train into `fitness`."""
        starts, train = self.documents("train"), self.splits["train"]
        border = starts[np.searchsorted(starts, tokens)] if tokens < starts[-1] else starts[-1]
        self.splits |= {"fitness": train[:border], "train": train[border:]}

    def shorten(self, tokens):
        """Keeps the first so many tokens of val and audit, for a quick look."""
        self.splits |= {split: self.splits[split][:tokens] for split in ("val", "audit")}

    def changed(self):
        """The splits that no longer have the digests with which the run began."""
        tokens = lambda split: np.memmap(self.folder / f"{split}.bin", dtype="<u2", mode="r", offset=1024)
        return [split for split, sha256 in self.digests.items() if digest(tokens(split)) != sha256]

    def sequences(self, split, T):
        """The split in file order, (sequences, T+1) uint16; the tail that fills no sequence is left out."""
        tokens = self.splits[split]
        return tokens[:len(tokens) // (T + 1) * (T + 1)].reshape(-1, T + 1)

    def documents(self, split):
        """The first position of every document, int64."""
        tokens, block = self.splits[split], 2 ** 22  # by blocks, for comparisons make a byte for each token
        return np.concatenate([np.flatnonzero(tokens[n:n + block] == self.bos_id) + n
                               for n in range(0, len(tokens), block)])

class Score(NamedTuple):
    loss: float             # nats per token
    bpb: float              # bits per byte, over the targets that have bytes
    documents: dict         # loss (float64), tokens, bytes (int64) of each of the split's documents

def log_likelihoods(target_logprobs, sequences, batch, team, device):
    """
    sequences (n, T+1) -> log-probabilities of all targets, (n, T) float64 on every rank of the team, by a
    function (B, T+1) -> (B, T). Each sequence is scored once, by one rank; the last batch is filled up with
    the first sequence, which is then dropped.
    """
    out = torch.zeros(len(sequences), sequences.shape[1] - 1, dtype=torch.float64, device=device)
    for start in range(team.rank * batch, len(sequences), team.size * batch):
        rows = np.arange(start, start + batch)
        chosen = sequences[np.where(rows < len(sequences), rows, 0)]
        scores = target_logprobs(torch.from_numpy(chosen.astype(np.int64)).to(device))
        out[start:start + batch] = scores[:len(sequences) - start]
    dist.all_reduce(out, group=team.group)
    return out.cpu().numpy()

def score(data, split, T, logp):
    """logp (n, T) of the split's targets -> its Score. A target counts for the document that it stands in."""
    targets = data.sequences(split, T)[:, 1:]
    nats, size = -logp.ravel(), data.token_bytes[targets.ravel()]
    is_start = data.splits[split] == data.bos_id
    owner = (np.cumsum(is_start) - 1)[:len(targets) * (T + 1)].reshape(-1, T + 1)[:, 1:].ravel()
    total = lambda weights: np.bincount(owner, weights=weights, minlength=is_start.sum())
    sums = {"loss": total(nats), "tokens": total(None), "bytes": total(size).astype(np.int64)}
    return Score(nats.mean(), nats[size > 0].sum() / (math.log(2) * size.sum()), sums)


# ---- Clock and caps ----------------------------------------------------------------------------------------

class Clock:
    """
    Training time: from start to stop all of it counts, but for what the harness does meanwhile (scoring,
    checkpoints, states). Segments say on how many ranks of which machine each part of it was spent.
    """

    def __init__(self, ranks, machine, segments):
        self.segments, self.since = [*segments, {"seconds": 0.0, "ranks": ranks, "machine": machine}], None

    def start(self):
        self.since = time.perf_counter()

    def stop(self):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.segments[-1]["seconds"], self.since = self.segments[-1]["seconds"] + self.running(), None

    def running(self):
        return 0.0 if self.since is None else time.perf_counter() - self.since

    def seconds(self, per_rank=False):
        """Of training; per rank: summed over the ranks, which is what a node's minutes are bought in."""
        return self.running() + sum(s["seconds"] * (s["ranks"] if per_rank else 1) for s in self.segments)

    @contextlib.contextmanager
    def paused(self):
        if stopped := self.since is not None:
            self.stop()
        yield
        if stopped:
            self.start()

EXCESS = 1.05  # of the FLOPs stated, that a run may execute

def violations(track, result, edited, changed, stopped_early):
    """Why a result can be no record: one sentence each."""
    row = rules(track)
    return [reason for reason, broken in {
        **{f"{field} {result[field]:.4g} is over the track's cap of {cap:.4g}": result[field] > cap
           for field, cap in row["cap"].items()},
        "stopped early by --max-steps": stopped_early,
        "scored on the first --val-tokens only": "val_tokens" in result["data"],
        f"trained on {result['data']['name']}, not on the track's {row['dataset']}":
            result["data"]["name"] != row["dataset"],
        "a source was edited while it ran": edited,
        f"tokens were edited while it ran: {', '.join(changed)}": changed,
        f"its products take {result['executed_flops']:.4g} FLOPs, over {EXCESS} of what it states":
            result["executed_flops"] > EXCESS * result["training_flops"],
    }.items() if broken]


# ---- The run -----------------------------------------------------------------------------------------------

class Report:
    """A step's loss, |gradient|^2 and flags, summed over the team; read a step later, when it is there."""

    def __init__(self, step, values, team, more):
        self.step, self.more, self.values, self.copied = step, more, torch.stack(values), None
        dist.all_reduce(self.values, group=team.group)
        if self.values.is_cuda:
            host = torch.empty_like(self.values, device="cpu", pin_memory=True)
            self.values, self.copied = host.copy_(self.values, non_blocking=True), torch.cuda.Event()
            self.copied.record()

    def read(self):
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()

installed = functools.cache(importlib.metadata.packages_distributions)  # looks through every package

def foreign_optimizer(c, parameters):
    """-> (an instance of the class that --optimizer names, the distribution that it was installed with)."""
    module, name = c.optimizer.split(":")
    try:
        arguments = json.loads(c.optimizer_args)
        if {"lr", "weight_decay"} & set(arguments):
            raise ValueError("lr and weight_decay are --lr-matrix and --weight-decay")
        package = installed().get(module.split(".")[0])
        if not package:  # a module that no distribution has installed could do anything while it is imported
            raise ValueError(f"no installed distribution has a module {module}")
        found = getattr(importlib.import_module(module), name)
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            raise TypeError(f"{name} is no subclass of torch.optim.Optimizer")
        return found(parameters, **arguments), f"{package[0]} {importlib.metadata.version(package[0])}"
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        fail(f"--optimizer {c.optimizer} --optimizer-args '{c.optimizer_args}': {error}")

def check_batch(c, args, ranks):
    """The batches divide over the ranks and their micro-steps; sets --device-batch where it was not given."""
    sizes = {tokens // c.seq_len for tokens in (c.batch_tokens, c.batch_tokens_ends) if tokens}
    for sequences in sizes:
        if sequences % ranks:
            fail(f"--batch-tokens {sequences * c.seq_len}: {ranks} ranks can't share {sequences} sequences")
    # A token's activations grow with the layers that are run and their width; so every track fits 80 GB.
    share, width = math.gcd(*sizes) // ranks, c.n_embd * len(c.layer_order(True))
    most = max(1, min(2 ** 14, 2 ** 30 // width) // c.seq_len)
    part, text = share, f"a rank's {share} sequences per step"
    if c.meta_norm:
        if share % c.meta_sequences:
            fewer = [n for n in range(1, ranks) if share * ranks % (n * c.meta_sequences) == 0]
            fail(f"--meta-sequences {c.meta_sequences} does not divide {text}: ranks take whole episodes"
                 f"{f', as {fewer[-1]} ranks could' if fewer else ''}")
        part, text = c.meta_sequences // 2, f"the {c.meta_sequences // 2} sequences of half an episode"
    if args.device_batch is None:
        args.device_batch = max(b for b in range(1, part + 1) if part % b == 0 and b <= most)
    if part % args.device_batch:
        fail(f"--device-batch {args.device_batch} does not divide {text}")

def compile_parts(parts, wanted, device, backend):
    """Compiles the functions (owner, name) of `parts`, where that can work; -> how it stands, for the log."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not wanted:
        return "not compiled"
    if device.type == "cpu" and not (headers.exists() and any(map(shutil.which, ("g++", "clang++", "c++")))):
        return "not compiled (no C++ compiler or no Python headers: slower)"
    for owner, name in parts:
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False, backend=backend))
    torch._dynamo.config.recompile_limit = 64  # one variant per kind of layer, for training and for scoring
    return "compiled"

# The part of a large product's speed that training reaches: in float32 as measured on a CPU, in bfloat16 as
# there and in the published records.
SHARE = {torch.bfloat16: 0.42, torch.float32: 0.55}

CPU = torch.device("cpu")

def matmul_peak(dtype, device=CPU):
    """FLOP/s of a large product, the best of half a second; one takes long in a foreign dtype."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, dtype=dtype, device=device)
    product = lambda: (a @ a)[0, 0].item()  # which waits for the device
    product()
    times = []
    while sum(times) < 0.5:
        began = time.perf_counter()
        product()
        times.append(time.perf_counter() - began)
    return 2 * size ** 3 / min(times)

class Products(TorchDispatchMode):
    """
    Counts the FLOPs of what torch's dispatcher executes: products of matrices, attention's kernels. Attention
    is stated by the keys that its windows show, and a CPU computes whole blocks of them. So of a batched
    product only the share counts that a mask of -inf leaves, or whose factors are not 0: weights that start
    at 0 would hide from it in a batched product, and a reader of the source has to see them.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, packet = function(*args, **kwargs or {}), function._overloadpacket
        if count := flop_registry.get(packet):
            share = lambda kept: kept.float().mean().item()
            shown = (share(args[0].isfinite()) if packet is torch.ops.aten.baddbmm else
                     min(share(factor != 0) for factor in args[:2]) if packet is torch.ops.aten.bmm else 1.0)
            self.flops += shown * count(*args, **kwargs or {}, out_val=out)
        return out

class Run:
    """
    What train_gpt.py trains in. It offers args, c (the Config), data, team, device and dtype; log(text) for
    console and log.txt; evaluate, file_member, save_state for what happens between steps, which the clock
    leaves out; progress, which a state remembers; and conclude, which scores the final predictor.
    """

    def __init__(self, stop, Config, TRACKS, source, argv=None):
        self.stop, self.args, self.started = stop, logbook.parse_args(Config, TRACKS, argv), time.monotonic()
        args = self.args
        self.sources = {"train_gpt.py": source, "harness.py": SOURCE, "logbook.py": logbook.SOURCE}
        self.device, name, self.dtype, reason = logbook.pick_device(args)
        self.world = world = logbook.join_ranks(self.device, args)
        self.team = logbook.make_team(args.ranks_per_member or world.size, timedelta(minutes=args.timeout))
        folder, before = on_main(world, logbook.find_run, args)
        fields = before["config"] | args.given if before else args.fields
        args.seed = (before["seed"] if before else 42) if args.seed is None else args.seed
        if before and not args.dtype:
            self.dtype, reason = getattr(torch, before["dtype"]), "as it was"
        if unknown := set(fields) - set(logbook.comments(Config)):
            fail(f"the run {folder.name} has fields that this source lacks: {', '.join(sorted(unknown))}")
        self.c = c = Config(**fields)
        if self.team.teams > c.members and not before:
            fail(f"--ranks-per-member {args.ranks_per_member}: {self.team.teams} teams for fewer --members")
        check_batch(c, args, self.team.size)
        stop.device_batch = args.device_batch
        if ":" in c.optimizer:
            _, version = foreign_optimizer(c, [torch.nn.Parameter(torch.zeros(2, 2))])  # or a mistake is seen
        self.data = data = Dataset(args.data or ROOT / "data" / c.dataset, f"./run.sh data {c.dataset}")
        if c.fitness_tokens:
            data.set_aside(c.fitness_tokens)
        look = before["data"].get("val_tokens") if before else args.val_tokens
        if look:
            data.shorten(look)
        if min(map(len, data.splits.values())) <= c.seq_len:
            fail(f"{data.folder} has a split that is shorter than a sequence; lower --seq-len {c.seq_len}")
        identity = json.loads(json.dumps({
            "track": args.track, "seed": args.seed, "config": dataclasses.asdict(c),
            "dtype": str(self.dtype)[6:], "teams": self.team.teams,
            "data": {"name": data.name, **data.digests, **({"val_tokens": look} if look else {})},
            "sources": {file: sha256(text) for file, text in self.sources.items()}}))
        self.folder, self.record = on_main(world, logbook.open_folder, args, folder, before, identity)
        self.machine = {"device": self.device.type, "name": name, "count": world.size,
                        "torch": torch.__version__}
        wandb = dict(project=args.wandb, name=self.folder.name, id=self.folder.name, resume="allow",
                     config=identity["config"])
        self.log = logbook.RunLog(self.folder, f"{args.track}, seed {args.seed}", self.sources,
                          wandb if args.wandb else None, self.team)
        self.log_environment(f"{name}, {str(self.dtype)[6:]} ({reason})")
        if ":" in c.optimizer:
            self.log(f"optimizer {c.optimizer} of {version}")
        logbook.LEADS_TEAM = self.team.rank == 0
        self.pulsed, self.executed = -math.inf, 0.0
        self.seen = [deque(maxlen=11) for _ in range(self.team.teams)]  # what pulse() saw of the other teams

    def log_environment(self, machine):
        args, c = self.args, self.c
        self.log(f"slowrun {args.track}, seed {args.seed}: {self.world.size} x {machine}, "
                 f"torch {torch.__version__}")
        self.log(f"python {platform.python_version()}, numpy {np.__version__}, {platform.platform()}, "
                 f"{torch.get_num_threads()} threads per rank\n"
                 f"command {Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}\n"
                 f"config {json.dumps(dataclasses.asdict(c))}", console=False)
        if shutil.which("nvidia-smi"):
            self.log(subprocess.run("nvidia-smi", capture_output=True, text=True).stdout, console=False)

    def announce(self, flops, plan):
        """Logs the contestant's plan, and above it how many minutes these FLOPs will roughly take here."""
        if flops > 1e12 * self.team.size and not self.args.resume:
            speed = SHARE[self.dtype] * matmul_peak(self.dtype, self.device) * self.team.size
            minutes = math.ceil(flops / speed / 60)
            hint = "; ./run.sh smoke shows a run in a few" * (self.device.type == "cpu" and minutes > 9)
            self.log(f"       about {minutes} min of training here, judged by matrix products{hint}")
        self.log(f"plan   {plan}, {flops:.3g} FLOPs")

    def warm_up(self, variants, throw_away, stated):
        """
        Calls throw_away(batch, *variant) for each variant of a step: for one sequence to count what torch
        executes, beside the FLOPs `stated` for the variant's first part; then to compile, if it is to be.
        """
        self.log(f"       preparing {len(variants)} variant(s) of a step")
        began = time.perf_counter()
        for variant in variants:
            with Products() as products, torch.compiler.set_stance("force_eager"):
                throw_away(1, *variant)
            self.executed = max(self.executed, products.flops / stated[variant[0]])
            if self.args.compile:
                throw_away(self.args.device_batch, *variant)
        self.log(f"       prepared in {time.perf_counter() - began:.0f} s; matrix products take "
                 f"{self.executed:.3f} of the FLOPs stated")

    def restore(self, optimizer):
        """Goes on from the newest state, if there is one: parameters, optimizer, progress, metrics, clock."""
        self.keeper = logbook.Keeper(self.log, optimizer, self.team)
        fresh = {"member": self.team.index, "step": 0, "updates": 0, "metrics_bytes": 0, "segments": [],
                 "wall_seconds": 0.0}
        self.progress = self.keeper.restore() or fresh
        self.progress["ranks"] = self.team.size
        self.wall_before = self.progress["wall_seconds"]
        self.clock = Clock(self.world.size, self.machine, self.progress["segments"])
        self.log.rewind(self.progress["metrics_bytes"])
        if self.progress["updates"]:
            minutes = self.clock.seconds() / 60
            self.log(f"resume at step {self.progress['step']}, after {minutes:.1f} minutes of training")

    def wall_seconds(self):
        return self.wall_before + time.monotonic() - self.started

    def progress_bar(self, **what):
        """For the first rank's terminal."""
        shown = self.log.main and self.team.index == 0 and sys.stdout.isatty()
        return tqdm(file=sys.stdout, dynamic_ncols=True, disable=not shown, **what)

    def likelihoods(self, split, target_logprobs):
        """log_likelihoods of the split by target_logprobs, (B, T+1) -> (B, T)."""
        def scorer(part):
            self.pulse()
            bar.update()
            return target_logprobs(part)

        sequences, batch = self.data.sequences(split, self.c.seq_len), self.args.device_batch
        calls = -(-len(sequences) // (batch * self.team.size))
        with self.clock.paused(), self.progress_bar(total=calls, desc=f"scoring {split}", leave=False) as bar:
            return log_likelihoods(scorer, sequences, batch, self.team, self.device)

    def evaluate(self, member, step, epoch, target_logprobs):
        """-> (the Score on val, the log-probabilities that it comes from)."""
        logp = self.likelihoods("val", target_logprobs)
        with self.clock.paused():
            result = score(self.data, "val", self.c.seq_len, logp)
            self.check_finite("val loss", result.loss, step)
            self.log.metric("eval", member=member, step=step, epoch=epoch, split="val", loss=result.loss,
                            bpb=result.bpb)
        return result, logp

    def look(self, member, step, epoch, target_logprobs):
        """An evaluation between two epochs, as --eval-every asks for it."""
        result, _ = self.evaluate(member, step, epoch, target_logprobs)
        self.log(f"look   {epoch:3d}/{self.c.epochs}  step {step:5d}  val {result.loss:.4f}")

    def check_finite(self, what, value, step):
        if not math.isfinite(value):
            kept = sorted(path.name for path in (self.folder / "checkpoints").glob("*.pt"))
            logbook.quit_run(3, f"the {what} is {value} at step {step}; the last good checkpoint is "
                        f"{kept[-1] if kept else 'none'} in runs/{self.folder.name}")

    def file_member(self, name, weights, scores, **record):
        """Writes a member of the predictor: its weights, its targets' log-probabilities, and a record."""
        if not self.log.main:
            return
        with self.clock.paused():
            path = self.folder / "checkpoints" / f"{name}.pt"
            record["sha256"] = write_atomic(path, lambda file: torch.save(weights, file))
            record["scores"] = write_atomic(path.with_suffix(".npz"), lambda file: np.savez(file, **scores))
            write_json(path.with_suffix(".json"), {"checkpoint": path.name, **record})

    def begin_steps(self, member, first, steps):
        """The clock runs from here to end_steps, but for what the harness does; a bar shows how far it is."""
        self.member, self.first, self.steps = member, first, steps
        self.bar = self.progress_bar(initial=first, total=steps, unit="step")
        self.seconds_before, self.said = self.clock.seconds(), time.monotonic()
        self.clock.start()

    def end_steps(self):
        self.clock.stop()
        self.bar.close()
        self.wait_for_state()

    def report(self, step, loss, squares, **more):
        """A step's Report, which also tells all ranks whether one of them should save or stop."""
        save_due = time.monotonic() > self.keeper.saved_at + 60 * self.args.save_every
        flags = loss.new_tensor((save_due, self.stop.name is not None))
        return Report(step, (loss, squares, *flags), self.team, more)

    def settle(self, report):
        """Reads and logs a step's report; -> (is a state due, has a signal come)."""
        loss, squares, save_due, stopping = report.read()
        step, seconds = report.step, self.clock.seconds()
        self.check_finite("training loss", loss, step)
        self.check_finite("gradient", squares, step)
        self.log.metric("step", member=self.member, step=step, loss=loss, grad_norm=squares ** 0.5,
                        **report.more, seconds=round(seconds, 3))
        ms = (seconds - self.seconds_before) / (step + 1 - self.first) * 1000
        due = self.bar.disable and time.monotonic() > self.said + 30  # no bar where there is no terminal
        self.log(f"step   {step + 1:5d}/{self.steps}  train {loss:.4f}  {seconds:.1f} s  {ms:.0f} ms/step",
                 console=due)
        self.said = time.monotonic() if due else self.said
        self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self.bar.update()
        if step == self.first + 9:
            minutes = ms * (self.steps - self.first) / 60000
            self.log(f"       about {minutes:.1f} minutes of training expected")
        return save_due, stopping

    def save_state(self):
        with self.clock.paused(), open(self.folder / f"metrics{self.log.suffix}.jsonl", "a") as file:
            os.fsync(file.fileno())
            self.keeper.save(self.progress | {"metrics_bytes": file.tell(), "segments": self.clock.segments,
                                              "wall_seconds": self.wall_seconds()})

    def wait_for_state(self):
        """Until the newest state is on the disk; if that takes long, a line counts the seconds."""
        with self.progress_bar(desc="saving the state", bar_format="{desc}: {elapsed}", delay=0.3,
                               leave=False) as bar:
            while not self.keeper.done(within=0.1):
                bar.update()
        self.keeper.wait()

    def leave(self):
        """Ends the run because a signal has come."""
        self.wait_for_state()
        dist.barrier(group=self.team.group)
        step = self.progress["step"] - 1
        logbook.quit_run(75, f"stopped by a signal after step {step}; to go on: "
                             f"./run.sh {self.args.track} --resume {self.folder.name}")

    def pulse(self):
        """
        Shows the other teams, with which it shares no collective, that this one goes on: by the time of its
        metrics. Ends the run, as a collective would, when an unfinished team has shown nothing for --timeout.
        Called for every micro-batch, so that a team that is merely slow is not taken for one that hangs.
        """
        if not self.log.main or time.monotonic() < self.pulsed + 60 * self.args.timeout / 10:
            return
        self.pulsed = time.monotonic()
        for index, seen in enumerate(self.seen):
            path = self.folder / f"metrics{f'_{index}' * (index > 0)}.jsonl"
            last = range(index, self.c.members, len(self.seen))[-1]
            if index == self.team.index:
                path.touch()
            elif not self.is_filed(last):
                seen.append(path.exists() and path.stat().st_mtime_ns)
                if seen.count(seen[-1]) == seen.maxlen:
                    self.log(f"team {index} of {len(self.seen)} does not answer")
                    raise RuntimeError("Application timeout between teams")

    def is_filed(self, member):
        return (self.folder / "checkpoints" / f"member_{member:04d}.json").exists()

    def wait_for_teams(self, count):
        """Until there are the first `count` members. All ranks see a signal that came to one."""
        while True:
            self.pulse()
            missing = not all(map(self.is_filed, range(count)))
            flags = torch.tensor([missing, self.stop.name is not None], dtype=torch.float32)
            dist.all_reduce(flags, group=self.team.side)
            if flags[1]:
                self.leave()
            if not flags[0]:
                return
            time.sleep(0.1)

    def conclude(self, logp, members, facts, stopped_early):
        """
        Scores the final predictor by its log-probabilities {split: (n, T)}, writes what the run leaves and
        prints the final table. `members` have checkpoint, weight, val_loss; `facts` are the contestant's.
        """
        log = self.log
        scores = {split: score(self.data, split, self.c.seq_len, logp[split]) for split in logp}
        totals = {f"{split}_{name}": getattr(scores[split], name)
                  for split in scores for name in ("loss", "bpb")}
        rows = [json.loads(row) for path in self.folder.glob("metrics*.jsonl") for row in path.open()]
        r = {"track": self.args.track, "seed": self.args.seed, "config": self.record["config"], **totals,
             "members": [{"checkpoint": m.checkpoint, "weight": m.weight, "val_loss": m.val_loss}
                         for m in members], **facts, "steps": sum(row["kind"] == "step" for row in rows),
             "executed_flops": self.executed * facts["training_flops"],
             "train_seconds": self.clock.seconds(), "wall_seconds": self.wall_seconds(),
             "gpu_seconds": self.clock.seconds(per_rank=True), "segments": self.clock.segments,
             "machine": self.machine, "data": self.record["data"],
             "source_sha256": sha256(self.sources["train_gpt.py"]), "harness_sha256": sha256(SOURCE),
             "logbook_sha256": sha256(logbook.SOURCE),
             "val_evaluations": 1 + sum(row["kind"] in ("eval", "ensemble") for row in rows),
             "date": f"{datetime.now():%Y-%m-%d}"}
        edited, changed = self.record["edited"], self.data.changed()
        r["violations"] = violations(self.args.track, r, edited, changed, stopped_early)
        r["complete"] = True
        log.metric("final", step=self.progress["step"], **totals)
        log.plot(final=r["val_loss"])
        documents = {f"{split}_{name}": values for split in scores
                     for name, values in scores[split].documents.items()}
        write_atomic(self.folder / "doc_losses.npz", lambda file: np.savez_compressed(file, **documents))
        write_json(self.folder / "result.json", r)
        for state in self.folder.glob("state*"):
            shutil.rmtree(state)
        log("\n" + "\n".join(f"{name:<12} {text}" for name, text in [
            ("val loss", f"{r['val_loss']:.4f}   ({r['val_bpb']:.4f} bits per byte)"),
            ("audit loss", f"{r['audit_loss']:.4f}   ({r['audit_bpb']:.4f} bits per byte)"),
            *(("  member", f"{m.val_loss:.4f}   val loss of {m.checkpoint}, weight {m.weight:.3f}")
              for m in members),
            ("training", f"{r['train_seconds'] / 60:.1f} min of {r['wall_seconds'] / 60:.1f} min in all"),
            ("compute", f"{r['training_flops']:.4g} FLOPs, {r['tokens_seen']:,} tokens, "
                        f"{r['parameters']:,} parameters"),
            *(("no record", reason) for reason in r["violations"]),
            ("run", f"runs/{self.folder.name}/  (loss.svg, result.json, log.txt)"),
        ]))
        self.speak()

    def speak(self):
        """Two lines in the predictor's own words, where its tokens are words. They can't cost a run."""
        if self.data.vocab_size > 256:
            try:
                from sample import continuations, load
                self.log("\n" + "\n".join(continuations(*load(self.folder, self.device.type))))
            except Exception as error:
                self.log(f"no words of the predictor: {error}")
