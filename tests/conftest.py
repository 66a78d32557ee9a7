"""When tests run, and with what: pytest's hooks. Here torch runs on one thread and compiles nothing; the
processes that tests start do as a user's would.

A test that takes seconds without being the only one to protect something is marked `slow`, and runs only with
--all.
"""
import functools
import gc
import sys

import pytest

LEFT_OUT = pytest.StashKey[int]()
gc.disable()  # while the tests import what they need, which is a quarter quicker so

def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")

def pytest_configure(config):
    config.stash[LEFT_OUT] = 0

def pytest_collection_modifyitems(config, items):
    """Without --all no slow tests; the longest files first: then two workers end at about the same time."""
    slow = [] if config.getoption("--all") else [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)
    config.stash[LEFT_OUT] = len(slow)
    longest = """resume tracks plan leaderboard model fineweb ruler published run run_sh website sample
        training meta terminal data bench rehearse""".split()
    place = {f"test_{name}": number for number, name in enumerate(longest)}
    items.sort(key=lambda item: place.get(item.path.stem, len(longest)))

def pytest_collection_finish():
    if torch := sys.modules.get("torch"):  # pytest-xdist's first process, which only starts others, has none
        torch.set_num_threads(1)
        torch.compiler.set_stance("force_eager")
    gc.freeze()
    gc.enable()

def pytest_sessionfinish(session):
    """A worker of pytest-xdist tells the process that has started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left out"] = session.config.stash[LEFT_OUT]

@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Every worker has collected all tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", 0)

def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash[LEFT_OUT]:
        terminalreporter.write_line(f"{count} slow tests were left out: ./run.sh test --all runs them")

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

def slow_but(always, values):
    """Parameters of a test: the values, slow but for those that always run."""
    return [value if value in always else slow(value) for value in values]

@pytest.fixture(scope="session")
def one_rank():
    """torch.distributed of a single process, for what is written for ranks."""
    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
