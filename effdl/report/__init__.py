"""What every command found, as frozen data; ``to_json`` makes what ``--json`` writes."""

from effdl.report.bench import (
    BaselineChange,
    BaselineReport,
    BenchReport,
    BenchResult,
    BenchScan,
    Latency,
    NodeTime,
    OpChange,
    OpTime,
    Peaks,
    Placement,
    Profile,
    ProfileReport,
    Yardstick,
)
from effdl.report.compare import (
    CompareReport,
    LocateReport,
    OutputError,
    TensorError,
    ThereReport,
)
from effdl.report.evaluate import EvaluateReport, ModelScore
from effdl.report.explain import ExplainReport
from effdl.report.layers import LayerRow, LayersReport
from effdl.report.machine import DoctorReport, Place
from effdl.report.model import ChannelGroup, InspectReport, ModelStats, NodeStats, Opportunity
from effdl.report.plain import SCHEMA, from_json, to_json
from effdl.report.run import GateReport, PassReport, RunReport

__all__ = [
    "SCHEMA",
    "BaselineChange",
    "BaselineReport",
    "BenchReport",
    "BenchResult",
    "BenchScan",
    "ChannelGroup",
    "CompareReport",
    "DoctorReport",
    "EvaluateReport",
    "ExplainReport",
    "GateReport",
    "InspectReport",
    "Latency",
    "LayerRow",
    "LayersReport",
    "LocateReport",
    "ModelScore",
    "ModelStats",
    "NodeStats",
    "NodeTime",
    "OpChange",
    "OpTime",
    "Opportunity",
    "OutputError",
    "PassReport",
    "Peaks",
    "Place",
    "Placement",
    "Profile",
    "ProfileReport",
    "RunReport",
    "TensorError",
    "ThereReport",
    "Yardstick",
    "from_json",
    "to_json",
]
