"""What moves a run from step to step: optimizer, averages, schedules, order of the data, noise; what makes an
ensemble of its members; and its configuration.

Held against the float64 reference, the recipe's check values, and properties that need no second opinion.
"""

import dataclasses
import itertools
import json
import math
import re
import shlex
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from datetime import timedelta
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import harness
import logbook
import reference as ref
import train_gpt
from common import command_line, exact, normal, refused
from logbook import Team, comments
from test_run import BOS, make_dataset

LIMITED, SEQUENCES = train_gpt.Config(), 48804  # sequences of 2049 in fineweb100M
SMALL = dict(n_layer=4, n_head=2, n_embd=32, seq_len=16, batch_tokens=4 * 16, replay="2-3")
CPU = torch.device("cpu")

@pytest.fixture(scope="module")
def team(one_rank):
    """One rank, which trains alone."""
    return logbook.make_team(1, timedelta(minutes=1))

def track(name, **changes):
    return train_gpt.Config(**train_gpt.TRACKS[name] | changes)

def float64(values):
    return torch.tensor(values, dtype=torch.float64)


# ---- Muon and AdamW ----------------------------------------------------------------------------------------

def muon_state(W):
    reduced = (len(W), W.shape[1], 1) if W.shape[1] >= W.shape[2] else (len(W), 1, W.shape[2])
    return {"momentum": torch.zeros_like(W), "variance": W.new_zeros(reduced)}

@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    row_norm=st.booleans(),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e3]),  # without a gradient all of the matrix decays
    seed=st.integers(0, 999),
)
def test_muon_steps_are_the_references_for_each_matrix_of_a_stack(n, rows, columns, row_norm, scale, seed):
    W = normal(n, rows, columns, seed=seed)
    expected = [(w.clone(), *ref.muon_state(w)) for w in W]
    state = muon_state(W)
    for step in range(4):
        G = scale * normal(n, rows, columns, seed=seed + 1 + step)
        momentum, lr, weight_decay = ref.muon_momentum(100 * step), 0.02 / (step + 1), 1.3 + step
        train_gpt.muon_update(W, G.clone(), state, lr, weight_decay, momentum, 0.95, row_norm, torch.float64)
        expected = [ref.muon_step(w, g, m, s, lr, momentum, weight_decay, normalize_rows=row_norm)
                    for (w, m, s), g in zip(expected, G)]
    for i, (w, m, s) in enumerate(expected):
        # Singular values near 0 are raised up to 2000-fold by the five polynomials, and rounding with them.
        torch.testing.assert_close(W[i], w, rtol=0, atol=1e-10)
        torch.testing.assert_close(state["momentum"][i], m, rtol=1e-12, atol=1e-12 * scale)
        torch.testing.assert_close(state["variance"][i], s, rtol=1e-8, atol=1e-12)

@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), beta1=st.sampled_from([0.8, 0.96]), weight_decay=st.sampled_from([0.0, 1.3]))
def test_adamw_steps_are_the_references(seed, beta1, weight_decay):
    W = normal(30, seed=seed)
    w, m, v = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
    state = {"mean": m.clone(), "square": v.clone()}
    for step in range(1, 6):
        g = normal(30, seed=seed + step) * (
            torch.arange(30) % 5 != 0
        )  # gradients that are always zero move nothing
        train_gpt.adamw_update(W, g.clone(), state, 0.03, weight_decay, beta1, 0.95, step)
        w, m, v = ref.adamw_step(w, g, m, v, step, 0.03, (beta1, 0.95), weight_decay)
    torch.testing.assert_close(W, w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state["square"], v, rtol=1e-12, atol=1e-15)


# ---- The parameter table -----------------------------------------------------------------------------------

# (optimizer, lr, betas, weight decay) of the kinds of parameters, by the recipe's tables of groups. Muon has
# a momentum in place of betas.
FAST = (0.8, 0.95)
LIMITED_ROWS = {
    "head": ("adamw", 5e-4, FAST, 1.3),
    "embed": ("adamw", 0.0375, FAST, 1.3),
    "lam": ("adamw", 2.5e-4, FAST, 0),
    "mu": ("adamw", 0.025, (0.96, 0.95), 0),
    "skip": ("adamw", 2.5e-4, FAST, 0),
    "mix": ("adamw", 0.02, FAST, 0),
    "matrix": ("muon", 0.01, None, 1.3),
}
TINY_ROWS = {
    "head": ("adamw", 8e-4, FAST, 0.8),
    "embed": ("adamw", 0.12, FAST, 0.8),
    "lam": ("adamw", 0.002, FAST, 0),
    "mu": ("adamw", 0.2, (0.96, 0.95), 0),
    "skip": ("adamw", 0.002, FAST, 0),
    "head_gate": ("adamw", 0.2, (0.9, 0.99), 0),
    "value_gate": ("muon", 0.032, None, 0.8),
    "xsa": ("adamw", 0.2, (0.9, 0.95), 0),
    "matrix": ("muon", 0.032, None, 0.8),
}

def row_of(name, rows):
    return rows.get(name.split(".")[-1], rows["matrix"])

@pytest.mark.parametrize(
    ("name", "rows"),
    [("limited", LIMITED_ROWS), ("two_hour", LIMITED_ROWS), ("tiny", TINY_ROWS), ("unlimited", LIMITED_ROWS),
     ("unlimited_snapshots", LIMITED_ROWS)],
)  # fmt: skip
def test_every_parameter_learns_by_the_recipes_table(name, rows):
    with torch.device("meta"):
        model = train_gpt.GPT(track(name), 50257)
    met = set()
    for parameter, _, row in train_gpt.match_rows(model, track(name)):
        kind, lr, betas, decay = row_of(parameter, rows)
        assert (row.optimizer, round(row.lr, 9), row.weight_decay) == (kind, lr, decay), parameter
        assert betas in (None, row.betas), parameter
        met.add(parameter.split(".")[-1])
    assert {*rows, "q"} - {"matrix"} <= met

def test_groups_of_limited(team):
    with torch.device("meta"):
        model = train_gpt.GPT(LIMITED, 50257)
    model.embed.data = model.embed.data.bfloat16()
    groups = train_gpt.Optimizer(model, LIMITED, torch.bfloat16, team).groups
    muon, adamw = Counter(), Counter()
    for g in groups:
        if g.row.optimizer == "muon":
            muon[tuple(g.W.shape[1:])] += len(g.W)
        else:
            adamw[round(g.row.lr, 9), g.row.betas, g.row.weight_decay, g.W.dtype] += g.W.numel()
    assert muon == {(14, 12): 31, (14, 32): 15, (1792, 1792): 139, (1792, 3584): 1, (1792, 4864): 31,
                    (4864, 1792): 62}
    table = 50304 * 1792
    assert adamw == {
        (0.00025, FAST, 0, torch.float32): 30 + 15,
        (0.0005, FAST, 1.3, torch.float32): table,
        (0.02, FAST, 0, torch.float32): 93 * 14 * 14,
        (0.025, (0.96, 0.95), 0, torch.float32): 30,
        (0.0375, FAST, 1.3, torch.bfloat16): table,
    }
    for g in groups:
        assert {t.dtype for t in g.state.values()} == {g.W.dtype}

def test_shards_of_eight_ranks_are_balanced():
    """No rank has 10% more products to compute in Muon, padding included, than if matrices could be cut."""
    with torch.device("meta"):
        model = train_gpt.GPT(LIMITED, 50257)
    work, own = [], []
    for rank in range(8):
        team = Team(0, 1, rank, 8, None, None)
        groups = [g for g in train_gpt.Optimizer(model, LIMITED, torch.bfloat16, team).groups
                  if g.row.optimizer == "muon"]
        with FlopCounterMode(display=False) as counter:
            for g in groups:
                g.update(1.0, 1.0, 0.95, 1)
        work.append(counter.get_total_flops())
        own.append([g.own for g in groups])
    assert np.sum(own, axis=0).tolist() == [g.units for g in groups] and sum(map(sum, own)) == 279
    # Each of five steps: X X^T, (X X^T)^2 and their sum times X, for the shorter side of a matrix first.
    sides = [(g.units, *sorted(g.W.shape[1:])) for g in groups]
    mean = sum(n * 5 * 2 * (2 * r * r * c + r**3) for n, r, c in sides) / 8
    assert max(work) <= 1.1 * mean

def test_a_parameter_of_no_row_or_of_two_is_an_error(monkeypatch):
    c = train_gpt.Config(**SMALL)
    model = train_gpt.GPT(c, 61)
    train_gpt.match_rows(model, c)
    model.stray = nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="stray matches 0 rows"):
        train_gpt.match_rows(model, c)
    del model.stray
    rows = train_gpt.param_table(c)
    monkeypatch.setattr(train_gpt, "param_table", lambda c: [*rows, rows[0]._replace(pattern="emb.*")])
    with pytest.raises(AssertionError, match="embed matches 2 rows"):
        train_gpt.match_rows(model, c)

@pytest.mark.parametrize(
    ("changes", "constants"),
    [
        ({}, {}),
        (dict(lam_init=1.1, out_init="zero"), dict(lam=1.1, o=0, out=0)),
        (dict(xsa="learned", values="table"), dict(xsa=0)),
    ],
)
def test_initial_values(changes, constants):
    """The means and standard deviations of the recipe, to five standard errors; the seed alone decides."""
    c = train_gpt.Config(**SMALL | dict(n_embd=256) | changes)
    model, again, other = (train_gpt.make_model(c, 61, "cpu", torch.float32) for _ in range(3))
    for m, seed in ((model, 1), (again, 1), (other, 2)):
        train_gpt.initialise(m, c, seed)
    std = {"embed": 1, "head": 0.001, "o": 1 / 16, "out": 1 / 16,
           **dict.fromkeys(["q", "k", "v", "value_proj", "value_tables", "gate", "up", "proj"], 1 / 16)}
    constant = {"lam": 1, "skip": 1, "mu": 0.1, "head_gate": 0, "value_gate": 0} | constants
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters()):
        key = name.split(".")[-1]
        assert torch.equal(p, q)
        if key in std and key not in constant:
            assert not torch.equal(p, r)
            assert abs(p.mean()) < 5 * std[key] / math.sqrt(p.numel())
            assert abs(p.std() / std[key] - 1) < 5 / math.sqrt(2 * p.numel())
            uniform = key not in ("embed", "head", "o", "out")
            assert (p.abs().max() <= math.sqrt(3) * std[key] * 1.0001) == uniform
        elif key == "mix":
            assert torch.equal(p, torch.eye(2).expand(3, 2, 2))
        else:
            assert (p == torch.tensor(constant[key])).all(), name

def random_model(c, seed=0):
    """A small model in float64, every parameter normal."""
    model = train_gpt.make_model(c, 61, "cpu", torch.float64).double()
    for i, p in enumerate(model.parameters()):
        p.data.copy_(normal(*p.shape, seed=seed + i))
    return model

def add_gradients(model, seed):
    """Gradients as a backward pass leaves them, which has found none."""
    for i, p in enumerate(model.parameters()):
        assert not p.grad.any()
        p.grad.add_(normal(*p.shape, seed=1000 * seed + i))

def values_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}

def assert_near(actual, expected, atol):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol,
                                   msg=lambda text: f"{name}: {text}")

def sgd_step(weight, gradient, buffer, lr, weight_decay):
    """Gradient descent with a momentum of 0.9, the decay as part of the gradient."""
    gradient = gradient + weight_decay * weight
    buffer = gradient if buffer is None else 0.9 * buffer + gradient
    return weight - lr * buffer, buffer

SGD = dict(optimizer="torch.optim:SGD", optimizer_args='{"momentum": 0.9}')
TINY_SMALL = train_gpt.TRACKS["tiny"] | SMALL

@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        (SMALL, LIMITED_ROWS),
        (TINY_SMALL, TINY_ROWS),
        (SMALL | dict(values="table"), LIMITED_ROWS | {"value_tables": LIMITED_ROWS["embed"]}),
        (SMALL | dict(optimizer="adamw"), LIMITED_ROWS | {"matrix": ("adamw", 0.01, (0.9, 0.95), 1.3)}),
        (SMALL | SGD | dict(wd_matrix=2.0), LIMITED_ROWS | {"matrix": ("sgd", 0.01, None, 2.6)}),
        (SMALL | dict(wd_scale=0.5, lr_scale=0.125),
         {kind: (name, lr / 2 if kind != "mix" else lr, betas, decay / 2)
          for kind, (name, lr, betas, decay) in LIMITED_ROWS.items()}),
    ],
    ids=["limited", "tiny", "table", "adamw", "sgd", "scales"],
)  # fmt: skip
def test_optimizer_steps_of_a_whole_model_are_the_references(team, changes, rows):
    """Through the flat buffers, with the schedule's multipliers, in float64; from two starts."""
    c = train_gpt.Config(**changes)
    model = random_model(c)
    expected = values_of(model)
    optimizer = train_gpt.Optimizer(model, c, torch.float64, team)
    for start in (0, 10):
        optimizer.reset()
        state = {}
        for step in range(1, 4):
            lr, weight_decay, momentum = 1 / step, 0.5 + 0.1 * step, 0.84 + 0.01 * step
            add_gradients(model, start + step)
            squares = sum(p.grad.square().sum() for p in model.parameters())
            for name, p in model.named_parameters():
                w, g = expected[name], p.grad.clone()
                kind, rate, betas, decay = row_of(name, rows)
                rates = dict(lr=lr * rate, weight_decay=weight_decay * decay)
                if kind == "muon":
                    old = state.get(name, ref.muon_state(w))
                    w, *new = ref.muon_step(w, g, *old, **rates, momentum=momentum, normalize_rows=c.row_norm)
                elif kind == "adamw":
                    old = state.get(name, (torch.zeros_like(w), torch.zeros_like(w)))
                    w, *new = ref.adamw_step(w, g, *old, step, **rates, betas=betas)
                else:
                    w, *new = sgd_step(w, g, *state.get(name, (None,)), **rates)
                expected[name], state[name] = w, new
            norm = optimizer.step(lr, weight_decay, momentum, step)
            torch.testing.assert_close(norm.double(), squares, rtol=1e-6, atol=0)
    assert_near(values_of(model), expected, atol=1e-10)

def test_sums_begin_in_the_last_backward_pass_and_change_nothing(team):
    """Of two micro-batches; every group's collective is under way before the step."""
    c = train_gpt.Config(**SMALL)
    sequences, mode = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(0)), (True, 1, 0)
    after = []
    for expected in (True, False):
        model = train_gpt.make_model(c, 61, CPU, torch.float32)
        train_gpt.initialise(model, c, 0)
        optimizer = train_gpt.Optimizer(model, c, torch.float32, team)
        for step in (1, 2):
            for micro in (0, 2):
                if expected and micro == 2:
                    optimizer.expect()
                noise = train_gpt.draw_noise(c, 42, range(micro, micro + 2), torch.float32)
                model.loss(sequences[micro : micro + 2], train_gpt.Mode(*mode), noise, 4)[0].backward()
                begun = {group.reduce is not None for group in optimizer.groups}
                assert begun == {expected and micro == 2}
            optimizer.step(1.0, 1.0, 0.9, step)
        after.append(values_of(model))
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])

@exact()
@pytest.mark.parametrize("clip", [0.01, 20.0])
def test_gradients_are_clipped_by_the_norm_of_all_of_them(team, clip):
    """As torch does, which divides by the norm and 1e-6 where that is less than 1."""
    c = train_gpt.Config(**SMALL)
    clipped, plain = random_model(c), random_model(c)
    optimizer = train_gpt.Optimizer(clipped, dataclasses.replace(c, grad_clip=clip), torch.float64, team)
    other = train_gpt.Optimizer(plain, c, torch.float64, team)
    for step in (1, 2, 3):
        for model in (clipped, plain):
            add_gradients(model, step)
            for p in model.parameters():
                p.grad *= 10.0**-step
        norm = nn.utils.clip_grad_norm_(plain.parameters(), clip)
        assert (norm > clip) == (clip < 1 or step == 1)
        squares = optimizer.step(1.0, 1.0, 0.9, step)
        other.step(1.0, 1.0, 0.9, step)
        torch.testing.assert_close(squares, norm**2, rtol=1e-12, atol=0)  # that of the gradient as it was
    assert_near(values_of(clipped), values_of(plain), atol=1e-10)

def test_gradients_below_the_bound_stay_as_they_are(team):
    c = train_gpt.Config(**SMALL)
    after = []
    for clip in (0.0, 1000.0):
        model = random_model(c)
        optimizer = train_gpt.Optimizer(model, dataclasses.replace(c, grad_clip=clip), torch.float64, team)
        add_gradients(model, 1)
        optimizer.step(1.0, 1.0, 0.9, 1)
        after.append(values_of(model))
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])

@pytest.mark.parametrize(
    ("optimizer", "arguments", "says"),
    [
        ("torch.optim:Nope", "{}", "Nope"),
        ("no.such_module:SGD", "{}", "no installed distribution has a module no.such_module"),
        ("pydoc:pipepager", '{"text": "", "cmd": "exit"}', "no installed distribution has a module pydoc"),
        ("torch.nn:Linear", "{}", "Linear is no subclass of torch.optim.Optimizer"),
        ("torch.optim:SGD", '{"mass": 1}', "mass"),
        ("torch.optim:SGD", '{"momentum": -1}', "momentum"),
        ("math:pi", "{}", "no installed distribution has a module math"),
        ("torch:pi", "{}", "pi is no subclass of torch.optim.Optimizer"),
        ("torch.optim:SGD", "{momentum}", "--optimizer-args '{momentum}'"),
        ("torch.optim:SGD", '{"lr": 1}', "--lr-matrix"),
        ("torch.optim:SGD", '{"weight_decay": 1}', "--weight-decay"),
    ],
)
def test_optimizers_that_cannot_be_made_are_refused(capsys, team, optimizer, arguments, says):
    c = train_gpt.Config(**SMALL, optimizer=optimizer, optimizer_args=arguments)
    err = refused(capsys, lambda: train_gpt.Optimizer(random_model(c), c, torch.float64, team))
    assert f"--optimizer {optimizer}" in err and says in err


# ---- Averages of weights -----------------------------------------------------------------------------------

AVERAGES = [
    dict(average_kind="weights", average_weights="recency"),
    dict(average_kind="weights", average_weights="equal"),
    dict(average_kind="ema"),
    dict(average_kind="blend", keep_final=0.7),
]

def average_by_reference(values, c, per_epoch):
    """Of values[step], a tensor that follows the step, by the whole history."""
    N, batch = len(values), c.batch_sequences
    if c.average_kind == "weights":
        epochs = range(c.epochs - c.average + 1, c.epochs + 1)
        ends = sorted({min(N, math.ceil(epoch * per_epoch / batch)) for epoch in epochs})
        last = [{"w": values[end - 1]} for end in ends]
        recency, equal = ref.recency_weights(len(ends)), [1 / len(ends)] * len(ends)
        return ref.weight_average(last, recency if c.average_weights == "recency" else equal)["w"]
    if c.average_kind == "ema":
        return ref.debiased_ema(values, ref.debiased_ema_beta(N / c.epochs))
    if not any(step % 10 == 0 for step in range(max(1, round(0.9 * N)), N + 1)):
        return values[-1]  # a run so short that the shadow never begins
    return ref.ema_blend(values, c.keep_final)

@pytest.mark.parametrize("changes", AVERAGES, ids=["recency", "equal", "ema", "blend"])
@settings(max_examples=40, deadline=None)
@given(epochs=st.integers(1, 20), per_epoch=st.integers(4, 200), average=st.integers(1, 20),
       keep_final=st.floats(0, 1), seed=st.integers(0, 99))
@example(12, 763, 3, 0.7, 0)
@example(15, 760, 4, 0.6, 0)
@example(3, 13, 1, 0.6, 0)
@example(18, 5, 3, 0.6, 0)  # one step ends two epochs
def test_average_is_the_references(changes, epochs, per_epoch, average, keep_final, seed):
    """Each step's share of the running average, against the average of all that it should hold."""
    assume(average <= epochs)
    c = train_gpt.Config(**SMALL | changes, epochs=epochs, cycles=0, average=average)
    c = dataclasses.replace(c, keep_final=keep_final)
    schedule = train_gpt.Schedule(c, per_epoch)
    values = normal(schedule.steps, 3, seed=seed)
    running = torch.zeros(3, dtype=torch.float64)
    for step, value in enumerate(values):
        share = schedule.average(step)
        assert 0 <= share <= 1
        running.lerp_(value, share)
    torch.testing.assert_close(running, average_by_reference(values, c, per_epoch), rtol=1e-10, atol=1e-10)

@exact()
@pytest.mark.parametrize("changes", AVERAGES, ids=["recency", "equal", "ema", "blend"])
def test_optimizer_takes_the_average_of_its_own_weights(team, changes):
    c = train_gpt.Config(**SMALL | dict(n_layer=2, replay="none") | changes, epochs=4, cycles=0, average=3)
    model, schedule = random_model(c), train_gpt.Schedule(c, 45)
    optimizer = train_gpt.Optimizer(model, c, torch.float64, team)
    for run in range(2):  # the next member's average begins anew
        optimizer.reset()
        history = []
        for step in range(schedule.steps):
            add_gradients(model, 100 * run + step)
            optimizer.step(0.5, 1.0, 0.95, step + 1, schedule.average(step))
            history.append(values_of(model))
        optimizer.take_average()
        stacks = {name: torch.stack([values[name] for values in history]) for name in history[0]}
        expected = {name: average_by_reference(stack, c, 45) for name, stack in stacks.items()}
        assert_near(values_of(model), expected, atol=1e-12)
        assert any((stack[-1] - expected[name]).abs().max() > 1e-3 for name, stack in stacks.items())

def test_without_weights_to_average_there_is_no_average(team):
    c = train_gpt.Config(**SMALL)
    schedule = train_gpt.Schedule(c, 40)
    assert not any(map(schedule.average, range(schedule.steps)))
    optimizer = train_gpt.Optimizer(random_model(c), c, torch.float64, team)
    assert not any("average" in group.state for group in optimizer.groups)


# ---- Schedules ---------------------------------------------------------------------------------------------

def test_snapshots_follow_the_schedules_of_their_place_in_the_chain():
    c, per_epoch = track("unlimited_snapshots"), (100_000_000 - 132_000) // 2049
    links = 96  # 480 snapshots, five groups of ranks
    for link in range(links):
        cm = c.member(link, links)
        schedule = train_gpt.Schedule(cm, per_epoch)
        assert cm.batch_tokens == ref.snapshot_batch(link, links)
        assert schedule.steps == ref.snapshot_cycle_steps(per_epoch * 2048, cm.batch_tokens)
        assert cm.distill == (0.45 if link >= 8 else 0)
        for s in range(0, schedule.steps, 1 if link in (0, 24) else 97):
            assert schedule.lr(s) == pytest.approx(ref.snapshot_lr_multiplier(s, schedule.steps), rel=1e-12)
            decay = ref.snapshot_wd_multiplier(s, schedule.steps)
            assert schedule.weight_decay(s) == pytest.approx(decay, rel=1e-12)
            assert schedule.momentum(s) == 0.95 and schedule.ahead(s) == (1.0,)
            assert schedule.mode(s) == train_gpt.Mode(replay=True, passes=1, stage=0)
    lengths = [train_gpt.Schedule(c.member(link, links), per_epoch).steps for link in (0, 23, 24, 71, 72)]
    assert lengths == [508, 508, 381, 381, 508]

def test_limited_replays_from_the_first_step_that_begins_in_its_seventh_epoch():
    schedule = train_gpt.Schedule(LIMITED, SEQUENCES)
    assert [step for step in range(2097) if schedule.mode(step).replay] == [
        *range(1144, 2097)
    ]  # 1144 = ceil(6 x 48804 / 256)
    assert [schedule.epoch(step) for step in (0, 190, 191, 2096)] == [1, 1, 2, 11]
    assert [schedule.momentum(step) for step in (0, 150, 300, 2096)] == pytest.approx(
        [0.85, 0.90, 0.95, 0.95]
    )

def changes_of(schedule):
    """[(epoch, mode)] at the start and wherever the mode changes, and the steps of the changes."""
    modes = [schedule.mode(step) for step in range(schedule.steps)]
    steps = [step for step in range(schedule.steps) if step == 0 or modes[step] != modes[step - 1]]
    return [(schedule.epoch(step), tuple(modes[step])) for step in steps], steps

def test_the_network_changes_where_the_records_change_it():
    """Mode is (replay, passes, stage of the windows)."""
    found, _ = changes_of(train_gpt.Schedule(track("two_hour"), SEQUENCES))
    assert found == [(1, (False, 1, 0)), (7, (False, 1, 1)), (14, (True, 1, 2))]
    windows = [[track("two_hour").window(layer, stage) for layer in (0, 3)] for stage in range(3)]
    assert windows == [[short, long] for _, short, long in ref.TWO_HOUR_STAGES]
    found, steps = changes_of(train_gpt.Schedule(track("tiny"), 48640))
    assert [mode for _, mode in found] == [(False, 1, 0), (False, 2, 0)] and steps == [0, 1995]
    found, _ = changes_of(train_gpt.Schedule(track("unlimited").member(1, 20), 48800))
    assert found == [(1, (False, 1, 0)), (17, (True, 1, 0))]
    found, _ = changes_of(train_gpt.Schedule(track("unlimited").member(0, 20), 48800))
    assert found == [(1, (False, 1, 0)), (9, (True, 1, 0))]

@settings(max_examples=30, deadline=None)
@given(stages=st.lists(st.integers(2, 12), max_size=4, unique=True).map(sorted), passes=st.integers(1, 3),
       per_epoch=st.integers(40, 300))
def test_windows_grow_by_epochs_and_passes_by_steps(stages, passes, per_epoch):
    stages = [1, *stages]
    c = train_gpt.Config(**SMALL, window_stages=[(epoch, 0.5, 1) for epoch in stages], passes=passes)
    schedule = train_gpt.Schedule(c, per_epoch)
    for step in range(schedule.steps):
        mode = schedule.mode(step)
        assert stages[mode.stage] <= schedule.epoch(step)
        assert mode.stage + 1 == len(stages) or schedule.epoch(step) < stages[mode.stage + 1]
        assert mode.passes == (passes if 10 * step >= 7 * schedule.steps else 1)

def linear_by_hand(step):
    return 1 if step <= 1678 else (2097 - step) / 419

@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_linear_warmdown_to_a_floor_and_constant_decay(floor):
    c = track("limited", warmdown_power=1.0, wd_schedule=[(0, 1)], cycles=0, lr_floor=floor)
    schedule = train_gpt.Schedule(c, SEQUENCES)
    for step in range(2097):
        assert schedule.lr(step) == pytest.approx(floor + (1 - floor) * linear_by_hand(step), abs=1e-12)
        assert schedule.weight_decay(step) == 1

@pytest.mark.parametrize(("warmup", "expected"), [(0, [0.95, 0.95, 0.95]), (40, [0.85, 0.90, 0.95])])
def test_momentum_warms_up(warmup, expected):
    schedule = train_gpt.Schedule(track("limited", momentum_warmup=warmup), SEQUENCES)
    assert [schedule.momentum(step) for step in (0, 20, 40)] == pytest.approx(expected)

@settings(max_examples=30, deadline=None)
@given(epochs=st.integers(9, 30), end=st.floats(0.1, 2), per_epoch=st.integers(40, 300))
@example(15, 0.93, 760)
def test_piecewise_decay_is_the_references(epochs, end, per_epoch):
    rows = [(2, 1), (8, 0.125), (epochs, end / 0.8)]
    c = train_gpt.Config(**SMALL, epochs=epochs, weight_decay=0.8, wd_schedule=rows)
    schedule = train_gpt.Schedule(c, per_epoch)
    theirs = ref.Schedule(schedule.steps, epochs, 0.5, weight_decay=0.8, wd="piecewise", wd_end=end)
    for step in range(schedule.steps):
        assert schedule.weight_decay(step) == pytest.approx(ref.wd_multiplier(step, theirs), rel=1e-9)

@settings(max_examples=30, deadline=None)
@given(per_epoch=st.integers(40, 300))
@example(760)
def test_weights_of_the_heads_predictions_are_the_references(per_epoch):
    c = train_gpt.Config(**SMALL, mtp="head", epochs=5)
    schedule = train_gpt.Schedule(c, per_epoch)
    counts = []
    for step in range(schedule.steps):
        weights = schedule.ahead(step)
        counts.append(len(weights))
        expected = ref.head_mtp_weights(step / schedule.steps)
        assert [*weights, 0, 0][:3] == pytest.approx(expected, abs=1e-12) and all(weights)
    assert counts == sorted(counts, reverse=True) and counts[0] == 3  # a variant is never returned to
    for mtp in ("block", "none"):
        other = train_gpt.Schedule(dataclasses.replace(c, mtp=mtp), per_epoch)
        assert {other.ahead(step) for step in range(other.steps)} == {(1.0,)}

@settings(max_examples=60, deadline=None)
@given(epochs=st.integers(1, 30), per_epoch=st.integers(40, 300), cycles=st.integers(0, 30),
       warmdown=st.floats(0, 1), power=st.floats(0.1, 3), replay_from=st.integers(1, 30),
       antiphase=st.booleans())
@example(22, 800, 8, 0.2, 0.5, 14, True)
def test_schedules_are_the_references_and_well_behaved(epochs, per_epoch, cycles, warmdown, power,
                                                       replay_from, antiphase):
    # Where cycles begin before 40% of the run the decay has no fall, and the reference is not meant for it.
    assume(cycles < 0.6 * epochs if antiphase else cycles <= epochs)
    wd = "antiphase" if antiphase else "constant"
    c = train_gpt.Config(**SMALL, epochs=epochs, cycles=cycles, warmdown=warmdown, warmdown_power=power,
                         average=1, replay_from_epoch=replay_from, wd_schedule=() if antiphase else [(0, 1)])
    schedule = train_gpt.Schedule(c, per_epoch)
    N = schedule.steps
    assert N == round(epochs * per_epoch / 4)
    theirs = ref.Schedule(N, epochs, warmdown, power=power, cycles=cycles, wd=wd)
    lr = [schedule.lr(step) for step in range(N)]
    np.testing.assert_allclose(lr, [ref.lr_multiplier(step, theirs) for step in range(N)], rtol=1e-12)
    np.testing.assert_allclose(
        [schedule.weight_decay(step) for step in range(N)],
        [ref.wd_multiplier(step, theirs) for step in range(N)],
        rtol=1e-12,
    )
    assert all(0 < value <= 1 for value in lr)
    # Continuous: but where a cycle starts, no step is larger than the warmdown's and the cosine's together.
    # (A start that is a whole step comes one late where the division leaves a remainder, as in the records.)
    length, falling = N / epochs, max(1, round(warmdown * N))
    most = max(power / falling, falling**-power) + math.pi / 2 / length + 1e-9
    jumps = np.flatnonzero(np.abs(np.diff(lr)) > most) + 1
    starts = N - length * np.arange(cycles + 1)
    assert set(jumps) <= {*np.ceil(starts - 1e-6), *np.ceil(starts + 1e-6)}
    epoch = [schedule.epoch(step) for step in range(N)]
    assert epoch[0] == 1 and epoch[-1] == epochs and all(b - a in (0, 1) for a, b in zip(epoch, epoch[1:]))
    begin = [step for step in range(N) if step * 4 >= (replay_from - 1) * per_epoch]
    assert [step for step in range(N) if schedule.mode(step).replay] == begin

@pytest.mark.parametrize(
    ("epochs", "cycles", "steps"), [(10, 6, 100), (25, 15, 205), (35, 21, 85), (3, 2, 30), (5, 5, 40)]
)
def test_decay_where_cycles_begin_before_it_would_fall(epochs, cycles, steps):
    schedule = train_gpt.Schedule(train_gpt.Config(**SMALL, epochs=epochs, cycles=cycles, average=1),
                                  steps * 4 / epochs)
    assert schedule.steps == steps
    decay = [schedule.weight_decay(step) for step in range(steps)]
    assert all(0.65 <= value <= 1.5 for value in decay)
    assert all(value == 1 for step, value in enumerate(decay) if step + 1e-6 < steps * (1 - cycles / epochs))


# ---- Order of the data -------------------------------------------------------------------------------------

@st.composite
def corpora(draw, longest=60):
    """(tokens, first positions of the documents): different tokens, so that each can be told apart."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1,
                            max_size=40).filter(lambda ls: sum(ls) >= 34))
    return np.arange(sum(lengths), dtype=np.uint16), np.cumsum([0, *lengths[:-1]])

def make_stream(tokens, starts, seed=42, **changes):
    return train_gpt.Stream(tokens, starts, train_gpt.Config(**(SMALL | changes)), seed)

def epoch_of(stream, epoch):
    n = stream.per_epoch
    return np.stack([stream.sequence(i) for i in range((epoch - 1) * n, epoch * n)])

@settings(max_examples=40, deadline=None)
@given(corpora())
def test_epochs_are_the_references(corpus):
    """Those of single models, and of the chains of snapshots, which have a seed each."""
    tokens, starts = corpus
    single, chain = make_stream(tokens, starts), make_stream(tokens, starts, 44, restarts=True, average=1)
    of_chain = dict(doc_seed=1009 * 44 + 1000, sequence_seed=1009 * 44 + 2000, first_in_file_order=False)
    for stream, seeds in (single, {}), (chain, of_chain):
        for epoch in range(1, 5):
            text = torch.from_numpy(tokens.astype(np.int64))
            expected = ref.epoch_sequences(text, starts, epoch, 17, **seeds)
            assert np.array_equal(epoch_of(stream, epoch), expected.numpy())

@settings(max_examples=40, deadline=None)
@given(corpora(), st.sampled_from(["document", "sequence", "none"]), st.integers(0, 100), st.data())
def test_every_epoch_holds_each_token_once_and_any_place_can_be_read_first(corpus, shuffle, seed, data):
    tokens, starts = corpus
    stream = make_stream(tokens, starts, seed, shuffle=shuffle)
    n = stream.per_epoch
    assert n == len(tokens) // 17
    epochs = [epoch_of(stream, e) for e in range(1, 5)]
    for epoch in epochs:
        assert epoch.shape == (n, 17) and len(np.unique(epoch)) == n * 17
    if shuffle == "none":
        assert all(np.array_equal(epoch.ravel(), tokens[: n * 17]) for epoch in epochs)
    if shuffle == "sequence":
        for epoch in epochs:
            assert np.array_equal(epoch[epoch[:, 0].argsort()].ravel(), tokens[: n * 17])
    whole = np.concatenate(epochs)
    for i in data.draw(
        st.lists(st.integers(0, 4 * n - 1), min_size=1, max_size=12)
    ):  # forwards and backwards
        assert np.array_equal(stream.sequence(i), whole[i])

def test_seeds_have_orders_of_their_own():
    tokens, starts = np.arange(3000, dtype=np.uint16), np.arange(0, 3000, 70)
    runs = [
        np.concatenate([epoch_of(make_stream(tokens, starts, seed), e) for e in (1, 2)])
        for seed in (42, 43, 0)
    ]
    assert not any(np.array_equal(a, b) for a, b in ((runs[0], runs[1]), (runs[1], runs[2]),
                                                     (runs[0], runs[2])))

def supplied(stream, c, rank, world, place, steps, device_batch):
    """What one of `world` ranks is supplied with for `steps` steps, a list of micro-batches each."""
    team = Team(0, 1, rank, world, None, None)
    supply = train_gpt.batches(stream, c, team, place, CPU, torch.float32, device_batch)
    taken = list(itertools.islice(supply, steps))
    supply.close()
    return taken

@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), world=st.sampled_from([1, 2, 3, 8]), device_batch=st.integers(1, 3),
       micro=st.integers(1, 3), place=st.integers(0, 100), steps=st.integers(1, 5))
@example(
    corpus=(np.arange(17 * 30 + 5, dtype=np.uint16), np.arange(0, 17 * 30, 41)),
    world=2, device_batch=1, micro=2, place=0, steps=21,
)  # fmt: skip
def test_ranks_and_micro_batches_share_the_same_stream(corpus, world, device_batch, micro, place, steps):
    """From any place in it on, through epoch borders within and between steps, without a gap."""
    batch, threads = world * device_batch * micro, threading.active_count()
    c = train_gpt.Config(**SMALL | dict(batch_tokens=16 * batch))
    parts = [supplied(make_stream(*corpus), c, r, world, place, steps, device_batch) for r in range(world)]
    assert threading.active_count() == threads
    assert {len(part[step]) for part in parts for step in range(steps)} == {micro}
    flat = [micro for step in range(steps) for part in parts for micro in part[step]]
    assert {sequences.shape for sequences, _ in flat} == {(device_batch, 17)}
    indices, stream = range(place, place + steps * batch), make_stream(*corpus)
    assert np.array_equal(np.concatenate([s for s, _ in flat]), [stream.sequence(i) for i in indices])
    assert flat[0][0].dtype == torch.int64
    for k, expected in enumerate(train_gpt.draw_noise(c, 42, indices, torch.float32)):
        assert torch.equal(torch.cat([noise[k] for _, noise in flat], dim=1), expected)

def test_next_batch_is_made_while_this_one_is_used():
    tokens, starts = np.arange(17 * 30, dtype=np.uint16), np.arange(0, 17 * 30, 41)
    stream, asked, ahead = make_stream(tokens, starts), [], threading.Event()
    of_stream = stream.sequence

    def sequence(index):
        asked.append(index)
        if index == 7:
            ahead.set()
        return of_stream(index)

    stream.sequence = sequence
    team = Team(0, 1, 0, 1, None, None)
    supply = train_gpt.batches(stream, train_gpt.Config(**SMALL), team, 0, CPU, torch.float32, 2)
    next(supply)
    assert ahead.wait(60) and asked == list(range(8))  # and not a batch further
    stream.sequence = lambda index: 1 / 0
    next(supply)
    with pytest.raises(ZeroDivisionError):  # trouble in the thread is the run's
        next(supply)

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "toy"
    make_dataset(path, "toy", train=3000, val=200, audit=200)
    return path

@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1), border=st.booleans())
def test_documents_that_are_set_aside_are_never_trained_on(folder, share, border):
    """At least so many tokens, in whole documents from the front, none of them more than it takes."""
    data = harness.Dataset(folder, "")
    whole, starts = np.array(data.splits["train"]), data.documents("train")
    tokens = int(share * starts[-1])
    if border:
        tokens = int(starts[np.searchsorted(starts, tokens)])  # exactly the documents before it
    data.set_aside(tokens)
    fitness, train = data.splits["fitness"], data.splits["train"]
    assert np.array_equal(np.concatenate([fitness, train]), whole)
    assert train[0] == BOS and len(fitness) >= tokens
    assert tokens == 0 or data.documents("fitness")[-1] < tokens
    # Every token by a number of its own: those that the stream yields are those of train, in all epochs.
    numbered = np.arange(len(whole), dtype=np.uint16)[len(fitness) :]
    stream = make_stream(numbered, data.documents("train"))
    for epoch in (1, 2, 3) if stream.per_epoch else ():
        seen = epoch_of(stream, epoch)
        assert seen.min() >= len(fitness) and len(np.unique(seen)) == seen.size

def test_the_stream_never_copies_the_dataset(tmp_path):
    path = tmp_path / "tokens"
    np.zeros(20_000_000, dtype=np.uint16).tofile(path)
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    tracemalloc.start()
    stream = make_stream(tokens, np.arange(0, len(tokens), 20_000), seq_len=2048, batch_tokens=2048)
    for i in (0, 1, stream.per_epoch, 3 * stream.per_epoch + 5):
        stream.sequence(i)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.05 * tokens.nbytes  # indices of 1000 documents and 9760 sequences

@pytest.mark.slow
def test_order_of_fineweb100M_is_made_in_little_memory():
    """140k documents of 100M tokens: finding them, and the orders of three epochs."""
    rng = np.random.default_rng(0)
    starts = np.unique(np.append(0, rng.integers(0, 100_000_000, 140_000)))
    with tempfile.TemporaryFile() as file:
        tokens = np.memmap(file, dtype=np.uint16, mode="w+", shape=100_000_000)
        tokens[starts] = BOS
        data = object.__new__(harness.Dataset)
        data.splits, data.bos_id = {"train": tokens}, BOS
        tracemalloc.start()
        began = time.process_time()
        found = data.documents("train")
        stream = train_gpt.Stream(tokens, found, LIMITED, 42)
        found_after = time.process_time() - began
        for epoch in (1, 2, 3):
            stream.enter(epoch)
        seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert np.array_equal(found, starts) and stream.per_epoch == SEQUENCES
        assert len(stream.sequence(3 * SEQUENCES - 1)) == 2049
    print(f"documents {found_after:.2f} s, three epochs {seconds - found_after:.2f} s, {peak / 1e6:.1f} MB")
    assert peak < 100e6 and seconds < 10


# ---- Noise -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("passes", [1, 2])
def test_noise_belongs_to_the_place_in_the_stream(passes):
    c = train_gpt.Config(**SMALL, stochastic_depth=0.5, passes=passes)
    whole = train_gpt.draw_noise(c, 42, range(50), torch.float32)
    executions = passes * len(c.layer_order(True)) + 1
    assert whole.drop.shape == (executions, 50, 2, 2) and whole.drop.dtype == torch.int32
    assert whole.keep.shape == (executions, 50, 1, 1)
    some = train_gpt.draw_noise(c, 42, [17, 3], torch.float32)
    for a, b in zip(some, whole):
        assert torch.equal(a, b[:, [17, 3]])
    assert (
        len(whole.drop.reshape(-1, 2).unique(dim=0)) == executions * 50 * 2
    )  # every mask of a step is its own
    other = train_gpt.draw_noise(c, 43, range(50), torch.float32)
    assert (other.drop != whole.drop).float().mean() > 0.99 and not torch.equal(other.keep, whole.keep)
    assert abs(whole.drop.double().mean() / 2**31) < 5 / math.sqrt(3 * whole.drop.numel())

@settings(max_examples=10, deadline=None)
@given(p=st.sampled_from([0.05, 0.3, 0.5]), seed=st.integers(0, 5))
def test_blocks_are_skipped_independently(p, seed):
    c = train_gpt.Config(**SMALL, stochastic_depth=p)
    n = 4000
    keep = train_gpt.draw_noise(c, seed, range(n), torch.float64).keep[:, :, 0, 0]
    layers = c.layer_order(True) + [c.n_layer]
    skipped = 1 - keep
    rate = float64(layers) / (c.n_layer - 1) * p
    assert ((skipped.mean(1) - rate).abs() <= 5 * (rate * (1 - rate) / n).sqrt()).all()
    both = (skipped @ skipped.T / n).triu(1)
    expected = torch.outer(rate, rate).triu(1)
    assert ((both - expected).abs() <= 5.5 * (expected * (1 - expected) / n).sqrt() + 1e-12).all()


# ---- Ensembles ---------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(link=st.integers(0, 30), links=st.integers(2, 30), epochs=st.integers(2, 60),
       first_epochs=st.integers(0, 60), replay_from=st.integers(1, 60), distill_from=st.integers(1, 10),
       ends=st.sampled_from([0, 32]))
@example(0, 20, 32, 16, 17, 1, 0)
@example(0, 20, 51, 59, 52, 1, 0)
@example(1, 5, 11, 0, 7, 1, 32)  # on the border of the first quarter
def test_members_of_a_chain(link, links, epochs, first_epochs, replay_from, distill_from, ends):
    assume(link < links)
    c = train_gpt.Config(**SMALL, epochs=epochs, first_epochs=first_epochs, replay_from_epoch=replay_from,
                         distill=0.7, distill_after_members=distill_from, batch_tokens_ends=ends, cycles=0,
                         average=1)
    expected, taught = {}, link >= distill_from
    if not taught:
        expected["distill"] = 0.0
        if first_epochs:  # the same share of the epochs goes by before layers are replayed
            before = Fraction(replay_from - 1, epochs) * first_epochs
            expected |= {"epochs": first_epochs, "replay_from_epoch": math.ceil(before) + 1}
    in_the_middle = ref.snapshot_batch(link, links) == 524288
    if ends and not in_the_middle:
        expected["batch_tokens"] = 32
    assert c.member(link, links) == dataclasses.replace(c, **expected)

def test_chain_of_one_member():
    assert track("nano_unlimited", distill=0.7).member(0, 1) == track("nano_unlimited")
    assert track("limited").member(0, 1) == LIMITED

def random_weights(links):
    model = random_model(train_gpt.Config(**SMALL | dict(n_layer=2, replay="none")))
    c = track("unlimited_snapshots", members=links)
    return model, c, values_of(model)

@pytest.mark.parametrize(("link", "links"), [(1, 96), (2, 96), (50, 96), (95, 96), (1, 2), (2, 3)])
def test_perturbation_is_the_published_share_of_each_tensors_deviation(link, links):
    model, c, before = random_weights(links)
    assert model.skip.numel() == 1 and model.lam.dim() == 1
    train_gpt.perturb(model, c, 42, link, links)
    scale = ref.perturbation_scale(link, links) if links > 2 else 0.25
    generator = torch.Generator().manual_seed(42 * 100003 + 31337 * link)
    for name, p in model.named_parameters():
        if p.numel() == 1:
            assert torch.equal(p, before[name])
            continue
        noise = (p.detach() - before[name]) / (scale * before[name].std())
        drawn = torch.randn(p.shape, generator=generator).double()
        torch.testing.assert_close(noise, drawn, rtol=1e-5, atol=1e-5)
        assert abs(noise.std() - 1) < 5 / math.sqrt(2 * p.numel())  # whatever generator it is

def test_perturbation_is_the_same_on_every_rank_and_other_at_every_link_and_seed():
    found = []
    for seed, link in ((42, 3), (42, 3), (42, 4), (43, 3)):
        model, c, _ = random_weights(9)
        train_gpt.perturb(model, c, seed, link, 9)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.numel() > 1]))
    assert torch.equal(found[0], found[1])
    assert all((found[0] != other).double().mean() > 0.99 for other in found[2:])

@settings(max_examples=8, deadline=None)
@given(members=st.integers(1, 12), tokens=st.integers(1, 200), top=st.integers(1, 14),
       seed=st.integers(0, 99))
def test_selection_is_the_references(members, tokens, top, seed):
    fitness = normal(members, tokens, 5, seed=seed).mul(2).log_softmax(-1)[..., 0]
    everyone = ref.select_weights(fitness.exp())
    best, weights = ref.top_k(everyone, min(top, members))
    rest = np.delete(everyone.numpy(), best.numpy())
    assume(top >= members or everyone[best].min() > 1.001 * rest.max())  # not by a hair
    expected = np.zeros(members)
    expected[best] = weights
    found = train_gpt.select_weights(fitness.numpy(), top)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert sum(found) == pytest.approx(1, abs=1e-12) and np.count_nonzero(found) == min(top, members)

@settings(max_examples=60, deadline=None)
@given(data=st.data(), vocab_size=st.integers(2, 5), order=st.integers(1, 4))
def test_ngrams_are_the_references(data, vocab_size, order):
    """After any context, also one that is not in the text; it repeats itself, so that counts exceed one."""
    tokens = st.lists(st.integers(0, vocab_size - 1), min_size=4, max_size=12)
    text = data.draw(tokens) * data.draw(st.integers(1, 3)) + data.draw(tokens)
    sequences = [(data.draw(tokens) * 3)[:12] for _ in range(2)]
    ngrams = train_gpt.Ngrams(torch.tensor(text, dtype=torch.int32), order, vocab_size)
    found = ngrams.predict(torch.tensor(sequences)).double().exp().numpy()
    for row, sequence in zip(found, sequences):
        for t, p in enumerate(row):
            expected = ref.kneser_ney(text, sequence[max(0, t + 2 - order):t + 1], order, vocab_size)
            np.testing.assert_allclose(p, expected, rtol=1e-5, atol=1e-7)


# ---- Configuration -----------------------------------------------------------------------------------------

FIELDS = dataclasses.fields(train_gpt.Config)
ALLOWED = {name: allowed for name, (_, allowed, _) in comments(train_gpt.Config).items()}
RANGED = [f for f in FIELDS if ALLOWED[f.name].startswith("[")]
CHOICES = [f for f in FIELDS if ALLOWED[f.name].startswith("{")]
ROWS = [f for f in FIELDS if f.type is tuple]

def flag_of(field):
    return "--" + field.name.replace("_", "-")

def test_every_field_is_explained():
    assert list(comments(train_gpt.Config)) == [f.name for f in FIELDS]
    for f in FIELDS:
        group, allowed, text = comments(train_gpt.Config)[f.name]
        assert group and len(text) > 10, f.name
        assert f.type in (int, float, bool, str, tuple)
        if f.type in (int, float):
            low, high = map(float, re.fullmatch(r"\[(.+), (.+)\]", allowed).groups())
            assert low <= f.default <= high
        elif f.type is tuple:
            assert re.fullmatch(r"\(epoch(,\w+)+\)", allowed)
        elif f.type is str and allowed:
            assert f.default in allowed[1:-1].split(", ")

def listed(rows):
    return [tuple(row) for row in rows] if isinstance(rows, (list, tuple)) else rows

@pytest.mark.parametrize("name", train_gpt.TRACKS)
def test_every_track_is_a_configuration(name):
    c, args = command_line("--track", name)
    row = train_gpt.TRACKS[name]
    assert {f: listed(getattr(c, f)) for f in row} == {f: listed(value) for f, value in row.items()}
    assert logbook.rules(name)["dataset"] == c.dataset and args.seed is None

@pytest.mark.parametrize("field", RANGED, ids=lambda f: f.name)
def test_values_out_of_range_are_refused(capsys, field):
    low, high = map(float, ALLOWED[field.name][1:-1].split(","))
    flag = flag_of(field)
    for value in (low - 1, high + 1, *([math.nan] if field.type is float else [])):
        value = field.type(value) if value == value else value
        err = refused(capsys, lambda: command_line(f"{flag}={value}"))
        assert flag in err and f"{low:g} to {high:g}" in err

@pytest.mark.parametrize("field", CHOICES, ids=lambda f: f.name)
def test_values_that_are_no_choice_are_refused(capsys, field):
    choices = ALLOWED[field.name][1:-1]
    for value in choices.split(", "):
        assert getattr(train_gpt.Config(**{field.name: value}), field.name) == value
    for value in ("", "other", choices):
        err = refused(capsys, lambda: command_line(f"{flag_of(field)}={value}"))
        assert flag_of(field) in err and choices in err

@settings(max_examples=100, deadline=None)
@given(st.sampled_from(ROWS), st.data())
def test_rows_are_the_same_from_the_command_line_and_from_json(field, data):
    """They are kept as tuples, and every number that they decide in a run is finite."""
    width = ALLOWED[field.name].count(",") + 1
    epochs = data.draw(st.lists(st.integers(2, 20), unique=True, max_size=4).map(sorted))
    share = st.sampled_from([0.001, 0.125, 0.5, 1, 1.0])
    rows = [[epoch, *(data.draw(share) for _ in range(width - 1))] for epoch in [1, *epochs]]
    flags = [flag_of(field), *(",".join(map(str, row)) for row in rows)]
    c, args = command_line("--track", "smoke", *flags)
    assert getattr(c, field.name) == tuple(map(tuple, rows))
    assert c == train_gpt.Config(**train_gpt.TRACKS["smoke"] | json.loads(json.dumps({field.name: rows})))
    schedule = train_gpt.Schedule(c, 40)
    for step in range(0, schedule.steps, 5):
        mode = schedule.mode(step)
        frequencies, scale = train_gpt.rotary(c, mode.stage, CPU)
        assert math.isfinite(scale) and frequencies.isfinite().all()
        assert 0 <= schedule.weight_decay(step) <= 1
        assert all(1 <= c.window(layer, mode.stage) <= c.seq_len for layer in c.layer_order(mode.replay))

NO_ROWS = [None, 7, 0.5, "", "1", [7], [[]], [[1]], [[1, 2, 3, 4]], [["1", 0.5, 1]], [[True, 0.5, 1]],
           [[1, math.nan, 1]], [[1, -1, 1]], [[1, math.inf, 1]]]

@pytest.mark.parametrize("rows", NO_ROWS, ids=str)
@pytest.mark.parametrize("field", ROWS, ids=lambda f: f.name)
def test_what_is_no_list_of_rows_is_refused(capsys, field, rows):
    err = refused(capsys, lambda: train_gpt.Config(**{field.name: rows}))
    assert err.startswith(f"error: {flag_of(field)} ") and ALLOWED[field.name][1:-1] in err

@pytest.mark.parametrize(
    ("field", "rows", "says"),
    [
        ("window_stages", [], "the first epoch is 1"),
        ("window_stages", [[2, 0.5, 1]], "the first epoch is 1"),
        ("window_stages", [[1, 0.5, 1], [1, 0.25, 1]], "the epochs must ascend"),
        ("window_stages", [[1, 0.25, 0.5], [7, 0.5, 1], [3, 0.25, 1]], "the epochs must ascend"),
        ("window_stages", [[1, 0.5, 1.5]], "shares are over 0, up to 1"),
        ("window_stages", [[1, 0, 1]], "shares are over 0, up to 1"),
        ("wd_schedule", [[2, 1], [1, 0.5]], "the epochs must ascend"),
        ("wd_schedule", [[2, 1], [8, 0.1], [8, 1]], "the epochs must ascend"),
    ],
)
def test_rows_that_mean_nothing_are_refused(capsys, field, rows, says):
    assert says in refused(capsys, lambda: train_gpt.Config(**{field: rows}))

@pytest.mark.parametrize("field", [f for f in FIELDS if f not in ROWS], ids=lambda f: f.name)
def test_wrong_types_are_refused(capsys, field):
    for value in (None, [1], {int: "12", float: "0.5", bool: 1, str: 7}[field.type]):
        err = refused(capsys, lambda: train_gpt.Config(**{field.name: value}))
        assert flag_of(field) in err and field.type.__name__ in err
    if field.type is int:
        refused(capsys, lambda: train_gpt.Config(**{field.name: 2.0}))
        refused(capsys, lambda: train_gpt.Config(**{field.name: True}))

@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--n-head 3", "--n-head 3 does not divide --n-embd 1792"),
        ("--n-head 256", "--n-head"),
        ("--n-layer 5", "--n-layer 5 is odd"),
        ("--batch-tokens 1000", "not a multiple of --seq-len 2048"),
        ("--cycles 12", "--cycles 12"),
        ("--epochs 4 --cycles 0 --average 5", "--average 5"),
        ("--replay 14-15", "15-29"),
        ("--replay 20-30", "15-29"),
        ("--replay 20-19", "15-29"),
        ("--replay all", "15-20"),
        ("--shuffle random", "document, sequence, none"),
        ("--mtp blocks", "block, head, none"),
        ("--wd-schedule linear", "--wd-schedule"),
        ("--wd-schedule 2", "epoch,multiplier"),
        ("--window-stages 0.5,1", "epoch,short,long"),
        ("--window-stages 2,0.5,1", "the first epoch is 1"),
        ("--window-stages 1:0.5/1", "--window-stages"),
        ("--window-stages 1,0.5,1 7,1", "epoch,short,long"),
        ("--optimizer sgd", "torch.optim:Adafactor"),
        ("--optimizer torch.optim.SGD", "torch.optim:Adafactor"),
        ("--optimizer-args {", "--optimizer-args"),
        ("--optimizer-args [1]", "--optimizer-args"),
        ("""--optimizer adamw --optimizer-args '{"eps": 1}'""", "adamw takes none"),
        ("--batch-tokens-ends 1000", "--batch-tokens-ends 1000"),
        ("--members 2", "--average 1"),
        ("--members 2 --average 1 --first-epochs 2", "a member has 2 epochs"),
        ("--restarts --average-kind ema", "--average-kind probs"),
        ("--top 3", "--fitness-tokens"),
        ("--top 3 --fitness-tokens 2048", "--fitness-tokens"),
        ("--ngram 5", "--fitness-tokens"),
        ("--ngram 5 --fitness-tokens 20000 --mix logits", "--mix probs"),
        ("--ranks-per-member 0", "--ranks-per-member 0"),
        ("--save-every -1", "--save-every -1"),
        ("--track huge", "nano"),
        ("--seed -1", "--seed"),
        ("--device-batch 0", "--device-batch 0"),
        ("--max-steps 0", "--max-steps 0"),
        ("--run-name ../x", "--run-name ../x"),
        ("--epoch 3", "--epoch"),
        ("--n-layer four", "four"),
        ("--dtype float16", "float16"),
        ("--config none.json", "none.json"),
        ("--lr-scale inf", "0 to 1000"),
        ("--replay 0-1", "15-29"),
    ],
)
def test_bad_command_lines_are_refused_in_one_line(capsys, flags, says):
    assert says in refused(capsys, lambda: command_line("--track", "limited", *shlex.split(flags)))

@pytest.mark.parametrize(
    ("text", "says"), [("{", "JSON"), ("[1]", "JSON"), ('{"layers": 3}', "layers"), ('{"n_layer": 5}', "odd"),
                       ('{"n_layer": "2"}', "--n-layer"), ('{"n_layer": 2.0}', "--n-layer"),
                       ('{"dropout": 2}', "0 to 0.9")],
)
def test_bad_config_files_are_refused(capsys, tmp_path, text, says):
    path = tmp_path / "c.json"
    path.write_text(text)
    assert says in refused(capsys, lambda: command_line("--config", path))

def test_flags_win_over_the_config_file_which_wins_over_the_track(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"n_layer": 4, "replay": "none", "dropout": 0, "unet_skips": false}')
    c, _ = command_line("--config", path, "--n-layer", 8, "--no-head-mixing")
    assert (c.n_layer, c.replay, c.dropout, c.unet_skips, c.head_mixing, c.lr_scale) == (
        8,
        "none",
        0,
        False,
        False,
        train_gpt.TRACKS["nano"]["lr_scale"],
    )

@pytest.mark.parametrize(
    ("world", "device_batch", "says"),
    [(3, None, "3 ranks"), (2, 3, "--device-batch 3"), (64, None, "64 ranks"), (1, 16, "--device-batch 16")],
)
def test_batches_that_ranks_cannot_share_are_refused(capsys, world, device_batch, says):
    sizes = "--seq-len 512 --batch-tokens 16384 --batch-tokens-ends 12288"  # 32 sequences, at the ends 24
    c, args = command_line(*sizes.split())
    args.device_batch = device_batch
    assert says in refused(capsys, lambda: harness.check_batch(c, args, world))

@pytest.mark.parametrize(
    ("flags", "world", "expected"),
    [
        ("--track limited", 1, 4),
        ("--track limited", 8, 4),
        ("--seq-len 512 --batch-tokens 16384", 2, 16),
        ("--seq-len 512 --batch-tokens 35840", 1, 14),  # 70 sequences, of which 27 would fit
        ("--seq-len 65536 --batch-tokens 131072", 1, 1),
        ("--track unlimited_snapshots", 8, 2),  # 32 sequences a rank, at the ends 24
        ("--track unlimited_snapshots", 32, 2),  # 8 and 6
        ("--track nano", 2, 8),
    ],
)
def test_the_default_device_batch_fits_and_divides(flags, world, expected):
    c, args = command_line(*flags.split())
    harness.check_batch(c, args, world)
    assert args.device_batch == expected
