"""A conversation with the base or adapters, which are switched while the base stays: what `rankwise chat` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.adapters.adapter import checked_name
from rankwise.data.template import Template
from rankwise.engine.generate import answer, stops_of
from rankwise.errors import DataError, SpecError
from rankwise.frozen.load import load_base
from rankwise.jobs.evaluate import as_trained, check_task, folder_names, load_adapter
from rankwise.jobs.vocabulary import with_tokens_of
from rankwise.jobs.watch import Watch
from rankwise.jobs.whole import check_adapters
from rankwise.surgery.bank import Bank
from rankwise.surgery.routing import Way
from rankwise.tasks import DEFAULT

BASE = "base"  # how the bare base is called


class Chat:
    """A loaded model with adapters on it, and what was said so far.

    Args:
        model, adapters: base, and adapters by name; the first one speaks, without any the base does.
        max_new_tokens: length of an answer at the most.
        temperature: 0 always gives the likeliest answer.
        storage: how the base is held; None as the adapters were trained.
        force: talk to adapters of another base or template all the same.

    Attributes:
        speaking: who answers, as it was asked for.

    Raises:
        DataError: the model has no chat template.
        SpecError: an adapter is called as the base is, or its folder holds a model that was trained whole.
        RankwiseError: of loading.
    """

    def __init__(
        self,
        model: str,
        adapters: Mapping[str, Path],
        watch: Watch,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        storage: str | None = None,
        force: bool = False,
    ) -> None:
        folders = list(adapters.values())
        if BASE in adapters:
            raise SpecError(f"{adapters[BASE]}: {BASE!r} is the bare base's name", hint="call it NAME=DIR")
        check_adapters(folders, "talk to it as --model, without --adapter")
        for folder in folders:
            check_task(folder, DEFAULT)  # before a model is loaded for what it is not
        with watch.stage(f"loading {model}"):
            base = load_base(model, storage=as_trained(folders, {"storage": storage})["storage"])
            self.base = with_tokens_of(base, folders, force=force)
            self.template = Template(self.base.tokenizer)
        if self.template.chat is None:
            raise DataError(f"{model} has no chat template", hint="chat with an instruct model")
        self.bank, self.adapters = Bank(self.base.model), dict(adapters)
        for name, folder in adapters.items():
            load_adapter(self.bank, name, folder, self.base, self.template.digest, force=force)
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.messages: list[dict[str, Any]] = []
        self.speaking = next(iter(adapters), BASE)

    def way(self, asked: str) -> Way:
        """Who is asked for: an adapter's name, a nested one at a rank such as `a@4`, `base`, or a mix: `a=0.7,b=0.3`.

        Raises:
            BankError: there is no such adapter.
            SpecError: a weight is no number, or a rank is none that the adapter has.
            RouteError: what is mixed cannot be.
        """
        if asked == BASE:
            return None
        if "=" not in asked:
            name, at, rank = asked.partition("@")
            adapter = self.bank.adapter(name)
            if not at:
                return name
            if not rank.isdecimal():
                raise SpecError(f"{asked!r}: expected a rank, such as {name}@4")
            adapter.check_nested(int(rank))
            return self.bank.prefix(name, int(rank))
        weights = {}
        for part in asked.split(","):
            name, _, weight = part.partition("=")
            try:
                weights[name.strip()] = float(weight)
            except ValueError:
                raise SpecError(f"{part!r}: expected a weight, such as {name.strip() or 'a'}=0.7") from None
        return self.bank.mix(weights)

    def use(self, asked: str) -> None:
        """From now on somebody else answers, on what was said so far.

        Raises:
            RankwiseError: as `way`.
        """
        self.way(asked)
        self.speaking = asked

    def reply(self, text: str, say: Callable[[str], None] | None = None) -> str:
        """The answer to `text`, given as it comes to `say`; both are remembered."""
        messages = [*self.messages, {"role": "user", "content": text}]
        found = self._answer(self.speaking, messages, say)
        self.messages = [*messages, {"role": "assistant", "content": found}]
        return found

    def compared(self, text: str, asked: Sequence[str]) -> list[str]:
        """What each of those asked answers to `text`.

        If who speaks is one of them, the text and that answer are remembered; else it was aside.

        Raises:
            RankwiseError: as `way`.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        found = [self._answer(one, messages) for one in asked]
        if self.speaking in asked:
            self.messages = [*messages, {"role": "assistant", "content": found[list(asked).index(self.speaking)]}]
        return found

    def _answer(self, asked: str, messages: Sequence[dict[str, Any]], say: Callable[[str], None] | None = None) -> str:
        return answer(
            self.bank,
            self.way(asked),
            self.base.tokenizer,
            self.template.generation_prompt(messages),
            stops=stops_of(self.template, self.base.model),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            say=say,
        )

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages = []


def named_adapters(asked: Sequence[str]) -> dict[str, Path]:
    """Folders by name, of `NAME=DIR` or `DIR`, which is called by its folder.

    Raises:
        SpecError: a name or a folder is said twice.
        BankError: a name is none.
    """
    places, names = [], []
    for one in asked:
        name, given, place = one.partition("=")
        own = bool(given) and "/" not in name and not Path(one).expanduser().exists()
        places.append(Path(place if own else one).expanduser())
        names.append(checked_name(name) if own else None)
    found = [name or by_folder for name, by_folder in zip(names, folder_names(places), strict=True)]
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise SpecError(f"two adapters are called {twice!r}", hint="give each a name of its own: NAME=DIR")
    return dict(zip(found, places, strict=True))
