"""The model and its losses against the float64 reference, which was written from the recipe alone.

Under `exact` both sides compute in float64 throughout and agree to its last digits. What float32 and bfloat16
cost is measured where it matters, against their own machine epsilon.
"""

import functools
import itertools
import json
import math
from argparse import Namespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import harness
import reference as ref
import train_gpt
from common import exact, normal
from conftest import slow, slow_but
from logbook import comments, write_atomic
from train_gpt import Config, Mode

VOCAB, T = 61, 32
SMALL = dict(n_layer=6, n_head=2, n_embd=64, seq_len=T, batch_tokens=4 * T, window_stages=((1, 0.15, 1),),
             dropout=0.0, stochastic_depth=0.0, replay="3-4")
PLAIN = dict(unet_skips=False, values="none", head_gate=False, head_mixing=False)
TINY = dict(rope="half", xsa="learned", mtp="head", passes=2)
TINY |= dict(head_mixing=False, replay="none")
STAGES = dict(window_stages=train_gpt.TRACKS["two_hour"]["window_stages"])
EVERYTHING = TINY | STAGES | dict(mtp="block", replay="4-4", replay_passes=2, head_mixing=True)

def make_model(dtype=torch.float64, **changes):
    """A model whose every parameter is random, so that none of its techniques rests in its initial state."""
    model = train_gpt.make_model(Config(**(SMALL | changes)), VOCAB, "cpu", dtype).to(dtype)
    for i, p in enumerate(model.parameters()):
        p.data.copy_(0.3 * normal(*p.shape, seed=i))
    return model

def make_tokens(B, length, seed=0):
    return torch.randint(VOCAB, (B, length), generator=torch.Generator().manual_seed(seed))

def modes_of(c):
    """Every mode in which a run of the configuration may run its network."""
    stages = range(len(c.window_stages))
    return [
        Mode(replay, passes, stage)
        for replay, passes, stage in itertools.product({False, c.replay != "none"}, {1, c.passes}, stages)
    ]

def make_noise(model, B, seed=42):
    return train_gpt.draw_noise(model.c, seed, range(B), model.embed.dtype)

def stages_of(c):
    """[(short, long)]: the windows of each stage in tokens."""
    return [(round(short * c.seq_len), round(long * c.seq_len)) for _, short, long in c.window_stages]

def reference_of(model, mode):
    """(leaf parameters, Net) of the reference for the same model; what it has switched off is absent."""
    c, L = model.c, model.c.n_layer
    params = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    params.setdefault("skip", torch.zeros(L // 2, dtype=torch.float64))
    for n, table in enumerate(params.get("value_tables", ())):
        params[f"blocks.{2 * n + 1}.attn.value_table"] = table
    for i in range(min(c.xsa_layers, L) if c.xsa == "fixed" else 0):
        params[f"blocks.{i}.attn.xsa"] = torch.full((c.n_head,), math.inf, dtype=torch.float64)
    stages = stages_of(c)[: mode.stage + 1]
    frequencies, scale = ref.rope_frequencies(c.head_dim, c.rope == "half"), c.head_dim**-0.5
    for (_, old), (_, new) in itertools.pairwise(stages):
        frequencies, scale = ref.yarn(frequencies, scale, old, new)
    long = [*range(3, L, 4), L - 1, L]  # the extra block too
    passes = (*map(int, c.replay.split("-")), c.replay_passes) if mode.replay else None
    return params, ref.Net(VOCAB, ref.layer_windows(L, *stages[-1]), ref.layer_order(L, passes), frequencies,
                           scale, c.softcap, key_offset_layers=long if c.rope == "half" else (),
                           passes=mode.passes, norm_passes=c.passes > 1)

def reference_loss(c, params, sequences, net, ahead=(1.0,), teacher=None):
    """The training loss; `teacher` is the (parameters, Net) of a lesson."""
    logits = ref.forward(params, sequences[:, :-1], net)
    loss = ref.head_mtp_loss(logits, sequences[:, 1:], ahead)
    if c.mtp == "block":
        loss = ref.training_loss(params, sequences, net)
    if teacher:
        lesson = ref.forward(teacher[0], sequences[:, :-1], teacher[1]).detach()
        loss = ref.distillation_loss(logits, lesson, loss, c.distill, c.temperature)
    return loss

def assert_close(actual, expected, eps=1e-12):
    """Equal up to eps of the largest entry."""
    actual, expected = (t.detach().double() for t in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=eps * expected.abs().max().item() + 1e-30)

def assert_same_gradients(model, params):
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0, name
        assert_close(p.grad, params[name].grad, 1e-11)


# ---- Forward and gradients ---------------------------------------------------------------------------------

# Each with the weights of the head's targets; every mode that the configuration may run in is gone through.
# Random weights amplify a rounding about tenfold in every five executed blocks, so these stay few.
TECHNIQUES = [
    ({}, (1.0,)),
    (PLAIN, (1.0,)),
    *(({name: value}, (1.0,)) for name, value in PLAIN.items()),
    (dict(mtp="none"), (1.0,)),
    (dict(window_stages=((1, 0.03125, 0.5),)), (1.0,)),
    (dict(n_layer=4, n_head=4, replay="2-3", replay_passes=2, softcap=3.0), (1.0,)),
    (dict(mlp="relu2"), (1.0,)),
    (dict(values="table"), (1.0,)),
    (dict(rope="half"), (1.0,)),
    (dict(xsa="learned"), (1.0,)),
    (dict(xsa="learned", xsa_layers=2), (1.0,)),
    (dict(xsa="fixed"), (1.0,)),
    (dict(xsa="fixed", xsa_layers=3), (1.0,)),
    (dict(passes=2, replay="4-4", replay_passes=2), (1.0,)),
    (dict(passes=3, n_layer=4, replay="none", unet_skips=False, mtp="none"), (1.0,)),
    (STAGES, (1.0,)),
    (dict(mtp="head"), (1.0, 0.5, 0.25)),
    (dict(mtp="head"), (1.0, 0.4)),
    (dict(mtp="head"), (1.0,)),
    (TINY, (1.0, 0.5, 0.1)),
    (EVERYTHING, (1.0,)),
    (EVERYTHING | dict(mlp="relu2", values="table", xsa="fixed", mtp="head"), (1.0, 0.5, 0.25)),
]

# What a single technique breaks, breaks all of them together, too: these always run.
COMBINED = [*TECHNIQUES[:2], *TECHNIQUES[-3:]]

SINGLE = itertools.starmap(slow, TECHNIQUES[2:-3])

@pytest.mark.parametrize(("changes", "ahead"), [*COMBINED, *SINGLE], ids=str)
@exact()
def test_logits_loss_and_gradients_are_the_references(changes, ahead):
    model, sequences = make_model(**changes), make_tokens(3, T + 1)
    tokens, noise = sequences[:, :-1], make_noise(model, 3)
    for mode in modes_of(model.c):
        params, net = reference_of(model, mode)
        x, _ = model.trunk(tokens, mode)
        assert_close(model.logits(x), ref.forward(params, tokens, net))
        assert_close(model.trunk(tokens[:, :7], mode)[0], x[:, :7])  # a shorter context is the same model
        model.zero_grad()
        loss, plain = model.loss(sequences, mode, noise, 3, ahead)
        loss.backward()
        expected = reference_loss(model.c, params, sequences, net, ahead)
        expected.backward()
        assert_close(loss, expected)
        assert_close(plain, ref.language_loss(params, sequences, net))
        assert_same_gradients(model, params)

DISTILLED = [
    (dict(distill=0.7), (1.0,)),
    (dict(distill=0.45, temperature=1.2), (1.0,)),
    (dict(distill=0.45, temperature=1.2, mtp="none", softcap=15.0), (1.0,)),
    (TINY | dict(distill=0.3, temperature=2.0), (1.0, 0.5, 0.25)),
]

@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize(("changes", "ahead"), DISTILLED, ids=str)
@exact()
def test_distillation_is_the_references(changes, ahead, rows):
    """By chunks of 7 tokens and at once; the teacher is run in a mode of its own."""
    model, sequences = make_model(**changes), make_tokens(3, T + 1)
    c, noise = model.c, make_noise(model, 3)
    teacher = train_gpt.frozen(make_model(**changes))
    for i, p in enumerate(teacher.parameters()):
        p.copy_(0.3 * normal(*p.shape, seed=100 + i))
    mode, teacher_mode = modes_of(c)[0], modes_of(c)[-1]
    assert mode != teacher_mode
    params, net = reference_of(model, mode)
    with mock.patch.object(train_gpt, "chunk_rows", lambda *_: rows):
        loss, plain = model.loss(sequences, mode, noise, 3, ahead, teacher.teach(sequences, teacher_mode))
    loss.backward()
    expected = reference_loss(c, params, sequences, net, ahead, reference_of(teacher, teacher_mode))
    expected.backward()
    assert_close(loss, expected)
    assert_close(plain, ref.language_loss(params, sequences, net))
    assert_same_gradients(model, params)
    assert all(p.grad is None for p in teacher.parameters())
    # Without a lesson the same configuration learns as if it had no teacher: so does a chain's first member.
    loss, _ = model.loss(sequences, mode, noise, 3, ahead)
    assert_close(loss, reference_loss(c, params, sequences, net, ahead))

@pytest.mark.parametrize(("changes", "ahead"), [({}, (1.0,)), (TINY, (1.0, 0.5, 0.25))], ids=str)
@exact()
def test_losses_of_micro_batches_add_up_to_the_batchs_whatever_they_are(changes, ahead):
    """
    With all the noise on, and a teacher: a sequence's dropout and depth do not depend on who shares its
    batch, and no target is taken from its neighbour.
    """
    model = make_model(dropout=0.2, stochastic_depth=0.4, distill=0.5, **changes)
    mode, sequences = modes_of(model.c)[-1], make_tokens(4, T + 1)

    def run(parts):
        model.zero_grad()
        losses = 0
        for part in parts:
            noise = train_gpt.draw_noise(model.c, 7, [100 + i for i in part], torch.float64)
            lesson = model.teach(sequences[part], mode)
            loss, _ = model.loss(sequences[part], mode, noise, 4, ahead, lesson)
            loss.backward()
            losses += loss.detach()
        return losses, [p.grad.clone() for p in model.parameters()]

    loss, grads = run([[0, 1, 2, 3]])
    other_loss, other_grads = run([[3, 1], [0], [2]])
    assert_close(other_loss, loss)
    for other, grad in zip(other_grads, grads):
        assert_close(other, grad, 1e-11)

@pytest.mark.parametrize(("changes", "ahead"), [({}, (1.0,)), (TINY, (1.0, 0.5, 0.25))], ids=str)
def test_checkpointing_changes_no_bit(changes, ahead):
    """With all the noise on: what backward computes again is what forward has computed."""
    model = make_model(torch.float32, dropout=0.2, stochastic_depth=0.4, **changes)
    sequences, computed = make_tokens(3, T + 1), []
    model.blocks[0].register_forward_pre_hook(lambda *_: computed.append(model.checkpointing))

    def run(mode, checkpointing):
        model.zero_grad()
        model.checkpointing = checkpointing
        loss, _ = model.loss(sequences, mode, make_noise(model, 3), 3, ahead)
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    for mode in modes_of(model.c):
        computed.clear()
        assert all(map(torch.equal, run(mode, True), run(mode, False)))
        assert computed == [True] * (mode.passes + 1) + [False] * mode.passes

@pytest.mark.parametrize(("values", "tables"), [("proj", ["embed"]), ("table", ["embed", "value_tables"])])
def test_bfloat16_stays_near_the_reference_and_in_bfloat16(values, tables):
    c = Config(**SMALL | dict(values=values))
    model = train_gpt.make_model(c, VOCAB, "cpu", torch.bfloat16)
    train_gpt.initialise(model, c, 42)
    model.head.data.mul_(100)
    assert [n for n, p in model.named_parameters() if p.dtype == torch.bfloat16] == tables
    tokens, mode = make_tokens(2, T), Mode(True, 1, 0)
    x, (cos, sin, _) = model.trunk(tokens, mode)
    assert x.dtype == cos.dtype == sin.dtype == torch.bfloat16
    params, net = reference_of(model, mode)
    expected = ref.trunk(params, tokens, net)
    # Some 40 independent roundings to eight bits, 2^-9 each, follow one another: twice the root of their sum.
    assert (x - expected).norm() / expected.norm() < 0.025

def test_a_frozen_model_scores_the_same_bits():
    """It has the weights as they are used, in memory of its own."""
    c, tokens, mode = Config(**SMALL), make_tokens(2, T + 1), Mode(True, 1, 0)
    model = train_gpt.make_model(c, VOCAB, "cpu", torch.bfloat16)
    train_gpt.initialise(model, c, 42)
    model.head.data.mul_(100)
    expected, frozen = model.target_logprobs(tokens, mode), train_gpt.frozen(model)
    for p in model.parameters():
        p.data.zero_()
    assert torch.equal(frozen.target_logprobs(tokens, mode), expected)
    assert {(p.dim() > 1, p.dtype, p.requires_grad) for p in frozen.parameters()} == {
        (True, torch.bfloat16, False), (False, torch.float32, False)}


# ---- Attention and rotary embedding ------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 300), window=st.integers(0, 320), scale=st.sampled_from([0.1, 0.5, 2.0]),
       seed=st.integers(0, 99))
@exact()
def test_attention_is_a_masked_softmax(length, window, scale, seed):
    q, k, v = (normal(2, length, 2, 4, seed=3 * seed + i).requires_grad_() for i in range(3))
    out = train_gpt.ATTENTION["cpu"](q, k, v, window, scale)
    expected = ref.windowed_attention(q, k, v, window, scale)
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
    out = train_gpt.ATTENTION["cpu"](q, k, v, window, 0.5)
    assert_close(out, ref.windowed_attention(q, k, v, window, 0.5))

@pytest.mark.parametrize("window", [0, 1, 5, 31, 32, 100])
@exact()
def test_attention_of_cuda_asks_its_kernel_for_the_same(window):
    """The kernel's call is answered by its documented meaning: sequences by starts, keys by their reach."""

    def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, *, scale, window_size):
        left, right = window_size
        assert right == 0 and torch.equal(starts_q, starts_k) and starts_q.dtype == torch.int32
        assert longest_q == longest_k == starts_q.diff().max()
        parts = [ref.windowed_attention(*(t[None, a:b] for t in (q, k, v)), left if left >= 0 else 10**6,
                                        scale)[0] for a, b in itertools.pairwise(starts_q.tolist())]
        return torch.cat(parts)

    q, k, v = (normal(3, T, 2, 4, seed=i) for i in range(3))
    with mock.patch("torch.nn.attention.varlen.varlen_attn", varlen):
        out = train_gpt.ATTENTION["cuda"](q, k, v, window, 0.3)
    assert_close(out, ref.windowed_attention(q, k, v, window, 0.3))

def test_float32_needs_no_flash_kernel():
    q, k, v = (normal(2, T, 2, 4, seed=i).float() for i in range(3))
    expected = ref.windowed_attention(q.double(), k.double(), v.double(), 5, 0.3)
    assert_close(train_gpt.ATTENTION["cuda"](q, k, v, 5, 0.3).double(), expected, 1e-5)

def test_rotary_embedding_in_float32():
    """The model's own tables, as its blocks are handed them."""
    changes = dict(n_layer=2, replay="none", seq_len=2048, batch_tokens=2048)
    x, tokens, first = normal(2, 2048, 2, 32), torch.zeros(1, 1, dtype=torch.int64), Mode(False, 1, 0)
    *tables, scale = make_model(**changes).trunk(tokens, first)[1]
    assert scale == 32**-0.5
    # The angle is a float32 up to 2047: 2^-14 from its last place, as much from the frequency's; |x| < 4.
    torch.testing.assert_close(train_gpt.rotate(x, tables), ref.rotate(x, ref.rope_frequencies(32)), rtol=0,
                               atol=4 * 2.0**-13)
    with exact():
        *tables, _ = make_model(**changes).trunk(tokens, first)[1]
        assert_close(train_gpt.rotate(x[:, :100], tables), ref.rotate(x, ref.rope_frequencies(32))[:, :100])

def test_stages_of_two_hour_are_the_recipes():
    """Windows, frequencies and scales in every epoch; the scales' digits are the recipe's."""
    c = Config(**train_gpt.TRACKS["two_hour"])
    schedule, stages, scales = train_gpt.Schedule(c, 48804), {}, []
    for step in range(schedule.steps):
        stages.setdefault(schedule.epoch(step), schedule.mode(step).stage)
    assert list(stages) == list(range(1, 23))
    for epoch, stage in stages.items():
        short, long, frequencies, scale = ref.two_hour_stage(epoch, 128)
        assert [c.window(layer, stage) for layer in (0, 1, 2, 3, 29)] == [short] * 3 + [long] * 2
        assert c.window(30, stage) == 2048  # the MTP block
        with exact():
            mine, mine_scale = train_gpt.rotary(c, stage, "cpu")
        assert_close(mine, frequencies)
        assert mine_scale == pytest.approx(scale, rel=1e-14)
        # In float32 some ten roundings of 2^-24 follow one another.
        single, _ = train_gpt.rotary(c, stage, "cpu")
        torch.testing.assert_close(single.double(), frequencies, rtol=1e-6, atol=0)
        scales.append(round(mine_scale, 7))
    assert scales == [0.0883883] * 6 + [0.1033666] * 7 + [0.1061271] * 9

@settings(max_examples=50, deadline=None)
@given(windows=st.lists(st.integers(8, 512), min_size=1, max_size=5), rope=st.sampled_from(["full", "half"]),
       head_dim=st.sampled_from([32, 36, 64, 128]))
@exact()
def test_growing_windows_stretch_as_yarn_does(windows, rope, head_dim):
    """Whenever the window is wider than any before; for an equal one the reference needs no case either."""
    stages = [(n, 0.1, window / 512) for n, window in enumerate(windows, start=1)]
    size = dict(n_head=1, n_embd=head_dim, seq_len=512, batch_tokens=512)
    c = Config(**SMALL | size | dict(rope=rope, window_stages=stages))
    frequencies, scale = ref.rope_frequencies(c.head_dim, rope == "half"), c.head_dim**-0.5
    for stage in range(len(windows)):
        if stage:
            old = max(windows[:stage])
            frequencies, scale = ref.yarn(frequencies, scale, old, max(old, windows[stage]))
        mine, mine_scale = train_gpt.rotary(c, stage, "cpu")
        assert_close(mine, frequencies)
        assert mine_scale == pytest.approx(scale, rel=1e-13)

EVERY_MODE = modes_of(Config(**SMALL | EVERYTHING))

@settings(max_examples=24, deadline=None)
@given(cut=st.integers(1, 199), mode=st.sampled_from(EVERY_MODE), data=st.data())
def test_later_tokens_change_no_earlier_logit(cut, mode, data):
    """With all techniques on, in every stage and pass; and the changed token's own logits do change."""
    changes = EVERYTHING | data.draw(st.sampled_from([{}, dict(mlp="relu2", values="table", xsa="fixed")]))
    model = make_model(torch.float32, **changes | dict(seq_len=200, batch_tokens=200))
    tokens = make_tokens(1, 200)
    changed = tokens.clone()
    changed[:, cut:] = (changed[:, cut:] + 1) % VOCAB
    before, after = (model.logits(model.trunk(t, mode)[0]) for t in (tokens, changed))
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.equal(before[:, cut], after[:, cut])

def test_windows_and_order_of_limited():
    c = Config()
    assert [c.window(i, 0) for i in range(31)] == [*ref.layer_windows(30, 1024, 2048), 2048]
    assert [i for i in range(31) if c.value_layer(i)] == list(range(1, 30, 2))
    assert c.layer_order(False) == list(ref.layer_order(30))
    assert c.layer_order(True) == list(ref.layer_order(30, (15, 20, 3)))
    assert c.mlp_hidden == 4864


# ---- Head and loss -----------------------------------------------------------------------------------------

def plain_loss(x, W, y, w, softcap, lesson=None, weight=0.0, temperature=1.0):
    """HeadLoss with whole logits; every token pays `weight` for its divergence from the teacher."""
    logits = softcap * torch.tanh(x @ W.T / softcap)
    loss = sum((w[:, k] * ref.cross_entropy(logits, y[:, k])).sum() for k in range(y.shape[1]))
    if lesson is not None:
        teacher = softcap * torch.tanh(lesson.x @ lesson.head.T / softcap)
        loss = loss + weight * len(x) * ref.distillation_loss(logits, teacher, 0.0, 1.0, temperature)
    return loss

@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 40), targets=st.integers(1, 3), vocab=st.integers(2, 97),
       rows=st.integers(1, 45), scale=st.sampled_from([0.01, 1.0, 30.0]),
       softcap=st.sampled_from([1.0, 10.0, 40.0]), temperature=st.sampled_from([None, 1.0, 1.2, 5.0]),
       seed=st.integers(0, 99))
@exact()
def test_head_loss_and_gradients_are_the_plain_ones(tokens, targets, vocab, rows, scale, softcap, temperature,
                                                    seed):
    """Some weights are 0, as at a sequence's end; without a teacher (temperature None) all of a token's."""
    x, W = scale * normal(tokens, 8, seed=seed), normal(vocab, 8, seed=seed + 1)
    y = torch.randint(vocab, (tokens, targets), generator=torch.Generator().manual_seed(seed))
    w = normal(tokens, targets, seed=seed + 2).abs()
    w[1::3, 0 if temperature is None else 1 :] = 0
    lesson = None
    if temperature:
        lesson = train_gpt.Lesson(scale * normal(tokens, 8, seed=seed + 3), normal(vocab, 8, seed=seed + 4))
    rest = (softcap, lesson, 0.3, temperature or 1.0)
    mine, other = ([t.clone().requires_grad_() for t in (x, W)] for _ in range(2))
    with mock.patch.object(train_gpt, "chunk_rows", lambda *_: rows):
        loss, plain = train_gpt.HeadLoss.apply(*mine, y, w, *rest)
        logp = train_gpt.target_logprobs(x[None], W, y[None, :, 0], softcap)[0]
    expected = plain_loss(*other, y, w, *rest)
    (2 * loss).backward()
    (2 * expected).backward()
    nats = ref.cross_entropy(softcap * torch.tanh(x @ W.T / softcap), y[:, 0])
    for actual, other_value in ((loss, expected), (plain, nats.sum()), (logp, -nats)):
        torch.testing.assert_close(actual, other_value, rtol=1e-12, atol=1e-12)
    for a, b in zip(mine, other):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 5e-6), (torch.bfloat16, 2.0**-7)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("temperature", [None, 1.0, 1.2])
def test_head_loss_in_low_precision(dtype, eps, scale, temperature):
    """
    Inputs are rounded before, so that only the computation's own error remains: in float32 four roundings by
    2^-24 of an exponent up to 2 x softcap, 5e-6 in all; in bfloat16 two of the results.
    """
    x, W = (scale * normal(300, 16)).to(dtype), normal(500, 16, seed=1).to(dtype).float().requires_grad_()
    y = torch.randint(500, (300, 1), generator=torch.Generator().manual_seed(2))
    w, lesson, wide = torch.full((300, 1), 0.3 / 300), None, None
    if temperature:
        lesson = [(scale * normal(300, 16, seed=3)).to(dtype), normal(500, 16, seed=4).to(dtype)]
        wide = train_gpt.Lesson(*(t.double() for t in lesson))
        lesson = train_gpt.Lesson(*lesson)
    leaf = x.clone().requires_grad_()
    rest = (0.7 / 300, temperature or 1.0)
    with mock.patch.object(train_gpt, "chunk_rows", lambda *_: 128):
        loss, _ = train_gpt.HeadLoss.apply(leaf, W, y, w, 10.0, lesson, *rest)
    loss.backward()
    x64, W64 = (t.detach().double().requires_grad_() for t in (x, W))
    expected = plain_loss(x64, W64, y, w.double(), 10.0, wide, *rest)
    expected.backward()
    assert abs(loss.item() - expected.item()) < eps * expected.item()
    for mine, other in ((leaf.grad, x64.grad), (W.grad, W64.grad)):
        assert (mine - other).norm() < eps * other.norm()

@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("softcap", [1.0, 40.0])
def test_lesson_is_finite_at_the_ends_of_the_permitted_range(softcap, end):
    """At the least and the greatest temperature, with logits near 0 as at the start, and at their bounds."""
    _, low_high, _ = comments(Config)["temperature"]
    temperature = json.loads(low_high)[end]
    for x, teacher in ((1e-3, 1e-3), (1e-3, 100.0), (100.0, 1e-3), (-100.0, -100.0)):
        x, head = torch.full((3, 1), x).requires_grad_(), torch.ones(50, 1).requires_grad_()
        lesson = train_gpt.Lesson(torch.full((3, 1), teacher), torch.linspace(0, 1, 50)[:, None])
        rest = torch.zeros(3, 1, dtype=torch.int64), torch.full((3, 1), 0.1), softcap
        loss, _ = train_gpt.HeadLoss.apply(x, head, *rest, lesson, 0.1, temperature)
        loss.backward()
        wide = train_gpt.Lesson(*(part.double() for part in lesson))
        expected = plain_loss(x.double(), head.double(), *rest, wide, 0.1, temperature)
        # The divergence is a difference of float32 logarithms of up to 4, times the temperature's square.
        atol = 3 * 0.1 * temperature**2 * 2.0**-21
        torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=atol)
        assert x.grad.isfinite().all() and head.grad.isfinite().all()

def test_probabilities_sum_to_one():
    model, tokens = make_model(torch.float32), make_tokens(1, T)
    x, _ = model.trunk(tokens, Mode(True, 1, 0))
    assert model.logits(x).shape == (1, T, VOCAB)
    every = torch.arange(VOCAB).view(1, VOCAB)
    for t in (0, T - 1):
        logp = train_gpt.target_logprobs(x[:, t : t + 1].expand(1, VOCAB, -1), model.head[:VOCAB], every,
                                         model.c.softcap)
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
        self.entries = max([self.entries] + [t.numel() for t in torch.utils._pytree.tree_leaves(out)
                                             if isinstance(t, torch.Tensor)])
        return out

def test_no_tensor_holds_the_logits_of_all_tokens():
    """On the meta device, whose tensors have shapes and no values."""
    tokens, vocab = 2048, 40000
    with torch.device("meta"):
        x, W = torch.empty(1, tokens, 32), torch.empty(vocab, 32)
        y, w = torch.empty(tokens, 3, dtype=torch.int64), torch.empty(tokens, 3)
    lesson = train_gpt.Lesson(x[0].detach(), W)
    x.requires_grad_(), W.requires_grad_()
    with Largest() as plain:
        plain_loss(x[0, :64], W, y[:64], w[:64], 10.0)
    assert plain.entries == 64 * vocab  # the instrument sees what it should
    with Largest() as largest:
        for teacher in (None, lesson):
            train_gpt.HeadLoss.apply(x[0], W, y, w, 10.0, teacher, 0.5, 1.2)[0].backward()
        train_gpt.target_logprobs(x, W, y[None, :, 0], 10.0)
    assert vocab * 32 < largest.entries <= tokens * vocab // 4


# ---- The predictor -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("mix", ["probs", "logits"])
@exact()
def test_predictor_is_the_weighted_mixture_of_its_members(tmp_path, mix):
    """Through its files: two checkpoints, run in different modes, weights 1 : 2."""
    folder, changes = tmp_path / "checkpoints", EVERYTHING | dict(mix=mix)
    folder.mkdir()
    models, members = [make_model(**changes), make_model(**changes)], []
    for p in models[1].parameters():
        p.data.mul_(1.1)
    for model, name, weight, mode in zip(models, "ab", (1 / 3, 2 / 3), EVERY_MODE[:: len(EVERY_MODE) - 1]):
        save = functools.partial(torch.save, model.state_dict())
        sha256 = write_atomic(folder / f"{name}.pt", save)
        members.append(train_gpt.Member(f"{name}.pt", sha256, "", mode, 0.0, weight))
    spec = dict(config=SMALL | changes, vocab_size=VOCAB, dtype="float64")
    spec["members"] = [member._asdict() for member in members]
    (folder / "predictor.json").write_text(json.dumps(spec))
    predictor, tokens = train_gpt.load_predictor(tmp_path, "cpu"), make_tokens(2, T)
    for _ in range(2):  # the second call finds the last member loaded
        logp = predictor.logprobs(tokens)
    assert logp.shape == (2, T, VOCAB)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(2, T))
    parts = [reference_of(model, member.mode) for model, member in zip(models, members)]
    logits = [ref.forward(params, tokens, net) for params, net in parts]
    if mix == "logits":
        expected = (logits[0] / 3 + logits[1] * 2 / 3).log_softmax(-1)
        return assert_close(logp, expected)
    targets = make_tokens(2, T, seed=1)
    expected = ref.mixture_loss(logits, [member.weight for member in members], targets)
    assert_close(-logp.gather(-1, targets[..., None])[..., 0], expected)


# ---- Dropout and stochastic depth --------------------------------------------------------------------------

def keys(n, seed=42):
    """Dropout keys (n, 2) as training draws them."""
    return train_gpt.draw_noise(Config(**SMALL), seed, range(n), torch.float32).drop[0, :, 0]

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

@pytest.mark.parametrize("mode", [Mode(False, 1, 0), Mode(True, 1, 0), Mode(True, 2, 0)], ids=str)
def test_stochastic_depth_skips_layers_at_their_rate(mode):
    """
    What the blocks are handed in a training pass: a skipped block hands back what it got, and no two
    executions share the keys of their dropout.
    """
    p, L, n = 0.6, SMALL["n_layer"], 3000
    model = make_model(torch.float32, stochastic_depth=p, passes=2)
    seen, drops = [], []

    def watch(layer):
        def hook(block, args, out):
            *_, drop, keep = args
            skipped = keep.flatten() == 0
            assert torch.equal(out[skipped], args[0][skipped]) and not torch.equal(
                out[~skipped], args[0][~skipped]
            )
            drops.append(drop)
            seen.append((layer, keep.mean().item()))

        return hook

    for layer, block in enumerate([*model.blocks, model.mtp.block]):
        block.register_forward_hook(watch(layer))
    with torch.no_grad():
        model.loss(make_tokens(n, 3), mode, make_noise(model, n), n)
    assert [layer for layer, _ in seen] == [
        *ref.layer_order(L, (3, 4, 3) if mode.replay else None) * mode.passes,
        L,
    ]
    for layer, kept in seen:
        rate = p * layer / (L - 1)
        assert abs(1 - kept - rate) <= 5 * math.sqrt(rate * (1 - rate) / n), (
            f"layer {layer}: {1 - kept:.3f}, not {rate:.3f}"
        )
    drawn = torch.stack(drops).view(-1, 2)
    # Of 10^5 keys of 64 bits two are equal with a chance of 3e-10.
    assert len(drawn.unique(dim=0)) == len(drawn) == len(seen) * n * 2

@pytest.mark.parametrize("dropout_mlp", [True, False])
def test_dropout_of_attention_and_of_the_mlp(dropout_mlp):
    """Each follows a key of its own; of the MLP only where it is wanted."""
    changes = dict(dropout=0.5, dropout_mlp=dropout_mlp, mtp="none")
    model, tokens, mode = make_model(torch.float32, **changes), make_tokens(2, T), Mode(False, 1, 0)

    def output(*flipped):
        noise = make_noise(model, 2)
        for which in flipped:
            noise.drop[:, :, which] ^= 12345
        return model.trunk(tokens, mode, noise)[0]

    assert torch.equal(output(), output()) and not torch.equal(output(), output(0))
    assert torch.equal(output(), output(1)) != dropout_mlp
    assert not torch.equal(output(), model.trunk(tokens, mode)[0])
    # What the MLP of one block adds has its zeros where, and only where, the second key says so.
    block, x, drop = model.blocks[0], normal(2, T, 64, dtype=torch.float32), make_noise(model, 2).drop[0]
    o, v = (normal(2, T, 2, 32, seed=seed, dtype=torch.float32) for seed in (1, 2))
    block.attn.o.data.zero_()
    added = block.after(x, o, v, drop, None) - x
    kept = masks(drop[:, 1], 0.5, (T, 64)).view(added.shape) | (not dropout_mlp)
    assert torch.equal(added != 0, kept)


# ---- Counting ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("track", ["tiny", "limited", "two_hour", "unlimited", "unlimited_snapshots"])
def test_tracks_have_the_parameters_of_the_reference(track):
    """Their number is held against the published ones in test_published.py."""
    c = Config(**train_gpt.TRACKS[track])
    model = train_gpt.make_model(c, 50257, "meta", torch.bfloat16)
    shapes = ref.parameter_shapes(
        *(c.n_layer, c.n_embd, c.n_head),
        *(2816 if track == "tiny" else 5632 if "unlimited" in track else 4864, 50304),
        **(dict(iha=False, xsa=True, mtp=False) if track == "tiny" else {}),
    )
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes

def on_meta(c, B=1, dtype=torch.float32):
    """(sequences, noise) without values."""
    noise = train_gpt.Noise(*(part.to("meta") for part in train_gpt.draw_noise(c, 42, range(B), dtype)))
    return torch.zeros(B, c.seq_len + 1, dtype=torch.int64, device="meta"), noise

TOY = dict(n_layer=4, n_head=4, n_embd=256, seq_len=256, batch_tokens=256, replay="2-2")
COUNTED = [
    ("nano", {}, 4096),
    *itertools.starmap(slow, [
        ("limited", dict(n_layer=8, replay="4-5"), 50257),
        ("tiny", dict(n_layer=6), 50257),
        ("two_hour", TOY, 4096),
        ("limited", TOY | dict(mlp="relu2", values="table", mtp="none", passes=2), 4096),
        ("nano_unlimited", TOY | STAGES | dict(distill=0.7), 512),
    ]),
]

@pytest.mark.parametrize(("track", "changes", "vocab"), COUNTED, ids=str)
def test_flops_are_those_that_torch_counts(track, changes, vocab):
    """
    torch counts the products of a forward and backward pass and those of the teacher, here on the meta
    device. It sees attention as a CPU runs it, by blocks of 128 keys of which some are masked; so attention
    is replaced by a sum, and its two products (six with their backward) are counted over the pairs that the
    mask shows. What torch then still sees and flops_per_token leaves out is the mixing of heads, a product of
    weights without any token.
    """
    c = Config(**train_gpt.TRACKS[track] | changes)
    model, (sequences, noise) = train_gpt.make_model(c, vocab, "meta", torch.float32), on_meta(c)
    last = modes_of(c)[-1]

    def count(mode):
        with FlopCounterMode(display=False) as counter:
            lesson = model.teach(sequences, last) if c.distill else None
            model.loss(sequences, mode, noise, 1, ahead, lesson)[0].backward()
        return counter.get_total_flops() / c.seq_len

    def shown(mode):
        """Multiplications and additions of attention in one forward pass, and in the MTP block's."""
        i, (short, long) = np.arange(c.seq_len), stages_of(c)[mode.stage]
        reach = [*ref.layer_windows(c.n_layer, short, long), c.seq_len]
        pairs = lambda layer: ((i[:, None] >= i) & (i[:, None] - i <= reach[layer])).sum()
        each = [4 * c.n_embd * pairs(layer) / c.seq_len for layer in range(c.n_layer + 1)]
        return sum(each[layer] for layer in c.layer_order(mode.replay)), each[-1] * (c.mtp == "block")

    ahead = (1.0, 0.5, 0.25) if c.mtp == "head" else (1.0,)  # further targets cost no product
    for mode in modes_of(c)[-3:]:
        mine, (trunk, mtp) = train_gpt.flops_per_token(c, vocab, mode), shown(mode)
        seen = (2 + mode.passes) * trunk + 3 * mtp + bool(c.distill) * c.passes * shown(last)[0]
        with mock.patch.dict(train_gpt.ATTENTION, meta=lambda q, k, v, window, scale: q + k + v):
            assert mine == pytest.approx(count(mode) + seen, rel=0.01)
        if c.seq_len <= 512:  # by blocks it is no less than the mask shows, and less than the whole square
            whole = 4 * c.n_embd * c.seq_len * len(c.layer_order(mode.replay)) * (2 + mode.passes)
            whole += 12 * c.n_embd * c.seq_len * (mtp > 0)
            whole += bool(c.distill) * c.passes * 4 * c.n_embd * c.seq_len * len(c.layer_order(last.replay))
            with mock.patch.dict(train_gpt.ATTENTION, meta=train_gpt.ATTENTION["cpu"]):
                assert mine < count(mode) < mine - seen + whole
        # A pass for scoring: no MTP block, no teacher and no backward pass, but all passes of the network.
        with (mock.patch.dict(train_gpt.ATTENTION, meta=lambda q, k, v, window, scale: q + k + v),
              FlopCounterMode(display=False) as counter):
            model.target_logprobs(sequences, mode)
        scoring = train_gpt.flops_per_token(c, vocab, mode, training=False)
        expected = counter.get_total_flops() / c.seq_len + mode.passes * trunk
        assert scoring == pytest.approx(expected, rel=0.01)


# ---- Compilation -------------------------------------------------------------------------------------------

def small_track(track, n_layer=2, replay="1-1"):
    """The track's techniques at a toy size; two layers are the least, four hold every kind of block."""
    row = train_gpt.TRACKS[track]
    size = {name: SMALL[name] for name in ("n_head", "n_embd", "seq_len", "batch_tokens")}
    replay = "none" if row.get("replay") == "none" else replay
    return Config(**row | size | dict(n_layer=n_layer, batch_tokens_ends=0, replay=replay, replay_passes=2))

def variants_of(c):
    """[(mode, ahead, taught)]: all kinds of steps of a chain's first member and of those with a teacher."""
    schedules = [train_gpt.Schedule(c.member(link, 99), 997) for link in (0, c.distill_after_members)]
    steps = [(s, step) for s in schedules for step in range(s.steps)]
    return sorted({(s.mode(step), len(s.ahead(step)), s.c.distill > 0) for s, step in steps})

@pytest.fixture
def counted():
    """(graphs, backend): a list and a backend that files each graph there. Compiling is on for the test."""
    graphs, module = [], dict(vars(train_gpt))

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    limits = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    with torch.compiler.set_stance("default"), limits:
        yield graphs, backend
    vars(train_gpt).update(module)
    torch._dynamo.reset()

def test_products_that_a_mask_hides_do_not_count():
    """Of attention's six products five lose what lies outside the window; of others nothing is taken off."""
    q, k, v = (normal(1, 256, 2, 8, seed=seed).requires_grad_() for seed in range(3))
    with harness.Products() as products:
        train_gpt.block_attention(q, k, v, 63, 0.3).sum().backward()
    shown, computed = 2 * (64 * 256 - 64 * 63 // 2), 2 * (128 * 128 + 128 * 191)
    alone = 2  # the first query of each head sees one key, whose score has no gradient
    assert products.flops == pytest.approx(16 * (3 * shown + 2 * (shown - alone) + computed), rel=1e-7)
    with harness.Products() as products:
        torch.bmm(torch.ones(3, 4, 5), torch.ones(3, 5, 6))
        torch.zeros(7, 8) @ torch.ones(8, 9)
    assert products.flops == 2 * (3 * 4 * 5 * 6 + 7 * 8 * 9)

@pytest.mark.parametrize("track", slow_but(["limited"], ["limited", "tiny", "two_hour", "unlimited"]))
def test_whole_loss_is_one_graph(counted, track):
    """
    As CUDA would run it: attention's flash kernel has a shape function, and is traced on the meta device. In
    the run's last mode, of a member with a teacher, and with the most targets per token.
    """
    graphs, backend = counted
    c, dtype = small_track(track), torch.bfloat16
    model, (sequences, noise) = train_gpt.make_model(c, VOCAB, "meta", dtype), on_meta(c, 2, dtype)
    teacher, variants = train_gpt.frozen(model), variants_of(c)
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False, backend=backend)
    with mock.patch.dict(train_gpt.ATTENTION, meta=train_gpt.ATTENTION["cuda"]):
        for mode, ahead, taught in {variants[-1], max(variants, key=lambda variant: variant[1:])}:
            graphs.clear()
            lesson = teacher.teach(sequences, mode) if taught else None
            compiled(sequences, mode, noise, 4, (1.0,) * ahead, lesson)[0].backward()
            assert len(graphs) == 1
            kernels = [node for node in graphs[0].graph.nodes if "varlen_attn" in str(node.target)]
            assert len(kernels) == len(c.layer_order(mode.replay)) * mode.passes + (c.mtp == "block")
    assert all(p.grad is not None for p in model.parameters())

@pytest.mark.parametrize(("track", "depths"), [slow("tiny", (4,)), slow("two_hour", (4, 6)),
                                               ("unlimited", (4,))], ids=str)
def test_after_the_warm_up_nothing_compiles(counted, track, depths):
    """Whatever the modes, members and batches of a run. A deeper network has no more graphs."""
    graphs, backend = counted
    # The parts are compiled in a class of their own, which may be overwritten; the fixture mends the module.
    train_gpt.Block = type("Block", (train_gpt.Block,), {})
    assert train_gpt.setup_compile(True, torch.device("meta"), backend) == "compiled"
    device, numbers = torch.device("cpu"), []
    for n_layer in depths:
        torch._dynamo.reset()
        graphs.clear()
        c = small_track(track, n_layer, f"{n_layer // 2}-{n_layer // 2 + 1}")
        model = train_gpt.make_model(c, VOCAB, device, torch.float32)
        train_gpt.initialise(model, c, 42)
        teacher = train_gpt.frozen(model)
        links = (0, c.distill_after_members)
        schedules = {link: train_gpt.Schedule(c.member(link, 99), 997) for link in links}
        run = Namespace(args=Namespace(compile=True, device_batch=2), device=device, dtype=torch.float32,
                        log=print, executed=0.0, data=Namespace(vocab_size=VOCAB))
        run.warm_up = functools.partial(harness.Run.warm_up, run)
        training = Namespace(run=run, c=c, model=model, teacher=teacher, schedules=schedules, own=schedules)
        training.throw_away = functools.partial(train_gpt.Training.throw_away, training)
        train_gpt.Training.warm_up(training)
        assert 0.9 < run.executed < 1.05
        numbers.append(len(graphs))
        with torch.compiler.set_stance("fail_on_recompile"):
            sequences, noise, last = make_tokens(2, T + 1, seed=3), make_noise(model, 2), modes_of(c)[-1]
            for mode, ahead, taught in variants_of(c):
                for _ in range(2):
                    lesson = teacher.teach(sequences, last) if taught else None
                    model.loss(sequences, mode, noise, 4, (1.0,) * ahead, lesson)[0].backward()
                    train_gpt.frozen(model).target_logprobs(sequences, mode)
        assert len(graphs) == numbers[-1]
    assert 0 < max(numbers) == min(numbers)
