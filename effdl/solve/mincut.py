"""The cheapest way to part a network in two: minimum s-t cut by Dinic's algorithm.

Dinic, "Algorithm for solution of a problem of maximum flow in a network with power estimation" (1970).
Energies of yes/no choices with costs for neighbours that differ are such cuts: Kolmogorov and Zabih,
"What energy functions can be minimized via graph cuts?" (2004).
"""

from __future__ import annotations

from collections import deque

SOURCE, SINK = 0, 1


class Network:
    """A flow network whose points are numbered; ``SOURCE`` and ``SINK`` are there from the start."""

    def __init__(self) -> None:
        self._edges: list[list[int]] = [[], []]  # numbers of the edges that leave each point
        self._heads: list[int] = []
        self._rest: list[int] = []

    def point(self) -> int:
        """Add a point and return its number."""
        self._edges.append([])
        return len(self._edges) - 1

    def edge(self, tail: int, head: int, capacity: int) -> None:
        """Add an edge: ``capacity`` is paid when ``tail`` is on the source's side and ``head`` is not."""
        for a, b, c in ((tail, head, capacity), (head, tail, 0)):
            self._edges[a].append(len(self._heads))
            self._heads.append(b)
            self._rest.append(c)

    def source_side(self) -> set[int]:
        """Return the smallest set of points on the source's side of a cheapest cut."""
        while (levels := self._levels())[SINK] >= 0:
            tried = [0] * len(self._edges)
            while self._push(levels, tried):
                pass
        return {p for p, level in enumerate(levels) if level >= 0}

    def _levels(self) -> list[int]:
        levels = [-1] * len(self._edges)
        levels[SOURCE] = 0
        queue = deque([SOURCE])
        while queue:
            point = queue.popleft()
            for edge in self._edges[point]:
                head = self._heads[edge]
                if self._rest[edge] > 0 and levels[head] < 0:
                    levels[head] = levels[point] + 1
                    queue.append(head)
        return levels

    def _push(self, levels: list[int], tried: list[int]) -> bool:
        """Send flow along one shortest way; False when none is left."""
        way: list[int] = []
        point = SOURCE
        while point != SINK:
            edge = self._next(point, levels, tried)
            if edge >= 0:
                way.append(edge)
                point = self._heads[edge]
            elif not way:
                return False
            else:
                point = self._heads[way.pop() ^ 1]
                tried[point] += 1
        flow = min(self._rest[edge] for edge in way)
        for edge in way:
            self._rest[edge] -= flow
            self._rest[edge ^ 1] += flow
        return True

    def _next(self, point: int, levels: list[int], tried: list[int]) -> int:
        edges = self._edges[point]
        while tried[point] < len(edges):
            edge = edges[tried[point]]
            if self._rest[edge] > 0 and levels[self._heads[edge]] == levels[point] + 1:
                return edge
            tried[point] += 1
        return -1
