"""What `lock` and `unlock` say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.cli.show import duration, files_in, say, show_json, size, table, warn

if TYPE_CHECKING:
    from weightsmith.protect.package import Locked

__all__ = ["summary"]


def summary(made: Locked, key: Path, done: str, *, json: bool, quiet: bool) -> None:
    """Where, how large, whether outputs stayed, and what was left as it is."""
    result = made.result
    files, nbytes = files_in(result.out)
    if json:
        show_json({
            "out": result.out, "files": files, "bytes": nbytes, "seconds": round(result.seconds, 3), "key": made.key,
            "logits": made.agreement, "left": made.left, "complete": result.complete, "warnings": result.warnings,
        })  # fmt: skip
        return
    for problem in result.warnings:
        warn(problem)
    if quiet:
        return
    say(f"{done} {result.out}: {size(nbytes)} in {files} file{'s' * (files != 1)}, {duration(result.seconds)}")
    if (found := made.agreement) is not None:
        say(f"outputs {found.words}")
    else:
        say("outputs were not compared with those before")
    why: dict[str, list[str]] = {}
    for name, text in made.left.items():
        why.setdefault(text, []).append(name)
    rows = [(names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), text) for text, names in why.items()]
    table("left as it is, or weak", ["what", "why"], rows)
    if done == "locked":
        said = "new key" if made.new_key else "key"
        say(f"{said} in {key} (hash {made.key[:12]}): without it the model stays as it is now; it is in no output")
        say(f'next: "weightsmith audit {result.out} --base BASE" says what the lock is worth')
