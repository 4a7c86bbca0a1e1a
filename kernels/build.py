"""Whether kernels can be built on this machine: Triton and torch.compile start a compiler."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


def can_build(cuda):
    """Whether there is all that a kernel for CUDA, or for the CPU, is built with."""
    # Kernels are C++ (CPU), or are started by a C program that Triton makes (CUDA).
    compilers = ("CC", "gcc", "clang") if cuda else ("CXX", "g++", "clang++")
    possible = any(shutil.which(os.environ.get(name, name)) for name in compilers)
    possible &= Path(sysconfig.get_path("include"), "Python.h").exists()
    return possible and (not cuda or importlib.util.find_spec("triton") is not None)
