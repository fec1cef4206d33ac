"""The text model of Kimi K3 in plain NumPy, written from the published description, and a tiny checkpoint of it.

transformers does not have it: this model, a loop over tokens in float64, stands in its place.
"""

from typing import Any

import numpy as np

SMALL: dict[str, Any] = {
    "model_type": "kimi_linear",
    "dtype": "float32",
    "vocab_size": 97,
    "hidden_size": 32,
    "hidden_act": "situ",
    "activation_situ_beta": 0.8,
    "activation_situ_linear_beta": 25.0,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "attn_res_block_size": 2,
    "linear_attn_config": {
        "full_attn_layers": [3, 5],
        "kda_layers": [1, 2, 4],
        "num_heads": 8,
        "head_dim": 11,
        "short_conv_kernel_size": 3,
        "gate_lower_bound": -5.0,
        "use_full_rank_gate": True,
    },
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "mla_use_nope": True,
    "mla_use_output_gate": True,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "routed_expert_hidden_size": 18,
    "latent_moe_use_norm": True,
    "num_experts": 11,
    "num_experts_per_token": 3,
    "num_shared_experts": 2,
    "num_expert_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "moe_router_activation_func": "sigmoid",
    "moe_renormalize": True,
    "routed_scaling_factor": 1.3,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
CONFIG = {
    "model_type": "kimi_k3",
    "architectures": ["KimiK3ForConditionalGeneration"],
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "text_config": SMALL,
    "vision_config": {"vt_hidden_size": 8},
}


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the text model's tensors by the publisher's names, without the prefix of the multimodal model."""
    D, inner, heads = c["hidden_size"], c["linear_attn_config"], c["num_attention_heads"]
    H, k, W = inner["num_heads"], inner["head_dim"], inner["short_conv_kernel_size"]
    nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], D)}

    def mixed(name: str) -> None:
        found[f"{name}_norm.weight"] = (D,)
        found[f"{name}_proj.weight"] = (1, D)

    def mlp(name: str, width: int, model: int, parts: tuple[str, str, str]) -> None:
        gate, up, down = parts
        found[f"{name}.{gate}.weight"] = found[f"{name}.{up}.weight"] = (width, model)
        found[f"{name}.{down}.weight"] = (model, width)

    projections = ("gate_proj", "up_proj", "down_proj")
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        mixed(f"{layer}.self_attention_res")
        mixed(f"{layer}.mlp_res")
        found[f"{layer}.input_layernorm.weight"] = found[f"{layer}.post_attention_layernorm.weight"] = (D,)
        if i + 1 in inner["kda_layers"]:
            own = {f"{part}_proj.weight": (H * k, D) for part in "qkvg"}
            own |= {f"{part}_conv1d.weight": (H * k, 1, W) for part in "qkv"}
            own |= {"f_a_proj.weight": (k, D), "f_b_proj.weight": (H * k, k), "b_proj.weight": (H, D)}
            own |= {"A_log": (max(H, k),), "dt_bias": (H * k,), "o_norm.weight": (k,), "o_proj.weight": (D, H * k)}
        else:
            own = {"q_a_proj.weight": (c["q_lora_rank"], D), "q_a_layernorm.weight": (c["q_lora_rank"],)}
            own |= {"q_b_proj.weight": (heads * (nope + rope), c["q_lora_rank"])}
            own |= {"kv_a_proj_with_mqa.weight": (c["kv_lora_rank"] + rope, D)}
            own |= {"kv_a_layernorm.weight": (c["kv_lora_rank"],)}
            own |= {"kv_b_proj.weight": (heads * (nope + v), c["kv_lora_rank"])}
            own |= {"g_proj.weight": (heads * v, D), "o_proj.weight": (D, heads * v)}
        found |= {f"{layer}.self_attn.{name}": shape for name, shape in own.items()}
        if i < c["first_k_dense_replace"]:
            mlp(f"{layer}.mlp", c["intermediate_size"], D, projections)
            continue
        moe, X, F = f"{layer}.block_sparse_moe", c["routed_expert_hidden_size"], c["moe_intermediate_size"]
        found[f"{moe}.gate.weight"] = (c["num_experts"], D)
        found[f"{moe}.gate.e_score_correction_bias"] = (c["num_experts"],)
        found[f"{moe}.routed_expert_down_proj.weight"] = (X, D)
        found[f"{moe}.routed_expert_norm.weight"] = (X,)
        found[f"{moe}.routed_expert_up_proj.weight"] = (D, X)
        mlp(f"{moe}.shared_experts", F * c["num_shared_experts"], D, projections)
        for expert in range(c["num_experts"]):
            mlp(f"{moe}.experts.{expert}", F, X, ("w1", "w3", "w2"))
    mixed("model.output_attn_res")
    return found | {"model.norm.weight": (D,), "lm_head.weight": (c["vocab_size"], D)}


def make_tensors(c: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random tensors in float32, of which norms, biases, rates and bounds all matter."""
    rng, made = np.random.default_rng(seed), {}
    for name, shape in sorted(shapes(c).items()):
        noise = rng.standard_normal(shape)
        if name.endswith("A_log"):
            # Slow enough that states remember a whole prompt; behind the heads' rates are zeros.
            noise = np.where(np.arange(len(noise)) < c["linear_attn_config"]["num_heads"], noise - 1.0, 0.0)
        elif len(shape) == 1:
            noise = noise * 0.2 + (0.0 if name.endswith("bias") else 1.0)
        else:
            # Halves that are not gated reach their bound.
            large = 4.0 if name.endswith(("up_proj.weight", "w3.weight")) and "routed_expert" not in name else 1.5
            noise = noise * (2.0 if "embed" in name else large * shape[-1] ** -0.5)
        made[name] = noise.astype(np.float32)
    return made


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function."""
    return 1 / (1 + np.exp(-x))


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    """Divide by the root of the mean square over the last dim."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


class NumpyKimiK3:
    """Logits of one sequence at a time."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, np.ndarray]):
        self.config, self.eps = config, config["rms_norm_eps"]
        self.w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits [S, vocabulary] of all positions."""
        blocks: list[np.ndarray] = []
        total = self.w["model.embed_tokens.weight"][ids]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            x = self._mixed([*blocks, total], f"{layer}.self_attention_res")
            mix = self._kda if i + 1 in self.config["linear_attn_config"]["kda_layers"] else self._mla
            y = mix(self._normed(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
            if i % self.config["attn_res_block_size"] == 0:
                blocks, total = [*blocks, total], y
            else:
                total = total + y
            x = self._mixed([*blocks, total], f"{layer}.mlp_res")
            x = self._normed(x, f"{layer}.post_attention_layernorm")
            dense = i < self.config["first_k_dense_replace"]
            total = total + (self._mlp(x, f"{layer}.mlp") if dense else self._moe(x, f"{layer}.block_sparse_moe"))
        x = self._normed(self._mixed([*blocks, total], "model.output_attn_res"), "model.norm")
        return x @ self.w["lm_head.weight"].T

    def _normed(self, x: np.ndarray, name: str, eps: float | None = None) -> np.ndarray:
        return rms(x, self.eps if eps is None else eps) * self.w[f"{name}.weight"]

    def _project(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T

    def _mixed(self, streams: list[np.ndarray], name: str) -> np.ndarray:
        """Attention over depth: a learned query against each stream, normalized."""
        values = np.stack(streams)
        query = self.w[f"{name}_norm.weight"] * self.w[f"{name}_proj.weight"][0]
        scores = np.exp(rms(values, self.eps) @ query)
        return np.einsum("ns,nsd->sd", scores / scores.sum(0), values)

    def _situ(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        beta, linear = self.config["activation_situ_beta"], self.config["activation_situ_linear_beta"]
        return beta * np.tanh(gate / beta) * sigmoid(gate) * linear * np.tanh(up / linear)

    def _mlp(
        self, x: np.ndarray, name: str, parts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    ) -> np.ndarray:
        gate, up, down = (f"{name}.{part}" for part in parts)
        return self._project(self._situ(self._project(x, gate), self._project(x, up)), down)

    def _moe(self, x: np.ndarray, name: str) -> np.ndarray:
        scores = sigmoid(self._project(x, f"{name}.gate"))
        latent = self._project(x, f"{name}.routed_expert_down_proj")
        routed = np.zeros_like(latent)
        for t, row in enumerate(scores):
            ids = np.argsort(-(row + self.w[f"{name}.gate.e_score_correction_bias"]))[
                : self.config["num_experts_per_token"]
            ]
            weights = row[ids] / row[ids].sum() * self.config["routed_scaling_factor"]
            for expert, weight in zip(ids, weights, strict=True):
                routed[t] += weight * self._mlp(latent[t], f"{name}.experts.{expert}", ("w1", "w3", "w2"))
        routed = self._project(self._normed(routed, f"{name}.routed_expert_norm"), f"{name}.routed_expert_up_proj")
        return routed + self._mlp(x, f"{name}.shared_experts")

    def _mla(self, x: np.ndarray, name: str) -> np.ndarray:
        c, S = self.config, len(x)
        heads, nope, rank = c["num_attention_heads"], c["qk_nope_head_dim"], c["kv_lora_rank"]
        # The latents' norms have an epsilon of their own in the released code.
        latent = self._normed(self._project(x, f"{name}.q_a_proj"), f"{name}.q_a_layernorm", 1e-6)
        q = self._project(latent, f"{name}.q_b_proj").reshape(S, heads, -1)
        both = self._project(x, f"{name}.kv_a_proj_with_mqa")
        kv = self._project(self._normed(both[:, :rank], f"{name}.kv_a_layernorm", 1e-6), f"{name}.kv_b_proj")
        kv = kv.reshape(S, heads, -1)
        shared = np.broadcast_to(both[:, None, rank:], (S, heads, both.shape[1] - rank))
        scores = np.einsum("shd,thd->hst", q, np.concatenate([kv[..., :nope], shared], axis=-1)) * q.shape[-1] ** -0.5
        scores = np.where(np.tri(S, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hst,thv->shv", weights / weights.sum(-1, keepdims=True), kv[..., nope:]).reshape(S, -1)
        return self._project(out * sigmoid(self._project(x, f"{name}.g_proj")), f"{name}.o_proj")

    def _kda(self, x: np.ndarray, name: str) -> np.ndarray:
        inner = self.config["linear_attn_config"]
        H, k, W, S = inner["num_heads"], inner["head_dim"], inner["short_conv_kernel_size"], len(x)

        def convolved(part: str) -> np.ndarray:
            taps, padded = self.w[f"{name}.{part}_conv1d.weight"][:, 0], self._project(x, f"{name}.{part}_proj")
            padded = np.pad(padded, [(W - 1, 0), (0, 0)])
            y = np.stack([(padded[t : t + W] * taps.T).sum(0) for t in range(S)])
            return (y * sigmoid(y)).reshape(S, H, k)

        q, key, value = (convolved(part) for part in "qkv")
        q, key = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, key))
        f = self._project(self._project(x, f"{name}.f_a_proj"), f"{name}.f_b_proj") + self.w[f"{name}.dt_bias"]
        rate = np.exp(self.w[f"{name}.A_log"][:H])[:, None]
        decay = np.exp(inner["gate_lower_bound"] * sigmoid(rate * f.reshape(S, H, k)))
        strength = sigmoid(self._project(x, f"{name}.b_proj"))
        memory, out = np.zeros((H, k, k)), np.zeros((S, H, k))
        for t, h in np.ndindex(S, H):
            faded = decay[t, h][:, None] * memory[h]
            memory[h] = faded + strength[t, h] * np.outer(key[t, h], value[t, h] - faded.T @ key[t, h])
            out[t, h] = memory[h].T @ q[t, h] / np.sqrt(k)
        out = self._normed(out, f"{name}.o_norm").reshape(S, -1)
        return self._project(out * sigmoid(self._project(x, f"{name}.g_proj")), f"{name}.o_proj")


def make_expected(prompts: list[list[int]], new_tokens: int, seed: int) -> dict[str, np.ndarray]:
    """Logits of each prompt's every position, and the tokens that follow it greedily, as tests/goldens has them."""
    model, expected = NumpyKimiK3(SMALL, make_tensors(SMALL, seed)), {}
    for i, prompt in enumerate(prompts):
        expected[f"prompt_{i}"] = np.array(prompt, np.int32)
        expected[f"logits_{i}"] = model.logits(prompt).astype(np.float32)
        ids = list(prompt)
        for _ in range(new_tokens):
            ids.append(int(model.logits(ids)[-1].argmax()))
        expected[f"greedy_{i}"] = np.array(ids[len(prompt) :], np.int32)
    return expected
