"""Inputs that nobody meant, for every parser: what it may raise, and texts to begin from.

`mutated(target, seed)` is a text of the target's corpus, changed in a few places: as a whole number of
decisions from one seed, so that a failure is told by its seed alone.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save

from dsv4c import strict_json
from dsv4c.buckets import Bucket
from dsv4c.cli.compile import counts, describe, figures
from dsv4c.cli.run import token_ids
from dsv4c.compiler.job import Saved, job_of, read_saved
from dsv4c.config import BUILTIN_FOLDER, Deployment, load_config
from dsv4c.errors import CheckpointError, ConfigError, GraphError, PlanError, SessionError
from dsv4c.headers import INDEX, read_header
from dsv4c.ir.text import graph_to_json, parse_attribute, parse_graph
from dsv4c.ir.verify import verify
from dsv4c.passes.pipeline import Pipeline, parse_pipeline
from dsv4c.plan import folder as folders
from dsv4c.plan.check import check as prove
from dsv4c.plan.folder import PLAN_FILE, Plan, read_plan
from dsv4c.runtime import state
from dsv4c.runtime.checkpoint import Checkpoint
from dsv4c.types import KV_FP8, NVFP4, TypeSyntaxError, parse_type

LONGEST = 1 << 16  # bytes of an input
SECONDS = 10.0  # that one input may take

NASTY = (
    *(
        "0",
        "-1",
        "1",
        "2",
        "7",
        "1_0",
        "1x-1",
        "0x0",
        "٣",
        "²",
        "1e999",
        "-1e999",
        "1e-999",
        "0.0",
        ".5",
        "+1",
    ),
    *(str(2**31), str(2**63), str(2**64), "9" * 30, "1" + "0" * 400, "7" * 4400, "NaN", "Infinity", "nan"),
    *("null", "true", "false", "[]", "{}", '""', "[[]]", '{"a":1}', "none", "inf"),
    *("(", ")", "[", "]", "{", "}", "(" * 50, "[" * 3000, "q[", "q[e4m3,ue8m0,0x0]", "f32[]", "f32[0]"),
    *("%", "%.", "=", " = a() {", " from [", "@", "#", "## ", ",", ", ", ":", ";", "\n", "\r\n", "\t", " "),
    *(
        "\x00",
        "\\",
        '"',
        "'",
        "é",
        "\ufeff",
        "\u2028",
        "a" * 300,
        "../../x",
        "/etc/passwd",
        "layers",
        "decode",
    ),
)

_PIECES = re.compile(r'-?[0-9][0-9.e+-]*|"[^"\n]{0,80}"|[A-Za-z_][A-Za-z0-9_]*|.', re.DOTALL)


VALUES: tuple[Any, ...] = (
    *(
        0,
        -1,
        1,
        3,
        2**31,
        2**63,
        10**40,
        1.5,
        -0.0,
        1e308,
        True,
        False,
        None,
        "",
        "x",
        "0",
        "f32[1]",
        "arena",
    ),
    *([], [[]], {}, {"a": 1}, [1, 2, 3], ["x"], "a" * 300, "\x00", "../x", "٣", "q[e4m3,ue8m0,1x64][1,64]"),
)


@dataclass(frozen=True)
class Target:
    """A parser: what it reads from, what it may raise, and inputs to begin from. `json`: these are objects,
    but for their first sign.
    """

    run: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    corpus: Sequence[bytes]
    json: bool = False


def mutated(target: Target, seed: int) -> bytes:
    """One to four changes: of whole numbers, words and signs, of bytes, of the length; half of the changes to
    JSON are of values, in what stays JSON.
    """
    choose = random.Random(seed)
    data = choose.choice(target.corpus)
    count = choose.randint(1, 4)
    if target.json and choose.random() < 0.5:
        parsed = json.loads(b"{" + data)
        for _ in range(count):
            _change_a_value(choose, parsed)
        return json.dumps(parsed).encode()[1:]
    for _ in range(count):
        data = (_bytewise if choose.random() < 0.3 else _piecewise)(choose, data, target.corpus)
    return data[:LONGEST]


def _change_a_value(choose: random.Random, parsed: Any) -> None:
    """Somewhere below: another value, none, one more, or two of them exchanged."""
    place = parsed
    while True:
        inner = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not inner:
            break
        key = choose.choice(inner)
        if isinstance(place[key], dict | list) and choose.random() < 0.8:
            place = place[key]
            continue
        match choose.randrange(4):
            case 0 | 1:
                place[key] = deepcopy(choose.choice(VALUES))
            case 2:
                del place[key]
            case 3:
                other = choose.choice(inner)
                place[key], place[other] = place[other], place[key]
        return
    value = deepcopy(choose.choice(VALUES))
    if isinstance(place, dict):
        place[choose.choice(("a", "name", "", "0"))] = value
    else:
        place.append(value)


def _piecewise(choose: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    pieces = _PIECES.findall(data.decode(errors="surrogateescape")) or [""]
    at = choose.randrange(len(pieces))
    end = min(at + choose.randint(1, 6), len(pieces))
    match choose.randrange(6):
        case 0:
            pieces[at] = choose.choice(NASTY)
        case 1:
            pieces.insert(at, choose.choice(NASTY))
        case 2:
            del pieces[at:end]
        case 3:
            pieces[at:end] = pieces[at:end] * choose.choice((2, 3, 50, 400))
        case 4:
            other = choose.randrange(len(pieces))
            pieces[at], pieces[other] = pieces[other], pieces[at]
        case 5:
            alien = _PIECES.findall(choose.choice(corpus).decode(errors="surrogateescape")) or [""]
            start = choose.randrange(len(alien))
            pieces[at:end] = alien[start : start + choose.randint(1, 30)]
    return "".join(pieces).encode(errors="surrogateescape")


def _bytewise(choose: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    changed = bytearray(data or b" ")
    at = choose.randrange(len(changed))
    match choose.randrange(4):
        case 0:
            changed[at] ^= 1 << choose.randrange(8)
        case 1:
            del changed[at:]
        case 2:
            changed[at : at + 8] = choose.randbytes(8)
        case 3:
            del changed[at : at + choose.randint(1, 64)]
    return bytes(changed)


def check(target: Target, data: bytes) -> float:
    """Seconds that the parser took. Raises AssertionError for another exception, or for too many of them."""
    started = time.perf_counter()
    with contextlib.suppress(*target.errors, UnicodeDecodeError):  # callers refuse what is no text
        target.run(data)
    seconds = time.perf_counter() - started
    assert seconds < SECONDS, f"{seconds:.1f} s"
    return seconds


# --- the parsers ---


def targets(folder: Path, plan: Plan) -> dict[str, Target]:
    """Every parser by name. Those of files read one in `folder`."""
    first, _, _ = plan.graph_text("decode").partition("@layers.1")
    lines = [line for line in first.splitlines() if not re.search(r"%(mtp|layers\.[1-9])", line)]
    graphs = [_SMALL_GRAPH.encode(), "\n".join([*lines, "return streams=%streams\n"]).encode()]
    as_json = json.dumps(graph_to_json(parse_graph(_SMALL_GRAPH))).encode()
    return {
        "json": Target(
            strict_json.parse, (ValueError,), [b'{"a": [1, 2.5, "x"], "b": {"c": null}}', as_json]
        ),
        "type": _of_text(
            parse_type, (TypeSyntaxError,), [f"{KV_FP8}[1,128,512]", f"{NVFP4}[8,64]", "f32[1,2]"]
        ),
        "attribute": _of_text(
            parse_attribute, (GraphError,), ["(1,2.5,(bf16,none))", f"({KV_FP8},true)", '"a \\" b"', "1e-06"]
        ),
        "graph": Target(lambda data: verify(parse_graph(data.decode())), (GraphError,), graphs),
        "config": _of_json(folder / "config.json", load_config, (ConfigError,), _configs()),
        "header": _of_file(folder / "x.safetensors", read_header, (CheckpointError,), [_tensors()]),
        "header json": _header(folder / "y.safetensors"),
        "index": _of_json(folder / INDEX, Checkpoint.open, (CheckpointError,), [_index(folder)]),
        "plan": _plan(folder / "plan", plan),
        "saved": _of_text(read_saved, (GraphError,), [_saved()]),
        "pipeline": _of_text(parse_pipeline, (GraphError, ConfigError), [str(Pipeline()), "fold{rules=a+b}"]),
        "tokens": _of_text(lambda text: token_ids(text, "--tokens"), (SessionError,), ["3,17,5", "-1, 2"]),
        "counts": _of_text(lambda text: counts([text]), (GraphError,), ["sinkhorn=86"]),
        "state": _state(folder / "state"),
    }


def _of_text(parse: Callable[[str], object], errors: Any, corpus: Sequence[str]) -> Target:
    return Target(lambda data: parse(data.decode()), errors, [text.encode() for text in corpus])


def _of_file(path: Path, parse: Callable[[Path], object], errors: Any, corpus: Sequence[bytes]) -> Target:
    def run(data: bytes) -> None:
        path.write_bytes(data)
        parse(path)

    return Target(run, errors, corpus)


def _of_json(path: Path, parse: Callable[[Path], object], errors: Any, corpus: Sequence[bytes]) -> Target:
    def run(data: bytes) -> None:
        path.write_bytes(b"{" + data)
        parse(path)

    return Target(run, errors, [text[1:] for text in corpus], json=True)


def _header(path: Path) -> Target:
    """The header of a file of tensors, with its length as it should be."""

    def run(data: bytes) -> None:
        header = b"{" + data
        path.write_bytes(len(header).to_bytes(8, "little") + header + payload)
        read_header(path)

    whole = _tensors()
    end = 8 + int.from_bytes(whole[:8], "little")
    payload = whole[end:]
    return Target(run, (CheckpointError,), [whole[9:end].rstrip()], json=True)


def _configs() -> list[bytes]:
    """A config in every dialect."""
    raw = json.loads((BUILTIN_FOLDER / "tiny.json").read_text())
    release = json.dumps(raw).encode()
    return [release, json.dumps(_TRANSFORMERS | raw).encode(), json.dumps(_INFERENCE).encode()]


_TRANSFORMERS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"] * 2,
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe", "moe", "moe"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    "partial_rotary_factor": 0.5,
    "rope_parameters": {
        "main": {"rope_theta": 10000.0, "rope_type": "default"},
        "compress": {"rope_theta": 160000.0, "rope_type": "yarn", "factor": 16, "attention_factor": 1.0},
    },
}
_INFERENCE: dict[str, Any] = {
    "dim": 256,
    "n_layers": 2,
    "n_heads": 4,
    "head_dim": 128,
    "rope_head_dim": 64,
    "vocab_size": 512,
    "compress_ratios": [0, 4, 0],
    "n_mtp_layers": 1,
    "moe_inter_dim": 128,
    "route_scale": 1.5,
    "n_routed_experts": 8,
    "n_activated_experts": 2,
    "window_size": 128,
    "original_seq_len": 4096,
}

_SMALL_GRAPH = """graph small
input %x: bf16[2,256]
param %gain: bf16[256]
param %w: q[e4m3,ue8m0,128x128][128,256]
@layers.0.attn
%.normed: bf16[2,256] = rms_norm(%x, %gain) {eps=1e-06, precision=f32} from [layers.0.attn.old]
%.q: q[e4m3,ue8m0,1x128][2,256] = quantize(%.normed) {format=q[e4m3,ue8m0,1x128]}
%.y: f32[2,128] = linear(%.q, %w) {out=f32}
%.r: f32[2,2,64] = reshape(%.y) {shape=(2,2,64)}
return y=%layers.0.attn.r
"""


def _tensors() -> bytes:
    return save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.uint8)}, {"format": "pt"})


def _index(folder: Path) -> bytes:
    (folder / "a.safetensors").write_bytes(_tensors())
    return json.dumps(
        {"metadata": {"total_size": 28}, "weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}
    ).encode()


def _saved() -> str:
    graphs = {"decode-1": parse_graph(_SMALL_GRAPH)}
    deployment = Deployment(buckets=(Bucket("decode"),))
    asked = (load_config("tiny"), deployment, "official", str(Pipeline()), {"embed": 1})
    return Saved("fold", *asked, graphs).text()


def _plan(folder: Path, plan: Plan) -> Target:
    """plan.json of a plan cut to a few records, its digest made again: the readers must notice."""
    plan.save(folder)
    data = json.loads((folder / PLAN_FILE).read_text())
    data["files"] = dict(list(data["files"].items())[:2])
    for name in ("weights", "certificates", "state"):
        data[name] = data[name][:2]
    data["report"], data["load"] = {}, None
    data["buckets"] = {"decode-1": data["buckets"]["decode-1"]}
    data["deployment"]["buckets"] = ["decode-1"]
    bucket = data["buckets"]["decode-1"]
    bucket["launches"], bucket["values"] = bucket["launches"][:2], dict(list(bucket["values"].items())[:3])
    del data["digest"]
    body = json.dumps(data, indent=0).partition("\n")[2]

    def run(changed: bytes) -> None:
        text = changed.decode()
        (folder / PLAN_FILE).write_text(folders._first_lines(text) + text)
        read = read_plan(folder)
        prove(read)  # may find what it likes, in words
        describe(read)
        figures(read)
        job_of(read)

    return Target(run, (PlanError, ConfigError, GraphError), [body.encode()], json=True)


def _state(path: Path) -> Target:
    """States of two slots; nothing but what was saved may be taken."""
    plan: Any = SimpleNamespace(digest="0" * 64, state=(), deployment={"max_context": 16})
    states = {
        "window": torch.arange(64, dtype=torch.float32).reshape(2, 32),
        "position": torch.tensor([3, 7]),
    }
    good = state.write(path, plan, states, [0, 1], {}).read_bytes()
    saved = state.read(path, plan, states, 2).rows

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = state.read(path, plan, states, 2).rows
        same = found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
        assert same, "a state that nobody saved was taken"

    return Target(run, (SessionError,), [good])
