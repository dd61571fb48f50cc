"""The table language: what its forms do to elements, that they come back, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.model.param import ParamSpec
from maxlm.model.table import Table, TableError, bind, joined, row
from tests.tables import to_ours, to_theirs


def spec(logical, *shape):
    return ParamSpec(shape, np.float32, logical, ())


SPECS = {
    "query": spec(("layers", "embed", "q_heads", "head_dim"), 2, 6, 4, 8),
    "key": spec(("layers", "embed", "kv_heads", "head_dim"), 2, 6, 2, 8),
    "moe": {
        "gate": spec(("layers", "expert", "embed", "mlp"), 2, 3, 6, 10),
        "up": spec(("layers", "expert", "embed", "mlp"), 2, 3, 6, 10),
        "down": spec(("layers", "expert", "mlp", "embed"), 2, 3, 10, 6),
    },
}
TABLE = Table(
    rows=(
        # Each kv head's query heads, then its keys: InternLM 2's order.
        joined(
            "{layer}.wqk",
            {"query": "D (K G) h -> K G h D", "key": "D K h -> K 1 h D"},
            axis=1,
            form="K N h D -> (K N h) D",
            sizes={"K": 2},
            layers=(5, 7),
        ),
        joined(
            "{layer}.experts.gate_up",
            {"moe/gate": "E D F -> E D F 1", "moe/up": "E D F -> E D F 1"},
            axis=3,
            form="E D F n -> E D (F n)",
        ),
        row("{layer}.{expert}.down", "moe/down", "F D -> D F"),
    )
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {
        key: {k: rng.normal(size=s.shape) for k, s in value.items()} if isinstance(value, dict)
        else rng.normal(size=value.shape)
        for key, value in SPECS.items()
    }  # fmt: skip


def test_elements_land_where_the_forms_say(params):
    theirs = to_theirs(bind(TABLE, SPECS), params)
    names = {"5.wqk", "7.wqk", "0.experts.gate_up", "1.experts.gate_up"}
    assert theirs.keys() == names | {f"{layer}.{expert}.down" for layer in range(2) for expert in range(3)}
    blocks = theirs["7.wqk"].reshape(2, 3, 8, 6)  # (K, G + 1, h, D)
    for kv_head in range(2):
        for group in range(2):
            np.testing.assert_array_equal(blocks[kv_head, group], params["query"][1, :, 2 * kv_head + group].T)
        np.testing.assert_array_equal(blocks[kv_head, 2], params["key"][1, :, kv_head].T)
    np.testing.assert_array_equal(theirs["0.experts.gate_up"][..., ::2], params["moe"]["gate"][0])
    np.testing.assert_array_equal(theirs["0.experts.gate_up"][..., 1::2], params["moe"]["up"][0])
    np.testing.assert_array_equal(theirs["1.2.down"], params["moe"]["down"][1, 2].T)


def test_shapes_are_known_without_values(params):
    rows = bind(TABLE, SPECS)
    shapes = {name: bound.shape for bound in rows for name, _ in bound.tensors()}
    assert shapes == {name: value.shape for name, value in to_theirs(rows, params).items()}


def test_our_parameters_come_back(params):
    rows = bind(TABLE, SPECS)
    back = to_ours(rows, to_theirs(rows, params))
    np.testing.assert_array_equal(back["query"], params["query"])
    np.testing.assert_array_equal(back["key"], params["key"])
    for name, value in params["moe"].items():
        np.testing.assert_array_equal(back["moe"][name], value)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_form_goes_there_and_back(data):
    sizes = {letter: data.draw(st.integers(1, 3)) for letter in "abcd"}

    def side():
        letters, groups = data.draw(st.permutations("abcd")), []
        while letters:
            taken = data.draw(st.integers(1, len(letters)))
            groups.append(letters[:taken])
            letters = letters[taken:]
        return groups

    left, right = side(), side()
    form = " -> ".join(" ".join(f"({' '.join(group)})" for group in groups) for groups in (left, right))
    shape = tuple(int(np.prod([sizes[x] for x in group])) for group in left)
    rows = bind(Table((row("x", "x", form, sizes=sizes),)), {"x": spec(("embed",) * len(shape), *shape)})
    values = {"x": np.arange(np.prod(shape)).reshape(shape)}
    theirs = to_theirs(rows, values)
    assert theirs["x"].shape == tuple(int(np.prod([sizes[x] for x in group])) for group in right)
    np.testing.assert_array_equal(to_ours(rows, theirs)["x"], values["x"])


@pytest.mark.parametrize("form", ["D H h -> (H h) D", "H h D -> D (H h)", "D H h -> h D H"])
def test_large_tensors_are_moved_like_small_ones(form):
    x = np.arange(150 * 3 * 97, dtype=np.float32).reshape(150, 3, 97)
    rows = bind(Table((row("x", "x", form),)), {"x": spec(("embed", "mlp", "head_dim"), *x.shape)})
    theirs = to_theirs(rows, {"x": x})["x"]
    order = {"D H h -> (H h) D": (1, 2, 0), "H h D -> D (H h)": (2, 0, 1), "D H h -> h D H": (2, 0, 1)}[form]
    np.testing.assert_array_equal(theirs, x.transpose(order).reshape(theirs.shape))
    np.testing.assert_array_equal(to_ours(rows, {"x": theirs})["x"], x)


ONE = {"x": spec(("layers", "embed", "mlp"), 2, 4, 6)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "x is in no row"),
        ((row("a.{layer}", "x"), row("b", "y")), "y is no parameter"),
        ((row("a.{layer}", "x"), row("b.{layer}", "x")), "x is in 2 rows"),
        ((row("a.{expert}", "x"),), r"x has the axes .*, expected \('expert',\) first"),
        ((row("a.{layer}", "x", "D F -> D"),), "every letter once"),
        ((row("a.{layer}", "x", "D F F -> F D F"),), "every letter once"),
        ((row("a.{layer}", "x", "D -> D"),), "does not fit the shape"),
        ((row("a.{layer}", "x", "D (F n) -> D F n"),), "does not fit the shape"),
        ((row("a.{layer}", "x", "D (F n) -> D F n", sizes={"n": 4}),), "does not fit the shape"),
        ((row("a.{layer}", "x", layers=(1,)),), "numbers 1 layers of 2"),
        ((row("a.{layer}", "x", layers=(1, 1)),), "a.1 more than once"),
    ],
)
def test_what_does_not_fit_is_refused(rows, message):
    with pytest.raises(TableError, match=message):
        bind(Table(rows), ONE)
