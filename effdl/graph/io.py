"""Model files: loading with every fault named, writing so that a reader never sees half a file."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from effdl.errors import ModelError, OutputError
from effdl.graph.dialects import adopt
from effdl.graph.proto import skeleton_proto, split_proto
from effdl.graph.scratch import exclusive, locked_folder, remove_abandoned
from effdl.graph.walk import subgraphs_in
from effdl.graph.weights import initializers
from effdl.upstream import all_tensors

INLINE_LIMIT = 1_900_000_000
"""Bytes of weights above which they go beside the model: a protobuf message holds 2 GiB."""
METADATA_PREFIX = "effdl."
_PLAIN_INITIALIZERS = 4
"""The IR version from which an initializer need not be a graph input."""


def load(path: str | Path) -> ir.Model:
    """Load a model; weights in external files stay memory-mapped.

    Args:
        path: an ``.onnx`` file.

    Raises:
        ModelError: missing, a directory, empty, truncated, not ONNX, invalid, or weights that are
            missing or lie outside the model's folder.
    """
    file = Path(os.path.abspath(path))  # a bare name would skip onnx_ir's path checks
    where = str(path)
    if file.is_dir():
        raise ModelError(
            "this is a folder, not a model", hint="name the .onnx file in it", where=where
        )
    try:
        if file.stat().st_size == 0:
            raise ModelError("the file is empty", where=where)
        proto = onnx.load(file, load_external_data=False)
    except FileNotFoundError:
        raise ModelError("no such file", where=where) from None
    except DecodeError:
        raise ModelError("not an ONNX model, or cut off in the middle", where=where) from None
    except OSError as e:
        raise ModelError(f"cannot be read: {e.strerror or e}", where=where) from None
    return from_proto(proto, where, file.parent)


def load_bytes(data: bytes, where: str = "stdin") -> ir.Model:
    """Load a model from the bytes of an ``.onnx`` file without external weights."""
    if not data:
        raise ModelError("no bytes: expected an ONNX model", where=where)
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError:
        raise ModelError("not an ONNX model, or cut off in the middle", where=where) from None
    return from_proto(proto, where, None)


def from_proto(proto: onnx.ModelProto, where: str, folder: Path | None) -> ir.Model:
    """Turn a protobuf message into a checked ``onnx_ir`` model."""
    if not proto.HasField("graph") or (not proto.graph.node and not proto.graph.output):
        raise ModelError("not an ONNX model: there is no graph in it", where=where)
    try:
        model = ir.from_proto(proto)
    except Exception as e:
        raise ModelError(f"invalid ONNX graph: {_one_line(_root(e))}", where=where) from e
    if model.ir_version < _PLAIN_INITIALIZERS and not _all_are_inputs(model.graph):
        model.ir_version = _PLAIN_INITIALIZERS  # ONNX Runtime takes it so, ONNX's checker does not
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
        for function in model.functions.values():
            for graph in subgraphs_in(function):
                ir.external_data.set_base_dir(graph, folder)
    _check_external(model, where, folder)
    try:
        check(model)
    except ModelError as e:
        raise ModelError(e.message, where=where) from e
    return model


def check(model: ir.Model) -> None:
    """Run ONNX's own checker on the model, at any size.

    Raises:
        ModelError: the graph is invalid.
    """
    proto = skeleton_proto(model)
    if not proto.opset_import or all(o.domain not in ("", "ai.onnx") for o in proto.opset_import):
        # The checker wants a default-domain version even where no node needs one.
        entry = proto.opset_import.add()
        entry.version = 13
    for port in (*proto.graph.input, *proto.graph.output):
        if port.type.HasField(
            "tensor_type"
        ):  # without a shape it is unknown; the checker wants one
            port.type.tensor_type.shape.SetInParent()
    adopt(proto)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as e:
        raise ModelError(f"invalid ONNX graph: {_one_line(e)}") from None


def _all_are_inputs(graph: ir.Graph) -> bool:
    return all(v.is_graph_input() for v in graph.initializers.values())


def _root(e: BaseException) -> BaseException:
    """Return what lies behind ``e``: onnx_ir wraps an error once a level."""
    while e.__cause__ is not None:
        e = e.__cause__
    return e


def _one_line(e: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(e)).strip()
    return text if len(text) <= 240 else text[:237] + "..."


def external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """Return the tensors of the model that live in files beside it."""
    tensors = (v.const_value for v in initializers(model))
    return [t for t in tensors if isinstance(t, ir.ExternalTensor)]


def _check_external(model: ir.Model, where: str, folder: Path | None) -> None:
    for tensor in external_tensors(model):
        name = str(tensor.location)
        if folder is None:
            raise ModelError(
                f"its weights are in the file '{name}', which a pipe cannot carry",
                hint="name the model's file instead of -",
                where=where,
            )
        file = Path(os.path.normpath(folder / name))
        if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)):
            raise ModelError(
                f"its weights file '{name}' is outside the model's folder", where=where
            )
        if not file.is_file():
            raise ModelError(
                f"its weights file '{name}' is missing",
                hint="keep the .onnx and its data files in one folder",
                where=where,
            )
        end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
        if file.stat().st_size < end:
            raise ModelError(
                f"its weights file '{name}' is too short: {file.stat().st_size} bytes, "
                f"'{tensor.name}' ends at {end}",
                where=where,
            )


def to_bytes(model: ir.Model) -> bytes:
    """Return the model as the bytes of an ``.onnx`` file."""
    proto = ir.to_proto(model)
    # onnx_ir repeats type and shape of each initializer as a value_info: up to 1 % of a small file.
    weights = {t.name for t in proto.graph.initializer}
    kept = [v for v in proto.graph.value_info if v.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    data: bytes = proto.SerializeToString()
    return data


def content_digest(model: ir.Model) -> str:
    """Return the SHA-256 of what the model says, in hex: its graph and weights.

    effdl's own metadata and the place of the weights (inside, or in a file beside) do not count, so
    the digest written into a model can be checked on the model.
    """
    proto, weights = split_proto(model, threshold=0)
    kept = [p for p in proto.metadata_props if not p.key.startswith(METADATA_PREFIX)]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    for tensor in proto.graph.initializer:
        tensor.ClearField("external_data")
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True))
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(memoryview(weights[name].tobytes()))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def data_files(path: Path) -> list[Path]:
    """Return the external weight files that the model file ``path`` names, without loading them."""
    proto = onnx.load(path, load_external_data=False)
    names = {e.value for t in all_tensors(proto) for e in t.external_data if e.key == "location"}
    return [path.parent / n for n in sorted(names)]


def files_size(path: Path) -> int:
    """Return the bytes of a model on disk, its external weight files included."""
    return path.stat().st_size + sum(f.stat().st_size for f in data_files(path))


class Stage:
    """A model being written: complete and readable at ``path``, not yet where it shall be.

    Its folder lies beside the goal and is locked while its owner lives, so that a later run can tell
    the leftovers of a killed one.
    """

    def __init__(self, goal: Path) -> None:
        self.goal = goal
        self._stack = ExitStack()

    def __enter__(self) -> Stage:
        try:
            self._folder = self._stack.enter_context(
                locked_folder(self.goal.parent, _prefix(self.goal))
            )
        except OSError as e:
            raise output_error(self.goal, e) from e
        self.path = self._folder / self.goal.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stack.close()

    def write(
        self, model: ir.Model, *, external: bool | None = None, max_shard_bytes: int | None = None
    ) -> None:
        """Write the model into the stage.

        Args:
            model: the model.
            external: weights in a file beside the model; None: only above ``INLINE_LIMIT``.
            max_shard_bytes: split the weights file into parts of at most this size.
        """
        size = sum(v.const_value.nbytes for v in initializers(model) if v.const_value is not None)
        beside = external if external is not None else size > INLINE_LIMIT
        # The data file is named by content: it never replaces one that the old model still names.
        data = f"{self.goal.name}.{content_digest(model)[:12]}.data" if beside else None
        try:
            if data is not None:
                model = ir.external_data.unload_from_model(
                    model.clone(),
                    self._folder,
                    data,
                    size_threshold_bytes=256,
                    max_shard_size_bytes=max_shard_bytes,
                )
            elif external_tensors(model):
                model = ir.external_data.load_to_model(model.clone())
            self.path.write_bytes(to_bytes(model))
        except OSError as e:
            raise output_error(self.goal, e) from e

    def commit(self) -> None:
        """Move the model to its goal: data files first, then the model in one rename."""
        try:
            with exclusive(self.goal.parent):
                old = _stale_candidates(self.goal)
                fresh = data_files(self.path)
                for file in (*fresh, self.path):
                    _sync(file)
                for file in fresh:
                    os.replace(file, self.goal.parent / file.name)
                os.replace(self.path, self.goal)
                _sync(self.goal.parent)
                for file in old - {self.goal.parent / f.name for f in fresh}:
                    file.unlink(missing_ok=True)
        except OSError as e:
            raise output_error(self.goal, e) from e


def save(
    model: ir.Model,
    path: str | Path,
    *,
    external: bool | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Write a model atomically: ``path`` holds the old file or the complete new one at any time.

    Args:
        model: the model.
        path: where to.
        external: weights in a file ``NAME.<content>.data`` beside the model; None: only when they do
            not fit into one protobuf message.
        max_shard_bytes: split that file into parts of at most this size.

    Raises:
        OutputError: the place cannot be written.
    """
    goal = check_goal(path)
    clean_leftovers(goal)
    with Stage(goal) as stage:
        stage.write(model, external=external, max_shard_bytes=max_shard_bytes)
        stage.commit()


def check_goal(path: str | Path) -> Path:
    """Return ``path`` as an absolute path that can be written, before any work is done.

    Raises:
        OutputError: its folder is missing or read-only, or it is a folder itself.
    """
    goal = Path(os.path.abspath(path))
    if goal.is_dir():
        raise OutputError("the output is a folder; name a file", where=str(path))
    if not goal.parent.is_dir():
        raise OutputError(
            "the output's folder does not exist", hint=f"mkdir -p {goal.parent}", where=str(path)
        )
    if not os.access(goal.parent, os.W_OK):
        raise OutputError("the output's folder cannot be written", where=str(path))
    return goal


def clean_leftovers(goal: Path) -> None:
    """Remove what killed runs left beside ``goal``: stages nobody holds, data files nobody names."""
    remove_abandoned(goal.parent, _prefix(goal))
    with suppress(OSError), exclusive(goal.parent):
        used = set()
        if goal.is_file():
            with suppress(DecodeError):  # what is there is no model: it names no data files
                used = set(data_files(goal))
        for file in _stale_candidates(goal) - used:
            file.unlink(missing_ok=True)


def _prefix(goal: Path) -> str:
    return f".{goal.name}.effdl-tmp-"


def _stale_candidates(goal: Path) -> set[Path]:
    """Data files beside ``goal`` that effdl wrote for it: NAME.<12 hex digits>.data, with shards."""
    pattern = re.compile(re.escape(goal.name) + r"\.[0-9a-f]{12}(-\d+-of-\d+)?\.data")
    return {f for f in goal.parent.iterdir() if pattern.fullmatch(f.name)}


def output_error(goal: Path, e: OSError) -> OutputError:
    """Turn a failed write into one sentence."""
    return OutputError(f"cannot be written: {e.strerror or e}", where=str(goal))


def _sync(path: Path) -> None:
    with suppress(OSError):  # some file systems cannot sync a folder
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
