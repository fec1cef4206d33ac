"""`read_measured`: measured rates of a device and times of parts of a step, for a plan to take in place of modeled ones.

A file is one of three, told apart by what is in it:

* `results.jsonl` of `scripts/gpu_session`, or the folder that it is in;
* a file of rates that such a session writes, see `jaxmoe.dispatch.rates`;
* one JSON object, from profiles of your own:

    {"device": "NVIDIA H100 80GB HBM3", "versions": {"jax": "0.11.2"},
     "rates": {"memory_bandwidth": 3.0e12, "flops": 7.1e14, "within": 3.6e11, "between": 4.5e10, "latency": 1.5e-5},
     "terms": [{"term": "experts", "slots": 16, "width": 2048, "expert_width": 768, "dtype": "bfloat16",
                "rows": 64, "seconds": 4.1e-5}, ...]}

Fields of a term are those of `TERMS`. A time is for one count; between two counts it is interpolated linearly, and outside
of those that were measured it is modeled as ever.
"""

import bisect
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from jaxmoe.checks import one_of, real_number
from jaxmoe.dispatch.collectives import CollectiveOp
from jaxmoe.hardware import GPU, get_gpu
from jaxmoe.kernels.grouped_matmul import BACKENDS
from jaxmoe.kernels.grouped_matmul.backends import GPU_BACKENDS
from jaxmoe.mesh import AXES

PARTS = ("dense", "experts", "cache", "exchange", "sums")
RATES = ("memory_bandwidth", "flops", "within", "between", "latency")


class Fields(NamedTuple):
    """Fields of a term, beside its seconds.

    Attributes:
        same: fields that have to be those of what is planned.
        over: field that times are interpolated over.
    """

    same: tuple[str, ...]
    over: str


TERMS = {
    # One layer's routed experts on one device, gated and not packed; `expert_width` is as far as the device holds it.
    "experts": Fields(("slots", "width", "expert_width", "dtype"), "rows"),
    # One collective within a node; `bytes` are those of its operand or result on a device, whichever is larger.
    "collective": Fields(("op", "devices"), "bytes"),
    # A whole part of a step, all layers: "dense", "experts", "cache", "exchange" or "sums" of `StepTime`.
    "part": Fields(
        ("part", "phase", "model_type", "layers", "width", "dtype", "packed", "mesh", "expert_axes", "length"),
        "batch_size",
    ),
}
# What a file may say about itself.
_ABOUT = ("device", "devices", "versions", "driver", "machine", "date", "note")
# Kinds of fields, as JSON has them; others are integers.
_KINDS = {"packed": bool, "mesh": dict, "expert_axes": list} | dict.fromkeys(
    ("dtype", "op", "part", "phase", "model_type"), str
)
_NAMES = {"part": PARTS, "phase": ("decode", "prefill"), "op": get_args(CollectiveOp)}
RESULTS = "results.jsonl"


@dataclasses.dataclass(frozen=True)
class Taken:
    """Seconds of a part of a step, and where they are from.

    Attributes:
        seconds: seconds.
        files: files that they were taken from.
        modeled: flag that some of them are modeled.
    """

    seconds: float = 0.0
    files: frozenset[str] = frozenset()
    modeled: bool = False

    def __add__(self, other: "Taken") -> "Taken":
        return Taken(self.seconds + other.seconds, self.files | other.files, self.modeled or other.modeled)

    @property
    def source(self) -> str:
        """Their origin in words."""
        if not self.files:
            return "modeled"
        return f"measured{' in part' if self.modeled else ''}, {' and '.join(sorted(self.files))}"


class _Value(NamedTuple):
    """A number, and the file that has it."""

    number: float
    file: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Rates and times that were measured on a kind of device, from one or more files.

    Attributes:
        files: {name of a file: device, versions and date that it tells}.
        rates: {name in `RATES`: its value, and the file}.
        times: {(term, its fields): {count: its seconds, and the file}}.
    """

    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rates: Mapping[str, _Value] = dataclasses.field(default_factory=dict)
    times: Mapping[tuple[Any, ...], Mapping[float, _Value]] = dataclasses.field(default_factory=dict)

    def device(self, gpu: GPU) -> GPU:
        """The kind of device with its measured rates in place of those of its data sheet."""
        found = {name: value.number for name, value in self.rates.items()}
        links = {name: found.pop(name) for name in ("within", "between", "latency") if name in found}
        own: dict[str, Any] = {**found, "links": dataclasses.replace(gpu.links, **links)}
        return dataclasses.replace(gpu, **own)

    def seconds(self, term: str, count: float, **same: Any) -> Taken | None:
        """The measured time of a term; None where it was not measured, or not around that count.

        Args:
            term: key of `TERMS`.
            count: value of the field that times are interpolated over.
            same: values of the others.
        """
        points = self.times.get(_key(term, same), {})
        counts = sorted(points)
        place = bisect.bisect_left(counts, count)
        if place < len(counts) and counts[place] == count:
            return Taken(points[count].number, frozenset({points[count].file}))
        if not 0 < place < len(counts):
            return None
        low, high = counts[place - 1], counts[place]
        share = (count - low) / (high - low)
        return Taken(
            points[low].number * (1 - share) + points[high].number * share,
            frozenset({points[low].file, points[high].file}),
        )

    def describe(self, gpu: GPU) -> tuple[str, ...]:
        """Tell what each file gives, in a line for each.

        Args:
            gpu: device with the rates that are replaced.
        """
        published = {"memory_bandwidth": gpu.memory_bandwidth, "flops": gpu.flops, **dataclasses.asdict(gpu.links)}
        lines = []
        for file, about in self.files.items():
            given = [
                f"{name} {value.number:.3g} (published {published[name]:.3g})"
                for name, value in self.rates.items()
                if value.file == file
            ]
            for term in TERMS:
                points = [points for key, points in self.times.items() if key[0] == term]
                number = sum(value.file == file for each in points for value in each.values())
                given += [f"{number} times of {term}"] if number else []
            lines.append(f"{file}, measured on {about}: {', '.join(given) or 'nothing that a plan takes'}")
        return tuple(lines)


NOTHING = Measured()


def read_measured(files: str | Path | Sequence[str | Path] | None, gpu: GPU) -> Measured:
    """Read files of measurements.

    Args:
        files: a file, or several; None for none.
        gpu: kind of device that they are to be of.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is none of the three, is of another kind of device, or says another value for what a second one
            has too.
    """
    paths = [files] if isinstance(files, str | Path) else files or []
    abouts: dict[str, str] = {}
    rates: dict[str, _Value] = {}
    times: dict[tuple[Any, ...], dict[float, _Value]] = {}

    def keep(values: dict[Any, _Value], name: Any, new: _Value, what: str) -> None:
        old = values.setdefault(name, new)
        if old.number != new.number:
            raise ValueError(
                f"measurements agree: {what} is {old.number:g} in {old.file} and {new.number:g} in {new.file}; leave one "
                "of them out"
            )

    for path in map(Path, paths):
        file = path / RESULTS if path.is_dir() else path
        name = str(file)
        try:
            found = _document(file.read_text(encoding="utf-8"))
            about = _about(found)
            new_rates, new_times = list(_rates(found)), list(_times(found))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{file} has no measurements that a plan can read ({error}): give results.jsonl of scripts/gpu_session, or "
                "a JSON object as jaxmoe.planning.measured describes it"
            ) from error
        if not _is_of(found["device"], gpu):
            raise ValueError(
                f"measurements are of the device that is planned for: {file} was measured on {found['device']!r}, and the "
                f"plan is for {gpu.name!r}"
            )
        abouts[name] = about
        for rate, number in new_rates:
            keep(rates, rate, _Value(number, name), rate)
        for key, count, seconds in new_times:
            what = f"the time of {key[0]} {', '.join(map(str, key[1:]))} at {count:g}"
            keep(times.setdefault(key, {}), count, _Value(seconds, name), what)
    return Measured(files=abouts, rates=rates, times=times)


def _is_of(device: str, gpu: GPU) -> bool:
    try:
        return device == gpu.name or get_gpu(device) == gpu
    except ValueError:
        return False


def _about(found: Mapping[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in found.get("versions", {}).items()]
    several = [f"{found['devices']} devices"] if "devices" in found else []
    more = [f"{name} {found[name]}" for name in ("driver", "date") if found.get(name)]
    return ", ".join([str(found["device"]), *several, *(versions or ["unknown versions"]), *more])


def _document(text: str) -> dict[str, Any]:
    """A file in the form of one JSON object, whichever of the three it is."""
    try:
        found = json.loads(text)
    except ValueError:
        whole = text[: text.rfind("\n") + 1]  # a session that was ended leaves a part of a line
        return _of_session([json.loads(line) for line in whole.splitlines()])
    if "kind" in found:  # a session of one line
        return _of_session([found])
    if "memory_bandwidth" in found:
        return {name: value for name, value in found.items() if name not in RATES} | {
            "rates": {name: found[name] for name in RATES if name in found}
        }
    return found


def _of_session(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lines of a session as such an object; of several kernels of jaxmoe's the fastest time is taken.

    Memory's rate is that of the line of ceilings, or of the line of rates where there is none.
    """
    of: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        of.setdefault(line.get("kind", ""), []).append(line)
    if "machine" not in of:
        raise ValueError("no line tells the machine")
    rates: dict[str, float] = {}
    for line in of.get("rates", []):
        rates |= {name: line[name] for name in ("memory_bandwidth", "within", "latency")}
    for line in of.get("ceilings", []):
        rates |= {"memory_bandwidth": line["bytes_per_second"], "flops": line["flops_per_second"]}
    experts: dict[tuple[Any, ...], float] = {}
    for line in of.get("speed", []):
        if line["side"] in {*BACKENDS, *GPU_BACKENDS} and line["routing"] == "uniform" and not line["fusion"]:
            point = (
                line["experts"],
                line["width"],
                line["expert_width"],
                line["dtype"],
                line["tokens"] * line["per_token"],
            )
            experts[point] = min(line["seconds"], experts.get(point, line["seconds"]))
    fields = TERMS["experts"]
    terms = [
        {"term": "experts", **dict(zip((*fields.same, fields.over), point, strict=True)), "seconds": seconds}
        for point, seconds in experts.items()
    ]
    terms += [
        {
            "term": "collective",
            "op": line["collective"].replace("_", "-"),
            **{name: line[name] for name in ("devices", "bytes", "seconds")},
        }
        for line in of.get("exchange", [])
    ]
    machine = of["machine"][0]
    return {name: machine[name] for name in _ABOUT if name in machine} | {"rates": rates, "terms": terms}


def _rates(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if unknown := found.keys() - {*_ABOUT, "rates", "terms"}:
        raise ValueError(f"fields are {', '.join((*_ABOUT, 'rates', 'terms'))}; got {', '.join(sorted(unknown))}")
    for name, number in found.get("rates", {}).items():
        if name not in RATES:
            raise ValueError(f"rates are {', '.join(RATES)}; got {name!r}")
        yield name, real_number(name, number, least=0) if name == "latency" else real_number(name, number, above=0)


def _times(found: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], float, float]]:
    """(Key, count, seconds) of each term."""
    for term in found.get("terms", []):
        if term.get("term") not in TERMS:
            raise ValueError(f"terms are {', '.join(TERMS)}; got {term.get('term')!r}")
        fields = TERMS[term["term"]]
        names = ("term", *fields.same, fields.over, "seconds")
        if set(term) != set(names):
            raise ValueError(f"a term has the fields {', '.join(names)}; got {', '.join(map(str, term))}")
        for name in fields.same:
            kind = _KINDS.get(name, int)
            if not isinstance(term[name], kind):
                raise ValueError(f"{name} of {term['term']} is of the kind {kind.__name__}; got {term[name]!r}")
            if name in _NAMES:
                one_of(name, term[name], _NAMES[name])
            if name == "mesh" and term[name].keys() - set(AXES):
                raise ValueError(f"axes of a mesh are {', '.join(AXES)}; got {', '.join(term[name])}")
        count = real_number(fields.over, term[fields.over], above=0)
        yield _key(term["term"], term), count, real_number("seconds", term["seconds"], above=0)


def _key(term: str, fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """The term with its fields, as what can be looked up."""
    return term, *[_hashable(fields[name]) for name in TERMS[term].same]


def _hashable(value: Any) -> Any:
    """A field's value, of a mesh the sizes of all axes."""
    if isinstance(value, dict):
        return tuple([value.get(axis, 1) for axis in AXES])
    return tuple(value) if isinstance(value, list) else value
