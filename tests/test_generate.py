"""`dsv4c generate` from a checkpoint and a tokenizer that the tests write: a command, a pipe, a terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4c.models.encoding.marks import USER
from dsv4c.plan.folder import load
from tests.commands import Result, command
from tests.goldens import golden_case
from tests.words import small_checkpoint, write_tokenizer

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers with a tokenizer, and a cache beside it."""
    return small_checkpoint(tmp_path_factory.mktemp("generate")).parent


def generate(folder: Path, *arguments: object) -> Result:
    given = [*arguments, "--cache", folder / "cache", "--max-context", 128]
    return command("generate", folder / "weights", *given)


def test_ids_in_ids_out_and_the_plan_is_kept(folder: Path) -> None:
    greedy = ("--tokens", "3,17,5", "--temperature", 0, "--max-new-tokens", 4)
    first, again = generate(folder, *greedy), generate(folder, *greedy)
    assert "compiling for cpu, once" in first.err
    assert "compiling" not in again.err
    assert first.out == again.out
    (plan,) = (folder / "cache" / "plans").iterdir()
    run = command("run", plan, "--weights", folder / "weights", "--tokens", "3,17,5", "--max-new-tokens", 4)
    assert first.out == run.out
    assert first.err.splitlines()[-1].startswith("4 tokens, cut off after 3 (3 read), first after ")
    (plan / "plan.json").write_text("{")
    mended = generate(folder, *greedy)
    assert "compiling it again" in mended.err
    assert mended.out == first.out


def test_an_answer_in_words_and_the_same_seed_again(folder: Path) -> None:
    asked = ("--prompt", "Hello", "--seed", 5, "--max-new-tokens", 6)
    said = [generate(folder, *asked).out for _ in range(2)]
    assert said[0] == said[1]
    assert said[0].strip("\n") != ""
    other = generate(folder, "--prompt", "Hello", "--seed", 6, "--max-new-tokens", 6)
    assert other.out != said[0]
    assert "taking the rules of preview" in other.err
    assert "seed 6" in other.err


def test_a_text_that_ends_an_answer_may_begin_in_one_token_and_end_in_another(folder: Path) -> None:
    asked = ("--prompt", "Hello", "--temperature", 0, "--max-new-tokens", 12)
    *events, _ = map(json.loads, generate(folder, *asked, "--json").out.splitlines())
    said = [event["text"] for event in events if event["text"]]
    place = next(i for i in range(1, len(said)) if "\ufffd" not in said[i - 1] + said[i])
    stop = said[place - 1][-1] + said[place][0]
    whole = "".join(said)
    ended = generate(folder, *asked, "--stop", "never", "--stop", stop)
    assert ended.out == whole[: whole.index(stop)] + "\n"
    assert "cut off" not in ended.err


def test_drafts_change_nothing_but_the_rounds(folder: Path) -> None:
    asked = ("--tokens", "3,17,5", "--seed", 3, "--max-new-tokens", 7)
    plain = generate(folder, *asked)
    drafted = generate(folder, *asked, "--draft", "mtp", "--draft-tokens", 2)
    assert drafted.out == plain.out
    found = re.search(
        r"; (\d+) rounds, (\d\.\d\d) tokens each \(held ([\d ]+)\)$", drafted.err.splitlines()[-1]
    )
    assert found is not None
    assert sum(map(int, found[3].split())) == int(found[1])
    assert "rounds" not in plain.err
    (plan,) = [p for p in (folder / "cache" / "plans").iterdir() if "round-1x3" in str(load(p).buckets)]
    given = ("generate", plan, "--weights", folder / "weights", *asked)
    done = json.loads(command(*given, "--draft", "auto", "--json").out.splitlines()[-1])
    assert done["ids"] == list(map(int, plain.out.split(",")))
    assert sum(done["accepted"]) == int(found[1])
    for wrong, message in (
        (("--draft", "dspark"), "drafts with mtp"),
        (("--draft", "mtp", "--draft-tokens", 3), "drafts 2 tokens a round"),
        (("--draft", "given"), "nobody gives drafts here"),
        (("--draft", "mtp", "--draft-confidence", 0.5), "no draft of plan weights comes with a confidence"),
        (("--draft-confidence", 1.5), "Invalid value for '--draft-confidence'"),
    ):
        refused = command(*given, *wrong)
        assert refused.code == 2
        assert message in refused.err


def test_confidence_changes_nothing_but_how_many_drafts_are_judged(tmp_path: Path) -> None:
    asked = (golden_case("dspark-fp32"), "--tokens", "3,17,5", "--seed", 3, "--max-new-tokens", 7)
    common = (*asked, "--recipe", "fp32", "--max-context", 64, "--cache", tmp_path, "--json")

    def done(*more: object) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(command("generate", *common, *more).out.splitlines()[-1])
        return made

    plain, drafting = done(), ("--draft", "dspark", "--draft-tokens", 2)
    found = {least: done(*drafting, "--draft-confidence", least) for least in (0, 1)}
    assert all(each["ids"] == plain["ids"] for each in found.values())
    assert len(found[1]["accepted"]) == 1  # none was judged, so none held


def test_events_are_objects_a_line(folder: Path) -> None:
    asked = ("--prompt", "Hello", "--thinking", "--seed", 5, "--max-new-tokens", 4)
    made = generate(folder, *asked, "--json", "--logprobs", 2)
    *events, done = map(json.loads, made.out.splitlines())
    assert {event["type"] for event in events} == {"reasoning"}
    assert [i for event in events for i in event["ids"]] == done["ids"]
    text = "".join(event["text"] for event in events)
    assert all(event["logprob"] <= event["best"][0][1] <= 0 for event in events if event["ids"])
    assert done["message"] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": text,
        "tool_calls": [],
    }
    assert (done["type"], done["reason"], done["new_tokens"], done["seed"]) == ("done", "length", 4, 5)
    assert done["launches_per_token"] > 10


def test_a_conversation_from_a_file_and_one_in_the_terminal(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    typed = f"Hello\n\n/save {saved}\nAgain\n/nothing\n/reset\n/load {saved}\n/save\nAgain\n/quit\n"
    options = ["--chat", "--seed", "5", "--max-new-tokens", "3", "--max-context", "128"]
    talk = subprocess.run(
        [
            sys.executable,
            "-m",
            "dsv4c",
            "generate",
            folder / "weights",
            *options,
            "--cache",
            folder / "cache",
        ],
        input=typed,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=True,
    )
    history = json.loads(saved.read_text())
    assert [message["role"] for message in history] == ["user", "assistant"]
    assert talk.stdout.startswith(history[1]["content"])
    (first, read), (second, more), (taken_back, _) = re.findall(r"after (\d+) \((\d+) read\)", talk.stderr)
    assert first == read
    assert int(second) - int(more) == int(first) + 3 - 1  # the last token that was said is read now
    assert "error: /nothing is no command" in talk.stderr
    assert "error: /save: name a file" in talk.stderr
    assert talk.stderr.count("chat.json: 2 messages") == 2
    saved.write_text(json.dumps([*history, {"role": "user", "content": "Again"}]))
    asked = generate(folder, "--messages", saved, "--max-new-tokens", 2, "--seed", 1)
    assert f"2 tokens, cut off after {taken_back} (" in asked.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected one of --prompt, --messages, --tokens, --chat, found none"),
        (("--prompt", "x", "--tokens", "3"), "found --prompt and --tokens"),
        (("--prompt", " "), "--prompt: is empty"),
        (("--prompt", "caf\udce9"), "--prompt: is no UTF-8 at character 3"),
        (("--prompt", "x", "--logprobs", 2), "--logprobs: is part of the events; give --json"),
        (("--tokens", "3,x"), "'x' is no token id"),
        (("--tokens", "3,700"), "token 1 is 700, out of range"),
        (("--prompt", "x" * 500), "the context room for 128 with the answer"),
        (("--prompt", "x", "--temperature", -1), "temperature is -1.0, expected a number of 0"),
        (("--prompt", "x", "--encoding", "july"), "no rules are named 'july'; expected preview, 0731, auto"),
        (("--prompt", "x", "--thinking", "--effort", "low"), "the preview release has no level 'low'"),
        (("--chat", "--thinking", "--effort", "low"), "the preview release has no level 'low'"),
        (("--prompt", "x", "--weights", "y"), "is no plan, so --weights has no place"),
    ],
)
def test_mistakes(folder: Path, arguments: tuple[object, ...], message: str) -> None:
    refused = generate(folder, *arguments)
    assert refused.code in (2, 6)
    assert refused.out == ""
    assert message in refused.err
    assert "weights: " not in refused.err  # said before they are loaded


def test_a_folder_without_a_tokenizer_answers_in_ids_alone(folder: Path, tmp_path: Path) -> None:
    for file in (folder / "weights").iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    options = ("--cache", folder / "cache", "--max-context", 128, "--max-new-tokens", 1)
    refused = command("generate", tmp_path, "--prompt", "x", *options)
    assert (refused.code, refused.out) == (2, "")
    assert f"{tmp_path}: has no tokenizer.json" in refused.err
    assert command("generate", tmp_path, "--tokens", "3", *options).code == 0
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    cut = command("generate", tmp_path, "--prompt", "x", *options, "--cache", tmp_path / "none")
    assert (cut.code, cut.out) == (2, "")
    assert "is no tokenizer" in cut.err
    assert not (tmp_path / "none").exists()  # said before anything is compiled
    (tmp_path / "tokenizer.json").unlink()
    write_tokenizer(tmp_path)
    foreign = (tmp_path / "tokenizer.json").read_text().replace(USER, "<user>")
    (tmp_path / "tokenizer.json").write_text(foreign)
    other = command("generate", tmp_path, "--prompt", "x", *options, "--cache", tmp_path / "none")
    assert (other.code, other.out) == (2, "")
    assert f"has no token {USER!r}: it is no tokenizer of DeepSeek-V4" in other.err
    assert not (tmp_path / "none").exists()
    (tmp_path / "model.safetensors").unlink()
    missing = command("generate", tmp_path, "--tokens", "3", *options)
    assert (missing.code, missing.out) == (4, "")
    assert "no checkpoint here" in missing.err
    (tmp_path / "model.safetensors").symlink_to("../blobs/3f2a")
    half = command("generate", tmp_path, "--tokens", "3", *options)
    assert half.code == 4
    assert "leads to ../blobs/3f2a, where nothing is; download it again" in half.err


def test_where_no_plan_can_be_kept_the_answer_comes_all_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", folder / "weights", "--tokens", "3", "--max-context", 128, "--max-new-tokens", 1)
    assert command(*asked, "--cache", tmp_path / "kept").code == 0
    plan = load(next((tmp_path / "kept" / "plans").glob("weights-*")))
    monkeypatch.setattr("dsv4c.compiler.kept.compile", lambda *given, **options: plan)
    (tmp_path / "plans").write_text("a file where a folder should be")
    made = command(*asked, "--cache", tmp_path)
    assert made.code == 0
    assert "the plan is used, and not kept" in made.err


def test_without_the_compiler_it_says_what_to_bring(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4c.compiler.kept.find_spec", lambda name: None)
    refused = generate(folder, "--tokens", "3", "--target", "sm_90a")
    assert refused.code == 7
    assert "the compiler for sm_90a is not installed" in refused.err
    assert "then `dsv4c generate PLAN --weights DIR` here" in refused.err


def test_an_interrupt_keeps_what_was_said(folder: Path) -> None:
    words = [sys.executable, "-m", "dsv4c", "generate", folder / "weights", "--tokens", "3", "--seed", "5"]
    options = ["--cache", folder / "cache", "--max-context", "128", "--temperature", "0"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [*words, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert all(part.isdigit() for part in (first + rest).strip().split(","))
    assert "interrupted after 1 (1 read)" in told.splitlines()[-1]


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[list[str]]:
    """`tmux` on a server of its own, with a terminal of 80 columns; a command line to talk to it."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    server = ["tmux", "-S", str(tmp_path / "tmux")]
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    given = [part for name, value in environment.items() for part in ("-e", f"{name}={value}")]
    new = [*server, "-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "30", *given, "sh"]
    subprocess.run(new, check=True)
    yield server
    subprocess.run([*server, "kill-server"], check=True)


def seen(server: list[str], text: str, times: int = 1) -> str:
    """The screen, once `text` is on it so often."""
    shown = ""
    for _ in range(300):
        shown = subprocess.run(
            [*server, "capture-pane", "-p", "-J"], capture_output=True, text=True, check=True
        ).stdout
        if shown.count(text) >= times:
            return shown
        time.sleep(0.1)
    raise AssertionError(f"{text!r} did not come:\n{shown}")


def test_a_conversation_in_a_real_terminal(folder: Path, screen: list[str], tmp_path: Path) -> None:
    """In 80 columns, then in 120; an interrupt at the prompt loses the line alone."""

    def type_in(text: str) -> None:
        subprocess.run([*screen, "send-keys", text, "Enter"], check=True)

    program = f"{sys.executable} -m dsv4c generate {folder / 'weights'} --chat --thinking --seed 5"
    type_in(f"{program} --max-new-tokens 3 --max-context 128 --cache {folder / 'cache'}")
    seen(screen, "/quit (or Ctrl-D) leaves")
    type_in("Hallo, Wörter")
    shown = seen(screen, "launches per token, seed 5\n>")  # and asks for more
    assert "> Hallo, Wörter" in shown
    assert "3 tokens, cut off after " in shown
    subprocess.run([*screen, "resize-window", "-x", "120"], check=True)
    type_in("und jetzt breit")
    assert "> und jetzt breit" in seen(screen, "launches per token, seed 5", times=2)
    subprocess.run([*screen, "send-keys", "not this"], check=True)
    seen(screen, "> not this")
    subprocess.run([*screen, "send-keys", "C-c"], check=True)
    seen(screen, "Ctrl-D or /quit leaves")
    type_in(f"/save {tmp_path / 'kept.json'}")
    seen(screen, "kept.json: 4 messages")
    subprocess.run([*screen, "send-keys", "C-d"], check=True)
    type_in("echo left with $?")
    seen(screen, "left with 0")
