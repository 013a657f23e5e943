import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.text import Text

from rankwise.texts import json_text, plain

texts = st.text(st.sampled_from("\\\\[]/#@ab 1:=\n"), max_size=12)


@given(texts, texts)
@example(r"match \[/INST\] here", "")
@example(r"solve \[x^2=1\] now", "")
@example(r"a\[1, 2]", "\\")
@example("ends in a backslash\\", "[open")
def test_a_text_is_shown_as_it_is_whatever_stands_around_it(first, second):
    shown = Text.from_markup(f"[bold]{plain(first)}[/bold]{plain(second)}] [dim]x[/]", emoji=False)
    assert shown.plain == f"{first}{second}] x"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_cannot_say_is_null(number):
    assert json.loads(json_text({"a": [1.5, (number,)], "b": number}, indent=1)) == {"a": [1.5, [None]], "b": None}
