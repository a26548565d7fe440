import pytest

from effdl.graph import io
from effdl.passes.fuse.biasgelu import FuseBiasgelu
from tests.support import assert_same, from_text, op_counts, run_pass

MS = "com.microsoft."


def text(body: str, *, bias: str = "3", dtype: str = "float", extra: str = "") -> str:
    more = f", {dtype}[B,3] z" if extra else ""
    numbers = "0.5, -1.0, 0.25" if bias.endswith("3") else "0.5"
    return f"""<ir_version: 9, opset_import: ["": 20, "com.microsoft": 1]>
    g ({dtype}[B,3] i) => ({dtype}[B,3] y{more}) <{dtype}[{bias}] b = {{{numbers}}}>
    {{ x = Neg(i) {body} {extra} y = Neg(r) }}"""


@pytest.mark.parametrize("add", ["a = Add(x, b)", "a = Add(b, x)"])
@pytest.mark.parametrize(
    ("gelu", "op"),
    [
        ("Gelu(a)", "BiasGelu"),
        ('Gelu<approximate = "tanh">(a)', "FastGelu"),
        (MS + "Gelu(a)", "BiasGelu"),
        (MS + "FastGelu(a)", "FastGelu"),
    ],
)
def test_fused(add: str, gelu: str, op: str) -> None:
    model = from_text(text(f"{add} r = {gelu}"))
    before = model.clone()
    changes, log = run_pass(FuseBiasgelu(), model)
    assert (changes, log.skipped) == (1, [])
    assert op_counts(model) == {"Neg": 2, op: 1}
    assert_same(before, model)
    after = io.to_bytes(model)
    assert run_pass(FuseBiasgelu(), model)[0] == 0
    assert io.to_bytes(model) == after


BODY = "a = Add(x, b) r = Gelu(a)"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (text(BODY, bias="1"), "no vector of the last axis"),
        (text(BODY, bias="1,3"), "no vector of the last axis"),
        (text(BODY, extra="z = Exp(a)"), "'a' is also used by Exp"),
        (
            text(BODY.replace("a", "z", 1).replace("(a)", "(z)"), extra=" "),
            "is also a graph output",
        ),
        (text(BODY, dtype="double"), "is DOUBLE"),
    ],
)
def test_near_misses_are_left_with_the_reason(model: str, reason: str) -> None:
    loaded = from_text(model)
    before = io.to_bytes(loaded)
    changes, log = run_pass(FuseBiasgelu(), loaded)
    assert changes == 0
    assert io.to_bytes(loaded) == before
    assert reason in log.skipped[0][1]


@pytest.mark.parametrize(
    "body", ["r = Gelu(x)", "a = Add(x, i) r = Gelu(a)", MS.join(["r = ", "FastGelu(x, b)"])]
)
def test_no_candidates(body: str) -> None:
    changes, log = run_pass(FuseBiasgelu(), from_text(text(body)))
    assert (changes, log.skipped) == (0, [])
