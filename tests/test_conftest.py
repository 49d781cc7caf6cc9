import pytest


@pytest.mark.slow(45)
def test_a_slow_test_has_the_time_limit_it_asks_for(request: pytest.FixtureRequest) -> None:
    limit = request.node.get_closest_marker("timeout")

    assert limit.args == (45,)


@pytest.mark.slow(limit_s=50)
def test_the_limit_may_be_named(request: pytest.FixtureRequest) -> None:
    limit = request.node.get_closest_marker("timeout")

    assert limit.args == (50,)


def test_other_tests_keep_the_general_limit(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("timeout") is None
    assert float(request.config.getini("timeout")) == 20
