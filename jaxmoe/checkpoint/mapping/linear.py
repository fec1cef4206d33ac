"""The linear layers of a model that quantizing is about, by the paths of their parameters."""

import re

# Routers, embeddings, the head and mixers with a state are none.
LINEAR_KINDS = (
    ("routed experts", re.compile(r".*\.moe\.w_(gate_up|down)")),
    ("shared experts", re.compile(r".*\.moe\.shared\.w_(gate|up|down)")),
    ("dense MLP", re.compile(r".*\.mlp\.w_(gate|up|down)")),
    ("attention", re.compile(r".*\.attention\.w_(q|k|v|o|q_a|q_b|kv_a|kv_b)")),
)


def linear_kind(path: str) -> str:
    """The kind of linear layer that a parameter is of, "" for one that is of none."""
    return next((kind for kind, pattern in LINEAR_KINDS if pattern.fullmatch(path)), "")
