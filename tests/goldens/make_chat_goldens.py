"""Writes `tests/fixtures/chat_templates/<name>.goldens.json`: what transformers renders with each `<name>.jinja` there.

The templates are ours, written to give the prompt format of a published family and to use the Jinja that its template
uses; the goldens come from `apply_chat_template` itself, so they include what it does before Jinja sees a message (keys
with a null value are dropped, a thought is found under its older names). The clock of `strftime_now` is fixed.

    python make_chat_goldens.py
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import tiny_tokenizer
from conversations import EVERY_FEATURE, PLAIN, THINKING, TOOL_FLOWS, TOOLS, system, user

FOLDER = tiny_tokenizer.FIXTURES / "chat_templates"
NOW = "2025-03-09T07:05:04"

Case = tuple[str, list[dict], dict]
"""Name, messages, and arguments of `apply_chat_template`."""


class FixedClock(datetime):
    """A `datetime` in which it is always `NOW`."""

    @classmethod
    def now(cls, tz: object = None) -> datetime:
        """Returns `NOW`."""
        return cls.fromisoformat(NOW)


@dataclass(frozen=True)
class Family:
    """One template, the tokens it is given and the conversations it is rendered with."""

    name: str
    bos_token: str | None
    eos_token: str
    conversations: list[dict[str, list[dict]]]
    more: list[Case] = field(default_factory=list)
    offers_tools: bool = False

    def cases(self) -> Iterator[Case]:
        """Yields each conversation with and without an opened answer, then the extra cases."""
        for group in self.conversations:
            tools = {"tools": TOOLS} if group is TOOL_FLOWS else {}
            for name, messages in group.items():
                yield name, messages, {**tools, "add_generation_prompt": True}
                yield f"{name}, no answer opened", messages, {**tools, "add_generation_prompt": False}
        yield from self.more


def opened(**arguments: object) -> dict:
    """Returns arguments that open an answer."""
    return {"add_generation_prompt": True, **arguments}


QUESTION = [system("Be exact."), user("Weather in Oslo?")]
CALLS_BUILTIN = [
    user("Search."),
    {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "brave_search", "arguments": {"query": "a b", "lang": "fr"}}}],
    },
    {"role": "ipython", "content": {"hits": ["x", 1]}},
]
SETTINGS = {
    "flag": True,
    "ratio": 0.1,
    "text": "é<>&'\"\u2028",
    "list": [],
    "map": {},
    "deep": {"z": [1, {"y": None}], "a": 1},
}

FAMILIES = [
    Family("llama3", "<|begin_of_text|>", "<|eot_id|>", [PLAIN]),
    Family(
        "llama3_1",
        "<|begin_of_text|>",
        "<|eot_id|>",
        [PLAIN, TOOL_FLOWS],
        [
            ("a date given", QUESTION, opened(date_string="1 Apr 2024")),
            ("tools in the system turn", QUESTION, opened(tools=TOOLS, tools_in_user_message=False)),
            ("tools under the older name", QUESTION, opened(custom_tools=TOOLS[1:])),
            ("an empty list of tools", QUESTION, opened(tools=[])),
            ("tools without a question", [system("Be.")], opened(tools=TOOLS)),
            ("built-in tools", QUESTION, opened(builtin_tools=["code_interpreter", "brave_search", "wolfram_alpha"])),
            ("a call of a built-in tool", CALLS_BUILTIN, opened(builtin_tools=["brave_search"])),
        ],
    ),
    Family("qwen2_5", None, "<|im_end|>", [PLAIN, TOOL_FLOWS], [("no tools", QUESTION, opened(tools=[]))]),
    Family(
        "qwen3",
        None,
        "<|im_end|>",
        [PLAIN, TOOL_FLOWS, THINKING],
        [
            ("thinking off", QUESTION, opened(enable_thinking=False)),
            ("thinking on", QUESTION, opened(enable_thinking=True)),
            ("thinking off with tools", QUESTION, opened(tools=TOOLS, enable_thinking=False)),
            ("thinking off, no answer opened", QUESTION, {"add_generation_prompt": False, "enable_thinking": False}),
        ],
    ),
    Family("mistral_v01", "<s>", "</s>", [PLAIN]),
    Family("mistral_v03", "<s>", "</s>", [PLAIN, TOOL_FLOWS]),
    Family(
        "every_feature",
        "<bos>",
        "<eos>",
        [EVERY_FEATURE],
        [
            ("settings", EVERY_FEATURE["one text"], opened(settings=SETTINGS)),
            ("the flag off", EVERY_FEATURE["one text"], opened(settings={**SETTINGS, "flag": False})),
        ],
    ),
]


def main() -> None:
    """Writes the goldens of every family."""
    chat_template_utils.datetime = FixedClock
    for family in FAMILIES:
        template = (FOLDER / f"{family.name}.jinja").read_text()
        rows = [golden(family, template, *case) for case in family.cases()]
        names = [row["name"] for row in rows]
        assert len(set(names)) == len(names), f"{family.name}: two rows have one name"
        write(FOLDER / f"{family.name}.goldens.json", rows)
        errors = sum("expect" not in row for row in rows)
        print(f"{family.name}: {len(rows)} rows, {errors} of them errors")


def golden(family: Family, template: str, name: str, messages: list[dict], arguments: dict) -> dict:
    """Renders one case. A row has `expect`, or `error` with the text given to `raise_exception`, or `fails` where the
    template breaks by itself; the words of that are Jinja's and not compared."""
    kwargs = {key: value for key, value in arguments.items() if key not in ("tools", "add_generation_prompt")}
    row = {
        "name": name,
        "messages": messages,
        "tools": arguments.get("tools"),
        "kwargs": kwargs,
        "add_generation_prompt": arguments["add_generation_prompt"],
        "bos_token": family.bos_token,
        "eos_token": family.eos_token,
        "now": NOW,
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.build(), bos_token=family.bos_token, eos_token=family.eos_token
    )
    try:
        row["expect"] = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)
    except jinja2.exceptions.UndefinedError:
        row["fails"] = True
    except jinja2.exceptions.TemplateError as error:
        assert type(error) is jinja2.exceptions.TemplateError, f"{family.name}: {name}: {error}"
        row["error"] = error.message
    return row


def write(path: Path, rows: list[dict]) -> None:
    """Writes one row a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
