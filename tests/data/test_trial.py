import time

import pytest

from rankwise.data.template import Template
from rankwise.data.trial import try_template
from rankwise.errors import DataError
from tests.data.chat import TEMPLATES, byte_level


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxx{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(70) }}",
        "{{ 'x' * 1000000000 }}",
        "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=3) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
        "{{ (9 ** 99) ** 99999 }}",
        "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x | replace('a', n.x) %}{% endfor %}",
    ],
    ids=["loop", "output", "recursion", "repeat", "tilde", "plus", "number", "power", "filter"],
)
def test_a_template_without_end_is_refused_in_time(source):
    begun = time.monotonic()
    with pytest.raises(DataError, match="the chat template is refused"):
        Template(byte_level(source))
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['os'].system('true') }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_a_template_that_reaches_for_the_machine_is_refused(source):
    with pytest.raises(DataError, match="unsafe"):
        Template(byte_level(source))


def test_a_template_with_a_mistake_is_refused_with_it():
    with pytest.raises(DataError, match=r"broken: .*endfor"):
        Template(byte_level("{% for message in messages %}"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_honest_templates_pass_the_trial_at_once(name):
    begun = time.monotonic()
    Template(byte_level(TEMPLATES[name]))
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    "construct",
    [
        "{% filter upper %}{% for m in messages %}{{ m.content | trim }}{% endfor %}{% endfilter %}",
        "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{{ 'x' | upper }}{% endcall %}",
        "{% set x | upper %}{{ messages[0].content }}{% endset %}{{ x }}",
        "{% for m in messages recursive %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index * 2 }}{% endfor %}",
        "{{ strftime_now('%d %b') }}{{ messages | tojson(indent=2) }}{{ '%s' % 3 }}{{ 2 ** 8 }}{{ ('a', 1) * 2 }}",
        "{% generation %}{% for m in messages %}{{ m.role[:2] ~ m['content'] }}{% break %}{% endfor %}"
        "{% endgeneration %}",
        "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}",
    ],
    ids=["filter block", "call block", "set block", "recursive", "functions", "generation", "exception"],
)
def test_whatever_a_template_does_first_it_is_watched_to_its_end(construct):
    Template(byte_level(construct))
    with pytest.raises(DataError, match="refused"):
        try_template(construct + "{{ 'x' * 1000000000 }}")
