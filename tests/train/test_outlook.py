"""What follows from a config alone: of a run with phases, the steps that take most, and what all of them take."""

import dataclasses

import pytest

from maxlm.config import PhaseConfig
from maxlm.model.flops import ledger
from maxlm.resolve import resolve
from maxlm.train.outlook import Stretch, at_heaviest, equal_steps, heaviest, run_stretches, run_tokens
from tests.tiny import tiny_config


def phased(**phases):
    config = tiny_config("corpus", train__steps=100, data__sequence_length=16, data__batch_size=8)
    return resolve(dataclasses.replace(config, data=dataclasses.replace(config.data, phases=phases)), devices=1)


def test_the_heaviest_steps_have_the_most_tokens_and_of_those_the_longest_rows():
    config = phased(
        long=PhaseConfig(from_step=90, sequence_length=64, batch_size=2),
        wide=PhaseConfig(from_step=40, batch_size=16),
        same=PhaseConfig(from_step=60, sequence_length=32, batch_size=8),
    )
    assert run_stretches(config) == [
        Stretch(0, 40, 8, 16),
        Stretch(40, 20, 16, 16),
        Stretch(60, 30, 8, 32),
        Stretch(90, 10, 2, 64),
    ]
    assert heaviest(config) == Stretch(60, 30, 8, 32)
    assert run_tokens(config) == 40 * 128 + 20 * 256 + 30 * 256 + 10 * 128
    alone = at_heaviest(config)
    assert (alone.data.batch_size, alone.data.sequence_length, dict(alone.data.phases)) == (8, 32, {})
    assert alone.model == config.model and at_heaviest(phased()) == phased()


def test_a_run_takes_the_flops_of_its_phases():
    config = phased(long=PhaseConfig(from_step=75, sequence_length=64))
    short, long = (ledger(config.model, sequence_length=length).causal_exact for length in (16, 64))
    assert long > short
    assert equal_steps(config) == pytest.approx(25 + 75 * 16 * short / (64 * long))
    assert equal_steps(phased()) == pytest.approx(100)
