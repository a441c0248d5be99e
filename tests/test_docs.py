"""The tutorial is run block by block, and the example package is installed and seen to fire."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from dsv4c.compiler.request import Request
from dsv4c.ir.totals import compulsory, totals
from dsv4c.view.text import render
from tests.codegen.lowered import gpu_plan

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "write-a-pass.md"
OF_KERNELS = ROOT / "docs" / "write-a-kernel.md"
EXAMPLE = ROOT / "examples" / "greedy_head"
BLOCK = re.compile(r"^```(python|sh|toml)(?: file=(\S+))?\n(.*?)^```$", re.M | re.S)


def environment(*paths: Path, cache: Path) -> dict[str, str]:
    given = [str(p) for p in (*paths, ROOT)]
    bin_folder = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(given),
        "PATH": bin_folder + os.pathsep + os.environ["PATH"],
        "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
    }


def run(command: list[str], cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def installed(folder: Path) -> str:
    """What `pip install .` leaves for others to find, without a network."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    groups = project["entry-points"].items()
    found = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    found.mkdir()
    name, version = project["name"], project["version"]
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (found / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in points.items()) for group, points in groups
        )
    )
    return "true"


@pytest.mark.parametrize(("page", "count"), [(TUTORIAL, 8), (OF_KERNELS, 5)])
def test_every_block_of_a_tutorial_runs(tmp_path: Path, page: Path, count: int) -> None:
    env = environment(tmp_path, EXAMPLE / "src", cache=tmp_path / "cache")
    blocks = BLOCK.findall(page.read_text())
    assert len(blocks) >= count
    for language, file, text in blocks:
        if file:
            (tmp_path / file).write_text(text)
        script = (
            re.sub(r"^dsv4c ", f"{sys.executable} -m dsv4c ", text, flags=re.M) if language == "sh" else text
        )
        if "pip install ." in script:
            script = script.replace("pip install .", installed(tmp_path))
        shell = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
        if language != "toml":
            run([*shell, script], tmp_path, env)


def test_the_kernels_of_the_tutorial_are_the_examples() -> None:
    shown = {file: text for _, file, text in BLOCK.findall(OF_KERNELS.read_text()) if file}
    assert (
        shown["dsv4c_greedy_head_kernel.py"] == (EXAMPLE / "src" / "dsv4c_greedy_head_kernel.py").read_text()
    )
    project = (EXAMPLE / "pyproject.toml").read_text()
    assert shown["pyproject.toml"].split("\n\n", 1)[1].strip() in project


def without_figures(text: str) -> str:
    """Bytes, counts and seconds change with the compiler; what is said about them should not."""
    return re.sub(r"\d[\d,.]*", "#", text)


def test_the_readmes_first_example_prints_what_it_says(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    example = readme.split("## From a config to tokens", 1)[1]
    session = re.search(r"^```\n(\$ .*?)^```$", example, re.M | re.S)
    python = re.search(r"^```python\n(.*?)^```$", example, re.M | re.S)
    assert session is not None
    assert python is not None
    env = environment(tmp_path, cache=tmp_path / "cache")
    commands = [part.split("\n", 1) for part in session[1].removeprefix("$ ").split("\n$ ")]
    assert len(commands) == 3
    for line, said in commands:
        command = line.split("#", 1)[0].split()
        printed = run([sys.executable, "-m", *command], tmp_path, env)
        assert without_figures(printed).strip() == without_figures(said).strip()
    run(["rm", "-r", "tiny.plan"], tmp_path, env)
    checked = "assert (tuple(logits.shape), session.positions) == ((3, 512), [5])"
    run([sys.executable, "-c", python[1] + checked], tmp_path, env)


def test_the_layer_in_the_docs_is_what_show_prints() -> None:
    """Without types, attributes and origins, as it says."""
    job = Request("deepseek-v4-flash", batch=1, verify=1, chunk=1).job()
    text = render(job.compiled(job.decode).after("fold"), 4, True)
    lines = [line for line in text.split("# layers.4 of graph", 1)[1].split("\n") if line[:1] in ("@", "%")]
    cut = [re.split(r" \{| from \[", line, maxsplit=1)[0] for line in lines]
    plain = [re.sub(r": (?:q\[[^\]]*\]|[a-z0-9]+)\[[^\]]*\]", "", line) for line in cut]
    assert "\n".join(["```", *plain, "```"]) in (ROOT / "docs/index.md").read_text()


def test_the_readmes_table_of_passes_is_what_they_do() -> None:
    rows = dict(re.findall(r"^\| (\w[\w, ()]*) \| (.*) \|$", (ROOT / "README.md").read_text(), re.M))
    for place, name in ((0, "deepseek-v4-flash"), (2, "deepseek-v4-pro")):
        job = Request(name, max_context=131072).job()
        compiled = job.compiled(job.decode)
        found = {stage: totals(graph) for stage, graph in compiled.named}
        assert found["prepack"] == found["tidy"]
        plan = gpu_plan(name, max_context=131072, batch=1, verify=1, chunk=1, certify=False)
        program, moved = plan.program(), found["tidy"].bytes
        counts = {s: (t.launches, t.bytes) for s, t in found.items()} | {
            "prepack, tidy": (found["tidy"].launches, moved),
            "lower (sm_90a)": (len(program.launches), moved),
        }
        for stage in ("build", "quantize", "fold", "prepack, tidy", "lower (sm_90a)"):
            launches, moved = counts[stage]
            shown = [cell.strip() for cell in rows[stage].split("|")][place : place + 2]
            assert shown == [f"{launches:,}", f"{moved / 1e9:.3f}"], stage
        least = sum(compulsory(compiled.graph).values())
        assert rows["compulsory"].split("|")[place + 1].strip() == f"{least / 1e9:.3f}"


def test_the_tutorials_fusion_is_short() -> None:
    code = [text for language, file, text in BLOCK.findall(TUTORIAL.read_text()) if file == "greedy.py"]
    assert len(code) == 1
    assert len([line for line in code[0].splitlines() if line.strip()]) < 40


def test_an_installed_package_contributes_its_fusion(tmp_path: Path) -> None:
    fresh = tmp_path / "venv"
    venv.create(fresh, with_pip=True)
    python = fresh / "bin" / "python"
    if not python.exists():
        pytest.fail(f"no interpreter in {fresh}")
    site = next(fresh.glob("lib/python*/site-packages"))
    (site / "tested.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n")
    package = tmp_path / "greedy_head"
    run(["cp", "-r", str(ROOT / "examples" / "greedy_head"), str(package)], tmp_path, dict(os.environ))
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    run(
        [str(python), "-m", "pip", "install", "-q", "--no-deps", str(package)],
        tmp_path,
        env,
    )
    command = [str(python), "-m", "dsv4c", "compile", "tiny", "-o", "tiny.plan", "--max-context", "256"]
    figures = json.loads(run([*command, "--expect", "greedy_head=1", "--json"], tmp_path, env))
    assert figures["rules"]["greedy_head"] == 1
    show = [str(python), "-m", "dsv4c", "passes", "tiny.plan", "--json"]
    (row,) = (r for r in json.loads(run(show, tmp_path, env))["rules"] if r["rule"] == "greedy_head")
    assert row["certificate"] == "bit-exact"
