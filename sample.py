"""
Text from a trained run, and its weights for other programs.

    ./run.sh sample RUN                                  a document from its beginning
    ./run.sh sample RUN --prompt "Fellow citizens"       what follows these words
    ./run.sh sample RUN --temperature 0                  always the likeliest token
    ./run.sh export RUN [DIR]                            safetensors, config.json and how to load them

RUN is the name of a run or the path of its folder. What speaks is the run's final predictor, a mixture
included. It is loaded by the run's own copy of train_gpt.py, which is executed: look at a stranger's first.
In a notebook three lines do the same:

    from sample import load, sample
    model, tokenizer = load("RUN")
    print("".join(sample(model, tokenizer, "Fellow citizens", tokens=100, temperature=0.8)))

Nothing of the context is kept between two tokens: each one costs a forward pass over all before it, and of a
mixture one for each member. `export` copies the weights as they are used, one file for each member, with the
sources that define the model.
"""
import argparse
import codecs
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
MODULES = "train_gpt", "harness", "logbook"  # the sources of a run
sys.path.append(str(ROOT / "data"))

import prepare  # noqa: E402
import shards  # noqa: E402
from shards import DataError  # noqa: E402

PROMPTS = "The people of the United States", "It is the first time that"  # of `continuations`


# ---- The run -----------------------------------------------------------------------------------------------

class Model:
    """A run's predictor, asked for one token at a time."""

    def __init__(self, predictor, seq_len, device):
        self.predictor, self.seq_len, self.device = predictor, seq_len, device

    @torch.no_grad()
    def next(self, tokens):
        """
        ids of a text -> log-probabilities (V,) float64 of what follows, from the last seq_len of them. They
        are filled up to a power of two, which changes nothing in a causal model: on a GPU every new length
        costs.
        """
        tokens = tokens[-self.seq_len:]
        length = min(self.seq_len, 1 << (len(tokens) - 1).bit_length())
        filled = torch.tensor([tokens + [0] * (length - len(tokens))], device=self.device)
        return self.predictor.logprobs(filled)[0, len(tokens) - 1].double().cpu()

def find_run(run):
    """The folder of a run, by its name or path."""
    for folder in (Path(run), ROOT / "runs" / run):
        if (folder / "train_gpt.py").is_file():
            if not (folder / "checkpoints").is_dir():
                raise DataError(f"{folder} keeps no checkpoints; name the run in runs/ that it came from")
            return folder.resolve()
    raise DataError(f"there is no run {run}; ./run.sh runs lists them")

def load_script(folder):
    """Imports a run's own train_gpt.py and what lies beside it, and leaves no trace in the folder."""
    others = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return importlib.import_module("train_gpt")
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes
        sys.modules.update(others)

def settings_of(folder):
    """The configuration of a run, from its result or, before there is one, from its checkpoints."""
    for path in (folder / "result.json", folder / "checkpoints/predictor.json"):
        if path.is_file():
            return json.loads(path.read_text())["config"]
    raise DataError(f"{folder.name} has no checkpoint yet; a run writes the first at the end of an epoch")

def load(run, device=None):
    """
    -> (Model, tokenizer) of a run, by its name or path; on a GPU if there is one. The tokenizer is the one
    that made the dataset, GPT-2's cut to the size of the predictor's vocabulary.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = find_run(run)
    seq_len = settings_of(folder)["seq_len"]
    model = Model(load_script(folder).load_predictor(folder, device), seq_len, device)
    vocab_size = len(model.next([0]))
    if not 256 < vocab_size <= prepare.GPT2_VOCAB:
        raise DataError(f"{folder.name} has {vocab_size:,} tokens, which no vocabulary cut from GPT-2's has")
    return model, prepare.gpt2(vocab_size)[0]


# ---- Text --------------------------------------------------------------------------------------------------

def choose(logprobs, temperature, top_k, generator):
    """A token drawn from log-probabilities (V,) sharpened by a temperature; 0: the likeliest."""
    if temperature == 0:
        return int(logprobs.argmax())
    scaled = (logprobs - logprobs.max()) / temperature
    if top_k:
        scaled[scaled < scaled.topk(min(top_k, len(scaled))).values[-1]] = -torch.inf
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))

def sample(model, tokenizer, prompt="", tokens=256, temperature=0.8, top_k=None, seed=0):
    """
    Yields the text that follows the prompt at the beginning of a document, as pieces of whole characters,
    until the document ends or has so many tokens more. The same arguments give the same text.

    temperature: from 0, always the likeliest token, to 1, as the model predicts, and beyond; top_k: tokens to
    choose from, None for all
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end in the middle of a character
    ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]
    for _ in range(tokens):
        token = choose(model.next(ids), temperature, top_k, generator)
        if token == tokenizer.eot_token:
            break
        ids.append(token)
        if text := decoder.decode(tokenizer.decode_single_token_bytes(token)):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text

def continuations(model, tokenizer, tokens=24):
    """Two lines that show at a glance what a model has learnt: PROMPTS and the likeliest words after them."""
    lines = (prompt + "".join(sample(model, tokenizer, prompt, tokens, temperature=0)) for prompt in PROMPTS)
    return [" ".join(line.split()) for line in lines]


# ---- Export ------------------------------------------------------------------------------------------------

MANUAL = """\
# {run}

The final predictor of a Slowrun run: {count} of `safetensors`, `config.json` with everything else, and the
sources that define the model. To use it, from this folder:

```python
import json
import torch
from safetensors.torch import load_file
from train_gpt import {imports}

spec = json.load(open("config.json"))
model = frozen(make_model(Config(**spec["config"]), spec["vocab_size"], "cpu", getattr(torch, spec["dtype"])))

@torch.no_grad()
def logprobs(tokens):
    \"\"\"tokens (B, T) int64 -> (B, T, V): position t has the log-probabilities of token t+1.\"\"\"
    parts = []
    for member in spec["members"]:
        weights = load_file(member["file"])
{predict}
        parts.append({mixed})
    return {mixture}

print(logprobs(torch.tensor([[spec["bos_id"]]])).exp().topk(5))
```

Token ids are GPT-2's: the first {bos_id:,} of them, then BOS, which starts every document.
"""
MODEL = """\
        model.load_state_dict(weights)
        logits = model.logits(model.trunk(tokens, Mode(*member["mode"]))[0])"""
NGRAMS = """\
        if member["mode"]:
            model.load_state_dict(weights)
            logits = model.logits(model.trunk(tokens, Mode(*member["mode"]))[0])
        else:
            logits = Ngrams(weights["text"], spec["config"]["ngram"], spec["vocab_size"]).predict(tokens)"""
PREDICT = {False: {"imports": "Config, Mode, frozen, make_model", "predict": MODEL},
           True: {"imports": "Config, Mode, Ngrams, frozen, make_model", "predict": NGRAMS}}
MIXTURES = {
    "probs": {"mixed": 'logits.log_softmax(-1) + torch.tensor(member["weight"]).log()',
              "mixture": "torch.stack(parts).logsumexp(0)"},
    "logits": {"mixed": 'logits * member["weight"]', "mixture": "sum(parts).log_softmax(-1)"},
}

def export(run, out=None):
    """
    Writes the folder `out` (by default RUN/export) and returns its path: the weights of each member of the
    final predictor as safetensors, config.json, README.md and the sources. It appears whole or not at all.
    """
    from safetensors.torch import save_file

    folder = find_run(run)
    settings_of(folder)  # says so where there is no checkpoint
    out = Path(out or folder / "export")
    if out.exists():
        raise DataError(f"{out} exists already; name another folder, or rm -r {out}")
    predictor = json.loads((folder / "checkpoints/predictor.json").read_text())
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        members = []
        for number, member in enumerate(predictor["members"], 1):
            path, file = folder / "checkpoints" / member["checkpoint"], f"member_{number:04d}.safetensors"
            if not path.is_file() or prepare.file_sha256(path) != member["sha256"]:
                raise DataError(f"{path} is missing or damaged: it has not the digest it was saved with")
            weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial / file)
            (partial / file).chmod(0o644)  # safetensors makes it its owner's alone
            sync(partial / file)
            members.append({"file": file, "sha256": prepare.file_sha256(partial / file),
                            **{field: member[field] for field in ("weight", "mode", "val_loss")}})
        for source in filter(Path.is_file, (folder / f"{name}.py" for name in MODULES)):
            shards.write_file(partial / source.name, source.read_bytes())
        vocab_size, mix = predictor["vocab_size"], predictor["config"]["mix"]
        shards.write_json(partial / "config.json", {
            "run": folder.name,
            "source_sha256": hashlib.sha256((partial / "train_gpt.py").read_bytes()).hexdigest(),
            "tokenizer": f"gpt2, its first {vocab_size - 1:,} ids and BOS",
            "vocab_size": vocab_size,
            "bos_id": vocab_size - 1,
            "dtype": predictor["dtype"],
            "mix": mix,
            "members": members,
            "config": predictor["config"],
        })
        count = "one file" if len(members) == 1 else f"{len(members)} files"
        counted = any(member["mode"] is None for member in members)
        manual = MANUAL.format(run=folder.name, count=count, bos_id=vocab_size - 1, **MIXTURES[mix],
                               **PREDICT[counted])
        shards.write_file(partial / "README.md", manual.encode())
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(out.parent)
    return out

def sync(path):
    """After this a file, or the names in a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---- Command line ------------------------------------------------------------------------------------------

def number(kind, least, most, what):
    """A type of argparse: a number from `least` to `most`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value
    return parse

def arguments(arguments):
    manual = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    if arguments[:1] == ["export"]:
        parser = prepare.Parser("./run.sh export", **manual)
        parser.add_argument("run", metavar="RUN")
        parser.add_argument("out", metavar="DIR", nargs="?", help="the folder to make (default: RUN/export)")
        return parser.parse_args(arguments[1:])
    parser = prepare.Parser("./run.sh sample", **manual)
    flag = parser.add_argument
    count = number(int, 1, 1 << 31, "a whole number from 1")
    flag("run", metavar="RUN")
    flag("--prompt", default="", metavar="TEXT", help="the beginning of the document (default: none)")
    flag("--tokens", type=count, default=256, metavar="N", help="the most to write (default: %(default)s)")
    flag("--temperature", type=number(float, 0, 1e9, "a number from 0"), default=0.8, metavar="T",
         help="0 is the likeliest token, 1 as the model predicts (default: %(default)s)")
    flag("--top-k", type=count, metavar="K", help="choose from the K likeliest tokens (default: from all)")
    flag("--seed", type=number(int, 0, (1 << 63) - 1, "a whole number from 0 to 2^63 - 1"), default=0,
         metavar="S", help="another number, another text (default: %(default)s)")
    flag("--device", choices=["cpu", "cuda"], help="(default: cuda if there is one)")
    return parser.parse_args(arguments)

def main():
    args = arguments(sys.argv[1:])
    if "out" in args:
        print(f"wrote {export(args.run, args.out)}/")
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise DataError("there is no GPU here; leave --device out")
    sys.stdout.reconfigure(encoding="utf-8")
    prompt = os.fsencode(args.prompt).decode(errors="replace")  # the terminal may have sent something else
    model, tokenizer = load(args.run, args.device)
    pieces = sample(model, tokenizer, prompt, args.tokens, args.temperature, args.top_k, args.seed)
    print(prompt, end="", flush=True)
    for text in pieces:
        print(text, end="", flush=True)
    print()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C and a closed pipe (| head) just end it
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(prepare.launch(main))
