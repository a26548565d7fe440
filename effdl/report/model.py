"""What is in a model, and what could be done with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelStats:
    """The static facts of a model.

    Args:
        path: the file, ``-`` for a pipe, empty for a model in memory.
        sha256: of the file, empty for a model in memory.
        opset: the default domain's version; ``opsets`` has all domains.
        ir_version: of the file format.
        nodes: all nodes, subgraphs and functions included; ``ops`` counts them by type.
        params: numbers held by floating-point, integer and packed weights.
        macs: multiply-accumulates of one inference at ``dims``; None when no node could be counted.
        macs_unknown: op types with work that could not be counted.
        weight_bytes: bytes of weights by dtype.
        file_bytes: the file with its external data, 0 for a model in memory.
        zstd_bytes: the same, compressed with zstd; None when not measured.
        inputs: ``name: dtype[shape]`` of the graph inputs; ``outputs`` likewise.
        dims: values of dynamic dimensions that ``macs`` assumes.
        dynamic: names of the dynamic dimensions.
    """

    path: str
    sha256: str
    opset: int
    opsets: dict[str, int]
    ir_version: int
    nodes: int
    ops: dict[str, int]
    params: int
    macs: int | None
    macs_unknown: tuple[str, ...]
    weight_bytes: dict[str, int]
    file_bytes: int
    zstd_bytes: int | None
    inputs: dict[str, str]
    outputs: dict[str, str]
    dims: dict[str, int]
    dynamic: tuple[str, ...]


@dataclass(frozen=True)
class Opportunity:
    """What one pass would find in a model.

    Args:
        name: the pass; ``lossy`` whether it may change outputs; ``needs_data`` whether it needs
            calibration data.
        count: changes it would make, or nodes it would work on.
        reason: why nothing, when ``count`` is 0.
    """

    name: str
    lossy: bool
    needs_data: bool
    count: int
    reason: str


@dataclass(frozen=True)
class NodeStats:
    """The cost of one node: multiply-accumulates, numbers and bytes of its own weights."""

    name: str
    op_type: str
    macs: int | None
    params: int
    weight_bytes: int


@dataclass(frozen=True)
class ChannelGroup:
    """Channels, hidden units or heads of a model that are alike.

    Args:
        name: the first layer that makes them.
        channels: how many there are; ``width`` outputs of that layer for each.
        makers: layers that make them; ``readers`` that sum over them.
        reason: why none can be removed, empty where some can.
    """

    name: str
    channels: int
    width: int
    makers: tuple[str, ...]
    readers: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class InspectReport:
    """What is in a model and what could be done with it."""

    stats: ModelStats
    could: tuple[Opportunity, ...]
    nodes: tuple[NodeStats, ...] = ()
    channels: tuple[ChannelGroup, ...] = ()
