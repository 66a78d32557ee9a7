"""
Slowrun: the lowest validation loss on a fixed 100M tokens, with as much compute as the track allows.

This file is the contestant, yours to change: model, optimizer, data order, schedules, ensemble and loop, in
reading order. What no submission may change is in harness.py: tokens, score, clock, caps, states.

    ./run.sh                        the nano track: any machine, under an hour
    ./run.sh smoke                  a thirtieth of it, for a first look
    ./run.sh nano --dropout 0.05    every field of Config is a flag; ./run.sh nano --help lists them
    ./run.sh limited --seed 43      8xH100, one hour (after ./run.sh data fineweb100M)
    ./run.sh unlimited --plan       what it would take: parameters, memory, hours, money
    torchrun --standalone --nproc-per-node 8 train_gpt.py --track limited

A run is a pure function of its configuration and seed. No random generator has a state: which tokens a step
sees and which activations it drops follow from (seed, position in the stream), so neither the number of ranks
nor the device batch changes the run beyond float rounding, and a resumed run repeats the unbroken one.

A track is a row of TRACKS; a number like (#7) names the record of the limited track that a technique comes
from. A run trains one model, or several members one after another, each of which may learn from the one
before. Shapes: B sequences, T tokens each, C = n_embd channels, H heads of D = C / H channels, V tokens in
the vocabulary.
"""
import copy
import dataclasses
import functools
import gc
import itertools
import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from harness import Run, compile_parts, foreign_optimizer
from logbook import check_digest, check_field, fail, launch, write_json

SOURCE = Path(__file__).read_bytes()  # read first: the log holds what ran, whatever is edited meanwhile


# ---- Config and tracks -------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is. Each field is also a flag; its comment is the help, led by the values it may take."""
    # data
    dataset: str = "fineweb100M"      # the folder under data/ that holds the tokens
    seq_len: int = 2048               # [16, 65536] T: tokens that a sequence feeds to the model
    batch_tokens: int = 524288        # [16, 100000000] tokens per optimizer step, all ranks together
    batch_tokens_ends: int = 0        # [0, 100000000] the same in a chain's outer quarters; 0: no change
    epochs: int = 11                  # [1, 9999] passes over the training tokens, for each member
    shuffle: str = "document"         # {document, sequence, none} what is permuted anew in every epoch
    fitness_tokens: int = 0           # [0, 100000000] training tokens set aside, for --top and --ngram
    # model
    n_layer: int = 30                 # [2, 1000] transformer blocks, an even number: half encode, half decode
    n_head: int = 14                  # [1, 1000] attention heads
    n_embd: int = 1792                # [32, 100000] C: width of the residual stream
    mlp: str = "swiglu"               # {swiglu, relu2} the feed-forward layer
    softcap: float = 10.0             # [1, 40] logits are bounded to +-softcap by a tanh
    window_stages: tuple = ((1, 0.5, 1),)  # (epoch,short,long) shares of T that layers see; YaRN at growth
    rope: str = "full"                # {full, half} half: half the rotary pairs stand still; key offset
    unet_skips: bool = True           # decoder layers also take the output of their encoder twin (#5)
    values: str = "proj"              # {proj, table, none} embedding added to every second layer's v (#3)
    head_gate: bool = True            # a sigmoid gate per head, from the first 12 channels (#6)
    head_mixing: bool = True          # heads are learned mixtures of heads, IHA (#17)
    xsa: str = "none"                 # {none, learned, fixed} attention less its part along the own value
    xsa_layers: int = 1000            # [0, 1000] number of layers, from the first, that use --xsa
    mtp: str = "block"                # {block, head, none} a block predicts the token after the next (#16)
    replay: str = "15-20"             # first-last layer of those that are run several times (#7), or none
    replay_passes: int = 3            # [1, 100] how often the layers of --replay are run in all (#8)
    replay_from_epoch: int = 7        # [1, 10000] the epoch from which layers are replayed
    passes: int = 1                   # [1, 10] of the network after 70% of the steps, gradient in the last
    lam_init: float = 1.0             # [0, 10] initial factor of the stream before each block
    out_init: str = "normal"          # {normal, zero} initial last matrix of attention and MLP (#14)
    # regularisation
    dropout: float = 0.05             # [0, 0.9] on the outputs of attention and MLP
    dropout_mlp: bool = True          # dropout on the outputs of the MLP too
    stochastic_depth: float = 0.0     # [0, 0.9] chance to skip the last layer, down to 0 at the first (#15)
    weight_decay: float = 1.3         # [0, 100] of matrices, embedding and head
    wd_scale: float = 1.0             # [0, 100] multiplies the weight decay, as the model's size wants
    wd_matrix: float = 1.0            # [0, 1000] multiplies the matrices' decay, as their optimizer wants
    wd_schedule: tuple = ()           # (epoch,multiplier) of the decay; none: against the learning rate (#20)
    # optimizer
    optimizer: str = "muon"           # of the matrices: muon, adamw, or package.module:Class
    optimizer_args: str = "{}"        # arguments of the class that --optimizer names, as JSON
    lr_scale: float = 0.25            # [0, 1000] multiplies the learning rates below
    lr_matrix: float = 0.04           # [0, 1000] learning rate of all matrices inside blocks
    lr_embed: float = 0.15            # [0, 1000] learning rate of the token embedding (AdamW)
    lr_head: float = 0.002            # [0, 1000] learning rate of the output head (AdamW)
    lr_scalar: float = 0.1            # [0, 1000] learning rate of residual scalars; lambda, skips: 1% (AdamW)
    gate_optimizer: str = "muon"      # {muon, adamw} of the head gates; adamw by lr_scalar, without decay
    row_norm: bool = True             # Muon normalises the rows of its update first, MuonEq-R (#18)
    momentum_warmup: int = 300        # [0, 100000] steps in which Muon's momentum rises from 0.85 to 0.95
    grad_clip: float = 0.0            # [0, 1000] the gradient's largest norm; 0: any
    warmdown: float = 0.2             # [0, 1] share of the steps over which the learning rate falls
    warmdown_power: float = 0.5       # [0.01, 10] shape of the warmdown: 1 linear, 0.5 a square root (#20)
    lr_floor: float = 0.0             # [0, 1] share of the learning rate that is left after the warmdown
    cycles: int = 3                   # [0, 10000] epochs at the end with a cosine cycle of the lr each (#13)
    # meta-gradient
    meta_norm: float = 0.5            # [0, 1000] length of an episode's trial step, absolute (#21); 0: none
    meta_schedule: str = "warmdown"   # {warmdown, constant} of that length: falls as the lr, without cycles
    meta_matrices: str = "all"        # {all, mlp} matrices that take the trial step, all as one vector
    meta_sequences: int = 32          # [2, 100000] consecutive sequences of a step that make an episode
    # predictor
    average: int = 3                  # [1, 10000] epochs at the end whose checkpoints are averaged (#12)
    average_weights: str = "recency"  # {recency, equal} weights of those epochs: 1, 2, 3, ... or all the same
    average_kind: str = "probs"       # {probs, weights, ema, blend} what is averaged, and how
    keep_final: float = 0.7           # [0, 1] --average-kind blend: share of the last weights, beside an EMA
    # ensemble
    members: int = 1                  # [1, 9999] models, trained one after another and mixed
    first_epochs: int = 0             # [0, 9999] epochs of members that have no teacher; 0: as --epochs
    drop_first: bool = False          # the first member only teaches
    distill: float = 0.0              # [0, 0.99] alpha: the teacher's share in the loss
    temperature: float = 1.0          # [1, 100] at which teacher and student are compared
    distill_after_members: int = 1    # [1, 10000] members of a chain before the first that has a teacher
    restarts: bool = False            # a member goes on from the weights of the one before: snapshots
    perturb: float = 0.0              # [0, 10] standard deviations of noise after snapshot 1; falls to 0.05
    top: int = 0                      # [0, 10000] members that fitness tokens select; 0: all of them
    mix: str = "probs"                # {probs, logits} what the mixture of members averages
    ngram: int = 0                    # [0, 9] tokens; counts of such n-grams are one more member; 0: none

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_field(self, field)
        if not re.fullmatch(r"none|\d+-\d+", self.replay):
            fail(f"--replay {self.replay}: write it as 15-20, or none")
        if not re.fullmatch(r"muon|adamw|[\w.]+:\w+", self.optimizer):
            fail(f"--optimizer {self.optimizer}: write it as muon, adamw or torch.optim:Adafactor")
        if self.n_embd % self.n_head:
            fail(f"--n-head {self.n_head} does not divide --n-embd {self.n_embd}")
        if self.head_dim % 4:
            fail(f"heads of {self.head_dim} channels: rotary pairs need a multiple of 4; change --n-head")
        if self.n_layer % 2:
            fail(f"--n-layer {self.n_layer} is odd; the U-Net needs an even number of layers")
        if self.meta_sequences % 2:
            fail(f"--meta-sequences {self.meta_sequences} is odd; an episode has two halves")
        for flag, tokens in ("", self.batch_tokens), ("-ends", self.batch_tokens_ends):
            if tokens % self.seq_len:
                fail(f"--batch-tokens{flag} {tokens} is not a multiple of --seq-len {self.seq_len}")
        if not self.window_stages or self.window_stages[0][0] != 1 or not all(
                0 < share <= 1 for _, *shares in self.window_stages for share in shares):
            fail(f"--window-stages {self.window_stages}: the first epoch is 1, shares are over 0, up to 1")
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
            fail(f"--optimizer-args are for a class, as torch.optim:Adafactor; {self.optimizer} takes none")
        if (self.top or self.ngram) and not self.fitness_tokens > self.seq_len:
            fail("--top and --ngram weigh by --fitness-tokens, which must hold a sequence or more")
        if self.ngram and self.mix == "logits":
            fail("--ngram has no logits: --mix probs")

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

    @functools.cached_property
    def replayed(self):
        """The first and the last replayed layer, or None."""
        return None if self.replay == "none" else tuple(map(int, self.replay.split("-")))

    def value_layer(self, layer):
        """Every second block injects values, the last one included, the MTP block (n_layer) not."""
        return self.values != "none" and layer % 2 == (self.n_layer - 1) % 2

    def long_layer(self, layer):
        """Every fourth layer sees far, and so does the last."""
        return layer % 4 == 3 or layer >= self.n_layer - 1

    def window(self, layer, stage):
        """Keys before its own that a layer's tokens see; in the MTP block (n_layer) the whole context."""
        _, short, long = self.window_stages[stage]
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
        if link < self.distill_after_members:
            changes["distill"] = 0.0
            if self.first_epochs:
                before_replay = -(-(self.replay_from_epoch - 1) * self.first_epochs // self.epochs)
                changes |= {"epochs": self.first_epochs, "replay_from_epoch": before_replay + 1}
        if self.batch_tokens_ends and abs(2 * link / max(1, links - 1) - 1) > 0.5:
            changes["batch_tokens"] = self.batch_tokens_ends
        return dataclasses.replace(self, **changes)

# A track is a row: the fields in which its preset differs from the defaults above, the limited track's.
NANO = dict(dataset="nano", seq_len=512, batch_tokens=8192, epochs=7, n_layer=4, n_head=2, n_embd=192,
            window_stages=[(1, 0.25, 1)], replay="2-2", replay_from_epoch=5, lr_scale=4.0, wd_scale=0.154,
            cycles=2, average=2, dropout=0.1, stochastic_depth=0.05, meta_norm=0.0, meta_sequences=16)
UNLIMITED = dict(n_head=16, n_embd=2048, softcap=15.0, replay="15-24", replay_passes=5, dropout=0.1,
                 warmdown_power=1.0, cycles=0, average=1, grad_clip=1.0, meta_norm=0.0)
TRACKS = {
    "nano": NANO,
    "smoke": NANO | dict(n_layer=2, n_head=1, n_embd=64, mtp="none", epochs=1, replay="1-1",
                         replay_from_epoch=1, cycles=1, average=1),
    "tiny": dict(n_layer=16, n_head=8, n_embd=1024, softcap=15.0, rope="half", head_mixing=False,
                 xsa="learned", mtp="head", replay="none", passes=2, lam_init=1.1, out_init="zero",
                 dropout=0.1, dropout_mlp=False, weight_decay=0.8,
                 wd_schedule=[(2, 1), (8, 0.125), (15, 1.1625)], lr_scale=0.8, lr_head=0.001, lr_scalar=0.25,
                 gate_optimizer="adamw", row_norm=False, epochs=15, warmdown=0.4, warmdown_power=1.0,
                 cycles=4, meta_schedule="constant", meta_matrices="mlp", average=4, average_kind="weights"),
    "limited": {},
    "two_hour": dict(window_stages=[(1, 0.125, 0.375), (7, 0.375, 0.875), (14, 0.625, 1)],
                     replay_from_epoch=14, epochs=22, cycles=8, average=11, dropout=0.1,
                     stochastic_depth=0.05, meta_norm=0.0),
    "nano_unlimited": NANO | dict(dropout=0.05, stochastic_depth=0.0, average=1, members=2, ngram=5,
                                  fitness_tokens=16384),
    "unlimited": UNLIMITED | dict(shuffle="sequence", wd_schedule=[(0, 1)], epochs=32, replay_from_epoch=17,
                                  members=20, first_epochs=16, drop_first=True, distill=0.7,
                                  average_kind="blend", keep_final=0.6),
    "unlimited_snapshots": UNLIMITED | dict(
        wd_schedule=[(0, 0.7), (2, 1)], momentum_warmup=0, warmdown=1.0, lr_floor=0.08, epochs=2,
        replay_from_epoch=1, members=480, restarts=True, distill=0.45, temperature=1.2,
        distill_after_members=8, batch_tokens_ends=393216, perturb=0.25, fitness_tokens=132000, top=256),
}


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
    if q.dtype == torch.float32:  # which the kernels refuse
        return block_attention(q, k, v, window, scale)
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
        self.n_head, self.key_offset = c.n_head, c.rope == "half" and c.long_layer(layer)
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
            w = torch.full((B, T, 1), 0.3 * unit * T / (T - 1), device=x.device)
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

    def predict(self, tokens, mode):
        """tokens (B, T) -> what `logits` says."""
        return self.logits(self.trunk(tokens, mode)[0])

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
    last = len(c.window_stages) - 1
    teacher = c.passes * sum(macs(layer, last) for layer in c.layer_order(True)) + head if c.distill else 0
    return 6 * (trunk + head + mtp) + 2 * ((mode.passes - 1) * trunk + teacher)


# ---- Head and loss -----------------------------------------------------------------------------------------

def softcap_pass(logits, softcap):
    """
    Raw logits l (n, V) -> (s (n, 1) float32, u (n, V) in the logits' dtype): s is the sum of the softmax's
    exponentials, u / s its probabilities times the softcap's slope. As z = c tanh(l / c) <= c, nobody need
    look for the maximum: q = 1 / (1 + torch.exp(2 l / c)) gives z - c = -2 c q and dz/dl = 4 q (1 - q).
    """
    q = 1 / (1 + torch.exp(logits.float() * (2 / softcap)))
    e = torch.exp(q * (-2 * softcap))
    return e.sum(-1, keepdim=True), (e * (4 * q * (1 - q))).to(logits.dtype)

def softcap_sum(logits, softcap):
    """The first half of softcap_pass, for scoring."""
    return torch.exp(-2 * softcap / (1 + torch.exp(logits.float() * (2 / softcap)))).sum(-1)

def lesson_pass(logits, teacher, softcap, temperature, ratio):
    """
    softcap_pass with a teacher's raw logits (n, V): also -> the divergences KL(teacher || student) at the
    temperature, (n, 1), whose gradient times ratio (n, 1) has been added to u / s.
    """
    q, qt = (1 / (1 + torch.exp(raw.float() * (2 / softcap))) for raw in (logits, teacher))
    z, zt = -2 * softcap * q, -2 * softcap * qt
    e, student, teacher = torch.exp(z), torch.exp(z / temperature), torch.exp(zt / temperature)
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
    adapts: bool = False  # takes the trial step of an episode

def param_table(c):
    """One row per kind of parameter, by the pattern that its whole name matches."""
    width = (3 / c.n_embd) ** 0.5  # uniform(-width, width) has variance 1 / C
    decay = c.weight_decay * c.wd_scale
    scaled = lambda lr: lr * c.lr_scale
    uniform = lambda p, g: p.uniform_(-width, width, generator=g)
    normal = lambda std: lambda p, g: p.normal_(0, std, generator=g)
    constant = lambda value: lambda p, g: p.fill_(value)
    identity = lambda p, g: p.copy_(torch.eye(p.size(-1)))
    mlp = (c.optimizer, scaled(c.lr_matrix), (0.9, 0.95), decay * c.wd_matrix, c.meta_norm > 0)
    matrix = (*mlp[:4], c.meta_norm > 0 and c.meta_matrices == "all")
    adamw, fast = "adamw", (0.8, 0.95)
    head_gate = matrix if c.gate_optimizer == "muon" else (adamw, scaled(c.lr_scalar), (0.9, 0.99), 0.0)
    last = normal(c.n_embd ** -0.5) if c.out_init == "normal" else constant(0.0)
    return [
        Row(r"embed", normal(1.0), adamw, scaled(c.lr_embed), fast, decay),
        Row(r"value_tables", uniform, adamw, scaled(c.lr_embed), fast, decay),
        Row(r"head", normal(0.001), adamw, scaled(c.lr_head), fast, decay),
        Row(r"lam", constant(c.lam_init), adamw, scaled(c.lr_scalar) * 0.01, fast, 0.0),
        Row(r"skip", constant(1.0), adamw, scaled(c.lr_scalar) * 0.01, fast, 0.0),
        Row(r"mu", constant(0.1), adamw, scaled(c.lr_scalar), (0.96, 0.95), 0.0),
        Row(r".*\.mix", identity, adamw, 0.02, fast, 0.0),
        Row(r".*\.xsa", constant(0.0), adamw, scaled(c.lr_scalar), (0.9, 0.95), 0.0),
        Row(r".*\.head_gate", constant(0.0), *head_gate),
        Row(r".*\.value_gate", constant(0.0), *matrix),
        Row(r".*\.(q|k|v|value_proj)|mtp\.proj", uniform, *matrix),
        Row(r".*\.o", last, *matrix),
        Row(r".*\.mlp\.(gate|up)", uniform, *mlp),
        Row(r".*\.mlp\.out", last, *mlp),
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
    scale = 0.05 + (c.perturb - 0.05) * fall
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
            self.state, self.inner = {}, matrices and foreign_optimizer(self.c, matrices)[0]
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

    def tensors(self):
        """What a state saves of this rank's part: the first `own` of its units are no padding."""
        return {"values": self.W, **self.state}

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

    def reset(self):
        for group in self.groups:
            group.reset()

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

class Episodes:
    """
    A first-order meta-gradient (#21). Consecutive sequences of a step make an episode: after the first half
    of them the matrices that adapt take a trial step of a given length down its gradient, after the second
    half they are put back. The optimizer gets the sum of all gradients, wherever they were taken. The length
    of the record, 0.5, is 0.0006 of the norm that limited's matrices start with.
    """

    def __init__(self, c, optimizer, device_batch):
        self.half = c.meta_sequences // 2 // device_batch  # in micro-batches
        self.groups = [group for group in optimizer.groups if group.row.adapts]
        self.weights, self.gradients = {}, {}  # of groups, set aside: what is put back; what came before

    @torch.no_grad()
    def after(self, n, count, length):
        """What follows on the backward pass of micro-batch n, from 1, of the `count` of a step."""
        if self.groups and n % self.half == 0:
            if n // self.half % 2:
                self.try_step(length, last=n + self.half == count)
            else:
                self.put_back(last=n == count)

    def try_step(self, length, last):
        rate = length / nn.utils.get_total_norm([group.grads for group in self.groups]).clamp_min(1e-30)
        for group in self.groups:
            # The optimizer's step brings every rank new values from their owners, who need only their own.
            part = group.W if last else group.values
            self.weights[group] = part, part.clone()
            group.values.addcmul_(group.grads, rate, value=-1)
            if group in self.gradients:
                group.grads += self.gradients.pop(group)

    def put_back(self, last):
        for group in self.groups:
            part, values = self.weights.pop(group)
            part.copy_(values)
            if not last:
                self.gradients[group] = group.grads.clone()
                group.grads.zero_()


# ---- Data --------------------------------------------------------------------------------------------------

class Stream:
    """
    The training sequences of a whole run, epoch after epoch, each an index over the memory-mapped tokens. An
    epoch permutes the documents, cuts them into sequences of T+1 tokens, and permutes those (#19). Document
    order accumulates; with seed 42 the permutations are the reference's, seeded by epoch e and e + 1000. The
    first epoch leaves the documents in order, but for snapshots, which have seeds of their own.
    """

    def __init__(self, tokens, starts, c, seed):
        self.tokens, self.starts, self.shuffle, self.seed = tokens, starts, c.shuffle, seed
        self.base, self.first = (1009 * seed + 1000, 1) if c.restarts else (1009 * (seed - 42), 2)
        self.lengths = np.diff(starts, append=len(tokens))
        self.S, self.per_epoch = c.seq_len + 1, len(tokens) // (c.seq_len + 1)
        self.documents, self.made = np.arange(len(starts)), 0

    def permutation(self, n, seed):
        generator = torch.Generator().manual_seed(self.base + seed)
        return torch.randperm(n, generator=generator).numpy()

    def enter(self, epoch):
        """Makes the index of an epoch, counted from 1."""
        if epoch < self.made:
            self.documents, self.made = np.arange(len(self.starts)), 0
        for e in range(max(self.first, self.made + 1), epoch + 1):
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
        for after in itertools.count(place + c.batch_sequences, c.batch_sequences):
            batch, following = following.result(), pool.submit(make, after)
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
        return Mode(replay=c.replayed is not None and epoch >= c.replay_from_epoch,
                    passes=c.passes if step >= 0.7 * self.steps else 1,
                    stage=sum(start <= epoch for start, *_ in c.window_stages) - 1)

    def cycle(self, step):
        """How far the step is in its cosine cycle, 0 to 1; None before the last `cycles` epochs."""
        epoch = self.steps / self.c.epochs
        start = self.steps - self.c.cycles * epoch
        return (step - start) % epoch / epoch if self.c.cycles and step >= start else None

    def warmdown(self, step):
        """1, then falling to 0 over the last steps."""
        left, steps = self.steps - step, round(self.c.warmdown * self.steps)
        return 1.0 if left >= steps else (left / steps) ** self.c.warmdown_power

    def meta_norm(self, step):
        """The length of an episode's trial step."""
        return self.c.meta_norm * (self.warmdown(step) if self.c.meta_schedule == "warmdown" else 1.0)

    def lr(self, step):
        """Multiplier of all learning rates: flat, then falling; at last a cosine to 0.05 in each epoch."""
        c, base = self.c, self.warmdown(step)
        if (cycle := self.cycle(step)) is None:
            return c.lr_floor + (1 - c.lr_floor) * base
        return 0.05 + (max(base, 0.05) - 0.05) * (1 + math.cos(math.pi * cycle)) / 2

    def weight_decay(self, step):
        """
        Multiplier of the decay: between the rows of wd_schedule linear; without any it runs against the
        learning rate (#20), from 1 after 40% of the run down to 0.65, in each cycle from 0.65 to 1.5.
        """
        if self.c.wd_schedule:
            epochs, multipliers = zip(*self.c.wd_schedule)
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
        left = 2 - 2 * step / self.steps / 0.66  # halves of the annealing that are left
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
        per_token = functools.cache(lambda mode: flops_per_token(self.c, vocab_size, mode))
        return self.c.batch_tokens * sum(per_token(self.mode(step)) for step in range(self.end))


# ---- Scoring and ensembles ---------------------------------------------------------------------------------

class Ngrams:
    """
    A language model that counts: interpolated Kneser-Ney (Chen & Goodman 1999). Each token that has followed
    a context gets its share of the counts there, less a discount; the context without its first token says
    who gets the rest. N-grams of the full order count how often they occur, shorter ones how many different
    tokens they follow.
    """

    def __init__(self, text, order, vocab_size):
        """text (n,). An n-gram's id is its place among all, sorted by the id of its context, then its end."""
        text = text.long()
        self.V, levels, keys, grams = vocab_size, [], [torch.arange(vocab_size, device=text.device)], [text]
        for n in range(1, order):  # n tokens of context; grams[n] are the ids of what begins at each place
            key, ids = torch.unique(grams[-1][:-1] * vocab_size + text[n:], return_inverse=True)
            keys.append(key)
            grams.append(ids)
        for n, key in enumerate(keys):
            seen = grams[n]
            if n + 1 < order:  # once for each token before it: the longer n-grams' ids without that token
                seen = torch.empty_like(keys[n + 1]).scatter_(0, grams[n + 1], seen[1:])
            counts = seen.bincount(minlength=len(key)).double()
            once, twice = ((counts == times).sum().item() for times in (1, 2))
            context = key // vocab_size
            zeros = counts.new_zeros(len(keys[n - 1]) + 1 if n else 1)  # the last: a context never seen
            total = zeros.index_add(0, context, counts).clamp_min(1)
            share = (counts - max(0.1, once / max(1, once + 2 * twice))).clamp_min(0) / total[context]
            rest = 1 - zeros.index_add(0, context, share)
            starts = F.pad(context.bincount(minlength=len(zeros)).cumsum(0), (1, 0))
            levels.append((key, starts, share.float(), rest.float()))
        (_, _, share, rest), *self.levels = levels
        self.unigrams = share + rest / vocab_size

    def predict(self, tokens, _=None):
        """tokens (B, T) -> log-probabilities (B, T, V) float32."""
        p, context = self.unigrams.repeat(tokens.numel(), 1), tokens  # ids of the n tokens up to each place
        for key, starts, share, rest in self.levels:
            first, count = starts[context.flatten()], starts.diff()[context.flatten()]
            rows = torch.arange(len(p), device=p.device).repeat_interleave(count)
            known = torch.arange(len(rows), device=p.device) + (first + count - count.cumsum(0))[rows]
            p *= rest[context].view(-1, 1)
            p[rows, key[known] % self.V] += share[known]
            wanted = F.pad(context[:, :-1], (1, 0), value=len(rest) - 1) * self.V + tokens
            place = torch.searchsorted(key, wanted).clamp_max(len(key) - 1)
            context = torch.where(key[place] == wanted, place, len(key))
        return p.log().view(*tokens.shape, self.V)

class Member(NamedTuple):
    """A model of a predictor: its checkpoint, how it is run, its own loss, and its weight in the mixture."""
    checkpoint: str
    sha256: str      # of the checkpoint
    scores: str      # sha256 of the file of its targets' log-probabilities
    mode: Mode       # None of n-grams
    val_loss: float
    weight: float = 1.0

def read_member(record):
    """The Member that a JSON object describes, or the file of one."""
    try:
        fields = json.loads(record.read_text()) if isinstance(record, Path) else record
        return Member(**fields | {"mode": fields["mode"] and Mode(*fields["mode"])})
    except (OSError, ValueError, TypeError, LookupError):
        fail(f"{record} is missing or damaged: it describes no member")

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
    found = [read_member(path) for path in sorted(folder.glob("*_????.json"))]
    if c.members == 1:
        found = found[-c.average if c.average_kind == "probs" else -1:]
    else:
        found = found[1 if c.drop_first and count > 1 else 0:count]
    recency = c.members == 1 and c.average_weights == "recency"
    weights = [n if recency else 1 for n in range(1, len(found) + 1)]
    if c.top and count == c.members > 1:
        weights = select_weights(np.stack([logprobs(folder, member, "fitness") for member in found]), c.top)
    used = [member._replace(weight=weight / sum(weights)) for member, weight in zip(found, weights) if weight]
    return add_ngrams(used, folder) if (folder / "ngrams.json").exists() else used

def add_ngrams(members, folder):
    """Gives the n-grams that share of the mixture which predicts the fitness tokens best."""
    ngrams = read_member(folder / "ngrams.json")
    others, _ = mixture((member.weight, logprobs(folder, member, "fitness")) for member in members)
    ratio, share = np.exp(logprobs(folder, ngrams, "fitness") - others), 0.5
    for _ in range(1000):  # of expectation maximisation, which climbs to the only maximum
        share = (share * ratio / (1 - share + share * ratio)).mean()
    return [*(member._replace(weight=member.weight * (1 - share)) for member in members),
            ngrams._replace(weight=share)]

def logprobs(folder, member, split):
    """What a member gave the split's targets, from the scores beside its checkpoint: (n * T,) float64."""
    path = folder / member.checkpoint.replace(".pt", ".npz")
    check_digest(path, member.scores)
    return np.load(path)[split].ravel().astype(np.float64)

def of_targets(logprobs):
    """Makes of a function (B, T) -> log-probabilities (B, T, V) one (B, T+1) -> the targets' (B, T)."""
    return lambda sequences: logprobs(sequences[:, :-1]).gather(-1, sequences[:, 1:, None])[..., 0]

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
        self.loaded, self.verified, self.ngrams = None, set(), None
        spec = json.loads((self.folder / "predictor.json").read_text())
        self.c, self.vocab_size = Config(**spec["config"]), spec["vocab_size"]
        self.members = [read_member(record) for record in spec["members"]]
        self.model = frozen(make_model(self.c, self.vocab_size, self.device, getattr(torch, spec["dtype"])))

    def load(self, member):
        """The member's model. A file must have its digest when it is read first."""
        path = self.folder / member.checkpoint
        if path not in self.verified:
            check_digest(path, member.sha256)
            self.verified.add(path)
        if member.mode is None:
            self.ngrams = self.ngrams or Ngrams(torch.load(path, self.device, weights_only=True)["text"],
                                                self.c.ngram, self.vocab_size)
            return self.ngrams
        if self.loaded != member.checkpoint:
            load_weights(self.model, path)
            self.loaded = member.checkpoint
        return self.model

    @torch.no_grad()
    def logprobs(self, tokens, mix=None):
        """tokens (B, T) int64 -> (B, T, V) float32: position t has the log-probabilities of token t+1."""
        mixed, by_logits = None, (mix or self.c.mix) == "logits"
        for member in self.members:
            z = self.load(member).predict(tokens.to(self.device), member.mode)
            part = z * member.weight if by_logits else z.log_softmax(-1) + math.log(member.weight)
            mixed = part if mixed is None else mixed + part if by_logits else torch.logaddexp(mixed, part)
        return mixed.log_softmax(-1) if by_logits else mixed

load_predictor = Predictor


# ---- Training ----------------------------------------------------------------------------------------------

def make_model(c, vocab_size, device, dtype):
    """A model without values. The embedding has the compute dtype, and so the stream; the rest is float32."""
    with torch.device(device):
        model = GPT(c, vocab_size)
    for table in (model.embed, *([model.value_tables] if c.values == "table" else [])):
        table.data = table.data.to(dtype)
    return model

def frozen(model):
    """A copy of a model that has its matrices in the compute dtype, as they are used, and no gradients."""
    dtype = lambda p: model.embed.dtype if p.dim() > 1 else p.dtype
    values = {id(p): nn.Parameter(p.detach().to(dtype(p), copy=True), False) for p in model.parameters()}
    return copy.deepcopy(model, values)  # which has no need to copy what is in `values`

@torch.no_grad()
def load_weights(model, path):
    weights = torch.load(path, map_location=model.embed.device, mmap=True, weights_only=True)
    for name, p in model.named_parameters():
        p.copy_(weights[name])

def member_schedule(c, tokens, team, member, max_steps=None):
    """The schedule of one of the run's members on these tokens, and in it the member's configuration."""
    links = -(-c.members // team.teams)
    return Schedule(c.member(member // team.teams, links), len(tokens) // (c.seq_len + 1), max_steps)

class Training:
    """A team's model, teacher, optimizer and schedules, and what it does with them between the steps."""

    def __init__(self, run):
        c = run.c
        self.run, self.c, self.folder = run, c, run.folder / "checkpoints"
        self.schedules = [member_schedule(c, run.data.splits["train"], run.team, member, run.args.max_steps)
                          for member in range(c.members)]
        self.own = range(run.team.index, c.members, run.team.teams)  # the members that this team trains
        self.model = make_model(c, run.data.vocab_size, run.device, run.dtype)
        self.model.checkpointing = run.args.checkpointing
        initialise(self.model, c, run.args.seed)
        self.teacher = frozen(self.model) if c.distill else None
        self.optimizer = Optimizer(self.model, c, run.dtype, run.team)

    def flops(self, members):
        """The counted operations of training these members."""
        return sum(self.schedules[member].training_flops(self.run.data.vocab_size) for member in members)

    def describe(self):
        first = self.schedules[self.own[0]]
        self.run.announce(self.flops(self.own), (
            f"{self.model.parameter_count():,} parameters, {self.c.epochs} epochs of "
            f"{first.per_epoch * self.c.seq_len:,} tokens, {first.steps} steps of {self.c.batch_tokens:,}"))

    def warm_up(self):
        """Goes once through every variant of a step, so that training time holds no compilation."""
        c, flops = self.c, functools.partial(flops_per_token, self.c, self.run.data.vocab_size)
        variants = {(s.mode(step), len(s.ahead(step)), s.c.distill > 0)
                    for s in (self.schedules[member] for member in self.own) for step in range(s.end)}
        stated = {mode: c.seq_len * (flops(mode) + flops(mode, training=False)) for mode, _, _ in variants}
        self.run.warm_up(sorted(variants), self.throw_away, stated)
        self.model.zero_grad(set_to_none=False)

    def throw_away(self, batch, mode, ahead, taught):
        """Trains on data without meaning, (batch, T+1), and scores it."""
        c, device = self.c, self.run.device
        sequences = torch.zeros(batch, c.seq_len + 1, dtype=torch.int64, device=device)
        noise = Noise(*(part.to(device) for part in draw_noise(c, 0, range(batch), self.run.dtype)))
        lesson = self.teacher.teach(sequences, mode) if taught else None
        self.model.loss(sequences, mode, noise, c.batch_sequences, (1.0,) * ahead, lesson)[0].backward()
        frozen(self.model).target_logprobs(sequences, mode)

    def begin(self, member):
        """Makes the weights that a member starts from: new ones, or the perturbed ones of the one before."""
        run, c, link = self.run, self.c, member // self.run.team.teams
        seed = run.args.seed + (run.team.index if c.restarts else member)
        if run.progress["step"] == 0 and c.restarts and link:
            perturb(self.model, c, seed, link, len(self.own))
        elif run.progress["step"] == 0:
            initialise(self.model, c, seed)
            self.optimizer.reset()
            start, _ = run.evaluate(member, 0, 0, self.scorer(self.schedules[member].mode(0)))
            run.log(f"start  val {start.loss:.4f} before training")
        return seed

    def load_teacher(self, member):
        """The member before in the chain becomes the teacher; -> how it is run."""
        before = read_member(self.folder / f"member_{member - self.run.team.teams:04d}.json")
        check_digest(path := self.folder / before.checkpoint, before.sha256)
        load_weights(self.teacher, path)
        return before.mode

    def scorer(self, mode):
        """(B, T+1) -> log-probabilities of the targets, by weights that are cast once, not for each batch."""
        model = frozen(self.model)
        return lambda sequences: model.target_logprobs(sequences, mode)

    def keep(self, name, mode, val, others=True):
        """Files the model as a member of the predictor, with what it gives the targets of val and others."""
        scores = {"val": val.astype(np.float32)}
        for split in ["audit"] + ["fitness"] * bool(self.c.top or self.c.ngram) if others else []:
            scores[split] = self.run.likelihoods(split, self.scorer(mode)).astype(np.float32)
        self.run.file_member(name, frozen(self.model).state_dict(), scores, mode=mode,
                             val_loss=-scores["val"].mean(dtype=float))

    def count_ngrams(self):
        """The n-grams of the training text become a member, whose checkpoint is that text."""
        run, text = self.run, torch.from_numpy(self.run.data.splits["train"].astype(np.int32))
        run.clock.start()
        ngrams = Ngrams(text.to(run.device), self.c.ngram, run.data.vocab_size)
        run.clock.stop()
        scores = {split: run.likelihoods(split, of_targets(ngrams.predict)).astype(np.float32)
                  for split in ("val", "audit", "fitness")}
        run.file_member("ngrams", {"text": text}, scores, mode=None,
                        val_loss=-scores["val"].mean(dtype=float))

    def discard(self, files):
        """Removes members that are no part of the predictor."""
        for path in files if self.run.log.main else ():
            for suffix in (".pt", ".npz", ".json"):  # what has its .json is found again
                path.with_suffix(suffix).unlink(missing_ok=True)

    def write_predictor(self, count):
        """Says in predictor.json what the first `count` members predict with; -> them, weighted."""
        members = members_of(self.c, self.folder, count)
        if self.run.log.main:
            spec = {"config": dataclasses.asdict(self.c), "vocab_size": self.run.data.vocab_size,
                    "dtype": str(self.run.dtype)[6:], "members": [member._asdict() for member in members]}
            write_json(self.folder / "predictor.json", spec)
        return members

    def end_epoch(self, member, epoch, step, speed):
        """Scores val after `step` steps; of a run with one member the last epochs are its predictor."""
        run, c, schedule = self.run, self.c, self.schedules[member]
        mode, last = schedule.mode(step - 1), schedule.epoch(schedule.end - 1)
        averaged = c.average if c.average_kind == "probs" else 0
        result, val = run.evaluate(member, step, epoch, self.scorer(mode))
        if c.members == 1:
            self.keep(f"epoch_{epoch:04d}", mode, val, others=epoch > last - averaged)
            self.write_predictor(1)
            dist.barrier(group=run.team.group)
            self.discard(sorted(self.folder.glob("epoch_*.json"))[:-max(1, averaged)])
        losses = [m["loss"] for m in run.log.metrics["step"][-schedule.steps:]
                  if m["member"] == member and schedule.epoch(m["step"]) == epoch]
        run.log(f"epoch  {epoch:3d}/{schedule.c.epochs}  step {step:5d}  train {np.mean(losses):.4f}  "
                f"val {result.loss:.4f}  {result.bpb:.4f} bpb  {run.clock.seconds() / 60:.1f} min  "
                f"{speed:,.0f} tok/s")
        run.log.plot()

    def end_member(self, member):
        """Files a member of an ensemble, or the one model of a run that averages weights."""
        schedule, steps = self.schedules[member], self.schedules[member].end
        if any(map(schedule.average, range(steps))):
            self.optimizer.take_average()
        mode = schedule.mode(steps - 1)
        result, val = self.run.evaluate(member, steps, schedule.epoch(steps - 1), self.scorer(mode))
        self.keep(f"member_{member:04d}", mode, val)
        if self.c.members == 1:
            self.write_predictor(1)
        dist.barrier(group=self.run.team.group)
        self.discard(self.folder.glob("epoch_*.json"))
        return result

    def mix_so_far(self, member, loss):
        """Waits for the teams' members up to this one, and says how well they predict together."""
        run, count = self.run, min(member + self.run.team.teams, self.c.members)
        run.wait_for_teams(count)
        so_far = self.write_predictor(count)
        if run.log.main:
            logp, _ = mixture((m.weight, logprobs(self.folder, m, "val")) for m in so_far)
            run.log.metric("ensemble", member=member, step=self.schedules[member].end, members=len(so_far),
                           loss=-logp.mean())
            run.log(f"member {member + 1:3d}/{self.c.members}  val {loss:.4f}  "
                    f"the {len(so_far)} members so far {-logp.mean():.4f}")
            run.log.plot()

def train(t):
    """Trains the team's members, one after another, or goes on with them."""
    run, c, progress = t.run, t.c, t.run.progress
    gc.collect()
    gc.freeze()  # what lives now lives to the end: the collector need not walk it at every pass
    place = 0  # in the stream: fresh members read it from its start, snapshots where the one before has ended
    for member in t.own:
        start, steps = place, t.schedules[member].end
        place += c.restarts * steps * t.schedules[member].c.batch_sequences
        if member < progress["member"]:
            continue
        if member > progress["member"]:
            progress |= {"member": member, "step": 0}
        train_member(t, member, start)
        if c.members > 1 or c.average_kind != "probs":
            result = t.end_member(member)
        if c.members > 1 and run.team.index == 0:
            t.mix_so_far(member, result.loss)
    if run.team.index:
        run.wait_for_teams(c.members)  # in case that another hangs: torchrun would not end it

def train_member(t, member, start):
    """The steps of one member; `start` is its first sequence in the stream."""
    run, optimizer, schedule, progress = t.run, t.optimizer, t.schedules[member], t.run.progress
    c, first, steps, report = schedule.c, progress["step"], schedule.end, None
    seed, seconds = t.begin(member), run.clock.seconds()
    teacher_mode = t.load_teacher(member) if c.distill else None
    stream = Stream(run.data.splits["train"], run.data.documents("train"), c, seed)
    supply = batches(stream, c, run.team, start + first * c.batch_sequences, run.device, run.dtype,
                     run.args.device_batch)
    episodes = Episodes(c, optimizer, run.args.device_batch)
    run.begin_steps(member, first, steps)
    for step in range(first, steps):
        epoch, mode, loss = schedule.epoch(step), schedule.mode(step), torch.zeros((), device=run.device)
        for n, (sequences, noise) in enumerate(batch := next(supply), 1):
            run.pulse()
            if n == len(batch):
                optimizer.expect()
            lesson = t.teacher.teach(sequences, teacher_mode) if c.distill else None
            total, plain = t.model.loss(sequences, mode, noise, c.batch_sequences, schedule.ahead(step),
                                        lesson)
            total.backward()
            episodes.after(n, len(batch), schedule.meta_norm(step))
            loss += plain
        progress |= {"step": step + 1, "updates": progress["updates"] + 1}
        lr, weight_decay = schedule.lr(step), schedule.weight_decay(step)
        squares = optimizer.step(lr, weight_decay, schedule.momentum(step),
                                 progress["updates"] if c.restarts else step + 1, schedule.average(step))
        # A step's report is read after the next one was launched: the device never waits for the host.
        report, earlier = run.report(step, loss, squares, lr=lr, weight_decay=weight_decay), report
        save_due, stopping = run.settle(earlier) if earlier else (False, False)
        ends_epoch = schedule.epoch(step + 1) > epoch or step + 1 == steps
        if pause := ends_epoch or save_due or stopping:
            stopping, report = run.settle(report)[1] or stopping, None
        if ends_epoch:
            speed = (step + 1 - first) * c.batch_tokens / (run.clock.seconds() - seconds)
            t.end_epoch(member, epoch, step + 1, speed)
        elif (step + 1) % (run.args.eval_every or math.inf) == 0:
            run.look(member, step + 1, epoch, t.scorer(mode))
        if pause:
            run.save_state()
        if stopping and not (step + 1 == steps and member == t.own[-1]):
            run.leave()
    run.end_steps()
    supply.close()

def finish(t):
    """Mixes the members of the final predictor, for the harness to score."""
    run, c, mixed = t.run, t.c, {}
    if c.ngram:
        t.count_ngrams()
    dist.barrier(group=run.team.group)  # the first rank has filed the members
    members = t.write_predictor(c.members)
    if c.mix == "logits":
        score_targets = of_targets(Predictor(run.folder, run.device).logprobs)
        mixed = {split: run.likelihoods(split, score_targets) for split in ("val", "audit")}
    elif run.log.main:
        mixed = {split: mixture((m.weight, logprobs(t.folder, m, split)) for m in members)[0]
                 for split in ("val", "audit")}
    if run.log.main:
        facts = {"parameters": t.model.parameter_count(), "training_flops": t.flops(range(c.members)),
                 "tokens_seen": sum(s.end * s.c.batch_tokens for s in t.schedules)}
        run.conclude(mixed, members, facts, stopped_early=any(s.end < s.steps for s in t.schedules))


# ---- main --------------------------------------------------------------------------------------------------

def setup_compile(wanted, device, backend="inductor"):
    """Compiles what is worth it, where that can work; -> how it stands, for the log."""
    here, functions = sys.modules[__name__], ("mix_stream", "softcap_pass", "softcap_sum", "lesson_pass")
    parts = (Block, "before"), (Block, "after"), *((here, function) for function in functions)
    return compile_parts(parts, wanted, device, backend)

def main(stop, argv=None):
    run = Run(stop, Config, TRACKS, SOURCE, argv)
    run.log(setup_compile(run.args.compile, run.device), console=False)
    training = Training(run)
    training.describe()
    training.warm_up()
    run.restore(training.optimizer)
    train(training)
    if run.team.index == 0:
        finish(training)
    dist.destroy_process_group()

if __name__ == "__main__":
    launch(main)
