import pytest

from rankwise.kernels.library import WORDS


@pytest.fixture(scope="module", params=WORDS)
def words(request):
    """The products of training in either kind of words, whichever this processor would take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKWISE_WORDS", request.param)
        yield request.param
