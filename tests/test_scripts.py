"""How a script begins and ends: exit codes, one sentence for a failure, no work lost where its reader leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import config
import scripts

ROOT = Path(__file__).parent.parent
STAGES = [
    ROOT / "data_loader.py",
    *(
        path
        for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")])
        if "scripts.answer_early(" in path.read_text(encoding="utf-8")
    ),
]


def run(main, capsys, *argv):
    code = scripts.run_script(config.RunSettings, "A stage.", main, list(argv), prog="stage.py")
    return code, capsys.readouterr()


def raising(error):
    def main(settings):
        raise error

    return main


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."),
    ],
)
def test_want_of_memory_is_said_in_a_sentence(capsys, error):
    code, said = run(raising(error), capsys)
    assert code == 1 and said.err == "error: there is not enough memory; try a smaller --batch-size or --image-size.\n"


def test_other_faults_of_the_program_are_not_hidden(capsys):
    with pytest.raises(RuntimeError, match="shapes"):
        run(raising(RuntimeError("shapes differ")), capsys)


def test_a_script_that_works_returns_0_and_gets_its_settings(capsys):
    got = []
    code, said = run(got.append, capsys, "--seed", "4")
    assert code == 0 and got == [config.RunSettings(seed=4)] and said.err == ""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            config.InputError("The folder x is empty; expected images."),
            1,
            "error: The folder x is empty; expected images.",
        ),
        (config.UsageError("alpha is 2; expected at most 1."), 2, "error: alpha is 2; expected at most 1."),
        (
            FileNotFoundError(2, "No such file or directory", "a/b.png"),
            1,
            "error: No such file or directory (a/b.png).",
        ),
        (OSError(28, "No space left on device"), 1, "error: No space left on device."),
        (OSError("the disk is odd"), 1, "error: the disk is odd."),
        (KeyboardInterrupt(), 130, "interrupted: what was already written is kept."),
    ],
    ids=["input", "usage", "missing", "full", "plain", "interrupted"],
)
def test_a_failure_is_one_line_on_stderr_and_an_exit_code(capsys, error, code, words):
    got, said = run(raising(error), capsys)
    assert got == code and said.err == words + "\n" and said.out == ""


def test_a_bug_is_not_hidden(capsys):
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()), capsys)


def test_wrong_usage_ends_with_2_before_main_runs(capsys):
    got = []
    code, said = run(got.append, capsys, "--sed", "4")
    assert code == 2 and got == [] and said.err.count("\n") == 1 and "'--seed'" in said.err


def python(*argv, **options):
    return subprocess.run(
        [sys.executable, *map(str, argv)], capture_output=True, text=True, cwd=ROOT, check=False, **options
    )


@pytest.mark.parametrize("unbuffered", ["1", ""], ids=["breaks in print", "breaks at exit"])
def test_a_reader_that_leaves_early_is_no_failure(tmp_path, unbuffered):
    script = tmp_path / "stage.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport config, scripts\n"
        "def main(settings):\n    sys.stdin.readline()\n    print('late')\n    print('later', file=sys.stderr)\n"
        f"    open({str(tmp_path / 'result')!r}, 'w').close()\n    print('done')\n"
        "sys.exit(scripts.run_script(config.RunSettings, 'A stage.', main))\n"
    )
    process = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == "later\n"
    process.stderr.close()
    assert (tmp_path / "result").exists(), "the work stopped with its reader"


def test_being_terminated_cleans_up_as_ctrl_c_does(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nimport config, files, scripts\n"
        "from pathlib import Path\n"
        "def main(settings):\n"
        f"    with files.whole_file(Path({str(tmp_path / 'result')!r})) as file:\n"
        "        print('begun', flush=True)\n        time.sleep(60)\n"
        "sys.exit(scripts.run_script(config.RunSettings, 'A stage.', main))\n"
    )
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        assert process.wait(30) == 130
        assert process.stderr.read() == "interrupted: what was already written is kept.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["stage.py"]


def test_importing_scripts_and_config_imports_nothing_heavy():
    done = python("-c", "import sys, scripts; print(sorted({'torch', 'numpy', 'cv2', 'yaml'} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("stage", STAGES, ids=lambda path: path.name)
def test_help_and_wrong_usage_are_answered_before_heavy_imports(stage):
    done = python("-X", "importtime", stage, "--help")
    assert done.returncode == 0 and "--output-dir" in done.stdout and "--config" in done.stdout
    assert "| torch\n" not in done.stderr and " torch\n" not in done.stderr
    wrong = python(stage, "--sed", "3", "x")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "did you mean '--seed'?" in wrong.stderr


EARLY = "import sys, config, scripts; sys.argv = ['x']; scripts.answer_early(config.RunSettings, 'A.')"


def test_ctrl_c_during_imports_is_one_line():
    done = python(
        "-c",
        f"{EARLY}; raise KeyboardInterrupt",
    )
    assert done.returncode == 130 and done.stderr == "interrupted: nothing was begun.\n"
    ended = python(
        "-c",
        f"{EARLY}; import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM); time.sleep(20)",
    )
    assert ended.returncode == 130 and ended.stderr == "interrupted: nothing was begun.\n"
    broken = python(
        "-c",
        f"{EARLY}; raise ValueError('x')",
    )
    assert broken.returncode == 1 and "Traceback" in broken.stderr
