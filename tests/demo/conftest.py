import pytest
import torch
from demo_packages import write_packages


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """{package: folder} as the demo fetches them, made small."""
    return write_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost more than they bring at these sizes, and much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
