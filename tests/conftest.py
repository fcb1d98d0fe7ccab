"Fixtures that several test files use."
import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false" # Milvus brings gRPC, whose handlers abort a child that is forked later, before it can start its program

import pytest
import torch


@pytest.fixture
def double():
    "float64 by default, and one seed."
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
