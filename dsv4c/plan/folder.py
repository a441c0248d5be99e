"""A compiled model as plain data: a folder with plan.json, the graphs as text, and kernels.

No pickle, no code, no absolute paths: a plan may be moved, read and compared. The same input gives the same
bytes. Every file has its sha256 in plan.json, whose own is on its second line; all are checked at load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dsv4c import strict_json
from dsv4c.buckets import Bucket, bucket_named
from dsv4c.errors import PlanError, listed
from dsv4c.plan.check import check
from dsv4c.plan.records import (
    SPACES,
    Argument,
    BodyCode,
    Box,
    KernelCode,
    Launch,
    Place,
    Program,
    StateSlot,
)
from dsv4c.plan.typed import require_types
from dsv4c.publish import OccupiedError, published, require_writable
from dsv4c.types import TypeSyntaxError, parse_type

if TYPE_CHECKING:
    from dsv4c.runtime.session import Session

SCHEMA = 6
"""Version of the folder's form; a reader refuses any other."""

LARGEST_FILE = 1 << 30
"""Bytes of a plan's file; weights are none of them."""

PLAN_FILE, TIMINGS_FILE = "plan.json", "timings.json"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """Everything a session needs. Made by `dsv4c.compile`, or read with `dsv4c.load`.

    blocks: bytes of every block that places point into (`dsv4c.plan.records.SPACES`); all buckets share
    them. buckets: a program per bucket, by its name. load: what is computed once when weights are there, its
    results in the block of constants. weights: for every parameter its name, type, form in memory and place
    of its arrays in the weights' block, and where each spelling of a checkpoint keeps it
    (`dsv4c.runtime.parameter.ParamRecord`). unused: the same of the model's parameters that rewrites made
    dead, so that their tensors surprise nobody. contributed: passes, rules that applied and kernels which are
    not dsv4c's own, with who gave them. kernels: what a GPU target runs, by name: origin is "dsv4c", or the
    package and version whose kernel it is; edited, that a person changed the text. files: contents of all
    files but plan.json. timings: seconds per stage of the compile; the only part that differs between two
    equal compiles, and in no digest.
    """

    name: str
    config: Mapping[str, Any]
    config_digest: str
    deployment: Mapping[str, Any]
    recipe: str
    pipeline: str
    blocks: Mapping[str, int]
    buckets: Mapping[str, Program]
    load: Program | None
    state: tuple[StateSlot, ...]
    weights: tuple[Mapping[str, Any], ...]
    unused: tuple[Mapping[str, Any], ...] = ()
    contributed: tuple[Mapping[str, str], ...] = ()
    certificates: tuple[Mapping[str, Any], ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    kernels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    timings: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)
    cache_hits: int = field(default=0, repr=False, compare=False)  # kernels that this compile found built

    def __repr__(self) -> str:
        deployment = self.deployment
        return (
            f"<Plan {self.name} for {self.target}: recipe {self.recipe}, "
            f"{deployment['slots']} × {deployment['max_context']:,} tokens, "
            f"buckets {', '.join(self.buckets)}, weights {self.blocks['weights'] / 1e6:,.2f} MB>"
        )

    @property
    def target(self) -> str:
        """What it runs on: cpu, sm_90a or sm_100a."""
        return str(self.deployment["target"])

    @property
    def ranks(self) -> int:
        """Devices that hold a part of the model each and run it together; each has blocks of these sizes."""
        return int(self.deployment["ranks"])

    def program(self, bucket: str = "decode") -> Program:
        """The program of a bucket, by its name or as the smallest of a kind.

        Raises PlanError if the plan was compiled without it.
        """
        if bucket in self.buckets:
            return self.buckets[bucket]
        of_kind = [p for p in self.buckets.values() if p.shape.kind == bucket]
        if not of_kind:
            hint = "; compile with --draft auto" if bucket == "draft" else ""
            raise PlanError(
                f"plan {self.name} has no bucket {bucket!r}, only {listed(self.buckets, bucket)}{hint}"
            )
        return min(of_kind, key=lambda program: program.shape.rows)

    def graph_text(self, bucket: str = "decode") -> str:
        """The text of a bucket's graph, for `dsv4c.ir.text.parse_graph`."""
        return self.files[self.program(bucket).graph].decode()

    @cached_property
    def text(self) -> str:
        """Contents of plan.json."""
        _, *rest = _lines(self._to_json())
        body = "\n".join([*rest, ""])
        return _first_lines(body) + body

    @property
    def digest(self) -> str:
        """sha256 (hex) of everything but the timings."""
        return self.text.split('"', 4)[3]

    def _to_json(self) -> dict[str, Any]:
        spelled = ("buckets", "load", "state", "files", "timings", "cache_hits", "weights")
        data: dict[str, Any] = {"schema": SCHEMA}
        data |= {f.name: getattr(self, f.name) for f in fields(self) if f.name not in spelled}
        data["files"] = {name: _sha256(content) for name, content in sorted(self.files.items())}
        data["state"] = [{"name": s.name, "type": str(s.type), "offset": s.offset} for s in self.state]
        data["weights"] = list(self.weights)
        data["buckets"] = {name: _program_to_json(program) for name, program in self.buckets.items()}
        data["load"] = None if self.load is None else _program_to_json(self.load)
        return data

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the plan as `folder`, whole or not at all, and return it.

        Raises PlanError if the folder cannot be written, is not empty and no plan, or is a plan and
        `overwrite` was not given.
        """
        target = Path(folder)
        check_target(target, overwrite=overwrite)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with published(target, replace=overwrite) as made:
                for name, content in {**self.files, PLAN_FILE: self.text.encode()}.items():
                    path = made / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                if self.timings:
                    (made / TIMINGS_FILE).write_text(json.dumps(dict(self.timings), indent=1) + "\n")
        except OccupiedError:
            raise PlanError(f"{target}: another process wrote it just now; it was left alone") from None
        except OSError as error:
            raise PlanError(f"{target}: cannot be written: {error.strerror or error}") from None
        return target

    def bind(
        self,
        weights: str | Path,
        *,
        progress: Progress | None = None,
        workers: int | None = None,
        poison: bool = False,
    ) -> Session:
        """Read the weights of a checkpoint folder and return a session with fresh state.

        `progress(name, bytes done, bytes in all)` is called from worker threads, one call at a time.
        `poison` fills the arena with NaN before every step and a fresh state with NaN, to find reads of bytes
        nobody wrote. Raises CheckpointError if the checkpoint does not fit, PlanError if this machine cannot
        run the plan.
        """
        from dsv4c.runtime.bind import bind  # loads torch; a plan is read without

        return bind(self, weights, progress=progress, workers=workers, poison=poison)


def check_target(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raise PlanError unless a plan may be written there, so that a long compile fails before it starts."""
    target = Path(folder)
    try:
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise PlanError(f"{target}: exists and is no folder; give a new folder for the plan")
        if target.is_dir() and any(target.iterdir()):
            if not (target / PLAN_FILE).is_file():
                raise PlanError(f"{target}: is not empty and holds no plan; give a new or empty folder")
            if not overwrite:
                raise PlanError(f"{target}: holds a plan; give another folder, or --overwrite to replace it")
        above = next(parent for parent in (target, *target.absolute().parents) if parent.exists())
        if not above.is_dir():
            raise PlanError(f"{target}: cannot be written: {above} is no folder")
        if above == target:
            require_writable(target)  # it will be moved, which takes the right to write to it
            above = target.absolute().parent
        require_writable(above)
    except OSError as error:
        raise PlanError(f"{target}: cannot be written: {error.strerror or error}") from None


def load(folder: str | Path) -> Plan:
    """Read a plan folder, and prove what its data says by itself (`dsv4c.plan.check`).

    Raises PlanError as `read_plan` does, and for the first thing that does not hold.
    """
    plan = read_plan(folder)
    if violations := check(plan):
        more = f" (and {len(violations) - 1} more: `dsv4c verify`)" if len(violations) > 1 else ""
        raise PlanError(f"{Path(folder) / PLAN_FILE}: {violations[0]}{more}; compile the plan again")
    return plan


def read_plan(folder: str | Path) -> Plan:
    """Read a plan folder, every file by its digest, every record by its form.

    Raises PlanError for a folder that is no plan, another schema version, a missing or altered file.
    """
    folder = Path(folder)
    path = folder / PLAN_FILE
    try:
        if not folder.exists():
            raise PlanError(
                f"{folder}: no such folder; compile a plan with `dsv4c compile CONFIG -o {folder}`"
            )
        if not path.is_file():
            foreign = (folder / "config.json").exists()
            what = "holds a model, not a compiled plan" if foreign else f"no {PLAN_FILE} here"
            raise PlanError(f"{folder}: {what}; expected a folder that `dsv4c compile` wrote")
    except OSError as error:  # a folder that may not be entered
        raise PlanError(f"{folder}: cannot be read: {error.strerror}") from None
    text = _read(path)
    data = _parse(path, text)
    _check_digest(path, text, data)
    return plan_of(path, data, _files(folder, data), _timings(folder / TIMINGS_FILE))


def plan_of(
    path: Path, data: Mapping[str, Any], files: Mapping[str, bytes], seconds: Mapping[str, float]
) -> Plan:
    """The plan of a parsed plan.json, which lies at `path`. Raises PlanError for records of another form."""
    try:
        plan = _plan_from_json(data, files, seconds)
    except (KeyError, TypeError, ValueError, AttributeError, TypeSyntaxError) as error:
        raise PlanError(f"{path}: a record cannot be read: {error!r:.200}; compile the plan again") from None
    require_types(plan, str(path))
    _require_keys(path, plan)
    return plan


# --- writing ---


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _first_lines(body: str) -> str:
    return f'{{\n"digest": "{_sha256(body.encode())}",\n'


def _lines(value: Any, depth: int = 0) -> Iterator[str]:
    """JSON with one entry per line down to the launches and values of a bucket, each of which is one line."""
    if depth >= 4 or not isinstance(value, Mapping | list | tuple) or not value:
        yield json.dumps(value, separators=(", ", ": "), default=dict)
        return
    start, stop = ("{", "}") if isinstance(value, Mapping) else ("[", "]")
    yield start
    entries = value.items() if isinstance(value, Mapping) else ((None, entry) for entry in value)
    last = len(value) - 1
    deeper = 4 if isinstance(value, list | tuple) else depth + 1
    for number, (key, entry) in enumerate(entries):
        head, *rest = _lines(entry, deeper)
        body = [head if key is None else f"{json.dumps(key)}: {head}", *rest]
        if number < last:
            body[-1] += ","
        yield from body
    yield stop


def _program_to_json(program: Program) -> dict[str, Any]:
    data: dict[str, Any] = {"graph": program.graph}
    if program.bucket is not None:
        data |= {name: getattr(program.bucket, name) for name in _SHAPE}
    return data | {
        "arena_bytes": program.arena_bytes,
        "inputs": program.inputs,
        "outputs": program.outputs,
        "values": {
            name: {"type": str(place.type), "space": place.space, "offset": place.offset}
            for name, place in program.values.items()
        },
        "launches": [_launch_to_json(launch) for launch in program.launches],
    }


def _launch_to_json(launch: Launch) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": launch.name,
        "op": launch.op,
        "nodes": launch.nodes,
        "scope": launch.scope,
    }
    data |= {f.name: getattr(launch.code, f.name) for f in fields(launch.code)}
    data["arguments"] = [_argument_to_json(a) for a in launch.arguments]
    return data | {"after": launch.after}


def _argument_to_json(argument: Argument) -> dict[str, Any]:
    data = {f.name: getattr(argument, f.name) for f in fields(argument) if f.name != "box"}
    return data | ({"box": asdict(argument.box)} if argument.box else {})


# --- reading ---


def _read_bytes(path: Path) -> bytes:
    """Raises OSError, PlanError for a file beyond `LARGEST_FILE`."""
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise PlanError(f"{path}: has {size:,} bytes, files of a plan at most {LARGEST_FILE:,}")
    return path.read_bytes()


def _read(path: Path) -> str:
    try:
        return _read_bytes(path).decode()
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PlanError(
            f"{path}: is damaged: no text at byte {error.start}; compile the plan again"
        ) from None


def _timings(path: Path) -> dict[str, float]:
    """Seconds by stage; nothing in a plan that came without them."""
    if not path.is_file():
        return {}
    timings = _parse(path, _read(path))
    if not all(isinstance(seconds, int | float) for seconds in timings.values()):
        raise PlanError(f"{path}: is damaged: holds more than seconds by stage; remove it, nothing needs it")
    return timings


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        data = strict_json.parse(text)
    except ValueError as error:
        raise PlanError(f"{path}: is damaged: {error}; compile the plan again") from None
    if not isinstance(data, dict):
        raise PlanError(f"{path}: holds a JSON {type(data).__name__}; expected the object of a compiled plan")
    return data


def _check_digest(path: Path, text: str, data: Mapping[str, Any]) -> None:
    if "schema" not in data or "buckets" not in data:
        raise PlanError(f"{path}: is no plan of dsv4c; expected a folder that `dsv4c compile` wrote")
    if data["schema"] != SCHEMA:
        raise PlanError(
            f"{path}: has schema {data['schema']!r}, this version of dsv4c reads {SCHEMA}; "
            "compile the plan again with this version"
        )
    if not text.startswith(_first_lines(text.split("\n", 2)[-1])):
        raise PlanError(f"{path}: was altered after it was compiled; compile the plan again")


def _files(folder: Path, data: Mapping[str, Any]) -> dict[str, bytes]:
    """Contents of the files that a plan names, each compared with its digest."""
    named = data.get("files")
    if not isinstance(named, Mapping):
        raise PlanError(f"{folder / PLAN_FILE}: names no files; compile the plan again")
    return {name: _checked(folder, name, digest) for name, digest in named.items()}


_DEPLOYMENT = {"target": str, "recipe": str, "max_context": int, "slots": int, "buckets": list, "ranks": int}
_CERTIFICATE = frozenset({"rule", "op", "operands", "kind", "worst"})
_ORIGIN = frozenset({"name", "kind", "source", "at"})


def _require_keys(path: Path, plan: Plan) -> None:
    """What readers take from the parts of a plan that are no records of ours."""
    found = {name: type(value) for name, value in plan.deployment.items()}
    counts = [value for value in plan.deployment.values() if type(value) is int]
    if found != _DEPLOYMENT or min(counts) < 1 or plan.deployment["buckets"] != list(plan.buckets):
        raise PlanError(
            f"{path}: its deployment is {plan.deployment!r:.200}; expected {', '.join(_DEPLOYMENT)}, the "
            f"buckets {', '.join(plan.buckets)}"
        )
    for number, certificate in enumerate(plan.certificates):
        if not certificate.keys() >= _CERTIFICATE or not isinstance(certificate["operands"], list):
            raise PlanError(f"{path}: certificate {number} lacks one of {', '.join(sorted(_CERTIFICATE))}")
    for number, origin in enumerate(plan.contributed):
        if not origin.keys() >= _ORIGIN:
            raise PlanError(f"{path}: contribution {number} lacks one of {', '.join(sorted(_ORIGIN))}")
    for name in ("vocab_size", "max_position_embeddings"):
        if type(plan.config.get(name)) is not int:
            raise PlanError(f"{path}: its config has no {name}; compile the plan again")
    block = plan.config.get("dspark_block_size", 0)
    if type(block) is not int or block < 0:
        raise PlanError(
            f"{path}: its config's dspark_block_size is {block!r:.80}; expected a number of rows; "
            "compile the plan again"
        )
    ratios = plan.config.get("compress_ratios")
    if not isinstance(ratios, list) or not all(type(ratio) is int for ratio in ratios):
        raise PlanError(f"{path}: its config has no compress_ratios; compile the plan again")
    missing = [space for space in SPACES if space not in plan.blocks]
    if missing:
        raise PlanError(f"{path}: says no size of the block of {missing[0]}; compile the plan again")


def _checked(folder: Path, name: str, digest: str) -> bytes:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise PlanError(f"{folder / PLAN_FILE}: names the file {name[:80]!r}; expected files inside the plan")
    path = folder / relative
    try:
        if not path.is_file():
            raise PlanError(
                f"{path}: is missing from the plan; compile the plan again, or copy it as a whole"
            )
        content = _read_bytes(path)
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from None
    if _sha256(content) != digest:
        raise PlanError(f"{path}: was altered after it was compiled; compile the plan again")
    return content


def _exactly(data: Mapping[str, Any], names: frozenset[str]) -> Mapping[str, Any]:
    """`data`, which has these fields and no other. Raises ValueError."""
    if data.keys() != names:
        odd = sorted(data.keys() ^ names)
        raise ValueError(f"fields {', '.join(odd)[:120]} are missing or unknown")
    return data


_PLAN = frozenset(f.name for f in fields(Plan)) - {"timings", "cache_hits"} | {"digest", "schema"}
_STATE, _VALUE = frozenset({"name", "type", "offset"}), frozenset({"type", "space", "offset"})
_BOX = frozenset(f.name for f in fields(Box))
_LOAD = frozenset({"graph", "arena_bytes", "inputs", "outputs", "values", "launches"})
_SHAPE = tuple(f.name for f in fields(Bucket) if f.name != "trusts")  # that, the bucket's name alone says
_BUCKET = _LOAD | set(_SHAPE)
_CALLED = frozenset(f.name for f in fields(Launch)) - {"code"}
_BODY, _KERNEL = (_CALLED | {f.name for f in fields(code)} for code in (BodyCode, KernelCode))


def _plan_from_json(
    data: Mapping[str, Any], files: Mapping[str, bytes], seconds: Mapping[str, float]
) -> Plan:
    _exactly(data, _PLAN)
    return Plan(
        name=data["name"],
        config=data["config"],
        config_digest=data["config_digest"],
        deployment=data["deployment"],
        recipe=data["recipe"],
        pipeline=data["pipeline"],
        blocks=data["blocks"],
        buckets={name: _program_from_json(program, name) for name, program in data["buckets"].items()},
        load=None if data["load"] is None else _program_from_json(data["load"], None),
        state=tuple(_state_from_json(s) for s in data["state"]),
        weights=tuple(data["weights"]),
        unused=tuple(data["unused"]),
        contributed=tuple(data["contributed"]),
        certificates=tuple(data["certificates"]),
        report=data["report"],
        versions=data["versions"],
        kernels=data["kernels"],
        files=files,
        timings=seconds,
    )


def _state_from_json(data: Mapping[str, Any]) -> StateSlot:
    _exactly(data, _STATE)
    return StateSlot(data["name"], parse_type(data["type"]), data["offset"])


def _place_from_json(data: Mapping[str, Any]) -> Place:
    _exactly(data, _VALUE)
    return Place(parse_type(data["type"]), data["space"], data["offset"])


def _program_from_json(data: Mapping[str, Any], name: str | None) -> Program:
    _exactly(data, _LOAD if name is None else _BUCKET)
    bucket = None if name is None else bucket_named(name)
    if bucket is not None and any(data[field] != getattr(bucket, field) for field in _SHAPE):
        raise ValueError(f"bucket {name} says that it is another")
    return Program(
        graph=data["graph"],
        bucket=bucket,
        values={n: _place_from_json(v) for n, v in data["values"].items()},
        arena_bytes=data["arena_bytes"],
        inputs=tuple(data["inputs"]),
        outputs=data["outputs"],
        launches=tuple(_launch_from_json(launch) for launch in data["launches"]),
    )


def _argument_from_json(data: Mapping[str, Any]) -> Argument:
    if "box" not in data:
        return Argument(**data)
    box = data["box"]
    _exactly(box, _BOX)
    sizes, strides, one = (tuple(box[name]) for name in ("sizes", "strides", "box"))
    return Argument(**{**data, "box": Box(box["element"], sizes, strides, one, box["swizzled"])})


def _launch_from_json(data: Mapping[str, Any]) -> Launch:
    code: BodyCode | KernelCode
    if "kernel" in data:
        _exactly(data, _KERNEL)
        code = KernelCode(
            kernel=data["kernel"],
            grid=tuple(data["grid"]),
            block=data["block"],
            cluster=tuple(data["cluster"]),
            shared=data["shared"],
            programmatic=data["programmatic"],
            waits=data["waits"],
        )
    else:
        _exactly(data, _BODY)
        code = BodyCode(data["attributes"], data["body"])
    return Launch(
        name=data["name"],
        op=data["op"],
        nodes=tuple(data["nodes"]),
        scope=data["scope"],
        code=code,
        arguments=tuple(map(_argument_from_json, data["arguments"])),
        after=tuple(data["after"]),
    )
