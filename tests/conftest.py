"""What every test shares: one thread, so that sums are added in one order, and fixed seeds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it

import random

import numpy as np
import pytest
import torch

import parallel

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same random state, alone or in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    parallel.warn_once.cache_clear()
