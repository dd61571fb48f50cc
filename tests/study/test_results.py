"""When a run counts as diverged: for good, so it must not be for what chance alone does."""

import numpy as np

from maxlm.study.results import divergence


def run(losses):
    return [{"loss": float(loss), "accepted": True} for loss in losses]


def curve(steps, seed, *, scatter=0.15):
    """Losses of batches of a few hundred bytes: falling to 1.3, each with its scatter."""
    rng = np.random.default_rng(seed)
    return (1.3 + 3.0 * np.exp(-np.arange(steps) / (0.1 * steps))) * (1 + scatter * rng.standard_normal(steps))


def test_short_sound_runs_of_small_batches_have_not_diverged():
    for steps in (20, 40, 390, 3000):
        assert not [seed for seed in range(200) if divergence(run(curve(steps, seed)), 1.3, 264)]


def test_a_rise_at_the_end_a_late_jump_and_a_held_out_loss_above_chance_have():
    for steps in (390, 3000):
        losses = curve(steps, 0)
        rise = losses.copy()
        rise[-steps // 5 :] *= np.linspace(1.0, 1.8, rise[-steps // 5 :].size)
        jump = losses.copy()
        jump[-steps // 10 :] += 2.0
        for bad in (rise, jump):
            assert divergence(run(bad), 1.3, 264).startswith("the training loss ended at ")
    assert divergence(run(curve(390, 0)), 6.0, 264).startswith("the held-out loss 6.000 is above")
    assert "not finite" in divergence(run(curve(390, 0)), None, 264)
