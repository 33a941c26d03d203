"""README's table of examples, and the command that makes it; nothing is trained here."""

import json
import subprocess
import sys
from pathlib import Path

import all as examples
import pytest

FOLDER = Path(examples.__file__).parent
README = "before\n<!-- families -->\n<!-- /families -->\nafter\n"
# What an example does, as far as all.py sees it. It may not import jax: that alone takes seconds.
WRITES = """
import json, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
(out / "results.json").write_text({results!r})
"""


def row(method, value, trained=0, seconds=0.0, peak_bytes=0, **spread):
    values = {"accuracy": value, "loss": 9.0}
    cost = {"trained": trained, "seconds": seconds, "peak_bytes": peak_bytes}
    return {"method": method, "values": values, "spread": spread} | cost


def result(*rows, date="2026-11-24T10:00:00+00:00", **more):
    machine = {"machine": {"devices": ["cpu"], "cores": 2}, "versions": {"jax": "0.10.2"}}
    kinds = {"title": "Digits", "about": "a|b on digits", "lower_is_better": False, "quick": False}
    return {"date": date, "wall_seconds": 61.4} | machine | kinds | {"rows": rows} | more


BASE = row("base", 0.5)
ADAPTER = row("LoRA rank 8", 0.9123, 73_696, 30.0, 80_000_000, accuracy=0.01)
FULL = row("Full fine-tuning", 0.92, 13_616_128, 40.0, 100_000_000)


@pytest.fixture
def sandbox(tmp_path):
    """A README and a folder of two examples, one of which fails."""
    (tmp_path / "README.md").write_text(README)
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "good.py").write_text(WRITES.format(results=json.dumps(result(BASE, ADAPTER, FULL))))
    (folder / "bad.py").write_text("print('its last words')\nraise SystemExit(3)\n")
    (folder / "silent.py").write_text("")
    return folder


def run(folder, *options):
    command = [sys.executable, examples.__file__, "--examples", str(folder), "--out", str(folder / "runs"), *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_readme_holds_the_table_of_the_kept_results():
    if not list((FOLDER / "results").glob("*.json")):
        pytest.skip("examples/results holds no JSON yet: `python examples/all.py` puts it there")
    assert examples.main(["--check"]) == 0


def test_every_example_of_the_harness_is_in_the_table():
    with_harness = {path.stem for path in FOLDER.glob("*.py") if "training.main(" in path.read_text(encoding="utf-8")}
    assert with_harness == set(examples.FAMILIES)


def test_renders_adapter_beside_base_and_full():
    lines = examples.markdown({"moe": result(BASE, row("linear probe", 0.7), ADAPTER, FULL)}).splitlines()
    assert lines[2] == (
        "| [Mixture of experts](examples/moe.py) | a\\|b on digits | accuracy ↑ | 0.500 | 0.912 ± 0.010 | 0.920 "
        "| 73.7k / 13.6M (0.5%) | 0.75 | 0.80 |"
    )
    assert len({line.replace("\\|", "").count("|") for line in lines[:3]}) == 1
    assert "2 CPU cores, jax 0.10.2, 2026-11-24." in lines[4]


def test_renders_without_full_fine_tuning_and_over_several_days():
    other = result(BASE, ADAPTER, date="2026-11-26T10:00:00+00:00", lower_is_better=True)
    lines = examples.markdown({"moe": result(BASE, ADAPTER), "swapping": other}).splitlines()
    assert lines[3].endswith("| accuracy ↓ | 0.500 | 0.912 ± 0.010 | - | 73.7k | - | - |")
    assert "2026-11-24 to 2026-11-26" in lines[-2]


def test_base_is_the_frozen_model_and_not_a_trivial_answer():
    trivial, probe = row("more frequent label", 0.4), row("linear probe", 0.7, 770, 9.0, 40_000_000)
    for rows, expected in (
        ((trivial, probe, ADAPTER), "0.700 (linear probe)"),
        ((trivial, BASE, probe, ADAPTER), "0.500"),
        ((trivial, ADAPTER), "0.400 (more frequent label)"),
    ):
        assert examples.cells("moe", result(*rows))[3] == expected


@pytest.mark.parametrize(
    ("n", "text"), [(852, "852"), (2_442_240, "2.44M"), (73_696, "73.7k"), (134_515_008, "135M"), (999_999, "1.00M")]
)
def test_counts_are_short(n, text):
    assert examples.count(n) == text


def test_refuses_results_without_an_adapter():
    with pytest.raises(examples.Stop, match="'base', 'Full fine-tuning'"):
        examples.markdown({"moe": result(BASE, FULL)})
    with pytest.raises(examples.Stop, match="not be the first"):
        examples.markdown({"moe": result(ADAPTER, FULL)})


def test_table_changes_only_what_is_between_the_markers():
    once = examples.with_table(README, "| new |")
    assert once == "before\n<!-- families -->\n| new |\n<!-- /families -->\nafter\n"
    assert examples.with_table(once, "| new |") == once
    for page in ("no markers", README + README, "<!-- /families -->\n<!-- families -->"):
        with pytest.raises(examples.Stop, match="README needs one line"):
            examples.with_table(page, "| new |")


def test_table_is_made_from_kept_results_and_checked(sandbox):
    found = run(sandbox, "--table")
    assert found.returncode == 1
    assert "There are no results" in found.stderr
    (sandbox / "results").mkdir()
    (sandbox / "results" / "moe.json").write_text(json.dumps(result(BASE, ADAPTER, FULL)))
    found = run(sandbox, "--check")
    assert found.returncode == 1
    assert "run `python examples/all.py --table`" in found.stderr
    assert run(sandbox, "--table").returncode == 0
    assert "(examples/moe.py)" in (sandbox.parent / "README.md").read_text()
    assert run(sandbox, "--check").returncode == 0


def test_quick_fails_if_one_fails_and_keeps_nothing(sandbox):
    found = run(sandbox, "--quick", "--only", "bad", "good", "silent")
    assert found.returncode == 1
    assert "its last words\nbad: exit code 3" in found.stdout
    assert "silent: exit code 0, no results.json" in found.stdout
    assert "Failed: bad, silent" in found.stdout
    assert "61 s" not in found.stdout, "the wall time is measured, and not what the example wrote"
    assert [line.split()[0] for line in found.stdout.splitlines() if "accuracy ↑" in line] == ["good"]
    assert not (sandbox / "results").exists()
    assert (sandbox.parent / "README.md").read_text() == README


def test_quick_passes_if_all_pass(sandbox):
    found = run(sandbox, "--quick", "--only", "good")
    assert found.returncode == 0, found.stdout
    assert "Failed" not in found.stdout


def test_full_keeps_results_with_their_environment_and_writes_the_table(sandbox):
    found = run(sandbox, "--only", "bad", "good")
    assert found.returncode == 1, "one failed"
    kept = json.loads((sandbox / "results" / "good.json").read_text())
    assert {"date", "machine", "versions", "wall_seconds", "rows"} <= kept.keys()
    assert kept["wall_seconds"] != 61.4, "the wall time is measured, and not what the example wrote"
    assert "(examples/good.py)" in (sandbox.parent / "README.md").read_text()


@pytest.mark.parametrize("options", [("--quick", "--table"), ("--table", "--only", "moe"), ("--only", "nothing")])
def test_refuses_what_makes_no_sense(sandbox, options):
    found = run(sandbox, *options)
    assert found.returncode in (1, 2)
    assert "not allowed with" in found.stderr or "run nothing" in found.stderr or "There is no example" in found.stderr
