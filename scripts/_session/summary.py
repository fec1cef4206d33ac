"""The summary of a session, from its lines of results alone. Imports no jax."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]


def summarize(lines: Sequence[Line]) -> str:
    """A few dozen lines of text: what ran, what was right, and how fast it was."""
    parts = [
        _machine(lines),
        _jobs(lines),
        _correctness(lines),
        _speeds(lines),
        _tuned(lines),
        _exchange(lines),
        _layers(lines),
        _models(lines),
    ]
    return "\n\n".join(part for part in parts if part)


def _of(lines: Sequence[Line], kind: str) -> list[Line]:
    return [line for line in lines if line.get("kind") == kind]


def _section(title: str, texts: Iterable[str]) -> str:
    body = "\n".join(f"  {text}" for text in texts)
    return f"{title}\n{body}" if body else ""


def _machine(lines: Sequence[Line]) -> str:
    def text(line: Line) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in line.get("versions", {}).items())
        here = f"{line.get('device')}, {line.get('multiprocessors')} multiprocessors, driver {line.get('driver')}"
        missing = f"; without {', '.join(line['missing'])}" if line.get("missing") else ""
        return f"{here}; {versions}{missing}"

    return _section("machine", map(text, _of(lines, "machine")))


def _jobs(lines: Sequence[Line]) -> str:
    ends = [line for line in lines if "status" in line]
    done = [line for line in ends if line["status"] == "done"]
    others = [f"{line['job']}: {line['status']}, {line['why']}" for line in ends if line["status"] != "done"]
    refused = [f"{line['job']}: left out, {line['left_out']}" for line in lines if "left_out" in line]
    return _section("jobs", [f"{len(done)} done, {len(others)} not", *others, *refused])


def _correctness(lines: Sequence[Line]) -> str:
    checks = _of(lines, "check")
    right = sum(line.get("verdict") == "right" for line in checks)
    others = [
        f"{line['job']}: {line['verdict']}, {line.get('case')}: {line.get('detail')}"
        for line in checks
        if line.get("verdict") != "right"
    ]
    return _section("correctness", [f"{right} of {len(checks)} checks right", *others]) if checks else ""


def _speeds(lines: Sequence[Line]) -> str:
    rates = next(iter(_of(lines, "ceilings")), None)

    def floor(line: Line) -> str:
        if rates is None:
            return ""
        seconds = max(line["flops"] / rates["flops_per_second"], line["bytes"] / rates["bytes_per_second"])
        return f"  floor {seconds * 1e6:9.1f} us"

    ceilings = [
        f"ceilings {line['flops_per_second'] / 1e12:.0f} TFLOP/s, {line['bytes_per_second'] / 1e9:.0f} GB/s"
        for line in _of(lines, "ceilings")
    ]
    measured = sorted(
        _of(lines, "speed"),
        key=lambda line: (line["shape"], line["routing"], line["tokens"], line["tuned"], line["seconds"]),
    )
    clocks = sorted({line["clock"] for line in measured})
    rows = [
        f"{line['shape']:18} {line['routing']:8} {line['tokens']:6} tokens  {_side(line):20} "
        f"{line['seconds'] * 1e6:10.1f} us{floor(line)}"
        f"{'  tuned' if line['tuned'] else ''}"
        for line in measured
    ]
    return _section("expert MLPs", [*ceilings, *(f"times from {clock}" for clock in clocks), *rows])


def _side(line: Line) -> str:
    return f"{line['side']}, fused" if line.get("fusion") else line["side"]


def _tuned(lines: Sequence[Line]) -> str:
    rows = [
        f"{line['case']}: {line['seconds'] * 1e6:.1f} us by {line['tiles']}, {line['default_seconds'] * 1e6:.1f} us by "
        f"its own choice, {line['candidates']} candidates"
        for line in _of(lines, "tuned")
    ]
    return _section("tiles", rows)


def _exchange(lines: Sequence[Line]) -> str:
    """Collectives alone, of which an all-to-all is one call of NCCL's on GPUs; the rates; and layers by dispatch."""
    collectives = [
        f"{line['collective']:12} of {line['bytes']:10,} bytes by {line['devices']}: {line['seconds'] * 1e6:10.1f} us, "
        f"a device sends {line['sent_per_second'] / 1e9:7.2f} GB/s"
        for line in _of(lines, "exchange")
    ]
    rates = [
        f"rates: memory {line['memory_bandwidth'] / 1e9:.0f} GB/s, links {line['within'] / 1e9:.1f} GB/s, latency "
        f"{line['latency'] * 1e6:.1f} us, in {line['file']}"
        for line in _of(lines, "rates")
    ]
    layers = []
    for line in sorted(_of(lines, "dispatch"), key=lambda line: (line["tokens"], line["seconds"])):
        modeled = (
            "" if line["modeled_seconds"] is None else f", {line['modeled_seconds'] * 1e6:.1f} us modeled for it alone"
        )
        layers.append(
            f"{line['tokens']:6} tokens, {line['dispatch']:18} {line['seconds'] * 1e6:10.1f} us a layer{modeled}"
            f"{', what auto takes' if line['auto'] else ''}"
        )
    return _section("several devices", [*collectives, *rates, *layers])


def _layers(lines: Sequence[Line]) -> str:
    rows = []
    for line in _of(lines, "layer"):
        rows.append(f"{line['shape']}, {line['tokens']} tokens, {line['kernels']}: {line['seconds'] * 1e6:.1f} us")
        rows += [f"    {seconds * 1e6:10.1f} us  {name}" for name, seconds in line.get("by_kernel", [])[:8]]
    return _section("whole layer", rows)


def _models(lines: Sequence[Line]) -> str:
    rows = [
        f"{line['layers']} layers, {line['step']} of {line['batch']} x {line['tokens']} by {line['kernels']}: "
        f"{line['seconds'] * 1e3:.2f} ms, {line['tokens_per_second']:.0f} tokens/s"
        f"{f', at most {peak / 1e9:.1f} GB taken' if (peak := line.get('peak_bytes')) else ''}"
        for line in _of(lines, "model")
    ]
    return _section("model", rows)
