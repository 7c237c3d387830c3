"""SculptConfig refuses what cannot work, by name; ranks follow it exactly."""

from __future__ import annotations

import pytest

from sculpt import SculptConfig
from sculpt.task.ranks import preserved_rank


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"unfreeze_rank_ratio": 0.0}, ValueError, "trains nothing"),
        ({"unfreeze_rank_ratio": 1.0}, ValueError, "preserves nothing"),
        ({"unfreeze_rank_ratio": 1}, TypeError, r"unfreeze_rank_ratio .* got 1 \(int\)"),
        ({"unfreeze_rank_ratio": True}, TypeError, "bool"),
        ({"unfreeze_rank_ratio": float("nan")}, ValueError, "got nan"),
        ({"unfreeze_rank_ratio": 0.5, "effective_rank": 3}, ValueError, "exclude each other"),
        ({"effective_rank": 0}, ValueError, "preserves nothing"),
        ({"effective_rank": 1.0}, ValueError, "trains nothing"),
        ({"effective_rank": -3}, ValueError, "got -3"),
        ({"effective_rank": "8"}, TypeError, "'8'"),
        ({"effective_rank": False}, TypeError, "bool"),
        ({"rank_pattern": {"q_proj": 1.0}}, ValueError, r"rank_pattern\['q_proj'\]=1.0"),
        ({"rank_pattern": ["q_proj"]}, TypeError, "must map"),
        ({"target_modules": []}, TypeError, "target_modules"),
        ({"target_modules": ["a", ""]}, TypeError, r"target_modules must be 'all-linear'.*'a', ''"),
        ({"target_modules": "*proj"}, ValueError, r"target_modules: '\*proj' is not a regular"),
        ({"exclude_modules": []}, TypeError, "exclude_modules must be None, a regular expression"),
        ({"exclude_modules": [3]}, TypeError, r"exclude_modules .*got \[3\]"),
        ({"exclude_modules": "(a"}, ValueError, r"exclude_modules: '\(a' is not a regular"),
        ({"rank_pattern": {"(a": 3}}, ValueError, r"rank_pattern: '\(a' is not a regular"),
        ({"rank_pattern": {3: 3}}, TypeError, "rank_pattern must have regular expressions; got 3"),
        ({"constraint": "soft"}, ValueError, "constraint must be one of 'strict', 'core'"),
        ({"constraint": "core", "engine": "compact"}, ValueError, "keeps constraint='strict' only"),
        ({"engine": "magic"}, ValueError, "engine must be one of"),
        ({"engine": "update", "coordinates": "full"}, ValueError, "is for engine='compact'"),
        ({"constraint": "core", "coordinates": "full"}, ValueError, "is for engine='compact'"),
        ({"coordinates": "fat"}, ValueError, "coordinates must be one of"),
        ({"others": "drop"}, ValueError, "others must be one of"),
        ({"originals": "gpu"}, ValueError, "originals must be one of"),
        ({"basis_dtype": "float16"}, ValueError, "basis_dtype must be one of"),
        ({"skip_nonfinite": 1}, TypeError, "skip_nonfinite must be True or False"),
        ({"weight_update": "magic"}, ValueError, "weight_update must be one of"),
        ({"subspace_cache": 3}, TypeError, "subspace_cache must be a path"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"unfreeze_rank_ration": 0.5}, TypeError, "did you mean 'unfreeze_rank_ratio'"),
        ({"zzz": 0.5}, TypeError, "no field 'zzz'.*Known fields: unfreeze_rank_ratio"),
    ],
)
def test_bad_values_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        SculptConfig(**kwargs)


def test_one_choice_of_rank_and_a_default():
    assert SculptConfig().unfreeze_rank_ratio == 0.25
    assert SculptConfig(effective_rank=8).unfreeze_rank_ratio is None


@pytest.mark.parametrize(
    ("kwargs", "shape", "expected"),
    [
        ({"unfreeze_rank_ratio": 0.25}, (576, 1536), 432),
        ({"unfreeze_rank_ratio": 0.9}, (10, 10), 1),
        ({"unfreeze_rank_ratio": 0.001}, (10, 10), 9),
        ({"unfreeze_rank_ratio": 0.999}, (10, 10), 1),
        ({"effective_rank": 7}, (10, 20), 7),
        ({"effective_rank": 0.9}, (10, 20), 9),
        ({"effective_rank": 1}, (10, 20), 1),
        ({"effective_rank": 7, "rank_pattern": {"q_proj": 3}}, (10, 20), 3),
        ({"effective_rank": 7, "rank_pattern": {r"layers\.0\..*": 0.5}}, (10, 20), 5),
        ({"effective_rank": 7, "rank_pattern": {"_proj": 3}}, (10, 20), 7),
    ],
)
def test_preserved_rank(kwargs, shape, expected):
    assert preserved_rank("model.layers.0.q_proj", shape, SculptConfig(**kwargs)) == expected


def test_a_rank_that_trains_nothing_names_the_matrix():
    with pytest.raises(ValueError, match=r"effective_rank=10 .* all 10 directions of 'a.b'"):
        preserved_rank("a.b", (10, 20), SculptConfig(effective_rank=10))
