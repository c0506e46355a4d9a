"""The fixture of the tests of the console in Chinese."""

from __future__ import annotations

import pytest

from minllama.cli.chinese import read_language


@pytest.fixture
def own_folder_and_language(empty_folder):
    """The test runs in an empty folder, and leaves the language to the locale."""
    yield
    read_language(["--lang="])
