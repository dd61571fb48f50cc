"""Digests: equal wherever an array lies, different after any change to it."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxlm.checkpoint import digest as module
from maxlm.checkpoint.digest import array_paths, digest_array

jitted = jax.jit(digest_array)
DTYPES = [
    "float32",
    "bfloat16",
    "float16",
    "int32",
    "uint32",
    "int16",
    "uint16",
    "int8",
    "uint8",
    "bool",
    "float8_e4m3fn",
]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (0, 3)]


def random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """An array of any bit patterns: NaNs, infinities and denormals among them."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def finalise(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def by_hand(x: np.ndarray) -> list[int]:
    """The definition, element by element in Python integers; good for up to 32 bits an element."""
    if x.dtype == bool or x.dtype.kind in "iu":
        words = [int(v) % 2**32 for v in x.ravel()]
    else:
        words = [int(v) for v in np.ascontiguousarray(x).ravel().view(f"u{x.dtype.itemsize}")]
    return [
        sum(finalise((w * lane.bits + i * lane.position) % 2**32) for i, w in enumerate(words)) % 2**32
        for lane in module._LANES
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_its_definition_says(dtype):
    for shape in SHAPES[:4] if dtype != "float32" else SHAPES:
        x = random_bits(dtype, shape, seed=len(shape))
        assert jitted(jnp.asarray(x)).tolist() == by_hand(x), shape


def test_it_is_the_same_on_every_mesh():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    x = random_bits("float32", (8, 4, 16), seed=0)
    expected = jitted(jnp.asarray(x)).tolist()
    for spec in [(), ("fsdp",), (None, "tensor"), (("data", "fsdp", "tensor"),), ("tensor", "data", "fsdp")]:
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert jitted(placed).tolist() == expected, spec


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
    seed=st.integers(0, 2**31),
    where=st.integers(0, 10**9),
)
def test_one_flipped_bit_shows_in_both_lanes(dtype, seed, where):
    x = random_bits(dtype, (6, 5, 8), seed)
    raw = bytearray(x.tobytes())
    where %= len(raw) * 8
    raw[where // 8] ^= 1 << where % 8
    flipped = np.frombuffer(bytes(raw), x.dtype).reshape(x.shape)
    before, after = jitted(jnp.asarray(x)), jitted(jnp.asarray(flipped))
    assert (np.asarray(before) != np.asarray(after)).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    few_values=st.booleans(),
    kind=st.sampled_from(["swap", "zero block", "shift block", "reverse", "move block"]),
    start=st.integers(0, 200),
    length=st.integers(1, 39),
)
def test_moved_and_lost_elements_show(seed, few_values, kind, start, length):
    rng = np.random.default_rng(seed)
    # Integers that grow by one are the values most alike their positions; few values are those of a damaged block.
    x = rng.integers(0, 3, 240).astype(np.float32) if few_values else (np.arange(240) + seed % 97).astype(np.float32)
    y = x.copy()
    stop = start + length
    if kind == "swap":
        y[[start, stop]] = y[[stop, start]]
    elif kind == "zero block":
        y[start:stop] = 0
    elif kind == "shift block":
        y[start:stop] = np.roll(x[start:stop], 1)
    elif kind == "reverse":
        y[start:stop] = x[start:stop][::-1]
    else:
        y[:length], y[start:stop] = x[start:stop].copy(), x[:length].copy()
    shape = (6, 5, 8)
    same = jitted(jnp.asarray(x.reshape(shape))).tolist() == jitted(jnp.asarray(y.reshape(shape))).tolist()
    assert same == np.array_equal(x, y)


def test_equal_values_with_other_bits_differ():
    zero, quiet = np.zeros(1, np.float32), np.array([0x7FC00000], np.uint32).view(np.float32)
    other_nan = np.array([0x7FC00001], np.uint32).view(np.float32)
    assert jitted(jnp.asarray(zero)).tolist() != jitted(jnp.asarray(-zero)).tolist()
    assert jitted(jnp.asarray(quiet)).tolist() != jitted(jnp.asarray(other_nan)).tolist()


def test_elements_beyond_one_position_word_stay_apart(monkeypatch):
    shape = (3, 4, 5)
    lower, upper = module._positions(shape, (0, 0, 0), shape, 10)
    pairs = np.stack([np.broadcast_to(lower, shape), np.broadcast_to(upper, shape)]).reshape(2, -1)
    assert len(set(map(tuple, pairs.T.tolist()))) == 60
    assert module._positions(shape, (0, 0, 0), shape, 60)[1] is None
    monkeypatch.setattr(module, "POSITIONS", 10)
    x = random_bits("float32", shape, seed=1)
    rolled = np.roll(x, 1, axis=0)  # keeps every lower word
    assert digest_array(jnp.asarray(x)).tolist() != digest_array(jnp.asarray(rolled)).tolist()


@pytest.mark.parametrize("limit", [2**30, 10])
def test_the_digests_of_blocks_add_up(monkeypatch, limit):
    monkeypatch.setattr(module, "POSITIONS", limit)
    x = random_bits("bfloat16", (3, 4, 5), seed=3)
    block = jax.jit(lambda part, start: module.digest_block(part, start, shape=x.shape))
    total = np.zeros(2, np.uint32)
    for index in np.ndindex(3, 2, 2):
        start = np.array(index, np.uint32) * np.array([1, 2, 3], np.uint32)
        part = x[tuple(slice(a, a + size) for a, size in zip(start, (1, 2, 3), strict=True))]
        total += np.asarray(block(jnp.asarray(part), start))
    assert total.tolist() == digest_array(jnp.asarray(x)).tolist()


def test_64_bit_elements():
    with jax.enable_x64(True):
        for dtype in ("int64", "float64"):
            x = random_bits(dtype, (3, 4), seed=2)
            y = x.copy()
            y.view(np.uint64)[1, 2] ^= np.uint64(1 << 40)
            assert digest_array(jnp.asarray(x)).tolist() != digest_array(jnp.asarray(y)).tolist()


def test_what_has_no_words_is_refused():
    with pytest.raises(TypeError, match="complex64.*bool, integers or floats"):
        digest_array(jnp.zeros(2, jnp.complex64))
    with pytest.raises(TypeError, match="jax.random.key_data"):
        digest_array(jax.random.key(0))


def test_leaves_by_path_in_their_order():
    tree = {"params": {"b": jnp.arange(3.0), "a": jnp.ones((2, 2))}, "rest": (jnp.int32(4),)}
    assert list(array_paths(tree)) == ["params/a", "params/b", "rest/0"]
    assert array_paths(tree)["rest/0"] is tree["rest"][0]


def test_hashes_are_never_materialised():
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    memory = jitted.lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096  # the array has 1 MiB
