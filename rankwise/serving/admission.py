"""An adapter read and checked by itself, before it comes near the bank that answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from rankwise.adapters.adapter import Adapter
from rankwise.errors import AdapterFileError, AdapterMismatchError, RequestError
from rankwise.formats.peft import read_adapter
from rankwise.formats.record import read_record
from rankwise.frozen.load import Base
from rankwise.jobs.evaluate import check_task, trained_task
from rankwise.jobs.whole import check_adapters
from rankwise.surgery.bank import Bank
from rankwise.surgery.binding import check_fits
from rankwise.surgery.sites import Site

_ALONE = "merge it into the base (rankwise merge) and serve the result"


@dataclass(frozen=True)
class Parts:
    """Where an adapter has something, as far as two adapters may be in each other's way.

    Attributes:
        whole: modules trained whole.
        rows: layers with rows of tokens.
        sites: layers with factors.
    """

    whole: frozenset[str] = frozenset()
    rows: frozenset[str] = frozenset()
    sites: frozenset[str] = frozenset()

    def clash(self, other: Parts) -> str | None:
        """A place that both cannot have in one bank."""
        for mine, others in ((self, other), (other, self)):
            if both := mine.rows & others.sites:
                return min(both)
            for path in sorted(mine.whole):
                inner = {*others.sites, *others.rows, *(others.whole - {path})}
                if found := sorted(p for p in inner if f"{p}.".startswith(f"{path}.")):
                    return found[0]
        return None


@dataclass(frozen=True)
class Admitted:
    """An adapter that fits; `digest` is of its weights, whatever its name."""

    adapter: Adapter
    digest: str
    parts: Parts


class Admission:
    """Who may come to a base; may be asked in any thread, also while the base answers.

    Args:
        bank: of the base.
        template: digest of how the model is talked to; None is anything.
        force: adapters of another base or template all the same.
    """

    def __init__(self, bank: Bank, base: Base, template: str | None, *, force: bool = False) -> None:
        self.bank, self.base, self.template, self.force = bank, base, template, force
        self._sites: Mapping[str, Site] = {
            path: site for site in bank.sites.values() for path in (site.path, *site.aliases)
        }
        self._known: Collection[int] = set(base.tokenizer.get_vocab().values())
        _ = bank.modules, bank.identity.fingerprint, bank.vocabulary.size  # of the clean model, in this thread

    def read(self, folder: Path) -> Admitted:
        """Reads an adapter and proves that it can be served.

        Raises:
            AdapterFileError: it is broken, unsafe or of an unknown kind.
            AdapterMismatchError: made for another model, task or template, or with tokens that the base has not.
            SpecError: the folder holds a model that was trained whole.
        """
        if not folder.is_dir():
            raise AdapterFileError(f"{folder}: no such folder", hint="an adapter is a folder in PEFT's format")
        check_adapters([folder], "serve it as --model")
        check_task(folder, self.base.task)
        adapter = read_adapter(folder)
        self._check_task(folder)
        self._check_tokens(folder, adapter)
        check_fits(adapter, self._sites, self.bank.modules, self.bank.vocabulary)
        if not self.force:
            self.bank.identity.check(folder, adapter)
            self._check_template(folder)
        return Admitted(adapter, adapter.digest(), self._parts(adapter))

    def _check_task(self, folder: Path) -> None:
        task = trained_task([folder])
        if task != self.base.task:
            raise AdapterMismatchError(f"{folder}: trained for {task}, and {self.base.task} is served")

    def _check_tokens(self, folder: Path, adapter: Adapter) -> None:
        fresh = sorted({token for rows in adapter.tokens.values() for token in rows.tokens} - set(self._known))
        if fresh:
            raise AdapterMismatchError(
                f"{folder}: has tokens of its own ({', '.join(map(str, fresh[:5]))}), which a base that many adapters "
                "share does not know",
                hint=_ALONE,
            )

    def _check_template(self, folder: Path) -> None:
        trained_with = (read_record(folder) or {}).get("template", {}).get("digest")
        if self.template is not None and trained_with not in (None, self.template):
            raise AdapterMismatchError(
                f"{folder}: trained with another chat template or tokenizer than {self.base.name} has",
                hint="use the tokenizer it was trained with; to go on all the same, --force",
            )

    def _parts(self, adapter: Adapter) -> Parts:
        sites = frozenset(self._sites[path].path for path in adapter.sites)
        rows = frozenset(self.bank.vocabulary.tables(adapter.tokens)) if adapter.tokens else frozenset()
        return Parts(frozenset(adapter.modules), rows, sites)


def allowed_folder(path: str, root: Path | None, *, any_path: bool = False) -> Path:
    """The folder that somebody names over HTTP, if it may be read; relative ones lie in `root`.

    Raises:
        RequestError: it lies elsewhere; whether there is anything is not told.
    """
    if root is None and not any_path:
        raise RequestError("no adapters can be loaded here", hint="rankwise serve --adapters-dir DIR")
    if "\0" in path:
        raise RequestError("a path with a zero byte in it")
    folder = Path(path).resolve() if root is None else (root.resolve() / path).resolve()
    if not any_path and root is not None and not folder.is_relative_to(root.resolve()):
        raise RequestError(f"{path}: not in the folder of the adapters", hint="--allow-any-path lets all paths in")
    return folder
