"""The meta-gradient: episodes against a direct computation, on any ranks, and through real runs."""

from unittest import mock

import numpy as np
import pytest
import torch

import train_gpt
from common import command_line, exact, refused
from harness import check_batch
from logbook import Team
from test_model import TINY, T, assert_close, make_tokens, reference_loss, reference_of
from test_model import make_model as make_full_model
from test_resume import MACHINE, RUN, assert_equal, death, mortal  # noqa: F401
from test_run import SHORT, SOURCE, losses, make_project, nursery, project, train  # noqa: F401
from test_training import track
from train_gpt import Config, Episodes, Mode, Optimizer, Schedule, draw_noise

LENGTH, MODE = 0.7, Mode(replay=True, passes=1, stage=0)

def make_model(**changes):
    return make_full_model(**dict(n_layer=2, replay="1-1", replay_passes=2, batch_tokens=8 * T) | changes)

def make_optimizer(model, rank=0, ranks=1):
    """That of one rank, which nobody answers."""
    return Optimizer(model, model.c, torch.float64, Team(0, 1, rank, ranks, None, None))

def pass_through(model, optimizer, sequences, device_batch, mode=MODE, ahead=(1.0,), teacher=None, first=0,
                 whole=None):
    """The backward passes of a rank's sequences, the first-th and following of a step's `whole` number."""
    episodes, count = Episodes(model.c, optimizer, device_batch), len(sequences) // device_batch
    for n in range(count):
        micro = slice(n * device_batch, (n + 1) * device_batch)
        noise = draw_noise(model.c, 42, range(first, first + len(sequences))[micro], model.embed.dtype)
        lesson = teacher.teach(sequences[micro], mode) if teacher else None
        model.loss(sequences[micro], mode, noise, whole or len(sequences), ahead, lesson)[0].backward()
        episodes.after(n + 1, count, LENGTH)
    assert not episodes.weights and not episodes.gradients

def values_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- A step ------------------------------------------------------------------------------------------------

# (configuration, targets ahead, how to know a parameter that adapts)
NO_MATRIX = ("embed", "head", "lam", "mu", "skip", "mix", "xsa")
MATRIX = lambda name: name.split(".")[-1] not in NO_MATRIX
CASES = {
    "limited": ({}, (1.0,), MATRIX),
    "MLP matrices": (dict(meta_matrices="mlp"), (1.0,), lambda name: ".mlp." in name),
    "tiny": (TINY | dict(gate_optimizer="adamw", row_norm=False), (1.0, 0.5),
             lambda name: MATRIX(name) and "head_gate" not in name),
    "student": (dict(distill=0.6, temperature=1.3), (1.0,), MATRIX),
    "AdamW": (dict(optimizer="adamw", mtp="none"), (1.0,), MATRIX),
}

def gradient_by_hand(model, sequences, adapts, mode, ahead, teacher):
    """{name: the sum over episodes of four of a step's sequences}, by the reference's losses."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    lesson = reference_of(teacher, mode) if teacher else None

    def gradient(params, net, half):
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        (reference_loss(model.c, leaves, half, net, ahead, lesson) * len(half) / len(sequences)).backward()
        return {name: leaves[name].grad for name in total}

    for episode in sequences.split(4):
        params, net = reference_of(model, mode)
        first = gradient(params, net, episode[:2])
        norm = sum(first[name].square().sum() for name in first if adapts(name)).sqrt()
        moved = {name: p - LENGTH / norm * first[name] if adapts(name) else p for name, p in params.items()}
        second = gradient(moved, net, episode[2:])
        total = {name: total[name] + first[name] + second[name] for name in total}
    return total

@pytest.mark.parametrize(("case", "device_batch"), [*((case, 1) for case in CASES), ("limited", 2)])
@exact()
def test_a_step_is_the_direct_computation(case, device_batch):
    """Of two episodes, in float64: gradients, restored weights, and the weights that the optimizer makes."""
    changes, ahead, adapts = CASES[case]
    changes = changes | dict(meta_norm=1.0, meta_sequences=4)
    model, sequences = make_model(**changes), make_tokens(8, T + 1)
    mode = MODE._replace(passes=model.c.passes, replay=model.c.replay != "none")
    teacher = train_gpt.frozen(make_model(**changes, n_head=1)) if model.c.distill else None
    expected = gradient_by_hand(model, sequences, adapts, mode, ahead, teacher)
    optimizer, before = make_optimizer(model), values_of(model)
    pass_through(model, optimizer, sequences, device_batch, mode, ahead, teacher)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert_close(p.grad, expected[name], 1e-10)

    plain = make_model(**changes | dict(meta_norm=0.0))
    by_hand = make_optimizer(plain)
    for name, p in plain.named_parameters():
        p.grad.copy_(expected[name])
    with mock.patch.object(train_gpt, "dist"):
        for each in optimizer, by_hand:
            each.step(1.0, 1.0, 0.9, 1)
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        assert not torch.equal(p, before[name])
        assert_close(p, q, 1e-8)  # Muon raises small singular values 2000-fold, and rounding with them

@exact()
def test_the_trial_step_goes_down_the_gradient_by_its_length():
    model, sequences = make_model(meta_norm=1.0, meta_sequences=4), make_tokens(2, T + 1)
    optimizer, before = make_optimizer(model), values_of(model)
    episodes, noise = Episodes(model.c, optimizer, 2), draw_noise(model.c, 42, range(2), torch.float64)
    model.loss(sequences, MODE, noise, 4)[0].backward()
    episodes.after(1, 2, LENGTH)
    moves = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert {name for name, move in moves.items() if move.any()} == {name for name in moves if MATRIX(name)}
    length = sum(move.square().sum() for move in moves.values()).sqrt()
    assert_close(length, torch.tensor(LENGTH), 1e-12)
    along = sum((moves[name] * p.grad).sum() for name, p in model.named_parameters())
    norm = sum(p.grad.square().sum() for name, p in model.named_parameters() if MATRIX(name)).sqrt()
    assert_close(along, -LENGTH * norm, 1e-12)

def test_without_a_gradient_nothing_moves():
    model = make_model(meta_norm=1.0, meta_sequences=2)
    episodes, before = Episodes(model.c, make_optimizer(model), 1), values_of(model)
    episodes.after(1, 2, LENGTH)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

@pytest.mark.parametrize(("ranks", "device_batch"), [(1, 2), (2, 1), (2, 2), (4, 1)])
@exact()
def test_ranks_and_device_batches_share_the_same_gradient(ranks, device_batch):
    """Two episodes of four among 1 and 2 ranks, and four of two among 4, with dropout: each by itself."""
    changes = dict(meta_norm=1.0, meta_sequences=8 // max(2, ranks), dropout=0.2)
    sequences, sums = make_tokens(8, T + 1), []
    for world, batch in ((1, 1), (ranks, device_batch)):
        sums.append({})
        for rank in range(world):
            model, share = make_model(**changes), 8 // world
            optimizer = make_optimizer(model, rank, world)
            before = [group.W.clone() for group in optimizer.groups]
            own = sequences[rank * share:(rank + 1) * share]
            pass_through(model, optimizer, own, batch, first=rank * share, whole=8)
            assert all(torch.equal(group.W, W) for group, W in zip(optimizer.groups, before))
            for name, p in model.named_parameters():
                sums[-1][name] = sums[-1].get(name, 0) + p.grad
    for name in sums[0]:
        assert_close(sums[1][name], sums[0][name], 1e-10)


# ---- Tracks and refusals -----------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "matrices", "numbers"), [
    ("limited", 279, 1_443_722_775 - 2 * 50304 * 1792 - 93 * 14 * 14 - 75), ("tiny", 48, 48 * 1024 * 2816),
    ("two_hour", 0, 0), ("unlimited_snapshots", 0, 0), ("nano", 0, 0),
])
def test_matrices_of_the_records(name, matrices, numbers):
    with torch.device("meta"):
        model = train_gpt.GPT(track(name), 4096 if name == "nano" else 50257)
    adapting = [p for _, p, row in train_gpt.match_rows(model, model.c) if row.adapts]
    assert (len(adapting), sum(p.numel() for p in adapting)) == (matrices, numbers)

def test_length_follows_the_warmdown_and_not_the_cycles():
    """limited: N = 2097 steps, of which 419 are the warmdown, a square root; tiny: always 0.5."""
    limited, tiny = Schedule(track("limited"), 48800), Schedule(track("tiny"), 48640)
    assert (limited.steps, tiny.steps) == (2097, 2850)
    for step, left in {0: 419, 1620: 419, 1678: 419, 1679: 418, 1907: 190, 2096: 1}.items():
        assert limited.meta_norm(step) == pytest.approx(0.5 * (left / 419) ** 0.5, rel=1e-12)
    assert limited.lr(1620) < 0.6  # in a cycle
    assert {tiny.meta_norm(step) for step in range(2850)} == {0.5}
    linear = Schedule(Config(meta_norm=2.0, warmdown=0.5, warmdown_power=1.0, lr_floor=0.1, cycles=0), 48800)
    assert linear.meta_norm(linear.steps - 100) == pytest.approx(200 / round(linear.steps / 2))

@pytest.mark.parametrize(("flags", "ranks", "says"), [
    ("", 16, "--meta-sequences 32 does not divide a rank's 16 sequences per step: ranks take whole episodes, "
             "as 8 ranks could"),
    ("--meta-sequences 512", 1, "--meta-sequences 512 does not divide a rank's 256 sequences per step"),
    ("--meta-sequences 48", 4, "--meta-sequences 48 does not divide a rank's 64"),
    ("--device-batch 32", 8, "--device-batch 32 does not divide the 16 sequences of half an episode"),
    ("--device-batch 3", 1, "--device-batch 3 does not divide the 16 sequences"),
    ("--meta-sequences 7", 1, "--meta-sequences 7 is odd"),
])
def test_what_cannot_be_halved_or_shared_is_refused(capsys, flags, ranks, says):
    refusal = lambda: check_batch(*command_line("--track", "limited", *flags.split()), ranks)
    assert says in refused(capsys, refusal)

@pytest.mark.parametrize(("flags", "ranks", "device_batch"), [
    ("", 1, 4), ("", 8, 4), ("--meta-sequences 4", 64, 2), ("--meta-norm 0", 64, 4), ("--track tiny", 8, 8),
])
def test_default_device_batch_divides_half_an_episode(flags, ranks, device_batch):
    c, args = command_line("--track", "limited", *flags.split())
    check_batch(c, args, ranks)
    assert args.device_batch == device_batch


# ---- Runs --------------------------------------------------------------------------------------------------

EPISODES = "--meta-norm 0.5 --meta-sequences 2".split()

@pytest.fixture(scope="module")
def run(project, train):  # noqa: F811
    """run(*flags, ranks=1, folder) -> the folder of a run of test_run's short kind."""
    made = []

    def run(*flags, ranks=1, folder=project):
        made.append(f"meta{len(made)}")
        outcome = train(folder, *SHORT, *flags, "--run-name", made[-1], ranks=ranks)
        assert set(outcome.codes) == {0} and outcome.stderr == "", outcome.stderr
        return folder / "runs" / made[-1]

    return run

@pytest.mark.slow
def test_a_run_is_the_same_on_one_and_four_ranks(run):
    """
    On two, limited and tiny are in test_tracks. With students, whose teacher gives lessons in episodes too.
    """
    flags = "--members 2 --distill 0.5 --average-kind weights --max-steps 6".split()  # the sixth replays
    one, four = (losses(run(*EPISODES, *flags, ranks=ranks)) for ranks in (1, 4))
    plain = losses(run(*flags))
    np.testing.assert_allclose(four, one, rtol=5e-6)
    assert np.abs(np.subtract(plain, one)).max() > 1e-3  # the lengths are large enough to see a difference

@pytest.mark.slow
def test_norm_0_is_a_run_without_episodes(run, project, tmp_path):  # noqa: F811
    source = SOURCE.replace("            episodes.after(n, len(batch), schedule.meta_norm(step))\n", "")
    assert source != SOURCE
    folder = make_project(tmp_path / "plain", source)
    (folder / "data").symlink_to(project / "data")
    flags = "--meta-norm 0 --meta-matrices mlp --meta-sequences 4 --optimizer adamw".split()
    ours, theirs = run(*flags), run("--optimizer", "adamw", folder=folder)
    assert np.array_equal(losses(ours), losses(theirs))
    for path in (ours / "checkpoints").glob("*.pt"):
        assert path.read_bytes() == (theirs / "checkpoints" / path.name).read_bytes()

@pytest.mark.slow
def test_resumed_in_the_middle_of_an_episode(mortal, train):  # noqa: F811
    """Killed in step 4 of 8 sequences, between the two halves of its third episode of two."""
    flags, runs = [*EPISODES, *MACHINE, "--device-batch", "1"], mortal / "runs"
    outcome = train(mortal, *RUN, *flags, "--run-name", "whole")
    assert outcome.codes == [0] and outcome.stderr == "", outcome.stderr
    outcome = train(mortal, *RUN, *flags, "--run-name", "broken", **death(("a micro-batch", 3 * 8 + 6)))
    assert outcome.codes != [0]
    outcome = train(mortal, *MACHINE, "--device-batch", "1", "--resume", "broken")
    assert outcome.codes == [0] and "resume at step 2" in outcome.stdout, outcome.stderr
    assert_equal(runs / "broken", runs / "whole")
