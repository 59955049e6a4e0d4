"""`evsam validate`: its report, its files, its exit status and its complaints."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from support.backends import made_up_backend

import evsam_kernels
from evsam_kernels.backends import BACKENDS, Backend
from evsam_kernels.cli import main, validate
from evsam_kernels.numerics.validation import plan
from evsam_kernels.ops.registry import formula

FEW = ["validate", "--op", "upsample_add", "--dtype", "float16", "--quick"]


def zeros(maps, height, width):
    like = maps[0]
    return torch.zeros(*like.shape[:2], height, width, dtype=like.dtype)


def nan(maps, height, width):
    return zeros(maps, height, width) * torch.nan


def test_a_passing_report(capsys):
    assert main(FEW) == 0
    out = capsys.readouterr().out
    assert "upsample_add" in out
    assert "passed" in out
    assert "comparisons, 0 failed." in out
    assert f"torch {torch.__version__}" in out
    assert "held against float32 rounded" in out


def test_a_failing_report(capsys):
    with made_up_backend("other", upsample_add=zeros):
        assert main(FEW) == 1
    out = capsys.readouterr().out
    assert "upsample_add on other, float16, random, output [2, 8, 16, 16]: the error is" in out
    assert "budget: Frobenius" in out
    assert "failed" in out


def test_many_failures_are_cut_short_unless_verbose(capsys):
    command = ["validate", "--op", "upsample_add", "--quick", "--backend", "other"]
    with made_up_backend("other", upsample_add=zeros):
        assert main(command) == 1
        short = capsys.readouterr().out
        assert main([*command, "--verbose"]) == 1
        long = capsys.readouterr().out
    assert short.count("upsample_add on other") == 20
    assert "more, with --verbose or --json FILE" in short
    steps = len(plan(["upsample_add"], ["reference"], quick=True))
    assert long.count("upsample_add on other") == steps


def test_verbose_prints_every_comparison(capsys):
    assert main([*FEW, "--verbose"]) == 0
    out = capsys.readouterr().out
    for step in plan(["upsample_add"], ["reference"], ["float16"], quick=True):
        assert step.case.name in out
    assert "gradient of maps[0]" in out


def test_json(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main([*FEW, "--backend", "reference", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["package_version"] == evsam_kernels.__version__
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["device"] == "cpu"
    assert report["passed"] is True
    row = report["rows"][0]
    assert (row["op"], row["backend"], row["dtype"]) == ("upsample_add", "reference", "float16")
    assert row["case"] == "random"
    assert row["shape"] == [2, 8, 16, 16]
    assert 0 < row["ours"]["frobenius"] < row["budget"]["frobenius"]
    assert row["ratio"] == pytest.approx(
        max(row["ours"][norm] / row["budget"][norm] for norm in ("frobenius", "maximum"))
    )
    assert list(tmp_path.iterdir()) == [path]


def test_json_of_failures_is_json(tmp_path, capsys):
    path = tmp_path / "report.json"
    with made_up_backend("other", upsample_add=nan):
        assert main([*FEW, "--backend", "other", "--json", str(path)]) == 1
    report = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert report["passed"] is False
    row = report["rows"][0]
    assert row["ours"] == {"frobenius": None, "maximum": None}
    assert row["ratio"] is None
    assert row["failure"].endswith("values are inf or NaN")


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.SVG", b"<?xml")]
)
def test_plot(tmp_path, capsys, name, start):
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    with made_up_backend("other", upsample_add=nan):
        assert main([*FEW, "--plot", str(path)]) == 1
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_filters_are_repeatable_and_keep_their_order(tmp_path, capsys):
    path = tmp_path / "report.json"
    operations = ["--op", "upsample_add", "--op", "layer_norm_2d", "--op", "upsample_add"]
    dtypes = ["--dtype", "bfloat16", "--dtype", "float64"]
    command = ["validate", "--quick", "--backend", "reference", *operations, *dtypes]
    assert main([*command, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert list(dict.fromkeys(row["op"] for row in rows)) == ["upsample_add", "layer_norm_2d"]
    assert {row["dtype"] for row in rows} == {"bfloat16", "float64"}
    keys = [(row["op"], row["dtype"], row["case"], row["quantity"]) for row in rows]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "arguments",
    [["--op", "softmax"], ["--backend", "cudnn"], ["--dtype", "int8"], ["--fast"], ["extra"]],
    ids=" ".join,
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["validate", *arguments])
    assert caught.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.fixture
def no_work(monkeypatch):
    """What is wrong must be noticed before anything is computed."""

    def validation_begins(*_):
        raise AssertionError("validation began")

    monkeypatch.setattr(validate, "validate", validation_begins)


@pytest.mark.usefixtures("no_work")
class TestRefusedBeforeTheWork:
    def refuse(self, arguments: list[str], capsys) -> str:
        assert main([*FEW, *arguments]) == 2
        return capsys.readouterr().err

    @pytest.mark.parametrize("option", ["--json", "--plot"])
    def test_folder_that_is_not_there(self, option, tmp_path, capsys):
        path = tmp_path / "none" / "report.png"
        message = self.refuse([option, str(path)], capsys)
        assert f"{option} {path}: there is no folder {path.parent}; make it first" in message

    def test_plot_of_an_unknown_format(self, capsys):
        message = self.refuse(["--plot", "report.gif"], capsys)
        assert "--plot must end in .png, .pdf, .svg, got report.gif" in message

    def test_plot_without_matplotlib(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        message = self.refuse(["--plot", "report.png"], capsys)
        assert "--plot needs matplotlib: pip install matplotlib" in message

    def test_backend_that_cannot_run(self, capsys, monkeypatch):
        broken = Backend("cpu", "C++", ("cpu",), lambda: "not built; install g++")
        monkeypatch.setitem(BACKENDS, "cpu", broken)
        message = self.refuse(["--backend", "cpu"], capsys)
        assert "--backend cpu: backend 'cpu' is not available here: not built" in message

    def test_backend_without_a_kernel(self, capsys):
        with made_up_backend("other", mbconv=formula("mbconv")):
            message = self.refuse(["--backend", "other"], capsys)
        assert "no kernel of other for upsample_add; 'evsam info' lists the kernels" in message

    @pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
    def test_device_that_is_not_there(self, device, capsys):
        assert f"--device {device}: " in self.refuse(["--device", device], capsys)


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    folder = tmp_path / "report.json"
    folder.mkdir()
    assert main([*FEW, "--json", str(folder)]) == 2
    assert f"{folder} cannot be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]
    assert list(folder.iterdir()) == []


def test_an_interrupted_plot_leaves_nothing(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(validate.plot, "draw", fail)
    pytest.importorskip("matplotlib")
    assert main([*FEW, "--plot", str(tmp_path / "a.png")]) == 2
    assert list(tmp_path.iterdir()) == []
