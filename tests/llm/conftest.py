"""Here the server is the language model's."""

import pytest


@pytest.fixture
def server(endpoint):
    return endpoint
