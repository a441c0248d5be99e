"""`dsv4c serve` up to the point where vLLM takes over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv4c.compiler.compile import compile
from dsv4c.vllm.options import DRAFTER
from tests.commands import command
from tests.words import small_checkpoint


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def plan(weights: Path) -> Path:
    return compile(weights, max_context=64, batch=(1, 2), certify=False).save(weights.parent / "a.plan")


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint that two ranks divide, and a plan for them."""
    root = tmp_path_factory.mktemp("ranked")
    weights = small_checkpoint(root, moe_intermediate_size=256)
    made = compile(weights, max_context=64, batch=1, ranks=2, certify=False)
    return weights, made.save(root / "two.plan")


def test_the_command_that_is_started(weights: Path, plan: Path) -> None:
    given = (plan, "--weights", weights, "--name", "small", "--port", 9000, "--dry-run", "--json")
    made = command("serve", *given, "--", "--api-key", "secret")
    assert made.code == 0
    assert made.json["url"] == "http://127.0.0.1:9000/v1"
    started = made.json["command"]
    assert started[-2:] == ["--api-key", "secret"]
    assert started[started.index("--max-num-seqs") + 1] == "2"
    assert started[started.index("--served-model-name") + 1] == "small"
    assert json.loads(started[started.index("--additional-config") + 1]) == {"plan": str(plan)}


def test_a_checkpoint_is_compiled_for_as_many_as_are_served(weights: Path, tmp_path: Path) -> None:
    given = ("--target", "cpu", "--slots", 3, "--max-context", 64, "--cache", tmp_path, "--dry-run", "--json")
    made = command("serve", weights, *given)
    assert made.code == 0
    kept = json.loads((Path(made.json["plan"]) / "plan.json").read_text())
    assert kept["deployment"]["slots"] == 3


def test_a_checkpoint_drafts_for_itself(weights: Path, tmp_path: Path) -> None:
    given = ("--target", "cpu", "--slots", 1, "--max-context", 64, "--cache", tmp_path, "--dry-run", "--json")
    made = command("serve", weights, *given, "--draft", "mtp", "--draft-tokens", 2)
    assert made.code == 0
    started = made.json["command"]
    speculates = json.loads(started[started.index("--speculative-config") + 1])
    assert (speculates["model"], speculates["num_speculative_tokens"]) == (DRAFTER, 2)
    assert "--no-async-scheduling" in started


@pytest.mark.parametrize("options", [(), ("-tp", 2), ("--", "--tensor-parallel-size=2"), ("--", "-tp", "2")])
def test_ranks_are_the_plans_whatever_is_said_to_vllm(
    ranked: tuple[Path, Path], options: tuple[object, ...]
) -> None:
    weights, plan = ranked
    made = command("serve", plan, "--weights", weights, "--dry-run", "--json", *options)
    assert made.code == 0, made.err
    assert not [part for part in made.json["command"] if "-tp" in part or "tensor" in part]


def test_a_checkpoint_is_compiled_for_so_many_ranks(ranked: tuple[Path, Path], tmp_path: Path) -> None:
    given = ("--target", "cpu", "--slots", 1, "--max-context", 64, "--cache", tmp_path, "--dry-run", "--json")
    made = command("serve", ranked[0], *given, "--ranks", 2)
    assert made.code == 0, made.err
    assert json.loads((Path(made.json["plan"]) / "plan.json").read_text())["deployment"]["ranks"] == 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("-tp", 2), 2, "--ranks 2 (-tp, --tensor-parallel-size): plan weights is compiled for 1"),
        (("--", "--tensor_parallel_size", 2), 2, "--ranks 2 (-tp, --tensor-parallel-size): plan weights is"),
        (("--ranks", 1, "--", "-tp", 2), 2, "--ranks 1, and --tensor-parallel-size 2 for vLLM; give one"),
        (("--", "-tp=two"), 2, "-tp/--tensor-parallel-size/--tensor_parallel_size: invalid int value: 'two'"),
        (("--", "-pp", 2), 2, "--pipeline-parallel-size 2: one worker runs a plan"),
        (("--", "--data-parallel-size=2"), 2, "--data-parallel-size 2: one worker runs a plan"),
        (("--", "--max_model_len", 9), 2, "--max-model-len: is decided by the plan"),
        (("--draft", "given"), 2, "--draft given: nobody gives drafts here"),
        (("--draft", "mtp"), 2, "drafts with nothing; compile one with --draft"),
        (("--", "--max-model-len", 9), 2, "--max-model-len: is decided by the plan"),
        (("--dry-run",), 4, "is the checkpoint of another model: vocab_size"),
    ],
)
def test_mistakes_are_said_at_once(
    weights: Path, plan: Path, tmp_path: Path, options: tuple[object, ...], code: int, message: str
) -> None:
    folder = weights
    if code == 4:
        folder = tmp_path / "other"
        folder.mkdir()
        config = json.loads((weights / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1024}))
        (folder / "tokenizer.json").write_bytes((weights / "tokenizer.json").read_bytes())
    found = command("serve", plan, "--weights", folder, *options)
    assert found.code == code
    assert message in found.err
