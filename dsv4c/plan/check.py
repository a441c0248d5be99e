"""Proves what a plan's data says by itself, without its graphs: run whenever a plan is loaded.

Every launch agrees with its kernel, of which the cubin says what it takes and the source how it is launched;
every byte that a launch touches lies in its block, at its value's place; sizes, limits and files agree with
each other. What launches compute needs the graphs: `dsv4c.compiler.verify`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dsv4c.arch import ARCHS, SYSTEM_SHARED, Arch
from dsv4c.buckets import Bucket
from dsv4c.exchange import SITE, SITES, TURNS, layout_of, tiled_region
from dsv4c.plan.cubin import Cubin, CubinError, read_cubin
from dsv4c.plan.declared import Declared, SourceError, divides, read_source
from dsv4c.plan.records import SPACES, Argument, BodyCode, KernelCode, Launch, Place, Program
from dsv4c.plan.typed import MOST
from dsv4c.types import ALIGN, F32, I32, TensorType, Type, TypeSyntaxError, parse_type

if TYPE_CHECKING:
    from dsv4c.plan.folder import Plan

BLOCK_ALIGN = 256  # bytes: where values begin in their blocks

# Bounds of CUDA, of every architecture here.
MOST_THREADS, MOST_CLUSTER, REGISTERS = 1024, 16, 65536
MOST_GRID = ((1 << 31) - 1, 65535, 65535)


@dataclass(frozen=True)
class Violation:
    """What is wrong, where: `launch` is its name, or "" for what concerns no launch alone; so is `bucket`.

    kind: order | wait | unwritten | stale | alias | outside | misplaced | overlap | kernel | launch | missing
    | surplus | limit | bucket | lowered | exchange.
    """

    kind: str
    launch: str
    text: str
    bucket: str = ""

    def __str__(self) -> str:
        places = [f"bucket {self.bucket}: "] * bool(self.bucket) + [f"launch {self.launch}: "] * bool(
            self.launch
        )
        return f"{self.kind}: {''.join(places)}{self.text}"


Parts = Mapping[str, tuple[str, int, int]]
"""Where a value's arrays lie, by component: block, offset, bytes."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter's place in the block of weights; `parts` are its arrays in order."""

    name: str
    type: Type
    form: str
    offset: int
    parts: Parts


def check(plan: Plan) -> list[Violation]:
    """All violations that need no graph; empty when there are none."""
    kernels, found = read_kernels(plan)
    weights, unread = _weights(plan)
    found += [
        *unread,
        *_weights_apart(weights.values()),
        *_states(plan),
        *_limits(plan),
        *_blocks(plan, weights.values()),
        *_files(plan),
    ]
    for name, program in programs(plan).items():
        about = [
            *_values(plan, program, weights),
            *(_interface(plan, program) if program.bucket is not None else _constants(program)),
            *_launches(plan, program, kernels, weights),
            *_exchanges(plan, program, kernels),
        ]
        found += [replace(v, bucket=name) for v in about]
    return found


def programs(plan: Plan) -> dict[str, Program]:
    """The programs of all buckets by name, and "load"."""
    return dict(plan.buckets) | ({"load": plan.load} if plan.load is not None else {})


# Kernels ----------------------------------------------------------------------------------------------------

_RECORD: Mapping[str, type] = {
    "symbol": str,
    "origin": str,
    "edited": bool,
    "source": str,
    "cubin": str,
    "ptx": str,
    "registers": int,
    "stack": int,
    "static_shared": int,
    "code": int,
    "not_run_here": bool,
}


def read_kernels(plan: Plan) -> tuple[dict[str, tuple[Cubin, Declared]], list[Violation]]:
    """What kernels say of themselves, of those that nothing is wrong with; and what is wrong with others."""
    known, found = {}, []
    for key, record in plan.kernels.items():
        wrong = list(_record(plan, record))
        if not wrong:
            try:
                cubin = read_cubin(plan.files[record["cubin"]])
                declared = read_source(plan.files[record["source"]].decode(errors="replace"))
            except (CubinError, SourceError) as error:
                wrong = [f"its {'cubin' if isinstance(error, CubinError) else 'source'} {error}"]
            else:
                wrong = list(_agrees(plan, record, cubin, declared))
                known[key] = cubin, declared
        found += [Violation("kernel", "", f"kernel {key}: {text}") for text in wrong]
    codes = [launch.code for program in programs(plan).values() for launch in program.launches]
    launched = {code.kernel for code in codes if isinstance(code, KernelCode)}
    found += [
        Violation("surplus", "", f"no launch runs kernel {key}")
        for key in plan.kernels
        if key not in launched
    ]
    return known, found


def _record(plan: Plan, record: Mapping[str, Any]) -> Iterator[str]:
    types = {name: type(value) for name, value in record.items()}
    if types != _RECORD:
        yield f"its record has {', '.join(sorted(types))[:200]}; expected {', '.join(_RECORD)}"
        return
    paths = [record[name] for name in ("source", "cubin", "ptx")]
    yield from (f"names {path}, which the plan has not" for path in paths if path not in plan.files)
    if len({path.rpartition(".")[0] for path in paths}) != 1:
        yield f"its files are of several kernels: {', '.join(paths)}"
    arch = ARCHS.get(plan.target)
    if arch is None:
        yield f"is of no use to target {plan.target}"
    elif record["not_run_here"] == arch.run_here:
        yield f"not_run_here is {record['not_run_here']}, of {arch.name} it is {not arch.run_here}"


def _agrees(plan: Plan, record: Mapping[str, Any], cubin: Cubin, declared: Declared) -> Iterator[str]:
    """Cubin, source and record are of one kernel, which fits the architecture."""
    arch = ARCHS[plan.target]
    if cubin.architecture != arch.name:
        yield f"its cubin is for {cubin.architecture}, the plan for {arch.name}"
    if cubin.symbol != record["symbol"]:
        yield f"its cubin holds {cubin.symbol}, its record names {record['symbol']}"
    for name, value in asdict(cubin.resources).items():
        if record[name] != value:
            yield f"{name} is {record[name]}, the cubin says {value}"
    if set(cubin.parameters) - {8}:
        yield f"its parameters have {', '.join(map(str, cubin.parameters))} bytes; all are pointers of 8"
    if len(cubin.parameters) != len(declared.parameters):
        yield f"its cubin takes {len(cubin.parameters)} parameters, its source {len(declared.parameters)}"
    if cubin.threads != (declared.block, 1, 1):
        yield f"its cubin wants blocks of {cubin.threads} threads, its source launches {declared.block}"
    if not 0 < declared.block <= MOST_THREADS or declared.block * cubin.resources.registers > REGISTERS:
        yield f"{declared.block} threads of {cubin.resources.registers} registers do not fit {arch.name}"
    if not 0 < math.prod(declared.cluster) <= MOST_CLUSTER:
        yield f"clusters of {declared.cluster} CTAs; at most {MOST_CLUSTER} fit"
    beside = max(0, cubin.resources.static_shared - SYSTEM_SHARED)
    if declared.shared + beside > arch.shared_per_cta:
        yield f"{declared.shared + beside} bytes of shared memory; a CTA has {arch.shared_per_cta}"


# Weights, states, limits, blocks, files ---------------------------------------------------------------------


def _weights(plan: Plan) -> tuple[dict[str, Weight], list[Violation]]:
    """Places of the weights by name, and what is wrong with single ones."""
    weights: dict[str, Weight] = {}
    found = []
    for record in plan.weights:
        try:
            weight = _weight(record)
        except (KeyError, TypeError, ValueError, TypeSyntaxError) as error:
            text = f"weight {str(record.get('name'))[:80]}: its record cannot be read: {error!r:.120}"
            found.append(Violation("misplaced", "", text))
            continue
        weights[weight.name] = weight
        sizes = {c.name: c.nbytes for c in weight.type.components}
        own = {name: size for name, (_, _, size) in weight.parts.items()}
        if weight.offset != next(iter(weight.parts.values()), ("", -1, 0))[1]:
            found.append(Violation("misplaced", "", f"weight {weight.name} does not begin with its data"))
        if (weight.form == "plain" and own != sizes) or "data" not in own or own.keys() - sizes.keys():
            text = (
                f"weight {weight.name} has {own} bytes as {weight.form}, its type {weight.type} has {sizes}"
            )
            found.append(Violation("misplaced", "", text))
    return weights, [*found, *_once("weight", [str(r.get("name")) for r in (*plan.weights, *plan.unused)])]


def _weight(record: Mapping[str, Any]) -> Weight:
    """Raises KeyError, TypeError or ValueError for what is no record of a weight with a place."""
    known = {"name", "type", "sources", "requantize", "slice", "offset", "form", "components"}
    if record.keys() - known:
        raise ValueError(f"it has {', '.join(sorted(record.keys() - known))[:80]}")
    name, form, offset = record["name"], record["form"], record["offset"]
    parts = {c["name"]: ("weights", c["offset"], c["nbytes"]) for c in record["components"]}
    numbers = [offset, *(n for part in parts.values() for n in part[1:])]
    if not all(isinstance(record[key], str) for key in ("name", "form", "type")):
        raise TypeError("name, form and type are words")
    if len(parts) != len(record["components"]):
        raise TypeError("two components have one name")
    if any(type(n) is not int or not 0 <= n <= MOST for n in numbers):
        raise TypeError(f"offsets and sizes {numbers}; expected counts")
    return Weight(name, parse_type(record["type"]), form, offset, parts)


def _weights_apart(weights: Iterable[Weight]) -> Iterator[Violation]:
    return _apart(
        "weights",
        [(at, at + size, f"{w.name}.{part}") for w in weights for part, (_, at, size) in w.parts.items()],
    )


def _states(plan: Plan) -> Iterator[Violation]:
    yield from _apart("state", [(s.offset, s.offset + s.type.extent, s.name) for s in plan.state])
    yield from _once("state", [s.name for s in plan.state])


def _apart(block: str, spans: Iterable[tuple[int, int, str]]) -> Iterator[Violation]:
    """Values of a block that is kept share no bytes, and begin where 16-byte loads can."""
    end, last = 0, ""
    for start, stop, name in sorted(spans):
        if start % ALIGN:
            yield Violation("misplaced", "", f"{name} starts at byte {start} of {block}, no multiple of 16")
        if start < end:
            yield Violation("overlap", "", f"{name} starts at byte {start} of {block}, inside of {last}")
        if stop > end:
            end, last = stop, name


def _once(what: str, names: Sequence[str]) -> Iterator[Violation]:
    for name in sorted(name for name, count in Counter(names).items() if count > 1):
        yield Violation("surplus", "", f"{what} {name} is there twice")


_CACHE = re.compile(r"layers\.(\d{1,6})\.(?:.+\.)?(?:entries|keys)")


def _limits(plan: Plan) -> Iterator[Violation]:
    """Every state has room for the slots, and caches of compressed entries for the context."""
    slots, context = plan.deployment["slots"], plan.deployment["max_context"]
    for state in plan.state:
        if state.type.shape[0] != slots:
            yield Violation("limit", "", f"{state.name} is {state.type}, the deployment has {slots} slots")
    ratios = plan.config["compress_ratios"]
    for state in plan.state:
        cache = _CACHE.fullmatch(state.name)
        if cache is None or int(cache[1]) >= len(ratios):
            continue
        ratio = max(1, ratios[int(cache[1])])
        room, wanted = state.type.shape[1], max(1, context // ratio)
        if room != wanted:
            text = f"{state.name} has {room} entries of {ratio} tokens, a context of {context} has {wanted}"
            yield Violation("limit", "", text)
    if context > plan.config["max_position_embeddings"]:
        yield Violation("limit", "", f"max_context is {context}, beyond the model's positions")
    for name, bucket in ((n, p.shape) for n, p in plan.buckets.items()):
        if bucket.sequences > slots or bucket.tokens > context:
            yield Violation(
                "limit", "", f"bucket {name} takes more than {slots} slots of {context} tokens hold"
            )
    if plan.deployment["recipe"] != plan.recipe:
        yield Violation("limit", "", f"its recipe is {plan.recipe}, deployed {plan.deployment['recipe']}")


def _blocks(plan: Plan, weights: Iterable[Weight]) -> Iterator[Violation]:
    """Blocks end where the last of what lies in them does."""
    ends: dict[str, int] = dict.fromkeys(SPACES, 0)
    ends["weights"] = max((at + size for w in weights for _, at, size in w.parts.values()), default=0)
    for state in plan.state:
        ends["state"] = max(ends["state"], state.offset + state.type.extent)
    for program in programs(plan).values():
        ends["arena"] = max(ends["arena"], program.arena_bytes)
        for name in program.inputs:
            if name in program.values:
                place = program.values[name]
                ends["input"] = max(ends["input"], place.offset + place.type.extent)
    if plan.load is not None:
        for place in plan.load.values.values():
            if place.space == "constants":
                ends["constants"] = max(ends["constants"], place.offset + place.type.extent)
    sites = max((sum(x.exchanges for x in p.launches) for p in plan.buckets.values()), default=0)
    if sites:
        try:
            ends["exchange"] = layout_of(plan.ranks, sites, plan.blocks["exchange"]).nbytes
            ends["tiles"] = tiled_region(plan.blocks["tiles"], plan.ranks) * TURNS * plan.ranks
        except ValueError as error:
            yield Violation("exchange", "", str(error))
            return
    for space, end in ends.items():
        if plan.blocks[space] != _aligned(end):
            yield Violation(
                "outside", "", f"block {space} has {plan.blocks[space]} bytes, what lies in it ends at {end}"
            )
    for space in plan.blocks:
        if space not in SPACES:
            yield Violation("outside", "", f"block {space!r} is unknown: known are {', '.join(SPACES)}")


def _files(plan: Plan) -> Iterator[Violation]:
    """The plan has the files it names, and no other."""
    named = {p.graph for p in programs(plan).values()}
    for record in plan.kernels.values():
        named |= {record[kind] for kind in ("source", "cubin", "ptx") if isinstance(record.get(kind), str)}
    for program in programs(plan).values():
        named |= {x.code.body for x in program.launches if isinstance(x.code, BodyCode) and x.code.body}
    for name in sorted(set(plan.files) - named):
        yield Violation("surplus", "", f"nothing names the file {name}")
    for name, program in programs(plan).items():
        if program.graph not in plan.files or program.graph != f"graph.{name}.txt":
            yield Violation(
                "missing", "", f"the graph of {name} is {program.graph}; expected graph.{name}.txt"
            )


# Values -----------------------------------------------------------------------------------------------------


def _values(plan: Plan, program: Program, weights: Mapping[str, Weight]) -> Iterator[Violation]:
    """Values lie in their blocks, and those that are kept where the plan keeps them."""
    states = {state.offset: state.type.extent for state in plan.state}
    made = plan.load.values if plan.load is not None else {}
    end = 0
    for name, place in program.values.items():
        offset, extent = place.offset, place.type.extent
        inside = not offset % ALIGN and 0 <= offset <= offset + extent <= plan.blocks[place.space]
        if not inside and name not in weights:  # those have a form, and its bytes
            yield Violation("outside", "", _beyond(name, place, plan.blocks[place.space]))
        if place.space == "arena":
            end = max(end, offset + extent)
        elif name in weights and place != Place(weights[name].type, "weights", weights[name].offset):
            yield Violation("misplaced", "", f"{name} is {place.type} at {offset}, its weight elsewhere")
        elif place.space == "state" and states.get(offset, -1) < extent:
            yield Violation("misplaced", "", f"{name} is at byte {offset} of state, where no state begins")
        elif place.space == "constants" and name in made and place != made[name]:
            yield Violation("misplaced", "", f"{name} is not where it is computed at load")
        elif place.space == "constants" and name not in made:
            yield Violation("unwritten", "", f"{name} is a constant that nothing computes at load")
    scratch = [a.offset + a.nbytes for x in program.launches for a in x.arguments if a.space == "arena"]
    end = _aligned(max(end, *scratch, 0))
    # What runs at load has room there for its results too, which lie among the constants.
    most = end if program.bucket is not None else end + plan.blocks["constants"]
    if not end <= program.arena_bytes <= most:
        yield Violation("outside", "", f"its arena has {program.arena_bytes} bytes, of which {end} are used")


def _beyond(name: str, place: Place, size: int) -> str:
    end = place.offset + place.type.extent
    return f"{name} is bytes {place.offset} to {end} of {place.space}, which has {size}"


def _interface(plan: Plan, program: Program) -> Iterator[Violation]:
    """Inputs and outputs have the sizes of the bucket."""
    bucket = program.shape
    last = bucket.sequences if bucket.logits == "last" else bucket.rows
    sizes = {"tokens": bucket.given, "lengths": bucket.sequences, "slots": bucket.sequences}
    wanted: dict[str, Type] = {name: TensorType(I32, (size,)) for name, size in sizes.items()}
    spans = []
    for name in program.inputs:
        place = program.values.get(name)
        if place is None or place.space != "input" or place.offset % BLOCK_ALIGN:
            yield Violation("bucket", "", f"its input {name} has no place among the inputs")
            continue
        spans.append((place.offset, place.offset + place.type.extent, name))
        if place.type != wanted.get(name, place.type) or place.type.shape[0] not in (
            bucket.rows,
            bucket.sequences,
        ):
            yield Violation("bucket", "", f"its input {name} is {place.type}; {bucket.name} has other sizes")
    yield from _apart("input", spans)
    yield from _once("input", program.inputs)
    if set(wanted) - set(program.inputs):
        yield Violation(
            "bucket", "", f"its inputs are {', '.join(program.inputs)}; it needs {', '.join(wanted)}"
        )
    following, judges = bucket.sequences if bucket.judges else last, bucket.judges
    made = {
        "logits": TensorType(F32, (last, plan.config["vocab_size"])),
        "next": TensorType(I32, (following,)),
    }
    if bucket.sampled:
        made["going"] = TensorType(I32, (bucket.sequences,))
    if bucket.sampled or judges:
        made["said"] = TensorType(I32, (bucket.rows,))
    for label, name in program.outputs.items():
        if name not in program.values:
            yield Violation("bucket", "", f"its output {label} is {name}, which is no value")
    for label, type_ in made.items():
        place = program.values.get(program.outputs.get(label, ""))
        if place is None or place.type != type_:
            found = None if place is None else place.type
            yield Violation("bucket", "", f"its output {label} is {found}; expected {type_}")


def _constants(program: Program) -> Iterator[Violation]:
    """What is computed at load is kept."""
    for label, name in program.outputs.items():
        if name not in program.values or program.values[name].space != "constants":
            yield Violation("bucket", "", f"its output {label} is {name}, which is no constant")


# Launches ---------------------------------------------------------------------------------------------------


def _launches(
    plan: Plan,
    program: Program,
    kernels: Mapping[str, tuple[Cubin, Declared]],
    weights: Mapping[str, Weight],
) -> Iterator[Violation]:
    places: dict[str, Parts] = {
        name: {c.name: (p.space, p.offset + c.offset, c.nbytes) for c in p.type.components}
        for name, p in program.values.items()
    }
    places |= {name: weights[name].parts for name in places if name in weights}
    written = ("constants", "arena") if program.bucket is None else ("state", "arena", "exchange")
    arch = ARCHS.get(plan.target) if program.bucket is not None else None
    rows = _row_counts(plan, program)
    yield from _once("launch", [launch.name for launch in program.launches])
    for index, launch in enumerate(program.launches):
        yield from _order(launch, index)
        yield from _arguments(plan.blocks, launch, places, written)
        code = launch.code
        if isinstance(code, BodyCode):
            if arch is not None:
                yield Violation("kernel", launch.name, f"has code for the CPU, in a plan for {arch.name}")
            elif code.body and code.body not in plan.files:
                yield Violation("kernel", launch.name, f"runs {code.body}, which the plan has not")
        elif arch is None:
            yield Violation("kernel", launch.name, f"has kernel {code.kernel}, where the CPU runs")
        elif code.kernel not in plan.kernels:
            yield Violation("kernel", launch.name, f"runs kernel {code.kernel}, which the plan has not")
        else:
            if code.programmatic and not code.waits:
                yield Violation("wait", launch.name, "has programmatic edges, and its kernel does not wait")
            if code.kernel not in kernels:
                continue  # said of the kernel
            declared = kernels[code.kernel][1]
            for text in _launched(program.shape, rows, code, launch.arguments, declared, arch):
                yield Violation("launch", launch.name, text)


# Ranks ------------------------------------------------------------------------------------------------------


def _exchanges(
    plan: Plan, program: Program, kernels: Mapping[str, tuple[Cubin, Declared]]
) -> Iterator[Violation]:
    """No wait between ranks is forever, and nobody reads another exchange's words.

    All ranks run these launches, so all come to the same exchanges in the same order if each has the next
    number. What a rank's kernel waits for, another's kernel of the same number gives: which must have begun
    there, whatever else waits. So launches are one chain from the first exchange to the last, each behind the
    one before, so that no CTA takes the room of an earlier launch's; and a kernel that waits for words gives
    its own first.
    """
    if plan.ranks == 1 or program.bucket is None:
        for launch in program.launches:
            if _exchanging(launch):
                yield Violation("exchange", launch.name, f"exchanges values, in a plan for {plan.ranks} rank")
        return
    given = {launch.nodes for launch in program.launches if launch.exchanges}
    found = [
        i
        for i, launch in enumerate(program.launches)
        if launch.exchanges or (_exchanging(launch) and launch.nodes not in given)
    ]
    if not found:
        yield Violation("exchange", "", f"has no exchange, in a plan for {plan.ranks} ranks")
        return
    for i in range(found[0] + 1, found[-1] + 1):
        if program.launches[i].after != (i - 1,):
            yield Violation(
                "exchange",
                program.launches[i].name,
                f"is behind {program.launches[i].after}, between two exchanges: expected {(i - 1,)}, or a "
                "rank may hold what another waits for",
            )
    for number, i in enumerate(found):
        launch = program.launches[i]
        if isinstance(launch.code, KernelCode):
            yield from _exchange(launch, launch.code, number, kernels)


def _exchanging(launch: Launch) -> bool:
    return launch.exchanges or not {"all_reduce", "all_gather"}.isdisjoint(launch.op.split(" + "))


def _exchange(
    launch: Launch,
    code: KernelCode,
    number: int,
    kernels: Mapping[str, tuple[Cubin, Declared]],
) -> Iterator[Violation]:
    """One exchange, the program's `number`-th from 0 on."""
    own = {a.value: a for a in launch.arguments if a.space == "exchange"}
    block, site = own.get("exchange"), own.get("exchange.site")
    if block is None or (block.offset, block.nbytes) != (0, SITES):
        yield Violation("exchange", launch.name, "does not get the header of the block for exchanges")
    if site is None or site.offset != SITES + SITE * number:
        found = "none" if site is None else f"the one at byte {site.offset}"
        yield Violation(
            "exchange", launch.name, f"is exchange {number}, at byte {SITES + SITE * number}; gets {found}"
        )
    if code.kernel in kernels and (wrong := kernels[code.kernel][1].exchange):
        yield Violation("exchange", launch.name, wrong)


def _order(launch: Launch, index: int) -> Iterator[Violation]:
    late = [i for i in launch.after if not 0 <= i < index]
    if late:
        yield Violation("order", launch.name, f"is behind launch {late[0]}, which does not come before it")
    if any(one >= two for one, two in pairwise(launch.after)):
        yield Violation("order", launch.name, f"is behind {launch.after}; expected each once, in order")


def _arguments(
    blocks: Mapping[str, int], launch: Launch, places: Mapping[str, Parts], written: tuple[str, ...]
) -> Iterator[Violation]:
    """Arguments lie inside of their block, at the place of their value. What is no value is scratch."""
    for a in launch.arguments:
        if a.space not in blocks:
            yield Violation(
                "outside", launch.name, f"{_of(a)} is in block {a.space!r}: known are {', '.join(SPACES)}"
            )
            continue
        end = a.offset + a.nbytes
        if not 0 <= a.offset < end <= blocks[a.space]:
            yield Violation(
                "outside",
                launch.name,
                f"{_of(a)} is bytes {a.offset} to {end} of {a.space}, which has {blocks[a.space]}",
            )
        elif a.offset % ALIGN:
            yield Violation("outside", launch.name, f"{_of(a)} is at byte {a.offset}, no multiple of {ALIGN}")
        elif a.value in places:
            found = (a.space, a.offset, a.nbytes)
            if places[a.value].get(a.component) != found:
                yield Violation(
                    "misplaced",
                    launch.name,
                    f"{_of(a)} is at {found}, its value at {places[a.value].get(a.component)}",
                )
        elif a.space not in ("arena", "exchange"):
            yield Violation("misplaced", launch.name, f"{_of(a)} is in {a.space}, and no value of the graph")
        if a.box and not (a.box.sound and a.box.extent <= a.nbytes and a.access in ("r", "early")):
            yield Violation(
                "launch",
                launch.name,
                f"{_of(a)} of {a.nbytes} bytes, access {a.access}, is copied by {a.box}; expected one "
                "that it holds and nothing writes",
            )
        if a.access not in ("r", "w", "rw", "early"):
            yield Violation(
                "launch", launch.name, f"{_of(a)} has access {a.access!r}; expected r, w, rw or early"
            )
        elif "w" in a.access and a.space not in written:
            kept = "a weight" if a.space == "weights" else f"in {a.space}"
            yield Violation("misplaced", launch.name, f"{_of(a)} is {kept}, and is written")


def _of(a: Argument) -> str:
    return f"{a.value}.{a.component}"


def _row_counts(plan: Plan, program: Program) -> frozenset[int]:
    """How many rows a launch of the bucket may be about."""
    if program.bucket is None:
        return frozenset()
    drafted = program.bucket.sequences * plan.config.get("dspark_block_size", 0) * program.bucket.drafts
    return frozenset({program.bucket.rows, program.bucket.sequences, drafted} - {0})


def _launched(
    bucket: Bucket,
    rows: frozenset[int],
    code: KernelCode,
    arguments: Sequence[Argument],
    declared: Declared,
    arch: Arch,
) -> Iterator[str]:
    """A launch is what its kernel's source asks for, and the architecture can do."""
    if len(arguments) != len(declared.parameters):
        yield f"has {len(arguments)} arguments, its kernel takes {len(declared.parameters)}"
    for a, name in zip(arguments, declared.parameters, strict=False):
        if a.component != "data" and not name.endswith(f"_{a.component}"):
            yield f"gives {_of(a)} for the parameter {name}"
    if code.block != declared.block:
        yield f"has blocks of {code.block} threads, its kernel wants {declared.block}"
    if code.cluster != declared.cluster:
        yield f"has clusters of {code.cluster}, its kernel wants {declared.cluster}"
    if code.shared != declared.shared:
        yield f"has {code.shared} bytes of shared memory, its kernel wants {declared.shared}"
    if not all(0 < g <= most for g, most in zip(code.grid, MOST_GRID, strict=True)):
        yield f"has a grid of {code.grid}; expected 1 to {MOST_GRID}"
    elif not divides(code.cluster, code.grid):
        yield f"has a grid of {code.grid}, which is not whole clusters of {code.cluster}"
    elif code.grid not in _grids(bucket, rows, code, arguments, declared, arch):
        yield f"has a grid of {code.grid}, which its kernel has not for {bucket.name}"
    if code.programmatic and not declared.programmatic:
        yield "has programmatic edges, which its kernel is not launched with"


def _grids(
    bucket: Bucket,
    counts: frozenset[int],
    code: KernelCode,
    arguments: Sequence[Argument],
    declared: Declared,
    arch: Arch,
) -> list[tuple[int, ...]]:
    """Grids of a kernel for so many rows. What it cuts into `parts` has at most as many in all as twice the
    SMs, or one for each row; `vectors` each have an f32 global scale.
    """
    scales = [a.nbytes // 4 for a in arguments if a.component == "global_scale"]
    found = []
    for rows in counts:
        sizes = {"rows": rows, "sequences": bucket.sequences, "vectors": scales[0] if scales else 0}
        if "parts" in declared.sizes:
            sizes["parts"] = min(code.grid[0], max(1, 2 * arch.sms // rows))
        found.append(declared.grid_of(sizes))
    return found


def _aligned(size: int) -> int:
    return -(-size // BLOCK_ALIGN) * BLOCK_ALIGN
