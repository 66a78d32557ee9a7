"""
Slowrun: the lowest validation loss on a fixed 100M tokens, with as much compute as the track allows.

This file is the contestant: model, optimizer, data order, schedules, scoring and the loop, in reading order.

    ./run.sh                        the nano track: a laptop CPU, minutes
    ./run.sh smoke                  a thirtieth of it, for a first look
    ./run.sh limited --seed 43      8xH100, one hour (after ./run.sh data fineweb100M)
    ./run.sh limited --resume       goes on with a run that was interrupted, as if it had not been
    ./run.sh unlimited --plan       what it would take: parameters, memory, hours, money
    ./run.sh nano --eval RUN        scores a run again from its checkpoints
    torchrun --standalone --nproc-per-node 8 train_gpt.py --track limited
    python train_gpt.py --track nano --config records/published/limited_07.json

It trains on any number of ranks, one process per GPU or CPU process, and writes runs/<name>/:

    train_gpt.py   the source that ran            log.txt          source, environment, config, console
    metrics.jsonl  every step and evaluation      checkpoints/     the members of the predictor
    result.json    the score and what it took     doc_losses.npz   loss per document of val and audit
    loss.svg       training and validation loss   state/           what --resume goes on from

A run is a pure function of its configuration and seed. No random generator has a state: which tokens a step
sees and which activations it drops follow from (seed, position in the stream), so neither the number of ranks
nor the device batch changes the run beyond float rounding, and a resumed run repeats the unbroken one.

A track is a row of TRACKS; a number like (#7) names the record of the limited track that a technique comes
from. A run trains one model, or several members one after another, each of which may learn from the one
before. Shapes: B sequences, T tokens each, C = n_embd channels, H heads of D = C / H channels, V tokens in
the vocabulary.
"""
import argparse
import copy
import ctypes
import dataclasses
import errno
import fcntl
import functools
import gc
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
SOURCE = Path(__file__).read_bytes()  # read first: the log holds what ran, whatever is edited meanwhile
SOURCE_SHA256 = hashlib.sha256(SOURCE).hexdigest()


# ---- Config and tracks -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """What a run is. Each field is also a flag; its comment is the help, led by the values it may take."""
    # data
    dataset: str = "fineweb100M"      # the folder under data/ with the tokens
    seq_len: int = 2048               # [16, 65536] T: tokens that a sequence feeds to the model
    batch_tokens: int = 524288        # [16, 100000000] tokens per optimizer step, all ranks together
    batch_tokens_ends: int = 0        # [0, 100000000] in a chain's first and last quarter; 0: no difference
    epochs: int = 11                  # [1, 9999] passes over the training tokens, for each member
    shuffle: str = "document"         # {document, sequence, none} what is permuted anew in every epoch
    fitness_tokens: int = 0           # [0, 100000000] training tokens set aside to weigh members by
    # model
    n_layer: int = 30                 # [2, 1000] transformer blocks, an even number: half encode, half decode
    n_head: int = 14                  # [1, 1000] attention heads
    n_embd: int = 1792                # [32, 100000] C: width of the residual stream
    mlp: str = "swiglu"               # {swiglu, relu2} the feed-forward layer
    softcap: float = 10.0             # [1, 40] logits are bounded to +-softcap by a tanh
    windows: str = "SSSL"             # short and long layers, repeated; the last one is long
    window_stages: str = "1:0.5/1"    # epoch:short/long ..., shares of seq_len; YaRN when it grows
    rope: str = "full"                # {full, half} half: half of the rotary pairs stand still
    key_offset: bool = False          # half of each key of a long layer is that of the position before
    unet_skips: bool = True           # decoder layers also take the output of their encoder twin (#5)
    values: str = "proj"              # {proj, table, none} every second layer adds a projected embedding (#3)
    head_gate: bool = True            # a sigmoid gate per head, from the first 12 channels (#6)
    head_mixing: bool = True          # heads are learned mixtures of heads, IHA (#17)
    xsa: str = "none"                 # {none, learned, fixed} takes out what points along the own value
    xsa_layers: int = 1000            # [0, 1000] the first so many layers do
    mtp: str = "block"                # {block, head, none} a block predicts the token after the next (#16)
    mtp_weight: float = 0.3           # [0, 10] the block's share in the training loss
    mtp_until: float = 0.66           # [0.01, 1] head: share of the steps with more than one target
    replay: str = "15-20"             # layers that are run again, first-last (#7); none: no layer
    replay_passes: int = 3            # [1, 100] how often they are run in all (#8)
    replay_from: int = 7              # [1, 10000] the epoch from which they are replayed
    passes: int = 1                   # [1, 10] of the whole network; the gradient goes through the last
    passes_from: float = 0.7          # [0, 1] the share of the steps before there is more than one
    lam_init: float = 1.0             # [0, 10] what the stream is multiplied by before each block, at first
    out_init: str = "normal"          # {normal, zero} the last matrix of attention and MLP (#14)
    # regularisation
    dropout: float = 0.1              # [0, 0.9] on the outputs of attention and MLP
    dropout_mlp: bool = True          # on those of the MLP too
    stochastic_depth: float = 0.05    # [0, 0.9] chance to skip the last layer, down to 0 at the first (#15)
    weight_decay: float = 1.3         # [0, 100] of matrices, embedding and head
    wd_scale: float = 1.0             # [0, 100] multiplies it, as the model's size wants
    wd_matrix: float = 1.0            # [0, 1000] multiplies that of the matrices, as their optimizer wants
    wd_schedule: str = "antiphase"    # antiphase to the lr (#20), constant, or epoch:multiplier ...
    # optimizer
    optimizer: str = "muon"           # of the matrices: muon, adamw, or package.module:Class
    optimizer_args: str = "{}"        # of that class, as JSON
    lr_scale: float = 0.25            # [0, 1000] multiplies the learning rates below, but for lr_mixing
    lr_matrix: float = 0.04           # [0, 1000] all matrices inside blocks
    lr_embed: float = 0.15            # [0, 1000] AdamW: token embedding
    lr_head: float = 0.002            # [0, 1000] AdamW: output head
    lr_scalar: float = 0.1            # [0, 1000] AdamW: residual scalars (lambda and skips take 1% of it)
    lr_mixing: float = 0.02           # [0, 1000] AdamW: head mixing
    gate_optimizer: str = "muon"      # {muon, adamw} of the gates; adamw by lr_scalar, without decay
    row_norm: bool = True             # Muon normalises the rows of its update first, MuonEq-R (#18)
    momentum_warmup: int = 300        # [0, 100000] steps in which Muon's momentum rises from 0.85 to 0.95
    grad_clip: float = 0.0            # [0, 1000] the gradient's largest norm; 0: any
    warmdown: float = 0.2             # [0, 1] share of the steps over which the learning rate falls
    warmdown_power: float = 0.5       # [0.01, 10] shape of the fall: 1 is linear, 0.5 a square root (#20)
    lr_floor: float = 0.0             # [0, 1] what it falls to
    cycles: int = 3                   # [0, 10000] epochs at the end with a cosine cycle of the lr each (#13)
    # the predictor
    average: int = 3                  # [1, 10000] epochs at the end whose checkpoints are averaged (#12)
    average_weights: str = "recency"  # {recency, equal} their weights: 1, 2, 3, ... or all the same
    average_kind: str = "probs"       # {probs, weights, ema, blend} what is averaged, and how
    keep_final: float = 0.7           # [0, 1] blend: share of the last weights; the rest is an EMA
    # the ensemble
    members: int = 1                  # [1, 9999] models, trained one after another and mixed
    first_epochs: int = 0             # [0, 9999] epochs of members that have no teacher; 0: as the others
    drop_first: bool = False          # the first member only teaches
    distill: float = 0.0              # [0, 0.99] alpha: the teacher's share in the loss
    temperature: float = 1.0          # [1, 100] at which teacher and student are compared
    distill_from: int = 1             # [1, 10000] members of a chain before the first that has a teacher
    restarts: bool = False            # a member goes on from the weights of the one before: snapshots
    perturb: float = 0.0              # [0, 10] noise between snapshots, in standard deviations, at first
    perturb_last: float = 0.05        # [0, 10] and at last
    top: int = 0                      # [0, 10000] members that fitness tokens select; 0: all of them
    mix: str = "probs"                # {probs, logits} what the mixture of members averages

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))
        if self.n_embd % self.n_head:
            fail(f"--n-head {self.n_head} does not divide --n-embd {self.n_embd}")
        if self.head_dim % 4:
            fail(f"heads of {self.head_dim} channels: rotary pairs need a multiple of 4; change --n-head")
        if self.n_layer % 2:
            fail(f"--n-layer {self.n_layer} is odd; the U-Net needs an even number of layers")
        for flag, tokens in ("", self.batch_tokens), ("-ends", self.batch_tokens_ends):
            if tokens % self.seq_len:
                fail(f"--batch-tokens{flag} {tokens} is not a multiple of --seq-len {self.seq_len}")
        if max(self.cycles, self.average) > (epochs := min(self.epochs, self.first_epochs or self.epochs)):
            fail(f"--cycles {self.cycles} and --average {self.average}: a member has {epochs} epochs")
        first, last = self.replayed or (self.n_layer // 2, self.n_layer // 2)
        if not self.n_layer // 2 <= first <= last < self.n_layer:
            fail(f"--replay {self.replay}: decoder layers are {self.n_layer // 2}-{self.n_layer - 1}")
        if self.members > 1 and self.average_kind == "probs" and self.average > 1:
            fail(f"--members {self.members} have one checkpoint each: --average 1, or another --average-kind")
        if self.restarts and self.average_kind != "probs":
            fail("--restarts goes on from a member's last weights: --average-kind probs")
        if self.optimizer_args != "{}" and ":" not in self.optimizer:
            fail(f"--optimizer-args are for a class, as {FORMS['optimizer'][1]}; {self.optimizer} takes none")
        if self.top and not self.fitness_tokens > self.seq_len:
            fail("--top selects by --fitness-tokens, which must hold a sequence or more")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def mlp_hidden(self):
        """Of relu2 four times the channels, of SwiGLU 8/3, rounded up to a multiple of 256."""
        return 4 * self.n_embd if self.mlp == "relu2" else -(-(8 * self.n_embd // 3) // 256) * 256

    @property
    def batch_sequences(self):
        return self.batch_tokens // self.seq_len

    @property
    def replayed(self):
        """The first and the last replayed layer, or None."""
        return None if self.replay == "none" else tuple(map(int, self.replay.split("-")))

    def value_layer(self, layer):
        """Every second block injects values, the last one included, the MTP block (n_layer) not."""
        return self.values != "none" and layer % 2 == (self.n_layer - 1) % 2

    def long_layer(self, layer):
        return layer >= self.n_layer - 1 or self.windows[layer % len(self.windows)] == "L"

    def window(self, layer, stage):
        """Keys before its own that a layer's tokens see; in the MTP block (n_layer) the whole context."""
        _, short, long = knots(self.window_stages)[stage]
        share = 1 if layer == self.n_layer else long if self.long_layer(layer) else short
        return max(1, round(share * self.seq_len))

    def layer_order(self, replay):
        """The blocks in the order in which they are executed."""
        order = list(range(self.n_layer))
        if replay and self.replayed:
            first, last = self.replayed
            order[last + 1:last + 1] = order[first:last + 1] * (self.replay_passes - 1)
        return order

    def member(self, link, links):
        """The configuration of a member by its place in its chain, from 0, of `links`."""
        changes = {}
        if link < self.distill_from:
            changes["distill"] = 0.0
            if self.first_epochs:
                before_replay = -(-(self.replay_from - 1) * self.first_epochs // self.epochs)
                changes |= {"epochs": self.first_epochs, "replay_from": before_replay + 1}
        if self.batch_tokens_ends and abs(2 * link / max(1, links - 1) - 1) > 0.5:
            changes["batch_tokens"] = self.batch_tokens_ends
        return dataclasses.replace(self, **changes)

# A track is a row: the fields in which its preset differs from the defaults above, the limited track's.
NANO = dict(dataset="nano", seq_len=512, batch_tokens=8192, epochs=7, n_layer=4, n_head=2, n_embd=192,
            window_stages="1:0.25/1", replay="2-2", replay_from=5, lr_scale=4.0, wd_scale=0.154, cycles=2,
            average=2)
UNLIMITED = dict(n_head=16, n_embd=2048, softcap=15.0, replay="15-24", replay_passes=5, stochastic_depth=0.0,
                 warmdown_power=1.0, cycles=0, average=1, grad_clip=1.0)
TRACKS = {
    "nano": NANO,
    "smoke": NANO | dict(n_layer=2, n_head=1, n_embd=64, epochs=1, replay="1-1", replay_from=1, cycles=1,
                         average=1),
    "tiny": dict(n_layer=16, n_head=8, n_embd=1024, softcap=15.0, rope="half", key_offset=True,
                 head_mixing=False, xsa="learned", mtp="head", replay="none", passes=2, lam_init=1.1,
                 out_init="zero", dropout_mlp=False, stochastic_depth=0.0, weight_decay=0.8,
                 wd_schedule="2:1 8:0.125 15:1.1625", lr_scale=0.8, lr_head=0.001, lr_scalar=0.25,
                 gate_optimizer="adamw", row_norm=False, epochs=15, warmdown=0.4, warmdown_power=1.0,
                 cycles=4, average=4, average_kind="weights"),
    "limited": {},
    "two_hour": dict(window_stages="1:0.125/0.375 7:0.375/0.875 14:0.625/1", replay_from=14, epochs=22,
                     cycles=8, average=11),
    "nano_unlimited": NANO | dict(n_embd=128, epochs=4, replay_from=3, average=1, members=8, distill=0.7),
    "unlimited": UNLIMITED | dict(shuffle="sequence", wd_schedule="constant", epochs=32, replay_from=17,
                                  members=20, first_epochs=16, drop_first=True, distill=0.7,
                                  average_kind="blend", keep_final=0.6),
    "unlimited_snapshots": UNLIMITED | dict(
        wd_schedule="0:0.7 2:1", momentum_warmup=0, warmdown=1.0, lr_floor=0.08, epochs=2, replay_from=1,
        members=480, restarts=True, distill=0.45, temperature=1.2, distill_from=8, batch_tokens_ends=393216,
        perturb=0.25, fitness_tokens=132000, top=256),
}
# What a run of the track may use, by the field of its result.json.
CAPS = {
    "nano": ("training_flops", 2e14),
    "smoke": ("training_flops", 1e13),
    "tiny": ("train_seconds", 900),
    "limited": ("train_seconds", 3600),
    "two_hour": ("train_seconds", 7200),
    "unlimited": ("gpu_seconds", 64 * 7 * 86400),
    "unlimited_snapshots": ("gpu_seconds", 64 * 7 * 86400),
}
LEADS_TEAM = False  # this rank is the first of its team, which may meet what no other does

def quit_run(code, message):
    """
    Ends every rank with one line and no traceback. They all get here for the same reason; one of them speaks.
    The codes: 2 a user's mistake, 3 a loss or gradient that is not finite, 75 a signal (the run can go on).
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 or LEADS_TEAM:
        print(f"{'error: ' if code != 75 else ''}{message}", file=sys.stderr, flush=True)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)  # torchrun ends all ranks at the first exit, which must be that of the one who speaks
    raise SystemExit(code)

def fail(message):
    quit_run(2, message)

# {field: (permitted values, help)} from the comments of Config, the one place where both are written.
COMMENTS = {name: rest for name, *rest in re.findall(
    r"^    (\w+): \w+ = .*?# (?:(\[[^\]]*\]|\{[^}]*\}) )?(.*)$", inspect.getsource(Config), re.M)}
# How the fields that are little languages are written, and an example.
NUMBER, SHARE = r"\d+(\.\d+)?", r"(1|0\.\d+)"
FORMS = {
    "windows": ("[SL]+", "SSSL"),
    "window_stages": (rf"1:{SHARE}/{SHARE}( \d+:{SHARE}/{SHARE})*", "1:0.25/0.5 7:0.5/1"),
    "replay": (r"none|\d+-\d+", "15-20, or none"),
    "wd_schedule": (rf"antiphase|constant|{NUMBER}:{NUMBER}( {NUMBER}:{NUMBER})*", "2:1 8:0.125 15:1.2"),
    "optimizer": (r"muon|adamw|[\w.]+:\w+", "torch.optim:Adafactor"),
    "optimizer_args": (r"\{.*\}", '{"momentum": 0.9}'),
}

def knots(text):
    """'1:0.25/0.5 7:0.5/1' -> [[1, 0.25, 0.5], [7, 0.5, 1]]: epochs, and what holds there."""
    return [list(map(float, re.split("[:/]", knot))) for knot in text.split() if ":" in knot]

def check_field(field, value):
    """The value has the field's type and is one of those that its comment permits."""
    flag, (allowed, _) = "--" + field.name.replace("_", "-"), COMMENTS[field.name]
    if type(value) not in ((int, float) if field.type is float else (field.type,)):
        fail(f"{flag} takes a value of type {field.type.__name__}, not {value!r}")
    if allowed.startswith("{") and value not in allowed[1:-1].split(", "):
        fail(f"{flag} {value}: choose one of {allowed[1:-1]}")
    if allowed.startswith("["):
        low, high = map(float, allowed[1:-1].split(","))
        if not low <= value <= high:
            fail(f"{flag} {value} is out of range: {low:g} to {high:g}")
    form, example = FORMS.get(field.name, (".*", ""))
    if isinstance(value, str) and not re.fullmatch(form, value):
        fail(f"{flag} {value}: write it as {example}")
    epochs = [knot[0] for knot in knots(value)] if field.name in ("window_stages", "wd_schedule") else []
    if sorted(set(epochs)) != epochs:
        fail(f"{flag} {value}: the epochs must ascend")


# ---- Model -------------------------------------------------------------------------------------------------

class Mode(NamedTuple):
    """How the network is run. It changes during training; a predictor states it for each of its members."""
    replay: bool     # some layers are run again
    passes: int      # of the whole network
    stage: int       # of the windows

def weight(*shape):
    """A parameter without values; `initialise` fills it by the parameter table."""
    return nn.Parameter(torch.empty(*shape))

def rms(x):
    """RMS norm over the channels, without a gain; the epsilon is float32's whatever the dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=2.0 ** -23)

def linear(x, w):
    """x W^T. Weights are float32 masters, cast where they are used; the stream's dtype is the embedding's."""
    return F.linear(x, w.to(x.dtype))

def rotary(c, stage, device):
    """
    Rotary embedding (Su et al. 2021, arXiv 2104.09864) -> (angles per position (D/2,) in float32, scale of
    the scores). Whenever the long window has grown, YaRN (Peng et al. 2023, arXiv 2309.00071) stretches the
    slow pairs, those that turn less than 32 times in it.
    """
    pairs = c.head_dim // 2
    turning = pairs // 2 if c.rope == "half" else pairs
    frequency = 10000.0 ** (-torch.arange(turning, dtype=torch.float32, device=device) / turning)
    frequency, scale = F.pad(frequency, (0, pairs - turning)), c.head_dim ** -0.5
    windows = (c.window(c.n_layer - 1, s) for s in range(stage + 1))
    for old, new in itertools.pairwise(itertools.accumulate(windows, max)):
        keep = ((old * frequency / (2 * math.pi) - 1) / 31).clamp(0, 1)
        frequency = frequency * (old / new + keep * (1 - old / new))
        scale *= 0.2 * math.log(new / old) + 1
    return frequency, scale

def rotate(x, rope):
    """Rotates the pairs (x_f, x_{f + D/2}) of x (B, T, H, D) by their position's angles."""
    cos, sin = (table[:x.size(1)] for table in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

def dropout(x, p, key):
    """
    Zeroes entries of x (B, T, C) with probability p; the others grow by 1 / (1 - p). The mask hashes the
    place with key (B, 2) int32, which belongs to one sequence and one dropout of the network. The key's
    numbers make an offset and an odd factor; multiply-and-shift rounds as in murmur3 follow. No key: x.
    """
    if key is None or p == 0:
        return x
    place = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device).view(1, *x.shape[1:])
    h = (place ^ key[:, 0, None, None]) * (key[:, 1, None, None] | 1)
    h = (h ^ ((h >> 15) & 0x1FFFF)) * -2048144789
    h = (h ^ ((h >> 13) & 0x7FFFF)) * -1028477387
    h = h ^ ((h >> 16) & 0xFFFF)
    return torch.where((h & 0x7FFFFFFF) >= int(p * 2 ** 31), x * (1 / (1 - p)), 0)

@functools.cache
def causal_mask(T, window, dtype, device):
    """(T, T), to be added to scores: 0 where query i sees key j, i - window <= j <= i, and -inf elsewhere."""
    distance = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
    hidden = (distance < 0) | (distance > window)
    return torch.zeros(T, T, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))

def flash_attention(q, k, v, window, scale):
    """On CUDA the in-core flash kernels for variable lengths, which have a sliding window and a backward."""
    from torch.nn.attention.varlen import varlen_attn
    B, T, H, D = q.shape
    starts = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
    reach = (-1 if window >= T else window, 0)
    flat = (t.flatten(0, 1) for t in (q, k, v))
    return varlen_attn(*flat, starts, starts, T, T, scale=scale, window_size=reach).view(B, T, H, D)

def block_attention(q, k, v, window, scale):
    """On the CPU blocks of queries and the keys in their reach: plain products beat the kernel."""
    B, T, H, D = q.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    mask, out = causal_mask(T, window, q.dtype, q.device), []
    # Smaller blocks compute less that a short window hides; the backward pass wants larger products.
    size = 64 if window < 256 and not q.requires_grad else 128
    for start in range(0, T, size):
        query, key = slice(start, start + size), slice(max(0, start - window), start + size)
        scores = torch.baddbmm(mask[query, key], q[:, query], k[:, key].mT, alpha=scale)
        out.append(scores.softmax(-1) @ v[:, key])
    return torch.cat(out, dim=1).view(B, H, T, D).transpose(1, 2)

# Causal attention of (B, T, H, D) tensors by device; the query at i sees the keys at i - window to i.
ATTENTION = {"cuda": flash_attention, "cpu": block_attention}

class Attention(nn.Module):
    """Multi-head attention with mixed heads, injected values, query and key norm, and a gate per head."""

    def __init__(self, c, layer):
        super().__init__()
        self.n_head, self.key_offset = c.n_head, c.key_offset and c.long_layer(layer)
        self.exclusive = c.xsa != "none" and layer < min(c.xsa_layers, c.n_layer)
        self.q, self.k, self.v, self.o = (weight(c.n_embd, c.n_embd) for _ in range(4))
        self.mix = weight(3, c.n_head, c.n_head) if c.head_mixing else None
        self.head_gate = weight(c.n_head, 12) if c.head_gate else None
        self.value_gate = weight(c.n_head, 32) if c.value_layer(layer) else None
        self.value_proj = weight(c.n_embd, c.n_embd) if c.value_layer(layer) and c.values == "proj" else None
        self.xsa = weight(c.n_head) if self.exclusive and c.xsa == "learned" else None

    def project(self, x, value, rope):
        """The normalised stream x, the embedding to inject (B, T, C) -> q, k, v (B, T, H, D)."""
        B, T, C = x.shape
        w = torch.stack((self.q, self.k, self.v)).to(x.dtype)
        if self.mix is not None:
            w = self.mix.to(x.dtype) @ w.view(3, self.n_head, -1)
        q, k, v = F.linear(x, w.view(3 * C, C)).view(B, T, 3, self.n_head, -1).unbind(2)
        if self.value_gate is not None:
            value = value if self.value_proj is None else linear(value, self.value_proj)
            gate = 2 * linear(x[..., :32], self.value_gate).sigmoid()
            v = v + gate[..., None] * value.view(v.shape)
        q, k = rms(rotate(q, rope)), rms(rotate(k, rope))
        if self.key_offset:
            own, moved = k.chunk(2, dim=-1)
            k = torch.cat((own, torch.cat((moved[:, :1], moved[:, :-1]), dim=1)), dim=-1)
        return q, k, v

    def output(self, x, o, v):
        """x (B, T, C), the heads' outputs o and values v (B, T, H, D) -> (B, T, C)."""
        if self.exclusive:
            v = F.normalize(v, dim=-1, eps=1e-4)
            along = (o * v).sum(-1, keepdim=True)
            o = o - (along if self.xsa is None else self.xsa.tanh().to(o.dtype)[:, None] * along) * v
        if self.head_gate is not None:
            o = o * linear(x[..., :12], self.head_gate).sigmoid()[..., None]
        return linear(o.reshape(x.shape), self.o)

class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202), or the squared ReLU (So et al. 2021, arXiv 2109.08668)."""

    def __init__(self, c):
        super().__init__()
        self.gate = weight(c.mlp_hidden, c.n_embd) if c.mlp == "swiglu" else None
        self.up, self.out = weight(c.mlp_hidden, c.n_embd), weight(c.n_embd, c.mlp_hidden)

    def forward(self, x):
        if self.gate is None:
            return linear(linear(x, self.up).relu().square(), self.out)
        gate, up = linear(x, torch.cat((self.gate, self.up))).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, self.out)

class Block(nn.Module):
    """
    Compiled in two parts, around the attention kernel. They are the same for all layers but for the value
    projection: a few seconds of compilation serve any depth, and windows and replay change nothing.
    """

    def __init__(self, c, layer):
        super().__init__()
        self.p, self.p_mlp = c.dropout, c.dropout * c.dropout_mlp
        self.attn, self.mlp = Attention(c, layer), MLP(c)

    def forward(self, x, value, frame, window, drop=None, keep=None):
        """
        x, value (B, T, C); frame: rotary tables and the scale of scores; window: keys in reach; drop
        (B, 2, 2): keys of two dropouts; keep (B, 1, 1): 0 skips the block.
        """
        *rope, scale = frame
        q, k, v = self.before(x, value, rope)
        return self.after(x, ATTENTION[x.device.type](q, k, v, window, scale), v, drop, keep)

    def before(self, x, value, rope):
        return self.attn.project(rms(x), value, rope)

    def after(self, x, o, v, drop, keep):
        start, (first, second) = x, (None, None) if drop is None else drop.unbind(1)
        x = x + dropout(self.attn.output(rms(x), o, v), self.p, first)
        x = x + dropout(self.mlp(rms(x)), self.p_mlp, second)
        return x if keep is None else start + keep * (x - start)

def mix_stream(x, x0, lam, mu, skip=None, twin=None):
    """The stream before a block: the encoder twin's output first, then the anchor to the embedding."""
    if twin is not None:
        x = x + skip * twin
    return lam * x + mu * x0

class Noise(NamedTuple):
    """The random draws of a micro-batch, one row per executed block (the MTP block last)."""
    drop: torch.Tensor   # (executions, B, 2, 2) int32: keys of the dropout masks
    keep: torch.Tensor   # (executions, B, 1, 1): 0 where stochastic depth skips the block, else 1

class Lesson(NamedTuple):
    """What a teacher says about a micro-batch: its outputs (B, T, C), and its head (V, C)."""
    x: torch.Tensor
    head: torch.Tensor

class GPT(nn.Module):
    """The model; `vocab_size` comes from the dataset, the tables are padded to a multiple of 64 rows."""

    def __init__(self, c, vocab_size):
        super().__init__()
        self.c, self.vocab_size, rows = c, vocab_size, -(-vocab_size // 64) * 64
        self.embed = weight(rows, c.n_embd)
        self.head = weight(rows, c.n_embd)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.lam, self.mu = weight(c.n_layer), weight(c.n_layer)
        self.skip = weight(c.n_layer // 2) if c.unet_skips else None
        self.value_tables = weight(c.n_layer // 2, rows, c.n_embd) if c.values == "table" else None
        if c.mtp == "block":
            self.mtp = nn.Module()
            self.mtp.proj = weight(c.n_embd, 2 * c.n_embd)
            self.mtp.block = Block(c, c.n_layer)
        self.checkpointing = False  # True: blocks keep only their input, and are computed again for backward

    def trunk(self, tokens, mode, noise=None):
        """tokens (B, T) -> (the normalised output (B, T, C), the frame of its blocks)."""
        c = self.c
        x = x0 = rms(F.embedding(tokens, self.embed))
        frequency, scale = rotary(c, mode.stage, x.device)
        angle = torch.outer(torch.arange(c.seq_len, dtype=torch.float32, device=x.device), frequency)[:, None]
        frame = angle.cos().to(x.dtype), angle.sin().to(x.dtype), scale
        rows = c.layer_order(True)  # of the noise: one for each execution when layers are replayed
        for n in range(mode.passes):
            outputs = {}
            with torch.set_grad_enabled(torch.is_grad_enabled() and n == mode.passes - 1):
                for place, layer in enumerate(c.layer_order(mode.replay)):
                    twin, value = (), x0
                    if self.skip is not None and layer >= c.n_layer // 2:
                        twin = (self.skip[layer - c.n_layer // 2], outputs[c.n_layer - 1 - layer])
                    if self.value_tables is not None and c.value_layer(layer):
                        value = F.embedding(tokens, self.value_tables[layer // 2])
                    x = mix_stream(x, x0, self.lam[layer], self.mu[layer], *twin)
                    row = n * len(rows) + (place if mode.replay else rows.index(layer))
                    draws = [part[row] for part in noise or ()]
                    x = outputs[layer] = self.run(self.blocks[layer], x, value, frame,
                                                  c.window(layer, mode.stage), *draws)
                x = rms(x) if c.passes > 1 else x
        return rms(x), frame

    def run(self, block, *arguments):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(*arguments)

    def loss(self, sequences, mode, noise, batch_sequences, ahead=(1.0,), lesson=None):
        """
        sequences (B, T+1) -> (the training loss, the plain next-token loss), divided by the tokens of the
        whole batch: what micro-batches and ranks get adds up to the mean's loss and gradient. `ahead` weighs
        the predictions of the head 1, 2, ... tokens ahead; the lesson is the teacher's.
        """
        c, targets = self.c, sequences[:, 1:]
        B, T = targets.shape
        x, frame = self.trunk(sequences[:, :-1], mode, noise)
        unit = (1 - c.distill * (lesson is not None)) / (batch_sequences * T)
        y = torch.stack([targets.roll(-k, 1) for k in range(len(ahead))], dim=-1)
        w = torch.zeros(y.shape, device=x.device)
        for k, share in enumerate(ahead):
            w[:, :T - k, k] = share * unit  # the last k have no target inside their sequence
        loss, plain = self.head_loss(x, y, w, lesson, c.distill / (batch_sequences * T))
        if c.mtp == "block":
            # Position t also knows token t+1 and predicts t+2; the last one has no target, its weight is 0.
            x = linear(torch.cat((x, rms(F.embedding(targets, self.embed))), dim=-1), self.mtp.proj)
            x = rms(self.run(self.mtp.block, x, x, frame, T, *(part[-1] for part in noise)))
            w = torch.full((B, T, 1), c.mtp_weight * unit * T / (T - 1), device=x.device)
            w[:, -1] = 0
            loss = loss + self.head_loss(x, targets.roll(-1, 1)[..., None], w)[0]
        return loss, plain / (batch_sequences * T)

    def head_loss(self, x, y, w, lesson=None, lesson_weight=0.0):
        """HeadLoss of x (B, T, C) for K targets y and their weights w (B, T, K), and the teacher's lesson."""
        head = self.head[:self.vocab_size]
        if lesson is not None:
            lesson = lesson._replace(x=lesson.x.flatten(0, 1))
        return HeadLoss.apply(x.flatten(0, 1), head, y.flatten(0, 1), w.flatten(0, 1), self.c.softcap,
                              lesson, lesson_weight, self.c.temperature)

    @torch.no_grad()
    def teach(self, sequences, mode):
        """The lesson about sequences (B, T+1): a forward pass, and nothing to remember for a backward."""
        return Lesson(self.trunk(sequences[:, :-1], mode)[0], self.head[:self.vocab_size])

    @torch.no_grad()
    def target_logprobs(self, sequences, mode):
        """sequences (B, T+1) -> the log-probabilities of their targets, (B, T) float64."""
        x, _ = self.trunk(sequences[:, :-1], mode)
        return target_logprobs(x, self.head[:self.vocab_size], sequences[:, 1:], self.c.softcap)

    def logits(self, x):
        """(B, T, C) -> (B, T, V) float32, softcapped. Whole logits are for looking at a few sequences."""
        return self.c.softcap * torch.tanh(linear(x, self.head[:self.vocab_size]).float() / self.c.softcap)

    def parameter_count(self):
        return sum(p.numel() for p in self.parameters())

def flops_per_token(c, vocab_size, mode, training=True):
    """
    Floating-point operations of a token's forward (and backward) pass: 2 for each multiplication and addition
    in all executed matrix products, replayed blocks and the MTP head included. Attention counts the keys that
    the causal window shows on average.
    """
    d, head = c.n_embd, vocab_size * c.n_embd

    def macs(layer, stage=mode.stage):
        reach = min(c.window(layer, stage) + 1, c.seq_len)
        keys = reach - reach * (reach - 1) / (2 * c.seq_len)
        mlp = (2 + (c.mlp == "swiglu")) * d * c.mlp_hidden
        values = c.value_layer(layer) * (32 * c.n_head + d * d * (c.values == "proj"))
        return 4 * d * d + mlp + 12 * c.n_head * c.head_gate + values + 2 * d * keys

    trunk = sum(map(macs, c.layer_order(mode.replay)))
    if not training:
        return 2 * (mode.passes * trunk + head)
    mtp = head + 2 * d * d + macs(c.n_layer) if c.mtp == "block" else 0
    # All passes but the last only go forward, and so does the teacher.
    last = len(knots(c.window_stages)) - 1
    teacher = c.passes * sum(macs(layer, last) for layer in c.layer_order(True)) + head if c.distill else 0
    return 6 * (trunk + head + mtp) + 2 * ((mode.passes - 1) * trunk + teacher)


# ---- Head and loss -----------------------------------------------------------------------------------------

def exp(x):
    """
    e^x of float32, to about 2e-7 + 1e-7 |x| of it, between 2^-126 and 2^127. Compiled for a CPU it is 2^n,
    made of its bits, times a minimax polynomial: twice as fast as the library's, which other devices use.
    """
    if x.device.type != "cpu" or not torch.compiler.is_compiling():
        return torch.exp(x)
    y = (x * (1 / math.log(2))).clamp(-126, 127)
    n, power = y.round(), 0.0
    for coefficient in (0.0013264729, 0.0096715132, 0.055507337, 0.24022242, 0.69314698, 1.0):
        power = power * (y - n) + coefficient
    return power * ((n.int() + 127) << 23).view(torch.float32)

def softcap_pass(logits, softcap):
    """
    Raw logits l (n, V) -> (s (n, 1) float32, u (n, V) in the logits' dtype): s is the sum of the softmax's
    exponentials, u / s its probabilities times the softcap's slope. As z = c tanh(l / c) <= c, nobody need
    look for the maximum: q = 1 / (1 + exp(2 l / c)) gives z - c = -2 c q and dz/dl = 4 q (1 - q).
    """
    q = 1 / (1 + exp(logits.float() * (2 / softcap)))
    e = exp(q * (-2 * softcap))
    return e.sum(-1, keepdim=True), (e * (4 * q * (1 - q))).to(logits.dtype)

def softcap_sum(logits, softcap):
    """The first half of softcap_pass, for scoring."""
    return exp(-2 * softcap / (1 + exp(logits.float() * (2 / softcap)))).sum(-1)

def lesson_pass(logits, teacher, softcap, temperature, ratio):
    """
    softcap_pass with a teacher's raw logits (n, V): also -> the divergences KL(teacher || student) at the
    temperature, (n, 1), whose gradient times ratio (n, 1) has been added to u / s.
    """
    q, qt = (1 / (1 + exp(l.float() * (2 / softcap))) for l in (logits, teacher))
    z, zt = -2 * softcap * q, -2 * softcap * qt
    e, student, teacher = exp(z), exp(z / temperature), exp(zt / temperature)
    s, ss, st = (part.sum(-1, keepdim=True) for part in (e, student, teacher))
    kl = (teacher * (zt - z)).sum(-1, keepdim=True) / (temperature * st) + ss.log() - st.log()
    u = 4 * q * (1 - q) * (e + ratio * s * (student / ss - teacher / st))
    return s, u.to(logits.dtype), kl

def chunk_rows(vocab_size, device):
    """Tokens whose logits are held at a time: 16M entries serve a CPU best, 128M keep a GPU busy."""
    return max(128, (2 ** 27 if device.type == "cuda" else 2 ** 24) // vocab_size)

class HeadLoss(torch.autograd.Function):
    """
    sum_nk w_nk (-log softmax(softcap(x_n W^T))[y_nk]), by chunks of tokens; gradients are made in the same
    pass over the logits. x (N, C), W (V, C), y (N, K) int64, w (N, K) float32 -> (that sum, the sum of the
    first targets' losses without weights, for looking at), scalars in float32. Once differentiable. With a
    lesson, lesson_weight tau^2 KL(teacher || student) of every token is added (Hinton et al. 2015, arXiv
    1503.02531); the weights of a token must not all be 0 then.
    """

    @staticmethod
    def forward(ctx, x, W, y, w, softcap, lesson, lesson_weight, temperature):
        loss, plain = torch.zeros(2, 1, device=x.device)
        dx, dW, Wc = torch.empty_like(x), torch.zeros_like(W), W.to(x.dtype)
        for n in range(0, len(x), rows := chunk_rows(len(W), x.device)):
            xn, yn, wn = x[n:n + rows], y[n:n + rows], w[n:n + rows]
            logits, total = xn @ Wc.T, wn.sum(1, keepdim=True)
            t = torch.tanh(logits.gather(1, yn).float() / softcap)
            if lesson is None:
                s, u = softcap_pass(logits, softcap)
            else:
                ratio, teacher = lesson_weight * temperature / total, lesson.x[n:n + rows] @ lesson.head.T
                s, u, kl = lesson_pass(logits, teacher, softcap, temperature, ratio)
                loss += lesson_weight * temperature ** 2 * kl.sum()
            nats = s.log() + softcap - softcap * t
            loss += (wn * nats).sum()
            plain += nats[:, 0].sum()
            # u / s is the gradient of the raw logits; the division waits until the rows have only C entries.
            own = -s * wn / total.clamp_min(1e-30) * (1 - t * t)
            rows_of = torch.arange(len(u), device=u.device)[:, None]
            u.index_put_((rows_of, yn), own.to(u.dtype), accumulate=True)
            dx[n:n + rows] = (u @ Wc) * (total / s)
            dW += u.T @ (xn * (total / s)).to(x.dtype)
        ctx.save_for_backward(dx, dW)
        loss, plain = loss[0], plain[0]
        ctx.mark_non_differentiable(plain)
        return loss, plain

    @staticmethod
    def backward(ctx, grad, _):
        dx, dW = ctx.saved_tensors
        return (dx * grad).to(dx.dtype), dW * grad, *[None] * 6

@torch.no_grad()
def target_logprobs(x, W, targets, softcap):
    """x (B, T, C), W (V, C), targets (B, T) -> the log-probabilities of the targets, (B, T) float64."""
    x, y, Wc = x.flatten(0, 1), targets.flatten()[:, None], W.to(x.dtype)
    out = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for n in range(0, len(x), rows := chunk_rows(len(W), x.device)):
        logits = x[n:n + rows] @ Wc.T
        z = softcap * torch.tanh(logits.gather(1, y[n:n + rows]).double() / softcap)
        out[n:n + rows] = z[:, 0] - softcap - softcap_sum(logits, softcap).double().log()
    return out.view(targets.shape)


# ---- Parameters and optimizer ------------------------------------------------------------------------------

class Row(NamedTuple):
    """A kind of parameter: how it starts and how it learns; lr and weight_decay before the schedule."""
    pattern: str
    init: object
    optimizer: str
    lr: float
    betas: tuple
    weight_decay: float

def param_table(c):
    """One row per kind of parameter, by the pattern that its whole name matches."""
    width = (3 / c.n_embd) ** 0.5  # uniform(-width, width) has variance 1 / C
    decay = c.weight_decay * c.wd_scale
    scaled = lambda lr: lr * c.lr_scale
    uniform = lambda p, g: p.uniform_(-width, width, generator=g)
    normal = lambda std: lambda p, g: p.normal_(0, std, generator=g)
    constant = lambda value: lambda p, g: p.fill_(value)
    identity = lambda p, g: p.copy_(torch.eye(p.size(-1)))
    matrix = (c.optimizer, scaled(c.lr_matrix), (0.9, 0.95), decay * c.wd_matrix)
    adamw, fast = "adamw", (0.8, 0.95)
    gate = matrix if c.gate_optimizer == "muon" else (adamw, scaled(c.lr_scalar), (0.9, 0.99), 0.0)
    last = normal(c.n_embd ** -0.5) if c.out_init == "normal" else constant(0.0)
    return [
        Row(r"embed", normal(1.0), adamw, scaled(c.lr_embed), fast, decay),
        Row(r"value_tables", uniform, adamw, scaled(c.lr_embed), fast, decay),
        Row(r"head", normal(0.001), adamw, scaled(c.lr_head), fast, decay),
        Row(r"lam", constant(c.lam_init), adamw, scaled(c.lr_scalar) * 0.01, fast, 0.0),
        Row(r"skip", constant(1.0), adamw, scaled(c.lr_scalar) * 0.01, fast, 0.0),
        Row(r"mu", constant(0.1), adamw, scaled(c.lr_scalar), (0.96, 0.95), 0.0),
        Row(r".*\.mix", identity, adamw, c.lr_mixing, fast, 0.0),
        Row(r".*\.xsa", constant(0.0), adamw, scaled(c.lr_scalar), (0.9, 0.95), 0.0),
        Row(r".*\.(head|value)_gate", constant(0.0), *gate),
        Row(r".*\.(q|k|v|value_proj|gate|up)|mtp\.proj", uniform, *matrix),
        Row(r".*\.(o|out)", last, *matrix),
    ]

def match_rows(model, c):
    """[(name, parameter, row)]; a parameter that matches no row of the table, or several, is an error."""
    matched = []
    for name, p in model.named_parameters():
        rows = [row for row in param_table(c) if re.fullmatch(row.pattern, name)]
        assert len(rows) == 1, f"parameter {name} matches {len(rows)} rows of the parameter table"
        matched.append((name, p, rows[0]))
    return matched

@torch.no_grad()
def initialise(model, c, seed):
    """Draws every parameter by its row, in the model's order; the same on every rank."""
    generator = torch.Generator(model.embed.device).manual_seed(seed)
    for _, p, row in match_rows(model, c):
        row.init(p, generator)

@torch.no_grad()
def perturb(model, c, seed, link, links):
    """Noise on every tensor after `link` snapshots, in its standard deviations, falling as a cosine."""
    fall = (1 + math.cos(math.pi * (link - 1) / max(1, links - 2))) / 2
    scale = c.perturb_last + (c.perturb - c.perturb_last) * fall
    generator = torch.Generator().manual_seed(seed * 100003 + 31337 * link)
    for p in model.parameters():
        if p.numel() > 1:
            noise = torch.randn(p.shape, generator=generator).to(p.device)
            p.add_((noise * (scale * p.float().std())).to(p.dtype))

# Five steps of Polar Express (Amsel et al. 2025, arXiv 2505.16932): aX + bX^3 + cX^5 of the singular values.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

def orthogonalise(G, dtype):
    """G (n, R, C) -> about U V^T of each matrix's singular value decomposition, computed in dtype."""
    X = G.mT if G.size(1) > G.size(2) else G
    X = (X / (X.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if G.size(1) > G.size(2) else X

def muon_update(W, G, state, lr, weight_decay, momentum, beta2, row_norm, dtype):
    """
    One step of Muon (Jordan 2024) for matrices W (n, R, C) with gradients G, in place: momentum, row
    normalisation, polar factor, variance reduction per row (NorMuon, arXiv 2510.05491), and decay of the
    weights that the update shrinks too (cautious).
    """
    M, S = state["momentum"], state["variance"]
    M.lerp_(G, 1 - momentum)
    update = G.lerp(M, momentum)
    if row_norm:
        update = update / update.norm(dim=2, keepdim=True).clamp_min(1e-7)
    X = orthogonalise(update, dtype).to(W.dtype)
    axis = 2 if W.size(1) >= W.size(2) else 1
    v = X.square().mean(dim=axis, keepdim=True)
    S.lerp_(v, 1 - beta2)
    r = S.clamp_min(1e-10).rsqrt()
    # The rescaling keeps the Frobenius norm; the length of the averaged axis would cancel.
    norm = lambda squares: squares.sum((1, 2), keepdim=True).sqrt()
    X *= r * norm(v) / norm(v * r * r).clamp_min(1e-10)
    lr = lr * max(1, W.size(1) / W.size(2)) ** 0.5
    W -= lr * X + lr * weight_decay * W * (X * W >= 0)

def adamw_update(W, G, state, lr, weight_decay, beta1, beta2, step):
    """One step of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), in place; `step` counts from 1."""
    m, v = state["mean"], state["square"]
    W.mul_(1 - lr * weight_decay)
    m.lerp_(G, 1 - beta1)
    v.lerp_(G.square(), 1 - beta2)
    W.addcdiv_(m, (v / (1 - beta2 ** step)).sqrt_().add_(1e-10), value=-lr / (1 - beta1 ** step))

class Team(NamedTuple):
    """Ranks that train a model together. Teams train members side by side, each its own chain of them."""
    index: int
    teams: int
    rank: int
    size: int
    group: object    # for the messages of training
    side: object     # for those of saving, which happens meanwhile

def make_team(size, timeout):
    """This rank's team, where `size` ranks make one."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % size:
        fail(f"--ranks-per-member {size} does not divide {world} ranks")
    groups = [(dist.new_group(ranks, timeout), dist.new_group(ranks, timeout, backend="gloo"))
              for ranks in (range(first, first + size) for first in range(0, world, size))]
    return Team(rank // size, world // size, rank % size, size, *groups[rank // size])

def foreign_optimizer(c, parameters):
    """An instance of the class that --optimizer names."""
    module, name = c.optimizer.split(":")
    try:
        arguments = json.loads(c.optimizer_args)
        if {"lr", "weight_decay"} & set(arguments):
            raise ValueError("lr and weight_decay are --lr-matrix and --weight-decay")
        return getattr(importlib.import_module(module), name)(parameters, **arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        fail(f"--optimizer {c.optimizer} --optimizer-args '{c.optimizer_args}': {error}")

class Group:
    """
    Parameters that are updated together. Their values and gradients live in two flat buffers, of which the
    parameters are views, padded so that each rank owns an equal part: gradients are summed into the part's
    owner, which alone keeps the optimizer's state and updates the values; then the values are gathered.
    """

    def __init__(self, row, params, c, dtype, team):
        self.row, self.c, self.dtype, self.team, self.params = row, c, dtype, team, params
        shape, size = params[0].shape, sum(p.numel() for p in params)
        # Matrices are never cut: the unit is a matrix. AdamW's unit is a number.
        unit = 1 if row.optimizer == "adamw" else shape.numel()
        part, self.units = -(-size // (unit * team.size)) * unit, size // unit
        self.values, self.grads = (params[0].new_zeros(part * team.size) for _ in range(2))
        start = 0
        for p in params:
            view = slice(start, start := start + p.numel())
            self.values[view] = p.data.flatten()
            p.data, p.grad = self.values[view].view(p.shape), self.grads[view].view(p.shape)
        own = slice(team.rank * part, (team.rank + 1) * part)
        self.W, self.G = self.values[own], self.grads[own]
        if row.optimizer != "adamw":
            self.W, self.G = self.W.view(-1, *shape), self.G.view(-1, *shape)
        self.own = max(0, min(self.units - team.rank * len(self.W), len(self.W)))  # units that are no padding
        self.missing, self.reduce = 0, None
        for p in params:
            p.register_post_accumulate_grad_hook(self.arrived)
        self.reset()

    def arrived(self, p):
        """Called in the backward pass: after the last gradient their sum over the ranks begins."""
        self.missing -= 1
        if self.missing == 0:
            self.start_reduce()

    def start_reduce(self):
        self.reduce = dist.reduce_scatter_single(self.G.flatten(), self.grads, group=self.team.group,
                                                 async_op=True)

    def reset(self):
        """The optimizer's state, and the average of the weights, as before the first step."""
        W, zeros, self.inner = self.W, torch.zeros_like, None
        if self.row.optimizer == "muon":
            variance = W[:, :, :1] if W.size(1) >= W.size(2) else W[:, :1]
            self.state = {"momentum": zeros(W), "variance": zeros(variance)}
        elif self.row.optimizer == "adamw":
            self.state = {"mean": zeros(W), "square": zeros(W)}
        else:
            matrices = [nn.Parameter(matrix) for matrix in W[:self.own]]
            self.state, self.inner = {}, matrices and foreign_optimizer(self.c, matrices)
        if self.c.average_kind != "probs":
            self.state["average"] = zeros(W, dtype=torch.float32)

    def update(self, lr, weight_decay, momentum, step):
        """The multipliers of learning rate and decay, Muon's momentum, and the step counted from 1."""
        row, lr, weight_decay = self.row, lr * self.row.lr, weight_decay * self.row.weight_decay
        if row.optimizer == "muon":
            muon_update(self.W, self.G, self.state, lr, weight_decay, momentum, row.betas[1], self.c.row_norm,
                        self.dtype)
        elif row.optimizer == "adamw":
            adamw_update(self.W, self.G, self.state, lr, weight_decay, *row.betas, step)
        elif self.inner:
            self.inner.param_groups[0] |= {"lr": lr, "weight_decay": weight_decay}
            for p, gradient in zip(self.inner.param_groups[0]["params"], self.G):
                p.grad = gradient
            self.inner.step()

    def gather(self):
        """Starts to bring the values from their owners to every rank; -> the work to wait for."""
        return dist.all_gather_single(self.values, self.W.flatten(), group=self.team.group, async_op=True)

    def shards(self, mesh):
        """A copy of values and optimizer state, as this rank's part of distributed tensors, unpadded."""
        local = lambda part: part[:self.own].to("cpu", copy=True)
        return {name: DTensor.from_local(local(part), mesh, [Shard(0)], run_check=False,
                                         shape=(self.units, *part.shape[1:]), stride=part.stride())
                for name, part in {"values": self.W, **self.state}.items()}

    def load(self, shards):
        """Takes over what `shards` had and a checkpoint has been loaded into."""
        for name, part in {"values": self.W, **self.state}.items():
            part[:self.own].copy_(shards[name].to_local())
        self.gather().wait()

class Optimizer:
    """All groups, sharded over the ranks (as ZeRO-2 does, Rajbhandari et al. 2020, arXiv 1910.02054)."""

    def __init__(self, model, c, dtype, team):
        self.c, self.team, groups = c, team, {}
        for name, p, row in match_rows(model, c):
            shape = p.shape if row.optimizer != "adamw" else None
            # The decoder's gradients are complete, and can be summed, while the encoder's are still made.
            encoder = name.startswith("blocks.") and int(name.split(".")[1]) < c.n_layer // 2
            groups.setdefault((*row[2:], p.dtype, shape, encoder), (row, []))[1].append(p)
        self.groups = [Group(row, params, c, dtype, team) for row, params in groups.values()]
        self.mesh = DeviceMesh.from_group(team.side, "cpu")

    def reset(self):
        for group in self.groups:
            group.reset()

    def shards(self):
        """A copy of parameters and optimizer state for a distributed checkpoint: any ranks can load it."""
        return {f"{i}": group.shards(self.mesh) for i, group in enumerate(self.groups)}

    def inner_states(self):
        """{group: the state of a foreign optimizer}, which the same number of ranks can load."""
        return {i: group.inner.state_dict() for i, group in enumerate(self.groups) if group.inner}

    def expect(self):
        """The next backward pass is the step's last."""
        for group in self.groups:
            group.missing, group.reduce = len(group.params), None

    @torch.no_grad()
    def step(self, lr, weight_decay, momentum, step, average=0.0):
        """
        Sums gradients over the ranks, updates parameters, clears gradients; the new values take the share
        `average` in their running average. -> the squared norm of the gradient, as far as this rank owns it.
        """
        gathers, squares = [], torch.zeros((), device=self.groups[0].W.device)
        for group in self.groups:
            if group.reduce is None:
                group.start_reduce()
        square = lambda group: torch.linalg.vector_norm(group.G).float() ** 2
        if self.c.grad_clip:
            for group in self.groups:
                group.reduce.wait()
                squares += square(group)
            total = squares.clone()
            dist.all_reduce(total, group=self.team.group)
            shrink = (self.c.grad_clip / (total.sqrt() + 1e-6)).clamp_max(1.0)
        for group in self.groups:
            group.reduce.wait()
            if self.c.grad_clip:
                group.G.mul_(shrink)
            else:
                squares += square(group)
            group.update(lr, weight_decay, momentum, step)
            if average:
                group.state["average"].lerp_(group.W.float(), average)
            gathers.append(group.gather())
            group.grads.zero_()
            group.reduce = None
        for gather in gathers:
            gather.wait()
        return squares

    @torch.no_grad()
    def take_average(self):
        """The parameters become their running average."""
        for group in self.groups:
            group.W.copy_(group.state["average"])
            group.gather().wait()


# ---- Data --------------------------------------------------------------------------------------------------

def digest(array):
    """The sha256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()

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
        except (ValueError, KeyError, TypeError) as error:
            fail(f"{folder}: manifest.json or token_bytes.bin is damaged ({error}); {self.remedy}")
        self.token_bytes = token_bytes.astype(np.int64)
        self.splits = {split: self.open(self.folder / f"{split}.bin", sha256)
                       for split, sha256 in self.digests.items()}

    def open(self, path, sha256=None):
        """The llm.c format: 256 int32 of header (magic, version, tokens), then uint16 tokens."""
        if not path.exists():
            fail(f"{path} is missing; {self.remedy}")
        header, held = np.fromfile(path, dtype="<i4", count=256), path.stat().st_size // 2 - 512
        if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
            fail(f"{path} is not a token file (wrong magic or version); {self.remedy}")
        if held != header[2] or path.stat().st_size % 2:
            fail(f"{path} is truncated: its header says {header[2]} tokens, it holds {held}; {self.remedy}")
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
        if sha256 and digest(tokens) != sha256:
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

    def sequences(self, split, T):
        """The split in file order, (sequences, T+1) uint16; the tail that fills no sequence is left out."""
        tokens = self.splits[split]
        return tokens[:len(tokens) // (T + 1) * (T + 1)].reshape(-1, T + 1)

    def documents(self, split):
        """The first position of every document, int64."""
        tokens, block = self.splits[split], 2 ** 22  # by blocks, for comparisons make a byte for each token
        return np.concatenate([np.flatnonzero(tokens[n:n + block] == self.bos_id) + n
                               for n in range(0, len(tokens), block)])

class Stream:
    """
    The training sequences of a whole run, epoch after epoch, each an index over the memory-mapped tokens. An
    epoch permutes the documents, cuts them into sequences of T+1 tokens, and permutes those (#19). Document
    order accumulates; with seed 42 the permutations are the reference's, seeded by epoch e and e + 1000.
    """

    def __init__(self, tokens, starts, c, seed):
        self.tokens, self.starts, self.shuffle, self.seed = tokens, starts, c.shuffle, seed
        self.lengths = np.diff(starts, append=len(tokens))
        self.S, self.per_epoch = c.seq_len + 1, len(tokens) // (c.seq_len + 1)
        self.documents, self.made = np.arange(len(starts)), 0

    def permutation(self, n, seed):
        generator = torch.Generator().manual_seed(1009 * (self.seed - 42) + seed)
        return torch.randperm(n, generator=generator).numpy()

    def enter(self, epoch):
        """Makes the index of an epoch, counted from 1."""
        if epoch < self.made:
            self.documents, self.made = np.arange(len(self.starts)), 0
        for e in range(max(2, self.made + 1), epoch + 1):
            if self.shuffle == "document":
                self.documents = self.documents[self.permutation(len(self.documents), e)]
        self.made, self.ends = epoch, np.cumsum(self.lengths[self.documents])
        self.order = np.arange(self.per_epoch)
        if self.shuffle != "none":
            self.order = self.permutation(self.per_epoch, epoch + 1000)

    def sequence(self, index):
        """The index-th sequence of the run, (T+1,) uint16, put together from the documents it crosses."""
        epoch, place = divmod(index, self.per_epoch)
        if epoch + 1 != self.made:
            self.enter(epoch + 1)
        start = self.order[place] * self.S
        n, out, missing = np.searchsorted(self.ends, start, side="right"), [], self.S
        while missing:
            first = self.starts[self.documents[n]]
            end = first + self.lengths[self.documents[n]]
            at = end - (self.ends[n] - start)
            out.append(self.tokens[at:min(at + missing, end)])
            start, missing, n = start + len(out[-1]), missing - len(out[-1]), n + 1
        return np.concatenate(out)

def draw_noise(c, seed, indices, dtype):
    """
    The noise of the sequences with these places in the stream. Philox is counter-based (Salmon et al. 2011):
    a sequence's draws follow from (seed, index). Stochastic depth skips block i with chance p i / (L - 1).
    """
    layers = np.array(c.layer_order(replay=True) * c.passes + [c.n_layer])
    drop, keep = [], []
    for index in indices:
        generator = np.random.Generator(np.random.Philox(key=[seed, index]))
        drop.append(generator.integers(-2 ** 31, 2 ** 31, (len(layers), 2, 2)).astype(np.int32))
        keep.append(generator.random(len(layers)) >= c.stochastic_depth * layers / (c.n_layer - 1))
    drop, keep = (torch.from_numpy(np.stack(draws, axis=1)) for draws in (drop, keep))
    return Noise(drop, keep[..., None, None].to(dtype))

def batches(stream, c, team, place, device, dtype, device_batch):
    """
    This team's batches from a place in the stream on, as lists of this rank's micro-batches (sequences
    (B, T+1) int64, noise) on the device. A thread makes the next one while this one is used.
    """
    share = c.batch_sequences // team.size

    def make(place):
        def micro(start):
            indices = range(start, start + device_batch)
            tokens = np.stack([stream.sequence(i) for i in indices]).astype(np.int64)
            tensors = torch.from_numpy(tokens), *draw_noise(c, stream.seed, indices, dtype)
            if device.type == "cuda":
                tensors = (tensor.pin_memory() for tensor in tensors)
            sequences, *noise = (tensor.to(device, non_blocking=True) for tensor in tensors)
            return sequences, Noise(*noise)
        first = place + team.rank * share
        return [micro(start) for start in range(first, first + share, device_batch)]

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(make, place)
        for place in itertools.count(place + c.batch_sequences, c.batch_sequences):
            batch, following = following.result(), pool.submit(make, place)
            yield batch


# ---- Schedules ---------------------------------------------------------------------------------------------

class Schedule:
    """
    All that changes with the step. `per_epoch` sequences make an epoch, `steps` batches the run, which may be
    stopped early, at its `end`.
    """

    def __init__(self, c, per_epoch, max_steps=None):
        self.c, self.per_epoch = c, per_epoch
        self.steps = max(1, round(c.epochs * per_epoch / c.batch_sequences))
        self.end = min(self.steps, max_steps or self.steps)

    def epoch(self, step):
        """The epoch in which a step lies, from 1: that of its first sequence. Steps straddle the borders."""
        return step * self.c.batch_sequences // self.per_epoch + 1

    def mode(self, step):
        """How the network is run in a step."""
        c, epoch = self.c, self.epoch(step)
        return Mode(replay=c.replayed is not None and epoch >= c.replay_from,
                    passes=c.passes if step >= c.passes_from * self.steps else 1,
                    stage=sum(start <= epoch for start, *_ in knots(c.window_stages)) - 1)

    def cycle(self, step):
        """How far the step is in its cosine cycle, 0 to 1; None before the last `cycles` epochs."""
        epoch = self.steps / self.c.epochs
        start = self.steps - self.c.cycles * epoch
        return (step - start) % epoch / epoch if self.c.cycles and step >= start else None

    def lr(self, step):
        """Multiplier of all learning rates: flat, then falling; at last a cosine to 0.05 in each epoch."""
        c, left, warmdown = self.c, self.steps - step, round(self.c.warmdown * self.steps)
        base = 1.0 if left >= warmdown else (left / warmdown) ** c.warmdown_power
        if (cycle := self.cycle(step)) is None:
            return c.lr_floor + (1 - c.lr_floor) * base
        return 0.05 + (max(base, 0.05) - 0.05) * (1 + math.cos(math.pi * cycle)) / 2

    def weight_decay(self, step):
        """
        Multiplier of the decay: of antiphase 1 to 40% of the run, down to 0.65, in each cycle from 0.65 to
        1.5; of knots, linear between them.
        """
        if self.c.wd_schedule == "constant":
            return 1.0
        if self.c.wd_schedule != "antiphase":
            epochs, multipliers = zip(*knots(self.c.wd_schedule))
            steps = [round(epoch * self.steps / self.c.epochs) for epoch in epochs]
            return float(np.interp(step, steps, multipliers))
        if (cycle := self.cycle(step)) is not None:
            return 0.65 + 0.85 * cycle
        t, end = step / self.steps, 1 - self.c.cycles / self.c.epochs
        return 1.0 if t <= 0.4 else 1 - 0.35 * min(1.0, (t - 0.4) / (end - 0.4))

    def momentum(self, step):
        """Muon's momentum warms up from 0.85 to 0.95."""
        return 0.85 + 0.10 * min(step / self.c.momentum_warmup, 1) if self.c.momentum_warmup else 0.95

    def ahead(self, step):
        """Weights of the head's predictions 1, 2 and 3 tokens ahead: 0.25 falls to 0 first, then 0.5."""
        if self.c.mtp != "head":
            return (1.0,)
        left = 2 - 2 * step / self.steps / self.c.mtp_until  # halves of the annealing that are left
        weights = (1.0, 0.5 * min(max(left, 0), 1), 0.25 * max(left - 1, 0))
        return tuple(weight for weight in weights if weight)

    def average(self, step):
        """The share that the weights after this step take in their running average; 0: they are left out."""
        c, done, last = self.c, step + 1, step + 1 == self.steps
        if c.average_kind == "weights":
            ends = [min(self.steps, -(-epoch * self.per_epoch // c.batch_sequences))
                    for epoch in range(c.epochs - c.average + 1, c.epochs + 1)]
            n = sorted(set(ends)).index(done) + 1 if done in ends else 0  # the n-th that is averaged
            return 0.0 if n < 1 else 2 / (n + 1) if c.average_weights == "recency" else 1 / n
        if c.average_kind == "ema" and step % 10 == 0:  # 0.15 of the average is older than an epoch; debiased
            kept, n = 0.15 ** (10 * c.epochs / self.steps), step // 10 + 1
            return (1 - kept) / (1 - kept ** n)
        if c.average_kind == "blend" and done >= (start := round(0.9 * self.steps)):
            first = -(-start // 10) * 10
            begins = done == first or last and done < first
            share = 1.0 if begins else 0.0 if done % 10 or done < first else 0.05
            return 1 - (1 - c.keep_final) * (1 - share) if last else share
        return 0.0

    def training_flops(self, vocab_size):
        """The counted operations of the run."""
        modes = [self.mode(step) for step in range(self.end)]
        per_token = {mode: flops_per_token(self.c, vocab_size, mode) for mode in set(modes)}
        return self.c.batch_tokens * sum(per_token[mode] for mode in modes)


# ---- Scoring and ensembles ---------------------------------------------------------------------------------

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

class Member(NamedTuple):
    """A model of a predictor: its checkpoint, how it is run, its own loss, and its weight in the mixture."""
    checkpoint: str
    sha256: str      # of the checkpoint
    scores: str      # sha256 of the file of its targets' log-probabilities
    mode: Mode
    val_loss: float
    weight: float = 1.0

def read_member(record):
    """The Member that a JSON object describes."""
    return Member(**record | {"mode": Mode(*record["mode"])})

def select_weights(fitness, top):
    """
    Log-probabilities (M, n) that M members give the fitness tokens -> the weights (M,) of the mixture that
    predicts them best, found by 300 steps of gradient descent on their softmax; only the `top` largest stay.
    """
    probabilities = torch.from_numpy(fitness).exp()
    generator = torch.Generator().manual_seed(0)
    alpha = (1e-4 * torch.randn(len(fitness), generator=generator)).to(probabilities.dtype).requires_grad_()
    optimizer = torch.optim.AdamW([alpha], lr=0.5, weight_decay=0.0)
    for _ in range(300):
        loss = -(alpha.softmax(0) @ probabilities).clamp_min(1e-12).log().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([alpha], 1.0)
        optimizer.step()
    weights = alpha.detach().softmax(0)
    weights[weights.argsort(descending=True, stable=True)[top:]] = 0
    return (weights / weights.sum()).tolist()

def members_of(c, folder, count):
    """What a run predicts with: late epochs of its one model (#12), or its first `count` members."""
    found = [read_member(json.loads(path.read_text())) for path in sorted(folder.glob("*_????.json"))]
    if c.members == 1:
        found = found[-c.average if c.average_kind == "probs" else -1:]
    else:
        found = found[1 if c.drop_first and count > 1 else 0:count]
    recency = c.members == 1 and c.average_weights == "recency"
    weights = [n if recency else 1 for n in range(1, len(found) + 1)]
    if c.top and count == c.members > 1:
        weights = select_weights(np.stack([logprobs(folder, member, "fitness") for member in found]), c.top)
    return [member._replace(weight=weight / sum(weights)) for member, weight in zip(found, weights) if weight]

def logprobs(folder, member, split):
    """What a member gave the split's targets, from the scores beside its checkpoint: (n * T,) float64."""
    path = folder / member.checkpoint.replace(".pt", ".npz")
    check_digest(path, member.scores)
    return np.load(path)[split].ravel().astype(np.float64)

def check_digest(path, sha256):
    if not path.exists() or not path.stat().st_size or digest(np.memmap(path, mode="r")) != sha256:
        fail(f"{path} is missing or damaged: it does not have the digest it was saved with")

def mixture(parts):
    """[(weight, log-probabilities)], one held at a time -> those of the weighted mean, each one's loss."""
    total, losses = -np.inf, []
    for weight, logp in parts:
        losses.append(-logp.mean())
        total = np.logaddexp(total, logp + math.log(weight))
    return total, losses

class Predictor:
    """What a run predicts with, for records/ruler.py: `logprobs(tokens)` is its interface."""

    def __init__(self, run_dir, device):
        self.folder, self.device = Path(run_dir) / "checkpoints", torch.device(device)
        self.loaded, self.verified = None, set()
        spec = json.loads((self.folder / "predictor.json").read_text())
        self.c, self.vocab_size = Config(**spec["config"]), spec["vocab_size"]
        self.members = [read_member(record) for record in spec["members"]]
        self.model = frozen(make_model(self.c, self.vocab_size, self.device, getattr(torch, spec["dtype"])))

    def load(self, member):
        """The model with the member's weights, whose file must have its digest when it is read first."""
        if self.loaded != member.checkpoint:
            path = self.folder / member.checkpoint
            if path not in self.verified:
                check_digest(path, member.sha256)
                self.verified.add(path)
            load_weights(self.model, path)
            self.loaded = member.checkpoint
        return self.model

    @torch.no_grad()
    def logprobs(self, tokens, mix=None):
        """tokens (B, T) int64 -> (B, T, V) float32: position t has the log-probabilities of token t+1."""
        mixed, by_logits = None, (mix or self.c.mix) == "logits"
        for member in self.members:
            model = self.load(member)
            z = model.logits(model.trunk(tokens.to(self.device), member.mode)[0])
            part = z * member.weight if by_logits else z.log_softmax(-1) + math.log(member.weight)
            mixed = part if mixed is None else mixed + part if by_logits else torch.logaddexp(mixed, part)
        return mixed.log_softmax(-1) if by_logits else mixed

    def score(self, sequences, batch, team, mix=None):
        """-> (log-probabilities of the targets of sequences (n, T+1), the loss of each member)."""
        if (mix or self.c.mix) == "logits":
            pick = lambda part: self.logprobs(part[:, :-1], mix).gather(-1, part[:, 1:, None])[..., 0]
            return log_likelihoods(pick, sequences, batch, team, self.device), []
        parts = ((m.weight, log_likelihoods(lambda part: self.load(m).target_logprobs(part, m.mode),
                                            sequences, batch, team, self.device)) for m in self.members)
        return mixture(parts)

load_predictor = Predictor


# ---- The run folder ----------------------------------------------------------------------------------------

def make_model(c, vocab_size, device, dtype):
    """A model without values. The embedding has the compute dtype, and so the stream; the rest is float32."""
    with torch.device("meta"):
        model = GPT(c, vocab_size)
    model = model.to_empty(device=device)
    for table in (model.embed, *([model.value_tables] if c.values == "table" else [])):
        table.data = table.data.to(dtype)
    return model

def frozen(model):
    """A copy of a model that has its matrices in the compute dtype, as they are used, and no gradients."""
    dtype = lambda p: model.embed.dtype if p.dim() > 1 else p.dtype
    values = {id(p): nn.Parameter(p.detach().to(dtype(p), copy=True), False) for p in model.parameters()}
    return copy.deepcopy(model, values)  # which has no need to copy what is in `values`

def save_weights(model, path):
    """Writes the weights as they are used; -> the file's digest."""
    return write_atomic(path, lambda file: torch.save(frozen(model).state_dict(), file))

@torch.no_grad()
def load_weights(model, path):
    weights = torch.load(path, map_location=model.embed.device, mmap=True, weights_only=True)
    for name, p in model.named_parameters():
        p.copy_(weights[name])

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
        raise error.__context__ if isinstance(error.__context__, OSError) else error

def write_json(path, value):
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))

class RunLog:
    """
    The run folder's text: console and log.txt, metrics.jsonl, loss.svg. Every rank keeps the metrics, the
    first of its team writes them; further teams write files of their own, and nothing to the console.
    """

    def __init__(self, folder, title, wandb_settings, team):
        self.folder, self.title, self.wandb, self.team = folder, title, None, team
        self.main, self.suffix = team.rank == 0, f"_{team.index}" * (team.index > 0)
        self.metrics, self.plotted = {"step": [], "eval": [], "ensemble": [], "final": []}, -math.inf
        if self.main and not team.index and not (folder / "log.txt").exists():
            write_atomic(folder / "train_gpt.py", lambda file: file.write(SOURCE))
            head = f"source train_gpt.py {len(SOURCE)} bytes sha256 {SOURCE_SHA256}\n".encode()
            write_atomic(folder / "log.txt", lambda file: file.write(head + SOURCE + b"\n"))
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
                tqdm.write(text)

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
                file.truncate(size)
        dist.barrier(group=self.team.group)
        for line in path.read_text().splitlines():
            values = json.loads(line)
            self.metrics[values.pop("kind")].append(values)

    def plot(self, final=None):
        """loss.svg, at most once a minute: the training loss, its running mean, and the validation losses."""
        if not self.main or self.team.index or final is None and time.monotonic() < self.plotted + 60:
            return
        self.plotted = time.monotonic()
        import matplotlib
        matplotlib.use("svg")
        from matplotlib import pyplot as plt
        y = np.array([m["loss"] for m in self.metrics["step"]])
        width = max(1, len(y) // 50)
        mean = np.convolve(y, np.ones(width) / width, "valid")
        with plt.rc_context({"svg.hashsalt": "slowrun", "font.size": 9}):
            figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
            axes.plot(y, color="0.85", linewidth=0.7, label="training")
            axes.plot(np.arange(width - 1, len(y)), mean, label=f"mean of {width} steps")
            for kind, style, label in ("eval", "C1o-", "validation"), ("ensemble", "C2s-", "members so far"):
                if rows := self.metrics[kind]:
                    axes.plot(*zip(*((m["at"], m["loss"]) for m in rows)), style, markersize=3, label=label)
            if final is not None:
                axes.axhline(final, color="C3", linestyle="--", label=f"final predictor {final:.4f}")
            low = min(*(m["loss"] for m in self.metrics["eval"]), *y[len(y) // 2:], final or math.inf)
            axes.set(title=self.title, xlabel="step", ylabel="nats per token", ylim=(low - 0.1, low + 2.5))
            axes.legend(frameon=False)
            write_atomic(self.folder / "loss.svg",
                         lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
            plt.close(figure)

class Keeper:
    """
    The states from which a team can go on: state/step_NNNNNNN/, the newest two. Each rank writes its part of
    a copy, in the background and under a temporary name; when all is on the disk, the first rank adds the
    progress and the digests and renames the folder.
    """

    def __init__(self, log, optimizer, team):
        self.folder, self.log = log.folder / f"state{log.suffix}", log
        self.optimizer, self.team = optimizer, team
        self.writer, self.writing, self.saved_at = ThreadPoolExecutor(1), None, time.monotonic()
        on_main(team, self.clear)

    def clear(self):
        self.folder.mkdir(exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            shutil.rmtree(leftover)

    def save(self, progress):
        """Copies the state and begins to write it, with a dictionary for JSON, after the one before."""
        self.wait()
        inner = io.BytesIO()
        torch.save(self.optimizer.inner_states(), inner)
        self.writing = self.writer.submit(self.write, self.optimizer.shards(), inner.getvalue(), progress)
        self.saved_at = time.monotonic()

    def write(self, shards, inner, progress):
        """In the writer's thread. The save ends on the first rank when all ranks' parts are on the disk."""
        temporary = self.folder / f"step_{progress['updates']:07d}.tmp"
        temporary.mkdir(exist_ok=True)
        (temporary / f"inner_{self.team.rank}.pt").write_bytes(inner)
        dcp.save(shards, checkpoint_id=temporary, process_group=self.team.side)
        if self.team.rank == 0:
            write_json(temporary / "progress.json", progress)
            digests = {file.name: digest(np.memmap(file, mode="r")) for file in temporary.iterdir()}
            write_json(temporary / "manifest.json", digests)
            temporary.rename(temporary.with_suffix(""))
            for old in sorted(self.folder.glob("step_???????"))[:-2]:
                shutil.rmtree(old)

    def wait(self):
        """Until the state that is being written is on the disk; raises what went wrong."""
        if self.writing is not None:
            self.writing.result()

    def restore(self):
        """Loads the newest sound state in place; -> its progress, or None where there is no state."""
        path, progress = on_main(self.team, self.newest)
        if path:
            shards = self.optimizer.shards()
            dcp.load(shards, checkpoint_id=path, process_group=self.team.side)
            for i, group in enumerate(self.optimizer.groups):
                group.load(shards[f"{i}"])
            if inner := self.optimizer.inner_states():
                if progress["ranks"] != self.team.size:
                    fail(f"the state of this optimizer goes on only on its {progress['ranks']} ranks")
                saved = torch.load(path / f"inner_{self.team.rank}.pt", weights_only=True)
                for i in inner:
                    self.optimizer.groups[i].inner.load_state_dict(saved[i])
        return progress

    def newest(self):
        """The newest sound state and its progress. Those that are not sound are named and removed."""
        for path in sorted(self.folder.glob("step_???????"), reverse=True):
            try:
                for name, expected in json.loads((path / "manifest.json").read_text()).items():
                    if digest(np.memmap(path / name, mode="r")) != expected:
                        raise ValueError(f"{name} does not have its digest")
                return path, json.loads((path / "progress.json").read_text())
            except (OSError, ValueError) as error:
                self.log(f"state  {path.name} is unsound: {error}; going back to the one before it")
                shutil.rmtree(path)
        return None, None

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

def run_folders(track):
    """[(folder, run.json)] of the track's runs, the newest last."""
    runs = [(path.parent, json.loads(path.read_text())) for path in (ROOT / "runs").glob("*/run.json")]
    return sorted((run for run in runs if run[1]["track"] == track), key=lambda run: run[1]["started"])

def unfinished(folder):
    return not (folder / "result.json").exists()

def find_run(args):
    """What --resume names: the folder of an unfinished run, and its run.json."""
    runs = [run for run in run_folders(args.track) if unfinished(run[0])]
    named = [run for run in runs if args.resume in ("newest", run[0].name)]
    if not named and (ROOT / "runs" / args.resume / "result.json").exists():
        fail(f"the run {args.resume} is complete: see runs/{args.resume}/result.json")
    return named[-1] if named else fail(f"{args.track} has no unfinished run to resume ({args.resume})")

def open_run(run, args):
    """
    -> the run's folder, locked, and its run.json: a new one, or with --resume that of an unfinished run,
    which must be the same. When torchrun has restarted the ranks because one was lost, their run goes on.
    """
    launch = f"{os.environ.get('TORCHELASTIC_RUN_ID')} on {platform.node()} by {os.getppid()}"
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    own = [folder for folder, old in run_folders(args.track) if restarted and old["launch"] == launch]
    if own:
        folder = own[-1] if unfinished(own[-1]) else sys.exit()  # a rank was lost after the end
    elif args.resume:
        folder = ROOT / "runs" / args.resume
    else:
        if run["teams"] > run["config"]["members"]:
            fail(f"--ranks-per-member {args.ranks_per_member} makes {run['teams']} teams for fewer --members")
        name = args.run_name or f"{args.track}_{datetime.now():%Y%m%d-%H%M%S}_s{args.seed}"
        folder = ROOT / "runs" / name
        if any(path.name not in ("checkpoints", "run.json.tmp") for path in folder.glob("*")):
            fail(f"the run runs/{name} exists already; choose another --run-name, or --resume {name}")
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", run | {"started": time.time(), "launch": launch})
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)  # never closed: held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is training in runs/{folder.name}; stop it first")
    before = json.loads((folder / "run.json").read_text())
    changed = [f"{name} was {before[name]}, is {run[name]}" for name in run if before[name] != run[name]
               and name not in ("config", "source_sha256")]
    if before["source_sha256"] != SOURCE_SHA256 and not args.resume_anyway:
        changed.append("train_gpt.py was edited since (--resume-anyway accepts that)")
    if changed:
        fail(f"the run {folder.name} cannot go on as another one: {'; '.join(changed)}")
    edited = before.get("edited", False) or before["source_sha256"] != SOURCE_SHA256
    before |= {"launch": launch, "edited": edited}
    write_json(folder / "run.json", before)
    return folder, before


# ---- The training loop -------------------------------------------------------------------------------------

class StopSignal:
    """
    Set by the signals that schedulers and people send: the step is finished, the state saved, the run ends
    with code 75. A second Ctrl-C, more than a second after the first, quits at once.
    """

    def __init__(self):
        self.name, self.at = None, 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.name and number == signal.SIGINT and time.monotonic() > self.at + 1:
            os._exit(128 + number)
        self.name, self.at = self.name or signal.Signals(number).name, time.monotonic()

class Report:
    """A step's loss, |gradient|^2 and flags, summed over the team; read a step later, when it is there."""

    def __init__(self, step, values, team):
        self.step, self.values, self.copied = step, torch.stack(values), None
        dist.all_reduce(self.values, group=team.group)
        if self.values.is_cuda:
            host = torch.empty_like(self.values, device="cpu", pin_memory=True)
            self.values, self.copied = host.copy_(self.values, non_blocking=True), torch.cuda.Event()
            self.copied.record()

    def read(self):
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()

def member_schedule(c, tokens, team, member, max_steps=None):
    """The schedule of one of the run's members on these tokens, and in it the member's configuration."""
    links = -(-c.members // team.teams)
    return Schedule(c.member(member // team.teams, links), len(tokens) // (c.seq_len + 1), max_steps)

class Training:
    """What a team trains with, and what it does between the steps. `progress` is what a state remembers."""

    def __init__(self, c, args, data, log, team, device, dtype, stop):
        self.c, self.args, self.data, self.log, self.team, self.stop = c, args, data, log, team, stop
        self.device, self.dtype, self.folder = device, dtype, log.folder / "checkpoints"
        self.started, self.pulsed = time.time(), -math.inf
        self.seen = [deque(maxlen=11) for _ in range(team.teams)]  # what pulse() saw of the other teams
        self.schedules = [member_schedule(c, data.splits["train"], team, member, args.max_steps)
                          for member in range(c.members)]
        self.own = range(team.index, c.members, team.teams)  # the members that this team trains
        self.model = make_model(c, data.vocab_size, device, dtype)
        self.model.checkpointing = args.checkpointing
        initialise(self.model, c, args.seed)
        self.teacher = frozen(self.model) if c.distill else None
        self.optimizer = Optimizer(self.model, c, dtype, team)
        self.keeper = Keeper(log, self.optimizer, team)
        first = self.schedules[team.index]
        flops = sum(self.schedules[member].training_flops(data.vocab_size) for member in self.own)
        log(f"plan   {self.model.parameter_count():,} parameters, {c.epochs} epochs of "
            f"{first.per_epoch * c.seq_len:,} tokens, {first.steps} steps of {c.batch_tokens:,}, "
            f"{flops:.3g} FLOPs")
        self.warm_up()
        self.progress = self.keeper.restore() or dict(member=team.index, step=0, updates=0, metrics_bytes=0,
                                                      train_seconds=0.0, wall_seconds=0.0)
        self.progress["ranks"] = team.size
        self.wall_before = self.progress["wall_seconds"]
        log.rewind(self.progress["metrics_bytes"])

    def warm_up(self):
        """Compiles every variant of the model on throw-away data, so that training time holds none of it."""
        c, batch = self.c, self.args.device_batch
        sequences = torch.zeros(batch, c.seq_len + 1, dtype=torch.int64, device=self.device)
        noise = Noise(*(part.to(self.device) for part in draw_noise(c, 0, range(batch), self.dtype)))
        variants = {(s.mode(step), len(s.ahead(step)), s.c.distill > 0)
                    for s in (self.schedules[member] for member in self.own) for step in range(s.end)}
        for mode, ahead, taught in sorted(variants):
            lesson = self.teacher.teach(sequences, mode) if taught else None
            self.model.loss(sequences, mode, noise, c.batch_sequences, (1.0,) * ahead, lesson)[0].backward()
            frozen(self.model).target_logprobs(sequences, mode)
        for p in self.model.parameters():
            p.grad.zero_()

    def begin(self, member):
        """Makes the weights that a member starts from: new ones, or the perturbed ones of the one before."""
        c, link = self.c, member // self.team.teams
        seed = self.args.seed + (self.team.index if c.restarts else member)
        if self.progress["step"] == 0 and c.restarts and link:
            perturb(self.model, c, seed, link, len(self.own))
        elif self.progress["step"] == 0:
            initialise(self.model, c, seed)
            self.optimizer.reset()
            start = self.evaluate(member, 0, 0, self.schedules[member].mode(0))[0]
            self.log(f"start  val {start.loss:.4f} before training")
        return seed

    def load_teacher(self, member):
        """The member before in the chain becomes the teacher; -> how it is run."""
        record = self.folder / f"member_{member - self.team.teams:04d}.json"
        if not record.exists():
            fail(f"{record} is missing: it belongs to the teacher of member {member}")
        before = read_member(json.loads(record.read_text()))
        check_digest(path := self.folder / before.checkpoint, before.sha256)
        load_weights(self.teacher, path)
        return before.mode

    def likelihoods(self, split, mode):
        model = frozen(self.model)  # so that no batch casts the weights anew

        def scorer(part):
            self.pulse()
            return model.target_logprobs(part, mode)

        sequences = self.data.sequences(split, self.c.seq_len)
        return log_likelihoods(scorer, sequences, self.args.device_batch, self.team, self.device)

    def evaluate(self, member, step, epoch, mode):
        """-> (the Score on val, the log-probabilities that it comes from)."""
        logp = self.likelihoods("val", mode)
        result = score(self.data, "val", self.c.seq_len, logp)
        self.check_finite("val loss", result.loss, step)
        self.log.metric("eval", member=member, step=step, epoch=epoch, split="val", loss=result.loss,
                        bpb=result.bpb)
        return result, logp

    def check_finite(self, what, value, step):
        if not math.isfinite(value):
            kept = sorted(path.name for path in self.folder.glob("*.pt"))
            quit_run(3, f"the {what} is {value} at step {step}; the last good checkpoint is "
                        f"{kept[-1] if kept else 'none'} in runs/{self.log.folder.name}")

    def keep(self, name, mode, val, others=True):
        """Files the model as a member of the predictor, with what it gives the targets of val and others."""
        scores = {"val": val.astype(np.float32)}
        for split in ["audit"] + ["fitness"] * (self.c.top > 0) if others else []:
            scores[split] = self.likelihoods(split, mode).astype(np.float32)
        if self.log.main:
            sha256 = save_weights(self.model, self.folder / f"{name}.pt")
            scored = write_atomic(self.folder / f"{name}.npz", lambda file: np.savez(file, **scores))
            loss = -scores["val"].mean(dtype=float)
            member = Member(f"{name}.pt", sha256, scored, mode, loss)
            write_json(self.folder / f"{name}.json", member._asdict())
            if self.c.members == 1:
                self.write_predictor(1)
        dist.barrier(group=self.team.group)

    def write_predictor(self, count):
        """Says in predictor.json what the first `count` members predict with; -> them, weighted."""
        members = members_of(self.c, self.folder, count)
        spec = {"config": dataclasses.asdict(self.c), "vocab_size": self.data.vocab_size,
                "dtype": str(self.dtype)[6:], "members": [member._asdict() for member in members]}
        write_json(self.folder / "predictor.json", spec)
        return members

    def discard(self, files):
        """Removes members that are no part of the predictor."""
        for path in files if self.log.main else ():
            for suffix in (".pt", ".npz", ".json"):  # what has its .json is found again
                path.with_suffix(suffix).unlink(missing_ok=True)

    def wall_seconds(self):
        return self.wall_before + time.time() - self.started

    def save_state(self):
        with open(self.log.folder / f"metrics{self.log.suffix}.jsonl", "a") as file:
            os.fsync(file.fileno())
            now = {"metrics_bytes": file.tell(), "wall_seconds": self.wall_seconds()}
            self.keeper.save(self.progress | now)

    def leave(self):
        """Ends the run because a signal has come."""
        self.keeper.wait()
        dist.barrier(group=self.team.group)
        quit_run(75, f"stopped by a signal after step {self.progress['step'] - 1}; to go on: ./run.sh "
                     f"{self.args.track} --resume {self.log.folder.name}")

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
            path = self.log.folder / f"metrics{f'_{index}' * (index > 0)}.jsonl"
            last = range(index, self.c.members, len(self.seen))[-1]
            if index == self.team.index:
                path.touch()
            elif not (self.folder / f"member_{last:04d}.json").exists():
                seen.append(path.exists() and path.stat().st_mtime_ns)
                if seen.count(seen[-1]) == seen.maxlen:
                    self.log(f"team {index} of {len(self.seen)} does not answer")
                    raise RuntimeError("Application timeout between teams")

    def wait_for_teams(self, count):
        """Until there are the first `count` members. All ranks see a signal that came to one."""
        while True:
            self.pulse()
            missing = not all((self.folder / f"member_{n:04d}.json").exists() for n in range(count))
            flags = torch.tensor([missing, self.stop.name is not None], dtype=torch.float32)
            dist.all_reduce(flags, group=self.team.side)
            if flags[1]:
                self.leave()
            if not flags[0]:
                return
            time.sleep(0.1)

def train(t):
    """Trains the team's members, one after another, or goes on with them."""
    c, args, team, log, progress, optimizer = t.c, t.args, t.team, t.log, t.progress, t.optimizer
    if progress["updates"]:
        minutes = progress["train_seconds"] / 60
        log(f"resume at step {progress['step']}, after {minutes:.1f} minutes of training")
    gc.collect()
    gc.freeze()  # what lives now lives to the end: the collector need not walk it at every pass
    place = 0  # in the stream: fresh members read it from its start, snapshots where the one before has ended
    for member in t.own:
        schedule = t.schedules[member]
        cm, steps = schedule.c, schedule.end
        start, place = place, place + c.restarts * steps * cm.batch_sequences
        if member < progress["member"]:
            continue
        if member > progress["member"]:
            progress |= {"member": member, "step": 0}
        first, last, report = progress["step"], schedule.epoch(steps - 1), None
        seed, seconds_before = t.begin(member), progress["train_seconds"]
        teacher_mode = t.load_teacher(member) if cm.distill else None
        stream = Stream(t.data.splits["train"], t.data.documents("train"), c, seed)
        supply = batches(stream, cm, team, start + first * cm.batch_sequences, t.device, t.dtype,
                         args.device_batch)
        bar = tqdm(initial=first, total=steps, unit="step", file=sys.stdout, dynamic_ncols=True,
                   disable=not (log.main and team.index == 0 and sys.stdout.isatty()))

        def settle(report):
            """Reads and logs a step's report; -> (is a state due, has a signal come)."""
            loss, squares, save_due, stopping = report.read()
            step, seconds = report.step, progress["train_seconds"]
            t.check_finite("training loss", loss, step)
            t.check_finite("gradient", squares, step)
            log.metric("step", member=member, step=step, loss=loss, grad_norm=squares ** 0.5,
                       lr=schedule.lr(step), weight_decay=schedule.weight_decay(step),
                       seconds=round(seconds, 3))
            log(f"step   {step + 1:5d}/{steps}  train {loss:.4f}  {seconds:.1f} s", console=False)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            if step == first + 9:
                minutes = (seconds - seconds_before) / 10 * (steps - first) / 60
                log(f"       about {minutes:.1f} minutes of training expected")
            return save_due, stopping

        for step in range(first, steps):
            began, epoch, mode = time.perf_counter(), schedule.epoch(step), schedule.mode(step)
            loss = torch.zeros((), device=t.device)
            for n, (sequences, noise) in enumerate(batch := next(supply), 1):
                t.pulse()
                if n == len(batch):
                    optimizer.expect()
                lesson = t.teacher.teach(sequences, teacher_mode) if cm.distill else None
                total, plain = t.model.loss(sequences, mode, noise, cm.batch_sequences, schedule.ahead(step),
                                            lesson)
                total.backward()
                loss += plain
            progress |= {"step": step + 1, "updates": progress["updates"] + 1}
            squares = optimizer.step(schedule.lr(step), schedule.weight_decay(step), schedule.momentum(step),
                                     progress["updates"] if c.restarts else step + 1, schedule.average(step))
            # One message tells all ranks the loss, the gradient's norm, and whether one should save or stop.
            save_due = time.monotonic() > t.keeper.saved_at + 60 * args.save_every
            flags = loss.new_tensor((save_due, t.stop.name is not None))
            report, earlier = Report(step, (loss, squares, *flags), team), report
            save_due, stopping = settle(earlier) if earlier else (False, False)
            ends_epoch = schedule.epoch(step + 1) > epoch or step + 1 == steps
            if pause := ends_epoch or save_due or stopping:
                report.read()  # waits for the device
            progress["train_seconds"] += time.perf_counter() - began
            if pause:
                stopping, report = settle(report)[1] or stopping, None
            if ends_epoch:
                result, val = t.evaluate(member, step + 1, epoch, mode)
                if c.members == 1:
                    averaged = c.average if c.average_kind == "probs" else 0
                    t.keep(f"epoch_{epoch:04d}", mode, val, others=epoch > last - averaged)
                    t.discard(sorted(t.folder.glob("epoch_*.json"))[:-max(1, averaged)])
                losses = [m["loss"] for m in log.metrics["step"][-schedule.steps:]
                          if m["member"] == member and schedule.epoch(m["step"]) == epoch]
                speed = (step + 1 - first) * cm.batch_tokens / (progress["train_seconds"] - seconds_before)
                log(f"epoch  {epoch:3d}/{cm.epochs}  step {step + 1:5d}  train {np.mean(losses):.4f}  "
                    f"val {result.loss:.4f}  {result.bpb:.4f} bpb  {progress['train_seconds'] / 60:.1f} min  "
                    f"{speed:,.0f} tok/s")
                log.plot()
            if pause:
                t.save_state()
            if stopping and not (step + 1 == steps and member + team.teams >= c.members):
                t.leave()
        bar.close()
        supply.close()
        t.keeper.wait()
        if c.members > 1 or c.average_kind != "probs":
            if any(map(schedule.average, range(steps))):
                optimizer.take_average()
            mode = schedule.mode(steps - 1)
            result, val = t.evaluate(member, steps, last, mode)
            t.keep(f"member_{member:04d}", mode, val)
            t.discard(t.folder.glob("epoch_*.json"))
        if c.members > 1 and team.index == 0:
            t.wait_for_teams(count := min(member + team.teams, c.members))
            if log.main:
                so_far = t.write_predictor(count)
                logp, _ = mixture((m.weight, logprobs(t.folder, m, "val")) for m in so_far)
                log.metric("ensemble", member=member, step=steps, members=len(so_far), loss=-logp.mean())
                log(f"member {member + 1:3d}/{c.members}  val {result.loss:.4f}  "
                    f"the {len(so_far)} members so far {-logp.mean():.4f}")
                log.plot()
    if team.index:
        t.wait_for_teams(c.members)  # in case that another hangs: torchrun would not end it

def finish(t, run):
    """Scores the final predictor, writes what the run leaves behind, prints the final table."""
    c, args, data, log, team, folder = t.c, t.args, t.data, t.log, t.team, t.folder
    dist.barrier(group=team.group)  # the first rank has written predictor.json
    members, mixed = members_of(c, folder, c.members), {}
    predictor = Predictor(log.folder, t.device) if c.mix == "logits" else None
    for split in ("val", "audit"):
        if predictor:
            sequences = data.sequences(split, c.seq_len)
            mixed[split], _ = predictor.score(sequences, args.device_batch, team)
        elif log.main:
            mixed[split], _ = mixture((m.weight, logprobs(folder, m, split)) for m in members)
    if not log.main:
        return
    scores = {split: score(data, split, c.seq_len, mixed[split]) for split in mixed}
    totals = {f"{split}_{name}": getattr(scores[split], name) for split in scores for name in ("loss", "bpb")}
    r = {
        "track": args.track, "seed": args.seed, "config": dataclasses.asdict(c), **totals,
        "members": [{"checkpoint": m.checkpoint, "weight": m.weight, "val_loss": m.val_loss}
                    for m in members],
        "parameters": t.model.parameter_count(),
        "tokens_seen": sum(s.end * s.c.batch_tokens for s in t.schedules),
        "training_flops": sum(s.training_flops(data.vocab_size) for s in t.schedules),
        "train_seconds": t.progress["train_seconds"], "wall_seconds": t.wall_seconds(),
        "gpu_seconds": t.progress["train_seconds"] * dist.get_world_size(),
        **{name: run[name] for name in ("machine", "data")}, "source_sha256": SOURCE_SHA256,
        "val_evaluations": 1 + sum(json.loads(row)["kind"] in ("eval", "ensemble")
                                   for path in log.folder.glob("metrics*.jsonl") for row in path.open()),
        "date": f"{datetime.now():%Y-%m-%d}",
    }
    field, cap = CAPS.get(args.track, ("training_flops", math.inf))
    dataset = TRACKS[args.track].get("dataset", Config.dataset)
    r["violations"] = [reason for reason, broken in {
        f"{field} {r[field]:.4g} is over the track's cap of {cap:.4g}": r[field] > cap,
        "stopped early by --max-steps": any(s.end < s.steps for s in t.schedules),
        f"trained on {data.name}, not on the track's {dataset}": data.name != dataset,
        "train_gpt.py was edited while it ran": run["edited"],
    }.items() if broken]
    r["complete"] = True
    log.metric("final", step=t.schedules[-1].end, **totals)
    log.plot(final=r["val_loss"])
    documents = {f"{split}_{name}": values for split in scores
                 for name, values in scores[split].documents.items()}
    write_atomic(log.folder / "doc_losses.npz", lambda file: np.savez_compressed(file, **documents))
    write_json(log.folder / "result.json", r)
    for state in log.folder.glob("state*"):
        shutil.rmtree(state)
    log("\n" + "\n".join(f"{name:<12} {text}" for name, text in [
        ("val loss", f"{r['val_loss']:.4f}   ({r['val_bpb']:.4f} bits per byte)"),
        ("audit loss", f"{r['audit_loss']:.4f}   ({r['audit_bpb']:.4f} bits per byte)"),
        *(("  member", f"{m['val_loss']:.4f}   val loss of {m['checkpoint']}, weight {m['weight']:.3f}")
          for m in r["members"]),
        ("training", f"{r['train_seconds'] / 60:.1f} min of {r['wall_seconds'] / 60:.1f} min in all"),
        ("compute", f"{r['training_flops']:.4g} FLOPs, {r['tokens_seen']:,} tokens, "
                    f"{r['parameters']:,} parameters"),
        *(("no record", reason) for reason in r["violations"]),
        ("run", f"runs/{log.folder.name}/  (loss.svg, result.json, log.txt)"),
    ]))

def score_again(args, device, team):
    """--eval: scores a run, complete or not, from the checkpoints it has so far."""
    folder = ROOT / "runs" / args.eval
    if not (folder / "checkpoints" / "predictor.json").exists():
        fail(f"there is no checkpoint in runs/{args.eval}; the runs are in runs/")
    predictor = Predictor(folder, device)
    c = predictor.c
    data = Dataset(args.data or ROOT / "data" / c.dataset, f"./run.sh data {c.dataset}")
    batch = args.device_batch or max(1, 16384 // c.seq_len)
    result = folder / "result.json"
    stated = json.loads(result.read_text()) if result.exists() else {}
    for split in [args.split] if args.split else ["val", "audit"]:
        if split not in data.splits:
            data.splits[split] = data.open(Path(split))
        logp, losses = predictor.score(data.sequences(split, c.seq_len), batch, team, args.mix)
        total = score(data, split, c.seq_len, logp)
        if dist.get_rank() == 0:
            for m, loss in zip(predictor.members, losses):
                print(f"  {loss:.6f}   {m.checkpoint}, weight {m.weight:.3f}, {m.mode}")
            said = f"; result.json says {stated[f'{split}_loss']:.6f}" if f"{split}_loss" in stated else ""
            print(f"{split} loss {total.loss:.6f} ({total.bpb:.6f} bits per byte), {len(predictor.members)} "
                  f"checkpoint(s), mixed by {args.mix or c.mix}{said}")


# ---- main --------------------------------------------------------------------------------------------------

def make_parser():
    """The command line: what a run does, and every field of Config."""
    layout, switch = argparse.RawDescriptionHelpFormatter, argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see ./run.sh --help and ./run.sh nano --help")
    add = parser.add_argument
    add("--track", default="nano", help=f"the preset: {', '.join(TRACKS)} (default nano)")
    add("--config", metavar="FILE", help="a JSON file of fields that override the track's")
    add("--seed", type=int, help="of initialisation, data order and dropout (default 42)")
    add("--run-name", help="the folder under runs/ (default: track, date, time and seed)")
    add("--data", metavar="DIR", help="the dataset's folder (default: data/ and the name of the dataset)")
    add("--device-batch", type=int, metavar="B", help="sequences per rank and micro-step (fits 80 GB)")
    add("--ranks-per-member", type=int, metavar="N", help="ranks that train a member together (default all)")
    add("--checkpointing", action=switch, default=False, help="save memory: compute blocks twice")
    add("--dtype", choices=("bfloat16", "float32"), help="of the products (default: bfloat16 if in hardware)")
    add("--compile", action=switch, default=True, help="compile the blocks (default yes)")
    add("--resume", nargs="?", const="newest", metavar="RUN", help="go on with a run (default the newest)")
    add("--resume-anyway", action="store_true", help="even if train_gpt.py was edited since")
    add("--save-every", type=float, default=5, metavar="MIN", help="minutes between states (default 5)")
    add("--timeout", type=float, default=10, metavar="MIN", help="that ranks wait for another (default 10)")
    add("--max-steps", type=int, metavar="N", help="stop each member early; the run is no record")
    add("--eval", metavar="RUN", help="score a run again, from its checkpoints so far; --mix may differ")
    add("--split", metavar="NAME", help="what --eval scores: val, audit or a token file (default val, audit)")
    add("--wandb", nargs="?", const="slowrun", metavar="PROJECT", help="log to Weights & Biases, offline too")
    group = parser.add_argument_group("fields of the configuration (defaults are the limited track's)")
    for field in dataclasses.fields(Config):
        allowed, text = COMMENTS[field.name]
        kind = {"action": switch} if field.type is bool else {"type": field.type, "metavar": allowed or "X"}
        group.add_argument("--" + field.name.replace("_", "-"), **kind, default=None,
                           help=f"{text} (default {field.default})".replace("%", "%%"))
    return parser

def parse_args(argv=None, parser=None):
    """-> (the Config: defaults, then the track's row, then --config, then flags; all of the command line)."""
    args = (parser or make_parser()).parse_args(argv)
    if args.track not in TRACKS:
        fail(f"there is no track {args.track}; the tracks are {', '.join(TRACKS)}")
    for name, low in (("seed", 0), ("device_batch", 1), ("ranks_per_member", 1), ("max_steps", 1),
                      ("save_every", 0), ("timeout", 0)):
        if (value := getattr(args, name)) is not None and value < low:
            fail(f"--{name.replace('_', '-')} {value} is out of range: {low} or more")
    if args.run_name and not re.fullmatch(r"[\w.+=-]+", args.run_name):
        fail(f"--run-name {args.run_name}: only letters, digits and . _ + = -")
    given = {}
    if args.config:
        try:
            given |= json.loads(Path(args.config).read_text())
        except (OSError, ValueError, TypeError) as error:
            fail(f"--config {args.config} is not a JSON object of fields: {error}")
        if unknown := set(given) - set(COMMENTS):
            fail(f"--config {args.config} has unknown fields: {', '.join(sorted(unknown))}")
    given |= {name: getattr(args, name) for name in COMMENTS if getattr(args, name) is not None}
    fields = TRACKS[args.track] | given
    if args.resume:  # the run's own configuration; what the command line says must be what it was
        folder, run = find_run(args)
        fields, wanted = run["config"], given | ({} if args.seed is None else {"seed": args.seed})
        before = fields | {"seed": run["seed"]}
        if changed := [f"{name} was {before.get(name)}, is {wanted[name]}" for name in wanted
                       if wanted[name] != before.get(name)]:
            fail(f"the run {folder.name} cannot go on as another one: {'; '.join(changed)}")
        args.resume, args.seed, args.dtype = folder.name, run["seed"], args.dtype or run["dtype"]
    args.seed = 42 if args.seed is None else args.seed
    return Config(**fields), args

def activate_flash():
    """Hopper's and Blackwell's own flash kernels, where their package is installed; -> what is used."""
    from torch.nn.attention import activate_flash_attention_impl
    for name, majors in {"FA3": (9,), "FA4": (9, 10)}.items():
        if torch.cuda.get_device_capability()[0] in majors:
            try:
                activate_flash_attention_impl(name)
                return name
            except ImportError:
                pass  # torch's own serve every GPU since Ampere
    return "FA2"

def pick_device(args):
    """-> (device, its name, dtype, why it). Without bfloat16 products in hardware, float32 is faster."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        name = f"{torch.cuda.get_device_name()} with {activate_flash()}"
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

def keep_heap():
    """
    glibc gives big blocks back to the system at every free, and their pages are faulted in anew by the next
    allocation: a tenth of a training step on the CPU. Here it keeps them.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)            # M_MMAP_MAX: all blocks come from the heap
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: which never shrinks

def setup_compile(wanted, device, backend="inductor"):
    """Compiles what is worth it, where that can work; -> how it stands, for the log."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not wanted:
        return "not compiled"
    if device.type == "cpu" and not (headers.exists() and any(map(shutil.which, ("g++", "clang++", "c++")))):
        return "not compiled (no C++ compiler or no Python headers: slower)"
    for owner, name in ((Block, "before"), (Block, "after"), *((sys.modules[__name__], function)
                        for function in ("mix_stream", "softcap_pass", "softcap_sum", "lesson_pass"))):
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False, backend=backend))
    torch._dynamo.config.recompile_limit = 64  # one variant per kind of layer, for training and for scoring
    return "compiled"

def check_batch(c, args, ranks):
    """The batches divide over the ranks and their micro-steps; sets --device-batch where it was not given."""
    sizes = {tokens // c.seq_len for tokens in (c.batch_tokens, c.batch_tokens_ends) if tokens}
    for sequences in sizes:
        if sequences % ranks:
            fail(f"--batch-tokens {sequences * c.seq_len}: {ranks} ranks can't share {sequences} sequences")
    # A token's activations grow with the layers that are run and their width; so every track fits 80 GB.
    share, width = math.gcd(*sizes) // ranks, c.n_embd * len(c.layer_order(True))
    most = max(1, min(2 ** 14, 2 ** 30 // width) // c.seq_len)
    if args.device_batch is None:
        args.device_batch = max(b for b in range(1, share + 1) if share % b == 0 and b <= most)
    if share % args.device_batch:
        fail(f"--device-batch {args.device_batch} does not divide a rank's {share} sequences per step")

def main(stop, argv=None):
    c, args = parse_args(argv)
    device, device_name, dtype, reason = pick_device(args)
    compiled = setup_compile(args.compile, device)
    if device.type == "cpu":
        keep_heap()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    timeout = timedelta(minutes=args.timeout)
    dist.init_process_group(backend, timeout=timeout, **alone)
    world = make_team(dist.get_world_size(), timeout)
    team = make_team(args.ranks_per_member or world.size, timeout)
    if args.eval:
        return score_again(args, device, world)
    check_batch(c, args, team.size)
    if ":" in c.optimizer:
        foreign_optimizer(c, [nn.Parameter(torch.zeros(2, 2))])  # a mistake shows before there is a run
    folder = args.data or ROOT / "data" / c.dataset
    data = Dataset(folder, f"./run.sh data {c.dataset}")
    if c.fitness_tokens:
        data.set_aside(c.fitness_tokens)
    if min(map(len, data.splits.values())) <= c.seq_len:
        fail(f"{folder} has a split that is shorter than a sequence; lower --seq-len {c.seq_len}")
    machine = {"device": device.type, "name": device_name, "count": dist.get_world_size(),
               "torch": torch.__version__}
    run = {"track": args.track, "seed": args.seed, "config": dataclasses.asdict(c), "dtype": str(dtype)[6:],
           "data": {"name": data.name, **data.digests}, "teams": team.teams, "source_sha256": SOURCE_SHA256}
    folder, run = on_main(world, open_run, run, args)
    wandb = dict(project=args.wandb, name=folder.name, id=folder.name, resume="allow", config=run["config"])
    log = RunLog(folder, f"{args.track}, seed {args.seed}", wandb if args.wandb else None, team)
    log(f"slowrun {args.track}, seed {args.seed}: {dist.get_world_size()} x {device_name}, "
        f"{str(dtype)[6:]} ({reason}), {compiled}, torch {torch.__version__}")
    log(f"python {platform.python_version()}, numpy {np.__version__}, {platform.platform()}, "
        f"{torch.get_num_threads()} threads per rank\n"
        f"command {Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}\n"
        f"config {json.dumps(run['config'])}", console=False)
    if shutil.which("nvidia-smi"):
        log(subprocess.run("nvidia-smi", capture_output=True, text=True).stdout, console=False)
    global LEADS_TEAM
    LEADS_TEAM = team.rank == 0
    training = Training(c, args, data, log, team, device, dtype, stop)
    train(training)
    if team.index == 0:
        finish(training, run | {"machine": machine})
    dist.destroy_process_group()

if __name__ == "__main__":
    stop = StopSignal()
    try:
        main(stop)
    except dcp.CheckpointException as error:  # the same on all ranks
        fail(f"cannot write the state: {next(iter(error.failures.values()))[0]}")
    except RuntimeError as error:
        if not re.search("gloo/transport|Application timeout", str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if stop.name:
            signal.raise_signal(signal.SIGTERM)
        time.sleep(10)  # torchrun ends all ranks when it has lost one; otherwise one of them does not answer
        os._exit(4)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        fail(f"cannot write {error.filename or 'the run folder'}: {error.strerror}; make room there")
