import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.graph import match
from effdl.graph.match import Mismatch, attempt, closed, expand, other, split_scalar, step
from tests.support import from_text, outputs


def graph(body: str, constants: str = "") -> ir.Model:
    head = f"<{constants}>" if constants else ""
    return from_text(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[2,3] x, float[2,3] e) => (float[2,3] y) {head} {{ {body} }}"""
    )


def values(model: ir.Model) -> dict[str, ir.Value]:
    found = {v.name: v for v in model.graph.inputs}
    found |= dict(model.graph.initializers)
    return found | {o.name: o for n in model.graph for o in n.outputs}


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[list[str], list[str], str]:
    """Lines of a graph body, declarations of constants, name of the result."""
    lines: list[str] = []
    constants: list[str] = []

    def constant(choices: st.SearchStrategy[float]) -> str:
        name = f"c{len(constants)}"
        shape = draw(st.sampled_from(["", "[1]", "[1,1]"]))
        constants.append(f"float{shape} {name} = {{{draw(choices)}}}")
        return name

    def build(level: int) -> str:
        kind = draw(
            st.sampled_from(
                ["x", "e"] if level == 0 else ["Add", "Sub", "Mul", "Div", "Neg", "Pow"]
            )
        )
        numbers = st.sampled_from([0.5, -2.0, 3.0, 0.25])
        if kind in ("x", "e"):
            return kind
        if kind == "Neg":
            args = [build(level - 1)]
        elif kind == "Div":
            args = [build(level - 1), constant(numbers)]
        elif kind == "Pow":
            args = [build(0), constant(st.sampled_from([1.0, 2.0, 3.0]))]
        else:
            args = [
                build(level - 1),
                build(level - 1) if draw(st.booleans()) else constant(numbers),
            ]
            args = draw(st.permutations(args))
        name = f"t{len(lines)}"
        lines.append(f"{name} = {kind}({', '.join(args)})")
        return name

    return lines, constants, build(depth)


@settings(deadline=None, max_examples=60)
@given(expressions())
def test_expand_is_the_polynomial_that_onnxruntime_computes(
    tree: tuple[list[str], list[str], str],
) -> None:
    lines, constants, root = tree
    model = graph("\n".join([*lines, f"y = Identity({root})"]), ", ".join(constants))
    names = values(model)
    x, e = names["x"], names["e"]
    read = attempt(expand, names[root], [x, e], 2)
    if isinstance(read, str):
        assert "higher power" in read
        return
    rng = np.random.default_rng(0)
    feed = {n: rng.uniform(-1, 1, (2, 3)).astype(np.float32) for n in "xe"}
    want = outputs(model, feed)[0]
    got = sum(
        (
            c * feed["x"].astype(float) ** i * feed["e"].astype(float) ** j
            for (i, j), c in read.terms.items()
        ),
        start=np.zeros((2, 3)),
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("t = Div(c, x)", "divides by a computed value"),
        ("t = Pow(c, x)", "exponent of Pow is computed"),
        ("t = Pow(x, h)", "exponent of Pow is 0.5"),
        ("t = Mul(x, v)", "no part of the formula"),
        ("s = Tanh(x) t = Mul(s, c)", "Tanh"),
    ],
)
def test_expand_names_what_is_no_arithmetic_of_the_atoms(line: str, reason: str) -> None:
    model = graph(
        f"{line} y = Identity(t)", "float c = {2.0}, float h = {0.5}, float[3] v = {1., 2., 3.}"
    )
    names = values(model)
    got = attempt(expand, names["t"], [names["x"]], 2)
    assert isinstance(got, str)
    assert reason in got


def test_a_constant_with_more_dimensions_than_the_operand_is_refused() -> None:
    model = graph("t = Mul(x, c) y = Identity(t)", "float[1,1,1] c = {2.0}")
    names = values(model)
    assert "may add a dimension" in str(attempt(expand, names["t"], [names["x"]], 2))
    assert "may add a dimension" in str(attempt(expand, names["t"], [names["x"]], None))


def test_step_says_why_it_cannot_go_on() -> None:
    model = graph("a = Relu(x) b = Exp(a) c = Exp(x) d = Mul(c, c) f = Add(d, b) y = Add(f, b)")
    names = values(model)
    assert step(names["c"], "Mul").outputs[0].name == "d"  # both operands of one node
    assert "goes to Exp, not to Sqrt or Pow" in str(attempt(step, names["a"], "Sqrt", "Pow"))
    assert "has 2 users" in str(attempt(step, names["b"], "Add"))
    assert "graph output" in str(attempt(step, names["y"], "Add"))


def test_split_scalar_finds_the_constant_on_either_side() -> None:
    model = graph(
        "a = Add(x, c) b = Add(c, a) d = Add(b, v) y = Add(d, d)",
        "float c = {2.0}, float[3] v = {1., 2., 3.}",
    )
    nodes = list(model.graph)
    found = [split_scalar(n) for n in nodes]
    assert [(p[0].name, p[1].name) if p else None for p in found] == [
        ("x", "c"),
        ("a", "c"),
        None,
        None,
    ]
    assert other(nodes[1], nodes[0].outputs[0]).name == "c"
    assert other(nodes[3], nodes[2].outputs[0]).name == "d"


def test_closed_names_the_user_outside() -> None:
    model = graph("a = Relu(x) b = Exp(a) c = Neg(a) y = Add(b, c)")
    nodes = list(model.graph)
    with pytest.raises(Mismatch, match="'a' is also used by Neg"):
        closed(nodes[:2], nodes[1].outputs[0])
    closed([nodes[0], nodes[1], nodes[2], nodes[3]], nodes[3].outputs[0])


def test_need_and_some_carry_the_reason() -> None:
    assert attempt(match.some, None, "nothing there") == "nothing there"
    assert attempt(match.some, 3, "nothing there") == 3
    assert attempt(match.need, False, "no") == "no"
