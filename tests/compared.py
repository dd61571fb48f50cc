"""Two computations of a step, held against one another."""

from maxlm.train.compare import Computed, distances


def too_far(got: Computed, expected: Computed) -> set[str]:
    """The names of losses, and the paths of gradients, that are farther away than allowed."""
    return {distance.what for distance in distances(got, expected) if distance.share > 1}
