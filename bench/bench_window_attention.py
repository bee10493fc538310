"""SAM's attention within windows of 14 on a map of 64 x 64, where windows hang over the border."""

from vlcore.bench.harness import Case, Inputs, Maker

SIDE, WINDOW, HEADS, DIM = 64, 14, 12, 64
# Real queries against whole windows.
FLOPS = 4 * HEADS * SIDE**2 * WINDOW**2 * DIM


def _inputs(make: Maker) -> Inputs:
    tables = (make(2 * WINDOW - 1, DIM, scale=0.1) for _ in range(2))
    return make(1, SIDE, SIDE, 3, HEADS, DIM), make(3, HEADS, DIM), *tables


CASES = [
    Case(
        operator="window_attention",
        shape=f"{SIDE} × {SIDE}, {HEADS} heads of {DIM}",
        inputs=_inputs,
        flops=FLOPS * (3.5 if trains else 1),
        trains=trains,
    )
    for trains in (False, True)
]
