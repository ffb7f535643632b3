"""hypothesis for property tests; where it is not installed, only these tests are skipped."""

from unittest.mock import MagicMock

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    given = lambda **_: pytest.mark.skip(reason="needs hypothesis: pip install hypothesis")
    settings = lambda **_: lambda test: test
    st = MagicMock()  # accepts any strategy

__all__ = ["given", "settings", "st"]
