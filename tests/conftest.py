"Fixtures that several test files use."
import pytest
import torch


@pytest.fixture
def double():
    "float64 by default, and one seed."
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
