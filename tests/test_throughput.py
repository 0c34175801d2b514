from __future__ import annotations

import pytest

from capfilt.throughput import Throughput


def run(*fragments: tuple[str, dict[str, float], tuple[float, float] | None]) -> Throughput:
    throughput = Throughput()
    for fragment in fragments:
        throughput.add(*fragment)
    return throughput


def test_busy_is_between_a_workers_first_and_last_batch() -> None:
    """Two workers, one of which began late; what lies before its first batch and after its last does not count."""
    found = run(
        ("a", {"model": 9.0, "write": 1.0}, (100.0, 110.0)),
        ("a", {"model": 9.0}, (110.0, 120.0)),
        ("b", {"model": 4.5}, (115.0, 120.0)),
    )
    assert found.spans == {"a": (100.0, 120.0), "b": (115.0, 120.0)}
    assert found.busy == pytest.approx(22.5 / 25)
    assert found.seconds == {"model": 22.5, "write": 1.0}


@pytest.mark.parametrize(
    ("seconds", "bottleneck"),
    [
        ({"model": 9.5, "read": 4.0}, "the models"),
        ({"model": 5.0, "read": 4.0, "wait": 1.0, "write": 1.0}, "reading the input"),
        ({"model": 5.0, "read": 1.0, "wait": 4.0, "write": 1.0, "decode": 40.0}, "decoding"),
        ({"model": 5.0, "read": 1.0, "wait": 1.0, "write": 4.0}, "writing the output"),
        ({"model": 5.0, "read": 0.5, "wait": 0.5, "write": 1.0}, "fragments to work on"),
    ],
)
def test_what_held_the_models_up(seconds: dict[str, float], bottleneck: str) -> None:
    assert run(("a", seconds, (0.0, 10.0))).bottleneck == bottleneck


def test_nothing_met_the_models() -> None:
    found = run(("a", {"read": 1.0}, None))
    assert (found.busy, found.bottleneck) == (None, None)


def test_clocks_are_coarse() -> None:
    assert run(("a", {"model": 1.001}, (0.0, 1.0))).busy == 1.0
