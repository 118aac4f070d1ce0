"""The places that grids of tests read: data, an encoder and a causal model, all tiny."""

import pytest
from tests.bench.places import tiny_causal, tiny_data, tiny_encoder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bench")
    return {
        "data": str(tiny_data(root / "data")),
        "encoder": str(tiny_encoder(root / "encoder")),
        "causal": str(tiny_causal(root / "causal")),
    }
