"""Twenty ways to tamper with a GPU plan, digests made right again: python -m tests.gpu.tampered PLAN.

A driver must never see any of them: `load` refuses each before the driver is called.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsv4c.errors import PlanError
from dsv4c.plan.folder import PLAN_FILE, Plan, load
from dsv4c.plan.records import KernelCode

Launch = dict[str, Any]
Change = Callable[[dict[str, Any], Launch], None]


def _argument(data: Launch, **fields: Any) -> None:
    data["arguments"][0] |= fields


def _kernel(plan: dict[str, Any], launch: Launch, **fields: Any) -> None:
    plan["kernels"][launch["kernel"]] |= fields


def _weights(plan: dict[str, Any], launch: Launch) -> None:
    written = next(
        a for x in plan["buckets"]["decode-1"]["launches"] for a in x["arguments"] if "w" in a["access"]
    )
    weight = next(
        a for x in plan["buckets"]["decode-1"]["launches"] for a in x["arguments"] if a["space"] == "weights"
    )
    written |= {**weight, "access": "w"}


def _swap_kernel(plan: dict[str, Any], launch: Launch) -> None:
    launch["kernel"] = next(k for k, r in plan["kernels"].items() if r["symbol"] != symbol_of(plan, launch))


def _swap_cubin(plan: dict[str, Any], launch: Launch) -> None:
    other = next(r for r in plan["kernels"].values() if r["symbol"] != symbol_of(plan, launch))
    record = plan["kernels"][launch["kernel"]]
    record["cubin"], other["cubin"] = other["cubin"], record["cubin"]


def symbol_of(plan: Mapping[str, Any], launch: Launch) -> str:
    return str(plan["kernels"][launch["kernel"]]["symbol"])


TAMPERED: dict[str, Change] = {
    "no argument": lambda plan, x: x["arguments"].clear(),
    "an argument too few": lambda plan, x: x["arguments"].pop(),
    "an argument too many": lambda plan, x: x["arguments"].append(dict(x["arguments"][0])),
    "arguments in reverse": lambda plan, x: x["arguments"].reverse(),
    "a pointer past its block": lambda plan, x: _argument(x, offset=1 << 40),
    "a pointer before its block": lambda plan, x: _argument(x, offset=-1),
    "a pointer at a block's end": lambda plan, x: _argument(x, offset=plan["blocks"]["arena"], nbytes=0),
    "an odd pointer": lambda plan, x: _argument(x, offset=x["arguments"][0]["offset"] + 1),
    "more bytes than the value has": lambda plan, x: _argument(x, nbytes=x["arguments"][0]["nbytes"] + 16),
    "a weight that is written": _weights,
    "no shared memory": lambda plan, x: x.update(shared=0),
    "shared memory of a gigabyte": lambda plan, x: x.update(shared=10**9),
    "a grid of a million": lambda plan, x: x.update(grid=[10**6, 1, 1]),
    "a negative grid": lambda plan, x: x.update(grid=[-1, 1, 1]),
    "blocks of 100,000 threads": lambda plan, x: x.update(block=100_000),
    "another cluster": lambda plan, x: x.update(cluster=[2, 2, 1]),
    "another launch's kernel": _swap_kernel,
    "another kernel's cubin": _swap_cubin,
    "another entry point": lambda plan, x: _kernel(plan, x, symbol="main"),
    "a context of 10^9": lambda plan, x: plan["deployment"].update(max_context=10**9),
}


def tampered(plan: Plan, name: str, folder: Path) -> Path:
    """The plan saved in `folder`, tampered with where its first clustered launch is."""
    data = json.loads(plan.text)
    launches = plan.program().launches
    index = next(i for i, x in enumerate(launches) if isinstance(x.code, KernelCode) and x.code.shared > 0)
    TAMPERED[name](data, data["buckets"][plan.program().shape.name]["launches"][index])
    target = plan.save(folder / name.replace(" ", "-"))
    (target / PLAN_FILE).write_text(signed(data))
    return target


def refused(plan: Plan, name: str, folder: Path) -> str:
    """Why `load` refuses it, or nothing."""
    try:
        load(tampered(plan, name, folder))
    except PlanError as error:
        return str(error)
    return ""


def main() -> int:
    """Tamper in every way; the exit code counts what was not refused before the driver was called."""
    from dsv4c.runtime import driver

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    plan = load(parser.parse_args().plan)
    calls: list[str] = []
    driver.call = lambda what, result: calls.append(what)  # type: ignore[assignment]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in TAMPERED:
            why = refused(plan, name, Path(folder))
            missed += not why
            print(f"{name:32} {'refused: ' + why.partition(': ')[2][:90] if why else 'TAKEN'}")
    if calls:
        print(f"the driver was called: {', '.join(calls[:5])}")
    print(f"{len(TAMPERED) - missed} of {len(TAMPERED)} refused")
    return missed + bool(calls)


def signed(data: Mapping[str, Any]) -> str:
    """A plan.json whose digest is right."""
    from dsv4c.plan.folder import _first_lines

    body = json.dumps({key: value for key, value in data.items() if key != "digest"}, indent=0)
    _, _, rest = body.partition("\n")
    return _first_lines(f"{rest}\n") + f"{rest}\n"


if __name__ == "__main__":
    sys.exit(main())
