from typing import Any

from cutlass import Numeric, cute

def make_fake_stream() -> Any: ...
def make_ptr(
    kind: type[Numeric], address: int, space: cute.AddressSpace, *, assumed_align: int
) -> cute.Pointer: ...
