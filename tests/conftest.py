"""What holds for the whole test run: time limits, and how hypothesis counts time."""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings

# Other processes share the machine: how long one example took says nothing about the code. The
# limit of pytest-timeout (pyproject.toml) holds for the test as a whole.
settings.register_profile("p2pllm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("p2pllm")


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Give a test marked `slow(limit_s)` that time limit instead of the general one."""
    for item in items:
        marker = item.get_closest_marker("slow")
        if marker is not None:
            limit_s = marker.kwargs["limit_s"] if marker.kwargs else marker.args[0]
            item.add_marker(pytest.mark.timeout(limit_s))
