"""What the tests of the engine share."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Tiny
from tests.engines import runs

# A method whose clients remember what they did not send.
FLASC: dict[str, Any] = {
    "method": {"name": "flasc", "feedback": True, "up_values": "int8"},
    "budgets": [{"up": 0.1}, {"down": 0.5, "up": 0.25}],
    "rounds": 5,
    "cohort": 8,
}


@pytest.fixture(autouse=True)
def _no_report(no_report: None) -> None:
    """The report has tests of its own."""


@pytest.fixture(scope="session")
def whole_with_memories(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of that method that was never stopped. Not to be changed."""
    folder = tmp_path_factory.mktemp("memories") / "run"
    runs.start(tiny, folder, **FLASC)
    return folder
