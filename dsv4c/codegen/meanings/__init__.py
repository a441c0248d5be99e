"""What each primitive means on a GPU, one function each, named and laid out as `dsv4c.reference`.

A meaning takes its op's operands, then its results (what they overwrite is an operand alone), then the op's
attributes by keyword, element types and formats as text. Elementwise meanings take and give numbers; all
others take arrays, shared or global, and the `Team` of threads that work together. Nothing is passed back in
registers, so that meanings follow each other with a barrier of the CTA between them.

As in the reference, sums and products accumulate in float64 and round once: simple and right, not fast.
"""
