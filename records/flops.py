"""The FLOPs of an entry, counted again: by its own source, for its own configuration, in a process that sees
nothing else (predictor.py says how). Nobody need believe the number that a log states; that the source counts
what it executes is for the harness, whose warm-up counts the matrix products (`executed_flops`)."""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from entry import DATASETS, Refused, need, parse_json, printable
from evidence import rows_of
from predictor import WAYS, confinement, environment, view

# Whole documents are set aside for `fitness_tokens`, so a few more tokens than are named.
TOLERANCE = 1e-3
PATIENCE = 120  # seconds

PROGRAM = """
import json, resource, sys
from types import SimpleNamespace
resource.setrlimit(resource.RLIMIT_DATA, (2 ** 34, 2 ** 34))
resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20))  # of what it prints
sys.path.insert(0, sys.argv[1])
import train_gpt
config, tokens, vocab_size, teams = json.loads(sys.argv[2])
c, team = train_gpt.Config(**config), SimpleNamespace(teams=teams)
schedule = lambda member: train_gpt.member_schedule(c, range(tokens), team, member)
members = range(config.get("members", 1))
print(json.dumps(float(sum(schedule(member).training_flops(vocab_size) for member in members))))
"""

def counted(sources, config, dataset, teams):
    """-> training FLOPs by the sources {name: text}; None where nothing confines their code."""
    tokens = DATASETS[dataset]["splits"]["train"]["tokens"] - config.get("fitness_tokens", 0)
    question = json.dumps([config, tokens, DATASETS[dataset]["vocab_size"], teams])
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as root:
        for name, text in sources.items():
            Path(folder, name).write_bytes(text)
        if not (way := confinement(folder, folder)):
            return None
        command = [*WAYS[way](view(folder, folder), root), sys.executable, "-I", "-B", "-c", PROGRAM]
        with open(Path(root, "said"), "w+") as said:
            try:
                done = subprocess.run([*command, folder, question], stdout=said, stderr=said,
                                      env=environment() | {"HOME": "/tmp"}, timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                raise Refused(f"its source counts FLOPs for more than {PATIENCE} seconds") from None
            said.seek(0)
            last = printable((said.read().strip() or "nothing").splitlines()[-1])[:200]
    need(done.returncode == 0, f"its source does not count its FLOPs: {last}")
    found = parse_json(last, "what its source counts")
    need(isinstance(found, float), f"its source does not count its FLOPs: {last}")
    return found

def check_flops(entry):
    """Those that the runs state are what their source counts, or less where a run was stopped early."""
    run = entry.runs[0]
    teams = 1 + max(row.get("team", 0) for row in rows_of(entry.files[run["metrics"]], entry.name))
    found = counted(entry.sources(), run["config"], run["data"]["name"], teams)
    if found is None:
        print(f"note: {entry.name}: its FLOPs are not counted again: neither bwrap nor unshare works here")
        return
    for one in entry.runs:
        early = any("stopped early" in reason for reason in one["violations"])
        stated = one["training_flops"]
        need((stated <= found if early else abs(stated - found) <= TOLERANCE * found),
             f"{entry.name}: seed {one['seed']} states {stated:.4g} training FLOPs, "
             f"its source counts {found:.4g}")
