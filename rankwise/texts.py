"""Values and texts as they are shown: JSON that every reader takes, and text in rich markup that is no markup."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_BRACKET = re.compile(r"(\\*)\[")
_TAG = re.compile(r"\[[a-z#/@][^\[]*?]")  # what rich takes for a tag
_NOTHING = "[none][/none]"  # a tag that changes nothing


def plain(text: str) -> str:
    """Text as it is, for rich markup around it: what looks like markup is not.

    rich's own `escape` loses backslashes before brackets that are no tags, and those at the end.
    """

    def escaped(found: re.Match[str]) -> str:
        count = len(found[1])
        # Before a tag two backslashes are one and a last one escapes; before another bracket one alone is taken away.
        doubled = 2 * count if _TAG.match(text, found.end() - 1) else count
        return "\\" * (doubled + 1) + "["

    shown = _BRACKET.sub(escaped, text)
    last = text.rfind("[")
    if last >= 0 and "]" not in text[last:]:
        return shown + "\\" * _trailing(text) + _NOTHING  # else the bracket could find its end in what follows
    return shown + "\\" * _trailing(text) + _NOTHING if text.endswith("\\") else shown


def _trailing(text: str) -> int:
    return len(text) - len(text.rstrip("\\"))


def json_text(value: Any, *, indent: int) -> str:
    """JSON; a number that is not finite, which JSON cannot say, is null."""
    return json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
