"""Entries of the leaderboard and runs, read as what a stranger has sent.

An `Entry` is runs of one method that differ in their seed: a folder records/<track>/<NN>_<slug>/, or run
folders that may become one. Whatever is wrong with a file raises `Refused`, whose text is one line for the
user. Files have a largest size and are no links; JSON holds no NaN, no key twice; arrays are measured by
their headers before they are read, and nothing of an entry is executed.
"""

import functools
import gzip
import hashlib
import io
import json
import math
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import jsonschema
import numpy as np

import stats

RECORDS = Path(__file__).resolve().parent
ROOT = RECORDS.parent
SPLITS = ("val", "audit")
MB = 2**20
LARGEST = {".json": 8 * MB, ".md": MB, ".diff": 8 * MB, ".npz": 64 * MB, ".txt": 64 * MB, ".gz": 64 * MB,
           ".jsonl": 512 * MB, ".py": 4 * MB, ".sha256": MB}
LARGEST_ARRAY = 256 * MB  # of doc_losses.npz, unpacked
LARGEST_METRICS = 512 * MB  # of metrics.jsonl.gz, unpacked

class Refused(Exception):
    """What is wrong and what mends it, in one line for the user."""

def need(condition, message):
    if not condition:
        raise Refused(message)

# {name: row}: what a track trains on, its cap, the seeds of a record; `board`: the leaderboard that it
# enters.
TRACKS = json.loads((RECORDS / "tracks.json").read_text())
DATASETS = json.loads((ROOT / "data" / "tokens.json").read_text())
BOARDS = {name: row for name, row in TRACKS.items() if row["board"] == name}


# ---- Files -------------------------------------------------------------------------------------------------

def sha256(data):
    return hashlib.sha256(data).hexdigest()

def printable(text):
    """One line that can do nothing to a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))

def read_bytes(path):
    need(not path.is_symlink(), f"{path} is a link; put the file itself there")
    need(path.is_file(), f"{path} is missing; name a finished run folder, or restore the entry")
    limit, size = LARGEST[path.suffix], path.stat().st_size
    need(size <= limit, f"{path} has {size / MB:.0f} MB; at most {limit // MB} are read")
    return path.read_bytes()

def read_text(path):
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is no UTF-8 text: {error}") from None

def parse_json(text, what):
    def number(digits):
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{digits[:40]} is no finite number")
        return value

    def pairs(items):
        if len(found := dict(items)) < len(items):
            raise ValueError("a key occurs twice")
        return found

    try:
        return json.loads(text, parse_constant=number, parse_float=number, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what} is no JSON: {error}") from None

def read_json(path):
    return parse_json(read_bytes(path), path)

def read_array(file, name):
    """An .npy file of numbers, by its header: never more than that says, and no objects."""
    size, limit = file.getinfo(name).file_size, LARGEST_ARRAY
    with file.open(name) as stream:
        raw = stream.read(limit + 1)
    if len(raw) > limit or len(raw) != size:
        raise ValueError(f"{name} is larger than it says, or than {limit // MB} MB")
    start = io.BytesIO(raw)
    if np.lib.format.read_magic(start) != (1, 0):
        raise ValueError(f"{name} is of another version of the format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(start, max_header_size=1000)
    if dtype.str not in ("<f8", "<i8", "<i4", "<u4") or fortran or not 1 <= len(shape) <= 2:
        raise ValueError(f"{name} holds no plain array of numbers")
    data = raw[start.tell() :]
    if min(shape) < 1 or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} does not have the size that its shape says")
    return np.frombuffer(data, dtype).reshape(shape)

def read_docs(path):
    """
    doc_losses.npz: {"val_loss": (D,) or (seeds, D) nats, "val_tokens": (D,), "val_bytes": (D,), and of audit}
    """
    keys = [f"{split}_{what}" for split in SPLITS for what in ("loss", "tokens", "bytes")]
    try:
        with zipfile.ZipFile(io.BytesIO(read_bytes(path))) as file:
            if sorted(file.namelist()) != sorted(f"{key}.npy" for key in keys):
                raise ValueError(f"it holds {', '.join(file.namelist()[:8])}")
            return {key: read_array(file, f"{key}.npy") for key in keys}
    except (ValueError, EOFError, KeyError, SyntaxError, NotImplementedError, zlib.error, RuntimeError,
            zipfile.BadZipFile) as error:
        raise Refused(f"{path} is no file of per-document losses: {error}") from None

def unpack(packed, what):
    """The text of a .gz, no longer than LARGEST_METRICS."""
    try:
        with gzip.open(io.BytesIO(packed)) as stream:
            raw = stream.read(LARGEST_METRICS + 1)
        need(len(raw) <= LARGEST_METRICS, f"{what} unpacks to more than {LARGEST_METRICS // MB} MB")
        return raw.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise Refused(f"{what} is no gzip of text: {error}") from None

def check_schema(name, value, definition):
    schema = read_json(RECORDS / "record.schema.json")
    if definition == "result":
        schema = {"$ref": "#/$defs/result", "$defs": schema["$defs"]}
    for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
        where = ".".join(str(step) for step in ["", *error.absolute_path])
        raise Refused(f"{name}{where}: {error.message[:200]} (records/record.schema.json)")


# ---- Entries -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Entry:
    """Runs of one method with different seeds: an entry of the leaderboard, or what may become one."""

    name: str  # its folder, for messages
    record: dict  # record.json; of run folders only `track` and `runs`
    docs: dict  # doc_losses.npz, losses (seeds, D)
    files: dict  # file name -> bytes: the logs and, packed, the metrics
    old: bool = False  # filed before there was a harness.py, as before_harness.sha256 has it
    extra: dict = field(default_factory=dict)  # what belongs to no record: the folders of runs

    @property
    def runs(self):
        return self.record["runs"]

    @property
    def track(self):
        return self.record["track"]

    @property
    def number(self):
        return self.record["number"]

    @property
    def kind(self):
        return self.record["kind"]

    @property
    def seeds(self):
        return f"{len(self.runs)} seed{'s' * (len(self.runs) > 1)}"

    @property
    def filed(self):
        """It is an entry, and has a number; or else runs of one's own."""
        return "number" in self.record

    @property
    def label(self):
        """For people: nano/9, or the names of the runs."""
        runs = ",".join(folder.name for folder in self.extra.get("folders", ()))
        return f"{self.track}/{self.number}" if self.filed else runs

    @property
    def folder(self):
        return f"{self.number:02d}_{self.record['slug']}"

    @property
    def place(self):
        """Where it belongs, from the root of the repository."""
        return f"records/{self.track}/{self.folder}"

    def split(self, name):
        return stats.Split(self.docs[f"{name}_loss"], self.docs[f"{name}_tokens"])

    def sources(self):
        """{file name: text} of what its first run ran."""
        return sources_of(self.files[self.runs[0]["log"]], f"{self.name}/{self.runs[0]['log']}")[0]

def board_of(track, who):
    need(track in TRACKS, f"{who} is of track {track}, which does not exist; there are {', '.join(TRACKS)}")
    return TRACKS[track]["board"]

# The sources that a run holds, by the field of its result with their digest.
SOURCES = {"train_gpt.py": "source_sha256", "harness.py": "harness_sha256", "logbook.py": "logbook_sha256"}
SOURCE = re.compile(rb"source (\w+\.py) (\d{1,8}) bytes sha256 ([0-9a-f]{64})\n")

def sources_of(log, who):
    """({file name: bytes}, the text below them) of a log, which begins with the sources that ran."""
    found, at = {}, 0
    for name in SOURCES:
        header = SOURCE.match(log, at)
        if header and header[1].decode() == name:
            text = log[header.end() : header.end() + int(header[2])]
            need(sha256(text) == header[3].decode(),
                 f"{who}: its {name} is not the one whose digest it states")
            found[name], at = text, header.end() + len(text) + 1
    need("train_gpt.py" in found, f"{who} doesn't begin with the source of train_gpt.py; run it again")
    return found, log[at:].decode(errors="replace")

def pack_metrics(folder):
    """The rows of metrics.jsonl, then with "team": K those of metrics_K.jsonl, as the bytes of a gzip."""
    lines, team = [], 0
    while (path := folder / f"metrics{f'_{team}' * (team > 0)}.jsonl").exists():
        for row in (parse_json(line, path) for line in read_text(path).split("\n") if line):
            need(isinstance(row, dict), f"{path} has a row that no run writes")
            lines.append(json.dumps(row | ({"team": team} if team else {})))
        team += 1
    need(team, f"{folder}/metrics.jsonl is missing; it belongs to the evidence of a run")
    return gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0)

def checkpoints_of(folder, result):
    """{name: sha256} of the members of the predictor, by what the run wrote beside each."""
    found = {}
    for name in (member["checkpoint"] for member in result["members"]):
        need(re.fullmatch(r"[\w.-]{1,100}", name), f"{folder}: {name} is no name of a checkpoint")
        record = read_json((folder / "checkpoints" / name).with_suffix(".json"))
        need(isinstance(record, dict) and record.get("checkpoint") == name and "sha256" in record,
             f"{folder}/checkpoints: the record of {name} is damaged")
        path = folder / "checkpoints" / name
        if path.exists():
            digest = sha256(np.memmap(path, mode="r"))  # many gigabytes
            need(digest == record["sha256"], f"{path} does not have the digest that was written beside it")
        found[name] = record["sha256"]
    return found

def why_unfinished(folder):
    """What to say of a run folder without result.json."""
    if any(folder.glob("state*/step_???????")):
        return f"{folder} is not finished; go on with ./run.sh TRACK --resume {folder.name}"
    if (folder / "run.json").exists():
        return f"{folder} ended before its first state; start it again"
    return f"{folder}/result.json is missing; name a finished run (./run.sh runs lists them) or an entry"

def read_result(folder):
    need((folder / "result.json").exists(), why_unfinished(folder))
    result = read_json(folder / "result.json")
    check_schema(folder / "result.json", result, "result")
    return result

def read_runs(folders, whole=False):
    """
    The Entry that run folders make: runs of one script and one config, each with another seed, in their
    order. `whole`: with the evidence that an entry needs, the metrics and the digests of the checkpoints.
    """
    found = sorted(((read_result(folder), folder) for folder in map(Path, folders)),
                   key=lambda run: run[0]["seed"])
    results, docs, files, (first, _) = [], [], {}, found[0]
    for result, folder in found:
        seed = f"_seed{result['seed']}" if len(found) > 1 else ""
        log, metrics = f"log{seed}.txt", f"metrics{seed}.jsonl.gz"
        need(log not in files,
             f"{folder}: seed {result['seed']} occurs twice; runs must differ in their seed")
        for key in ("track", "config", *SOURCES.values(), "data"):
            need(result.get(key) == first.get(key),
                 f"{folder}: its {key} is not that of the first run; only the seed may differ")
        files[log] = read_bytes(folder / "log.txt")
        results.append({**result, "log": log, "log_sha256": sha256(files[log])})
        if whole:
            files[metrics] = pack_metrics(folder)
            results[-1] |= {"metrics": metrics, "metrics_sha256": sha256(files[metrics]),
                            "checkpoints": checkpoints_of(folder, result)}
        docs.append(read_docs(folder / "doc_losses.npz"))
        need(all(np.array_equal(docs[-1][key], docs[0][key]) for key in docs[0] if not key.endswith("_loss")),
             f"{folder}: other tokens were scored than in the first run")
        need(all(docs[-1][f"{split}_loss"].shape == docs[-1][f"{split}_tokens"].shape for split in SPLITS),
             f"{folder}: the arrays of doc_losses.npz don't fit each other")
    joined = dict(docs[0])
    for split in SPLITS:
        joined[f"{split}_loss"] = np.stack([one[f"{split}_loss"] for one in docs])
    name = ",".join(str(folder) for folder in folders)
    return Entry(name, {"track": board_of(first["track"], name) or first["track"], "runs": results}, joined,
                 files, extra={"folders": [folder for _, folder in found]})

@functools.cache
def before_harness():
    """
    {"<track>/<NN>_<slug>": sha256 of record.json} of the entries that were filed before harness.py was there.
    """
    lines = read_text(RECORDS / "before_harness.sha256").split("\n")
    return {
        place.removesuffix("/record.json"): digest
        for digest, place in (line.split() for line in lines if line)
    }

def read_record(folder):
    folder = Path(folder)
    need(not folder.is_symlink(), f"{folder} is a link; put the folder itself there")
    record = read_json(folder / "record.json")
    check_schema(folder / "record.json", record, "record")
    files = {}
    for run in record["runs"]:
        for what in ("log", "metrics"):
            if name := run.get(what):
                need(name not in files, f"{folder}: {name} belongs to two runs")
                files[name] = read_bytes(folder / name)
                need(sha256(files[name]) == run[f"{what}_sha256"],
                     f"{folder}/{name} was changed since; restore it")
    docs = folder / "doc_losses.npz"
    need(sha256(read_bytes(docs)) == record["doc_losses_sha256"], f"{docs} was changed since; restore it")
    name = "/".join(folder.resolve().parts[-2:])
    old = before_harness().get(name) == sha256(read_bytes(folder / "record.json"))
    return Entry(str(folder), record, read_docs(docs), files, old)

def locate(argument):
    """The folder that is meant by a path, the name of a run, or an entry's track/NN_slug or track/N."""
    for path in (Path(argument), ROOT / argument, ROOT / "runs" / argument, RECORDS / argument):
        if path.is_dir() and (path / "record.json").exists() | (path / "result.json").exists():
            return path
    if (match := re.fullmatch(r"(?:records/)?(\w+)/(\d{1,2})/?", argument)) and (
        found := sorted((RECORDS / match[1]).glob(f"{int(match[2]):02d}_*"))
    ):
        return found[0]
    path = next((path for path in (Path(argument), ROOT / "runs" / argument) if path.is_dir()), None)
    raise Refused(
        why_unfinished(path)
        if path
        else f"there is no run or entry {argument}; name one as ./run.sh runs lists it, or as nano/9"
    )

def read(argument):
    """
    The Entry that is meant on the command line: an entry, or runs (seeds of one method) joined by commas.
    """
    folders = [locate(name) for name in argument.split(",")]
    filed = [(folder / "record.json").exists() for folder in folders]
    need(not any(filed) or len(folders) == 1,
         f"{argument}: an entry has all its seeds; only runs are joined by commas")
    return read_record(folders[0]) if filed[0] else read_runs(folders)


# ---- History -----------------------------------------------------------------------------------------------

def folders_of(track):
    return sorted((RECORDS / track).glob("[0-9][0-9]_*"))

@functools.cache
def attempts(track):
    """[Entry or Refused] of the track's folders."""

    def attempt(folder):
        try:
            return read_record(folder)
        except Refused as problem:
            return problem

    return list(map(attempt, folders_of(track)))

def history(track):
    """The track's entries that can be read, oldest first; `unreadable` has what is wrong with the others."""
    return [entry for entry in attempts(track) if isinstance(entry, Entry)]

def unreadable():
    return [str(problem) for track in BOARDS for problem in attempts(track) if isinstance(problem, Refused)]

def before(entry):
    return [old for old in history(entry.track) if old.number < entry.number]

def stood(entries):
    """Those that the others had to beat, each until the next: the records, before them the baselines."""
    kinds = [entry.kind for entry in entries]
    start = kinds.index("record") if "record" in kinds else len(kinds)
    return [entry for place, entry in enumerate(entries) if kinds[place] == "record"
            or kinds[place] == "baseline" and place < start]
