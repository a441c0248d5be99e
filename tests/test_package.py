"""What a user of the package sees: metadata, types, documentation."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

import dsv4c

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The editable wheel that an installer would unpack, built in a copy."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "dsv4c").mkdir()
    shutil.copy(ROOT / "dsv4c" / "__init__.py", folder / "dsv4c")
    script = "from setuptools.build_meta import build_editable; build_editable('.')"
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return zipfile.ZipFile(made)


def read(wheel: zipfile.ZipFile, suffix: str) -> str:
    (name,) = (n for n in wheel.namelist() if n.endswith(suffix))
    return wheel.read(name).decode()


def test_an_editable_install_is_a_path_which_type_checkers_follow(wheel: zipfile.ZipFile) -> None:
    folder = Path(str(wheel.filename)).parent
    assert read(wheel, ".pth").strip() == str(folder)
    assert (ROOT / "dsv4c" / "py.typed").is_file()


def test_metadata(wheel: zipfile.ZipFile) -> None:
    found = message_from_string(read(wheel, "METADATA"))
    assert found["License-Expression"] == "Apache-2.0"
    assert {c.partition(" :: ")[0] for c in found.get_all("Classifier", [])} >= {"Topic", "Typing"}
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in found.get_all("Classifier", [])
    assert all(" https://" in url for url in found.get_all("Project-URL", []))
    assert found["Keywords"]


def test_the_changelog_has_this_version() -> None:
    headings = re.findall(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == PROJECT["version"]


def test_every_page_is_there_and_in_the_navigation() -> None:
    listed = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize(
    "page", ["CHANGELOG.md", "README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    found = re.findall(r"^::: (\S+)\n    options:\n      heading: dsv4c\.(\w+)$", page, re.M)
    entries = {name: path for path, name in found}
    assert sorted(entries) == sorted(dsv4c.__all__)
    for name, path in entries.items():
        module, _, attribute = path.rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is getattr(dsv4c, name)


@pytest.mark.parametrize("name", dsv4c.__all__)
def test_public_names_and_their_members_say_what_they_are(name: str) -> None:
    public = getattr(dsv4c, name)
    assert len(inspect.getdoc(public) or "") > 20
    if inspect.isclass(public):
        bare = [
            member
            for member, value in vars(public).items()
            if not member.startswith("_")
            and isinstance(value, property | staticmethod | classmethod | type(inspect.getdoc))
            and not inspect.getdoc(value)
        ]
        assert bare == []
