"""A few unseen documents answered before and after training, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.data.corpus import Corpus
from rankwise.data.examples import Examples
from rankwise.data.laid import Pairs
from rankwise.data.template import Template
from rankwise.engine.generate import answer, stops_of
from rankwise.jobs.reader import Reader, TextReader
from rankwise.jobs.watch import Advance
from rankwise.surgery.bank import Bank

SAMPLES = 3
_LONGEST_PROMPT, _LONGEST_ANSWER = 1024, 96


@dataclass(frozen=True)
class Asked:
    """Prompts with what should come, in tokens, and where an answer ends."""

    tokenizer: Any
    prompts: tuple[tuple[list[int], list[int]], ...]
    stops: Sequence[int]

    def answers(self, bank: Bank, which: str | None, advance: Advance) -> list[str]:
        """One to each prompt, by an adapter or the base (None)."""
        found = []
        for number, (prompt, reference) in enumerate(self.prompts, start=1):
            limit = min(_LONGEST_ANSWER, 2 * len(reference) + 16)
            found.append(answer(bank, which, self.tokenizer, prompt, stops=self.stops, max_new_tokens=limit).strip())
            advance(number / len(self.prompts))
        return found

    def beside(self, before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
        """`prompt`, `reference`, `before` and `after` of each."""
        rows = []
        for (prompt, reference), first, second in zip(self.prompts, before, after, strict=True):
            texts = [self.tokenizer.decode(part, skip_special_tokens=True).strip() for part in (prompt, reference)]
            rows.append(dict(zip(("prompt", "reference", "before", "after"), [*texts, first, second], strict=True)))
        return rows


def asked_of(model: Any, tokenizer: Any, reader: Reader, examples: Examples) -> Asked:
    """Of documents spread over those whose prompt fits; nothing where the model does not write."""
    if isinstance(examples, Pairs):
        return _of_pairs(model, tokenizer, examples)
    if isinstance(examples, Corpus) and isinstance(reader, TextReader) and isinstance(reader.reading, Template):
        return _of_corpus(model, tokenizer, reader.reading, examples)
    return Asked(tokenizer, (), ())


def _of_corpus(model: Any, tokenizer: Any, template: Template, corpus: Corpus) -> Asked:
    """First answers."""
    fitting = [i for i in range(len(corpus)) if 0 < int(corpus.document(i)[1].argmax()) <= _LONGEST_PROMPT]

    def asked(i: int) -> tuple[list[int], list[int]]:
        tokens, mask = corpus.document(i)
        begin = int(mask.argmax())
        end = begin + int(np.argmin(np.append(mask[begin:], False)))
        return tokens[:begin].tolist(), tokens[begin:end].tolist()

    prompts = tuple(asked(fitting[place]) for place in _spread(len(fitting)))
    return Asked(tokenizer, prompts, stops_of(template, model))


def _of_pairs(model: Any, tokenizer: Any, examples: Pairs) -> Asked:
    """What is written for sources."""
    fitting = [i for i in range(len(examples)) if len(examples.document(i)[0]) <= _LONGEST_PROMPT]
    found = (examples.document(fitting[place]) for place in _spread(len(fitting)))
    prompts = tuple((source.tolist(), target.tolist()) for source, target in found)
    own = model.generation_config.eos_token_id
    return Asked(tokenizer, prompts, tuple(own) if isinstance(own, list) else (tokenizer.eos_token_id,))


def _spread(count: int) -> list[int]:
    """Places of the samples among so many documents."""
    return np.linspace(0, count - 1, min(SAMPLES, count)).round().astype(int).tolist()
