"""The house stands: imports point one way, and every room loads without what it must not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Room:
    """What the modules of a room may import: rooms and packages, anywhere or inside functions only."""

    rooms: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    rooms_inside: tuple[str, ...] = ()
    packages_inside: tuple[str, ...] = ()


LEAVES = ("types", "errors", "strict_json", "headers", "publish", "cache", "buckets", "arch", "scope")
CONFIG = (*LEAVES, "config")
COMPILER = (*CONFIG, "ir", "models", "passes")

# From the bottom up. A module lives in the room with the longest matching name; a room may import itself.
HOUSE = {
    "types": Room(),
    "errors": Room(),
    "strict_json": Room(),
    "headers": Room(("errors", "strict_json")),
    "publish": Room(),
    "cache": Room(("errors", "publish")),
    "buckets": Room(),
    "arch": Room(),
    "scope": Room(),
    "dialects": Room(("errors", "headers", "scope")),
    "config": Room((*LEAVES, "dialects")),
    "numerics.forms": Room(),
    "numerics.resident": Room(("types", "numerics.forms")),
    "numerics": Room((*LEAVES, "numerics.forms", "numerics.resident"), ("torch", "numpy")),
    # The contract of compiler and runtime: data.
    "plan": Room(LEAVES, (), ("runtime",)),
    "ir": Room(LEAVES),
    "reference": Room((*LEAVES, "ir", "numerics"), ("torch",)),
    # Runs plans, knows nothing of how they are made; the CPU executor alone interprets, and loads that late.
    "runtime.cpu": Room(
        (*LEAVES, "runtime", "plan", "numerics"), ("torch", "numpy"), rooms_inside=("ir", "reference")
    ),
    "runtime": Room(
        (*CONFIG, "plan", "numerics", "numerics.forms", "numerics.resident", "runtime.cpu"),
        ("torch", "numpy", "safetensors", "cuda"),
        (),
        ("rich",),
    ),
    # Graph work happens without torch: these load it, and whatever needs it, only inside functions.
    "models": Room(
        (*CONFIG, "ir"),
        ("networkx",),
        ("runtime", "numerics"),
        ("torch", "numpy", "safetensors", "rich"),
    ),
    "passes": Room(
        (*CONFIG, "ir"), ("networkx",), ("reference", "runtime", "numerics", "models"), ("torch",)
    ),
    "view": Room((*CONFIG, "ir", "models"), ("networkx",), (), ("graphviz", "rich")),
    # Device code, imported by generated kernels. Host code may read the modules in it that need no cutlass.
    "codegen.lib": Room(("numerics.forms",), ("cutlass", "cuda")),
    # Launches are lowered to what plans hold, which is data: without templates, as for the CPU.
    "codegen.lower": Room((*COMPILER, "numerics.forms", "numerics.resident", "plan")),
    "codegen.bodies": Room((*COMPILER, "plan", "codegen.lower")),
    "codegen": Room(
        (*COMPILER, "numerics.forms", "codegen.lib", "codegen.lower", "plan"),
        ("jinja2",),
        (),
        ("cutlass", "cuda", "torch"),
    ),
    "codegen.targets": Room((*COMPILER, "codegen.lower", "codegen.bodies"), (), ("codegen",)),
    # The one path from a config to a plan. Torch and kernels are loaded only where they are needed.
    "compiler": Room(
        (*COMPILER, "plan", "codegen.lower", "codegen.targets"),
        (),
        ("runtime", "runtime.cpu", "numerics", "reference", "view", "codegen", "codegen.bodies"),
        ("torch", "safetensors"),
    ),
    "": Room((*CONFIG, "ir", "passes", "compiler", "plan"), (), ("runtime", "models", "codegen", "view")),
    "cli": Room(
        ("", *CONFIG),
        ("typer", "rich", "click"),
        (*COMPILER, "compiler", "plan", "numerics", "runtime", "view", "codegen"),
    ),
    "__main__": Room(("cli",)),
}


@dataclass(frozen=True)
class Import:
    """One imported module: its name, the line, and whether it is imported only when something is called."""

    module: str
    line: int
    inside: bool


def imports_of(tree: ast.Module, module: str, is_package: bool) -> Iterator[Import]:
    """Every import below `tree`. Function bodies and `if TYPE_CHECKING:` count as inside."""

    def walk(node: ast.AST, inside: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            names = [f"{source}.{alias.name}" for alias in node.names] if source == "dsv4c" else [source]
            yield from (Import(name, node.lineno, inside) for name in names)
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside or deferred or typing_only)

    yield from walk(tree, inside=False)


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
        where = f"{module}:{found.line}: {'inside a function' if found.inside else 'at module level'}"
        if top == "dsv4c":
            target = room_of(found.module)
            allowed = (here, *room.rooms, *(room.rooms_inside if found.inside else ()))
            if target not in allowed:
                wrong.append(f"{where}, {here or 'dsv4c'} must not import {found.module}")
        elif top not in sys.stdlib_module_names:
            allowed = (*room.packages, *(room.packages_inside if found.inside else ()))
            if top not in allowed:
                wrong.append(f"{where}, {here or 'dsv4c'} must not import {found.module}")
    return wrong


def modules() -> list[tuple[str, Path]]:
    return [
        (".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"), path)
        for path in sorted((REPOSITORY / "dsv4c").rglob("*.py"))
        if "templates" not in path.parts
    ]


def test_imports_point_one_way() -> None:
    found = modules()
    assert len(found) > 10
    wrong = [
        line
        for module, path in found
        for line in wrong_imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ]
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
        (
            "dsv4c.passes.fold",
            "from dsv4c.reference import interpret",
            "passes must not import dsv4c.reference",
        ),
        ("dsv4c.passes.fold", "import dsv4c.codegen.build", "passes must not import dsv4c.codegen.build"),
        ("dsv4c.models.weights", "from torch import Tensor", "models must not import torch"),
        ("dsv4c.config", "import pydantic", "config must not import pydantic"),
        ("dsv4c.plan.records", "import cutlass.cute", "plan must not import cutlass.cute"),
        ("dsv4c.plan.records", "def f():\n    import jinja2", "plan must not import jinja2"),
        (
            "dsv4c.runtime.session",
            "def f():\n    import dsv4c.reference",
            "runtime must not import dsv4c.reference",
        ),
        ("dsv4c.runtime.cpu", "import dsv4c.reference", "runtime.cpu must not import dsv4c.reference"),
        (
            "dsv4c.runtime.cpu",
            "def f():\n    import dsv4c.passes",
            "runtime.cpu must not import dsv4c.passes",
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
            "import networkx\nfrom dsv4c.types import Type\nfrom .memory import lay_out",
        ),
        ("dsv4c.passes.certify", "def f():\n    import torch\n    from dsv4c.reference import interpret"),
        ("dsv4c.passes.certify", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("dsv4c.runtime.cpu", "import torch\ndef f():\n    from dsv4c.reference import registry"),
        ("dsv4c.reference.quant", "import torch\nfrom dsv4c.numerics.codec import quantize"),
        ("dsv4c.cli", "def f():\n    from dsv4c.compiler.compile import compile"),
    ],
)
def test_a_right_import_passes(module: str, text: str) -> None:
    assert wrong_imports(text, module) == []


def test_a_lower_room_never_names_a_higher_one() -> None:
    """The table itself points one way: a room lists rooms declared before it.

    Exceptions: `runtime.cpu` interprets, and `Plan.bind` hands itself to the runtime.
    """
    order = list(HOUSE)
    for name, room in HOUSE.items():
        for other in (*room.rooms, *room.rooms_inside):
            assert name in ("runtime.cpu", "plan") or order.index(other) <= order.index(name), (
                f"{name} lists {other}"
            )


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
        ("cli", ("torch", "cutlass", "transformers")),
        (
            "runtime",
            (
                "cutlass",
                "jinja2",
                "transformers",
                "dsv4c.ir",
                "dsv4c.passes",
                "dsv4c.codegen",
                "dsv4c.models",
            ),
        ),
    ],
)
def test_a_room_loads_without(room: str, absent: tuple[str, ...]) -> None:
    """Loads every module of the room in a fresh interpreter and looks at what came with it."""
    names = [module for module, _ in modules() if room_of(module) == room]
    assert names, f"no module lives in {room}"
    script = f"import sys, importlib\n[importlib.import_module(name) for name in {names!r}]\n"
    script += f"print(*(name for name in {absent!r} if name in sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == []


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
