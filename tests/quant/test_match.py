"""Tensors of a checkpoint against its settings: what agrees is found, and what does not is an error of its own."""

import contextlib
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.quant import Quantization, QuantizationError, Rules, find_quantization, match_tensors
from jaxmoe.quant.formats import Fp8Block, Gptq, Mxfp4Blocks, PackQuantized
from jaxmoe.quant.infer import infer_format
from jaxmoe.quant.names import Names
from tests.support.quantized import BASE, EXAMPLES, NAME, Example, Tensor, example

PLAIN = {
    name: Tensor(name, "BF16", shape)
    for name, shape in {
        "model.embed_tokens.weight": (100, 64),
        "model.layers.0.mlp.gate.weight": (4, 64),
        "model.layers.0.input_layernorm.weight": (64,),
        "lm_head.weight": (100, 64),
    }.items()
}


def declared(form, **rules) -> Quantization:
    return Quantization("test", "config.json", Rules(default=form, **rules))


def match(one: Example, quantization="its own", **more):
    quantization = declared(one.format) if quantization == "its own" else quantization
    return match_tensors({**PLAIN, **one.headers(), **more}, quantization)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_weight_is_found_by_its_settings(name: str) -> None:
    one = example(name)
    found = match(one)
    assert set(found.weights) == {one.weight}
    assert set(found.parts) == set(one.arrays)
    weight = found.weights[one.weight].bind(one.values.shape)
    assert (weight.format, weight.shape) == (one.format, one.values.shape)
    decoded = {part.role for part in one.format.parts if part.decoded}
    unused = {header.name for role, header in weight.stored.items() if role not in decoded}
    assert set(found.unused) == unused
    arrays = {name: array for name, array in one.arrays.items() if name not in unused}
    assert weight.stored_bytes == sum(array.nbytes for array in arrays.values())


# Settings that tensors do not tell.
AMBIGUOUS = {
    "gptq, less than a group",
    "gptq, v2",
    "gptq, 2 bits",
    "gptq, 3 bits",
    "gptq, 3 bits, v2, order",
    "gptq, 8 bits",
} | {
    "pack_quantized, 8 bits",
    "pack_quantized, 2 bits",
    "pack_quantized, 3 bits",
    "pack_quantized, 3 bits apart",
    "pack_quantized, 6 bits",
    "fp8_block, stack",
    "fp8_block, stack of its own name",
    "fbgemm_fp8",
    "fbgemm_fp8, stack",
    "fbgemm_fp8, stack, scales last",
}


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - AMBIGUOUS))
def test_a_format_is_told_by_its_tensors(name: str) -> None:
    one = example(name)
    form = one.format
    if isinstance(form, Gptq):
        form = dataclasses.replace(form, act_order=False)  # which only the settings and the values tell
    assert infer_format(one.weight, one.headers()) == form
    assert set(match(one, None).weights) == {one.weight}


def test_plain_tensors_are_left_alone() -> None:
    assert infer_format("lm_head.weight", PLAIN) is None
    assert match_tensors(PLAIN, declared(Fp8Block())).weights == {}


def changed(name: str, suffix: str, **changes) -> dict[str, Tensor]:
    """The headers of an example with one of them changed, or without it where there are no changes."""
    headers = example(name).headers()
    tensor = headers.pop(next(one for one in headers if one.endswith(suffix)))
    if changes:
        headers[tensor.name] = dataclasses.replace(tensor, **changes)
    return headers


WRONG: list[tuple[str, dict[str, Tensor], Quantization, str]] = [
    (
        "scales missing",
        changed("fp8_block", "scale_inv"),
        declared(Fp8Block()),
        r"'.*up_proj.weight' is in fp8_block, and '.*up_proj.weight_scale_inv' is missing",
    ),
    (
        "scales of the wrong shape",
        changed("fp8_block", "scale_inv", shape=(3, 3)),
        declared(Fp8Block()),
        r"scale_inv' has shape \(3, 3\); of a weight \(300, 200\) in fp8_block it is \(3, 2\)",
    ),
    (
        "scales of the wrong dtype",
        changed("fp8_block", "scale_inv", dtype_name="I32"),
        declared(Fp8Block()),
        "scale_inv' is I32, and fp8_block has F32 or BF16",
    ),
    (
        "another block size",
        example("fp8_block").headers(),
        declared(Fp8Block((64, 64))),
        r"scale_inv' has shape \(3, 2\); .* in fp8_block \(block_size \(64, 64\)\) it is \(5, 4\)",
    ),
    (
        "packed dims that do not multiply out",
        changed("gptq", ".qweight", shape=(11, 32)),
        declared(Gptq(4, 32)),
        "a group size of 32 does not divide the 88 inputs",
    ),
    (
        "another group size",
        changed("gptq", ".qweight", shape=(16, 32)),
        declared(Gptq(4, 32)),
        r"qzeros' has shape \(3, 4\); of a weight \(32, 128\) in gptq \(group_size 32\) it is \(4, 4\)",
    ),
    (
        "packed dims of another group size",
        example("pack_quantized").headers(),
        declared(PackQuantized(4, 64)),
        "a group size of 64 does not divide the 96 inputs of its matrices",
    ),
    (
        "groups that are not whole",
        changed("nvfp4", ".weight", shape=(24, 44)),
        declared(example("nvfp4").format),
        "a group size of 16 does not divide the 88 inputs of its matrices",
    ),
    (
        "a block that contradicts the tensors",
        example("fp8_block").headers(),
        declared(PackQuantized(4, 32)),
        r"says? that '.*up_proj.weight' is in pack_quantized \(group_size 32\); its tensors say otherwise: they look like "
        "fp8_block",
    ),
    (
        "a module that is named as quantized and plain",
        {},
        declared(None, modules={"model.layers.0.mlp.gate": Fp8Block()}),
        "gate.weight' is in fp8_block; its tensor says otherwise: it is BF16",
    ),
    (
        "a module that is ignored and quantized",
        example("fp8_block").headers(),
        declared(Fp8Block(), ignored=Names([BASE])),
        "is not quantized; its tensors say otherwise: they look like fp8_block",
    ),
    (
        "an ignore list that names nothing",
        example("fp8_block").headers(),
        declared(Fp8Block(), ignored=Names(["language_model.layers.0.mlp.gate", "lm_header"])),
        "none of the 2 entries of the ignore list names a module of this checkpoint; the first is 'language_model",
    ),
    (
        "scales without a weight",
        changed("fp8_block", "up_proj.weight"),
        declared(Fp8Block()),
        "weight_scale_inv' is part of a quantized weight, and '.*up_proj.weight' is not there",
    ),
    (
        "a vector where a matrix is packed",
        changed("gptq", ".qweight", shape=(384,)),
        declared(Gptq(4, 32)),
        r"qweight' has shape \(384,\), which is none of gptq",
    ),
]


@pytest.mark.parametrize(
    ("headers", "quantization", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG]
)
def test_what_contradicts_is_refused(headers: dict[str, Tensor], quantization: Quantization, message: str) -> None:
    with pytest.raises(QuantizationError, match=message) as error:
        match_tensors({**PLAIN, **headers}, quantization)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("quantization test of config.json has 1 problem: ")


def test_problems_are_told_together() -> None:
    headers = {}
    for expert in range(6):
        for name, tensor in changed("fp8_block", "scale_inv").items():
            other = name.replace("experts.3", f"experts.{expert}")
            headers[other] = dataclasses.replace(tensor, name=other)
    with pytest.raises(QuantizationError, match=r"has 6 problems: .*; and 2 more$"):
        match_tensors(headers, declared(Fp8Block()))


def test_what_is_not_wanted_is_not_checked() -> None:
    headers = {**PLAIN, **changed("fp8_block", "scale_inv")}
    found = match_tensors(headers, declared(Fp8Block()), wanted=lambda name: "experts" not in name)
    assert found.weights == {}


def test_an_ignore_list_may_name_what_is_optional() -> None:
    one = example("fp8_block")
    quantization = declared(one.format, ignored=Names(["model.visual*", "mtp*", "lm_heads"]))
    headers = one.headers()
    assert set(match_tensors(headers, quantization).weights) == {NAME}
    some = declared(one.format, ignored=Names(["model.embed_tokens", "model.layers.9.mlp.gate"]))
    assert match(one, some).notes == (
        "1 entries of the ignore list name no module, the first is 'model.layers.9.mlp.gate'",
    )


def test_a_head_in_fp8_is_found_though_heads_are_plain_by_default() -> None:
    headers = {
        "lm_head.weight": Tensor("lm_head.weight", "F8_E4M3", (256, 128)),
        "lm_head.weight_scale_inv": Tensor("lm_head.weight_scale_inv", "F32", (2, 1)),
    }
    quantization = find_quantization({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    assert quantization.format_of("lm_head") is None
    assert set(match_tensors(headers, quantization).weights) == {"lm_head.weight"}


def test_scales_of_activations_and_of_the_cache_are_told_apart() -> None:
    one = example("fp8_tensor")
    cache = "model.layers.0.self_attn.k_proj.k_scale"
    found = match(one, "its own", **{cache: Tensor(cache, "F32", ())})
    assert found.unused == {
        BASE + ".input_scale": f"no value of {NAME} depends on it",
        cache: "it scales a cache of keys and values, which is not quantized",
    }


def test_another_framework_s_packs_are_no_format_of_these() -> None:
    headers = {
        NAME: Tensor(NAME, "U32", (24, 12)),
        BASE + ".scales": Tensor(BASE + ".scales", "F16", (24, 2)),
        BASE + ".biases": Tensor(BASE + ".biases", "F16", (24, 2)),
    }
    with pytest.raises(QuantizationError, match=r"up_proj.weight' \(U32, with scales and biases\) are packed by MLX"):
        match_tensors(headers, None)
    del headers[BASE + ".biases"]
    with pytest.raises(
        QuantizationError, match=r"up_proj.weight' \(U32\) is in no format that is known by its tensors"
    ):
        match_tensors(headers, None)


@pytest.mark.parametrize("name", ["pack_quantized, width of no whole word", "bnb_4bit"])
def test_a_shape_that_headers_do_not_tell_comes_from_the_model(name: str) -> None:
    one = example(name)
    weight = match(one).weights[one.weight]
    assert weight.shape != one.values.shape
    bound = weight.bind(one.values.shape)
    assert bound.shape == one.values.shape
    with pytest.raises(QuantizationError, match=r"must have shape \(24, 999\)"):
        weight.bind((24, 999))


USUAL = (
    "fp8_block/fp8_block, stack/fp8_tensor/fp8_channel/fbgemm_fp8/int_quantized/pack_quantized/pack_quantized, 3 bits"
)
USUAL += "/nvfp4_pack/mxfp4_pack/gptq/gptq, 3 bits/awq/mxfp4/deepseek_fp4/nvfp4/bnb_int8"


@pytest.mark.parametrize("name", USUAL.split("/"))
def test_bytes_of_a_format_are_those_of_its_tensors(name: str) -> None:
    one = example(name)
    needed = {part.role for part in one.format.parts if part.required}
    stored = sum(one.arrays[header.name].nbytes for role, header in one.bound().stored.items() if role in needed)
    assert one.format.stored_bytes(one.values.shape) == stored


def test_bytes_of_published_experts() -> None:
    # gpt-oss-20b: 24 layers of 32 experts of 2880 by 2880, in 4.25 bits.
    shapes = [(32, 2880, 5760), (32, 2880, 2880)]
    assert sum(24 * Mxfp4Blocks().stored_bytes(shape) for shape in shapes) == 24 * 32 * 3 * 2880**2 * 17 // 32
    # DeepSeek-V3: a float32 for 16384 bytes.
    assert Fp8Block().stored_bytes((2048, 7168)) == 2048 * 7168 + 16 * 56 * 4


@pytest.mark.parametrize("declares", [True, False])
@pytest.mark.parametrize("name", EXAMPLES)
@settings(max_examples=5)
@given(data=st.data())
def test_headers_of_any_kind_are_matched_or_refused(name: str, declares: bool, data) -> None:
    one = example(name)
    headers = one.headers()
    for tensor in data.draw(st.lists(st.sampled_from(sorted(headers)), min_size=1, unique=True)):
        shape = data.draw(st.lists(st.sampled_from([0, 1, 3, 24, 96, 2**40]), max_size=4))
        dtype = data.draw(st.sampled_from([headers[tensor].dtype_name, "BF16", "I32", "F8_E4M3", "U8", "F4", "BOOL"]))
        headers[tensor] = Tensor(tensor, dtype, tuple(shape))
    with contextlib.suppress(QuantizationError):
        found = match_tensors(headers, declared(one.format) if declares else None)
        for weight in found.weights.values():
            assert weight.shape is None or weight.bind(weight.shape) is not None
            with contextlib.suppress(QuantizationError):
                weight.bind(one.values.shape)


def test_weights_that_are_plain_again_are_no_problem() -> None:
    quantization = declared(Fp8Block(), ignored=Names(["some.other.model"]))
    assert match_tensors(PLAIN, quantization).weights == {}
