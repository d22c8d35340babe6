from __future__ import annotations

import pytest

from be_serve.serving.middleware import RequestContext, current


@pytest.fixture
def context():
    made = RequestContext("/v1/chat/completions")
    reset = current.set(made)
    yield made
    current.reset(reset)
