"""The model's chat template: what of a conversation the model sees, and which of its tokens are trained.

The mask needs no help from the template.  For each assistant turn the conversation is rendered twice: up to that turn
with the prompt for it, and with the turn.  What the second adds to the first is what the model will have to write, and
that is what is trained, up to and with the end-of-turn token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError, TemplateSyntaxError

from rankwise.data.conversations import SHAPES, Conversation, Message, Text, read_document
from rankwise.data.corpus import Corpus
from rankwise.data.problems import Problems
from rankwise.data.reading import Marked, Reading
from rankwise.data.row import Row
from rankwise.data.tokeniser import Draft, Piece, Span, Tokenised, Tokeniser
from rankwise.data.trial import try_template
from rankwise.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["all", "last"]
# Everything a template, which is somebody's program, may raise while it runs.
_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_NO_TEMPLATE = "use an instruct model, set tokenizer.chat_template, or write the rows as 'prompt' and 'completion'"


class TemplateRefusedError(DataError):
    """The template does not take this conversation; the next one may be fine."""


@dataclass(frozen=True)
class _Turn:
    """A conversation rendered up to one assistant turn.

    Attributes:
        text: the rendering.
        begin: where what the model has to write begins.
        end: behind the end-of-turn token, or behind the content where the template writes none.
        least_end: behind the first special token after the content; some templates write a second one at the very end.
        closed: the template wrote an end-of-turn token.
    """

    text: str
    begin: int
    end: int
    least_end: int
    closed: bool


class Template(Reading):
    """How a tokenizer's model is talked to.

    With a chat template every conversation is rendered by it (by transformers, in jinja's sandbox); the template alone
    decides about BOS.  A tokenizer without one has the plain format: BOS if the tokenizer adds one, the prompt, the
    completion, EOS.  The prompt of an alpaca row is instruction, blank line, input, blank line.  Plain text is always
    BOS if the tokenizer adds one, the text, EOS.

    Args:
        tokenizer: a fast one, of any model.
        train_on: all assistant turns, or only the last of each conversation.

    Raises:
        DataError: the chat template is broken, unsafe or endless, the tokenizer is not fast, or there is no EOS to end
            a document with.
    """

    shapes = SHAPES
    needs = "a row needs an assistant turn, a completion or a text of at least two tokens"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "all") -> None:
        if train_on not in get_args(TrainOn):
            raise DataError(f"train_on = {train_on!r}, expected one of {', '.join(get_args(TrainOn))}")
        self.tokeniser = Tokeniser(tokenizer)
        self.train_on = train_on
        self._named = _templates(tokenizer)
        self.chat: str | None = self._named.get("default")
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self._special = {str(token.content) for token in added if token.special} | {tokenizer.eos_token or ""} - {""}
        self._special_sizes = sorted({len(token) for token in self._special}, reverse=True)
        if self.chat is None and self.tokeniser.eos is None:
            raise _no_eos()
        for chat in self._named.values():
            self._check(chat)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the template's text and the tokenizer: with the same digest the same rows give the same tokens."""
        # Rows with tools are rendered by another of the named templates, so all of them count.
        chat = self.chat if len(self._named) < 2 else json.dumps(self._named, sort_keys=True)
        return hashlib.sha256(f"{self.tokeniser.digest}\n{chat}".encode()).hexdigest()

    @property
    def key(self) -> list[object]:
        return [self.digest, self.train_on]

    def read(self, row: Row, problems: Problems) -> Text | Conversation | None:
        return read_document(row, problems)

    def encode(self, drafts: Sequence[Draft], max_length: int) -> list[Tokenised]:
        return [document.cut(max_length) for document in self.tokeniser.encode(drafts, max_length)]

    def examples(self, corpus: Corpus) -> Corpus:
        return corpus

    def shown(self, examples: Corpus, i: int) -> Marked:
        return self.excerpt(*examples.document(i))

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Tokens at which an answer is over: EOS, and the end-of-turn token of the chat template."""
        ids = [] if self.tokeniser.eos is None else [self.tokeniser.eos]
        if self.chat is not None:
            try:
                turn = self._turn([{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}], 1, None)
            except TemplateRefusedError:
                return tuple(ids)
            ids += self.tokeniser.ids(turn.text[: turn.least_end])[-1:] if turn.closed else []
        return tuple(dict.fromkeys(ids))

    def render(self, conversation: Conversation | Text) -> list[Tokenised]:
        """The documents of one row: usually one; none when it has no assistant turn to train.

        Where earlier turns are rendered differently once a later one follows (templates that strip the thinking from
        history) there is a document for each way they are rendered, and every turn is trained in the one in which it
        stands as the model wrote it.

        Raises:
            TemplateRefusedError: the template does not take it.
        """
        return self.tokeniser.encode(self.drafts(conversation))

    def drafts(self, conversation: Conversation | Text) -> list[Draft]:
        """As `render`, before tokenising.  A document ends with its last trained token; the rest teaches nothing."""
        if isinstance(conversation, Text):
            text = conversation.text
            return [Draft((Piece(text, ((0, len(text)),)),), opened=True, closed=self._can_close())]
        trained = conversation.trained if self.train_on == "all" else conversation.trained[-1:]
        if not trained:
            return []
        if self.chat is None:
            return [self._plain(conversation)]
        return self._gathered(self._turns(conversation.messages, conversation.tools, trained), trained)

    def generation_prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """The tokens after which the model answers, the same as before that answer in training.

        Raises:
            TemplateRefusedError: the template does not take these messages; or there is none, and several messages.
        """
        if self.chat is not None:
            text = self._text(messages, tools, prompt=True)
            pieces = self._split(Piece(text), self._turns(messages, tools))
            return list(map(int, self.tokeniser.encode([Draft(pieces)])[0].tokens))
        if len(messages) != 1:
            raise TemplateRefusedError("without a chat template there can be only one turn", hint=_NO_TEMPLATE)
        prompt = self.tokeniser.ids(messages[0]["content"])
        opening = list(self.tokeniser.opening)
        return prompt if prompt[: len(opening)] == opening else opening + prompt

    def _plain(self, conversation: Conversation) -> Draft:
        if conversation.prompt is None:
            raise TemplateRefusedError("turns need a chat template and the tokenizer has none", hint=_NO_TEMPLATE)
        answer = conversation.messages[-1]["content"]
        return Draft((Piece(conversation.prompt), Piece(answer, ((0, len(answer)),))), opened=True, closed=True)

    def _turns(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, trained: Sequence[int] = ()
    ) -> dict[int, _Turn]:
        """Assistant turns by their place: those trained, and the others as far as their seams are needed."""
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [i for i in assistants if i <= max(trained, default=i)] if self.tokeniser.splittable else trained
        return {i: self._turn(messages, i, tools) for i in wanted}

    def _gathered(self, turns: Mapping[int, _Turn], trained: Sequence[int]) -> list[Draft]:
        """As few documents as hold every trained turn in the words in which it was rendered when it was the last."""
        documents: list[tuple[_Turn, list[Span]]] = []
        for turn in (turns[i] for i in reversed(trained)):
            last, spans = documents[-1] if documents else (None, [])
            if last is not None and last.text.startswith(turn.text[: turn.end]):
                spans.append((turn.begin, turn.end))
            elif last is not None and last.text.startswith(turn.text[: turn.least_end]):
                spans.append((turn.begin, turn.least_end))
            else:
                documents.append((turn, [(turn.begin, turn.end)]))
        drafts = []
        for turn, spans in reversed(documents):
            text = turn.text[: turn.end]
            pieces = self._split(Piece(text, tuple(sorted(spans))), turns)
            drafts.append(Draft(pieces, closed=not turn.closed and self._can_close()))
        return drafts

    def _split(self, piece: Piece, turns: Mapping[int, _Turn]) -> tuple[Piece, ...]:
        """A rendering cut where assistant turns begin, so that no token reaches across from prompt to answer.

        When the model is asked, the text ends there.  Tokenised in one, a prompt that ends in line ends or a space
        comes out differently once an answer follows.  Tokenizers that put a space before each text cannot do this.
        """
        if not self.tokeniser.splittable:
            return (piece,)
        begins = {turn.begin for turn in turns.values() if piece.text.startswith(turn.text[: turn.begin])}
        return piece.split(sorted(begins))

    def _can_close(self) -> bool:
        if self.tokeniser.eos is None:
            raise _no_eos()
        return True

    def _turn(self, messages: Sequence[Message], i: int, tools: Sequence[Any] | None) -> _Turn:
        text = self._text(messages[: i + 1], tools)
        begin = self._begin(messages, i, tools, text)
        end, least_end, closed = self._end(text, begin, messages[i].get("content") or "")
        return _Turn(text, begin, end, least_end, closed)

    def _begin(self, messages: Sequence[Message], i: int, tools: Sequence[Any] | None, text: str) -> int:
        """Behind the prompt for this turn; where that is not how the turn begins, at the first thing it says."""
        if i:
            try:
                prompt = self._text(messages[:i], tools, prompt=True)
            except TemplateRefusedError:
                prompt = None  # the turn itself is fine, but not the question for one: two answers in a row
            if prompt is not None and text.startswith(prompt):
                return len(prompt)
        # What two other answers leave as it is, the template writes by itself.
        others = (self._text([*messages[:i], {"role": "assistant", "content": other}], tools) for other in "XY")
        return min(_agreement(text, other) for other in others)

    def _end(self, text: str, begin: int, content: str) -> tuple[int, int, bool]:
        """Where a turn ends, at least ends, and whether a token says so; white space behind it never counts."""
        end = _rstripped(text, len(text))
        written = content.rstrip()
        size = self._special_before(text, begin, end)
        # A short answer such as ">" also ends the token behind it; that token goes first, unless the answer holds it.
        itself = written.endswith(text[end - size : end])
        if written and text.endswith(written, begin, end) and itself:
            return end, end, False
        last = least = 0
        at = end
        while size := self._special_before(text, begin, at):
            least = at
            last = last or at
            at = _rstripped(text, at - size)
        return (last, least, True) if last else (end, end, False)

    def _special_before(self, text: str, begin: int, end: int) -> int:
        """Characters of the special token that ends here, 0 when none does."""
        return next((n for n in self._special_sizes if end - n >= begin and text[end - n : end] in self._special), 0)

    def _text(self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=prompt
            )
        except _FAILURES as error:
            raise TemplateRefusedError(f"the chat template refuses it: {error}") from None
        return str(text)

    def _check(self, chat: str) -> None:
        try_template(chat)
        try:
            self._tokenizer.apply_chat_template([{"role": "user", "content": "A"}], chat_template=chat, tokenize=False)
        except (TemplateSyntaxError, SecurityError) as error:
            raise DataError(
                f"the chat template is {'unsafe' if isinstance(error, SecurityError) else 'broken'}: {error}",
                hint="it came with the model; correct tokenizer.chat_template or use another model",
            ) from None
        except _FAILURES:
            pass  # it may want more than one question; rows will tell


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The tokenizer's chat templates by name: none, `default`, or several of which transformers takes one by the row.

    Raises:
        DataError: there are several and none is the default.
    """
    found = tokenizer.chat_template
    if not found:
        return {}
    if isinstance(found, str):
        return {"default": found}
    if "default" not in found:
        raise DataError(
            f"the tokenizer has chat templates named {', '.join(map(repr, found))} and none is called 'default'",
            hint="set tokenizer.chat_template to the one to use",
        )
    return dict(found)


def _agreement(a: str, b: str) -> int:
    """Characters that two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _rstripped(text: str, end: int) -> int:
    while end and text[end - 1].isspace():
        end -= 1
    return end


def _no_eos() -> DataError:
    return DataError(
        "the tokenizer has no end-of-sequence token, so the model could never learn to stop",
        hint="set tokenizer.eos_token to the token the model ends its answers with",
    )
