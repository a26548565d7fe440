"""Weights with zeros that change a layer's outputs least: alternating directions, then conjugate gradients.

A layer has groups of n outputs and K inputs each, weights W [groups, n, K] and the second moments of the
inputs H [groups, K, K]. Weights V in its place change its outputs by tr((V - W) H (V - W)^T). Among V with
a given number of zeros the best cannot be found in reasonable time; alternating between the best V near
some with zeros and the best zeros near V comes closer than deciding once (Boza 2024, "Fast and Effective
Weight Update for Pruned Large Language Models"; Meng et al. 2024, "ALPS"). Zeros of W stay zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from effdl.solve.sparsity import Mask

Float = npt.NDArray[np.floating[Any]]
Singles = npt.NDArray[np.float32]
Drop = Callable[[Singles], Mask]
"""Tells from scores, larger for what matters more, which weights become zero."""
_DAMPING = 0.01
"""Share of the mean second moment that is added to all: what shrinks the result towards W."""
_STAGES = ((0.1, 10), (0.3, 10), (1.0, 10))
"""How strongly V and its zeros are drawn together, relative to H's diagonal, and for how many rounds."""
_PATH = ((0.3, 4), (1.0, 4))
_STEPS = 15
_ENOUGH = 1e-7


def damped(second: Float, damping: float = _DAMPING) -> npt.NDArray[np.float64]:
    """Return second moments [groups, K, K] with a share of the mean of their diagonal added to it."""
    h = np.array(second, np.float64)
    diagonal = np.einsum("gkk->gk", h)
    level = diagonal.mean(1, keepdims=True)
    diagonal += damping * np.where(level > 0, level, 1.0)
    return h


def change(weight: Float, new: Float, second: Float) -> float:
    """Return tr(D H D^T) / tr(W H W^T): the squared change of the outputs, relative to them; 0 for none."""
    size = _energy(weight, second)
    return _energy(np.asarray(new, np.float64) - weight, second) / size if size > 0 else 0.0


def _energy(weight: Float, second: Float) -> float:
    return float(np.einsum("gnk,gnk->", np.asarray(weight @ second, np.float64), weight))


def admm(weight: Float, second: Float, drop: Drop) -> Singles:
    """Return the weights with the zeros that ``drop`` chooses, [groups, n, K].

    Args:
        weight: [groups, n, K].
        second: [groups, K, K].
        drop: of scores [groups, n, K], the squares of weights in units of the outputs.
    """
    state = _State(weight, damped(second))
    for rho, rounds in _STAGES:
        state.draw(state.inverse(rho), rho, rounds, drop)
    return state.weights()


def path(weight: Float, second: Float, drops: Sequence[Drop]) -> Iterator[float]:
    """Yield the relative change of the outputs with the zeros of each of ``drops``, fewer zeros first.

    Every one starts where the one before ended, so that all cost little more than ``admm`` once.
    """
    state = _State(weight, damped(second))
    inverses = [state.inverse(rho) for rho, _ in _PATH]
    for drop in drops:
        for inverse, (rho, rounds) in zip(inverses, _PATH, strict=True):
            state.draw(inverse, rho, rounds, drop)
        yield change(weight, state.weights(), second)


class _State:
    """W, V and its zeros while they are drawn together, with inputs of equal size."""

    def __init__(self, weight: Float, h: npt.NDArray[np.float64]) -> None:
        self.scale = np.sqrt(np.einsum("gkk->gk", h))[:, None, :]
        self.h = (h / (self.scale * self.scale.transpose(0, 2, 1))).astype(np.float32)
        start: Singles = (weight * self.scale).astype(np.float32)
        self.nothing = np.asarray(weight) == 0
        self.wanted = start @ self.h
        self.free, self.sparse = start, start
        self.dual = np.zeros_like(start)
        self.rho = 1.0

    def inverse(self, rho: float) -> Singles:
        inverse: Singles = np.linalg.inv(
            self.h + np.float32(rho) * np.eye(self.h.shape[1], dtype=np.float32)
        )
        return inverse

    def draw(self, inverse: Singles, rho: float, rounds: int, drop: Drop) -> None:
        self.dual *= np.float32(self.rho / rho)
        self.rho = rho
        for _ in range(rounds):
            self.free = (self.wanted + np.float32(rho) * (self.sparse - self.dual)) @ inverse
            both = self.free + self.dual
            scores = np.square(both)
            scores[self.nothing] = 0.0
            self.sparse = np.where(drop(scores) | self.nothing, np.float32(0), both)
            self.dual = both - self.sparse

    def weights(self) -> Singles:
        found: Singles = (np.where(self.sparse != 0, self.free, 0) / self.scale).astype(np.float32)
        return found


def refit(
    weight: Float, start: Float, second: Float, *, steps: int = _STEPS, damping: float = _DAMPING
) -> npt.NDArray[np.float64]:
    """Return the weights on the support of ``start`` that change the outputs least, shrunk towards W.

    Minimises tr(D H D^T) + lam |D|^2 with D = V - W over V that are zero where ``start`` is, every output by
    itself, by conjugate gradients with the diagonal as preconditioner: what is minimised never grows.

    Args:
        weight: W, [groups, n, K].
        start: weights to start from, [groups, n, K]; zeros stay zeros.
        second: H, [groups, K, K].
        steps: of the iteration, at most.
        damping: lam as a share of the mean of H's diagonal.
    """
    h = damped(second, damping)
    kept = np.asarray(start) != 0
    found = np.array(start, np.float64)
    scale = 1.0 / np.maximum(np.einsum("gkk->gk", h), np.finfo(np.float64).tiny)[:, None, :]
    residual = np.where(kept, (np.asarray(weight, np.float64) - found) @ h, 0.0)
    first = float(np.square(residual).sum())
    direction = residual * scale
    product = np.einsum("gnk,gnk->gn", residual, direction)
    for _ in range(steps):
        if float(np.square(residual).sum()) <= _ENOUGH**2 * first:
            break
        image = np.where(kept, direction @ h, 0.0)
        curve = np.einsum("gnk,gnk->gn", direction, image)
        length = np.divide(product, curve, out=np.zeros_like(product), where=curve > 0)[..., None]
        found += length * direction
        residual -= length * image
        scaled = residual * scale
        after = np.einsum("gnk,gnk->gn", residual, scaled)
        turn = np.divide(after, product, out=np.zeros_like(product), where=product > 0)[..., None]
        direction = scaled + turn * direction
        product = after
    return found
