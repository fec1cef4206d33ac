"""The order of a session: job after job, what a failure costs, and when to end. Imports no jax."""

import datetime
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from scripts._session.plan import ALIVE, Job
from scripts._session.process import Limits, run_process
from scripts._session.records import Records

ROOT = Path(__file__).resolve().parent.parent.parent
# Seconds of a job's limit that it does not plan with, so that it ends by itself.
SPARE_SECONDS = 2.0


class Session:
    """Runs jobs within a time, and remembers which kernels are not to be run again."""

    def __init__(self, records: Records, *, seconds: float, tiny: bool = False, gpus: int = 1, alive: Job = ALIVE):
        """Start the clock.

        Args:
            records: file of the results.
            seconds: time for everything.
            tiny: flag that jobs run on a CPU with tiny sizes.
            gpus: number of GPUs, or of simulated devices.
            alive: job that tests whether the GPU works.
        """
        self.records, self.seconds, self.tiny, self.alive = records, seconds, tiny, alive
        self.gpus = gpus
        self.start = time.monotonic()
        self.lost: dict[str, str] = {}
        self.last_words = ""

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def run(self, jobs: Sequence[Job]) -> None:
        """Run jobs until they, the time or the GPU are at an end."""
        for number, job in enumerate(jobs):
            if not self._run_one(job):
                why = f"the session ended with {job.name!r}"
                for left in jobs[number + 1 :]:
                    self._end_of(left.name, "skipped", why)
                return

    def _run_one(self, job: Job) -> bool:
        """Run one job, or say why not; whether the session goes on."""
        kernel = next((name for name in job.kernels if self._reason_against(name) is None), None)
        if job.kernels and kernel is None:
            self._end_of(job.name, "skipped", self._reason_against(job.kernels[-1]) or "")
            return True
        if job.seconds > self.seconds - self.elapsed:
            left = self.seconds - self.elapsed
            self._end_of(job.name, "skipped", f"it may take {job.seconds:g} s, and {left:.0f} s are left")
            return True
        lost_before = len(self.lost)
        failed = self._start(job, kernel)
        if failed is None and len(self.lost) == lost_before:
            return True
        if failed is not None and kernel is not None:
            self.lost.setdefault(kernel, f"{failed} in {job.name!r}")
        if failed is not None and job.needed:
            self._end_of("session", "ended", f"{job.name!r} failed, without which nothing else makes sense")
            print(
                f"{self.last_words}\nset PYTHON to a Python that has jax and Flax, for the GPU that is here", flush=True
            )
            return False
        # The time of this one test is not counted against the others: without a GPU they are worth nothing.
        if self._start(self.alive, None) is not None:
            self._end_of("session", "ended", f"the GPU no longer works after {job.name!r}")
            return False
        return True

    def _start(self, job: Job, kernel: str | None) -> str | None:
        """Run a job with a kernel; how it failed, None if it did not."""
        print(f"[{self.elapsed:5.0f} s] {job.name}{f' ({kernel})' if len(job.kernels) > 1 else ''}", flush=True)
        began = self.elapsed

        def keep(result: dict) -> None:
            if isinstance(result.get("lost"), str):
                self.lost.setdefault(result["lost"], f"{result.get('why', '')} in {job.name!r}".strip())
            self.records.add({"job": job.name, "at": round(self.elapsed, 2)} | result)

        environment = {
            **job.environment,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "SESSION_GPUS": str(self.gpus),
            "SESSION_END": str(time.monotonic() + max(0.0, job.seconds - SPARE_SECONDS)),
            # Tables of tiles that this session makes, and none that the user has.
            "XDG_DATA_HOME": str(self.records.folder.resolve()),
        }
        if self.tiny:
            environment |= {"SESSION_TINY": "1", "JAX_PLATFORMS": "cpu"}
        command = [*job.command, *([kernel] if kernel else [])]
        end = run_process(command, Limits(job.seconds), environment, ROOT, keep)
        self.records.log(job.name, end.said)
        self.last_words = (end.said.decode(errors="replace").strip().splitlines() or [""])[-1]
        self._end_of(job.name, end.status, end.why, seconds=round(self.elapsed - began, 2))
        return None if end.status == "done" else end.status

    def _end_of(self, name: str, status: str, why: str, **more: float) -> None:
        self.records.add({"job": name, "at": round(self.elapsed, 2), "status": status, "why": why} | more)
        if status != "done":
            print(f"          {name}: {status}, {why}", flush=True)

    def _reason_against(self, kernel: str) -> str | None:
        """The reason why a kernel is lost, or the one that it is a part of."""
        for name in (kernel, kernel.partition(".")[0]):
            if name in self.lost:
                return f"{name}: {self.lost[name]}"
        return None


def device_name() -> str:
    """The GPU's name as the driver has it; "gpu" where there is no `nvidia-smi` to ask."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "gpu"
    return found.strip().splitlines()[0] if found.strip() else "gpu"


def default_folder(device: str) -> Path:
    """A folder for a session that starts now: results/<date>-<device>, with a number where that is taken."""
    name = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    base = ROOT / "results" / f"{datetime.date.today():%Y-%m-%d}-{name}"
    numbered = (base.with_name(f"{base.name}-{number}") for number in range(2, 1000))
    return next(folder for folder in (base, *numbered) if not folder.exists())
