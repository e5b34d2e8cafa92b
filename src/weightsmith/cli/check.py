"""`weightsmith check`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Device, Json, chosen
from weightsmith.cli.show import show_json
from weightsmith.cli.words import Parameter
from weightsmith.core.errors import RecipeError

__all__ = ["check"]

_BESIDE = "Another model to measure, instead of those that it was made from; may be repeated."
_SCORES = "Python file that defines scores(model, split), or a command that prints JSON; it is run on every model."


def check(
    out: Annotated[Path, Parameter(help="Folder with the model.")],
    /,
    *,
    beside: Annotated[tuple[str, ...], Parameter(help=_BESIDE)] = (),
    text: Annotated[Path | None, Parameter(help="UTF-8 file to measure perplexity on; default: some English.")] = None,
    length: Annotated[int, Parameter(help="Tokens of context.")] = 512,
    prompt: Annotated[str | None, Parameter(help="Also let every model continue this text.")] = None,
    tokens: Annotated[int, Parameter(help="Tokens of an answer, at most.")] = 64,
    chat: Annotated[bool, Parameter(help="Ask the prompt in the tokenizer's chat template.")] = False,
    evaluator: Annotated[str | None, Parameter(help=_SCORES)] = None,
    device: Device = "auto",
    trust_remote_code: Annotated[bool, Parameter(help="Let the checkpoint's own python code run.")] = False,
    json: Json = False,
) -> int:
    """Load a result, run it, and compare its perplexity (or else its outputs) with its parents'."""
    from weightsmith.cli.shown.check import show
    from weightsmith.observe.check import check as look

    if tokens < 1:
        raise RecipeError(f"--tokens must be at least 1, for example 64 (got {tokens})")
    ask = score = None
    if prompt is not None:
        from weightsmith.observe.answer import answer

        ask = partial(answer, prompt=prompt, tokens=tokens, chat=chat)
    elif chat:
        raise RecipeError("--chat says how --prompt is asked; name a prompt too")
    if evaluator is not None:
        from weightsmith.search.judge import judge

        score = judge(evaluator)
    report = look(
        out, beside=beside, text=text, length=length, device=chosen(device=device).device,
        trust_remote_code=trust_remote_code, ask=ask, score=score,
    )  # fmt: skip
    if json:
        show_json(report)
    else:
        show(report)
    return 0 if report["ok"] else 2
