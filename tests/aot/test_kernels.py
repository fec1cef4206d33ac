"""The Hopper kernel through ptxas, at the shapes of published models."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxmoe.dispatch import DispatchLayout, Experts
from jaxmoe.dispatch.local import local_sums, weighted_sum
from jaxmoe.kernels.grouped_matmul import ACTIVATIONS, QuantizedStack, expert_mlp
from jaxmoe.kernels.grouped_matmul.mosaic_gpu import Problem, Tiles, choose_tiles, grouped_matmul
from jaxmoe.kernels.grouped_matmul.quantized import FORMATS
from jaxmoe.planning.topology import gpu_topology

# Experts on a device, model width, expert width, activation and its limit.
SHAPES = {
    "mixtral-8x7b": (8, 4096, 14336, "silu", None),
    "qwen3-30b-a3b, ep 8": (16, 2048, 768, "silu", None),
    "qwen3-235b, ep 8": (16, 4096, 1536, "silu", None),
    "deepseek-v3, ep 8": (32, 7168, 2048, "silu", None),
    "gpt-oss, ep 8": (16, 2880, 2880, "clamped_swiglu", 7.0),
    "gpt-oss, tp 2 ep 4": (32, 2880, 1440, "clamped_swiglu", 7.0),
    "kimi-k2, ep 8": (48, 7168, 2048, "silu", None),
    "minimax-m2, ep 8": (32, 3072, 1536, "silu", None),
    "nemotron-3-nano, ep 8": (16, 2688, 1856, "relu2", None),
}
# Those whose experts have no gate.
UNGATED = {"nemotron-3-nano, ep 8"}
# As the checkpoints are: model, format, block, dtype of the scales, and whether there are zero points.
PACKED = [
    ("deepseek-v3, ep 8", "float8_e4m3fn", (128, 128), "float32", False),
    ("gpt-oss, ep 8", "mxfp4", (1, 32), "uint8", False),
    ("qwen3-30b-a3b, ep 8", "int4", (1, 32), "bfloat16", False),
    ("qwen3-30b-a3b, ep 8", "int4", (1, 32), "bfloat16", True),
    ("qwen3-235b, ep 8", "int4", (1, 128), "bfloat16", True),
    ("qwen3-30b-a3b, ep 8", "float8_e4m3fn", (128, 128), "bfloat16", False),
    ("kimi-k2, ep 8", "int4", (1, 32), "bfloat16", False),
    ("qwen3-235b, ep 8", "nvfp4", (1, 16), "float8_e4m3fn", False),
    ("deepseek-v3, ep 8", "nvfp4", (1, 16), "float8_e4m3fn", False),
    ("minimax-m2, ep 8", "nvfp4", (1, 16), "float8_e4m3fn", False),
    ("nemotron-3-nano, ep 8", "nvfp4", (1, 16), "float8_e4m3fn", False),
    ("qwen3-30b-a3b, ep 8", "int8", (1, None), "bfloat16", False),
    # What devices hold of matrices and blocks that are cut.
    ("gpt-oss, tp 2 ep 4", "mxfp4", (1, 32), "uint8", False),
    ("minimax-m2, ep 8", "float8_e4m3fn", (64, 128), "float32", False),
    ("deepseek-v3, ep 8", "float8_e4m3fn", (128, 64), "float32", False),
    ("qwen3-235b, ep 8", "nvfp4", (1, 8), "float8_e4m3fn", False),
    ("qwen3-30b-a3b, ep 8", "nvfp4", (64, 16), "float8_e4m3fn", False),
]

# Rows and matrices of 8 bits: model, format, block and dtype of the scales of matrices, and what rows are rounded to.
EIGHT_BITS = [
    ("deepseek-v3, ep 8", "float8_e4m3fn", (128, 128), "float32", "fp8_block"),
    ("qwen3-30b-a3b, ep 8", "float8_e4m3fn", (128, 128), "bfloat16", "fp8_block"),
    ("qwen3-30b-a3b, ep 8", "float8_e4m3fn", (1, None), "float32", "fp8_token"),
    ("qwen3-30b-a3b, ep 8", "int8", (1, None), "bfloat16", "int8_token"),
]

pytestmark = [
    pytest.mark.covering,
    pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernel needs jax 0.11.2"),
]


def array(*shape, dtype="bfloat16"):
    on = SingleDeviceSharding(gpu_topology("h100", 1)[0])
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=on)


def packed(shape, format, block, scale_dtype, has_zeros):
    *lead, N, K = shape
    values = array(*lead, N, K // FORMATS[format].per_byte, dtype=FORMATS[format].dtype)
    block = (block[0], block[1] or K)
    blocks = (*lead, N // block[0], K // block[1])
    arrays = {
        "values": values,
        "scales": array(*blocks, dtype=scale_dtype),
        "zero_points": array(*blocks, dtype="uint8") if has_zeros else None,
        "matrix_scales": array(*lead, dtype="float32") if format == "nvfp4" else None,
    }
    return QuantizedStack(**arrays, format=format, block=block)


def compile_mlp(
    up, down, rows, activation, limit, monkeypatch, capfd, out_dtype=jnp.bfloat16, activations="none", gathered=False
):
    """The compiled experts with biases; nothing of theirs may spill registers, and no product wait for the one before.

    Gathered rows are of half as many.
    """
    p, halves, F, D = up.shape

    def mlp(x, up, down, b_up, b_down, sizes, index):
        return expert_mlp(
            x, up, down, sizes, index_R=index, b_gate_up_p2F=b_up, b_down_pD=b_down, activation=activation, limit=limit,
            out_dtype=out_dtype, backend="mosaic_gpu", activations=activations,
        )  # fmt: skip

    x, index = (array(-(-rows // 2), D), array(rows, dtype="int32")) if gathered else (array(rows, D), None)
    arguments = (x, up, down, array(p, halves, F), array(p, D), array(p, dtype="int32"), index)
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    compiled = jax.jit(mlp).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    check_ptxas("".join(capfd.readouterr()))
    return compiled


def check_ptxas(said: str, kernels: int = 2) -> None:
    """Hold what ptxas says of the kernels against what they are written for.

    All three warpgroups enter with equally many registers, a third of the 40 and two times 232 that they take from there on
    by setmaxnreg. Where ptxas leaves that instruction out, those who multiply have too few; where they enter with fewer than
    168, they wait for registers that nobody gives back.
    """
    assert said.count("for 'sm_90a'") == kernels, said
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == kernels, said
    assert re.findall(r"Used (\d+) registers", said) == [str((40 + 2 * 232) // 3)] * kernels, said
    assert "setmaxnreg" not in said, said
    assert "wgmma.mma_async instructions are serialized" not in said, said


def test_ptxas_is_believed_only_where_it_says_so() -> None:
    """Its words as they are where a kernel is well, and what it says where one is not."""
    well = (
        "ptxas info    : Compiling entry function 'kernel' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem\n"
    )
    check_ptxas(well, kernels=1)
    ignored = "ptxas info    : (C7508) 'setmaxnreg' ignored to maintain minimum register requirements.\n"
    for ill in (
        well.replace("Used 168", "Used 128"),
        well.replace("0 bytes spill stores", "8 bytes spill stores"),
        ignored + well,
        well.partition("ptxas info    : Used")[0],
        "",
    ):
        with pytest.raises(AssertionError):
            check_ptxas(ill, kernels=1)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("rows", [64, 8192])
# Kimi's kernels are DeepSeek's for more experts.
@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=[pytest.mark.full] * shape.startswith("kimi")) for shape in SHAPES]
)
def test_published_shapes(shape, rows, gathered, gpu_compiler, monkeypatch, capfd) -> None:
    G, D, F, activation, limit = SHAPES[shape]
    # The widest are partial sums where F is split over devices, in float32.
    out_dtype = jnp.float32 if shape.startswith("qwen3-30b") else jnp.bfloat16
    up, down = array(G, 1 if shape in UNGATED else 2, F, D), array(G, D, F)
    compiled = compile_mlp(up, down, rows, activation, limit, monkeypatch, capfd, out_dtype, gathered=gathered)
    # What stands between the products, the padded biases and the table of tiles: no copy of a row or a weight.
    assert compiled.memory_analysis().temp_size_in_bytes < rows * F * 2 + G * 3 * (F + D) * 2 + 2**18


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("shape", SHAPES)
def test_published_shapes_with_clusters(shape, gpu_compiler, monkeypatch, capfd) -> None:
    """Groups of 192 rows, where the first product has clusters, too, and results as a layer asks for them."""
    G, D, F, activation, limit = SHAPES[shape]
    halves = 1 if shape in UNGATED else 2
    up = Problem(R=192 * G, G=G, halves=halves, N=F, K=D)
    down = Problem(R=192 * G, G=G, halves=1, N=D, K=F, out_bytes=4)
    assert 2 in {choose_tiles(problem).cluster for problem in (up, down)}
    arrays = array(G, halves, F, D), array(G, D, F)
    compile_mlp(*arrays, 192 * G, activation, limit, monkeypatch, capfd, jnp.float32)


@pytest.mark.parametrize(
    ("sizes", "out_dtype"),
    [
        ({"m": 128, "n": 256, "stages": 4}, "float32"),
        ({"m": 128, "n": 192, "stages": 4}, "float32"),
        ({"m": 256, "n": 128, "stages": 3}, "bfloat16"),
        ({"m": 176, "n": 128, "stages": 3, "swapped": True}, "float32"),
    ],
    ids=str,
)
def test_what_the_blocks_of_a_cluster_share(sizes, out_dtype, gpu_compiler, monkeypatch, capfd) -> None:
    """Rows are copied to both, matrices to one; who multiplies arrives at both blocks' barriers, which expect as many."""
    tiles = Tiles(**sizes, k=64, cluster=2)

    def multiply(*arguments):
        return grouped_matmul(*arguments, out_dtype=jnp.dtype(out_dtype), tiles=tiles)

    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    arguments = (array(8192, 2048), array(8, 4096, 2048), array(8, dtype="int32"))
    jax.jit(multiply).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    lines = "".join(capfd.readouterr()).splitlines(keepends=True)
    of_ptxas = [line for line in lines if line.startswith("ptxas ") or "bytes stack frame" in line]
    check_ptxas("".join(of_ptxas), kernels=1)
    code = "".join(line for line in lines if line not in of_ptxas)
    assert ".reqnctapercluster 2, 1, 1" in code
    copies = re.findall(r"cp\.async\.bulk\.tensor\.\S*shared::cluster\.global\S*(?:.*\], )?", code)
    assert [copy.count("multicast::cluster") for copy in copies] == [1, 0] * (len(copies) // 2)
    constants = dict(re.findall(r"mov\.[bu]32 +\t?(%r\d+), (\d+);", code))
    expected = [constants[name] for name in re.findall(r"mbarrier\.init\.\S+ \[%r\d+\], (%r\d+);", code)]
    # Arrivals of warpgroups at the barriers of places given back, of threads at those of copies and at that of the sizes.
    assert sorted(expected) == sorted([str(2 * 2), str(2 * 128)] * tiles.stages + [str(128)])
    arrivals = re.findall(r"mbarrier\.arrive(\S*)", code)
    assert arrivals.count(".shared::cluster.b64") == code.count("mapa.shared::cluster") > 0
    assert set(arrivals) == {".shared::cluster.b64", ".expect_tx.shared.b64", ".release.cta.shared::cta.b64"}


@pytest.mark.parametrize("gathered", [False, True])
def test_parts_of_the_inner_dimension(gathered, gpu_compiler, monkeypatch, capfd) -> None:
    """A row or two have two kernels too, and one that adds parts up in their order: nothing adds by who comes first."""
    G, D, F, activation, limit = SHAPES["deepseek-v3, ep 8"]
    arguments = (array(G, 2, F, D), array(G, D, F), 1, activation, limit)
    compiled = compile_mlp(*arguments, monkeypatch, capfd, gathered=gathered)
    text = compiled.as_text()
    assert re.search(r"= f32\[\d+,4096\]\S* custom-call", text), "no parts"
    assert not re.search(r" (scatter|reduce)\(", text[text.index("ENTRY") :])


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("rows", [64, 8192])
@pytest.mark.parametrize(("shape", "format", "block", "scale_dtype", "has_zeros"), PACKED)
def test_packed_at_published_shapes(
    shape, format, block, scale_dtype, has_zeros, rows, gathered, gpu_compiler, monkeypatch, capfd
) -> None:
    G, D, F, activation, limit = SHAPES[shape]
    halves = 1 if shape in UNGATED else 2
    up, down = (packed(dims, format, block, scale_dtype, has_zeros) for dims in ((G, halves, F, D), (G, D, F)))
    compiled = compile_mlp(up, down, rows, activation, limit, monkeypatch, capfd, gathered=gathered)
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves((up, down)))
    memory = compiled.memory_analysis()
    assert weights < memory.argument_size_in_bytes < weights + 2 * rows * D + 2**22
    # Rows of 4-bit products are split in two parts first; nothing is expanded outside of the kernel.
    # Scales in float8 of several outputs are repeated for each of them.
    repeated = G * (halves + 1) * F * D // block[1] if scale_dtype == "float8_e4m3fn" and block[0] > 1 else 0
    assert memory.temp_size_in_bytes < rows * (2 * F + D) * 2 + G * 3 * (F + D) * 2 + 2**18 + repeated


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("rows", [64, 8192])
@pytest.mark.parametrize(("shape", "format", "block", "scale_dtype", "activations"), EIGHT_BITS)
def test_eight_bits_on_both_sides(
    shape, format, block, scale_dtype, activations, rows, gathered, gpu_compiler, monkeypatch, capfd
) -> None:
    G, D, F, activation, limit = SHAPES[shape]
    up, down = (packed(dims, format, block, scale_dtype, has_zeros=False) for dims in ((G, 2, F, D), (G, D, F)))
    options = {"activations": activations, "gathered": gathered}
    compiled = compile_mlp(up, down, rows, activation, limit, monkeypatch, capfd, **options)
    # Rows of 8 bits with their scales, h as it is and again in 8 bits.
    of_rows = rows * (D + 3 * F) + rows * (D + F) // 32
    assert compiled.memory_analysis().temp_size_in_bytes < of_rows + G * 3 * (F + D) * 2 + 2**18


@pytest.mark.parametrize("shape", ["qwen3-30b-a3b, ep 8", "gpt-oss, tp 2 ep 4"])
def test_gradients_at_published_shapes(shape, gpu_compiler, monkeypatch, capfd) -> None:
    """Both products of the way back, outer products of matrices and of biases; those of one size are one kernel."""
    G, D, F, activation, limit = SHAPES[shape]
    rows, biased = 8192, shape.startswith("gpt-oss")

    def gradients(x, up, down, biases, sizes, dy):
        def mlp(x, up, down, biases):
            return expert_mlp(
                x,
                up,
                down,
                sizes,
                **biases,
                activation=activation,
                limit=limit,
                out_dtype=dy.dtype,
                backend="mosaic_gpu",
            )

        return jax.vjp(mlp, x, up, down, biases)[1](dy)

    biases = {"b_gate_up_p2F": array(G, 2, F), "b_down_pD": array(G, D)} if biased else {}
    stacks = array(G, 2, F, D), array(G, D, F)
    arguments = (array(rows, D), *stacks, biases, array(G, dtype="int32"), array(rows, D, dtype="float32"))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    compiled = jax.jit(gradients).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    # The first product again, two by columns, two outer products, and one with ones for both biases: no y.
    check_ptxas("".join(capfd.readouterr()), kernels=6 if biased else 5)
    # As the backward pass says, columns of ones and the gradients of biases against them aside.
    workspace = rows * (6 * 2 * F + 6 * F + 2 * D)
    of_biases = biased * (G * (2 * F + D) * 64 * 2 + rows * 64 * 2)
    assert compiled.memory_analysis().temp_size_in_bytes < workspace + of_biases + 2**20


@pytest.mark.parametrize(("out_dtype", "swapped"), [("bfloat16", False), ("float32", False), ("bfloat16", True)])
def test_results_are_stored_without_bank_conflicts(out_dtype, swapped, gpu_compiler, monkeypatch) -> None:
    """Mosaic falls back to slow stores without a word where it finds no order that is free of conflicts."""
    from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray

    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    stored, store = [], FragmentedArray.store_tiled

    def recorded(self, ref, swizzle, optimized=True, **options):
        store(self, ref, swizzle, optimized, **options)
        stored.append((swizzle, optimized, self.shape))

    monkeypatch.setattr(FragmentedArray, "store_tiled", recorded)
    arguments = (array(8192, 768), array(16, 2048, 768), array(16, dtype="int32"))
    tiles = mosaic_gpu.Tiles(m=96 if swapped else 128, n=256, k=64, stages=3, swapped=swapped)

    def multiply(*arguments):
        return mosaic_gpu.grouped_matmul(*arguments, out_dtype=jnp.dtype(out_dtype), tiles=tiles)

    jax.jit(multiply).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    width = 128 // jnp.dtype(out_dtype).itemsize
    expected = [(128, True, (128, 96))] if swapped else [(128, True, (64, width))] * (256 // width)
    assert stored == expected


@pytest.mark.parametrize(
    ("out_dtype", "swapped", "barriers"),
    [("bfloat16", True, 2), ("float32", False, 2 * 8), ("bfloat16", "packed", 2 + 1)],
)
def test_a_warpgroup_waits_for_itself_around_results_only(
    out_dtype, swapped, barriers, gpu_compiler, monkeypatch, capfd
) -> None:
    """Twice for every piece of them, once at the end, and before a stage is given back that was read into registers.

    Mosaic's own barriers would be as many around pieces again, and one for every copy of a stage.
    """
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    packs = swapped == "packed"
    matrices = packed((16, 2048, 768), "int4", (1, 32), "bfloat16", has_zeros=True) if packs else array(16, 2048, 768)
    arguments = (array(8192, 768), matrices, array(16, dtype="int32"))
    tiles = None if packs else mosaic_gpu.Tiles(m=96 if swapped else 128, n=256, k=64, stages=3, swapped=swapped)

    def multiply(*arguments):
        return mosaic_gpu.grouped_matmul(*arguments, out_dtype=jnp.dtype(out_dtype), tiles=tiles)

    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    jax.jit(multiply).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    said = "".join(capfd.readouterr())
    assert said.count(".visible .entry") == 1
    # Those of the whole block have the constant 0 in place of a register.
    assert len(re.findall(r"bar\.sync\s+%r\d+", said)) == barriers + 1


@pytest.mark.parametrize(("G", "T"), [(16, 1024), (128, 1)])
def test_nothing_but_the_kernel_writes_its_result(G, T, gpu_compiler) -> None:
    """Zeros for rows that no group owns would be a pass that writes it all again, and the sum that follows reads none.

    Nor does a kernel stand before the products: each finds its tiles itself.
    """
    _, D, F, activation, _ = SHAPES["qwen3-30b-a3b, ep 8"]
    K, rows = 8, 8 * T

    def layer(x, up, down, sizes, places, weights):
        options = {"activation": activation, "out_dtype": jnp.float32, "zeros_beyond": False}
        y = expert_mlp(x, up, down, sizes, backend="mosaic_gpu", **options)
        return weighted_sum(weights, y, places)

    arguments = (
        *(array(rows, D), array(G, 2, F, D), array(G, D, F), array(G, dtype="int32")),
        *(array(T, K, dtype="int32"), array(T, K, dtype="float32")),
    )
    compiled = jax.jit(layer).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    text = compiled.as_text()
    program = text[text.index("ENTRY") :].splitlines()
    writers = [line for line in program if f"= f32[{rows},{D}]" in line]
    assert len(writers) == 1
    assert "mosaic_gpu" in writers[0]
    # The two products, weights of what there is, and the sum.
    assert len(launches(text)) <= 4, launches(text)


def launches(text: str) -> list[str]:
    """The kernels of a program without loops."""
    program = text[text.index("ENTRY") :].splitlines()
    return [line for line in program if " fusion(" in line or " custom-call(" in line]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_activation_of_gathered_rows(activation, gated, gpu_compiler, monkeypatch, capfd) -> None:
    """With as many sums as a thread may have: ptxas shares registers out between those who load and those who multiply."""
    G, D, F = 8, 4096, 14336
    up, down = array(G, 2 if gated else 1, F, D), array(G, D, F)
    compile_mlp(up, down, 8192, activation, None, monkeypatch, capfd, gathered=True)


@pytest.mark.parametrize(("T", "most"), [(1, 8), (1024, 9)])
def test_a_layer_stores_no_gathered_rows(T, most, gpu_compiler) -> None:
    """The experts of a layer take the rows of tokens as they are: no array [pairs, D] of their dtype is written.

    Between slots and sums there are few kernels, of which each is waited for by the next.
    """
    E, K, D, F = 16, 8, 2048, 768

    def apply(params, rows, index, sizes, dtype):
        options = {"index_R": index, "out_dtype": dtype, "zeros_beyond": False}
        return expert_mlp(rows, *params, sizes, backend="mosaic_gpu", **options)

    def layer(x, slots, weights, up, down):
        layout = DispatchLayout(mesh_shape=(("ep", 1),), expert_axes=("ep",), partial_axes=(), num_slots=E)
        options = {"expected_pairs": T * K, "weights_on_input": False}
        return local_sums(x, slots, weights, Experts(apply, (up, down)), layout, **options)

    arguments = (
        *(array(T, D), array(T, K, dtype="int32"), array(T, K, dtype="float32")),
        *(array(E, 2, F, D), array(E, D, F)),
    )
    text = jax.jit(layer).trace(*arguments).lower(lowering_platforms=("cuda",)).compile().as_text()
    program = text[text.index("ENTRY") :]
    assert program.count("mosaic_gpu_v2") == 2
    assert not re.search(rf"bf16\[{T * K}(,1)?,{D}\]\S* (fusion|copy|gather)\(", program)
    assert len(launches(text)) <= most, launches(text)
