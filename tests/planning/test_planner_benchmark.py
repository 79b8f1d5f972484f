import subprocess
import sys
from pathlib import Path


def test_missing_traces_are_said_in_one_line(tmp_path):
    bench = Path(__file__).parents[2] / "benchmarks" / "planner" / "bench.py"
    done = subprocess.run([sys.executable, bench, "--traces", tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "this benchmark needs the published routing traces" in done.stderr
    assert done.stderr.count("\n") == 1
