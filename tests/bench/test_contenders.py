"""bench.contenders: a contender that fails is told and does not stop the others; nothing of it is left."""

import base64
import json
import sys
from pathlib import Path

import psutil
import pytest
from servers import gone
from tiny import tiny_bundle

from bench import __main__ as bench
from bench import contenders, prepare, results, visit
from bench.cases import Case
from bench.contenders import Body, Contender, Failed, differs
from local.run import DEFAULT, find

# Answers with what it is told to, from a child process that does not end by itself.
SERVER = """
import http.server, subprocess, sys, time
if "child" not in sys.argv:
    sys.exit(subprocess.run([sys.executable, *sys.argv, "child"]).returncode)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        end = time.thread_time() + 0.02
        while time.thread_time() < end: pass
        body = open(sys.argv[2], "rb").read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
TOP = [{"label": "beagle", "probability": 0.9}, {"label": "basset", "probability": 0.05}]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (contenders, prepare, visit):
        monkeypatch.setattr(module, "HOME", tmp_path)
    return tmp_path


@pytest.fixture
def photos(home: Path) -> dict[str, list[Path]]:
    return prepare.photographs(home / "there-is-none")


def server(home: Path, name: str, top: list[dict[str, object]]) -> Contender:
    (home / "server.py").write_text(SERVER)
    (home / f"{name}.json").write_text(json.dumps({"top": top}))
    return Contender(name, f"{sys.executable} {home}/server.py {{port}} {home}/{name}.json")


def test_the_rounds_go_on_where_one_fails(
    home: Path, photos: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(visit, "reference", lambda _: TOP)
    good = server(home, "good", TOP)
    other = server(home, "other", [{"label": "basset", "probability": 0.9}, TOP[0]])
    dead = Contender("dead", f"{sys.executable} -c raise(SystemExit('no-licence'))")
    book = results.Book(home / "results.jsonl", {"contenders": [{"name": c.name} for c in (dead, other, good)]})
    load = Case("32 clients", 1, clients=4)
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    for contender in (dead, other, good):
        visit.pay(visit.Visit(1, contender, (load,)), photos, book, warm_up=0.2)
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert gone(left)
    assert "no-licence" in book.error("dead")
    assert "place 1 is 'basset', not 'beagle'" in book.error("other")
    [measured] = book.rows("good", load.name)
    assert measured["images_per_s"] > 2
    assert measured["failed"] == {}
    assert 15 < sum(measured["cpu_ms"].values()) < 60
    assert book.values("good", "start", "start_s")[0] < 60
    assert "no-licence" in capsys.readouterr().out


def test_capacity_must_be_known_for_an_open_loop(
    home: Path, photos: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visit, "reference", lambda _: TOP)
    monkeypatch.setattr(visit, "CALM", 0.1)
    good = server(home, "good", TOP)
    book = results.Book(home / "results.jsonl", {"contenders": [{"name": "good"}]})
    open_loop = Case("5 x capacity", 1, of_capacity=5, recovery=2)
    visit.pay(visit.Visit(1, good, (open_loop,)), photos, book, warm_up=0.1)
    assert "capacity is unknown" in book.error("good")
    book.add("good", 1, "32 clients", {"images_per_s": 10.0})
    visit.pay(visit.Visit(1, good, (open_loop,)), photos, book, warm_up=0.1)
    [measured] = book.rows("good", open_loop.name)
    assert measured["rate"] == 50.0
    assert measured["n"] == 50
    assert "recovery_s" in measured
    assert set(measured["pss_before_mb"]) == set(measured["pss_after_mb"])


def test_what_is_not_there_is_reported_beforehand(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def install(environment: str) -> None:
        raise Failed(f"{environment}: pip could not install it")

    monkeypatch.setattr(contenders, "install", install)
    tiny_bundle(home / "bundle")
    monkeypatch.setattr(prepare, "BUNDLES", home)
    chosen = [Contender(name, "", "nowhere", bundle="bundle") for name in ("a", "b")]
    broken = prepare.prepare([*chosen, Contender("c", "", bundle="no-such-bundle")])
    assert broken.pop("c").startswith(f"{home}/no-such-bundle: is no bundle")
    assert broken == dict.fromkeys(("a", "b"), "nowhere: pip could not install it")


@pytest.mark.parametrize("kind", ["raw", "base64", "instances"])
def test_every_body_carries_the_same_bytes(kind: str, photos: dict[str, list[Path]]) -> None:
    photo = photos["small"][0]
    body = contenders.body(Contender("x", "", body=kind), photo)  # type: ignore[arg-type]
    if kind == "raw":
        assert body == Body(photo, "image/jpeg")
        return
    value = json.loads(body.path.read_text())
    text = value["image"] if kind == "base64" else value["instances"][0]["image"]["b64"]
    assert base64.b64decode(text) == photo.read_bytes()
    assert body.content_type == "application/json"


def test_close_probabilities_may_change_places_and_others_not() -> None:
    right = [
        {"label": "a", "probability": 0.5},
        {"label": "b", "probability": 0.499},
        {"label": "c", "probability": 0.1},
    ]
    assert differs(right, right) == ""
    assert differs([right[1], right[0], right[2]], right) == ""
    assert differs([right[0], right[2], right[1]], right) == "place 2 is 'c', not 'b'"
    assert "'d'" in differs([*right[:2], {"label": "d", "probability": 0.1}], right)


def test_names_of_contenders_are_said_where_one_is_wrong() -> None:
    assert [c.name for c in bench.choose(["ours"])] == ["ours"]
    with pytest.raises(SystemExit, match=r"no contender 'Mosec': there are limit; ours; .*Mosec, ONNX Runtime"):
        bench.choose(["Mosec"])


def test_every_environment_is_pinned() -> None:
    for name in {c.environment for c in contenders.ALL} - {""}:
        lines = (contenders.ROOT / "bench" / f"requirements-{name}.txt").read_text().splitlines()
        assert prepare.versions(name)
        assert all("==" in line for line in lines[1:])
        assert {"pillow==13.0.0", "numpy==2.4.6", "onnxruntime==1.31.1"} <= set(lines)


@pytest.mark.slow
def test_ours_and_the_limit_for_real(home: Path, photos: dict[str, list[Path]]) -> None:
    find(DEFAULT)
    chosen = bench.choose(["limit", "ours"])
    book = results.Book(home / "results.jsonl", {"contenders": [{"name": c.name} for c in chosen]})
    for contender in chosen:
        visit.pay(visit.Visit(1, contender, (Case("32 clients", 2, clients=8),)), photos, book, warm_up=0.5)
        assert book.error(contender.name) == ""
    [limit], [ours] = (book.rows(name, "32 clients") for name in ("limit", "ours"))
    assert ours["failed"] == {}
    assert ours["images_per_s"] > 5
    assert set(ours["cpu_ms"]) >= {"gateway", "JVM", "worker"}
    assert set(limit["cpu_ms"]) == {"decode, resize", "model"}
    parts = book.values("ours", "start", "parts_s")[0]
    assert 0.1 < parts["gateway"] < book.values("ours", "start", "start_s")[0]
    assert 0.1 < parts["model server"] < contenders.START_SECONDS


def test_bfloat16_is_left_out_and_told_where_the_cpu_has_none(monkeypatch, capsys) -> None:
    chosen = [contender for contender in contenders.ALL if contender.runtime == "bf16"]
    assert {contender.name for contender in chosen} == {"limit, bf16", "ours, bf16"}
    monkeypatch.setattr(prepare, "features", lambda: {"avx512_bf16"})
    monkeypatch.setattr(prepare, "read_bundle", lambda folder: None)
    assert set(prepare.prepare(chosen).values()) == {"this CPU has no AMX"}
    assert "without ours, bf16: this CPU has no AMX" in capsys.readouterr().out


def test_our_precision_is_the_one_that_is_compared(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRECISION", "bf16")
    ours = {c.name: contenders.command(c, 1, 2, tmp_path)[1]["PRECISION"] for c in contenders.ALL if c.ours}
    assert ours == {"ours": "", "ours, int8": "", "ours, bf16": "bf16"}
