"""The launchers with commands that need no JAX: arguments, failures, signals, exit statuses."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT

# A line is one write, for both processes have the same stdout; `print` makes two of it where Python does not buffer.
SAY = "import sys, time; say = lambda line: (sys.stdout.write(line + '\\n'), sys.stdout.flush()); "
SHOW = [sys.executable, "-c", SAY + "say(str(sys.argv[1:]))", 'it\'s "one" $HOME argument']
# Process 1 fails; the other would go on for minutes.
FAIL = [sys.executable, "-c", "import sys, time; sys.exit(7) if '1' in sys.argv[-1] else time.sleep(300)"]
SLEEP = [sys.executable, "-c", SAY + "say('started'); time.sleep(300); say('ended')"]

LAUNCHERS = {
    "node": [sys.executable, str(ROOT / "scripts/launch_node"), "--port", "5", "2"],
    # A stand-in for ssh that drops the host and, as ssh does, hands a line to a shell.
    "hosts": [sys.executable, str(ROOT / "scripts/launch_hosts"), "--hosts", "me@a,b", "--port", "5"],
}


def command(launcher: str, tmp_path: Path, argv: list[str]) -> list[str]:
    if launcher == "hosts":
        ssh = tmp_path / "ssh"
        ssh.write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
        ssh.chmod(0o755)
        return [*LAUNCHERS[launcher], "--ssh", str(ssh), "--directory", str(tmp_path), *argv]
    return [*LAUNCHERS[launcher], *argv]


@pytest.mark.parametrize("dashes", [[], ["--"]], ids=["", "dashes"])
@pytest.mark.parametrize(("launcher", "address"), [("node", "127.0.0.1:5"), ("hosts", "a:5")])
def test_each_process_gets_the_command_and_its_place(launcher, address, dashes, tmp_path) -> None:
    argv = command(launcher, tmp_path, [*dashes, *SHOW])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    join = ["--coordinator", address, "--num-processes", "2", "--process-id"]
    assert sorted(done.stdout.splitlines()) == [str([SHOW[-1], *join, index]) for index in "01"]


@pytest.mark.full
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_failure_ends_the_others_and_gives_the_status(launcher, tmp_path) -> None:
    done = subprocess.run(command(launcher, tmp_path, FAIL), capture_output=True, text=True, timeout=60)
    assert done.returncode == 7


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_ends_all(launcher, tmp_path) -> None:
    with subprocess.Popen(command(launcher, tmp_path, SLEEP), stdout=subprocess.PIPE, text=True) as running:
        assert [running.stdout.readline() for _ in range(2)] == ["started\n"] * 2
        running.send_signal(signal.SIGTERM)
        # All that hold the pipe have ended when it ends.
        assert running.stdout.read() == ""
        assert running.wait(timeout=60) == 128 + signal.SIGTERM


def test_hosts_end_their_process_when_the_launcher_is_killed(tmp_path) -> None:
    with subprocess.Popen(command("hosts", tmp_path, SLEEP), stdout=subprocess.PIPE, text=True) as running:
        assert [running.stdout.readline() for _ in range(2)] == ["started\n"] * 2
        running.kill()
        assert running.stdout.read() == "", "the processes went on to their own end"


def test_a_command_that_is_not_there(tmp_path) -> None:
    done = subprocess.run(command("node", tmp_path, ["no-such-command"]), capture_output=True, text=True, timeout=60)
    assert done.returncode == 127
    assert done.stderr.startswith("cannot start no-such-command --coordinator 127.0.0.1:5")


def test_slurm_gives_srun_its_options_and_the_command_the_flag(tmp_path) -> None:
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 3\n')
    srun.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts/launch_slurm", "--nodes", "2", "--", "jaxmoe", "generate", "a b"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    assert done.stdout.splitlines() == "--kill-on-bad-exit=1|--nodes|2|jaxmoe|generate|a b|--distributed".split("|")


@pytest.mark.parametrize("name", ["launch_node", "launch_hosts", "launch_slurm"])
def test_usage(name) -> None:
    shown = subprocess.run([ROOT / "scripts" / name, "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0
    assert "jaxmoe generate" in shown.stdout
    assert subprocess.run([ROOT / "scripts" / name], capture_output=True, timeout=60).returncode == 2


@pytest.mark.parametrize("ssh", ["ssh -i 'no end", ""], ids=["unbalanced", "empty"])
def test_an_ssh_command_that_is_none(ssh) -> None:
    command = [*LAUNCHERS["hosts"], "--ssh", ssh, "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"argument --ssh: invalid words value: {ssh!r}" in done.stderr
