"""What tests of workers share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """A worker takes as many cores as the build has threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
