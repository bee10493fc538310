"""The dtypes that benches run in, by name; TF32 is torch.float32 multiplied as torch's own switch allows it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

TF32 = "tf32"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, TF32: torch.float32}


@contextmanager
def computing_in(dtype: str) -> Iterator[None]:
    """Within it float32 is multiplied in TF32 if that is the dtype, and as it is if not."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = dtype == TF32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
