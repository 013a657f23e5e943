"""The curve over a nested adapter's ranks, held against each rank loaded by itself."""

import numpy as np
import pytest

from rankwise.engine.evaluate import measured
from rankwise.errors import SpecError
from rankwise.search.nested import prefixed
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.grid import spec, state_of, trained
from tests.models import tiny

UNSEEN = random_corpus([9, 4, 12, 7, 30])


def test_each_rank_is_that_of_the_adapter_cut_to_it_and_the_bank_is_as_before():
    ranks, told = (1, 2, 3, 5), []
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec(rank=5, scaling="alpha/sqrt(r)", modules_to_save=("lm_head",)))
        bank.nest("a", (1, 2, 4, 5))
        adapter = bank.adapter("a")
        for rank in ranks:
            bank.put(f"at-{rank}", adapter.prefix(rank))
        want, _ = measured(bank, [f"at-{rank}" for rank in ranks], UNSEEN)
    model = tiny("llama")
    with Bank(model) as bank:
        before = state_of(model)
        found = prefixed(bank, adapter, ranks, UNSEEN, lambda text, share: told.append(share))
        assert state_of(model) == before
    np.testing.assert_allclose(np.stack(found), want, rtol=1e-6)
    assert len({row.tobytes() for row in found}) == len(ranks)
    assert told[-1] == 1


def test_what_has_no_prefixes_is_refused_and_let_go_of():
    with Bank(tiny("llama")) as bank:
        trained(bank, "a", spec(form="dora"))
        with pytest.raises(SpecError, match="form dora"):
            prefixed(bank, bank.adapter("a"), [1], UNSEEN, lambda text, share: None)
        assert bank.names == ("a",)
