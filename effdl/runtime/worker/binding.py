"""Inputs and outputs that stay on the device, so that a time is that of the model and not of copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from effdl.runtime.worker.refusal import Refusal
from effdl.runtime.worker.session import NUMPY

if TYPE_CHECKING:
    from effdl.runtime.worker.session import Feed


class Bound:
    """One feed bound to one session: inputs copied to the device once, outputs made there.

    Args:
        session: the session.
        feed: arrays by input name.
        device: ``cpu`` or ``cuda``, as ONNX Runtime names memory.
        fixed: make the outputs now, so that all addresses stay what they are (a CUDA graph needs
            that); their shapes must be numbers then.
    """

    def __init__(
        self, session: ort.InferenceSession, feed: Feed, device: str, fixed: bool = False
    ) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._keep: list[Any] = []  # the memory that the binding points to
        for port in session.get_inputs():
            array = np.asarray(feed[port.name], order="C")
            value = ort.OrtValue.ortvalue_from_numpy(array, device, 0)
            self._keep += [array, value]
            self._binding.bind_ortvalue_input(port.name, value)
        for port in session.get_outputs():
            if fixed:
                value = _empty(port, device)
                self._keep.append(value)
                self._binding.bind_ortvalue_output(port.name, value)
            else:
                self._binding.bind_output(port.name, device, 0)
        self._binding.synchronize_inputs()

    def __call__(self) -> None:
        """Run once and wait until the device is done."""
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def outputs(self) -> list[Any]:
        """Return copies of the outputs as arrays."""
        return [v.numpy() for v in self._binding.get_outputs()]


def why_not_bound(session: ort.InferenceSession) -> str:
    """Return why the inputs and outputs of a model cannot stay on a device, empty when they can."""
    for what, ports in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for port in ports:
            if port.type not in NUMPY:
                return f"{what} '{port.name}' is a {port.type}: its copies are part of the times"
    return ""


def check_graph_feeds(session: ort.InferenceSession, feeds: list[Feed]) -> None:
    """Refuse what a CUDA graph cannot replay: dynamic outputs, several shapes, types without binding.

    Raises:
        Refusal: of the kind ``graph``.
    """
    why = why_not_bound(session)
    if why:
        raise Refusal("graph", f"a CUDA graph needs all data on the device, but {why}")
    for port in session.get_outputs():
        if not all(isinstance(d, int) for d in port.shape):
            raise Refusal(
                "graph", f"a CUDA graph needs fixed shapes: output '{port.name}' has none"
            )
    if len(feeds) > 1:
        raise Refusal("graph", f"a CUDA graph replays one feed, given are {len(feeds)}")


def _empty(port: Any, device: str) -> Any:
    shape = [int(d) for d in port.shape]
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(NUMPY[port.type]), device, 0)
