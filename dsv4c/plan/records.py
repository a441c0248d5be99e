"""A compiled model as plain data: a folder with plan.json, the graphs as text, and kernels.

No pickle, no code, no absolute paths: a plan may be moved, read and compared. The same input gives the same
bytes. Every file has its sha256 in plan.json, whose own is on its second line; all are checked at load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from dsv4c import strict_json
from dsv4c.errors import PlanError
from dsv4c.plan.typed import require_types
from dsv4c.publish import OccupiedError, published, require_writable
from dsv4c.types import Type, TypeSyntaxError, parse_type

if TYPE_CHECKING:
    from dsv4c.runtime.session import Session

SCHEMA = 1
"""Version of the folder's form; a reader refuses any other."""

LARGEST_FILE = 1 << 30
"""Bytes of a plan's file; weights are none of them."""

PLAN_FILE, TIMINGS_FILE = "plan.json", "timings.json"
Space = Literal["arena", "state", "weights", "input", "constants"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a value lives: `offset` bytes into a block. States of one-sequence buckets are slices of it."""

    type: Type
    space: Space
    offset: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One op on values by name. `after` are the launches of the bucket it waits for; `body` is the file that
    spells out a fused op in primitives, empty for a primitive.
    """

    name: str
    op: str
    attributes: str  # as in the graph's text, without braces
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scope: str
    origin: tuple[str, ...]
    after: tuple[int, ...]
    body: str = ""


@dataclass(frozen=True, slots=True)
class Argument:
    """One pointer of a kernel: `offset` bytes into a block, where `component` of `value` has `nbytes` bytes.

    access: "r", "w", "rw", or "early" for what is read before the kernel waits, though no weight.
    """

    space: Space
    offset: int
    value: str
    component: str
    nbytes: int
    access: str


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """A kernel of the plan on bytes of its blocks, for the graph's `nodes`.

    `waits`: the kernel waits for its predecessors before it touches what they write; `programmatic`: it may
    therefore start while those of `after` still run. Sizes in CTAs, threads and bytes.
    """

    name: str
    op: str
    nodes: tuple[str, ...]
    scope: str
    kernel: str
    grid: tuple[int, int, int]
    block: int
    cluster: tuple[int, int, int]
    shared: int
    programmatic: bool
    waits: bool
    arguments: tuple[Argument, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Bucket:
    """One static shape of the model: `tokens` rows of `sequences` sequences per call.

    Launches are ops on the CPU target and kernels on a GPU target.
    """

    graph: str  # file with the graph's text
    tokens: int
    sequences: int
    values: Mapping[str, Slot]
    arena_bytes: int
    input_bytes: int
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]
    launches: tuple[Launch | KernelLaunch, ...]


@dataclass(frozen=True, slots=True)
class StateSlot:
    """A buffer kept between calls, with room for all sequences of the batch in its first dimension."""

    name: str
    type: Type
    offset: int


@dataclass(frozen=True)
class Plan:
    """Everything a session needs. Made by `dsv4c.compile`, or read with `dsv4c.load`.

    weights: for every parameter its name, type, offset in the weights' block, and where each spelling of a
    checkpoint keeps it (`dsv4c.runtime.parameter.ParamRecord`); on a GPU target also its form in memory.
    loads: what each bucket computes once from the weights, when they are loaded. kernels, constants: what a
    GPU target runs, by hash, and the arrays computed at compile time. files: contents of all files but
    plan.json. timings: seconds per stage of the compile; the only part that differs between two equal
    compiles, and in no digest.
    """

    name: str
    config: Mapping[str, Any]
    config_digest: str
    deployment: Mapping[str, Any]
    recipe: str
    pipeline: str
    buckets: Mapping[str, Bucket]
    state: tuple[StateSlot, ...]
    state_bytes: int
    weights: tuple[Mapping[str, Any], ...]
    weights_bytes: int
    certificates: tuple[Mapping[str, Any], ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    loads: Mapping[str, Bucket] = field(default_factory=dict)
    kernels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    timings: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)
    cache_hits: int = field(default=0, repr=False, compare=False)  # kernels that this compile found built

    @property
    def target(self) -> str:
        return str(self.deployment["target"])

    def bucket(self, mode: str) -> Bucket:
        """The bucket of that mode. Raises PlanError if the plan was compiled without it."""
        if mode not in self.buckets:
            hint = "; compile with mtp=True (--mtp)" if mode == "mtp" else ""
            raise PlanError(f"plan {self.name} has no bucket {mode!r}, only {', '.join(self.buckets)}{hint}")
        return self.buckets[mode]

    def graph_text(self, mode: str = "decode") -> str:
        """The text of a bucket's graph, for `dsv4c.ir.text.parse_graph`."""
        return self.files[self.bucket(mode).graph].decode()

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
        kept = ("buckets", "loads", "state", "files", "timings", "cache_hits", "weights")
        data: dict[str, Any] = {"schema": SCHEMA}
        data |= {f.name: getattr(self, f.name) for f in fields(self) if f.name not in kept}
        data["files"] = {name: _sha256(content) for name, content in sorted(self.files.items())}
        data["state"] = [{"name": s.name, "type": str(s.type), "offset": s.offset} for s in self.state]
        data["weights"] = list(self.weights)
        data["buckets"] = {mode: _bucket_to_json(bucket) for mode, bucket in self.buckets.items()}
        data["loads"] = {mode: _bucket_to_json(bucket) for mode, bucket in self.loads.items()}
        return data

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the plan as `folder`, whole or not at all, and return it.

        Raises PlanError if the folder cannot be written, is not empty and no plan, or is a plan and `force`
        was not given.
        """
        target = Path(folder)
        check_target(target, force=force)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with published(target, replace=force) as made:
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
        from dsv4c.runtime.session import bind

        return bind(self, weights, progress=progress, workers=workers, poison=poison)


def check_target(folder: str | Path, *, force: bool = False) -> None:
    """Raise PlanError unless a plan may be written there, so that a long compile fails before it starts."""
    target = Path(folder)
    try:
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise PlanError(f"{target}: exists and is no folder; give a new folder for the plan")
        if target.is_dir() and any(target.iterdir()):
            if not (target / PLAN_FILE).is_file():
                raise PlanError(f"{target}: is not empty and holds no plan; give a new or empty folder")
            if not force:
                raise PlanError(f"{target}: holds a plan; give another folder, or --force to replace it")
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
    """Read a plan folder and check every byte of it.

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
    files = _files(folder, data)
    try:
        plan = _plan_from_json(data, files, _timings(folder / TIMINGS_FILE))
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


def _bucket_to_json(bucket: Bucket) -> dict[str, Any]:
    data = {f.name: getattr(bucket, f.name) for f in fields(bucket)}
    data["values"] = {
        name: {"type": str(slot.type), "space": slot.space, "offset": slot.offset}
        for name, slot in bucket.values.items()
    }
    data["launches"] = [_launch_to_json(launch) for launch in bucket.launches]
    return data


def _launch_to_json(launch: Launch | KernelLaunch) -> dict[str, Any]:
    data = {f.name: getattr(launch, f.name) for f in fields(launch)}
    if isinstance(launch, KernelLaunch):
        data["arguments"] = [{f.name: getattr(a, f.name) for f in fields(a)} for a in launch.arguments]
    elif not launch.body:
        del data["body"]
    return data


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


_DEPLOYMENT = {"target": str, "recipe": str, "batch": int, "max_context": int, "chunk": int}


_CERTIFICATE = frozenset({"rule", "op", "operands", "kind", "worst"})


def _require_keys(path: Path, plan: Plan) -> None:
    """What readers take from the parts of a plan that are no records of ours."""
    found = {name: type(value) for name, value in plan.deployment.items()}
    counts = [value for value in plan.deployment.values() if type(value) is int]
    if found != _DEPLOYMENT or min(counts) < 1:
        raise PlanError(
            f"{path}: its deployment is {plan.deployment!r:.200}; expected {', '.join(_DEPLOYMENT)}"
        )
    for number, certificate in enumerate(plan.certificates):
        if not certificate.keys() >= _CERTIFICATE or not isinstance(certificate["operands"], list):
            raise PlanError(f"{path}: certificate {number} lacks one of {', '.join(sorted(_CERTIFICATE))}")
    if type(plan.config.get("vocab_size")) is not int:
        raise PlanError(f"{path}: its config has no vocab_size; compile the plan again")


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


def _plan_from_json(
    data: Mapping[str, Any], files: Mapping[str, bytes], seconds: Mapping[str, float]
) -> Plan:
    return Plan(
        name=data["name"],
        config=data["config"],
        config_digest=data["config_digest"],
        deployment=data["deployment"],
        recipe=data["recipe"],
        pipeline=data["pipeline"],
        buckets={mode: _bucket_from_json(bucket) for mode, bucket in data["buckets"].items()},
        state=tuple(StateSlot(s["name"], parse_type(s["type"]), s["offset"]) for s in data["state"]),
        state_bytes=data["state_bytes"],
        weights=tuple(data["weights"]),
        weights_bytes=data["weights_bytes"],
        certificates=tuple(data["certificates"]),
        loads={mode: _bucket_from_json(bucket) for mode, bucket in data["loads"].items()},
        report=data["report"],
        versions=data["versions"],
        kernels=data.get("kernels", {}),
        constants=data.get("constants", {}),
        files=files,
        timings=seconds,
    )


def _bucket_from_json(data: Mapping[str, Any]) -> Bucket:
    return Bucket(
        graph=data["graph"],
        tokens=data["tokens"],
        sequences=data["sequences"],
        values={n: Slot(parse_type(v["type"]), v["space"], v["offset"]) for n, v in data["values"].items()},
        arena_bytes=data["arena_bytes"],
        input_bytes=data["input_bytes"],
        inputs=tuple(data["inputs"]),
        outputs=data["outputs"],
        launches=tuple(_launch_from_json(launch) for launch in data["launches"]),
    )


def _launch_from_json(data: Mapping[str, Any]) -> Launch | KernelLaunch:
    if "kernel" in data:
        return KernelLaunch(
            name=data["name"],
            op=data["op"],
            nodes=tuple(data["nodes"]),
            scope=data["scope"],
            kernel=data["kernel"],
            grid=tuple(data["grid"]),
            block=data["block"],
            cluster=tuple(data["cluster"]),
            shared=data["shared"],
            programmatic=data["programmatic"],
            waits=data["waits"],
            arguments=tuple(Argument(**argument) for argument in data["arguments"]),
            after=tuple(data["after"]),
        )
    return Launch(
        name=data["name"],
        op=data["op"],
        attributes=data["attributes"],
        inputs=tuple(data["inputs"]),
        outputs=tuple(data["outputs"]),
        scope=data["scope"],
        origin=tuple(data["origin"]),
        after=tuple(data["after"]),
        body=data.get("body", ""),
    )


__all__ = [
    "SCHEMA",
    "Argument",
    "Bucket",
    "KernelLaunch",
    "Launch",
    "Plan",
    "Progress",
    "Slot",
    "StateSlot",
    "check_target",
    "load",
]
