"""Versions of the packages that decide results."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from effdl import __version__

_PACKAGES = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of effdl and of the packages it computes with, those that are there."""
    found = {"effdl": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
