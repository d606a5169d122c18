"""int8: kept where it answers as fp32 does, and only there; right on every CPU; nothing left where it is not."""

import json
import shutil
from dataclasses import replace

import archive
import handler
import numpy as np
import onnx
import pytest
from drawn import CLASSES, PAPER, RESIZE, WEIGHTS, bundle_of, drawing, manifest
from onnx import helper, numpy_helper

from bundle import golden, picture
from bundle.manifest import BundleError, Decision, read, sha256, write
from training import data, int8, quantize
from training.export import ONNX, onnx_runner
from training.quantize import Judged, main, parts

NAMES = ("blue", "green", "red", "yellow")
EACH = {"train": 8, "validation": 12}  # pictures a class: 32 and 48


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "pictures"
    for label in NAMES:
        for i in range(sum(EACH.values())):
            path = root / ("train" if i < EACH["train"] else "validation") / label / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(drawing(label, i))
    return root


def convolutions(folder, spread=1.0):
    """drawn's model through four convolutions, one of them depthwise; one channel is `spread` times the others."""
    random = np.random.default_rng(0)
    mix = [np.linalg.qr(random.normal(size=(8, 8)))[0] for _ in range(3)]
    mix[1] = np.diag([spread] + [1.0] * 7) @ mix[1]
    into, depth = random.normal(size=(8, 3)) / 64, random.uniform(0.5, 2, 8)
    through = mix[2] @ np.diag(depth) @ mix[1] @ into
    constants = {
        "w0": into[:, :, None, None],
        "b0": into @ np.full(3, -PAPER),
        "w1": mix[1][:, :, None, None],
        "w2": np.diag(depth).sum(1)[:, None, None, None] * np.pad([[1.0]], 1),
        "w3": mix[2][:, :, None, None],
        "b": np.zeros(8),
        "w": WEIGHTS[[CLASSES.index(name) for name in NAMES]] @ np.linalg.pinv(through),
        "c": np.zeros(len(NAMES)),
    }
    nodes = [
        helper.make_node("Transpose", ["pixels"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["t"], ["x"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "w0", "b0"], ["x0"]),
        helper.make_node("Conv", ["x0", "w1", "b"], ["x1"]),
        helper.make_node("Conv", ["x1", "w2", "b"], ["x2"], group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x2", "w3", "b"], ["x3"]),
        helper.make_node("GlobalAveragePool", ["x3"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "c"], ["logits"], transB=1),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [info("pixels", onnx.TensorProto.UINT8, ["n", RESIZE.height, RESIZE.width, 3])],
        [info("logits", onnx.TensorProto.FLOAT, ["n", len(NAMES)])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )

    def make(new):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.save(model, new / ONNX)
        (new / "model.pt2").write_bytes(b"of a GPU")
        golden.record(new, golden.draw(4, RESIZE.height, RESIZE.width), onnx_runner(new / ONNX))
        return manifest(Decision(temperature=2.0, threshold=0.3), NAMES)

    return write(folder, make)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "colours"
    convolutions(folder)
    return folder


@pytest.fixture(scope="module")
def kept(bundle, pictures):
    """The bundle in int8."""
    assert main([str(bundle), str(pictures), "--quiet"]) == 0
    return bundle.with_name("colours-int8")


def load(files):
    return np.stack([picture.load(file.read_bytes(), RESIZE) for file in files])


def test_within_the_bounds_it_is_kept_and_served(bundle, kept, pictures, tmp_path):
    fp32, made = read(bundle), read(kept)
    served = handler.Model(kept)  # its golden answers come out
    assert archive.archive(kept, tmp_path).exists()
    assert (made.name, made.version) == (fp32.name, f"{fp32.version}-int8")
    assert made.digest != fp32.digest == made.provenance["int8"]["from"]
    assert (made.classes, made.input, made.decision.threshold) == (fp32.classes, fp32.input, fp32.decision.threshold)
    assert set(made.files) == {ONNX, "golden.npz"}
    assert fp32.tolerance < made.tolerance < 1
    files = sorted((pictures / "validation").glob("*/*.jpg"))
    before, after = onnx_runner(bundle / ONNX)(load(files)), served.run(load(files))
    assert not np.array_equal(before, after)
    right = [NAMES[i] == file.parent.name for i, file in zip(after.argmax(1), files, strict=True)]
    told = made.metrics["int8"]
    assert told["agree"] == (before.argmax(1) == after.argmax(1)).mean() >= 0.97
    assert told["int8"] == made.metrics["validation"]["accuracy"] == np.mean(right)
    assert told["difference_low"] < told["difference"] < told["difference_high"]
    report = json.loads(kept.with_name("colours-int8.quantize.json").read_text())
    assert report["kept"] == made.digest
    assert report["attempts"][-1]["milliseconds"]["int8"] > 0


def test_no_weight_can_overflow_the_16_bits_that_older_cpus_add_in(kept):
    graph = onnx.load(kept / ONNX).graph
    shapes = []
    for tensor in graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.int8 and value.ndim == 4:
            shapes.append(value.shape)
            # Depthwise ones are added in 32 bits: there the whole range is used.
            assert np.abs(value.astype(int)).max() == (127 if value.shape[1] == 1 else 64)
    assert sorted(shapes) == [(8, 1, 3, 3), (8, 8, 1, 1)]  # of four convolutions the first two stay fp32


def test_biases_take_back_what_rounding_adds_on_average(bundle, pictures, tmp_path, monkeypatch):
    pixels = load(sorted((pictures / "train").glob("*/*.jpg")))
    wanted = onnx_runner(bundle / ONNX)(pixels).mean(axis=0)

    def error(name):
        int8.to_int8(bundle / ONNX, tmp_path / name, pixels, kept=0)
        return np.abs(onnx_runner(tmp_path / name)(pixels).mean(axis=0) - wanted).mean()

    corrected = error("corrected.onnx")
    monkeypatch.setattr(int8, "_put_back", lambda *_: None)
    assert corrected < error("plain.onnx") / 2


def test_its_probabilities_are_those_of_fp32(bundle, kept, pictures):
    pixels = load(sorted((pictures / "train").glob("*/*.jpg")))
    before, after = (
        quantize.probabilities(onnx_runner(folder / ONNX)(pixels), read(folder).decision.temperature)
        for folder in (bundle, kept)
    )
    assert np.abs(before - after).max() < 0.05
    doubled = quantize._temperature(
        onnx_runner(bundle / ONNX), lambda batch: 1.5 * onnx_runner(bundle / ONNX)(batch), pixels, 2.0
    )
    assert doubled == pytest.approx(3.0, abs=0.01)


def test_the_same_pictures_give_the_same_bundle(bundle, kept, pictures, tmp_path):
    assert main([str(bundle), str(pictures), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    assert read(tmp_path / "again").files == read(kept).files
    assert read(tmp_path / "again").digest == read(kept).digest


def test_a_model_that_int8_ruins_stays_fp32(pictures, tmp_path, capsys):
    """Of two channels in one range the smaller is rounded away."""
    folder, out = tmp_path / "wide", tmp_path / "wide-int8"
    fp32 = convolutions(folder, spread=3e4)
    assert main([str(folder), str(pictures), "--quiet"]) == 3
    said = capsys.readouterr().out
    assert "the first 2 layers in fp32: of 48 pictures" in said  # half of them at most
    assert "int8 is not kept, fp32 stays: the same top answer is wanted for 97% of the pictures, it is" in said
    assert "pictures fewer right" in said
    assert read(folder) == fp32
    report = json.loads((tmp_path / "wide-int8.quantize.json").read_text())
    assert report["kept"] is None
    assert len(report["attempts"]) == 1
    assert report["attempts"][0]["agree"] < 0.97
    assert len(report["attempts"][0]["unmet"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wide", "wide-int8.quantize.json"]

    earlier = bundle_of(out, NAMES, Decision())
    assert main([str(folder), str(pictures), "--quiet"]) == 3
    assert f"what is at {out} was made earlier" in capsys.readouterr().out
    assert read(out) == earlier


def test_ranges_come_from_no_picture_that_is_judged(bundle, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    shutil.copy(tmp_path / "data/train/red/0.jpg", tmp_path / "data/validation/red/copy.jpg")
    catalogue = data.catalogue(str(tmp_path / "data"), progress=False)
    measuring, judging = parts(catalogue)
    assert {record.split for record in measuring} == {"train"}
    assert not {record.sha256 for record in measuring} & {record.sha256 for record in judging}
    assert "validation/red/copy.jpg" not in {record.key for record in judging}
    made, _ = quantize.quantize(bundle, tmp_path / "out", catalogue, progress=False)
    told = made.provenance["int8"]["calibration"]
    assert told["pictures"] == len(measuring) == 32
    assert told["digest"] == sha256("\n".join(sorted(record.sha256 for record in measuring)).encode())


@pytest.mark.parametrize("given", [False, True])
def test_held_out_pictures_are_those_that_training_held_out(pictures, tmp_path, given):
    """Without splits, and where test alone is given."""
    root = str(tmp_path / "data")
    for label in NAMES:
        shutil.copytree(pictures / "train" / label, tmp_path / "data" / ("test" if given else "") / f"{label}")
        rest = tmp_path / "data" / ("train" if given else "") / f"{label}"
        shutil.copytree(pictures / "validation" / label, rest, dirs_exist_ok=True)
    trained = data.catalogue(root, progress=False)
    here = quantize.pictures(root, None, 0.2, progress=False)
    assert {one.key: one.split for one in trained.records} == {one.key: one.split for one in here.records}


def test_pictures_without_the_bundles_labels_tell_the_agreement(bundle, pictures, tmp_path, capsys):
    for split in EACH:
        for path in (pictures / split).glob("*/*.jpg"):
            to = tmp_path / "album" / split / "holidays" / f"{path.parent.name}-{path.name}"
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
    out = tmp_path / "out"
    command = [str(bundle), str(tmp_path / "album"), "--out", str(out), "--quiet"]
    assert main(command) == 1
    assert "holidays; the data has none of these" in (error := capsys.readouterr().err)
    assert "to judge the agreement with fp32 alone, say --unlabelled" in error
    assert main([*command, "--unlabelled"]) == 0
    assert "named right" not in capsys.readouterr().out
    told = read(out).metrics
    assert told["int8"]["agree"] >= 0.97
    assert told["int8"]["difference"] is None
    assert "validation" not in told


def test_bad_input_is_refused_and_leaves_nothing(bundle, kept, pictures, tmp_path, capsys):
    here = tmp_path / "here"
    here.mkdir()

    def refused(folder, *more, of=pictures):
        assert main([str(folder), str(of), "--out", str(here / "out"), *more, "--quiet"]) == 1
        assert not list(here.iterdir())
        return capsys.readouterr().err

    assert "colours 2-int8 is int8 already: name the fp32 bundle" in refused(kept)
    assert "is no bundle" in refused(tmp_path / "none")
    assert "is the fp32 bundle itself" in refused(bundle, "--out", str(bundle))
    assert "does not exist" in refused(bundle, of=tmp_path / "none")
    few = tmp_path / "few"
    shutil.copytree(pictures / "train/red", few / "train/red")
    shutil.copytree(pictures / "validation/red", few / "validation/red")
    assert "has 8 pictures in train" in (error := refused(bundle, of=few))
    assert "12 in validation and test to judge on: int8 needs 16 and 34" in error
    bundle_of(tmp_path / "flat", NAMES, Decision())
    assert "its model has nothing to quantize but a classifier" in refused(tmp_path / "flat")
    write(tmp_path / "long", lambda new: replace(manifest(Decision()), version="v" * 60))
    assert "the int8 bundle's version" in refused(tmp_path / "long")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/thesis.txt").write_text("mine")
    assert "holds something that is not a bundle" in refused(bundle, "--out", str(tmp_path / "kept"))


def test_on_a_gpu_it_is_refused_with_the_reason(kept):
    with pytest.raises(BundleError, match=r"model\.pt2: is missing, as in int8 bundles, .*on a GPU serve the fp32 one"):
        handler.Model(kept, "cuda:0")


def judged(same, lost, won, wrong=0):
    """`same` pictures alike and right, `lost` that only fp32 names right, `won` only int8, `wrong` neither."""
    answers = [(0, 0)] * same + [(0, 1)] * lost + [(1, 0)] * won + [(1, 2)] * wrong
    before, after = (np.eye(3, dtype=np.float32)[list(each)] for each in zip(*answers, strict=True))
    return Judged.of(before, after, np.zeros(len(answers), np.int64))


def test_the_bounds_are_half_a_point_or_one_picture_and_97_of_100():
    assert judged(33, 1, 0).unmet() == []
    assert "same top answer is wanted for 97% of the pictures, it is 94.1%" in judged(32, 1, 1).unmet()[0]
    assert "names 2 of 341 pictures fewer right" in judged(339, 2, 0).unmet()[0]
    assert judged(339, 1, 0, wrong=1).unmet() == []
    assert judged(398, 2, 0).unmet() == []
    assert judged(335, 4, 3).unmet() == []
    assert len(judged(50, 9, 1).unmet()) == 2


def test_the_interval_of_a_paired_difference():
    """By hand: (1 + 1) / 23 - (7 + 1) / 23 and 1.959964 standard errors of 0.126273."""
    found = judged(13, 7, 1)
    assert (found.pictures, found.lost, found.won, found.difference) == (21, 7, 1, -6 / 21)
    assert found.difference_low == pytest.approx(-0.26087 - 0.24749, abs=1e-4)
    assert found.difference_high == pytest.approx(-0.26087 + 0.24749, abs=1e-4)
    assert "of 21 pictures 61.9% get the same top answer" in str(found)
