"""What the code and the pages refer to is in the repository: pages, headings, files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [path for room in ("squeeze_jax", "configs") for path in sorted((ROOT / room).rglob("*.py"))]
TESTS = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__)]

CITATION = re.compile(r'(docs/[\w-]+\.md),\s+"([^"]+)"')
ELSEWHERE = re.compile(r"\b(?:PAPER|AMENDMENTS|DESIGN)\b")
"""Pages that the repository does not have."""
NAMED = re.compile(r"(?<![\w/.-])(?:squeeze_jax/[\w/]+\.py|docs/[\w-]+\.(?:md|png))(?!\w)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def unfolded(path: Path) -> str:
    """The file's text with the line breaks of docstrings and comments taken out."""
    return re.sub(r"\s*\n\s*(?:# )?", " ", path.read_text())


def headings(page: Path) -> set[str]:
    return set(HEADING.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)))


def test_cited_pages_have_the_headings_that_are_cited():
    cited = [
        (path.relative_to(ROOT).as_posix(), *found)
        for path in [*CODE, *TESTS, *PAGES]
        for found in CITATION.findall(unfolded(path))
    ]
    assert len(cited) >= 15
    absent = [
        (where, page, heading)
        for where, page, heading in cited
        if not (ROOT / page).is_file() or heading not in headings(ROOT / page)
    ]
    assert not absent


def test_nothing_cites_pages_that_are_not_in_the_repository():
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in [*CODE, *TESTS, *PAGES]
        for match in ELSEWHERE.finditer(path.read_text())
    ]
    assert not found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(path):
    named = set(NAMED.findall(path.read_text()))
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]


def test_files_that_the_code_names_exist():
    absent = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in CODE
        for name in sorted(set(NAMED.findall(path.read_text())))
        if not (ROOT / name).is_file()
    ]
    assert not absent


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_of_a_page_lead_to_files(path):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]


def test_the_page_of_decisions_names_every_ablation_and_only_fields_that_exist():
    from squeeze_jax.config import load_preset

    page = (ROOT / "docs" / "decisions.md").read_text()
    presets = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.py")}
    named = set(re.findall(r"configs/[\w/]+\.py", page))
    assert named <= presets
    assert {name for name in presets if "/ablations/" in name} <= named
    config = load_preset(ROOT / "configs" / "flux_stage2.py")
    sections = "|".join(vars(config))
    for field in re.findall(rf"`((?:{sections})\.[a-z_.0-9]+)`", page):
        value = config
        for name in field.split("."):
            assert hasattr(value, name), field
            value = getattr(value, name)
