"""The suite of benchmarks as a command: claims that fail are told, results are kept, pages are made of them. Nothing is timed."""

import contextlib
import gc
import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import measure, report, scale_once, suite

RESULTS = {"date": "2026-01-02T03:04:05+00:00", "machine": {"devices": {"cpu": 1}}, "value": 3}


def module(holds):
    return types.SimpleNamespace(
        __doc__="What it is.\n\n    python -m benchmarks.thing\n\nHow.",
        tables=lambda r: [suite.Table("Things", ["", "n"], [["a", str(r["value"])]], "a note")],
        claims=lambda r: [suite.Claim("three things", holds, str(r["value"]))],
        run=lambda quick: {"value": 3},
    )


def test_a_claim_that_fails_is_told(capsys):
    assert suite.report(module(True), RESULTS)
    assert "holds: three things [3]" in capsys.readouterr().out
    assert not suite.report(module(False), RESULTS)
    out = capsys.readouterr().out
    assert "FAILS: three things [3]" in out
    assert "a note" in out
    with pytest.raises(SystemExit) as error:
        suite.main(module(False), ["--quick"])
    assert error.value.code == 1


def test_results_go_to_a_file_or_to_one_each(tmp_path):
    command.write(tmp_path / "all.json", {"thing": RESULTS})
    assert json.loads((tmp_path / "all.json").read_text())["thing"]["value"] == 3
    command.write(tmp_path, {"thing": RESULTS})
    assert json.loads((tmp_path / "thing-cpu-2026-01-02.json").read_text()) == RESULTS
    command.write(None, {"thing": RESULTS})


def test_ratios_are_of_the_same_round_and_laws_are_slopes():
    assert suite.ratios([2.0, 4.0, 60.0], [1.0, 2.0, 30.0]) == (2.0, 2.0, 2.0)
    assert suite.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


def test_pages_are_made_between_their_marks(tmp_path, monkeypatch):
    text = f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter"
    assert report.within(text, report.MARKS, "new\n") == text.replace("old", "new")
    with pytest.raises(SystemExit, match="There must be one"):
        report.within("nothing", report.MARKS, "new")
    assert report.about(module(True)) == "What it is.\n\nHow."
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="no results of the step yet"):
        report.main([])


def test_what_is_missing_is_named():
    assert suite.missing(["json"]) == {}
    assert "pip install" in suite.missing(["no_such_package"])["no_such_package"]


def test_a_base_that_has_no_room_is_named_and_not_made(monkeypatch):
    monkeypatch.setattr(measure, "free_memory", lambda: 10**9)
    found, missing = scale_once.sizes_of((128, 256, 4096), (4,), layers=1, rounds=1, cold_rounds=1)
    assert list(found["width"]) == ["128", "256"]
    assert missing == {"width 4096": "takes 2.1 GB of memory, of which 1.0 are free"}
    assert scale_once.nbytes(scale_once.abstract(1, 128)[2]) == found["width"]["128"]["base bytes"]


def test_free_memory_is_what_the_system_says():
    free = measure.free_memory()
    assert free is None or 2**20 < free < 2**50


def test_where_results_go_is_checked_before_anything_is_measured(tmp_path, capsys):
    assert suite.out_path(str(tmp_path)) == tmp_path
    assert suite.out_path(f"{tmp_path}/new/one/").is_dir()
    with pytest.raises(SystemExit) as error:
        suite.main(module(True), ["--out", str(tmp_path / "none" / "x.json")])
    assert error.value.code == 2
    assert f"there is no folder {tmp_path / 'none'}" in capsys.readouterr().err


def test_a_choice_of_nothing_names_what_there_is():
    assert suite.chosen(["Llama", "conv net"], "LLA") == ["Llama"]
    with pytest.raises(SystemExit, match="--only x: there are only Llama, conv net"):
        suite.chosen(["Llama", "conv net"], "x")


def test_what_cannot_run_is_named_and_fails(monkeypatch, capsys):
    monkeypatch.setitem(suite.NEEDS, "trace", ("json", "no_such_package"))
    with pytest.raises(SystemExit, match=r"benchmarks.trace: not installed: no_such_package; pip install"):
        suite.require("trace")
    with pytest.raises(SystemExit, match="Not run: trace"):
        command.main(["--quick", "--only", "trace"])
    assert "not run: trace (not installed: no_such_package" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux for the processes")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_all_that_runs(sent, tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "trace", "dispatch", "variants"]
    with subprocess.Popen(
        [*command, "--out", f"{tmp_path}/"], cwd=suite.ROOT, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as parent:
        parent.stderr.readline()  # a benchmark says what it is at
        running = children(parent.pid)
        assert running
        parent.send_signal(sent)
        said = parent.communicate(timeout=120)[1]
    assert parent.returncode == 130
    assert "Stopped; written: nothing." in said
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in running)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_during_garbage_collection_is_not_lost(sent):
    def once(phase, info):
        gc.callbacks.remove(once)
        signal.raise_signal(sent)

    def collect_and_wait():
        gc.callbacks.append(once)
        gc.collect()
        time.sleep(20)

    with suite.terminable(), pytest.raises(KeyboardInterrupt):
        collect_and_wait()


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended
            parent = stat.read_text().rpartition(")")[2].split()[1]
            found += [stat.parent.name] if int(parent) == pid else []
    return found
