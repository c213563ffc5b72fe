"""Chat templates of many families, and what each is to make of a conversation, marked by hand.

Where TRL ships a family's own template, that is read at run time from the installed package; the others are
written here in the manner of the family. `Family` says in plain text how the family writes each part of a
conversation: `learned` is what the assistant says and is to be trained on, to the character.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

SPECIAL = [
    *(
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|im_start|>",
        "<|im_end|>",
    ),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]"),
    *(
        "[/INST]",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
        "[gMASK]",
        "<sop>",
        "<|tool_call|>",
    ),
    *(
        "<|START_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|USER_TOKEN|>",
        "<|CHATBOT_TOKEN|>",
        "<|SYSTEM_TOKEN|>",
    ),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<|turn>", "<turn|>"),
]

MISTRAL = """{{ bos_token }}{% set ns = namespace(system='') %}
{%- for m in messages -%}
{%- if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}
{%- elif m.role == 'user' %}{{ '[INST] ' + ns.system + m.content + ' [/INST]' }}{% set ns.system = '' %}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""

CHATML = """{% for m in messages %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

ZEPHYR = """{% for m in messages %}
{{- '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

VICUNA = """{{ bos_token }}{% for m in messages -%}
{%- if m.role == 'system' %}{{ m.content + '\n\n' }}
{%- elif m.role == 'user' %}{{ 'USER: ' + m.content + '\n' }}
{%- else %}{{ 'ASSISTANT: ' + m.content + eos_token + '\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"""

# Drops the thoughts of earlier turns, has no marks, and is unknown to TRL: the mask cannot be had.
FORGETFUL = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if m.role == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}
{%- else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Marks the last turn alone.
LAST_ONLY = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if m.role == 'assistant' and loop.last -%}
{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}
{%- else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"""

# Marks what the user says.
WRONG_SIDE = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}
{%- generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% endfor %}"""


@dataclass(frozen=True)
class Family:
    """How a family writes a conversation. system None: it takes no system prompt.

    template: Jinja text, or the name of one of TRL's. merged: the system prompt goes into the first
    user's turn, before it. default_system: stands where no system prompt is given. first_user: `user` of
    the first turn, where that differs. end: stands at the end, trained on.
    """

    template: str
    user: str
    learned: str
    start: str = ""
    system: str | None = None
    merged: str | None = None
    default_system: str = ""
    first_user: str | None = None
    before: str = ""
    after: str = ""
    end: str = ""

    @property
    def text(self) -> str:
        return self.template if "{" in self.template else trl_template(self.template)

    def takes_system(self) -> bool:
        return self.system is not None or self.merged is not None

    def expected(self, messages: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """(text, spans of what the assistant says) of a conversation of system, user and assistant."""
        text, spans, system = self.start, [], ""
        if messages[0]["role"] != "system":
            text += self.default_system
        first = True
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                if self.merged is not None:
                    system = self.merged.format(content)
                else:
                    assert self.system is not None
                    text += self.system.format(content)
            elif message["role"] == "user":
                pattern = self.first_user if first and self.first_user else self.user
                text += pattern.format(system + content)
                system, first = "", False
            else:
                said = self.learned.format(content)
                text += self.before
                spans.append((len(text), len(text) + len(said)))
                text += said + self.after
        if self.end:
            spans.append((len(text), len(text) + len(self.end)))
        return text + self.end, spans


def trl_template(name: str) -> str:
    """The text of a template that TRL has in its package."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _headers(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _chatml(role: str) -> str:
    return f"<|im_start|>{role}\n"


_QWEN_SYSTEM = _chatml("system") + "{}<|im_end|>\n"
_QWEN_USER = _chatml("user") + "{}<|im_end|>\n"
_COHERE = "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>{{}}<|END_OF_TURN_TOKEN|>"

FAMILIES: dict[str, Family] = {
    "llama3": Family(
        "llama3",
        start="<s>",
        system=_headers("system") + "{}<|eot_id|>",
        user=_headers("user") + "{}<|eot_id|>",
        before=_headers("assistant"),
        learned="{}<|eot_id|>",
    ),
    "llama3.1": Family(
        "llama3_1",
        start="<s>",
        default_system=_headers("system")
        + "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>",
        system=_headers("system")
        + "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{}<|eot_id|>",
        user=_headers("user") + "{}<|eot_id|>",
        before=_headers("assistant"),
        learned="{}<|eot_id|>",
    ),
    "qwen2.5": Family(  # TRL's variant counts the line's end after the role to the answer
        "qwen2_5",
        default_system=_QWEN_SYSTEM.format(
            "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        ),
        system=_QWEN_SYSTEM,
        user=_QWEN_USER,
        before="<|im_start|>assistant",
        learned="\n{}<|im_end|>\n",
    ),
    "qwen3": Family(
        "qwen3",
        system=_QWEN_SYSTEM,
        user=_QWEN_USER,
        before=_chatml("assistant"),
        learned="<think>\n\n</think>\n\n{}<|im_end|>\n",
    ),
    "qwen3-instruct": Family(
        "qwen3_instruct_2507",
        system=_QWEN_SYSTEM,
        user=_QWEN_USER,
        before=_chatml("assistant"),
        learned="{}<|im_end|>\n",
    ),
    "gemma": Family(
        "gemma",
        start="<s>",
        user="<start_of_turn>user\n{}<end_of_turn>\n",
        before="<start_of_turn>model\n",
        learned="{}<end_of_turn>\n",
    ),
    "gemma3": Family(
        "gemma3",
        start="<s>",
        merged="{}\n\n",
        user="<start_of_turn>user\n{}<end_of_turn>\n",
        before="<start_of_turn>model\n",
        learned="{}<end_of_turn>\n",
    ),
    "gemma4": Family(
        "gemma4",
        start="<s>",
        system="<|turn>system\n{}<turn|>\n",
        user="<|turn>user\n{}<turn|>\n",
        before="<|turn>model\n",
        learned="{}<turn|>\n",
    ),
    "phi3": Family(
        "phi3",
        system="<|system|>\n{}<|end|>\n",
        user="<|user|>\n{}<|end|>\n",
        before="<|assistant|>\n",
        learned="{}<|end|>\n",
        end="</s>",
    ),
    "deepseek-v3": Family(  # the role's mark is the assistant's, in TRL's variant
        "deepseekv3",
        start="<s>",
        system="{}",
        user="<｜User｜>{}",
        learned="<｜Assistant｜>{}<｜end▁of▁sentence｜>",
    ),
    "glm4": Family(  # a turn ends with the mark of the one that follows
        "glm4moe",
        start="[gMASK]<sop>",
        system="<|system|>\n{}",
        first_user="<|user|>\n{}",
        user="\n{}",
        before="<|assistant|>",
        learned="\n<think></think>\n{}<|user|>",
    ),
    "cohere": Family(
        "cohere",
        start="<s>",
        system=_COHERE.format("SYSTEM"),
        user=_COHERE.format("USER"),
        before="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        learned="{}<|END_OF_TURN_TOKEN|>",
    ),
    "lfm2": Family(
        "lfm2",
        start="<s>",
        system=_QWEN_SYSTEM,
        user=_QWEN_USER,
        before=_chatml("assistant"),
        learned="{}<|im_end|>\n",
    ),
    "mistral": Family(MISTRAL, start="<s>", merged="{}\n\n", user="[INST] {} [/INST]", learned=" {}</s>"),
    "chatml": Family(
        CHATML, system=_QWEN_SYSTEM, user=_QWEN_USER, before=_chatml("assistant"), learned="{}<|im_end|>\n"
    ),
    "zephyr": Family(
        ZEPHYR,
        system="<|system|>\n{}</s>\n",
        user="<|user|>\n{}</s>\n",
        before="<|assistant|>\n",
        learned="{}</s>\n",
    ),
    "vicuna": Family(
        VICUNA,
        start="<s>",
        system="{}\n\n",
        user="USER: {}\n",
        before="ASSISTANT: ",
        learned="{}</s>\n",
    ),
}
