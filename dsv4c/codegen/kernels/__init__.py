"""The kernel families, one a file: what a kernel computes, its source and launch, and the ops that it takes.

A family is such a file, a template and a line here; importing this package registers all of them. Where two
take an op, the first one here is asked first.

What a row gives never depends on the rows beside it: a plan for up to eight may spread them over CTAs, and
must not add a row's numbers up in another order for it. Where rows decide nothing but the grid they are not
in the kernel's text, so that all numbers of them share one.
"""

from dsv4c.codegen.kernels import (  # noqa: F401
    attention,
    blockscaled,
    ends,
    experts_down,
    experts_up,
    hyper_norm,
    index,
    linear,
    rows,
)
