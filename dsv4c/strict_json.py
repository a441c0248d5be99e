"""JSON as its standard has it. Python's own reader also takes NaN and a key given twice, and recurses."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any


def parse(text: str | bytes) -> Any:
    """Raises ValueError that says what is wrong; json.JSONDecodeError, which is one, has the place."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise ValueError("is nested too deeply; expected lists and objects a few levels deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        counted = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counted.items() if count > 1)
        raise ValueError(f"{twice[:80]} is given twice; expected each key once")
    return parsed


def _constant(name: str) -> float:
    raise ValueError(f"malformed JSON: {name} is not a JSON number")


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number
