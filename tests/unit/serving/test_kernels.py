"""Packed layers equal plain ones; ``topk`` is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from serving.engines.builtin.kernels import (
    WeightDtype,
    choose_weight_dtype,
    fits_fp16,
    pack_linear,
    replace_linears,
    replace_norms,
    topk,
)


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-5), ("int8", 3e-2)])
def test_a_packed_layer_equals_the_plain_product(dtype: WeightDtype, tolerance: float, bias: bool, rows: int) -> None:
    torch.manual_seed(rows)
    weight_OI, x_RI = torch.randn(48, 64).half().float(), torch.randn(rows, 64)
    bias_O = torch.randn(48) if bias else None
    expected = nn.functional.linear(x_RI, weight_OI, bias_O)
    found = pack_linear(dtype, weight_OI, bias_O)(x_RI)
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_an_int8_row_is_bitwise_independent_of_the_rest_of_the_batch() -> None:
    torch.manual_seed(0)
    layer, row = pack_linear("int8", torch.randn(33, 96)), torch.randn(1, 96)
    alone = layer(row)
    for others in (1, 6, 40):
        batch = torch.cat([torch.randn(others, 96) * 100, row])
        assert torch.equal(layer(batch)[-1:], alone)


def test_a_row_of_zeros_stays_zero_in_int8() -> None:
    assert torch.equal(pack_linear("int8", torch.randn(8, 16))(torch.zeros(2, 16)), torch.zeros(2, 8))


def test_auto_chooses_only_exact_dtypes() -> None:
    exact, inexact = torch.randn(64, 64).half().float(), torch.full((4, 4), 1 + 2**-20)
    assert fits_fp16(exact)
    assert not fits_fp16(inexact)
    assert choose_weight_dtype("auto", [exact]) in {"float16", "float32"}
    assert choose_weight_dtype("auto", [exact, inexact]) == "float32"
    assert choose_weight_dtype("int8", [exact]) == "int8"


def test_every_linear_layer_of_a_model_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 4, bias=False)))
    x = torch.randn(3, 8)
    expected = model(x)
    replace_linears(model, "float32")
    assert not [module for module in model.modules() if isinstance(module, nn.Linear)]
    torch.testing.assert_close(model(x), expected)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 9),
    width=st.sampled_from([1, 64, 576]),
    size=st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e4, 1e15]),
    eps=st.sampled_from([None, 0.0, 1e-6, 1e-5]),
)
def test_a_replaced_norm_equals_torchs_own(seed: int, rows: int, width: int, size: float, eps: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.RMSNorm(width, eps=eps))
    nn.init.normal_(model[0].weight, generator=generator)
    x_RW = torch.randn(rows, width, generator=generator) * size
    exact_eps = torch.finfo(torch.float32).eps if eps is None else eps
    expected = nn.functional.rms_norm(x_RW.double(), (width,), model[0].weight.double(), exact_eps).float()
    replace_norms(model)
    assert not isinstance(model[0], nn.RMSNorm)
    torch.testing.assert_close(model(x_RW), expected, rtol=2e-6, atol=1e-30, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 5),
    vocabulary=st.sampled_from([61, 512, 1024, 49152]),
    k=st.integers(1, 20),
    ties=st.booleans(),
)
def test_topk_equals_torch_topk(seed: int, rows: int, vocabulary: int, k: int, ties: bool) -> None:
    scores_RV = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores_RV = scores_RV.round()
    found = topk(scores_RV, k)
    expected = scores_RV.topk(k, dim=-1)
    assert torch.equal(found.scores_Rk, expected.values)
    assert torch.equal(scores_RV.gather(1, found.ids_Rk), expected.values)
    assert all(len(set(ids)) == k for ids in found.ids_Rk.tolist())
