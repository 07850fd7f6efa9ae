"""Metrics merge to the number that one rank with all the data would have."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopd.metrics.metric import Metric, means, merge, values
from mopd.metrics.span import Spans

whole = st.integers(-1000, 1000).map(float)


@given(st.lists(whole, min_size=1), st.integers(0, 50))
def test_merging_parts_equals_measuring_the_whole(data: list[float], cut: int) -> None:
    def measured(part: list[float]) -> dict[str, Metric]:
        if not part:
            return {"mean": Metric.mean(0.0, 0)}
        return {
            "mean": Metric.mean(sum(part), len(part)),
            "sum": Metric.sum(sum(part)),
            "max": Metric.max(max(part)),
            "last": Metric.last(part[-1]),
        }

    merged = values(merge([measured(data[:cut]), measured(data[cut:])]))
    assert merged == values(measured(data))


def test_nothing_measured_is_no_number() -> None:
    assert Metric.mean(0.0, 0).value is None
    assert values({"a": Metric.mean(0.0, 0), "b": Metric.sum(0.0)}) == {"b": 0.0}


@pytest.mark.parametrize("order", [(math.nan, 1.0), (1.0, math.nan)])
@pytest.mark.parametrize("make", [Metric.sum, Metric.max])
def test_nan_is_not_lost(order: tuple[float, float], make: type[Metric]) -> None:
    merged = make(order[0]).merge(make(order[1]))
    assert merged.value is not None
    assert math.isnan(merged.value)


def test_reductions_do_not_mix() -> None:
    with pytest.raises(ValueError, match="a sum and a max"):
        Metric.sum(1).merge(Metric.max(1))


def test_a_metric_travels_between_processes() -> None:
    assert pickle.loads(pickle.dumps(Metric.mean(3, 2))).value == 1.5


def test_step_batch_sums_become_means() -> None:
    assert values(means({"canonical": (3.0, 4.0), "unseen": (0.0, 0.0)})) == {"canonical": 0.75}


def test_spans_nest_and_add_up() -> None:
    ticks = iter([0.0, 1.0, 4.0, 10.0, 20.0, 21.0])
    spans = Spans(clock=lambda: next(ticks))
    with spans("rollout"), spans("decode"):
        pass
    with spans("rollout"):
        pass
    drained = spans.drain()
    assert values(drained) == {"time/rollout": 11.0, "time/rollout/decode": 3.0}
    assert drained["time/rollout"].reduction == "max"
    assert spans.drain() == {}


def test_a_span_that_raises_is_closed() -> None:
    spans = Spans()
    with pytest.raises(KeyError), spans("a"):
        raise KeyError
    with spans("b"):
        pass
    assert list(spans.drain()) == ["time/a", "time/b"]
