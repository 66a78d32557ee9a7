"""The statistics of the leaderboard: is a gain real, how sure is it, and what is it worth in data?

Two noises blur the difference between two methods.

* **Documents.** Another draw of validation text would give another difference. Tokens of one document share
  its difficulty, so documents, not tokens, are the unit: per-document sums of loss and numbers of tokens are
  all it takes. Both methods are scored on the same documents, which are compared one by one (paired).
* **Seeds.** Another seed of the same method would give another loss, by s (standard deviation). It is
  pooled over the track's baseline and what others have reproduced (verdict.py), for invented seeds agree as
  they like.

A new record must pass the gate, a one-sided test at 1 %:

    z = gain / sqrt(SE_doc² + s² (1/n_new + 1/n_old)) >= 2.33

Losses are nats per token. A split scored by S seeds on D documents is a `Split`: loss (S, D), tokens (D,).
Everything is float64 numpy; nothing here reads files.
"""
import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

NORMAL = NormalDist()
GATE = 2.33             # the 99 % quantile of the normal distribution
WIDE = 1.96             # half-width, in standard errors, of the 95 % intervals that are printed

# One-epoch 124M models with identical code differ by 0.0011 (modded-nanogpt's track 3, 425 degrees of
# freedom) to 0.0017 (its track 1, 914). Until a track has an estimate worth the name, s is at least the
# larger: few seeds underestimate s easily, and a gate must not open because two runs happened to agree. Above
# the floor few degrees of freedom make the test generous: with 4, its size is about 4 % instead of 1 %.
SEED_FLOOR = 0.0017
ENOUGH_DOF = 10         # five entries of three seeds; s is then known to about 22 %, and the floor goes
TYPICAL_SE_DOC = 0.0004  # paired, 14,400 documents, methods about 0.01 nats apart

class Split(NamedTuple):
    """One split as S seeds scored it: summed nats (S, D) and scored tokens (D,) of each of D documents."""
    loss: np.ndarray
    tokens: np.ndarray


# ---- Documents ---------------------------------------------------------------------------------------------

def mean_loss(split):
    """Nats per token, averaged over the seeds."""
    return split.loss.mean(0).sum() / split.tokens.sum()

def influence(split):
    """(D,): what each document adds to the error of `mean_loss`, a ratio of two sums, to first order."""
    return (split.loss.mean(0) - mean_loss(split) * split.tokens) / split.tokens.sum()

def clustered_se(influences):
    """Standard error from per-document influences: sqrt(D/(D-1) · sum of squares), the ratio estimator's
    (Cochran, Sampling Techniques, §2.11). Documents without a scored token have no influence."""
    documents = len(influences)
    return math.sqrt(documents / (documents - 1) * np.square(influences).sum())

def paired_gain(new, old):
    """How much lower the new loss is, and the document-clustered standard error of that difference.

    The two may count different tokens of a document (another sequence length), but of the same documents."""
    assert new.tokens.shape == old.tokens.shape, "scored on different documents"
    return mean_loss(old) - mean_loss(new), clustered_se(influence(old) - influence(new))

def bootstrap_gain(new, old, resamples=10_000, seed=0):
    """(resamples,): the gain on validation sets made by drawing documents with replacement (Efron)."""
    columns = np.stack([new.loss.mean(0), new.tokens, old.loss.mean(0), old.tokens], axis=1)
    documents = len(columns)
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, 4))
    counts = np.empty((min(resamples, 64), documents))  # a block of multinomial draws, to fit the cache
    for start in range(0, resamples, len(counts)):
        block = counts[:resamples - start]
        for row in block:
            drawn = rng.integers(documents, size=documents, dtype=np.uint32)
            row[:] = np.bincount(drawn, minlength=documents)
        sums[start:start + len(block)] = block @ columns
    new_loss, new_tokens, old_loss, old_tokens = sums.T
    return old_loss / old_tokens - new_loss / new_tokens

def overfit_gap(val_new, val_old, audit_new, audit_old):
    """(gap, se): the gain on val in excess of the gain on audit, which nothing was ever chosen on.

    The same models stand on both sides, so seed noise largely cancels and the documents' is left."""
    val_gain, val_se = paired_gain(val_new, val_old)
    audit_gain, audit_se = paired_gain(audit_new, audit_old)
    return val_gain - audit_gain, math.hypot(val_se, audit_se)


# ---- Seeds and the gate ------------------------------------------------------------------------------------

def pooled(groups):
    """(s, degrees of freedom): standard deviation over seeds, pooled over methods; 0.0 where each has but
    one.

    `groups`: the losses of each method, one per seed."""
    dof = sum(len(group) - 1 for group in groups)
    return math.sqrt(sum(np.var(group) * len(group) for group in groups) / dof) if dof else 0.0, dof

def seed_noise(groups):
    """`pooled`, but at least SEED_FLOOR until there are ENOUGH_DOF."""
    s, dof = pooled(groups)
    return (s if dof >= ENOUGH_DOF else max(s, SEED_FLOOR)), dof

def total_se(se_doc, s, n_new, n_old):
    """Standard error of a gain: documents and seeds together."""
    return math.sqrt(se_doc**2 + s**2 * (1 / n_new + 1 / n_old))

def gate(gain, se_doc, s, n_new, n_old):
    """z of the gate; a record needs at least GATE."""
    return gain / total_se(se_doc, s, n_new, n_old)

def more_seeds(gain, se_doc, s, n_new, n_old):
    """How many further seeds of the new method would pass the gate if the gain stayed as it is; None: no
    number would, the gain being too small for the documents or for the few seeds of the old method."""
    room = (gain / GATE)**2 - se_doc**2 - s**2 / n_old if gain > 0 else 0.0
    return max(0, math.ceil(s**2 / room - 1e-9) - n_new) if room > 0 else None

def seeds_for(gain, se_doc=TYPICAL_SE_DOC, s=SEED_FLOOR, power=0.8):
    """Fewest seeds of each of the two methods with which a true gain passes the gate with probability
    `power`; None: no number does, the documents alone are too noisy."""
    room = (gain / (GATE + NORMAL.inv_cdf(power)))**2 - se_doc**2 if gain > 0 else 0.0
    return max(1, math.ceil(2 * s**2 / room - 1e-9)) if room > 0 else None


# ---- Does a small track predict a large one? ---------------------------------------------------------------

def ranks(values):
    """(..., n): the place of each value among the n, from 1; equal ones share the mean of their places."""
    values = np.asarray(values)
    other, own = values[..., None, :], values[..., None]
    return (other < own).sum(-1) + ((other == own).sum(-1) + 1) / 2

def rank_correlation(known, gains, errors, resamples=10_000, seed=0):
    """(rho, low, high, p): Spearman's rank correlation of `known` and `gains`, (n,) each; the 95 % interval
    in which the gains' standard errors leave it; how often a random order of the n does as well."""
    def rho(rows):
        a, b = (ranks(part) - (len(known) + 1) / 2 for part in (known, rows))
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))

    rng = np.random.default_rng(seed)
    low, high = np.quantile(rho(rng.normal(gains, errors, (resamples, len(gains)))), (0.025, 0.975))
    shuffled = rho(rng.permuted(np.tile(gains, (resamples, 1)), axis=1))
    found = rho(np.asarray(gains))
    return found, low, high, (shuffled >= found - 1e-9).mean()


# ---- Data efficiency ---------------------------------------------------------------------------------------

def efficiency(loss, baseline):
    """How many times the data the reference model would need for this loss.

    `baseline`: {"unit_tokens": int, "losses": {tokens: [loss per size]}}. The best size at each token count
    counts, with straight lines in tokens between them. Beyond the table it is 0.0 (loss too high) or inf."""
    curve = sorted((int(tokens), min(losses)) for tokens, losses in baseline["losses"].items())
    tokens, best = zip(*curve)
    needed = np.interp(loss, best[::-1], tokens[::-1], left=math.inf, right=0.0)
    return float(needed) / baseline["unit_tokens"]
