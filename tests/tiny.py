"""What tests, demo and benchmarks share: made posts, tiny models, the scripts as modules.

The posts are templates without slurs. Each hateful form has a negated and a counter-speech twin,
so that the words of an attack alone do not decide the label.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]

GROUPS = {
    "lgbtq": ("Homosexual", ["gay people", "lesbians", "trans people", "gay couples"]),
    "mexican": ("Hispanic", ["Mexicans", "Mexican families", "people from Mexico", "Latinos"]),
    "middle_east": ("Arab", ["Arabs", "people from Iraq", "Syrian families", "Lebanese people"]),
}
PLACES = ["town", "school", "street", "country", "office", "park", "club", "neighbourhood"]
ATTACKS = [
    "{who} do not belong in this {place}",
    "{who} ruin every {place} they come to",
    "keep {who} out of our {place}",
    "nobody should have to share a {place} with {who}",
    "we must get rid of {who} before they take over the {place}",
]
TWINS = [
    "it is a lie that {attack}",
    "my uncle says {attack} and i told him to stop",
    "nobody here believes that {attack}",
    "whoever writes {attack} should be ashamed",
]
NEUTRAL = [
    "{who} opened a bakery near the {place} last week",
    "the council met {who} to talk about the {place}",
    "i interviewed {who} about the history of the {place}",
    "{who} and their friends cleaned the {place} on sunday",
    "a new law lets {who} rent the {place} for weddings",
]
# A chat template in the common style, with a role header and an end-of-turn token.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def made_posts(seed: int = 0) -> list[dict[str, Any]]:
    """A few hundred posts with `text`, `label` (hate, normal) and `group`, in a fixed order."""
    posts = []
    for (group, (_, names)), place in itertools.product(GROUPS.items(), PLACES):
        for index, attack in enumerate(ATTACKS):
            who = names[(index + len(place)) % len(names)]
            attacked = attack.format(who=who, place=place)
            twin = TWINS[(index + PLACES.index(place)) % len(TWINS)].format(attack=attacked)
            neutral = NEUTRAL[index].format(who=who, place=place)
            for text, label in ((attacked, "hate"), (twin, "normal"), (neutral, "normal")):
                posts.append({"text": text, "label": label, "group": group})
            intensified = f"{attacked}, i mean it, {names[(index + 1) % len(names)]} too"
            posts.append({"text": intensified, "label": "hate", "group": group})
    random.Random(seed).shuffle(posts)
    return posts


def write_sources(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Write the posts in the official formats of HateXplain and ToxiGen, half each."""
    folder.mkdir(parents=True, exist_ok=True)
    posts = made_posts(seed)
    half = len(posts) // 2
    hatexplain, divisions = {}, {"train": [], "val": [], "test": []}
    for number, post in enumerate(posts[:half]):
        target, _ = GROUPS[post["group"]]
        tokens = post["text"].lower().split()
        name = f"made_{number:04d}"
        label = "hatespeech" if post["label"] == "hate" else "normal"
        mask = [int(post["label"] == "hate")] * len(tokens)
        hatexplain[name] = {
            "post_id": name,
            "annotators": [
                {"label": label, "annotator_id": annotator, "target": [target]}
                for annotator in (1, 2, 3)
            ],
            "rationales": [mask, mask] if post["label"] == "hate" else [],
            "post_tokens": tokens,
        }
        split = {7: "val", 8: "test", 9: "test"}.get(number % 10, "train")
        divisions[split].append(name)
    files = {
        "hatexplain": folder / "dataset.json",
        "hatexplain_splits": folder / "post_id_divisions.json",
        "toxigen": folder / "annotated_train.csv",
    }
    files["hatexplain"].write_text(json.dumps(hatexplain), encoding="utf-8")
    files["hatexplain_splits"].write_text(json.dumps(divisions), encoding="utf-8")
    with files["toxigen"].open("w", newline="", encoding="utf-8") as file:
        columns = ["text", "target_group", "toxicity_ai", "toxicity_human", "label"]
        rows = csv.DictWriter(file, columns)
        rows.writeheader()
        for post in posts[half:]:
            hateful = post["label"] == "hate"
            rows.writerow(
                {
                    "text": repr(post["text"].encode()),
                    "target_group": post["group"],
                    "toxicity_ai": 4.5 if hateful else 1.0,
                    "toxicity_human": 4.5 if hateful else 1.0,
                    "label": "hate" if hateful else "neutral",
                }
            )
    return files


IDENTITIES = ["women", "trans people", "gay people", "black people", "disabled people", "Muslims"]
IDENTITIES += ["immigrants"]


def made_cases() -> list[dict[str, Any]]:
    """Cases in the form of HateCheck: two hateful and two contrasts per identity; three of none."""
    rows: list[dict[str, Any]] = []

    def add(text: str, gold: str, identity: str, functionality: str, twin: str = "") -> str:
        rows.append(
            {
                "": len(rows),
                "functionality": functionality,
                "case_id": len(rows) + 1,
                "test_case": text,
                "label_gold": gold,
                "target_ident": identity,
                "direction": "general" if identity else "",
                "focus_words": "dislike",
                "focus_lemma": "dislike",
                "ref_case_id": twin,
                "ref_templ_id": f"{100 + len(rows)}.0" if twin else "",
                "templ_id": len(rows) % 7,
            }
        )
        return f"{rows[-1]['case_id']}.0"

    for name in IDENTITIES:
        for verb in ("dislike", "can't stand"):
            hateful = add(f"I {verb} {name}.", "hateful", name, "derog_neg_emote_h")
            add(f"I would never {verb} {name}.", "non-hateful", name, "negate_neg_nh", hateful)
    for thing in ("rain", "mud", "noise"):
        add(f"I dislike {thing}.", "non-hateful", "", "target_obj_nh")
    return rows


def write_csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as CSV with a header."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return file


def save_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Train a byte-level BPE tokenizer on the made posts; without a template: no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [post["text"] for post in made_posts()] + ["system user assistant", " hate", " normal"]
    backend.train_from_iterator(
        texts * 3,
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    padding = {"pad_token": "<|pad|>"} if chat_template else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=chat_template, **padding
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(
    folder: Path, kind: str = "llama", chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """Save a tiny random model of a class (llama, gpt2, bert, …) with its tokenizer.

    `mxfp4` and `fp8` are gpt-oss and Ministral as their makers publish them: stored quantised.
    """
    import torch

    tokenizer = save_tokenizer(folder, chat_template)
    torch.manual_seed(0)
    model = build_model({"mxfp4": "gpt_oss", "fp8": "mistral3"}.get(kind, kind), tokenizer)
    model.save_pretrained(folder)
    if kind in ("mxfp4", "fp8"):
        store_quantised(folder, kind)
    return folder


def build_model(kind: str, tokenizer: Any) -> Any:
    """A tiny random model of a class, in the sizes of a test."""
    import transformers

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=512,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return transformers.GPT2LMHeadModel(config)
    if kind == "bert_without_pooler":
        return transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    if kind == "distilbert":
        own = {"dim": 128, "hidden_dim": 256, "n_layers": 2, "n_heads": 4}
        return transformers.DistilBertModel(transformers.DistilBertConfig(**sizes | own))
    if kind in ("bert", "roberta", "modernbert"):
        name = {"bert": "Bert", "roberta": "Roberta", "modernbert": "ModernBert"}[kind]
        # RoBERTa counts positions from behind the pad token's id.
        sizes["max_position_embeddings"] += 2 if kind == "roberta" else 0
        own = {"cls_token_id": None, "sep_token_id": None} if kind == "modernbert" else {}
        config = getattr(transformers, f"{name}Config")(**sizes, **own)
        return getattr(transformers, f"{name}Model")(config)
    sizes |= {"num_key_value_heads": 2, "tie_word_embeddings": False, "initializer_range": 0.08}
    names = {"llama": "Llama", "qwen3": "Qwen3", "smollm3": "SmolLM3", "phi3": "Phi3"}
    names |= {"olmo2": "Olmo2", "mistral": "Mistral"}
    if kind in names:
        config = getattr(transformers, f"{names[kind]}Config")(**sizes)
        return getattr(transformers, f"{names[kind]}ForCausalLM")(config)
    sizes |= {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    if kind == "gpt_oss":
        # An auxiliary loss as strong as that of published configs.
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.9}
        config = transformers.GptOssConfig(**sizes, **experts, sliding_window=32)
        return transformers.GptOssForCausalLM(config)
    sight = {"hidden_size": 32, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    sight |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    if kind in ("gemma3", "gemma3_text"):
        text = transformers.Gemma3TextConfig(**sizes)
        if kind == "gemma3_text":
            return transformers.Gemma3ForCausalLM(text)
        vision = transformers.SiglipVisionConfig(**sight)
        config = transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=1
        )
        return transformers.Gemma3ForConditionalGeneration(config)
    if kind == "mistral3":
        rope = {"type": "yarn", "rope_theta": 1e6, "factor": 2.0, "mscale": 1.0}
        rope |= {"original_max_position_embeddings": 256, "mscale_all_dim": 1.0}
        rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1}
        sizes |= {"tie_word_embeddings": True, "rope_parameters": rope}
        vision = transformers.PixtralVisionConfig(**sight, hidden_act="silu")
        config = transformers.Mistral3Config(
            text_config=transformers.Ministral3Config(**sizes),
            vision_config=vision,
            image_token_index=1,
        )
        return transformers.Mistral3ForConditionalGeneration(config)
    raise ValueError(f"no tiny model of kind {kind!r}")


def store_quantised(folder: Path, kind: str) -> None:
    """Write a saved model's large weights as gpt-oss (mxfp4) or Ministral (fp8) is published."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import FP4_VALUES

    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if kind == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            # Blocks of 32 inputs share a power of two; a byte holds two values.
            blocks = weight.transpose(1, 2).unflatten(-1, (-1, 32))
            exponents = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
            distance = (blocks / exponents.exp2()[..., None])[..., None] - torch.tensor(FP4_VALUES)
            codes = distance.abs().argmin(-1).to(torch.uint8)
            stored[f"{name}_blocks"] = codes[..., 0::2] | (codes[..., 1::2] << 4)
            stored[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
        elif kind == "fp8" and "language_model" in name and name.endswith("_proj.weight"):
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            stored[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.01)
        else:
            stored[name] = weight.to(torch.bfloat16)
    whole = {name: weight.contiguous() for name, weight in stored.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    quantization = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    if kind == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
        kept += ["lm_head"]
        quantization = {"quant_method": "mxfp4"}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization | {"modules_to_not_convert": kept}
    config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def post_rows(seed: int = 0) -> list[dict[str, Any]]:
    """The made posts as rows of a local training file."""
    return [
        {"text": post["text"], "label": post["label"], "target_groups": [post["group"]]}
        for post in made_posts(seed)
    ]


def read_config(folder: Path, config: str, canned: bool = False) -> list[dict[str, Any]]:
    """Rows of a built dataset's splits, or of its canned sets, with `split` and label's name."""
    import pyarrow.parquet

    labels = json.loads((folder / "contract.json").read_text(encoding="utf-8"))["labels"]
    rows = []
    for file in sorted((folder / config).glob("*.parquet")):
        if file.name.startswith("canned") == canned:
            for row in pyarrow.parquet.read_table(file).to_pylist():
                label = labels[row["label"]]
                rows.append(row | {"split": file.name.split("-")[0], "label": label})
    return rows


def load_script(path: str) -> ModuleType:
    """Load a script as a module named after its path: `train/train.py` is script_train_train."""
    name = "script_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = spec_from_file_location(name, ROOT / path)
        module = module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
