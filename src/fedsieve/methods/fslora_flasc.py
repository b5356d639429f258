"""FSLoRA and FLASC together: sketch the rank, then send the largest entries of the slices.

A client gets the top d_down entries of its own k slices, trains an adapter of rank k with the scale
(r / k) s, and returns the top d_up entries of its change. Memory and compute follow the ratio k / r
as in FSLoRA; bytes follow ratio times density. Neither paper tests the download half; FSLoRA's
ablation compresses the uploaded slices only, which is down = 1 here.
"""

from typing import Annotated, Literal

from pydantic import Field

from fedsieve.algebra.method import Method, Ranked, Weighting, compose, evaluated_at, r_over_k
from fedsieve.algebra.optim import Optimizer, adam
from fedsieve.algebra.options import checked
from fedsieve.algebra.payload import Form
from fedsieve.algebra.sieve import sketch, top_k, within


@checked
def method(
    *,
    server: Optimizer | None = None,
    ranked: Ranked = "values",
    shared: bool = True,
    head: Literal["sieved", "whole"] = "sieved",
    evaluated: Annotated[float, Field(gt=0, le=1)] = 1.0,
    weighting: Weighting = "uniform",
    down_values: Form = "float32",
    up_values: Form = "float32",
) -> Method:
    """The combination. Options as in `fslora` and `flasc`; the server is FLASC's Adam."""
    inner = compose(
        down=within(sketch(shared=shared), top_k("down", head=head)),
        up=top_k("up", head=head),
        knobs=frozenset({"ratio", "down", "up"}),
        rescale=r_over_k,
        server=adam(5e-3) if server is None else server,
        weighting=weighting,
        down_values=down_values,
        up_values=up_values,
        ranked=ranked,
    )
    return evaluated_at(inner, evaluated, head)
