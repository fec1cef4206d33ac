"""Batch files over the fake engine, in this process and in one that kills its own children at random points."""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxmoe.batches.output
from jaxmoe.batches import Batch, BatchResult, LineSettings
from tests.support.fake_engine import FakeEngine
from tests.support.tokenizers import byte_level, save

PROMPTS = ["he said", "a", "what a day", "z" * 9]


def checkpoint(directory: Path) -> Path:
    """A directory with a tokenizer and no weights."""
    directory.mkdir(exist_ok=True)
    save(byte_level(), directory, chat_template="{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    return directory


def outline(source: Path | None) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(vocab_size=byte_level().get_vocab_size(), max_position_embeddings=64), source=source
    )


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(source: Path, input: Path, output: Path, engine: Any = None, **options: Any) -> BatchResult:
    """Do a file with the fake engine."""
    options.setdefault("settings", LineSettings(max_new_tokens=4))
    model = options.pop("model", {"dtype": "float32"})
    with Batch(outline(source), input, output, **options) as batch:
        batch.start(model, {"mesh": {"dp": 1}})
        return batch.run(engine or FakeEngine(vocab_size=byte_level().get_vocab_size()))


def many_lines(count: int) -> list[Any]:
    """Lines of many lengths, some of which are wrong."""
    lines = []
    for index in range(count):
        line = {"prompt": PROMPTS[index % 4], "max_tokens": 1 + index * 7 % 13, "id": index, "n": 1 + index % 3 // 2}
        lines.append("" if index % 29 == 7 else "{bad" if index % 31 == 5 else line)
    return lines


class _SlowEngine(FakeEngine):
    def step(self) -> list:
        time.sleep(1e-4)
        return super().step()


def _write_in_pieces(file: int, data: bytes, offset: int) -> int:
    """As a system may do it, with time to be killed between two."""
    time.sleep(2e-5)
    return _whole_write(file, data[:40], offset)


_whole_write = os.pwrite


def main(directory: Path, order: str, kills: int, seed: int) -> None:
    """Start the run, kill it, and look at what is there, again and again; then let it end."""
    source, input, output = directory / "checkpoint", directory / "in.jsonl", directory / "out.jsonl"
    random.seed(seed)
    halves, hits, before = 0, 0, b""

    def start() -> int:
        child = os.fork()
        if child:
            return child
        os.pwrite = _write_in_pieces
        jaxmoe.batches.output._SYNC_SECONDS = 0.01
        try:
            run(source, input, output, _SlowEngine(vocab_size=byte_level().get_vocab_size()), order=order)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)

    for _ in range(kills):
        child = start()
        time.sleep(random.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        hits += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        now = output.read_bytes() if output.exists() else b""
        whole = now[: now.rfind(b"\n") + 1]
        assert whole.startswith(before), "a line that was there is gone"
        halves, before = halves + (whole != now), whole
    status = os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1])
    print(json.dumps({"hits": hits, "halves": halves, "status": status}))


if __name__ == "__main__":
    # jax warns of forks; none of its own threads is there, for nothing has used a device.
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
