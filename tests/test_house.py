"""The house stands: imports point one way, and every room loads without what it must not need."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import networkx
import pytest

from dsv4c.cli import COMMANDS
from dsv4c.compiler.compile import compile
from dsv4c.compiler.request import Request
from dsv4c.ir.graph import Graph
from dsv4c.passes.base import Context, Pass
from dsv4c.passes.pipeline import Pipeline
from dsv4c.plan.folder import Plan
from dsv4c.plan.records import Program

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Room:
    """What the modules of a room may import: rooms and packages, anywhere or inside functions only; and how
    many lines they may have together.

    `back` are rooms above that it must import after all, with the reason.
    """

    lines: int
    rooms: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    rooms_inside: tuple[str, ...] = ()
    packages_inside: tuple[str, ...] = ()
    back: Mapping[str, str] = field(default_factory=dict)


LEAVES = (
    "types",
    "errors",
    "strict_json",
    "headers",
    "publish",
    "cache",
    "buckets",
    "cuts",
    "arch",
    "scope",
    "threads",
    "exchange",
)
CONFIG = (*LEAVES, "config")
COMPILER = (*CONFIG, "ir", "models", "models.encoding", "passes")

# From the bottom up. A module lives in the room with the longest matching name; a room may import itself.
# Lines are today's and about a tenth more: who needs others says so here, and why in the change.
HOUSE = {
    "types": Room(350),
    "errors": Room(110),
    "strict_json": Room(50),
    "headers": Room(240, ("errors", "strict_json")),
    "publish": Room(250),
    "cache": Room(90, ("errors", "publish")),
    "buckets": Room(95),
    "cuts": Room(90, ("errors", "strict_json")),
    "arch": Room(90, ("cuts",)),
    "scope": Room(80),
    # What lies where in the block of exchanges: known to compiler, kernels and runtime.
    "exchange": Room(85),
    "threads": Room(90, packages_inside=("torch",)),
    "dialects": Room(820, ("errors", "headers", "scope")),
    "config": Room(530, (*LEAVES, "dialects")),
    # How the model is spoken to: texts and their ids.
    "models.encoding": Room(1000, ("errors", "strict_json"), packages_inside=("tokenizers",)),
    # Sizes and names of packings, for those who compute nothing.
    "numerics.forms": Room(80),
    "numerics.resident": Room(80, ("types", "numerics.forms")),
    "numerics": Room(840, (*LEAVES, "numerics.forms", "numerics.resident"), ("torch",)),
    # The contract of compiler and runtime: data.
    # With folders of a plan's variants, which tuning carries from the one to the other.
    "plan": Room(
        1860, LEAVES, back={"runtime": "Plan.bind hands the plan to the runtime, which is loaded only then"}
    ),
    "ir": Room(3600, LEAVES),
    "reference": Room(1180, (*LEAVES, "ir", "numerics"), ("torch",)),
    # Runs plans, knows nothing of how they are made; ops are known where they are interpreted, in one module
    # that is loaded late.
    "runtime.meaning": Room(50, (*LEAVES, "plan", "ir", "reference")),
    "runtime": Room(
        5360,
        (*CONFIG, "models.encoding", "plan", "numerics", "numerics.forms", "numerics.resident"),
        ("torch", "safetensors", "cuda"),
        rooms_inside=("runtime.meaning",),
    ),
    # Graph work happens without torch and without kernels.
    "models": Room(1650, (*CONFIG, "ir")),
    "models.synth": Room(390, (*CONFIG, "models", "numerics"), ("torch",)),
    "passes": Room(3780, (*CONFIG, "ir"), packages_inside=("networkx",)),
    # Evaluates both sides of rewrites. What a compile needs of it where all certificates are kept from before
    # loads without torch.
    "certify": Room(1650, (*LEAVES, "ir", "numerics", "reference", "passes"), ("torch",)),
    "view": Room(1600, (*CONFIG, "plan", "ir", "models"), packages_inside=("graphviz",)),
    # Device code, imported by generated kernels: all of a kernel but the order of its stages. Host code may
    # read the modules in it that need no cutlass. What templates held, one a family, is here now; and index
    # scores of many tokens on wgmma, which take 0.58 of the time, and experts' halves on the same CTAs.
    "codegen.lib": Room(14070, ("numerics.forms", "exchange"), ("cutlass", "cuda")),
    # What primitives mean on a device, imported by generated kernels alone.
    "codegen.meanings": Room(2050, ("types", "codegen.lib"), ("cutlass",)),
    # Launches are lowered to what plans hold, which is data. What their kernels' texts say is said here;
    # boundaries of many rows are two of them, and the shared expert is cut beside the routed ones.
    "codegen": Room(
        8050,
        (*LEAVES, "ir", "passes", "codegen.lib", "plan", "numerics.forms", "numerics.resident"),
        ("jinja2",),
        packages_inside=("cutlass",),
    ),
    # The one path from a config to a plan.
    "compiler": Room(1840, (*COMPILER, "certify", "codegen", "plan")),
    # Runs a plan beside its unfused graph, so it stands above compiler and runtime both.
    "compiler.bisect": Room(
        600,
        (*COMPILER, "certify", "codegen", "compiler", "plan", "numerics", "reference", "runtime"),
        ("torch", "safetensors"),
    ),
    # Runs a plan's kernels beside their meaning; of several ranks, each with the words of the others.
    "compiler.device": Room(
        455, (*COMPILER, "certify", "compiler", "plan", "numerics", "reference", "runtime"), ("torch",)
    ),
    "": Room(90, (*CONFIG, "ir", "passes", "compiler", "plan", "runtime")),
    # Plans for the loops of another library, which is an extra.
    "hf": Room(200, ("errors", "plan", "runtime"), ("torch", "transformers")),
    # Plans behind a server, which is an extra of an environment of its own.
    "vllm": Room(
        1000,
        ("errors", "buckets", "plan", "runtime"),
        ("torch", "vllm", "numpy", "prometheus_client"),
    ),
    # Every command imports what it needs; the package loads a command's module when it is called.
    "cli": Room(
        4110,
        (
            *(*COMPILER, "models.synth", "certify", "compiler", "compiler.bisect", "compiler.device"),
            *("plan", "runtime", "view", "vllm"),
        ),
        ("typer", "rich"),
    ),
    "__main__": Room(20, ("cli",)),
}

LATE = 15
"""Imports of dsv4c inside functions that the whole house may have."""


@dataclass(frozen=True)
class Import:
    """One imported module: its name, the line, and whether it is imported only when something is called, or
    only for the checker of types.
    """

    module: str
    line: int
    inside: bool
    typing: bool = False


def imports_of(tree: ast.Module, module: str, is_package: bool) -> Iterator[Import]:
    """Every import below `tree`: at module level, in the bodies of functions, under `if TYPE_CHECKING:`."""

    def walk(node: ast.AST, inside: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, inside, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                name = f"{source}.{alias.name}"
                is_module = source == "dsv4c" or name in names_of_modules()
                yield Import(name if is_module else source, node.lineno, inside, typing)
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside or deferred, typing or typing_only)

    yield from walk(tree, inside=False, typing=False)


def room_of(module: str) -> str | None:
    """The room of a module below dsv4c, or None when the house has no such room."""
    name = module.removeprefix("dsv4c").removeprefix(".")
    parts = name.split(".") if name else []
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in HOUSE:
            return ".".join(parts[:length])
    return None if len(parts) > 1 else ""  # a bare name is an attribute of the package itself


def wrong_imports(text: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module's source, a line each."""
    here = room_of(module)
    if here is None or (here == "" and module != "dsv4c"):
        return [f"{module}: has no room in the house"]
    room, wrong = HOUSE[here], []
    for found in imports_of(ast.parse(text), module, is_package):
        top = found.module.partition(".")[0]
        late = found.inside or found.typing
        where = f"{module}:{found.line}: {'inside a function' if found.inside else 'at module level'}"
        if top == "dsv4c":
            target = room_of(found.module)
            allowed = (here, *room.rooms, *((*room.rooms_inside, *room.back) if late else ()))
            if target not in allowed:
                wrong.append(f"{where}, {here or 'dsv4c'} must not import {found.module}")
        elif top not in sys.stdlib_module_names:
            allowed = (*room.packages, *(room.packages_inside if late else ()))
            if top not in allowed:
                wrong.append(f"{where}, {here or 'dsv4c'} must not import {found.module}")
    return wrong


@dataclass(frozen=True)
class Source:
    """One module of the house as text."""

    module: str
    text: str
    is_package: bool = False

    @cached_property
    def imports(self) -> list[Import]:
        return list(imports_of(ast.parse(self.text), self.module, self.is_package))


def sources() -> list[Source]:
    return [Source(m, path.read_text(encoding="utf-8"), path.name == "__init__.py") for m, path in modules()]


def modules() -> list[tuple[str, Path]]:
    return [
        (".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"), path)
        for path in sorted((REPOSITORY / "dsv4c").rglob("*.py"))
        if "templates" not in path.parts
    ]


@cache
def names_of_modules() -> frozenset[str]:
    return frozenset(module for module, _ in modules())


def test_imports_point_one_way() -> None:
    found = sources()
    assert len(found) > 10
    wrong = [line for each in found for line in wrong_imports(each.text, each.module, each.is_package)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("dsv4c.types", "import dsv4c.ir.graph", "types must not import dsv4c.ir.graph"),
        ("dsv4c.types", "import numpy", "types must not import numpy"),
        (
            "dsv4c.ir.graph",
            "from dsv4c.passes import fold",
            "at module level, ir must not import dsv4c.passes",
        ),
        ("dsv4c.ir.graph", "from dsv4c import passes", "ir must not import dsv4c.passes"),
        ("dsv4c.ir.graph", "from ..passes.fold import fold", "ir must not import dsv4c.passes.fold"),
        ("dsv4c.ir.graph", "from dsv4c import compile", "ir must not import dsv4c.compile"),
        (
            "dsv4c.ir.graph",
            "def f():\n    import torch",
            "graph:2: inside a function, ir must not import torch",
        ),
        ("dsv4c.passes.fold", "import torch", "at module level, passes must not import torch"),
        ("dsv4c.passes.fold", "def f():\n    import torch", "passes must not import torch"),
        (
            "dsv4c.passes.fold",
            "from dsv4c.reference import interpret",
            "passes must not import dsv4c.reference",
        ),
        ("dsv4c.ir.graph", "from dsv4c.codegen import lower", "ir must not import dsv4c.codegen.lower"),
        ("dsv4c.passes.fold", "import dsv4c.codegen.build", "passes must not import dsv4c.codegen.build"),
        ("dsv4c.models.weights", "from torch import Tensor", "models must not import torch"),
        ("dsv4c.config", "import pydantic", "config must not import pydantic"),
        ("dsv4c.plan.records", "import cutlass.cute", "plan must not import cutlass.cute"),
        ("dsv4c.plan.records", "def f():\n    import jinja2", "plan must not import jinja2"),
        ("dsv4c.plan.folder", "import dsv4c.runtime.bind", "plan must not import dsv4c.runtime.bind"),
        (
            "dsv4c.runtime.session",
            "def f():\n    import dsv4c.reference",
            "runtime must not import dsv4c.reference",
        ),
        (
            "dsv4c.runtime.cpu",
            "import dsv4c.runtime.meaning",
            "runtime must not import dsv4c.runtime.meaning",
        ),
        (
            "dsv4c.runtime.meaning",
            "import dsv4c.runtime.cpu",
            "runtime.meaning must not import dsv4c.runtime.cpu",
        ),
        (
            "dsv4c.compiler.compile",
            "import dsv4c.compiler.bisect",
            "compiler must not import dsv4c.compiler.bisect",
        ),
        ("dsv4c.codegen.lib.ptx", "import dsv4c.ir", "codegen.lib must not import dsv4c.ir"),
        ("dsv4c.codegen.emit", "import dsv4c.compiler", "codegen must not import dsv4c.compiler"),
        ("dsv4c.compiler", "def f():\n    import dsv4c.cli", "compiler must not import dsv4c.cli"),
        ("dsv4c.cli", "import torch", "cli must not import torch"),
        ("dsv4c.utils", "", "has no room in the house"),
        ("dsv4c.attic.things", "", "has no room in the house"),
    ],
)
def test_a_wrong_import_is_caught(module: str, text: str, message: str) -> None:
    wrong = wrong_imports(text, module)
    assert len(wrong) == 1
    assert message in wrong[0]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            "dsv4c.passes.schedule",
            "from dsv4c.types import Type\nfrom .memory import lay_out\ndef f():\n    import networkx",
        ),
        ("dsv4c.certify.evaluate", "import torch\nfrom dsv4c.reference import interpret"),
        ("dsv4c.view.svg", "def f():\n    import graphviz"),
        (
            "dsv4c.plan.folder",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import dsv4c.runtime",
        ),
        ("dsv4c.plan.folder", "def f():\n    from dsv4c.runtime.bind import bind"),
        ("dsv4c.runtime.cpu", "import torch\ndef f():\n    from dsv4c.runtime.meaning import meaning_of"),
        ("dsv4c.reference.quant", "import torch\nfrom dsv4c.numerics.codec import quantize"),
        ("dsv4c.cli.compile", "from dsv4c.compiler.compile import compile"),
    ],
)
def test_a_right_import_passes(module: str, text: str) -> None:
    assert wrong_imports(text, module) == []


def test_a_lower_room_never_names_a_higher_one() -> None:
    """The table itself points one way: a room lists rooms declared before it, or says why not."""
    order = list(HOUSE)
    for name, room in HOUSE.items():
        for other in (*room.rooms, *room.rooms_inside):
            assert order.index(other) <= order.index(name), f"{name} lists {other}"
        for other, reason in room.back.items():
            assert order.index(other) > order.index(name), f"{name} may list {other} among its rooms"
            assert reason
    assert sum(len(room.back) for room in HOUSE.values()) <= 2


# --- no circle between rooms ---


def between_rooms(found: Iterable[Source]) -> set[tuple[str, str]]:
    """(room, room that it imports), by all imports there are: late ones, and those for types, too."""
    pairs = set()
    for source in found:
        here = room_of(source.module)
        targets = {room_of(i.module) for i in source.imports if i.module.partition(".")[0] == "dsv4c"}
        pairs |= {(here, target) for target in targets - {here}}
    return pairs


def circles(pairs: Iterable[tuple[str, str]]) -> list[set[str]]:
    """Rooms that reach each other, but for the ways back that the table gives a reason for."""
    ways = networkx.DiGraph((a, b) for a, b in pairs if b not in HOUSE[a].back)
    return [rooms for rooms in networkx.strongly_connected_components(ways) if len(rooms) > 1]


def test_no_circle_between_rooms() -> None:
    pairs = between_rooms(sources())
    assert circles(pairs) == []
    backs = {(name, other) for name, room in HOUSE.items() for other in room.back}
    assert backs <= pairs, "the table excuses an import that there is not; strike it"


@pytest.mark.parametrize(
    "late", ["import dsv4c.models.layout", "def f():\n    from dsv4c.models.layout import layout"]
)
def test_a_circle_is_caught(late: str) -> None:
    found = [
        Source("dsv4c.models.layout", "from dsv4c.ir.graph import Graph"),
        Source("dsv4c.ir.graph", "from dsv4c.types import Type\nimport dsv4c.passes.fold"),
        Source("dsv4c.passes.fold", late),
    ]
    assert circles(between_rooms(found)) == [{"ir", "passes", "models"}]
    assert circles(between_rooms(found[:-1])) == []


# --- late imports are few, and say why ---


def late_imports(source: Source) -> Iterator[tuple[str, str]]:
    """Imports of dsv4c inside functions, with the reason on the line or the one above ("": there is none)."""
    lines = source.text.splitlines()
    for found in source.imports:
        if found.inside and found.module.partition(".")[0] == "dsv4c":
            beside = lines[found.line - 1].partition("#")[2]
            above = lines[found.line - 2].strip()
            reason = re.sub(r"^\s*noqa: \w+", "", beside).strip(" ()") or above.partition("#")[2].strip()
            yield f"{source.module}:{found.line}", reason


def test_late_imports_are_few_and_give_their_reason() -> None:
    found = dict(pair for source in sources() for pair in late_imports(source))
    assert found
    assert len(found) <= LATE, "\n".join(found)
    bare = [where for where, reason in found.items() if len(reason.split()) < 2]
    assert bare == [], "import at the top, or say beside it why not"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("    from dsv4c.ir import op", ""),
        ("    from dsv4c.ir import op  # noqa: F401", ""),
        ("    import dsv4c.ir.ops  # noqa: F401  (fills OPS)", "fills OPS"),
        ("    from dsv4c.ir import op  # loads torch", "loads torch"),
        ("    # Loads torch.\n    from dsv4c.ir import op", "Loads torch."),
    ],
)
def test_the_reason_of_a_late_import_is_read(line: str, reason: str) -> None:
    ((_, found),) = late_imports(Source("dsv4c.passes.fold", f"def f():\n{line}\n"))
    assert found == reason


def test_imports_at_the_top_are_not_late() -> None:
    text = (
        "from typing import TYPE_CHECKING\nimport dsv4c.types\nif TYPE_CHECKING:\n    import dsv4c.ir.graph"
    )
    assert list(late_imports(Source("dsv4c.passes.fold", text))) == []


# --- rooms keep their size ---


def over_budget(found: Iterable[Source]) -> list[str]:
    lines = Counter[str]()
    for source in found:
        lines[room_of(source.module) or ""] += len(source.text.splitlines())
    return [
        f"{name or 'dsv4c'}: {lines[name]} lines, more than the {room.lines} of the table; take some out, or "
        "raise it with a reason"
        for name, room in HOUSE.items()
        if lines[name] > room.lines
    ]


def test_rooms_keep_within_their_lines() -> None:
    found = sources()
    assert over_budget(found) == []
    grown = [*found, Source("dsv4c.passes.more", "x = 1\n" * HOUSE["passes"].lines)]
    assert [line.partition(":")[0] for line in over_budget(grown)] == ["passes"]


# --- the way from a config to a plan ---

PATH = ("models", "passes", "codegen", "plan")


def walk(model: str, **options: Any) -> list[str]:
    """The rooms in which the model's graph, and what becomes of it, is made when it is compiled, in order.

    Tools (`ir`) and the path itself (`compiler`) are none of them; a plan is of its own room, whoever makes
    it.
    """
    rooms: list[str] = []

    def made(frame: FrameType, event: str, value: object) -> None:
        form = type(value)  # not isinstance, which asks traced values what they are
        if event != "return" or form not in (Graph, Program, Plan):
            return
        if form is Graph and not value.name.startswith(f"{model}."):  # type: ignore[attr-defined]
            return  # the body of a fused op
        room = "plan" if form is Plan else room_of(frame.f_globals["__name__"])
        if room in PATH and rooms[-1:] != [room]:
            rooms.append(room)

    sys.setprofile(made)
    try:
        compile(model, **options)
    finally:
        sys.setprofile(None)
    return rooms


def returns(rooms: Sequence[str]) -> list[str]:
    """Steps of a walk that go back to an earlier room."""
    return [f"{a} to {b}" for a, b in pairwise(rooms) if PATH.index(b) < PATH.index(a)]


ONE_FORM: dict[str, Any] = {"max_context": 64, "batch": 1, "verify": 1, "chunk": 8, "certify": False}
"""Options of a compile whose buckets share one graph: the walk is that of this graph."""


@dataclass(frozen=True)
class Rebuild(Pass):
    """Builds the model again where it should have been at hand."""

    name = "rebuild"

    def run(self, graph: Graph, context: Context) -> Graph:
        job = Request("tiny").job()
        job.built(job.decode)
        return graph


def test_the_walk_to_the_plan_returns_to_no_earlier_room() -> None:
    """Only what no kernel takes is given back to fold by the lowering, which the CPU never does."""
    assert walk("tiny", **ONE_FORM) == list(PATH)


def test_a_walk_that_returns_is_caught() -> None:
    rooms = walk("tiny", **ONE_FORM, pipeline=Pipeline().with_pass(Rebuild()))
    assert returns(rooms) == ["passes to models"]
    assert returns(["models", "passes", "codegen", "passes", "codegen", "plan"]) == ["codegen to passes"]
    assert returns(PATH) == []


# --- rooms load without what they must not need ---

HEAVY = ("torch", "cutlass", "transformers", "pydantic", "jinja2")


@pytest.mark.parametrize(
    ("room", "absent"),
    [
        ("config", (*HEAVY, "networkx", "typer")),
        ("ir", HEAVY),
        ("passes", HEAVY),
        ("models", HEAVY),
        ("codegen", ("torch", "cutlass", "transformers")),
        ("compiler", HEAVY),
        (
            "runtime",
            (
                "cutlass",
                "jinja2",
                "transformers",
                "dsv4c.ir",
                "dsv4c.passes",
                "dsv4c.codegen",
                "dsv4c.models.layout",
            ),
        ),
    ],
)
def test_a_room_loads_without(room: str, absent: tuple[str, ...]) -> None:
    """Loads every module of the room in a fresh interpreter and looks at what came with it."""
    names = [module for module, _ in modules() if room_of(module) == room]
    assert names, f"no module lives in {room}"
    assert loaded_with(names, absent) == []


def loaded_with(names: Sequence[str], looked_for: Sequence[str]) -> list[str]:
    """Which of these a fresh interpreter has loaded, too, that imports the modules of these names."""
    script = f"import sys, importlib\n[importlib.import_module(name) for name in {list(names)!r}]\n"
    script += f"print(*(name for name in {tuple(looked_for)!r} if name in sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr
    return loaded.stdout.split()


EVALUATE = ("bisect", "check", "generate", "memory", "run", "serve", "synth", "weights")
"""Commands that compute with tensors; all others, and their help, wait for no torch."""


def test_commands_load_without_torch() -> None:
    light = [f"dsv4c.cli.{name.replace('-', '_')}" for name in COMMANDS if name not in EVALUATE]
    assert loaded_with(light, HEAVY) == []
    assert loaded_with([f"dsv4c.cli.{EVALUATE[0]}"], HEAVY) == ["torch"]


def test_certificates_that_are_kept_load_without_torch() -> None:
    """What `compile` imports of its room; an evaluation loads the rest."""
    assert loaded_with(["dsv4c.certify.certificates"], (*HEAVY, "numpy", "dsv4c.reference")) == []
    assert "torch" in loaded_with(["dsv4c.certify.evaluate"], HEAVY)


def test_golden_compares_whole_texts(golden, tmp_path: Path) -> None:
    writer, reader = type(golden)(tmp_path, update=True), type(golden)(tmp_path, update=False)
    with pytest.raises(pytest.fail.Exception, match=r"no golden .*a\.txt"):
        reader("one\ntwo", "a.txt")
    writer("one\ntwo", "a.txt")
    reader("one\ntwo\n", "a.txt")
    with pytest.raises(pytest.fail.Exception, match=r"(?s)-two\n\+three"):
        reader("one\nthree", "a.txt")
    with pytest.raises(pytest.fail.Exception, match="differs from golden"):
        reader("one\ntwo\nand more", "a.txt")
