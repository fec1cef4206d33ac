"""Blocks of a parameter that is rows of one tensor, carried out on arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.checkpoint.mapping.blocks import rows_on_disk, whole_tensor_blocks
from jaxmoe.layers import ParamSpec


def spec(shape: tuple[int, ...], rows: tuple[int, ...] | None, source_groups: int | None) -> ParamSpec:
    sharding = None  # blocks are of whole parameters
    return ParamSpec(
        path="w", shape=shape, dtype=np.dtype(np.int64), sharding=sharding, rows=rows, source_groups=source_groups
    )


def filled(param: ParamSpec, tensor: np.ndarray, **where) -> np.ndarray:
    """The parameter, every element of which has to be filled once."""
    result, times = np.full(param.shape, -7), np.zeros(param.shape, int)
    for block in whole_tensor_blocks(param, "t", **where):
        region = tuple(slice(*edges) for edges in block.param_box)
        times[region] += 1
        if block.tensor is None:
            result[region] = 0
        else:
            assert block.tensor_shape == tensor.shape
            result[region] = tensor[tuple(slice(*edges) for edges in block.tensor_box)]
    assert (times == 1).all()
    return result


@given(
    rows=st.lists(st.integers(-1, 4), min_size=1, max_size=9),
    group=st.integers(1, 3),
    width=st.integers(1, 3),
    before=st.integers(0, 5),
    behind=st.integers(0, 5),
)
def test_groups_of_rows_come_from_where_they_are_said_to_be(rows, group, width, before, behind):
    """Copies, gaps, other orders and zeros; in a tensor of their own and behind other rows of a shared one."""
    param = spec((len(rows) * group, width), tuple(rows), 5)
    own = 5 * group
    assert rows_on_disk(param) == own
    shared = np.arange((before + own + behind) * width).reshape(-1, width) + 1
    tensor = shared[before : before + own]
    groups = tensor.reshape(5, group, width)
    expected = np.concatenate([groups[row] if row >= 0 else np.zeros((group, width), int) for row in rows])
    np.testing.assert_array_equal(filled(param, tensor), expected)
    if (before, behind) != (0, 0):
        joined = (before, len(shared))
        np.testing.assert_array_equal(filled(param, shared, joined=joined), expected)


@pytest.mark.parametrize("shape", [(), (4,), (4, 2), (1, 3)])
def test_a_parameter_that_is_its_tensor(shape):
    tensor = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    np.testing.assert_array_equal(filled(spec(shape, None, None), tensor), tensor)
