"""The GPU's benchmark, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench.device import METHODS, main

from weightsmith.devices.accelerator import Host


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("nothing measured: --device cuda:0: torch ")
    assert said.err.count("\n") == 1
    assert main(["--device", "cpu"]) == 2


def test_every_rate_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "tiny", "--experts", "2", "--repeat", "1", "--megabytes", "1", "--folder", str(tmp_path)]
    assert main(options, Host()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"host, torch {torch.__version__}"
    rates = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in lines[4:]}
    assert len(rates) == 3 + len(METHODS)
    assert min(rates.values()) > 0
    assert not (tmp_path / "device-out").exists()
