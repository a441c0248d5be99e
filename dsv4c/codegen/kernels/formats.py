"""What kernel families call the number formats of values."""

from __future__ import annotations

from dsv4c.types import BF16, FP8_WEIGHT, KV_FP8, MXFP4, NVFP4, NVFP4_ROW, QuantFormat, QuantType, Type

WEIGHTS = {FP8_WEIGHT: "fp8", MXFP4: "mxfp4", NVFP4: "nvfp4"}
CACHES = {KV_FP8: "fp8", MXFP4: "mxfp4"}
# The other way around, for a kernel's text.
WEIGHT_FORMATS = {name: str(format_) for format_, name in WEIGHTS.items()} | {"bf16": "bf16"}
CACHE_FORMATS = {name: str(format_) for format_, name in CACHES.items()} | {"bf16": "bf16"}


def format_name(type_: Type, names: dict[QuantFormat, str]) -> str:
    """What the kernel families call the number format of a type; "" for one they do not have."""
    if isinstance(type_, QuantType):
        return names.get(type_.format, "")
    return "bf16" if type_.dtype is BF16 else ""


def holds(type_: Type, dtype: object) -> bool:
    """Whether a type has plain elements of this kind."""
    return not isinstance(type_, QuantType) and type_.dtype is dtype


def is_packed(type_: Type) -> bool:
    """Whether a type is rows of NVFP4 with a global scale each."""
    return isinstance(type_, QuantType) and type_.format == NVFP4_ROW
