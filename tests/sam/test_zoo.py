"""Variants by name, and checkpoints that fit or are refused whole."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

import evsam_kernels as ek
from evsam_kernels.sam.checkpoint import differences, load_checkpoint, read_checkpoint
from evsam_kernels.sam.zoo import VARIANTS


class Net(torch.nn.Module):
    """A small model: what is tested does not depend on the size."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, width)
        self.second = torch.nn.BatchNorm2d(width)


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_untouched(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def save(state: dict, path, form: str) -> str:
    if form == "safetensors":
        path = path / "net.safetensors"
        save_file(state, path)
    else:
        path = path / "net.pt"
        torch.save(state if form == "bare" else {"state_dict": state, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("form", ["bare", "wrapped", "safetensors"])
def test_loads_every_form(tmp_path, form):
    source, model = Net(), Net()
    load_checkpoint(model, save(source.state_dict(), tmp_path, form))
    assert_untouched(model, source.state_dict())


@pytest.mark.parametrize("form", ["bare", "safetensors"])
def test_truncated_file(tmp_path, form):
    path = save(Net().state_dict(), tmp_path, form)
    path.write_bytes(path.read_bytes()[:-40])
    model = Net()
    before = values(model)
    with pytest.raises(ek.CheckpointError, match=rf"{path.name} is not a readable checkpoint"):
        load_checkpoint(model, path)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "content", [b"", b"hello, no checkpoint", pickle.dumps({"a": print}, protocol=2)]
)
def test_foreign_file(tmp_path, content):
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    with pytest.raises(ek.CheckpointError, match=r"foreign\.pt is not a readable checkpoint"):
        read_checkpoint(path)


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the checkpoint was run')",))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": {"first.weight": Harmful()}}, tmp_path / "harmful.pt")
    with pytest.raises(ek.CheckpointError, match=r"harmful\.pt"):
        read_checkpoint(tmp_path / "harmful.pt")


@pytest.mark.parametrize("content", [[1, 2], {"weights": 3}, torch.zeros(3), {1: torch.zeros(1)}])
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ek.CheckpointError, match=r"other\.pt holds no state dict"):
        read_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("first.bias"), r"missing first\.bias \[3\]"),
        (lambda state: state.update(extra=torch.zeros(2)), r"unexpected extra \[2\]"),
        (
            lambda state: state.update({"first.weight": torch.zeros(3, 5)}),
            r"first\.weight has shape \[3, 5\] instead of \[3, 2\]",
        ),
    ],
)
def test_difference_is_named_and_nothing_loaded(tmp_path, change, message):
    state = values(Net())
    change(state)
    model = Net()
    before = values(model)
    path = save(state, tmp_path, "bare")
    with pytest.raises(ek.CheckpointError, match=rf"net\.pt does not fit[\s\S]*{message}"):
        load_checkpoint(model, path)
    assert_untouched(model, before)


def test_first_differences_only():
    expected = {f"w{index}": torch.zeros(1) for index in range(9)}
    assert len(differences(expected, {})) == 9


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at nowhere\.pt"):
        ek.create_efficientvit_sam_model("efficientvit-sam-l0", weight_url="nowhere.pt")


def test_default_path_is_that_of_the_authors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"efficientvit_sam_xl1\.pt"):
        ek.create_efficientvit_sam_model()


def test_checkpoint_of_another_variant(tmp_path):
    with torch.device("meta"):
        other = ek.create_efficientvit_sam_model("efficientvit-sam-l1", pretrained=False)
    path = tmp_path / "l1.pt"
    torch.save(
        {key: torch.zeros(()).expand(t.shape) for key, t in other.state_dict().items()}, path
    )
    with pytest.raises(ek.CheckpointError, match="another variant's checkpoint"):
        ek.create_efficientvit_sam_model("efficientvit-sam-l0", weight_url=path)


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"efficientvit-sam-l0.*efficientvit-sam-xl1"):
        ek.create_efficientvit_sam_model("efficientvit-sam-l9", pretrained=False)


def test_older_alias():
    with torch.device("meta"):
        for name in ("l0", "efficientvit-sam-l0"):
            model = ek.create_sam_model(name, pretrained=False)
            assert model.image_size == (1024, VARIANTS["efficientvit-sam-l0"].image_size)


def test_pretrained_model_is_ready_to_use(tmp_path):
    with torch.device("meta"):
        model = ek.create_efficientvit_sam_model("efficientvit-sam-l0", pretrained=False)
    state = {key: torch.full(t.shape, 0.5, dtype=t.dtype) for key, t in model.state_dict().items()}
    path = tmp_path / "l0.pt"
    torch.save(state, path)
    model = ek.create_efficientvit_sam_model("efficientvit-sam-l0", weight_url=path)
    assert not model.training
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
