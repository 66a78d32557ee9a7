"""The model and its losses against the float64 reference, which was written from the recipe alone.

Under `exact` both sides compute in float64 throughout and agree to its last digits. What float32 and bfloat16
cost is measured where it matters, against their own machine epsilon.
"""

import json
import math
from unittest import mock

import numpy as np
import pytest
import reference as ref
import torch
from conftest import exact, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

VOCAB, T = 61, 32
SMALL = dict(
    n_layer=6,
    n_head=2,
    n_embd=64,
    seq_len=T,
    batch_tokens=4 * T,
    short_window=5,
    dropout=0.0,
    stochastic_depth=0.0,
    replay="3-4",
)
PLAIN = dict(unet_skips=False, value_proj=False, head_gate=False, head_mixing=False)


def make_model(dtype=torch.float64, **changes):
    """A model whose every parameter is random, so that none of its techniques rests in its initial state."""
    model = train_gpt.make_model(train_gpt.Config(**(SMALL | changes)), VOCAB, "cpu", dtype).to(dtype)
    for i, p in enumerate(model.parameters()):
        p.data.copy_(0.3 * normal(*p.shape, seed=i))
    return model


def make_tokens(B, length, seed=0):
    return torch.randint(VOCAB, (B, length), generator=torch.Generator().manual_seed(seed))


def reference_of(model, replay):
    """(leaf parameters, Net) of the reference for the same model; what it has switched off is absent."""
    c = model.c
    params = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    params.setdefault("skip", torch.zeros(c.n_layer // 2, dtype=torch.float64))
    passes = (*map(int, c.replay.split("-")), c.replay_passes) if replay else None
    return params, ref.Net(
        VOCAB,
        ref.layer_windows(c.n_layer, c.short_window, c.seq_len, c.windows),
        ref.layer_order(c.n_layer, passes),
        ref.rope_frequencies(c.head_dim),
        softcap=c.softcap,
    )


def assert_close(actual, expected, eps=1e-12):
    """Equal up to eps of the largest entry."""
    actual, expected = (t.detach().double() for t in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=eps * expected.abs().max().item() + 1e-30)


# ---- Forward and gradients -----------------------------------------------------------------------

TECHNIQUES = [
    {},
    PLAIN,
    *({name: False} for name in PLAIN),
    dict(windows="SL", short_window=1),
    dict(windows="L"),
    dict(n_layer=4, n_head=4, replay="2-3", replay_passes=2, softcap=3.0),
]


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("changes", TECHNIQUES, ids=str)
@exact()
def test_logits_are_the_references(changes, replay):
    model, tokens = make_model(**changes), make_tokens(2, T)
    params, net = reference_of(model, replay)
    x, _ = model.trunk(tokens, replay)
    assert_close(model.logits(x), ref.forward(params, tokens, net))
    assert_close(model.trunk(tokens[:, :7], replay)[0], x[:, :7])  # a shorter context is the same model


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("changes", [{}, PLAIN, dict(mtp="none"), dict(mtp_weight=0.7, windows="S")], ids=str)
@exact()
def test_training_loss_and_gradients_are_the_references(changes, replay):
    model, sequences = make_model(**changes), make_tokens(3, T + 1)
    params, net = reference_of(model, replay)
    noise = train_gpt.draw_noise(model.c, 42, range(3), torch.float64)
    loss, plain = model.loss(sequences, replay, noise, batch_sequences=3)
    loss.backward()
    if model.c.mtp == "block":
        expected = ref.training_loss(params, sequences, net, model.c.mtp_weight)
    else:
        expected = ref.language_loss(params, sequences, net)
    expected.backward()
    assert_close(loss, expected)
    assert_close(plain, ref.language_loss(params, sequences, net))
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0, name
        assert_close(p.grad, params[name].grad, 1e-11)


def test_losses_of_micro_batches_add_up_to_the_batchs_whatever_they_are():
    """With all the noise on: a sequence's dropout and depth do not depend on who shares its batch."""
    with exact():
        model = make_model(dropout=0.2, stochastic_depth=0.4)
        sequences = make_tokens(4, T + 1)

        def run(parts):
            model.zero_grad()
            losses = 0
            for part in parts:
                noise = train_gpt.draw_noise(model.c, 7, [100 + i for i in part], torch.float64)
                loss, _ = model.loss(sequences[part], True, noise, batch_sequences=4)
                loss.backward()
                losses += loss.detach()
            return losses, [p.grad.clone() for p in model.parameters()]

        loss, grads = run([[0, 1, 2, 3]])
        other_loss, other_grads = run([[3, 1], [0], [2]])
        assert_close(other_loss, loss)
        for other, grad in zip(other_grads, grads):
            assert_close(other, grad, 1e-11)


def test_bfloat16_stays_near_the_reference_and_in_bfloat16():
    c = train_gpt.Config(**SMALL)
    model = train_gpt.make_model(c, VOCAB, "cpu", torch.bfloat16)
    train_gpt.initialise(model, c, 42)
    model.head.data.mul_(100)
    assert [n for n, p in model.named_parameters() if p.dtype == torch.bfloat16] == ["embed"]
    tokens = make_tokens(2, T)
    x, rope = model.trunk(tokens, True)
    assert x.dtype == rope[0].dtype == torch.bfloat16
    params, net = reference_of(model, True)
    expected = ref.trunk(params, tokens, net)
    # Some 40 independent roundings to eight bits, 2^-9 each, follow one another: twice the root of their sum.
    assert (x - expected).norm() / expected.norm() < 0.025


# ---- Attention and rotary embedding --------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 300), window=st.integers(0, 320), seed=st.integers(0, 99))
@exact()
def test_attention_is_a_masked_softmax(length, window, seed):
    q, k, v = (normal(2, length, 2, 4, seed=3 * seed + i).requires_grad_() for i in range(3))
    out, expected = train_gpt.attention(q, k, v, window), ref.windowed_attention(q, k, v, window, 0.5)
    assert_close(out, expected)
    upstream = normal(*out.shape, seed=7)
    for mine, other in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream)
    ):
        assert_close(mine, other)


@pytest.mark.parametrize("window", [0, 1, 127, 128, 129, 255, 256, 299, 300, 1000])
@exact()
def test_attention_at_the_borders_of_its_blocks(window):
    q, k, v = (normal(1, 300, 1, 4, seed=i) for i in range(3))
    assert_close(train_gpt.attention(q, k, v, window), ref.windowed_attention(q, k, v, window, 0.5))


def test_rotary_embedding_in_float32():
    c = train_gpt.Config(**SMALL | dict(seq_len=2048, batch_tokens=2048))
    x = normal(2, 2048, 2, c.head_dim)
    tables = train_gpt.rope_tables(c, "cpu", torch.float64)
    # The angle is a float32 up to 2047: 2^-14 from its last place, as much from the frequency's; |x| < 4.
    torch.testing.assert_close(
        train_gpt.rotate(x, tables),
        ref.rotate(x, ref.rope_frequencies(c.head_dim)),
        rtol=0,
        atol=4 * 2.0**-13,
    )
    with exact():
        tables = train_gpt.rope_tables(c, "cpu", torch.float64)
        assert_close(
            train_gpt.rotate(x[:, :100], tables), ref.rotate(x, ref.rope_frequencies(c.head_dim))[:, :100]
        )


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 199), replay=st.booleans())
def test_later_tokens_change_no_earlier_logit(cut, replay):
    model = make_model(torch.float32, seq_len=200, batch_tokens=200, short_window=40)
    tokens = make_tokens(1, 200)
    changed = tokens.clone()
    changed[:, cut:] = (changed[:, cut:] + 1) % VOCAB
    before, after = (model.logits(model.trunk(t, replay)[0]) for t in (tokens, changed))
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.equal(before[:, cut], after[:, cut])


def test_windows_and_order_of_limited():
    c = train_gpt.Config()
    assert [i for i in range(31) if c.window(i) == 2048] == [3, 7, 11, 15, 19, 23, 27, 29, 30]
    assert {c.window(i) for i in range(31)} == {1024, 2048}
    assert [i for i in range(31) if c.value_layer(i)] == list(range(1, 30, 2))
    assert c.layer_order(False) == list(range(30))
    assert c.layer_order(True) == [*range(15), *[15, 16, 17, 18, 19, 20] * 3, *range(21, 30)]
    assert c.mlp_hidden == 4864


# ---- Head and loss -------------------------------------------------------------------------------


def plain_loss(x, W, y, w, softcap):
    return (w * ref.cross_entropy(softcap * torch.tanh(x @ W.T / softcap), y)).sum()


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(2, 97),
    rows=st.integers(1, 45),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    softcap=st.sampled_from([1.0, 10.0, 40.0]),
    seed=st.integers(0, 99),
)
@exact()
def test_head_loss_and_gradients_are_the_plain_ones(tokens, vocab, rows, scale, softcap, seed):
    x, W = scale * normal(tokens, 8, seed=seed), normal(vocab, 8, seed=seed + 1)
    y = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    w = normal(tokens, seed=seed + 2).abs() * (torch.arange(tokens) % 3 != 1)
    mine, other = ([t.clone().requires_grad_() for t in (x, W)] for _ in range(2))
    with mock.patch.object(train_gpt, "chunk_rows", lambda *_: rows):
        loss = train_gpt.HeadLoss.apply(*mine, y, w, softcap)
        logp = train_gpt.target_logprobs(x[None], W, y[None], softcap)[0]
    expected = plain_loss(*other, y, w, softcap)
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        logp, -ref.cross_entropy(softcap * torch.tanh(x @ W.T / softcap), y), rtol=1e-12, atol=1e-12
    )
    for a, b in zip(mine, other):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 5e-6), (torch.bfloat16, 2.0**-7)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_head_loss_in_low_precision(dtype, eps, scale):
    """
    Inputs are rounded before, so that only the computation's own error remains: in float32 four roundings by
    2^-24 of an exponent up to 2 x softcap, 5e-6 in all; in bfloat16 two of the results.
    """
    x, W = (scale * normal(300, 16)).to(dtype), normal(500, 16, seed=1).to(dtype).float().requires_grad_()
    y, w = torch.randint(500, (300,), generator=torch.Generator().manual_seed(2)), torch.full((300,), 1 / 300)
    leaf = x.clone().requires_grad_()
    with mock.patch.object(train_gpt, "chunk_rows", lambda *_: 128):
        loss = train_gpt.HeadLoss.apply(leaf, W, y, w, 10.0)
    loss.backward()
    x64, W64 = (t.detach().double().requires_grad_() for t in (x, W))
    expected = plain_loss(x64, W64, y, w.double(), 10.0)
    expected.backward()
    assert abs(loss.item() - expected.item()) < eps * expected.item()
    for mine, other in ((leaf.grad, x64.grad), (W.grad, W64.grad)):
        assert (mine - other).norm() < eps * other.norm()


def test_probabilities_sum_to_one():
    model, tokens = make_model(torch.float32), make_tokens(1, T)
    x, _ = model.trunk(tokens, True)
    assert model.logits(x).shape == (1, T, VOCAB)
    every = torch.arange(VOCAB).view(1, VOCAB)
    for t in (0, T - 1):
        logp = train_gpt.target_logprobs(
            x[:, t : t + 1].expand(1, VOCAB, -1), model.head[:VOCAB], every, model.c.softcap
        )
        assert logp.dtype == torch.float64
        # Each of the float32 sums of VOCAB exponentials rounds to 2^-24, relatively.
        assert abs(logp.exp().sum().item() - 1) < 4 * 2**-24 * math.sqrt(VOCAB)


class Largest(TorchDispatchMode):
    """Records the entries of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.entries = max(
            [self.entries]
            + [t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        )
        return out


def test_no_tensor_holds_the_logits_of_all_tokens():
    tokens, vocab = 512, 40000
    x, W = normal(1, tokens, 32, dtype=torch.float32), normal(vocab, 32, dtype=torch.float32)
    y, w = torch.zeros(1, tokens, dtype=torch.int64), torch.ones(tokens)
    x.requires_grad_(), W.requires_grad_()
    with Largest() as plain:
        plain_loss(x[0, :64], W, y[0, :64], w[:64], 10.0)
    assert plain.entries == 64 * vocab  # the instrument sees what it should
    with Largest() as largest:
        train_gpt.HeadLoss.apply(x[0], W, y[0], w, 10.0).backward()
        train_gpt.target_logprobs(x, W, y, 10.0)
    assert vocab * 32 < largest.entries <= tokens * vocab // 4


# ---- The predictor -------------------------------------------------------------------------------


def test_predictor_is_the_weighted_mixture_of_its_members(tmp_path):
    """Through its files: two checkpoints of which only the second replays, weights 1 : 2."""
    with exact():
        folder = tmp_path / "checkpoints"
        folder.mkdir()
        models = [make_model(), make_model()]
        for p in models[1].parameters():
            p.data.mul_(1.1)
        members = [train_gpt.Member("a.pt", 1 / 3, False), train_gpt.Member("b.pt", 2 / 3, True)]
        for model, member in zip(models, members):
            torch.save(model.state_dict(), folder / member.checkpoint)
        spec = dict(config=SMALL, vocab_size=VOCAB, dtype="float64", members=[m._asdict() for m in members])
        (folder / "predictor.json").write_text(json.dumps(spec))
        predictor = train_gpt.load_predictor(tmp_path, "cpu")
        predictor.model.double()
        tokens = make_tokens(2, T)
        for _ in range(2):  # the second call finds the last member loaded
            logp = predictor.logprobs(tokens)
        assert logp.shape == (2, T, VOCAB)
        torch.testing.assert_close(logp.exp().sum(-1), torch.ones(2, T))
        parts = [reference_of(model, member.replay) for model, member in zip(models, members)]
        logits = [ref.forward(params, tokens, net) for params, net in parts]
        targets = make_tokens(2, T, seed=1)
        expected = ref.mixture_loss(logits, [member.weight for member in members], targets)
        assert_close(-logp.gather(-1, targets[..., None])[..., 0], expected)


# ---- Dropout and stochastic depth ----------------------------------------------------------------


def keys(n, seed=42):
    """Dropout keys (n, 2) as training draws them."""
    return train_gpt.draw_noise(train_gpt.Config(**SMALL), seed, range(n), torch.float32).drop[0, :, 0]


def masks(key, p, shape=(64, 256)):
    """(n, places) bool: which entries the keys keep."""
    return (train_gpt.dropout(torch.ones(len(key), *shape), p, key) > 0).flatten(1)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_scales_it(p):
    mask = masks(keys(200), p).double()
    n, places = mask.shape
    variance = p * (1 - p)
    assert abs(mask.mean() - (1 - p)) < 5 * math.sqrt(variance / mask.numel())
    assert (mask.mean(1) - (1 - p)).abs().max() < 5 * math.sqrt(variance / places)
    # The means of keys, and those of places, scatter as independent draws do: neither more nor less.
    for means, draws in ((mask.mean(1), places), (mask.mean(0), n)):
        assert abs(means.var() * draws / variance - 1) < 5 * math.sqrt(2 / len(means))
    x = normal(3, 8, 16)
    out = train_gpt.dropout(x, p, keys(3))
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] / (1 - p))


def standard(mask):
    """Rows shifted and scaled: the product of two is their correlation, in standard deviations."""
    mask = mask.float() - mask.float().mean(1, keepdim=True)
    return mask / mask.norm(dim=1, keepdim=True) * mask.shape[1] ** 0.25


def test_masks_of_different_keys_and_places_are_independent():
    """Five standard deviations, for at most some thousands of correlations each; the seeds are fixed."""
    key = keys(60)
    mask = masks(key, 0.5, (64, 128))
    rows = standard(mask)
    assert (rows @ rows.T).triu(1).abs().max() < 5
    for lag in (1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 127, 128, 129, 256, 1024, 4096):  # places of one key
        z = (standard(mask[:, lag:]) * standard(mask[:, :-lag])).sum(1)
        assert z.abs().max() < 5 and z.mean().abs() * math.sqrt(60) < 5, lag
    # Keys that differ in one bit: of the offset, or of the factor but for its lowest, which does not count,
    # and its highest, which leave a part of the places alone. (Drawn keys differ in about 31 of 63 bits.)
    for bit in [*range(32), *range(33, 56)]:
        flip = torch.zeros(2, dtype=torch.int64)
        flip[bit // 32] = 1 << bit % 32
        z = (rows * standard(masks(key ^ flip.to(torch.int32), 0.5, (64, 128)))).sum(1)
        # A low bit of the offset swaps places two by two: each product occurs twice; the variance doubles.
        assert z.abs().max() < 5 * math.sqrt(2) and z.mean().abs() * math.sqrt(60 / 2) < 5, bit


def test_neighbouring_places_are_jointly_uniform():
    """Chi-square over the 256 patterns of eight places in a row, eight in a stride of a row of channels."""
    mask = masks(keys(50), 0.5, (128, 128)).long()
    bits = 2 ** torch.arange(8)
    for patterns in (
        (mask.view(50, -1, 8) * bits).sum(-1),
        (mask.view(50, -1, 8, 128) * bits[:, None]).sum(2),
    ):
        counts = torch.bincount(patterns.flatten(), minlength=256).double()
        expected = counts.sum() / 256
        chi = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


def test_dropout_depends_on_its_own_key_alone_and_passes_gradients_of_what_it_keeps():
    x, key = normal(5, 8, 16, dtype=torch.float32), keys(5)
    whole = train_gpt.dropout(x, 0.3, key)
    order = [3, 1]
    assert torch.equal(train_gpt.dropout(x[order], 0.3, key[order]), whole[order])
    x.requires_grad_()
    train_gpt.dropout(x, 0.3, key).sum().backward()
    torch.testing.assert_close(x.grad, (whole != 0).float() / 0.7)
    assert torch.equal(train_gpt.dropout(x, 0.0, key), x)


@pytest.mark.parametrize("replay", [False, True])
def test_stochastic_depth_skips_layers_at_their_rate(replay):
    """What the blocks are handed in a training pass, and that a skipped block hands back what it got."""
    p, L, n = 0.6, SMALL["n_layer"], 3000
    model = make_model(torch.float32, stochastic_depth=p)
    seen = []

    def watch(layer):
        def hook(block, args, out):
            keep = args[4].flatten()
            skipped = keep == 0
            assert torch.equal(out[skipped], args[0][skipped]) and not torch.equal(
                out[~skipped], args[0][~skipped]
            )
            seen.append((layer, keep.mean().item()))

        return hook

    for layer, block in enumerate([*model.blocks, model.mtp.block]):
        block.register_forward_hook(watch(layer))
    noise = train_gpt.draw_noise(model.c, 42, range(n), torch.float32)
    with torch.no_grad():
        tokens = make_tokens(n, 3)
        model.loss(tokens, replay, noise, n)
    assert [layer for layer, _ in seen] == [*ref.layer_order(L, (3, 4, 3) if replay else None), L]
    for layer, kept in seen:
        rate = p * layer / (L - 1)
        assert abs(1 - kept - rate) <= 5 * math.sqrt(rate * (1 - rate) / n), (
            f"layer {layer}: {1 - kept:.3f}, not {rate:.3f}"
        )


# ---- Counting ------------------------------------------------------------------------------------


def test_limited_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Config(), 50257)
    assert model.parameter_count() == 1_443_722_775
    shapes = ref.parameter_shapes(30, 1792, 14, 4864, 50304)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize(("track", "vocab"), [("nano", 4096), ("smoke", 4096), ("limited", 50257)])
def test_flops_are_those_that_torch_counts(track, vocab, replay):
    """
    torch counts the products of a forward and backward pass, here on the meta device. It sees attention as a
    CPU runs it, by blocks of 128 keys of which some are masked; so attention is replaced by a sum, and its
    two products (six with their backward) are counted over the pairs that the mask shows. What torch then
    still sees and flops_per_token leaves out is the mixing of heads, a product of weights without any token.
    """
    c = train_gpt.Config(**train_gpt.TRACKS[track])
    model = train_gpt.make_model(c, vocab, "meta", torch.float32)
    sequences = torch.zeros(1, c.seq_len + 1, dtype=torch.int64, device="meta")
    noise = train_gpt.Noise(*(part.to("meta") for part in train_gpt.draw_noise(c, 42, [0], torch.float32)))

    def count():
        with FlopCounterMode(display=False) as counter:
            model.loss(sequences, replay, noise, 1)[0].backward()
        return counter.get_total_flops() / c.seq_len

    i = np.arange(c.seq_len)
    pairs = sum(
        ((i[:, None] >= i) & (i[:, None] - i <= c.window(layer))).sum()
        for layer in c.layer_order(replay) + [c.n_layer]
    )
    shown = 6 * 2 * c.n_embd * pairs / c.seq_len
    mine = train_gpt.flops_per_token(c, vocab, replay)
    with mock.patch.object(train_gpt, "attention", lambda q, k, v, window: q + k + v):
        assert mine == pytest.approx(count() + shown, rel=0.01)
    if track != "limited":  # by blocks it is no less than the mask shows, and less than the whole square
        square = 12 * c.n_embd * c.seq_len * (len(c.layer_order(replay)) + 1)
        mask = train_gpt.causal_mask
        with mock.patch.object(train_gpt, "causal_mask", lambda *args: mask(*args).to("meta")):
            assert mine < count() < mine - shown + square
    # A pass for scoring has no MTP block and no backward pass, which costs twice the forward one.
    mtp_macs = (vocab + 6 * c.n_embd + 3 * c.mlp_hidden + c.seq_len + 1) * c.n_embd + 12 * c.n_head
    assert mine == 3 * train_gpt.flops_per_token(c, vocab, replay, training=False) + 6 * mtp_macs
