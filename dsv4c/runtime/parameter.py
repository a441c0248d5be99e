"""One parameter: where checkpoints keep it, as plan data, and its value, put together from their tensors.

What to read is data (`ParamRecord`, from a plan); nothing here knows the model. A tensor whose numbers are no
numbers, or that cannot become what the plan wants, is a CheckpointError that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from dsv4c.errors import CheckpointError
from dsv4c.headers import Entry
from dsv4c.numerics.codec import ConversionError, Quantized, Value, convert, part_of, view
from dsv4c.numerics.soundness import not_finite
from dsv4c.types import F32, UE8M0, QuantType, TensorType, Type, TypeSyntaxError, parse_type


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the checkpoint, or one per expert where the name contains "{e}"; dtypes are
    alternatives.
    """

    tensor: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]

    def name(self, e: int) -> str:
        return self.tensor.replace("{e}", str(e))

    def names(self, stack: int) -> list[str]:
        return [self.name(e) for e in range(stack)] if "{e}" in self.tensor else [self.tensor]


@dataclass(frozen=True, slots=True)
class Source:
    """How a parameter is put together from the tensors of a checkpoint; written by `dsv4c.models.weights`.

    stored: its type as stored, in the parameter's shape. parts: data, scale, global_scale; also `input_scale`
    (checked with the others, read as a parameter of its own) and `same` (must hold what data holds). stack:
    experts, one tensor each. rows: (start, stop) of every matrix of a merged stack. limit: integers lie in
    [0, limit).
    """

    stored: Type
    parts: Mapping[str, Part]
    stack: int = 0
    rows: tuple[int, int] | None = None
    limit: int | None = None

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Source:
        parts = {r: Part(name, tuple(d.split("|")), tuple(s)) for r, (name, d, s) in data["parts"].items()}
        rows = tuple(data["rows"]) if "rows" in data else None
        return Source(parse_type(data["stored"]), parts, data.get("stack", 0), rows, data.get("limit"))

    def tensors(self) -> Iterator[tuple[str, Part]]:
        for part in self.parts.values():
            for name in part.names(self.stack):
                yield name, part


@dataclass(frozen=True, slots=True)
class ParamRecord:
    """A parameter a plan wants: its type, whether rounding to that type is allowed, and a source per name
    table. Where ranks have a `slice` of it each, (axis, of how many), the type is that of their part.
    """

    name: str
    type: Type
    sources: Mapping[str, Source]
    requantize: bool = False
    slice: tuple[int, int] | None = None

    @property
    def whole(self) -> Type:
        """The parameter's type before it is cut."""
        if self.slice is None:
            return self.type
        axis, of = self.slice
        shape = self.type.shape
        return self.type.with_shape((*shape[:axis], shape[axis] * of, *shape[axis + 1 :]))

    def part(self, value: Value, rank: int) -> Value:
        """What a rank has of the whole parameter, or of some matrices of a stack."""
        if self.slice is None:
            return value
        axis, of = self.slice
        return part_of(value, axis, of, rank)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ParamRecord:
        """Read a record of a plan. Raises CheckpointError if it is not one."""
        try:
            sources = {table: Source.from_json(source) for table, source in data["sources"].items()}
            cut = data.get("slice")
            if cut is not None:
                axis, of = map(int, cut)
                if not 0 <= axis < len(parse_type(data["type"]).shape) or of < 2:
                    raise ValueError(f"slice {cut}")
                cut = (axis, of)
            requantize = bool(data.get("requantize", False))
            return ParamRecord(data["name"], parse_type(data["type"]), sources, requantize, cut)
        except (KeyError, TypeError, ValueError, AttributeError, TypeSyntaxError) as error:
            name = data.get("name", "?") if isinstance(data, Mapping) else "?"
            raise CheckpointError(f"the plan's weight record {name!r} cannot be read: {error!r}") from None


# --- its value ---


REMEDY = "re-export it or download it again"


class Tensors(Protocol):
    """What is read from: an open checkpoint."""

    @property
    def tensors(self) -> Mapping[str, Entry]: ...
    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class ParamReader:
    """Reads one parameter from the tensors that `source` names."""

    checkpoint: Tensors
    param: ParamRecord
    source: Source

    @property
    def pieces(self) -> Sequence[int | None]:
        """What can be read by itself: the matrices of a stack, by number, or None, the whole parameter."""
        merged = not self.source.stack and len(self.source.parts["data"].shape) == 3
        return range(self.param.whole.shape[0] if merged else self.source.stack) or (None,)

    def entries(self, e: int | None) -> Iterator[Entry]:
        """The places that a piece is read from: of a merged stack, its part of them."""
        for role, part in self.source.parts.items():
            if role != "input_scale":
                entry = self.checkpoint.tensors[part.name(e or 0)]
                if e is not None and not self.source.stack:
                    each = entry.nbytes // entry.shape[0]
                    begin = entry.begin + e * each
                    entry = replace(entry, shape=entry.shape[1:], begin=begin, end=begin + each)
                yield entry

    def value(self) -> Value:
        """The parameter, all its pieces, before it is cut."""
        if self.pieces[0] is None:
            return self.piece(None)
        return self.run(range(len(self.pieces)))

    def run(self, matrices: range) -> Value:
        """Some matrices of a stack, together."""
        whole = self.param.whole
        type_ = whole.with_shape((len(matrices), *whole.shape[1:]))
        made = view(torch.empty(type_.extent, dtype=torch.uint8), type_)
        for i, e in enumerate(matrices):
            _copy(made.map(_at(i)) if isinstance(made, Quantized) else made[i], self.piece(e))
        return made

    def piece(self, e: int | None) -> Value:
        """A matrix of a stack, or the whole parameter: assembled, checked and converted."""
        if e is None:
            return self._convert(self._regroup(self._stored(None)), self.param.whole)
        return self._convert(self._stored(e), self.param.whole.with_shape(self.param.whole.shape[1:]))

    def _convert(self, value: Value, want: Type) -> Value:
        try:
            return convert(value, want, requantize=self.param.requantize)
        except ConversionError as error:
            self._fail("data", 0, f"cannot become parameter {self.param.name}: {error}")

    def _fail(self, role: str, e: int, what: str) -> NoReturn:
        name = self.source.parts[role].name(e)
        raise CheckpointError(f"{self.checkpoint.tensors[name].file}: tensor {name} {what}")

    def _stored(self, e: int | None) -> Value:
        """The stored value: of expert `e` of a stack, or the whole parameter."""
        parts = {r: self._tensor(r, e) for r in self.source.parts if r not in ("input_scale", "same")}
        data, stored = parts["data"], self.source.stored
        if "same" in self.source.parts and not torch.equal(data, other := self._tensor("same", e)):
            same = self.source.parts["same"].name(e or 0)
            self._fail(
                "data",
                e or 0,
                f"is {data.tolist()}, but {same} is {other.tolist()}; expected one value for both",
            )
        if isinstance(stored, TensorType):
            return data
        scale, format = parts["scale"], stored.format
        if format.scale is UE8M0 and scale.dtype is torch.float32:
            exponents = _exponents(scale)
            format = format if exponents is not None else replace(format, scale=F32)
            scale = scale if exponents is None else exponents
        return Quantized(format, data, scale, global_scale=parts.get("global_scale"))

    def _tensor(self, role: str, e: int | None) -> Tensor:
        """One part of the parameter (rows of a merged stack cut out), all of whose elements are proper
        numbers.
        """
        part = self.source.parts[role]
        tensor = self.checkpoint.tensor(part.name(e or 0))
        if e is not None and not self.source.stack:
            tensor = tensor[e]
        if self.source.rows is not None:
            tensor = tensor[self._rows(role)]
        self._check_numbers(role, e or 0, tensor)
        return tensor

    def _rows(self, role: str) -> slice:
        start, stop = self.source.rows or (0, 0)
        stored = self.source.stored
        block = stored.format.block[0] if role == "scale" and isinstance(stored, QuantType) else 1
        if start % block or (stop % block and stop != self.source.parts["data"].shape[-2]):
            self._fail(
                role,
                0,
                f"has blocks of {block} rows that straddle w1 and w3, which meet inside one at row {stop}",
            )
        return slice(start // block, -(-stop // block))

    def _check_numbers(self, role: str, e: int, tensor: Tensor) -> None:
        if self.source.limit is not None and role == "data":
            low, high = (int(x) for x in torch.aminmax(tensor))
            if low < 0 or high >= self.source.limit:
                worst = low if low < 0 else high
                self._fail(
                    role, e, f"holds {worst}; expected expert numbers from 0 to {self.source.limit - 1}"
                )
            return
        # Scales were judged before anything was read. Data in bytes is packed e2m1: all are numbers.
        fault = not_finite(tensor) if role == "data" and tensor.dtype is not torch.uint8 else None
        if fault is not None:
            self._fail(role, e, f"{fault}; {REMEDY}")

    def _regroup(self, value: Value) -> Value:
        """Give a matrix [G * R, K] the parameter's shape [G, R, K]; scale tiles must lie within a group or
        cover it.
        """
        shape = self.param.whole.shape
        if tuple(value.shape) == shape:
            return value
        if not isinstance(value, Quantized):
            return value.reshape(shape)
        (groups, rows), tile = shape[:2], value.format.block[0]
        if rows % tile == 0:
            scale = value.scale.reshape(groups, rows // tile, -1)
        elif tile % rows == 0:
            scale = value.scale[torch.arange(groups) * rows // tile].unsqueeze(1)
        else:
            self._fail(
                "scale",
                0,
                f"has tiles of {tile} rows, which do not line up with {groups} groups of {rows} rows",
            )
        return Quantized(value.format, value.data.reshape(*shape[:2], -1), scale)


def _at(e: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[e]


def _copy(target: Value, value: Value) -> None:
    if isinstance(target, Quantized):
        assert isinstance(value, Quantized)
        for part, new in zip(target.parts, value.parts, strict=True):
            part.copy_(new)
    else:
        assert isinstance(value, Tensor)
        target.copy_(value)


def _exponents(scale: Tensor) -> Tensor | None:
    """f32 scales that are all powers of two, as ue8m0 bytes; None if any is not."""
    bits = scale.view(torch.int32)
    exponent = bits >> 23  # negative for negative numbers
    if bool((((bits & 0x7FFFFF) != 0) | (exponent < 1) | (exponent > 254)).any()):
        return None
    return exponent.to(torch.uint8)
