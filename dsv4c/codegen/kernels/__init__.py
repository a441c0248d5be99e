"""The kernel families, one a file: what a kernel computes, its source and launch, and the ops that it takes.

A family is such a file, its code in `lib`, and a name here. Where two take an op, the first one here is asked
first; what other packages contribute is asked before all of these.

What a row gives never depends on the rows beside it: a plan for up to eight may spread them over CTAs, and
must not add a row's numbers up in another order for it. A kernel for more may (attention of many tokens
does), within the bound of its op; what only moves or norms rows gives the same bits. Where rows decide
nothing but the grid they are not in the kernel's text, so that all numbers of them share one.
"""

from dsv4c.codegen.kernels import (
    around,
    attention,
    blockscaled,
    ends,
    exchange,
    experts_down,
    experts_up,
    hyper_norm,
    index,
    linear,
    rows,
    sampler,
    state,
)
from dsv4c.codegen.registry import kernels_in

FAMILIES = (
    attention,
    blockscaled,
    ends,
    exchange,
    experts_down,
    experts_up,
    hyper_norm,
    index,
    linear,
    state,
    sampler,
    rows,
    around,
)

KERNELS = tuple(kernel for family in FAMILIES for kernel in kernels_in(family))
"""All candidates of dsv4c, in the order in which they are asked."""
