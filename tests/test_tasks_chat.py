"""Chat: prompts through the tokenizer's own template."""

from typing import Any

import pytest

from patchclamp.errors import TaskError
from patchclamp.tasks import load_task
from small_tokenizers import CHATML, LLAMA3, byte_level

TEXTS = ["What is the capital of France? Peru? It is Paris. Lima. You are a helpful bot. system user assistant"] * 3
TEXT = "What is the capital of France?"
SPAN = {"country": [TEXT.index("France"), TEXT.index("?")]}
ROW = {"clean": TEXT, "corrupt": TEXT.replace("France", "Peru"), "answer": " Paris", "wrong": " Lima", "spans": SPAN}


def tokenizer(template: str | None, bos: bool = True) -> Any:
    made = byte_level(TEXTS, bos=bos, template=template, size=600)
    for row in (" Paris", "Paris", " Lima", "Lima", " France", " Peru"):
        assert len(made([row], add_special_tokens=False)["input_ids"][0]) >= 1
    return made


def messages(content: str, *before: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": said} for role, said in (*before, ("user", content))]


@pytest.mark.parametrize(("template", "adds"), [(CHATML, True), (CHATML, False), (LLAMA3, True), (LLAMA3, False)])
def test_wrapped_prompts_are_the_templates_own_tokens(template: str, adds: bool) -> None:
    """The template's text, its ids, and BOS exactly once, whether template, tokenizer, both or none writes one."""
    made = tokenizer(template, adds)
    (one,) = load_task([ROW], chat=True).examples(made)
    rendered = made.apply_chat_template(messages(TEXT), tokenize=False, add_generation_prompt=True)
    bare = made([rendered], add_special_tokens=False)["input_ids"][0]
    wanted = adds or template == LLAMA3
    assert one.clean.count(0) == (1 if wanted else 0)
    assert list(one.clean) == ([0] if wanted and bare[0] != 0 else []) + bare
    # a wrapped answer begins a message: no blank before it
    assert made.decode(list(one.answers[0])) == "Paris" and made.decode(list(one.wrong[0])) == "Lima"
    joined = made([rendered + "Paris"], add_special_tokens=False)["input_ids"][0]
    assert joined == [*bare, *one.answers[0]]


@pytest.mark.parametrize(("bos", "count"), [(True, 1), (False, 0)])
@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_bos_once_or_never_where_asked(template: str, bos: bool, count: int) -> None:
    """The user's word on BOS goes before the template's; spans stay in place."""
    made = tokenizer(template)
    (one,) = load_task([ROW], chat=True, bos=bos).examples(made)
    assert one.clean.count(0) == count and (one.clean[0] == 0) is bos
    assert made.decode(list(one.clean[slice(*one.spans["country"])])).strip() == "France"


@pytest.mark.parametrize(
    ("template", "tail"),
    [(CHATML, "<|im_end|>\n<|im_start|>assistant\n"), (LLAMA3, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")],
)
def test_spans_name_who_speaks(template: str, tail: str) -> None:
    """system, user and template cover their text, the prompt's spans lie in the user's message."""
    made = tokenizer(template)
    task = load_task([ROW], chat=True, system="You are a helpful bot.")
    (one,) = task.examples(made)
    said = {name: made.decode(list(one.clean[start:end])) for name, (start, end) in one.spans.items()}
    assert said["system"] == "You are a helpful bot." and said["user"] == TEXT
    assert said["country"].strip() == "France" and said["template"] == tail
    assert one.spans["end"][1] == one.spans["template"][1] == len(one.clean)
    batch = task.examples(made).batch()
    width, longest = batch.tokens.shape[1], len(one.answers[0])
    assert batch.spans["answer"][0].tolist() == [width - longest, width]
    assert "Paris" not in said["user"]
    text = task.preview(made, 1)
    assert "<|eot_id|>" in text if template == LLAMA3 else "<|im_start|>" in text  # rendered tokens are shown


def test_rows_of_messages() -> None:
    """Messages are rendered without being asked to; a final assistant message is gone on with."""
    made = tokenizer(CHATML)
    before = (("system", "You are a helpful bot."), ("user", "What is it?"), ("assistant", "It is."))
    row = {**ROW, "clean": messages(ROW["clean"], *before), "corrupt": messages(ROW["corrupt"], *before)}
    (one,) = load_task([{**row, "answer": "Paris", "wrong": "Lima"}]).examples(made)
    said = {name: made.decode(list(one.clean[start:end])) for name, (start, end) in one.spans.items()}
    assert said["user_1"] == "What is it?" and said["user"] == TEXT and said["assistant"] == "It is."
    begun = {side: [*row[side], {"role": "assistant", "content": "It is"}] for side in ("clean", "corrupt")}
    (other,) = load_task([{**row, **begun}]).examples(made)
    assert made.decode(list(other.clean)).endswith("<|im_start|>assistant\nIt is")
    assert made.decode(list(other.answers[0])) == " Paris" and "template" in other.spans
    assert other.spans["assistant"][1] == len(other.clean)


def test_built_in_tasks_wrap() -> None:
    """A built-in task as a chat: pairs still align."""
    made = byte_level([f"{name} she he" for name in ("Mary", "John")], template=CHATML)
    task = load_task("gendered_pronoun", chat=True)
    rows = load_task([{"clean": "Mary said that", "corrupt": "John said that", "answer": " she", "wrong": " he"}], chat=True)
    (one,) = rows.examples(made)
    assert one.corrupt is not None and len(one.clean) == len(one.corrupt)
    assert task.hash != load_task("gendered_pronoun").hash


def test_arguments_reach_the_template() -> None:
    """What the template takes besides, such as switching thinking off; it counts in the hash."""
    made = tokenizer("{% if polite %}Please. {% endif %}" + CHATML)
    plain, polite = load_task([ROW], chat=True), load_task([ROW], chat=True, chat_arguments={"polite": True})
    assert not made.decode(list(plain.examples(made)[0].clean)).startswith("<s>Please")
    assert made.decode(list(polite.examples(made)[0].clean)).startswith("<s>Please. <|im_start|>user")
    assert plain.hash != polite.hash


def test_templates_that_cannot() -> None:
    """No template, one that refuses, one that rewrites: each says so."""
    with pytest.raises(TaskError, match=r"chat template cannot render these messages: .*chat_template is not set"):
        load_task([ROW], chat=True).examples(tokenizer(None))
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(TaskError, match="cannot render these messages: no system role"):
        load_task([ROW], chat=True, system="You are a helpful bot.").examples(tokenizer(refusing))
    shouting = CHATML.replace("message['content']", "message['content'] | upper")
    with pytest.raises(TaskError, match="the chat template rewrites the user message 'What is the capital"):
        load_task([ROW], chat=True).examples(tokenizer(shouting))
    with pytest.raises(TaskError, match="a chat template wraps text, and this prompt is token ids"):
        load_task([{"clean": [7, 8], "answer": 9}], chat=True).examples(tokenizer(CHATML))
