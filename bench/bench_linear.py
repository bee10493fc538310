"""Linear layers: those of the 1.3B for one decoded token, each weight read from memory, and of many rows."""

from vlcore.bench.harness import Case, Inputs, Maker
from vlcore.bench.shapes import HYBRID, LLAMA, PROMPT

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


def _case(outputs: int, inputs: int, rows: int = 1, trains: bool = False) -> Case:
    size = outputs * inputs

    def make_inputs(make: Maker) -> Inputs:
        x = make(rows, inputs)
        count = turns(size * make.dtype.itemsize)
        return [(x, make(outputs, inputs, scale=inputs**-0.5)) for _ in range(count)]

    return Case(
        operator="linear",
        shape=f"{rows} × {inputs} → {outputs}",
        inputs=make_inputs,
        elements=size if rows == 1 else 0,
        flops=(6 if trains else 2) * rows * size,
        trains=trains,
    )


SAM, SIGLIP = HYBRID.sam, HYBRID.siglip
assert SAM
CASES = [
    *(_case(outputs, inputs) for outputs, inputs in LAYERS),
    _case(SAM.intermediate_size, SAM.hidden_size, rows=SAM.grid**2),
    _case(SIGLIP.intermediate_size, SIGLIP.hidden_size, rows=SIGLIP.num_tokens),
    *(_case(LLAMA.intermediate_size, LLAMA.hidden_size, rows=PROMPT, trains=trains) for trains in (False, True)),
]
