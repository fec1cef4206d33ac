"""`generate`: prompts in, text out."""

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxmoe.checks import flag, instance_of, integer
from jaxmoe.checks import token_ids as check_token_ids
from jaxmoe.distributed import broadcast, check_same
from jaxmoe.generation.arguments import eos_token_ids_for, seeds_for, stop_strings, text_streams, tokenizer_for
from jaxmoe.generation.engine import Engine, FinishReason, Row
from jaxmoe.generation.model import HoldsAdapters, Model, Outline
from jaxmoe.generation.output import Output, TokenEvent
from jaxmoe.generation.params import SamplingParams, sampling_params_of
from jaxmoe.generation.prompts import Prompt, check_prompts, encode_prompts
from jaxmoe.generation.speculative import check_speculation
from jaxmoe.generation.stats import GenerationStats
from jaxmoe.generation.tokenizer import Tokenizer
from jaxmoe.placement.balancer import Balancer

StreamCallback = Callable[[TokenEvent], None]


def generate(
    model: Model,
    prompts: str | Iterable[Prompt],
    *,
    max_new_tokens: int = 64,
    sampling_params: SamplingParams | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | Sequence[int] | None = None,
    adapters: Sequence[str | None] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    ignore_eos: bool = False,
    stop: str | Sequence[str] | None = None,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    stream: StreamCallback | None = None,
    stats: GenerationStats | None = None,
    balancer: Balancer | None = None,
    speculate: str | None = None,
    num_drafts: int | None = None,
) -> list[Output]:
    """Generate text (or token ids) for every prompt.

    A prompt gives the same output alone and in any batch. Nothing is compiled twice: prompt
    and cache lengths are rounded up to few sizes, and programs are kept with the model.

    Args:
        model: model from `jaxmoe.load`.
        prompts: list of texts, of lists of token ids, or of conversations (lists of
            ``{"role": ..., "content": ...}``, put through the chat template); or one text.
        max_new_tokens: most tokens to generate for each prompt, at least 1.
        sampling_params: settings by which tokens are chosen; the likeliest token is taken by default.
        temperature, top_k, top_p, min_p, repetition_penalty: the same settings one by one, see `SamplingParams`.
        seed: integer for every prompt alike, so that a prompt's text depends on nothing else; or one
            for each prompt; None draws a fresh one for each.
        adapters: name of an adapter for each prompt, of those that the model holds (`jaxmoe.add_adapter`), or None for the
            model as it is; None for all as it is. One batch may have any mixture.
        eos_token_id: token or tokens that end the text; None for those that
            generation_config.json, else config.json, names.
        ignore_eos: whether to generate max_new_tokens whatever comes.
        stop: text or texts that end the output, and are cut off it; a special token's text too, though special tokens are
            no part of the output.
        chat: whether text prompts are user messages, to be put through the chat template.
        chat_template_kwargs: further variables for the template, such as ``{"enable_thinking": False}``. With ``"tools"``
            a template named "tool_use" is taken where there is one; ``"chat_template"`` names another.
        tokenizer: tokenizer to use instead of the checkpoint's.
        stream: function that is called with a `TokenEvent` for every token, in the order in which they come.
        stats: object to which counts and times are added.
        balancer: balancer that moves the model's experts between steps when the devices' loads have become uneven.
        speculate: "mtp" guesses tokens with the model's layers for multi-token prediction, which `jaxmoe.load` is asked for
            with ``mtp=True``, and checks them in one step: the same greedy tokens in fewer steps. None makes one token a
            step. `stats` has the share of the guesses that were right.
        num_drafts: number of tokens to guess in each step, with `speculate`; None for one by each of these layers.

    Returns:
        One `Output` per prompt, in order.

    Raises:
        ValueError: a setting is out of range or given twice with two values, a prompt is empty or of no known kind, a
            token is outside the vocabulary, there are more positions than the model has, the model holds no adapter of a
            name, a replayed trace is of another generation, or speculation does not go with the model or the settings.
        TypeError: `model`, `sampling_params`, `stream`, `stats` or `balancer` is something else.
        FileNotFoundError: text prompts or stop strings, and the checkpoint has no tokenizer.json.

    Example:
        >>> outs = jaxmoe.generate(model, ["def is_valid(name):"], max_new_tokens=12)
        >>> outs[0].finish_reason
        'length'
        >>> settings = jaxmoe.SamplingParams(temperature=0.8, top_p=0.95)
        >>> outs = jaxmoe.generate(model, [[5, 6, 7]], max_new_tokens=4, sampling_params=settings, seed=0)
        >>> len(outs[0].token_ids)
        4
    """
    begin = time.perf_counter()
    _check_objects(model, stream, stats, balancer)
    params = sampling_params_of(
        sampling_params,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    max_new_tokens = integer("max_new_tokens", max_new_tokens, least=1)
    drafts = check_speculation(model, speculate, num_drafts, params)
    ignore_eos, chat = flag("ignore_eos", ignore_eos), flag("chat", chat)
    stop = stop_strings(stop)
    given_eos = None if eos_token_id is None else check_token_ids("eos_token_id", eos_token_id, model.config.vocab_size)
    token_ids = encode(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        chat=chat,
        chat_template_kwargs=chat_template_kwargs,
        tokenizer=tokenizer,
    )
    texts = text_streams(len(token_ids), model, tokenizer, stop)
    eos_token_ids = frozenset[int]() if ignore_eos else eos_token_ids_for(model, given_eos)
    adapter_ids = _adapter_ids(model, adapters, len(token_ids))
    if drafts and adapter_ids is not None:
        raise ValueError(
            "layers for multi-token prediction guess for the model as it is, and a prompt has chosen an adapter; leave "
            "speculate out, or merge the adapter: jaxmoe.load(..., adapter=DIR)"
        )
    given_seeds = seeds_for(seed, len(token_ids))
    seeds = None if params.greedy else given_seeds
    if model.mesh.is_multi_process:
        if balancer is not None:
            raise NotImplementedError("experts are not rebalanced between processes: leave balancer out")
        settings = (params, max_new_tokens, sorted(eos_token_ids), stop, drafts, adapters)
        seeds = _agree(model, seeds, token_ids, settings, drawn=seed is None)
    stats = GenerationStats() if stats is None else stats
    compiled_before = stats.compile_seconds

    def on_token(index: int, token_id: int, reason: FinishReason | None) -> bool:
        if stats.first_token_seconds is None:
            stats.first_token_seconds = time.perf_counter() - begin - (stats.compile_seconds - compiled_before)
        piece = None
        if texts is not None:
            piece, reason = texts[index].take(token_id, reason)
        if stream is not None:
            stream(TokenEvent(index, token_id, piece, reason))
        return reason == "stop"

    rows = Engine(model).run(
        token_ids,
        params,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        seeds=seeds,
        adapter_ids=adapter_ids,
        on_token=on_token,
        stats=stats,
        balancer=balancer,
        num_drafts=drafts,
    )
    return [
        _output(
            prompt,
            row,
            None if texts is None else texts[index].text,
            None if adapters is None else adapters[index],
        )
        for index, (prompt, row) in enumerate(zip(token_ids, rows, strict=True))
    ]


def _check_objects(model: Any, stream: Any, stats: Any, balancer: Any) -> None:
    instance_of("model", model, Model, "a model from jaxmoe.load")
    if stream is not None and not callable(stream):
        raise TypeError(f"stream is a function that is called with each TokenEvent; got {type(stream).__name__}")
    if stats is not None:
        instance_of("stats", stats, GenerationStats, "a jaxmoe.GenerationStats")
    if balancer is not None:
        instance_of("balancer", balancer, Balancer, "a jaxmoe.Balancer")


def encode(
    model: Outline,
    prompts: str | Iterable[Prompt],
    *,
    max_new_tokens: int,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[list[int]]:
    """Encode prompts to the token ids that `generate` gives to the model; arguments and errors are the same as there.

    It is for callers who want every prompt checked before the first of many batches, and before a weight is read.
    """
    token_ids = encode_prompts(
        prompts,
        functools.partial(tokenizer_for, model, tokenizer),
        chat=chat,
        chat_template_kwargs=chat_template_kwargs,
    )
    check_prompts(
        token_ids,
        vocab_size=model.config.vocab_size,
        max_new_tokens=max_new_tokens,
        max_position_embeddings=model.config.max_position_embeddings,
    )
    return token_ids


def _output(prompt: list[int], row: Row, text: str | None, adapter: str | None) -> Output:
    assert row.finish_reason is not None
    return Output(
        prompt_token_ids=prompt,
        token_ids=row.token_ids,
        text=text,
        finish_reason=row.finish_reason,
        adapter=adapter,
    )


def _adapter_ids(model: Model, adapters: Sequence[str | None] | None, count: int) -> np.ndarray | None:
    if adapters is None:
        return None
    if not isinstance(model, HoldsAdapters):
        raise TypeError(f"adapters are chosen of a model from jaxmoe.load; got {type(model).__name__}")
    return model.adapter_ids(adapters, count)


def _agree(
    model: Model, seeds: list[int] | None, token_ids: list[list[int]], settings: Any, *, drawn: bool
) -> list[int] | None:
    """The seeds for all processes, once it is sure that what decides the text is the same in all of them.

    Each process runs the whole loop and stops a row by itself, which is right as long as all come to the same end. The
    programs of a step differ with what is recorded.
    """
    # Stop strings are looked for in text, so with them the tokenizer decides as well.
    path = None if model.source is None else model.source / "tokenizer.json"
    tokenizer = path.read_bytes() if path is not None and path.is_file() else None
    recorder, replay = model.recorder, model.replay
    replayed = None if replay is None else [np.asarray(array).tobytes() for array in jax.tree.leaves(nnx.state(replay))]
    check_same(
        {
            "prompts": token_ids,
            "settings of generate": (settings, None if drawn else seeds),
            "tokenizers": tokenizer,
            "recordings of routing": None if recorder is None else recorder.token_ids,
            "replayed traces": replayed,
        }
    )
    if seeds is None or not drawn:
        return seeds
    words = broadcast(np.array([(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds], np.uint32))
    return [int(high) << 32 | int(low) for high, low in words]
