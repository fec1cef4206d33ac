"""`jaxmoe.save` and `jaxmoe.convert`: checkpoints that transformers loads, from a model on a mesh or from files."""

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import get_args

import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.errors import Problems
from jaxmoe.checkpoint.formats import Checkpoint, can_cast, decode_checkpoint, is_stored, open_checkpoint, open_files
from jaxmoe.checkpoint.mapping import (
    PREDICTING_RULE,
    REST,
    TIED_RULE,
    UNREAD_RULE,
    FamilyCheckpoint,
    abstract_specs,
    written_blocks,
    written_form,
)
from jaxmoe.checkpoint.saving.directory import copy_side_files, new_directory
from jaxmoe.checkpoint.saving.outputs import OutputTensor, copied_tensor, output_tensors
from jaxmoe.checkpoint.saving.quantize import QuantizedOutputs, Quantizing
from jaxmoe.checkpoint.saving.report import SaveReport, quantized_params
from jaxmoe.checkpoint.saving.values import CheckpointValues, ModelValues
from jaxmoe.checkpoint.saving.write import divide_into_files, parse_size, write_files
from jaxmoe.checks import flag, instance_of, path_like
from jaxmoe.config import DecoderConfig, directory_of, find_checkpoint
from jaxmoe.layers import check_usable, packings_of, param_specs, params_by_path, unpacked_specs
from jaxmoe.models import Decoder, Family, Form, read_model_config
from jaxmoe.progress import ProgressCallback, byte_progress, check_progress


@dataclasses.dataclass(frozen=True)
class _Options:
    """The arguments that `save` and `convert` share, checked before anything is read."""

    form: Form
    max_bytes: int
    overwrite: bool
    progress: bool | ProgressCallback
    quantizing: Quantizing | None


def save(
    model: Decoder,
    directory: str | os.PathLike[str],
    *,
    form: Form = "per_expert",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool | ProgressCallback = False,
    quantize: str | None = None,
    ignore: Sequence[str] = (),
) -> SaveReport:
    """Write a model as a checkpoint that transformers and `jaxmoe.load` load, whatever mesh and placement it is on.

    Expert slots become logical experts again; padding and replicas are left out. One tensor at a time is in host
    memory. config.json, tokenizer and the like are copied from the checkpoint that the model was loaded from, and so
    are the tensors that were ignored by rule. Of a multimodal checkpoint the text model alone is written, under its own
    names and with its own config.json. Weights that are held packed are decoded, or quantized again where `quantize` says
    so; with "fp8_block" the static fp8 scales of activations of a model that rounds by them are written too. The
    directory appears when all of it is written.

    Args:
        model: model from `jaxmoe.load`, with all its devices in this process.
        directory: directory to make.
        form: "per_expert" for one tensor each, "fused" for one tensor of all experts of a layer. Families that transformers
            writes in one form only are written in that one; the report says which.
        dtype: type of the weights; None for the model's. Routers, which a model holds in float32, are rounded only where
            that changes no value.
        max_shard_size: bytes of tensors in one file, a number or as "5GB"; more become several files with an index.
        overwrite: whether a checkpoint that is there is replaced, with all that is in its directory.
        progress: True draws a bar on stderr; a callable is given (bytes done, bytes in all).
        quantize: format of the linear layers of attention, MLPs and experts, a name of `jaxmoe.quant.encode.TARGETS`; None
            leaves them plain.
        ignore: modules that `quantize` leaves plain, by name, or "re:" and an expression.

    Returns:
        A report of what was written.

    Raises:
        FileExistsError: there is something in the way.
        ValueError: an argument is none of those above, or the model does not come from a checkpoint, or a weight cannot be
            quantized so.
        NotImplementedError: a part of the model is on devices of another process.

    Example:
        >>> jaxmoe.save(model, "out", form="fused", max_shard_size="2GB").tensors
        68
    """
    path_like("directory", directory)
    instance_of("model", model, Decoder, "a model from jaxmoe.load")
    options = _check_options(form, max_shard_size, overwrite, progress, quantize, ignore)
    target = _plain_dtype(dtype) or np.dtype(model.dtype)
    if model.origin is None:
        raise ValueError(
            "a checkpoint has the config.json of the one that its model came from; this model has random weights and "
            "came from none; load it from a checkpoint, with weights of its own put into it afterwards"
        )
    check_usable(model)
    arrays = {path: param.get_value() for path, param in params_by_path(model).items()}
    elsewhere = [path for path, array in arrays.items() if not array.is_fully_addressable]
    if elsewhere:
        raise NotImplementedError(
            f"save writes what the devices of one process hold; {elsewhere[0]} is on others too; convert the "
            "checkpoint's files instead (jaxmoe.convert), or load the model in one process"
        )
    packings = packings_of(model)
    specs = {spec.path: spec for spec in unpacked_specs(param_specs(model), packings, model.dtype)}
    source = model.origin.path
    family, config = read_model_config(source, mtp=model.config.mtp is not None)
    ignored = _carried(dict(model.origin.ignored), family)
    checkpoint = _open_source(source, family, config, needed=bool(ignored))
    with open_files(checkpoint.files if ignored and checkpoint else ()) as descriptors:
        blocks = written_blocks(specs, family, form, checkpoint.tensors if checkpoint else None)
        tensors = output_tensors(specs, blocks, ModelValues(arrays, packings), target, np.dtype(model.dtype))
        carried = [copied_tensor(checkpoint.tensors[name], descriptors) for name in ignored] if checkpoint else []
        # An adapter may have made the vocabulary another one.
        vocab_size = None if model.config.vocab_size == config.vocab_size else model.config.vocab_size
        names = _file_names(checkpoint)
        report = _write(source, Path(directory), tensors, carried, target, family, options, names, vocab_size)
    static = [path for path, packing in packings.items() if packing.input_scales]
    return report.with_notes(packings, static, dict(model.origin.ignored))


def convert(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    form: Form = "per_expert",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool | ProgressCallback = False,
    quantize: str | None = None,
    ignore: Sequence[str] = (),
) -> SaveReport:
    """Write a checkpoint in another form, without a model or a device: each tensor is read when it is written.

    Of a multimodal checkpoint the text model alone is written, as by `save`.

    Args:
        source: a checkpoint of safetensors or ``.bin`` files, given as for `jaxmoe.load`.
        directory: directory to make.
        form: "per_expert" for one tensor each, "fused" for one tensor of all experts of a layer. Families that transformers
            writes in one form only are written in that one; the report says which.
        dtype: type of the weights; None leaves each tensor its own, and gives quantized ones that of config.json.
        max_shard_size: bytes of one file, as for `save`.
        overwrite: whether a checkpoint that is there is replaced, as by `save`; `source` itself may be.
        progress: bar or callable, as for `save`.
        quantize: format of the linear layers, as for `save`.
        ignore: modules that are left plain, as for `save`.

    Returns:
        A report of what was written.

    Raises:
        FileExistsError: there is something in the way.
        FileNotFoundError: `source` or a part of it is missing.
        ValueError: the checkpoint cannot be loaded as it is, or an argument is none of those above, or a weight cannot be
            quantized so.

    Example:
        >>> report = jaxmoe.convert("demo", "demo-fp8", quantize="fp8_block", ignore=["self_attn"])
        >>> report.losses[0].kind, round(report.losses[0].rms, 2)
        ('routed experts', 0.03)
    """
    path_like("source", source)
    path_like("directory", directory)
    options = _check_options(form, max_shard_size, overwrite, progress, quantize, ignore)
    target, source = _plain_dtype(dtype), find_checkpoint(source)
    found = FamilyCheckpoint.open(source)
    found = found.decoding_to(target or np.dtype(jnp.dtype(found.config.dtype or "float32")))
    checkpoint, family = found.checkpoint, found.family
    model_dtype = target or np.dtype(np.float32)
    specs = abstract_specs(found.config, model_dtype)
    mapped = found.onto(specs)
    problems = Problems(f"the conversion of {checkpoint.path}")
    unused = mapped.check(problems).ignored
    ignored = _carried(unused, family)
    problems.raise_if_any()
    with open_files(checkpoint.files) as descriptors:
        blocks = written_blocks(specs, family, form, checkpoint.tensors)
        tensors = output_tensors(specs, blocks, CheckpointValues(mapped, descriptors), target, model_dtype)
        carried = [copied_tensor(checkpoint.tensors[name], descriptors) for name in ignored]
        report = _write(source, Path(directory), tensors, carried, target, family, options, _file_names(checkpoint))
    return report.with_notes(quantized_params(mapped), (), unused)


def _file_names(checkpoint: Checkpoint | None) -> set[str]:
    return {file.path.name for file in checkpoint.files} if checkpoint else set()


def _write(
    source: Path,
    directory: Path,
    tensors: list[OutputTensor],
    carried: list[OutputTensor],
    dtype: np.dtype | None,
    family: Family,
    options: _Options,
    weights: Collection[str],
    vocab_size: int | None = None,
) -> SaveReport:
    start = time.perf_counter()
    source = directory_of(source)
    if source.resolve() != directory.resolve() and source.resolve().is_relative_to(directory.resolve()):
        raise ValueError(
            f"a checkpoint is not written over a directory that its source is in; {source} is in {directory}; name a "
            "directory beside it"
        )
    form, quantized = written_form(family, options.form), None
    if options.quantizing is not None:
        quantized = QuantizedOutputs(tensors, carried, options.quantizing, family, form)
        tensors = quantized.tensors
    files = divide_into_files([*tensors, *carried], options.max_bytes)
    with (
        new_directory(directory, overwrite=options.overwrite) as partial,
        byte_progress(f"writing {directory.name}", options.progress) as on_bytes,
    ):
        left_out = copy_side_files(
            source,
            partial,
            dtype=None if dtype is None else dtype.name,
            wrapper=family.wrapper,
            quantization=None if quantized is None else quantized.settings,
            weights=weights,
            vocab_size=vocab_size,
        )
        write_files(partial, files, on_bytes)
    dtypes: Counter[str] = Counter()
    for tensor in (*tensors, *carried):
        dtypes[tensor.dtype_name] += tensor.nbytes
    return SaveReport(
        path=str(directory),
        form=form,
        files={name: sum(tensor.nbytes for tensor in part) for name, part in files.items()},
        tensors=len(tensors) + len(carried),
        dtypes=dict(dtypes),
        carried=len(carried),
        left_out=tuple(left_out),
        seconds=time.perf_counter() - start,
        quantized=None if options.quantizing is None else options.quantizing.target,
        losses=quantized.losses() if quantized else (),
        input_scales=quantized.input_scales if quantized else 0,
    )


def _check_options(
    form: str,
    max_shard_size: int | str,
    overwrite: bool,
    progress: bool | ProgressCallback,
    quantize: str | None,
    ignore: Sequence[str],
) -> _Options:
    check_progress(progress)
    quantizing = Quantizing.checked(quantize, ignore)
    for known in get_args(Form):
        if form == known:
            return _Options(known, parse_size(max_shard_size), flag("overwrite", overwrite), progress, quantizing)
    raise ValueError(f"form is one of {', '.join(get_args(Form))}; got {form!r}")


def _plain_dtype(name: str | None) -> np.dtype | None:
    if name is None:
        return None
    try:
        dtype = np.dtype(jnp.dtype(name))
    except TypeError:
        dtype = np.dtype(object)
    if not can_cast(np.dtype(np.float32), dtype):
        raise ValueError(f"dtype is float32, bfloat16, float16 or float64, or None to leave it as it is; got {name!r}")
    return dtype


def _carried(ignored: Mapping[str, Sequence[str]], family: Family) -> list[str]:
    """The ignored tensors that are copied: no others of a multimodal model, no embedding again, and no rest of a tensor."""
    left_out = {TIED_RULE, UNREAD_RULE, PREDICTING_RULE, *(family.wrapper.ignored if family.wrapper else ())}
    names = [name for rule, names in ignored.items() if rule not in left_out for name in names]
    return [name for name in names if not name.endswith(REST)]


def _open_source(source: Path, family: Family, config: DecoderConfig, *, needed: bool) -> Checkpoint | None:
    """The checkpoint a model came from; one that is gone by now is missed only if something is to be copied."""
    if is_stored(source):
        return None  # its names are not a family's, and its tensors are all the model's
    try:
        return FamilyCheckpoint.of(decode_checkpoint(open_checkpoint(source)), family, config).checkpoint
    except FileNotFoundError:
        if needed:
            raise
        return None
