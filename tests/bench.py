"""
How fast train_gpt.py is on this machine's CPU, part by part, and how close to what the machine can do.

    python tests/bench.py                      the table for the nano track: some minutes
    python tests/bench.py head attention       some of its parts
    python tests/bench.py --profile [score]    where the time of a training step, or of a part, goes

    attention W        forward and backward of a layer's attention with the window W
    head               logits, softcap and loss, forward and backward
    forward            the trunk without gradients, of a teacher or a model that is scored
    score              log-probabilities of the targets
    optimizer          a step of Muon and AdamW
    step S             a training step, data to optimizer, for each of its modes; S is the stage of windows
    save               a state to resume from, until it is on the disk

`plain` is the time, in units of ours, of the plainest correct version on the same numbers: train_gpt.py not
compiled, with masked scaled_dot_product_attention, torch's dropout, cross entropy of whole float32 logits,
Muon matrix by matrix, torch.save, and no frozen weights. Both must agree. GFLOP/s are of matrix products
as train_gpt.py counts them, also as a share of the 2048^3 product's of the same round and dtype, by default
that of a run here; MB is the peak growth of resident memory (Linux, glibc). Figures are medians of rounds
that time all parts in turn on an idle machine.
"""
import ctypes
import importlib.util
import itertools
import os
import re
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import namedtuple
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.benchmark import Timer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import harness
import logbook
import train_gpt

# What run.sh has set for a run; glibc reads them when a process begins.
HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}

class PlainKeeper(logbook.Keeper):
    """Saves a state by torch.save."""

    def save(self, progress):
        state = [progress, *((group.W, group.state) for group in self.optimizer.groups)]
        logbook.write_atomic(self.folder / "plain.pt", lambda file: torch.save(state, file))

def load_plain():
    """A copy of train_gpt.py, as a module of its own, whose fast parts are the textbook's."""
    spec = importlib.util.spec_from_file_location("train_gpt_plain", train_gpt.__file__)
    t = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up by its name
    spec.loader.exec_module(t)

    def attention(q, k, v, window, scale):
        mask = t.causal_mask(q.size(1), window, q.dtype, q.device)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)

    def logits(x, W, softcap):
        return softcap * torch.tanh(t.linear(x, W).float() / softcap)

    def head_loss(x, W, y, w, softcap, *lesson):
        z = logits(x, W, softcap)
        nats = torch.stack([F.cross_entropy(z, targets, reduction="none") for targets in y.unbind(1)], 1)
        return (w * nats).sum(), nats[:, 0].sum()

    def one_by_one(W, G, state, *settings, update=t.muon_update):
        for i in range(len(W)):
            update(W[i:i + 1], G[i:i + 1], {name: s[i:i + 1] for name, s in state.items()}, *settings)

    t.ATTENTION["cpu"], t.muon_update, t.HeadLoss = attention, one_by_one, SimpleNamespace(apply=head_loss)
    t.target_logprobs = lambda x, W, y, c: logits(x, W, c).log_softmax(-1).gather(-1, y[..., None])[..., 0]
    t.dropout = lambda x, p, key: x if key is None else F.dropout(x, p)
    t.frozen = lambda model: model
    return t


# ---- The parts ---------------------------------------------------------------------------------------------

# call() returns tensors on which both versions agree; `steps` says how many steps of a run are such a call.
Part = namedtuple("Part", "call tokens flops steps", defaults=(0, 0.0, 0))

def make_parts(t, Keeper, track, folder, dtype):
    """-> {name: Part} of train_gpt.py as the module t, and of a way to save states."""
    args = logbook.parse_args(t.Config, t.TRACKS, ["--track", track])
    c, cpu, team = t.Config(**args.fields).member(0, 1), torch.device("cpu"), logbook.make_team(1, None)
    harness.check_batch(c, args, 1)
    data = harness.Dataset(harness.ROOT / "data" / c.dataset, f"./run.sh data {c.dataset}")
    V, T, C, B = data.vocab_size, c.seq_len, c.n_embd, args.device_batch
    schedule = t.Schedule(c, len(data.splits["train"]) // (T + 1))
    modes = [schedule.mode(n) for n in range(schedule.steps)]
    model = t.make_model(c, V, cpu, dtype)
    t.initialise(model, c, 42)
    model.head.data.mul_(100)  # logits of about 1, as those of a trained model; the first ones are next to 0
    frozen = t.frozen(model)
    optimizer, counter = t.Optimizer(model, c, dtype, team), itertools.count(1)
    keeper = Keeper(SimpleNamespace(folder=folder, suffix=""), optimizer, team)
    stream = t.Stream(data.splits["train"], data.documents("train"), c, 42)
    supply = t.batches(stream, c, team, 0, cpu, dtype, B)
    sequences = next(supply)[0][0]
    fetch, update = record_function("data")(supply.__next__), record_function("optimizer")(optimizer.step)
    torch.manual_seed(42)
    draw = partial(torch.randn, dtype=dtype, requires_grad=True)
    *heads, upstream = (draw(B, T, c.n_head, c.head_dim) for _ in range(4))
    x, w = draw(B, T, C), torch.full((B, T, 1), 1 / (B * T))
    gradients = [torch.randn_like(group.grads) for group in optimizer.groups]

    def attention(window):
        out = t.ATTENTION["cpu"](*heads, window, c.head_dim ** -0.5)
        return out, *torch.autograd.grad(out, heads, upstream)

    def head():
        loss, _ = model.head_loss(x, sequences[:, 1:, None], w)
        return loss, *torch.autograd.grad(loss, (x, model.head))

    def optimizer_step():
        for group, gradient in zip(optimizer.groups, gradients):
            group.grads.copy_(gradient)
        optimizer.step(1.0, 1.0, 0.95, next(counter))
        return model.blocks[0].attn.q.detach(),

    def step(n):
        for sequences, noise in fetch():
            loss, _ = model.loss(sequences, modes[n], noise, c.batch_sequences, schedule.ahead(n))
            loss.backward()
        update(schedule.lr(n), schedule.weight_decay(n), schedule.momentum(n), n + 1)
        return loss.detach(),

    parts, mode, tokens = {}, modes[-1], B * T
    scoring = t.flops_per_token(c, V, mode, training=False)
    for window in sorted({c.window(layer, mode.stage) for layer in range(c.n_layer)}):
        keys = sum(min(i, window) + 1 for i in range(T)) / T
        parts[f"attention {window}"] = Part(partial(attention, window), tokens, 12 * C * keys * tokens)
    shapes = ((len(group.W), *sorted(group.W.shape[1:])) for group in optimizer.groups if group.W.dim() == 3)
    polar = len(t.POLAR_EXPRESS) * sum(2 * n * (2 * R * R * S + R ** 3) for n, R, S in shapes)
    trunk = (scoring - 2 * V * C) * tokens
    parts |= {
        "head": Part(head, tokens, 6 * V * C * tokens),
        "forward": Part(lambda: frozen.teach(sequences, mode)[:1], tokens, trunk),
        "score": Part(lambda: (frozen.target_logprobs(sequences, mode),), tokens, scoring * tokens),
        "optimizer": Part(optimizer_step, c.batch_tokens, polar),
    }
    for kind in dict.fromkeys(modes):
        name = f"step {kind.stage}" + " replay" * kind.replay + f" x{kind.passes}" * (kind.passes > 1)
        flops = c.batch_tokens * t.flops_per_token(c, V, kind)
        parts[name] = Part(partial(step, modes.index(kind)), c.batch_tokens, flops, modes.count(kind))
    return parts | {"save": Part(lambda: keeper.save({"updates": next(counter)}) or keeper.wait() or ())}


# ---- Measuring ---------------------------------------------------------------------------------------------

def peak_growth(call):
    """MB by which resident memory grows in a call, at most; what the heap had kept is given back before."""
    resident = lambda kind: int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten (man 5 proc)
    before = resident("VmRSS")
    call()
    return round((resident("VmHWM") - before) * 1024 / 1e6)

def measure(versions, rounds, dtype):
    """{name: (ours, plain)} -> {name: (their seconds, our share, their MB)}, the FLOP/s of the product."""
    memory, times, peaks = {}, {name: ([], []) for name in versions}, []
    for name, pair in tqdm(versions.items(), "warm-up", unit="part", leave=False):
        for a, b in zip(*(part.call() for part in pair), strict=True):
            error = (a.double() - b.double()).norm() / b.double().norm()
            assert error < 0.05, f"{name}: ours and plain differ by {error:.1%}, more than bfloat16 does"
        memory[name] = [peak_growth(part.call) for part in pair]
    for _ in tqdm(range(rounds), "measuring", unit="round", leave=False):
        peaks.append(harness.matmul_peak(dtype))
        for name, pair in versions.items():
            for part, samples in zip(pair, times[name]):
                timer = Timer("call()", globals=part._asdict(), num_threads=torch.get_num_threads())
                samples.append(timer.blocked_autorange(min_run_time=0.2).median)
    def figures(name):
        flops, seconds = versions[name][0].flops, times[name]
        share = median(flops / time / peak for time, peak in zip(seconds[0], peaks))
        return *map(median, seconds), share, *memory[name]

    return {name: figures(name) for name in versions}, median(peaks)

def print_table(versions, figures, peak):
    row = "{:<16}{:>10}{:>11}{:>10}{:>9}{:>9}{:>8}{:>10}".format
    print(row("part", "ms", "tokens/s", "GFLOP/s", "% peak", "plain", "MB", "plain MB"))
    steps, time, flops, possible = 0, 0.0, 0.0, 0.0
    for name, (part, _) in versions.items():
        ours, plain, share, *sizes = figures[name]
        rates = f"{part.tokens / ours:,.0f}", f"{part.flops / ours / 1e9:,.1f}", f"{share:.1%}"
        print(row(name, f"{1e3 * ours:,.2f}", *rates, f"{plain / ours:.2f}", *sizes))
        steps, time, flops = steps + part.steps, time + part.steps * ours, flops + part.steps * part.flops
        possible += part.steps * part.flops / share if part.steps else 0
    print(row("2048^3 product", f"{2e3 * 2048 ** 3 / peak:.2f}", "-", f"{peak / 1e9:,.1f}", "100.0%", *"---"))
    if steps:
        print(f"a run's {steps:,} steps: {time:,.0f} s, {flops:.4g} FLOPs, {flops / possible:.1%} of peak")

# An event's group is the first whose pattern is in its path, the names from the outermost event to its own.
GROUPS = {"data": "/data", "optimizer": "/optimizer", "attention": "/attention", "head": "HeadLoss|/head",
          "trunk matmuls": "mm$|linear$", "elementwise (compiled)": "Compiled", "other": ""}

def print_profile(name, call, steps=5):
    """Where the time of a part goes: the own times of the events that torch.profiler sees."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as seen, record_function("steps"):
        for _ in range(steps):
            call()
    paths, attention, spent = {None: ""}, set(), dict.fromkeys(GROUPS, 0.0)
    for event in seen.events():  # parents come before children, and forward before backward
        # A node of autograd has the number of the forward operation that it is the backward of.
        backward = event.name.startswith("autograd::engine") and event.sequence_nr in attention
        above = paths[event.cpu_parent and event.cpu_parent.id]
        path = paths[event.id] = f"{above}/{'attention' if backward else event.name}"
        if "/attention" in path and event.sequence_nr >= 0:
            attention.add(event.sequence_nr)
        if path.startswith("/steps"):
            group = next(group for group, pattern in GROUPS.items() if re.search(pattern, path))
            spent[group] += event.self_cpu_time_total
    total = sum(spent.values())
    print(f"{name}: {total / steps / 1e3:,.1f} ms")
    for group, time in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{group:<24}{time / total:>6.1%}{time / steps / 1e3:>10,.1f} ms")

def main():
    t = train_gpt
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: logbook.fail(f"{message}; see python tests/bench.py --help")
    add = parser.add_argument
    add("part", nargs="*", metavar="PART", help="first word of a part to measure (default: all)")
    add("--track", default="nano", help="whose preset is measured (default nano)")
    add("--rounds", type=int, default=5, help="how often all parts are timed (default 5)")
    add("--dtype", choices=("bfloat16", "float32"), help="of the products (default: as in a run here)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own choice)")
    add("--profile", action="store_true", help="profile the parts instead (default: the last step)")
    args = parser.parse_args()
    if min(args.rounds, args.threads) < 1:
        parser.error("--rounds and --threads are 1 or more")
    torch.set_num_threads(args.threads)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    compiled = t.setup_compile(True, torch.device("cpu"))
    dtype = logbook.pick_device(args)[2]
    with tempfile.TemporaryDirectory() as folder:
        parts = make_parts(t, logbook.Keeper, args.track, Path(folder), dtype)
        if unknown := set(args.part) - {name.split()[0] for name in parts}:
            parser.error(f"there is no part {', '.join(sorted(unknown))}")
        print(f"{args.track}, {str(dtype)[6:]}, {args.threads} threads, {compiled}, "
              f"torch {torch.__version__}")
        chosen = [name for name in parts if not args.part or name.split()[0] in args.part]
        if args.profile:
            t.ATTENTION["cpu"] = record_function("attention")(t.ATTENTION["cpu"])
            t.target_logprobs = record_function("head")(t.target_logprobs)
            for name in chosen if args.part else [name for name in chosen if parts[name].steps][-1:]:
                print_profile(name, parts[name].call)
            return
        plain = make_parts(load_plain(), PlainKeeper, args.track, Path(folder), dtype)
        versions = {name: (parts[name], plain[name]) for name in chosen}
        print_table(versions, *measure(versions, args.rounds, dtype))

if __name__ == "__main__":
    if not HEAP.keys() <= os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, HEAP | os.environ)
    main()
