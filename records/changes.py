"""
What changed between two entries or runs: their configurations field by field, their sources line by line.
"""

import difflib

import numpy as np

from entry import SOURCES

# Everywhere here `new` and `old` are Entries: filed ones, or runs.

def fields(new, old):
    """[(field, value in old, value in new)] where the configurations differ; what one lacks is "absent"."""
    a, b = (entry.runs[0]["config"] for entry in (new, old))
    get = lambda config, name: config.get(name, "absent")
    return [(name, get(b, name), get(a, name)) for name in [*b, *(name for name in a if name not in b)]
            if get(a, name) != get(b, name)]

def source_diff(name, new, old):
    """(the lines of a unified diff of one source, lines added, lines removed)"""
    # Lines end with newlines only: form feeds within them are text, and may not make a second line of the
    # diff.
    split = lambda sources: sources.get(name, b"").decode(errors="replace").split("\n")
    lines = list(difflib.unified_diff(split(old), split(new), f"a/{name}", f"b/{name}", lineterm=""))
    added, removed = (sum(line.startswith(sign) for line in lines[2:]) for sign in "+-")
    return lines, added, removed

def summary(new, old):
    """The changes in short, as lines."""
    sources = [(name, *source_diff(name, new.sources(), old.sources())[1:]) for name in SOURCES]
    changed = [f"{name}: +{added} -{removed} lines" for name, added, removed in sources if added or removed]
    changed = changed or ["the same sources"]
    lines = [f"{name}: {was} -> {now}" for name, was, now in fields(new, old)]
    return changed + (lines or ["the same configuration"])

def diff(new, old):
    """changes.diff: the text of everything that changed."""
    lines = [f"# {new.label} against {old.label}", "# configuration"]
    for name, was, now in fields(new, old):
        lines += [f"-{name}: {was}", f"+{name}: {now}"]
    for name in SOURCES:
        lines += source_diff(name, new.sources(), old.sources())[0]
    return "\n".join(lines) + "\n"

def moved_documents(new, old):
    """(documents scored by both, nats that each gained in all, nats a token), most gained first."""
    a, b = new.split("val"), old.split("val")
    scored = np.flatnonzero((a.tokens > 0) & (b.tokens > 0))
    moved = (b.loss.mean(0) / np.maximum(b.tokens, 1) - a.loss.mean(0) / np.maximum(a.tokens, 1))[scored]
    order = np.argsort(-moved * a.tokens[scored])
    return scored[order], (moved * a.tokens[scored])[order], moved[order]
