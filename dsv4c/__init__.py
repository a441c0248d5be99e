"""dsv4c, a compiler for DeepSeek-V4: `dsv4c.compile(config)` makes a plan, `dsv4c.load(folder)` reads one.

Names are loaded when first used, so that importing dsv4c costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4c.compiler.compile import compile as compile
    from dsv4c.config import Deployment as Deployment
    from dsv4c.config import ModelConfig as Config
    from dsv4c.config import load_config as load_config
    from dsv4c.errors import Dsv4cError as Dsv4cError
    from dsv4c.ir.declare import fused as fused
    from dsv4c.ir.fused import Fused as Fused
    from dsv4c.ir.graph import Builder as Builder
    from dsv4c.ir.graph import Graph as Graph
    from dsv4c.ir.graph import Value as Value
    from dsv4c.passes.base import Pass as Pass
    from dsv4c.passes.fold import Rule as Rule
    from dsv4c.plan.folder import Plan as Plan
    from dsv4c.plan.folder import load as load
    from dsv4c.runtime.session import Session as Session

_HOME = {
    "Builder": ("dsv4c.ir.graph", "Builder"),
    "Config": ("dsv4c.config", "ModelConfig"),
    "Deployment": ("dsv4c.config", "Deployment"),
    "Dsv4cError": ("dsv4c.errors", "Dsv4cError"),
    "Fused": ("dsv4c.ir.fused", "Fused"),
    "Graph": ("dsv4c.ir.graph", "Graph"),
    "Pass": ("dsv4c.passes.base", "Pass"),
    "Plan": ("dsv4c.plan.folder", "Plan"),
    "Rule": ("dsv4c.passes.fold", "Rule"),
    "Session": ("dsv4c.runtime.session", "Session"),
    "Value": ("dsv4c.ir.graph", "Value"),
    "compile": ("dsv4c.compiler.compile", "compile"),
    "fused": ("dsv4c.ir.declare", "fused"),
    "load": ("dsv4c.plan.folder", "load"),
    "load_config": ("dsv4c.config", "load_config"),
}
"""Where every public name lives: module and attribute."""

__all__ = [
    "Builder",
    "Config",
    "Deployment",
    "Dsv4cError",
    "Fused",
    "Graph",
    "Pass",
    "Plan",
    "Rule",
    "Session",
    "Value",
    "compile",
    "fused",
    "load",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsv4c' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
