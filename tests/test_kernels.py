"""The kernels of kernels/ are the functions that they say, run line by line on a CPU by Triton.

Run: pytest tests/test_kernels.py        (seconds; skipped without Triton, and where there is a GPU:
                                          there test_vit.py and test_gpu.py compare compiled ones)
"""

import pytest
import torch

from attention import Packing, attend, fastest, pack

pytest.importorskip("triton", reason="PyTorch for CUDA brings Triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels are compared")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Triton asks when kernels are defined, and knows how to loop on a CPU since 3.7."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("this interpreter does not know NumPy 2.4")


def answers(backend, qkv_M3HE, dy_MHE, groups):
    """What attention says, and the gradient of q, k and v."""
    qkv_M3HE = qkv_M3HE.clone().requires_grad_()
    y_MHE = attend(qkv_M3HE, Packing(groups, backend))
    return y_MHE.detach(), *torch.autograd.grad(y_MHE, qkv_M3HE, dy_MHE)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("groups", [((2, 37), (3, 17), (1, 5)), ((1, 65), (2, 1))])
def test_short_attention_and_its_gradient_are_those_of_plain_attention(groups, dtype, limit):
    M = sum(B * T for B, T in groups)
    generator = torch.Generator().manual_seed(0)
    qkv_M3HE = torch.randn(M, 3, 2, 32, generator=generator) * 2
    dy_MHE = torch.randn(M, 2, 32, generator=generator)
    expected = answers("plain", qkv_M3HE, dy_MHE, groups)
    for got, right in zip(
        answers("short", qkv_M3HE.to(dtype), dy_MHE.to(dtype), groups), expected, strict=True
    ):
        assert (got - right).norm() < limit * right.norm()


def test_the_operator_is_what_pytorch_expects_of_one():
    from kernels.short import attend_short

    qkv_M3HE = torch.randn(2 * 5 + 3, 3, 2, 16, requires_grad=True)
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(attend_short, (qkv_M3HE, [2, 5, 1, 3]), test_utils=checks)


def test_crops_of_many_tokens_full_precision_and_odd_heads_take_another_way():
    cuda, half = torch.device("cuda"), torch.bfloat16
    assert fastest(cuda, half, 256) == "short"
    assert fastest(cuda, half, 257) == fastest(cuda, torch.float32, 5) == "sdpa"
    assert pack(((2, 5), (1, 257)), "auto", cuda, half).backend == "sdpa"
    qkv_M3HE = torch.randn(7, 3, 2, 24)
    odd = [attend(qkv_M3HE, Packing(((1, 7),), name)) for name in ("short", "plain")]
    assert torch.allclose(*odd, atol=1e-5)
