"""The two orders of a pipeline's layers: the model's, in which the state holds them, and the stages'.

The state holds stacked parameters (L, ...) in the model's order, cut over `pipeline` into L / stages in a row. A stage
with v virtual stages runs v chunks that lie apart, so that interleaved schedules exchange chunks once a step on the
way in and gradients on the way out. With one virtual stage nothing moves.

Source and goal are v chunks on every stage, so the moves fall into v rounds in which every stage sends and gets one
chunk each (Koenig 1916: a regular bipartite graph is a union of perfect matchings).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Round(NamedTuple):
    """In a round stage s sends its chunk `take[s]` to the stage `goes[s]`, and puts what it gets at `put[s]`."""

    goes: tuple[int, ...]
    take: tuple[int, ...]
    put: tuple[int, ...]


def rounds(stages: int, virtual: int) -> list[Round]:
    """The exchange from the model's order, in which stage s has the chunks s v to s v + v - 1, to the stages'."""
    left = set(range(stages * virtual))
    found = []
    for _ in range(virtual):
        chunk_of = _matching(left, stages, virtual)  # by the stage that gets it
        left -= set(chunk_of)
        goes, take, put = np.zeros((3, stages), int)
        for goal, chunk in enumerate(chunk_of):
            source = chunk // virtual
            goes[source], take[source], put[goal] = goal, chunk % virtual, chunk // stages
        found.append(Round(tuple(map(int, goes)), tuple(map(int, take)), tuple(map(int, put))))
    return found


def _matching(chunks: set[int], stages: int, virtual: int) -> list[int]:
    """A chunk for every goal, no two from one source (augmenting paths)."""
    goal_of: dict[int, tuple[int, int]] = {}  # source -> (goal, chunk)

    def place(goal: int, tried: set[int]) -> bool:
        for chunk in sorted(chunks):
            source = chunk // virtual
            if chunk % stages == goal and source not in tried:
                tried.add(source)
                if source not in goal_of or place(goal_of[source][0], tried):
                    goal_of[source] = (goal, chunk)
                    return True
        return False

    for goal in range(stages):
        assert place(goal, set()), "a regular graph has a perfect matching"
    by_goal = dict(goal_of.values())
    return [by_goal[goal] for goal in range(stages)]


def to_stages(x: jax.Array, axis: str, virtual: int) -> jax.Array:
    """Inside `shard_map`: this stage's part (L / stages, ...) of the model's order -> its chunks, in their order."""
    return _exchanged(x, axis, virtual, back=False)


def from_stages(x: jax.Array, axis: str, virtual: int) -> jax.Array:
    """Undoes `to_stages`."""
    return _exchanged(x, axis, virtual, back=True)


def _exchanged(x: jax.Array, axis: str, virtual: int, *, back: bool) -> jax.Array:
    if virtual == 1:
        return x
    chunks, stage = x.reshape(virtual, -1, *x.shape[1:]), jax.lax.axis_index(axis)
    out = jnp.zeros_like(chunks)
    for turn in rounds(jax.lax.axis_size(axis), virtual):
        there = list(enumerate(turn.goes))
        take, put, goes = (
            (turn.put, turn.take, [(goal, source) for source, goal in there]) if back else (turn.take, turn.put, there)
        )
        got = jax.lax.ppermute(chunks[jnp.asarray(take)[stage]], axis, goes)
        out = out.at[jnp.asarray(put)[stage]].set(got)
    return out.reshape(x.shape)
