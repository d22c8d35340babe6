"""What the documents say holds: CLI help, links, the file tree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = [
    page
    for page in sorted(ROOT.rglob("*.md"))
    if not {".venv", "out", "runs", "node_modules"} & set(page.relative_to(ROOT).parts)
]


def test_cli_page_is_the_commands_own_help():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "cli_docs", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run scripts/cli_docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readmes_tree_names_what_there_is():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("## File tree", 1)[1].split("```", 2)[1]
    named = [line.split()[0] for line in block.splitlines()[1:] if line.strip() and not line.startswith("```")]
    assert len(named) > 10
    folder = ""
    for line in block.splitlines()[1:]:
        if not line.strip():
            continue
        name = line.split()[0]
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            folder = name if name.endswith("/") else ""
        path = ROOT / name if indent == 0 else ROOT / folder / name
        assert path.exists(), f"README names {path.relative_to(ROOT)}"


def test_the_commands_in_the_readme_exist():
    from be_serve.cli.main import _VERBS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"be-serve ([a-z][a-z-]+)\b", text)) - {"is", "serves", "trains"}
    unknown = {word for word in used if word not in _VERBS}
    assert not unknown, f"README uses be-serve {unknown}"
