"""Versions of the packages that decide results."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from effdl import __version__

_PACKAGES = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of effdl and of the packages it computes with, those that are there."""
    found = {package: installed(package) for package in _PACKAGES}
    return {"effdl": __version__} | {k: v for k, v in found.items() if v}


def installed(package: str) -> str:
    """Return the version of an installed package, empty when it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
