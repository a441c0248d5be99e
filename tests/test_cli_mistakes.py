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

from tests.commands import command

REPOSITORY = Path(__file__).parents[1]

LONG = "x" * 300
"""A name that no file system takes: looking for it fails, as in a folder that may not be entered."""

MISTAKES = {
    ("compile", "nothing-here"): (2, "error: nothing-here: no such file; expected a config.json"),
    ("compile", "tiny", "--recipe", "int8"): (2, "error: recipe: unknown recipe 'int8'; known: fp32, bf16"),
    ("compile", "tiny", "--chunk", "99", "--max-context", "50"): (
        2,
        "error: deployment: prefill-99 takes 99 tokens; expected at most 50 tokens, max_context",
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
    ("compile", "tiny", "--logits", "first"): (2, "Invalid value for '--logits'"),
    ("compile", "tiny", "--target", "sm_90a", "--draft", "mtp"): (
        2,
        "error: draft: sm_90a has no kernels for the MTP block; compile with draft off, or for cpu",
    ),
    ("compile", "tiny", "--target", "sm_90a", "--chunk", "64"): (
        2,
        "prefill-64 has 64 rows; expected at most 8",
    ),
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
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_message_and_an_exit_code(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, message = MISTAKES[arguments]
    result = command(*arguments)
    assert result.code == code
    assert message in " ".join(result.err.split())
    assert result.out == ""
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


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
        '# dsv4c graphs of a compile that stopped after fold\n# {"config": 1}\n',
        ("compile", "--resume", "FILE"),
        3,
        "FILE: line 2: cannot be read: config: is 1; expected the fields of ModelConfig",
    ),
    "resume of half a config": (
        '# dsv4c graphs of a compile that stopped after fold\n# {"config": {}}\n',
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


def run(*arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dsv4c", *arguments],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize(
    "arguments", [("show", "deepseek-v4-flash", "--no-fold"), ("show", "tiny", "--json"), ("--help",)]
)
def test_a_reader_that_leaves_is_no_mistake(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    with run(*arguments, stdout=write) as process:
        os.close(write)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [("show", "tiny"), ("show", "tiny", "--json"), ("--help",)])
def test_a_full_disk_is_told(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full, run(*arguments, stdout=full) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.splitlines()[0] == "error: No space left on device"
    assert "Traceback" not in error


def test_closed_streams_are_no_mistake() -> None:
    shell = f"{sys.executable} -m dsv4c show tiny >&- 2>&-"
    assert subprocess.run(shell, shell=True, cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize("wait", [0.3, 0.6, 1.2])
def test_ctrl_c_at_any_time(wait: float, tmp_path: Path) -> None:
    with run("compile", "deepseek-v4-pro", "-o", str(tmp_path / "a.plan")) as process:
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)  # to a shell, both are 130
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


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
