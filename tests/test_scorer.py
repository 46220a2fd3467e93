"""The label scorer of eval/eval.py: exact, or fallen back and said so, on tiny random models."""

from __future__ import annotations

import math
import random
from types import ModuleType
from typing import Any

import pytest
import tiny

VOCABULARY = 300
# One token each; several tokens; a tree with a shared beginning and a longer branch.
LABELS = {
    "one token": [[70], [90]],
    "same end": [[80, 70, 2], [80, 90, 2]],
    "tree": [[80, 81, 70, 2], [80, 81, 90, 91, 92], [80, 99]],
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPARSE = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Class, what it adds to the sizes, and the path that its code allows.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", {}, "packed"),
    "mistral": ("MistralForCausalLM", {"sliding_window": 12}, "packed"),
    "ministral3": ("Ministral3ForCausalLM", {}, "packed"),
    "qwen2": ("Qwen2ForCausalLM", {}, "packed"),
    "qwen3": ("Qwen3ForCausalLM", {}, "packed"),
    "gemma2": ("Gemma2ForCausalLM", {"sliding_window": 12, "query_pre_attn_scalar": 16}, "packed"),
    "gemma3": ("Gemma3ForCausalLM", {"sliding_window": 12}, "packed"),
    "gpt_oss": ("GptOssForCausalLM", {**SPARSE, "sliding_window": 12}, "packed"),
    "mixtral": ("MixtralForCausalLM", SPARSE, "packed"),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 12}, "packed"),
    "olmo2": ("Olmo2ForCausalLM", {}, "packed"),
    "smollm3": ("SmolLM3ForCausalLM", {}, "packed"),
    "granite": ("GraniteForCausalLM", {"logits_scaling": 3.0}, "packed"),
    "gpt2": ("GPT2LMHeadModel", {}, "packed"),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "num_key_value_heads": 4,
            "head_dim": 8,
        },
        "packed",
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": 16,
            "no_rope_layers": [1, 1, 1, 0],
        },
        "packed",
    ),
    "jamba": (
        "JambaForCausalLM",
        {"mamba_d_state": 8, "mamba_d_conv": 4, "use_mamba_kernels": False, "num_experts": 2},
        None,
    ),
    "mamba": ("MambaForCausalLM", {}, None),
}


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    return tiny.load_script("eval/eval.py")


def build_model(kind: str, dtype: str = "float32") -> Any:
    import torch
    import transformers

    name, extra, _ = ARCHITECTURES[kind]
    model_class = getattr(transformers, name)
    torch.manual_seed(7)
    if kind == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4}
        config = transformers.GPT2Config(**sizes, n_positions=512, initializer_range=0.15)
    else:
        config = model_class.config_class(**SIZES | extra)
    model = model_class(config).eval()
    for weight in model.parameters():
        # As a checkpoint loads: its buffers, such as rotary frequencies, stay float32.
        weight.data = weight.data.to(getattr(torch, dtype))
    return model


def made_prompts(count: int, shared: int, seed: int = 3) -> list[list[int]]:
    """Random prompts of several lengths with the same first tokens, two of them equal."""
    chance = random.Random(seed)
    head = [chance.randrange(3, VOCABULARY) for _ in range(shared)]
    prompts = [
        head + [chance.randrange(3, VOCABULARY) for _ in range(chance.randrange(1, 40))]
        for _ in range(count)
    ]
    return [*prompts, list(prompts[0])]


def scorer_of(
    evaluate: ModuleType, model: Any, completions: list[list[int]], budget: int = 96, **setup: Any
) -> Any:
    settings = {"dtype": "float32", "quantization": None, "in_4bit": False, "autocast": False}
    return evaluate.Scorer(model, completions, 0, budget, evaluate.Setup(**settings | setup))


def naive_scores(
    model: Any, prompts: list[list[int]], completions: list[list[int]]
) -> list[list[float]]:
    """The definition, written once more: a forward per label, the sum of log-likelihoods."""
    import torch

    scores = []
    for prompt in prompts:
        row = []
        for completion in completions:
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0]
            likelihood = torch.log_softmax(logits.float(), -1)[len(prompt) - 1 : -1]
            row.append(likelihood.gather(1, torch.tensor(completion)[:, None]).sum().item())
        scores.append(row)
    return scores


def all_scores(evaluate: ModuleType, scorer: Any, prompts: list[list[int]]) -> list[list[float]]:
    world = evaluate.World(0, 1)
    scores, _, _ = evaluate.score_posts(
        scorer, prompts, lambda row: math.inf, scorer.setup.rounded, "scores", None, world
    )
    return scores


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_is_exact_or_falls_back(evaluate: ModuleType, kind: str) -> None:
    model = build_model(kind)
    prompts = made_prompts(11, shared=21)
    for completions in LABELS.values():
        expected = naive_scores(model, prompts, completions)
        scorer = scorer_of(evaluate, model, completions)
        scorer.begin(prompts)
        scorer.check(prompts, scorer.path)
        assert scorer.path == (ARCHITECTURES[kind][2] or scorer.path), scorer.record
        found = all_scores(evaluate, scorer, prompts)
        assert evaluate.largest_difference(found, expected) < 1e-4, scorer.path
