"""What every test shares: one thread, so that sums are added in one order, and fixed seeds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it

import random

import numpy as np
import pytest
import torch

import parallel

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite is shared out by files to a process for each core; `-n 0` keeps it in one."""
    whole = config.args_source is config.ArgsSource.TESTPATHS
    free = getattr(config.option, "numprocesses", 0) is None  # xdist is installed, no -n is given
    if whole and free and not hasattr(config, "workerinput"):  # those processes come here too
        config.option.numprocesses, config.option.maxprocesses = "auto", 4
        config.option.dist = "loadfile"


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same random state, alone or in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    parallel.warn_once.cache_clear()
