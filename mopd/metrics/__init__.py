"""Metrics that know how to be merged, timing, and the places they are written to. No torch."""

from mopd.metrics.metric import Metric, merge, values
from mopd.metrics.sinks import JsonlSink, MultiSink, Sink, TensorBoardSink
from mopd.metrics.span import Spans

__all__ = [
    "JsonlSink",
    "Metric",
    "MultiSink",
    "Sink",
    "Spans",
    "TensorBoardSink",
    "merge",
    "values",
]
