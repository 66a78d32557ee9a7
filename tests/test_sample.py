"""sample.py: text and exports of real little runs, and of contestants made up for the purpose."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
import sample as s
import shards
from conftest import slow
from test_run import nursery, train  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent

T, BOS = 32, 4095
FILES = """train_gpt.py harness.py logbook.py sample.py records/tracks.json records/plots.py
    data/prepare.py data/shards.py""".split()
SIZES = {"train": 6_000, "val": 700, "audit": 700}
FLAGS = f"""--no-compile --dtype float32 --seq-len {T} --batch-tokens {8 * T} --n-embd 32 --max-steps 6
            --members 2 --average 1 --run-name two""".split()


# ---- Runs --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def project(tmp_path_factory, train):  # noqa: F811
    """A clone with a run of two members, trained on a little of nano's text."""
    root = tmp_path_factory.mktemp("project")
    for name in FILES:
        if (ROOT / name).exists():
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    nano, folder = ROOT / "data/nano", root / "data/nano"
    tokens, token_bytes = shards.read(nano / "train.bin"), np.fromfile(nano / "token_bytes.bin", dtype="u1")
    folder.mkdir()
    for split, size in SIZES.items():
        writer = shards.ShardWriter(folder / f"{split}.bin")
        writer.append(tokens[:size])
        writer.close()
    manifest = {"name": "nano", "source": "sotu", "revision": "1", "tokenizer": "gpt2", "vocab_size": BOS + 1}
    shards.write_folder_end(folder, manifest | {"bos_id": BOS, "splits": list(SIZES)}, token_bytes)
    outcome = train(root, "--track", "smoke", *FLAGS)
    assert outcome.codes == [0] and outcome.stderr == "", outcome.stderr
    assert all(map(str.startswith, outcome.stdout.splitlines()[-2:], s.PROMPTS))  # its last words
    return root

@pytest.fixture
def run(project, tmp_path):
    """A copy of the run that may be changed."""
    return shutil.copytree(project / "runs/two", tmp_path / "two")

def call(project, *arguments, **options):
    """sample.py of the clone as a user calls it, from another directory."""
    command = [sys.executable, project / "sample.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", **options)

@pytest.fixture
def inside(project, monkeypatch, capsys):
    """inside(*arguments) -> the same in this process, which has imported torch."""

    def inside(*arguments):
        monkeypatch.setattr(s, "ROOT", project)
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        code = prepare.launch(s.main)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)
    return inside

def complaint(result):
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert re.fullmatch("error: .*\n", result.stderr), result.stderr
    return result.stderr

def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

def said(*arguments, **options):
    return "".join(s.sample(*arguments, **options))


# ---- Text --------------------------------------------------------------------------------------------------

def test_greedy_text_is_what_the_predictor_predicts(project):
    """Beyond seq_len too, by a loop that fills up nothing."""
    model, tokenizer = s.load(project / "runs/two", "cpu")
    predictor = s.load_script(project / "runs/two").load_predictor(project / "runs/two", "cpu")
    ids = [BOS, *tokenizer.encode_ordinary("Fellow citizens")]
    start = len(ids)
    while len(ids) < start + T + 4:
        ids.append(int(predictor.logprobs(torch.tensor([ids[-T:]]))[0, -1].argmax()))
    assert BOS not in ids[start:]
    expected = tokenizer.decode_bytes(ids[start:]).decode(errors="replace")
    assert said(model, tokenizer, "Fellow citizens", T + 4, temperature=0) == expected
    assert said(model, tokenizer, "Fellow citizens", T + 4, top_k=1, seed=7) == expected
    lines = s.continuations(model, tokenizer)
    assert len(lines) == 2 and lines == s.continuations(model, tokenizer)
    assert all(line.startswith(prompt) and "\n" not in line for line, prompt in zip(lines, s.PROMPTS))

@pytest.mark.slow
def test_command_and_function_say_the_same(project):
    before = files_of(project / "runs/two")
    flags = f"--tokens {T + 4} --temperature 1.2 --top-k 500 --seed 3".split()
    done = call(project, "two", "--prompt", "It was naïve", *flags)
    assert done.returncode == 0, done.stderr
    model, tokenizer = s.load(project / "runs/two")
    text = said(model, tokenizer, "It was naïve", T + 4, temperature=1.2, top_k=500, seed=3)
    assert done.stdout == f"It was naïve{text}\n" and len(text) > T
    assert not text.startswith(said(model, tokenizer, "It was naïve", 9, temperature=1.2, top_k=500, seed=4))
    assert files_of(project / "runs/two") == before

CONTESTANT = '''
import torch
from harness import WORD

class Predictor:
    def logprobs(self, tokens):
        return torch.nn.functional.one_hot(torch.full_like(tokens, WORD), 4096).float().log_softmax(-1)

def load_predictor(run_dir, device):
    return Predictor()
'''

@pytest.fixture
def contestant(tmp_path):
    """make(word): the folder of a run whose own two sources predict nothing but that token."""
    def make(word):
        folder = tmp_path / f"word {word}"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "train_gpt.py").write_text(CONTESTANT)
        (folder / "harness.py").write_text(f"WORD = {word}\n")
        (folder / "result.json").write_text('{"config": {"seq_len": 8}}')
        return folder
    return make

def test_each_run_speaks_by_its_own_sources(contestant):
    """Two of them in one process, while another train_gpt is imported."""
    sys.modules["train_gpt"] = another = object()
    try:
        texts = [said(*s.load(contestant(word)), tokens=3, temperature=0) for word in (0, 1)]
        assert sys.modules["train_gpt"] is another
    finally:
        del sys.modules["train_gpt"]
    assert texts == ["!!!", '"""']


BYTES = prepare.gpt2(257)[0]

class Script:
    """A model that says these bytes, then BOS for ever."""

    def __init__(self, content):
        ranks = {BYTES.decode_single_token_bytes(i): i for i in range(256)}
        self.ids = [ranks[bytes([byte])] for byte in content]

    def next(self, tokens):
        token = (self.ids + [256] * 9)[len(tokens) - 1]
        return torch.full((257,), -torch.inf, dtype=torch.float64).index_fill(0, torch.tensor(token), 0.0)

def test_whole_characters():
    """A character of three tokens comes as one piece; what is no UTF-8 is replaced; BOS is the end."""
    assert list(s.sample(Script("a日é".encode()), BYTES)) == ["a", "日", "é"]
    assert list(s.sample(Script(b"a\xff\xe6\x97"), BYTES)) == ["a", "\ufffd", "\ufffd"]
    assert list(s.sample(Script("日".encode()), BYTES, tokens=2)) == ["\ufffd"]
    assert list(s.sample(Script(b""), BYTES)) == []

@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (2.0, 3), (1e-300, None), (1, 9)])
def test_draws_follow_the_distribution(temperature, top_k):
    """4,000 draws: each token within 4.5 standard errors of its probability, by the formula."""
    logprobs = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64).log()
    weights = (logprobs / temperature - logprobs.max() / temperature).exp()
    weights[top_k or 5:] = 0
    p = (weights / weights.sum()).numpy()
    generator = torch.Generator().manual_seed(0)
    draws = [s.choose(logprobs.clone(), temperature, top_k, generator) for _ in range(4000)]
    shares = np.bincount(draws, minlength=5) / 4000
    assert (abs(shares - p) <= 4.5 * np.sqrt(p * (1 - p) / 4000)).all()


SMALL = prepare.gpt2(BOS + 1)[0]

@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_any_prompt_can_be_said_in_nanos_vocabulary(text):
    assert SMALL.decode_bytes(SMALL.encode_ordinary(text)) == text.encode()


# ---- Export ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mix", ["probs", slow("logits"), "ngrams"])
def test_export_gives_the_same_probabilities(inside, run, tmp_path, mix):
    """Loaded by the code of its own README, in a process that knows nothing else."""
    path = run / "checkpoints/predictor.json"
    spec = json.loads(path.read_text())
    spec["members"][0]["weight"], spec["members"][1]["weight"] = 0.3, 0.7
    if mix == "ngrams":  # in place of the second model
        text = torch.from_numpy(shards.read(ROOT / "data/nano/train.bin")[:6_000].astype(np.int32))
        torch.save({"text": text}, run / "checkpoints/member_0001.pt")
        sha256 = prepare.file_sha256(run / "checkpoints/member_0001.pt")
        spec["members"][1] |= {"mode": None, "sha256": sha256}
        spec["config"] |= {"ngram": 4, "fitness_tokens": 1000}
    else:
        spec["config"]["mix"] = mix
    path.write_text(json.dumps(spec))
    done = inside("export", run, tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path}/out/\n"), done.stderr
    sources = [path.name for path in run.glob("*.py")]
    weights = ["member_0001.safetensors", "member_0002.safetensors"]
    assert files_of(tmp_path / "out") == sorted(["README.md", "config.json", *sources, *weights])
    tokens = torch.tensor([[BOS, *range(T - 1)], [BOS, *range(500, 500 + T - 1)]])
    code = re.search("```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)[1]
    code += f"torch.save(logprobs(torch.tensor({tokens.tolist()})), 'said.pt')\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", check=True, stdout=subprocess.DEVNULL)
    found = torch.load(tmp_path / "out/said.pt", weights_only=True)
    expected = s.load_script(run).load_predictor(run, "cpu").logprobs(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)

def test_export_is_whole_or_nothing(inside, run):
    before = files_of(run)
    weights = sorted((run / "checkpoints").glob("*.pt"))[-1]
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "missing or damaged" in complaint(inside("export", run))
    assert files_of(run) == before
    weights.write_bytes(content)
    (run / "export.partial").mkdir()  # what a crash left behind
    assert inside("export", run).returncode == 0
    assert "exists already" in complaint(inside("export", run))
    assert not (run / "export.partial").exists()


# ---- Mistakes ----------------------------------------------------------------------------------------------

MISTAKES = [
    ([], "required: RUN"),
    (["nothing"], "there is no run nothing; ./run.sh runs"),
    (["two", "--temperature", "-1"], "'-1' is not a number from 0"),
    (["two", "--temperature", "nan"], "is not a number from 0"),
    (["two", "--tokens", "0"], "is not a whole number from 1"),
    (["two", "--top-k", "x"], "is not a whole number from 1"),
    (["two", "--seed", str(1 << 64)], "is not a whole number from 0"),
    (["export"], "required: RUN"),
    (["export", "two", "/proc/nowhere"], "/proc/nowhere.partial: "),
]

@pytest.mark.parametrize("arguments, says", MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes(project, inside, arguments, says):
    before = files_of(project / "runs")
    assert says in complaint(inside(*arguments))
    assert files_of(project / "runs") == before

def test_a_run_that_cannot_speak(inside, run):
    shutil.rmtree(run / "checkpoints")
    assert "keeps no checkpoints" in complaint(inside(run))
    (run / "checkpoints").mkdir()
    (run / "result.json").unlink()
    assert "has no checkpoint yet" in complaint(inside(run))

def test_a_closed_pipe_ends_it_quietly(project):
    command = f'"{sys.executable}" "{project}/sample.py" two --prompt Hm --tokens 99 | head -c 1'
    done = subprocess.run(["bash", "-c", command], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"H", b"")
