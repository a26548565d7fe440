"""effdl: make an ONNX model smaller and faster, prove that it still computes the right thing.

The verbs of the command line, for scripts. Nothing heavy is imported before one is used.

>>> import effdl
>>> report = effdl.optimize("m.onnx", recipe="lossless", output="o.onnx")  # doctest: +SKIP
"""

from __future__ import annotations

__version__ = "0.1.0"
