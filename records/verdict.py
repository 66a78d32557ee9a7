"""How sure an entry is: its gain over the standing record, the noise of documents and seeds, who repeated it.

What was filed later plays no part in a verdict, so a verdict never changes. stats.py has the terms and
formulas.
"""

import itertools
import json
import re
from typing import NamedTuple

import numpy as np

import stats
from entry import BOARDS, RECORDS, before, history, read_json, stood

# All gains and their noise are nats per token.

class Verdict(NamedTuple):
    """How a method compares with another on one split."""

    against: str
    gain: float
    se_doc: float
    s: float
    dof: int
    n_new: int
    n_old: int

    @property
    def noise(self):
        return self.se_doc, self.s, self.n_new, self.n_old

    @property
    def half(self):
        """Half the width of the 95 % interval over documents and seeds."""
        return stats.WIDE * stats.total_se(*self.noise)

    @property
    def z(self):
        return stats.gate(self.gain, *self.noise)

    def __str__(self):
        return f"{self.gain:+.4f} ± {self.half:.4f} against {self.against}, z = {self.z:.1f}"

    def decided_by(self):
        more = stats.more_seeds(self.gain, *self.noise)
        return "no number of seeds would pass" if more is None else f"about {more} more seeds would pass"

def others(entry, entries):
    """The reproductions of an entry by people who did not file it."""
    mine = set(entry.record["contributors"])
    return [again for again in entries if again.record["of"] == entry.number and again.kind == "reproduction"
            and not mine & set(again.record["contributors"])]

def trusted(entries):
    """Of a track's entries those that teach the noise of a seed: its own baseline, and what others have
    reproduced, with the reproductions. Seeds that nobody else ran could be as alike as their author likes."""
    found = [entry for entry in entries[:1] if entry.kind == "baseline"]
    for entry in entries:
        found += [entry, *again] if (again := others(entry, entries)) else []
    return found

def losses_by_method(entries):
    """[the losses of each method]: runs of one script and config are one method, whichever entry has them."""
    methods = {}
    for run in (run for entry in entries for run in entry.runs):
        method = run["source_sha256"], json.dumps(run["config"], sort_keys=True)
        methods.setdefault(method, {})[run["log_sha256"]] = run["val_loss"]
    return [list(losses.values()) for losses in methods.values()]

def seed_noise(pool, compared=()):
    """(s, degrees of freedom) of the trusted entries of `pool`; no less than what the compared ones
    themselves show, of which more noise is believed at once, less noise never."""
    s, dof = stats.seed_noise(losses_by_method(trusted(pool)))
    own, own_dof = stats.pooled(losses_by_method(compared))
    return max(s, own) if own_dof else s, dof

def verdict_of(new, old, against, split="val", pool=()):
    """The Verdict on two Entries; `pool`: the track's entries, to learn the noise of seeds from."""
    gain, se_doc = stats.paired_gain(new.split(split), old.split(split))
    return Verdict(against, gain, se_doc, *seed_noise(pool, (old, new)), len(new.runs), len(old.runs))

def rivals(entry):
    """
    [the entry that it reproduces, or else the record that stood when it was filed]; [] for a track's first.
    """
    earlier = before(entry)
    return [old for old in earlier if old.number == entry.record["of"]] or stood(earlier)[-1:]

def judge(entry):
    """The Verdict against `rivals`; None for the first of a track."""
    rival = rivals(entry)
    return verdict_of(entry, rival[0], f"#{rival[0].number}", pool=before(entry)) if rival else None

def watched(new, old):
    """(gap, its standard error): the gain on val in excess of the gain on audit."""
    return stats.overfit_gap(*(one.split(name) for name in ("val", "audit") for one in (new, old)))

def evidence(entry):
    """A phrase on how sure an entry is, and a word on who says so."""
    verdict, word = judge(entry), standing(entry)
    if verdict is None:
        return f"{word}; {entry.seeds}, the first of its track"
    if entry.kind == "reproduction":
        agrees = "agrees" if abs(verdict.gain) <= verdict.half else "disagrees"
        return f"{entry.seeds}; {agrees} with {verdict.against}: {verdict}"
    return f"{word}; {entry.seeds}; {verdict} {'✓' if verdict.z >= stats.GATE else '✗'}"

def standing(entry):
    """
    Who stands for it: `baseline`, `self-reported`, or `reproduced n/m`: so many of others' m attempts agreed.
    """
    verdicts = [judge(again) for again in others(entry, history(entry.track))]
    agreed = sum(abs(verdict.gain) <= verdict.half for verdict in verdicts)
    if verdicts:
        return f"reproduced {agreed}/{len(verdicts)}"
    return "baseline" if entry.kind == "baseline" else "self-reported"


# ---- Over a track's history --------------------------------------------------------------------------------

def watch(track):
    """(entry numbers, gaps, half-widths): by how much gains on val since the track's first entry exceed those
    on audit, for each later one that stood."""
    first, *later = stood(history(track)) or [None]
    gaps = [watched(entry, first) for entry in later]
    return [entry.number for entry in later], [gap for gap, _ in gaps], [stats.WIDE * se for _, se in gaps]

def watch_sentence(track):
    looks = sum(run["val_evaluations"] for entry in history(track) for run in entry.runs)
    numbers, gaps, halves = watch(track)
    return f"Overfitting watch: {looks} looks at val so far, by the runs filed here; " + (
        f"gains on val exceed gains on audit by {gaps[-1]:.4f} ± {halves[-1]:.4f} (95 %)."
        if numbers
        else "no second entry yet whose gains on val and audit could be compared."
    )

def published_losses(track):
    return {fact["number"]: fact["val_loss"] for fact in read_json(RECORDS / "published.json")["records"]
            if fact["track"] == track}

def steps(track, of):
    """[(number, published gain, title, Verdict)]: the entries here that repeat a published record of the
    track `of`, as their slugs `<of>-<number>` say, each beside the one before it."""
    losses = published_losses(of)
    repeats = {
        int(match[1]): entry
        for entry in history(track)
        if (match := re.fullmatch(rf"{of}-(\d+)", entry.record["slug"])) and int(match[1]) in losses
    }
    return [
        (n, losses[m] - losses[n], new.record["title"], verdict_of(new, old, f"p{m}", pool=history(track)))
        for (m, old), (n, new) in itertools.pairwise(sorted(repeats.items()))
    ]

def correlation(rows):
    """stats.rank_correlation of what `steps` gives."""
    known, gains, halves = zip(*((known, verdict.gain, verdict.half) for _, known, _, verdict in rows))
    return stats.rank_correlation(known, gains, np.array(halves) / stats.WIDE)

def noise_of_track(track):
    """(s, degrees of freedom, the documents' standard error) that a new entry would have to reckon with."""
    entries = history(track) if track in BOARDS else []
    verdicts = [verdict for verdict in map(judge, entries) if verdict]
    se_doc = verdicts[-1].se_doc if verdicts else stats.TYPICAL_SE_DOC
    return *seed_noise(entries, stood(entries)[-1:]), se_doc
