"""Writes expressions.json, what transformers renders from each of these templates. Usage: python make_expressions.py"""
import json
import os

from transformers.utils.chat_template_utils import render_jinja_template
import transformers

HERE = os.path.dirname(os.path.abspath(__file__))
CONTEXT = {
    "s": "Héllo, wörld", "blank": "  a b\t c \n", "lines": "a\nb\r\nc\n\nd", "n": 3, "x": 2.5, "big": 1e20, "small": 1e-7, "one": 1.0,
    "flag": True, "nothing": None, "items": [3, 1, 2], "words": ["b", "a", "C"],
    "mixed": [1, "two", 3.0, None, True, {"k": "v"}, [], {}], "map": {"b": 1, "a": [1.5, "it's"], "c": None, "é": "\"q\""},
    "rows": [{"n": 2, "k": "x"}, {"n": 1, "k": "y"}, {"n": 3, "k": "x"}], "quote": "it's", "both": "it's \"x\"", "emoji": "你🎉\x7f\u2028",
}
TEXT = r"""
{{ 1.0 }} {{ 10/2 }} {{ 7//2 }} {{ 2**3 }} {{ 0.1+0.2 }} {{ 1e16 }} {{ 3 % 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7.5 // 2 }}
{{ 1.5|int }} {{ '3'|int + 1 }} {{ 'x'|int }} {{ '3.7'|int }} {{ 'x'|int(7) }} {{ 5|float }} {{ 'y'|float }} {{ '1e3'|float }}
{{ 2.5|round }} {{ 3.5|round }} {{ 2.675|round(2) }} {{ 2.1|round(0, 'ceil') }} {{ 2.9|round(method='floor') }} {{ 1234.5|round(-2) }} {{ 3|round }}
{{ 1e16 }} {{ 1e15 }} {{ 123456789.123 }} {{ 1e-4 }} {{ 1e-5 }} {{ 0.00001234 }} {{ 1e22 }} {{ 1.5e300 }} {{ -0.0 }} {{ 1e100 }}
{{ x }} {{ big }} {{ small }} {{ one }} {{ flag }} {{ nothing }} {{ not flag }} {{ n }} {{ -n }} {{ -x }}
{{ items }} {{ words }} {{ mixed }} {{ map }} {{ rows }}
{{ quote }} {{ [quote] }} {{ [both] }} {{ [emoji] }} {{ {'k': 'a\nb\t\\'} }} {{ ('a', 1) }} {{ ('a',) }} {{ () }} {{ [] }} {{ {} }}
{{ 'a' ~ 1 ~ 2.0 ~ true ~ none ~ [1] ~ {'a': 1} }}
{{ 'v: ' ~ x ~ ';' ~ one ~ ';' ~ nothing ~ ';' ~ flag }}
{{ 'v: ' ~ small ~ ' ' ~ big }}
{{ x|string + '!' }} {{ big|string }} {{ flag|string }} {{ nothing|string }} {{ mixed|string }} {{ map|string }} {{ 1e16|string }}
{{ mixed|join(', ') }} {{ [1.0, 1e16, none, true]|join('|') }} {{ words|join }} {{ rows|join(',', attribute='n') }} {{ 'abc'|join('-') }}
{{ ', '.join(words) }} {{ ''.join(['a', 'b']) }} {{ '-'.join('abc') }}
{{ map|tojson }} {{ mixed|tojson }} {{ s|tojson }} {{ emoji|tojson }} {{ emoji|tojson(ensure_ascii=True) }} {{ both|tojson }}
{{ [1.0, 0.1, 1e20, 1e-7, 123456789.123, -0.0, 1e16, 1e15]|tojson }} {{ none|tojson }} {{ true|tojson }}
{{ map|tojson(indent=2) }} {{ map|tojson(indent=4, sort_keys=true) }} {{ map|tojson(sort_keys=True) }} {{ map|tojson(indent=0) }}
{{ map|tojson(separators=(',', ':')) }} {{ map|tojson(separators=[', ', ' = ']) }} {{ mixed|tojson(indent=2, separators=(',', ': ')) }} {{ map|tojson(indent='--') }}
{{ map|tojson(False) }} {{ s|tojson(true) }} {{ [[], {}, [[]]]|tojson(indent=1) }} {{ map|tojson(ensure_ascii=False, indent=none) }}
{{ {2: 'a', none: 'b', true: 'c', 1.5: 'd'}|tojson }} {{ ('a', 1)|tojson }} {{ {'a': {'b': [1, {'c': 2}]}}|tojson(indent=3) }}
{{ range(3)|list }} {{ range(1, 7, 2)|list|tojson }} {{ range(5, 0, -2)|list }}
{{ s.upper() }} {{ s.lower() }} {{ s.title() }} {{ s.capitalize() }} {{ s.swapcase() }} {{ s.casefold() }} {{ s|upper }} {{ s|title }} {{ s|capitalize }}
{{ 'hello wORLD it\'s x-y'.title() }} {{ 'hello wORLD it\'s x-y'|title }} {{ 'HELLO'.capitalize() }} {{ 'straße'.upper() }}
[{{ blank.strip() }}] [{{ blank.lstrip() }}] [{{ blank.rstrip() }}] [{{ blank|trim }}] [{{ 'xxaxx'.strip('x') }}] [{{ 'xyaxy'.lstrip('yx') }}] [{{ 'a\n\n'.rstrip('\n') }}] [{{ 'xxaxx'|trim('x') }}]
{{ 'abc'.startswith('ab') }} {{ 'abc'.startswith(('x', 'a')) }} {{ 'abc'.endswith(('x', 'c')) }} {{ 'abc'.startswith('b', 1) }} {{ 'abc'.endswith('b', 0, 2) }}
{{ 'aXbX'.replace('X', 'y', 1) }} {{ 'aXbX'.replace('X', 'y') }} {{ 'abc'.replace('', '-') }} {{ 'aXbX'|replace('X', 'y', 1) }} {{ 'aXbX'|replace('X', 'y') }} {{ 'aXbX'.replace('X', 'y', count=1) }}
{{ 'a,b,,c'.split(',') }} {{ 'a,b,,c'.split(',', 1) }} {{ blank.split() }} {{ ' a  b c '.split(None, 1) }} {{ 'abc'.split('x') }} {{ ''.split() }} {{ ''.split(',') }} {{ 'a b c'.split(' ', maxsplit=1) }} {{ 'a,b'.split(sep=',') }}
{{ 'a b c'.rsplit(' ', 1) }} {{ ' a  b c '.rsplit(None, 1) }} {{ 'a b c'.rsplit() }} {{ 'a,b,c'.rsplit(',', maxsplit=1)[0] }}
{{ 'a:b:c'.partition(':') }} {{ 'a:b:c'.rpartition(':') }} {{ 'abc'.partition(':') }} {{ 'abc'.rpartition(':') }}
{{ 'abc'.removeprefix('a') }} {{ 'abc'.removesuffix('c') }} {{ 'abc'.removeprefix('x') }} {{ 'abc'.removesuffix('') }}
{{ 'abcb'.index('b') }} {{ 'abcb'.rindex('b') }} {{ 'abcb'.find('b') }} {{ 'abcb'.find('z') }} {{ 'abcb'.rfind('b') }} {{ 'abcb'.find('b', 2) }} {{ 'éab'.find('b') }} {{ 'abcb'.count('b') }} {{ 'aaaa'.count('aa') }} {{ 'abc'.count('') }} {{ 'abcb'.count('b', 2) }}
{{ lines.splitlines() }} {{ lines.splitlines(true) }} {{ 'a\u2028b\x0bc\x1cd'.splitlines() }} {{ lines.splitlines(keepends=True)|length }}
{{ '12'.isdigit() }} {{ '1.2'.isdigit() }} {{ '½'.isdigit() }} {{ '½'.isnumeric() }} {{ '²'.isdigit() }} {{ '²'.isdecimal() }} {{ '12'.isdecimal() }} {{ 'ab1'.isalnum() }} {{ 'ab'.isalpha() }} {{ ''.isalpha() }} {{ ' '.isspace() }} {{ 'Ab'.istitle() }} {{ 'AB'.isupper() }} {{ 'ab1'.islower() }} {{ 'é'.isascii() }} {{ 'a_1'.isidentifier() }}
[{{ 'ab'.center(7) }}] [{{ 'ab'.center(7, '*') }}] [{{ 'ab'.ljust(5) }}] [{{ 'ab'.rjust(5, '.') }}] [{{ '-7'.zfill(5) }}] [{{ 'a\tb'.expandtabs(4) }}] [{{ 'ab'|center(6) }}]
{{ '%s-%d' % ('a', 3) }} {{ '%s' % 'x' }} {{ '%.2f' % 3.14159 }} {{ '%5d|%-5d|%05d' % (1, 2, 3) }} {{ '%x %X %o %e %g' % (255, 255, 8, 12345.678, 0.0001) }} {{ '%%' % () }} {{ '%s %s' % (1.0, none) }} {{ '%r' % 'a' }} {{ '%(a)s' % {'a': 1} }}
{{ '%s, %s!'|format('a', 'b') }} {{ '%.1f'|format(2.25) }} {{ '%s'|format(1e16) }} {{ '%(a)s'|format(a=1) }} {{ '%s'|format(none) }}
{{ '{}:{}'.format('k', 1) }} {{ '{0}{1}{0}'.format('a', 'b') }} {{ '{a}'.format(a=1) }} {{ '{:.2f}|{:5}|{:<5}|{:>5}|{:^5}|{:05d}'.format(1.5, 'a', 'b', 'c', 'd', 7) }} {{ '{}'.format(1.0) }} {{ '{!r}'.format('a') }} {{ '{{}}'.format() }} {{ '{:,}'.format(1234567) }} {{ '{}'.format(none) }} {{ '{}'.format(1e16) }} {{ '{}'.format([1, 'a']) }}
{{ items|sort }} {{ items|sort(reverse=true) }} {{ words|sort }} {{ words|sort(case_sensitive=true) }} {{ rows|sort(attribute='n')|map(attribute='n')|list }} {{ items|reverse|list }} {{ 'abc'|reverse }}
{{ items|first }} {{ items|last }} {{ items|min }} {{ items|max }} {{ items|sum }} {{ rows|sum(attribute='n') }} {{ [0.1, 0.2]|sum }} {{ items|length }} {{ 'héé'|length }} {{ map|length }} {{ items|count }}
{{ rows|map(attribute='k')|list }} {{ rows|selectattr('k', 'equalto', 'x')|list|length }} {{ rows|rejectattr('k', 'eq', 'x')|map(attribute='n')|first }} {{ items|select('odd')|list }} {{ items|reject('>', 1)|list }} {{ words|map('upper')|list }} {{ [0, 1, '', 'a']|select|list }} {{ rows|map(attribute='zz', default='-')|list }}
{{ rows|groupby('k')|map('first')|list }} {% for k, group in rows|groupby('k') %}{{ k }}={{ group|length }};{% endfor %} {{ [1, 1, 2]|unique|list }} {{ [1,2,3,4,5]|batch(2)|list }} {{ [1,2,3,4,5]|slice(2)|list }}
{% for k, v in map.items() %}{{ k }}={{ v }};{% endfor %}{% for k, v in map|items %}{{ k }}{% endfor %}{% for k, v in map|dictsort %}{{ k }}{% endfor %}{% for k in map %}{{ k }}{% endfor %}{{ map.keys()|list }}{{ map.values()|list }}
{{ map.get('b') }} {{ map.get('zz') }} {{ map.get('zz', 'd') }} {{ 'b' in map }} {{ 'zz' not in map }} {{ map['b'] }} {{ map.b }} {{ map.zz is defined }} {{ map['zz']|default('dd') }} {{ ''|default('e') }} {{ ''|default('e', true) }} {{ nothing|default('f') }} {{ nothing|d('f', true) }}
{{ map.items()|list }} {{ map.items()|list|tojson }} {{ rows[0].items()|list }}
{{ s[0] }} {{ s[-1] }} {{ s[1:4] }} {{ s[:-3] }} {{ s[::-1] }} {{ items[1:] }} {{ items[::-1] }} {{ items[-2:] }} {{ items[:2]|tojson }} {{ items + [4] }} {{ 'ab' * 3 }} {{ [1] * 3 }} {{ 3 * 'ab' }} {{ '-' * 0 }}|{{ (items + [9])[-1] }}
{{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ 'a' < 'b' }} {{ 1 == 1.0 }} {{ true == 1 }} {{ none == none }} {{ [1] == [1] }} {{ {'a': 1} == {'a': 1} }} {{ 'a' == 1 }} {{ (1, 2) == (1, 2) }} {{ 3 in items }} {{ 'll' in s }}
{{ flag and 'yes' }} {{ '' or 'no' }} {{ none and 1 }} {{ not none }} {{ 'a' if flag else 'b' }} {{ 'a' if not flag }}| {{ [] or {} }} {{ 0 or 0.0 }} {{ (1 if items else 2) }}
{{ n is number }} {{ x is float }} {{ n is integer }} {{ s is string }} {{ map is mapping }} {{ items is iterable }} {{ items is sequence }} {{ s is iterable }} {{ map is iterable }} {{ map is sequence }} {{ s is sequence }} {{ nothing is none }} {{ flag is boolean }} {{ flag is true }} {{ flag is number }} {{ flag is integer }} {{ n is odd }} {{ n is divisibleby 3 }} {{ s is defined }} {{ zz is undefined }} {{ n is eq 3 }} {{ n is in items }} {{ 'ABC' is upper }} {{ n is sameas 3 }} {{ (1,2) is sequence }} {{ range(2) is iterable }} {{ zz is none }} {{ one is integer }} {{ n is not none and s is string }} {{ nothing is iterable }} {{ nothing is sequence }} {{ n is iterable }} {{ nothing is mapping }} {{ zz is iterable }} {{ zz is sequence }} {{ zz is mapping }} {{ nothing is string }} {{ flag is iterable }} {{ nothing is number }} {{ zz is string }} {{ n is sequence }} {{ nothing is defined }} {{ nothing is undefined }} {{ map.items() is iterable }} {{ (items|map('string')) is iterable }} {{ zz is none }} {{ zz|list }} {{ zz|join }} {{ zz in items }} {{ zz ~ 'a' }}
{{ zz }}|{{ zz|default('q') }}|{{ zz|length }}|{{ zz|list }}|{{ zz == none }}|{{ zz is defined }}|{{ not zz }}
{% set ns = namespace(a=1, b=[]) %}{% set ns.a = ns.a + 1 %}{% for i in items %}{% set ns.b = ns.b + [i] %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns['a'] }}
{% for i in items %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.cycle('a', 'b') }}{{ loop.previtem }}{{ loop.nextitem }};{% else %}none{% endfor %}
{% for i in [] %}x{% else %}empty{% endfor %}{% for i in items if i > 1 %}{{ i }}{{ loop.length }}{% endfor %}{% for i in items %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% if i == 2 %}{% break %}{% endif %}{% endfor %}
{% for a in [[1, 2], [3, 4]] recursive %}{{ a|join }}{% endfor %}{% for a, b in [[1, 2], [3, 4]] %}{{ a }}{{ b }}{% endfor %}{% for (a, b) in [(1, 2)] %}{{ a + b }}{% endfor %}
{% macro m(a, b=2, c='x') %}<{{ a }}{{ b }}{{ c }}>{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(a=1, c='y') }}
{% macro inner() %}[{{ caller() }}]{% endmacro %}{% call inner() %}hi{% endcall %}
{% set v %}block {{ n }}{% endset %}{{ v }}{{ v|length }}{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set t = (1, 2) %}{{ t[0] }}{{ t }}
{% filter upper %}abc{{ s }}{% endfilter %}{% with q = 5 %}{{ q }}{% endwith %}{# comment #}{% raw %}{{ x }}{% endraw %}
{% if n > 2 and x < 3 or false %}A{% elif n == 3 %}B{% else %}C{% endif %}{%- if true -%}  trimmed  {%- endif %}   {%- if true +%}  kept{% endif %}
{{ s | upper | replace('L', 'l') | length }}{{ (s ~ s)|length }}{{ n|abs }}{{ -5|abs }}{{ (-5)|abs }}{{ x|abs }}
{{ 'a' 'b' }} {{ "a\"b\\n\n" }} {{ 'é\u4f60\x41\101' }} {{ 'a\U0001F389b\\U0001F389' ~ '\x7f' }} {{ 1_000 }} {{ 0x1F }} {{ 0b101 }} {{ 0o17 }} {{ 1e3 }} {{ 1.5e-3 }}
{{ items.index(1) }} {{ items.count(3) }} {{ [1, 2].copy() }} {{ (1, 2, 1).count(1) }} {{ map.copy() == map }} {{ words.index('a') }}
{{ '<a & "b">'|e }} {{ '<b>'|escape }} {{ '<b>'|safe }} {{ 'a b c'|wordcount }} {{ 'x\ny'|indent(2) }} {{ 'x\ny'|indent(2, true) }} {{ 'x\n\ny'|indent(width=3, first=True, blank=True) }}
{{ ['a', 'b']|list|first }} {{ 'abc'|list }} {{ map|list }} {{ 'abc'|first }} {{ 'abc'|last }} {{ (1, 2)|list }} {{ map.items()|first }} {{ []|first }}|
{{ dict(a=1, b=2) }} {{ dict([('a', 1)]) }} {{ dict(map, d=1)|length }} {{ cycler('a', 'b').next() }} {% set j = joiner(',') %}{{ j() }}a{{ j() }}b
{{ 7 / 2 }} {{ 6 / 3 }} {{ 2 ** -1 }} {{ 2 ** 0.5 }} {{ 10 ** 20 }} {{ 5 - 7.0 }} {{ 3 * 1.0 }} {{ true + 1 }} {{ 1 - true }} {{ 1.0 * 3 }} {{ 7 % 2.5 }}
{{ (x * 2)|int }} {{ x|round|int }} {{ '%d' % 3.7 }} {{ (7/2)|int }} {{ n|string|length }} {{ '0x1f'|int(base=16) }} {{ '11'|int(0, 2) }}
{{ messages[0].content.split('e')[0] }} {{ messages|length }} {{ messages[0]['role'] }} {{ messages[-1].content }} {{ messages[1:]|length }} {{ (messages|first).role }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ messages|map(attribute='role')|join(',') }} {{ messages[0].zz is defined }} {{ messages[0].get('tool_calls', [])|length }} {{ tools }} {{ tools is none }} {{ messages[0].keys()|list }}
{{ namespace(a=1).a }} {{ (namespace(a=1)).a is defined }} {{ 'a'.__class__ is defined }} {{ true }} {{ True }} {{ None }} {{ none }} {{ False }}
{{ [1, 2, 3][1] }} {{ {'a': {'b': 2}}.a.b }} {{ {'a': 1}['a'] }} {{ [[1, 2], [3]]|sum(start=[]) }} {{ [3, 1]|sort|first }} {{ [{'a': 1}, {'a': none}]|selectattr('a')|list }} {{ ['a', none]|select('none')|list|length }} {{ ['a', none]|reject('none')|list }} {{ [1, 2]|map('string')|join('') }} {{ ['a b', 'c']|map('replace', ' ', '_')|list }}
{{ '\n' in 'a\nb' }} {{ 'a\\n' }} {{ 'tab\there' }} {{ 'a' + 'b' if flag else 'c' }} {{ ('a' if flag else 'b') + 'c' }} {{ 'abc'[1:][0] }} {{ 'a-b'.split('-')[-1] }} {{ 'a-b'.split('-')|last }} {{ 'x'.join(['a', 'b'])|upper }}
{{ [1, 2]|tojson|length }} {{ {'a': range(3)|list}|tojson }} {{ (messages|map(attribute='role')|list)|tojson }} {{ [1.0]|tojson }} {{ 'é'|tojson(ensure_ascii=true) }} {{ {'b': 1, 'a': {'d': 1, 'c': 2}}|tojson(sort_keys=true, separators=(',', ':')) }}
{% for message in messages %}{% if loop.index0 == 0 and message.role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ message.role ~ ': ' ~ message.content|trim ~ '\n' }}{% endfor %}
{{ 'a,b;c'|replace(',', ' ')|replace(';', ' ') }} {{ 'x'|center(5)|length }} {{ 'Ab'|lower }} {{ 'abc'|upper|lower|title }} {{ 5|string|int + 1 }} {{ '5' ~ 5 }} {{ 'Hello %s' % 'a' ~ 'b' }} {{ '%d%%' % 50 }} {{ '%s' % [1, 2] }} {{ '%s' % ('t',) }} {{ '%c' % 'x' }} {{ '%+d % d' % (1, 2) }} {{ '%#x' % 255 }} {{ '%10.3f|' % 3.14159 }} {{ '%-10s|' % 'ab' }}
{{ items|tojson }}{{ items|list|tojson }}{{ (items|map('string')|list)|tojson }}{{ '' if nothing is none else nothing }}{{ [] if not items else items|first }}{{ 3|default(4) }}{{ zz|default([])|length }}
""".strip("\n")
EXTRA = ["{%- for m in messages -%}\n{{- m.role }}\n{%- if not loop.last %},{% endif -%}\n{%- endfor %}", "  {% if true %}\n  a\n  {% endif %}\nb\n", "a\n{% set x = 1 %}\n  b {# c #}\nd\n\n", "\n\n{{ n }}\n", "{% for i in items %}\n- {{ i }}\n{% endfor %}\nend",
         "{{ n -}}  x", "x  {{- n }}", "a {%- if true %} b {%- endif %} c", "{% generation %}\nx\n{% endgeneration %}\ny", "x\n  {%- generation -%}\n  y\n  {%- endgeneration %}\nz",
         "{{ '{% generation %}' }}", "{%- set tools = tools or [] %}\n{{ tools|length }}\n", "a\r\nb{% if true %}\r\nc{% endif %}\r\n"]
MESSAGES = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": " Yes. ", "reasoning": "hm"}]


def main():
    cases = []
    singles = []
    for line in TEXT.split("\n"):
        parts, depth, start, i = [], 0, 0, 0
        # whole lines, and for lines of plain expressions each expression by itself
        if "{%" not in line and "{#" not in line:
            i = 0
            while (a := line.find("{{", i)) >= 0:
                b = a + 2
                quote = None
                nest = 0
                while True:
                    ch = line[b]
                    if quote:
                        if ch == "\\":
                            b += 1
                        elif ch == quote:
                            quote = None
                    elif ch in "'\"":
                        quote = ch
                    elif ch == "{":
                        nest += 1
                    elif ch == "}":
                        if nest == 0:
                            break
                        nest -= 1
                    b += 1
                singles.append(line[a:b + 2])
                i = b + 2
        else:
            singles.append(line)
    for source in dict.fromkeys(singles + EXTRA):
        try:
            text = render_jinja_template([MESSAGES], chat_template=source, **CONTEXT)[0][0]
            cases.append({"template": source, "text": text})
        except Exception as error:
            cases.append({"template": source, "error": f"{type(error).__name__}: {error}"[:120]})
    with open(os.path.join(HERE, "expressions.json"), "w") as file:
        rows = ",\n".join(json.dumps(case, ensure_ascii=True) for case in cases)
        file.write('{"transformers": %s, "messages": %s, "context": %s, "cases": [\n%s\n]}\n' % (
            json.dumps(transformers.__version__), json.dumps(MESSAGES), json.dumps(CONTEXT), rows))


main()
