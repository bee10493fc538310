"""How float32 is multiplied on a GPU: as torch's switches say."""

import pytest
import torch
from operators import random

from vlcore import ops
from vlcore.kernels import launch

matrix_product = pytest.importorskip("vlcore.kernels.matrix_product")


@pytest.fixture
def switch():
    """torch's newer one of two, as it was afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


@pytest.fixture(params=["high", "tf32"])
def allowed(request, switch):
    """TF32, by either of torch's switches, which torch does not let one mix."""
    if request.param == "tf32":
        switch.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("high")
    yield
    if request.param != "tf32":
        torch.set_float32_matmul_precision("highest")


def test_float32_is_multiplied_as_it_is():
    assert matrix_product.input_precision(torch.float32) == "ieee"
    assert matrix_product.operand_bits(torch.float32, "ieee") == 32


def test_float32_is_multiplied_in_tf32_where_torch_allows_it(allowed):
    assert matrix_product.input_precision(torch.float32) == "tf32"
    assert matrix_product.operand_bits(torch.float32, "tf32") == 19


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_do_not_mind(dtype, allowed):
    assert matrix_product.input_precision(dtype) == "ieee"
    assert matrix_product.operand_bits(dtype, "ieee") == 16


def test_tf32_is_launched_by_entries_of_its_own(allowed, monkeypatch):
    asked = []
    settings = launch.settings

    def watched(operator, kernel, device, **sizes):
        asked.append(sizes)
        return settings(operator, kernel, device, **sizes)

    monkeypatch.setattr(launch, "settings", watched)
    q, k, v = (random(1, 20, 2, 16) for _ in range(3))
    out = ops.attention(q, k, v, backend="triton")
    assert [sizes["bits"] for sizes in asked] == [19]
    torch.testing.assert_close(out, ops.attention(q, k, v, backend="torch"), rtol=1e-2, atol=1e-2)
