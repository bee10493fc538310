"""Run by tests/test_direct_launch.py in a process of its own, without Triton's interpreter: every operator's kernels
are launched three times, without a GPU or a compiler, and once more by Triton itself; prints what was launched.
"""

from unittest.mock import patch

import torch
from triton.runtime.jit import JITFunction

from tests.recorder import ARGUMENTS_BEFORE, Recorder, compile_nothing
from vlcore import ops
from vlcore.bench.stand_in import in_place_of_a_gpu
from vlcore.kernels import direct_launch


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()


def calls() -> dict:
    """A call of every operator that Triton has kernels for, of each kind of arguments."""
    x, weight, bias = random(3, 64), random(64), random(64)
    qkv, packed = [random(2, 32, 4, 64) for _ in range(3)], [random(1, 32, 4, 64) for _ in range(3)]
    wide = [tensor.detach().float().requires_grad_() for tensor in qkv]
    cu_seqlens, positions = torch.tensor([0, 7, 32], dtype=torch.int32), torch.arange(32).expand(2, 32)
    heads, sides = [random(2, 3, 16, 64) for _ in range(3)], [random(7, 64) for _ in range(2)]
    windows, qkv_bias = random(1, 6, 6, 3, 2, 64), random(3, 2, 64)
    vocabulary, labels, hidden = random(32, 64), torch.arange(16), random(16, 64)
    long = (random(2, 40000), random(40000), random(40000))
    layers = (random(64, 32), random(64), random(64, 32), random(64), random(48, 128), random(48))
    quantized = [ops.quantize_weight(random(64, 64).detach(), bits, group) for bits, group in ((8, None), (4, 32))]
    maps = random(1, 16, 8, 8), random(1, 16, 8, 8), torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    convolutions = random(32, 16, 3, 3), random(16, 32, 3, 3)
    new = [tensor.detach() for tensor in (random(2, 1, 4, 64), random(2, 1, 2, 64), random(2, 1, 2, 64))]
    caches = random(2, 40, 2, 64).detach(), random(2, 40, 2, 64).detach()
    return {
        "rms_norm": lambda: ops.rms_norm(x, weight, backend="triton"),
        "add_rms_norm": lambda: ops.add_rms_norm(x, 2 * x, weight, backend="triton"),
        "layer_norm": lambda: ops.layer_norm(x, weight, bias, backend="triton"),
        "layer_norm of long rows": lambda: ops.layer_norm(*long, backend="triton"),
        "swiglu": lambda: ops.swiglu(x, 2 * x, backend="triton"),
        "swiglu of halves": lambda: ops.swiglu(*x.split(32, 1), backend="triton"),
        "attention of float32": lambda: ops.attention(*wide, scale=2, backend="triton"),
        "attention": lambda: ops.attention(*qkv, causal=True, backend="triton"),
        "attention, packed": lambda: ops.attention(*packed, cu_seqlens=cu_seqlens, backend="triton"),
        "apply_rope": lambda: ops.apply_rope(qkv[0], positions, backend="triton"),
        "rope_attention": lambda: ops.rope_attention(*qkv, positions, causal=True, backend="triton"),
        "decode_attention": lambda: ops.decode_attention(*new, *caches, torch.tensor([5, 9]), backend="triton"),
        "rel_pos_attention": lambda: ops.rel_pos_attention(*heads, *sides, (4, 4), backend="triton"),
        "window_attention": lambda: ops.window_attention(windows, qkv_bias, *sides, 4, backend="triton"),
        "hybrid_adaptor": lambda: ops.hybrid_adaptor(x[:, :32], x[:, 32:], *layers, backend="triton"),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(hidden, vocabulary, labels, backend="triton"),
        "quantized_linear, 8 bits": lambda: ops.quantized_linear(x.detach(), quantized[0], backend="triton"),
        "quantized_linear, 4 bits": lambda: ops.quantized_linear(x, quantized[1], bias, backend="triton"),
        "downsample_features": lambda: ops.downsample_features(*maps, *convolutions, size=16, backend="triton"),
    }


def launched(driver: Recorder, call) -> list[tuple]:
    """What a call and its backward launch."""
    driver.launches = []
    outputs = call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if outputs[0].requires_grad:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return driver.launches


def compare(direct: tuple, by_triton: tuple) -> bool:
    """Whether a launch was direct; it is the same as Triton's."""
    assert direct[:6] == by_triton[:6], (direct, by_triton)
    pointers = []
    for given, wanted in zip(direct[ARGUMENTS_BEFORE:], by_triton[ARGUMENTS_BEFORE:], strict=True):
        if isinstance(wanted, torch.Tensor):
            pointers.append(given)
        else:
            assert type(given) is type(wanted) and given == wanted, (direct, by_triton)
    if isinstance(pointers[0], torch.Tensor):
        assert any(tensor.data_ptr() % 16 for tensor in pointers), direct[4]
        return False
    assert all(type(address) is int and address % 16 == 0 for address in pointers)
    assert direct[6:ARGUMENTS_BEFORE] == (None, None, None)
    return True


def main() -> None:
    driver = Recorder()
    with in_place_of_a_gpu(driver, "sm_90"), patch.object(JITFunction, "_do_compile", compile_nothing):
        for name, call in calls().items():
            launched(driver, call)
            direct = launched(driver, call)
            with patch.object(direct_launch, "run", wraps=direct_launch.run) as anew:
                repeated = launched(driver, call)
            with patch.object(direct_launch, "TRITONS_RUN", None):
                by_triton = launched(driver, call)
            found = [compare(*pair) for pair in zip(direct, by_triton, strict=True)]
            assert found == [compare(*pair) for pair in zip(repeated, by_triton, strict=True)]
            num_repeated = len(repeated) - anew.call_count
            print(f"{name}: {sum(found)} of {len(found)}, {num_repeated} of them repeated")


if __name__ == "__main__":
    main()
