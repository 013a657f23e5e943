"""A few unseen documents answered by the base and by the adapter, side by side."""

from __future__ import annotations

from typing import Any

import numpy as np

from rankwise.data.corpus import Corpus
from rankwise.data.template import Template
from rankwise.engine.generate import answer, stops_of
from rankwise.jobs.watch import Advance
from rankwise.surgery.bank import Bank

SAMPLES = 3
_LONGEST_PROMPT, _LONGEST_ANSWER = 1024, 96


def sample_answers(
    bank: Bank, name: str, tokenizer: Any, template: Template, corpus: Corpus, advance: Advance
) -> list[dict[str, str]]:
    """`prompt`, `reference`, `before` and `after`: first answers, in documents spread over those whose prompt fits."""
    found: list[dict[str, str]] = []
    fitting = [i for i in range(len(corpus)) if 0 < int(corpus.document(i)[1].argmax()) <= _LONGEST_PROMPT]
    wanted = min(SAMPLES, len(fitting))
    stops = stops_of(template, bank.model)
    for place in np.linspace(0, len(fitting) - 1, wanted).round().astype(int):
        tokens, mask = corpus.document(fitting[place])
        begin = int(mask.argmax())
        end = begin + int(np.argmin(np.append(mask[begin:], False)))
        prompt, reference = tokens[:begin].tolist(), tokens[begin:end].tolist()
        answers = []
        for which in (None, name):
            limit = min(_LONGEST_ANSWER, 2 * len(reference) + 16)
            answers.append(answer(bank, which, tokenizer, prompt, stops=stops, max_new_tokens=limit))
            advance((len(found) + len(answers) / 2) / wanted)
        texts = [tokenizer.decode(part, skip_special_tokens=True).strip() for part in (prompt, reference)]
        found.append(
            dict(zip(("prompt", "reference", "before", "after"), [*texts, *map(str.strip, answers)], strict=True))
        )
    return found
