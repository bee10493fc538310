"""The dtypes of the benches, TF32 among them."""

import pytest
import torch

from vlcore import cli
from vlcore.bench.dtypes import DTYPES, TF32, computing_in
from vlcore.bench.plot import COLORS


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_is_multiplied_as_the_dtype_says(dtype, before):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    found = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = before
    try:
        with computing_in(dtype):
            assert matmul.allow_tf32 == cudnn.allow_tf32 == (dtype == TF32)
        assert matmul.allow_tf32 == cudnn.allow_tf32 == before
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = found


def test_a_plot_has_a_colour_for_each():
    assert COLORS.keys() == DTYPES.keys()


def test_a_cpu_is_refused_tf32_before_anything_is_timed(capsys):
    assert cli.main(["bench", "swiglu", "--dtype", "tf32"]) == 2
    said = capsys.readouterr()
    assert "TF32 is how GPUs multiply float32" in said.err and not said.out
