from __future__ import annotations

import torch
from tiny_models import TINY

from longclip_rt.weights.random import random_state_dict, sha256_of_tensors


def test_the_seed_determines_every_number_and_the_global_state_none() -> None:
    torch.manual_seed(1)
    first = random_state_dict(TINY, 3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = random_state_dict(TINY, 3)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    assert sha256_of_tensors(random_state_dict(TINY, 4)) != sha256_of_tensors(first)


def test_it_draws_the_tensors_of_the_architecture() -> None:
    drawn = random_state_dict(TINY, 0)
    assert {name: tuple(tensor.shape) for name, tensor in drawn.items()} == TINY.shapes()
    assert all(tensor.dtype == torch.float32 and bool(torch.isfinite(tensor).all()) for tensor in drawn.values())


def test_no_bias_is_zero_and_no_norm_is_one() -> None:
    for name, tensor in random_state_dict(TINY, 0).items():
        centre = float("ln_" in name and name.endswith("weight"))
        assert name == "logit_scale" or (tensor - centre).std() > 0.005, name


def test_the_hash_sees_values_names_and_shapes_but_not_the_order() -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.tensor(1.0)}
    digest = sha256_of_tensors(tensors)
    assert sha256_of_tensors(dict(reversed(tensors.items()))) == digest
    assert sha256_of_tensors(tensors | {"a": torch.ones(3, 2)}) != digest
    assert sha256_of_tensors(tensors | {"b": torch.tensor(2.0)}) != digest
    assert sha256_of_tensors({"a": tensors["a"], "c": tensors["b"]}) != digest
