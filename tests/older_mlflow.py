"""What MLflow itself gets wrong in the older versions that we support, with us or without.

The marks are strict: once a version gets it right, its mark has to go.
"""

from typing import Final

import mlflow
import pytest
from packaging.version import Version

BEFORE_3_17: Final = Version(mlflow.__version__) < Version("3.17")

RAISES_INTO_GENERATORS: Final = pytest.mark.xfail(
    BEFORE_3_17,
    reason="MLflow before 3.17 raises ValueError into a generator with a span around its yields, where each "
    "of its steps runs in a context of its own",
    strict=True,
)
SPLITS_LLAMA_INDEX_STREAMS: Final = pytest.mark.xfail(
    BEFORE_3_17,
    reason="MLflow before 3.17 makes two traces of a streamed answer of LlamaIndex's, and ends only one",
    strict=True,
)
