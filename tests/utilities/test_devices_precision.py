import pytest
import torch

from lightning_iet.utilities.devices import full_precision

A = torch.rand(64, 512, generator=torch.Generator().manual_seed(0))
EXACT = A.double() @ A.double().T


def error():
    return ((A @ A.T).double() - EXACT).abs().max().item()


@pytest.fixture
def reduced_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("reduced_precision")
def test_products_are_exact_inside_and_settings_as_before_outside():
    before = error()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error() > 1e-2
        with full_precision("cpu"):
            assert error() < 1e-3
        assert error() > 1e-2
    assert error() == before
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.usefixtures("reduced_precision")
def test_settings_come_back_after_an_exception():
    with pytest.raises(KeyError), full_precision("cpu"):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "medium"
