"""A few unseen documents answered by the base and by the adapter, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def samples(
    bank: Bank, name: str, tokenizer: Any, reader: Reader, examples: Examples, advance: Advance
) -> list[dict[str, str]]:
    """As `sample_answers`, for every task in which the model writes something; none for the others."""
    if isinstance(examples, Pairs):
        return sample_targets(bank, name, tokenizer, examples, advance)
    if isinstance(examples, Corpus) and isinstance(reader, TextReader) and isinstance(reader.reading, Template):
        return sample_answers(bank, name, tokenizer, reader.reading, examples, advance)
    return []


def sample_answers(
    bank: Bank, name: str, tokenizer: Any, template: Template, corpus: Corpus, advance: Advance
) -> list[dict[str, str]]:
    """`prompt`, `reference`, `before` and `after`: first answers, in documents spread over those whose prompt fits."""
    fitting = [i for i in range(len(corpus)) if 0 < int(corpus.document(i)[1].argmax()) <= _LONGEST_PROMPT]

    def asked(i: int) -> tuple[list[int], list[int]]:
        tokens, mask = corpus.document(i)
        begin = int(mask.argmax())
        end = begin + int(np.argmin(np.append(mask[begin:], False)))
        return tokens[:begin].tolist(), tokens[begin:end].tolist()

    asking = (asked(fitting[place]) for place in _spread(len(fitting)))
    return list(_answered(bank, name, tokenizer, asking, stops_of(template, bank.model), advance, _wanted(fitting)))


def sample_targets(bank: Bank, name: str, tokenizer: Any, examples: Pairs, advance: Advance) -> list[dict[str, str]]:
    """As `sample_answers`: what is written for sources spread over those that fit."""
    fitting = [i for i in range(len(examples)) if len(examples.document(i)[0]) <= _LONGEST_PROMPT]
    found = (examples.document(fitting[place]) for place in _spread(len(fitting)))
    asking = ((source.tolist(), target.tolist()) for source, target in found)
    own = bank.model.generation_config.eos_token_id
    stops = tuple(own) if isinstance(own, list) else (tokenizer.eos_token_id,)
    return list(_answered(bank, name, tokenizer, asking, stops, advance, _wanted(fitting)))


def _wanted(fitting: Sequence[int]) -> int:
    return min(SAMPLES, len(fitting))


def _spread(count: int) -> Iterator[int]:
    """Places of the samples among so many documents."""
    return iter(np.linspace(0, count - 1, min(SAMPLES, count)).round().astype(int).tolist())


def _answered(
    bank: Bank,
    name: str,
    tokenizer: Any,
    asking: Iterator[tuple[list[int], list[int]]],
    stops: Sequence[int],
    advance: Advance,
    wanted: int,
) -> Iterator[dict[str, str]]:
    for number, (prompt, reference) in enumerate(asking):
        answers = []
        for which in (None, name):
            limit = min(_LONGEST_ANSWER, 2 * len(reference) + 16)
            answers.append(answer(bank, which, tokenizer, prompt, stops=stops, max_new_tokens=limit))
            advance((number + len(answers) / 2) / wanted)
        texts = [tokenizer.decode(part, skip_special_tokens=True).strip() for part in (prompt, reference)]
        yield dict(zip(("prompt", "reference", "before", "after"), [*texts, *map(str.strip, answers)], strict=True))
