"""One server for the tests that only ask it."""

import pytest
from servers import loader, running


@pytest.fixture(scope="session")
def server(demo_float32):
    with running(loader(demo_float32)) as live:
        yield live
