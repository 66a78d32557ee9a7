"""The published recipes: records/published/*.json against the facts of the reference's records.

A file holds in what its record differs from the newest of its track. Here stands the same the other way
round, technique by technique, written from the recipes of the records and not from the files.
"""

import functools
import json
import math
import re
import shutil
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import harness
import logbook
import reference as ref
import train_gpt
from common import command_line
from test_run import VOCAB, T, make_dataset

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "records/published"
RECORDS = json.loads((ROOT / "records/published.json").read_text())["records"]
FACTS = {f"{r['track']}_{r['number']:02}": r for r in RECORDS}
FILES = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
NAMES = sorted(FACTS)
# What the files leave to the command line: members of the unlimited track were limited's models until 8.
WIDTH = dict(n_embd=1792, n_head=14)
SIZES = {f"unlimited_{n:02}": WIDTH | (dict(replay="15-20") if n > 6 else {}) for n in range(1, 9)}
# Parameters that a record's script has and does not use: strengths of layers without XSA, 8 each.
IDLE = {"tiny_11": 10 * 8, "tiny_12": 16 * 8}

def track_of(name):
    return "unlimited_snapshots" if name == "unlimited_12" else FACTS[name]["track"]

def config(name):
    """The record's Config, at its own size."""
    return train_gpt.Config(**train_gpt.TRACKS[track_of(name)] | FILES[name] | SIZES.get(name, {}))

def named(text):
    """'limited 1-3,7 tiny 14 two_hour' -> the names of these records; a track alone is all of its records."""
    found = set()
    for track, numbers in re.findall(r"([a-z_]+) ?([\d,-]*)", text):
        ranges = [list(map(int, part.split("-"))) for part in (numbers or "1-99").strip(",").split(",")]
        wanted = {n for ends in ranges for n in range(ends[0], ends[-1] + 1)}
        found |= {name for name, r in FACTS.items() if r["track"] == track and r["number"] in wanted}
    return found


# ---- The files ---------------------------------------------------------------------------------------------

def test_every_record_has_its_file_and_its_line_in_the_readme():
    assert set(FILES) == set(FACTS)
    line = re.compile(r"^\| \[(\w+)\.json\]\(\1\.json\) \| ([\d.]+) \| .+ \|$", re.M)
    losses = {name: float(loss) for name, loss in line.findall((FOLDER / "README.md").read_text())}
    assert losses == {name: r["val_loss"] for name, r in FACTS.items()}

@pytest.mark.parametrize("name", NAMES)
def test_file_holds_what_differs_from_its_row_and_no_size(name):
    sizes = {"dataset", "seq_len", "batch_tokens", "n_layer", "n_head", "n_embd", "lr_scale", "wd_scale"}
    assert not sizes & set(FILES[name]) and FILES[name].get("replay", "none") == "none"
    preset = train_gpt.TRACKS[track_of(name)]
    row, mine = (train_gpt.Config(**preset | more) for more in ({}, FILES[name]))
    same = {field for field in FILES[name] if getattr(row, field) == getattr(mine, field)}
    # On nano, where late epochs are mixed, an ensemble has to say what its members leave; and nano's row
    # skips layers, as limited's did from 15 to 20.
    repeated = {"average": "unlimited 2-8", "average_kind": "unlimited 9", "stochastic_depth": "limited 1-14"}
    assert same == {field for field, records in repeated.items() if name in named(records)}

@pytest.mark.parametrize("name", NAMES)
def test_command_line_takes_the_file_on_its_track_and_on_nano(name):
    for track in (track_of(name), "nano"):
        c, _ = command_line("--track", track, "--config", FOLDER / f"{name}.json")
        assert c == train_gpt.Config(**train_gpt.TRACKS[track] | FILES[name])


# ---- What they say -----------------------------------------------------------------------------------------

SWITCHES = """
    mlp swiglu: limited 4-21 tiny 2-15 two_hour unlimited 3-12
    values proj: limited 3-21 tiny two_hour unlimited 3-12
    unet_skips True: limited 5-21 tiny 3-15 two_hour unlimited 4-12
    head_gate True: limited 6-21 tiny 4-15 two_hour unlimited 4-12
    gate_optimizer adamw: tiny 4-15
    head_mixing True: limited 17-21 two_hour 2-6 unlimited 11-12
    row_norm True: limited 18-21 two_hour 3-6 unlimited 11-12
    mtp block: limited 16-21 two_hour unlimited 11-12
    mtp head: tiny 13-15
    xsa fixed: limited 9-10
    xsa learned: tiny 11,13-15
    xsa_layers 6: tiny 11
    rope half: tiny 6-15
    lam_init 1.1: tiny 6-15
    passes 2: tiny 12,14-15
    out_init normal: limited 14-21 two_hour unlimited 11-12
    stochastic_depth 0.05: limited 15-20 two_hour
    dropout 0.1: limited 1-20 tiny two_hour unlimited
    dropout 0.05: limited 21
    dropout_mlp True: limited two_hour unlimited
    softcap 10.0: limited 11-21 two_hour
    softcap 15.0: limited 1-10 tiny unlimited
    shuffle none: limited 1 unlimited 1
    shuffle sequence: limited 2-18 tiny 1-9 two_hour 1-5 unlimited 2-11
    shuffle document: limited 19-21 tiny 10-15 two_hour 6 unlimited 12
    window_stages ((1,0.5,1),): limited tiny two_hour 1-4 unlimited
    replay none: limited 1-6 tiny unlimited 1-6
    replay 15-20: limited 7-21 two_hour unlimited 7-8
    replay 15-24: unlimited 9-12
    grad_clip 1.0: unlimited 9-12
    meta_norm 0.5: limited 21 tiny 15
    average_kind probs: limited 1-10,12-21 tiny 1-7 two_hour unlimited 1-8,12
    average_kind blend: limited 11 unlimited 9-11
    average_kind ema: tiny 8
    average_kind weights: tiny 9-15
    members 1: limited tiny two_hour unlimited 1
    members 8: unlimited 2-6
    members 10: unlimited 7,9
    members 12: unlimited 8
    members 20: unlimited 10-11
    first_epochs 18: unlimited 7-8
    first_epochs 16: unlimited 9-11
    drop_first True: unlimited 7-9,11
    distill 0.5: unlimited 6,8
    distill 0.7: unlimited 7,9-11
    distill 0.45: unlimited 12
    mix logits: unlimited 2-9"""

@pytest.mark.parametrize("line", SWITCHES.split("\n    ")[1:])
def test_switch_is_on_in_its_records_and_in_no_other(line):
    field, value, records = re.match(r"(\w+) (\S+): (.*)", line).groups()
    text = {name: str(getattr(config(name), field)).replace(" ", "") for name in NAMES}
    assert {name for name in NAMES if text[name] == value} == named(records)

@pytest.mark.parametrize(("records", "replay"), [
    ("limited 7", (10, 2)), ("limited 8-10", (10, 3)), ("limited 11-21", (7, 3)),
    ("two_hour 1-3", (7, 3)), ("two_hour 4-6", (14, 3)),
    ("unlimited 7-8", (19, 4)), ("unlimited 9-11", (17, 5)), ("unlimited 12", (1, 5)),
])
def test_replay_starts_in_its_epoch_with_its_passes(records, replay):
    for c in map(config, named(records)):
        assert (c.replay_from_epoch, c.replay_passes) == replay

@pytest.mark.parametrize(("records", "averaged"), [
    ("limited 12-21", (3, "recency")), ("tiny 9-15", (4, "recency")),
    ("two_hour 1-3", (3, "equal")), ("two_hour 4-6", (11, "recency")),
])
def test_checkpoints_that_are_averaged(records, averaged):
    assert {(config(name).average, config(name).average_weights) for name in named(records)} == {averaged}

def test_all_others_predict_with_their_last_epoch():
    rest = set(FACTS) - named("limited 12-21 tiny 9-15 two_hour")
    assert {config(name).average for name in rest} == {1}

@pytest.mark.parametrize(("records", "scale", "rates"), [
    ("limited 1-9 unlimited 1-8", 0.25, (0.08, 0.5, 0.3, 0.004)),
    ("limited 10-21 two_hour unlimited 9-12", 0.25, (0.04, 0.1, 0.15, 0.002)),
    ("tiny 1-8", 1.0, (0.04, 0.25, 0.15, 0.001)),
    ("tiny 9-15", 0.8, (0.04, 0.25, 0.15, 0.001)),
])
def test_learning_rates(records, scale, rates):
    for c in map(config, named(records)):
        mine = (c.lr_scale * rate for rate in (c.lr_matrix, c.lr_scalar, c.lr_embed, c.lr_head))
        assert tuple(mine) == pytest.approx(tuple(scale * rate for rate in rates), rel=1e-12)

def sequences_used(name):
    """Of the 48,804 of an epoch, those that fill the micro-batches of the record's 8 ranks."""
    per_batch = 16 if name in named("tiny 1-8") else 32 if name in named("tiny") else 4
    return 48804 // (8 * per_batch) * 8 * per_batch

def assert_schedule(name, c, theirs):
    mine = train_gpt.Schedule(c, sequences_used(name))
    assert mine.steps == theirs.steps
    every = range(mine.steps)
    lr, expected = [mine.lr(it) for it in every], [ref.lr_multiplier(it, theirs) for it in every]
    np.testing.assert_allclose(lr, expected, rtol=1e-12)
    decay = [c.weight_decay * c.wd_scale * mine.weight_decay(it) for it in every]
    expected = [theirs.weight_decay * ref.wd_multiplier(it, theirs) for it in every]
    np.testing.assert_allclose(decay, expected, rtol=1e-12)

@pytest.mark.parametrize("records", [key for key in ref.SCHEDULES if not key.endswith("first member")])
def test_schedule_is_the_records_at_every_step(records):
    for name in named(records):
        assert_schedule(name, config(name), ref.SCHEDULES[records])

@pytest.mark.parametrize(("records", "schedule", "replay_from"), [
    ("unlimited 7-8", "unlimited 5-6, first member of 7-8", 15),
    ("unlimited 9-11", "unlimited 9-11, first member", 9),
])
def test_first_member_learns_alone_and_for_less_time(records, schedule, replay_from):
    for name in named(records):
        c = config(name)
        first = c.member(0, c.members)
        assert_schedule(name, first, ref.SCHEDULES[schedule])
        assert (first.distill, first.replay_from_epoch) == (0, replay_from)
        assert all(c.member(link, c.members) == c for link in range(1, c.members))


# ---- Models ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_full_size_model_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = train_gpt.GPT(config(name), 50257)
    assert model.parameter_count() == FACTS[name]["parameters"] - IDLE.get(name, 0)


# ---- Training ----------------------------------------------------------------------------------------------

TOY = f"--seq-len {T} --n-layer 2 --n-head 2 --n-embd 32 --dtype float32 --no-compile".split()
SINGLE = f"--batch-tokens {2 * T} --meta-sequences 2".split()  # two steps an epoch, or order would not count
LONG = f"--batch-tokens {4 * T}".split()  # one, where records differ in more than their order
ENSEMBLE = f"--batch-tokens {8 * T} --members 2".split()  # a step in two epochs
SNAPSHOTS = f"--batch-tokens {2 * T} --batch-tokens-ends {T} --device-batch 1".split()
SNAPSHOTS += f"--members 5 --distill-after-members 2 --top 3 --fitness-tokens {T + 1}".split()

def covering(names):
    """
    Some of the records, in which every value occurs that a field of SWITCHES has in any record, its being off
    too, but for how many members there are: the next is one with the most values that are missing still.
    """
    fields = {line.split()[0] for line in SWITCHES.split("\n    ")[1:]} - {"members", "first_epochs"}
    values = {name: {(field, getattr(config(name), field)) for field in fields} for name in names}
    missing, chosen = set().union(*values.values()), []
    while missing:
        chosen.append(max(names, key=lambda name: (len(values[name] & missing), -config(name).epochs)))
        missing -= values[chosen[-1]]
    return chosen

@pytest.fixture(scope="module")
def val_loss(one_rank, tmp_path_factory):
    """val_loss(name) trains the record at a toy size, all of its epochs, and scores its predictor."""
    folder = tmp_path_factory.mktemp("toys")
    make_dataset(folder / "toy", "toy", train=4 * (T + 1) + 8, val=2 * (T + 1), audit=T + 1)
    (folder / "records").mkdir()
    shutil.copy(ROOT / "records/tracks.json", folder / "records")
    nothing = lambda *args, **kwargs: None

    @functools.cache
    def train(name):
        c = config(name)
        flags = ["--track", track_of(name), "--config", FOLDER / f"{name}.json", "--data", folder / "toy"]
        flags += TOY + SINGLE
        flags += ["--replay", "1-1"] if c.replay != "none" else []
        flags += LONG if track_of(name) in ("tiny", "two_hour") else []
        flags += ENSEMBLE if c.members > 1 else []
        flags += SNAPSHOTS if c.restarts else []
        with (
            mock.patch.multiple(logbook.dist, init_process_group=nothing, destroy_process_group=nothing),
            mock.patch.object(logbook, "ROOT", folder),
            mock.patch.object(logbook.RunLog, "plot", nothing),
            mock.patch.object(harness.Run, "warm_up", lambda run, *_: setattr(run, "executed", 1.0)),
            mock.patch.object(logbook.Keeper, "save", nothing),
            mock.patch.object(logbook.os, "fsync", nothing),
        ):
            train_gpt.main(types.SimpleNamespace(name=None), [*map(str, flags), "--run-name", name])
        result = json.loads((folder / "runs" / name / "result.json").read_text())
        assert result["complete"]
        return result["val_loss"]

    return train

SOME = covering(NAMES)  # the first five have most values, and always run

@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOME[:5] else pytest.mark.slow) for name in NAMES]
)
def test_record_trains_at_a_toy_size(name, val_loss):
    assert val_loss(name) < math.log(VOCAB) - 0.01  # where it starts, as the head does near 0

@pytest.mark.parametrize("names", [
    pytest.param(SOME[:5], id="some"),
    pytest.param(NAMES, id="all", marks=pytest.mark.slow),
])
def test_every_step_changes_the_result(val_loss, names):
    """All switches reach the training: no two records end alike, but the two that were one run do."""
    losses = {name: val_loss(name) for name in names}
    if {"unlimited_01", "limited_01"} <= set(losses):
        assert losses.pop("unlimited_01") == losses["limited_01"]
    assert len(set(losses.values())) == len(losses)
