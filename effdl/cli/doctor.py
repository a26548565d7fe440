"""``effdl doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from effdl.cli.options import Json, Python, target_spec


def doctor(
    target: Annotated[
        str, typer.Option("--target", help="cpu: this machine; or ssh:HOST, arm-emulated.")
    ] = "cpu",
    python: Python = None,
    peaks: Annotated[
        bool, typer.Option("--peaks", help="Measure what matrix products and memory reach (6 s).")
    ] = False,
    json: Json = False,
) -> None:
    """Show versions, processor, providers, and what is wrong; here, or on another machine.

    Also the integer format that quantize_static chooses for the processor, and why.
    """
    from dataclasses import replace

    from effdl.measure.roofline import of_machine
    from effdl.render import doctor as render
    from effdl.render.console import print_json
    from effdl.report import to_json
    from effdl.runtime.doctor import doctor as examine
    from effdl.runtime.target import parse_target

    place = parse_target(target_spec(target, python))
    report = replace(examine(place), peaks=of_machine(place, measure=peaks))
    if json:
        print_json(to_json(report))
    else:
        render.print_doctor(report)
