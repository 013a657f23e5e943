"""A conversation with the base or an adapter: what `rankwise chat` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankwise.data.template import Template
from rankwise.engine.generate import answer, stops_of
from rankwise.errors import DataError
from rankwise.frozen.load import load_base
from rankwise.jobs.evaluate import as_trained, check_task, load_adapter
from rankwise.jobs.vocabulary import with_tokens_of
from rankwise.jobs.watch import Watch
from rankwise.jobs.whole import check_adapters
from rankwise.surgery.bank import Bank
from rankwise.tasks import DEFAULT

_NAME = "adapter"


class Chat:
    """A loaded model and what was said so far.

    Args:
        model, adapter: base, and the adapter to talk to; None talks to the base.
        max_new_tokens: length of an answer at the most.
        temperature: 0 always gives the likeliest answer.
        storage: how the base is held; None as the adapter was trained.
        force: talk to an adapter of another base or template all the same.

    Raises:
        DataError: the model has no chat template.
        SpecError: the adapter's folder holds a model that was trained whole.
        RankwiseError: of loading.
    """

    def __init__(
        self,
        model: str,
        adapter: Path | None,
        watch: Watch,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        storage: str | None = None,
        force: bool = False,
    ) -> None:
        adapters = [adapter] if adapter is not None else []
        check_adapters(adapters, "talk to it as --model, without --adapter")
        for folder in adapters:
            check_task(folder, DEFAULT)  # before a model is loaded for what it is not
        with watch.stage(f"loading {model}"):
            base = load_base(model, storage=as_trained(adapters, {"storage": storage})["storage"])
            self.base = with_tokens_of(base, adapters, force=force)
            self.template = Template(self.base.tokenizer)
        if self.template.chat is None:
            raise DataError(f"{model} has no chat template", hint="chat with an instruct model")
        self.bank = Bank(self.base.model)
        self.name = _NAME if adapter is not None else None
        if adapter is not None:
            load_adapter(self.bank, _NAME, adapter, self.base, self.template.digest, force=force)
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.messages: list[dict[str, Any]] = []

    def reply(self, text: str, say: Callable[[str], None] | None = None) -> str:
        """The answer to `text`, given as it comes to `say`; both are remembered."""
        messages = [*self.messages, {"role": "user", "content": text}]
        found = answer(
            self.bank,
            self.name,
            self.base.tokenizer,
            self.template.generation_prompt(messages),
            stops=stops_of(self.template, self.base.model),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            say=say,
        )
        self.messages = [*messages, {"role": "assistant", "content": found}]
        return found

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages = []
