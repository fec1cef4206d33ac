"""Whole tensors of an adapter, which stand in for the checkpoint's: ``modules_to_save``, and a vocabulary that has grown.

They are read from the adapter's file by the same plan that reads the others from the checkpoint's, so nothing is merged.
"""

import dataclasses

from jaxmoe.checkpoint.errors import CheckpointError, Problems
from jaxmoe.checkpoint.formats import TensorInfo
from jaxmoe.checkpoint.lora import Adapter
from jaxmoe.checkpoint.mapping import FamilyCheckpoint, Spellings
from jaxmoe.checkpoint.nearest import nearest_name

_ENDS = ("embed.weight", "lm_head.weight")


def put_in_whole_modules(found: FamilyCheckpoint, adapter: Adapter) -> FamilyCheckpoint:
    """Put an adapter's whole tensors in the place of a checkpoint's, as PEFT does.

    The rows of a new embedding or output projection are the vocabulary. Where the two are tied, and the adapter has one of
    them, it alone is another one: the model is no longer tied.

    Args:
        found: checkpoint under its family's names.
        adapter: adapter from `open_adapter`.

    Returns:
        The checkpoint and the config of the model that the adapter was trained for; as it was, where the adapter has
        low-rank updates alone.

    Raises:
        CheckpointError: a tensor of the adapter is none of the checkpoint's, or of another shape; or the embedding and the
            output projection would have vocabularies of two sizes.
    """
    if not adapter.whole:
        return found
    family, tensors, problems = found.family, dict(found.checkpoint.tensors), Problems(str(adapter.path))
    known = {*tensors, *[name for path in _ENDS for name in family.tensors[path]]}
    spellings, ends = Spellings(family), dict[str, TensorInfo]()
    for name, tensor in adapter.whole.items():
        target = spellings.find(name, known)
        end = next((path for path in _ENDS if target in family.tensors[path]), None)
        old = tensors.get(target)
        if end is not None:
            ends[end] = tensor
        elif old is None:
            nearest = nearest_name(target, tensors)
            problems.add(
                f"{tensor.name!r} replaces a tensor of the checkpoint, and that has no {target!r}"
                f"{f'; the nearest is {nearest!r}' if nearest else ''}; is the adapter for this model?"
            )
        elif old.shape != tensor.shape:
            problems.add(
                f"{tensor.name!r} has shape {tensor.shape}, and {target!r}, which it replaces, {old.shape}: only "
                "vocabularies may grow; is the adapter for this model?"
            )
        if end is None:
            tensors[target] = dataclasses.replace(tensor, name=target)
    problems.raise_if_any()
    config = found.config
    if ends:
        both = _both_ends(found, ends, adapter)
        tensors |= both
        rows = {tensor.shape[0] for tensor in both.values()}
        # An adapter of a tied model that has one end alone leaves the other as it is.
        config = dataclasses.replace(config, vocab_size=rows.pop(), tie_word_embeddings=False)
    checkpoint = dataclasses.replace(found.checkpoint, tensors=tensors, files=(*found.checkpoint.files, adapter.file))
    return dataclasses.replace(found, checkpoint=checkpoint, config=config)


def _both_ends(found: FamilyCheckpoint, ends: dict[str, TensorInfo], adapter: Adapter) -> dict[str, TensorInfo]:
    """The embedding and the output projection by name, those of the adapter before those of the checkpoint."""
    tensors, family = found.checkpoint.tensors, found.family
    names = {
        path: next((name for name in family.tensors[path] if name in tensors), family.tensors[path][0])
        for path in _ENDS
    }
    embedding = tensors[names["embed.weight"]]
    own = {"embed.weight": embedding, "lm_head.weight": tensors.get(names["lm_head.weight"], embedding)}
    both = {names[path]: dataclasses.replace(ends.get(path, own[path]), name=names[path]) for path in _ENDS}
    sizes = {name: tensor.shape for name, tensor in both.items()}
    if len({shape[0] for shape in sizes.values()}) > 1 or any(len(shape) != 2 for shape in sizes.values()):
        raise CheckpointError(
            f"{adapter.path}: an embedding and an output projection are of one vocabulary; with what the adapter replaces "
            f"they would be {' and '.join(f'{name!r} {shape}' for name, shape in sizes.items())}; save both with the adapter"
        )
    return both
