"""``effdl doctor``."""

from __future__ import annotations

from effdl.cli.options import Json


def doctor(json: Json = False) -> None:
    """Show versions, processor, providers, and what is wrong.

    Also the integer format that quantize_static chooses for this processor, and why.
    """
    from effdl.render import doctor as render
    from effdl.render.console import print_json
    from effdl.report import to_json
    from effdl.runtime.doctor import doctor as examine

    report = examine()
    if json:
        print_json(to_json(report))
    else:
        render.print_doctor(report)
