"""The C++ operators under every instruction set that the processor has."""

from collections.abc import Iterator

import pytest

from megatron_llm.kernels import native
from megatron_llm.utils.errors import UserError


@pytest.fixture(params=native.CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that the operators use during the test; a skip with the reason where there is none."""
    if reason := native.load():
        pytest.skip(f"the C++ operators cannot be used: {reason}")
    before = native.capability()
    try:
        native.use_capability(request.param)
    except UserError as error:
        pytest.skip(str(error))
    yield request.param
    native.use_capability(before)


@pytest.fixture
def loaded() -> None:
    """The C++ operators, whatever their instruction set; a skip with the reason where there are none."""
    if reason := native.load():
        pytest.skip(f"the C++ operators cannot be used: {reason}")
