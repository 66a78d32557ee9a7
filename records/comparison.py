"""
`compare` and `runs`: what two methods differ in, document by document and line by line; what is in runs/.
"""

import ast
import contextlib
import json

import numpy as np

import changes
import curves
import stats
from entry import (
    ROOT,
    Refused,
    history,
    need,
    printable,
    read,
    read_json,
    read_text,
    why_unfinished,
)
from verdict import verdict_of
from words import beginnings

LISTED = 12  # changed fields that `compare` prints before it counts the rest


# ---- compare -----------------------------------------------------------------------------------------------

def compare(args):
    new, old = read(args.a), read(args.b)
    need(new.runs[0]["data"] == old.runs[0]["data"]
         and all(new.split(name).tokens.shape == old.split(name).tokens.shape for name in ("val", "audit")),
         "A and B were scored on different data; no comparison")
    need(args.documents >= 0, f"--documents {args.documents}: 0 or more")
    print(f"A: {new.label}, {new.seeds}\nB: {old.label}, {old.seeds}")
    for name in ("val", "audit"):
        print_losses(name, new, old)
    print("what differs, B -> A:")
    lines = changes.summary(new, old)
    print(*(f"  {line}" for line in lines[:LISTED]), sep="\n")
    if len(lines) > LISTED:
        print(f"  and {len(lines) - LISTED} more: ./run.sh diff {args.a} {args.b}")
    print_documents(new, old, args.documents)
    names = "_".join(entry.label.replace("/", "-").replace(",", "+")[-60:] for entry in (new, old))
    path = args.picture or ROOT / "runs" / f"compare_{names}.svg"
    draw(new, old, path)

def print_losses(name, new, old):
    a, b = new.split(name), old.split(name)
    verdict = verdict_of(new, old, "B", name, pool=history(new.track))
    draws = stats.bootstrap_gain(a, b)
    low, high = np.quantile(draws, (0.025, 0.975))
    print(f"{name}: A {stats.mean_loss(a):.5f}, B {stats.mean_loss(b):.5f}, A gains {verdict.gain:+.5f}")
    print(f"  over documents ± {stats.WIDE * verdict.se_doc:.5f}, bootstrap [{low:+.5f}, {high:+.5f}]; "
          f"A is better with probability {np.mean(draws > 0):.4f}")
    print(f"  and over seeds ± {verdict.half:.5f} (s = {verdict.s:.5f}, dof {verdict.dof}), "
          f"z = {verdict.z:.2f}; A is better with probability {stats.NORMAL.cdf(verdict.z):.4f}")

def print_documents(new, old, count):
    documents, nats, per_token = changes.moved_documents(new, old)
    words = beginnings(new.runs[0]["data"]) or [""] * new.docs["val_tokens"].size
    better = np.mean(nats > 0)
    print(f"A is better on {better:.1%} of {len(documents):,} val documents; those that moved most:")
    for place in [*range(len(documents))[:count], *range(len(documents))[count:][::-1][:count]]:
        print(f"  {documents[place]:>6}: {nats[place]:+9.2f} nats, {per_token[place]:+.4f} a token  "
              f"{printable(words[documents[place]][:44])}")

def curve(entry):
    """(steps, training losses, evaluated steps, val losses) of an entry's first run."""
    whole = curves.of_run(entry)
    losses = np.array([loss for _, loss in whole["step"]])
    return np.arange(1, len(losses) + 1), losses, *map(np.array, zip(*whole["eval"]))

def draw(new, old, path):
    import plots

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(plots.curves({f"A: {new.label}": curve(new), f"B: {old.label}": curve(old)}))
    except OSError as error:
        raise Refused(f"cannot write {path}: {error.strerror}") from None
    print(f"both curves: {path}")


# ---- runs --------------------------------------------------------------------------------------------------

def value_of(node, names):
    """The value of what a source writes as data: literals, dict(…), names of such data, one | another."""
    match node:
        case ast.Name():
            return names[node.id]
        case ast.Dict():
            return {
                value_of(key, names): value_of(value, names) for key, value in zip(node.keys, node.values)
            }
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return {keyword.arg: value_of(keyword.value, names) for keyword in node.keywords}
        case ast.BinOp(op=ast.BitOr()):
            return value_of(node.left, names) | value_of(node.right, names)
    return ast.literal_eval(node)

def presets(folder):
    """({field: default}, {track: its fields}) of the run's own source, which is read and not executed."""
    defaults, names = {}, {}
    for node in ast.parse(read_text(folder / "train_gpt.py")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # it is no data
                names[node.targets[0].id] = value_of(node.value, names)
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            defaults = {field.target.id: value_of(field.value, names) for field in node.body
                        if isinstance(field, ast.AnnAssign) and field.value is not None}
    return defaults, names["TRACKS"]

def unlike_preset(folder, track, config):
    """The fields in which a run differs from its track's preset; nothing where the source cannot be read."""
    try:
        defaults, tracks = presets(folder)
        preset = defaults | tracks[track]
    except (Refused, SyntaxError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    listed = lambda value: json.loads(json.dumps(value))  # tuples are lists in JSON
    return " ".join(f"{name}={value}" for name, value in config.items() if listed(preset.get(name)) != value)

def describe(folder):
    """(time of its start, val loss, the line) of a run folder."""
    if (folder / "result.json").exists():
        run, state = read_json(folder / "result.json"), "complete"
    else:
        run = read_json(folder / "run.json")
        state = ("unfinished, has a state" if any(folder.glob("state*/step_???????"))
                 else "died before a state")
    try:
        at = ((folder / "run.json" if (folder / "run.json").exists()
               else folder / "result.json").stat().st_mtime)
        started = read_json(folder / "run.json")["started"] if (folder / "run.json").exists() else at
        val, audit = run.get("val_loss"), run.get("audit_loss")
        losses = (f"val {val:.4f}  audit {audit:.4f}  {run['train_seconds'] / 60:6.1f} min" if val
                  else " " * 36)
        differs = unlike_preset(folder, run["track"], run["config"])
        return (started, val, (f"{folder.name:<32} {run['track']:<14} seed {run['seed']:<4} {losses}  {state}"
                               f"{'  ' if differs else ''}{differs[:160]}"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refused(f"{folder}: its record is damaged ({error!r})") from None

def list_runs(args):
    found, damaged = [], []
    folders = [path for path in sorted((ROOT / "runs").glob("[!.]*")) if path.is_dir()
               and not path.is_symlink()]
    for folder in folders:
        try:
            need((folder / "result.json").exists() or (folder / "run.json").exists(), why_unfinished(folder))
            found.append(describe(folder))
        except Refused as problem:
            damaged.append(f"{folder.name:<32} cannot be read: {printable(problem)}")
    by_val = lambda run: (run[1] is None, run[1])
    for _, _, line in sorted(found, key=by_val if args.sort == "val" else lambda run: run[0]):
        print(printable(line))
    print(*damaged, sep="\n" if damaged else "", end="\n" if damaged else "")
    if not folders:
        print("no runs yet; ./run.sh smoke makes one in a minute")
