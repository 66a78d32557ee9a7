"""
What a run would take, without training it: parameters, FLOPs, steps, memory, hours, money, disk, and whether
the track's cap holds. It is what one runs before renting a node, and needs neither a GPU nor the data.

    ./run.sh limited --plan                                      on 8 GPUs
    ./run.sh limited --plan --device-batch 2 --checkpointing     on smaller ones
    ./run.sh unlimited --plan --ranks 64 --mfu 0.4 --price 2.5
    python plan.py --track limited --config records/published/limited_07.json

It takes all flags of train_gpt.py, which say what the run is. Memory is the most that the tensors of a rank
hold at once in a training step; of a GPU what torch.cuda.max_memory_allocated says. To find it, the step of
train_gpt.py is run on fake tensors, which have shapes and no values. Its parts at that moment: weights,
gradients, the optimizer's state and the teacher, which stay; episode, the weights that one sets aside;
activations, all that the forward pass has made; temporaries, what backward pass and optimizer have. CUDA,
NCCL and the allocator's fragments come on top.
"""
import functools
import itertools
import json
import math
import operator
import resource
import sys
import textwrap
import warnings
import weakref
from collections import Counter
from unittest import mock

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import train_gpt
from harness import SHARE, check_batch, matmul_peak
from logbook import ROOT, Team, fail, make_parser, parse_args, pick_device, rules
from train_gpt import (
    ATTENTION,
    TRACKS,
    Config,
    Episodes,
    Mode,
    Noise,
    Optimizer,
    draw_noise,
    flops_per_token,
    frozen,
    make_model,
    member_schedule,
    setup_compile,
)

# What the datasets hold, for plans that are made before they are here.
DATASETS = json.loads((ROOT / "data/tokens.json").read_text())


# ---- Memory ------------------------------------------------------------------------------------------------

def nbytes(tree):
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))

class LiveBytes(TorchDispatchMode):
    """Counts live storages' bytes by the `phase` that made them; `peak` is that of the largest sum."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.peak, self.phase = set(), Counter(), Counter(), "start"

    @classmethod
    def ignore_compile_internals(cls):
        return True  # or torch.compile would not compile while somebody looks

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        return out

    def see(self, storage):
        if (key := storage._cdata) not in self.known:
            size = storage.nbytes()
            self.known.add(key)
            self.live[self.phase] += size
            weakref.finalize(storage, self.forget, key, self.phase, size)

    def forget(self, key, phase, size):
        self.known.remove(key)
        self.live[phase] -= size

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}
VIEWS = {aten.view.default, aten.permute.default, aten.transpose.int, aten.t.default, aten.expand.default,
         aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int, aten.unbind.int,
         aten.split.Tensor, operator.getitem}

class Compiled(fx.Interpreter):
    """A compiled region as inductor's kernels run it: products, what they read, and results have memory."""

    def __init__(self, graph, kernel):
        super().__init__(graph)
        self.on_cpu = kernel == "cpu"
        self.stored = {node for node in self.graph.nodes if self.is_stored(node)}
        ends = self.user_to_last_uses  # {node: those that are freed after it}
        reader = {node: last for last, nodes in ends.items() for node in nodes}
        for node in self.graph.nodes:
            if node in ends and node in reader and node not in self.stored:  # is computed when it is read
                ends[reader[node]] += ends.pop(node)

    def is_stored(self, node):
        readers = {user.target for user in node.users}
        # A row that is summed and then used again is read twice; the CPU's kernels don't compute it twice.
        twice = self.on_cpu and len(readers) > 1 and aten.sum.dim_IntList in readers
        return twice or node.target in PRODUCTS or any(
            user.op == "output" or user.target in PRODUCTS or user.target in VIEWS and self.is_stored(user)
            for user in node.users)

    def call_function(self, target, args, kwargs):
        """Views are taken of what there is."""
        return None if args[0] is None else super().call_function(target, args, kwargs)

    def run_node(self, node):
        """What is stored is made, but not computed. All else goes from register to register: None."""
        if node.op != "call_function" or node.target in VIEWS:
            return super().run_node(node)
        make = lambda value: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return tree_map(make, node.meta["val"]) if node in self.stored else None

def compiler(kernel):
    """A backend of torch.compile: inductor's choice of what is kept for the backward pass, but no code."""

    def compile_graph(graph, _):
        region = Compiled(graph, kernel)

        def call(inputs):
            results = region.boxed_run(inputs)
            region.env = {}  # frees what nobody has read
            return results

        call._boxed_call = True  # takes a list, and frees what is in it after its last use
        return call

    partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
    return aot_autograd(fw_compiler=compile_graph, partition_fn=partition, decompositions=select_decomp_table)

class NoNetwork:
    """In place of torch.distributed: it has every function, and each returns it again."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: self

def step_memory(c, args, vocab_size, dtype, kernel, team, variants):
    """{part: bytes} when a step holds most, for variants (*mode, targets ahead, is there a teacher)."""
    exceeds = lambda a, b: a != b and all(x >= y for x, y in zip(a, b))
    worst = [v for v in sorted(variants) if not any(exceeds(other, v) for other in variants)]
    live, fake, rows = LiveBytes(), FakeTensorMode(), train_gpt.chunk_rows
    setup_compile(args.compile, torch.device("meta"), compiler(kernel))
    model = make_model(c, vocab_size, "meta", dtype)
    model.checkpointing = args.checkpointing
    teacher = frozen(model) if c.distill else None
    noise = Noise(*map(fake.from_tensor, draw_noise(c, 0, range(args.device_batch), dtype)))
    with (
        mock.patch.dict(ATTENTION, cpu=ATTENTION[kernel]),
        mock.patch.multiple(train_gpt, dist=NoNetwork(),
                            chunk_rows=lambda vocab_size, _: rows(vocab_size, torch.device(kernel))),
        fake, live,
    ):
        for module in itertools.chain(model.modules(), teacher.modules() if teacher else ()):
            for name, p in module.named_parameters(recurse=False):
                fresh = torch.empty(p.shape, dtype=p.dtype)
                setattr(module, name, nn.Parameter(fresh, requires_grad=p.requires_grad))
        optimizer = Optimizer(model, c, dtype, team)
        episodes = Episodes(c, optimizer, args.device_batch)
        last = c.batch_sequences // team.size == c.meta_sequences
        optimizer.step(1.0, 1.0, 0.95, 1)  # foreign optimizers make their state in their first step
        for *mode, ahead, taught in worst:
            mode, live.phase = Mode(*mode), "episode"
            with torch.no_grad():
                episodes.try_step(1.0, last)  # what it sets aside is there while the second half is computed
            live.phase = "forward"
            sequences = torch.zeros(args.device_batch, c.seq_len + 1, dtype=torch.int64)
            lesson = teacher.teach(sequences, mode) if taught else None
            total, _ = model.loss(sequences, mode, noise, c.batch_sequences, (1.0,) * ahead, lesson)
            live.phase = "backward"
            total.backward()
            episodes.put_back(last=True)
            optimizer.step(1.0, 1.0, 0.95, 1, float(c.average_kind != "probs"))
        groups = optimizer.groups
    memory = {"weights": nbytes([group.values for group in groups]),
              "gradients": nbytes([group.grads for group in groups]),
              "optimizer": nbytes([(g.state, g.inner and g.inner.state_dict()) for g in groups]),
              "teacher": nbytes(list(teacher.parameters())) if teacher else 0,
              "episode": live.peak["episode"], "activations": live.peak["forward"]}
    return memory | {"temporaries": live.peak.total() - sum(memory.values())}


# ---- The plan ----------------------------------------------------------------------------------------------

def process_memory():
    """Bytes that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(Config, TRACKS, argv)
    parser.description = __doc__
    add = parser.add_argument_group("the machine").add_argument
    add("--ranks", type=int, metavar="N", help="GPUs, or processes of a CPU (default 8 GPUs, 1 process)")
    add("--mfu", type=float, help="share of the peak that training reaches (default 0.42, in float32 0.55)")
    add("--price", type=float, help="dollars per hour of a GPU (default 3), or of a CPU's process")
    args = parse_args(Config, TRACKS, argv, parser)
    c = Config(**args.fields)
    data = DATASETS.get(c.dataset) or fail(f"a plan knows {', '.join(DATASETS)}")
    vocab_size, kernel = data["vocab_size"], "cpu" if c.dataset == "nano" else "cuda"
    ranks = (1 if kernel == "cpu" else 8) if args.ranks is None else args.ranks
    team_size = args.ranks_per_member or ranks
    if ranks < 1:
        fail(f"--ranks {ranks} is out of range: 1 or more")
    if ranks % team_size:
        fail(f"--ranks-per-member {team_size} does not divide {ranks} ranks")
    if args.price is not None and not args.price >= 0:
        fail(f"--price {args.price:g} is out of range: 0 or more")
    price = 3.0 if args.price is None and kernel == "cuda" else args.price
    team = Team(0, ranks // team_size, 0, team_size, None, None)
    check_batch(c, args, team_size)
    dtype = pick_device(args)[2] if kernel == "cpu" else torch.bfloat16
    mfu = SHARE[dtype] if args.mfu is None else args.mfu
    if not 0 < mfu <= 1:
        fail(f"--mfu {mfu:g} is out of range: more than 0, up to 1")
    split = range(data["splits"]["train"]["tokens"] - c.fitness_tokens)
    schedules = [member_schedule(c, split, team, member, args.max_steps) for member in range(c.members)]
    members, distinct = Counter(s.c for s in schedules), {s.c: s for s in schedules}
    variants = {(*s.mode(step), len(s.ahead(step)), s.c.distill > 0)
                for s in distinct.values() for step in range(s.end)}
    warnings.simplefilter("ignore")
    try:
        memory = step_memory(c, args, vocab_size, dtype, kernel, team, variants)
    except DataDependentOutputException:
        fail(f"{c.optimizer} reads values, which a plan has not; plan with --optimizer adamw instead")
    model = make_model(c, vocab_size, "meta", dtype)
    parts, count = Counter(), model.parameter_count()
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        parts[part if part in ("embed", "head", "blocks") else "the rest"] += p.numel()
    flops = sum(members[cm] * s.training_flops(vocab_size) for cm, s in distinct.items())
    peak = matmul_peak(dtype) / ranks if kernel == "cpu" else 989e12  # of this CPU's share, or of an H100
    seconds = flops / (mfu * peak * ranks)
    kept = c.average if c.members == 1 and c.average_kind == "probs" else c.members
    state = memory["weights"] + team_size * memory["optimizer"]
    field, cap = next(iter(rules(args.track)["cap"].items()), ("training_flops", math.inf))
    used = {"training_flops": flops, "gpu_seconds": seconds * ranks}[field]
    one, size = schedules[-1], lambda count: f"{count / 2 ** 30:,.3f} GiB"
    held = sum(memory.values())
    fits = f"; fits 80 GB: {'yes' if held < 77 * 2 ** 30 else 'NO'}" if kernel == "cuda" else ""
    print("\n".join(textwrap.fill(f"{name:<12} {text}", 100, subsequent_indent=" " * 13) for name, text in [
        ("parameters", f"{count:,}: " + ", ".join(f"{name} {n:,}" for name, n in parts.items())),
        *(("FLOPs/token", f"{flops_per_token(c, vocab_size, mode):.4g} in training with {mode}")
          for mode in sorted({Mode(*mode) for *mode, _, _ in variants})),
        ("a member", f"{one.c.epochs} epochs of {one.per_epoch * c.seq_len:,} tokens, {one.end:,} steps of "
                     f"{one.c.batch_tokens:,}"),
        ("in all", f"{c.members} member(s), {team.teams} side by side, {flops:.4g} training FLOPs"),
        ("memory", f"{size(held)} per rank of {ranks}, device batch {args.device_batch}: " +
                   ", ".join(f"{name} {size(part)}" for name, part in memory.items() if part) + fits),
        *[("process", f"{size(process_memory())} or more on top for Python, torch and its compiler, as here, "
                      f"what the allocator wastes, and {size(memory['weights'] + memory['optimizer'])} while "
                      f"a state is saved")] * (kernel == "cpu"),
        ("time", f"{seconds / 3600:,.2f} hours at {mfu:.0%} of {peak / 1e12:,.3g} TFLOP/s per rank, an "
                 f"assumption; on the machine itself --rehearse measures it"),
        *([] if price is None else
          [("price", f"${seconds / 3600 * ranks * price:,.2f} at ${price:g} per hour of a rank")]),
        ("disk", f"{size(kept * dtype.itemsize * count)} of checkpoints, {size(2 * state)} of states"),
        ("cap", f"{field} {used:.3g} of {cap:.3g}: {'holds' if used <= cap else 'DOES NOT HOLD'}"),
    ]))

if __name__ == "__main__":
    main()
