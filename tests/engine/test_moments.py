"""Going on with the optimiser of an earlier run: two halves of a run are the whole, to the bit."""

import pytest
import torch

from rankwise.engine.folder import held_folder
from rankwise.engine.loop import train
from rankwise.engine.run import Loop, Run
from rankwise.errors import RunFolderError
from rankwise.surgery.bank import Bank
from tests.corpora import random_corpus
from tests.grid import spec
from tests.models import tiny

STEADY = {"lr": 1e-2, "schedule": "constant", "warmup": 0.0}


def trained_once(bank, corpus, steps, out, **run):
    with held_folder(out, resume=False) as folder:
        train(bank, {"a": Run(**STEADY, **run)}, corpus, loop=Loop(max_steps=steps, batch_tokens=10**6), out=folder)


@pytest.mark.parametrize("kept", [True, False])
def test_two_halves_with_the_optimiser_kept_are_one_run_to_the_bit(kept, tmp_path):
    """Every step has all documents, so that the order of the second half is that of the first."""
    corpus = random_corpus([9, 14, 7, 11])
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec(("q_proj", "down_proj")))
        trained_once(bank, corpus, 6, tmp_path / "whole")
        whole = bank.adapter("a").digest()
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec(("q_proj", "down_proj")))
        trained_once(bank, corpus, 3, tmp_path / "first")
        trained_once(bank, corpus, 3, tmp_path / "second", **({"moments": tmp_path / "first"} if kept else {}))
        differs = [
            torch.dist(own.A, other.A) + torch.dist(own.B, other.B)
            for own, other in zip(
                bank.adapter("a").sites.values(), bank.adapter("a").plain().sites.values(), strict=True
            )
        ]
        assert max(differs) == 0
        assert (bank.adapter("a").digest() == whole) == kept


def test_an_optimiser_of_another_adapter_is_refused_and_everything_that_differs_is_told(tmp_path):
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec(("q_proj",)))
        trained_once(bank, random_corpus([9, 14, 7, 11]), 1, tmp_path / "first")
    for targets, rank, why in ((("q_proj",), 2, "is \\(3, 32\\)"), (("q_proj", "v_proj"), 3, "nothing is kept for it")):
        with Bank(tiny("llama")) as bank:
            bank.add("a", spec(targets, rank=rank))
            with pytest.raises(RunFolderError, match=why):
                trained_once(
                    bank, random_corpus([9, 14, 7, 11]), 1, tmp_path / f"next-{rank}", moments=tmp_path / "first"
                )
    with Bank(tiny("llama")) as bank:
        bank.add("a", spec(("k_proj",)))
        with pytest.raises(RunFolderError, match=r"q_proj\.A: is no parameter"):
            trained_once(bank, random_corpus([9, 14, 7, 11]), 1, tmp_path / "next", moments=tmp_path / "first")
        with pytest.raises(RunFolderError, match="has no checkpoints") as caught:
            trained_once(bank, random_corpus([9, 14, 7, 11]), 1, tmp_path / "more", moments=tmp_path / "nowhere")
        assert "--keep-optimiser" in caught.value.hint
