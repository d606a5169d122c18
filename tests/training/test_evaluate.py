"""A real bundle with a tiny model, evaluated as it would be served."""

import json
from dataclasses import replace

import numpy as np
import pytest
from drawn import CLASSES, RESIZE, bundle_of, catalogue, drawing, logits

from bundle import picture
from bundle.manifest import BundleError, Decision, read
from gateway.schemas import decide
from training import evaluate, export
from training.evaluate import calibrate, folds, judge, main, predict
from training.gate import GateError
from training.metrics import MetricError

SHUFFLED = ("yellow", "blue", "red", "teal", "white", "orange", "violet", "green", "pink")  # none is "white"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "colours"
    bundle_of(folder, SHUFFLED, Decision(temperature=2.0, threshold=0.4))
    return folder


@pytest.fixture(scope="module")
def drawn():
    return catalogue(6, 2)


def test_what_is_measured_is_what_is_served(bundle, drawn):
    found = predict(bundle, drawn, "validation", progress=False)
    assert found.classes == SHUFFLED
    manifest, run = read(bundle), export.onnx_runner(bundle / export.ONNX)
    right = 0
    for record, row in zip(found.records, found.logits, strict=True):
        served = run(picture.load(drawn.read(record), manifest.input.resize)[None])[0]
        assert np.array_equal(served, row)
        right += decide(manifest, served).top[0].label == drawn.classes[record.label]
    assert found.right.sum() == right
    assert 0.8 * 48 < right < 48


def test_classes_are_matched_by_name(bundle, drawn):
    found = predict(bundle, drawn, "validation", progress=False)
    assert [SHUFFLED[i] for i in found.labels] == [drawn.classes[record.label] for record in found.records]
    pixels = np.stack([picture.load(drawn.read(record), RESIZE) for record in found.records])
    assert np.allclose(found.logits[:, [SHUFFLED.index(name) for name in CLASSES]], logits(pixels), atol=1e-3)


def test_splits_and_what_is_kept_out(bundle, drawn):
    copy = replace(drawn.of("validation")[3], excluded="copy of red/007.jpg in train")
    kept_out = replace(drawn, records=tuple(copy if one.key == copy.key else one for one in drawn.records))
    found = predict(bundle, kept_out, "validation", progress=False)
    assert len(found.records) == 47
    assert copy.key not in {record.key for record in found.records}
    assert {record.split for record in predict(bundle, drawn, "train", progress=False).records} == {"train"}
    assert len(predict(bundle, drawn, "all", progress=False).records) == 64


def test_order_and_threads_change_nothing(bundle, drawn):
    class InShardOrder(type(drawn)):
        def pictures(self, records):
            return super().pictures(records[::-1])

    found = predict(bundle, drawn, "validation", workers=1, progress=False)
    other = predict(bundle, InShardOrder(**vars(drawn)), "validation", workers=3, progress=False)
    assert other.records == found.records
    assert np.array_equal(other.logits, found.logits)


def test_pictures_are_streamed():
    read_ahead, taken = [], 0

    def pictures():
        for i in range(200):
            read_ahead.append(i - taken)
            yield i, b""

    for batch, _ in evaluate._in_threads(len, pictures(), 2):
        taken += len(batch)
    assert taken == 200
    assert max(read_ahead) < 4 * evaluate.BATCH


def test_a_class_of_the_bundle_without_pictures_is_known_to_be_unknown(bundle, drawn, tmp_path):
    found = predict(bundle, drawn, "validation", progress=False)
    summary, unmet = judge(tmp_path / "x", found, drawn, read(bundle), requirements=["recall[white]>=0.5"])
    assert next(row for row in summary["per_class"] if row["name"] == "white")["recall"] is None
    assert unmet == ["recall[white] >= 0.5 is required, but these pictures cannot tell"]


def test_a_class_that_the_bundle_does_not_know_is_refused(bundle, drawn):
    other = replace(drawn, classes=("blue", "Grün", *drawn.classes[2:]))
    with pytest.raises(MetricError, match=r"colours does not know 1 of the 8 classes of drawn/pictures: Grün; .*green"):
        predict(bundle, other, "validation", progress=False)


def test_an_empty_split_is_refused(bundle, drawn):
    with pytest.raises(MetricError, match=r"test has no pictures.* there are: train 16, validation 48, test 0"):
        predict(bundle, drawn, "test", progress=False)


def test_a_picture_that_cannot_be_read_any_more_is_named(bundle, drawn):
    broken = replace(drawn, content={**drawn.content, "pink/002.jpg": drawn.content["pink/002.jpg"][:-400]})
    with pytest.raises(MetricError, match=r"pink/002\.jpg: the JPEG picture is cut off"):
        predict(bundle, broken, "validation", progress=False)


def test_a_bundle_that_would_not_be_served_is_refused(bundle, drawn, tmp_path):
    with pytest.raises(BundleError, match="is no bundle"):
        predict(tmp_path, drawn, "validation", progress=False)
    for file in bundle.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "golden.npz").write_bytes(b"")
    with pytest.raises(BundleError, match=r"golden\.npz: was altered"):
        predict(tmp_path, drawn, "validation", progress=False)


def test_calibration_is_fitted_and_measured(bundle):
    many = catalogue(20, 0)
    found = predict(bundle, many, "validation", progress=False)
    decision = calibrate(found, precision=0.97)
    assert calibrate(found).threshold == 0
    assert calibrate(found).temperature == decision.temperature
    summary = evaluate.metrics.summarise(found, decision.temperature, decision.threshold)
    assert summary["nll"] < summary["nll_before"]
    assert summary["precision_at_threshold"] >= 0.97 > summary["accuracy"]
    assert summary["coverage"] > 0.5


def test_the_report_says_what_the_gate_said(bundle, drawn, tmp_path):
    found = predict(bundle, drawn, "validation", progress=False)
    worse = replace(found, logits=np.where(np.arange(48)[:, None] < 12, -found.logits, found.logits))
    required = ["accuracy>=0.99", "accuracy>=0.5"]
    summary, unmet = judge(tmp_path / "new/x", worse, drawn, read(bundle), requirements=required, other=found)
    assert len(unmet) == 2
    assert unmet[0].startswith("accuracy >= 0.99 is required, but it is 0.")
    assert "it loses 12 and wins 0" in unmet[1]
    told = json.loads((tmp_path / "new/x.report.json").read_text())
    assert told["gate"] == summary["gate"]
    assert told["gate"]["unmet"] == unmet
    assert told["gate"]["requirements"] == dict.fromkeys(required, told["accuracy"])
    assert told["accuracy"] == summary["accuracy"] == worse.right.mean()
    assert told["bundle"]["digest"] == read(bundle).digest
    assert told["data"] == {"address": "drawn/pictures", "digest": "d" * 64}
    assert "The gate failed" in (tmp_path / "new/x.report.html").read_text()
    assert judge(tmp_path / "y", found, drawn, read(bundle), requirements=["accuracy>=0.5"], other=worse)[1] == []
    assert "The gate is passed" in (tmp_path / "y.report.html").read_text()
    with pytest.raises(GateError):
        judge(tmp_path / "z", found, drawn, read(bundle), requirements=["accuracy"])


def test_folds():
    labels = np.repeat([0, 1, 2], [20, 12, 8])
    groups = np.arange(40) // 2  # pairs of copies
    seen = []

    def fit(train, held):
        assert not set(train) & set(held)
        assert not set(groups[train]) & set(groups[held])
        assert set(labels[held]) == set(labels[train]) == {0, 1, 2}
        seen.append(held)
        return np.eye(3)[np.where(held % 10 == 0, 1, labels[held])]  # 0, 10 and 30 are wrong

    found = folds(labels, fit, 4, seed=1, groups=groups)
    assert sorted(np.concatenate(seen)) == list(range(40))
    right = [np.mean((held % 10 != 0) | (labels[held] == 1)) for held in seen]
    assert found == {"count": 4, "accuracy": right, "mean": np.mean(right), "deviation": np.std(right, ddof=1)}
    assert folds(labels, lambda train, held: np.eye(3)[labels[held]], 8)["accuracy"] == [1] * 8
    with pytest.raises(MetricError, match="2 to 8, the pictures of the smallest class, not 9"):
        folds(labels, fit, 9)
    with pytest.raises(MetricError, match="not finite"):
        folds(labels, lambda train, held: np.full((len(held), 3), np.nan), 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures on disk: by class, in validation."""
    root = tmp_path_factory.mktemp("data")
    for name in CLASSES:
        (root / "validation" / name).mkdir(parents=True)
        for i in range(4):
            (root / "validation" / name / f"{i}.jpg").write_bytes(drawing(name, i))
    return root


def test_command(bundle, folder, tmp_path, capsys):
    arguments = [str(bundle), str(folder), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--require", "accuracy>=0.5", "ece<=0.9", "--no-worse-than", str(bundle)]) == 0
    told = json.loads((tmp_path / "out.report.json").read_text())
    assert (told["pictures"], told["temperature"], told["threshold"]) == (32, 2.0, 0.4)
    assert told["gate"]["comparison"] == {"pictures": 32, "won": 0, "lost": 0, "p": 1.0}
    assert "of 32 pictures are named right; the report: " in capsys.readouterr().out

    assert main([*arguments, "--require", "accuracy>=1"]) == 3
    assert "evaluate: the gate failed: accuracy >= 1 is required, but it is 0." in capsys.readouterr().err
    assert json.loads((tmp_path / "out.report.json").read_text())["gate"]["unmet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{bundle}", "{folder}", "--require", "acuracy>=1"], "there is no metric acuracy"),
        (["{bundle}", "{folder}", "--require", "recall[socks]>=1"], "there is no class socks"),
        (["{folder}", "{folder}"], "is no bundle"),
        (["{bundle}", "{folder}", "--split", "train"], "the split train has no pictures"),
        (["{bundle}", "{folder}/nothing"], "nothing"),
    ],
)
def test_command_refuses_with_a_sentence(bundle, folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([part.format(bundle=bundle, folder=folder) for part in arguments]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not list(bundle.parent.glob("*.report.*"))
