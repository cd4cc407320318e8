"""The doctor tells a machine that can start a run from one that cannot, and never takes a lock for held that is not."""

import configparser
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer import doctor, toolchain


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process that holds tmp_path/lock, by what torch's lock is made of, or by a module's own FileLock."""
    module = getattr(request, "param", "filelock")
    hold = f"import sys, time; from {module} import FileLock\n"
    hold += "with FileLock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", hold, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_file_that_no_process_holds_is_not_a_lock(tmp_path: Path) -> None:
    assert not doctor.is_held(tmp_path / "lock")
    (tmp_path / "lock").touch()
    assert not doctor.is_held(tmp_path / "lock")


def test_a_lock_in_use_is_named_with_its_process_and_kept(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert doctor.is_held(tmp_path / "lock")
    assert doctor.lock_holders(tmp_path / "lock") == [holder.pid]
    answer = doctor.clear_lock(tmp_path)
    assert answer.startswith("kept")
    assert f"kill {holder.pid}" in answer
    assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("holder", ["torch.utils._filelock"], indirect=True)
def test_torch_frees_the_lock_of_a_build_that_was_killed(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    # torch before 2.14 did not, and every later run waited for ever
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "lock").exists()
    assert not doctor.is_held(tmp_path / "lock")
    assert doctor.clear_lock(tmp_path) == f"removed {tmp_path / 'lock'}"
    assert not (tmp_path / "lock").exists()


def test_a_lock_held_elsewhere_goes_only_when_its_folder_is_quiet() -> None:
    # /proc/locks names no process for a lock that another machine or container holds
    long = 60 * doctor.QUIET_MINUTES
    assert doctor.may_clear([], long + 1)
    assert not doctor.may_clear([], long - 1)
    assert not doctor.may_clear([4711], long + 1)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build folder like DeepSpeed's, whose compiler is cp."""
    import torch

    monkeypatch.setenv("PATH", os.environ["PATH"])
    toolchain.use_own()
    (tmp_path / "source.cpp").write_text("old")
    (tmp_path / "build.ninja").write_text(
        f"# -L{Path(torch.__file__).parent}/lib\n"
        f"rule compile\n  command = cp $in $out\nbuild {doctor.EXTENSION}.so: compile {tmp_path}/source.cpp\n"
    )
    subprocess.run(["ninja"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    return tmp_path


def test_a_finished_build_is_not_built_again(built: Path) -> None:
    assert doctor.rebuild_reason(built) == ""


def test_a_changed_source_is_seen_without_building_it(built: Path) -> None:
    (built / "source.cpp").write_text("new")
    assert "older than its sources" in doctor.rebuild_reason(built)
    assert (built / f"{doctor.EXTENSION}.so").read_text() == "old"


def test_a_log_that_this_ninja_cannot_read_means_a_rebuild(built: Path) -> None:
    log = built / ".ninja_log"
    log.write_text(log.read_text().replace("# ninja log v", "# ninja log v9"))
    assert "another ninja" in doctor.rebuild_reason(built)


def test_a_build_of_another_environment_is_seen(built: Path) -> None:
    recipe = built / "build.ninja"
    recipe.write_text(recipe.read_text().splitlines(keepends=True)[0].replace("torch", "other") + "rule compile\n")
    assert "another Python environment" in doctor.rebuild_reason(built)


def test_an_unfinished_build_is_not_taken_for_a_built_extension(built: Path) -> None:
    (built / f"{doctor.EXTENSION}.so").unlink()
    assert "not built" in doctor.rebuild_reason(built)


def test_programs_of_this_environment_come_first_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = sysconfig.get_path("scripts")
    monkeypatch.setenv("PATH", f"/usr/bin:{scripts}:/bin")
    toolchain.use_own()
    assert os.environ["PATH"] == f"{scripts}:/usr/bin:/bin"
    assert shutil.which("ninja") == f"{scripts}/ninja"


def test_exactly_the_pins_of_setup_cfg_are_checked_and_no_tool_of_an_extra() -> None:
    settings = configparser.ConfigParser()
    settings.read(Path(doctor.__file__).parents[1] / "setup.cfg")
    lines = settings["options"]["install_requires"].split()
    assert {check.name for check in doctor.packages()} == {line.split("==")[0] for line in lines if "==" in line}


def test_a_package_in_another_version_is_missing() -> None:
    assert not doctor.package("pytest", "0.1").ok
    assert doctor.package("pytest", pytest.__version__).ok
    assert "no_such_package" in doctor.package("no_such_package", "1.0").found


def test_a_view_kernel_that_does_not_load_is_missing(tmp_path: Path) -> None:
    assert "not compiled" in doctor.view_kernel(tmp_path).found
    (tmp_path / "_views.so").write_text("no ELF")
    assert "does not load" in doctor.view_kernel(tmp_path).found


def test_a_low_limit_of_open_files_is_missing() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (doctor.MIN_OPEN_FILES - 1, hard))
    try:
        assert not doctor.open_files().ok
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_one_missing_thing_fails_the_report_and_comes_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    fine = doctor.Check("fine", True, "here", "no advice")
    assert doctor.report([fine])
    assert not doctor.report([fine, doctor.Check("lacking", False, "gone", "fetch it")])
    assert capsys.readouterr().out.splitlines()[-2:] == ["missing  lacking  gone", "                  -> fetch it"]


def test_the_code_of_the_command_says_whether_a_row_is_missing() -> None:
    done = subprocess.run([sys.executable, "-m", "trainer.doctor"], capture_output=True, text=True, check=False)
    words = [line.split()[0] for line in done.stdout.splitlines()]
    assert words.count("ok") >= 5, done.stderr
    assert done.returncode == int("missing" in words)
