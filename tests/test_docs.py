"""The code blocks of README and docs run as they stand."""

import importlib
import json
import re
from pathlib import Path

import jax
import pytest

from benchmarks import measure

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {
    page.relative_to(ROOT).as_posix(): re.findall(r"```python\n(.*?)```", page.read_text(), re.S) for page in PAGES
}


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a page writes
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile("\n".join(BLOCKS[page]), page, "exec"), {"__name__": "__main__"})


def test_readme_is_short_and_its_links_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    links = [
        link
        for page in PAGES
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
        for link in [page.parent / link]
    ]
    assert links
    assert not [link for link in links if not link.exists()]
    assert {"README.md", "docs/guide.md"} <= {page for page, blocks in BLOCKS.items() if blocks}


@pytest.mark.parametrize(("name", "page"), [("collectives", "pod"), ("pod_memory", "pod"), ("export_memory", "peft")])
def test_tables_show_the_committed_results(name, page):
    benchmark = importlib.import_module(f"benchmarks.{name}")
    (file,) = sorted((ROOT / "benchmarks" / "results").glob(f"{name}-*.json"))
    table = measure.markdown(benchmark.HEADER, benchmark.rows(json.loads(file.read_text())))
    assert table in (ROOT / "docs" / f"{page}.md").read_text()
