"""The audit: sound devices pass on any mesh, and a bit that comes out otherwise is put down to the right cause."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train import audit as module
from maxlm.train.audit import Audit, SilentCorruption, turned
from maxlm.train.compare import drawn_params
from maxlm.train.setup import make_setup, place_batch
from maxlm.train.state import initial_state
from tests.tiny import random_batch, tiny_config

MESHES = {
    "replicas": {"parallel__data": 4},
    "shards and microbatches": {"parallel__fsdp": 2, "parallel__tensor": 2, "train__accumulation": 2},
    "stages": {"parallel__pipeline": 2, "parallel__data": 2, "train__accumulation": 2},
}


def world(tmp_path, leaves):
    config = resolve(tiny_config(tmp_path, **{"parallel__data": 1} | leaves), devices=4)
    setup = make_setup(config, make_mesh(config.parallel, jax.devices()[:4]))
    params = drawn_params(setup.parts.specs, 1)
    state = jax.device_put(initial_state(config, setup.optimizer, params=params), setup.shardings)
    batch = random_batch(1)
    placed = place_batch(setup.mesh, batch.tokens.shape, lambda rows: jax.tree.map(lambda x: x[rows], batch))
    return setup, state, placed


def faulty(monkeypatch, wrong):
    """Executions, by their number, in which a gradient comes out with another bit."""
    execute, count = module._Program.__call__, [0]

    def call(self, state, batch):
        found = dict(execute(self, state, batch))
        count[0] += 1
        if wrong(self, count[0]):
            found["layers/mlp/up"] = found["layers/mlp/up"] ^ np.uint32(1)
        return found

    monkeypatch.setattr(module._Program, "__call__", call)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_sound_devices_pass_and_the_state_stays(tmp_path, monkeypatch, name):
    setup, state, batch = world(tmp_path, MESHES[name])
    before = jax.device_get(state)
    count = faulty(monkeypatch, lambda program, number: False)
    logged = []
    Audit(setup, log=logged.append).check(state, batch, step=3)
    assert count == [2] and not logged
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)


def test_every_device_does_the_work_of_another():
    mesh = make_mesh(resolve(tiny_config("x", parallel__data=2, parallel__tensor=2)).parallel, jax.devices()[:4])
    assert (turned(mesh).devices != mesh.devices).all() and turned(mesh).shape == mesh.shape


def test_processes_meet_between_compiling_and_running(tmp_path, monkeypatch):
    """One that has its program from the cache would wait for the others in a collective, which gloo gives up."""
    setup, state, batch = world(tmp_path, MESHES["replicas"])
    happened = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: happened.append("compiled") if event.endswith("backend_compile_duration") else None
    )
    monkeypatch.setattr(module, "meet", lambda where: happened.append("met"))
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda *args, **kwargs: happened.append("moved") or put(*args, **kwargs))
    program = module._Program(setup, setup.mesh)
    happened.clear()
    found = program(state, batch)
    assert happened[0] == "compiled" and happened.count("met") == 1
    assert happened[happened.index("met") :] == ["met", "moved"]
    happened.clear()
    assert not module._differing(found, program(state, batch)) and happened == ["moved"]
    # A phase of the data has other rows.
    short = jax.tree.map(lambda x: jax.device_put(x[:, :32], x.sharding), batch)
    happened.clear()
    other = program(state, short)
    assert happened[0] == "compiled" and happened[happened.index("met") :] == ["met", "moved"]
    assert module._differing(found, other) and not module._differing(other, program(state, short))
    assert not module._differing(found, program(state, batch))


def test_a_gradient_is_compared_where_the_guard_would_refuse_it(tmp_path, monkeypatch):
    """A microbatch has the noise of few rows: of an accumulating run's gradients its own is an outlier."""
    setup, state, batch = world(tmp_path, MESHES["replicas"])
    tiny = jnp.full_like(state.guard.norms, 1e-6)
    state = dataclasses.replace(state, guard=state.guard._replace(norms=tiny, accepted=jnp.int32(tiny.size)))
    flip = []

    def made(*args, **kwargs):
        own = make_setup(*args, **kwargs)

        def gradients(params, batch, scale):
            found = own.gradients(params, batch, scale)
            up = found.grads["layers"]["mlp"]["up"]
            bits = jax.lax.bitcast_convert_type(up, jnp.uint32).at[0, 0, 0].add(jnp.uint32(len(flip)))
            found.grads["layers"]["mlp"]["up"] = jax.lax.bitcast_convert_type(bits, jnp.float32)
            return found

        flip.append(None)  # every program another bit
        return dataclasses.replace(own, gradients=gradients)

    monkeypatch.setattr(module, "make_setup", made)
    there, here = (module._Program(setup, setup.mesh)(state, batch) for _ in range(2))
    assert module._differing(there, here) == ["layers/mlp/up"]


def test_faults_are_told_apart(tmp_path, monkeypatch):
    setup, state, batch = world(tmp_path, MESHES["replicas"])
    with monkeypatch.context() as once:  # the second execution alone
        faulty(once, lambda program, number: number == 2)
        with pytest.raises(SilentCorruption, match="on the devices beside them give other bits in layers/mlp/up: "):
            Audit(setup, log=print).check(state, batch, step=3)
    audit, logged = Audit(setup, log=print), []
    audit.check(state, batch, step=3)
    with monkeypatch.context() as later:  # from now on always, on the devices beside
        faulty(later, lambda program, number: program is audit._there)
        with pytest.raises(SilentCorruption, match="audit after step 6: layers/mlp/up come out differently on"):
            audit.check(state, batch, step=6)
    with monkeypatch.context() as always:  # from the beginning: that is the wiring
        wired = Audit(setup, log=logged.append)
        count = faulty(always, lambda program, number: number in (2, 4))
        wired.check(state, batch, step=3)
        assert "sums depend on the placement" in logged[0] and count == [4]
        wired.check(state, batch, step=6)
        assert count == [6]
        always.undo()
        faulty(always, lambda program, number: number == 2)
        with pytest.raises(SilentCorruption, match="on the same devices give other bits"):
            wired.check(state, batch, step=9)


def test_what_the_wiring_does_is_found_out_for_each_shape(tmp_path, monkeypatch):
    """Sums of one shape may depend on the placement where those of another do not."""
    config = resolve(tiny_config(tmp_path, parallel__data=4), devices=4)
    mesh = make_mesh(config.parallel, jax.devices()[:4])
    executed = []

    class Program:
        def __init__(self, setup, mesh):
            self.own = mesh is setup.mesh

        def __call__(self, state, batch):
            executed.append((self.own, batch.tokens.shape[1]))
            return {"the loss": np.uint32(0 if self.own else wired(batch))}

    def wired(batch):
        return batch.tokens.shape[1] == 32

    monkeypatch.setattr(module, "_Program", Program)
    logged = []
    audit = Audit(SimpleNamespace(mesh=mesh), log=logged.append)
    long, short = random_batch(1), random_batch(1, length=32)
    for batch, runs in ((long, [True, False]), (short, [True, False, True, False]), (long, [True, False])):
        executed.clear()
        audit.check(None, batch, step=1)
        assert executed == [(own, batch.tokens.shape[1]) for own in runs]
    assert len(logged) == 1
    executed.clear()
    audit.check(None, short, step=2)
    assert executed == [(True, 32), (True, 32)]
    monkeypatch.setattr(Program, "__call__", lambda self, state, batch: {"the loss": np.uint32(self.own)})
    with pytest.raises(SilentCorruption, match="come out differently on the devices beside"):
        audit.check(None, long, step=3)
