"""The command line: which verbs there are, and what becomes of their errors.

A verb's file is imported when the verb is used, so that help and typing mistakes answer at once.
Exit codes: 0 done, 1 a fault in weightsmith, 2 a mistake in what was asked, 130 interrupted (by Ctrl-C, or by
the signals that end a session or a machine: SIGTERM, SIGHUP).
"""

from __future__ import annotations

import _thread
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from weightsmith import __version__

if TYPE_CHECKING:
    import cyclopts

__all__ = ["build", "main"]

_SUMMARY = "Make better models of trained ones by working on their weights."

_VERBS = {
    "merge": "Merge models as a recipe says.",
    "plan": "Show what a merge would do, and every problem, without doing it.",
    "inspect": "Measure how task vectors lie to each other, and which methods that speaks for.",
    "methods": "List the methods, or explain one.",
    "check": "Load a result and see whether it works.",
    "verify": "See whether a result is as it was written.",
    "observe": "Collect statistics of a model on data, for methods that need them.",
    "compress": "Store several fine-tuned models in little more space than one.",
    "restore": "Get one model back out of a compressed folder.",
    "lora": "Combine, average, resize or extract LoRA adapters.",
    "soup": "Merge those models of a recipe that are better together, by their scores.",
    "tune": "Learn numbers of a recipe from a handful of inputs.",
    "search": "Find values of a recipe by scoring candidates.",
    "bench": "Compare methods on models of your own, every method on every task.",
    "convert": "Print a mergekit config as the recipe that does the same.",
    "moe": "Build a mixture of experts of dense models, or make one smaller.",
    "train": "Fine-tune a model, or its singular values, as a baseline or an expert.",
    "align": "Put one model's units into the order of another's, so that averages make sense.",
    "barrier": "Measure the loss on the line between two models.",
    "disentangle": "Measure how far two task vectors disturb each other.",
    "heads": "Find channels between attention heads.",
    "edit": "Scale components of attention heads.",
    "lock": "Write a model in another basis, so that it cannot be merged naively.",
    "unlock": "Write a locked model as it was.",
    "audit": "Say what a lock is worth, and what is strange about a model.",
    "find": "Find recipes and models by example.",
    "diff": "Say how two models differ, tensor by tensor.",
    "lineage": "Show what a model was made from, and that from what.",
    "tokenizer": "Move a model to another tokenizer.",
    "studio": "Merge, look and compare in a browser, on this machine only.",
    "schema": "Print the JSON Schema of recipes, for editors.",
}
_COMPLETION = "Complete weightsmith's words in the shell."
_HOW_TO_GO_ON = {
    **dict.fromkeys(
        ("merge", "compress", "restore", "lock", "unlock", "tokenizer", "moe", "train", "tune"),
        "; continue with --resume",
    ),
    **dict.fromkeys(("bench", "search", "soup"), "; the same command goes on where it stopped"),
}


def build() -> cyclopts.App:
    """The command line as cyclopts reads it, with all its verbs, none of them imported."""
    from weightsmith.cli import full

    return full.build(_SUMMARY, _VERBS, _COMPLETION)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.  `argv`: without the program's name."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [w for i, w in enumerate(words) if w != "--debug" or i >= end]
    return _run(lambda: _command(words, argv is None), debug, words)


def _command(words: Sequence[str], own: bool) -> int:
    if words in ([], ["--help"], ["-h"]):
        return _help()
    if words == ["--version"]:
        sys.stdout.write(__version__ + "\n")
        return 0
    if own:
        from weightsmith.cli.process import own_process

        own_process()
    if words[0] in _VERBS and "--help" not in words:
        from weightsmith.cli.words import read

        module = importlib.import_module(f"weightsmith.cli.{words[0]}")
        if (call := read(getattr(module, words[0]), words[1:])) is not None:
            return _code(call.verb(*call.positional, **call.named))
    import cyclopts

    try:
        return _code(build()(words, exit_on_error=False, print_error=False))
    except cyclopts.CycloptsError as error:
        from weightsmith.core.errors import WeightsmithError

        raise WeightsmithError(_usage(error, words)) from None


def _code(returned: object) -> int:
    """What a verb returns is its exit code, if it is a number."""
    return returned if isinstance(returned, int) else 0


def _help() -> int:
    """The list of verbs, printed without importing anything: it is what is asked for most often."""
    rows = {
        **_VERBS,
        "--install-completion": _COMPLETION,
        "--version": "Print the version.",
        "--debug": "With any command: show where an error comes from.",
    }
    width = max(map(len, rows))
    lines = ["Usage: weightsmith COMMAND", "", _SUMMARY, ""]
    lines += [f"  {name:<{width}}  {text}" for name, text in rows.items()]
    lines += ["", '"weightsmith COMMAND --help" explains a command.']
    lines += [
        "A method of your own is one Python file: --plugin FILE (merge, plan, methods, ...); docs/howto/plugin.md."
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _run(action: Callable[[], int], debug: bool, words: Sequence[str]) -> int:
    """Exit code of an action; what goes wrong becomes one line on stderr."""
    try:
        with _ends_cleanly():
            code = action()
            sys.stdout.flush()
            return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        how = _HOW_TO_GO_ON.get(words[0], "") if words else ""
        return _fail(f"interrupted{how}", 130, debug)
    except BrokenPipeError:
        # Whoever read our output has seen enough.  Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # Imported by need: help has no error to tell of.
        from weightsmith.core.errors import WeightsmithError

        if isinstance(error, WeightsmithError):
            return _fail(f"error: {error}", error.code, debug)
        from weightsmith.plugins import blamed

        said = f"{type(error).__name__}: {error}".splitlines()[0]
        hint = "" if debug else "; --debug shows where"
        if place := blamed(error):
            return _fail(f"error: {place}: {said}{hint}", 2, debug)
        code = 2 if words[:1] == ["diff"] else 1  # where 1 means that two models differ
        return _fail(f"internal error: {said}; please report it{hint}", code, debug)


@contextlib.contextmanager
def _ends_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP act like Ctrl-C, unless somebody (nohup, a program around us) has other plans for them.

    Python drops what is raised while a `__del__` runs, as many do while large libraries are imported: a request to end
    that comes at such a moment is made again.
    """
    last = signal.SIGINT
    before = sys.unraisablehook

    def stop(number: int, frame: object) -> None:
        nonlocal last
        last = signal.Signals(number)
        raise KeyboardInterrupt

    def dropped(said: sys.UnraisableHookArgs) -> None:
        if said.exc_type is KeyboardInterrupt:
            again = threading.Timer(0.05, _thread.interrupt_main, (last,))
            again.daemon = True
            again.start()
        else:
            before(said)

    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = before
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _usage(error: cyclopts.CycloptsError, words: Sequence[str]) -> str:
    """One line, with the nearest valid word and where to read on."""
    import cyclopts

    if isinstance(error, cyclopts.UnusedCliTokensError):
        text = f"unexpected argument {' '.join(error.unused_tokens or [])!r}{_takes(error)}"
    elif isinstance(error, cyclopts.UnknownOptionError):
        text = f"unknown option: {_written(error)}{_nearest_option(error)}"
    else:
        text = " ".join(str(error).split()).partition(" Available commands:")[0].rstrip(".")
        text = text[:1].lower() + text[1:]
    chain = (error.command_chain or ()) or tuple(word for word in words[:1] if word in _VERBS)
    return f'{text}; see "{" ".join(["weightsmith", *chain])} --help"'


def _written(error: cyclopts.UnknownOptionError) -> str:
    return (error.token.keyword or error.token.value).partition("=")[0]


def _nearest_option(error: cyclopts.UnknownOptionError) -> str:
    """What was meant by an unknown option: an argument that has no name, or an option that is called nearly so."""
    from weightsmith.core.errors import nearest

    word = _written(error).lstrip("-")
    if word.upper() in _arguments(error):
        return f"; {word.upper()} is given without a name{_takes(error)}"
    known = [name for one in error.argument_collection or () for name in one.names if name.startswith("--")]
    return nearest(f"--{word}", known)


def _arguments(error: cyclopts.CycloptsError) -> dict[str, bool]:
    """What the command takes without a name, as its usage shows it: name -> whether it must be there."""
    import inspect

    if error.target is None:
        return {}
    taken = [one for one in inspect.signature(error.target).parameters.values() if one.kind is one.POSITIONAL_ONLY]
    return {one.name.strip("_").upper(): one.default is one.empty for one in taken}


def _takes(error: cyclopts.CycloptsError) -> str:
    """What the command that was given too much takes: '; usage: weightsmith merge [OPTIONS] RECIPE OUT'."""
    if error.target is None:
        return ""
    shown = [name if needed else f"[{name}]" for name, needed in _arguments(error).items()]
    return f"; usage: weightsmith {' '.join([*(error.command_chain or ()), '[OPTIONS]', *shown])}"


def _fail(text: str, code: int, debug: bool) -> int:
    from weightsmith.cli.show import printable

    sys.stdout.flush()
    if debug:
        import traceback

        traceback.print_exc()
    sys.stderr.write(printable(text) + "\n")
    return code
