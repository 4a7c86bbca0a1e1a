"""The kernels of kernels/ are the functions that they say, run line by line on a CPU by Triton.

Run: pytest tests/test_kernels.py        (seconds; without Triton, most are skipped. On a GPU
                                          test_vit.py and test_gpu.py compare the compiled kernels)
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from running import ROOT

from attention import Packing, attend, fastest, pack
from kernels import build


def answers(backend, qkv_M3HE, dy_MHE, groups):
    """What attention says, and the gradient of q, k and v."""
    qkv_M3HE = qkv_M3HE.clone().requires_grad_()
    y_MHE = attend(qkv_M3HE, Packing(groups, backend))
    return y_MHE.detach(), *torch.autograd.grad(y_MHE, qkv_M3HE, dy_MHE)


def errors(groups, dtype):
    """Of the short kernels against plain attention in fp32: of y and of the gradient, relative."""
    M = sum(B * T for B, T in groups)
    qkv_M3HE, dy_MHE = torch.randn(M, 3, 2, 32) * 2, torch.randn(M, 2, 32)
    expected = answers("plain", qkv_M3HE, dy_MHE, groups)
    got = answers("short", qkv_M3HE.to(dtype), dy_MHE.to(dtype), groups)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]


def interpreted():
    """Print what the tests ask for; Triton has to be told before it is imported."""
    from kernels.short import attend_short

    torch.manual_seed(0)
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    qkv_M3HE = torch.randn(2 * 5 + 3, 3, 2, 16, requires_grad=True)
    torch.library.opcheck(attend_short, (qkv_M3HE, [2, 5, 1, 3]), test_utils=checks)
    cases = ((2, 37), (3, 17), (1, 5)), ((1, 65), (2, 1))
    print(json.dumps([[errors(c, t) for c in cases] for t in (torch.float32, torch.float16)]))


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="comes with PyTorch for CUDA")
def test_short_attention_and_its_gradient_are_those_of_plain_attention():
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    if "only 0-dimensional arrays" in done.stderr:
        pytest.skip("the interpreter of this Triton does not know NumPy 2.4")
    single, half = json.loads(done.stdout)
    assert max(max(case) for case in single) < 1e-6
    assert max(max(case) for case in half) < 2e-3


def test_crops_of_many_tokens_full_precision_and_odd_heads_take_another_way(monkeypatch):
    monkeypatch.setattr(build, "can_build", lambda cuda: cuda)
    fastest.cache_clear()
    cuda, half = torch.device("cuda"), torch.bfloat16
    assert fastest(cuda, half, 256) == "short"
    assert fastest(cuda, half, 257) == fastest(cuda, torch.float32, 5) == "sdpa"
    assert pack(((2, 5), (1, 257)), "auto", cuda, half).backend == "sdpa"
    qkv_M3HE = torch.randn(7, 3, 2, 24)
    monkeypatch.setattr(build, "can_build", lambda cuda: False)  # no compiler
    fastest.cache_clear()
    assert fastest(cuda, half, 5) == "sdpa"
    fastest.cache_clear()
    odd = [attend(qkv_M3HE, Packing(((1, 7),), name)) for name in ("short", "plain")]
    assert torch.allclose(*odd, atol=1e-5)


def test_a_cpu_takes_plain_attention_in_bf16_and_for_few_tokens():
    cpu = torch.device("cpu")
    found = [fastest(cpu, torch.float32, n) for n in (5, 40, 41)]
    assert [*found, fastest(cpu, torch.bfloat16, 785)] == ["plain", "plain", "sdpa", "plain"]


if __name__ == "__main__":
    interpreted()
