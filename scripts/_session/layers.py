"""The whole MoE layer, router to combine, with the time of each of the GPU's kernels."""

from scripts import bench_layer
from scripts._bench.inputs import VARIANTS
from scripts._bench.report import check_finite, reason
from scripts._session import clock
from scripts._session.inside import check_alive, device, emit, shapes, tokens, while_time


def layer(kernel: str) -> None:
    """Emit the times of Qwen3-30B-A3B's layer for few and many tokens."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    for name, shape in shapes("qwen3-30b-a3b").items():
        module = bench_layer.make_layer(shape, "ep=1", "bfloat16")
        module.kernels = kernel
        graph, state = nnx.split(module)
        call = jax.jit(lambda state, x_TD, graph=graph: nnx.merge(graph, state)(x_TD)[0])
        for T in while_time(tokens(32, 4096, 1, 128)):
            x_TD = jax.random.normal(jax.random.key(T), (T, shape.width), jnp.bfloat16)

            def turn(x_TD: jax.Array = x_TD) -> list[jax.Array]:
                return jax.block_until_ready([call(state, x_TD) for _ in range(VARIANTS)])  # noqa: B023

            try:
                check_finite(float(jnp.linalg.norm(turn()[0].astype(jnp.float32))))
                timed = clock.measure(turn, device())
            except Exception as refusal:  # one number of tokens; others may do
                check_alive()
                emit("layer_refused", left_out=f"{name}, {T} tokens: {reason(refusal)}")
                continue
            emit("layer", shape=name, tokens=T, kernels=kernel, **timed._asdict())
