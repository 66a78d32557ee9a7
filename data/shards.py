"""
The token-file format: write, read, verify.

A dataset is a folder of `train.bin`, `val.bin`, `audit.bin` (nano also has `reserve.bin`), `token_bytes.bin`
and `manifest.json`. A `.bin` is the llm.c format: a header of 256 little-endian int32 (magic 20240520,
version 1, number of tokens, zeros), then the tokens as little-endian uint16. Every document starts with the
BOS token, the only marker of a document. `token_bytes.bin` is one uint8 per token id: how many bytes of text
it stands for, 0 for BOS.

The manifest says for every split how many tokens and documents it has and the sha256 of its raw token bytes
(without the header), so two datasets are the same exactly when their digests are. All that a user can get
wrong raises `DataError`, whose text is one line: what is wrong, and where there is one, the command that
mends it.
"""
import hashlib
import json
import os
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER = 256  # int32 words
HEADER_BYTES = 4 * HEADER
TOKEN = np.dtype("<u2")
BLOCK = 1 << 22  # tokens looked at together: bounds the memory of every pass over a split to tens of MB

class DataError(Exception):
    """A dataset that is missing, damaged or not what it says; the text is a single line for the user."""


# ---- Write -------------------------------------------------------------------------------------------------

class ShardWriter:
    """
    Appends tokens to one `.bin`; `close` writes the header, so an unfinished file is never mistaken for a
    finished one. `keep` is the number of tokens to keep of a file that is already there: what was written
    after them is cut away, which is how an interrupted build continues.
    """

    def __init__(self, path, keep=0):
        self.path = Path(path)
        self.tokens = keep
        self.file = open(path, "r+b" if keep else "w+b")  # noqa: SIM115 (`close` closes it)
        self.file.write(bytes(HEADER_BYTES))
        end = HEADER_BYTES + TOKEN.itemsize * keep
        assert self.file.seek(0, os.SEEK_END) >= end, f"{path} is shorter than what is to be kept"
        self.file.seek(end)
        self.file.truncate()

    def append(self, tokens):
        """tokens: array of uint16 (n,)"""
        assert tokens.dtype == TOKEN and tokens.ndim == 1
        self.file.write(tokens.tobytes())
        self.tokens += len(tokens)

    def sync(self):
        """After this the tokens appended so far survive a crash of the machine."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self):
        header = np.zeros(HEADER, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.tokens
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.sync()
        self.file.close()

def write_file(path, content):
    """Writes bytes so that the file is there whole or not at all, whenever the machine stops."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

def write_json(path, value):
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())

def write_folder_end(folder, manifest, token_bytes):
    """
    Completes a dataset folder whose splits are written and closed: `token_bytes.bin`, and last the manifest,
    with the measured row of each split named in `manifest["splits"]`. Returns the manifest.

    token_bytes: uint8 (vocab_size,)
    """
    folder = Path(folder)
    assert token_bytes.dtype == np.uint8 and token_bytes.shape == (manifest["vocab_size"],)
    write_file(folder / "token_bytes.bin", token_bytes.tobytes())
    splits = {name: describe(read(folder / f"{name}.bin"), manifest["bos_id"]) for name in manifest["splits"]}
    digest = hashlib.sha256(token_bytes.tobytes()).hexdigest()
    manifest = {**manifest, "splits": splits, "token_bytes_sha256": digest}
    write_json(folder / "manifest.json", manifest)
    return manifest


# ---- Read --------------------------------------------------------------------------------------------------

def read(path):
    """
    The tokens of one `.bin` as a memory map, uint16 (n,). Raises DataError when the file is missing, is no
    token file, or is not as long as its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is missing")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise DataError(f"{path} is truncated: {size} bytes are less than its header of {HEADER_BYTES}")
    magic, version, count = (int(word) for word in np.fromfile(path, dtype="<i4", count=3))
    if magic != MAGIC:
        raise DataError(f"{path} is no token file: its magic number is {magic}, not {MAGIC}")
    if version != VERSION:
        raise DataError(f"{path} has version {version} of the format; this is version {VERSION}")
    expected = HEADER_BYTES + TOKEN.itemsize * count
    if count < 1 or size != expected:
        what = "truncated" if size < expected else "too long"
        raise DataError(f"{path} is {what}: {size:,} bytes, its header says {expected:,} ({count:,} tokens)")
    # Mode c, in which writes stay in memory, and not r: torch warns of arrays that it could not write to.
    return np.memmap(path, dtype=TOKEN, mode="c", offset=HEADER_BYTES, shape=(count,))

def blocks(tokens):
    """The tokens in consecutive arrays of at most BLOCK."""
    return (np.asarray(tokens[start:start + BLOCK]) for start in range(0, len(tokens), BLOCK))

def describe(tokens, bos_id):
    """{"tokens", "documents", "sha256"}: a split's row of the manifest, measured."""
    digest = hashlib.sha256()
    documents = 0
    for block in blocks(tokens):
        digest.update(block.tobytes())
        documents += int(np.count_nonzero(block == bos_id))
    return {"tokens": len(tokens), "documents": documents, "sha256": digest.hexdigest()}

def document_starts(tokens, bos_id):
    """int64 (documents,): where each document's BOS stands."""
    found, offset = [], 0
    for block in blocks(tokens):
        found.append(np.flatnonzero(block == bos_id) + offset)
        offset += len(block)
    return np.concatenate(found).astype(np.int64)


# ---- Verify ------------------------------------------------------------------------------------------------

def read_manifest(folder, name="manifest.json"):
    """The manifest of a dataset folder, as a dict. Raises DataError when it is missing or unreadable."""
    path = Path(folder) / name
    if not path.is_file():
        raise DataError(f"{folder} holds no dataset: {name} is missing")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for field in ("name", "source", "revision", "vocab_size", "bos_id", "splits", "token_bytes_sha256"):
            manifest[field]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    return manifest

def verify_splits(folder, manifest):
    """
    Checks each split of the manifest: header and length, BOS at its start, every token id, the number of
    documents and the digest. The first thing found wrong raises DataError. The digest comes last because the
    other checks say more.
    """
    vocab_size, bos_id = manifest["vocab_size"], manifest["bos_id"]
    for name, row in manifest["splits"].items():
        path = Path(folder) / f"{name}.bin"
        tokens = read(path)
        if len(tokens) != row["tokens"]:
            raise DataError(f"{path} has {len(tokens):,} tokens, the manifest says {row['tokens']:,}")
        if tokens[0] != bos_id:
            raise DataError(f"{path} starts with token {tokens[0]}: BOS ({bos_id}) is missing")
        largest = max(int(block.max()) for block in blocks(tokens))
        if largest >= vocab_size:
            raise DataError(f"{path} holds token id {largest}, beyond the vocabulary of {vocab_size:,}")
        found = describe(tokens, bos_id)
        if found["documents"] != row["documents"]:
            raise DataError(f"{path} has BOS at {found['documents']:,} document starts, "
                            f"the manifest says {row['documents']:,}")
        if found["sha256"] != row["sha256"]:
            raise DataError(f"{path} is damaged: sha256 {found['sha256']}, the manifest says {row['sha256']}")

def verify(folder):
    """Checks a dataset folder against its manifest, which it returns: every split, and token_bytes.bin."""
    manifest = read_manifest(folder)
    verify_splits(folder, manifest)
    path = Path(folder) / "token_bytes.bin"
    if not path.is_file():
        raise DataError(f"{path} is missing")
    if hashlib.sha256(path.read_bytes()).hexdigest() != manifest["token_bytes_sha256"]:
        raise DataError(f"{path} is damaged: its sha256 is not the manifest's")
    return manifest
