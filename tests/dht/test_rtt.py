from p2pllm.dht.rtt import WINDOW, RpcTimeout


def test_before_anything_is_measured_the_timeout_is_the_largest() -> None:
    assert RpcTimeout(0.3, 2.0).seconds == 2.0


def test_the_timeout_is_twice_the_95th_percentile() -> None:
    timeout = RpcTimeout(0.3, 2.0)

    for index in range(WINDOW):
        timeout.add(0.6 if index % 10 == 0 else 0.05)

    assert timeout.seconds == 1.2


def test_the_timeout_stays_within_its_bounds() -> None:
    fast, slow = RpcTimeout(0.3, 2.0), RpcTimeout(0.3, 2.0)

    for _ in range(WINDOW):
        fast.add(0.001)
        slow.add(30.0)

    assert (fast.seconds, slow.seconds) == (0.3, 2.0)


def test_old_round_trips_are_forgotten() -> None:
    timeout = RpcTimeout(0.3, 2.0)
    for _ in range(WINDOW):
        timeout.add(0.9)

    for _ in range(WINDOW + 8):
        timeout.add(0.2)

    assert timeout.seconds == 0.4
