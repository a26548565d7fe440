"""How near to a machine's peaks models run, as rows of text."""

from __future__ import annotations

from effdl.report import BenchReport, BenchResult, Peaks


def rate(m: BenchResult) -> str:
    """``55.2``: achieved GFLOP/s, ``-`` when unknown."""
    return "-" if m.gflops is None else f"{m.gflops:.3g}"


def share(m: BenchResult) -> str:
    """``56%``: of the peak for the model's number formats."""
    return "-" if m.peak_share is None else f"{m.peak_share:.0%}"


def energy(m: BenchResult) -> str:
    """``12.3 mJ``."""
    if m.energy_mj is None:
        return "-"
    return f"{m.energy_mj:.3g} mJ" if m.energy_mj < 1000 else f"{m.energy_mj / 1000:.3g} J"


def peaks_line(known: Peaks) -> str:
    """``fp32 110 GFLOP/s, int8 417 GOP/s, memory 30.1 GB/s``."""
    parts = [
        f"fp32 {known.fp32_gflops:.3g} GFLOP/s",
        *([f"fp16 {known.fp16_gflops:.3g} GFLOP/s"] if known.fp16_gflops else []),
        *([f"int8 {known.int8_gops:.3g} GOP/s"] if known.int8_gops else []),
        f"memory {known.bandwidth:.3g} GB/s",
        *([f"cache {known.cache_bandwidth:.3g} GB/s"] if known.cache_bandwidth else []),
    ]
    return ", ".join(parts)


def sources(report: BenchReport) -> list[str]:
    """Return what the numbers of a bench on rates and energy stand for."""
    said = []
    if report.peaks is not None:
        said.append(f"measured peaks: {peaks_line(report.peaks)}")
    if any(m.energy_mj is not None for m in report.models):
        said.append(f"energy of one inference: {report.energy}, idle power included")
    return said
