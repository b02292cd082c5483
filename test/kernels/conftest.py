from collections.abc import Iterator

import pytest
from blocklora_testing.kernels.worker import Worker


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()
