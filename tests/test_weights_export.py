"""weights/export.py: what is written gives the same numbers when it is read again.

Run: pytest tests/test_weights_export.py        (seconds; other sizes and ONNX, a minute: -m slow)
"""

import json

import pytest
import torch
from test_readme import README, commands
from test_vit import close
from test_weights_load import lively

from config import Config, UserError, to_dict
from vit import VisionTransformer
from weights import export
from weights.load import contents, load_backbone, teacher_file


def network(registers=0, **options):
    """Two blocks with random weights and positions for 70 px."""
    net = VisionTransformer(
        (128, 2, 4, "swiglu" if registers else "mlp"), 14, 70, registers=registers,
        interpolate_offset=0.0 if registers else 0.1, interpolate_antialias=bool(registers),
        **options,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(lively(parameter.shape))
    return net.eval()


def written(net, path, size=(42, 56), **options):
    cfg = Config()
    cfg.data.mean, cfg.data.std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    export.export(net, cfg, path, size, **options)
    return path


@torch.no_grad()
def test_safetensors_keep_even_what_shapes_do_not_tell(tmp_path):
    net = network(registers=2)
    net.interpolate_offset, net.interpolate_antialias = 0.1, False  # not as released
    again = load_backbone(written(net, tmp_path / "x.safetensors"))
    image = torch.randn(2, 3, 28, 84)
    assert torch.equal(again(image), net(image))  # four heads of 32 channels


@torch.no_grad()
def test_pth_is_a_state_dict_under_the_released_names(tmp_path):
    net = VisionTransformer((384, 1, 6, "mlp"), 14, 28, layerscale=0.5).eval()
    path = written(net, tmp_path / "x.pth")
    assert torch.load(path, weights_only=True).keys() == net.state_dict().keys()
    image = torch.randn(1, 3, 42, 28)
    assert torch.equal(load_backbone(path)(image), net(image))


IMAGES = {"channels": 3, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1], "size": [42, 56]}


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "folder"])
def test_weights_say_how_to_feed_them_and_are_fed_so(tmp_path, name, capsys):
    path = written(network(registers=2), tmp_path / name)
    assert capsys.readouterr().err == ""
    assert contents(teacher_file(path))[1]["images"] == IMAGES
    _, cfg = load_backbone(path, with_config=True)
    assert (list(cfg.data.mean), list(cfg.data.std)) == (IMAGES["mean"], IMAGES["std"])
    assert cfg.crops.global_size == 42 and capsys.readouterr().err == ""


@torch.no_grad()
def assert_same(run, net, *sizes):
    """run(images) is what the network says, for any number of images."""
    for count, size in zip((3, 1, 2), (sizes * 3)[:3], strict=True):
        images = torch.randn(count, 3, *size)
        features = net.forward_features(images)
        cls, patches = run(images)
        # The same sums, in another order at most; outputs are of the order 1.
        close(torch.as_tensor(cls), features["x_norm_clstoken"], 1e-5)
        close(torch.as_tensor(patches), features["x_norm_patchtokens"], 1e-5)


def test_an_exported_program_gives_the_same_for_any_number_of_images(tmp_path):
    net = network(registers=4)
    path = written(net, tmp_path / "x.pt2")
    extra = {"nanodinov2": ""}
    assert_same(torch.export.load(path, extra_files=extra).module(), net, (42, 56))
    assert json.loads(extra["nanodinov2"])["images"] == IMAGES


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pt2", "onnx"])
@pytest.mark.parametrize("registers", [0, 4])
def test_an_exported_network_of_free_size_gives_the_same_at_any(tmp_path, registers, form):
    net, sizes = network(registers), [(70, 70), (42, 112), (140, 28)]
    if form == "pt2":
        path = written(net, tmp_path / "x.pt2", "free")
        return assert_same(torch.export.load(path).module(), net, *sizes)
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    session = runtime.InferenceSession(written(net, tmp_path / "x.onnx", "free"))
    assert_same(lambda images: session.run(None, {"images": images.numpy()}), net, *sizes)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(70, 70), (42, 56), (84, 28)])
@pytest.mark.parametrize("registers", [0, 4])
def test_an_exported_program_of_any_size_gives_the_same(tmp_path, registers, size):
    net = network(registers)
    path = written(net, tmp_path / "x.pt2", size)
    assert_same(torch.export.load(path).module(), net, size)


@pytest.mark.slow
@pytest.mark.parametrize("registers", [0, 4])
def test_onnx_gives_the_same(tmp_path, registers):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = network(registers)
    session = runtime.InferenceSession(written(net, tmp_path / "x.onnx"))
    assert [x.name for x in session.get_outputs()] == ["cls", "patches"]
    about = session.get_modelmeta().custom_metadata_map["nanodinov2"]
    assert json.loads(about)["images"] == IMAGES
    assert_same(lambda images: session.run(None, {"images": images.numpy()}), net, (42, 56))


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """A folder with the teacher.pt of a nano network for 16 px."""
    cfg = Config()
    cfg.vit.size, cfg.vit.patch, cfg.crops.global_size = "nano", 8, 16
    net = VisionTransformer("nano", 8, 16)
    teacher = {"backbone": net.state_dict(), "config": to_dict(cfg), "step": 1}
    torch.save(teacher, tmp_path / "teacher.pt")
    return tmp_path


@torch.no_grad()
def test_a_run_is_exported_from_the_command_line(run_folder, capsys):
    images = torch.randn(1, 3, 16, 16)
    expected = load_backbone(run_folder)(images)
    for ending in ".pth", ".safetensors":
        path = run_folder / f"out{ending}"
        export.main([str(run_folder), str(path)])
        assert f"wrote {path}" in capsys.readouterr().out
        assert torch.equal(load_backbone(path)(images), expected)
    export.main([str(run_folder), str(run_folder / "out.pt2")])
    assert "out.pt2 for images of 16 x 16 px" in capsys.readouterr().out


def readme_commands():
    for words in commands(README, "weights.export"):
        form = words[1].rpartition(".")[2]
        marks = {"safetensors": (), "pth": (), "folder": ()}.get(form, pytest.mark.slow)
        yield pytest.param(words, id=" ".join(words), marks=marks)


@pytest.mark.parametrize("words", list(readme_commands()))
def test_a_command_of_the_readme_runs(run_folder, words):
    if words[1].endswith(".onnx"):
        pytest.importorskip("onnxscript")
    export.main([str(run_folder), str(run_folder / words[1]), *words[2:]])
    written = run_folder / words[1]
    largest = max(path.stat().st_size for path in (written, *written.glob("*")))
    assert largest > 4e6  # 1.2 million parameters


BAD = [
    (["{run}", "x.gguf"], "use .safetensors .pth .pt2 .onnx or a folder"),
    (["{run}", "x.pt2", "format=timm"], "use .safetensors .pth; or format=timm"),
    (["{run}", "x.pt2", "format=tim"], "or format=timm"),
    (["{run}", "x.pt2", "size=20"], "size=20x20: height and width must be multiples of 8"),
    (["{run}", "x.pt2", "size=16xa"], "write size=224, or size=98x126"),
    (["{run}", "x.pt2", "16"], "write size=224, or size=98x126"),
    (["{run}", "/nowhere/x.pth"], "/nowhere/x.pth: cannot be written"),
    (["{run}", "/nowhere/x.safetensors"], "/nowhere/x.safetensors: cannot be written"),
    (["/nowhere", "x.pth"], "/nowhere: no such file"),
]


@pytest.mark.parametrize("words, expected", BAD)
def test_bad_input_is_one_line(run_folder, capsys, words, expected):
    with pytest.raises(SystemExit) as leaving:
        export.main([word.format(run=run_folder) for word in words])
    line = capsys.readouterr().err
    assert leaving.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert expected in line


def test_a_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"x\.onnx: .*pip install onnx onnxscript"):
        written(network(), tmp_path / "x.onnx")
