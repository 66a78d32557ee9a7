"""
Slowrun: the lowest validation loss on a fixed 100M tokens, with as much compute as the track allows.

This file is the contestant: model, optimizer, data order, schedules, scoring and the loop, in reading order.

    ./run.sh                        the nano track: a laptop CPU, minutes
    ./run.sh smoke                  the same in under a minute
    ./run.sh limited --seed 43      8xH100, one hour (after ./run.sh data fineweb100M)
    torchrun --standalone --nproc-per-node 8 train_gpt.py --track limited
    python train_gpt.py --track nano --epochs 4 --n-layer 6

It trains on any number of ranks, one process per GPU or CPU process, and writes runs/<name>/:

    train_gpt.py   the source that ran            log.txt          source, environment, config, every step
    metrics.jsonl  every step and evaluation      checkpoints/     the members of the predictor
    result.json    the score and what it took     doc_losses.npz   loss per document of val and audit
    loss.svg       training and validation loss

A run is a pure function of its configuration and seed. No random generator has a state: which tokens a step sees
and which activations it drops follow from (seed, position in the stream), so neither the number of ranks nor the
device batch changes the run beyond float rounding. The recipe is that of limited #20 of the slowrun leaderboard;
the records named in comments are its entries. Shapes: B sequences, T tokens each, C = n_embd channels, H heads of
D = C / H channels, V tokens in the vocabulary.
"""
import argparse
import dataclasses
import errno
import functools
import gc
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent

# ---- Config and tracks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What a run is. Each field is also a flag; its comment is the help, led by the values it may take."""
    # data
    dataset: str = "fineweb100M"       # the folder under data/ with the tokens
    seq_len: int = 2048                # [16, 65536] T: tokens a sequence feeds to the model
    batch_tokens: int = 524288         # [16, 100000000] tokens per optimizer step, all ranks together
    epochs: int = 11                   # [1, 10000] passes over the training tokens
    shuffle: str = "document"          # {document, sequence, none} what is permuted anew in every epoch
    # model
    n_layer: int = 30                  # [2, 1000] transformer blocks, an even number: half encode, half decode
    n_head: int = 14                   # [1, 1000] attention heads
    n_embd: int = 1792                 # [32, 100000] C: width of the residual stream
    softcap: float = 10.0              # [1, 40] logits are bounded to +-softcap by a tanh
    short_window: int = 1024           # [1, 65536] keys before its own that a token sees in a short layer
    windows: str = "SSSL"              # short and long (whole context) layers, repeated; the last layer is long
    unet_skips: bool = True            # decoder layers also take the output of their encoder twin (#5)
    value_proj: bool = True            # every second layer adds a projection of the embedding to its values (#3)
    head_gate: bool = True             # a sigmoid gate per head, from the first 12 channels (#6)
    head_mixing: bool = True           # heads are learned mixtures of heads, IHA (#17)
    mtp: str = "block"                 # {block, none} multi-token prediction: one more block predicts the token after (#16)
    mtp_weight: float = 0.3            # [0, 10] its share of the training loss
    replay: str = "15-20"              # layers that are run again, first-last (#7); none: no layer
    replay_passes: int = 3             # [1, 100] how often they are run in all
    replay_from: int = 7               # [1, 10000] the epoch from which they are replayed
    # regularisation
    dropout: float = 0.1               # [0, 0.9] on the output of attention and MLP
    stochastic_depth: float = 0.05     # [0, 0.9] chance that the last layer is skipped, falling linearly to 0 at the first (#15)
    weight_decay: float = 1.3          # [0, 100] of matrices, embedding and head
    wd_schedule: str = "antiphase"     # {antiphase, constant} antiphase: it falls, then rises as each lr cycle falls (#20)
    # optimizer
    lr_scale: float = 0.25             # [0, 1000] multiplies the learning rates below, but for that of the head mixing
    lr_matrix: float = 0.04            # [0, 1000] Muon, all matrices inside blocks
    lr_embed: float = 0.15             # [0, 1000] AdamW, token embedding
    lr_head: float = 0.002             # [0, 1000] AdamW, output head
    lr_scalar: float = 0.1             # [0, 1000] AdamW, residual scalars (lambda and skips take 1% of it)
    lr_mixing: float = 0.02            # [0, 1000] AdamW, head mixing
    row_norm: bool = True              # Muon normalises the rows of its update first, MuonEq-R (#18)
    warmdown: float = 0.2              # [0, 1] share of the steps over which the learning rate falls
    warmdown_power: float = 0.5        # [0.01, 10] shape of that fall: 1 is linear, 0.5 a square root (#20)
    cycles: int = 3                    # [0, 10000] epochs at the end, each with a cosine cycle of the learning rate (#13)
    # the predictor
    average: int = 3                   # [1, 10000] checkpoints of the last epochs whose probabilities are averaged (#12)
    average_weights: str = "recency"   # {recency, equal} their weights: 1, 2, 3, ... or all the same

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
        if self.cycles > self.epochs:
            fail(f"--cycles {self.cycles} are more than --epochs {self.epochs}")
        if self.average > self.epochs:
            fail(f"--average {self.average} checkpoints are more than --epochs {self.epochs}")
        if not re.fullmatch(r"[SL]+", self.windows):
            fail(f"--windows {self.windows}: only the letters S and L")
        if self.replay != "none":
            match = re.fullmatch(r"(\d+)-(\d+)", self.replay)
            if not match or not self.n_layer // 2 <= int(match[1]) <= int(match[2]) < self.n_layer:
                fail(f"--replay {self.replay}: first-last, decoder layers within {self.n_layer // 2}-{self.n_layer - 1}, or none")

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

    def value_layer(self, layer):
        """Every second block has a value projection, the last one included. The MTP block, number n_layer, has none."""
        return self.value_proj and layer % 2 == (self.n_layer - 1) % 2

    def window(self, layer):
        """Keys before its own that a token of this layer sees; the last layer and the MTP block see the whole context."""
        long = layer >= self.n_layer - 1 or self.windows[layer % len(self.windows)] == "L"
        return self.seq_len if long else min(self.short_window, self.seq_len)

    def layer_order(self, replay):
        """The blocks in the order in which they are executed."""
        order = list(range(self.n_layer))
        if replay and self.replay != "none":
            first, last = map(int, self.replay.split("-"))
            order[last + 1:last + 1] = list(range(first, last + 1)) * (self.replay_passes - 1)
        return order


# A track is a row: the fields in which its preset differs from the defaults above, which are the limited track's.
NANO = dict(dataset="nano", seq_len=512, batch_tokens=8192, epochs=7, n_layer=4, n_head=2, n_embd=192, short_window=128,
            replay="2-2", replay_from=5, lr_scale=1.0)
TRACKS = {
    "nano": NANO,
    "smoke": NANO | dict(n_layer=2, n_head=1, n_embd=64, epochs=2, replay="1-1", replay_from=2, cycles=1, average=2),
    "limited": {},
}
# What a run of the track may use, by the field of its result.
CAPS = {
    "nano": ("training_flops", 2e14),
    "smoke": ("training_flops", 1e13),
    "limited": ("train_seconds", 3600),
}


def fail(message):
    """A user's mistake: one line, no traceback, exit code 2. Every rank sees the same mistake; one of them speaks."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def field_comments():
    """{field: (permitted values, help)} from the comments of Config's source: the one place where both are written."""
    pattern = r"^    (\w+): \w+ = .*?# (?:(\[[^\]]*\]|\{[^}]*\}) )?(.*)$"
    return {name: (allowed, text) for name, allowed, text in re.findall(pattern, inspect.getsource(Config), re.M)}


def check_field(field, value):
    """The value has the field's type and lies within the range or the choices that its comment gives."""
    flag = "--" + field.name.replace("_", "-")
    allowed, _ = COMMENTS[field.name]
    if type(value) is not field.type and not (field.type is float and type(value) is int):
        fail(f"{flag} takes a value of type {field.type.__name__}, not {value!r}")
    if allowed.startswith("{") and value not in allowed[1:-1].split(", "):
        fail(f"{flag} {value}: choose one of {allowed[1:-1]}")
    if allowed.startswith("["):
        low, high = map(float, allowed[1:-1].split(","))
        if not low <= value <= high:
            fail(f"{flag} {value} is out of range: {low:g} to {high:g}")


COMMENTS = field_comments()

# ---- Model ---------------------------------------------------------------------------------------------------------


def weight(*shape):
    """A parameter without values; `initialise` fills it by the parameter table."""
    return nn.Parameter(torch.empty(*shape))


def rms(x):
    """RMS norm over the channels without a gain; the epsilon is float32's whatever the dtype, as in the records."""
    return F.rms_norm(x, (x.size(-1),), eps=2.0 ** -23)


def linear(x, w):
    """x W^T. Weights are float32 masters, cast where they are used: the stream's dtype is stated once, at the embedding."""
    return F.linear(x, w.to(x.dtype))


def rope_tables(c, device, dtype):
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864): cos and sin, each (T, 1, D/2); computed in float32."""
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
    Zeroes entries of x (B, T, C) with probability p, the others grow by 1 / (1 - p). The mask is a hash of (key, place):
    key (B, 2) int32 belongs to one sequence and one place in the network, so the mask depends on nothing else. The two
    numbers make an offset and an odd factor, then come two rounds of murmur3's finaliser.
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
    Causal attention of (B, T, H, D) tensors; the query at i sees the keys at i - window to i. On CUDA by the in-core
    variable-length flash kernels, the only ones with a sliding window and a backward pass. On the CPU by blocks of 128
    queries against the keys in reach: plain products, which take 60% of the time of the CPU's fused kernel.
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
        """x, x0 (B, T, C), the normalised stream and the embedding that values are injected from -> q, k, v (B, T, H, D)."""
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
    Compiled in two parts, around the attention kernel: the parts are the same for all layers but for the value projection,
    so a few seconds of compilation serve any depth, and nothing is compiled anew when windows or replay change.
    """

    def __init__(self, c, layer):
        super().__init__()
        self.p, self.window = c.dropout, c.window(layer)
        self.attn, self.mlp = Attention(c, layer), MLP(c)

    def forward(self, x, x0, rope, drop=None, keep=None):
        """x (B, T, C); in training also drop (B, 2, 2), the keys of two dropouts, and keep (B, 1, 1), 0 to skip the block."""
        return self.after(x, attention(*self.before(x, x0, rope), self.window), drop, keep)

    @torch.compile(dynamic=False)
    def before(self, x, x0, rope):
        return self.attn.project(rms(x), x0, rope)

    @torch.compile(dynamic=False)
    def after(self, x, o, drop, keep):
        start, y = x, self.attn.output(rms(x), o)
        x = x + (y if drop is None else dropout(y, self.p, drop[:, 0]))
        y = self.mlp(rms(x))
        x = x + (y if drop is None else dropout(y, self.p, drop[:, 1]))
        return x if keep is None else start + keep * (x - start)


@torch.compile(dynamic=False)
def mix_stream(x, x0, lam, mu, skip=None, twin=None):
    """The residual stream before a block: the encoder twin's output first, then the anchor to the embedding."""
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
        """tokens (B, T) -> (the normalised output (B, T, C), the rotary tables). The stream has the embedding's dtype."""
        x = x0 = rms(F.embedding(tokens, self.embed))
        rope = rope_tables(self.c, x.device, x.dtype)
        half, outputs = self.c.n_layer // 2, {}
        for n, layer in enumerate(self.c.layer_order(replay)):
            twin = ()
            if self.skip is not None and layer >= half:
                twin = (self.skip[layer - half], outputs[self.c.n_layer - 1 - layer])
            x = mix_stream(x, x0, self.lam[layer], self.mu[layer], *twin)
            x = self.blocks[layer](x, x0, rope, *(part[n] for part in noise or ()))
            if layer < half:
                outputs[layer] = x
        return rms(x), rope

    def loss(self, sequences, replay, noise, batch_sequences):
        """
        sequences (B, T+1) -> (the training loss, the plain next-token loss), each divided by the sequences of the whole
        batch, so that the losses and gradients of all micro-batches and ranks add up to those of the batch's mean.
        """
        tokens, targets = sequences[:, :-1], sequences[:, 1:]
        share = 1 / (batch_sequences * tokens.size(1))
        x, rope = self.trunk(tokens, replay, noise)
        loss = plain = head_loss(x, self.head, targets, torch.full_like(targets, share, dtype=torch.float32), self)
        if self.c.mtp == "block":
            # Position t also knows the token t+1 and predicts t+2; the last one has no target, its weight is 0.
            x = linear(torch.cat((x, rms(F.embedding(targets, self.embed))), dim=-1), self.mtp.proj)
            x = rms(self.mtp.block(x, x, rope, *(part[-1] for part in noise)))
            weights = torch.full_like(targets, self.c.mtp_weight * share * targets.size(1) / (targets.size(1) - 1),
                                      dtype=torch.float32)
            weights[:, -1] = 0
            loss = loss + head_loss(x, self.head, targets.roll(-1, 1), weights, self)
        return loss, plain.detach()

    def logits(self, x):
        """(B, T, C) -> (B, T, V) float32, softcapped. Whole logits: for looking at a few sequences, never for training."""
        return self.c.softcap * torch.tanh(linear(x, self.head[:self.vocab_size]).float() / self.c.softcap)

    def parameter_count(self):
        return sum(p.numel() for p in self.parameters())


def flops_per_token(c, vocab_size, replay, training=True):
    """
    Floating-point operations of a token's forward (and backward) pass: 2 per multiplication and addition of every executed
    matrix product, replayed blocks and the MTP head included; attention counts the keys that a causal window shows on average.
    """
    d, rows = c.n_embd, vocab_size
    block = 4 * d * d + 3 * d * c.mlp_hidden + 12 * c.n_head * c.head_gate

    def keys(window):
        reach = min(window + 1, c.seq_len)
        return reach - reach * (reach - 1) / (2 * c.seq_len)

    macs = rows * d
    layers = c.layer_order(replay)
    if training and c.mtp == "block":
        layers = layers + [c.n_layer]
        macs += rows * d + 2 * d * d
    for layer in layers:
        macs += block + c.value_layer(layer) * (d * d + 32 * c.n_head) + 2 * d * keys(c.window(layer))
    return (6 if training else 2) * macs


# ---- Head and loss -------------------------------------------------------------------------------------------------


@torch.compile(dynamic=False)
def softcap_pass(logits, softcap):
    """
    Raw logits l (n, V) -> (s (n,) float32, u (n, V) in the logits' dtype): the sum of the softmax's exponentials, and u / s
    its probabilities times the softcap's slope. With z = c tanh(l / c) <= c there is no need to look for the maximum:
    q = 1 / (1 + exp(2 l / c)) gives z - c = -2 c q and dz/dl = 4 q (1 - q), one exponential where a tanh would cost five.
    """
    q = 1 / (1 + torch.exp(logits.float() * (2 / softcap)))
    e = torch.exp(q * (-2 * softcap))
    return e.sum(-1), (e * (4 * q * (1 - q))).to(logits.dtype)


@torch.compile(dynamic=False)
def softcap_sum(logits, softcap):
    """The first half of softcap_pass, for scoring."""
    return torch.exp(-2 * softcap / (1 + torch.exp(logits.float() * (2 / softcap)))).sum(-1)


def chunk_rows(vocab_size, device):
    """Tokens whose logits are held at a time: 4M entries stay in a CPU's cache, 128M keep a GPU's product efficient."""
    return max(128, (2 ** 27 if device.type == "cuda" else 2 ** 22) // vocab_size)


class HeadLoss(torch.autograd.Function):
    """
    sum_n w_n (-log softmax(softcap(x_n W^T))[y_n]), by chunks of tokens, gradients made in the same pass over the logits.
    x (N, C), W (V, C), y (N,) int64, w (N,) float32 -> scalar float32. Once differentiable.
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
            # u / s becomes the gradient of the raw logits; the division waits until the rows have only C entries.
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
    return HeadLoss.apply(x.flatten(0, 1), W[:model.vocab_size], targets.flatten(), weights.flatten(), model.c.softcap)


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

# ---- Parameters and optimizer --------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A kind of parameter: how it starts and how it learns. `optimizer` is muon or adamw; lr is before the schedule."""
    pattern: str
    init: object
    optimizer: str
    lr: float
    betas: tuple
    weight_decay: float


def param_table(c):
    """One row per kind of parameter, by the pattern that its whole name matches."""
    width = (3 / c.n_embd) ** 0.5                                       # uniform(-width, width) has variance 1 / C
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


# Five steps of Polar Express (Amsel et al. 2025, arXiv 2505.16932): a polynomial each, aX + bX^3 + cX^5 of the singular values.
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
    One step of Muon (Jordan 2024) for matrices W (n, R, C) with gradients G, in place: momentum, row normalisation, polar
    factor, variance reduction per row (NorMuon, arXiv 2510.05491) and decay where the update agrees in sign (cautious).
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
    # The rescaling keeps the Frobenius norm. Both norms are of X up to the same factor, the length of the averaged axis.
    X *= r * v.sum((1, 2), keepdim=True).sqrt() / (v * r * r).sum((1, 2), keepdim=True).sqrt().clamp_min(1e-10)
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
    Parameters that are updated together. Their values and gradients live in two flat buffers, of which the parameters are
    views, padded so that each rank owns an equal part: gradients are summed into the part's owner, which alone keeps the
    optimizer's state and updates the values, and then the values are gathered. No copies are made on the way.
    """

    def __init__(self, row, params, c, dtype):
        self.row, self.c, self.dtype = row, c, dtype
        rank, world = dist.get_rank(), dist.get_world_size()
        shape, like = params[0].shape, params[0]
        # Muon's matrices are never cut: the unit is a matrix. AdamW's unit is a number.
        unit = like.numel() if row.optimizer == "muon" else 1
        part = -(-sum(p.numel() for p in params) // (unit * world)) * unit
        self.values, self.grads = (torch.zeros(part * world, dtype=like.dtype, device=like.device) for _ in range(2))
        start = 0
        for p in params:
            view = slice(start, start := start + p.numel())
            self.values[view] = p.data.flatten()
            p.data, p.grad = self.values[view].view(p.shape), self.grads[view].view(p.shape)
        own = slice(rank * part, (rank + 1) * part)
        self.W, self.G = self.values[own], self.grads[own]
        if row.optimizer == "muon":
            self.W, self.G = self.W.view(-1, *shape), self.G.view(-1, *shape)
            reduced = (len(self.W), shape[0], 1) if shape[0] >= shape[1] else (len(self.W), 1, shape[1])
            self.state = {"momentum": torch.zeros_like(self.W), "variance": self.W.new_zeros(reduced)}
        else:
            self.state = {"mean": torch.zeros_like(self.W), "square": torch.zeros_like(self.W)}

    def update(self, lr, weight_decay, momentum, step):
        """The multipliers of the learning rate and the decay, Muon's momentum, and the step counted from 1."""
        lr, weight_decay = lr * self.row.lr, weight_decay * self.row.weight_decay
        if self.row.optimizer == "muon":
            muon_update(self.W, self.G, self.state, lr, weight_decay, momentum, self.row.betas[1], self.c.row_norm, self.dtype)
        else:
            adamw_update(self.W, self.G, self.state, lr, weight_decay, *self.row.betas, step)


class Optimizer:
    """All groups, sharded over the ranks (as ZeRO-2 does, Rajbhandari et al. 2020, arXiv 1910.02054)."""

    def __init__(self, model, c, dtype):
        groups = {}
        for _, p, row in match_rows(model, c):
            key = (row.optimizer, row.lr, row.betas, row.weight_decay, p.dtype, p.shape if row.optimizer == "muon" else None)
            groups.setdefault(key, (row, []))[1].append(p)
        self.groups = [Group(row, params, c, dtype) for row, params in groups.values()]

    @torch.no_grad()
    def step(self, lr, weight_decay, momentum, step):
        """Sums the gradients over the ranks, updates every parameter, clears the gradients."""
        reduces = [dist.reduce_scatter_single(g.G.flatten(), g.grads, async_op=True) for g in self.groups]
        gathers = []
        for group, reduce in zip(self.groups, reduces):
            reduce.wait()
            group.update(lr, weight_decay, momentum, step)
            gathers.append(dist.all_gather_single(group.values, group.W.flatten(), async_op=True))
            group.grads.zero_()
        for gather in gathers:
            gather.wait()


# ---- Data ----------------------------------------------------------------------------------------------------------


class Dataset:
    """A folder of tokens: memory-mapped, verified against its manifest. `splits` holds uint16 arrays."""

    def __init__(self, folder, command):
        self.folder = Path(folder)
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
        except FileNotFoundError:
            fail(f"there is no dataset in {folder}; make it with: {command}")
        except ValueError:
            fail(f"{folder}/manifest.json is damaged; make the dataset anew with: {command}")
        self.name, self.vocab_size, self.bos_id = manifest["name"], manifest["vocab_size"], manifest["bos_id"]
        self.digests = {split: manifest["splits"][split]["sha256"] for split in ("train", "val", "audit")}
        self.splits = {split: self.open(split, command) for split in self.digests}
        self.token_bytes = np.fromfile(self.folder / "token_bytes.bin", dtype=np.uint8).astype(np.int64)

    def open(self, split, command):
        """The llm.c format: 256 int32 of header (magic, version, tokens), then uint16 tokens."""
        path, remedy = self.folder / f"{split}.bin", f"make the dataset anew with: {command}"
        if not path.exists():
            fail(f"{path} is missing; {remedy}")
        header = np.fromfile(path, dtype="<i4", count=256)
        if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
            fail(f"{path} is not a token file (wrong magic or version); {remedy}")
        if path.stat().st_size != 1024 + 2 * int(header[2]):
            fail(f"{path} is truncated: its header says {header[2]} tokens, it holds {path.stat().st_size // 2 - 512}; {remedy}")
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
        if hashlib.sha256(tokens).hexdigest() != self.digests[split]:
            fail(f"{path} does not have the digest of its manifest; {remedy}")
        if tokens.max() >= self.vocab_size:
            fail(f"{path} holds the token {tokens.max()}, beyond its vocabulary of {self.vocab_size}; {remedy}")
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
    The training sequences of a whole run: the epochs one after another, each an index over the memory-mapped tokens. An epoch
    permutes the documents, cuts their concatenation into sequences of T+1 tokens, and permutes those (#19). Document order
    accumulates over the epochs; with seed 42 the permutations are the reference's, seeded by the epoch e and e + 1000.
    """

    def __init__(self, tokens, starts, c, seed):
        self.tokens, self.starts, self.shuffle = tokens, starts, c.shuffle
        self.lengths = np.diff(starts, append=len(tokens))
        self.S, self.per_epoch, self.seed = c.seq_len + 1, len(tokens) // (c.seq_len + 1), seed
        self.documents, self.made = np.arange(len(starts)), 0

    def permutation(self, n, seed):
        generator = torch.Generator().manual_seed(1009 * (self.seed - 42) + seed)
        return torch.randperm(n, generator=generator).numpy()

    def enter(self, epoch):
        """Makes the index of an epoch, counted from 1."""
        if epoch < self.made:
            self.documents, self.made = np.arange(len(self.starts)), 0
        for e in range(self.made + 1, epoch + 1):
            if self.shuffle == "document" and e > 1:
                self.documents = self.documents[self.permutation(len(self.documents), e)]
        self.made = epoch
        self.ends = np.cumsum(self.lengths[self.documents])
        self.order = np.arange(self.per_epoch)
        if self.shuffle != "none":
            self.order = self.permutation(self.per_epoch, epoch + 1000)

    def sequence(self, index):
        """The index-th sequence of the run, (T+1,) uint16."""
        epoch, place = divmod(index, self.per_epoch)
        if epoch + 1 != self.made:
            self.enter(epoch + 1)
        start = self.order[place] * self.S
        out, document = [], np.searchsorted(self.ends, start, side="right")
        skip = start - (self.ends[document] - self.lengths[self.documents[document]])
        missing = self.S
        while missing:
            at = self.starts[self.documents[document]]
            out.append(self.tokens[at + skip:at + min(skip + missing, self.lengths[self.documents[document]])])
            missing, skip, document = missing - len(out[-1]), 0, document + 1
        return np.concatenate(out)


def draw_noise(c, seed, indices, dtype):
    """
    The noise of the sequences with these places in the stream. Philox is a counter-based generator (Salmon et al. 2011), so a
    sequence's draws follow from (seed, index) alone. Stochastic depth skips block i with probability p i / (L - 1).
    """
    layers = c.layer_order(replay=True) + [c.n_layer]
    draws = [np.random.Generator(np.random.Philox(key=[seed, index])) for index in indices]
    drop = np.stack([g.integers(-2 ** 31, 2 ** 31, (len(layers), 2, 2)) for g in draws], axis=1).astype(np.int32)
    p = c.stochastic_depth * np.array(layers)[:, None] / (c.n_layer - 1)
    keep = np.stack([g.random(len(layers)) for g in draws], axis=1) >= p
    return Noise(torch.from_numpy(drop), torch.from_numpy(keep)[..., None, None].to(dtype))


def batches(stream, c, seed, step, device, dtype, device_batch):
    """This rank's micro-batches of an optimizer step: (sequences (B, T+1) int64, noise), on the device."""
    share = c.batch_sequences // dist.get_world_size()
    first = step * c.batch_sequences + dist.get_rank() * share
    for start in range(first, first + share, device_batch):
        indices = range(start, start + device_batch)
        sequences = torch.from_numpy(np.stack([stream.sequence(i) for i in indices]).astype(np.int64))
        noise = draw_noise(c, seed, indices, dtype)
        yield sequences.to(device, non_blocking=True), Noise(*(part.to(device, non_blocking=True) for part in noise))


# ---- Schedules -----------------------------------------------------------------------------------------------------


class Schedule:
    """Everything that changes with the step: `per_epoch` sequences make an epoch, `steps` batches of them the run."""

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
        """Multiplier of all learning rates: flat, then falling; in the last epochs a cosine to 0.05 in each (#13, #20)."""
        c, warmdown = self.c, round(self.c.warmdown * self.steps)
        left = self.steps - step
        base = 1.0 if left >= warmdown else (left / warmdown) ** c.warmdown_power
        if (cycle := self.cycle(step)) is None:
            return base
        return 0.05 + (max(base, 0.05) - 0.05) * (1 + math.cos(math.pi * cycle)) / 2

    def weight_decay(self, step):
        """Multiplier of the decay: flat to 40% of the run, down to 0.65 at the first cycle, 0.65 to 1.5 over each (#20)."""
        if self.c.wd_schedule == "constant":
            return 1.0
        if (cycle := self.cycle(step)) is not None:
            return 0.65 + 0.85 * cycle
        t, end = step / self.steps, 1 - self.c.cycles / self.c.epochs
        return 1.0 if t < 0.4 else 1 - 0.35 * min(1.0, (t - 0.4) / (end - 0.4))

    def momentum(self, step):
        """Muon's momentum warms up over 300 steps."""
        return 0.85 + 0.10 * min(step / 300, 1)

    def training_flops(self, vocab_size, steps=None):
        """The counted operations of the run's first `steps` steps."""
        tokens = [0, 0]
        for step in range(self.steps if steps is None else steps):
            tokens[self.replay(step)] += self.c.batch_tokens
        return sum(n * flops_per_token(self.c, vocab_size, replay) for replay, n in enumerate(tokens))


# ---- Scoring -------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    loss: float             # nats per token
    bpb: float              # bits per byte, over the targets that have bytes
    documents: dict         # loss (float64), tokens, bytes (int64) of each of the split's documents


def log_likelihoods(model, sequences, replay, batch):
    """
    sequences (n, T+1) -> log-probabilities of all targets, (n, T) float64 on every rank. Each sequence is scored by one rank,
    once; the last batch is filled up with the first sequence, whose surplus scores are dropped.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    device = model.embed.device
    out = torch.zeros(len(sequences), sequences.shape[1] - 1, dtype=torch.float64, device=device)
    for start in range(rank * batch, len(sequences), world * batch):
        rows = np.arange(start, start + batch)
        chosen = np.where(rows < len(sequences), rows, 0)
        part = torch.from_numpy(sequences[chosen].astype(np.int64)).to(device)
        with torch.no_grad():
            x, _ = model.trunk(part[:, :-1], replay)
            scores = target_logprobs(x, model.head[:model.vocab_size], part[:, 1:], model.c.softcap)
        valid = min(batch, len(sequences) - start)
        out[start:start + valid] = scores[:valid]
    dist.all_reduce(out)
    return out


def score(data, split, T, logp):
    """logp (n, T) of the split's targets -> its Score. A target counts for the document that it stands in."""
    targets = data.sequences(split, T)[:, 1:]
    nats, size = -logp.cpu().numpy().ravel(), data.token_bytes[targets.ravel()]
    is_start = data.splits[split] == data.bos_id
    document = (np.cumsum(is_start) - 1)[:targets.shape[0] * (T + 1)].reshape(-1, T + 1)[:, 1:].ravel()
    total = lambda weights: np.bincount(document, weights=weights, minlength=is_start.sum())
    sums = {"loss": total(nats), "tokens": total(None), "bytes": total(size).astype(np.int64)}
    return Score(nats.mean(), nats[size > 0].sum() / (math.log(2) * size.sum()), sums)


class Member(NamedTuple):
    """A model of a predictor: its checkpoint, its weight, and the configuration it is run in."""
    checkpoint: str
    weight: float
    replay: bool


def score_mixture(model, folder, members, data, split, batch):
    """
    -> (the Score of the members' weighted mean probability, each member's own loss). Members are loaded one after another and
    only their targets' probabilities are kept: memory does not grow with their number.
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


def late_members(c, epochs):
    """The predictor of a run: the checkpoints of these epochs, weighted by recency or equally (#12)."""
    weights = [i + 1 if c.average_weights == "recency" else 1 for i in range(len(epochs))]
    return [Member(f"epoch_{epoch:03d}.pt", w / sum(weights), epoch >= c.replay_from) for epoch, w in zip(epochs, weights)]


class Predictor:
    """What a run predicts with: `logprobs(tokens)` -> the mixture's log-probabilities of every next token."""

    def __init__(self, run_dir, device):
        folder = Path(run_dir) / "checkpoints"
        spec = json.loads((folder / "predictor.json").read_text())
        c, self.folder, self.device = Config(**spec["config"]), folder, torch.device(device)
        self.members = [Member(**member) for member in spec["members"]]
        self.model = make_model(c, spec["vocab_size"], self.device, getattr(torch, spec["dtype"]))
        self.loaded = None

    @torch.no_grad()
    def logprobs(self, tokens):
        """tokens (B, T) int64, T up to the context length -> (B, T, V) float32; position t tells token t+1."""
        mixture = None
        for member in self.members:
            if self.loaded != member.checkpoint:
                load_weights(self.model, self.folder / member.checkpoint)
                self.loaded = member.checkpoint
            x, _ = self.model.trunk(tokens.to(self.device), member.replay)
            logp = self.model.logits(x).log_softmax(-1) + math.log(member.weight)
            mixture = logp if mixture is None else torch.logaddexp(mixture, logp)
        return mixture


def load_predictor(run_dir, device="cpu"):
    """The final predictor of the run in run_dir: the interface that records/ruler.py scores records by."""
    return Predictor(run_dir, device)


# ---- Checkpoints and the run folder --------------------------------------------------------------------------------


def make_model(c, vocab_size, device, dtype):
    """A model without values. The embedding has the compute dtype, and so the residual stream; the rest is float32."""
    with torch.device("meta"):
        model = GPT(c, vocab_size)
    model = model.to_empty(device=device)
    model.embed.data = model.embed.data.to(dtype)
    return model


def write_atomic(path, write):
    """write(file) to a temporary name, which takes its place only when all of it is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, value):
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def load_weights(model, path):
    weights = torch.load(path, map_location=model.embed.device, mmap=True, weights_only=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])


class RunLog:
    """The run folder's text: console and log.txt, metrics.jsonl, loss.svg. Only rank 0 writes; the others stay silent."""

    def __init__(self, folder, title, wandb_settings):
        self.folder, self.title, self.bar, self.wandb = folder, title, None, None
        self.steps, self.evals = [], []
        source = Path(__file__).read_bytes()
        self.source_sha256 = hashlib.sha256(source).hexdigest()
        self.main = dist.get_rank() == 0
        if not self.main:
            return
        (folder / "train_gpt.py").write_bytes(source)
        head = f"source train_gpt.py {len(source)} bytes sha256 {self.source_sha256}\n".encode()
        write_atomic(folder / "log.txt", lambda file: file.write(head + source + b"\n"))
        if wandb_settings:
            try:
                import wandb
                self.wandb = wandb.init(dir=folder, **wandb_settings)
            except Exception as error:  # a logger's trouble, whatever it is, must not cost a run
                self(f"wandb is off: {error}")

    def __call__(self, text, console=True):
        if not self.main:
            return
        with open(self.folder / "log.txt", "a") as file:
            print(text, file=file)
        if console:
            self.bar.write(text) if self.bar is not None else print(text, flush=True)

    def metric(self, kind, **values):
        if not self.main:
            return
        {"step": self.steps, "eval": self.evals}.get(kind, []).append(values)
        with open(self.folder / "metrics.jsonl", "a") as file:
            print(json.dumps({"kind": kind, **values}), file=file)
        if self.wandb is not None:
            try:
                self.wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=values.get("step"))
            except Exception as error:
                self.wandb = None
                self(f"wandb is off: {error}")

    def plot(self, final=None):
        """loss.svg: training loss per step and validation loss per epoch, from metrics so far."""
        if not self.main or not self.evals:
            return
        import matplotlib
        matplotlib.use("svg")
        from matplotlib import pyplot as plt
        with plt.rc_context({"svg.hashsalt": "slowrun", "font.size": 9}):
            figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
            x, y = [m["step"] for m in self.steps], np.array([m["loss"] for m in self.steps])
            axes.plot(x, y, color="0.8", linewidth=0.7, label="training, each step")
            width = max(1, len(y) // 50)
            axes.plot(x[width - 1:], np.convolve(y, np.ones(width) / width, "valid"), color="C0", linewidth=1.2,
                      label=f"training, mean of {width} steps")
            axes.plot([m["step"] for m in self.evals], [m["loss"] for m in self.evals], "C1o-", ms=3, label="validation")
            if final is not None:
                axes.axhline(final, color="C3", linewidth=0.9, linestyle="--", label=f"final predictor {final:.4f}")
            low = min([m["loss"] for m in self.evals] + [final or math.inf, *y[len(y) // 2:]])
            axes.set(title=self.title, xlabel="step", ylabel="loss, nats per token", ylim=(low - 0.1, low + 2.5))
            axes.grid(color="0.92")
            axes.legend(frameon=False)
            write_atomic(self.folder / "loss.svg", lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
            plt.close(figure)


def environment(device, dtype, reason):
    """Everything about the machine that could matter to who reads the log later."""
    lines = [f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, {platform.platform()}",
             f"{dist.get_world_size()} ranks, {torch.get_num_threads()} threads each, {device_name(device)}, {dtype}: {reason}",
             f"command: {' '.join(sys.argv)}"]
    if shutil.which("nvidia-smi"):
        lines.append(subprocess.run("nvidia-smi", capture_output=True, text=True).stdout)
    return "\n".join(lines)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


# ---- The training loop ---------------------------------------------------------------------------------------------


class Clock:
    """Training time: seconds between start and stop, with the device's work done."""

    def __init__(self, device):
        self.device, self.seconds, self.since = device, 0.0, None

    def start(self):
        self.synchronize()
        self.since = time.perf_counter()

    def stop(self):
        self.synchronize()
        self.seconds, self.since = self.now(), None

    def now(self):
        return self.seconds + (time.perf_counter() - self.since if self.since is not None else 0)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def warm_up(model, c, stream, seed, device, dtype, device_batch):
    """Compiles every variant of the model on throw-away data, so that training time holds none of it."""
    sequences = torch.zeros(device_batch, c.seq_len + 1, dtype=torch.int64, device=device)
    noise = Noise(*(part.to(device) for part in draw_noise(c, seed, range(device_batch), dtype)))
    for replay in (False, True):
        loss, _ = model.loss(sequences, replay, noise, c.batch_sequences)
        loss.backward()
        log_likelihoods(model, sequences[:1].cpu().numpy(), replay, device_batch)
    for p in model.parameters():
        p.grad.zero_()


def train(c, args, data, log, device, dtype):
    """Trains one model and returns (the model, the predictor's members, the training seconds, steps, looks at val)."""
    started = time.time()
    stream = Stream(data.splits["train"], data.documents("train"), c, args.seed)
    schedule = Schedule(c, stream.per_epoch)
    steps = min(schedule.steps, args.max_steps or schedule.steps)
    model = make_model(c, data.vocab_size, device, dtype)
    initialise(model, c, args.seed)
    optimizer = Optimizer(model, c, dtype)
    cap = CAPS.get(args.track)
    flops = schedule.training_flops(data.vocab_size)
    log(f"plan   {model.parameter_count():,} parameters, {c.epochs} epochs of {stream.per_epoch * c.seq_len:,} tokens, "
        f"{schedule.steps} steps of {c.batch_tokens:,}, {flops:.3g} training FLOPs"
        + (f" (cap {cap[1]:.3g})" if cap and cap[0] == "training_flops" else ""))
    warm_up(model, c, stream, args.seed, device, dtype, args.device_batch)
    clock, looks = Clock(device), 0

    def evaluate(step, epoch):
        nonlocal looks
        logp = log_likelihoods(model, data.sequences("val", c.seq_len), schedule.replay(max(step - 1, 0)), args.device_batch)
        result, looks = score(data, "val", c.seq_len, logp), looks + 1
        log.metric("eval", step=step, epoch=epoch, split="val", loss=result.loss, bpb=result.bpb)
        return result

    log(f"start  val {evaluate(0, 0).loss:.4f} before training")
    gc.collect()
    gc.freeze()                       # what lives now lives to the end: the collector need not walk it at every pass
    log.bar = progress_bar(steps) if log.main and sys.stdout.isatty() else None
    saved, recent = [], []
    clock.start()
    for step in range(steps):
        lr, weight_decay, momentum = schedule.lr(step), schedule.weight_decay(step), schedule.momentum(step)
        loss = torch.zeros((), device=device)
        for sequences, noise in batches(stream, c, args.seed, step, device, dtype, args.device_batch):
            total, plain = model.loss(sequences, schedule.replay(step), noise, c.batch_sequences)
            total.backward()
            loss += plain
        dist.all_reduce(loss)
        loss = loss.item()
        if not math.isfinite(loss):
            kept = f"the last good checkpoint is {saved[-1]}" if saved else "there was no checkpoint yet"
            fail(f"the training loss is {loss} at step {step}; {kept}")
        optimizer.step(lr, weight_decay, momentum, step + 1)

        recent.append(loss)
        log.metric("step", step=step, loss=loss, lr=lr, weight_decay=weight_decay, seconds=round(clock.now(), 3))
        if log.bar is not None:
            log.bar.update()
            log.bar.set_postfix_str(f"loss {loss:.3f}")
        if step == 9:
            log(f"       about {clock.now() / 10 * steps / 60:.1f} minutes of training expected")
        epoch = schedule.epoch(step)
        if schedule.epoch(step + 1) > epoch or step + 1 == steps:
            clock.stop()
            path = log.folder / "checkpoints" / f"epoch_{epoch:03d}.pt"
            saved.append(path)
            if log.main:
                write_atomic(path, lambda file: torch.save(model.state_dict(), file))
                for old in saved[:-c.average]:
                    old.unlink(missing_ok=True)
            result = evaluate(step + 1, epoch)
            log(f"epoch  {epoch:3d}/{c.epochs}  step {step + 1:5d}  train {np.mean(recent):.4f}  val {result.loss:.4f}  "
                f"{result.bpb:.4f} bpb  {clock.seconds / 60:.1f} min  "
                f"{(step + 1) * c.batch_tokens / clock.seconds:,.0f} tok/s")
            log.plot()
            recent = []
            clock.start()
    clock.stop()
    if log.bar is not None:
        log.bar.close()
        log.bar = None
    return model, late_members(c, [int(path.stem[6:]) for path in saved[-c.average:]]), clock.seconds, steps, looks


def progress_bar(steps):
    from tqdm import tqdm
    return tqdm(total=steps, unit="step", file=sys.stdout, dynamic_ncols=True, smoothing=0.05)


# ---- main ----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message}; ./run.sh --help lists the tracks, train_gpt.py --help the flags")


def parse_args(argv):
    """-> (the Config: defaults, then the track's row, then --config, then flags; the rest of the command line)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--track", default="nano", help=f"the preset: {', '.join(TRACKS)} (default nano)")
    add("--config", metavar="FILE", help="a JSON file of fields that override the track's")
    add("--seed", type=int, default=42, help="of initialisation, data order and dropout (default 42)")
    add("--run-name", help="the folder under runs/ (default: track, date, time and seed)")
    add("--data", metavar="DIR", help="the dataset's folder (default: data/ and the name of the dataset)")
    add("--device-batch", type=int, metavar="B", help="sequences per rank and micro-step (default: 16,384 tokens of them)")
    add("--dtype", choices=("bfloat16", "float32"), help="of the matrix products (default: bfloat16 where the hardware has it)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the blocks (default yes)")
    add("--max-steps", type=int, metavar="N", help="stop early; the run is no record")
    add("--wandb", nargs="?", const="slowrun", metavar="PROJECT", help="log to Weights & Biases too (WANDB_MODE=offline works)")
    group = parser.add_argument_group("fields of the configuration (defaults are the limited track's)")
    for field in dataclasses.fields(Config):
        allowed, text = COMMENTS[field.name]
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type, "metavar": allowed or "X"}
        group.add_argument("--" + field.name.replace("_", "-"), **kind, default=None,
                           help=f"{text} (default {field.default})".replace("%", "%%"))
    args = parser.parse_args(argv)
    if args.track not in TRACKS:
        fail(f"there is no track {args.track}; the tracks are {', '.join(TRACKS)}")
    if args.seed < 0:
        fail(f"--seed {args.seed} is out of range: 0 or more")
    for name in ("device_batch", "max_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range: 1 or more")
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
    """-> (device, dtype, the reason for the dtype). bfloat16 needs hardware that multiplies it, or it is slower than float32."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        fast, hardware = torch.cuda.get_device_capability()[0] >= 8, "GPU"
    else:
        cpuinfo = Path("/proc/cpuinfo")
        flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
        device, fast, hardware = torch.device("cpu"), "amx_bf16" in flags or "avx512_bf16" in flags, "CPU"
    if args.dtype:
        return device, getattr(torch, args.dtype), "--dtype"
    if fast:
        return device, torch.bfloat16, f"the {hardware} multiplies it"
    return device, torch.float32, f"the {hardware} has no bfloat16 units"


def setup_compile(wanted, device):
    """Turns torch.compile off where it is not wanted or cannot work; -> how it stands, for the log."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    possible = device.type == "cuda" or (headers.exists() and any(map(shutil.which, ("g++", "clang++", "c++"))))
    torch._dynamo.config.recompile_limit = 64
    if wanted and possible:
        return "compiled"
    torch.compiler.set_stance("force_eager")
    return "not compiled" if possible else "not compiled (no C++ compiler or no Python headers: slower)"


def check_batch(c, args, world):
    """The batch divides over the ranks and their micro-steps; sets --device-batch where it was not given."""
    if c.batch_sequences % world:
        fail(f"--batch-tokens {c.batch_tokens} is {c.batch_sequences} sequences, which {world} ranks cannot share equally")
    share = c.batch_sequences // world
    if args.device_batch is None:
        args.device_batch = max(b for b in range(1, share + 1) if share % b == 0 and b * c.seq_len <= max(16384, c.seq_len))
    if share % args.device_batch:
        fail(f"--device-batch {args.device_batch} does not divide the {share} sequences that each rank has per step")


def make_run_folder(args):
    """runs/<name>/, new; rank 0 makes it and tells the others."""
    name = [args.run_name or f"{args.track}_{datetime.now():%Y%m%d-%H%M%S}_s{args.seed}"]
    dist.broadcast_object_list(name)
    folder, made = ROOT / "runs" / name[0], [True]
    if dist.get_rank() == 0:
        made = [not folder.exists()]
        if made[0]:
            (folder / "checkpoints").mkdir(parents=True)
    dist.broadcast_object_list(made)
    if not made[0]:
        fail(f"the run {folder.relative_to(ROOT)} exists already; choose another --run-name")
    return folder


def finish(c, args, data, log, model, members, train_seconds, steps, looks, machine, started):
    """Scores the final predictor and writes what the run leaves behind; -> result.json's content."""
    spec = {"config": dataclasses.asdict(c), "vocab_size": data.vocab_size, "dtype": str(model.embed.dtype)[6:],
            "members": [member._asdict() for member in members]}
    if log.main:
        write_json(log.folder / "checkpoints" / "predictor.json", spec)
    scores, documents, losses = {}, {}, {}
    for split in ("val", "audit"):
        scores[split], losses[split] = score_mixture(model, log.folder / "checkpoints", members, data, split, args.device_batch)
        documents |= {f"{split}_{name}": values for name, values in scores[split].documents.items()}
    schedule = Schedule(c, len(data.splits["train"]) // (c.seq_len + 1))
    result = {
        "track": args.track, "seed": args.seed, "config": dataclasses.asdict(c),
        "val_loss": scores["val"].loss, "val_bpb": scores["val"].bpb,
        "audit_loss": scores["audit"].loss, "audit_bpb": scores["audit"].bpb,
        "members": [{"checkpoint": m.checkpoint, "weight": m.weight, "val_loss": loss} for m, loss in zip(members, losses["val"])],
        "parameters": model.parameter_count(), "tokens_seen": steps * c.batch_tokens,
        "training_flops": schedule.training_flops(data.vocab_size, steps),
        "train_seconds": train_seconds, "wall_seconds": time.time() - started, "machine": machine,
        "data": {"name": data.name, **data.digests}, "source_sha256": log.source_sha256,
        "val_evaluations": looks + 1, "date": f"{datetime.now():%Y-%m-%d}",
    }
    result["violations"] = violations(args, data, c, result, steps < schedule.steps)
    result["complete"] = True
    log.metric("final", step=steps, **{key: result[key] for key in ("val_loss", "val_bpb", "audit_loss", "audit_bpb")})
    log.plot(final=result["val_loss"])
    if log.main:
        write_atomic(log.folder / "doc_losses.npz", lambda file: np.savez_compressed(file, **documents))
        write_json(log.folder / "result.json", result)
    return result


def violations(args, data, c, result, stopped):
    """Why the run can be no record of its track; empty for a valid run."""
    found = []
    field, cap = CAPS.get(args.track, (None, math.inf))
    if field and result[field] > cap:
        found.append(f"{field} {result[field]:.4g} is over the track's cap of {cap:.4g}")
    if stopped:
        found.append("stopped early by --max-steps")
    if data.name != TRACKS[args.track].get("dataset", Config.dataset):
        found.append(f"trained on {data.name}, not the track's dataset")
    return found


def final_table(result, folder):
    rows = [("val loss", f"{result['val_loss']:.4f}   ({result['val_bpb']:.4f} bits per byte)"),
            ("audit loss", f"{result['audit_loss']:.4f}   ({result['audit_bpb']:.4f} bits per byte)")]
    rows += [("  member", f"{m['val_loss']:.4f}   val loss of {m['checkpoint']}, weight {m['weight']:.3f}") for m in result["members"]]
    rows += [("training", f"{result['train_seconds'] / 60:.1f} min of {result['wall_seconds'] / 60:.1f} min in all"),
             ("compute", f"{result['training_flops']:.4g} FLOPs, {result['tokens_seen']:,} tokens, {result['parameters']:,} parameters")]
    rows += [("no record", reason) for reason in result["violations"]]
    rows += [("run", str(folder.relative_to(ROOT)) + "/  (loss.svg, result.json, log.txt)")]
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def main(argv=None):
    started = time.time()
    c, args = parse_args(argv)
    device, dtype, reason = pick_device(args)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    check_batch(c, args, dist.get_world_size())
    folder = args.data or ROOT / "data" / c.dataset
    data = Dataset(folder, f"./run.sh data {c.dataset}")
    if min(len(data.splits["train"]), len(data.splits["val"]), len(data.splits["audit"])) <= c.seq_len:
        fail(f"{folder} has a split that is shorter than a sequence; lower --seq-len {c.seq_len}")
    run = make_run_folder(args)
    settings = dict(project=args.wandb, name=run.name, config=dataclasses.asdict(c)) if args.wandb else None
    log = RunLog(run, f"{args.track}, seed {args.seed}", settings)
    state = setup_compile(args.compile, device)
    log(environment(device, dtype, reason), console=False)
    log(f"config {json.dumps(dataclasses.asdict(c))}", console=False)
    log(f"slowrun {args.track} seed {args.seed}: {dist.get_world_size()} x {device_name(device)}, "
        f"{str(dtype)[6:]} ({reason}), {state}, torch {torch.__version__}")
    machine = {"device": device.type, "name": device_name(device), "count": dist.get_world_size(), "torch": torch.__version__}
    model, members, seconds, steps, looks = train(c, args, data, log, device, dtype)
    result = finish(c, args, data, log, model, members, seconds, steps, looks, machine, started)
    log("\n" + final_table(result, run))
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        fail(f"cannot write {error.filename or 'the run folder'}: {error.strerror}; free some space or choose another place")
