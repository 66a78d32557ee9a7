"""
The logbook: what a run is asked to do, what it says, and the states from which it goes on. Like harness.py,
which imports it and does the judging, no submission may change it.

Exit codes: 0 done; 2 a mistake of the user, in one line; 3 a loss or gradient that is not finite; 4 a rank
that does not answer; 75 stopped by a signal, to be resumed.
"""
import argparse
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import textwrap
import time
from concurrent import futures
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

SOURCE = Path(__file__).read_bytes()  # read first: the log holds what ran, whatever is edited meanwhile
ROOT = Path(__file__).resolve().parent


# ---- How a run ends ----------------------------------------------------------------------------------------

LEADS_TEAM = False  # this rank is the first of its team, which may meet what no other rank meets

def quit_run(code, message):
    """
    Ends every rank with one line, no traceback, below a progress bar and not in it. All get here for the same
    reason; one of them speaks.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 or LEADS_TEAM:
        tqdm.write(f"{'error: ' if code != 75 else ''}{message}", file=sys.stderr)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)  # torchrun ends all ranks at the first exit, which must be that of the one who speaks
    raise SystemExit(code)

def fail(message):
    quit_run(2, message)

class StopSignal:
    """
    Set by the signals that schedulers and people send: the step is finished, the state saved, the run ends
    with code 75. A second Ctrl-C, more than a second after the first, quits at once.
    """

    def __init__(self):
        self.name, self.at, self.device_batch = None, 0.0, 1
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.name and number == signal.SIGINT and time.monotonic() > self.at + 1:
            os._exit(128 + number)
        if self.name is None and sys.stderr.isatty():
            print("\nstopping after this step; Ctrl-C again quits at once", file=sys.stderr, flush=True)
        self.name, self.at = self.name or signal.Signals(number).name, time.monotonic()

def launch(main):
    """Runs main(stop); what a machine does to a run ends in one line and an exit code."""
    stop = StopSignal()
    try:
        main(stop)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            smaller = [b for b in range(1, stop.device_batch) if stop.device_batch % b == 0]
            advice = f"--device-batch {smaller[-1]}" if smaller else "--checkpointing, or a smaller model"
            fail(f"out of memory with --device-batch {stop.device_batch}; try {advice}")
        if not re.search("gloo/transport|Application timeout", str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if stop.name:
            signal.raise_signal(signal.SIGTERM)
        time.sleep(10)  # torchrun ends all ranks when it has lost one; otherwise one of them does not answer
        os._exit(4)
    except OSError as error:
        advice = {errno.ENOSPC: "make room there", errno.EDQUOT: "make room there",
                  errno.EFBIG: "raise ulimit -f", errno.EMFILE: "raise ulimit -n",
                  errno.EROFS: "mount it for writing", errno.EACCES: "see to its permissions"}
        if error.errno not in advice:
            raise
        fail(f"cannot write {error.filename or 'the run folder'}: {error.strerror}; {advice[error.errno]}")


# ---- Files -------------------------------------------------------------------------------------------------

def digest(array):
    """The sha256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()

def sha256(text):
    return hashlib.sha256(text).hexdigest()

def check_digest(path, sha256):
    if not path.exists() or not path.stat().st_size or digest(np.memmap(path, mode="r")) != sha256:
        fail(f"{path} is missing or damaged: it does not have the digest it was saved with")

def write_atomic(path, write):
    """write(file) to a temporary name, which takes its place when all of it is on the disk; -> its digest."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        sha256 = digest(np.memmap(temporary, mode="r"))
        os.replace(temporary, path)
        return sha256
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save wraps a full disk's OSError into a RuntimeError.
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

def write_json(path, value):
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


# ---- Ranks -------------------------------------------------------------------------------------------------

class Team(NamedTuple):
    """Ranks that train a model together. Teams train members side by side, each its own chain of them."""
    index: int
    teams: int
    rank: int
    size: int
    group: object    # for the messages of training
    side: object     # for those of saving, which happens meanwhile

if not hasattr(dist, "all_gather_single"):  # their names before torch 2.13
    dist.all_gather_single = dist.all_gather_into_tensor
    dist.reduce_scatter_single = dist.reduce_scatter_tensor

def make_team(size, timeout):
    """This rank's team, where `size` ranks make one."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % size:
        fail(f"--ranks-per-member {size} does not divide {world} ranks")
    groups = [(dist.new_group(ranks, timeout), dist.new_group(ranks, timeout, backend="gloo"))
              for ranks in (range(first, first + size) for first in range(0, world, size))]
    return Team(rank // size, world // size, rank % size, size, *groups[rank // size])

def on_main(team, function, *arguments):
    """The team's first rank calls the function; every rank gets its result, or ends as the first does."""
    outcome = [None]
    if team.rank == 0:
        try:
            outcome = [function(*arguments)]
        except (SystemExit, OSError) as end:
            outcome = [end]
    dist.broadcast_object_list(outcome, group=team.group, group_src=0)
    if isinstance(outcome[0], (SystemExit, OSError)):
        raise outcome[0]
    return outcome[0]

def join_ranks(device, args):
    """The team of all ranks that torchrun has started, or of this process alone."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=(timeout := timedelta(minutes=args.timeout)), **alone)
    return make_team(dist.get_world_size(), timeout)


# ---- The command line --------------------------------------------------------------------------------------

def rules(track):
    """The track's row of records/tracks.json: its dataset, its cap, whether it has a board."""
    return json.loads((ROOT / "records" / "tracks.json").read_text())[track]

@functools.cache
def comments(Config):
    """{field: (group, permitted values, help)} from the comments of Config, where they stand once."""
    found, group = {}, ""
    module = Path(inspect.getfile(Config)).read_text()  # inspect.getsource would parse all of it, twice
    for line in re.search(rf"^class {Config.__name__}:.*?^(?=\S)", module, re.M | re.S)[0].splitlines():
        if title := re.fullmatch(r"    # (.*)", line):
            group = title[1]
        if field := re.match(r"    (\w+): \w+ = .*?# (?:(\[[^\]]*\]|\{[^}]*\}|\([^)]*\)) )?(.*)$", line):
            found[field[1]] = group, field[2] or "", field[3]
    return found

def check_field(config, field):
    """A Config's field has its type and is one of the values that its comment permits; rows become tuples."""
    flag, value = "--" + field.name.replace("_", "-"), getattr(config, field.name)
    _, allowed, _ = comments(type(config))[field.name]
    if field.type is tuple:
        width, sound = allowed.count(",") + 1, lambda x: type(x) in (int, float) and 0 <= x < 1e9
        listed = lambda x: isinstance(x, (list, tuple))
        rows = [tuple(row) if listed(row) else () for row in value] if listed(value) else [()]
        if not all(len(row) == width and all(map(sound, row)) for row in rows):
            fail(f"{flag} takes rows of {width} numbers, {allowed[1:-1]}, not {value}")
        if (epochs := [row[0] for row in rows]) != sorted(set(epochs)):
            fail(f"{flag} {value}: the epochs must ascend")
        object.__setattr__(config, field.name, tuple(rows))
    elif type(value) not in ((int, float) if field.type is float else (field.type,)):
        fail(f"{flag} takes a value of type {field.type.__name__}, not {value!r}")
    elif allowed.startswith("{") and value not in allowed[1:-1].split(", "):
        fail(f"{flag} {value}: choose one of {allowed[1:-1]}")
    elif allowed.startswith("["):
        low, high = map(float, allowed[1:-1].split(","))
        if not low <= value <= high:
            fail(f"{flag} {value} is out of range: {low:g} to {high:g}")

def numbers(text):
    """'1,0.5,1' -> (1, 0.5, 1): a row of a field that is a list of rows."""
    return tuple(json.loads(f"[{text}]"))

def make_parser(Config, TRACKS, argv=None):
    """The command line: what a run does, and every field of Config; its help is about the track."""
    switch = argparse.BooleanOptionalAction
    layout = lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120)
    parser = argparse.ArgumentParser("./run.sh", "./run.sh [TRACK] [FLAGS]", formatter_class=layout,
                                     allow_abbrev=False, argument_default=None)
    parser.error = lambda message: fail(f"{message}; see ./run.sh --help and ./run.sh nano --help")
    parser.add_argument("--track", default="nano", metavar="TRACK", help=argparse.SUPPRESS)
    track = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")] if argv else [])[0].track
    if track not in TRACKS:
        fail(f"there is no track {track}; the tracks are {', '.join(TRACKS)}")
    parser.description = (
        f"Trains on the track {track}: {rules(track)['rule']}. A field of the configuration shows the values "
        f"it may take, = the one it has on this track. The tracks: {', '.join(TRACKS)}.")
    parser.epilog = ("--plan says what it would take, and knows --ranks N, --mfu SHARE, --price DOLLARS too; "
                     "--rehearse tries it out on this machine, and knows --price DOLLARS too.")
    add = parser.add_argument_group("the run").add_argument
    add("--config", metavar="FILE", help="JSON of fields, a result.json or record.json; flags override it")
    add("--seed", type=int, help="of initialisation, data order and dropout (default 42)")
    add("--run-name", help="the folder under runs/ (default: track, date, time and seed)")
    add("--resume", nargs="?", const="newest", metavar="RUN", help="go on with a run (default: the newest)")
    add("--max-steps", type=int, metavar="N", help="stop each member early; the run is no record")
    add("--val-tokens", type=int, metavar="N", help="score the first N of val and audit only; no record")
    add("--eval-every", type=int, metavar="N", help="score val every N steps, not only after each epoch")
    add("--device-batch", type=int, metavar="B", help="sequences per rank and micro-step (fits 80 GB)")
    add("--checkpointing", action=switch, default=False, help="compute blocks twice, to save memory")
    add("--data", metavar="DIR", help="the dataset's folder (default: data/ and the name of the dataset)")
    add("--dtype", choices=("bfloat16", "float32"), help="of the products (default: bfloat16 if in hardware)")
    add("--attention", choices=("FA2", "FA3", "FA4"), help="a GPU's flash kernels (default: the newest)")
    add("--compile", action=switch, default=True, help="compile the blocks (default yes)")
    add("--ranks-per-member", type=int, metavar="N", help="ranks that train a member together (default all)")
    add("--save-every", type=float, default=5, metavar="MIN", help="minutes between states (default 5)")
    add("--timeout", type=float, default=10, metavar="MIN", help="that a rank waits for another (default 10)")
    add("--resume-anyway", action="store_true", help="with --resume: even if the sources were edited since")
    add("--wandb", nargs="?", const="slowrun", metavar="PROJECT", help="log to Weights & Biases, offline too")
    groups = {}
    for field in dataclasses.fields(Config):
        group, allowed, text = comments(Config)[field.name]
        if group not in groups:
            groups[group] = parser.add_argument_group(f"fields of the configuration: {group}")
        preset = TRACKS[track].get(field.name, field.default)
        if field.type is tuple:
            preset = " ".join(",".join(map(str, row)) for row in preset) or "none"
        kind = {bool: {"action": switch},
                tuple: {"type": numbers, "nargs": "*", "metavar": allowed[1:-1]}}.get(
                    field.type, {"type": field.type, "metavar": "X"})
        choice = allowed + " " if allowed[:1] in ("[", "{") else ""
        groups[group].add_argument("--" + field.name.replace("_", "-"), **kind, default=None,
                                   help=f"{text}  {choice}= {preset}".replace("%", "%%"))
    return parser

def parse_args(Config, TRACKS, argv=None, parser=None):
    """-> the command line; `given`: the fields that --config and flags set, `fields`: all of a new run."""
    argv = sys.argv[1:] if argv is None else argv
    args = (parser or make_parser(Config, TRACKS, argv)).parse_args(argv)
    for name, low in {"seed": 0, "device_batch": 1, "ranks_per_member": 1, "max_steps": 1, "val_tokens": 1,
                      "eval_every": 1, "save_every": 0, "timeout": 0}.items():
        if (value := getattr(args, name)) is not None and not low <= value < 2 ** 31:
            fail(f"--{name.replace('_', '-')} {value} is out of range: {low} or more, below 2^31")
    if args.run_name and not re.fullmatch(r"[\w.+=-]{1,100}", args.run_name):
        fail(f"--run-name {args.run_name[:100]}: at most 100 letters, digits and . _ + = -")
    if args.resume and args.run_name:
        fail(f"--resume goes on under the run's own name; leave out --run-name {args.run_name}")
    args.given, known = {}, comments(Config)
    if args.config:
        try:
            text = json.loads(Path(args.config).read_text())
            args.given |= text.get("config") or (text["runs"][0]["config"] if "runs" in text else text)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            fail(f"--config {args.config} is not a JSON object of fields: {error}")
        if unknown := set(args.given) - set(known):
            fail(f"--config {args.config} has unknown fields: {', '.join(sorted(unknown))}")
    args.given |= {name: getattr(args, name) for name in known if getattr(args, name) is not None}
    row = TRACKS[args.track]
    if epochs := args.epochs:  # some fields follow this flag, unless they are given too
        preset = Config(**row)
        row = row | {"cycles": min(preset.cycles, epochs), "average": min(preset.average, epochs),
                     "replay_from_epoch": (preset.replay_from_epoch - 1) * epochs // preset.epochs + 1}
    args.fields = row | args.given
    return args

def activate_flash(wanted=None):
    """The wanted flash kernels, or Hopper's and Blackwell's own where they are installed; -> what is used."""
    from torch.nn.attention import activate_flash_attention_impl
    for name, majors in {"FA3": (9,), "FA4": (9, 10)}.items():
        if torch.cuda.get_device_capability()[0] in majors and wanted in (None, name):
            try:
                activate_flash_attention_impl(name)
                return name
            except ImportError:
                pass  # torch's own serve every GPU since Ampere
    if wanted in ("FA3", "FA4"):
        fail(f"--attention {wanted}: not installed, or not for this GPU; .venv/bin/pip install "
             "-r requirements-gpu.txt brings FA4")
    return "FA2"

def pick_device(args):
    """-> (device, its name, dtype, why it). Without bfloat16 products in hardware, float32 is faster."""
    if torch.__version__ < "2.11":
        fail(f"torch {torch.__version__} is older than 2.11; install a newer one: pip install torch==2.13.0")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        name = f"{torch.cuda.get_device_name()} with {activate_flash(args.attention)}"
        fast = torch.cuda.get_device_capability()[0] >= 8
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        models = re.findall(r"model name\s*: (.*)", info) or [platform.processor() or platform.machine()]
        device, name = torch.device("cpu"), f"{models[0]}, {os.cpu_count()} cores"
        fast = bool({"amx_bf16", "avx512_bf16"} & set(info.split()))
    if args.dtype:
        slow = "" if fast or args.dtype == "float32" else "; no bfloat16 units, a hundred times slower"
        return device, name, getattr(torch, args.dtype), "--dtype" + slow
    return device, name, *((torch.bfloat16, "in hardware") if fast else (torch.float32, "no bfloat16 units"))


# ---- The log -----------------------------------------------------------------------------------------------

def folded(text):
    """The text in lines as long as the terminal's, where words have room."""
    fold = functools.partial(textwrap.fill, width=shutil.get_terminal_size().columns, break_long_words=False,
                             subsequent_indent=" " * 7, break_on_hyphens=False)
    return "\n".join(map(fold, text.split("\n")))

class RunLog:
    """
    The run folder's text: console and log.txt, metrics.jsonl, loss.svg. Every rank keeps the metrics, the
    first of its team writes them; further teams write files of their own, and nothing to the console.
    """

    def __init__(self, folder, title, sources, wandb_settings, team):
        self.folder, self.title, self.wandb, self.team = folder, title, None, team
        self.main, self.suffix = team.rank == 0, f"_{team.index}" * (team.index > 0)
        self.metrics, self.plotted = {"step": [], "eval": [], "ensemble": [], "final": []}, -math.inf
        if self.main and not team.index and not (folder / "log.txt").exists():
            head = b""
            for name, text in sources.items():
                write_atomic(folder / name, lambda file, text=text: file.write(text))
                head += f"source {name} {len(text)} bytes sha256 {sha256(text)}\n".encode() + text + b"\n"
            write_atomic(folder / "log.txt", lambda file: file.write(head))
        if self.main and wandb_settings:
            start = lambda: importlib.import_module("wandb").init(dir=folder, **wandb_settings)
            self.wandb = self.guard(start)

    def guard(self, call):
        """What wandb returns; whatever trouble it has turns it off, and does not cost a run."""
        try:
            return call()
        except Exception as error:
            self.wandb = None
            self(f"wandb is off: {error}")

    def __call__(self, text, console=True):
        if self.main:
            with open(self.folder / f"log{self.suffix}.txt", "a") as file:
                print(text, file=file)
            if console and not self.team.index:
                tqdm.write(folded(text) if sys.stdout.isatty() else text)

    def metric(self, kind, **values):
        values["at"] = len(self.metrics["step"])  # steps before it, of all members
        self.metrics[kind].append(values)
        if self.main:
            with open(self.folder / f"metrics{self.suffix}.jsonl", "a") as file:
                print(json.dumps({"kind": kind, **values}), file=file)
        if self.wandb is not None:
            named = {f"{kind}/{name}": value for name, value in values.items()}
            self.guard(lambda: self.wandb.log(named, step=values["at"]))

    def rewind(self, size):
        """Cuts metrics.jsonl to the `size` bytes that a state had seen of it, and reads them again."""
        path = self.folder / f"metrics{self.suffix}.jsonl"
        if self.main:
            with open(path, "a") as file:
                held = file.tell()
                file.truncate(size)
        on_main(self.team, lambda: held < size and fail(f"{path} has lost lines that the state had seen"))
        try:
            for line in path.read_text().splitlines():
                values = json.loads(line)
                self.metrics[values.pop("kind")].append(values)
        except (ValueError, LookupError):
            fail(f"{path} is damaged; the run cannot go on without what it says")

    def plot(self, final=None):
        """loss.svg, at most once a minute."""
        if not self.main or self.team.index or final is None and time.monotonic() < self.plotted + 60:
            return
        self.plotted = time.monotonic()
        from records.plots import curve  # matplotlib takes a second to import
        drawn = curve(self.metrics, self.title, final)
        write_atomic(self.folder / "loss.svg", lambda file: file.write(drawn))


# ---- States ------------------------------------------------------------------------------------------------

def read_progress(path):
    """The progress of a state; ValueError unless its files have the digests of its manifest."""
    manifest = json.loads((path / "manifest.json").read_text())
    if {file.name for file in path.iterdir()} != {*manifest, "manifest.json"}:
        raise ValueError("it has not the files of its manifest")
    for name, sha256 in manifest.items():
        if not (path / name).stat().st_size or digest(np.memmap(path / name, mode="r")) != sha256:
            raise ValueError(f"{name} does not have its digest")
    return json.loads((path / "progress.json").read_text())

def retried(read):
    """A disk that does not answer is asked three times, a second apart; a file that is not there, once."""
    for last in (False, False, True):
        try:
            return read()
        except OSError as error:
            if last or isinstance(error, FileNotFoundError):
                raise
            time.sleep(1)

class Keeper:
    """
    The states from which a team can go on: state/step_NNNNNNN/, the newest two. Each rank writes its part of
    a copy, in the background and under a temporary name; when all is on the disk, the first rank adds the
    progress and the digests and renames the folder.
    """

    def __init__(self, log, optimizer, team):
        # Not at the top: they take a second to import, and --help, plans and mistakes need not wait for it.
        from torch.distributed import checkpoint, tensor
        self.checkpoint, self.tensor = checkpoint, tensor
        self.folder, self.log = log.folder / f"state{log.suffix}", log
        self.optimizer, self.team, self.mesh = optimizer, team, DeviceMesh.from_group(team.side, "cpu")
        self.writer, self.writing, self.saved_at = futures.ThreadPoolExecutor(1), None, time.monotonic()
        on_main(team, self.clear)

    def clear(self):
        self.folder.mkdir(exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            shutil.rmtree(leftover)

    def shards(self):
        """A copy of the groups' tensors, unpadded, as this rank's part of distributed ones."""
        local = lambda group, part: part[:group.own].to("cpu", copy=True)
        whole = lambda group, part: self.tensor.DTensor.from_local(
            local(group, part), self.mesh, [self.tensor.Shard(0)], run_check=False,
            shape=(group.units, *part.shape[1:]), stride=part.stride())
        return {f"{i}": {name: whole(group, part) for name, part in group.tensors().items()}
                for i, group in enumerate(self.optimizer.groups)}

    def inner_states(self):
        """{group: the state of a foreign optimizer}, which the same number of ranks can load."""
        return {i: group.inner.state_dict() for i, group in enumerate(self.optimizer.groups) if group.inner}

    def save(self, progress):
        """Copies the state and begins to write it, with a dictionary for JSON, after the one before."""
        self.wait()
        inner = io.BytesIO()
        torch.save(self.inner_states(), inner)
        self.writing = self.writer.submit(self.write, self.shards(), inner.getvalue(), progress)
        self.saved_at = time.monotonic()

    def write(self, shards, inner, progress):
        """In the writer's thread. The save ends on the first rank when all ranks' parts are on the disk."""
        temporary = self.folder / f"step_{progress['updates']:07d}.tmp"
        temporary.mkdir(exist_ok=True)
        (temporary / f"inner_{self.team.rank}.pt").write_bytes(inner)
        self.checkpoint.save(shards, checkpoint_id=temporary, process_group=self.team.side)
        if self.team.rank == 0:
            write_json(temporary / "progress.json", progress)
            digests = {file.name: digest(np.memmap(file, mode="r")) for file in temporary.iterdir()}
            write_json(temporary / "manifest.json", digests)
            temporary.rename(temporary.with_suffix(""))
            for old in sorted(self.folder.glob("step_???????"))[:-2]:
                shutil.rmtree(old)

    def attempt(self, what, action):
        """Does it; what a disk has against it is one line, the same on all ranks."""
        try:
            action()
        except self.checkpoint.CheckpointException as error:
            fail(f"cannot {what} the state: {next(iter(error.failures.values()))[0]}")

    def done(self, within):
        """Whether no state is being written, or none is after these seconds."""
        return self.writing is None or bool(futures.wait([self.writing], within).done)

    def wait(self):
        """Until the state that is being written is on the disk; raises what went wrong."""
        if self.writing is not None:
            self.attempt("write", self.writing.result)

    def restore(self):
        """Loads the newest sound state in place; -> its progress, or None where there is no state."""
        path, progress = on_main(self.team, self.newest)
        if path:
            shards = self.shards()
            self.attempt("read", lambda: self.checkpoint.load(shards, checkpoint_id=path,
                                                              process_group=self.team.side))
            for i, group in enumerate(self.optimizer.groups):
                for name, part in group.tensors().items():
                    part[:group.own].copy_(shards[f"{i}"][name].to_local())
                group.gather().wait()
            if inner := self.inner_states():
                if progress["ranks"] != self.team.size:
                    fail(f"the state of this optimizer goes on only on its {progress['ranks']} ranks")
                saved = torch.load(path / f"inner_{self.team.rank}.pt", weights_only=True)
                for i in inner:
                    self.optimizer.groups[i].inner.load_state_dict(saved[i])
        return progress

    def newest(self):
        """The newest sound state and its progress. Those that are not sound are named, and kept as .bad."""
        for path in sorted(self.folder.glob("step_???????"), reverse=True):
            try:
                return path, retried(lambda path=path: read_progress(path))
            except (FileNotFoundError, ValueError, TypeError, AttributeError) as error:
                self.log(f"state  {path.name} is unsound: {error}; going back to the one before it")
                path.rename(path.with_suffix(".bad"))
            except OSError as error:
                fail(f"cannot read the state {path}: {error.strerror}; try again when the disk answers")
        if any(self.folder.glob("*.bad")):
            fail(f"no state in {self.folder} is sound (kept as .bad); start anew under another --run-name")
        return None, None


# ---- The folders of runs -----------------------------------------------------------------------------------

def run_folders(track):
    """[(folder, run.json)] of the track's runs, the newest last. What cannot be read is named and skipped."""
    runs = []
    for path in (ROOT / "runs").glob("*/run.json"):
        try:
            run = json.loads(path.read_text())
            runs += [(run["started"], path.parent, run)] if run["track"] == track and "launch" in run else []
        except (OSError, ValueError, LookupError, TypeError) as error:
            print(f"skipped {path}: {error!r}", file=sys.stderr)
    return [(folder, run) for _, folder, run in sorted(runs, key=lambda run: run[0])]

def has_state(folder):
    return any(path.suffix != ".tmp" for path in folder.glob("state*/step_*"))

def launch_name():
    """What the ranks that torchrun starts again have in common with those that it had started first."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} on {platform.node()} by {os.getppid()}"

def find_run(args):
    """
    -> the folder and run.json of the run that goes on: the one that these ranks had begun when one of them
    was lost and torchrun started all again, or else the one that --resume names. Of a new run (None, None).
    """
    runs, restarted = run_folders(args.track), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    done = lambda folder: (folder / "result.json").exists()
    if own := [run for run in runs if restarted and run[1]["launch"] == launch_name()]:
        return own[-1] if not done(own[-1][0]) else sys.exit()  # a rank was lost after the end
    if not args.resume:
        return None, None
    name, newest = Path(args.resume).name, args.resume == "newest"
    if not newest and done(ROOT / "runs" / name):
        fail(f"the run {name} is complete: see runs/{name}/result.json")
    named = [(folder, run) for folder, run in runs
             if not done(folder) and (has_state(folder) if newest else folder.name == name)]
    if not named:
        fail(f"{args.track} has no unfinished run to resume ({args.resume})")
    if not has_state(named[-1][0]):
        fail(f"the run {name} ended before its first state; start it again under its --run-name {name}")
    return named[-1]

def open_folder(args, folder, before, identity):
    """-> the run's folder, locked, and its run.json: of a new run, or of one that must be what it was."""
    fresh = args.run_name or f"{args.track}_{datetime.now():%Y%m%d-%H%M%S}_s{args.seed}"
    name = folder.name if folder else fresh
    folder = ROOT / "runs" / name
    names = {path.name for path in folder.glob("*")}
    ended_early = "run.json" in names and "result.json" not in names and not has_state(folder)
    if before is None and names - {"lock", "run.json.tmp"} and not ended_early:
        fail(f"the run runs/{name} exists already; choose another --run-name, or --resume {name}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)  # never closed: held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is training in runs/{name}; stop it first")
    if before is None:
        for path in folder.iterdir():  # left by a run that ended before its first state
            if path.name not in ("lock", "run.json"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = identity | {"started": time.time(), "edited": False}
    flat = lambda run: {key: run[key] for key in identity if key not in ("config", "sources")} | run["config"]
    was, now, edited = flat(before), flat(identity), before["sources"] != identity["sources"]
    changed = [f"{name} was {was.get(name)}, is {now[name]}" for name in now if was.get(name) != now[name]]
    if edited and not args.resume_anyway:
        changed.append("its sources were edited since (--resume-anyway accepts that)")
    if changed:
        fail(f"the run {name} cannot go on as another one: {'; '.join(changed)}")
    before |= {"launch": launch_name(), "edited": before["edited"] or edited}
    write_json(folder / "run.json", before)
    (folder / "checkpoints").mkdir(exist_ok=True)
    return folder, before
