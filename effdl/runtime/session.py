"""ONNX Runtime sessions: opened quietly, on the provider that was asked for or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from google.protobuf.message import DecodeError

from effdl.errors import ModelError, TargetError
from effdl.graph.io import files_size
from effdl.graph.proto import folder_of, split_proto
from effdl.graph.weights import weight_tensors
from effdl.runtime.target import Target, check_available, parse_target

if TYPE_CHECKING:
    import onnxruntime as ort

Array = npt.NDArray[np.generic]
PREPACK_LIMIT = 1 << 28
"""Bytes of weights above which ONNX Runtime may not keep a second, repacked copy of them: these
sessions check outputs and collect statistics, their speed is not what is measured."""
_FOLDER = "session.model_external_initializers_file_folder_path"
_FATAL = 4
_EXACT = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""Products of float32 in float32: TF32, the default, rounds them to 10 bits, an error in which that of
a pass would drown. What is timed runs with the default."""
_UNKNOWN_OP = re.compile(
    r"(?:Fatal error: |: )?([\w.]*):(\w+)\([-\d]*\) is not a registered function/op"
)
_NO_KERNEL = re.compile(
    r"Could not find an implementation for (\w+)\((\d+)\)(?: node with name '([^']*)')?"
)


@dataclass(frozen=True)
class Port:
    """A graph input or output as ONNX Runtime sees it.

    Args:
        name: its name.
        shape: integers for fixed dimensions, names or None for dynamic ones.
        dtype: the numpy dtype, None for sequences, maps and optionals.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[Any] | None


class Session:
    """A model that is loaded and can be run.

    Use ``open_session`` to make one.
    """

    def __init__(self, raw: ort.InferenceSession, keep: Sequence[object] = ()) -> None:
        self.raw = raw
        self._keep = keep  # weights the session reads from our memory
        self.inputs = [_port(p) for p in raw.get_inputs()]
        self.outputs = [_port(p) for p in raw.get_outputs()]

    def run(self, feed: Mapping[str, Array]) -> dict[str, Any]:
        """Run one feed; returns an array (or list, map, None) per graph output.

        Raises:
            ModelError: ONNX Runtime refused the feed or failed while computing.
        """
        try:
            values = self.raw.run(None, dict(feed))
        except Exception as e:  # ONNX Runtime raises half a dozen unrelated classes
            raise ModelError(f"ONNX Runtime cannot run the model: {_short(e)}") from e
        return {p.name: v for p, v in zip(self.outputs, values, strict=True)}


def open_session(
    source: ir.Model | Path,
    target: Target | None = None,
    *,
    threads: int | None = None,
    optimize: bool = True,
) -> Session:
    """Open a model on the target.

    Args:
        source: a model in memory (its weights are not copied) or a file.
        target: where; this machine's CPU when None.
        threads: intra-op threads; the target's own number when None, 0 for ONNX Runtime's choice.
        optimize: ORT_ENABLE_ALL; False for ORT_DISABLE_ALL, the graph as it is written.

    Raises:
        ModelError: the model does not load; names the operator and domain that are missing.
        TargetError: the provider is absent or fell back to the CPU.
    """
    import onnxruntime as ort

    target = target or parse_target("cpu")
    check_available(target)
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = target.threads if threads is None else threads
    # Between runs numpy computes, on the cores on which the threads would go on spinning.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        if optimize
        else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    if _weight_bytes(source) > PREPACK_LIMIT:
        options.add_session_config_entry("session.disable_prepacking", "1")
    keep: list[object] = []
    if isinstance(source, ir.Model):
        folder = _weights_folder(source)
        if folder is not None:  # ONNX Runtime maps these files itself; handed over, it copies them
            options.add_session_config_entry(_FOLDER, folder)
        proto, weights = split_proto(source, on_disk=folder)
        for name in [n for n in weights if _unused(source.graph.initializers[n])]:
            # ONNX Runtime drops them first, then fails to find them.
            del weights[name]
            proto.graph.initializer.remove(
                next(t for t in proto.graph.initializer if t.name == name)
            )
        arrays = {name: np.ascontiguousarray(t.numpy()) for name, t in weights.items()}
        values = [ort.OrtValue.ortvalue_from_numpy(a) for a in arrays.values()]
        keep = [arrays, values]
        options.add_external_initializers(list(arrays), values)
        payload: bytes | str = proto.SerializeToString()
    else:
        payload = str(source)
    try:
        providers = list(target.providers)
        told = [_EXACT.get(p, {}) for p in providers]
        raw = ort.InferenceSession(payload, options, providers=providers, provider_options=told)
    except Exception as e:  # ONNX Runtime raises half a dozen unrelated classes
        raise load_error(e) from e
    got = raw.get_providers()[0]
    if got != target.providers[0]:
        raise TargetError(
            f"asked for {target.providers[0]}, but the session runs on {got}",
            hint="see `effdl doctor`: a driver or library is missing",
        )
    return Session(raw, keep)


def _unused(value: ir.Value) -> bool:
    return not value.uses() and not value.is_graph_output() and not value.is_graph_input()


def _weights_folder(model: ir.Model) -> str | None:
    """Return the folder of the model's external weights, None when a file of them is gone.

    A file may be replaced while the model lives: its memory map stays, and is handed over then.
    """
    files = {
        t.path: folder_of(t) for t in weight_tensors(model) if isinstance(t, ir.ExternalTensor)
    }
    if not all(os.path.isfile(f) for f in files):
        return None
    return next(iter(files.values()), None)


def _weight_bytes(source: ir.Model | Path) -> int:
    if isinstance(source, ir.Model):
        return sum(t.nbytes for t in weight_tensors(source))
    try:
        return files_size(source)
    except (OSError, DecodeError):  # no model: ONNX Runtime will say so
        return 0


def load_error(e: Exception) -> ModelError:
    """Turn ONNX Runtime's refusal of a model into one sentence that names what is missing."""
    text = str(e)
    if m := _UNKNOWN_OP.search(text):
        domain = m[1] or "ai.onnx"
        return ModelError(
            f"this onnxruntime has no operator '{m[2]}' of domain '{domain}'",
            hint="passes and commands that need not run the model still work on it",
        )
    if m := _NO_KERNEL.search(text):
        node = f" (node '{m[3]}')" if m[3] else ""
        return ModelError(f"ONNX Runtime has no kernel for {m[1]} of opset {m[2]} here{node}")
    return ModelError(f"ONNX Runtime cannot load the model: {_short(e)}")


def _short(e: Exception) -> str:
    text = re.sub(r"\s+", " ", str(e)).strip()
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/\S*?/(onnxruntime/\S+)", r"\1", text)
    return text if len(text) <= 300 else text[:297] + "..."


_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
} | {f"tensor({k}{b})": np.dtype(f"{k}{b}") for k in ("int", "uint") for b in (8, 16, 32, 64)}


def _port(arg: Any) -> Port:
    dtype = _DTYPES.get(arg.type)
    return Port(arg.name, tuple(arg.shape or ()), None if dtype is None else np.dtype(dtype))
