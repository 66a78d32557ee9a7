"""The evidence of a run: its log and its metrics must tell the story that its result tells.

`check_log` reads log.txt, which holds the sources, the configuration, the machine, every step and evaluation
and the final table. `check_metrics` reads metrics.jsonl, one row a step and an evaluation, in full precision.
Whoever edits one number has to edit all of them alike; whoever does is caught only by a run of the same
sources.
"""

import math
import re
from typing import NamedTuple

from entry import DATASETS, SOURCES, TRACKS, Refused, need, parse_json, sources_of, unpack

# Untrained weights know nothing: their loss is ln(vocabulary), plus half the variance of the logits. The 42
# filed starts lie within 0.0004 of it; less by 0.01 needs knowledge, more by 1 logits of standard deviation
# 1.4.
START_BELOW, START_ABOVE = 0.01, 1.0
SECONDS = 0.051  # what is printed with one digit may be so far off

class Log(NamedTuple):
    """What a log.txt says: numbers as they were printed."""

    sources: dict  # {file name: bytes}
    machines: list  # (track, seed, ranks, the rest: name, dtype, torch) of every start
    configs: list
    starts: list  # losses before training
    steps: list  # (step from 1, train loss, seconds)
    epochs: list  # (epoch, step, val loss)
    table: dict  # label -> numbers, of the last table
    members: list  # (val loss, checkpoint, weight) of the last table
    executed: list  # FLOPs that matrix products took, as shares of those stated, at every start

TABLE = {"val": r"^val loss +([\d.]+) +\(([\d.]+) bits per byte\)$",
         "audit": r"^audit loss +([\d.]+) +\(([\d.]+) bits per byte\)$",
         "training": r"^training +([\d.]+) min of ([\d.]+) min in all$",
         "compute": r"^compute +(\S+) FLOPs, ([\d,]+) tokens, ([\d,]+) parameters$"}

def read_log(raw, who):
    sources, text = sources_of(raw, who)
    find = lambda pattern, part=text: re.findall(pattern, part, re.MULTILINE)
    at = text.rfind("\nval loss ")
    need(at >= 0, f"{who} has no final table; the run did not finish")
    end = text[at + 1 :]
    table = {}
    for label, pattern in TABLE.items():
        rows = find(pattern, end)
        need(len(rows) == 1, f"{who} has no line '{label}' in its final table")
        table[label] = [float(number.replace(",", "")) for number in rows[0]]
    return Log(sources, find(r"^slowrun (\w+), seed (\d+): (\d+) x (.*)$"),
               [parse_json(config, f"the config in {who}") for config in find(r"^config (\{.*\})$")],
               find(r"^start +val ([\d.]+) before training$"),
               find(r"^step +(\d+)/\d+ +train ([\d.]+) +([\d.]+) s\b"),
               find(r"^(?:epoch|look) +(\d+)/\d+ +step +(\d+) +(?:train [\d.]+ +)?val ([\d.]+)"), table,
               find(r"^  member +([\d.]+) +val loss of (\S+), weight ([\d.]+)$", end),
               find(r"^ +prepared in \d+ s; matrix products take ([\d.]+) of the FLOPs stated$"))

def same(printed, exact):
    """Is the number, printed to so many digits, the exact one?"""
    digits = len(printed.partition(".")[2])
    return abs(float(printed) - exact) <= 0.5001 * 10.0**-digits

def is_within(some, others, equal=lambda one, other: one == other):
    """Are these, in their order, among the others? Where not: the first that is not; else None."""
    rest = iter(others)
    return next((one for one in some if not any(equal(one, other) for other in rest)), None)

def check_start(loss, dataset, who):
    vocab_size = DATASETS[dataset]["vocab_size"]
    expected = math.log(vocab_size)
    need(expected - START_BELOW <= loss <= expected + START_ABOVE,
         f"{who} starts at loss {loss:.4f}; untrained weights know nothing, which costs "
         f"ln {vocab_size} = {expected:.4f}, at least {expected - START_BELOW:.4f}, "
         f"at most {expected + START_ABOVE:.4f}")

def check_log(log, run, who):
    """The log says what the result says; `log` is a Log, `run` the run's part of record.json."""

    def agree(condition, what, said, stated):
        need(condition, f"{who}: {what} is {said} in {run['log']}, {stated} in the result")

    for name, key in SOURCES.items():
        need((name in log.sources) == (key in run),
             f"{who}: the log and the result must both have {name}, or neither")
    need(log.machines and log.configs and log.starts and log.steps and log.epochs,
         f"{who}: {run['log']} lacks machine, config, start, steps or epochs; file it as the run wrote it")
    for track, seed, _, _ in log.machines:
        agree((track, seed) == (run["track"], str(run["seed"])), "the run", f"{track}, seed {seed}",
              f"{run['track']}, seed {run['seed']}")
    for config in log.configs:
        differs = [name for name in {*config, *run["config"]} if config.get(name) != run["config"].get(name)]
        agree(not differs, f"the configuration ({', '.join(sorted(differs)[:5])})", "another one", "not that")
    machine, (_, _, ranks, rest) = run["machine"], log.machines[-1]
    agree(int(ranks) == machine["count"] and rest.startswith(machine["name"])
          and rest.endswith(f", torch {machine['torch']}"), "the machine", f"{ranks} x {rest[:80]}",
          f"{machine['count']} x {machine['name']}, torch {machine['torch']}")
    table = log.table
    for split in ("val", "audit"):
        for said, key in zip(table[split], (f"{split}_loss", f"{split}_bpb")):
            agree(abs(said - run[key]) <= 5.1e-5, key, said, run[key])
    for said, key in zip(table["training"], ("train_seconds", "wall_seconds")):
        agree(abs(said - run[key] / 60) <= SECONDS, key.replace("_seconds", " minutes"), said,
              f"{run[key] / 60:.2f}")
    flops, tokens, parameters = table["compute"]
    agree(f"{flops:.4g}" == f"{run['training_flops']:.4g}", "training_flops", f"{flops:.4g}",
          f"{run['training_flops']:.4g}")
    if "executed_flops" in run:
        share = run["executed_flops"] / run["training_flops"]
        agree(log.executed and same(log.executed[-1], share), "executed_flops", log.executed, f"{share:.3f}")
    agree(tokens == run["tokens_seen"], "tokens_seen", f"{tokens:.0f}", run["tokens_seen"])
    agree(parameters == run["parameters"], "parameters", f"{parameters:.0f}", run["parameters"])
    members = [(m["checkpoint"], m["weight"], m["val_loss"]) for m in run["members"]]
    agree(
        len(members) == len(log.members)
        and all(
            name == said[1] and same(said[2], weight) and same(said[0], loss)
            for said, (name, weight, loss) in zip(log.members, members)
        ),
        "the list of members",
        "another one",
        "not that",
    )
    for start in log.starts:
        check_start(float(start), TRACKS[run["track"]]["dataset"], who)
    counted = [int(step) for step, _, _ in log.steps]
    need(all(step in (1, before + 1) or step <= before for before, step in zip(counted, counted[1:])),
         f"{who}: steps are missing in {run['log']}")

def rows_of(packed, what):
    """The rows of a run's metrics.jsonl, packed."""
    return [parse_json(line, what) for line in unpack(packed, what).splitlines()]

def check_metrics(packed, log, run, who):
    """metrics.jsonl, packed, agrees with the Log and with the result."""
    what = f"{who}: {run['metrics']}"
    rows = rows_of(packed, what)
    try:
        compare_metrics(rows, log, run, who)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refused(f"{what} has a row that no run writes ({error!r})") from None

def compare_metrics(rows, log, run, who):
    def agree(condition, what, said, stated):
        need(condition, f"{who}: {what} is {said} in its metrics, {stated} in the result")

    steps, evaluations = ([row for row in rows if row["kind"] == kind] for kind in ("step", "eval"))
    looks = [row for row in rows if row["kind"] in ("eval", "ensemble")]
    agree(len(looks) + 1 == run["val_evaluations"], "the number of evaluations", len(looks) + 1,
          run["val_evaluations"])
    agree("steps" not in run or len(steps) == run["steps"], "the number of steps", len(steps),
          run.get("steps"))
    for member in {row["member"] for row in steps}:
        own = [row["step"] for row in steps if row["member"] == member]
        need(own == list(range(len(own))), f"{who}: steps of member {member} are missing in its metrics")
    sizes = [run["config"][key] for key in ("batch_tokens", "batch_tokens_ends") if run["config"].get(key)]
    if sizes:
        agree(min(sizes) * len(steps) <= run["tokens_seen"] <= max(sizes) * len(steps),
              "the number of tokens", f"{len(steps)} steps of {' or '.join(map(str, sizes))}",
              run["tokens_seen"])
    for team in {row.get("team", 0) for row in rows}:
        clock = [row["seconds"] for row in steps if row.get("team", 0) == team]
        need(clock and clock[0] >= 0 and clock == sorted(clock),
             f"{who}: the seconds of its steps go backwards")
        need(clock[-1] <= run["train_seconds"] + SECONDS,
             f"{who}: its steps took {clock[-1]:.1f} seconds, the result states {run['train_seconds']:.1f}")
    clock = max(row["seconds"] for row in steps)
    agree(run["train_seconds"] - clock <= max(5, 0.02 * clock), "the time of all steps", f"{clock:.1f}",
          f"{run['train_seconds']:.1f}")
    final = [row for row in rows if row["kind"] == "final"]
    keys = [f"{split}_{what}" for split in ("val", "audit") for what in ("loss", "bpb")]
    agree(final and all(abs(final[-1][key] - run[key]) <= 1e-9 for key in keys), "the final score",
          final[-1]["val_loss"] if final else "not there", run["val_loss"])
    for row in evaluations:
        if row["step"] == 0:
            check_start(row["loss"], TRACKS[run["track"]]["dataset"], who)

    # The log holds the first team's rows; after a crash it holds some steps twice, of which the metrics keep
    # the last.
    first = [row for row in rows if not row.get("team")]
    told = [(row["step"] + 1, row["loss"], row["seconds"]) for row in first if row["kind"] == "step"]
    lost = is_within(
        told,
        log.steps,
        lambda row, said: (
            row[0] == int(said[0]) and same(said[1], row[1]) and abs(float(said[2]) - row[2]) <= SECONDS
        ),
    )
    need(lost is None, f"{who}: step {lost and lost[0]} of its metrics is not in its log")
    evaluated = [row for row in first if row["kind"] == "eval"]
    ends = [row for place, row in enumerate(evaluated) if row["step"]
            and not (place and all(row[key] == evaluated[place - 1][key] for key in ("member", "step")))]
    lost = is_within(ends, log.epochs,
                     lambda row, said: ((row["epoch"], row["step"]) == tuple(map(int, said[:2]))
                                        and same(said[2], row["loss"])))
    need(lost is None, f"{who}: epoch {lost and lost['epoch']} of its metrics is not in its log")

def losses_of_steps(log):
    """What no two runs have in common: the training loss of every step."""
    return tuple(loss for _, loss, _ in log.steps)

def check_segments(log, run, who):
    """
    Training time by segment: each on so many ranks of a machine that the log names; -> their GPU-seconds.
    """
    segments = run["segments"]
    need(segments, f"{who} has no segments: seconds, ranks and machine of each part of its training time")
    for segment in segments:
        need(segment["seconds"] >= 0, f"{who} has a segment of {segment['seconds']} seconds")
    seconds = sum(segment["seconds"] for segment in segments)
    spent = sum(segment["seconds"] * segment["ranks"] for segment in segments)
    need(abs(seconds - run["train_seconds"]) <= 1e-3 + 1e-6 * seconds,
         f"{who}: its segments make {seconds:.1f} seconds, train_seconds is {run['train_seconds']:.1f}")
    need(
        abs(spent - run["gpu_seconds"]) <= 1e-3 + 1e-6 * spent,
        f"{who}: its segments make {spent:.1f} seconds of all ranks, gpu_seconds is {run['gpu_seconds']:.1f}",
    )
    lost = is_within([(s["ranks"], s["machine"]["name"]) for s in segments], log.machines,
                     lambda segment, said: segment[0] == int(said[2]) and said[3].startswith(segment[1]))
    need(lost is None,
         f"{who}: no start in its log is that of a segment on {lost and lost[0]} x {lost and lost[1]}")
    return spent
