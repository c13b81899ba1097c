"""Chat: messages become the text that the tokenizer's own template makes of them, with spans by role."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from patchclamp.errors import TaskError
from patchclamp.tasks._pairs import Message, Prompt, Range
from patchclamp.tasks._tokens import Tokenizer


@dataclass(frozen=True)
class Chat:
    """How prompts become chats.

    Args:
        wrap: whether a text prompt becomes a user message (messages are rendered in any case).
        system: a system message to begin with, where the prompt has none of its own.
        arguments: what the tokenizer's template takes besides, such as `enable_thinking`.
    """

    wrap: bool = False
    system: str | None = None
    arguments: Mapping[str, object] = field(default_factory=dict[str, object])


def messages_of(prompt: Prompt, chat: Chat) -> tuple[Message, ...] | None:
    """The messages of a prompt under `chat`; None where it stays what it is."""
    if isinstance(prompt, str):
        if not chat.wrap:
            return None
        messages: tuple[Message, ...] = (Message("user", prompt),)
    else:
        messages = tuple(part for part in prompt if isinstance(part, Message))
        if not messages:
            if chat.wrap:
                raise TaskError("a chat template wraps text, and this prompt is token ids: leave out chat")
            return None
    if chat.system is not None and messages[0].role != "system":
        messages = (Message("system", chat.system), *messages)
    return messages


def render(tokenizer: Tokenizer, messages: tuple[Message, ...], chat: Chat) -> tuple[str, dict[str, Range]]:
    """The text of some messages up to where the answer begins, and its spans in characters.

    `system` and `user` are the contents of the system and of the last user message (`user_1`, ... those before), and
    `template` what the template puts between the last content and the answer. A final assistant message is gone on with.

    Raises:
        TaskError: the tokenizer has no template, or the template refuses or rewrites the messages.
    """
    template: Any = getattr(tokenizer, "apply_chat_template", None)
    if template is None:
        raise TaskError("the prompts are chats, and this tokenizer has no chat template")
    begun = messages[-1].role == "assistant"
    rows = [{"role": message.role, "content": message.content} for message in messages]
    try:
        how: dict[str, object] = {"add_generation_prompt": not begun, "continue_final_message": begun, **chat.arguments}
        text = str(template(rows, tokenize=False, **how))
    except Exception as error:  # jinja's and the template's own errors, of many classes
        raise TaskError(f"the tokenizer's chat template cannot render these messages: {error}") from error
    return text, _spans(text, messages, begun)


def _spans(text: str, messages: tuple[Message, ...], begun: bool) -> dict[str, Range]:
    places: list[Range] = []
    after = 0
    for message in messages:
        content = message.content.strip()  # most templates trim
        start = text.find(content, after)
        if start < 0:
            raise TaskError(f"the chat template rewrites the {message.role} message {content[:60]!r}: its span cannot be named")
        after = start + len(content)
        places.append((start, after))
    spans: dict[str, Range] = {}
    for role in {message.role for message in messages}:
        mine = [place for place, message in zip(places, messages, strict=True) if message.role == role]
        spans |= {f"{role}_{i}": place for i, place in enumerate(mine[:-1], 1)}
        spans[role] = mine[-1]
    last, end = (places[-2][1] if len(places) > 1 else 0, places[-1][0]) if begun else (places[-1][1], len(text))
    if last < end:
        spans["template"] = last, end
    return {name: span for name, span in spans.items() if span[0] < span[1]}


def shift_spans(spans: Mapping[str, Range], messages: tuple[Message, ...], rendered: Mapping[str, Range]) -> dict[str, Range]:
    """Spans in the last user message, as spans in the rendered text."""
    if not spans:
        return {}
    content = next((message.content for message in reversed(messages) if message.role == "user"), None)
    if content is None or "user" not in rendered:
        raise TaskError("spans of a chat are characters of its last user message, and there is none")
    by = rendered["user"][0] - (len(content) - len(content.lstrip()))
    return {name: (max(0, start + by), end + by) for name, (start, end) in spans.items()}
