"""Replay: a step again, and whether the hardware, the data or the numbers were at fault. Each fault is put there."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from maxlm.checkpoint.reader import CheckpointReader
from maxlm.cli import main
from maxlm.errors import UserError
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import as_config_dict, resolve
from maxlm.train import replay as module
from maxlm.train.first import other_weights, settle_weights
from maxlm.train.home import Home, first_start
from maxlm.train.metrics import FILE_NAME, read_metrics
from maxlm.train.replay import replay
from maxlm.train.run import train
from maxlm.train.setup import Setup, make_setup
from tests.tiny import tiny_config, write_corpus

STEPS = 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A whole run, its data in its own folder; norms are not computed by its program."""
    folder = tmp_path_factory.mktemp("replay")
    config = tiny_config(
        write_corpus(folder / "corpus"),
        train__steps=STEPS,
        train__norms_every=0,
        train__compilation_cache=str(folder / "xla"),
        checkpoint__every_steps=3,
    )
    train(config, folder / "whole", log=lambda _: None)
    return folder


def copied(runs, name):
    shutil.copytree(runs / "whole", runs / name)
    prepared = runs / name / "data" / "prepared.json"
    prepared.write_text(prepared.read_text().replace(str(runs / "whole"), str(runs / name)))
    return runs / name


def rewritten(workdir, step, **values):
    """metrics.jsonl with other figures for a step."""
    lines = [json.loads(line) for line in (workdir / FILE_NAME).read_text().splitlines()]
    for record in lines:
        if record["kind"] == "step" and record["step"] == step:
            record.update(values)
    (workdir / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_an_older_version_recorded_is_named_as_what_it_is(tmp_path):
    config, said = tiny_config(tmp_path), []
    recorded = as_config_dict(resolve(config)).to_dict()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(recorded | {"gone": {"once": 1}}))
    found = module._config(tmp_path, log=said.append)
    assert found.parallel.data == jax.device_count() and found.optim == config.optim
    assert said == ["the run was recorded with gone, which this version has no more"]
    path.write_text(json.dumps(recorded | {"model": recorded["model"] | {"vocab_size": 2}}))
    with pytest.raises(UserError, match="(?s)this version refuses what .*config.json records.*model.vocab_size is 2"):
        module._config(tmp_path, log=said.append)
    path.write_text(json.dumps(recorded | {"parallel": {"data": 2}}))
    assert module._config(tmp_path, log=said.append).parallel.data == jax.device_count()
    assert len(said) == 2 and "does not fit 8 devices" in said[1]


def test_a_sound_step_gives_the_same_bits_and_is_told_to_people_and_programs(runs, capsys):
    before = {path: path.read_bytes() for path in (runs / "whole").rglob("*") if path.is_file()}
    assert main(["replay", f"--workdir={runs / 'whole'}", "--step=5", f"--json={runs / 'found.json'}"]) == 0
    out = capsys.readouterr().out
    assert "nothing: the step gives the same bits as then, twice" in out and "step 5: nothing" in out
    found = json.loads((runs / "found.json").read_text())
    assert found["verdict"] == "nothing" and found["start"] == 3 and not found["differing"]
    recorded = next(record for record in read_metrics(runs / "whole", "step") if record["step"] == 5)
    assert [figures["loss"] for figures in found["executed"]] == [recorded["loss"]] * 2
    assert len(found["batch"]["tiny"]) == 8
    assert len(found["norms"]["activations"]["residual"]) == 2 and min(found["norms"]["activations"]["residual"]) > 0
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_a_loss_that_was_written_down_otherwise_is_put_down_to_the_hardware_of_then(runs):
    workdir = copied(runs, "then")
    recorded = next(record for record in read_metrics(workdir, "step") if record["step"] == 4)
    rewritten(workdir, 4, loss=float(np.nextafter(np.float32(recorded["loss"]), np.float32(9))))
    found = replay(workdir, 5, log=lambda _: None)
    assert found.verdict == "hardware" and "wrote down something else for step 4" in found.why


def test_devices_that_compute_otherwise_the_second_time_are_found(runs, monkeypatch):
    compile_step, calls = Setup.compile, []

    def compiled(self, *shape):
        program = compile_step(self, *shape)

        def run(state, batch):
            new, metrics = program(state, batch)
            calls.append(None)
            if len(calls) == 5:  # two steps, the norms among them, then the second execution
                x = new.params["final_norm"]["scale"]
                flipped = jax.device_put(x.at[3].set(np.nextafter(np.float32(x[3]), np.float32(9))), x.sharding)
                new.params["final_norm"]["scale"] = flipped
            return new, metrics

        return run

    monkeypatch.setattr(Setup, "compile", compiled)
    found = replay(runs / "whole", 5, log=lambda _: None)
    assert len(calls) == 5
    assert found.verdict == "hardware" and found.differing == ["params/final_norm/scale"]
    assert "leave other bits in 1 arrays" in found.why


def test_a_store_that_has_changed_is_found_and_the_file_named(runs):
    workdir = copied(runs, "data")
    (shard,) = workdir.glob("data/*/train-00000.bin")
    tokens = np.fromfile(shard, np.uint16)
    tokens[:] = tokens[::-1]
    tokens.tofile(shard)
    found = replay(workdir, 4, log=lambda _: None)
    assert found.verdict == "data" and "the batch of step 4" in found.why and "train-00000.bin is damaged" in found.why


def test_a_damaged_file_that_no_digest_of_a_batch_shows_is_found_before_hardware_is_blamed():
    """Where documents begin is in a file of its own: the tokens of a batch are the same, what they see is not."""
    figures = {4: {"loss": 1.0, "grad_norm": 2.0, "batch": 7, "accepted": True}}
    execution = module._Execution(figures, {}, {})
    records = {4: {**figures[4], "loss": 1.5}}
    evidence = module._Evidence(records, execution, execution, [], "", "")
    verdict, why = module._judge(evidence, 4, damaged=lambda: "offsets.bin is damaged")
    assert verdict == "data" and "offsets.bin is damaged" in why and "step 4" in why
    assert module._judge(evidence, 4, damaged=lambda: "")[0] == "hardware"


def test_steps_that_were_not_written_down_are_not_held_against_anybody():
    def figures(loss):
        return {"loss": loss, "grad_norm": 2.0, "batch": 7, "accepted": True}

    execution = module._Execution({step: figures(1.0) for step in (4, 5, 6)}, {}, {})
    for loss, unlike, expected in ((1.0, "", "nothing"), (1.5, "", "hardware"), (1.5, "mesh was x", "unlike")):
        evidence = module._Evidence({6: figures(loss)}, execution, execution, [], unlike, "")
        verdict, why = module._judge(evidence, 6, damaged=lambda: "")
        assert verdict == expected and "(2 of the steps up to it were not written down)" in why
    assert "5.0e-01 from what was written down" in why
    evidence = module._Evidence(execution.figures, execution, execution, [], "", "")
    assert "written down" not in module._judge(evidence, 6, damaged=lambda: "")[1]


def test_which_weights_a_run_began_with_is_written_down_and_another_beginning_is_told(tmp_path):
    home, said = Home(tmp_path, log=print), []
    one, other = ({"a": {"b": np.full(3, value, np.float32)}} for value in (1, 2))
    one, other = (jax.tree.map(jax.device_put, params) for params in (one, other))
    assert other_weights(home, one, "there") == "the run did not write down which weights of there it began with"
    first_start(tmp_path)
    for params, lines in ((one, 0), (one, 0), (other, 1), (other, 0)):
        said.clear()
        settle_weights(home, params, "there", log=said.append)
        assert len(said) == lines and all("was begun before, with other weights: there has" in line for line in said)
        assert other_weights(home, params, "there") == ""
    assert other_weights(home, one, "there") == "the run began with other weights than there holds now"
    assert home.facts()["id"] == home.run != ""


@pytest.mark.slow
def test_a_run_whose_first_weights_are_not_there_any_more_is_not_called_faulty(runs):
    """They were another run's, which has trained on since. A start anew, before the first checkpoint, says so."""
    source, workdir, said = copied(runs, "source"), runs / "follows", []
    later = source / "checkpoints" / "5"
    later.rename(source / "5.later")
    config = tiny_config(
        runs / "corpus",
        train__steps=3,
        train__norms_every=0,
        train__compilation_cache=str(runs / "xla"),
        train__init_from=str(source),
        data__cache_dir=str(runs / "data"),
    )
    train(config, workdir, log=said.append)
    assert replay(workdir, 2, log=said.append).verdict == "nothing"
    (source / "5.later").rename(later)
    found = replay(workdir, 2, log=said.append)
    assert found.start == 0 and found.verdict == "unlike"
    assert f"the run began with other weights than {source} holds now" in found.why
    facts = Home(workdir, log=said.append).facts()
    assert facts["saved"] == 3 and len(facts["weights"]) == 16


def test_other_settings_are_told_from_faults_and_a_damaged_checkpoint_is_gone_past(runs):
    workdir, said = copied(runs, "settings"), []
    config = module._config(workdir, log=said.append)
    setup = make_setup(config, make_mesh(config.parallel))
    assert module._unlike(workdir, setup, 3, 5) == ""
    told = dataclasses.replace(config, name="other", checkpoint=dataclasses.replace(config.checkpoint, keep_latest=9))
    assert module._unlike(workdir, dataclasses.replace(setup, config=told), 3, 5) == ""
    later = dataclasses.replace(config, optim=dataclasses.replace(config.optim, peak_lr=0.5))
    assert module._unlike(workdir, dataclasses.replace(setup, config=later), 3, 5).startswith("config was ")

    reader = CheckpointReader(workdir / "checkpoints", log=said.append)
    bench = module._Bench(config, setup, None, reader)
    assert reader.steps() == [3, 5] and bench.begin(5, log=said.append)[0] == 5
    for path in (workdir / "checkpoints" / "5" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    start, state = bench.begin(5, log=said.append)
    assert start == int(state.step) == 3 and "checkpoint 5 is damaged" in said[0]
    assert bench.begin(2, log=said.append)[0] == 0


@pytest.mark.slow
def test_numbers_that_are_not_finite_are_named_where_they_begin(runs, monkeypatch):
    workdir = copied(runs, "numbers")
    restore = module.CheckpointReader.restore_state

    def restored(self, abstract_state, *, step):
        found = restore(self, abstract_state, step=step)
        x = found.state.params["layers"]["mlp"]["up"]
        found.state.params["layers"]["mlp"]["up"] = jax.device_put(x.at[1, 2, 3].set(np.nan), x.sharding)
        return found

    monkeypatch.setattr(module.CheckpointReader, "restore_state", restored)
    found = replay(workdir, 4, log=lambda _: None)
    assert not found.executed[0]["accepted"]
    rewritten(workdir, 4, **{name: str(found.executed[0][name]) for name in ("loss", "grad_norm")}, accepted=False)
    found = replay(workdir, 4, log=lambda _: None)
    assert found.verdict == "numerics" and "the guard refused the update" in found.why
    assert found.non_finite == "weights/layers/mlp/up of layer 1"


def test_the_first_tensor_is_that_which_is_computed_first():
    good, bad = [1.0, 1.0], [1.0, np.nan]
    norms = {
        "weights": {"embed": 1.0, "layers/up": good, "prefix/up": good},
        "activations": {"residual": good},
        "gradients": {"embed": np.nan, "layers/up": bad, "layers/down": good},
        "updates": {"embed": np.nan, "layers/up": bad},
    }
    figures = {3: {"loss": 1.0, "grad_norm": np.nan}}

    def first(**changed):
        return module._non_finite(module._Execution(figures, {}, norms | changed), 3)

    assert first() == "gradients/layers/up of layer 1"  # from the last layer on, the embedding last
    assert first(activations={"residual": bad}) == "activations/residual of layer 1"
    weights = norms["weights"] | {"layers/up": bad, "prefix/up": bad}
    assert first(activations={"residual": bad}, weights=weights) == "weights/prefix/up of layer 1"
    assert first(gradients={}, updates={}) == "grad_norm"


@pytest.mark.slow
def test_a_run_of_another_mesh_is_not_called_faulty(runs):
    workdir = copied(runs, "mesh")
    text = (workdir / FILE_NAME).read_text()
    (workdir / FILE_NAME).write_text(text.replace('"mesh": "data 8"', '"mesh": "data 4, tensor 2"'))
    recorded = next(record for record in read_metrics(workdir, "step") if record["step"] == 4)
    rewritten(workdir, 4, loss=recorded["loss"] * (1 + 1e-6))
    found = replay(workdir, 4, log=lambda _: None)
    assert found.verdict == "unlike" and "mesh was data 4, tensor 2, here it is data 8" in found.why


def test_a_step_that_was_not_made_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="--step is 9, but the run in .* has steps 1 to 5"):
        replay(runs / "whole", 9, log=lambda _: None)
    with pytest.raises(UserError, match="has made no step"):
        replay(tmp_path, 1, log=lambda _: None)
