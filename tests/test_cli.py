"""The command line: what commands print, JSON alone on stdout, exit codes, no traceback for a mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from inspect import cleandoc
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

import dsv4c
from dsv4c.cli import COMMANDS, console, module_of
from dsv4c.cli.run import token_ids
from dsv4c.compiler.job import rules_of
from dsv4c.config import BUILTIN_FOLDER, TARGETS, load_config
from dsv4c.errors import SessionError
from dsv4c.models.synth import synthesize
from dsv4c.passes.recipes import RECIPES
from tests.codegen.lowered import gpu_plan
from tests.commands import command

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(dsv4c.load_config("tiny"), tmp_path_factory.mktemp("cli") / "weights", seed=1)


@pytest.fixture(scope="module")
def plan(weights: Path) -> Path:
    folder = weights.parent / "tiny.plan"
    result = command("compile", weights, "-o", folder, "--max-context", 64, "--chunk", 5, "--batch", 2)
    assert result.code == 0, result.err
    return folder


# --- what there is ---


def test_rules_recipes_targets_and_models_are_listed() -> None:
    rules = command("rules", "--json").json["rules"]
    assert [row["rule"] for row in rules] == list(rules_of().rules)
    assert {row["from"] for row in rules} == {"dsv4c"}
    assert all(row["what"] for row in rules)
    recipes = command("recipes", "--json").json["recipes"]
    assert [row["recipe"] for row in recipes] == list(RECIPES)
    assert all(row["what"] for row in recipes)
    assert [row["target"] for row in command("targets", "--json").json["targets"]] == list(TARGETS)
    flash, _, tiny = command("models", "--json").json["models"]
    assert round(flash["parameters"] / 1e9, 2) == 284.33
    assert tiny["layers"] == "2 SWA, 2 CSA, 2 HCA"


@pytest.mark.parametrize("name", ["rules", "recipes", "targets", "models"])
def test_lists_are_tables_to_read(name: str) -> None:
    (rows,) = command(name, "--json").json.values()
    out = command(name).out
    assert all(str(next(iter(row.values()))) in out for row in rows)


def test_the_hubs_id_leads_to_the_built_in_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "deepseek-ai/DeepSeek-V4-Flash"
    assert load_config(name) == load_config("deepseek-v4-flash")
    assert load_config(name).notes == (
        "deepseek-ai/DeepSeek-V4-Flash is the built-in deepseek-v4-flash; nothing was downloaded",
    )
    clone = tmp_path / name
    clone.mkdir(parents=True)
    (clone / "config.json").write_text((BUILTIN_FOLDER / "tiny.json").read_text())
    assert load_config(name) == load_config("tiny")  # a clone comes first


# --- compile ---


def test_compile_writes_a_plan_and_says_what_it_is(weights: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.plan"
    result = command("compile", weights, "-o", target, "--max-context", 64, "--draft", "mtp", "--slots", 3)
    assert result.code == 0
    assert "recipe official" in result.out
    assert "  3 slots of 64 tokens\n" in result.out
    for bucket, program in dsv4c.load(target).buckets.items():
        assert f"  {bucket:12} {len(program.launches)} launches, arena" in result.out
    assert list(dsv4c.load(target).buckets) == [
        "decode-1",
        "verify-1x4",
        "prefill-64",
        "draft-1",
        "round-1x2",
    ]


def test_compile_takes_sizes_of_buckets(tmp_path: Path) -> None:
    args = ("compile", "tiny", "-o", tmp_path / "p", "--max-context", 128, "--no-certify", "--json")
    buckets = ("--batch", "4, 1", "--chunk", "64,8", "--verify", 8, "--logits", "last")
    data = command(*args, *buckets).json
    wanted = ["decode-1", "decode-4", "verify-1x8", "prefill-8.last", "prefill-64.last"]
    assert list(data["buckets"]) == data["deployment"]["buckets"] == wanted
    assert data["deployment"]["slots"] == 4
    assert data["blocks"]["arena"] == max(figures["arena_bytes"] for figures in data["buckets"].values())


def test_compile_prints_json_alone(weights: Path, tmp_path: Path) -> None:
    result = command("compile", weights, "-o", tmp_path / "p", "--recipe", "fp32", "--batch", 2, "--json")
    data = result.json
    loaded = dsv4c.load(tmp_path / "p")
    assert data["digest"] == loaded.digest
    assert data["deployment"] == {
        "target": "cpu",
        "recipe": "fp32",
        "max_context": 4096,
        "slots": 2,
        "buckets": ["decode-2", "verify-1x4", "prefill-64"],
        "ranks": 1,
    }
    assert data["buckets"]["decode-2"]["launches"] == len(loaded.program().launches)
    assert data["blocks"] == loaded.blocks
    assert data["seconds"]["build decode-2"] > 0


def test_compile_names_the_plan_after_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("compile", "tiny", "--max-context", 32).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.plan"]
    assert dsv4c.load("tiny.plan").program("prefill").shape.tokens == 32
    again = command("compile", "tiny", "--max-context", 32)
    assert again.code == 5
    assert again.err == "error: tiny.plan: holds a plan; give another folder, or --overwrite to replace it\n"
    assert command("compile", "tiny", "--max-context", 32, "--overwrite").code == 0


def test_an_output_folder_that_cannot_be_written_is_found_before_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("dsv4c.cli.compile.compile", lambda *_, **__: pytest.fail("compiled all the same"))
    result = command("compile", "tiny", "-o", tmp_path / "file" / "plan")
    assert result.code == 5
    assert result.err == f"error: {tmp_path}/file/plan: cannot be written: {tmp_path}/file is no folder\n"


def test_a_compiled_plan_is_no_config(plan: Path) -> None:
    result = command("compile", plan)
    assert (result.code, "is a compiled plan" in result.err) == (2, True)


# --- show ---


def test_show_gives_figures_then_the_folded_graph(plan: Path) -> None:
    for subject in ("tiny", plan):
        out = command("show", subject).out
        assert out.startswith("graph ")
        assert out.index("ops by family") < out.index("\nreturn logits=")
        assert "equal to layers." in out
    assert "equal to layers." not in command("show", "tiny", "--no-fold").out


def test_show_of_a_layer(plan: Path) -> None:
    for subject in ("tiny", plan):
        out = command("show", subject, "--layer", "1").out
        assert "# layers.1 of graph" in out
        assert "param %layers.1.attn.wq_a" in out
        assert "@layers.2" not in out


def test_show_as_json_dot_and_file(plan: Path, tmp_path: Path) -> None:
    figures = command("show", plan, "--json").json
    assert figures["digest"] == dsv4c.load(plan).digest
    assert figures["summary"]["parameters"] > 9_000_000
    assert sum(figures["summary"]["bytes_per_token"].values()) > 1_000_000
    graph = command("show", plan, "--format", "json", "--bucket", "prefill").json
    assert graph["name"] == "weights.prefill-5"
    assert {"inputs", "states", "params", "nodes", "outputs"} <= set(graph)
    layer = command("show", plan, "--format", "json", "--layer", "1").json
    assert {node["scope"].split(".attn")[0].split(".ffn")[0] for node in layer["nodes"]} == {"layers.1"}
    assert layer["name"] == "weights.decode-2.layers.1"
    file = tmp_path / "g.dot"
    result = command("show", "tiny", "--layer", "0", "--format", "dot", "-o", file)
    assert (result.code, result.out) == (0, "")
    assert file.read_text().startswith("digraph")
    assert command("show", "tiny", "-o", tmp_path / "no" / "file").code == 3


@pytest.mark.parametrize(
    "arguments", [("show", "PLAN"), ("diff", "PLAN", "@fold"), ("why-not", "head", "PLAN")], ids=" ".join
)
def test_what_a_plan_has_decided_is_no_option(plan: Path, arguments: tuple[str, ...]) -> None:
    named = [plan if a == "PLAN" else a for a in arguments]
    result = command(*named, "--max-context", "64")
    assert result.code == 2
    assert f"{plan}: a plan has decided --max-context; leave it out, or name a config" in result.err
    assert command(*named).code == 0


@pytest.mark.parametrize("format", ["text", "json", "dot", "html", "model-explorer"])
def test_with_json_the_graph_goes_to_its_file_alone(plan: Path, tmp_path: Path, format: str) -> None:
    figures = command("show", plan, "--json").json["summary"]
    alone = command("show", plan, "--json", "--format", format)
    assert alone.json["summary"] == figures
    file = tmp_path / "graph"
    both = command("show", plan, "--json", "--format", format, "-o", file)
    assert both.json["summary"] == figures
    assert len(file.read_text()) > 1000


NAMES = ["two\nlines", "[red]x", "</script>", "{{DATA}}", "## bucket decode", "\x1b[31m", "a 'b' \"c\""]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_may_be_called_anything(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name.replace("/", "|")
    folder.mkdir()
    raw = json.loads((BUILTIN_FOLDER / "tiny.json").read_text())
    one = {"num_hidden_layers": 1, "compress_ratios": [0, 0], "num_hash_layers": 0}
    (folder / "config.json").write_text(json.dumps(raw | one))
    stopped, plan = tmp_path / "x.ir", tmp_path / "x.plan"
    stop = command("compile", folder, "--stop-after", "fold", "-o", stopped, "--max-context", 16)
    assert stop.code == 0, stop.err
    resumed = command("compile", "--resume", stopped, "-o", plan, "--no-certify")
    assert resumed.code == 0, resumed.err
    shown = "".join(c if c.isprintable() else "_" for c in folder.name)
    assert f"{plan}: {shown} for cpu" in resumed.out
    assert f"{shown}, recipe official" in " ".join(command("passes", plan).out.split())
    assert command("show", plan).code == 0


def test_a_stopped_compile_prints_json_alone(tmp_path: Path) -> None:
    stop = ("compile", "tiny", "--max-context", 64, "--stop-after", "fold")
    found = command(*stop, "--json").json
    assert found["graphs"] == command(*stop).out
    written = command(*stop, "--json", "-o", tmp_path / "x.ir").json
    assert written == {"after": "fold", "file": str(tmp_path / "x.ir"), "nodes": found["nodes"]}
    assert (tmp_path / "x.ir").read_text() == found["graphs"]


def test_show_reads_a_plan_in_a_fresh_process(plan: Path) -> None:
    """Its graph names fused ops, which somebody must have declared."""
    found = subprocess.run(
        [sys.executable, "-m", "dsv4c", "show", str(plan), "--layer", "0"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "hyper_norm" in found.stdout


# --- run ---


def test_run_gives_a_row_of_logits_per_token(plan: Path, weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.safetensors"
    prompt, forced = [3, 17, 5, 200, 9, 8, 7], [11, 12]
    result = command(
        *("run", plan, "--weights", weights, "--tokens", "3,17, 5,200,9,8,7", "--force", "11,12"),
        *("--logits", file, "--json", "--max-new-tokens", 3, "--poison"),
    )
    assert result.code == 0, result.err
    logits = load_file(file)["logits"]
    assert logits.shape == (9, 512)
    session = dsv4c.load(plan).bind(weights)
    rows = session.prefill([*prompt, *forced])
    assert (logits == rows).all()
    data = result.json
    assert data["tokens"] == prompt + forced
    assert data["top"][0]["token"] == data["generated"][0] == int(logits[-1].argmax())
    assert data["positions"] == [11, 0]
    session.reset()
    session.prefill(prompt)
    for token in forced:
        session.decode([token, None])
    greedy = [session.next_tokens[0]]
    while len(greedy) < 3:
        session.decode([greedy[-1], None])
        greedy.append(session.next_tokens[0])
    assert data["generated"] == greedy


def test_run_prints_what_it_generated(plan: Path, weights: Path) -> None:
    base = ("run", plan, "--weights", weights, "--tokens", "3,17")
    tokens = command(*base, "--max-new-tokens", "4").out.strip().split(",")
    assert len(tokens) == 4
    assert all(0 <= int(t) < 512 for t in tokens)
    likeliest = command(*base).out
    assert likeliest.startswith(f"likeliest after 2 tokens: {tokens[0]} (")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--tokens", "1,x"), 6, "--tokens: 'x' is no token id; expected numbers like 3,17,5"),
        (("--tokens", ""), 6, "the prompt is empty"),
        (("--tokens", "1,512"), 6, "token 1 is 512, out of range; expected ids from 0 to 511"),
        (("--tokens", "1", "--force", "-3"), 6, "token 0 is -3, out of range"),
        (("--tokens", "1", "--max-new-tokens", "65"), 6, "65 tokens exceed the context of 64"),
        (
            ("--tokens", "1", "--logits", "no/such/folder/x"),
            6,
            "no/such/folder/x: the logits cannot be written",
        ),
    ],
)
def test_run_refuses_a_bad_request(
    plan: Path, weights: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    result = command("run", plan, "--weights", weights, *options)
    assert result.code == code
    assert message in result.err
    assert result.out == ""


@pytest.mark.parametrize("target", ["cpu", "sm_90a"])
def test_run_refuses_the_weights_of_another_model(plan: Path, target: str, tmp_path: Path) -> None:
    if target != "cpu":
        plan = gpu_plan(plan.parent / "weights", target=target).save(plan.parent / f"{target}.plan")
    config = json.loads((plan.parent / "weights" / "config.json").read_text())
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    (tmp_path / "w" / "model.safetensors").symlink_to(plan.parent / "weights" / "model.safetensors")
    result = command("run", plan, "--weights", tmp_path / "w", "--tokens", "1")
    assert result.code == 4
    assert "is the checkpoint of another model: rope_theta is 5000.0, the plan has 10000.0" in result.err


def test_run_without_a_gpu_says_so(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("dsv4c.runtime.driver.version", lambda: 0)
    folder = gpu_plan(weights).save(tmp_path / "p")
    result = command("run", folder, "--weights", weights, "--tokens", "1")
    assert result.code == 5
    assert "no NVIDIA GPU that torch can use on this machine; run there, or compile with" in result.err


def test_an_altered_plan_does_not_run(plan: Path, weights: Path, tmp_path: Path) -> None:
    other = dsv4c.load(plan).save(tmp_path / "p")
    text = (other / "graph.decode-2.txt").read_text()
    (other / "graph.decode-2.txt").write_text(text.replace("eps=1e-06", "eps=1e-05"))
    result = command("run", other, "--weights", weights, "--tokens", "1")
    assert result.code == 5
    assert "graph.decode-2.txt: was altered after it was compiled" in result.err


def test_token_ids() -> None:
    assert token_ids(" 3, 17,5", "--tokens") == [3, 17, 5]
    assert token_ids("", "--force") == []
    with pytest.raises(SessionError, match="--force: '' is no token id"):
        token_ids("3,,5", "--force")
    with pytest.raises(SessionError, match="--tokens: '3 17 5' is no token id"):
        token_ids("3 17 5", "--tokens")


# --- weights and synth ---


def test_weights_of_a_complete_checkpoint(weights: Path) -> None:
    text = command("weights", weights)
    assert text.code == 0
    assert "complete" in text.out
    data = command("weights", weights, "--json").json
    assert data["complete"] is True
    assert data["table"] == "release"
    assert data["tensors"] == len(load_file(weights / "model.safetensors"))


def test_weights_of_an_incomplete_checkpoint(weights: Path, tmp_path: Path) -> None:
    tensors = load_file(weights / "model.safetensors")
    del tensors["layers.0.attn.wkv.weight"]
    tensors["surplus"] = tensors["norm.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    result = command("weights", tmp_path, "--config", "tiny", "--json")
    assert result.code == 4
    assert result.json["missing"] == ["layers.0.attn.wkv.weight"]
    assert result.json["unexpected"] == ["surplus"]
    assert "does not fit tiny: 1 tensors missing, 1 tensors unexpected" in result.err
    assert "layers.0.attn.wkv.weight" in command("weights", tmp_path, "--config", "tiny").out
    alone = command("weights", tmp_path)
    assert (alone.code, "name one with --config" in alone.err) == (4, True)


def test_synth_writes_what_weights_accepts(tmp_path: Path) -> None:
    data = command("synth", "tiny", "-o", tmp_path / "w", "--seed", 3, "--shards", 2, "--json").json
    assert data["seed"] == 3
    assert sum(name.endswith(".safetensors") for name in data["files"]) == 2
    assert command("weights", tmp_path / "w").code == 0
    again = command("synth", "tiny", "-o", tmp_path / "w")
    assert (again.code, "holds a checkpoint; give another" in again.err) == (4, True)


# --- the whole ---


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_and_json(name: str) -> None:
    out = command(name, "--help").out
    assert f"dsv4c {name} " in out.split("Examples:")[1]
    assert "--json" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_their_help_begins_with(name: str) -> None:
    alone = typer.Typer()
    module_of(name).register(alone)
    (registered,) = alone.registered_commands
    assert registered.name == name
    assert cleandoc(registered.callback.__doc__).partition("\n\n")[0] == COMMANDS[name]


def test_a_command_is_loaded_when_it_is_called() -> None:
    script = "from tests.commands import command; import sys; command(*sys.argv[1:]); print(*sys.modules)"
    loaded = {}
    for arguments in (("--help",), ("targets", "--help")):
        shown = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        loaded[arguments[0]] = {name for name in shown.stdout.split() if name.startswith("dsv4c.")}
    assert {name for name in loaded["--help"] if name.startswith("dsv4c.cli.")} == {"dsv4c.cli.help"}
    assert "dsv4c.cli.targets" in loaded["targets"]
    assert "dsv4c.cli.compile" not in loaded["targets"]


def test_help_needs_no_large_package() -> None:
    script = "import sys, dsv4c.cli; print(*({'torch', 'numpy', 'networkx', 'rich'} & sys.modules.keys()))"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split() == []
    shown = subprocess.run(
        [sys.executable, "-m", "dsv4c", "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "compile" in shown.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_compile_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "dsv4c", "compile", "deepseek-v4-pro", "-o", str(tmp_path / "a.plan")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        time.sleep(1.5)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error == "interrupted: nothing was left half-written\n"
    assert list(tmp_path.iterdir()) == []


def test_version() -> None:
    result = command("--version")
    assert result.code == 0
    assert result.out.startswith("dsv4c")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_is_as_it_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags do not read as if they took a value; brackets, which rich would swallow, are there."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = command(name, "--help").out
    flag = next(line for line in shown.splitlines() if " --json " in line or " --help " in line)
    assert "<" not in flag
    assert max(map(len, shown.splitlines())) <= 80
    if name == "run":
        assert "[prompt" in shown


@pytest.mark.parametrize(
    ("typed", "completions"),
    [
        ("lim", {"limits"}),
        ("show ti", {"tiny"}),
        ("compile tiny --recipe nvfp4-", {"nvfp4-experts", "nvfp4-experts-w4a4"}),
        ("why-not index_", {"index_topk"}),
        ("show tiny --orig", {"--origins"}),
    ],
)
def test_a_shell_completes(typed: str, completions: set[str]) -> None:
    words = f"dsv4c {typed}"
    asked = {"_DSV4C_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = subprocess.run(
        [sys.executable, "-m", "dsv4c"],
        cwd=REPOSITORY,
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(result.stdout.split()) == completions


def test_figures_of_a_layer_are_its_own() -> None:
    whole, layer = (command("show", "tiny", *one, "--json").json for one in ((), ("--layer", "2")))
    assert layer["summary"]["graph"] == "tiny.decode-1.layers.2"
    assert layer["summary"]["parameters"] < whole["summary"]["parameters"] / 4
    assert list(layer["summary"]["layers"]) == ["layers.2"]
    several = command("show", "tiny", "--layer", "2", "--batch", "4", "--json").json
    weights = "attention projections"
    one = layer["summary"]["bytes_per_token"][weights]
    assert several["summary"]["bytes_per_token"][weights] == one // 4


def test_origins_are_counted_unless_asked_for() -> None:
    args = ("show", "tiny", "--after", "fold", "--layer", "2")
    short, whole = command(*args).out, command(*args, "--origins").out
    assert max(map(len, short.splitlines())) < 700
    assert re.search(r" from \d+ nodes$", short, re.M)
    assert " from [" not in short
    assert " from [layers.2." in whole


def test_text_is_painted_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "# a layer\n@layers.2\n%.x: bf16[1,4] = silu(%.y) {out=bf16} from 3 nodes\n"
    assert console.painted(text) == text
    monkeypatch.setattr(console.sys, "stdout", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    painted = console.painted(text)
    assert "\033[36msilu\033[0m(" in painted
    assert "\033[32mbf16[1,4]\033[0m" in painted
    assert re.sub("\033\\[[0-9]+m", "", painted) == text
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.painted(text) == text
