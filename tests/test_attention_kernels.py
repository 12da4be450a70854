"""The fused kernel gives what its PyTorch reference gives. Needs a GPU, or TRITON_INTERPRET=1 with triton installed."""

import os

import pytest
import torch

from cagsr.attention.probabilities import Scratch, exponential_columns

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("The Triton kernel needs a CUDA GPU (or TRITON_INTERPRET=1).", allow_module_level=True)
kernels = pytest.importorskip("cagsr.attention.kernels", reason="triton is not installed")
pytestmark = pytest.mark.cuda
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.parametrize("heads", [None, (1, 2, 5)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]
)  # triton reads bfloat16 wrongly there
@pytest.mark.parametrize(("rows", "columns", "width"), [(5, 7, 8), (40, 130, 24), (64, 64, 64)])
def test_kernel_equals_reference(rows, columns, width, dtype, heads):
    torch.manual_seed(0)
    query = torch.randn(2, columns + rows, 6, width, device=DEVICE, dtype=dtype).transpose(1, 2)
    key = torch.randn(2, columns + rows, 2, width, device=DEVICE, dtype=dtype).transpose(1, 2)
    scaling = width**-0.5
    logsumexp = (query.float() @ key.float().repeat_interleave(3, 1).transpose(2, 3) * scaling).logsumexp(-1)
    picked = slice(columns - 1, columns - 1 + rows)
    chosen = list(heads or range(6))
    target = torch.ones(2, rows, columns + 3, device=DEVICE)
    kernels.add_columns(
        target[..., :columns],
        query[:, chosen, picked],
        key[:, :, :columns],
        torch.tensor([head // 3 for head in chosen], dtype=torch.int32, device=DEVICE),
        logsumexp[:, chosen, picked],
        scaling,
    )
    expected = 1 + sum(
        exponential_columns(
            query[:, [head], picked].float() * scaling,
            key[:, [head // 3], :columns],
            None,
            None,
            logsumexp[:, [head], picked],
            Scratch(),
        )
        for head in chosen
    )
    torch.testing.assert_close(target[..., :columns], expected, rtol=0, atol=5e-6)
    assert (target[..., columns:] == 1).all()
