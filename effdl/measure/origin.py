"""Which nodes of a model each node of the graph that ONNX Runtime runs computes.

ONNX Runtime says nothing about it, but it keeps names: a tensor that survives keeps its own, a fused
node ends with the output of its last part, a node in another layout is called after the node or the
tensor that it makes. Each such name anchors a tensor of the model to the node that computes it; what
lies between two anchors belongs to the later one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from effdl.measure.owngraph import Graph, Node, Scope

_LAYOUT = ("ReorderInput", "ReorderOutput", "MemcpyFromHost", "MemcpyToHost")
"""Op types that only ONNX Runtime puts in."""
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity")
"""Op types that it puts in too, around a node whose place or type of data it changed."""
_AROUND = ("QuantizeLinear", "DequantizeLinear", "Cast", "Identity")
"""What a fused node does besides; named last."""
_INSERTED_CAST = re.compile(r"Inserted(PrecisionFree)?Cast_")
_INLINED = "_inlfunc_"
_BRANCH = re.compile(r"_if_(then|else)_branch_(token_\d+_)?")
_PREFIXES = (_INSERTED_CAST, re.compile(r"fused "), _BRANCH)
_SUFFIX = re.compile(
    r"(_token_\d+|/duplicated|_nchwc|_nhwc|/\w*Fusion/?|_new_reshape|_pre_q|_post_dq|_transformed)$"
)
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Tanh")


@dataclass(frozen=True)
class Origins:
    """The map.

    Args:
        of: per executed node, in order: labels of the model's nodes that it computes; empty for one
            that ONNX Runtime put in.
        near: per executed node: labels of the node it works for: the writer of what a QuantizeLinear
            takes, the first reader of what another one gives; the other way round at the graph's ends.
        folded: labels of nodes that nothing computes any more: constant, or without effect.
    """

    of: tuple[tuple[str, ...], ...]
    near: tuple[tuple[str, ...], ...]
    folded: tuple[str, ...]


def map_origins(own: Graph, executed: Graph) -> Origins:
    """Map the nodes of ``executed`` to those of the model ``own``.

    Every node of ``own`` is computed by one executed node, or is folded; copies that ONNX Runtime made
    of a node name it too.
    """
    index = _Index(own)
    claims = _Claims(index, executed)
    claims.take_cones()
    claims.take_rest()
    of = claims.labels()
    near = tuple(_near(executed.nodes, of))
    folded = tuple(n.label for n in own.nodes if id(n) not in claims.owner)
    return Origins(tuple(of), near, folded)


class _Index:
    """Looks up nodes and tensors of the model."""

    def __init__(self, own: Graph) -> None:
        self.own = own
        self.by_name: dict[str, Node] = {}
        self.makers: dict[str, list[Node]] = {}
        self.users: dict[str, list[Node]] = {}
        for node in own.nodes:
            if node.name:
                self.by_name.setdefault(node.name, node)
            for output in node.outputs:
                if output:
                    self.makers.setdefault(output, []).append(node)
            for name in node.inputs:
                self.users.setdefault(name, []).append(node)

    def maker(self, tensor: str, scope: Scope | None = None) -> Node | None:
        """Return the node that makes ``tensor`` as seen from ``scope``, any that does when None."""
        found = self.makers.get(tensor, ())
        if scope is None:
            return found[0] if found else None
        seen = [n for n in found if scope[: len(n.scope)] == n.scope]
        return max(seen, key=lambda n: len(n.scope), default=None)

    def named(self, name: str) -> Node | None:
        """Return the node that a name of ONNX Runtime's was made from: of a node, or of its output."""
        inlined = _BRANCH.match(name)  # such a node is called after its op type, not its name
        for candidate in _stems(name):
            node = self.by_name.get(candidate) or self.maker(candidate)
            if node is not None and (node.scope or not inlined):
                return node
        return None

    def constant(self, kept: set[str]) -> set[int]:
        """Return the nodes that depend on weights and on fixed shapes only.

        DequantizeLinear is none: ONNX Runtime leaves it to be fused. A shape is fixed where nothing
        named in ``kept`` computes it.
        """
        found: set[int] = set()
        for node in self.own.nodes:
            if node.op_type == "DequantizeLinear" or node.op_type.startswith("Random"):
                continue
            if kept.intersection((node.name, *node.outputs)):
                continue
            fixed = node.op_type in ("Shape", "Size")
            if fixed or all(self._is_constant(i, node.scope, found) for i in node.inputs):
                found.add(id(node))
        return found

    def _is_constant(self, tensor: str, scope: Scope, found: set[int]) -> bool:
        maker = self.maker(tensor, scope)
        return id(maker) in found if maker is not None else tensor in self.own.constants


def _stems(name: str) -> Iterator[str]:
    """Yield a name, then what is left of it without the parts that ONNX Runtime adds."""
    todo, seen = [name], set()
    while todo:
        stem = todo.pop(0)
        if not stem or stem in seen:
            continue
        seen.add(stem)
        yield stem
        todo.append(_SUFFIX.sub("", stem))
        todo += [prefix.sub("", stem, count=1) for prefix in _PREFIXES if prefix.match(stem)]


class _Claims:
    """Who computes what: executed nodes by number, the model's nodes by identity."""

    def __init__(self, index: _Index, executed: Graph) -> None:
        self.index = index
        self.executed = executed.nodes
        self.owner: dict[int, int] = {}
        self.copies: dict[int, Node] = {}
        self.anchored: dict[tuple[int, str], int] = {}
        real = [n for n in executed.nodes if not self._is_inserted(n)]
        names = {n.name for n in real} | {o for n in real for o in n.outputs}
        self.kept = {stem for name in names for stem in _stems(name)}
        self.folded = index.constant(self.kept)
        for name in executed.constants:
            maker = index.maker(name)
            if maker is not None and maker.op_type != "DequantizeLinear":
                self.folded.add(id(maker))
        self.starts = [self._anchor(k, node) for k, node in enumerate(self.executed)]

    def _anchor(self, k: int, node: Node) -> list[Node]:
        """Anchor what executed node ``k`` makes; returns the model's nodes that make it."""
        targets = [(m, o) for m, o in self._targets(node) if id(m) not in self.folded]
        free = [(m, o) for m, o in targets if (id(m), o) not in self.anchored]
        if targets and not free:
            maker = targets[0][0]
            if maker.op_type == node.op_type and self.index.named(node.name) is maker:
                self.copies[k] = maker
        for maker, output in free:
            self.anchored[id(maker), output] = k
        return list(dict.fromkeys(m for m, _ in free))

    def _is_inserted(self, node: Node) -> bool:
        """Whether ONNX Runtime put the node in to move or cast data."""
        if node.op_type in _LAYOUT:
            return True
        if node.op_type not in _MOVES or node.name in self.index.by_name:
            return False
        named = self.index.named(node.name)
        makers = [self.index.maker(o) for o in node.outputs if o]
        return all(m is None or m.op_type != node.op_type for m in (named, *makers))

    def _targets(self, node: Node) -> list[tuple[Node, str]]:
        index = self.index
        if self._is_inserted(node):
            return []
        made = [(index.maker(o), o) for o in node.outputs if o]
        direct = [(m, o) for m, o in made if m is not None]
        if direct:
            return direct
        if _INLINED in node.name:
            return []
        stems = (index.named(name) for name in (*node.outputs, node.name) if name)
        named = next((m for m in stems if m is not None), None)
        if named is None:
            return []
        return [self._forward(node, named, o) for o in named.outputs if o]

    def _forward(self, executed: Node, node: Node, output: str) -> tuple[Node, str]:
        """Go on to what was taken into a node after it was moved: sum, activation, QuantizeLinear."""
        adds = (executed.op_type == "Conv" and executed.arity > 3) or "Gemm" in executed.op_type
        while output not in self.index.own.results:
            users = self.index.users.get(output, ())
            if len(users) != 1 or not users[0].outputs:
                break
            after = users[0]
            if after.name in self.kept or after.outputs[0] in self.kept:
                break
            if after.op_type in ("Add", "Sum") and adds:
                adds = False
            elif after.op_type not in (*_ACTIVATIONS, "QuantizeLinear"):
                break
            node, output = after, after.outputs[0]
            if node.op_type == "QuantizeLinear":
                break
        return node, output

    def take_cones(self) -> None:
        """Give every executed node what lies before its anchors, up to the next ones."""
        for k, makers in enumerate(self.starts):
            todo = list(makers)
            while todo:
                node = todo.pop()
                if id(node) in self.owner or id(node) in self.folded:
                    continue
                self.owner[id(node)] = k
                if node.op_type == "If" and self.executed[k].op_type != "If":
                    todo += self._taken_branch(node, self.executed[k])
                for name in node.inputs:
                    maker = self.index.maker(name, node.scope)
                    if maker is not None and (id(maker), name) not in self.anchored:
                        todo.append(maker)

    def _taken_branch(self, node: Node, executed: Node) -> list[Node]:
        """Return what makes the outputs of the branch that ONNX Runtime put in place of an If.

        The other branch is folded.
        """
        anchors = {key for key, _ in self.anchored}
        mark = _BRANCH.match(executed.name)
        taken: list[Node] = []
        for scope, results in node.bodies.items():
            inside = [n for n in self.index.own.nodes if n.scope[: len(scope)] == scope]
            marked = mark is not None and scope[-1].endswith(f"/{mark[1]}_branch")
            if marked or (mark is None and any(id(n) in anchors for n in inside)):
                taken += [m for r in results if (m := self.index.maker(r, scope)) is not None]
            else:
                self.folded.update(id(n) for n in inside)
        return taken

    def take_rest(self) -> None:
        """Give what is left, and has an effect, to who computes its inputs, or else to its reader."""
        self._fold_readers_of_nothing()
        alive = self._alive()
        left = [
            n
            for n in self.index.own.nodes
            if id(n) not in self.owner and id(n) not in self.folded and id(n) in alive
        ]
        for node in left:
            makers = (self.index.maker(i, node.scope) for i in node.inputs)
            owners = (self.owner.get(id(m)) for m in makers if m is not None)
            owner = next((o for o in owners if o is not None), None)
            if owner is not None:
                self.owner[id(node)] = owner
        for node in reversed([n for n in left if id(n) not in self.owner]):
            users = (u for o in node.outputs for u in self.index.users.get(o, ()))
            owners = (self.owner.get(id(u)) for u in users)
            owner = next((o for o in owners if o is not None), None)
            if owner is not None:
                self.owner[id(node)] = owner

    def _fold_readers_of_nothing(self) -> None:
        """Fold what only folded nodes read, such as the Shape of a tensor whose shape is fixed."""
        for node in reversed(self.index.own.nodes):
            if id(node) in self.owner or self.index.own.results.intersection(node.outputs):
                continue
            users = [u for o in node.outputs for u in self.index.users.get(o, ())]
            if users and all(id(u) in self.folded for u in users):
                self.folded.add(id(node))

    def _alive(self) -> set[int]:
        """Nodes that an output of the model depends on; all of those in subgraphs."""
        index = self.index
        inner = [n for n in index.own.nodes if n.scope]
        todo = [m for r in index.own.results if (m := index.maker(r, ())) is not None] + inner
        alive: set[int] = set()
        while todo:
            node = todo.pop()
            if id(node) in alive:
                continue
            alive.add(id(node))
            makers = (index.maker(i, node.scope) for i in node.inputs)
            todo += [m for m in makers if m is not None]
        return alive

    def labels(self) -> list[tuple[str, ...]]:
        """Return the labels per executed node, in the order of the model, the main work first."""
        parts: list[list[Node]] = [[] for _ in self.executed]
        for node in self.index.own.nodes:
            owner = self.owner.get(id(node))
            if owner is not None:
                parts[owner].append(node)
        for k, node in self.copies.items():
            parts[k].append(node)
        readers = _readers(self.executed)
        for k in reversed(range(len(parts))):
            if not parts[k] and _is_part(self.executed[k]):
                parts[k] = next((parts[r] for r in readers[k] if parts[r]), [])
        for k, found in enumerate(parts):
            work = self.executed[k].op_type
            found.sort(key=lambda n: (n.op_type in _AROUND, n.op_type not in work))
        return [tuple(dict.fromkeys(n.label for n in found)) for found in parts]


def _is_part(node: Node) -> bool:
    """Whether a node of unknown origin does a part of what its reader is for."""
    names = (node.name, *node.outputs)
    return any(_INLINED in n for n in names) or node.op_type not in (*_LAYOUT, *_MOVES, *_AROUND)


def _readers(nodes: list[Node]) -> list[list[int]]:
    """Return per node the numbers of those that read its outputs."""
    by_input: dict[str, list[int]] = {}
    for k, node in enumerate(nodes):
        for name in node.inputs:
            by_input.setdefault(name, []).append(k)
    return [[r for o in node.outputs if o for r in by_input.get(o, ())] for node in nodes]


def _near(nodes: list[Node], of: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield the labels of the neighbour that each node works for."""
    readers = _readers(nodes)
    writer = {o: k for k, node in enumerate(nodes) for o in node.outputs if o}

    def before(k: int) -> int | None:
        return writer.get(nodes[k].inputs[0]) if nodes[k].inputs else None

    def after(k: int) -> int | None:
        return next(iter(readers[k]), None)

    for k, node in enumerate(nodes):
        ways = (before, after) if node.op_type == "QuantizeLinear" else (after, before)
        yield next((names for way in ways if (names := _first(k, way, of))), ())


def _first(
    start: int, way: Callable[[int], int | None], of: list[tuple[str, ...]]
) -> tuple[str, ...]:
    """Return the labels of the first node on a way through the graph that has some."""
    at = way(start)
    while at is not None and not of[at]:
        at = way(at)
    return of[at] if at is not None else ()
