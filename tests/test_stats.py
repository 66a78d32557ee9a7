"""The statistics against scipy, against brute force, and against simulations that know the truth."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

import stats

ROOT = Path(__file__).resolve().parent.parent

BASELINE = json.loads((ROOT / "records/baseline.json").read_text())["fineweb100M"]

def documents(rng, count=600):
    """(difficulty, tokens), (count,) each: longer documents are easier, so the mean is no mean of means."""
    tokens = np.maximum(1, rng.lognormal(5, 1, count).astype(int))
    return 3.5 - 0.1 * np.log(tokens) + rng.normal(0, 0.6, count), tokens

def split_of(rng, difficulty, tokens, level=0.0, seeds=1, seed_sd=0.0, document_sd=0.03):
    shifts = level + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, document_sd, (seeds, len(tokens)))
    return stats.Split(tokens * (difficulty + shifts), tokens)

def pair(rng, gain=0.01, count=600, **kwargs):
    difficulty, tokens = documents(rng, count)
    return split_of(rng, difficulty, tokens, -gain, **kwargs), split_of(rng, difficulty, tokens, **kwargs)


# ---- Documents ---------------------------------------------------------------------------------------------

def test_paired_error_is_the_cluster_robust_formula():
    new, old = pair(np.random.default_rng(0), seeds=3)
    gain, se = stats.paired_gain(new, old)
    total = D = 0
    differences = []
    for document, n in enumerate(new.tokens):  # the textbook's formula, one document at a time
        difference = sum(old.loss[:, document]) / 3 - sum(new.loss[:, document]) / 3
        differences.append((difference, n))
        total += difference
        D += 1
    N = sum(n for _, n in differences)
    squares = sum((difference - total / N * n) ** 2 for difference, n in differences)
    assert gain == pytest.approx(total / N, rel=1e-10)
    assert se == pytest.approx(math.sqrt(D / (D - 1) * squares) / N, rel=1e-10)

def test_paired_error_agrees_with_the_jackknife_also_when_counts_differ():
    rng = np.random.default_rng(1)
    new, old = pair(rng)
    fewer = np.maximum(1, old.tokens - rng.integers(0, 9, len(old.tokens)))
    old = stats.Split(old.loss * fewer / old.tokens, fewer)
    gain, se = stats.paired_gain(new, old)
    keep = ~np.eye(len(fewer), dtype=bool)
    left_out = [
        stats.mean_loss(stats.Split(old.loss[:, k], old.tokens[k]))
        - stats.mean_loss(stats.Split(new.loss[:, k], new.tokens[k]))
        for k in keep
    ]
    assert se == pytest.approx(math.sqrt((len(keep) - 1) * np.var(left_out)), rel=0.02)

def test_bootstrap_agrees_with_scipy_and_with_the_formula():
    new, old = pair(np.random.default_rng(2), count=300)

    def gain(a, n, b, m, axis):
        return b.sum(axis) / m.sum(axis) - a.sum(axis) / n.sum(axis)

    reference = scipy.stats.bootstrap((new.loss[0], new.tokens, old.loss[0], old.tokens), gain, paired=True,
                                      n_resamples=5000, method="percentile", rng=np.random.default_rng(3))
    draws = stats.bootstrap_gain(new, old, resamples=5000)
    assert draws.std() == pytest.approx(reference.standard_error, rel=0.05)
    assert draws.std() == pytest.approx(stats.paired_gain(new, old)[1], rel=0.1)
    assert np.quantile(draws, (0.025, 0.975)) == pytest.approx(
        reference.confidence_interval, abs=0.15 * draws.std()
    )

def test_bootstrap_is_seeded_and_takes_any_number_of_resamples():
    new, old = pair(np.random.default_rng(4), count=50)
    assert np.array_equal(stats.bootstrap_gain(new, old, 130), stats.bootstrap_gain(new, old, 130))
    assert not np.array_equal(
        stats.bootstrap_gain(new, old, 130), stats.bootstrap_gain(new, old, 130, seed=1)
    )
    assert len(stats.bootstrap_gain(new, old, 1)) == 1

def test_intervals_cover_the_truth():
    """95 % intervals over fresh document draws contain the population's gain about 95 times in 100."""
    rng = np.random.default_rng(5)
    covered = []
    for _ in range(1000):
        gain, se = stats.paired_gain(*pair(rng, gain=0.01, count=400))
        covered.append(abs(gain - 0.01) <= stats.WIDE * se)
    assert 0.92 <= np.mean(covered) <= 0.97

def test_iid_tokens_would_be_far_too_sure_of_an_absolute_loss():
    """Why documents are the unit: the clustered error is many times what independent tokens would give."""
    rng = np.random.default_rng(6)
    split = split_of(rng, *documents(rng, 5000))
    assert stats.clustered_se(stats.influence(split)) > 3 * 2.5 / math.sqrt(split.tokens.sum())

def test_overfit_gap_is_seen_and_covers_the_truth():
    rng = np.random.default_rng(7)
    covered = []
    for _ in range(500):
        gap, se = stats.overfit_gap(*pair(rng, 0.012, 300), *pair(rng, 0.010, 300))
        covered.append(abs(gap - 0.002) <= stats.WIDE * se)
    assert 0.92 <= np.mean(covered) <= 0.98
    gap, se = stats.overfit_gap(*pair(rng, 0.03, 300), *pair(rng, 0.01, 300))
    assert gap > 3 * se


# ---- Seeds and the gate ------------------------------------------------------------------------------------

@given(st.lists(st.lists(st.floats(3, 4), min_size=1, max_size=5), max_size=8))
def test_pooled_seed_noise(groups):
    s, dof = stats.seed_noise(groups)
    assert dof == sum(len(group) - 1 for group in groups)
    squares = sum((len(group) - 1) * np.var(group, ddof=1) for group in groups if len(group) > 1)
    pooled = math.sqrt(squares / dof) if dof else 0.0
    assert s == pytest.approx(pooled if dof >= 10 else max(pooled, 0.0017), abs=1e-12)

def test_the_gate_is_the_one_percent_quantile():
    assert stats.GATE == pytest.approx(scipy.stats.norm.ppf(0.99), abs=0.005)
    assert stats.gate(0.004, 0.0004, 0.0013, 3, 5) == pytest.approx(
        0.004 / math.sqrt(0.0004**2 + 0.0013**2 / 3 + 0.0013**2 / 5)
    )

def simulate(rng, trials, gain, se_doc, s, n_new, n_old, pooled=0):
    """Share of comparisons that pass; with `pooled`, s is estimated, also from that many other pairs."""
    new = rng.normal(-gain, s, (trials, n_new))
    old = rng.normal(0, s, (trials, n_old))
    seen = old.mean(1) - new.mean(1) + rng.normal(0, se_doc, trials)
    if not pooled:
        return np.mean(stats.gate(seen, se_doc, s, n_new, n_old) >= stats.GATE)
    others = rng.normal(0, s, (trials, pooled, 2))
    used = [stats.seed_noise([*group, a, b])[0] for group, a, b in zip(others, new, old)]
    return np.mean(
        [stats.gate(*case, n_new, n_old) >= stats.GATE for case in zip(seen, [se_doc] * trials, used)]
    )

def test_size_of_the_gate():
    rng = np.random.default_rng(8)
    assert simulate(rng, 200_000, 0.0, 0.0004, 0.0013, 3, 3) == pytest.approx(0.01, abs=0.0015)
    # with s estimated: the floor keeps it strict, above it Student's tail lifts it until much is pooled
    assert simulate(rng, 4_000, 0.0, 0.0004, 0.0013, 3, 3, pooled=1) <= 0.01
    assert 0.01 < simulate(rng, 4_000, 0.0, 0.0004, 0.004, 3, 3, pooled=1) <= 0.045
    assert simulate(rng, 4_000, 0.0, 0.0004, 0.004, 3, 3, pooled=20) <= 0.02

@pytest.mark.parametrize("gain, s", [(0.003, 0.0013), (0.006, 0.0017), (0.002, 0.0011)])
def test_power_of_the_gate_is_what_seeds_for_promises(gain, s):
    rng = np.random.default_rng(9)
    n = stats.seeds_for(gain, 0.0004, s, power=0.8)
    assert simulate(rng, 50_000, gain, 0.0004, s, n, n) >= 0.79
    assert n == 1 or simulate(rng, 50_000, gain, 0.0004, s, n - 1, n - 1) < 0.8

def test_no_number_of_seeds_beats_the_documents():
    assert stats.seeds_for(0.001, se_doc=0.0004) is None
    assert stats.seeds_for(-0.001) is None
    assert stats.more_seeds(0.0009, 0.0004, 0.001, 3, 3) is None
    assert stats.more_seeds(-0.1, 0.0004, 0.001, 3, 3) is None

@given(gain=st.floats(1e-4, 0.05), se_doc=st.floats(1e-5, 0.002), s=st.floats(1e-4, 0.01),
       n_new=st.integers(1, 9), n_old=st.integers(1, 9))
def test_more_seeds_is_the_fewest_that_pass(gain, se_doc, s, n_new, n_old):
    more = stats.more_seeds(gain, se_doc, s, n_new, n_old)
    if more is None:
        assert stats.gate(gain, se_doc, s, 10**9, n_old) <= stats.GATE * (1 + 1e-6)
    else:
        assert stats.gate(gain, se_doc, s, n_new + more, n_old) >= stats.GATE * (1 - 1e-6)
        assert more == 0 or stats.gate(gain, se_doc, s, n_new + more - 1, n_old) < stats.GATE * (1 + 1e-6)


# ---- Does a small track predict a large one? ---------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_scipys_also_with_ties(seed):
    rng = np.random.default_rng(seed)
    known, gains = rng.integers(0, 6, 9) / 100, rng.integers(0, 6, 9) / 100
    rho, low, high, p = stats.rank_correlation(known, gains, np.full(9, 1e-12))
    expected = scipy.stats.spearmanr(known, gains).statistic
    shuffled = [scipy.stats.spearmanr(known, rng.permutation(gains)).statistic for _ in range(1000)]
    assert rho == pytest.approx(expected)
    assert p == pytest.approx(np.mean(np.array(shuffled) >= expected - 1e-9), abs=0.06)

def test_rank_correlation_knows_how_little_few_steps_say():
    known = np.array([0.01, 0.02, 0.03, 0.04])
    rho, low, high, p = stats.rank_correlation(known, known, np.full(4, 1e-6))
    assert rho == low == high == pytest.approx(1) and p == pytest.approx(1 / 24, abs=0.01)
    assert stats.rank_correlation(known, known, np.full(4, 0.05))[1] < 0  # noise beyond the gains


# ---- Data efficiency ---------------------------------------------------------------------------------------

# worked out by hand from the table, per track in the order of the published records
EFFICIENCIES = {
    "limited": [
        3.81,
        3.96,
        4.25,
        4.41,
        4.66,
        4.88,
        5.00,
        5.08,
        5.11,
        5.18,
        5.39,
        5.44,
        5.58,
        5.65,
        5.68,
        5.74,
        5.84,
        5.87,
        5.95,
        6.13,
        6.44,
    ],
    "tiny": [3.65, 3.76, 3.85, 3.91, 3.92, 3.98, 4.06, 4.20, 4.29, 4.45, 4.48, 4.54, 4.65, 4.74, 4.88],
    "two_hour": [5.96, 6.08, 6.31, 7.30, 7.45, 7.58],
    "unlimited": [3.81, 5.25, 5.79, 6.39, 6.88, 7.92, 8.88, 9.09, 10.06, 11.43, 12.92, 13.83],
}

def test_efficiency_of_every_published_record():
    records = json.loads((ROOT / "records/published.json").read_text())["records"]
    for track, wanted in EFFICIENCIES.items():
        losses = [record["val_loss"] for record in sorted(records, key=lambda r: r["number"])
                  if record["track"] == track]
        assert [stats.efficiency(loss, BASELINE) for loss in losses] == pytest.approx(wanted, abs=0.0051)

@pytest.mark.parametrize(
    "loss, multiple",
    [
        (3.703, 2),
        (3.370, 4),
        (3.2, 6),
        (3.123, 8),
        (3.046, 10),
        (2.892, 20),
        (2.969, 15),
        (3.7031, 0),
        (2.8919, math.inf),
    ],
)
def test_efficiency_at_and_beyond_the_knots(loss, multiple):
    assert stats.efficiency(loss, BASELINE) == pytest.approx(multiple)

@given(st.floats(2.892, 3.703), st.floats(2.892, 3.703))
def test_a_lower_loss_is_worth_more_data(one, other):
    low, high = sorted((one, other))
    assert 2 <= stats.efficiency(high, BASELINE) <= stats.efficiency(low, BASELINE) <= 20
