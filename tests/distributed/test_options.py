"""What `initialize` and the command refuse before any process is reached."""

import jax
import pytest

import jaxmoe
from jaxmoe.cli import main
from jaxmoe.distributed import initialize, is_first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:5", 2, None), "coordinator, num_processes and process_id, or none of them"),
        ((None, 2, 0), "coordinator, num_processes and process_id, or none of them"),
        (("127.0.0.1", 2, 0), "a coordinator is written host:port; got '127.0.0.1'"),
        (("127.0.0.1:5", 2, 2), "process ids run from 0 to num_processes - 1; got 2 of 2"),
    ],
)
def test_initialize_refuses(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        initialize(*arguments)
    assert is_first(), "nothing has been joined"


def test_a_timeout_is_positive() -> None:
    with pytest.raises(ValueError, match="a number of seconds above 0; got 0"):
        initialize("127.0.0.1:5", 2, 0, failure_timeout=0)


def test_joining_comes_before_devices_and_once(monkeypatch) -> None:
    jaxmoe.simulate_devices(8)
    late = r"8 cpu devices are already running in this one, from jaxmoe.simulate_devices, .* first thing in the program"
    with pytest.raises(RuntimeError, match=late):
        initialize("127.0.0.1:5", 1, 0)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="this one has; leave the second jaxmoe.distributed.initialize out"):
        initialize("127.0.0.1:5", 1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "127.0.0.1:5"], "go together, or --distributed alone"),
        (["--distributed", "--process-id", "0"], "go together, or --distributed alone"),
        (["--distributed", "--prompt-file", "-"], "stdin is one's alone"),
        (["--distributed", "--prompt", "-"], "stdin is one's alone"),
    ],
)
def test_wrong_usage(options, message, capsys) -> None:
    prompts = [] if any(option.startswith("--prompt") for option in options) else ["--prompt-ids", "1"]
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "somewhere", *prompts, *options])
    assert message in capsys.readouterr().err
