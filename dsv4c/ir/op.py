"""What an operation is: a frozen dataclass whose fields are its attributes, a type rule, and a cost.

An op says nothing about how it runs. Its meaning lives in `dsv4c.reference`, its kernels in `dsv4c.codegen`.
Operands are positional, attributes are keywords: `rms_norm(x, gain, eps=1e-6)`.
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, dataclass_transform

from dsv4c.errors import GraphError
from dsv4c.types import DType, QuantType, TensorType, Type

if TYPE_CHECKING:
    from dsv4c.ir.graph import Value


def expect(condition: bool, message: str) -> None:
    """Raise GraphError(message) unless `condition`; the builder adds where it happened."""
    if not condition:
        raise GraphError(message)


def expect_tensor(
    type_: Type, name: str, rank: int | None = None, dtype: DType | None = None, least: int = 0
) -> TensorType:
    """`type_` as a plain tensor of that rank (or at least `least`) and element type.

    Raises GraphError naming the operand.
    """
    if not isinstance(type_, TensorType):
        raise GraphError(f"{name} must be a plain tensor, got {type_}; dequantize it first")
    if rank is not None and len(type_.shape) != rank:
        raise GraphError(f"{name} must have {rank} dimensions, got {type_}")
    if len(type_.shape) < least:
        raise GraphError(f"{name} must have at least {least} dimension, got {type_}")
    if dtype is not None and type_.dtype is not dtype:
        raise GraphError(f"{name} must be {dtype}, got {type_}")
    return type_


@dataclass(frozen=True)
class Cost:
    """Work of one node: floating-point operations (2 per multiply-add) and bytes per operand and result."""

    flops: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return sum(self.reads) + sum(self.writes)


def row_bytes(type_: Type, rows: int, rank: int = 1) -> int:
    """Bytes of `rows` rows of a value whose first `rank` dimensions count rows."""
    total = 1
    for n in type_.shape[:rank]:
        total *= n
    return type_.nbytes * rows // max(total, 1)


def elements(type_: Type) -> int:
    total = 1
    for n in type_.shape:
        total *= n
    return total


class Rounding(enum.Enum):
    """Where the graph rounds what an op computes, so that a kernel may differ there."""

    NOWHERE = "nowhere"  # copies
    ONCE = "once"  # at the end, behind a sum
    INSIDE = "inside"  # on the way, to the type of the values
    CODES = "codes"  # on the way, to a quantized format


class Op:
    """Base of every operation. Subclasses are declared with `@primitive` or, with a body, `@fused`."""

    name: ClassVar[str]
    alias: ClassVar[Mapping[int, int]] = {}  # result index -> operand index whose buffer it overwrites
    per_call: ClassVar[str] = ""  # the attribute that counts the tokens of each sequence of a call
    room: ClassVar[str] = ""  # the attribute that has one more for each of those tokens
    commutative: ClassVar[bool] = False  # two operands, in either order
    view: ClassVar[bool] = False  # the result is the bytes of the first operand
    addressed: ClassVar[bool] = False  # inside of a kernel only addresses: its readers read the operand
    collective: ClassVar[bool] = False  # joins the values of all ranks; its meaning takes those of each
    product: ClassVar[bool] = False  # multiplies operand 0 by its weight, either of them perhaps quantized
    weight: ClassVar[int | None] = None  # the operand, if given, that is the model's and scales or projects
    by_slot: ClassVar[bool] = False  # reaches into the state of the slots that rows are in
    geometry: ClassVar[frozenset[str]] = frozenset()  # attributes that follow from shapes
    rounding: ClassVar[Rounding] = Rounding.INSIDE
    same_format: ClassVar[Mapping[int, int]] = {}  # operand index -> operand whose number format it must have
    picks: ClassVar[Mapping[int, tuple[int, int]]] = {}
    """Operands that are indices: which operand each is an index into, and of which of its dimensions."""
    by_row: ClassVar[frozenset[int] | None] = None
    """Operands whose leading dimension counts rows that the op keeps apart, as do its results; it reads the
    others whole. None where rows meet."""

    def rows_of(self, operands: tuple[Type, ...]) -> frozenset[int] | None:
        """`by_row` on operands of these types."""
        return self.by_row

    def hands_on(self, operand: int) -> int | None:
        """The result that holds the elements of an operand as they are, indices say; None without one."""
        return None

    def infer(self, *operands: Type) -> Type | tuple[Type, ...]:
        """Result types. Raises GraphError when the operands do not fit."""
        raise NotImplementedError(f"{type(self).__name__} declares no type rule")

    def cost(self, operands: tuple[Type, ...], results: tuple[Type, ...]) -> Cost:
        """Default: one operation per result element, every operand read once, every result written once."""
        flops = sum(elements(r) for r in results)
        return Cost(flops, tuple(o.nbytes for o in operands), tuple(r.nbytes for r in results))

    def __call__(self, *operands: Value | None, name: str = "") -> Any:
        """Add a node to the graph being built; returns its Value, or a tuple of them."""
        from dsv4c.ir.graph import current_builder  # graphs are made of ops

        values = current_builder().emit(self, tuple(v for v in operands if v is not None), name=name)
        return values[0] if len(values) == 1 else values

    @classmethod
    def apply(cls, *operands: Value | None, name: str = "", **attributes: Any) -> Any:
        """The functional spelling: operands positional, attributes by keyword."""
        return cls(**attributes)(*operands, name=name)

    def results(self, operands: tuple[Type, ...]) -> tuple[Type, ...]:
        """`infer`, checked for the number of operands and always a tuple."""
        least, most = arity(type(self))  # type: ignore[arg-type]  # mypy takes the class for an instance
        wanted = least if least == most else f"{least} to {most}"
        expect(least <= len(operands) <= most, f"{self.name} takes {wanted} operands, got {len(operands)}")
        try:
            inferred = self.infer(*operands)
        except ValueError as error:  # a format that does not fit a shape
            raise GraphError(str(error)) from None
        return inferred if isinstance(inferred, tuple) else (inferred,)

    def attributes(self) -> dict[str, Any]:
        """Fields by name, in order of declaration."""
        names = field_names(type(self))  # type: ignore[arg-type]  # mypy takes the class for an instance
        return {name: getattr(self, name) for name in names}


@cache
def field_names(op: type[Op]) -> tuple[str, ...]:
    """Attribute names, in order of declaration."""
    return tuple(f.name for f in fields(op))  # type: ignore[arg-type]


@cache
def operand_names(op: type[Op]) -> tuple[str, ...]:
    """Operand names, read off the type rule."""
    source = op.infer if "infer" in op.__dict__ else getattr(op, "body", op.infer)
    return tuple(p for p in inspect.signature(source).parameters if p != "self")


@cache
def arity(op: type[Op]) -> tuple[int, int]:
    """Least and most operands, read off the signature of the type rule (or of the body)."""
    source = op.infer if "infer" in op.__dict__ else getattr(op, "body", op.infer)
    parameters = [p for p in inspect.signature(source).parameters.values() if p.name != "self"]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return sum(p.kind is not p.VAR_POSITIONAL for p in parameters), 1 << 30
    return sum(p.default is p.empty for p in parameters), len(parameters)


OPS: dict[str, type[Op]] = {}
"""Every declared op by its name in the text form. Filled by the imports in `dsv4c.ir.ops`; clashes raise."""

OpClass = TypeVar("OpClass", bound=type[Op])


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def register(op: type[Op]) -> None:
    """Make an op known to the parser and the printer. Raises GraphError when the name is taken."""
    other = OPS.get(op.name)
    if other is not None and other is not op:
        raise GraphError(
            f"two ops are named {op.name!r}: {other.__module__}.{other.__qualname__} "
            f"and {op.__module__}.{op.__qualname__}; rename one"
        )
    OPS[op.name] = op


@dataclass_transform(frozen_default=True)
def primitive(cls: OpClass) -> OpClass:
    """Declare an op: freezes the dataclass, names it after the class, registers it."""
    made: Any = dataclass(frozen=True)(cls)
    if "name" not in cls.__dict__:
        made.name = snake_case(cls.__name__)
    register(made)
    return made  # type: ignore[no-any-return]


def lookup(name: str) -> type[Op]:
    """The op of that name. Raises GraphError naming close spellings."""
    import difflib

    import dsv4c.ir.ops  # noqa: F401  (fills OPS, and its modules import this one)

    if name not in OPS:
        near = difflib.get_close_matches(name, OPS, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise GraphError(f"unknown op {name!r}{hint} (an op of another package must be imported first)")
    return OPS[name]


__all__ = [
    "OPS",
    "Cost",
    "Op",
    "QuantType",
    "Rounding",
    "TensorType",
    "arity",
    "elements",
    "expect",
    "expect_tensor",
    "lookup",
    "operand_names",
    "primitive",
    "register",
    "row_bytes",
    "snake_case",
]
