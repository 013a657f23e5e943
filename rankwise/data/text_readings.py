"""Rows that become texts for encoders: with a class, with a text to write, or alone.

reading        fields (those in brackets may be missing)                        becomes
LabelledTexts  text | sentence, label [label_name]                              Labelled
               text_a, text_b | sentence1, sentence2 | premise, hypothesis      Labelled, of two texts
SourceTargets  source, target | prompt, completion [system] | instruction,      Pairs
               output [input, system] | messages with one question
PlainTexts     text | sentence                                                  Masked
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rankwise.data.classes import LABEL, NAME, Classes, label_of
from rankwise.data.conversations import SHAPES, Conversation, read_document
from rankwise.data.corpus import Corpus
from rankwise.data.encoded import encoded
from rankwise.data.fields import Fields, Shape, Shapes, known_shape, shape_among
from rankwise.data.laid import Labelled, Masked, Pairs
from rankwise.data.problems import Problems
from rankwise.data.reading import Marked, Reading
from rankwise.data.row import Row
from rankwise.data.tokeniser import Tokenised, Tokeniser
from rankwise.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TWO = (("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"))
_ONE = ("text", "sentence")


@dataclass(frozen=True)
class _Texts:
    """A row: its texts, and its class where it has one."""

    texts: tuple[str, ...]
    label: int = 0

    @property
    def size(self) -> int:
        return sum(map(len, self.texts))


class _TextReading(Reading):
    """What the three have in common."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokeniser = Tokeniser(tokenizer)

    @property
    def digest(self) -> str:
        return self.tokeniser.digest

    def drafts(self, document: _Texts) -> list[_Texts]:
        return [document]


class LabelledTexts(_TextReading):
    """Texts, or pairs of texts, of one class each."""

    needs = "a row needs a text of at least one token, and its label"
    shapes: ClassVar[Shapes] = {
        "+".join(fields): Shape((*fields, LABEL), (NAME,)) for fields in (*((one,) for one in _ONE), *_TWO)
    }

    def __init__(self, tokenizer: PreTrainedTokenizerBase, classes: Classes) -> None:
        super().__init__(tokenizer)
        self.classes = classes

    @property
    def key(self) -> list[object]:
        return ["labelled", self.digest, self.classes.names, self.classes.labels]

    def read(self, row: Row, problems: Problems) -> _Texts | None:
        shape = known_shape(self.shapes, row, problems)
        if shape is None:
            return None
        fields = Fields(row, problems)
        texts = tuple(fields.text(field) for field in self.shapes[shape].needed if field != LABEL)
        number = None
        try:
            said = label_of(row.fields)
        except ValueError as error:
            fields.wrong(LABEL, str(error).removeprefix(f"{LABEL} "))
        else:
            number = self.classes.number(*said)
            if number is None:
                fields.wrong(LABEL, f"{said[1] or said[0]!r} is none of {', '.join(self.classes.names)}")
        return None if fields.failed or number is None else _Texts(texts, number)

    def encode(self, drafts: Sequence[_Texts], max_length: int) -> list[Tokenised]:
        found: dict[int, Tokenised] = {}
        for count in (1, 2):  # a file may mix texts and pairs of them
            chosen = [i for i, draft in enumerate(drafts) if len(draft.texts) == count]
            parts = [[drafts[i].texts[part] for i in chosen] for part in range(count)]
            read = encoded(self.tokeniser, parts[0], parts[1] if count == 2 else None, max_length)
            for i, one in zip(chosen, read, strict=True):
                tokens = np.append(one.tokens, drafts[i].label).astype(np.int32)
                found[i] = Tokenised(tokens, np.append(one.second, len(one.tokens) > 0), one.whole)
        return [found[i] for i in range(len(drafts))]

    def examples(self, corpus: Corpus) -> Labelled:
        return Labelled(corpus, self.classes.names)

    def shown(self, examples: Labelled, i: int) -> Marked:
        tokens, _ = examples.document(i)
        name = examples.classes[int(examples.labels[i])]
        return [*self.excerpt(tokens, np.zeros(len(tokens), dtype=np.bool_)), (" → ", False), (name, True)]


class SourceTargets(_TextReading):
    """Texts to read, each with a text to write."""

    needs = "a row needs a source and a target of at least one token each"
    shapes: ClassVar[Shapes] = {
        "source": Shape(("source", "target")),
        **{name: SHAPES[name] for name in ("completion", "instruction", "messages")},
    }

    @property
    def key(self) -> list[object]:
        return ["pairs", self.digest]

    def read(self, row: Row, problems: Problems) -> _Texts | None:
        if shape_among(self.shapes, row.fields) == "source":
            fields = Fields(row, problems)
            texts = fields.text("source"), fields.text("target")
            return None if fields.failed else _Texts(texts)
        if known_shape(self.shapes, row, problems) is None:
            return None
        document = read_document(row, problems)
        if not isinstance(document, Conversation):
            return None
        *context, answer = document.messages
        roles = [turn["role"] for turn in context]
        if roles not in (["user"], ["system", "user"]) or answer["role"] != "assistant":
            said = ", ".join(turn["role"] for turn in document.messages)
            problems.add(
                row.origin,
                f"turns {said}: a model with an encoder reads one text and writes one",
                hint="one user and one assistant turn a row; a conversation is for --task causal-lm",
            )
            return None
        source = "\n\n".join(turn["content"] for turn in context) if document.prompt is None else document.prompt
        return _Texts((source.strip(), answer["content"]))

    def encode(self, drafts: Sequence[_Texts], max_length: int) -> list[Tokenised]:
        sources = encoded(self.tokeniser, [draft.texts[0] for draft in drafts], None, max_length)
        targets = encoded(self.tokeniser, [draft.texts[1] for draft in drafts], None, max_length, target=True)
        found = []
        for source, target in zip(sources, targets, strict=True):
            mask = np.arange(len(source.tokens) + len(target.tokens)) >= len(source.tokens)
            tokens = np.concatenate([source.tokens, target.tokens])
            found.append(Tokenised(tokens, mask, source.whole and target.whole))
        return found

    def examples(self, corpus: Corpus) -> Pairs:
        return Pairs(corpus)

    def shown(self, examples: Pairs, i: int) -> Marked:
        return self.excerpt(*examples.laid.document(i))


class PlainTexts(_TextReading):
    """Texts some of whose tokens are hidden.

    Raises:
        DataError: the tokenizer has no token that hides another.
    """

    needs = "a row needs a text of at least one token"
    shapes: ClassVar[Shapes] = {one: Shape((one,)) for one in _ONE}

    def __init__(self, tokenizer: PreTrainedTokenizerBase, words: int, seed: int = 0) -> None:
        super().__init__(tokenizer)
        if tokenizer.mask_token_id is None:
            raise DataError(
                f"{type(tokenizer).__name__} has no mask token, so nothing can be hidden",
                hint="masked-lm is for models that were made so: BERT, RoBERTa, ALBERT, DistilBERT",
            )
        self.mask_token: int = tokenizer.mask_token_id
        self.words, self.seed = words, seed

    @property
    def key(self) -> list[object]:
        return ["masked", self.digest]

    def read(self, row: Row, problems: Problems) -> _Texts | None:
        shape = known_shape(self.shapes, row, problems)
        if shape is None:
            return None
        fields = Fields(row, problems)
        text = fields.text(shape)
        return None if fields.failed else _Texts((text,))

    def encode(self, drafts: Sequence[_Texts], max_length: int) -> list[Tokenised]:
        read = encoded(self.tokeniser, [draft.texts[0] for draft in drafts], None, max_length)
        return [Tokenised(one.tokens, ~one.special, one.whole) for one in read]

    def examples(self, corpus: Corpus) -> Masked:
        return Masked(corpus, self.mask_token, self.words, self.seed)

    def shown(self, examples: Masked, i: int) -> Marked:
        shown, places, _ = examples.document(i)
        hidden: Any = np.zeros(len(shown), dtype=np.bool_)
        hidden[places] = True
        return self.excerpt(shown, hidden)
