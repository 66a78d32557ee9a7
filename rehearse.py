"""
A rehearsal on the machine that is to train: is it right here, does it fit, and will it hold its cap? Some
minutes that one spends before one rents hours.

    ./run.sh limited --rehearse                     with every GPU of this node
    ./run.sh limited --rehearse --device-batch 2
    ./run.sh nano --rehearse

It takes all flags of train_gpt.py, and trains at full size on tokens that mean nothing: two steps of each
variant that the run will have (replayed layers, windows, passes, with and without a teacher), a part of the
scoring, one saved state. First it compares what this device computes with float64, or with float32 on the
CPU; last, on a GPU, it times every kernel of attention that torch has for it. It leaves nothing behind. Exit
code 0: right, and the cap holds; 1: not, with the reason; 2: a mistake in the command.
"""
import dataclasses
import functools
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import plan
import train_gpt
from harness import check_batch, matmul_peak
from logbook import (
    Keeper,
    fail,
    join_ranks,
    launch,
    make_parser,
    make_team,
    on_main,
    parse_args,
    pick_device,
    rules,
)
from train_gpt import TRACKS, Config, Mode, Noise, draw_noise, flops_per_token

TIMED = 2  # steps of each variant, after one that compiles
LIMIT = {torch.bfloat16: 0.02, torch.float32: 1e-4}  # of a relative error; a wrong kernel is far beyond it
DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s of dense products in bfloat16


# ---- Is it right here? -------------------------------------------------------------------------------------

def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def error(found, expected):
    """The norm of the difference, relative to the norm of what is expected."""
    joined = lambda parts: torch.cat([part.detach().double().cpu().flatten() for part in parts])
    return ((joined(found) - joined(expected)).norm() / joined(expected).norm()).item()

def attention_error(attention, window, T, head_dim, device, dtype):
    """Of a kernel and its gradients, beside a masked softmax in float64, for at most 1,024 tokens."""
    T = min(T, 1024)
    window = min(window, T)
    q, k, v, upstream = (normal(1, T, 2, head_dim, seed=seed).to(dtype) for seed in range(4))
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    a, b, c = (t.transpose(1, 2) for t in exact)
    at = torch.arange(T)
    seen = (at[:, None] >= at) & (at[:, None] - at <= window)
    weights = (a @ b.mT / math.sqrt(head_dim)).masked_fill(~seen, -torch.inf).softmax(-1)
    expected = (weights @ c).transpose(1, 2)
    here = [t.to(device).requires_grad_() for t in (q, k, v)]
    found = attention(*here, window, 1 / math.sqrt(head_dim))
    gradients = (torch.autograd.grad(out, into, upstream.to(out)) for out, into in
                 ((found, here), (expected, exact)))
    return error((found, *next(gradients)), (expected, *next(gradients)))

def polar_error(device, dtype):
    """Of the polar factor that Muon steps along, beside the same polynomials in float64."""
    G = normal(3, 96, 160, seed=5)
    return error([train_gpt.orthogonalise(G.float().to(device), dtype)],
                 [train_gpt.orthogonalise(G, torch.float64)])

def model_errors(c, device, dtype):
    """Of loss and gradients of a small model of the track's kind, beside float32 on the CPU; and whether the
    device gives the same bits twice."""
    small = dataclasses.replace(
        c, n_layer=4, n_head=2, n_embd=128, seq_len=256, batch_tokens=512, batch_tokens_ends=0, meta_norm=0.0,
        replay="2-2" if c.replayed else "none", members=1, distill=0.0, top=0, restarts=False, xsa_layers=4,
        ngram=0, fitness_tokens=0)
    sequences = torch.from_numpy(made_up(2 * 257, 512)).view(2, 257)
    last = Mode(bool(small.replayed), small.passes, len(small.window_stages) - 1)
    results = []
    for place, kind in ((torch.device("cpu"), torch.float32), (device, dtype), (device, dtype)):
        model = train_gpt.make_model(small, 512, place, kind)
        train_gpt.initialise(model, small, 1)
        noise = Noise(*(part.to(place) for part in draw_noise(small, 0, range(2), kind)))
        loss, _ = model.loss(sequences.to(place), last, noise, 2)
        loss.backward()
        results.append([loss.view(1), *(p.grad for p in model.parameters())])
    expected, found, again = results
    same = all(map(torch.equal, found, again))
    return error(found[:1], expected[:1]), error(found[1:], expected[1:]), same

def sum_error(team, device):
    """Of a sum over the ranks."""
    part = torch.full((1000,), float(team.rank + 1), device=device)
    dist.all_reduce(part, group=team.group)
    return abs(part.mean().item() - team.size * (team.size + 1) / 2)

def windows_of(c):
    """All that some layer has in some stage, from the shortest."""
    stages, layers = range(len(c.window_stages)), range(c.n_layer + 1)
    return sorted({c.window(layer, stage) for stage in stages for layer in layers})

def check_numerics(c, team, device, dtype, say):
    """-> the names of what is off."""
    limit, attention = LIMIT[dtype], train_gpt.ATTENTION[device.type]
    rows = [(f"attention, window {window}",
             attention_error(attention, window, c.seq_len, c.head_dim, device, dtype), limit)
            for window in windows_of(c)]
    loss, gradient, same = model_errors(c, device, dtype)
    rows += [("polar factor", polar_error(device, dtype), 2 * limit), ("loss of a small model", loss, limit),
             ("its gradient", gradient, 5 * limit), ("sum over the ranks", sum_error(team, device), 1e-6)]
    for name, off, most in rows:
        say(f"{name:<24} {off:.1e} off, {most:.0e} allowed{'' if off <= most else '   WRONG'}")
    say(f"{'the same step twice':<24} {'the same bits' if same else 'not the same bits'}")
    return [name for name, off, most in rows if not off <= most]


# ---- Which attention? --------------------------------------------------------------------------------------

def flash(name):
    """The contestant's own attention, by one of the kernels that --attention chooses from."""
    restore_flash_attention_impl(_raise_warn=False)  # torch's own, FA2
    if name != "FA2":
        activate_flash_attention_impl(name)
    return train_gpt.ATTENTION["cuda"]

@functools.cache
def flex():
    """FlexAttention (Dong et al. 2024, arXiv 2412.05496), compiled, which leaves out what no window shows."""
    compiled = torch.compile(flex_attention, dynamic=False)

    @functools.cache
    def shown(T, window, device):
        see = lambda batch, head, query, key: (key <= query) & (query - key <= window)
        return create_block_mask(see, None, None, T, T, device=device)

    def attention(q, k, v, window, scale):
        mask = shown(q.size(1), window, q.device)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=mask, scale=scale).transpose(1, 2)

    return attention

def cudnn():
    """cuDNN's kernel, for whole contexts only."""
    def attention(q, k, v, window, scale):
        if window < q.size(1):
            raise ValueError("it knows no window")
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)

    return attention

# Makers of attention (q, k, v, window, scale), all (B, T, H, D), for a GPU. --attention chooses among the
# first three; for the others edit ATTENTION in train_gpt.py.
KERNELS = {name: functools.partial(flash, name) for name in ("FA2", "FA3", "FA4")}
KERNELS |= {"FlexAttention": flex, "cuDNN": cudnn}

def time_kernels(makers, windows, shape, device, dtype, say):
    """
    Says how long each kernel takes forward and backward for q, k and v of the shape (B, T, H, D); one that
    can't be had, or can't do it, says why. -> {window: the fastest of those that are right}.
    """
    B, T, H, D = shape
    here = [normal(*shape, seed=seed).to(device, dtype).requires_grad_() for seed in range(3)]
    upstream, took = normal(*shape, seed=3).to(device, dtype), {window: {} for window in windows}
    for name, maker in makers.items():
        for window in windows:
            try:
                attention = maker()
                off = attention_error(attention, window, T, D, device, dtype)
                work = lambda: torch.autograd.grad(attention(*here, window, D ** -0.5), here, upstream)
                work()
                best = min(seconds(device, work) for _ in range(10))
            except Exception as trouble:  # whatever a kernel that is not made for this GPU may do
                said = str(trouble).strip().splitlines() or [type(trouble).__name__]
                say(f"{name + f', window {window}':<24} {said[0][:75]}")
                continue
            right = off <= LIMIT[dtype]
            verdict = "" if right else "   WRONG"
            say(f"{name + f', window {window}':<24} {1000 * best:.2f} ms, {off:.1e} off{verdict}")
            if right:
                took[window][name] = best
    return {window: min(times, key=times.get) for window, times in took.items() if times}


# ---- Does it fit, does it hold? ----------------------------------------------------------------------------

def made_up(count, vocab_size):
    """Tokens that mean nothing, int64: of no text, so that no data need be there."""
    return torch.randint(1, vocab_size, (count,), generator=torch.Generator().manual_seed(0)).numpy()

def seconds(device, function):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began

def make_step(t, schedule, variant, tokens):
    """A function that takes one whole step of the variant, as train_member does."""
    (mode, ahead, taught), c, run = variant, schedule.c, t.run
    stream = train_gpt.Stream(tokens, np.array([0]), c, 0)
    supply = train_gpt.batches(stream, c, run.team, 0, run.device, run.dtype, run.args.device_batch)
    episodes = train_gpt.Episodes(c, t.optimizer, run.args.device_batch)

    def step():
        for n, (sequences, noise) in enumerate(batch := next(supply), 1):
            if n == len(batch):
                t.optimizer.expect()
            lesson = t.teacher.teach(sequences, mode) if taught else None
            t.model.loss(sequences, mode, noise, c.batch_sequences, (1.0,) * ahead, lesson)[0].backward()
            episodes.after(n, len(batch), c.meta_norm)
        t.optimizer.step(1e-3, 1.0, 0.95, 1, float(c.average_kind != "probs"))

    return step, supply

def say_collectives(t, step, took, say):
    """How fast a step's sums and gathers are by themselves, and how much of their time the step hides."""
    groups, device = t.optimizer.groups, t.run.device

    def alone():
        for group in groups:
            group.start_reduce()
        for group in groups:
            group.reduce.wait()
            group.gather().wait()

    alone()
    spent = statistics.median(seconds(device, alone) for _ in range(TIMED))
    size = sum(group.grads.nbytes + group.values.nbytes for group in groups)
    done = SimpleNamespace(wait=lambda: None)  # a collective that has nothing to do
    silent = {"start_reduce": lambda group: setattr(group, "reduce", done), "gather": lambda group: done}
    with mock.patch.multiple(train_gpt.Group, **silent):
        without = statistics.median(seconds(device, step) for _ in range(TIMED))
    hidden = min(1.0, max(0.0, 1 - (took - without) / spent))
    say(f"{'sums and gathers':<24} {spent * 1000:,.0f} ms by themselves, {size / spent / 1e9:.1f} GB/s; "
        f"the step hides {hidden:.0%} of that")

def largest_batch(sequences, batch, fixed, peak, most):
    """
    The largest device batch whose memory stays below `most`; it divides the sequences that a rank, or half an
    episode, has. Memory grows from `fixed` to `peak` bytes at `batch`, which is the answer where none fits.
    """
    each = (peak - fixed) / batch
    fits = [b for b in range(1, sequences + 1) if sequences % b == 0 and fixed + b * each <= most]
    return max(fits, default=batch)

def rehearse(args, c, run, say):
    """
    -> (seconds of training that the whole run will take, of scoring, peak memory in bytes), its FLOPs. Teams
    train side by side: the times are those of this rank's own team.
    """
    data = plan.DATASETS[c.dataset]
    vocab_size, count = data["vocab_size"], data["splits"]["train"]["tokens"]
    run.data = SimpleNamespace(vocab_size=vocab_size, splits={"train": made_up(count, vocab_size)})
    t = train_gpt.Training(run)
    counts, schedules, training = Counter(), {}, 0.0  # of steps of one kind; one that has such steps
    for s in (t.schedules[member] for member in t.own):
        for step in range(s.end):
            kind = (s.mode(step), len(s.ahead(step)), s.c.distill > 0), s.c.batch_tokens
            counts[kind] += 1
            schedules[kind] = s
    for (variant, batch_tokens), steps in sorted(counts.items()):
        s = schedules[variant, batch_tokens]
        step, supply = make_step(t, s, variant, run.data.splits["train"])
        first = seconds(run.device, step)
        took = statistics.median(seconds(run.device, step) for _ in range(TIMED))
        training += took * steps
        flops = flops_per_token(s.c, vocab_size, variant[0]) * batch_tokens / took / run.team.size
        sheet = "".join(f", {flops / peak:.0%} of the {peak / 1e12:.0f} TFLOP/s on its data sheet"
                        for card, peak in DATA_SHEET.items() if card in run.name)
        say(f"{steps:5d} steps of {took * 1000:,.0f} ms: {batch_tokens / took:,.0f} tokens/s, "
            f"{flops / run.peak:.0%} of the product's speed{sheet}, the first in {first:.0f} s\n"
            f"{'':24} {variant[0]}{' taught' * variant[2]}")
        if run.team.size > 1 and steps == max(counts.values()):
            say_collectives(t, step, took, say)
        supply.close()
    mode, model = max(mode for (mode, *_), _ in counts), train_gpt.frozen(t.model)
    part = torch.from_numpy(made_up(run.args.device_batch * (c.seq_len + 1), vocab_size))
    part = part.view(-1, c.seq_len + 1).to(run.device)
    score = lambda: model.target_logprobs(part, mode)
    score()
    batch = seconds(run.device, score)
    looks = data["splits"]["val"]["tokens"] / (c.seq_len + 1) / args.device_batch / run.team.size
    epochs = sum(t.schedules[member].c.epochs if c.members == 1 else 1 for member in t.own) + len(t.own)
    scoring = batch * looks * (2 * epochs + 1)
    folder = Path(on_main(run.team, tempfile.mkdtemp))
    keeper = Keeper(SimpleNamespace(folder=folder, suffix=""), t.optimizer, run.team)
    saving = seconds(run.device, lambda: (keeper.save({"updates": 0}), keeper.wait()))
    dist.barrier(group=run.team.group)
    shutil.rmtree(folder, ignore_errors=True)  # the ranks of a node share it
    say(f"{'scoring':<24} {batch * looks:,.1f} s for val, {scoring / 60:,.1f} min in all")
    say(f"{'a saved state':<24} {saving:.1f} s")
    memory = torch.cuda.max_memory_allocated() if run.device.type == "cuda" else plan.process_memory()
    return (training, scoring, memory), t.flops(range(c.members))


# ---- main --------------------------------------------------------------------------------------------------

def main(stop, argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(Config, TRACKS, argv)
    parser.description = __doc__
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="per hour of a GPU")
    args = parse_args(Config, TRACKS, argv, parser)
    c = Config(**args.fields)
    if c.dataset not in plan.DATASETS:
        fail(f"a rehearsal knows the datasets {', '.join(plan.DATASETS)}, not {c.dataset}")
    device, name, dtype, reason = pick_device(args)
    world = join_ranks(device, args)
    team = make_team(args.ranks_per_member or world.size, timedelta(minutes=args.timeout))
    check_batch(c, args, team.size)
    stop.device_batch, args.seed = args.device_batch, 42
    say = functools.partial(print, flush=True) if world.rank == 0 else lambda _: None
    say(f"{args.track}: {world.size} x {name}, {str(dtype)[6:]} ({reason}), torch {torch.__version__}, "
        f"device batch {args.device_batch}")
    wrong = check_numerics(c, team, device, dtype, say)
    if wrong:
        say(f"\nnot right here: {', '.join(wrong)}")
        dist.destroy_process_group()
        sys.exit(1)
    peak = matmul_peak(dtype, device)
    say(f"{'a large product':<24} {peak / 1e12:,.3g} TFLOP/s per rank")
    train_gpt.setup_compile(args.compile, device)
    run = SimpleNamespace(c=c, args=args, team=team, device=device, name=name, dtype=dtype, folder=Path(),
                          peak=peak)
    expected, flops = rehearse(args, c, run, say)
    field, cap = next(iter(rules(args.track)["cap"].items()), (None, math.inf))
    worst = torch.tensor(expected, dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    training, scoring, memory = worst.tolist()
    used = {"gpu_seconds": training * world.size, "training_flops": flops}.get(field, 0)
    if device.type == "cuda":
        most = torch.cuda.get_device_properties(device).total_memory
        fixed = torch.cuda.memory_allocated()
        share = c.meta_sequences // 2 if c.meta_norm else c.batch_sequences // team.size
        larger = largest_batch(share, args.device_batch, fixed, memory, 0.97 * most)
        say(f"{'memory':<24} {memory / 2 ** 30:.2f} of {most / 2 ** 30:.2f} GiB per rank; by proportion the "
            f"largest that fits is --device-batch {larger}")
    else:
        say(f"{'memory':<24} {memory / 2 ** 30:.1f} GiB of each process, Python and compiler included")
    say(f"{'the whole run':<24} {training / 60:,.1f} min of training, {scoring / 60:,.1f} min of scoring")
    if args.price:
        say(f"{'price':<24} ${(training + scoring) / 3600 * world.size * args.price:,.2f}")
    if field:
        said = f"{used / 60:,.0f} of {cap / 60:,.0f} minutes of a GPU" if field == "gpu_seconds" else (
            f"{used:.3g} of {cap:.3g} {field}")
        say(f"{'cap':<24} {said}: {'holds' if used <= cap else 'DOES NOT HOLD'}")
    if device.type == "cuda":  # at the end: a kernel that fails can take the device with it
        shape = args.device_batch, c.seq_len, c.n_head, c.head_dim
        fastest = time_kernels(KERNELS, windows_of(c), shape, device, dtype, say)
        say(f"{'the fastest':<24} {', '.join(f'{name} for {window}' for window, name in fastest.items())}")
    dist.destroy_process_group()
    sys.exit(used > cap)

if __name__ == "__main__":
    launch(main)
