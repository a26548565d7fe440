"""What every command found, as frozen data; ``to_json`` makes what ``--json`` writes."""

from effdl.report.bench import (
    BenchReport,
    BenchResult,
    Latency,
    NodeTime,
    OpChange,
    OpTime,
    Peaks,
    Placement,
    Profile,
    ProfileReport,
)
from effdl.report.compare import CompareReport, OutputError
from effdl.report.machine import DoctorReport
from effdl.report.model import InspectReport, ModelStats, NodeStats, Opportunity
from effdl.report.plain import SCHEMA, to_json
from effdl.report.run import GateReport, PassReport, RunReport

__all__ = [
    "SCHEMA",
    "BenchReport",
    "BenchResult",
    "CompareReport",
    "DoctorReport",
    "GateReport",
    "InspectReport",
    "Latency",
    "ModelStats",
    "NodeStats",
    "NodeTime",
    "OpChange",
    "OpTime",
    "Opportunity",
    "OutputError",
    "PassReport",
    "Peaks",
    "Placement",
    "Profile",
    "ProfileReport",
    "RunReport",
    "to_json",
]
