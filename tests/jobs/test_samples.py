import numpy as np
import pytest

from rankwise.data.corpus import Corpus
from rankwise.data.template import Template
from rankwise.frozen.load import load_base
from rankwise.jobs import samples
from rankwise.jobs.reader import TextReader
from rankwise.surgery.bank import Bank


def corpus(prompts):
    """Documents with prompts of these lengths and answers of four tokens."""
    lengths = [length + 4 for length in prompts]
    mask = np.concatenate([np.arange(length) >= length - 4 for length in lengths])
    origins = np.zeros((len(prompts), 2), dtype=np.int64)
    return Corpus(np.full(sum(lengths), 99, dtype=np.int32), mask, np.cumsum([0, *lengths]), origins, ("a",))


def test_samples_are_chosen_among_documents_whose_prompt_fits(world, adapter):
    base = load_base(world / "llama")
    long, told = 2 * samples._LONGEST_PROMPT, []
    with Bank(base.model) as bank:
        bank.load("a", adapter)

        def sampled(prompts):
            reader = TextReader(Template(base.tokenizer), 4096, "truncate")
            asked = samples.asked_of(bank.model, base.tokenizer, reader, corpus(prompts))
            return asked.beside(*(asked.answers(bank, which, told.append) for which in (None, "a")))

        found = sampled([long, 5, long, 6, 7, long, long])
        assert len(found) == 3
        assert [len(one["prompt"]) for one in found] == [5, 6, 7]  # one byte a token
        assert told[-1] == pytest.approx(1.0)
        assert sampled([long]) == []
