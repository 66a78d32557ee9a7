"""
Slowrun: the lowest validation loss on a fixed 100M tokens, with as much compute as the track allows.

This file is the contestant: model, optimizer, data order, schedules, scoring and the loop, in reading order.

    ./run.sh                        the nano track: a laptop CPU, minutes
    ./run.sh smoke                  a twentieth of it, for a first look
    ./run.sh limited --seed 43      8xH100, one hour (after ./run.sh data fineweb100M)
    ./run.sh limited --resume       goes on with a run that was interrupted, as if it had not been
    torchrun --standalone --nproc-per-node 8 train_gpt.py --track limited
    python train_gpt.py --track nano --epochs 4 --n-layer 6

It trains on any number of ranks, one process per GPU or CPU process, and writes runs/<name>/:

    train_gpt.py   the source that ran            log.txt          source, environment, config, console
    metrics.jsonl  every step and evaluation      checkpoints/     the members of the predictor
    result.json    the score and what it took     doc_losses.npz   loss per document of val and audit
    loss.svg       training and validation loss   state/           what --resume goes on from

A run is a pure function of its configuration and seed. No random generator has a state: which tokens a step
sees and which activations it drops follow from (seed, position in the stream), so neither the number of ranks
nor the device batch changes the run beyond float rounding, and a resumed run repeats the unbroken one. The
recipe is that of limited #20 of the slowrun leaderboard; a number like (#7) names the limited record that a
technique comes from. Shapes: B sequences, T tokens each, C = n_embd channels, H heads of D = C / H channels,
V tokens in the vocabulary.
"""
import argparse
import dataclasses
import errno
import fcntl
import functools
import gc
import hashlib
import importlib
import inspect
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
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
    epochs: int = 11                  # [1, 10000] passes over the training tokens
    shuffle: str = "document"         # {document, sequence, none} what is permuted anew in every epoch
    # model
    n_layer: int = 30                 # [2, 1000] transformer blocks, an even number: half encode, half decode
    n_head: int = 14                  # [1, 1000] attention heads
    n_embd: int = 1792                # [32, 100000] C: width of the residual stream
    softcap: float = 10.0             # [1, 40] logits are bounded to +-softcap by a tanh
    short_window: int = 1024          # [1, 65536] keys before its own that a token sees in a short layer
    windows: str = "SSSL"             # short and long (whole context) layers, repeated; the last one is long
    unet_skips: bool = True           # decoder layers also take the output of their encoder twin (#5)
    value_proj: bool = True           # every second layer adds projected embeddings to its values (#3)
    head_gate: bool = True            # a sigmoid gate per head, from the first 12 channels (#6)
    head_mixing: bool = True          # heads are learned mixtures of heads, IHA (#17)
    mtp: str = "block"                # {block, none} one more block predicts the token after the next (#16)
    mtp_weight: float = 0.3           # [0, 10] the share of that prediction in the training loss
    replay: str = "15-20"             # layers that are run again, first-last (#7); none: no layer
    replay_passes: int = 3            # [1, 100] how often they are run in all (#8)
    replay_from: int = 7              # [1, 10000] the epoch from which they are replayed
    # regularisation
    dropout: float = 0.1              # [0, 0.9] on the outputs of attention and MLP
    stochastic_depth: float = 0.05    # [0, 0.9] chance to skip the last layer, down to 0 at the first (#15)
    weight_decay: float = 1.3         # [0, 100] of matrices, embedding and head
    wd_schedule: str = "antiphase"    # {antiphase, constant} antiphase rises as each lr cycle falls (#20)
    # optimizer
    lr_scale: float = 0.25            # [0, 1000] multiplies the learning rates below, but for lr_mixing
    lr_matrix: float = 0.04           # [0, 1000] Muon: all matrices inside blocks
    lr_embed: float = 0.15            # [0, 1000] AdamW: token embedding
    lr_head: float = 0.002            # [0, 1000] AdamW: output head
    lr_scalar: float = 0.1            # [0, 1000] AdamW: residual scalars (lambda and skips take 1% of it)
    lr_mixing: float = 0.02           # [0, 1000] AdamW: head mixing
    row_norm: bool = True             # Muon normalises the rows of its update first, MuonEq-R (#18)
    warmdown: float = 0.2             # [0, 1] share of the steps over which the learning rate falls
    warmdown_power: float = 0.5       # [0.01, 10] shape of the fall: 1 is linear, 0.5 a square root (#20)
    cycles: int = 3                   # [0, 10000] epochs at the end with a cosine cycle of the lr each (#13)
    # the predictor
    average: int = 3                  # [1, 10000] epochs at the end whose checkpoints are averaged (#12)
    average_weights: str = "recency"  # {recency, equal} their weights: 1, 2, 3, ... or all the same

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))
        if self.n_embd % self.n_head:
            fail(f"--n-head {self.n_head} does not divide --n-embd {self.n_embd}")
        if self.head_dim % 2:
            fail(f"heads of {self.head_dim} channels: rotary embedding needs an even number; change --n-head")
        if self.n_layer % 2:
            fail(f"--n-layer {self.n_layer} is odd; the U-Net needs an even number of layers")
        if self.batch_tokens % self.seq_len:
            fail(f"--batch-tokens {self.batch_tokens} is not a multiple of --seq-len {self.seq_len}")
        if max(self.cycles, self.average) > self.epochs:
            fail(f"--cycles {self.cycles} and --average {self.average} take at most --epochs {self.epochs}")
        if not re.fullmatch("[SL]+", self.windows):
            fail(f"--windows {self.windows}: only the letters S and L")
        first, last = self.replayed or (self.n_layer // 2, self.n_layer // 2)
        if not self.n_layer // 2 <= first <= last < self.n_layer:
            fail(f"--replay {self.replay}: decoder layers are {self.n_layer // 2}-{self.n_layer - 1}")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def mlp_hidden(self):
        """SwiGLU width: 8/3 of the channels, rounded up to a multiple of 256."""
        return -(-(8 * self.n_embd // 3) // 256) * 256

    @property
    def batch_sequences(self):
        return self.batch_tokens // self.seq_len

    @property
    def replayed(self):
        """The first and the last replayed layer, or None."""
        if self.replay == "none":
            return None
        if not re.fullmatch(r"\d+-\d+", self.replay):
            fail(f"--replay {self.replay}: write first-last, as in 15-20, or none")
        return tuple(map(int, self.replay.split("-")))

    def value_layer(self, layer):
        """Every second block has a value projection, the last one included, the MTP block (n_layer) not."""
        return self.value_proj and layer % 2 == (self.n_layer - 1) % 2

    def window(self, layer):
        """Keys before its own that a layer's tokens see: for the last and the MTP block the whole context."""
        long = layer >= self.n_layer - 1 or self.windows[layer % len(self.windows)] == "L"
        return self.seq_len if long else min(self.short_window, self.seq_len)

    def layer_order(self, replay):
        """The blocks in the order in which they are executed."""
        order = list(range(self.n_layer))
        if replay and self.replayed:
            first, last = self.replayed
            order[last + 1:last + 1] = order[first:last + 1] * (self.replay_passes - 1)
        return order

# A track is a row: the fields in which its preset differs from the defaults above, the limited track's.
NANO = dict(dataset="nano", seq_len=512, batch_tokens=8192, epochs=8, n_layer=4, n_head=2, n_embd=128,
            short_window=128, replay="2-2", replay_from=6, lr_scale=4.0, weight_decay=0.2, dropout=0.05)
TRACKS = {
    "nano": NANO,
    "smoke": NANO | dict(n_layer=2, n_head=1, n_embd=56, epochs=2, replay="1-1", replay_from=2, cycles=1,
                         average=2),
    "limited": {},
}
# What a run of the track may use, by the field of its result.json.
CAPS = {
    "nano": ("training_flops", 2e14),
    "smoke": ("training_flops", 1e13),
    "limited": ("train_seconds", 3600),
}

def quit_run(code, message):
    """
    Ends every rank with one line and no traceback. They all get here for the same reason; one of them speaks.
    The codes: 2 a user's mistake, 3 a loss or gradient that is not finite, 75 a signal (the run can go on).
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
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


# ---- Model -------------------------------------------------------------------------------------------------

def weight(*shape):
    """A parameter without values; `initialise` fills it by the parameter table."""
    return nn.Parameter(torch.empty(*shape))

def rms(x):
    """RMS norm over the channels, without a gain; the epsilon is float32's whatever the dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=2.0 ** -23)

def linear(x, w):
    """x W^T. Weights are float32 masters, cast where they are used; the stream's dtype is the embedding's."""
    return F.linear(x, w.to(x.dtype))

def rope_tables(c, device, dtype):
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864): cos and sin, (T, 1, D/2), computed in float32."""
    frequency = 10000.0 ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float32, device=device) / c.head_dim)
    angle = torch.outer(torch.arange(c.seq_len, dtype=torch.float32, device=device), frequency)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)

def rotate(x, rope):
    """Rotates the pairs (x_f, x_{f + D/2}) of x (B, T, H, D) by their position's angles."""
    cos, sin = (table[:x.size(1)] for table in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

def dropout(x, p, key):
    """
    Zeroes entries of x (B, T, C) with probability p; the others grow by 1 / (1 - p). The mask hashes the
    place with key (B, 2) int32, which belongs to one sequence and one dropout of the network. The key's
    numbers make an offset and an odd factor; multiply-and-shift rounds as in murmur3 follow.
    """
    place = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device).view(1, *x.shape[1:])
    h = (place ^ key[:, 0, None, None]) * (key[:, 1, None, None] | 1)
    h = (h ^ ((h >> 15) & 0x1FFFF)) * -2048144789
    h = (h ^ ((h >> 13) & 0x7FFFF)) * -1028477387
    h = h ^ ((h >> 16) & 0xFFFF)
    return torch.where((h & 0x7FFFFFFF) >= int(p * 2 ** 31), x * (1 / (1 - p)), 0)

@functools.cache
def causal_mask(T, window, dtype):
    """(T, T), to be added to scores: 0 where query i sees key j, i - window <= j <= i, and -inf elsewhere."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return torch.zeros(T, T, dtype=dtype).masked_fill_((distance < 0) | (distance > window), float("-inf"))

def attention(q, k, v, window):
    """
    Causal attention of (B, T, H, D) tensors; the query at i sees the keys at i - window to i. On CUDA by the
    in-core variable-length flash kernels, the only ones with a sliding window and a backward. On the CPU by
    blocks of 128 queries against the keys in reach: plain products, faster there than the fused kernel.
    """
    B, T, H, D = q.shape
    if q.device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn
        starts = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
        reach = (-1 if window >= T else window, 0)
        flat = (t.flatten(0, 1) for t in (q, k, v))
        return varlen_attn(*flat, starts, starts, T, T, window_size=reach).view(B, T, H, D)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    mask, out = causal_mask(T, window, q.dtype), []
    for start in range(0, T, 128):
        query, key = slice(start, start + 128), slice(max(0, (start - window) // 128 * 128), start + 128)
        scores = torch.baddbmm(mask[query, key], q[:, query], k[:, key].mT, alpha=D ** -0.5)
        out.append(scores.softmax(-1) @ v[:, key])
    return torch.cat(out, dim=1).view(B, H, T, D).transpose(1, 2)

class Attention(nn.Module):
    """Multi-head attention with mixed heads, injected values, query and key norm, and a gate per head."""

    def __init__(self, c, layer):
        super().__init__()
        self.n_head = c.n_head
        self.q, self.k, self.v, self.o = (weight(c.n_embd, c.n_embd) for _ in range(4))
        self.mix = weight(3, c.n_head, c.n_head) if c.head_mixing else None
        self.head_gate = weight(c.n_head, 12) if c.head_gate else None
        self.value_proj = weight(c.n_embd, c.n_embd) if c.value_layer(layer) else None
        self.value_gate = weight(c.n_head, 32) if c.value_layer(layer) else None

    def project(self, x, x0, rope):
        """The normalised stream x and the embedding x0, (B, T, C) -> q, k, v (B, T, H, D)."""
        B, T, C = x.shape
        w = torch.stack((self.q, self.k, self.v)).to(x.dtype)
        if self.mix is not None:
            w = self.mix.to(x.dtype) @ w.view(3, self.n_head, -1)
        q, k, v = F.linear(x, w.view(3 * C, C)).view(B, T, 3, self.n_head, -1).unbind(2)
        if self.value_proj is not None:
            gate = 2 * linear(x[..., :32], self.value_gate).sigmoid()
            v = v + gate[..., None] * linear(x0, self.value_proj).view(v.shape)
        return rms(rotate(q, rope)), rms(rotate(k, rope)), v

    def output(self, x, o):
        """x (B, T, C) and the heads' outputs o (B, T, H, D) -> (B, T, C)."""
        if self.head_gate is not None:
            o = o * linear(x[..., :12], self.head_gate).sigmoid()[..., None]
        return linear(o.reshape(x.shape), self.o)

class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, c):
        super().__init__()
        self.gate, self.up = weight(c.mlp_hidden, c.n_embd), weight(c.mlp_hidden, c.n_embd)
        self.out = weight(c.n_embd, c.mlp_hidden)

    def forward(self, x):
        gate, up = linear(x, torch.cat((self.gate, self.up))).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, self.out)

class Block(nn.Module):
    """
    Compiled in two parts, around the attention kernel. They are the same for all layers but for the value
    projection: a few seconds of compilation serve any depth, and windows and replay change nothing.
    """

    def __init__(self, c, layer):
        super().__init__()
        self.p, self.window = c.dropout, c.window(layer)
        self.attn, self.mlp = Attention(c, layer), MLP(c)

    def forward(self, x, x0, rope, drop=None, keep=None):
        """x, x0 (B, T, C); drop (B, 2, 2): keys of two dropouts; keep (B, 1, 1): 0 skips the block."""
        return self.after(x, attention(*self.before(x, x0, rope), self.window), drop, keep)

    def before(self, x, x0, rope):
        return self.attn.project(rms(x), x0, rope)

    def after(self, x, o, drop, keep):
        start, y = x, self.attn.output(rms(x), o)
        x = x + (y if drop is None else dropout(y, self.p, drop[:, 0]))
        y = self.mlp(rms(x))
        x = x + (y if drop is None else dropout(y, self.p, drop[:, 1]))
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
        if c.mtp == "block":
            self.mtp = nn.Module()
            self.mtp.proj = weight(c.n_embd, 2 * c.n_embd)
            self.mtp.block = Block(c, c.n_layer)

    def trunk(self, tokens, replay, noise=None):
        """tokens (B, T) -> (the normalised output (B, T, C), the rotary tables)."""
        x = x0 = rms(F.embedding(tokens, self.embed))
        rope = rope_tables(self.c, x.device, x.dtype)
        half, outputs = self.c.n_layer // 2, {}
        rows = self.c.layer_order(True)  # of the noise: one for each execution when layers are replayed
        for n, layer in enumerate(self.c.layer_order(replay)):
            twin = ()
            if self.skip is not None and layer >= half:
                twin = (self.skip[layer - half], outputs[self.c.n_layer - 1 - layer])
            x = mix_stream(x, x0, self.lam[layer], self.mu[layer], *twin)
            row = n if replay else rows.index(layer)
            x = self.blocks[layer](x, x0, rope, *(part[row] for part in noise or ()))
            if layer < half:
                outputs[layer] = x
        return rms(x), rope

    def loss(self, sequences, replay, noise, batch_sequences):
        """
        sequences (B, T+1) -> (the training loss, the plain next-token loss), divided by the tokens of the
        whole batch: what micro-batches and ranks get adds up to the mean's loss and gradient.
        """
        tokens, targets = sequences[:, :-1], sequences[:, 1:]
        T = tokens.size(1)
        x, rope = self.trunk(tokens, replay, noise)
        weights = torch.full_like(targets, 1 / (batch_sequences * T), dtype=torch.float32)
        loss = plain = head_loss(x, self.head, targets, weights, self)
        if self.c.mtp == "block":
            # Position t also knows token t+1 and predicts t+2; the last one has no target, its weight is 0.
            x = linear(torch.cat((x, rms(F.embedding(targets, self.embed))), dim=-1), self.mtp.proj)
            x = rms(self.mtp.block(x, x, rope, *(part[-1] for part in noise)))
            weights = weights * (self.c.mtp_weight * T / (T - 1))
            weights[:, -1] = 0
            loss = loss + head_loss(x, self.head, targets.roll(-1, 1), weights, self)
        return loss, plain.detach()

    def logits(self, x):
        """(B, T, C) -> (B, T, V) float32, softcapped. Whole logits are for looking at a few sequences."""
        return self.c.softcap * torch.tanh(linear(x, self.head[:self.vocab_size]).float() / self.c.softcap)

    def parameter_count(self):
        return sum(p.numel() for p in self.parameters())

def flops_per_token(c, vocab_size, replay, training=True):
    """
    Floating-point operations of a token's forward (and backward) pass: 2 for each multiplication and addition
    in all executed matrix products, replayed blocks and the MTP head included. Attention counts the keys that
    the causal window shows on average.
    """
    d, head = c.n_embd, vocab_size * c.n_embd
    macs, layers = head, c.layer_order(replay)
    if training and c.mtp == "block":
        macs, layers = macs + head + 2 * d * d, layers + [c.n_layer]
    for layer in layers:
        reach = min(c.window(layer) + 1, c.seq_len)
        keys = reach - reach * (reach - 1) / (2 * c.seq_len)
        macs += 4 * d * d + 3 * d * c.mlp_hidden + 12 * c.n_head * c.head_gate + 2 * d * keys
        macs += c.value_layer(layer) * (d * d + 32 * c.n_head)
    return (6 if training else 2) * macs


# ---- Head and loss -----------------------------------------------------------------------------------------

def softcap_pass(logits, softcap):
    """
    Raw logits l (n, V) -> (s (n,) float32, u (n, V) in the logits' dtype): s is the sum of the softmax's
    exponentials, u / s its probabilities times the softcap's slope. As z = c tanh(l / c) <= c, nobody need
    look for the maximum: q = 1 / (1 + exp(2 l / c)) gives z - c = -2 c q and dz/dl = 4 q (1 - q).
    """
    q = 1 / (1 + torch.exp(logits.float() * (2 / softcap)))
    e = torch.exp(q * (-2 * softcap))
    return e.sum(-1), (e * (4 * q * (1 - q))).to(logits.dtype)

def softcap_sum(logits, softcap):
    """The first half of softcap_pass, for scoring."""
    return torch.exp(-2 * softcap / (1 + torch.exp(logits.float() * (2 / softcap)))).sum(-1)

def chunk_rows(vocab_size, device):
    """Tokens whose logits are held at a time: 4M entries stay in a CPU's cache, 128M keep a GPU busy."""
    return max(128, (2 ** 27 if device.type == "cuda" else 2 ** 22) // vocab_size)

class HeadLoss(torch.autograd.Function):
    """
    sum_n w_n (-log softmax(softcap(x_n W^T))[y_n]), by chunks of tokens; gradients are made in the same pass
    over the logits. x (N, C), W (V, C), y (N,) int64, w (N,) float32 -> scalar float32. Once differentiable.
    """

    @staticmethod
    def forward(ctx, x, W, y, w, softcap):
        loss = torch.zeros((), device=x.device)
        dx, dW, Wc = torch.empty_like(x), torch.zeros_like(W), W.to(x.dtype)
        for n in range(0, len(x), rows := chunk_rows(len(W), x.device)):
            xn, yn, wn = x[n:n + rows], y[n:n + rows, None], w[n:n + rows, None]
            logits = xn @ Wc.T
            s, u = softcap_pass(logits, softcap)
            t = torch.tanh(logits.gather(1, yn).float() / softcap)
            loss += (wn * (s.log()[:, None] + softcap - softcap * t)).sum()
            # u / s is the gradient of the raw logits; the division waits until the rows have only C entries.
            u.scatter_add_(1, yn, (-s[:, None] * (1 - t * t)).to(u.dtype))
            scale = wn / s[:, None]
            dx[n:n + rows] = (u @ Wc) * scale
            dW += u.T @ (xn * scale).to(x.dtype)
        ctx.save_for_backward(dx, dW)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dW = ctx.saved_tensors
        return (dx * grad).to(dx.dtype), dW * grad, None, None, None

def head_loss(x, W, targets, weights, model):
    """The weighted sum of the next-token losses of x (B, T, C) for targets (B, T)."""
    x, W = x.flatten(0, 1), W[:model.vocab_size]
    return HeadLoss.apply(x, W, targets.flatten(), weights.flatten(), model.c.softcap)

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
    scaled = lambda lr: lr * c.lr_scale
    uniform = lambda p, g: p.uniform_(-width, width, generator=g)
    normal = lambda std: lambda p, g: p.normal_(0, std, generator=g)
    constant = lambda value: lambda p, g: p.fill_(value)
    identity = lambda p, g: p.copy_(torch.eye(p.size(-1)))
    muon, adamw, fast = ("muon", scaled(c.lr_matrix), (0.95, 0.95)), "adamw", (0.8, 0.95)
    return [
        Row(r"embed", normal(1.0), adamw, scaled(c.lr_embed), fast, c.weight_decay),
        Row(r"head", normal(0.001), adamw, scaled(c.lr_head), fast, c.weight_decay),
        Row(r"lam|skip", constant(1.0), adamw, scaled(c.lr_scalar) * 0.01, fast, 0.0),
        Row(r"mu", constant(0.1), adamw, scaled(c.lr_scalar), (0.96, 0.95), 0.0),
        Row(r".*\.mix", identity, adamw, c.lr_mixing, fast, 0.0),
        Row(r".*\.(head|value)_gate", constant(0.0), *muon, c.weight_decay),
        Row(r".*\.(q|k|v|value_proj|gate|up)|mtp\.proj", uniform, *muon, c.weight_decay),
        Row(r".*\.(o|out)", normal(c.n_embd ** -0.5), *muon, c.weight_decay),
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

    def __init__(self, row, params, c, dtype):
        self.row, self.c, self.dtype = row, c, dtype
        rank, world = dist.get_rank(), dist.get_world_size()
        shape, size = params[0].shape, sum(p.numel() for p in params)
        # Muon's matrices are never cut: the unit is a matrix. AdamW's unit is a number.
        unit = shape.numel() if row.optimizer == "muon" else 1
        part, self.units = -(-size // (unit * world)) * unit, size // unit
        self.values, self.grads = params[0].new_zeros(part * world), params[0].new_zeros(part * world)
        start = 0
        for p in params:
            view = slice(start, start := start + p.numel())
            self.values[view] = p.data.flatten()
            p.data, p.grad = self.values[view].view(p.shape), self.grads[view].view(p.shape)
        own = slice(rank * part, (rank + 1) * part)
        self.W, self.G = self.values[own], self.grads[own]
        if row.optimizer == "muon":
            self.W, self.G = self.W.view(-1, *shape), self.G.view(-1, *shape)
            variance = (len(self.W), shape[0], 1) if shape[0] >= shape[1] else (len(self.W), 1, shape[1])
            self.state = {"momentum": torch.zeros_like(self.W), "variance": self.W.new_zeros(variance)}
        else:
            self.state = {"mean": torch.zeros_like(self.W), "square": torch.zeros_like(self.W)}

    def update(self, lr, weight_decay, momentum, step):
        """The multipliers of learning rate and decay, Muon's momentum, and the step counted from 1."""
        row = self.row
        settings = self.W, self.G, self.state, lr * row.lr, weight_decay * row.weight_decay
        if row.optimizer == "muon":
            muon_update(*settings, momentum, row.betas[1], self.c.row_norm, self.dtype)
        else:
            adamw_update(*settings, *row.betas, step)

    def gather(self):
        """Starts to bring the values from their owners to every rank; -> the work to wait for."""
        return dist.all_gather_single(self.values, self.W.flatten(), async_op=True)

    def shards(self, mesh):
        """A copy of values and optimizer state, as this rank's part of distributed tensors, unpadded."""
        own = max(0, min(self.units - dist.get_rank() * len(self.W), len(self.W)))
        return {name: DTensor.from_local(part[:own].to("cpu", copy=True), mesh, [Shard(0)], run_check=False,
                                         shape=(self.units, *part.shape[1:]), stride=part.stride())
                for name, part in {"values": self.W, **self.state}.items()}

    def load(self, shards):
        """Takes over what `shards` had and a checkpoint has been loaded into."""
        for name, part in {"values": self.W, **self.state}.items():
            local = shards[name].to_local()
            part[:len(local)].copy_(local)
        self.gather().wait()

class Optimizer:
    """All groups, sharded over the ranks (as ZeRO-2 does, Rajbhandari et al. 2020, arXiv 1910.02054)."""

    def __init__(self, model, c, dtype):
        groups = {}
        for _, p, row in match_rows(model, c):
            shape = p.shape if row.optimizer == "muon" else None
            groups.setdefault((*row[2:], p.dtype, shape), (row, []))[1].append(p)
        self.groups = [Group(row, params, c, dtype) for row, params in groups.values()]
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def shards(self):
        """A copy of parameters and optimizer state for a distributed checkpoint: any ranks can load it."""
        return {f"{i}": group.shards(self.mesh) for i, group in enumerate(self.groups)}

    @torch.no_grad()
    def step(self, lr, weight_decay, momentum, step):
        """Sums gradients over the ranks, updates parameters, clears gradients; -> this rank's |G|^2."""
        reduces = [dist.reduce_scatter_single(g.G.flatten(), g.grads, async_op=True) for g in self.groups]
        gathers, squares = [], torch.zeros((), device=self.groups[0].W.device)
        for group, reduce in zip(self.groups, reduces):
            reduce.wait()
            squares += torch.linalg.vector_norm(group.G).float() ** 2
            group.update(lr, weight_decay, momentum, step)
            gathers.append(group.gather())
            group.grads.zero_()
        for gather in gathers:
            gather.wait()
        return squares


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
        self.splits = {split: self.open(self.folder / f"{split}.bin", split) for split in self.digests}

    def open(self, path, split):
        """The llm.c format: 256 int32 of header (magic, version, tokens), then uint16 tokens."""
        if not path.exists():
            fail(f"{path} is missing; {self.remedy}")
        header, held = np.fromfile(path, dtype="<i4", count=256), path.stat().st_size // 2 - 512
        if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
            fail(f"{path} is not a token file (wrong magic or version); {self.remedy}")
        if held != header[2] or path.stat().st_size % 2:
            fail(f"{path} is truncated: its header says {header[2]} tokens, it holds {held}; {self.remedy}")
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
        if digest(tokens) != self.digests[split]:
            fail(f"{path} does not have the digest of its manifest; {self.remedy}")
        if tokens.max() >= self.vocab_size:
            fail(f"{path} holds token {tokens.max()}, beyond its vocabulary; {self.remedy}")
        if tokens[0] != self.bos_id:
            fail(f"{path} does not start with a document; {self.remedy}")
        return tokens

    def sequences(self, split, T):
        """The split in file order, (sequences, T+1) uint16; the tail that fills no sequence is left out."""
        tokens = self.splits[split]
        return tokens[:len(tokens) // (T + 1) * (T + 1)].reshape(-1, T + 1)

    def documents(self, split):
        """The first position of every document, int64."""
        return np.flatnonzero(self.splits[split] == self.bos_id)

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
    layers = np.array(c.layer_order(replay=True) + [c.n_layer])
    drop, keep = [], []
    for index in indices:
        generator = np.random.Generator(np.random.Philox(key=[seed, index]))
        drop.append(generator.integers(-2 ** 31, 2 ** 31, (len(layers), 2, 2)).astype(np.int32))
        keep.append(generator.random(len(layers)) >= c.stochastic_depth * layers / (c.n_layer - 1))
    drop, keep = (torch.from_numpy(np.stack(draws, axis=1)) for draws in (drop, keep))
    return Noise(drop, keep[..., None, None].to(dtype))

def batches(stream, c, seed, step, device, dtype, device_batch):
    """This rank's micro-batches of an optimizer step: (sequences (B, T+1) int64, noise), on the device."""
    share = c.batch_sequences // dist.get_world_size()
    first = step * c.batch_sequences + dist.get_rank() * share
    for start in range(first, first + share, device_batch):
        indices = range(start, start + device_batch)
        sequences = torch.from_numpy(np.stack([stream.sequence(i) for i in indices]).astype(np.int64))
        noise = draw_noise(c, seed, indices, dtype)
        move = lambda tensor: tensor.to(device, non_blocking=True)
        yield move(sequences), Noise(*map(move, noise))


# ---- Schedules ---------------------------------------------------------------------------------------------

class Schedule:
    """All that changes with the step. `per_epoch` sequences make an epoch, `steps` batches the run."""

    def __init__(self, c, per_epoch):
        self.c, self.per_epoch = c, per_epoch
        self.steps = max(1, round(c.epochs * per_epoch / c.batch_sequences))

    def epoch(self, step):
        """The epoch in which a step lies, from 1: that of its first sequence. Steps straddle the borders."""
        return step * self.c.batch_sequences // self.per_epoch + 1

    def replay(self, step):
        return self.epoch(step) >= self.c.replay_from

    def cycle(self, step):
        """How far the step is in its cosine cycle, 0 to 1; None before the last `cycles` epochs."""
        epoch = self.steps / self.c.epochs
        start = self.steps - self.c.cycles * epoch
        return (step - start) % epoch / epoch if self.c.cycles and step >= start else None

    def lr(self, step):
        """Multiplier of all learning rates: flat, then falling; at last a cosine to 0.05 in each epoch."""
        left, warmdown = self.steps - step, round(self.c.warmdown * self.steps)
        base = 1.0 if left >= warmdown else (left / warmdown) ** self.c.warmdown_power
        if (cycle := self.cycle(step)) is None:
            return base
        return 0.05 + (max(base, 0.05) - 0.05) * (1 + math.cos(math.pi * cycle)) / 2

    def weight_decay(self, step):
        """Multiplier of the decay: flat to 40% of the run, down to 0.65, in each cycle from 0.65 to 1.5."""
        if self.c.wd_schedule == "constant":
            return 1.0
        if (cycle := self.cycle(step)) is not None:
            return 0.65 + 0.85 * cycle
        t, end = step / self.steps, 1 - self.c.cycles / self.c.epochs
        return 1.0 if t <= 0.4 else 1 - 0.35 * min(1.0, (t - 0.4) / (end - 0.4))

    def momentum(self, step):
        """Muon's momentum warms up over 300 steps."""
        return 0.85 + 0.10 * min(step / 300, 1)

    def training_flops(self, vocab_size, steps=None):
        """The counted operations of the run's first `steps` steps, by default of all."""
        replayed = sum(map(self.replay, range(steps := steps or self.steps)))
        per_token = [flops_per_token(self.c, vocab_size, replay) for replay in (False, True)]
        return self.c.batch_tokens * ((steps - replayed) * per_token[0] + replayed * per_token[1])


# ---- Scoring -----------------------------------------------------------------------------------------------

class Score(NamedTuple):
    loss: float             # nats per token
    bpb: float              # bits per byte, over the targets that have bytes
    documents: dict         # loss (float64), tokens, bytes (int64) of each of the split's documents

def log_likelihoods(model, sequences, replay, batch):
    """
    sequences (n, T+1) -> log-probabilities of all targets, (n, T) float64 on every rank. Each sequence is
    scored once, by one rank; the last batch is filled up with the first sequence, which is then dropped.
    """
    rank, world, device = dist.get_rank(), dist.get_world_size(), model.embed.device
    out = torch.zeros(len(sequences), sequences.shape[1] - 1, dtype=torch.float64, device=device)
    for start in range(rank * batch, len(sequences), world * batch):
        rows = np.arange(start, start + batch)
        chosen = sequences[np.where(rows < len(sequences), rows, 0)]
        part = torch.from_numpy(chosen.astype(np.int64)).to(device)
        with torch.no_grad():
            x, _ = model.trunk(part[:, :-1], replay)
            scores = target_logprobs(x, model.head[:model.vocab_size], part[:, 1:], model.c.softcap)
        out[start:start + batch] = scores[:len(sequences) - start]
    dist.all_reduce(out)
    return out

def score(data, split, T, logp):
    """logp (n, T) of the split's targets -> its Score. A target counts for the document that it stands in."""
    targets = data.sequences(split, T)[:, 1:]
    nats, size = -logp.cpu().numpy().ravel(), data.token_bytes[targets.ravel()]
    is_start = data.splits[split] == data.bos_id
    owner = (np.cumsum(is_start) - 1)[:len(targets) * (T + 1)].reshape(-1, T + 1)[:, 1:].ravel()
    total = lambda weights: np.bincount(owner, weights=weights, minlength=is_start.sum())
    sums = {"loss": total(nats), "tokens": total(None), "bytes": total(size).astype(np.int64)}
    return Score(nats.mean(), nats[size > 0].sum() / (math.log(2) * size.sum()), sums)

class Member(NamedTuple):
    """A model of a predictor: its checkpoint, its weight, and the configuration it is run in."""
    checkpoint: str
    weight: float
    replay: bool

def checkpoint_name(epoch):
    return f"epoch_{epoch:04d}.pt"

def late_members(c, epochs):
    """The predictor of a run: the checkpoints of these epochs, weighted by recency or equally (#12)."""
    weights = [n if c.average_weights == "recency" else 1 for n in range(1, len(epochs) + 1)]
    return [Member(checkpoint_name(epoch), weight / sum(weights), epoch >= c.replay_from)
            for epoch, weight in zip(epochs, weights)]

def score_mixture(model, folder, members, data, split, batch):
    """
    -> (the Score of the members' weighted mean probability, the loss of each). Members are loaded one after
    another and only their targets' probabilities are kept: memory does not grow with their number.
    """
    sequences = data.sequences(split, model.c.seq_len)
    mixture, losses = None, []
    for member in members:
        load_weights(model, folder / member.checkpoint)
        logp = log_likelihoods(model, sequences, member.replay, batch)
        losses.append(-logp.mean().item())
        logp += math.log(member.weight)
        mixture = logp if mixture is None else torch.logaddexp(mixture, logp)
    return score(data, split, model.c.seq_len, mixture), losses

class Predictor:
    """What a run predicts with, for records/ruler.py: `logprobs(tokens)` is its interface."""

    def __init__(self, run_dir, device):
        self.folder, self.device = Path(run_dir) / "checkpoints", torch.device(device)
        spec = json.loads((self.folder / "predictor.json").read_text())
        self.members, self.loaded = [Member(**member) for member in spec["members"]], None
        dtype = getattr(torch, spec["dtype"])
        self.model = make_model(Config(**spec["config"]), spec["vocab_size"], self.device, dtype)

    @torch.no_grad()
    def logprobs(self, tokens):
        """tokens (B, T) int64 -> (B, T, V) float32: position t has the log-probabilities of token t+1."""
        mixture = None
        for member in self.members:
            if self.loaded != member.checkpoint:
                load_weights(self.model, self.folder / member.checkpoint)
                self.loaded = member.checkpoint
            x, _ = self.model.trunk(tokens.to(self.device), member.replay)
            logp = self.model.logits(x).log_softmax(-1) + math.log(member.weight)
            mixture = logp if mixture is None else torch.logaddexp(mixture, logp)
        return mixture

load_predictor = Predictor


# ---- The run folder ----------------------------------------------------------------------------------------

def make_model(c, vocab_size, device, dtype):
    """A model without values. The embedding has the compute dtype, and so the stream; the rest is float32."""
    with torch.device("meta"):
        model = GPT(c, vocab_size)
    model = model.to_empty(device=device)
    model.embed.data = model.embed.data.to(dtype)
    return model

@torch.no_grad()
def load_weights(model, path):
    weights = torch.load(path, map_location=model.embed.device, mmap=True, weights_only=True)
    for name, p in model.named_parameters():
        p.copy_(weights[name])

def write_atomic(path, write):
    """write(file) to a temporary name, which takes its place only when all of it is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save wraps a full disk's OSError into a RuntimeError.
        raise error.__context__ if isinstance(error.__context__, OSError) else error

def write_json(path, value):
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))

class RunLog:
    """
    The run folder's text: console and log.txt, metrics.jsonl, loss.svg. Every rank keeps the metrics, rank 0
    writes.
    """

    def __init__(self, folder, title, wandb_settings):
        self.folder, self.title, self.wandb = folder, title, None
        self.metrics, self.main = {"step": [], "eval": [], "final": []}, dist.get_rank() == 0
        if self.main and not (folder / "log.txt").exists():
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
            with open(self.folder / "log.txt", "a") as file:
                print(text, file=file)
            if console:
                tqdm.write(text)

    def metric(self, kind, **values):
        self.metrics[kind].append(values)
        if self.main:
            with open(self.folder / "metrics.jsonl", "a") as file:
                print(json.dumps({"kind": kind, **values}), file=file)
        if self.wandb is not None:
            named = {f"{kind}/{name}": value for name, value in values.items()}
            self.guard(lambda: self.wandb.log(named, step=values["step"]))

    def rewind(self, size):
        """Cuts metrics.jsonl to the `size` bytes that a state had seen of it, and reads them again."""
        path = self.folder / "metrics.jsonl"
        if self.main:
            with open(path, "a") as file:
                file.truncate(size)
        dist.barrier()
        for line in path.read_text().splitlines():
            values = json.loads(line)
            self.metrics[values.pop("kind")].append(values)

    def plot(self, final=None):
        """loss.svg: the training loss of every step, its running mean, and the validation losses."""
        if not self.main:
            return
        import matplotlib
        matplotlib.use("svg")
        from matplotlib import pyplot as plt
        x, y = (np.array([m[key] for m in self.metrics["step"]]) for key in ("step", "loss"))
        at, val = ([m[key] for m in self.metrics["eval"]] for key in ("step", "loss"))
        width = max(1, len(y) // 50)
        with plt.rc_context({"svg.hashsalt": "slowrun", "font.size": 9}):
            figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
            axes.plot(x, y, color="0.85", linewidth=0.7, label="training")
            mean = np.convolve(y, np.ones(width) / width, "valid")
            axes.plot(x[width - 1:], mean, label=f"mean of {width} steps")
            axes.plot(at, val, "C1o-", markersize=3, label="validation")
            if final is not None:
                axes.axhline(final, color="C3", linestyle="--", label=f"final predictor {final:.4f}")
            low = min(*val, *y[len(y) // 2:], final or math.inf)
            axes.set(title=self.title, xlabel="step", ylabel="nats per token", ylim=(low - 0.1, low + 2.5))
            axes.legend(frameon=False)
            write_atomic(self.folder / "loss.svg",
                         lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
            plt.close(figure)

class Keeper:
    """
    The states from which a run can go on: state/step_NNNNNNN/, the newest two. Each rank writes its part of a
    copy, in the background and under a temporary name; when all is on the disk, rank 0 adds the progress and
    the digests and renames the folder.
    """

    def __init__(self, folder, optimizer, timeout):
        self.folder, self.optimizer, self.writing = folder / "state", optimizer, None
        self.writer = ThreadPoolExecutor(1)
        self.group = dist.new_group(backend="gloo", timeout=timeout)  # not to mix with training's messages
        self.saved_at = time.monotonic()
        on_main(self.clear)

    def clear(self):
        self.folder.mkdir(exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            shutil.rmtree(leftover)

    def save(self, progress):
        """Copies the state and begins to write it, with a dictionary for JSON, after the one before."""
        self.wait()
        self.writing = self.writer.submit(self.write, self.optimizer.shards(), progress)
        self.saved_at = time.monotonic()

    def write(self, shards, progress):
        """In the writer's thread. The save ends on rank 0 when all ranks' parts are on the disk."""
        temporary = self.folder / f"step_{progress['step']:07d}.tmp"
        dcp.save(shards, checkpoint_id=temporary, process_group=self.group)
        if dist.get_rank() == 0:
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

    def restore(self, log):
        """Loads the newest sound state in place; -> its progress, or None where there is no state."""
        path, progress = on_main(self.newest, log)
        if path:
            shards = self.optimizer.shards()
            dcp.load(shards, checkpoint_id=path, process_group=self.group)
            for i, group in enumerate(self.optimizer.groups):
                group.load(shards[f"{i}"])
        return progress

    def newest(self, log):
        """The newest sound state and its progress. Those that are not sound are named and removed."""
        for path in sorted(self.folder.glob("step_???????"), reverse=True):
            try:
                for name, expected in json.loads((path / "manifest.json").read_text()).items():
                    if digest(np.memmap(path / name, mode="r")) != expected:
                        raise ValueError(f"{name} does not have its digest")
                return path, json.loads((path / "progress.json").read_text())
            except (OSError, ValueError) as error:
                log(f"state  {path.name} is unsound: {error}; going back to the one before it")
                shutil.rmtree(path)
        return None, None

def on_main(function, *arguments):
    """Rank 0 calls the function; every rank gets its result, or ends as rank 0 does."""
    outcome = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [function(*arguments)]
        except (SystemExit, OSError) as end:
            outcome = [end]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], (SystemExit, OSError)):
        raise outcome[0]
    return outcome[0]

def open_run(c, args, data):
    """
    -> the run's folder, locked: a new one, or with --resume that of an unfinished run, which must be the
    same. When torchrun has restarted the group because a rank was lost, the group's run goes on by itself.
    """
    launch = f"{os.environ.get('TORCHELASTIC_RUN_ID')} on {platform.node()} by {os.getppid()}"
    run = {"track": args.track, "seed": args.seed, "config": dataclasses.asdict(c),
           "data": {"name": data.name, **data.digests}, "source_sha256": SOURCE_SHA256}
    runs = sorted((old["started"], path.parent, old["launch"]) for path in (ROOT / "runs").glob("*/run.json")
                  if (old := json.loads(path.read_text()))["track"] == args.track)
    unfinished = [folder for _, folder, _ in runs if not (folder / "result.json").exists()]
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if own := [folder for _, folder, by in runs if restarted and by == launch]:
        folder = own[-1] if own[-1] in unfinished else sys.exit()  # a rank was lost after the end
    elif args.resume == "newest":
        folder = unfinished[-1] if unfinished else fail(f"no run of the track {args.track} is unfinished")
    elif args.resume:
        folder = ROOT / "runs" / args.resume
        if not (folder / "run.json").exists():
            fail(f"there is no run to resume in runs/{args.resume}")
    else:
        name = args.run_name or f"{args.track}_{datetime.now():%Y%m%d-%H%M%S}_s{args.seed}"
        folder = ROOT / "runs" / name
        if any(path.name not in ("checkpoints", "run.json.tmp") for path in folder.glob("*")):
            fail(f"the run runs/{name} exists already; choose another --run-name, or --resume {name}")
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", run | {"launch": launch, "started": time.time()})
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)  # never closed: held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is training in runs/{folder.name}; stop it first")
    write_json(folder / "run.json", check_same_run(folder, run, args) | {"launch": launch})
    return folder

def check_same_run(folder, run, args):
    """A run goes on only as what it was: track, seed, configuration, data and source; -> its run.json."""
    before = json.loads((folder / "run.json").read_text())
    if (folder / "result.json").exists():
        fail(f"the run {folder.name} is complete: see runs/{folder.name}/result.json")
    flat = lambda run: {**run["config"], **{name: run[name] for name in ("track", "seed", "data")}}
    old, new = flat(before), flat(run)
    changed = [f"{name} was {old.get(name)}, is {new[name]}" for name in new if old.get(name) != new[name]]
    if before["source_sha256"] != SOURCE_SHA256 and not args.resume_anyway:
        changed.append("train_gpt.py was edited since (--resume-anyway accepts that)")
    if changed:
        fail(f"the run {folder.name} cannot go on as another one: {'; '.join(changed)}")
    return before


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

def warm_up(model, c, args, device, dtype):
    """Compiles every variant of the model on throw-away data, so that training time holds none of it."""
    sequences = torch.zeros(args.device_batch, c.seq_len + 1, dtype=torch.int64, device=device)
    noise = Noise(*(part.to(device) for part in draw_noise(c, args.seed, range(args.device_batch), dtype)))
    for replay in (False, True):
        loss, _ = model.loss(sequences, replay, noise, c.batch_sequences)
        loss.backward()
        log_likelihoods(model, sequences[:1].cpu().numpy(), replay, args.device_batch)
    for p in model.parameters():
        p.grad.zero_()

def train(c, args, data, log, device, dtype, stop):
    """Trains a model, or goes on with it; -> (model, members, steps, {train,wall}_seconds)."""
    started = time.time()
    stream = Stream(data.splits["train"], data.documents("train"), c, args.seed)
    schedule = Schedule(c, stream.per_epoch)
    steps = min(schedule.steps, args.max_steps or schedule.steps)
    model = make_model(c, data.vocab_size, device, dtype)
    initialise(model, c, args.seed)
    optimizer = Optimizer(model, c, dtype)
    keeper = Keeper(log.folder, optimizer, timedelta(minutes=args.timeout))
    log(f"plan   {model.parameter_count():,} parameters, "
        f"{c.epochs} epochs of {stream.per_epoch * c.seq_len:,} tokens, "
        f"{schedule.steps} steps of {c.batch_tokens:,}, {schedule.training_flops(data.vocab_size):.3g} FLOPs")
    warm_up(model, c, args, device, dtype)
    progress = keeper.restore(log) or dict(step=0, metrics_bytes=0, train_seconds=0.0, wall_seconds=0.0)
    first, train_seconds = progress["step"], progress["train_seconds"]
    log.rewind(progress["metrics_bytes"])
    wall_seconds = lambda: progress["wall_seconds"] + time.time() - started

    def check_finite(what, value, step):
        if not math.isfinite(value):
            kept = sorted(path.name for path in (log.folder / "checkpoints").glob("epoch_*.pt"))
            quit_run(3, f"the {what} is {value} at step {step}; the last good checkpoint is "
                        f"{kept[-1] if kept else 'none'} in runs/{log.folder.name}")

    def evaluate(step, epoch):
        replay = schedule.replay(max(step - 1, 0))
        logp = log_likelihoods(model, data.sequences("val", c.seq_len), replay, args.device_batch)
        result = score(data, "val", c.seq_len, logp)
        check_finite("val loss", result.loss, step)
        log.metric("eval", step=step, epoch=epoch, split="val", loss=result.loss, bpb=result.bpb)
        return result

    def save_state(step):
        with open(log.folder / "metrics.jsonl", "a") as file:
            os.fsync(file.fileno())
            keeper.save({"step": step, "metrics_bytes": file.tell(), "train_seconds": train_seconds,
                         "wall_seconds": wall_seconds()})

    if first:
        log(f"resume at step {first}, after {train_seconds / 60:.1f} minutes of training")
    else:
        log(f"start  val {evaluate(0, 0).loss:.4f} before training")
    gc.collect()
    gc.freeze()  # what lives now lives to the end: the collector need not walk it at every pass
    bar = tqdm(initial=first, total=steps, unit="step", file=sys.stdout, dynamic_ncols=True,
               disable=not (log.main and sys.stdout.isatty()))
    for step in range(first, steps):
        began, epoch = time.perf_counter(), schedule.epoch(step)
        lr, weight_decay, momentum = schedule.lr(step), schedule.weight_decay(step), schedule.momentum(step)
        loss = torch.zeros((), device=device)
        for sequences, noise in batches(stream, c, args.seed, step, device, dtype, args.device_batch):
            total, plain = model.loss(sequences, schedule.replay(step), noise, c.batch_sequences)
            total.backward()
            loss += plain
        squares = optimizer.step(lr, weight_decay, momentum, step + 1)
        # One message tells all ranks the loss, the gradient's norm, and whether one was told to stop or save.
        save_due = time.monotonic() > keeper.saved_at + 60 * args.save_every
        report = torch.stack((loss, squares, *loss.new_tensor((save_due, stop.name is not None))))
        dist.all_reduce(report)
        loss, squares, save_due, stopping = report.tolist()
        train_seconds += time.perf_counter() - began
        check_finite("training loss", loss, step)
        check_finite("gradient", squares, step)
        log.metric("step", step=step, loss=loss, grad_norm=squares ** 0.5, lr=lr, weight_decay=weight_decay,
                   seconds=round(train_seconds, 3))
        log(f"step   {step + 1:5d}/{steps}  train {loss:.4f}  {train_seconds:.1f} s", console=False)
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        bar.update()
        if step == first + 9:
            per_step = (train_seconds - progress["train_seconds"]) / 10
            log(f"       about {per_step * (steps - first) / 60:.1f} minutes of training expected")
        if schedule.epoch(step + 1) > epoch or step + 1 == steps:
            result = evaluate(step + 1, epoch)
            if log.main:
                folder = log.folder / "checkpoints"
                save = lambda file: torch.save(model.state_dict(), file)
                write_atomic(folder / checkpoint_name(epoch), save)
                (folder / checkpoint_name(epoch - c.average)).unlink(missing_ok=True)
            losses = [m["loss"] for m in log.metrics["step"] if schedule.epoch(m["step"]) == epoch]
            log(f"epoch  {epoch:3d}/{c.epochs}  step {step + 1:5d}  train {np.mean(losses):.4f}  "
                f"val {result.loss:.4f}  {result.bpb:.4f} bpb  {train_seconds / 60:.1f} min  "
                f"{(step + 1) * c.batch_tokens / train_seconds:,.0f} tok/s")
            log.plot()
            save_state(step + 1)
        elif save_due or stopping:
            save_state(step + 1)
        if stopping and step + 1 < steps:
            keeper.wait()
            dist.barrier()
            quit_run(75, f"stopped by a signal after step {step}; to go on, give the same command and "
                         f"--resume {log.folder.name}")
    keeper.wait()
    bar.close()
    last = schedule.epoch(steps - 1)
    members = late_members(c, range(max(1, last - c.average + 1), last + 1))
    return model, members, steps, {"train_seconds": train_seconds, "wall_seconds": wall_seconds()}

def finish(c, args, data, log, machine, model, members, steps, seconds):
    """Scores the final predictor, writes what the run leaves behind, prints the final table."""
    if log.main:
        write_json(log.folder / "checkpoints" / "predictor.json",
                   {"config": dataclasses.asdict(c), "vocab_size": data.vocab_size,
                    "dtype": str(model.embed.dtype)[6:], "members": [m._asdict() for m in members]})
    scores, documents, losses = {}, {}, {}
    for split in ("val", "audit"):
        scores[split], losses[split] = score_mixture(
            model, log.folder / "checkpoints", members, data, split, args.device_batch)
        documents |= {f"{split}_{name}": values for name, values in scores[split].documents.items()}
    schedule = Schedule(c, len(data.splits["train"]) // (c.seq_len + 1))
    totals = {f"{split}_{name}": getattr(scores[split], name) for split in scores for name in ("loss", "bpb")}
    r = {
        "track": args.track, "seed": args.seed, "config": dataclasses.asdict(c), **totals,
        "members": [{"checkpoint": m.checkpoint, "weight": m.weight, "val_loss": loss}
                    for m, loss in zip(members, losses["val"])],
        "parameters": model.parameter_count(), "tokens_seen": steps * c.batch_tokens,
        "training_flops": schedule.training_flops(data.vocab_size, steps), **seconds,
        "machine": machine, "data": {"name": data.name, **data.digests}, "source_sha256": SOURCE_SHA256,
        "val_evaluations": len(log.metrics["eval"]) + 1, "date": f"{datetime.now():%Y-%m-%d}",
    }
    field, cap = CAPS.get(args.track, ("training_flops", math.inf))
    dataset = TRACKS[args.track].get("dataset", Config.dataset)
    r["violations"] = [reason for reason, broken in {
        f"{field} {r[field]:.4g} is over the track's cap of {cap:.4g}": r[field] > cap,
        "stopped early by --max-steps": steps < schedule.steps,
        f"trained on {data.name}, not on the track's {dataset}": data.name != dataset,
    }.items() if broken]
    r["complete"] = True
    log.metric("final", step=steps, **totals)
    log.plot(final=r["val_loss"])
    if log.main:
        write_atomic(log.folder / "doc_losses.npz", lambda file: np.savez_compressed(file, **documents))
        write_json(log.folder / "result.json", r)
        shutil.rmtree(log.folder / "state")
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


# ---- main --------------------------------------------------------------------------------------------------

def parse_args(argv):
    """-> (the Config: defaults, then the track's row, then --config, then flags; all of the command line)."""
    layout, switch = argparse.RawDescriptionHelpFormatter, argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see ./run.sh --help and ./run.sh nano --help")
    add = parser.add_argument
    add("--track", default="nano", help=f"the preset: {', '.join(TRACKS)} (default nano)")
    add("--config", metavar="FILE", help="a JSON file of fields that override the track's")
    add("--seed", type=int, default=42, help="of initialisation, data order and dropout (default 42)")
    add("--run-name", help="the folder under runs/ (default: track, date, time and seed)")
    add("--data", metavar="DIR", help="the dataset's folder (default: data/ and the name of the dataset)")
    add("--device-batch", type=int, metavar="B", help="sequences per rank and micro-step (16k tokens)")
    add("--dtype", choices=("bfloat16", "float32"), help="of the products (default: bfloat16 if in hardware)")
    add("--compile", action=switch, default=True, help="compile the blocks (default yes)")
    add("--resume", nargs="?", const="newest", metavar="RUN", help="go on with a run (default the newest)")
    add("--resume-anyway", action="store_true", help="even if train_gpt.py was edited since")
    add("--save-every", type=float, default=5, metavar="MIN", help="minutes between states (default 5)")
    add("--timeout", type=float, default=10, metavar="MIN", help="that ranks wait for another (default 10)")
    add("--max-steps", type=int, metavar="N", help="stop early; the run is no record")
    add("--wandb", nargs="?", const="slowrun", metavar="PROJECT", help="log to Weights & Biases, offline too")
    group = parser.add_argument_group("fields of the configuration (defaults are the limited track's)")
    for field in dataclasses.fields(Config):
        allowed, text = COMMENTS[field.name]
        kind = {"action": switch} if field.type is bool else {"type": field.type, "metavar": allowed or "X"}
        group.add_argument("--" + field.name.replace("_", "-"), **kind, default=None,
                           help=f"{text} (default {field.default})".replace("%", "%%"))
    args = parser.parse_args(argv)
    if args.track not in TRACKS:
        fail(f"there is no track {args.track}; the tracks are {', '.join(TRACKS)}")
    for name, low in (("seed", 0), ("device_batch", 1), ("max_steps", 1), ("save_every", 0), ("timeout", 0)):
        if (value := getattr(args, name)) is not None and value < low:
            fail(f"--{name.replace('_', '-')} {value} is out of range: {low} or more")
    if args.run_name and not re.fullmatch(r"[\w.+=-]+", args.run_name):
        fail(f"--run-name {args.run_name}: only letters, digits and . _ + = -")
    fields = dict(TRACKS[args.track])
    if args.config:
        try:
            fields |= json.loads(Path(args.config).read_text())
        except (OSError, ValueError, TypeError) as error:
            fail(f"--config {args.config} is not a JSON object of fields: {error}")
        if unknown := set(fields) - set(COMMENTS):
            fail(f"--config {args.config} has unknown fields: {', '.join(sorted(unknown))}")
    fields |= {name: getattr(args, name) for name in COMMENTS if getattr(args, name) is not None}
    return Config(**fields), args

def pick_device(args):
    """-> (device, its name, dtype, why it). Without bfloat16 products in hardware, float32 is faster."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        name, fast = torch.cuda.get_device_name(), torch.cuda.get_device_capability()[0] >= 8
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        models = re.findall(r"model name\s*: (.*)", info) or [platform.processor() or platform.machine()]
        device, name = torch.device("cpu"), f"{models[0]}, {os.cpu_count()} cores"
        fast = bool({"amx_bf16", "avx512_bf16"} & set(info.split()))
    if args.dtype:
        return device, name, getattr(torch, args.dtype), "--dtype"
    return device, name, *((torch.bfloat16, "in hardware") if fast else (torch.float32, "no bfloat16 units"))

def setup_compile(wanted, device):
    """Compiles what is worth it, where that can work; -> how it stands, for the log."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not wanted:
        return "not compiled"
    if device.type == "cpu" and not (headers.exists() and any(map(shutil.which, ("g++", "clang++", "c++")))):
        return "not compiled (no C++ compiler or no Python headers: slower)"
    for owner, name in ((Block, "before"), (Block, "after"), *((sys.modules[__name__], function)
                        for function in ("mix_stream", "softcap_pass", "softcap_sum"))):
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))
    torch._dynamo.config.recompile_limit = 64  # one variant per kind of layer, for training and for scoring
    return "compiled"

def check_batch(c, args, world):
    """The batch divides over the ranks and their micro-steps; sets --device-batch where it was not given."""
    share, rest = divmod(c.batch_sequences, world)
    if rest:
        fail(f"--batch-tokens {c.batch_tokens}: {world} ranks can't share {c.batch_sequences} sequences")
    if args.device_batch is None:
        most = max(1, 16384 // c.seq_len)
        args.device_batch = max(b for b in range(1, share + 1) if share % b == 0 and b <= most)
    if share % args.device_batch:
        fail(f"--device-batch {args.device_batch} does not divide a rank's {share} sequences per step")

def main(stop, argv=None):
    c, args = parse_args(argv)
    device, device_name, dtype, reason = pick_device(args)
    compiled = setup_compile(args.compile, device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timedelta(minutes=args.timeout), **alone)
    check_batch(c, args, dist.get_world_size())
    folder = args.data or ROOT / "data" / c.dataset
    data = Dataset(folder, f"./run.sh data {c.dataset}")
    if min(map(len, data.splits.values())) <= c.seq_len:
        fail(f"{folder} has a split that is shorter than a sequence; lower --seq-len {c.seq_len}")
    run = on_main(open_run, c, args, data)
    config = dataclasses.asdict(c)
    wandb_settings = dict(project=args.wandb, name=run.name, id=run.name, resume="allow", config=config)
    log = RunLog(run, f"{args.track}, seed {args.seed}", wandb_settings if args.wandb else None)
    log(f"slowrun {args.track}, seed {args.seed}: {dist.get_world_size()} x {device_name}, "
        f"{str(dtype)[6:]} ({reason}), {compiled}, torch {torch.__version__}")
    log(f"python {platform.python_version()}, numpy {np.__version__}, {platform.platform()}, "
        f"{torch.get_num_threads()} threads per rank\ncommand {' '.join(sys.argv)}\n"
        f"config {json.dumps(config)}", console=False)
    if shutil.which("nvidia-smi"):
        log(subprocess.run("nvidia-smi", capture_output=True, text=True).stdout, console=False)
    machine = {"device": device.type, "name": device_name, "count": dist.get_world_size(),
               "torch": torch.__version__}
    finish(c, args, data, log, machine, *train(c, args, data, log, device, dtype, stop))
    dist.destroy_process_group()

if __name__ == "__main__":
    stop = StopSignal()
    try:
        main(stop)
    except dcp.CheckpointException as error:  # the same on all ranks
        fail(f"cannot write the state: {next(iter(error.failures.values()))[0]}")
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
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
