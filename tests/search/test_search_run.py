"""Whole searches over small models: what they find, that they can be killed, and what they leave."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from search.pantry import SHAPES, WANTED, splits, stocked, tree
from weightsmith.core.errors import OutputError, PlanError, RecipeError
from weightsmith.core.settings import Settings
from weightsmith.jobs.merge import run
from weightsmith.recipe.load import load as load_recipe
from weightsmith.search.api import search
from weightsmith.search.fronts import front
from weightsmith.search.journal import History
from weightsmith.search.run import prepared
from weightsmith.search.schema import SearchFile

SAMPLERS: dict[str, dict[str, Any]] = {
    "random": {}, "grid": {"steps": 2}, "tpe": {}, "nsga2": {"population": 6}, "nsga3": {"population": 6},
    "gp": {"startup": 3}, "cmaes": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def pantry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stocked(tmp_path_factory.mktemp("pantry"))


def told(folder: Path) -> list[str]:
    return (folder / "history.jsonl").read_text().splitlines()


def test_cmaes_recovers_the_genes(pantry: Path, tmp_path: Path) -> None:
    made = search(tree(pantry, sampler="cmaes", evaluations=182), tmp_path / "out")
    for name, weight in WANTED.items():
        assert made.best.point[f"weight/{name}"] == pytest.approx(weight, abs=1e-2)
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.parameters["weight"]["a"] == made.best.point["weight/a"]
    assert not (tmp_path / "out" / "candidates").exists()


def test_the_gaussian_process_learns(pantry: Path, tmp_path: Path) -> None:
    """Far fewer candidates than cmaes takes bring it to the best weights; its journal is one that optuna reads."""
    import optuna

    made = search(tree(pantry, sampler={"gp": {"startup": 8}}, evaluations=24), tmp_path / "out")
    drawn = [trial.scores["near"] for trial in made.search.trials[:8] if trial.scores]
    assert made.best.scores is not None
    assert made.best.scores["near"] > 0.02 * max(drawn)  # scores are 0 at best, and below it
    assert json.loads(told(tmp_path / "out")[-1])["state"]["kernels"]
    journal = optuna.storages.journal.JournalFileBackend(str(tmp_path / "out" / "optuna.journal"))
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(journal))
    assert [trial.values for trial in study.trials] == [trial.told for trial in made.search.trials]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_interrupted_anywhere_it_ends_the_same(
    pantry: Path, tmp_path: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    goals = {"a": "max", "b": "min"} if sampler in ("nsga2", "nsga3") else {"near": "max"}
    budget = {"evaluations": 9, "batch": 2} if sampler == "gp" else {"evaluations": 15, "batch": 5}
    file = SearchFile.model_validate(tree(pantry, sampler={sampler: SAMPLERS[sampler]}, goals=goals, **budget))
    whole = search(file, tmp_path / "whole")

    class Killed(BaseException):
        """Not an error that anything may catch."""

    real = SCORES(file)
    for last in (1, 3, 4, 2):
        count = 0

        def dying(model: Any, split: str) -> Any:
            nonlocal count
            count += 1
            if count == last:  # noqa: B023
                raise Killed
            return real(model, split)

        dying.__qualname__ = "same"
        with pytest.raises(Killed):
            search(file, tmp_path / "cut", dying)

    def same(model: Any, split: str) -> Any:
        return real(model, split)

    same.__qualname__ = "same"

    def killed(*given: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(History, "add", killed)  # when optuna's journal is on the disk
        with pytest.raises(Killed):
            search(file, tmp_path / "cut", same)
    again = search(file, tmp_path / "cut", same)
    assert [(t.point, t.scores, t.told) for t in again.search.trials] == [
        (t.point, t.scores, t.told) for t in whole.search.trials
    ]
    assert told(tmp_path / "cut")[1:] == told(tmp_path / "whole")[1:]  # the heads name two evaluators
    assert (tmp_path / "cut" / "recipe.yaml").read_bytes() == (tmp_path / "whole" / "recipe.yaml").read_bytes()


def SCORES(file: SearchFile) -> Any:  # noqa: N802
    """The file's own evaluator as a function."""
    from weightsmith.search.score import scorer

    made = scorer(file)
    return lambda model, split: dict(made(model, split, None, Path()).values)


@pytest.mark.parametrize(("sampler", "count"), [
    ({"grid": {"stepz": 3, "steps": 0}}, 2), ({"tpe": {"startup": 0, "candidates": "x"}}, 2),
    ({"cmaes": {"sigma": -1, "population": 1}}, 2), ({"gp": {"startup": True, "foo": 1}}, 2),
    ({"map": {"points": 0, "link": "probit", "nested": "maybe", "prefer": {"a": -1}, "rounds": -1}}, 5),
    ({"frank_wolfe": {"score": "cos", "granularity": "x", "step_size": -1, "foo": 1}}, 4), ("gq", 1),
])  # fmt: skip
def test_mistakes_of_options_come_with_the_others(pantry: Path, sampler: Any, count: int) -> None:
    with pytest.raises(RecipeError) as caught:
        SearchFile.model_validate(tree(pantry, sampler=sampler, evaluations=0, goals={"x": "up"}))
    assert len(caught.value.problems) == count + 2
    assert sum("sampler" in problem.text for problem in caught.value.problems) == count


def test_what_does_not_fit_the_models_comes_in_one_round(pantry: Path, tmp_path: Path) -> None:
    file = tree(pantry, sampler={"grid": {"steps": 3}}, evaluations=2, halving=[4],
                space={"weight": [0, 1], "density": [0, 1]})  # fmt: skip
    file["recipe"] = {"models": file["recipe"]["models"], "method": "ties"}
    with pytest.raises(PlanError) as caught:
        search(file, tmp_path / "out")
    said = [problem.text for problem in caught.value.problems]
    assert len(said) == 3
    assert all(any(part in one for one in said) for part in ("3 x 3 = 9 points", "needs a base", "for a few items"))


def test_kill_9_and_the_same_command(pantry: Path, tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(tree(pantry, sampler="tpe", evaluations=9, batch=3)))
    words = [sys.executable, "-m", "weightsmith", "search", str(file), str(tmp_path / "cut"), "--quiet"]
    for die in ("6",):
        (pantry / "log").unlink(missing_ok=True)
        done = subprocess.run(words, env={**os.environ, "DIE": die}, check=False)
        assert done.returncode == -9
    assert subprocess.run(words, check=False).returncode == 0
    search(SearchFile.model_validate(tree(pantry, sampler="tpe", evaluations=9, batch=3)), tmp_path / "whole")
    assert (tmp_path / "cut" / "history.jsonl").read_bytes() == (tmp_path / "whole" / "history.jsonl").read_bytes()
    assert (tmp_path / "cut" / "recipe.yaml").read_bytes() == (tmp_path / "whole" / "recipe.yaml").read_bytes()


def test_a_finished_search_scores_nothing_again(pantry: Path, tmp_path: Path) -> None:
    for count in (6, 6, 9):
        (pantry / "log").unlink(missing_ok=True)
        made = search(tree(pantry, sampler="random", evaluations=count), tmp_path / "out")
        assert len(made.search.trials) == count
        scored = (pantry / "log").read_text().split() if (pantry / "log").exists() else []
        if count == 9:
            assert 3 <= scored.count("dev") <= 4  # three more, and the incumbent again if it is another
        elif len(scored):
            assert scored.count("dev") == 6 + 1 + 1 + 3  # candidates, recipe, again, experts
    with pytest.raises(OutputError, match="another search"):
        search(tree(pantry, sampler="random", evaluations=6, seed=1), tmp_path / "out")


def test_equal_recipes_are_scored_once(pantry: Path, tmp_path: Path) -> None:
    (pantry / "log").unlink(missing_ok=True)
    spec = {"weight": {"values": [0.1, 0.2, 0.3]}}
    made = search(tree(pantry, sampler="random", evaluations=20, space=spec), tmp_path / "out")
    assert len({trial.key for trial in made.search.trials}) == 3
    assert (pantry / "log").read_text().split().count("dev") == 3 + 3 + 1  # the recipe is one of them; experts; again
    assert made.cost.repeated >= 17 - 3


def test_grid_is_every_combination(pantry: Path, tmp_path: Path) -> None:
    space = {"weight": [0.0, 1.0], "lambda": {"values": [0.5, 1.0]}}
    made = search(tree(pantry, sampler={"grid": {"steps": 3}}, space=space), tmp_path / "out")
    points = [(t.point["weight"], t.point["lambda"]) for t in made.search.trials]
    assert "2 genes, 6 candidates, 8 a generation" in made.search.plan()[0]
    assert points == [(0.0, 0.5), (0.0, 1.0), (0.5, 0.5), (0.5, 1.0), (1.0, 0.5), (1.0, 1.0)]
    with pytest.raises(RecipeError, match="3 x 2 = 6 points, but evaluations = 5"):
        search(tree(pantry, sampler={"grid": {"steps": 3}}, space=space, evaluations=5), tmp_path / "few")


def test_a_front_its_page_and_its_picks(pantry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from weightsmith.cli.main import main

    goals = {"a": "max", "b": "min"}
    made = search(tree(pantry, sampler={"nsga2": {"population": 8}}, goals=goals, evaluations=32), tmp_path / "out")
    values = np.array([[t.scores["a"], -t.scores["b"]] for t in made.front])
    assert len(front(values)) == len(made.front) > 2
    page = (tmp_path / "out" / "front.html").read_text()
    assert page.count('type="range"') == 2
    assert all(f"recipes/{t.number + 1}.yaml" in page for t in made.front)
    for prefer, column in (("a=1", 0), ("b=3", 1)):
        assert main(["search", "pick", str(tmp_path / "out"), "--prefer", prefer, "--json"]) == 0
        chosen = json.loads(capsys.readouterr().out)
        assert chosen["candidate"] - 1 == made.front[int(values[:, column].argmax())].number
        load_recipe(chosen["recipe"])
    assert main(["search", "pick", str(tmp_path / "out"), "--prefer", "c=1"]) == 2
    assert "unknown score 'c'" in capsys.readouterr().err


def test_failures_are_the_worst_and_end_nothing(pantry: Path, tmp_path: Path) -> None:
    def score(tensors: Any, split: str) -> Any:
        first = float(tensors["lm_head.weight"][0, 0])
        calls.append(first)
        return [1.0, float("nan"), "high", {"other": 1}, 0.5][len(calls) % 5 if len(calls) > 1 else 0]

    calls: list[float] = []
    made = search(tree(pantry, sampler="tpe", evaluations=12, goals={"score": "max"}), tmp_path / "out", score)
    failed = [trial for trial in made.search.trials if trial.failed]
    assert failed
    assert all(trial.failed and "score" in trial.failed for trial in failed)
    worst = min(t.told[0] for t in made.search.trials if t.told and not t.failed)
    assert all(trial.told is None or trial.told[0] >= worst for trial in failed)
    assert made.best.scores is not None
    assert any("candidates failed" in note for note in made.notes)


def test_a_recipe_that_cannot_be_scored_stops_it_at_once(pantry: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"could not be scored.*gives no score 'near'"):
        search(tree(pantry, evaluations=3), tmp_path / "out", lambda tensors, split: {"nera": 1.0})


def test_programs_in_folders_with_limits(pantry: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\nassert os.path.getsize(sys.argv[1] + '/model.safetensors') > 0\n"
        "print('looking', file=sys.stderr)\n"
        "n = int(open(sys.argv[3]).read()) if os.path.exists(sys.argv[3]) else 0\n"
        "open(sys.argv[3], 'w').write(str(n + 1))\n"
        "if n == 2: time.sleep(60)\n"
        "if n == 3: sys.exit('no such thing')\n"
        "print('a line for people')\nprint({4: 'NaN', 5: 'a lot', 6: '\"0.5\"', 7: 'true'}.get(n, -n))\n"
    )
    command = f"{sys.executable} -I -S {program} {{model}} {{data}} {tmp_path / 'count'}"
    score = {"command": command, "data": splits(pantry), "timeout": 3.0}
    file = tree(pantry, score=score, sampler="random", evaluations=8, goals={"score": "max"}, rescore=0)
    made = search(file, tmp_path / "out")
    reasons = [trial.failed or "" for trial in made.search.trials]
    expected = ["", "not done after 3 s", "ended with code 1: no such thing", "score is nan, not a finite number",
                "prints no JSON; its last line should be a number or a mapping, is 'a lot'",
                "score is '0.5', not a finite number", "score is True, not a finite number", ""]  # fmt: skip
    assert all(bool(part) == bool(why) and part in why for part, why in zip(expected, reasons, strict=True))
    assert made.best.number == 0
    kept = list((tmp_path / "out" / "stderr").iterdir())
    assert any("looking" in path.read_text() for path in kept)
    assert not (tmp_path / "out" / "candidates").exists()


def test_a_program_sees_the_bytes_of_merges_in_rooms_that_are_used_again(pantry: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import hashlib, os, sys\nfolder = sys.argv[1]\nfile = os.path.join(folder, 'model.safetensors')\n"
        "assert sorted(os.listdir(folder)) == ['model.safetensors']\n"
        "open(os.path.join(folder, 'stray'), 'w').close()\n"
        "digest = hashlib.sha256(open(file, 'rb').read()).hexdigest()\n"
        "print(digest, os.stat(file).st_ino, file=open(sys.argv[3], 'a'))\nprint(0)\n"
    )
    command = f"{sys.executable} {program} {{model}} {{data}} {tmp_path / 'seen'}"
    file = tree(pantry, score={"command": command, "data": splits(pantry)}, sampler="random", evaluations=6,
                batch=3, together=3, goals={"score": "max"}, rescore=0)  # fmt: skip
    made = search(file, tmp_path / "out")
    seen = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    for trial in made.search.trials:
        run(made.recipe(trial), tmp_path / "alone", overwrite=True)
        digest = hashlib.sha256((tmp_path / "alone" / "model.safetensors").read_bytes()).hexdigest()
        assert digest == seen[1 + trial.number][0]  # behind the recipe itself
    assert len({place for _, place in seen[:7]}) == 3
    assert not (tmp_path / "out" / "candidates").exists()


def test_retries_of_a_program(pantry: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nn = int(open(sys.argv[2]).read()) if os.path.exists(sys.argv[2]) else 0\n"
        "open(sys.argv[2], 'w').write(str(n + 1))\nprint('{\"score\": [1, 0, 1, 1]}' if n % 2 else 'nothing')\n"
    )
    command = f"{sys.executable} {program} {{data}} {tmp_path / 'count'} {{model}}"
    for retries, right in ((1, True), (0, False)):
        score = {"command": command, "data": splits(pantry), "retries": retries}
        file = tree(pantry, score=score, sampler="random", evaluations=2, goals={"score": "max"}, rescore=0)
        if right:
            made = search(file, tmp_path / "out")
            assert all(trial.scores == {"score": 0.75} for trial in made.search.trials)
            report = made.lines[0].report
            assert report is not None
            assert report.error == pytest.approx(0.25)
            assert report.low == pytest.approx(0.75 - 1.96 * 0.25)
        else:
            (tmp_path / "count").write_text("0")
            with pytest.raises(RecipeError, match="prints no JSON"):
                search(file, tmp_path / "other")


def test_halving_spends_items_on_the_better_ones(pantry: Path, tmp_path: Path) -> None:
    (pantry / "halves.py").write_text(
        "import score, pathlib\nLOG = pathlib.Path(__file__).with_name('items')\n"
        "def scores_of_tensors(tensors, data, items=None):\n"
        "    with LOG.open('a') as file: file.write(f'{items}\\n')\n"
        "    return {'near': score.scores_of_tensors(tensors, data)['near']}\n"
    )
    score = {"file": str(pantry / "halves.py"), "data": splits(pantry)}
    file = tree(pantry, score=score, sampler="random", evaluations=18, batch=9, rescore=0,
                halving={"items": [4, 16], "keep": 0.34})  # fmt: skip
    made = search(file, tmp_path / "out")
    asked = (pantry / "items").read_text().split()
    assert (asked.count("4"), asked.count("16")) == (18, 8)  # of 9 go on 4, of these 2
    whole = [trial for trial in made.search.trials if trial.items is None]
    assert len(whole) == 4
    for start in (0, 9):
        part = made.search.trials[start : start + 9]
        kept = min(t.told[0] for t in part if t.items is None and t.told)
        assert all(t.told is not None and t.told[0] <= kept for t in part if t.items is not None)
    assert made.best in whole
    plain = tree(pantry, halving={"items": [4]})
    with pytest.raises(RecipeError, match="cannot be asked for a few items"):
        search(plain, tmp_path / "no")


def test_the_table_has_what_it_has_to_beat(pantry: Path, tmp_path: Path) -> None:
    (pantry / "log").unlink(missing_ok=True)
    made = search(tree(pantry, sampler="tpe", evaluations=12, controls=True), tmp_path / "out")
    names = [line.name for line in made.lines]
    assert names == ["incumbent", "recipe as it is", "best single expert (a)", "random search, 12 candidates"]
    assert all(line.report is not None for line in made.lines)
    assert (pantry / "log").read_text().split().count("test") == 4
    assert made.cost.evaluations == len((pantry / "log").read_text().split())
    assert made.cost.read_bytes > 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["best"]["point"] == made.best.point
    few = search(tree(pantry, sampler="tpe", evaluations=2), tmp_path / "few")
    assert not any("startup" in note for note in made.notes)
    assert any("lower sampler.tpe.startup" in note for note in few.notes)
    assert "Held-out scores" in (tmp_path / "out" / "report.html").read_text()


def test_candidates_have_the_bytes_of_merges(pantry: Path, tmp_path: Path) -> None:
    """What is scored in memory and in folders is what the recipe makes."""
    seen: list[Any] = []
    recipe = tree(pantry)["recipe"] | {
        "method": [{"dare": {"density": 0.5}}, {"ties": {"density": 0.5}}],
        "parameters": {},
    }
    file = tree(pantry, recipe=recipe, space={"ties.density": [0.2, 0.9]}, sampler="random", evaluations=4, rescore=0)
    made = search(file, tmp_path / "out", lambda tensors, split: seen.append(tensors) or {"near": 0.0})
    folders: list[Any] = []

    def look(folder: Path, split: str) -> Any:
        folders.append(load_file(folder / "model.safetensors"))
        return {"near": 0.0}

    search(file, tmp_path / "folders", look, in_memory=False)
    alone = made.recipe(made.search.trials[2])
    run(alone, tmp_path / "alone")
    expected = load_file(tmp_path / "alone" / "model.safetensors")
    for found in (seen[3], folders[3]):  # behind the recipe itself
        assert all((found[name] == tensor).all() for name, tensor in expected.items())


def test_candidates_in_memory_keep_to_the_bound_on_memory(pantry: Path, tmp_path: Path) -> None:
    """As many are built together as fit; the same is found, and too little memory is refused at the start."""
    file = SearchFile.model_validate(tree(pantry, sampler="random", evaluations=4, batch=4, together=4, rescore=0))
    free = prepared(file, tmp_path / "free", Settings(threads=1))
    (_, one), (_, four) = (free.evaluations.workshop.peak(free.start, n, in_memory=True) for n in (1, 4))
    size = sum(math.prod(shape) * 4 for shape in SHAPES.values())
    assert four - one >= 3 * size
    assert free.together == (4, four)
    groups: dict[int, list[int]] = {}
    for bound in (four, one + (four - one) // 3, one):
        work = prepared(file, tmp_path / str(bound), Settings(memory=bound, threads=1))
        made, make = groups.setdefault(bound, []), work.evaluations.workshop.make

        def counted(recipes: Any, *, in_memory: bool = False, made: Any = made, make: Any = make) -> Any:
            made.append(len(recipes))
            return make(recipes, in_memory=in_memory)

        work.evaluations.workshop.make = counted  # type: ignore[method-assign]
        with work.alone():
            work.run()
        assert f"candidates: {max(made)} built in one pass, predicted peak" in work.plan()[1]
        assert not any(trial.failed for trial in work.trials)
    assert list(groups.values()) == [[1, 4], [1, 2, 2], [1] * 5]
    with pytest.raises(PlanError, match=r"--memory .* MB is too little: .* alone needs"):
        prepared(file, tmp_path / "no", Settings(memory=one - size, threads=1))


def test_buffers_are_used_again_unless_somebody_holds_them(pantry: Path, tmp_path: Path) -> None:
    held: list[Any] = []
    places: list[int] = []

    def look(tensors: Any, split: str) -> dict[str, float]:
        places.append(tensors["lm_head.weight"].data_ptr())
        if len(held) < 5:
            held.append((tensors["lm_head.weight"][1:], {n: t.clone() for n, t in tensors.items()}))
        return {"near": 0.0}

    file = tree(pantry, sampler="random", evaluations=12, batch=4, rescore=0)
    made = search(file, tmp_path / "out", look)
    assert all(torch.equal(rows, then["lm_head.weight"][1:]) for rows, then in held)
    assert len(set(places[5:])) < len(places[5:])
    for number in (1, 3):  # behind the recipe itself
        run(made.recipe(made.search.trials[number]), tmp_path / str(number))
        expected = load_file(tmp_path / str(number) / "model.safetensors")
        assert all(torch.equal(held[1 + number][1][name], tensor) for name, tensor in expected.items())
