"""Every track from its first step to its table, and what only ensembles do, in real processes.

The runs are those of test_run.py: a made-up dataset, and the track's row with a model that learns in seconds.
What a mixture should be is counted again here, in float64, from the weights in the checkpoints.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

import harness
import logbook
import reference as ref
import shards
import train_gpt
from conftest import slow
from test_run import (  # noqa: F401
    ENVIRONMENT,
    ROOT,
    SOURCE,
    VOCAB,
    T,
    losses,
    make_dataset,
    make_project,
    metrics,
    nursery,
    project,
    result_of,
    train,
)

SMALL = f"""--dataset short --seq-len {T} --n-layer 2 --n-head 2 --n-embd 32 --batch-tokens {8 * T}
    --lr-scale 0.25 --dtype float32 --no-compile"""
REPLAY = "--replay 1-1 --replay-passes 2 --replay-from-epoch 2"
# What makes the track's row small, and lets everything that changes in a run change within a few epochs.
TRACKS = {
    "tiny": "--meta-sequences 4 --epochs 3 --cycles 1 --average 2 --wd-schedule 0.5,1 1.5,0.125 3,1.1625",
    "limited": f"{REPLAY} --meta-sequences 4 --epochs 3 --cycles 1 --average 2",
    "two_hour": f"""{REPLAY} --replay-from-epoch 3 --epochs 4 --cycles 1 --average 4
        --window-stages 1,0.125,0.375 2,0.375,0.875 3,0.625,1""",
    "nano_unlimited": f"""{REPLAY} --members 3 --distill 0.7 --epochs 2 --cycles 1
        --average-kind weights --average 2 --ngram 0 --fitness-tokens 0""",
    "unlimited": f"{REPLAY} --members 3 --epochs 2 --first-epochs 1",
    "unlimited_snapshots": f"""{REPLAY} --replay-from-epoch 1 --members 5 --epochs 1
        --distill-after-members 2 --top 3 --batch-tokens-ends {4 * T} --fitness-tokens 100""",
}
MEMBERS = {"tiny": ["member_0000.pt"], "limited": ["epoch_0002.pt", "epoch_0003.pt"],
           "two_hour": [f"epoch_{epoch:04d}.pt" for epoch in (1, 2, 3, 4)],
           "nano_unlimited": [f"member_{member:04d}.pt" for member in (0, 1, 2)],
           "unlimited": ["member_0001.pt", "member_0002.pt"]}  # the first one only teaches

LEARNS = ("--lr-scale", 1)  # four times as fast, for what shows only in models that have learned something

def flags(track):
    return ["--track", track, *shlex.split(SMALL), *shlex.split(TRACKS[track])]

@pytest.fixture(scope="session")
def run(project, train):  # noqa: F811
    """run(track, *more flags, ranks) -> the run's folder; runs that were made before are not made again."""
    made = {}

    def run(track, *more, ranks=1):
        key = (track, *more, ranks)
        if key not in made:
            name = f"{track}{len(made)}"
            outcome = train(project, *flags(track), *more, "--run-name", name, ranks=ranks)
            assert set(outcome.codes) == {0} and outcome.stderr == "", outcome.stderr
            made[key] = project / "runs" / name
        return made[key]

    return run


# ---- Counted again -----------------------------------------------------------------------------------------

def cut(folder, split):
    """(n, T+1) int64: the non-overlapping sequences of a split in file order."""
    tokens = np.array(shards.read(folder / f"{split}.bin"), dtype=np.int64)
    return tokens[:len(tokens) // (T + 1) * (T + 1)].reshape(-1, T + 1)

@torch.no_grad()
def member_logits(run, checkpoint, sequences, mode=None):
    """(n, T, VOCAB) float64: the logits of the run's own model, with the checkpoint's weights put into it."""
    folder, config = run / "checkpoints", train_gpt.Config(**result_of(run)["config"])
    mode = mode or train_gpt.Mode(*json.loads((folder / checkpoint).with_suffix(".json").read_text())["mode"])
    model = train_gpt.make_model(config, VOCAB, torch.device("cpu"), torch.float32)
    weights = torch.load(folder / checkpoint, weights_only=True)
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        p.copy_(weights[name])
    return model.logits(model.trunk(torch.from_numpy(sequences[:, :-1]), mode)[0]).double().numpy()

def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)

def target_probabilities(p, sequences):
    return np.take_along_axis(p, sequences[:, 1:, None], -1)[..., 0]

def mixture_loss(run, sequences, members, mix="probs"):
    """The loss of a mixture of [(checkpoint, weight)]."""
    z = [member_logits(run, checkpoint, sequences) for checkpoint, _ in members]
    weights = [weight for _, weight in members]
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    if mix == "logits":
        p = softmax(sum(w * part for w, part in zip(weights, z)))
    else:
        p = sum(w * softmax(part) for w, part in zip(weights, z))
    return -np.log(target_probabilities(p, sequences)).mean()

def predictor_of(run):
    return [(m["checkpoint"], m["weight"]) for m in result_of(run)["members"]]


# ---- All tracks --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("track", TRACKS)
def test_track_leaves_the_checkpoints_of_its_members(run, track):
    folder = run(track)
    result = result_of(folder)
    assert result["violations"] == [f"trained on short, not on the track's {track_data(track)}"]
    if track in MEMBERS:
        assert [m["checkpoint"] for m in result["members"]] == MEMBERS[track]
    names = {path.name for path in (folder / "checkpoints").iterdir()} - {"predictor.json"}
    count = result["config"]["members"]
    trained = [f"member_{m:04d}.pt" for m in range(count)] if count > 1 else MEMBERS[track]
    assert names == {name[:-2] + suffix for name in trained for suffix in ("pt", "npz", "json")}

@pytest.mark.parametrize("track", ["tiny", slow("nano_unlimited"), slow("unlimited_snapshots")])
def test_track_is_the_same_on_one_and_on_two_ranks(run, track):
    # With zero out-projections the stream's scale has no effect on the loss at first, and AdamW goes where
    # rounding points in those gradients: such a run differs by more than rounding.
    more = ["--out-init", "normal"] if track == "tiny" else []
    one, two = (run(track, *more, ranks=ranks) for ranks in (1, 2))
    left = [({path.name for path in (folder / "checkpoints").iterdir()},
             [member["checkpoint"] for member in result_of(folder)["members"]]) for folder in (one, two)]
    assert left[0] == left[1]
    np.testing.assert_allclose(losses(one), losses(two), rtol=5e-6)

def track_data(track):
    return "nano" if track == "nano_unlimited" else "fineweb100M"

@pytest.mark.parametrize("track", TRACKS)
def test_score_is_that_of_the_checkpoints(run, project, track):  # noqa: F811
    folder = run(track)
    for split in "val", "audit":
        loss = mixture_loss(folder, cut(project / "data/short", split), predictor_of(folder))
        assert result_of(folder)[f"{split}_loss"] == pytest.approx(loss, rel=1e-6)

@pytest.mark.parametrize("track", TRACKS)
def test_counts(run, track):
    """Steps, tokens and looks at val that result.json states are those in the metrics."""
    folder = run(track)
    result, steps = result_of(folder), metrics(folder, "step")
    members = result["config"]["members"]
    assert [row["at"] for row in steps] == list(range(len(steps)))
    assert {row["member"] for row in steps} == set(range(members))
    sequences = [8] * members
    if track == "unlimited_snapshots":
        sequences = [4, 8, 8, 8, 4]
    assert result["tokens_seen"] == sum(sequences[row["member"]] for row in steps) * T
    looks = len(metrics(folder, "eval")) + len(metrics(folder, "ensemble")) + 1
    assert result["val_evaluations"] == looks
    assert len(metrics(folder, "ensemble")) == (members if members > 1 else 0)

@pytest.mark.parametrize(("flags", "name", "reason"), [
    ("avx2", None, "no bfloat16 units"),
    ("avx2", "float32", "--dtype"),
    ("avx2", "bfloat16", "--dtype; no bfloat16 units, a hundred times slower"),
    ("avx512_bf16", None, "in hardware"),
    ("amx_bf16", "bfloat16", "--dtype"),
])
def test_the_log_says_why_a_dtype_was_taken(flags, name, reason):
    info = f"model name\t: A CPU\nflags\t\t: sse {flags}\n"
    with mock.patch.object(logbook.Path, "exists", lambda _: True), \
            mock.patch.object(logbook.Path, "read_text", lambda _: info):
        device, cpu, dtype, why = logbook.pick_device(Namespace(dtype=name))
    assert (device.type, cpu.split(",")[0], why) == ("cpu", "A CPU", reason)
    assert str(dtype) == f"torch.{name or ('float32' if flags == 'avx2' else 'bfloat16')}"


# ---- Mixtures ----------------------------------------------------------------------------------------------

def evaluate(folder, *flags, data="short"):
    """What `./run.sh eval` prints of a run, by the run's own source."""
    command = [sys.executable, ROOT / "records/ruler.py", "eval", folder, *flags, "--unconfined"]
    command += ["--data", folder.parent.parent / "data" / data]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

def scores(printed):
    """{split: the loss}, and [each member's loss, split by split], as eval printed them."""
    totals = re.findall(r"^(.+): loss (\d+\.\d+)", printed, re.M)
    members = re.findall(r"^  (\d+\.\d{6})  .* loss of \S+\.pt", printed, re.M)
    return {split: float(loss) for split, loss in totals}, list(map(float, members))

@pytest.mark.slow
@pytest.mark.parametrize("ranks, mix", [(1, "probs"), (2, "logits")])
def test_mixture_is_a_direct_computation(run, project, train, ranks, mix):  # noqa: F811
    """As the run scored itself, and as eval with the other mix does."""
    folder = run("nano_unlimited", "--mix", mix, *LEARNS, ranks=ranks)
    sequences = cut(project / "data/short", "val")
    members = predictor_of(folder)
    assert [weight for _, weight in members] == pytest.approx([1 / 3] * 3)
    expected = {kind: mixture_loss(folder, sequences, members, kind) for kind in ("probs", "logits")}
    assert abs(expected["probs"] - expected["logits"]) > 1e-4  # or the test could not tell them apart
    assert result_of(folder)["val_loss"] == pytest.approx(expected[mix], rel=1e-6)
    other = "logits" if mix == "probs" else "probs"
    code, printed, errors = evaluate(folder, "--mix", other, "--split", "val")
    assert (code, errors) == (0, "")
    assert scores(printed)[0] == {"val": pytest.approx(expected[other], abs=1.5e-6)}

@pytest.mark.parametrize("track", ["nano_unlimited", "unlimited"])
def test_curve_of_the_ensemble(run, project, track):  # noqa: F811
    """After every member the score of those so far: in the metrics, in log.txt, and on the console."""
    folder, sequences = run(track), cut(project / "data/short", "val")
    names = [f"member_{member:04d}.pt" for member in range(3)]
    first = 1 if track == "unlimited" else 0  # which leaves its first member out as soon as there is another
    groups = [names[first * (n > 1):n] for n in (1, 2, 3)]
    rows = metrics(folder, "ensemble")
    assert [row["members"] for row in rows] == list(map(len, groups))
    assert [row["member"] for row in rows] == [0, 1, 2]
    log = (folder / "log.txt").read_text()
    for row, group in zip(rows, groups):
        expected = mixture_loss(folder, sequences, [(name, 1 / len(group)) for name in group])
        assert row["loss"] == pytest.approx(expected, rel=1e-6)
        assert f"the {len(group)} members so far {row['loss']:.4f}" in log
    assert rows[-1]["loss"] == pytest.approx(result_of(folder)["val_loss"], rel=1e-12)

def test_every_member_starts_anew_and_is_longer_taught_than_the_first(run):
    folder = run("unlimited")
    starts = [row for row in metrics(folder, "eval") if row["step"] == 0]
    assert [row["member"] for row in starts] == [0, 1, 2]
    assert len({row["loss"] for row in starts}) == 3  # seeds of their own
    steps = [sum(row["member"] == member for row in metrics(folder, "step")) for member in range(3)]
    assert steps == [5, 10, 10]
    modes = [json.loads((folder / f"checkpoints/member_{m:04d}.json").read_text())["mode"] for m in range(3)]
    assert [mode[0] for mode in modes] == [False, True, True]  # the first never comes to the replay


# ---- Snapshots and their selection -------------------------------------------------------------------------

def test_snapshots_go_on_where_the_one_before_ended(run):
    folder = run("unlimited_snapshots", *LEARNS)
    evals = metrics(folder, "eval")
    assert [row["member"] for row in evals if row["step"] == 0] == [0]  # one start
    rows = [[row["loss"] for row in metrics(folder, "step") if row["member"] == m] for m in range(5)]
    assert max(first[0] for first in rows[1:]) < rows[0][0] - 0.1

def fitness_probabilities(run, project):  # noqa: F811
    """(M, n): what each snapshot gives the targets of the first whole documents of train, 100 tokens."""
    tokens = np.array(shards.read(project / "data/short/train.bin"), dtype=np.int64)
    end = next(i for i in range(100, len(tokens)) if tokens[i] == VOCAB - 1)
    sequences = tokens[:end // (T + 1) * (T + 1)].reshape(-1, T + 1)
    names = [f"member_{member:04d}.pt" for member in range(5)]
    return np.stack([target_probabilities(softmax(member_logits(run, name, sequences)), sequences).ravel()
                     for name in names])

def test_selection_is_the_best_mixture_of_the_fitness_tokens(run, project):  # noqa: F811
    """The best is found here by expectation maximisation, which climbs to the only maximum."""
    everybody = run("unlimited_snapshots", *LEARNS, "--top", 5)
    p = fitness_probabilities(everybody, project)
    saved = [np.load(everybody / f"checkpoints/member_{m:04d}.npz")["fitness"].ravel() for m in range(5)]
    np.testing.assert_allclose(np.stack(saved), np.log(p), rtol=1e-4, atol=1e-5)
    best = np.full(5, 0.2)
    for _ in range(20_000):
        best = (best[:, None] * p / (best @ p)).mean(1)
    loss = lambda weights: -np.log(weights @ p).mean()
    weights = np.array([weight for _, weight in predictor_of(everybody)])
    assert len(weights) == 5
    assert loss(best) - 1e-9 <= loss(weights) < loss(best) + 1e-3
    assert loss(weights) < loss(np.full(5, 0.2)) - 0.01
    chosen = dict(predictor_of(run("unlimited_snapshots", *LEARNS)))
    largest = sorted(predictor_of(everybody), key=lambda member: -member[1])[:3]
    total = sum(weight for _, weight in largest)
    assert chosen == {name: pytest.approx(weight / total, rel=1e-6) for name, weight in largest}

@pytest.mark.slow
def test_selection_never_sees_val_or_audit(run, project, train, tmp_path):  # noqa: F811
    make_dataset(tmp_path / "other", "short", train=1_300, val=700, audit=800, seed=1)
    for name in "train.bin", "token_bytes.bin":
        shutil.copy(project / "data/short" / name, tmp_path / "other")
    manifest, ours = (json.loads((folder / "manifest.json").read_text())
                      for folder in (tmp_path / "other", project / "data/short"))
    manifest["splits"]["train"] = ours["splits"]["train"]
    manifest["token_bytes_sha256"] = ours["token_bytes_sha256"]
    (tmp_path / "other/manifest.json").write_text(json.dumps(manifest))
    arguments = ["--data", tmp_path / "other", "--run-name", "other"]
    outcome = train(project, *flags("unlimited_snapshots"), *arguments)
    assert outcome.codes == [0], outcome.stderr
    results = result_of(project / "runs/other"), result_of(run("unlimited_snapshots"))
    assert abs(results[0]["val_loss"] - results[1]["val_loss"]) > 0.1
    assert predictor_of(project / "runs/other") == predictor_of(run("unlimited_snapshots"))

@pytest.mark.parametrize("track, names", [
    ("limited", MEMBERS["limited"]),
    ("nano_unlimited", MEMBERS["nano_unlimited"]),
])
def test_ngrams_are_a_member_whose_share_fitness_tokens_fit(run, project, track, names):  # noqa: F811
    folder = run(track, "--ngram", 3, "--fitness-tokens", 100, *LEARNS)
    *weights, share = [weight for _, weight in predictor_of(folder)]
    assert [name for name, _ in predictor_of(folder)] == [*names, "ngrams.pt"]
    others = np.array([1, 2] if track == "limited" else [1, 1, 1])  # late epochs by recency, members equally
    others = others / others.sum()
    assert weights == pytest.approx((1 - share) * others)
    checkpoints = folder / "checkpoints"
    data = harness.Dataset(project / "data/short", "")
    data.set_aside(100)
    text = np.array(data.splits["train"]).tolist()
    assert torch.load(checkpoints / "ngrams.pt", weights_only=True)["text"].tolist() == text
    scores = {name: dict(np.load((checkpoints / name).with_suffix(".npz"))) for name in [*names, "ngrams.pt"]}
    for split in "val", "audit", "fitness":
        sequences = data.sequences(split, T)[:3].tolist()
        expected = [[ref.kneser_ney(text, sequence[:t + 1][-2:], 3, VOCAB)[sequence[t + 1]] for t in range(T)]
                    for sequence in sequences]
        found = np.exp(scores["ngrams.pt"][split][:3])
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    p = {split: np.stack([np.exp(scores[name][split].ravel().astype(float)) for name in scores])
         for split in ("val", "fitness")}
    loss = lambda share, split: -np.log(np.append((1 - share) * others, share) @ p[split]).mean()
    best = minimize_scalar(loss, (0, 1), (0, 1), args=("fitness",), method="bounded", options={"xatol": 1e-9})
    assert share == pytest.approx(best.x, abs=1e-4) and 0.01 < share < 0.999
    assert result_of(folder)["val_loss"] == pytest.approx(loss(share, "val"), rel=1e-9)
    sequences = torch.from_numpy(data.sequences("val", T).astype(np.int64))
    logp = train_gpt.load_predictor(folder, "cpu").logprobs(sequences[:, :-1]).double()
    assert (logp.exp().sum(-1) - 1).abs().max() < 5e-6  # in float32
    said = -logp.gather(-1, sequences[:, 1:, None]).mean().item()
    assert said == pytest.approx(result_of(folder)["val_loss"], abs=1e-5)

def test_fitness_tokens_are_taken_from_train(project):  # noqa: F811
    tokens = np.array(shards.read(project / "data/short/train.bin"))
    for size in 1, 100, 500, 1_299, 10_000:
        data = harness.Dataset(project / "data/short", "")
        data.set_aside(size)
        fitness, rest = data.splits["fitness"], data.splits["train"]
        assert (np.concatenate((fitness, rest)) == tokens).all()
        assert rest[0] == VOCAB - 1 and len(fitness) >= min(size, data.documents("fitness")[-1])


# ---- Teams of ranks ----------------------------------------------------------------------------------------

def weights_of(run, member):
    return torch.load(run / f"checkpoints/member_{member:04d}.pt", weights_only=True)

def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)

def test_members_without_a_chain_are_the_same_in_two_teams(run):
    independent = ["--distill", 0, "--members", 4, "--epochs", 1, "--average", 1]
    together = run("nano_unlimited", *independent, ranks=2)
    apart = run("nano_unlimited", *independent, "--ranks-per-member", 2, ranks=4)
    members = [weights_of(together, member) for member in range(4)]
    assert not same(members[0], members[1])
    assert all(same(weights, weights_of(apart, member)) for member, weights in enumerate(members))
    one, two = result_of(together), result_of(apart)
    for name in "val_loss", "audit_loss", "members", "tokens_seen", "training_flops":
        assert one[name] == two[name]
    assert two["gpu_seconds"] == pytest.approx(4 * two["train_seconds"])
    # Each team writes down its own members, and the looks at val of all of them count.
    looks = 1
    for suffix, expected in ("", {0, 2}), ("_1", {1, 3}):
        rows = list(map(json.loads, (apart / f"metrics{suffix}.jsonl").read_text().splitlines()))
        looks += sum(row["kind"] in ("eval", "ensemble") for row in rows)
        assert {row["member"] for row in rows if row["kind"] == "step"} == expected
        assert (apart / f"log{suffix}.txt").exists()
    assert two["val_evaluations"] == looks

@pytest.mark.slow
def test_each_team_has_a_chain_of_its_own(run):
    """Which is that of a run of one team with its seed: its stream, noise, teachers and snapshots."""
    chain = ["--distill-after-members", 1, "--top", 0]
    both = run("unlimited_snapshots", *chain, "--members", 6, "--ranks-per-member", 1, ranks=2)
    for team in 0, 1:
        alone = run("unlimited_snapshots", *chain, "--members", 3, "--seed", 42 + team)
        for link in range(3):
            assert same(weights_of(both, 2 * link + team), weights_of(alone, link)), (team, link)


# ---- The ruler ---------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("track", ["limited", "unlimited_snapshots"])
def test_ruler_finds_what_the_run_states(run, project, track):  # noqa: F811
    """Late epochs that are averaged, and a selection with weights of its own."""
    command = [sys.executable, ROOT / "records/ruler.py", run(track), "--data", project / "data/short"]
    done = subprocess.run([*command, "--device-batch", "16"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("ok  ") == 7, done.stdout + done.stderr


# ---- A clone that can be stopped and watched ---------------------------------------------------------------

def planted(source, *lines_before):
    for line, code in lines_before:
        assert source.count(line) == 1, line
        source = source.replace(line, code + line)
    return source

WATCHED = planted(
    SOURCE,
    ("        epoch, mode, loss = schedule.epoch(step)",
     "        if sys.modules['logbook'].os.environ.get('STOP_AT') == f'{member} {step}':\n"
     "            sys.modules['logbook'].signal.raise_signal(15)\n"),
    ("    stream = Stream(",
     "    if sys.modules['logbook'].os.environ.get('WATCH'):\n"
     "        print('weights', member, sys.modules['logbook'].digest(np.concatenate("
     "[p.detach().flatten().numpy() for p in t.model.parameters()])))\n"),
)

@pytest.fixture(scope="session")
def watched(project, tmp_path_factory):  # noqa: F811
    folder = make_project(tmp_path_factory.mktemp("watched") / "clone", WATCHED)
    (folder / "data").symlink_to(project / "data")
    return folder

@pytest.mark.slow
def test_snapshots_and_noise_are_the_same_on_all_ranks(watched, train):  # noqa: F811
    more = ["--top", 0, "--run-name", "noise"]
    outcome = train(watched, *flags("unlimited_snapshots"), *more, ranks=2, WATCH=1)
    assert set(outcome.codes) == {0}, outcome.stderr
    seen = re.findall(r"^weights (\d) (\w+)$", outcome.stdout, re.M)
    assert sorted(int(member) for member, _ in seen) == sorted(2 * [0, 1, 2, 3, 4])
    assert len(set(seen)) == 5  # one digest for each member

@pytest.fixture(scope="session")
def stopped(watched, train):  # noqa: F811
    """A distilled ensemble whose run was stopped in its third member, and its flags."""
    arguments = [*flags("unlimited"), "--members", "4"]
    outcome = train(watched, *arguments, "--run-name", "stopped", STOP_AT="2 3")
    assert outcome.codes == [75], outcome.stderr
    return watched / "runs/stopped", arguments

@pytest.mark.slow
def test_eval_of_a_half_finished_run(stopped, watched):
    folder, _ = stopped
    shutil.copytree(folder, watched / "runs/half")
    code, printed, errors = evaluate(watched / "runs/half", "--split", "val")
    assert (code, errors) == (0, "")
    curve = metrics(folder, "ensemble")
    assert len(curve) == 2 and scores(printed)[0] == {"val": pytest.approx(curve[-1]["loss"], abs=1.5e-6)}
    assert "result.json" not in printed

def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

@pytest.mark.slow
def test_damaged_member_is_named(stopped, watched, train):  # noqa: F811
    """By eval and by the member that would learn from it; mended, the run goes on to its end."""
    folder, arguments = stopped
    damaged = folder / "checkpoints/member_0001.pt"
    flip(damaged)
    code, printed, _ = evaluate(folder, "--split", "val")
    assert code == 1 and re.search(r"^FAIL .*member_0001\.pt .*damaged", printed, re.M), printed
    outcome = train(watched, *arguments, "--resume", "stopped")
    assert outcome.codes == [2]
    assert re.fullmatch(r"error: [^\n]*member_0001\.pt [^\n]*damaged[^\n]*\n", outcome.stderr), outcome.stderr
    flip(damaged)
    outcome = train(watched, *arguments, "--resume", "stopped")
    assert outcome.codes == [0], outcome.stderr
    assert [m["checkpoint"] for m in result_of(folder)["members"]] == [f"member_000{m}.pt" for m in (1, 2, 3)]

@pytest.mark.parametrize("name", ["adamw", slow("torch.optim:Adafactor")])
def test_optimizers_run_and_resume(watched, train, name):  # noqa: F811
    more = ["--optimizer", name, "--lr-scale", 1, "--lr-matrix", "0.01", "--weight-decay", "0.1"]
    if name != "adamw":
        more += ["--optimizer-args", '{"d": 2.0}']
    arguments = [*flags("limited"), *more]
    ranks = 1 if name == "adamw" else 2
    for run_name, stop in ("whole", ""), ("parts", "0 7"):
        outcome = train(watched, *arguments, "--run-name", run_name + name[-3:], ranks=ranks, STOP_AT=stop)
        assert outcome.codes[0] == (75 if stop else 0), outcome.stderr
    outcome = train(watched, *arguments, "--resume", "parts" + name[-3:], ranks=ranks)
    assert set(outcome.codes) == {0} and outcome.stderr == "", outcome.stderr
    whole, parts = (watched / "runs" / (kind + name[-3:]) for kind in ("whole", "parts"))
    assert (losses(whole) == losses(parts)).all()
    evals = [row["loss"] for row in metrics(whole, "eval")]
    assert evals[-1] < evals[0] - 0.3  # it learns


# ---- Scored again ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("track", ["unlimited_snapshots", slow("two_hour"), slow("tiny"), slow("unlimited")])
def test_eval_of_a_finished_run(run, track):
    folder = run(track)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, printed, errors = evaluate(folder)
    assert (code, errors) == (0, "")
    result, (totals, members) = result_of(folder), scores(printed)
    assert totals == {split: pytest.approx(result[f"{split}_loss"], abs=1.5e-6) for split in ("val", "audit")}
    stated = [member["val_loss"] for member in result["members"]]
    assert len(stated) == 1 or members[:len(stated)] == pytest.approx(stated, abs=1.5e-6)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

@pytest.mark.slow
def test_eval_of_a_run_that_ended_early(run):
    folder = run("nano_unlimited", "--max-steps", 3)
    assert "stopped early by --max-steps" in result_of(folder)["violations"]
    totals, _ = scores(evaluate(folder, "--split", "val")[1])
    assert totals == {"val": pytest.approx(result_of(folder)["val_loss"], abs=1.5e-6)}

@pytest.mark.slow
def test_eval_of_a_file(run, project, tmp_path):  # noqa: F811
    folder, file = run("nano_unlimited"), tmp_path / "some tokens.bin"
    shutil.copy(project / "data/nano/audit.bin", file)
    code, printed, errors = evaluate(folder, "--split", file)
    assert (code, errors) == (0, "")
    expected = mixture_loss(folder, cut(project / "data/nano", "audit"), predictor_of(folder))
    assert list(scores(printed)[0].values()) == pytest.approx([expected], abs=1.5e-6)

def test_early_members_are_scored_as_they_were_trained(run, project):  # noqa: F811
    """With the windows and replay of their epoch, not of the last one: result, evaluations and eval agree
    (test_eval_of_a_finished_run), and they would not if the mode were another."""
    folder, sequences = run("two_hour", *LEARNS), cut(project / "data/short", "val")
    members = result_of(folder)["members"]
    evals = {f"epoch_{row['epoch']:04d}.pt": row["loss"] for row in metrics(folder, "eval")}
    predictor = json.loads((folder / "checkpoints/predictor.json").read_text())
    modes = [member["mode"] for member in predictor["members"]]
    assert modes == [[False, 1, 0], [False, 1, 1], [True, 1, 2], [True, 1, 2]]
    last = train_gpt.Mode(*modes[-1])
    for member in members:
        assert member["val_loss"] == pytest.approx(evals[member["checkpoint"]], abs=2e-6)
        p = softmax(member_logits(folder, member["checkpoint"], sequences, last))
        otherwise = -np.log(target_probabilities(p, sequences)).mean()
        assert (abs(otherwise - member["val_loss"]) > 1e-5) == (member in members[:2])
