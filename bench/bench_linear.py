"""Linear layers of the 1.3B for one decoded token, each weight read from memory."""

from vlcore.bench.harness import Case, Inputs, Maker
from vlcore.bench.shapes import LLAMA

# More than any processor's cache.
ENOUGH = 3e8
LAYERS = [
    (LLAMA.hidden_size, LLAMA.hidden_size),
    (LLAMA.intermediate_size, LLAMA.hidden_size),
    (LLAMA.hidden_size, LLAMA.intermediate_size),
    (LLAMA.vocab_size, LLAMA.hidden_size),
]


def turns(bytes_each: float) -> int:
    """How many weights to take in turn, so that each has left the caches when it comes again."""
    return max(1, round(ENOUGH / bytes_each))


def _case(outputs: int, inputs: int) -> Case:
    size = outputs * inputs

    def make_inputs(make: Maker) -> Inputs:
        x = make(1, inputs)
        return [(x, make(outputs, inputs)) for _ in range(turns(size * make.dtype.itemsize))]

    return Case(operator="linear", shape=f"1 × {inputs} → {outputs}", inputs=make_inputs, elements=size, flops=2 * size)


CASES = [_case(outputs, inputs) for outputs, inputs in LAYERS]
