"""Inputs without measure: refused in a sentence, soon, before any work is done for them."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4c
from dsv4c import strict_json
from dsv4c.config import BUILTIN_FOLDER, Deployment, load_config
from dsv4c.errors import CheckpointError, ConfigError, GraphError, PlanError, SessionError
from dsv4c.headers import read_header
from dsv4c.ir.text import parse_attribute, parse_graph
from dsv4c.models.synth import synthesize
from dsv4c.plan import folder as folders
from dsv4c.plan.folder import PLAN_FILE, Plan, load
from dsv4c.runtime.generate import check_file, save_logits
from dsv4c.types import TypeSyntaxError, parse_type
from tests.commands import command


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """Every test here is one of time, too."""
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < 20


# --- texts ---


def test_a_key_given_twice_among_many_is_found_soon() -> None:
    keys = ", ".join(f'"key{n}": 0' for n in range(200_000))
    with pytest.raises(ValueError, match="key199999 is given twice"):
        strict_json.parse(f'{{{keys}, "key199999": 1}}')


def test_a_line_without_end_is_refused_soon() -> None:
    line = "%x: f32[1]" + " = a() {" * 50_000
    with pytest.raises(GraphError, match="line 2: ") as error:
        parse_graph(f"graph g\n{line}\n")
    assert len(str(error.value)) < 2_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f32[" + "9" * 4400 + "]", "is no number of at most 19 digits"),
        ("f32[99999999999,99999999999]", "which no memory holds"),
        ("f32[" + ",".join("1" * 40) + "]", "has 40 dimensions, at most 16 do"),
        ("f32[0]", "holds nothing; expected dimensions of at least 1"),
        ("f32[1_0]", "cannot read the shape"),
        ("f32[٣]", "cannot read the shape"),
        ("q[e4m3,ue8m0,0x128][8,128]", "blocks have at least 1 row and column"),
        ("q[e4m3,ue8m0,1x-1][8,128]", "'-1' is no number"),
        ("q[e4m3,ue8m0,1x1_0][8,128]", "'1_0' is no number"),
        ("q[e4m3,ue8m0,1x64,tail=-1][8,128]", "'-1' is no number"),
    ],
)
def test_a_type_of_no_memory(text: str, message: str) -> None:
    with pytest.raises(TypeSyntaxError) as error:
        parse_type(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "text", ["1_0", "٣", "1e999", "-1e999", "9" * 4400, "1x-1", "+1", " 1", "1e", "(1,)", "(,"]
)
def test_a_number_that_is_none(text: str) -> None:
    with pytest.raises(GraphError, match="cannot read the"):
        parse_attribute(text)


def test_attributes_nest_a_few_levels() -> None:
    assert parse_attribute("((((1))))") == ((((1,),),),)
    with pytest.raises(GraphError, match="nested at most 8 deep"):
        parse_attribute("(" * 2000 + ")" * 2000)


@pytest.mark.parametrize(
    "node",
    [
        "completed_entries(%p, %p) {ratio=0, tokens=1}",
        "completed_entries(%p, %p) {ratio=4, tokens=0}",
        "compress_pool(%r, %r, %p, %p) {ratio=0, overlap=false, tokens=1}",
    ],
)
def test_nothing_divides_by_zero(node: str) -> None:
    text = f"graph g\ninput %p: i32[4]\nstate %r: f32[4,8,8]\n%y: i32[1] = {node}\nreturn y=%y\n"
    with pytest.raises(GraphError, match="must be positive, got 0"):
        parse_graph(text)


# --- configs ---


def config(folder: Path, **changes: Any) -> Path:
    raw = json.loads((BUILTIN_FOLDER / "tiny.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 200_000, "compress_ratios": [0] * 200_001},
            "num_hidden_layers is 200000; expected",
        ),
        ({"hc_sinkhorn_iters": 10**7}, "hc_sinkhorn_iters is 10000000; expected at most 256"),
        ({"vocab_size": 2**63}, "vocab_size is 9223372036854775808; expected at most 16,777,216"),
        ({"hidden_size": 10**400}, "expected at most 16,777,216"),
        ({"rope_theta": 10**400}, "expected at most 9,007,199,254,740,992"),
        ({"num_hidden_layers": 10**400}, "expected at most 512"),
        ({"n_routed_experts": 8193}, "n_routed_experts is 8193; expected at most 8,192"),
        ({"num_nextn_predict_layers": 10**9}, "expected at most 16"),
    ],
)
def test_a_model_beyond_measure(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(config(tmp_path, **changes))
    assert message in str(error.value)
    assert len(str(error.value)) < 2_000


def test_a_number_beyond_floats_is_no_number(tmp_path: Path) -> None:
    file = config(tmp_path) / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e999'))
    with pytest.raises(ConfigError, match="1e999 is too large for a number"):
        load_config(tmp_path)


def test_many_unknown_keys_are_noted_soon(tmp_path: Path) -> None:
    (note,) = load_config(config(tmp_path, **{f"unrelated{n}": 1 for n in range(20_000)})).notes
    assert note.endswith("and 19980 more")
    assert len(note) < 2_000


@pytest.mark.parametrize("changes", [{"slots": 10**6}, {"max_context": 2**31}, {"slots": 2**63}])
def test_a_deployment_beyond_measure(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected at most"):
        Deployment(**changes)  # type: ignore[arg-type]


def test_two_draft_blocks_are_one_more_than_is_used(tmp_path: Path) -> None:
    ratios = json.loads((BUILTIN_FOLDER / "tiny.json").read_text())["compress_ratios"]
    model = load_config(config(tmp_path, num_nextn_predict_layers=2, compress_ratios=[*ratios, 0]))
    weights = synthesize(model, tmp_path / "weights", seed=1)
    assert command("weights", weights).code == 0
    session = dsv4c.compile(weights, max_context=64, draft="mtp", certify=False).bind(weights)
    session.prefill([3, 17])
    assert session.draft({0: 5})[0].logits.shape == (1, model.vocab_size)


# --- plans ---


@pytest.fixture(scope="module")
def plan() -> Plan:
    return dsv4c.compile("tiny", max_context=64, certify=False)


def edited(plan: Plan, folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """The plan with its records edited and its digest made again."""
    plan.save(folder)
    data = json.loads((folder / PLAN_FILE).read_text())
    del data["digest"]
    edit(data)
    body = json.dumps(data, indent=0).partition("\n")[2]
    (folder / PLAN_FILE).write_text(folders._first_lines(body) + body)
    return folder


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no files": (lambda d: d.pop("files"), "names no files"),
    "files a list": (lambda d: d.update(files=[]), "names no files"),
    "long name": (lambda d: d["files"].update({"x" * 300: ""}), "cannot be read: File name too long"),
    "no name": (lambda d: d["files"].update({"\x00": ""}), "is missing from the plan"),
    "name": (lambda d: d.update(name=3), "plan.json.name is int 3; expected str"),
    "inputs": (lambda d: d["buckets"]["decode-1"].update(inputs=[1]), "inputs[0] is int 1; expected str"),
    "block": (lambda d: d["blocks"].pop("arena"), "says no size of the block of arena"),
    "state": (lambda d: d["blocks"].update(state=2**63), "blocks.state is int 9223372036854775808"),
    "negative": (lambda d: d["buckets"]["decode-1"].update(arena_bytes=-5), "arena_bytes is int -5"),
    "deployment": (lambda d: d["deployment"].update(slots="many"), "its deployment is"),
    "none": (lambda d: d["deployment"].update(slots=0), "its deployment is"),
    "vocabulary": (lambda d: d["config"].pop("vocab_size"), "its config has no vocab_size"),
    "space": (lambda d: _first(d, "values").update(space="heap"), "space is str 'heap'; expected 'arena' or"),
    "after": (lambda d: _first(d, "launches").update(after=["x"]), "after[0] is str 'x'; expected a count"),
    "contributed": (lambda d: d.update(contributed=[{}]), "contribution 0 lacks one of at, kind, name"),
    "weights": (lambda d: d.update(weights=[3]), "weights[0] is int 3; expected an object"),
    "bucket": (lambda d: d["buckets"].update({"decode-1": None}), "a record cannot be read"),
}


def _first(data: dict[str, Any], name: str) -> dict[str, Any]:
    held = data["buckets"]["decode-1"][name]
    found: dict[str, Any] = held[0] if isinstance(held, list) else next(iter(held.values()))
    return found


@pytest.mark.parametrize("name", EDITS)
def test_a_plan_of_another_kind(name: str, plan: Plan, tmp_path: Path) -> None:
    edit, message = EDITS[name]
    with pytest.raises(PlanError) as error:
        load(edited(plan, tmp_path / "a.plan", edit))
    assert message in str(error.value)
    assert len(str(error.value)) < 800


@pytest.mark.parametrize("name", [PLAN_FILE, "decode.graph"])
def test_a_sparse_file_is_not_read(name: str, plan: Plan, tmp_path: Path) -> None:
    folder = plan.save(tmp_path / "a.plan")
    file = folder / (name if name == PLAN_FILE else plan.program("decode").graph)
    os.truncate(file, 1 << 41)
    with pytest.raises(PlanError, match=r"has 2,199,023,255,552 bytes, files of a plan at most"):
        load(folder)


def test_a_header_beyond_its_file_is_refused_soon(tmp_path: Path) -> None:
    keys = b", ".join(b'"key%d": 0' % n for n in range(200_000)) + b', "key199999": 0'
    header = b"{" + keys + b"}"
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="key199999 is given twice"):
        read_header(tmp_path / "x.safetensors")


# --- logits ---


def test_logits_go_to_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for check in (check_file, lambda path: save_logits(path, torch.zeros(1, 4))):
        with pytest.raises(SessionError, match=r"pipe: the logits cannot be written: it is no regular file"):
            check(tmp_path / "pipe")


def test_logits_that_fill_the_disk_are_told(tmp_path: Path) -> None:
    """The writer runs with a limit to the size of its files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(SessionError, match=r"out: the logits cannot be written: "):
            save_logits(tmp_path / "out", torch.zeros(100, 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


# --- stopped compiles ---


@pytest.mark.parametrize("after", ["build", "tidy"])
def test_a_compile_goes_on_after_any_pass(after: str, plan: Plan, tmp_path: Path) -> None:
    small = ("--max-context", "64", "--no-certify")
    assert (
        command("compile", "tiny", "--max-context", "64", "--stop-after", after, "-o", tmp_path / "x").code
        == 0
    )
    resumed = command("compile", "--resume", tmp_path / "x", "--no-certify", "-o", tmp_path / "a.plan")
    assert resumed.code == 0, resumed.err
    assert command("compile", "tiny", *small, "-o", tmp_path / "b.plan").code == 0
    a, b = load(tmp_path / "a.plan"), load(tmp_path / "b.plan")
    assert (a.buckets, a.state) == (b.buckets, b.state)


def test_a_stopped_compile_that_was_cut_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x"
    assert command("compile", "tiny", "--max-context", "64", "--stop-after", "fold", "-o", file).code == 0
    text = file.read_text()
    cuts = [text.index(f"## {part}") for part in ("bucket prefill", "end")]
    for cut in (*cuts, len(text) - 3):
        file.write_text(text[:cut])
        result = command("compile", "--resume", file, "-o", tmp_path / "p")
        assert result.code == GraphError.exit_code
        assert f"{file}: is cut off: its last line is not '## end'" in result.err
