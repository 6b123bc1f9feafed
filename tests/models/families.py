"""Families of bases, each with a tiny configuration: what `docs/bases.md` lists and `test_outsiders_bases.py` runs.

`python -m tests.models.families` prints the page's table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

COMMON = {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.2}
MODERN = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
WHOLE = {**MODERN, "num_key_value_heads": 4}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        kind: Transformers' `model_type`.
        options: of its configuration, beside `COMMON`.
        attn: the attention that it is loaded with.
        second: a method that is tried beside LoRA, one a family.
        quick: runs in the gate.
        refused: what is refused: "" for nothing, "candidates" or "always".
        why: of the refusal, as the page says it; or a note.
        says: a part of the error.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    attn: str = "sdpa"
    second: str = "head"
    quick: bool = False
    refused: str = ""
    why: str = ""
    says: str = ""

    def config(self, vocab_size: int) -> Any:
        """A tiny configuration."""
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self.kind](**{**COMMON, **self.options, "vocab_size": vocab_size})


_SHARED = "LoRA `all-linear` leaves out shared experts and dense layers, which PEFT would move (peft#3711)"
_FUSED = "LoRA `all-linear` leaves out fused experts"
_EAGER = "`model.attn: eager`"

FAMILIES = (
    Family("llama", MODERN, second="qlora"),
    Family("mistral", {**MODERN, "sliding_window": 512}, second="full"),
    Family("qwen2", MODERN, second="adapter"),
    Family("qwen3", {**MODERN, "head_dim": 8}, second="full", quick=True),
    Family("qwen2_moe", {**MODERN, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
           second="adapter", why=_FUSED),
    Family("qwen3_moe", {**MODERN, **EXPERTS, "num_experts": 4, "head_dim": 8}, why=_FUSED),
    Family("mixtral", {**MODERN, "num_local_experts": 4, "num_experts_per_tok": 2}, second="adapter", why=_FUSED),
    Family("jetmoe", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2,
                      "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                      "max_position_embeddings": 512}, why=_FUSED),
    Family("deepseek_v2", {**WHOLE, **LATENT, **EXPERTS}, second="full", why=_SHARED),
    Family("deepseek_v3", {**WHOLE, **LATENT, **EXPERTS}, second="adapter", quick=True, why=_SHARED),
    Family("hunyuan_v1_moe", {**MODERN, "head_dim": 8, "num_experts": 4, "moe_topk": 2}, why=_SHARED),
    Family("phi", WHOLE, second="qlora"),
    Family("phi3", MODERN, second="qlora"),
    Family("phimoe", {**MODERN, "num_local_experts": 4, "num_experts_per_tok": 2}, why=_FUSED),
    Family("gemma", {**MODERN, "head_dim": 8}, second="adapter"),
    Family("gemma2", {**MODERN, "head_dim": 8, "sliding_window": 512}, attn="eager", second="adapter", why=_EAGER),
    Family("gemma3_text", {**MODERN, "head_dim": 8, "sliding_window": 512}, second="adapter"),
    Family("gpt_oss", {**MODERN, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                       "sliding_window": 512}, attn="eager", why=f"{_EAGER}; {_FUSED}"),
    Family("olmo", MODERN, second="full"),
    Family("olmo2", MODERN, second="adapter"),
    Family("olmo3", {**MODERN, "sliding_window": 512}, second="full"),
    Family("gpt2", OLD, second="adapter"),
    Family("gpt_bigcode", OLD, second="adapter"),
    Family("gpt_neo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 512,
                       "attention_types": [[["global", "local"], 1]], "window_size": 384}, attn="eager",
           second="full", quick=True, why=f"{_EAGER}; `max_length` up to its window"),
    Family("gpt_neox", {**WHOLE, "num_key_value_heads": None}, second="qlora"),
    Family("gptj", {**OLD, "rotary_dim": 4}, attn="eager", second="full", why=_EAGER),
    Family("opt", {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "word_embed_proj_dim": 32, "max_position_embeddings": 512}, second="qlora"),
    Family("biogpt", {**WHOLE, "num_key_value_heads": None}, second="full"),
    Family("ctrl", {"n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    Family("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False,
                      "new_decoder_architecture": True, "num_kv_heads": 2, "max_position_embeddings": 512},
           second="full", why="with rotary positions"),
    Family("stablelm", MODERN, second="adapter"),
    Family("starcoder2", MODERN, second="adapter"),
    Family("glm", {**MODERN, "head_dim": 8}, second="qlora"),
    Family("glm4", {**MODERN, "head_dim": 8}, second="adapter"),
    Family("smollm3", MODERN, second="qlora"),
    Family("diffllama", MODERN),
    Family("doge", {**MODERN, "attention_dropout": 0.0}, quick=True, why="`max_length` up to `keep_window_size`"),
    Family("arcee", MODERN),
    Family("nemotron", MODERN),
    Family("helium", {**MODERN, "head_dim": 8}),
    Family("exaone4", {**MODERN, "sliding_window": 512}),
    Family("seed_oss", {**MODERN, "head_dim": 8}),
    Family("cohere_compass_text", {**MODERN, "head_dim": 8, "sliding_window": 512,
                                   "layer_types": ["sliding_attention", "full_attention"],
                                   "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4,
                                                              "mrope_section": [2, 1, 1]}
                                                       for kind in ("sliding_attention", "full_attention")}},
           second="adapter"),
    Family("ministral", {**MODERN, "head_dim": 8, "sliding_window": 512}),
    Family("ministral3", {**MODERN, "head_dim": 8, "sliding_window": 512}),
    Family("persimmon", {**WHOLE, "num_key_value_heads": None}),
    Family("minicpm3", {**WHOLE, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                        "v_head_dim": 8}),
    Family("qwen3_next", {**MODERN, **EXPERTS, **LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 32},
           refused="candidates", why="linear attention layers", says="linear_attention"),
    Family("qwen3_5_text", {**MODERN, **LINEAR}, refused="candidates", why="linear attention layers",
           says="linear_attention", quick=True),
    Family("jamba", {**MODERN, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                     "expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4,
                     "use_mamba_kernels": False}, refused="candidates", why="mamba layers", says="linear_attention"),
    Family("minimax", {**MODERN, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                       "layer_types": ["linear_attention", "full_attention"]},
           refused="candidates", why="linear attention layers", says="linear_attention", quick=True),
    Family("openai-gpt", OLD, attn="eager", refused="candidates",
           why="takes no mask for each row", says="OpenAIGPTModel takes no mask for each row"),
    Family("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, attn="eager", refused="always",
           why="ALiBi: positions cannot be given", says="takes no position_ids"),
    Family("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}, attn="eager", refused="always",
           why="ALiBi: positions cannot be given", says="takes no position_ids"),
    Family("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
           refused="candidates", why="with ALiBi: positions cannot be given", says="ALiBi: positions cannot be given"),
    Family("modernbert-decoder", {**WHOLE, "bos_token_id": 2, "local_attention": 1024}, refused="always",
           why="modules between backbone and head", says="lacks the weight head"),
)  # fmt: skip


def name_of(family: Family) -> str:
    """A family's name among the tests."""
    return f"{family.kind}-alibi" if family.options.get("alibi") else family.kind


def table() -> str:
    """The table of `docs/bases.md`."""
    lines = ["| family (`model_type`) | prefixes | candidates, bank, scorer | notes |", "|---|---|---|---|"]
    for family in FAMILIES:
        prefixes = "refused" if family.refused == "always" else "works"
        candidates = "refused" if family.refused else "works"
        lines.append(f"| `{family.kind}` | {prefixes} | {candidates} | {family.why} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
