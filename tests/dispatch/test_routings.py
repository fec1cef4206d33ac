"""Every backend equals the dense oracle for every routing, in one compiled program and so in one workspace.

`pytest tests/dispatch --dispatch-cases 20000` draws more of them.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from jaxmoe.dispatch import DISPATCHES
from tests.support import runs
from tests.support.dispatch_programs import LAYOUTS, E, Program, program
from tests.support.routings import KINDS, draw_ids

pytestmark = pytest.mark.covering

VARIANTS = [
    {},
    {"tight": True},
    {"K": 1},
    {"K": E},
    {"replicas": True},
    {"tight": True, "weights_on_input": True, "T": 72},
]
# Each backend on every layout, and in every variant on some.
PROGRAMS = [
    {"backend": backend, "mesh_shape": shape, "expert_axes": axes, **VARIANTS[(i + 2 * b) % len(VARIANTS)]}
    for i, (shape, axes) in enumerate(LAYOUTS)
    for b, backend in enumerate(DISPATCHES)
]


def name_of(settings: dict) -> str:
    return "-".join(str(value) for value in settings.values()).replace(" ", "")


def check(run: Program, kind: str, seed: int) -> None:
    ids_TK = draw_ids(kind, seed, run.T, run.K, run.sources)
    weights_TK = np.random.default_rng(seed).uniform(0.1, 1, size=ids_TK.shape).astype(np.float32)
    slots_TK = run.slots(ids_TK)
    y_TD, stats = run(slots_TK, weights_TK)
    expected = run.expected(ids_TK, weights_TK)
    np.testing.assert_allclose(y_TD, expected, rtol=0, atol=2e-6 * max(1.0, np.abs(expected).max()))
    if "all_to_all" in run.backend:
        assert int(stats.rounds) == run.expected_rounds(slots_TK)
    else:
        assert int(stats.rounds) == 0


@pytest.mark.parametrize("settings_of", PROGRAMS, ids=name_of)
def test_any_routing(settings_of, request):
    run = program(**settings_of)
    drawn = request.config.getoption("dispatch_cases") or runs.examples(600, 2000)
    cases = -(-drawn // len(PROGRAMS))

    @settings(max_examples=cases, database=None, suppress_health_check=list(HealthCheck))
    @given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1))
    def one_case(kind, seed):
        check(run, kind, seed)

    one_case()
