"""Held-out bits per byte against a naive loop over documents, and the plan of windows and rows."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import (
    AttentionConfig,
    Config,
    DataConfig,
    EvalConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    ParallelConfig,
    RopeConfig,
)
from maxlm.data.loader import DataChanged
from maxlm.data.store import StoreWriter, TokenStore
from maxlm.eval import heldout
from maxlm.kernels.experts import local_experts
from maxlm.model.decoder import document_lengths, merge, split_model
from maxlm.model.runtime import Runtime
from maxlm.parallel.mesh import make_mesh
from maxlm.resolve import resolve
from maxlm.train.setup import make_setup
from maxlm.tree import map_paths
from tests.tiny import tiny_config

VOCAB, BOS = 50, 49
LENGTHS = [1, 2, 5, 17, 18, 40, 3, 9, 33, 2, 12]  # with the begin token; windows have 16 positions
CONFIG = Config(
    model=ModelConfig(
        vocab_size=VOCAB,
        embed_dim=16,
        num_layers=2,
        attention=AttentionConfig(q_heads=2, kv_heads=1, head_dim=8),
        mlp=MlpConfig(dim=24),
    ),
    data=DataConfig(sequence_length=16),
    eval=EvalConfig(batch_size=4, overlap=6),
)


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])


# --- the plan --------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 70), max_size=12), st.integers(1, 20), st.data())
def test_windows_count_every_token_once_with_the_context_asked_for(lengths, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    offsets = offsets_of(lengths)
    plan = heldout.plan_windows(offsets, window=window, overlap=overlap)
    document = np.searchsorted(offsets, plan.start, side="right") - 1
    counted = np.zeros(offsets[-1], np.int64)
    for start, length, context, owner in zip(*plan, document, strict=True):
        assert 1 <= length <= window and 0 <= context < length
        assert start + length < offsets[owner + 1]  # the last target is the document's own
        first = start == offsets[owner]
        assert context == (0 if first else overlap)
        counted[start + context + 1 : start + length + 1] += 1
    expected = np.ones(offsets[-1], np.int64)
    expected[offsets[:-1]] = 0
    np.testing.assert_array_equal(counted, expected)


def test_a_long_document_by_hand():
    plan = heldout.plan_windows(np.array([100, 111]), window=4, overlap=1)
    np.testing.assert_array_equal(plan.start, [100, 103, 106])
    np.testing.assert_array_equal(plan.length, [4, 4, 4])
    np.testing.assert_array_equal(plan.context, [0, 1, 1])


@pytest.mark.parametrize("overlap", [-1, 8, 9])
def test_an_overlap_that_leaves_nothing_to_count_is_refused(overlap):
    with pytest.raises(ValueError, match=f"overlap is {overlap}"):
        heldout.plan_windows(np.array([0, 5]), window=8, overlap=overlap)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 24).flatmap(lambda window: st.tuples(st.just(window), st.lists(st.integers(1, window)))))
def test_rows_hold_every_window_without_collision_and_waste_little(case):
    window, lengths = case
    lengths = np.array(lengths, np.int64)
    places = heldout.place_windows(lengths, window=window)
    filled = np.zeros((places.rows, window), np.int64)
    for row, column, length in zip(places.row, places.column, lengths, strict=True):
        assert column + length <= window
        filled[row, column : column + length] += 1
    assert filled.max(initial=0) <= 1 and filled.sum() == lengths.sum()
    # What lies in a second row half empty would have been put into the first.
    assert (2 * filled.sum(axis=1) <= window).sum() <= 1


def test_rows_are_full_where_documents_are_as_long_as_real_ones():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.5, 1.5, 3000).astype(np.int64) + 1, 512)
    places = heldout.place_windows(lengths, window=512)
    assert lengths.sum() / (places.rows * 512) > 0.995


# --- the figure ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What a store's writer asks of a tokenizer."""

    kind: str = "bytes"
    file_name: str = ""
    vocab_size: int = VOCAB
    bos_id: int = BOS
    eos_id: int | None = None
    fingerprint: str = "numbers"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store whose held-out split has LENGTHS, cut into shards inside documents."""
    folder, rng = tmp_path_factory.mktemp("store"), np.random.default_rng(0)
    writer = StoreWriter(folder, Numbers(), shard_tokens=37)
    tokens = rng.integers(0, VOCAB - 1, sum(LENGTHS))
    tokens[offsets_of(LENGTHS)[:-1]] = BOS
    writer.add("heldout", tokens, lengths=LENGTHS, byte_lengths=[3 * length for length in LENGTHS])
    writer.add("train", tokens[:2], lengths=[2], byte_lengths=[1])
    writer.finish(heldout_permille=500)
    return TokenStore.open(folder)


@pytest.fixture(scope="module")
def parts():
    return split_model(CONFIG.model)


@pytest.fixture(scope="module")
def params(parts):
    return params_of(parts)


def params_of(parts):
    rng = np.random.default_rng(1)

    def value(_path, spec):  # NumPy, because compiling JAX's own initialisation takes longer than the tests
        return jnp.asarray(rng.normal(0, 0.4, spec.shape), jnp.float32) + (spec.role == "vector")

    return map_paths(value, parts.specs)


@pytest.fixture(scope="module")
def naive(parts, params, store):
    return naive_of(parts, params, store)


def naive_of(parts, params, store):
    """Nats of each document after its begin token: a window at a time, one a row, by whole logits in float64."""

    @jax.jit
    def forward(tokens, length):
        model = merge(parts.graphdef, params)
        rows = {"positions_BS": jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], "segments_BS": None}
        return model.logits(model.hidden(tokens, **rows, runtime=Runtime(), longest=length).hidden_BSD)

    def nats(document, window, overlap):
        total, done = 0.0, 0
        while done < len(document) - 1:
            begin = max(done - overlap, 0)
            inputs = document[begin : min(begin + window, len(document) - 1)]
            row = np.zeros((1, 48), np.int32)
            row[0, : len(inputs)] = inputs
            logits = np.asarray(forward(row, len(inputs)))[0, done - begin : len(inputs)].astype(np.float64)
            targets = document[done + 1 : begin + len(inputs) + 1]
            total += (np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]).sum()
            done += len(targets)
        return total

    documents = [store.split("heldout").document(i) for i in range(len(LENGTHS))]
    return lambda window, overlap: [nats(document, window, overlap) for document in documents]


def run(parts, params, store, config=CONFIG, *, runtime=None, put=lambda batch: batch, **rest):
    split = store.split("heldout")
    return heldout.evaluate(
        params, split, config=config, graphdef=parts.graphdef, runtime=runtime or Runtime(), put=put, **rest
    )


def with_eval(**changes):
    return dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, **changes))


@pytest.mark.parametrize("overlap", [0, 6, 15])
def test_the_figure_is_that_of_a_naive_loop(parts, params, store, naive, overlap):
    result = run(parts, params, store, with_eval(overlap=overlap))
    nats = sum(naive(16, overlap))
    tokens = sum(LENGTHS) - len(LENGTHS)
    # Sums of float32 terms in another order; 1e-6 is some ten roundings of them.
    np.testing.assert_allclose(result.bits_per_byte, nats / math.log(2) / (3 * sum(LENGTHS)), rtol=1e-6)
    np.testing.assert_allclose(result.nats_per_token, nats / tokens, rtol=1e-6)
    assert (result.documents, result.bytes, result.tokens) == (len(LENGTHS), 3 * sum(LENGTHS), tokens)


def test_documents_that_fit_a_window_are_not_cut_whatever_the_overlap(parts, params, store, naive):
    whole = sum(naive(48, 0))
    result = run(parts, params, store, with_eval(sequence_length=48))
    np.testing.assert_allclose(result.nats_per_token * result.tokens, whole, rtol=1e-6)
    assert abs(sum(naive(16, 0)) / whole - 1) > 1e-4  # a cut would have been seen


def test_a_limit_takes_the_first_documents(parts, params, store, naive):
    result = run(parts, params, store, documents=4)
    assert (result.documents, result.bytes) == (4, 3 * sum(LENGTHS[:4]))
    nats = sum(naive(16, 6)[:4])
    np.testing.assert_allclose(result.bits_per_byte, nats / math.log(2) / result.bytes, rtol=1e-6)


@pytest.mark.parametrize("scaling", ["longrope", "dynamic"])
def test_a_document_does_not_feel_what_it_is_batched_with(store, scaling):
    """Where frequencies go by how long a text is: some are below the original length, some above."""
    factors = {"short_factors": (1.0,) * 4, "long_factors": (2.0, 8.0, 8.0, 8.0)} if scaling == "longrope" else {}
    rope = RopeConfig(scaling=scaling, factor=4.0, original_length=10, **factors)
    config = dataclasses.replace(with_eval(sequence_length=48), model=dataclasses.replace(CONFIG.model, rope=rope))
    parts = split_model(config.model)
    params = params_of(parts)
    expected = sum(naive_of(parts, params, store)(48, 0))
    for rows in (1, 4):
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=rows))
        result = run(parts, params, store, config)
        np.testing.assert_allclose(result.nats_per_token * result.tokens, expected, rtol=1e-6)


def test_lengths_of_documents_by_hand():
    positions = np.array([[0, 1, 2, 0, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
    segments = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1] * 8])
    lengths = document_lengths(jnp.asarray(positions), jnp.asarray(segments))
    np.testing.assert_array_equal(lengths[:, :6], [[3, 3, 3, 1, 2, 2], [8] * 6])


def experts_config(**sizes):
    """A mixture of experts, with frequencies by length, as a run on such a mesh has it."""
    rope = RopeConfig(
        scaling="longrope", factor=4.0, original_length=10, short_factors=(1.0,) * 4, long_factors=(2.0, 8.0, 8.0, 8.0)
    )
    config = tiny_config(
        "unused",
        model=ModelConfig(
            vocab_size=264,
            embed_dim=16,
            num_layers=2,
            attention=AttentionConfig(
                q_heads=4, kv_heads=2, head_dim=8, windows=(6, 0)[: 3 - sizes.get("pipeline", 1)]
            ),
            rope=rope,
            moe=MoeConfig(experts=4, active=2, dim=24),
        ),
        parallel=ParallelConfig(data=1, **sizes),
        train__accumulation=2,
        eval=EvalConfig(batch_size=4, overlap=6, sequence_length=16),
    )
    return resolve(config, devices=math.prod(sizes.values()))


@pytest.mark.parametrize("sizes", [{"context": 2, "tensor": 2}, {"pipeline": 2, "expert": 2}], ids=str)
def test_a_mesh_gives_the_figure_of_one_device(store, sizes):
    """As runs evaluate: experts, packed rows with padding, each axis with what a run takes for it."""
    config = experts_config(**sizes)
    setup = make_setup(config, make_mesh(config.parallel, jax.devices()[:4]))
    params = params_of(setup.parts)
    alone = run(setup.parts, params, store, config)
    told = []
    data = types.SimpleNamespace(stores={"numbers": store})
    params = jax.device_put(params, setup.shardings.params)
    with jax.transfer_guard_device_to_host("disallow"):
        found = heldout.evaluate_stores(setup, params, data, final=True, progress=lambda *call: told.append(call))
    # Float32 sums in another order; 1e-6 is some ten roundings of them.
    np.testing.assert_allclose(found["numbers"].bits_per_byte, alone.bits_per_byte, rtol=1e-6)
    batches = told[-1][2]
    assert batches > 1 and told == [("numbers", done, batches) for done in range(1, batches + 1)]


def test_padding_goes_to_no_expert(store):
    config = experts_config(expert=1)
    parts, sent = split_model(config.model), []

    def watched(x, routes, experts, **rest):
        jax.debug.callback(lambda chosen: sent.append(int((chosen < 4).sum())), routes.experts)
        return local_experts(x, routes, experts, **rest)

    run(parts, params_of(parts), store, config, runtime=Runtime(experts=watched))
    jax.effects_barrier()
    windows = heldout.plan_windows(store.split("heldout").offsets, window=16, overlap=6)
    assert sum(sent) == windows.length.sum() * config.model.moe.active * config.model.num_layers


def test_processes_meet_between_compiling_and_running(parts, params, store, monkeypatch):
    """One that has its program from the cache would wait for the others in a collective, which gloo gives up."""
    compiled, met = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    monkeypatch.setattr(heldout, "meet", lambda where: met.append(len(compiled)))
    run(parts, params, store, with_eval(sequence_length=24))  # a program of its own
    assert len(met) == 1 and 0 < met[0] == len(compiled)


def test_a_result_from_rows_that_were_lost_is_refused(parts, params, store):
    def lossy(batch):
        return batch._replace(weights=batch.weights * (np.arange(4) > 0)[:, None])

    with pytest.raises(RuntimeError, match=r"tokens of 131"):
        run(parts, params, store, put=lossy)


def test_a_split_with_nothing_to_count_is_refused(parts, params, store):
    with pytest.raises(ValueError, match="heldout_permille"):
        run(parts, params, store, documents=1)  # the first document has its begin token only


def test_a_store_may_be_evaluated_or_not_but_not_be_another():
    heldout.check_evaluated({}, {"a": "1"}, step=3)  # a checkpoint from before that was recorded
    heldout.check_evaluated({"a": "1", "b": "2"}, {"a": "1", "c": "3"}, step=3)
    with pytest.raises(DataChanged, match="the store 'b' was 2 and is 4") as error:
        heldout.check_evaluated({"a": "1", "b": "2"}, {"a": "1", "b": "4"}, step=3)
    assert "'a'" not in str(error.value)
