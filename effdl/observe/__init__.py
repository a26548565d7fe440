"""What calibration data shows about the tensors of a model."""

MAX_BYTES = 256 << 20
"""Bytes of activations or statistics that are held at a time, unless somebody says otherwise."""
