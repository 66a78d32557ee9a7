"""What tests of several files call."""
import contextlib
from unittest import mock

import pytest
import torch

from logbook import parse_args
from train_gpt import TRACKS, Config

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

def command_line(*flags):
    """-> the Config and the arguments that the flags of train_gpt.py make."""
    args = parse_args(Config, TRACKS, list(map(str, flags)))
    return Config(**args.fields), args

def refused(capsys, make):
    """The one line of standard error with which make() ends the program."""
    with pytest.raises(SystemExit) as stop:
        make()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err
