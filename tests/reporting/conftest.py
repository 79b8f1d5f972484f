from __future__ import annotations

from pathlib import Path

import pytest
from page_reader import Page
from synthetic_run import make_run

from equipoise.reporting import write_report


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 layers of 16 experts on 4 ranks, with its report; not to be changed."""
    path = tmp_path_factory.mktemp("report") / "run"
    make_run(path, ranks=4)
    write_report(path)
    return path


@pytest.fixture(scope="session")
def small_page(small_run: Path) -> Page:
    return Page.read(small_run / "report.html")
