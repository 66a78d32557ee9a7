"""What moves a run from step to step: optimizer, schedules, order of the data, noise; and its configuration.

Held against the float64 reference, the recipe's check values, and properties that need no second opinion.
"""

import dataclasses
import math
import re
import tracemalloc

import numpy as np
import pytest
import reference as ref
import torch
from conftest import normal
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

import train_gpt

LIMITED, SEQUENCES = train_gpt.Config(), 48804  # sequences of 2049 in fineweb100M
SMALL = dict(n_layer=4, n_head=2, n_embd=32, seq_len=16, batch_tokens=4 * 16, replay="2-3")


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


# ---- Muon and AdamW ------------------------------------------------------------------------------


def muon_state(W):
    reduced = (len(W), W.shape[1], 1) if W.shape[1] >= W.shape[2] else (len(W), 1, W.shape[2])
    return {"momentum": torch.zeros_like(W), "variance": W.new_zeros(reduced)}


@pytest.mark.parametrize(
    ("transposed", "expected", "variance"),
    [
        (
            False,
            [[0.979936, -0.985312, 0.484846], [-0.505097, 0.238204, 1.973004]],
            [0.006966, 0.026771, 0.023171],
        ),
        (
            True,
            [[0.976027, -0.505046], [-0.980665, 0.237152], [0.483025, 2.003005]],
            [0.016073, 0.016073, 0.013],
        ),
    ],
)
def test_muon_check_values(transposed, expected, variance):
    W, G = float64([[1, -1, 0.5], [-0.5, 0.25, 2]]), float64([[0.1, -0.2, 0.3], [0.05, 0.4, -0.1]])
    W, G = (M.T if transposed else M for M in (W, G))
    W = W[None].clone()
    train_gpt.muon_update(W, G[None], state := muon_state(W), 0.01, 1.3, 0.85, 0.95, True, torch.float64)
    # Six decimals were written down: half a unit of the last.
    torch.testing.assert_close(W[0], float64(expected), rtol=0, atol=6e-7)
    torch.testing.assert_close(state["variance"].flatten(), float64(variance), rtol=0, atol=6e-7)


def test_adamw_check_values():
    W, G = float64([1, -2, 0.5]), float64([0.1, 0.2, -0.3])
    state = {"mean": torch.zeros_like(W), "square": torch.zeros_like(W)}
    train_gpt.adamw_update(W, G, state, 0.01, 1.3, 0.8, 0.95, 1)
    torch.testing.assert_close(W, float64([0.9770, -1.9840, 0.5035]), rtol=0, atol=1e-9)


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
        expected = [
            ref.muon_step(w, g, m, s, lr, momentum, weight_decay, normalize_rows=row_norm)
            for (w, m, s), g in zip(expected, G)
        ]
    for i, (w, m, s) in enumerate(expected):
        # Singular values near 0 are raised up to 2000-fold by the five polynomials, and rounding with them.
        torch.testing.assert_close(W[i], w, rtol=0, atol=1e-10)
        torch.testing.assert_close(state["momentum"][i], m, rtol=1e-12, atol=1e-12 * scale)
        torch.testing.assert_close(state["variance"][i], s, rtol=1e-8, atol=1e-12)


def test_polar_factor_moves_singular_values_as_published():
    """A matrix with the singular values of the recipe's table, scaled at first by 1 / (1.02 |G|)."""
    sigmas = float64([1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 0.6])
    U, V = (torch.linalg.qr(normal(12, 8, seed=i))[0] for i in range(2))
    G = U * sigmas @ V.T
    X = train_gpt.orthogonalise(G[None], torch.float64)[0]
    start = sigmas / (1.02 * G.norm() + 1e-6)
    torch.testing.assert_close(
        X, U * float64([ref.polar_express_scalar(s) for s in start.tolist()]) @ V.T, rtol=0, atol=1e-12
    )
    assert train_gpt.orthogonalise(G.T[None], torch.bfloat16).dtype == torch.bfloat16


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


# ---- The parameter table -------------------------------------------------------------------------


def row_of(name):
    """(optimizer, lr, betas, weight decay) of a parameter of limited, by the recipe's table of groups."""
    fixed = {
        "head": (5e-4, (0.8, 0.95), 1.3),
        "embed": (0.0375, (0.8, 0.95), 1.3),
        "lam": (2.5e-4, (0.8, 0.95), 0),
        "mu": (0.025, (0.96, 0.95), 0),
        "skip": (2.5e-4, (0.8, 0.95), 0),
        "mix": (0.02, (0.8, 0.95), 0),
    }
    return (
        ("adamw", *fixed[key]) if (key := name.split(".")[-1]) in fixed else ("muon", 0.01, (0.95, 0.95), 1.3)
    )


def test_groups_of_limited(one_rank):
    with torch.device("meta"):
        model = train_gpt.GPT(LIMITED, 50257)
    model.embed.data = model.embed.data.bfloat16()
    groups = train_gpt.Optimizer(model, LIMITED, torch.bfloat16).groups
    muon = {tuple(g.W.shape[1:]): len(g.W) for g in groups if g.row.optimizer == "muon"}
    assert muon == {
        (14, 12): 31,
        (14, 32): 15,
        (1792, 1792): 139,
        (1792, 3584): 1,
        (1792, 4864): 31,
        (4864, 1792): 62,
    }
    for g in groups:
        if g.row.optimizer == "muon":
            assert (round(g.row.lr, 9), g.row.betas[1], g.row.weight_decay) == (0.01, 0.95, 1.3)
    table = 50304 * 1792
    adamw = sorted(
        (round(g.row.lr, 9), g.row.betas, g.row.weight_decay, g.W.numel(), g.W.dtype)
        for g in groups
        if g.row.optimizer == "adamw"
    )
    assert adamw == [
        (0.00025, (0.8, 0.95), 0, 30 + 15, torch.float32),
        (0.0005, (0.8, 0.95), 1.3, table, torch.float32),
        (0.02, (0.8, 0.95), 0, 93 * 14 * 14, torch.float32),
        (0.025, (0.96, 0.95), 0, 30, torch.float32),
        (0.0375, (0.8, 0.95), 1.3, table, torch.bfloat16),
    ]
    for g in groups:
        assert {t.dtype for t in g.state.values()} == {g.W.dtype}
    for name, _, row in train_gpt.match_rows(model, LIMITED):
        assert (row.optimizer, round(row.lr, 9), row.betas, row.weight_decay) == row_of(name), name


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


def test_initial_values():
    """The means and standard deviations of the recipe, to five standard errors; the seed alone decides."""
    c = train_gpt.Config(**SMALL | dict(n_embd=256))
    model, again, other = (train_gpt.make_model(c, 61, "cpu", torch.float32) for _ in range(3))
    for m, seed in ((model, 1), (again, 1), (other, 2)):
        train_gpt.initialise(m, c, seed)
    std = {
        "embed": 1,
        "head": 0.001,
        "o": 1 / 16,
        "out": 1 / 16,
        **dict.fromkeys(["q", "k", "v", "value_proj", "gate", "up", "proj"], 1 / 16),
    }
    constant = {"lam": 1, "skip": 1, "mu": 0.1, "head_gate": 0, "value_gate": 0}
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters()):
        key = name.split(".")[-1]
        assert torch.equal(p, q)
        if key in std:
            assert not torch.equal(p, r)
            assert abs(p.mean()) < 5 * std[key] / math.sqrt(p.numel())
            assert abs(p.std() / std[key] - 1) < 5 / math.sqrt(2 * p.numel())
            uniform = key not in ("embed", "head", "o", "out")
            assert (p.abs().max() <= math.sqrt(3) * std[key] * 1.0001) == uniform
        elif key == "mix":
            assert torch.equal(p, torch.eye(2).expand(3, 2, 2))
        else:
            assert (p == constant[key]).all(), name


def test_optimizer_steps_of_a_whole_model_are_the_references(one_rank):
    """Through the flat buffers, with the schedule's multipliers; every parameter in float64."""
    c = train_gpt.Config(**SMALL)
    model = train_gpt.make_model(c, 61, "cpu", torch.float64).double()
    for i, p in enumerate(model.parameters()):
        p.data.copy_(normal(*p.shape, seed=i))
    expected = {}
    for name, p in model.named_parameters():
        w = p.detach().clone()
        expected[name] = (
            w,
            *(ref.muon_state(w) if row_of(name)[0] == "muon" else (torch.zeros_like(w), torch.zeros_like(w))),
        )
    optimizer = train_gpt.Optimizer(model, c, torch.float64)
    for step in range(1, 4):
        lr, weight_decay, momentum = 1 / step, 0.5 + 0.1 * step, 0.84 + 0.01 * step
        for i, (name, p) in enumerate(model.named_parameters()):
            assert not p.grad.any()
            g = normal(*p.shape, seed=1000 * step + i)
            p.grad.add_(g)
            kind, rate, betas, decay = row_of(name)
            if kind == "muon":
                expected[name] = ref.muon_step(
                    expected[name][0], g, *expected[name][1:], lr * rate, momentum, weight_decay * decay
                )
            else:
                expected[name] = ref.adamw_step(
                    expected[name][0], g, *expected[name][1:], step, lr * rate, betas, weight_decay * decay
                )
        optimizer.step(lr, weight_decay, momentum, step)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.detach(), expected[name][0], rtol=0, atol=1e-10, msg=lambda text: f"{name}: {text}"
        )


# ---- Schedules -----------------------------------------------------------------------------------

LIMITED_ANCHORS = """
    838: 1/1; 1181: 1/.825482; 1525: 1/.650046; 1526: .999947/.654053; 1620: .528202/1.073176;
    1678: .138885/1.331784; 1679: .134272/1.336242; 1715: .050032/1.496757; 1716: .953572/.651216;
    1907: .673378/.652837; 2001: .266739/1.071960; 2096: .05/1.495541"""
TWO_HOUR_ANCHORS = """
    1678: 1/.999859; 2668: 1/.650321; 2669: .999999/.650405; 2764: .526779/1.073987; 2860: .999987/.652027;
    3355: .379707/1.159108; 3356: .372072/1.163567; 4004: .475867/.652837; 4098: .195751/1.071960;
    4193: .05/1.495541"""


@pytest.mark.parametrize(
    ("changes", "steps", "anchors"),
    [
        ({}, 2097, LIMITED_ANCHORS),
        (dict(cycles=8, epochs=22), 4194, TWO_HOUR_ANCHORS),
    ],
    ids=["limited", "two_hour"],
)
def test_schedule_anchors(changes, steps, anchors):
    schedule = train_gpt.Schedule(dataclasses.replace(LIMITED, **changes), SEQUENCES)
    assert schedule.steps == steps
    for step, lr, weight_decay in re.findall(r"(\d+): ([\d.]+)/([\d.]+)", anchors):
        assert schedule.lr(int(step)) == pytest.approx(float(lr), abs=6e-7)
        assert schedule.weight_decay(int(step)) == pytest.approx(float(weight_decay), abs=6e-7)


def test_limited_replays_from_the_first_step_that_begins_in_its_seventh_epoch():
    schedule = train_gpt.Schedule(LIMITED, SEQUENCES)
    assert [step for step in range(2097) if schedule.replay(step)] == [
        *range(1144, 2097)
    ]  # 1144 = ceil(6 x 48804 / 256)
    assert [schedule.epoch(step) for step in (0, 190, 191, 2096)] == [1, 1, 2, 11]
    assert [schedule.momentum(step) for step in (0, 150, 300, 2096)] == pytest.approx(
        [0.85, 0.90, 0.95, 0.95]
    )


def linear_by_hand(step):
    return 1 if step <= 1678 else (2097 - step) / 419


def test_linear_warmdown_and_constant_decay():
    c = dataclasses.replace(LIMITED, warmdown_power=1.0, wd_schedule="constant", cycles=0)
    schedule = train_gpt.Schedule(c, SEQUENCES)
    for step in range(2097):
        assert schedule.lr(step) == pytest.approx(linear_by_hand(step), abs=1e-12)
        assert schedule.weight_decay(step) == 1


@settings(max_examples=60, deadline=None)
@given(
    epochs=st.integers(1, 30),
    per_epoch=st.integers(40, 300),
    cycles=st.integers(0, 30),
    warmdown=st.floats(0, 1),
    power=st.floats(0.1, 3),
    replay_from=st.integers(1, 30),
    antiphase=st.booleans(),
)
@example(22, 800, 8, 0.2, 0.5, 14, True)
def test_schedules_are_the_references_and_well_behaved(
    epochs, per_epoch, cycles, warmdown, power, replay_from, antiphase
):
    # Where cycles begin before 40% of the run the decay has no fall, and the reference is not meant for it.
    assume(cycles < 0.6 * epochs if antiphase else cycles <= epochs)
    wd = "antiphase" if antiphase else "constant"
    c = train_gpt.Config(
        **SMALL,
        epochs=epochs,
        cycles=cycles,
        warmdown=warmdown,
        warmdown_power=power,
        average=1,
        replay_from=replay_from,
        wd_schedule=wd,
    )
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
    # Continuous: but where a cycle starts, no step is larger than the warmdown's and the cosine's together. (A start
    # that is a whole step comes one step late where the division leaves a remainder, as in the records.)
    length, falling = N / epochs, max(1, round(warmdown * N))
    most = max(power / falling, falling**-power) + math.pi / 2 / length + 1e-9
    jumps = np.flatnonzero(np.abs(np.diff(lr)) > most) + 1
    starts = N - length * np.arange(cycles + 1)
    assert set(jumps) <= {*np.ceil(starts - 1e-6), *np.ceil(starts + 1e-6)}
    epoch = [schedule.epoch(step) for step in range(N)]
    assert epoch[0] == 1 and epoch[-1] == epochs and all(b - a in (0, 1) for a, b in zip(epoch, epoch[1:]))
    begin = [step for step in range(N) if step * 4 >= (replay_from - 1) * per_epoch]
    assert [step for step in range(N) if schedule.replay(step)] == begin


@pytest.mark.parametrize(
    ("epochs", "cycles", "steps"), [(10, 6, 100), (25, 15, 205), (35, 21, 85), (3, 2, 30), (5, 5, 40)]
)
def test_decay_where_cycles_begin_before_it_would_fall(epochs, cycles, steps):
    schedule = train_gpt.Schedule(
        train_gpt.Config(**SMALL, epochs=epochs, cycles=cycles, average=1), steps * 4 / epochs
    )
    assert schedule.steps == steps
    decay = [schedule.weight_decay(step) for step in range(steps)]
    assert all(0.65 <= value <= 1.5 for value in decay)
    assert all(value == 1 for step, value in enumerate(decay) if step + 1e-6 < steps * (1 - cycles / epochs))


# ---- Order of the data ---------------------------------------------------------------------------


@st.composite
def corpora(draw, longest=60):
    """(tokens, first positions of the documents): different tokens, so that each can be told apart."""
    lengths = draw(
        st.lists(st.integers(1, longest), min_size=1, max_size=40).filter(lambda ls: sum(ls) >= 34)
    )
    return np.arange(sum(lengths), dtype=np.uint16), np.cumsum([0, *lengths[:-1]])


def make_stream(tokens, starts, seed=42, **changes):
    return train_gpt.Stream(tokens, starts, train_gpt.Config(**(SMALL | changes)), seed)


def epoch_of(stream, epoch):
    n = stream.per_epoch
    return np.stack([stream.sequence(i) for i in range((epoch - 1) * n, epoch * n)])


@settings(max_examples=40, deadline=None)
@given(corpora())
def test_epochs_are_the_references(corpus):
    tokens, starts = corpus
    stream = make_stream(tokens, starts)
    for epoch in range(1, 5):
        expected = ref.epoch_sequences(torch.from_numpy(tokens.astype(np.int64)), starts, epoch, 17)
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


def test_the_permutations_are_those_of_the_records():
    """The recipe's anchors, at the size of fineweb100M in sequences; and seeds differ."""
    stream = make_stream(np.zeros(SEQUENCES * 17, dtype=np.uint16), np.arange(0, SEQUENCES * 17, 700))
    assert stream.per_epoch == SEQUENCES
    stream.enter(1)
    assert stream.order[:6].tolist() == [38201, 43298, 35105, 11343, 27570, 12495]
    assert np.array_equal(stream.documents, np.arange(len(stream.starts)))
    stream.enter(2)
    assert stream.order[:6].tolist() == [26283, 2365, 21579, 12985, 18748, 29740]
    assert stream.permutation(1525, 2)[:6].tolist() == [1273, 40, 1204, 1355, 237, 144]
    assert stream.permutation(190, 2)[:6].tolist() == [88, 151, 91, 178, 54, 49]
    tokens, starts = np.arange(3000, dtype=np.uint16), np.arange(0, 3000, 70)
    runs = [
        np.concatenate([epoch_of(make_stream(tokens, starts, seed), e) for e in (1, 2)])
        for seed in (42, 43, 0)
    ]
    assert not any(
        np.array_equal(a, b) for a, b in ((runs[0], runs[1]), (runs[1], runs[2]), (runs[0], runs[2]))
    )


@pytest.mark.parametrize(("world", "device_batch"), [(1, 4), (1, 1), (2, 2), (2, 1), (4, 1)])
def test_ranks_and_micro_batches_share_the_same_stream(monkeypatch, world, device_batch):
    """Steps 0 to 20 run through two epoch borders, at 13.2 and 26.5 steps, without a gap."""
    tokens, starts = np.arange(17 * 30 + 5, dtype=np.uint16), np.arange(0, 17 * 30, 41)
    c = train_gpt.Config(**SMALL)
    whole = [make_stream(tokens, starts).sequence(i) for i in range(4 * 21)]
    expected = train_gpt.draw_noise(c, 42, range(4 * 21), torch.float32)
    monkeypatch.setattr(train_gpt.dist, "get_world_size", lambda: world)
    parts = {}
    for rank in range(world):
        monkeypatch.setattr(train_gpt.dist, "get_rank", lambda rank=rank: rank)
        stream = make_stream(tokens, starts)
        for step in range(21):
            parts[step, rank] = list(
                train_gpt.batches(stream, c, 42, step, "cpu", torch.float32, device_batch)
            )
    flat = [part for step in range(21) for rank in range(world) for part in parts[step, rank]]
    assert {len(sequences) for sequences, _ in flat} == {device_batch}
    assert np.array_equal(np.concatenate([sequences for sequences, _ in flat]), whole)
    assert flat[0][0].dtype == torch.int64
    for k in range(2):
        assert torch.equal(torch.cat([noise[k] for _, noise in flat], dim=1), expected[k])


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


# ---- Noise ---------------------------------------------------------------------------------------


def test_noise_belongs_to_the_place_in_the_stream():
    c = train_gpt.Config(**SMALL, stochastic_depth=0.5)
    whole = train_gpt.draw_noise(c, 42, range(50), torch.float32)
    executions = len(c.layer_order(True)) + 1
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


# ---- Configuration -------------------------------------------------------------------------------

FIELDS = dataclasses.fields(train_gpt.Config)
RANGED = [f for f in FIELDS if train_gpt.COMMENTS[f.name][0].startswith("[")]


def refused(capsys, make):
    """The one line of standard error with which make() ends the program."""
    with pytest.raises(SystemExit) as stop:
        make()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def test_every_field_is_explained():
    assert set(train_gpt.COMMENTS) == {f.name for f in FIELDS}
    for f in FIELDS:
        allowed, text = train_gpt.COMMENTS[f.name]
        assert len(text) > 10, f.name
        assert f.type in (int, float, bool, str)
        if f.type in (int, float):
            low, high = map(float, re.fullmatch(r"\[(.+), (.+)\]", allowed).groups())
            assert low <= f.default <= high
        elif f.type is str and allowed:
            assert f.default in allowed[1:-1].split(", ")


@pytest.mark.parametrize("name", train_gpt.TRACKS)
def test_every_track_is_a_configuration(name):
    c, args = train_gpt.parse_args(["--track", name])
    assert {f: getattr(c, f) for f in train_gpt.TRACKS[name]} == train_gpt.TRACKS[name]
    assert set(train_gpt.CAPS) <= set(train_gpt.TRACKS) and args.seed == 42


@pytest.mark.parametrize("field", RANGED, ids=lambda f: f.name)
def test_values_out_of_range_are_refused(capsys, field):
    low, high = map(float, train_gpt.COMMENTS[field.name][0][1:-1].split(","))
    flag = "--" + field.name.replace("_", "-")
    for value in (low - 1, high + 1, *([math.nan] if field.type is float else [])):
        err = refused(
            capsys, lambda: train_gpt.parse_args([f"{flag}={field.type(value) if value == value else value}"])
        )
        assert flag in err and f"{low:g} to {high:g}" in err


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_wrong_types_are_refused(capsys, field):
    for value in (None, [1], {int: "12", float: "0.5", bool: 1, str: 7}[field.type]):
        err = refused(capsys, lambda: train_gpt.Config(**{field.name: value}))
        assert "--" + field.name.replace("_", "-") in err and field.type.__name__ in err
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
        ("--windows SXL", "--windows SXL"),
        ("--windows=", "--windows"),
        ("--replay 14-15", "15-29"),
        ("--replay 20-30", "15-29"),
        ("--replay 20-19", "15-29"),
        ("--replay all", "15-20"),
        ("--shuffle random", "document, sequence, none"),
        ("--mtp head", "block, none"),
        ("--wd-schedule linear", "antiphase, constant"),
        ("--track huge", "nano"),
        ("--seed -1", "--seed"),
        ("--device-batch 0", "--device-batch 0"),
        ("--max-steps 0", "--max-steps 0"),
        ("--run-name ../x", "--run-name ../x"),
        ("--epoch 3", "--epoch"),
        ("--n-layer four", "four"),
        ("--dtype float16", "float16"),
        ("--config none.json", "none.json"),
    ],
)
def test_bad_command_lines_are_refused_in_one_line(capsys, flags, says):
    assert says in refused(capsys, lambda: train_gpt.parse_args(["--track", "limited", *flags.split()]))


@pytest.mark.parametrize(
    ("text", "says"), [("{", "JSON"), ("[1]", "JSON"), ('{"layers": 3}', "layers"), ('{"n_layer": 5}', "odd")]
)
def test_bad_config_files_are_refused(capsys, tmp_path, text, says):
    path = tmp_path / "c.json"
    path.write_text(text)
    assert says in refused(capsys, lambda: train_gpt.parse_args(["--config", str(path)]))


def test_flags_win_over_the_config_file_which_wins_over_the_track(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"n_layer": 4, "replay": "none", "dropout": 0, "unet_skips": false}')
    c, _ = train_gpt.parse_args(["--config", str(path), "--n-layer", "8", "--no-head-mixing"])
    assert (c.n_layer, c.replay, c.dropout, c.unet_skips, c.head_mixing, c.epochs) == (
        8,
        "none",
        0,
        False,
        False,
        train_gpt.TRACKS["nano"]["epochs"],
    )


@pytest.mark.parametrize(
    ("world", "device_batch", "says"),
    [(3, None, "3 ranks"), (2, 3, "--device-batch 3"), (64, None, "64 ranks")],
)
def test_batches_that_ranks_cannot_share_are_refused(capsys, world, device_batch, says):
    c, args = train_gpt.parse_args("--seq-len 512 --batch-tokens 16384".split())  # 32 sequences
    args.device_batch = device_batch
    assert says in refused(capsys, lambda: train_gpt.check_batch(c, args, world))


@pytest.mark.parametrize(
    ("flags", "world", "expected"),
    [
        ("--track limited", 1, 8),
        ("--track limited", 8, 8),
        ("--seq-len 512 --batch-tokens 16384", 2, 16),
        ("--seq-len 512 --batch-tokens 35840", 1, 14),  # 70 sequences, of which 32 would fit
        ("--seq-len 65536 --batch-tokens 131072", 1, 1),
    ],
)
def test_the_default_device_batch_fits_and_divides(flags, world, expected):
    c, args = train_gpt.parse_args(flags.split())
    train_gpt.check_batch(c, args, world)
    assert args.device_batch == expected
