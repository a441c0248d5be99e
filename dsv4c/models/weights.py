"""Which tensors a DeepSeek-V4 checkpoint holds: names, shapes and storage types, in each spelling in use.

`sources(config, table)` says which tensors of a checkpoint each parameter of `dsv4c.models.layout` is read
from, as plain data that the runtime's loader follows; `inventory(config, table)` is what a file should hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from dsv4c.config import ModelConfig
from dsv4c.errors import CheckpointError
from dsv4c.headers import ELEMENT_BYTES
from dsv4c.models.layout import Param, head_of_drafts, layout
from dsv4c.scope import LAYERS, Scope
from dsv4c.types import (
    BF16,
    F32,
    FP8_WEIGHT,
    I64,
    MXFP4,
    NVFP4,
    DType,
    QuantFormat,
    QuantType,
    TensorType,
    Type,
)

Table = Literal["release", "nvfp4", "transformers", "transformers-split"]
TABLES: tuple[Table, ...] = ("release", "nvfp4", "transformers", "transformers-split")
"""Spellings of tensor names.

release             the official checkpoints: layers.0.attn.wq_a.weight and .scale
nvfp4               the same, but routed experts of the main layers have weight_scale, weight_scale_2,
                    input_scale
transformers        module names of `DeepseekV4ForCausalLM`, expert stacks merged, scales named *_scale_inv;
                    written by `save_pretrained(..., save_original_format=False)`
transformers-split  what `save_pretrained` writes by default: release-like names under "model.", experts
                    separate
"""

# --- where a checkpoint keeps it ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a checkpoint, or one per expert where the name contains "{e}". `dtypes` are safetensors
    names, the usual one first; `shape` is as stored.
    """

    tensor: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]

    def names(self, stack: int) -> list[str]:
        return [self.tensor.format(e=e) for e in range(stack)] if "{e}" in self.tensor else [self.tensor]


@dataclass(frozen=True, slots=True)
class Source:
    """How one canonical parameter is read.

    stored  the parameter's type as the checkpoint stores it, in canonical shape
    parts   role -> tensor: data, scale, global_scale; `input_scale` belongs to the parameter but is read as
            another one; `same` must hold the same bytes as data (a scale that is stored twice)
    stack   number of experts when parts are per expert ("{e}" in the name), else 0
    rows    (start, stop): these rows of every matrix of a merged stack
    limit   integers must lie in [0, limit); None for floats
    """

    stored: Type
    parts: Mapping[str, Part]
    stack: int = 0
    rows: tuple[int, int] | None = None
    limit: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plan data, read back by `dsv4c.runtime.parameter.Source.from_json`. Defaults are left out."""
        parts = {role: [p.tensor, "|".join(p.dtypes), list(p.shape)] for role, p in self.parts.items()}
        data: dict[str, Any] = {"stored": str(self.stored), "parts": parts}
        if self.stack:
            data["stack"] = self.stack
        if self.rows:
            data["rows"] = list(self.rows)
        if self.limit is not None:
            data["limit"] = self.limit
        return data


def sources(config: ModelConfig, table: Table) -> dict[str, Source]:
    """Canonical parameter name -> where `table` keeps it, for every parameter the table has.

    `nvfp4` also has layers.L.ffn.experts.{w1,w2}.input_scale, f32 [E] (w3 shares that of w1); the
    transformers spellings have no MTP block.
    """
    found: dict[str, Source] = {}
    for param in layout(config):
        if table.startswith("transformers") and param.place.draft:
            continue
        found[param.name] = _source(config, table, param)
        stored_so = table == "nvfp4" and param.storage == "expert" and not param.place.draft
        if stored_so and param.place.leaf in ("w1", "w2"):
            found[f"{param.name}.input_scale"] = _input_scale(param)
    return found


def records(config: ModelConfig, wanted: Iterable[tuple[str, Type, bool]]) -> list[dict[str, Any]]:
    """Plan data for the loader: for every wanted (name, type, requantize) where each table keeps it.

    `requantize` allows a conversion that rounds. A type of a part of the parameter's shape is that of a rank,
    which the record says as `slice`: [axis, of how many]. Raises CheckpointError for a name that no table
    has. Read back by `dsv4c.runtime.parameter.ParamRecord.from_json`.
    """
    by_table = {table: sources(config, table) for table in TABLES}
    for known in by_table.values():
        known[head_of_drafts(config)] = known["head"]
    whole = {name: source.stored.shape for known in by_table.values() for name, source in known.items()}
    result = []
    for name, type, requantize in wanted:
        found = {table: known[name].to_json() for table, known in by_table.items() if name in known}
        if not found:
            raise CheckpointError(
                f"no checkpoint of {config.name} has a parameter {name}; see `layout` for names"
            )
        record: dict[str, Any] = {"name": name, "type": str(type), "sources": found}
        if requantize:
            record["requantize"] = True
        if type.shape != whole[name]:
            record["slice"] = _slice_of(name, whole[name], type.shape)
        result.append(record)
    return result


def _slice_of(name: str, whole: tuple[int, ...], part: tuple[int, ...]) -> list[int]:
    """(axis, of how many) parts of this shape a parameter has. Raises CheckpointError where it has not."""
    axes = [i for i, (n, m) in enumerate(zip(whole, part, strict=True)) if n != m]
    if len(axes) != 1 or whole[axes[0]] % part[axes[0]]:
        raise CheckpointError(f"{name}: {list(part)} is no rank's part of {list(whole)}")
    return [axes[0], whole[axes[0]] // part[axes[0]]]


_FORMATS: dict[str, QuantFormat | DType] = {
    "f32": F32,
    "bf16": BF16,
    "i64": I64,
    "fp8": FP8_WEIGHT,
    "mxfp4": MXFP4,
}


def stored_format(config: ModelConfig, table: Table, param: Param) -> QuantFormat | DType:
    """The number format in which `table` stores a parameter of this model."""
    if param.storage == "linear":
        return _FORMATS[config.linear_format]
    if param.storage == "expert":
        if table == "nvfp4" and not param.place.draft:  # MTP experts stay as the release has them
            return NVFP4
        # The NVFP4 checkpoints were recast from MXFP4, so that is what the other spellings hold of such a
        # model.
        recast = "bf16" if config.linear_format == "bf16" else "mxfp4"
        return _FORMATS[recast if config.expert_format == "nvfp4" else config.expert_format]
    return _FORMATS[param.storage]


def _source(config: ModelConfig, table: Table, param: Param) -> Source:
    format = stored_format(config, table, param)
    stored = TensorType(format, param.shape) if isinstance(format, DType) else QuantType(format, param.shape)
    limit = config.n_routed_experts if param.storage == "i64" else None
    if param.storage == "expert":
        return _expert_source(table, param, stored)
    shape = (math.prod(param.shape[:-1]), param.shape[-1]) if len(param.shape) == 3 else param.shape
    return Source(stored, _parts(table, _tensor_name(table, param), stored.with_shape(shape)), limit=limit)


def _expert_source(table: Table, param: Param, stored: Type) -> Source:
    E, out, width = param.shape
    layer, name = param.place.layer, param.place.leaf
    if table != "transformers":
        prefix = "model." if table == "transformers-split" else ""
        tensor = f"{prefix}{layer}.ffn.experts.{{e}}.{name}.weight"
        return Source(stored, _parts(table, tensor, stored.with_shape((out, width))), stack=E)
    if name == "w2":
        return Source(stored, _parts(table, f"model.{layer}.mlp.experts.down_proj", stored))
    rows = (0, out) if name == "w1" else (out, 2 * out)
    tensor = f"model.{layer}.mlp.experts.gate_up_proj"
    return Source(stored, _parts(table, tensor, stored.with_shape((E, 2 * out, width))), rows=rows)


def _parts(table: Table, tensor: str, stored: Type) -> dict[str, Part]:
    """The tensors of one value of type `stored`, whose data is called `tensor`.

    Packed FP4 and power-of-two scales are the same bytes under several dtypes. A plain tensor may be stored
    wider or narrower than the release has it: loading converts it if that rounds nothing.
    """
    if isinstance(stored, TensorType):
        dtypes = {BF16: ("BF16", "F32"), F32: ("F32", "BF16"), I64: ("I64", "I32")}[stored.dtype]
        return {"data": Part(tensor, dtypes, stored.shape)}
    data, scale = stored.components[:2]
    base = tensor.removesuffix(".weight")
    if stored.format == NVFP4:
        return {
            "data": Part(tensor, ("U8", "I8"), data.shape),
            "scale": Part(f"{base}.weight_scale", ("F8_E4M3",), scale.shape),
            "global_scale": Part(f"{base}.weight_scale_2", ("F32",), ()),
            "input_scale": Part(f"{base}.input_scale", ("F32",), ()),
        }
    name = f"{tensor}_scale_inv" if table == "transformers" else f"{base}.scale"
    return {
        "data": Part(tensor, ("F8_E4M3",) if stored.format == FP8_WEIGHT else ("I8", "U8"), data.shape),
        "scale": Part(name, ("F8_E8M0", "F32", "U8"), scale.shape),
    }


def _input_scale(param: Param) -> Source:
    E = param.shape[0]
    layer, name = param.place.layer, param.place.leaf
    parts = {"data": Part(f"{layer}.ffn.experts.{{e}}.{name}.input_scale", ("F32",), ())}
    if name == "w1":
        parts["same"] = Part(f"{layer}.ffn.experts.{{e}}.w3.input_scale", ("F32",), ())
    return Source(TensorType(F32, (E,)), parts, stack=E)


# --- names --------------------------------------------------------------------------------------------------

_TOP = {
    "embed": "embed_tokens.weight",
    "norm": "norm.weight",
    "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
}

_MODULES = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn.wq_a": "self_attn.q_a_proj.weight",
    "attn.q_norm": "self_attn.q_a_norm.weight",
    "attn.wq_b": "self_attn.q_b_proj.weight",
    "attn.wkv": "self_attn.kv_proj.weight",
    "attn.kv_norm": "self_attn.kv_norm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wo_a": "self_attn.o_a_proj.weight",
    "attn.wo_b": "self_attn.o_b_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.norm": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.norm": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj.weight",
}

_BARE = re.compile(r"(^|\.)(hc_\w+|attn_sink|ape|bias|tid2eid)$")  # tensors without ".weight"


def _tensor_name(table: Table, param: Param) -> str:
    """Name of a parameter's data tensor; experts are named by `_expert_source`."""
    name = param.name
    release = name if _BARE.search(name) else f"{name}.weight"
    if not table.startswith("transformers"):
        return release
    if name == "head":
        return "lm_head.weight" if table == "transformers" else "head.weight"
    if name in _TOP:
        return f"model.{_TOP[name]}"
    layer, path = param.place.layer, param.place.path
    if table == "transformers":
        return f"model.{layer}.{_MODULES[path]}"
    # save_pretrained undoes the renames it made at load, and `kv_norm` comes back as plain `norm`.
    return f"model.{layer}.attn.norm.weight" if path == "attn.kv_norm" else f"model.{release}"


# Per spelling what stands before the layer, and what inside of one tells it from the others.
_SIGNS: tuple[tuple[Table, str, re.Pattern[str]], ...] = (
    ("nvfp4", "", re.compile(r"ffn\.experts\.\d+\.w[123]\.weight_scale(_2)?")),
    ("release", "", re.compile(r"ffn\.experts\.\d+\.w[123]\.scale")),
    ("transformers", "model.", re.compile(r"(self_attn|mlp|attn_hc|ffn_hc)\..+")),
    ("transformers-split", "model.", re.compile(r"(attn|ffn)\..+")),
)
_RELEASE_LAYER = re.compile(r"(attn|ffn)\..+")


def detect_table(names: Iterable[str], where: str) -> Table:
    """The spelling that the tensor names of the checkpoint `where` follow. Raises CheckpointError if it is
    none or more than one.
    """
    names = sorted(names)
    seen: dict[Table, str] = {}
    for table, prefix, sign in _SIGNS:
        match = _first(names, prefix, sign)
        if match is not None:
            seen[table] = match
    plain = _first(names, "", _RELEASE_LAYER)
    if plain is not None and not seen.keys() & {"release", "nvfp4"}:
        seen["release"] = plain
    if len(seen) == 1:
        return next(iter(seen))
    if not seen:
        examples = ", ".join(names[:3]) or "no tensors at all"
        raise CheckpointError(
            f"{where}: these tensor names are not those of a DeepSeek-V4 checkpoint: {examples}; expected "
            "names like layers.0.attn.wq_a.weight (release) or model.layers.0.self_attn.q_a_proj.weight "
            "(transformers)"
        )
    examples = "; ".join(f"{name} ({table})" for table, name in seen.items())
    raise CheckpointError(
        f"{where}: the tensor names mix {len(seen)} spellings: {examples}; remove the tensors of all but one"
    )


def _first(names: Iterable[str], prefix: str, sign: re.Pattern[str]) -> str | None:
    """The first tensor of a layer, behind a prefix, whose path fits."""
    for name in names:
        scope = Scope.of(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if scope is not None and scope.block == LAYERS and sign.fullmatch(scope.path):
            return name
    return None


# --- expected contents --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint; `dtype` is the safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


def inventory(config: ModelConfig, table: Table = "release", *, mtp: bool = True) -> list[TensorSpec]:
    """Every tensor that a checkpoint of this model holds, in the order of `layout`, each once."""
    specs: dict[str, TensorSpec] = {}
    for name, source in sources(config, table).items():
        if Scope.of(name).draft and not mtp:
            continue
        for part in source.parts.values():
            for tensor in part.names(source.stack):
                specs.setdefault(tensor, TensorSpec(tensor, part.dtypes[0], part.shape))
    return list(specs.values())


class _Entry(Protocol):
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...


class _Report(Protocol):
    @property
    def missing(self) -> list[str]: ...
    @property
    def unexpected(self) -> list[str]: ...
    @property
    def misshapen(self) -> list[str]: ...
    @property
    def mistyped(self) -> list[str]: ...


class _Checkpoint(Protocol):
    """What `describe` needs of `dsv4c.runtime.checkpoint.Checkpoint`."""

    @property
    def path(self) -> Any: ...
    @property
    def files(self) -> list[Any]: ...
    @property
    def tensors(self) -> Mapping[str, _Entry]: ...
    def compare(self, sources: Mapping[str, Any]) -> _Report: ...
    def unsound_scales(self, sources: Iterable[Any]) -> list[str]: ...


@dataclass
class _Tally:
    tensors: int = 0
    bytes: int = 0
    by_dtype: dict[str, int] = field(default_factory=dict)


def describe(checkpoint: _Checkpoint, config: ModelConfig) -> dict[str, Any]:
    """What a checkpoint holds against what the model needs, as JSON-able data.

    Keys: table, files, tensors, bytes, bytes_by_dtype, parameters, drafts {model, checkpoint} (what the model
    drafts with, and whether the checkpoint has such tensors), missing, unexpected, misshapen, mistyped,
    unsound (lists of sentences or names), complete. Tensors that draft are compared when the checkpoint has
    any. Scales are looked at (unsound: those that cannot be right) when all
    headers fit. Raises CheckpointError if the names follow no table.
    """
    table = detect_table(checkpoint.tensors, str(checkpoint.path))
    drafts = any(Scope.of(name).draft for name in checkpoint.tensors)
    needed = {
        name: source.to_json()
        for name, source in sources(config, table).items()
        if drafts or not Scope.of(name).draft
    }
    report = checkpoint.compare(needed)
    tally = _Tally()
    for entry in checkpoint.tensors.values():
        tally.tensors += 1
        tally.bytes += entry.nbytes
        tally.by_dtype[entry.dtype] = tally.by_dtype.get(entry.dtype, 0) + entry.nbytes
    fits = not (report.missing or report.unexpected or report.misshapen or report.mistyped)
    unsound = checkpoint.unsound_scales(needed.values()) if fits else []
    return {
        "table": table,
        "files": [str(file) for file in checkpoint.files],
        "tensors": tally.tensors,
        "bytes": tally.bytes,
        "bytes_by_dtype": dict(sorted(tally.by_dtype.items())),
        "parameters": sum(param.size for param in layout(config) if param.name in needed),
        "drafts": {"model": config.drafts_with, "checkpoint": drafts},
        "missing": report.missing,
        "unexpected": report.unexpected,
        "misshapen": report.misshapen,
        "mistyped": report.mistyped,
        "unsound": unsound,
        "complete": fits and not unsound,
    }
