"""Examples as text to be read by a person."""

from patchclamp.tasks._examples import Example, Examples
from patchclamp.tasks._pairs import Tokens
from patchclamp.tasks._tokens import Tokenizer


def shown(examples: Examples, k: int) -> str:
    """The first `k` examples, each on a few lines: prompts as tokens with `|` between them, answers, spans."""
    lines = [line for i, one in enumerate(examples.items[:k]) for line in (f"{i + 1}.", *_lines(examples.tokenizer, one))]
    lines += [f"dropped {count}: {reason}" for reason, count in examples.dropped.items()]
    return "\n".join(lines)


def _lines(tokenizer: Tokenizer, one: Example) -> list[str]:
    lines = [f"   clean    {_joined(tokenizer, one.clean)}"]
    if one.corrupt is not None:
        lines.append(f"   corrupt  {_joined(tokenizer, one.corrupt)}")
    for name, side in (("answer", one.answers), ("wrong", one.wrong)):
        if side:
            shown_side = ", ".join(repr(_joined(tokenizer, tokens)) for tokens in side[:8]) + (" ..." if len(side) > 8 else "")
            lines.append(f"   {name:<8} {shown_side}")
    if one.targets:
        lines.append(f"   targets  {len(one.targets)} of {len(one.clean)} tokens")
    spans = ", ".join(f"{name}={_joined(tokenizer, one.clean[start:end])!r}" for name, (start, end) in one.spans.items())
    return [*lines, f"   spans    {spans}"]


def _joined(tokenizer: Tokenizer, tokens: Tokens) -> str:
    return "|".join(str(tokenizer.decode([token])) for token in tokens).replace("\n", "\\n")
