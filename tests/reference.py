"""The recipe a second time: float64, plain functions, written from its prose description alone.

This file was written without sight of train_gpt.py, which is what it is for: the tests hold the two against
each other. It favours clarity over speed, runs on the CPU, and knows no dropout, no stochastic depth and no
low precision. tests/test_reference.py holds it against the recipe's check values.

Parameters are a dict of float64 tensors; a weight of shape (out, in) acts as `y = x @ W.T`. A technique whose
key is absent is off. d is the width, h the hidden width, L the layers (even), H the heads, Vp the padded
vocabulary:

    embed, head                    (Vp, d)
    lam, mu, skip                  (L,), (L,), (L/2,)
    blocks.{i}.attn.q k v o        (d, d)
    blocks.{i}.attn.mix            (3, H, H)   interleaved heads, for q, k, v
    blocks.{i}.attn.head_gate      (H, 12)     output gate, read from the first 12 channels
    blocks.{i}.attn.value_proj     (d, d)      value layers only: i of the parity of L-1
    blocks.{i}.attn.value_table    (Vp, d)     or this in its place: the value of each token (limited 1-2)
    blocks.{i}.attn.value_gate     (H, 32)     value layers only, read from the first 32 channels
    blocks.{i}.attn.xsa            (H,)        exclusive self-attention: learned, or infinite: fixed
    blocks.{i}.mlp.gate up out     (h, d), (h, d), (d, h); without `gate` a squared ReLU (limited 1-3)
    mtp.proj                       (d, 2d)     multi-token prediction by one extra block
    mtp.block.attn.*, mtp.block.mlp.*          as a block without value injection
"""

import math
from dataclasses import dataclass

import torch

EPSILON = 2.0**-23  # of every RMS norm: the machine epsilon of float32


# ---- Model -------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Net:
    """Everything about the forward pass that the parameters' shapes do not tell.

    The head width is twice the number of frequencies; the number of heads follows from it.
    """

    vocab_size: int  # logits of the padding rows of `head` are cut off
    windows: tuple  # per layer: query i sees the keys i-w..i
    order: tuple  # layers in the order in which one pass executes them, see layer_order
    frequencies: torch.Tensor  # (d_h/2,) RoPE angle per position, in radians
    scale: float | None = None  # of the attention scores; None: d_h^-1/2
    softcap: float = 10.0
    key_offset_layers: tuple = ()  # half of each key is that of the position before (tiny); L: the MTP block
    passes: int = 1  # of the whole network; all but the last are detached (tiny)
    norm_passes: bool = False  # an RMS norm after each pass, beside the one before the head (tiny)

def parameter_shapes(n_layer, n_embd, n_head, hidden, padded_vocab, iha=True, head_gate=True, xsa=False,
                     mtp=True):
    """{name: shape} of every parameter, as in the table at the top."""
    d = n_embd

    def block(prefix, value_layer, xsa):
        shapes = {f"{prefix}.attn.{name}": (d, d) for name in "qkvo"}
        if iha:
            shapes[f"{prefix}.attn.mix"] = (3, n_head, n_head)
        if head_gate:
            shapes[f"{prefix}.attn.head_gate"] = (n_head, 12)
        if value_layer:
            shapes[f"{prefix}.attn.value_proj"] = (d, d)
            shapes[f"{prefix}.attn.value_gate"] = (n_head, 32)
        if xsa:
            shapes[f"{prefix}.attn.xsa"] = (n_head,)
        shapes[f"{prefix}.mlp.gate"] = shapes[f"{prefix}.mlp.up"] = (hidden, d)
        shapes[f"{prefix}.mlp.out"] = (d, hidden)
        return shapes

    shapes = {"embed": (padded_vocab, d), "head": (padded_vocab, d)}
    shapes |= {"lam": (n_layer,), "mu": (n_layer,), "skip": (n_layer // 2,)}
    for i in range(n_layer):
        shapes |= block(f"blocks.{i}", value_layer=i % 2 == (n_layer - 1) % 2, xsa=xsa)
    if mtp:
        shapes |= {"mtp.proj": (d, 2 * d)} | block("mtp.block", value_layer=False, xsa=False)
    return shapes

def layer_order(n_layer, replay=None):
    """Executions of one pass; replay = (first, last, times): layers first..last run `times` times in all."""
    layers = list(range(n_layer))
    if replay is None:
        return tuple(layers)
    first, last, times = replay
    return tuple(layers[:first] + layers[first : last + 1] * times + layers[last + 1 :])

def layer_windows(n_layer, short, long):
    """Window of each layer: three short ones and a long one in turn, the last layer always long."""
    windows = [long if i % 4 == 3 else short for i in range(n_layer)]
    return tuple(windows[:-1] + [long])

def rms(x):
    """RMS norm without gain over the last dimension."""
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()

def rope_frequencies(head_width, half_truncated=False):
    """(d_h/2,) angles per position; half_truncated (tiny): half as many, spread as widely, then zeros."""
    pairs = head_width // 2
    if not half_truncated:
        return 10000.0 ** (-2 * torch.arange(pairs, dtype=torch.float64) / head_width)
    moving = 10000.0 ** (-2 * torch.arange(pairs // 2, dtype=torch.float64) / pairs)
    return torch.cat([moving, torch.zeros(pairs - pairs // 2, dtype=torch.float64)])

def rotate(x, frequencies):
    """x (B, T, H, d_h): channel f turns with channel f + d_h/2 by the angle -t * frequencies[f]."""
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequencies
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], dim=-1)

def yarn(frequencies, scale, old_window, new_window):
    """(frequencies, scale) after the long window grows: slow pairs are interpolated, fast ones kept."""
    ratio = old_window / new_window
    rotations = old_window * frequencies / (2 * math.pi)
    keep = ((rotations - 1) / (32 - 1)).clamp(0, 1)
    return frequencies * (ratio + keep * (1 - ratio)), scale * (0.2 * math.log(1 / ratio) + 1)

TWO_HOUR_STAGES = ((1, 256, 768), (7, 768, 1792), (14, 1280, 2048))  # from epoch, short, long

def two_hour_stage(epoch, head_width):
    """(short, long, frequencies, scale) in a 1-based epoch; the first stage is without YaRN."""
    _, short, long = TWO_HOUR_STAGES[0]
    frequencies, scale = rope_frequencies(head_width), head_width**-0.5
    for start, next_short, next_long in TWO_HOUR_STAGES[1:]:
        if epoch >= start:
            frequencies, scale = yarn(frequencies, scale, long, next_long)
            short, long = next_short, next_long
    return short, long, frequencies, scale

def windowed_attention(q, k, v, window, scale):
    """Masked softmax attention of (B, T, H, d_h) tensors: query i sees the keys i-window <= j <= i."""
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
    hidden = (j > i) | (j < i - window)
    scores = torch.einsum("bihc,bjhc->bhij", q, k) * scale
    return torch.einsum("bhij,bjhc->bihc", scores.masked_fill(hidden, -math.inf).softmax(-1), v)

def attention(params, prefix, x, x0, net, window, key_offset):
    """Attention sub-layer on the normalised x (B, T, d); x0 is what values are injected from."""
    p = {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
    head_width = 2 * net.frequencies.numel()
    n_head = x.shape[-1] // head_width

    def heads(y):
        return y.unflatten(-1, (n_head, head_width))

    def project(which, name):
        weight = p[name]
        if "mix" in p:  # head h works with the mixture of all heads' weights
            mixed = torch.einsum("hm,mcd->hcd", p["mix"][which], weight.unflatten(0, (n_head, head_width)))
            weight = mixed.flatten(0, 1)
        return heads(x @ weight.T)

    q, k, v = (project(which, name) for which, name in enumerate("qkv"))
    if "value_gate" in p:
        gate = 2 * torch.sigmoid(x[..., : p["value_gate"].shape[1]] @ p["value_gate"].T)
        v = v + gate[..., None] * heads(x0 @ p["value_proj"].T if "value_proj" in p else x0)
    q, k = rms(rotate(q, net.frequencies)), rms(rotate(k, net.frequencies))
    if key_offset:
        own, moved = k.chunk(2, dim=-1)
        k = torch.cat([own, torch.cat([moved[:, :1], moved[:, :-1]], dim=1)], dim=-1)
    out = windowed_attention(q, k, v, window, head_width**-0.5 if net.scale is None else net.scale)
    if "xsa" in p:  # take out (part of) what points along the token's own value
        own_value = v / v.norm(dim=-1, keepdim=True).clamp_min(1e-4)
        along = (out * own_value).sum(-1, keepdim=True)
        out = out - torch.tanh(p["xsa"])[:, None] * along * own_value
    if "head_gate" in p:
        gate = torch.sigmoid(x[..., : p["head_gate"].shape[1]] @ p["head_gate"].T)
        out = out * gate[..., None]
    return out.flatten(-2) @ p["o"].T

def block(params, prefix, x, x0, net, window, key_offset=False):
    """One transformer block: (B, T, d) -> (B, T, d). x0 is unused where no value is injected."""
    x = x + attention(params, prefix + "attn.", rms(x), x0, net, window, key_offset)
    hidden = rms(x) @ params[f"{prefix}mlp.up"].T
    if f"{prefix}mlp.gate" in params:
        hidden = torch.nn.functional.silu(rms(x) @ params[f"{prefix}mlp.gate"].T) * hidden
    else:
        hidden = hidden.clamp_min(0).square()
    return x + hidden @ params[f"{prefix}mlp.out"].T

def trunk(params, tokens, net):
    """tokens (B, T) -> final normalised residual stream (B, T, d)."""
    n_layer = params["lam"].numel()
    assert n_layer % 2 == 0 and len(net.windows) == n_layer
    x0 = rms(params["embed"][tokens])
    x = x0
    for n in range(net.passes):
        if n > 0:
            x = x.detach()
        encoder = {}
        for i in net.order:
            if i >= n_layer // 2:  # the skip comes before the mix with the embedding
                x = x + params["skip"][i - n_layer // 2] * encoder[n_layer - 1 - i]
            x = params["lam"][i] * x + params["mu"][i] * x0
            table = params.get(f"blocks.{i}.attn.value_table")
            value = x0 if table is None else table[tokens]
            x = block(params, f"blocks.{i}.", x, value, net, net.windows[i], i in net.key_offset_layers)
            if i < n_layer // 2:
                encoder[i] = x
        if net.norm_passes:
            x = rms(x)
    return rms(x)

def logits_of(params, x, net):
    """Final stream (B, T, d) -> soft-capped logits (B, T, vocab_size)."""
    logits = x @ params["head"][: net.vocab_size].T
    return net.softcap * torch.tanh(logits / net.softcap)

def forward(params, tokens, net):
    """tokens (B, T) -> soft-capped logits (B, T, vocab_size) float64; position t predicts token t+1."""
    return logits_of(params, trunk(params, tokens, net), net)


# ---- Losses ------------------------------------------------------------------------------------------------

def cross_entropy(logits, targets):
    """Nats per target, unreduced: (..., V), (...) -> (...)."""
    return torch.logsumexp(logits, -1) - logits.gather(-1, targets[..., None])[..., 0]

def language_loss(params, sequences, net):
    """Mean next-token loss of sequences (B, T+1)."""
    return cross_entropy(forward(params, sequences[:, :-1], net), sequences[:, 1:]).mean()

def mtp_loss(params, x, sequences, net):
    """Mean loss of the extra block, which predicts token t+2 from the trunk at t and token t+1.

    x (B, T, d) is the trunk's output on sequences[:, :-1] (B, T). The block sees T-1 positions.
    """
    next_token = rms(params["embed"][sequences[:, 1:-1]])
    u = torch.cat([x[:, :-1], next_token], dim=-1) @ params["mtp.proj"].T
    key_offset = params["lam"].numel() in net.key_offset_layers
    u = rms(block(params, "mtp.block.", u, None, net, u.shape[1], key_offset))
    return cross_entropy(logits_of(params, u, net), sequences[:, 2:]).mean()

def training_loss(params, sequences, net, mtp_weight=0.3):
    """The limited track's training loss on sequences (B, T+1): next token + mtp_weight * the one after."""
    x = trunk(params, sequences[:, :-1], net)
    main = cross_entropy(logits_of(params, x, net), sequences[:, 1:]).mean()
    return main + mtp_weight * mtp_loss(params, x, sequences, net)

def head_mtp_loss(logits, targets, weights):
    """Tiny: the same head predicts several tokens ahead. logits (B, T, V), targets (B, T), weights (K,).

    Position t pays weights[k] times its loss on targets[t+k], as far as the sequence goes; the sum over all
    positions is divided by all B*T of them, also for k > 0, where the last k of a sequence have no target.
    """
    total = 0.0
    for k, weight in enumerate(weights):
        total = total + weight * cross_entropy(logits[:, : logits.shape[1] - k], targets[:, k:]).sum()
    return total / targets.numel()

def head_mtp_weights(progress, end=0.66):
    """Tiny: (1, w1, w2) at progress = it/N. w2 falls to 0 over the first half of `end`, then w1 does."""
    half = end / 2
    w1 = 0.5 * (1 - min(max((progress - half) / half, 0), 1))
    w2 = 0.25 * (1 - min(progress / half, 1))
    return 1.0, w1, w2

def distillation_loss(student, teacher, own_loss, alpha, temperature):
    """(1-alpha) * own_loss + alpha * temperature^2 * mean KL(teacher || student); logits (..., V)."""
    target = (teacher / temperature).log_softmax(-1)
    divergence = (target.exp() * (target - (student / temperature).log_softmax(-1))).sum(-1).mean()
    return (1 - alpha) * own_loss + alpha * temperature**2 * divergence


# ---- Optimizer ---------------------------------------------------------------------------------------------

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

def polar_express_scalar(sigma):
    """What the five steps make of one singular value."""
    for a, b, c in POLAR_EXPRESS:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma

def polar_express(g):
    """(R, C) -> about the nearest semi-orthogonal matrix: norm, then five odd quintic steps."""
    x = g / (1.02 * g.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x

def muon_state(weight):
    """Zero (momentum (R, C), second moment (R, 1) if R >= C else (1, C))."""
    rows, columns = weight.shape
    second = torch.zeros((rows, 1) if rows >= columns else (1, columns), dtype=torch.float64)
    return torch.zeros_like(weight), second

def muon_step(weight, gradient, buffer, second, lr, momentum, weight_decay, beta2=0.95, normalize_rows=True):
    """One Muon step of one matrix (R, C) -> (weight, buffer, second), all new tensors.

    Nesterov momentum, row normalisation (MuonEq-R), Polar Express, variance reduction along one axis at equal
    Frobenius norm (NorMuon), and decay only where the update shrinks the weight (cautious).
    """
    rows, columns = weight.shape
    buffer = buffer + (1 - momentum) * (gradient - buffer)
    g = (1 - momentum) * gradient + momentum * buffer
    if normalize_rows:
        g = g / g.norm(dim=1, keepdim=True).clamp_min(1e-7)
    x = polar_express(g)

    axis = 1 if rows >= columns else 0
    variance = x.square().mean(dim=axis, keepdim=True)
    second = second + (1 - beta2) * (variance - second)
    reduced = x * second.clamp_min(1e-10).rsqrt()
    x = reduced * x.norm() / reduced.norm().clamp_min(1e-10)

    step = lr * math.sqrt(max(1, rows / columns))
    shrinking = (x * weight >= 0).to(weight.dtype)
    return weight - step * x - step * weight_decay * weight * shrinking, buffer, second

def adamw_step(weight, gradient, m, v, t, lr, betas, weight_decay, eps=1e-10):
    """One AdamW step, t = 1, 2, ... -> (weight, m, v), all new tensors. The decay comes first."""
    weight = weight * (1 - lr * weight_decay)
    m = m + (1 - betas[0]) * (gradient - m)
    v = v + (1 - betas[1]) * (gradient**2 - v)
    denominator = (v / (1 - betas[1] ** t)).sqrt() + eps
    return weight - lr / (1 - betas[0] ** t) * m / denominator, m, v

def muon_momentum(it):
    """0.85 -> 0.95 over the first 300 steps; it counts from 0."""
    return 0.85 + 0.10 * min(it / 300, 1)


# ---- Schedules ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay of one recipe. Steps count from 0; an epoch is steps/epochs, a float."""

    steps: int  # N
    epochs: int  # E
    warmdown: float  # share of the steps
    power: float = 1.0  # of the warmdown; 0.5 is the square root
    cycles: int = 0  # last epochs with a cosine cycle each
    weight_decay: float = 1.3  # what wd_multiplier multiplies
    wd: str = "constant"  # or "antiphase", "piecewise"
    wd_end: float = math.nan  # piecewise: weight decay at step N
    wd_knots: tuple | None = None  # piecewise: steps of the two bends; None: after 2 and 8 epochs

SCHEDULES = {
    "limited 1-6": Schedule(2288, 12, 0.5, weight_decay=1.6),
    "limited 7-9": Schedule(2288, 12, 0.4, weight_decay=1.6),
    "limited 10": Schedule(2288, 12, 0.2, weight_decay=1.6),
    "limited 11-12": Schedule(2288, 12, 0.2),
    "limited 13-15": Schedule(2288, 12, 0.2, cycles=3),
    "limited 16-19": Schedule(2097, 11, 0.2, cycles=3),
    "limited 20-21": Schedule(2097, 11, 0.2, power=0.5, cycles=3, wd="antiphase"),
    "two_hour 1-3": Schedule(3812, 20, 0.2, cycles=3),
    "two_hour 4-6": Schedule(4194, 22, 0.2, power=0.5, cycles=8, wd="antiphase"),
    "tiny 1-4": Schedule(3048, 16, 0.5, weight_decay=0.8),
    "tiny 5-6": Schedule(3048, 16, 0.6, weight_decay=0.8),
    "tiny 7": Schedule(
        3048, 16, 0.6, weight_decay=0.8, wd="piecewise", wd_end=1.25, wd_knots=(380, 1520)
    ),
    "tiny 8": Schedule(3048, 16, 0.6, weight_decay=0.8, wd="piecewise", wd_end=1.25),
    "tiny 9-11,13": Schedule(3040, 16, 0.6, cycles=4, weight_decay=0.8, wd="piecewise", wd_end=1.25),
    "tiny 12,14-15": Schedule(2850, 15, 0.4, cycles=4, weight_decay=0.8, wd="piecewise", wd_end=0.93),
    "unlimited 1-4": Schedule(2288, 12, 0.5, weight_decay=1.6),  # unlimited: steps as on one node
    "unlimited 5-6, first member of 7-8": Schedule(3431, 18, 0.5, weight_decay=1.6),
    "unlimited 7-8": Schedule(4575, 24, 0.5, weight_decay=1.6),
    "unlimited 9-11": Schedule(6100, 32, 0.2),
    "unlimited 9-11, first member": Schedule(3050, 16, 0.2),
}

def planned_steps(targets_per_epoch, epochs, batch_tokens=524288):
    """N: optimizer steps of a run."""
    return round(targets_per_epoch * epochs / batch_tokens)

def cycle_position(it, s):
    """(first step of the cyclic tail, a float; position 0..1 within the current cycle, None before it)."""
    epoch = s.steps / s.epochs
    start = s.steps - s.cycles * epoch
    return start, ((it - start) % epoch) / epoch if it >= start else None

def lr_multiplier(it, s):
    """Learning rate at step it over the base learning rate."""
    warmdown = round(s.warmdown * s.steps)
    base = 1.0 if it <= s.steps - warmdown else ((s.steps - it) / warmdown) ** s.power
    _, position = cycle_position(it, s)
    if position is None:
        return base
    return 0.05 + (max(base, 0.05) - 0.05) * (1 + math.cos(math.pi * position)) / 2

def wd_multiplier(it, s):
    """Weight decay at step it over s.weight_decay."""
    if s.wd == "antiphase":  # a cycle's decay is low while its learning rate is high
        start, position = cycle_position(it, s)
        if position is not None:
            return 0.65 + 0.85 * position
        return 1 - 0.35 * min(max((it / s.steps - 0.4) / (start / s.steps - 0.4), 0), 1)
    if s.wd == "piecewise":
        first, second = s.wd_knots or (round(2 * s.steps / s.epochs), round(8 * s.steps / s.epochs))
        knots = ((0, 0.8), (first, 0.8), (second, 0.1), (s.steps, s.wd_end))
        for (left, low), (right, high) in zip(knots, knots[1:]):
            if it <= right:
                return (low + (high - low) * (it - left) / (right - left)) / s.weight_decay
    return 1.0


# ---- Data order --------------------------------------------------------------------------------------------

def permutation(n, seed):
    """(n,) int64 from torch's own generator on the CPU."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))

def epoch_sequences(tokens, doc_starts, epoch, size, doc_seed=0, sequence_seed=1000,
                    first_in_file_order=True):
    """Document shuffle: the (n, size) sequences of a 1-based epoch, in training order.

    The documents of epoch e are those of epoch e-1 permuted by seed doc_seed+e (epoch 1: file order), joined,
    cut into n = len(tokens) // size sequences, which are permuted by seed sequence_seed+e. doc_starts begins
    with 0. Snapshot chains of node seed s: 1009*s+1000, 1009*s+2000 and first_in_file_order=False.
    """
    bounds = [*(int(start) for start in doc_starts), len(tokens)]
    documents = [tokens[a:b] for a, b in zip(bounds, bounds[1:])]
    for e in range(2 if first_in_file_order else 1, epoch + 1):
        documents = [documents[i] for i in permutation(len(documents), doc_seed + e).tolist()]
    n = len(tokens) // size
    sequences = torch.cat(documents)[: n * size].view(n, size)
    return sequences[permutation(n, sequence_seed + epoch)]

def step_shuffle(n, epoch):
    """Step shuffle (older records): order of n micro-batches in a 1-based epoch, accumulating."""
    order = torch.arange(n)
    for e in range(2, epoch + 1):
        order = order[permutation(n, e)]
    return order


# ---- Averages and ensembles --------------------------------------------------------------------------------

def recency_weights(n):
    """(1, 2, ..., n) / sum, oldest first."""
    return [i / (n * (n + 1) / 2) for i in range(1, n + 1)]

def weight_average(members, weights):
    """Weighted mean of parameter dicts."""
    return {name: sum(w * m[name] for w, m in zip(weights, members)) for name in members[0]}

def mixture_loss(member_logits, weights, targets):
    """Nats per target of the weighted mean of the members' probabilities; weights sum to 1."""
    return -sum(w * (-cross_entropy(z, targets)).exp() for w, z in zip(weights, member_logits)).log()

def debiased_ema_beta(steps_per_epoch, kept=0.15, every=10):
    """Tiny: the factor per update that leaves `kept` of a weight's share after an epoch."""
    return kept ** (every / steps_per_epoch)

def debiased_ema(values, beta, every=10):
    """Tiny: the average after the last of values (values[it] follows step it); it = 0, every, ... enter."""
    taken = values[::every]
    ema = torch.zeros_like(values[0])
    for value in taken:
        ema = ema + (1 - beta) * (value - ema)
    return ema / (1 - beta ** len(taken))

def ema_blend(values, keep_final, decay=0.95, every=10, start=0.9):
    """keep_final * last + (1 - keep_final) * shadow; values[s-1] follows step s = 1..N.

    The shadow begins as the weights after the first step s >= round(start*N) that `every` divides.
    keep_final is 0.7 in limited 11 and 0.6 in unlimited 9-11.
    """
    shadow = None
    for s in range(round(start * len(values)), len(values) + 1):
        if s % every == 0:
            value = values[s - 1]
            shadow = value if shadow is None else decay * shadow + (1 - decay) * value
    return keep_final * values[-1] + (1 - keep_final) * shadow


# ---- Snapshot chains (unlimited 12) ------------------------------------------------------------------------

def snapshot_batch(cycle, cycles):
    """Tokens per optimizer step of a 0-based cycle: large in the middle half of the run."""
    return 524288 if 1 - abs(2 * cycle / (cycles - 1) - 1) >= 0.5 else 393216

def snapshot_cycle_steps(targets_per_epoch, batch_tokens, epochs_per_cycle=2):
    """Optimizer steps of one cycle."""
    return max(1, round(epochs_per_cycle * targets_per_epoch / batch_tokens))

def snapshot_lr_multiplier(s, length):
    """Within a cycle, s = 0..length-1: 1 -> 0.08, linear, with a jump back at every cycle's start."""
    return 0.08 + 0.92 * (1 - s / length)

def snapshot_wd_multiplier(s, length):
    """Within a cycle: 0.7 -> 1, in antiphase to the learning rate."""
    return 0.7 + 0.3 * (1 - snapshot_lr_multiplier(s, length)) / 0.92

def perturbation_scale(completed, cycles):
    """Noise after `completed` = 1..cycles-1 cycles, in standard deviations of each tensor: 0.25 -> 0.05."""
    return 0.05 + 0.20 * (1 + math.cos(math.pi * (completed - 1) / (cycles - 2))) / 2

def select_weights(probabilities, steps=300, lr=0.5):
    """(M, n) of members' target probabilities -> (M,) mixture weights of least mean loss, by gradient.

    Softmax of logits that start at 1e-4 * N(0, 1) (seed 0, drawn in float32); AdamW with betas (.9, .999),
    eps 1e-8 and no decay, the gradient clipped to norm 1, on all n tokens at once.
    """
    draw = torch.randn(len(probabilities), generator=torch.Generator().manual_seed(0))
    alpha = 1e-4 * draw.double()
    m, v = torch.zeros_like(alpha), torch.zeros_like(alpha)
    for t in range(1, steps + 1):
        leaf = alpha.clone().requires_grad_()
        loss = -(leaf.softmax(0) @ probabilities).clamp_min(1e-12).log().mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        gradient = gradient * min(1.0, 1.0 / (float(gradient.norm()) + 1e-6))
        alpha, m, v = adamw_step(alpha, gradient, m, v, t, lr, (0.9, 0.999), 0.0, eps=1e-8)
    return alpha.softmax(0)

def kneser_ney(text, context, order, vocab_size):
    """[V] probabilities of what follows the context: interpolated Kneser-Ney, a discount for each order, from
    its definition (Chen & Goodman 1999). Of n-grams under `order` the different tokens before them count.
    """
    p = [1 / vocab_size] * vocab_size
    for n in range(1, min(order, len(context) + 1) + 1):
        places = {}
        for i in range(len(text) - n + 1):
            places.setdefault(tuple(text[i:i + n]), []).append(i)
        count = {gram: len(at) if n == order else len({text[i - 1] for i in at if i})
                 for gram, at in places.items()}
        once, twice = ([*count.values()].count(times) for times in (1, 2))
        discount = max(0.1, once / max(1, once + 2 * twice))
        before = tuple(context[len(context) - n + 1:])
        follows = [count.get((*before, token), 0) for token in range(vocab_size)]
        if total := sum(follows):
            shares = [max(0, times - discount) / total for times in follows]
            p = [share + (1 - sum(shares)) * rest for share, rest in zip(shares, p)]
    return p

def top_k(weights, k):
    """(indices (k,), weights (k,) that sum to 1) of the k largest weights, largest first."""
    values, indices = weights.topk(k)
    return indices, values / values.sum()
