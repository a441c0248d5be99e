"""Certificates: right rules pass bit for bit, wrong ones turn red, and nothing is computed twice."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4c.certify import application as application_module
from dsv4c.certify import defects
from dsv4c.certify.adversarial import operands_for
from dsv4c.certify.application import application, applications, reduce_sizes
from dsv4c.certify.certificates import certify
from dsv4c.certify.compare import compare
from dsv4c.certify.defects import DEFECTS, inject, kills, totals
from dsv4c.certify.evaluate import PATTERNS, evaluate
from dsv4c.certify.finding import from_dict, to_dict
from dsv4c.compiler.request import Request
from dsv4c.errors import GraphError
from dsv4c.ir.declare import fused
from dsv4c.ir.fused import Fused
from dsv4c.ir.graph import Builder, Graph, Value
from dsv4c.ir.ops import (
    add,
    attention_scores,
    attention_values,
    cache_write,
    cast,
    clamp,
    embedding,
    expert_linear,
    gather,
    linear,
    mul,
    quantize,
    rms_norm,
    rope,
    silu,
    sink_softmax,
    softmax,
    window_index,
)
from dsv4c.passes.fold import Rule, fold
from dsv4c.passes.work import Match
from dsv4c.reference.registry import MEANINGS, meaning
from dsv4c.types import (
    BF16,
    F32,
    FP8_ROW,
    MXFP4,
    DType,
    QuantFormat,
    parse_type,
)


@fused
class CertifiedTest(Fused):
    """Norm and encoding."""

    literals = ("rms_norm.precision",)
    eps: float
    format: QuantFormat

    def body(self, x: Value, gain: Value) -> tuple[Value, ...]:
        y = rms_norm(x, gain, eps=self.eps)
        return quantize(y, format=self.format), y


@fused
class LooseTest(Fused):
    """The same, with a meaning of its own and leave to differ by the order of a sum."""

    literals = ("rms_norm.precision",)
    certified_as = "reassociation"
    eps: float

    def body(self, x: Value, gain: Value) -> Value:
        return silu(rms_norm(x, gain, eps=self.eps))  # type: ignore[no-any-return]


@fused
class AttendTest(Fused):
    """Rotated queries over a window, with a sink; the new row is stored first."""

    literals = ("rope.inverse", "rope.stride")
    window: int
    scale: float
    out: DType

    def body(
        self,
        cache: Value,
        row: Value,
        q: Value,
        sink: Value,
        positions: Value,
        slots: Value,
        frequencies: Value,
    ) -> tuple[Value, ...]:
        cache = cache_write(cache, rope(row, positions, frequencies), positions, slots)
        index = window_index(positions, window=self.window)
        keys = gather(cache, index, slots)
        scores = attention_scores(rope(q, positions, frequencies), keys, index, scale=self.scale)
        p, denominator = sink_softmax(scores, sink, out=self.out)
        return attention_values(p, denominator, keys), cache


@fused
class ExpertsTest(Fused):
    """Chosen experts, clamped and gated."""

    literals = ("clamp.low", "expert_linear.out", "cast.to")
    limit: float

    def body(self, x: Value, w1: Value, w3: Value, experts: Value) -> Value:
        gate = silu(clamp(cast(expert_linear(x, w1, experts, out=BF16), to=F32), low=None, high=self.limit))
        return mul(gate, cast(expert_linear(x, w3, experts, out=BF16), to=F32))  # type: ignore[no-any-return]


def matches_of(op: type[Fused], build: Any, **operands: str) -> list[Match]:
    b = Builder("g")
    kinds = {"state": b.state, "param": b.param, "input": b.input}
    values = []
    for name, text in operands.items():
        kind, _, type_ = text.rpartition(" ")
        values.append(kinds[kind or "input"](name, parse_type(type_)))
    with b:
        made = build(*values)
    graph = b.finish({str(i): v for i, v in enumerate(made if isinstance(made, tuple) else (made,))})
    _, report = fold(graph, [Rule(op)])
    assert report.matches, report.rules[op.name].refusals
    return report.matches


def norm_quantize(x: Value, g: Value) -> Value:
    return quantize(rms_norm(x, g, eps=1e-6), format=FP8_ROW)  # type: ignore[no-any-return]


def simple() -> list[Match]:
    return matches_of(CertifiedTest, norm_quantize, x="bf16[2,256]", g="param bf16[256]")


def attended() -> list[Match]:
    def build(
        cache: Value, row: Value, q: Value, sink: Value, pos: Value, slots: Value, freq: Value
    ) -> tuple[Value, ...]:
        cache = cache_write(cache, rope(row, pos, freq), pos, slots)
        index = window_index(pos, window=8)
        keys = gather(cache, index, slots)
        scores = attention_scores(rope(q, pos, freq), keys, index, scale=0.25)
        p, denominator = sink_softmax(scores, sink, out=BF16)
        return attention_values(p, denominator, keys), cache

    return matches_of(
        AttendTest,
        build,
        cache="state bf16[2,16,32]",
        row="bf16[2,32]",
        q="bf16[2,3,32]",
        sink="param f32[3]",
        pos="i32[2]",
        slots="i32[2]",
        freq="param f32[8]",
    )


def experts(width: int = 128, count: int = 4) -> list[Match]:
    def build(x: Value, w1: Value, w3: Value, chosen: Value) -> Value:
        gate = silu(clamp(cast(expert_linear(x, w1, chosen, out=BF16), to=F32), low=None, high=7.0))
        return mul(gate, cast(expert_linear(x, w3, chosen, out=BF16), to=F32))  # type: ignore[no-any-return]

    weight = f"param q[e2m1,ue8m0,1x32][{count},64,{width}]"
    return matches_of(ExpertsTest, build, x=f"bf16[1,{width}]", w1=weight, w3=weight, chosen="i32[1,2]")


# --- what a certificate says ---


@pytest.mark.parametrize("matches", [simple, attended, experts])
def test_a_right_rule_is_bit_exact(matches: Any, tmp_path: Path) -> None:
    result = certify(matches(), folder=tmp_path)
    (certificate,) = result.all
    assert (certificate.kind, certificate.worst, certificate.holds) == ("bit-exact", 0.0, True)
    assert certificate.patterns == PATTERNS
    assert result.failed == []


def test_equal_applications_share_one(tmp_path: Path) -> None:
    def build(x: Value, y: Value, g: Value, h: Value, other: Value) -> tuple[Value, ...]:
        return norm_quantize(x, g), norm_quantize(y, h), norm_quantize(x, other)

    found = matches_of(
        CertifiedTest,
        build,
        x="bf16[2,256]",
        y="bf16[2,256]",
        g="param bf16[256]",
        h="param bf16[256]",
        other="param f32[256]",
    )
    assert [a.count for a in applications(found)] == [2, 1]
    assert [c.count for c in certify(found, folder=tmp_path).all] == [2, 1]


def test_a_meaning_of_the_wrong_type_is_different() -> None:
    certificate = with_meaning(CertifiedTest, lambda op, x, g: x, simple())
    assert not certificate.holds
    assert "instead of" in certificate.reason


def with_meaning(op: type[Fused], function: Any, matches: list[Match]) -> Any:
    meaning(op)(function)
    try:
        return evaluate(applications(matches)[0])
    finally:
        del MEANINGS[op]


def loose() -> list[Match]:
    return matches_of(
        LooseTest, lambda x, g: silu(rms_norm(x, g, eps=1e-6)), x="f32[2,256]", g="param f32[256]"
    )


def test_a_declared_class_is_held_to() -> None:
    def one_ulp(op: LooseTest, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.double().square().mean(-1, keepdim=True).float() + op.eps) * g
        exact = torch.nn.functional.silu(y.double()).float()
        return torch.nextafter(exact, torch.full_like(exact, torch.inf))

    def far(op: LooseTest, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return one_ulp(op, x, g) * 1.001

    near = with_meaning(LooseTest, one_ulp, loose())
    assert (near.kind, near.holds) == ("reassociation", True)
    assert near.worst >= 1
    wrong = with_meaning(LooseTest, far, loose())
    assert (wrong.kind, wrong.holds) == ("approximate", False)


def test_an_unknown_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LooseTest, "certified_as", "about right")
    with pytest.raises(GraphError, match="certified_as is 'about right'; expected one of bit-exact"):
        evaluate(applications(loose())[0])


# --- mistakes of a match ---


def test_a_wrong_capture_is_noticed() -> None:
    (match,) = simple()
    wrong = replace(match, op=replace(match.op, eps=1e-2))
    assert not evaluate(application(wrong)).holds


def test_a_wrong_format_is_noticed() -> None:
    (match,) = simple()
    wrong = replace(match, op=replace(match.op, format=MXFP4))
    assert "instead of" in evaluate(application(wrong)).reason


def test_a_dropped_operand_is_noticed() -> None:
    (match,) = simple()
    with pytest.raises(GraphError, match="operand g is not read by both sides"):
        application(replace(match, operands=match.operands[:1]))


def test_swapped_operands_are_noticed() -> None:
    (match,) = experts()
    x, w1, w3, chosen = match.operands
    assert not evaluate(application(replace(match, operands=(x, w3, w1, chosen)))).holds


def test_a_write_that_one_side_forgets_is_noticed() -> None:
    def without_write(op: AttendTest, cache: Any, *rest: Any) -> Any:
        from dsv4c.reference.interpret import _run_body

        made = _run_body(op, (cache.clone(), *rest))
        return made[0], cache

    certificate = with_meaning(AttendTest, without_write, attended())
    assert certificate.kind == "different"


def test_an_operand_that_is_overwritten_is_noticed() -> None:
    """The results are right, but a gain is not what it was before."""

    def clobbering(op: CertifiedTest, x: Any, gain: torch.Tensor) -> Any:
        from dsv4c.reference.interpret import _run_body

        made = _run_body(op, (x, gain))
        gain.zero_()
        return made

    certificate = with_meaning(CertifiedTest, clobbering, simple())
    assert not certificate.holds


# --- sizes ---


def test_huge_dimensions_are_cut_down() -> None:
    def build(x: Value, g: Value) -> Value:
        return quantize(rms_norm(x, g, eps=1e-6), format=FP8_ROW)  # type: ignore[no-any-return]

    matches = matches_of(CertifiedTest, build, x="bf16[64,7168]", g="param bf16[7168]")
    reduced = reduce_sizes(applications(matches)[0])
    assert [t.shape for t in reduced.types] == [(5, 256), (256,)]
    (many,) = applications(experts(width=1024, count=256))
    small = reduce_sizes(many)
    assert small.types[1].shape == (8, 64, 256)
    assert evaluate(many).reduced == tuple(map(str, small.types))


# --- inputs ---


@pytest.mark.parametrize("pattern", PATTERNS)
def test_inputs_are_deterministic_and_legal(pattern: str) -> None:
    (applied,) = applications(experts())
    one, two = (operands_for(applied.nodes, pattern, 3) for _ in range(2))
    assert compare(one, two, "").kind == "bit-exact"
    chosen = one[3]
    assert isinstance(chosen, torch.Tensor)
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < 4


def test_mixed_inputs_hold_every_profile() -> None:
    (applied,) = applications(matches_of(CertifiedTest, norm_quantize, x="bf16[4,512]", g="param bf16[512]"))
    x = operands_for(applied.nodes, "mixed", 0)[0]
    assert isinstance(x, torch.Tensor)
    wide = x.float()
    negative_zero = (wide == 0) & torch.signbit(wide)
    subnormal = (wide != 0) & (wide.abs() < 2.0**-126)
    ties, huge = wide.abs() == 6, wide.abs() > 2e4
    halfway = (wide.abs() < 8) & ((wide * 32).remainder(2) == 1)
    saturating = (wide.abs() >= 448) & (wide.abs() < 1e4)
    for found in (negative_zero, subnormal, ties, halfway, saturating):
        assert bool((found.reshape(-1, 32).sum(1) > 8).any())
    assert bool(huge.any())


# --- comparing ---


def test_classes_of_difference() -> None:
    x = torch.tensor([1.0, -2.0, 0.0])
    up = torch.nextafter(x, torch.full_like(x, torch.inf))
    assert compare([x], [x.clone()], "").kind == "bit-exact"
    assert compare([x], [up], "").kind == "reassociation"
    assert compare([x], [x * 1.001], "").kind == "approximate"
    assert compare([x], [x * 2], "").kind == "different"
    assert compare([x], [x.bfloat16()], "").kind == "different"
    assert compare([x], [], "").kind == "different"
    assert compare([torch.tensor([0.0])], [torch.tensor([-0.0])], "").kind != "bit-exact"
    nan = torch.tensor([torch.nan])
    assert compare([nan], [nan.clone()], "").kind == "bit-exact"
    assert compare([nan], [torch.tensor([1.0])], "").kind == "different"
    ones = torch.tensor([1], dtype=torch.int32)
    assert compare([ones], [ones + 1], "").kind == "different"


def test_one_code_is_a_requantization() -> None:
    from dsv4c.numerics.codec import quantize as encode

    for format_, step in ((FP8_ROW, 1), (MXFP4, 1), (MXFP4, 16)):
        q = encode(torch.linspace(-1, 1, 128).reshape(1, 128), format_)
        codes = q.data.view(torch.uint8).clone()
        codes[0, 5] += step
        moved = q._replace(data=codes.view(q.data.dtype))
        finding = compare([q], [moved], "")
        assert (finding.kind, finding.worst) == ("requantization", 1)


# --- keeping ---


def test_kept_by_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert certify(simple(), folder=tmp_path).computed == 1
    again = certify(simple(), folder=tmp_path)
    assert again.computed == 0
    assert again.all == certify(simple(), folder=tmp_path, fresh=True).all
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    file.write_text(file.read_text()[:20])  # cut off: computed again
    assert certify(simple(), folder=tmp_path).computed == 1
    monkeypatch.setattr(application_module, "VERSION", 0)
    assert certify(simple(), folder=tmp_path).computed == 1


def test_other_sizes_share_what_is_kept(tmp_path: Path) -> None:
    """Both are evaluated on five rows of 256, and each certificate says what it is of."""

    def of(rows: int, width: int) -> Any:
        x, gain = f"bf16[{rows},{width}]", f"bf16[{width}]"
        return certify(matches_of(CertifiedTest, norm_quantize, x=x, g=f"param {gain}"), folder=tmp_path)

    first, second, third = of(64, 7168), of(128, 4096), of(5, 256)
    assert [found.computed for found in (first, second, third)] == [1, 0, 0]
    assert first.all[0].operands == ("bf16[64,7168]", "bf16[7168]")
    assert second.all[0].operands == ("bf16[128,4096]", "bf16[4096]")
    assert first.all[0].reduced == second.all[0].reduced == ("bf16[5,256]", "bf16[256]")
    assert third.all[0].reduced == ()
    assert first.all[0].digest == third.all[0].digest


def test_a_digest_covers_fields_types_and_wiring() -> None:
    (match,) = simple()
    (wide,) = matches_of(CertifiedTest, norm_quantize, x="bf16[2,512]", g="param bf16[512]")
    others = [wide, replace(match, op=replace(match.op, eps=1e-5))]
    digests = {application(m).digest for m in (match, *others)}
    assert len(digests) == 3


def _certify_in(folder: Path) -> str:
    return certify(simple(), folder=folder, fresh=True).all[0].digest


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        digests = pool.map(_certify_in, [tmp_path] * 4)
    assert len(set(digests)) == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [digests[0]]


def test_as_plain_data(tmp_path: Path) -> None:
    (certificate,) = certify(simple(), folder=tmp_path).all
    plain = to_dict(certificate)
    assert json.loads(json.dumps(plain)) == plain
    assert from_dict(plain) == certificate


# --- defects ---


def everything() -> Iterator[Match]:
    yield from simple()
    yield from attended()
    yield from experts()


def test_every_injected_defect_is_caught() -> None:
    found = inject(everything())
    summary = totals(found)
    assert summary["survivors"] == []
    assert summary["injected"] == summary["caught"] == len(found)
    names = {k.defect for k in found}
    assert {"drop eps", "swap scale axes", "skip clamp", "off-by-one block", "wrong rounding"} <= names
    assert {"rotate the other way", "forget sink", "wrong place", "wrong slot", "swap operands"} <= names


def test_a_blind_certificate_lets_defects_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defects, "PATTERNS", ("zeros",))
    (applied,) = applications(simple())
    survivors = {k.defect for k in kills(applied) if not k.caught}
    assert "swap scale axes" in survivors
    assert "drop eps" not in survivors


def test_every_defect_has_a_place_somewhere() -> None:
    """The catalogue holds nothing that no op can suffer."""

    def build(b: Builder) -> Graph:
        from dsv4c.ir.ops import cache_extend, completed_entries, hadamard, mix_streams, scale, top_k

        x = b.input("x", parse_type("f32[2,64]"))
        streams, comb = b.input("s", parse_type("f32[2,4,64]")), b.input("c", parse_type("f32[2,4,4]"))
        slots = b.input("slots", parse_type("i32[2]"))
        ids, w = b.input("i", parse_type("i32[2]")), b.input("w", parse_type("f32[8,64]"))
        cache = b.state("cache", parse_type("f32[2,4,64]"))
        sink, freq = b.input("sink", parse_type("f32[4]")), b.input("f", parse_type("f32[8]"))
        table = b.input("e", parse_type("f32[4,8,64]"))
        with b:
            rms_norm(x, b.input("g", parse_type("f32[64]")), eps=1e-6)
            quantize(add(cast(x, to=BF16), cast(x, to=BF16)), format=MXFP4)
            clamp(mix_streams(streams, comb), low=None, high=1.0)
            rope(scale(x, factor=2.0), ids, freq)
            sink_softmax(b.input("l", parse_type("f32[2,4,8]")), sink, out=BF16)
            softmax(linear(x, w, out=F32), axis=-1)
            cache_extend(cache, x, ids, slots, capacity=8, tokens=2)
            cache_write(cache, hadamard(x), ids, slots)
            embedding(w, completed_entries(ids, slots, ratio=4, tokens=2)[0])
            top_k(x, k=2)
            expert_linear(x, table, b.input("k", parse_type("i32[2,2]")), out=F32)
        return b.finish({})

    graph = build(Builder("all"))
    found = {name for name, find in DEFECTS.items() if any(find(node) is not None for node in graph.nodes)}
    assert found == set(DEFECTS)


def test_progress_counts_certificates(tmp_path: Path) -> None:
    job = Request("tiny", max_context=16).job()
    fold = job.compiled(job.decode).context.fold
    assert fold is not None
    told: list[tuple[str, int, int]] = []
    found = certify(
        fold.matches[:12],
        folder=tmp_path,
        progress=lambda what, done, whole: told.append((what, done, whole)),
    )
    assert [done for _, done, _ in told] == list(range(len(found.all)))
    assert {whole for *_, whole in told} == {len(found.all)}
    assert [what for what, *_ in told] == [f"certificate of {c.rule}" for c in found.all]
