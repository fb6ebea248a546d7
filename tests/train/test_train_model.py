from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import token_ids
from train_case import SMALL, VOCABULARY, batch_of, clip_weights, small_model

from longclip_rt.errors import WeightsError
from longclip_rt.model.positions import stretch_positions
from longclip_rt.train.model import TrainableClip, stretched
from longclip_rt.weights.checkpoint import Checkpoint, load_checkpoint, towers_from_checkpoint
from longclip_rt.weights.convert import write_weights
from longclip_rt.weights.random import random_state_dict

BASE, RESIDUAL = "positional_embedding", "positional_embedding_res"


def gradients(model: TrainableClip) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def trained_a_little(model: TrainableClip, steps: int = 2) -> TrainableClip:
    """The model after a few large steps that move every parameter that has a gradient."""
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.3)
    batch = batch_of([60, 9, 240, 30])
    for _ in range(steps):
        optimizer.zero_grad()
        (model.encode_text(batch.long_ids) * model.encode_image(batch.pixels)).sum().neg().backward()
        optimizer.step()
    return model


def test_kps_starts_with_two_equal_stretched_tables() -> None:
    start = random_state_dict(SMALL, 0)
    weights = small_model("kps").weights()
    expected = stretch_positions(start[BASE])
    assert expected.shape == (248, SMALL.text_width)
    assert torch.equal(weights[BASE], expected) and torch.equal(weights[RESIDUAL], expected)
    assert weights.keys() == {*start, RESIDUAL}
    for name in start.keys() - {BASE}:
        assert torch.equal(weights[name], start[name]), name


def test_the_base_table_is_frozen_and_the_residual_trained_from_row_20_on() -> None:
    model = small_model("kps")
    before = model.weights()
    after = trained_a_little(model).weights()
    assert torch.equal(after[BASE], before[BASE])
    assert torch.equal(after[RESIDUAL][:20], before[RESIDUAL][:20])
    assert (after[RESIDUAL][20:240] != before[RESIDUAL][20:240]).any(dim=1).all()
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert set(before) - set(changed) == {BASE, "logit_scale"}


@pytest.mark.parametrize("stretch", ["interpolate", "none"])
def test_a_single_table_is_trained_from_its_first_row_on(stretch: str) -> None:
    model = small_model(stretch)  # type: ignore[arg-type]
    before = model.weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model.encode_text(token_ids([60, 12], 64, vocab_size=VOCABULARY)).square().sum().backward()
    optimizer.step()
    after = model.weights()
    assert (after[BASE][:60] != before[BASE][:60]).any(dim=1).all()
    if stretch == "interpolate":
        assert torch.equal(after[BASE], after[RESIDUAL])
    else:
        assert len(after[BASE]) == 77 and RESIDUAL not in after


@pytest.mark.parametrize("stretch", ["kps", "interpolate", "none"])
def test_the_weights_load_as_the_model_that_was_trained(tmp_path: Path, stretch: str) -> None:
    model = trained_a_little(small_model(stretch)) if stretch != "none" else small_model(stretch)  # type: ignore[arg-type]
    start = Checkpoint({}, model.architecture, "small", None, trained=True)
    write_weights(start, model.weights(), tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors", context_length=None)
    assert loaded.architecture == model.architecture and loaded.trained
    text, image = towers_from_checkpoint(loaded)
    longest = model.architecture.context_length
    batch = batch_of([longest, longest - 1, 20, 21, 2])
    ids = batch.long_ids[:, :longest]
    with torch.no_grad():
        for found, features in (
            (text(ids)[0], model.encode_text(ids)),
            (image(batch.pixels)[0], model.encode_image(batch.pixels)),
        ):
            torch.testing.assert_close(found, torch.nn.functional.normalize(features, dim=1), atol=1e-6, rtol=1e-5)


def test_interpolation_keeps_the_ends_and_spreads_the_rest_evenly() -> None:
    table = torch.randn(77, 5, generator=torch.Generator().manual_seed(0))
    even = stretched(table, "interpolate")
    assert even.shape == (248, 5)
    torch.testing.assert_close(even[0], table[0])
    torch.testing.assert_close(even[-1], table[-1])
    line = stretched(torch.arange(77.0)[:, None].expand(77, 2), "interpolate")
    torch.testing.assert_close(line[:, 0], torch.from_numpy(np.linspace(0, 76, 248)).float())
    # Unlike knowledge-preserved stretching, which leaves the first 20 rows alone.
    assert not torch.allclose(even[1:20], table[1:20]) and torch.equal(stretched(table, "kps")[:20], table[:20])


def test_a_table_of_248_rows_is_taken_as_it_is_and_others_are_refused() -> None:
    table = torch.randn(248, 5)
    for stretch in ("kps", "interpolate", "none"):
        assert torch.equal(stretched(table, stretch), table)  # type: ignore[arg-type]
    for stretch in ("kps", "interpolate"):
        with pytest.raises(WeightsError, match=r"has 100 rows.*--positions none"):
            stretched(torch.randn(100, 5), stretch)  # type: ignore[arg-type]
    assert len(stretched(torch.randn(100, 5), "none")) == 100


def test_long_clip_weights_can_be_trained_on_with_a_single_table(tmp_path: Path) -> None:
    path = clip_weights(tmp_path / "long.safetensors", context_length=248)
    loaded = load_checkpoint(path, context_length=None)
    model = TrainableClip(loaded.architecture, loaded.state_dict, stretch="none")
    weights = model.weights()
    assert len(weights[BASE]) == 248 and torch.equal(weights[RESIDUAL], weights[BASE])


def test_the_temperature_is_set_or_kept() -> None:
    assert small_model(logit_scale=2.5).logit_scale.item() == 2.5
    kept = random_state_dict(SMALL, 0) | {"logit_scale": torch.tensor(3.25)}
    assert TrainableClip(SMALL, kept).logit_scale.item() == 3.25


def test_the_given_weights_are_not_changed() -> None:
    start = random_state_dict(SMALL, 0)
    trained_a_little(TrainableClip(SMALL, start, stretch="kps"))
    assert all(torch.equal(tensor, start[name]) for name, tensor in random_state_dict(SMALL, 0).items())


def test_weights_go_back_into_another_model() -> None:
    trained = trained_a_little(small_model("kps")).weights()
    model = small_model("kps", seed=1)
    model.load_weights(trained)
    found = model.weights()
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)


def test_parameters_are_counted_once() -> None:
    model = small_model("kps")
    numbers = sum(one.numel() for one in model.parameters())
    assert numbers == sum(tensor.numel() for tensor in model.weights().values())


@pytest.mark.parametrize("stretch", ["kps", "none"])
def test_gradient_checkpointing_changes_no_gradient(stretch: str) -> None:
    batch = batch_of([60, 9, 70, 30])
    found = []
    for checkpointing in (False, True):
        model = small_model(stretch, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
        (model.encode_text(batch.long_ids) * model.encode_image(batch.pixels)).sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        if expected is None:
            assert found[1][name] is None
        else:
            torch.testing.assert_close(found[1][name], expected, msg=name)


def test_gradient_checkpointing_keeps_fewer_activations() -> None:
    def kept(**options: bool) -> int:
        numbers = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal numbers
            numbers += tensor.numel() if not isinstance(tensor, torch.nn.Parameter) else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            small_model(**options).encode_text(token_ids([200] * 4, 200, vocab_size=VOCABULARY))
        return numbers

    assert kept(gradient_checkpointing=True) < kept() / 3


def test_a_short_text_gives_the_residual_a_gradient_of_zeros() -> None:
    """Else processes whose texts are all short would not have the gradients that the others have."""
    model = small_model("kps")
    ids = token_ids([7, 20], 24, vocab_size=VOCABULARY)
    for width in (24, 20, 8):
        model.zero_grad()
        model.encode_text(ids[:, :width]).square().sum().backward()
        (residual,) = (one.grad for name, one in model.named_parameters() if name == "_second")
        assert residual is not None and residual.shape == (248, SMALL.text_width) and not residual.any()


def test_compiled_towers_give_the_same_features_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces as torch.compile does, and leaves out the generation of code, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    batch = batch_of([60, 9, 70, 30])
    found = []
    for compiled in (False, True):
        model = small_model("kps")
        if compiled:
            model.compile_towers()
        (model.encode_text(batch.long_ids) * model.encode_image(batch.pixels)).sum().backward()
        with torch.no_grad():
            found.append((gradients(model), model.encode_text(batch.short_ids)))
    torch.testing.assert_close(found[1][1], found[0][1])
    for name, expected in found[0][0].items():
        if expected is not None:
            torch.testing.assert_close(found[1][0][name], expected, msg=name, atol=1e-4, rtol=1e-4)
