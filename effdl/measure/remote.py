"""Outputs of a model on another machine, and whether they are what this machine computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from effdl.data.feeds import Feed, Feeds
from effdl.errors import CheckFailed, DataError, ModelError
from effdl.graph import io
from effdl.graph.scratch import scratch
from effdl.graph.walk import all_nodes
from effdl.graph.weights import weight_tensors
from effdl.measure.fidelity import Comparison, Tolerance
from effdl.measure.sending import write_feeds
from effdl.measure.verify import run_all
from effdl.report import CompareReport, OutputError, Place, ThereReport
from effdl.runtime.host import Host, open_host
from effdl.runtime.machine import this_machine
from effdl.runtime.target import Target, cores_of, parse_target
from effdl.runtime.worker.outputs import unpack

Outputs = list[dict[str, Any]]
Progress = Callable[[str, str], None]
LOW_PRECISION = 0.05
"""Largest relative L2 error between processors of an output of a quantized or float16 model, all values
taken together. Where a sum lies between two quanta kernels round to either: 2.4 % were seen between
x86 and Arm on a deep int8 model. Arm cores with float16 arithmetic add up in float16, where x86 converts
and adds up in float32: 2.2 % were seen on a SqueezeNet, none on a core without that arithmetic."""
ONE_VALUE = 0.25
"""The same of a single value, relative to it or to the root mean square of the output."""
_QUANTIZED = (
    "Quantize",
    "Dequantize",
    "DynamicQuantize",
    "QLinear",
    "QGemm",
    "QAttention",
    "ConvInteger",
    "MatMulInteger",
    "MatMulNBits",
)
_BYTES = (ir.DataType.INT8, ir.DataType.UINT8)


def outputs_on(
    host: Host,
    model: Path,
    feeds: Sequence[Feed] | Feeds,
    *,
    threads: int = 0,
    optimize: bool = True,
) -> Outputs:
    """Run a model file on a host and return its outputs, one mapping per feed in the model's order.

    Args:
        host: an open host.
        model: the file; it is sent with its weights.
        feeds: inputs; floats are cast to the precision that the model takes.
        threads: intra-op threads, 0 for ONNX Runtime's own choice.
        optimize: ORT_ENABLE_ALL; False for the graph as it is written.

    Raises:
        ModelError: it does not load or run there.
        TargetError: it is too large for the machine, or the machine was lost.
    """
    with scratch() as folder, host.worker(str(model)) as worker:
        files = write_feeds(list(feeds), folder, host)
        goal = host.output("outputs.npz")
        worker.ask(
            "run",
            model=host.send(model),
            providers=list(host.target.providers),
            threads=threads,
            feeds=files,
            output=goal,
            optimize=optimize,
        )
        outputs = unpack(str(host.fetch(goal)))
        worker.ask("remove", path=goal)
        for file in folder.glob("feed*.npz"):
            host.discard(file)
    return outputs


def compare_on(
    host: Host, reference: Path, candidate: Path, feeds: Feeds, *, rtol: Tolerance = None
) -> CompareReport:
    """Run two models on the same feeds on a host and compare their outputs.

    Args, errors: as in ``measure.fidelity.compare``.
    """
    first, second = (outputs_on(host, m, feeds) for m in (reference, candidate))
    return _report(first, second, feeds, (reference, candidate), Rule(rtol), place_of(host))


def verify_there(
    host: Host,
    model: Path,
    feeds: Feeds,
    *,
    rtol: Tolerance = None,
    expected: Outputs | None = None,
) -> CompareReport:
    """Run a model on a host and compare its outputs with those of this machine's CPU.

    Args:
        host: an open host.
        model: the file.
        feeds: inputs.
        rtol: as in ``fidelity.compare_outputs``; ``cross_rule`` when None.
        expected: the outputs here, when they are known already.

    Raises:
        ModelError: the model does not run here or there.
    """
    rule = cross_rule(io.load(model)) if rtol is None else Rule(rtol)
    if expected is None:
        expected = run_all(model, feeds, parse_target("cpu"))
    found = outputs_on(host, model, feeds)
    return _report(expected, found, feeds, (model, model), rule, place_of(host))


def verify_at(
    target: Target, host: Host | None, model: Path, feeds: Feeds
) -> tuple[CompareReport, ...]:
    """Run a model file on a target that is another machine, on each core that it stands for.

    Args:
        target: ``ssh`` or ``arm-emulated``.
        host: it, when it is open already.
        model: the file.
        feeds: inputs.

    Raises:
        CheckFailed: it does not run there.
    """
    found = []
    for core in cores_of(target):
        with ExitStack() as stack:
            place = host or stack.enter_context(open_host(core))
            try:
                found.append(verify_there(place, model, feeds))
            except ModelError as e:
                raise CheckFailed(f"the model does not run on {core.name}: {e.message}") from e
    return tuple(found)


def compare_there(
    target: Target,
    models: Sequence[Path],
    feeds: Feeds,
    *,
    rtol: Tolerance = None,
    progress: Progress | None = None,
) -> ThereReport:
    """Tell whether models compute on a target what they compute here; on each core of ``arm-emulated``.

    Args:
        target: ssh or arm-emulated.
        models: one file, or two of which the second is also compared with the first there.
        feeds: inputs that both take.
        rtol: goes before the tolerances that follow from the models' number formats.
        progress: told the place and what is done there.

    Raises:
        TargetError: the target cannot be reached.
        ModelError: a model does not run here or there.
    """
    if len(feeds) == 0:
        raise DataError("there is no sample to compare on", where=feeds.source)
    say = progress or (lambda place, what: None)
    say("here", "running")
    wanted = [run_all(m, feeds, parse_target("cpu")) for m in models]
    rules = [cross_rule(io.load(m)) if rtol is None else Rule(rtol) for m in models]
    results = []
    for place in cores_of(target):
        say(place.name, "connecting")
        with open_host(place) as host:
            there = place_of(host)
            found = []
            for model in models:
                say(place.name, f"running {model.name}")
                found.append(outputs_on(host, model, feeds))
            for model, here, got, rule in zip(models, wanted, found, rules, strict=True):
                results.append(_report(here, got, feeds, (model, model), rule, there))
            if len(models) > 1:
                pair = (models[0], models[1])
                results.append(_report(found[0], found[1], feeds, pair, Rule(rtol), there))
    return ThereReport(
        target=target.name,
        here=this_machine().cpu,
        equal=all(r.equal for r in results if r.reference == r.candidate),
        results=tuple(results),
    )


@dataclass(frozen=True)
class Rule:
    """How near the outputs of a model have to be on two processors.

    Args:
        rtol: of single values, as ``fidelity.compare_outputs`` takes it.
        rel_l2: of each output as a whole; None when single values say enough.
        notes: a sentence about it.
    """

    rtol: Tolerance = None
    rel_l2: float | None = None
    notes: tuple[str, ...] = ()


def cross_rule(model: ir.Model) -> Rule:
    """Return how near a model's outputs have to be on another processor.

    Numbers are not bit-equal between processors: sums are taken in another order. float32 keeps the
    usual tolerances on all processors tried; int8 and float16 do not, see ``LOW_PRECISION``.
    """
    outputs = [v for v in model.graph.outputs if v.dtype is not None]
    floats = [v.name or "" for v in outputs if v.dtype and v.dtype.is_floating_point()]
    if any(n.op_type.startswith(_QUANTIZED) for n in all_nodes(model)):
        # An output that is itself quantized may be one quantum off.
        names = floats + [v.name or "" for v in outputs if v.dtype in _BYTES]
        note = (
            f"quantized: held to {LOW_PRECISION:.0%} relative L2; kernels of two processors round sums "
            "to neighbouring quanta, which was seen to make 2.4 % where all was right"
        )
        if not parse_target("cpu").int8_dot:
            note += "; this machine's own 8-bit sums may saturate"
        return Rule(dict.fromkeys(names, ONE_VALUE), LOW_PRECISION, (note,))
    if any(t.dtype == ir.DataType.FLOAT16 for t in weight_tensors(model)):
        note = (
            f"float16: held to {LOW_PRECISION:.0%} relative L2; processors with float16 arithmetic add "
            "up in it, others in float32, which was seen to make 2.2 % where all was right"
        )
        return Rule(dict.fromkeys(floats, ONE_VALUE), LOW_PRECISION, (note,))
    return Rule()


def _hold(error: OutputError, rule: Rule) -> OutputError:
    """Judge an output also as a whole."""
    if rule.rel_l2 is None or not error.equal or error.rel_l2 <= rule.rel_l2:
        return error
    reason = f"relative L2 error {error.rel_l2:.2g} is above {rule.rel_l2:g}"
    return replace(error, equal=False, reason=reason)


def place_of(host: Host) -> Place:
    """Return what is known of a host."""
    machine = host.machine
    return Place(
        host.target.name,
        machine.arch,
        machine.cpu,
        machine.isa,
        machine.emulator,
        host.onnxruntime,
    )


def _report(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    feeds: Feeds,
    models: tuple[Path, Path],
    rule: Rule,
    place: Place,
) -> CompareReport:
    comparison = Comparison(rule.rtol, casts=True)
    for a, b in zip(first, second, strict=True):
        comparison.add(a, b)
    errors = tuple(_hold(e, rule) for e in comparison.result())
    cast = [f"output '{n}' is {w}: compared by value" for n, w in comparison.cast_outputs.items()]
    return CompareReport(
        reference=str(models[0]),
        candidate=str(models[1]),
        feeds=len(feeds),
        source=feeds.source,
        real=feeds.real,
        equal=all(e.equal for e in errors),
        outputs=errors,
        notes=(*rule.notes, *cast),
        place=place,
    )
