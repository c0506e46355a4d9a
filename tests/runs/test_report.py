"""minllama/runs/report.py: a run as a page, looked at in a browser."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import check_model_precision
from minllama.runs import metrics, report
from minllama.runs.comparison import find_metrics, read_run
from minllama.runs.metrics import RELOAD_SECONDS, Metrics
from minllama.runs.report import Curves, describe_run, number, page
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import UsageError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
HOSTILE = '</script><script>alert(1)</script> <b>&amp; @@DATA@@ "quoted" \u2028 \udce4 狐狸'


def open_metrics(folder: RunFolder, done: int, **settings: Any) -> Metrics:
    """The metrics of a run of 100 steps."""
    settings = {"save": lambda _, write: write()} | settings
    return Metrics(folder, done, last_step=lambda: 100, **settings)


def record(step: int, **more: Any) -> dict[str, Any]:
    """A step's record, whose numbers follow from its step."""
    return {
        "step": step,
        "epoch": 1,
        "tokens": 64 * step,
        "elapsed": step / 4,
        "loss": 5 - step / 1000,
        "val_loss": None,
        "lr": 1e-3 / step,
        "grad_norm": 1.5,
        "tokens_per_second": 256.0,
        "memory": 1_500_000_000,
        **more,
    }


def write_run(folder: Path, steps: int, *, every: int = 10, **start: Any) -> Path:
    """The records and the start of a run, as the program leaves them."""
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        found = {}
        if step % every == 0:
            found = {"val_loss": 5.5 - step / 1000, "sample": f"One day {HOSTILE} {step}"}
        lines.append(json.dumps(record(step, **found)))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = {"option": "pretrain", "epochs": 5, "dim": 32, "seed": 1337} | start
    starts = {
        "options": options,
        "environment": {"torch": "2", "command": ["run_llama.py", "--save_dir", "a b"]},
        "device": HOSTILE,
        "plan": ["model        1,066,112 parameters"],
    }
    (folder / "run.json").write_text(json.dumps({"starts": [starts]}), encoding="utf-8")
    return folder


# ---------------------------------------------------------------------------- curves


@pytest.mark.parametrize("steps", [7, 100, 1001])
def test_a_long_run_is_thinned_to_means(steps, monkeypatch):
    """Each point is the mean of the steps up to it; no step is lost, none counted twice."""
    monkeypatch.setattr(report, "MOST_POINTS", 16)
    pick = random.Random(steps)
    losses = [None if step % 13 == 5 else pick.random() for step in range(1, steps + 1)]
    curves = Curves(record(i + 1, loss=loss) for i, loss in enumerate(losses))
    found, stride = curves.to_plain()["steps"], curves.stride
    assert len(found["step"]) == -(-steps // stride) <= 16
    assert stride == 1 or steps > 16 * stride / 2
    for i, step in enumerate(found["step"]):
        assert step == min((i + 1) * stride, steps)
        known = [loss for loss in losses[i * stride : step] if loss is not None]
        mean = sum(known) / len(known) if known else None
        assert found["loss"][i] == (None if mean is None else pytest.approx(mean, rel=1e-5))
        assert (found["tokens"][i], found["elapsed"][i]) == (64 * step, step / 4)


def test_evaluations_and_samples_are_thinned_but_for_the_last(monkeypatch):
    """They are few, and each stands where it was made."""
    monkeypatch.setattr(report, "MOST_POINTS", 10)
    monkeypatch.setattr(report, "MOST_SAMPLES", 4)
    curves = Curves(record(step, val_loss=1 / step, sample=f"{step}") for step in range(1, 100))
    found = curves.to_plain()
    assert 5 <= len(found["evaluations"]["step"]) <= 10 and found["evaluations"]["step"][-1] == 99
    for step, loss in zip(*map(found["evaluations"].get, ("step", "val_loss")), strict=True):
        assert loss == pytest.approx(1 / step, rel=1e-5)
    assert 2 <= len(found["samples"]) <= 4 and found["samples"][-1] == (99, "99")


def test_a_record_that_holds_no_numbers_is_no_point():
    """A metrics file may come from anybody."""
    strange = ["7", True, math.nan, math.inf, 10**400, [1], {"a": 1}, None]
    assert [number(value) for value in strange] == [None] * len(strange)
    curves = Curves([record(1), *({"step": value} for value in strange), record(1), record(2)])
    assert curves.to_plain()["steps"]["step"] == [1, 2]
    for value in strange:
        found = Curves([record(1, loss=value, val_loss=value, sample=7)]).to_plain()
        assert found["steps"]["loss"] == [None] and found["evaluations"]["step"] == []
        assert not found["samples"]


@pytest.mark.parametrize("figures", [None, 3, "x", [1], {"a": "x"}, {"a": [1]}, {"a": math.nan}])
def test_figures_by_source_may_hold_anything(figures):
    """Of a damaged record; names that are endless, or too many, are cut."""
    curves = Curves([record(1, val_loss=2.0, val_loss_by_source=figures)])
    columns = curves.to_plain()["evaluations"]
    assert columns["val_loss"] == [2.0] and columns.get("val_loss, a") in (None, [None])
    many = {f"{number:09}" * 1000: 1.0 for number in range(1000)}
    columns = Curves([record(1, val_loss_by_source=many)]).to_plain()["evaluations"]
    assert len(columns) < 100 and max(map(len, columns)) < 300


def test_starts_may_hold_anything():
    """run.json, too: what is not as it should be is left out."""
    for strange in (None, 7, "a", [1], {"option": ["x"]}, {"environment": {"command": 7}}):
        start = {"options": strange, "environment": strange, "plan": strange}
        run = describe_run("a", Curves([record(1)]), [start])
        assert "@@" not in page("a", [run]) and run["command"] == ""


def test_flags_that_were_typed_stand_apart(tmp_path, view):
    """From those that the program chose; also those of a resume. Older records do not say."""
    path = write_run(tmp_path / "run", 3, epochs=7, pretrain_lr=0.25)
    run = read_run(path)
    for typed, title in (
        (None, "choices other than the defaults"),
        (["epochs"], "choices other than the defaults, made by the program"),
    ):
        starts = [run.starts[0] | {"typed": typed}, run.starts[0] | {"typed": ["seed", 7]}]
        starts = starts[: 2 if typed else 1]
        described = describe_run("run", run.curves, starts) | {"state": "finished", "last_step": 3}
        (tmp_path / "page.html").write_text(page("run", [described]), encoding="utf-8")
        shown = view(tmp_path / "page.html")
        tables = dict(
            zip(
                shown.locator("#rest > h2").all_inner_texts(),
                shown.locator("#rest > .table").all_inner_texts(),
                strict=False,
            )
        )
        assert "--pretrain_lr" in tables[title] and ("--epochs" in tables[title]) == (typed is None)
        if typed:
            names = [row.split("\t")[0] for row in tables["choices that were typed"].splitlines()]
            assert sorted(names) == ["--epochs", "--seed"]


def test_findings_are_tables_of_text_or_left_out(tmp_path):
    """Of a damaged record, too; a run that goes on has none any more."""
    folder = RunFolder(write_run(tmp_path / "run", 3), "pretrain")
    folder.note_findings({"how good": [["this model", "1.5"]]})
    folder.note_findings({"next": [["a", HOSTILE]]})
    sound = {"how good": [["this model", "1.5"]], "next": [["a", HOSTILE]]}
    assert folder.findings() == sound
    path = folder.file("run.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    for strange in ([["a"]], [["a", 1]], [7], 7, None, "ab", ["ab"]):
        record["findings"] = sound | {"strange": strange}
        path.write_text(json.dumps(record), encoding="utf-8")
        assert folder.findings() == sound
    folder.add_start({})
    assert folder.findings() == {}


def test_names_that_are_no_utf8_show_their_bytes():
    """Of a folder with a GBK name the title had question marks, and the rest of the page boxes."""
    name = "\udcb2\udce2-run"
    options = {"option": "pretrain", "save_dir": name, "pretrain_data": [f"{name}.txt"]}
    start = {"options": options, "environment": {"command": ["x.py", name]}, "plan": [name]}
    run = describe_run(name, Curves([record(1)]), [start])
    assert run["name"] == run["plan"][0] == r"\xb2\xe2-run"
    assert ("--pretrain_data", r"\xb2\xe2-run.txt") in run["choices"]
    text = page(run["name"], [run])
    assert r"<title>\xb2\xe2-run</title>" in text and text.encode() and "udcb2" not in text
    if os.name != "nt":
        assert run["command"] == r"python x.py $'\262\342-run'"


# ---------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, where there is one."""
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as program:
        chromium = program.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def view(browser):
    """Opens a page file; in the end nothing was said on the console, and nothing fetched."""
    said, pages = [], []

    def open_page(path: Path, *, width: int = 1200):
        shown = browser.new_page(viewport={"width": width, "height": 900})
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("dialog", lambda dialog: said.append("an alert") or dialog.dismiss())
        own = path.resolve().as_uri()
        shown.on(
            "request",
            lambda request: None if request.url.startswith((own, "data:")) else said.append("net"),
        )
        shown.goto(own)
        pages.append(shown)
        return shown

    yield open_page
    assert not said
    for shown in pages:
        shown.close()


def hover(shown, chart: int, share: float) -> dict[str, str]:
    """What a chart's legend says with the pointer at this share of its width."""
    box = shown.locator(".u-over").nth(chart).bounding_box()
    shown.mouse.move(box["x"] + share * (box["width"] - 1), box["y"] + 50)
    rows = shown.locator(".chart").nth(chart).locator(".u-series")
    return dict(row.locator("th, td").all_text_contents() for row in rows.all())


INKED = """canvas => {
    const { width, height } = canvas;
    const data = canvas.getContext('2d').getImageData(0, 0, width, height).data;
    let found = 0;
    for (let i = 0; i < data.length; i += 4)
        found += Math.abs(data[i] - 0x44) + Math.abs(data[i + 1] - 0x77) +
            Math.abs(data[i + 2] - 0xaa) < 40 && data[i + 3] > 200;
    return found;
}"""  # how many pixels have the blue of a first curve


def test_the_page_of_a_run_is_drawn_and_tells_its_values(tmp_path, view, monkeypatch):
    """By a pointer over the curves: those of its records. Text of the run is text, not markup."""
    now = SimpleNamespace(perf_counter=lambda: 5.0, monotonic=lambda: 5.0)
    monkeypatch.setattr(metrics, "time", now)
    folder = RunFolder(write_run(tmp_path / "run", 100), "pretrain")
    folder.note_findings({"how good": [["gzip", f"3.1 {HOSTILE[:-4]}"]]})
    with open_metrics(folder, 99) as opened:
        opened.append(record(100, val_loss=5.4, sample=f"One day {HOSTILE} 100"))
        assert view(folder.path / "report.html").evaluate("page.reload") == RELOAD_SECONDS
    shown = view(folder.path / "report.html")
    state = shown.locator("#state").inner_text()
    assert state.startswith("finished: step 100 of 100 (100 %); ")
    titles = shown.locator(".chart h3").all_inner_texts()
    assert titles == ["loss", "learning rate", "gradient norm", "tokens per second", "memory"]
    assert all(canvas.evaluate(INKED) > 100 for canvas in shown.locator("canvas").all())
    for share, step, evaluation in ((0, 1, 5.49), (1, 100, 5.4), (24 / 99, 25, 5.48)):
        said = hover(shown, 0, share)
        assert said["step"] == str(step)
        assert float(said["training"]) == pytest.approx(5 - step / 1000)
        assert float(said["validation"]) == pytest.approx(evaluation)  # the nearest
        assert float(said["training, smoothed"]) == pytest.approx(5 - step / 1000, abs=0.002)
    assert hover(shown, 4, 0.5)["of the run"] == "1.5 GB"
    noisy = [random.Random(i).random() if i % 9 else None for i in range(400)]
    for i, value in enumerate(shown.evaluate("values => smoothed(values)", noisy)):
        side = min(i, 8)
        near = [v for v in noisy[i - side : i + side + 1] if v is not None]
        assert (value is None) == (noisy[i] is None)
        assert value is None or value == pytest.approx(sum(near) / len(near))
    assert shown.evaluate("smoothed([1, 2, 3])") == []
    samples = shown.locator(".sample").all_inner_texts()
    assert len(samples) == 10 and samples[0].endswith("狐狸 100") and "</script>" in samples[0]
    text = shown.locator("body").inner_text()
    assert "a b" in text and "how good" in text and "3.1 </script>" in text
    shown.select_option("#x", "elapsed")
    shown.check("#log")
    assert hover(shown, 0, 1)["time"] == "0:00:25"
    assert shown.evaluate("page.reload") is None
    shown.reload()
    assert shown.locator("#x").input_value() == "elapsed" and shown.locator("#log").is_checked()
    phone = view(folder.path / "report.html", width=360)
    assert phone.evaluate("document.documentElement.scrollWidth") == 360
    assert phone.locator(".u-over").first.bounding_box()["width"] > 200


def test_the_page_draws_what_was_held_out_by_source(tmp_path, view):
    """A curve for each source, whatever its name; another run may have others, or none."""
    folders = [write_run(tmp_path / name, 20) for name in ("one", "two")]
    names, runs = ["wiki/", f"code, {HOSTILE}"], []
    for folder, own in zip(folders, (names, names[:1]), strict=True):
        curves = Curves()
        for step in range(1, 21):
            figures = {name: step / 10 + place for place, name in enumerate(own)}
            curves.add(record(step, val_loss=2.0, val_loss_by_source=figures))
        runs.append(describe_run(folder.name, curves, []))
    path = tmp_path / "page.html"
    path.write_text(
        page("one", [runs[0] | {"state": "finished", "last_step": 20}]), encoding="utf-8"
    )
    shown = view(path)
    titles = shown.locator(".chart h3").all_inner_texts()
    assert titles[:2] == ["loss", "validation loss by source"] and len(titles) == 6
    assert hover(shown, 1, 1)["wiki/"] == "2"
    assert hover(shown, 1, 1)[names[1]] == "3"
    text = shown.locator("body").inner_text()
    assert "validation loss, wiki/" in text and "2, best 0.1" in text
    path.write_text(page("both", runs), encoding="utf-8")
    assert hover(view(path), 1, 1)["two: wiki/"] == "2"


def test_two_runs_laid_over_each_other(tmp_path, view, capsys):
    """Each keeps its steps, though they are not the same; what differs between them is named."""
    one, two = write_run(tmp_path / "one", 40), write_run(tmp_path / "two", 30, every=7, dim=64)
    output = tmp_path / "both.html"
    words = ["--compare-runs", str(one), str(two), "--output", str(output)]
    assert check_model_precision.main(words) == 0 and str(output) in capsys.readouterr().out
    shown = view(output)
    said = hover(shown, 0, 1)
    assert (said["step"], said[f"{one}: training"]) == ("40", "4.96")
    assert said[f"{two}: training"] == "4.97"  # its last, of step 30
    assert "see that it is the same" in shown.locator("#notes").inner_text()
    differ = shown.locator("table.facts").nth(1).inner_text()
    assert "--dim" in differ and "32" in differ and "64" in differ and "--seed" not in differ
    assert check_model_precision.main(words) == 2
    assert "is there already" in capsys.readouterr().err


# ---------------------------------------------------------------------------- without one


def test_a_page_is_rewritten_rarely_and_says_how_the_run_ended(tmp_path, monkeypatch):
    """Once in ten seconds, at most for a hundredth of the time; at the end always."""
    now, written = [100.0], []

    def save(path: Path, write: Any) -> None:
        write()
        now[0] += 0.5
        text = path.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
        written.append(json.loads(text))

    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    folder = RunFolder(tmp_path, "pretrain")
    with pytest.raises(ZeroDivisionError):
        with open_metrics(folder, 0, save=save) as opened:
            for step in range(1, 301):
                opened.append(record(step))
                now[0] += 1
            opened.rewind(200)
            opened.append(record(201))
            raise ZeroDivisionError
    steps = [data["runs"][0]["steps"]["step"][-1] for data in written]
    assert steps == [1, 51, 101, 151, 201, 251, 201, 201]
    assert [data["runs"][0]["state"] for data in written[-2:]] == ["running", "ended by an error"]
    assert [data["reload"] for data in written] == [RELOAD_SECONDS] * 7 + [None]


def test_what_is_no_run_is_said(tmp_path, capsys):
    """In one line, which names it; nothing is written."""
    write_run(tmp_path / "one", 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("finetune-a-metrics.jsonl", "finetune-b-metrics.jsonl"):
        (tmp_path / "two" / name).write_text("{}\n", encoding="utf-8")
    file = tmp_path / "two" / "finetune-a-metrics.jsonl"
    assert find_metrics(tmp_path / "one") == tmp_path / "one" / "metrics.jsonl"
    assert find_metrics(file) == file
    for path, said in (
        ("missing", "no such folder"),
        ("empty", "holds no run"),
        ("two", "finetune-b-metrics.jsonl"),
        ("two/finetune-a-metrics.jsonl", "holds no records"),
    ):
        with pytest.raises(UsageError, match=said):
            read_run(tmp_path / path)
    output = ["--output", str(tmp_path / "x.html")]
    for words in (["a"], ["a", "b", "--verify", *output], ["a", *output]):
        assert check_model_precision.main(["--compare_runs", *words]) == 2
        assert capsys.readouterr().err.count("error: --compare_runs") == 1
    assert not (tmp_path / "x.html").exists()


def test_what_draws_the_page_is_whole():
    """uPlot as published, with its licence; the page fetches nothing."""
    licence = report.read_part("uPlot-LICENSE")
    assert "MIT" in licence and "Leon Sorokin" in licence
    assert "uPlot (v1.6.32)" in report.read_part("uPlot.iife.min.js")[:80]
    text = page("a", [])
    assert "default-src 'none'" in text and 'src="' not in text and "@import" not in text
