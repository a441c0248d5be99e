"""Commands about rewrites: rules chosen, figures, stages, stop and resume, why-not, diff, certificates."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import dsv4c
from dsv4c.compiler.job import choose_rules, job_of, read_saved, rules_of
from dsv4c.errors import GraphError
from dsv4c.passes.recipes import RECIPES
from dsv4c.reference.registry import MEANINGS
from tests.commands import command

README = Path(__file__).parents[1] / "README.md"
SMALL = ("--max-context", 64, "--chunk", 5)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("passes") / "tiny.plan"
    result = command("compile", "tiny", "-o", folder, *SMALL)
    assert result.code == 0, result.err
    return folder


# --- compile ---


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_default_compile_warns_of_nothing(recipe: str) -> None:
    compiled = dsv4c.compile("tiny", recipe=recipe, max_context=64, chunk=5)
    assert compiled.report["warnings"] == []
    assert compiled.report["launches_outside_layers"] <= 6
    assert compiled.report["unfolded"] == []
    assert compiled.report["rules"]["sinkhorn"] == 12


def test_figures_are_the_same_at_compile_and_in_the_plan(tmp_path: Path) -> None:
    made = command("compile", "tiny", "-o", tmp_path / "p", *SMALL, "--json").json
    shown = command("show", tmp_path / "p", "--json").json
    keys = ("launches_per_layer", "launches_outside_layers", "planned_bytes_per_token", "rules", "seconds")
    for key in (*keys, "compulsory_bytes_per_token"):
        assert made[key] == shown[key]
    assert made["launches_per_layer"] == {"swa": 10, "csa": 16, "hca": 13}
    assert made["compulsory_bytes_per_token"] < made["planned_bytes_per_token"]
    assert "fold decode-1" in made["seconds"]
    assert not any(name.startswith("rule ") for name in made["seconds"])


def test_rules_are_left_out_and_taken_back(tmp_path: Path) -> None:
    out = command(
        "compile", "tiny", "-o", tmp_path / "p", *SMALL, "--disable", "all", "--enable", "sinkhorn", "--json"
    ).json
    assert {name: n for name, n in out["rules"].items() if n} == {"sinkhorn": 12}
    assert "without=" in out["pipeline"]
    job = job_of(dsv4c.load(tmp_path / "p"))
    assert (
        str(choose_rules(job.line, job.rules, enable=["all"]))
        == out["pipeline"].partition(",fold")[0] + ",fold,prepack,tidy"
    )
    assert command("compile", "tiny", "-o", tmp_path / "q", "--disable", "sinkhron").code == 3


def test_a_count_that_differs_is_an_error(tmp_path: Path) -> None:
    result = command("compile", "tiny", "-o", tmp_path / "p", *SMALL, "--expect", "sinkhorn=11")
    assert result.code == 3
    assert "the rule sinkhorn matched 12 times, expected 11" in result.err
    assert not (tmp_path / "p").exists()
    wrong = command("compile", "tiny", "-o", tmp_path / "p", "--expect", "sinkhorn")
    assert "expected a rule and a number" in wrong.err


MINE = """
from dsv4c import Fused, fused
from dsv4c.ir.ops import shift, sigmoid, silu

@fused
class ShiftedSigmoid(Fused):
    offset: float

    def body(self, x):
        return shift(sigmoid(x), offset=self.offset)

@fused
class SiluSigmoid(Fused):
    def body(self, x):
        return silu(sigmoid(x))
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_cli.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])


@pytest.mark.usefixtures("mine")
def test_a_pass_of_ones_own_folds_or_is_warned_of(tmp_path: Path) -> None:
    own = ("--pass", "mine_for_cli")
    args = ("compile", "tiny", "-o", tmp_path / "p", *SMALL, *own, "--disable", "all")
    result = command(*args, "--enable", "shifted_sigmoid", "--enable", "silu_sigmoid", "--json")
    assert result.code == 0, result.err
    assert result.json["rules"]["shifted_sigmoid"] > 0
    assert result.err.count("warning:") == 1
    assert "the rule silu_sigmoid matched nothing; ask why-not silu_sigmoid" in result.err
    assert "shifted_sigmoid" in command("show", tmp_path / "p", *own, "--layer", "1").out
    assert command("why-not", "shifted_sigmoid", tmp_path / "p", *own, "--json").json["matched"] > 0
    assert (
        "op, 12 times: expected silu reading" in command("why-not", "silu_sigmoid", tmp_path / "p", *own).out
    )
    (origin,) = dsv4c.load(tmp_path / "p").contributed
    assert origin == {
        "name": "shifted_sigmoid",
        "kind": "rule",
        "source": "--pass mine_for_cli",
        "at": "mine_for_cli.py:5",
    }
    needed = (
        f"error: plan {dsv4c.load(tmp_path / 'p').name} was compiled with the rule shifted_sigmoid of --pass "
        "mine_for_cli, written in mine_for_cli.py:5; give --pass mine_for_cli\n"
    )
    for opened in (
        ("show", tmp_path / "p"),
        ("why-not", "sinkhorn", tmp_path / "p"),
        ("check", tmp_path / "p"),
    ):
        result = command(*opened)
        assert (result.code, result.err) == (3, needed)


# --- stages ---


def test_stages_are_dumped_with_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "stages"
    assert command("compile", "tiny", "-o", tmp_path / "p", *SMALL, "--dump-stages", folder).code == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names[:3] == ["00-build.txt", "01-quantize.txt", "02-fold.txt"]
    assert names[-1] == "04-tidy.txt"
    assert (folder / names[-1]).read_text() == dsv4c.load(tmp_path / "p").graph_text()


@pytest.mark.parametrize("after", ["build", "fold", "prepack"])
def test_a_stopped_compile_goes_on_to_the_same_plan(plan: Path, tmp_path: Path, after: str) -> None:
    file, resumed = tmp_path / "x.ir", tmp_path / "resumed"
    assert command("compile", "tiny", *SMALL, "--stop-after", after, "-o", file).code == 0
    result = command("compile", "--resume", file, "-o", resumed)
    assert result.code == 0, result.err
    one, other = dsv4c.load(plan), dsv4c.load(resumed)
    assert other.buckets == one.buckets
    assert other.load == one.load
    assert other.pipeline == one.pipeline
    assert other.report["rules"] == one.report["rules"]
    assert "resumed after" in result.err
    assert ("no certificates" in result.err) == (after != "build")
    settled = command("compile", "--resume", file, "-o", resumed, "--overwrite", "--disable", "head")
    assert settled.code == 2
    assert f"--resume {file} has decided --disable" in settled.err


def test_an_edit_is_in_the_resumed_plan(tmp_path: Path) -> None:
    file = tmp_path / "x.ir"
    command("compile", "tiny", *SMALL, "--stop-after", "fold", "-o", file)
    text = file.read_text()
    assert "eps=1e-06" in text
    file.write_text(text.replace("eps=1e-06", "eps=1e-05"))
    assert command("compile", "--resume", file, "-o", tmp_path / "p").code == 0
    assert "eps=1e-05" in dsv4c.load(tmp_path / "p").graph_text()
    file.write_text(text.replace("%tokens: i32[1]", "%tokens: i32[", 1))
    broken = command("compile", "--resume", file, "-o", tmp_path / "q")
    assert broken.code == 3
    assert f"{file}: bucket decode-1, counted from line 4: line 2" in broken.err
    with pytest.raises(GraphError, match="holds no stopped compile"):
        read_saved("graph tiny\n")


def test_a_stage_is_shown(plan: Path) -> None:
    folded = command("show", plan, "--after", "fold", "--layer", 2)
    built = command("show", "tiny", "--after", "build", "--layer", 2)
    assert "experts_down(" in folded.out
    assert "experts_down(" not in built.out
    assert "quantize(" not in built.out
    assert "there are: build, quantize, fold" in command("show", plan, "--after", "folds").err


def test_files_of_all_stages(plan: Path, tmp_path: Path) -> None:
    page, graphs = tmp_path / "a.html", tmp_path / "a.json"
    assert command("show", plan, "--format", "html", "-o", page).code == 0
    assert command("show", plan, "--format", "model-explorer", "-o", graphs).code == 0
    assert "http://" not in page.read_text().replace("http://www.w3.org", "")
    assert [g["id"] for g in json.loads(graphs.read_text())["graphs"]][:3] == ["build", "quantize", "fold"]


def test_diff_of_stages_and_of_plans(plan: Path) -> None:
    found = command("diff", f"{plan}@quantize", "@fold", "--json").json
    assert found["before"]["launches"] > 10 * found["after"]["launches"]
    assert any("sinkhorn" not in line and "normalize" in line for line in found["gone"])
    assert "are equal" in command("diff", plan, plan).out
    assert command("diff", plan, "nowhere").code == 2


# --- what rules did ---


def test_passes_shows_every_rule(plan: Path) -> None:
    rows = {row["rule"]: row for row in command("passes", plan, "--json").json["rules"]}
    assert set(rows) == set(rules_of().rules)
    assert rows["sinkhorn"]["matched"] == 12
    assert rows["sinkhorn"]["launches_saved"] == 12 * 40
    assert rows["attention"]["bytes_saved"] > 0
    assert {r["certificate"] for r in rows.values() if r["matched"]} == {"bit-exact"}
    assert rows["scaled_experts_down"]["certificate"] is None
    assert all(row["ms"] >= 0 for row in rows.values())
    table = command("passes", plan).out
    assert "kv_norm_rope_store" in table
    assert "bit-exact" in table


def test_why_not_groups_refusals_and_tells_one(plan: Path) -> None:
    recipe = ("--recipe", "nvfp4-experts-w4a4", "--max-context", 64)
    grouped = command("why-not", "experts_down", "tiny", *recipe)
    assert "experts_down: tried 6, matched 0" in grouped.out
    assert grouped.out.count("operand, 6 times: expected 1 operands and 1 results, found 2 and 1") == 1
    assert "would have saved 36 launches" in grouped.out
    one = command("why-not", "experts_down", "tiny", *recipe, "--node", "layers.3")
    assert one.out.count("would have saved 6 launches") == 1
    assert "operand at layers.3.ffn.experts.h_quantized" in one.out
    assert (
        "was not tried at 'layers.9'"
        in command("why-not", "experts_down", "tiny", *recipe, "--node", "layers.9").err
    )
    assert (
        "the graph has no quantize" in command("why-not", "rmsnorm_quantize", "tiny", "--recipe", "fp32").out
    )
    assert command("why-not", "experts_up", plan).code == 3


def test_why_not_tells_where_a_rule_applied(plan: Path) -> None:
    assert "it applied wherever it was tried" in command("why-not", "sinkhorn", plan).out
    inside = command("why-not", "q_norm_quantize", plan, "--node", "layers.2").out
    assert [line for line in inside.splitlines() if "applied" in line] == ["  applied: layers.2.attn.qb"]


def test_why_not_tells_of_a_rule_that_is_left_out(tmp_path: Path) -> None:
    command("compile", "tiny", "-o", tmp_path / "p", *SMALL, "--disable", "head")
    assert "the pipeline leaves it out" in command("why-not", "head", tmp_path / "p").out


# --- certificates ---


def test_certificates_are_stored_kept_and_checked(tmp_path: Path) -> None:
    cache = ("--cache", tmp_path / "cache")
    args = ("compile", "tiny", *SMALL, "--disable", "all", "--enable", "sinkhorn", "--enable", "embed")
    made = command(*args, "-o", tmp_path / "p", *cache, "--json").json
    stored = dsv4c.load(tmp_path / "p").certificates
    assert made["certificates"] == len(stored) == 2  # two rules, in buckets of one form
    assert {c["kind"] for c in stored} == {"bit-exact"}
    again = command("check", tmp_path / "p", *cache, "--cached", "--json").json
    assert again["computed"] == 0
    assert again["failed"] == again["changed"] == []
    fresh = command("check", tmp_path / "p", *cache, "--json").json
    assert fresh["computed"] == 2
    assert "sinkhorn" in command("check", tmp_path / "p", *cache).out
    assert "2 certificates, all bit-exact" in command(*args, "-o", tmp_path / "q", *cache).out
    assert command(*args, "-o", tmp_path / "r", "--no-certify", "--json").json["certificates"] == 0


def test_a_certificate_that_changed_fails_the_check(tmp_path: Path) -> None:
    cache = ("--cache", tmp_path / "cache")
    args = ("compile", "tiny", *SMALL, "--disable", "all", "--enable", "embed", *cache)
    command(*args, "-o", tmp_path / "p")
    from dataclasses import replace

    good = dsv4c.load(tmp_path / "p")
    certificates = tuple({**c, "kind": "reassociation", "worst": 2.0} for c in good.certificates)
    replace(good, certificates=certificates).save(tmp_path / "q")
    result = command("check", tmp_path / "q", *cache)
    assert result.code == 3
    assert "embed: reassociation 2 in the plan, bit-exact 0 now" in result.err


@pytest.mark.usefixtures("mine")
def test_a_rule_that_is_wrong_is_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op whose own meaning is not that of its body: compile says so, and says how to go on."""
    places = ("--cache", tmp_path / "cache", "-o", tmp_path / "p")
    args = ("compile", "tiny", *SMALL, "--pass", "mine_for_cli", *places)
    only = ("--disable", "all", "--enable", "shifted_sigmoid")
    monkeypatch.syspath_prepend(tmp_path)
    wrong = rules_of(["mine_for_cli"]).rule("shifted_sigmoid").op
    monkeypatch.setitem(MEANINGS, wrong, lambda op, x: x.sigmoid())
    refused = command(*args, *only)
    assert refused.code == 3
    assert "the rule shifted_sigmoid is wrong on f32[1,4]: " in refused.err
    assert "value 0: relative error" in refused.err
    assert "leave it out with --disable shifted_sigmoid" in refused.err
    assert not (tmp_path / "p").exists()
    assert command(*args, "--disable", "all").code == 0


def test_injected_mistakes_are_counted(tmp_path: Path) -> None:
    args = ("compile", "tiny", *SMALL, "--disable", "all", "--enable", "sinkhorn")
    command(*args, "-o", tmp_path / "p")
    found = command("check", tmp_path / "p", "--inject", "--json").json
    assert found["injected"] == found["caught"] == len(found["defects"]) > 0
    assert found["survivors"] == []
    assert {row["rule"] for row in found["defects"]} == {"sinkhorn"}
    assert "check: name a plan" in command("check").err


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_mistake_is_caught_whatever_the_recipe(recipe: str, tmp_path: Path) -> None:
    args = ("compile", "tiny", *SMALL, "--recipe", recipe, "-o", tmp_path / "p", "--no-certify")
    assert command(*args).code == 0
    found = command("check", tmp_path / "p", "--inject", "--json").json
    assert found["survivors"] == []
    assert found["caught"] == found["injected"] > 70


def test_every_mistake_in_every_rule_is_caught() -> None:
    found = command("check", "--inject", "--json").json
    assert found["survivors"] == []
    assert found["caught"] == found["injected"] > 100
    assert f"{found['caught']} of {found['injected']} caught" in README.read_text()
    assert {row["rule"] for row in found["defects"]} == set(rules_of().rules)


FAULTY = {
    "broken.py": (
        "from dsv4c import Fused, fused\nfrom dsv4c.ir.ops import silu\n\n\n@fused\nclass Broken(Fused):\n"
        "    def body(self, x):\n        return silu(x).shape\n"
    ),
    "spelling.py": "def x(:\n",
    "passes_of_mine.py": (
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom dsv4c import Pass\n\n\n"
        "@dataclass(frozen=True)\nclass Nothing(Pass):\n    name: ClassVar = 'nothing'\n\n"
        "    def run(self, graph, context):\n        pass\n\n\n"
        "@dataclass(frozen=True)\nclass Crash(Pass):\n    name: ClassVar = 'crash'\n\n"
        "    def run(self, graph, context):\n        return graph.nodez\n"
    ),
}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "broken",
            "--pass broken: HERE/broken.py:8: AttributeError: 'Value' object has no attribute 'shape'",
        ),
        ("spelling", "--pass spelling: HERE/spelling.py:1: invalid syntax"),
        ("passes_of_mine:Crash", "pass crash: HERE/passes_of_mine.py:19: AttributeError: 'Graph' object has"),
        ("passes_of_mine:Nothing", "pass nothing: `run` returned NoneType; expected the graph that it made"),
    ],
)
def test_a_mistake_in_contributed_code_is_told_with_its_place(
    given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in FAULTY.items():
        (tmp_path / name).write_text(text)
    result = command("show", "tiny", "--after", "tidy", "--pass", given)
    assert result.code == 3
    assert message.replace("HERE", str(tmp_path)) in result.err
    assert result.err.count("\n") == 1


def test_a_mistake_of_dsv4cs_own_stays_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4c.passes.pipeline.tidy", lambda graph: graph.nodez)
    with pytest.raises(AttributeError):
        command("show", "tiny", "--after", "tidy")


def test_why_not_names_the_rules_that_were_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "twice.py").write_text(
        "from dsv4c import Fused, fused\nfrom dsv4c.ir.ops import silu\n\n\n@fused\nclass Twice(Fused):\n"
        "    def body(self, x):\n        return silu(silu(x))\n"
    )
    result = command("why-not", "twice", "tiny", "--pass", "twice:Twice")
    assert "took every place where a search could begin: swiglu (6 times)" in result.out
