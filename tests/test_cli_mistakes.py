"""What a user or the system does wrong: one sentence on stderr, an exit code, nothing left, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dsv4c import strict_json
from tests.commands import command

REPOSITORY = Path(__file__).parents[1]

LONG = "x" * 300
"""A name that no file system takes: looking for it fails, as in a folder that may not be entered."""

MISTAKES = {
    ("compile", "nothing-here"): (2, "error: nothing-here: no such file; expected a config.json"),
    ("compile", "tiny", "--recipe", "int8"): (2, "error: recipe: unknown recipe 'int8'; known: fp32, bf16"),
    ("compile", "tiny", "--chunk", "99", "--max-context", "50"): (
        2,
        "error: deployment: prefill-99 takes 99 tokens; expected at most 50, max_context",
    ),
    ("compile", "tiny", "--batch", "0"): (2, "error: batch: 0 is no size of a bucket, expected a number of"),
    ("compile", "tiny", "--batch", "1,1"): (2, "error: batch: 1, 1 names a size twice"),
    ("compile", "tiny", "--batch", ""): (2, "error: --batch: '' is no size of a bucket, expected numbers"),
    ("compile", "tiny", "--batch", "1,"): (2, "error: --batch: '' is no size of a bucket, expected numbers"),
    ("compile", "tiny", "--chunk", "x"): (2, "error: --chunk: 'x' is no size of a bucket, expected numbers"),
    ("compile", "tiny", "--chunk", "-8"): (2, "error: --chunk: '-8' is no size of a bucket, expected"),
    ("show", "tiny", "--chunk", "8;9"): (2, "error: --chunk: '8;9' is no size of a bucket, expected"),
    ("compile", "tiny", "--batch", "1,4", "--slots", "2"): (
        2,
        "error: deployment: slots is 2; expected at least 4, the sequences of decode-4",
    ),
    ("compile", "tiny", "--verify", "9"): (2, "error: verify: 9 tokens, expected 1 (no such bucket) to 8"),
    ("compile", "tiny", "--verify", "8", "--max-context", "7"): (2, "verify-1x8 takes 8 tokens; expected at"),
    ("compile", "tiny", "--slots", "0"): (2, "Invalid value for '--slots'"),
    ("compile", "tiny", "--draft", "medusa"): (2, "Invalid value for '--draft'"),
    ("compile", "tiny", "--draft", "dspark"): (
        2,
        "but the model drafts with an MTP block; compile with draft",
    ),
    ("compile", "tiny", "--draft", "mtp", "--draft-tokens", "8"): (2, "draft_tokens: 8, expected 1 to 7"),
    ("compile", "tiny", "--draft-tokens", "2"): (2, "draft_tokens: 2, but nothing drafts; give a draft, too"),
    ("compile", "tiny", "--logits", "first"): (2, "Invalid value for '--logits'"),
    ("compile", "tiny", "--require-fused", "sinkhrn"): (
        3,
        "error: no rule is named 'sinkhrn'; there are: embed",
    ),
    ("show", "tiny", "--bucket", "decode-8"): (
        3,
        "there is no bucket 'decode-8', only decode-1, verify-1x4, pre",
    ),
    ("show", "tiny", "--bucket", "decode-8", "--batch", "1,4"): (
        3,
        "error: tiny: there is no bucket 'decode-8', only decode-1, decode-4, verify-1x4, prefill-64",
    ),
    ("show", "tiny", "--bucket", "mtp"): (3, "there is no bucket 'mtp', only decode-1"),
    ("show", "tiny", "--bucket", "prefill-64", "--chunk", "8"): (3, "there is no bucket 'prefill-64', only"),
    ("why-not", "head", "tiny", "--bucket", "draft-64", "--chunk", "8"): (
        3,
        "no bucket 'draft-64', only dec",
    ),
    ("compile", "tiny", "--target", "tpu"): (2, "Invalid value for '--target'"),
    ("compile",): (2, "Missing argument 'CONFIG'"),
    ("compil", "tiny"): (2, "No such command 'compil'"),
    ("show", "nothing-here"): (2, "error: nothing-here: no such file"),
    ("compile", "tiny", "--expect", "sinkhrn=3"): (3, "error: no rule is named 'sinkhrn'; there are: embed"),
    ("compile", "tiny", "--expect", "=3"): (3, "error: --expect =3: expected a rule and a number"),
    ("compile", "--resume", "nothing-here"): (
        3,
        "error: nothing-here: cannot be read: No such file or directory",
    ),
    ("compile", "tiny", "--pass", ":"): (3, "error: --pass :: Empty module name; expected MODULE:OBJECT"),
    ("compile", "tiny", "--pass", "os:path"): (
        3,
        "error: --pass os:path contributes nothing; expected a pass",
    ),
    ("compile", "tiny", "--pipeline", "quantize,fold"): (
        3,
        "error: pipeline: quantize needs its recipe: quantize{recipe=...}",
    ),
    ("compile", "tiny", "--cache", LONG): (
        7,
        f"error: {LONG}: the cache cannot be written: File name too long; name another with --cache DIR",
    ),
    ("check", "tiny", "--cache", LONG): (7, f"error: {LONG}: the cache cannot be written"),
    ("compile", LONG): (2, f"error: {LONG}: cannot be read: File name too long"),
    ("show", LONG): (2, f"error: {LONG}: cannot be read: File name too long"),
    ("show", LONG, "--kernels"): (5, f"error: {LONG}: cannot be read: File name too long"),
    ("run", LONG, "--weights", "w", "--tokens", "1"): (
        5,
        f"error: {LONG}: cannot be read: File name too long",
    ),
    ("weights", LONG, "--config", "tiny"): (4, f"error: {LONG}: cannot be read: File name too long"),
    ("synth", "tiny", "-o", LONG): (4, f"error: {LONG}: cannot be written: File name too long"),
    ("compile", "tiny", "-o", LONG): (5, f"error: {LONG}: cannot be written: File name too long"),
    ("compile", "tiny", "--dump-stages", LONG): (3, f"error: {LONG}: cannot be written: File name too long"),
    ("synth", "tiny", "-o", "w", "--shards", "999"): (4, "cannot split 585 tensors into 999 files"),
    ("show", "tiny", "--layer", "99"): (3, "has no layer 'layers.99'; its layers: layers.0 to layers.5"),
    ("show", "tiny", "--layer", "99", "--json"): (3, "has no layer 'layers.99'"),
    ("show", "tiny", "--layer", "99", "--format", "json"): (3, "has no layer 'layers.99'"),
    ("show", "tiny", "--layer", "1", "--format", "html"): (3, "--format html shows every layer; leave"),
    ("show", "tiny", "--layer", "²"): (3, "has no layer '²'"),
    ("show", "tiny", "--layer", "-1"): (3, "has no layer '-1'"),
    ("show", "tiny", "--layer", "1", "--bucket", "draft"): (3, "has no layer 'layers.1'; its layers: mtp.0"),
    ("show", "tiny", "--after", "folding"): (3, "error: no stage is named 'folding'; there are: build"),
    ("run", "p", "--weights", "w", "--tokens", "1,,2"): (6, "error: --tokens: '' is no token id"),
    ("run", "p", "--weights", "w", "--tokens", "1_0"): (6, "error: --tokens: '1_0' is no token id"),
    ("run", "p", "--weights", "w", "--tokens", "٣"): (6, "error: --tokens: '٣' is no token id"),
    ("run", "p", "--weights", "w", "--tokens", "1", "--force", "0x3"): (
        6,
        "error: --force: '0x3' is no token",
    ),
    ("run", "p", "--weights", "w", "--tokens", "1", "--logits", "."): (
        6,
        "error: .: the logits cannot be wri",
    ),
    ("run", "nothing-here", "--weights", "w", "--tokens", "1"): (
        5,
        "error: nothing-here: no such folder; compile",
    ),
    ("weights", "nothing-here"): (4, "error: nothing-here: no such file or folder"),
    ("compile", "deepseek-v4-flsh"): (2, "deepseek-v4-pro, tiny; did you mean 'deepseek-v4-flash'?"),
    ("show", "nvidia/DeepSeek-V4-Pro-NVFP4"): (2, "tiny; did you mean 'deepseek-v4-pro'?"),
    ("compile", "tiny", "--recipe", "oficial"): (2, "nvfp4; did you mean 'official'?"),
    ("compile", "tiny", "--recipe", "NVFP4"): (2, "nvfp4; did you mean 'nvfp4'?"),
    ("compile", "tiny", "--disable", "sinkorn"): (
        3,
        "no rule is named 'sinkorn'; there are: embed, sinkhorn",
    ),
    ("compile", "tiny", "--enable", "hyper_nrom"): (3, "in_proj; did you mean 'hyper_norm'?"),
    ("compile", "tiny", "--stop-after", "fould"): (3, "there are: quantize, fold, prepack, tidy"),
    ("compile", "tiny", "--pipeline", "quantise{recipe=official},fold"): (
        3,
        "tidy, shard; did you mean 'quantize'?",
    ),
    ("why-not", "swiglo", "tiny"): (3, "in_proj; did you mean 'swiglu'?"),
    ("show", "tiny", "--after", "fould"): (3, "did you mean 'fold'?"),
    ("run",): (2, "error: Missing argument 'PLAN'; see dsv4c run --help"),
    ("run", "p", "--weights", "w"): (2, "error: Missing option '--tokens'; see dsv4c run --help"),
    ("run", "p", "--tokens", "1"): (2, "error: Missing option '--weights'; see"),
    ("run", "p", "--weights", "w", "--tokens", "[1,2]"): (
        6,
        "error: --tokens: '[1' is no token id; expected numbers like 3,17,5",
    ),
    ("run", "p", "--weights", "w", "--tokens", "1 2"): (6, "error: --tokens: '1 2' is no token id"),
    ("run", "p", "--weights", "w", "--tokens", "1.5"): (6, "error: --tokens: '1.5' is no token id"),
    ("run", "p", "--weights", "w", "--tokens", "1", "--max-new-tokens", "-1"): (
        2,
        "error: Invalid value for '--max-new-tokens': ",
    ),
    ("run", "p", "--weights", "w", "--tokens", "1", "--logits", "no/such/x"): (
        6,
        "error: no/such/x: the logits cannot be written: No such",
    ),
    ("synth", "tiny"): (2, "error: Missing option '-o' / '--output'; see dsv4c synth --help"),
    ("synth", "tiny", "-o", "w", "--seed", "x"): (2, "error: Invalid value for '--seed': "),
    ("synth", "tiny", "-o", "w", "--shards", "0"): (2, "error: Invalid value for '--shards': "),
    ("synth", "nothing-here", "-o", "w"): (2, "error: nothing-here: no such file"),
    ("synth", "tiny", "-o", "w", "--force"): (2, "error: No such option: --force"),
    ("compile", "tiny", "--force"): (2, "error: No such option: --force"),
    ("compile", "tiny", "--max_context", "5"): (
        2,
        "error: No such option: --max_context (Possible options: --max-context)",
    ),
    ("compile", "tiny", "--max-contex", "5"): (
        2,
        "(Possible options: --max-context); see dsv4c compile --help",
    ),
    ("compile", "tiny", "--max-context", "0"): (2, "error: Invalid value for '--max-context': "),
    ("compile", "tiny", "--max-context", "4k"): (2, "error: Invalid value for '--max-context': "),
    ("compile", "tiny", "pro"): (2, "error: Got unexpected extra argument(s) (pro)"),
    ("compile", "tiny", "-o"): (2, "error: Option '-o' requires an argument"),
    ("compile", "-o", "x"): (2, "error: Missing argument 'CONFIG' (or --resume FILE)"),
    ("compile", "tiny.plan"): (2, "tiny; did you mean 'tiny'?"),
    ("compile", "."): (2, "error: config.json: no such file"),
    ("compile", "tiny", "--pass", "nothing_here"): (
        3,
        "error: --pass nothing_here: No module named 'nothing_here'",
    ),
    ("compile", "tiny", "--pass", "json:nothing"): (3, "has no attribute 'nothing'; expected MODULE:OBJECT"),
    ("compile", "tiny", "--expect", "sinkhorn"): (
        3,
        "error: --expect sinkhorn: expected a rule and a number",
    ),
    ("compile", "tiny", "--pipeline", ""): (3, "error: pipeline: no pass is written ''; there are: quantize"),
    ("compile", "tiny", "--resume", "x"): (2, "error: compile: --resume x has decided tiny; leave it out"),
    ("compile", "--resume", "x", "--batch", "2"): (
        2,
        "error: compile: --resume x has decided --batch; leave it out",
    ),
    ("show", "tiny", "--format", "png"): (
        2,
        "error: Invalid value for '--format': 'png' is not one of 'text', 'json'",
    ),
    ("show", "tiny", "--format", "html", "--after", "fold"): (
        3,
        "--format html shows every stage; leave --after out",
    ),
    ("show", "tiny", "--kernels"): (
        5,
        "error: tiny: no such folder; compile a plan with `dsv4c compile CONFIG -o tiny`",
    ),
    ("show", "tiny", "-o", "no/such/x"): (
        3,
        "error: no/such/x: cannot be written: No such file or directory",
    ),
    ("show", "tiny", "-o", "."): (3, "error: .: is a folder; give a file"),
    ("diff", "tiny"): (2, "error: Missing argument 'B'; see dsv4c diff --help"),
    ("diff", "tiny@fould", "@fold"): (3, "did you mean 'fold'?"),
    ("passes", "tiny"): (5, "error: tiny: no such folder; compile a plan with"),
    ("verify", "tiny"): (5, "error: tiny: no such folder; compile a plan with"),
    ("check",): (2, "error: check: name a plan or a config, or give --inject"),
    ("check", "--inject", "nothing-here"): (2, "error: nothing-here: no such file"),
    ("bisect", "nothing-here", "--weights", "w", "--tokens", "1"): (5, "error: nothing-here: no such folder"),
    ("weights", ".", "--config", "tiny"): (4, "error: .: no checkpoint here; expected model.safetensors"),
    ("weights", "tiny"): (4, "error: tiny: no such file or folder; expected a checkpoint folder"),
    ("models", "tiny"): (2, "error: Got unexpected extra argument(s) (tiny); see dsv4c models --help"),
    ("targets", "--target", "cpu"): (2, "error: No such option: --target; see dsv4c targets --help"),
    ("limits", "tiny", "--target", "gpu"): (
        2,
        "error: Invalid value for '--target': 'gpu' is not one of cpu, sm_90a, sm_100a",
    ),
    ("limits", "tiny", "--recipe", "int4"): (2, "error: recipe: unknown recipe 'int4'; known: fp32"),
    ("limits", "tiny", "--batch", "one"): (2, "error: --batch: 'one' is no size of a bucket"),
    ("why-not", "hyper", "tiny"): (3, "did you mean 'hyper_norm'?"),
    ("shwo",): (2, "error: No such command 'shwo'. Did you mean 'show'? See dsv4c --help"),
}


def test_a_hundred_mistakes() -> None:
    assert len(MISTAKES) >= 100


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_message_and_an_exit_code(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, message = MISTAKES[arguments]
    result = command(*arguments)
    assert result.code == code
    assert message in result.err
    assert result.err.startswith('{"error": ' if "--json" in arguments else "error: ")
    assert result.out == ""
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (("show", "nothing-here"), "ConfigError", 2),
        (("compile", "tiny", "--expect", "=3"), "GraphError", 3),
        (("weights", "nothing-here"), "CheckpointError", 4),
        (("passes", "nothing-here"), "PlanError", 5),
        (("synth", "tiny", "-o", "w", "--shards", "0"), "UsageError", 2),
        (("show", "tiny", "--nope"), "UsageError", 2),
        (("show",), "UsageError", 2),
        (("shwo", "tiny"), "UsageError", 2),
    ],
)
def test_with_json_an_error_is_an_object_in_a_line(
    arguments: tuple[str, ...], kind: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command(*arguments, "--json")
    found = strict_json.parse(result.err)
    assert (result.code, result.out, result.err.count("\n")) == (code, "", 1)
    assert (found["kind"], found["exit_code"]) == (kind, code)
    plain = command(*arguments).err
    assert found["error"].split()[0] in plain


DEEP = "[" * 100_000

FILES: dict[str, tuple[str | bytes, tuple[str, ...], int, str]] = {
    "empty": ("", ("compile", "FILE"), 2, "FILE:1:1: malformed JSON"),
    "binary": (b"\xff\x00\xfe", ("compile", "FILE"), 2, "FILE: is not UTF-8 text at byte 0"),
    "a list": ("[1, 2]", ("compile", "FILE"), 2, "FILE: holds a JSON list; expected an object"),
    "a well": (DEEP, ("compile", "FILE"), 2, "FILE: is nested too deeply"),
    "no number": ('{"dim": %s}' % ("9" * 5000), ("compile", "FILE"), 2, "FILE: Exceeds the limit"),
    "weights empty": ("", ("weights", "FILE"), 4, "FILE: not a safetensors file: it has 0 bytes"),
    "weights text": ("{}", ("weights", "FILE"), 4, "FILE: not a safetensors file"),
    "resume empty": ("", ("compile", "--resume", "FILE"), 3, "FILE: holds no stopped compile"),
    "resume binary": (b"\xff", ("compile", "--resume", "FILE"), 3, "FILE: is not text at byte 0"),
    "resume of no config": (
        '# dsv4c graphs of a compile that stopped after fold\n# {"config": 1}\n\n## end\n',
        ("compile", "--resume", "FILE"),
        3,
        "FILE: line 2: cannot be read: config: is 1; expected the fields of ModelConfig",
    ),
    "resume of half a config": (
        '# dsv4c graphs of a compile that stopped after fold\n# {"config": {}}\n\n## end\n',
        ("compile", "--resume", "FILE"),
        3,
        "FILE: line 2: cannot be read: config: 37 problems",
    ),
    "a file for a plan": ("{}", ("show", "FILE", "--kernels"), 5, "FILE: no plan.json here"),
    "a file for a folder": ("", ("synth", "tiny", "-o", "FILE"), 4, "FILE: exists and is no folder"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind(name: str, tmp_path: Path) -> None:
    content, arguments, code, message = FILES[name]
    file = tmp_path / "given"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    result = command(*(str(file) if a == "FILE" else a for a in arguments))
    assert result.code == code
    assert message.replace("FILE", str(file)) in result.err
    assert result.out == ""
    assert list(tmp_path.iterdir()) == [file]


# --- the whole process ---


def run(
    *arguments: str, stdout: object = subprocess.PIPE, cwd: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "dsv4c", *arguments],  # as the installed command: not from this folder
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments", [("show", "deepseek-v4-flash", "--no-fold"), ("show", "tiny", "--json"), ("--help",)]
)
def test_a_reader_that_leaves_is_no_mistake(
    arguments: tuple[str, ...], unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    read, write = os.pipe()
    os.close(read)
    with run(*arguments, stdout=write) as process:
        os.close(write)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (141, "")


@pytest.mark.parametrize("arguments", [("show", "nothing-here"), ("show", "--nope")])
def test_nor_is_one_that_reads_no_errors(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    command_line = [sys.executable, "-m", "dsv4c", *arguments]
    process = subprocess.run(command_line, stdout=write, stderr=write, cwd=REPOSITORY, check=False)
    os.close(write)
    assert process.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [("show", "tiny"), ("show", "tiny", "--json"), ("--help",)])
def test_a_full_disk_is_told(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full, run(*arguments, stdout=full) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "No space left on device" in error.splitlines()[0]
    assert "Traceback" not in error


def test_closed_streams_are_no_mistake() -> None:
    shell = f"{sys.executable} -m dsv4c show tiny >&- 2>&-"
    assert subprocess.run(shell, shell=True, cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wait", [0.3, 0.6, 1.2])
def test_ctrl_c_or_a_polite_kill_at_any_time(wait: float, number: signal.Signals, tmp_path: Path) -> None:
    with run("compile", "deepseek-v4-pro", "-o", str(tmp_path / "a.plan")) as process:
        time.sleep(wait)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    # To a shell the signals are 130 and 143; either stands for a stop before the command line is there.
    assert process.returncode in (130, -number, -signal.SIGINT)
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_compilers_are_ended(number: signal.Signals, tmp_path: Path) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    command = ("compile", "tiny", "--target", "sm_90a", "--no-certify", "-o", str(tmp_path / "a.plan"))
    with run(*command, "--cache", str(tmp_path / "cache"), TMPDIR=str(scratch)) as process:
        while process.poll() is None and not list(scratch.iterdir()):  # until a compiler has its folder
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "interrupted: nothing was left half-written\n"
    assert list(scratch.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("cache", "tmp")] == []


def test_ctrl_c_while_the_command_line_loads() -> None:
    script = """
        import os, signal, sys
        import dsv4c.__main__

        class Impatient:
            def find_spec(self, name, path=None, target=None):
                if name == "dsv4c.cli":
                    os.kill(os.getpid(), signal.SIGINT)

        sys.meta_path.insert(0, Impatient())
        dsv4c.__main__.main()
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=REPOSITORY, capture_output=True, check=False
    )
    assert (result.returncode, result.stderr) == (-signal.SIGINT, b"")


# --- a folder that somebody else made ---

NAMES = ("queue", "json", "typing", "torch", "cutlass", "cuda", "graphviz", "dsv4c", "sitecustomize")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with modules, and a program, that leave a mark when they run."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    (folder / "dot").write_text(f"#!/bin/sh\ntouch {tmp_path / 'mark'}\n")
    (folder / "dot").chmod(0o755)
    return folder


STARTING = [
    ("show", "tiny", "--layer", "1", "--format", "svg"),
    pytest.param(("compile", "tiny", "--target", "sm_90a", "--no-certify"), marks=pytest.mark.slow),
]
"""Commands that start other programs; `test_nothing_else_starts_programs` knows where that is done."""


@pytest.mark.parametrize("arguments", STARTING, ids=lambda arguments: arguments[0])
def test_nothing_in_the_folder_runs(arguments: tuple[str, ...], hostile: Path, tmp_path: Path) -> None:
    with run(*arguments, cwd=hostile, XDG_CACHE_HOME=str(tmp_path / "cache")) as process:
        _, error = process.communicate(timeout=300)
    assert process.returncode == 0 or "which is not on PATH" in error
    assert not (tmp_path / "mark").exists()


def test_nothing_else_starts_programs() -> None:
    starting = ("subprocess", "multiprocessing", "os.exec", "os.spawn", "os.system", "os.fork", "graphviz.")
    texts = {path: path.read_text() for path in (REPOSITORY / "dsv4c").rglob("*.py")}
    found = {path.name for path, text in texts.items() if any(word in text for word in starting)}
    assert found == {"build.py", "serve.py", "svg.py"}


def test_a_module_beside_the_user_takes_the_place_of_none(hostile: Path, tmp_path: Path) -> None:
    (hostile / "mine.py").write_text("from dsv4c.passes.fusions.embed import Embed\n")
    with run("show", "tiny", "--pass", "mine:Embed", "--json", cwd=hostile) as process:
        _, error = process.communicate(timeout=100)
    assert not (tmp_path / "mark").exists(), error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_what_is_written_to_a_full_disk_is_told(tmp_path: Path) -> None:
    result = command("show", "tiny", "-o", "/dev/full")
    assert (result.code, result.err) == (3, "error: /dev/full: cannot be written: No space left on device\n")
    result = command("compile", "tiny", "--stop-after", "fold", "-o", "/dev/full", "--overwrite")
    assert (result.code, result.err) == (3, "error: /dev/full: cannot be written: No space left on device\n")


def test_a_machine_without_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    result = command("check", "tiny")
    assert result.code == 7
    assert result.err.startswith(
        "error: there is no home folder for the cache; name another with --cache DIR"
    )
