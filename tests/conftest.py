"""What the tests share. Here torch runs on one thread and compiles nothing; the processes that tests start
do as a user's would."""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
torch.compiler.set_stance("force_eager")


def pytest_collection_modifyitems(items):
    """The longest files first: then two workers end at about the same time."""
    longest = ["test_resume", "test_tracks", "test_plan", "test_run", "test_model"]
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))


@pytest.fixture(scope="session")
def one_rank():
    """torch.distributed of a single process, for what is written for ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@contextlib.contextmanager
def exact():
    """What says float32 computes in float64: formulas can be compared to the last digit. Also a decorator."""
    default = torch.get_default_dtype()
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def normal(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
