# SPDX-License-Identifier: MPL-2.0
"""The manual says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import driver
from nspawn.options import render_reference
from tests.agent import parse_hcl

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_options_file_is_what_the_code_says() -> None:
    text = (ROOT / "docs/options.md").read_text()
    made = render_reference(driver.TASK_GROUPS, driver.PLUGIN_OPTIONS)
    assert text == made, "docs/options.md is old: run `sh build.sh reference`"


def test_readme_and_example_agree_on_the_plugin_block() -> None:
    for text in (README, (ROOT / "example/config.hcl").read_text()):
        assert f'plugin "{driver.FILE_NAME}" {{' in text


def test_links_lead_somewhere() -> None:
    anchors = {path: headings(path) for path in DOCUMENTS}
    for path in DOCUMENTS:
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text()):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), f"{path.name}: {link}"
            assert not anchor or anchor in anchors[target], f"{path.name}: {link}"


def headings(path: Path) -> set[str]:
    """Return the anchors that a Markdown file offers."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_documents_name_files_that_exist() -> None:
    for path in DOCUMENTS:
        for name in re.findall(r"\b(?:example|tests)/[\w./-]*\w", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language in a Markdown file."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_hcl_can_be_read(path: Path) -> None:
    for block in blocks(path, "hcl"):
        parse_hcl(block)


def test_image_of_the_readme_is_that_of_the_examples() -> None:
    """Whoever has made one has made the other."""
    commands = next(block for block in blocks(ROOT / "README.md", "shell") if "mmdebstrap" in block)
    assert commands in (ROOT / "docs/images.md").read_text()
    comment = (ROOT / "example/debian.hcl").read_text().replace("\n# ", "\n").replace("\\\n", "")
    assert set(commands.split()) <= set(comment.split())


def test_readme_names_every_example() -> None:
    for path in (ROOT / "example").iterdir():
        assert f"example/{path.name}" in README, path.name
