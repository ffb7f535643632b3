"""hypothesis for the tests of properties; where it is not installed, these alone are skipped."""

from unittest.mock import MagicMock

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    given = lambda **_: pytest.mark.skip(reason="needs hypothesis: pip install hypothesis")
    settings = lambda **_: lambda test: test
    st = MagicMock()  # is asked for strategies that nobody will draw from

__all__ = ["given", "settings", "st"]
