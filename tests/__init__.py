"""Import effdl first: it switches ONNX Runtime's telemetry off."""

import effdl  # noqa: F401
