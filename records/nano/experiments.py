"""
The runs behind nano's data efficiency, a queue: each is made once, and it may be stopped at any time.

    .venv/bin/python records/nano/experiments.py           what there is, and how many of its runs are done
    .venv/bin/python records/nano/experiments.py once      the plain model, one epoch of each amount of text
    .venv/bin/python records/nano/experiments.py often     the plain model, as many epochs as help it
    .venv/bin/python records/nano/experiments.py preset    the preset, on less text than it was made for
    … once --jobs 2                                        two runs at once, on half of the cores each

The plain model is a GPT without what the records have added (plain.json), trained by AdamW, and tuned anew
for each amount of text: from the best setting for the amount below, it goes along one axis of the grid after
the other until no neighbour has a lower val loss with seed 42. The best then gets two seeds more. To choose
by val flatters the plain model, so the efficiency that comes of it is too low rather than too high.

A run lies in runs/, named after its experiment, its text, the values of its axes and its seed. What is known
so far stands in baseline.json.
"""
import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.append(str(ROOT / "data"))

from shards import write_json  # noqa: E402 (found by the line above)

SEEDS = (42, 43, 44)
TEXT = {"nano0.1M": 100_000, "nano0.25M": 250_000, "nano0.5M": 500_000, "nano": 1_000_000,
        "nano1.4M": 1_400_000, "nano2M": 2_000_000, "nano2.79M": 2_790_000}
ONCE = {
    "lr_scale": (0.125, 0.25, 0.5, 1, 2, 4, 8),
    "lr_matrix": (0.00125, 0.0025, 0.005, 0.01, 0.02),  # beside those of embedding and head
    "batch_tokens": (1024, 2048, 4096, 8192, 16384),
    "n_embd": (32, 64, 96, 128, 192, 256, 384),
    "weight_decay": (0.01, 0.1, 1, 3, 10),
}
OFTEN = ONCE | {"epochs": (1, 2, 4, 6, 8, 12, 16, 24, 32), "dropout": (0.0, 0.1, 0.2, 0.3)}
START = {"lr_scale": 1, "lr_matrix": 0.005, "batch_tokens": 4096, "n_embd": 128, "weight_decay": 0.1}
PLAIN = ("--config", str(HERE / "plain.json"))


# ---- Runs --------------------------------------------------------------------------------------------------

class Queue:
    """The runs of one experiment, `jobs` at a time; it remembers and prints what came of them."""

    def __init__(self, kind, flags, jobs):
        self.kind, self.flags, self.known, self.code = kind, flags, {}, 0
        self.pool, share = ThreadPoolExecutor(jobs), max(1, os.cpu_count() // jobs)
        self.environment = os.environ | ({"OMP_NUM_THREADS": f"{share}"} if jobs > 1 else {})

    def run(self, name, flags):
        """(val loss, audit loss) of a run, made unless it is there; of one that diverges (inf, inf)."""
        folder = ROOT / "runs" / name
        if not (folder / "result.json").exists():
            goes_on = any(folder.glob("state/*"))
            how = ["--resume", name] if goes_on else [*self.flags, *flags, "--run-name", name]
            if not self.code:  # after one that was stopped no other begins
                self.code = subprocess.run([ROOT / "run.sh", "nano", *how], env=self.environment,
                                           stdout=subprocess.DEVNULL).returncode
            if self.code == 3:
                self.code = 0
                return math.inf, math.inf
            if self.code:  # it has said why
                raise SystemExit(self.code)
        result = json.loads((folder / "result.json").read_text())
        return result["val_loss"], result["audit_loss"]

    def losses(self, data, settings, seed=SEEDS[0]):
        """(val loss, audit loss) of the settings {field: value} on an amount of text."""
        name = "_".join([self.kind, data, *(f"{value:g}" for value in settings.values()), f"s{seed}"])
        if name not in self.known:
            flags = [f"--{field.replace('_', '-')}={value:g}" for field, value in settings.items()]
            self.known[name] = self.run(name, [*flags, f"--dataset={data}", f"--seed={seed}"])
            print(f"{self.known[name][0]:.4f}  {name}", flush=True)
        return self.known[name]

    def descend(self, data, start, axes):
        """The settings of which no neighbour on the grid, along any axis, has a lower val loss."""
        best, before = start, None
        while best != before:
            before = best
            for field, grid in axes.items():
                moved = True
                while moved:
                    place = grid.index(best[field])
                    beside = [value for value in grid[max(0, place - 1):place + 2] if value != best[field]]
                    near = [best, *(best | {field: value} for value in beside)]
                    val = [loss for loss, _ in self.pool.map(lambda at: self.losses(data, at), near)]
                    lowest = near[val.index(min(val))]
                    moved, best = lowest is not best, lowest
        return best

    def row(self, data, settings):
        """All seeds of the settings, for baseline.json."""
        val, audit = zip(*self.pool.map(lambda seed: self.losses(data, settings, seed), SEEDS))
        return {"tokens": TEXT[data], "settings": settings, "seeds": SEEDS, "val": val, "audit": audit}


# ---- Experiments -------------------------------------------------------------------------------------------

def plain(kind, axes, best, jobs):
    queue, rows = Queue(kind, PLAIN, jobs), []
    for data in TEXT:
        best = queue.descend(data, best, axes)
        rows.append(queue.row(data, best))
        write(kind, rows)

def preset(kind, jobs):
    queue = Queue(kind, (), jobs)
    write(kind, [queue.row(data, {}) for data in TEXT if TEXT[data] < TEXT["nano"]])

def write(kind, rows):
    path = HERE / "baseline.json"
    write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | {kind: rows})

EXPERIMENTS = {
    "once": lambda jobs: plain("once", ONCE, START, jobs),
    "often": lambda jobs: plain("often", OFTEN, START | {"epochs": 4, "dropout": 0.0}, jobs),
    "preset": lambda jobs: preset("preset", jobs),
}

def main():
    manual = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=manual)
    parser.add_argument("experiment", nargs="?", choices=EXPERIMENTS, help="none: says how far all are")
    parser.add_argument("--jobs", type=int, choices=range(1, 65), default=1, metavar="N",
                        help="runs at once (default: 1)")
    args = parser.parse_args()
    if not args.experiment:
        for kind in EXPERIMENTS:
            done = len(list((ROOT / "runs").glob(f"{kind}_nano*/result.json")))
            print(f"{kind:8}{done:4} runs are done")
        return
    for data in TEXT:
        if not (ROOT / "data" / data).exists():
            subprocess.run([ROOT / "run.sh", "data", data], check=True)
    try:
        EXPERIMENTS[args.experiment](args.jobs)
    except KeyboardInterrupt:  # which the runs got too; they save their states
        sys.exit("stopped; the same command goes on")

if __name__ == "__main__":
    main()
