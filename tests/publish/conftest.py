from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def fast_collections() -> Iterator[None]:
    """Leave what the libraries have made so far out of garbage collections.

    Every merge collects garbage once. Among the objects of torch and transformers that takes longer than
    merging a tiny model and verifying it.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
