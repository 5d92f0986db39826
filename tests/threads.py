"""A fixture for tests of small models: a conftest that imports it runs its folder's tests on one thread."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The fastest for models this small; and tests on other cores are not slowed down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
