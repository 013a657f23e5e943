from types import SimpleNamespace

import numpy as np
import pytest

from rankwise.data.corpus import Corpus
from rankwise.jobs import samples
from tests.data.chat import TEMPLATES, byte_level


def corpus(prompts):
    """Documents with prompts of these lengths and answers of four tokens."""
    lengths = [length + 4 for length in prompts]
    mask = np.concatenate([np.arange(length) >= length - 4 for length in lengths])
    origins = np.zeros((len(prompts), 2), dtype=np.int64)
    return Corpus(np.full(sum(lengths), 99, dtype=np.int32), mask, np.cumsum([0, *lengths]), origins, ("a",))


def test_samples_are_chosen_among_documents_whose_prompt_fits(monkeypatch):
    monkeypatch.setattr(samples, "answer", lambda *a, **k: "x")
    tokenizer = byte_level(TEMPLATES["chatml"])
    long, bank = 2 * samples._LONGEST_PROMPT, SimpleNamespace(model=None)
    told = []
    found = samples.sample_answers(
        bank, "a", tokenizer, samples.Template(tokenizer), corpus([long, 5, long, 6, 7, long, long]), told.append
    )
    assert len(found) == 3
    assert told[-1] == pytest.approx(1.0)
    none = samples.sample_answers(bank, "a", tokenizer, samples.Template(tokenizer), corpus([long]), told.append)
    assert none == []


def test_an_answer_also_ends_where_the_model_says():
    template = samples.Template(byte_level(TEMPLATES["chatml"]))
    for named, more in ((7, (7,)), ([7, 9, template.stops[0]], (7, 9)), (None, ())):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named))
        assert samples.stops_of(template, model) == (*template.stops, *more)
