import pytest

from maxlm.optim.rules import RuleError, match_rules

PATHS = ("embedding/table", "head/kernel", "layers/mlp/up", "layers/mlp_norm/scale")


def match(*rules):
    return match_rules(rules, PATHS, setting="optim.lr_rules")


def test_the_first_match_counts():
    assert match((".*norm.*", 0.0), ("layers/.*", 2.0), (".*", 1.0)) == {
        "embedding/table": 1.0,
        "head/kernel": 1.0,
        "layers/mlp/up": 2.0,
        "layers/mlp_norm/scale": 0.0,
    }


def test_a_pattern_has_to_match_the_whole_path():
    with pytest.raises(RuleError, match="'mlp', which matches no parameter"):
        match(("mlp", 0.0), (".*", 1.0))


def test_every_unmatched_parameter_is_listed():
    with pytest.raises(RuleError) as error:
        match(("layers/.*", 1.0))
    assert "embedding/table, head/kernel;" in str(error.value)
    assert "layers/mlp/up" not in str(error.value)
    assert str(error.value).startswith("optim.lr_rules")


def test_a_rule_for_nothing_names_the_nearest_path():
    with pytest.raises(RuleError, match="the nearest is 'head/kernel'"):
        match(("head/kernle", 0.5), (".*", 1.0))


def test_a_shadowed_rule_is_told_apart():
    with pytest.raises(RuleError, match="'head/.*', which is never reached"):
        match((".*", 1.0), ("head/.*", 0.5))


def test_all_problems_come_at_once():
    with pytest.raises(RuleError) as error:
        match(("heads/.*", 0.5), ("layers/.*", 1.0))
    assert len(str(error.value).splitlines()) == 2
