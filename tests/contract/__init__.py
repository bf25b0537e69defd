"""One table per section of the contract: its statements, in its order, against real sockets."""

import pytest

# They assert for the tests, and should say as much when that fails.
pytest.register_assert_rewrite("tests.contract.tables", "tests.contract.steps")
