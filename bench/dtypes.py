"""The dtypes that benches run in, by name; TF32 is torch.float32 multiplied as torch's own switch allows it."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

TF32 = "tf32"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, TF32: torch.float32}


def check_dtypes(dtypes: Collection[str], device: str) -> None:
    """
    Raises:
        ValueError: the device does not compute in one of them.
    """
    if device == "cpu" and TF32 in dtypes:
        raise ValueError("TF32 is how GPUs multiply float32; a CPU does not.")


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
