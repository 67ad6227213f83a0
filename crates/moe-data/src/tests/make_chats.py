"""Writes chats.json, what transformers renders from the two templates beside this file. Usage: python make_chats.py TOKENIZER_DIR"""
import json
import os
import sys

import transformers

HERE = os.path.dirname(os.path.abspath(__file__))
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])


def turn(role, content, **more):
    return dict(role=role, content=content, **more)


call = {"type": "function", "function": {"name": "get", "arguments": {"city": "Zürich", "n": [1, 2.5, True, None]}}}
tool = {"name": "get", "description": "it's <x> & \"y\"", "parameters": {"type": "object", "properties": {}}}
CASES = [
    ("qwen_kind", [turn("user", "2 + 2?"), turn("assistant", "4")], None),
    ("qwen_kind", [turn("system", "Be brief."), turn("user", "Hé <b>?"), turn("assistant", "Yes & no."), turn("user", "Why?"),
                   turn("assistant", "<think>\nhm\n</think>\n\nBecause.")], None),
    ("qwen_kind", [turn("user", "a"), turn("assistant", "<think>\nlong\n</think>\n\nfirst"), turn("user", "b"), turn("assistant", "second")], None),
    ("qwen_kind", [turn("user", "Weather?"), turn("assistant", None, tool_calls=[call]), turn("tool", "<sunny>"), turn("assistant", "Sun.")],
     [{"type": "function", "function": tool}]),
    ("blocks", [turn("user", "hi", urgent=True), turn("assistant", " hello there ", shout=True), turn("user", "x", urgent=None),
                turn("assistant", " y ")], None),
    ("blocks", [turn("system", " S ", name="n"), turn("user", "q", urgent=[None, 3])], None),
]
out = []
for template, messages, tools in CASES:
    source = open(os.path.join(HERE, template + ".jinja")).read()
    given = dict(conversation=messages, tools=tools, chat_template=source)
    out.append({
        "template": template, "messages": messages, "tools": tools,
        "text": tokenizer.apply_chat_template(**given, tokenize=False),
        "opened": tokenizer.apply_chat_template(**given, tokenize=False, add_generation_prompt=True),
        "ids": tokenizer.apply_chat_template(**given, return_dict=False),
    })
with open(os.path.join(HERE, "chats.json"), "w") as file:
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in out)
    file.write('{"transformers": "%s", "cases": [\n%s\n]}\n' % (transformers.__version__, lines))
