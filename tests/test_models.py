"""Every class of base model and every form of data, through training, resume, evaluation, merge.

pytest tests/test_models.py
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
from hub import Hub
from huggingface_hub import HfApi
from tiny import load_script

STEPS, SAVED = 4, 2
RUN = [
    *("--max_steps", str(STEPS), "--save_steps", str(SAVED), "--logging_steps", "1"),
    *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
    *("--warmup_steps", "1", "--learning_rate", "1e-2", "--lora_r", "4", "--report_to", "none"),
    *("--early_stopping_patience", "0"),
]
LABELS = ["normal", "hate"]
CLASSIFY = ["--task", "classify"]
EXPERTS = ["--lora_target_parameters", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Kind of base, whether it has a chat template, flags.
RUNS: dict[str, tuple[str, bool, list[str]]] = {
    "llama-4bit": ("llama", True, ["--load_in_4bit"]),
    "qwen3": ("qwen3", True, []),
    "smollm3": ("smollm3", True, []),
    "phi3": ("phi3", True, []),
    "olmo2": ("olmo2", True, []),
    "gemma3-text": ("gemma3_text", True, []),
    "gemma3": ("gemma3", True, ["--lora_target_modules", "all-linear"]),
    "ministral": ("mistral3", True, []),
    "ministral-fp8": ("fp8", True, ["--lora_target_modules", "all-linear"]),
    "ministral-fp8-4bit": ("fp8", True, ["--load_in_4bit"]),
    "gpt-oss-mxfp4": ("mxfp4", True, []),
    "gpt-oss-experts": ("mxfp4", True, EXPERTS),
    "gpt-oss-4bit": ("gpt_oss", True, ["--load_in_4bit"]),
    "gpt2-classifier": ("gpt2", False, CLASSIFY),
    "bert-classifier": ("bert_without_pooler", False, [*CLASSIFY, "--class_weights", "balanced"]),
    "roberta-classifier": ("roberta", True, CLASSIFY),
    "modernbert-classifier": ("modernbert", True, [*CLASSIFY, "--class_weights", "hate=2.5"]),
    "qwen3-classifier": ("qwen3", False, [*CLASSIFY, "--load_in_4bit"]),
}
# Each of these has a kin of its own above that is always run.
SLOW = {"smollm3", "phi3", "olmo2", "gemma3-text", "ministral", "ministral-fp8-4bit"}
SLOW |= {"gpt-oss-4bit", "roberta-classifier", "qwen3-classifier"}
pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return load_script("train/train.py")


@pytest.fixture(scope="module")
def evaluate() -> Callable[[list[str]], None]:
    return load_script("eval/eval.py").main


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training files of made posts and the tiny bases, made when first asked for."""
    folder = tmp_path_factory.mktemp("models")
    rows = tiny.post_rows()
    tiny.write_jsonl(folder / "train.jsonl", rows[:24])
    tiny.write_jsonl(folder / "validation.jsonl", rows[24:32])
    return folder


def base_of(files: Path, kind: str, template: bool = True) -> Path:
    folder = files / f"{kind}-{'chat' if template else 'plain'}"
    if not folder.exists():
        tiny.save_model(folder, kind, tiny.CHAT_TEMPLATE if template else None)
    return folder


def flags_of(files: Path, base: Path, out: Path, *more: str) -> list[str]:
    data = ["--train_file", str(files / "train.jsonl")]
    data += ["--validation_file", str(files / "validation.jsonl")]
    return [*data, "--model_name_or_path", str(base), "--output_dir", str(out), *RUN, *more]


def refusal(main: Callable, capsys: pytest.CaptureFixture, argv: list[str], code: int = 2) -> str:
    """Run main and return the message it ends with; it must exit with `code`."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    message = capsys.readouterr().err
    assert end.value.code == code and "error: " in message, message
    return message


def interrupted(whole: Path, folder: Path) -> Path:
    """A run's folder as it stood after its checkpoint in the middle."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    for path in [*folder.glob("adapter_*"), *folder.glob("eval")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    contract = read_json(folder / "contract.json")
    contract["training"] |= {"state": "running", "step": SAVED}
    (folder / "contract.json").write_text(json.dumps(contract))
    return folder


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def losses(folder: Path) -> list[float]:
    entries = read_json(folder / f"checkpoint-{STEPS}" / "trainer_state.json")["log_history"]
    return [entry["loss"] for entry in entries if "loss" in entry]


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder)


# --- classes of models ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in RUNS]
)
def test_a_class_is_trained_resumed_evaluated_and_merged(
    train: ModuleType,
    evaluate: Callable,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    name: str,
) -> None:
    """A fresh load of base and adapter scores two posts as the trained model itself did."""
    kind, template, flags = RUNS[name]
    base, out = base_of(files, kind, template), tmp_path / "whole"
    argv = flags_of(files, base, out, *flags)
    probed: list[list[float]] = []
    probe = train.probe_scores
    monkeypatch.setattr(train, "probe_scores", lambda *v: probed.append(probe(*v)) or probed[-1])
    train.main(argv)
    printed = capsys.readouterr().out
    assert "differ by 0.0e+00" in printed or "--load_in_4bit" in flags
    again = interrupted(out, tmp_path / "resumed")
    train.main([str(again) if word == str(out) else word for word in argv])
    assert f"resuming from checkpoint-{SAVED} " in capsys.readouterr().out
    assert losses(again) == losses(out) and len(losses(out)) == STEPS
    weights = "adapter_model.safetensors"
    assert (again / weights).read_bytes() == (out / weights).read_bytes()

    names = weights_of(out / weights)
    assert not [key for key in names if "vision" in key or "projector" in key]
    assert bool([key for key in names if ".experts." in key]) == ("experts" in name)
    if "--task" in flags:
        assert [key for key in names if "classifier" in key or "score" in key]

    given = ["--adapter", str(out), "--model_name_or_path", str(base)]
    texts = [train.PROBE_POST, "The council met on Monday."]
    posts = [{"text": text, "label": "normal"} for text in texts]
    evaluate([*given, "--test_file", str(tiny.write_jsonl(tmp_path / "posts.jsonl", posts))])
    with next((out / "eval").rglob("predictions.csv")).open(newline="") as file:
        found = [float(row["p_hate"]) for row in csv.DictReader(file)]
    trained = [1 / (1 + math.exp(no - yes)) for no, yes in (probed[0][:2], probed[0][2:])]
    assert found == pytest.approx(trained, abs=1e-5)

    merged = tmp_path / "merged"
    load_script("merge/merge.py").main([*given, "--output_dir", str(merged), "--dtype", "float32"])
    difference = read_json(merged / "contract.json")["largest_probability_difference"]
    assert difference["merged_against_adapter"] < difference["adapter_against_base"] / 2
    config = read_json(merged / "config.json")
    assert "quantization_config" not in config
    if "--task" not in flags:
        assert config["architectures"] == read_json(base / "config.json")["architectures"]
        before, after = (
            {key.removeprefix("model."): weight.float() for key, weight in weights_of(file).items()}
            for file in (base / "model.safetensors", merged / "model.safetensors")
        )
        towers = [key for key in before if "vision" in key or "projector" in key]
        assert bool(towers) == (kind in ("gemma3", "mistral3", "fp8"))
        assert all(before[key].equal(after[key]) for key in towers)


@pytest.mark.parametrize("kind", ["bert_without_pooler", "distilbert", "modernbert", "roberta"])
def test_what_a_base_lacks_comes_with_the_adapter(
    train: ModuleType,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    kind: str,
) -> None:
    """Each load of such a base draws another pooler, pre-classifier or head."""
    import peft
    import torch

    evaluate = load_script("eval/eval.py")
    repo = train.open_repo(str(base_of(files, kind)), "model")
    args = train.parse_args(CLASSIFY)

    def load() -> Any:
        config = train.read_base_config(repo)
        return train.load_base(repo, config, "classify", LABELS, torch.float32, "cpu").eval()

    def logits(model: Any) -> Any:
        return model(input_ids=torch.arange(3, 30)[None]).logits

    def adapt(folder: Path) -> tuple[Any, Any]:
        model = load()
        model = peft.get_peft_model(model, train.lora_config(args, model, repo)).eval()
        model.save_pretrained(folder)
        return model, evaluate.Repo("adapter", "model", None, folder)

    trained, adapter = adapt(tmp_path / "whole")
    expected = logits(trained)
    assert logits(evaluate.load_adapter(load(), adapter, repo)).equal(expected)
    train.zero_trained(trained)
    weights = peft.load_peft_weights(str(tmp_path / "whole"), device="cpu")
    peft.set_peft_model_state_dict(trained, weights)
    assert logits(trained).equal(expected)
    # PEFT takes the other kinds' modules by their names, also where none is named.
    if kind in ("bert_without_pooler", "modernbert"):
        monkeypatch.setattr(train, "whole_modules", lambda *_: None)
        trained, adapter = adapt(tmp_path / "part")
        expected = logits(trained)
        refused = refusal(lambda _: evaluate.load_adapter(load(), adapter, repo), capsys, [])
        assert "neither the base" in refused and "drawn at random" in refused
        train.zero_trained(trained)
        weights = peft.load_peft_weights(str(tmp_path / "part"), device="cpu")
        peft.set_peft_model_state_dict(trained, weights)
        assert not logits(trained).allclose(expected, atol=1e-3)


def test_a_quantised_checkpoint_is_loaded_whole_in_the_dtype_asked_for(
    train: ModuleType, files: Path
) -> None:
    import torch

    for kind in ("mxfp4", "fp8"):
        repo = train.open_repo(str(base_of(files, kind)), "model")
        config = train.read_base_config(repo)
        model = train.load_base(repo, config, "causal", ["a", "b"], torch.float32, "cpu")
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_four_bits_of_an_fp8_checkpoint_spare_the_vision_tower(
    train: ModuleType, files: Path
) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    args = argparse.Namespace(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    repo = train.open_repo(str(base_of(files, "fp8")), "model")
    config = train.read_base_config(repo)
    how = train.build_quantization(args, repo, config, "float32")
    model = train.load_base(repo, config, "causal", ["a", "b"], torch.float32, "cpu", how)
    four = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(four) == 2 * 7 and all("language_model" in name for name in four)
    assert how.bnb_4bit_quant_type == "nf4" and how.bnb_4bit_use_double_quant
    stored = weights_of(base_of(files, "fp8") / "model.safetensors")
    found = model.model.language_model.layers[0].mlp.up_proj.weight
    from bitsandbytes.functional import dequantize_4bit

    whole = next(key for key in stored if key.endswith("layers.0.mlp.up_proj.weight"))
    expected = stored[whole].float() * stored[f"{whole}_scale_inv"]
    difference = dequantize_4bit(found.data, found.quant_state).float() - expected
    assert difference.norm() < 0.15 * expected.norm()


def test_a_classifier_in_four_bits_recomputes_no_activations_unasked(
    train: ModuleType, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[Any] = []

    def keep(_: Any, trainer: Any, *__: Any) -> None:
        trainers.append(trainer)
        raise SystemExit

    monkeypatch.setattr(train, "choose_speed", keep)
    argv = flags_of(files, base_of(files, "qwen3"), tmp_path, *CLASSIFY, "--load_in_4bit")
    with pytest.raises(SystemExit):
        train.main(argv)
    [trainer] = trainers
    assert not trainer.args.activation_checkpointing
    assert not trainer.model.get_base_model().is_activation_checkpointing


def test_flags_that_contradict_the_model_are_refused(
    train: ModuleType, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def says(kind: str, *flags: str) -> str:
        argv = flags_of(files, base_of(files, kind), tmp_path / "out", *flags)
        return refusal(train.main, capsys, argv)

    message = says("mxfp4", "--load_in_4bit")
    assert "stored as mxfp4" in message and "experts" in message and "no linear layers" in message
    assert "--lora_dropout 0" in says("mxfp4", *EXPERTS, "--lora_dropout", "0.2")
    message = says("mxfp4", "--lora_target_parameters", "mlp.experts.up_proj")
    assert "It has: mlp.experts.down_proj, mlp.experts.gate_up_proj" in message
    assert "no such tensor of experts" in says("llama", *EXPERTS)
    assert "--task classify" in says("llama", "--class_weights", "balanced")
    assert all("is an encoder" in says(kind) for kind in ("bert", "roberta", "modernbert"))
    message = says("mistral3", *CLASSIFY)
    assert "cannot be loaded for the task classify" in message and len(message) < 600
    message = says("mistral3", "--lora_target_modules", "patch_conv")
    assert "no such modules" in message
    assert "no linear layer" not in says("gpt_oss", "--router_aux_loss_coef", "nan?")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_base_whose_tokens_see_the_answer_learns_none(
    train: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    import transformers

    base = train.Repo("some/base", "model", None, None)

    def checked(check: Callable[[], None]) -> bool:
        try:
            check()
        except SystemExit:
            assert "Say --task classify" in capsys.readouterr().err
            return False
        return True

    def passes(name: str, **fields: Any) -> bool:
        config = getattr(transformers, f"{name}Config")(**fields)
        return checked(lambda: train.check_encoder(argparse.Namespace(task="causal"), base, config))

    assert not passes("Bert") and not passes("XLMRoberta") and not passes("DebertaV2")
    assert not passes("Gemma3Text", use_bidirectional_attention=True)
    assert passes("Bert", is_decoder=True) and passes("Bart") and passes("GptOss")
    assert passes("Gemma3") and passes("Gemma3Text") and passes("Mistral3") and passes("XLNet")

    def runs(model: Any) -> bool:
        state = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False}
        nothing = argparse.Namespace(autocast=contextlib.nullcontext)
        trainer = argparse.Namespace(model=model, accelerator=nothing, **state)
        return checked(lambda: train.check_causality(trainer, base))

    sizes = {"vocab_size": 40, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 32}
    xlnet = transformers.XLNetConfig(**sizes, initializer_range=0.3)
    assert not runs(transformers.XLNetLMHeadModel(xlnet))
    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
    gpt2 = transformers.GPT2Config(**sizes, initializer_range=0.3)
    assert runs(transformers.GPT2LMHeadModel(gpt2))


@pytest.mark.parametrize(("kind", "most"), [("bert", 512), ("roberta", 513), ("gpt2", 512)])
def test_a_length_beyond_a_bases_positions_is_refused(
    train: ModuleType, files: Path, capsys: pytest.CaptureFixture, kind: str, most: int
) -> None:
    """The tiny RoBERTa has 514 positions and counts from behind its pad token, whose id is 0."""
    repo = train.open_repo(str(base_of(files, kind)), "model")
    config = train.read_base_config(repo)
    train.check_positions(argparse.Namespace(max_length=most), repo, config)
    with pytest.raises(SystemExit):
        train.check_positions(argparse.Namespace(max_length=most + 1), repo, config)
    assert f"Say --max_length {most} or less" in capsys.readouterr().err
    llama = train.open_repo(str(base_of(files, "llama")), "model")
    long = argparse.Namespace(max_length=4096)
    train.check_positions(long, llama, train.read_base_config(llama))


def test_experts_that_four_bits_do_not_touch_are_named(
    train: ModuleType, files: Path, capsys: pytest.CaptureFixture
) -> None:
    args = argparse.Namespace(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    repo = train.open_repo(str(base_of(files, "gpt_oss")), "model")
    train.build_quantization(args, repo, train.read_base_config(repo), "bfloat16")
    said = capsys.readouterr().out
    assert "does not touch the experts" in said and "stay in bfloat16" in said
    assert "% of its weights" in said


@pytest.mark.parametrize(("flags", "coefficient"), [([], 0.0), (["0.3"], 0.3)])
def test_the_routers_auxiliary_loss_is_off_unless_asked_for(
    train: ModuleType, files: Path, tmp_path: Path, flags: list[str], coefficient: float
) -> None:
    base = base_of(files, "gpt_oss")
    more = [part for value in flags for part in ("--router_aux_loss_coef", value)]
    args = train.parse_args(flags_of(files, base, tmp_path, *more))
    config = train.read_base_config(train.open_repo(str(base), "model"))
    assert config.router_aux_loss_coef == 0.9
    settings = train.build_settings(args, config, "cpu", "float32", False, tmp_path)
    assert settings.hub_private_repo is True  # of the Space that trackio makes
    assert settings.router_aux_loss_coef == coefficient


def trl_template(name: str) -> str:
    """A model's own chat template, of which TRL has a copy."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def test_gpt_oss_learns_the_label_in_the_final_channel_alone(
    train: ModuleType, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = shutil.copytree(base_of(files, "mxfp4"), tmp_path / "base")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|channel|>", "<|message|>", "<|return|>"]}
    )
    tokenizer.chat_template = trl_template("gptoss")
    model = AutoModelForCausalLM.from_pretrained(base_of(files, "gpt_oss"))
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    argv = flags_of(files, base, tmp_path / "out", "--max_steps", "1", "--save_steps", "1")
    train.main([*argv, "--max_length", "2048", "--reasoning_effort", "medium"])
    assert "trained on, in the first row: 'hate<|return|>'" in capsys.readouterr().out
    rendering = read_json(tmp_path / "out/contract.json")["rendering"]
    assert rendering["pieces"][-2].endswith("<|start|>assistant<|channel|>final<|message|>")
    assert rendering["pieces"][-1] == "<|return|>"
    head = rendering["pieces"][0]
    assert f"Current date: {rendering['date']}" in head and "Reasoning: medium" in head


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("llama3", "<|eot_id|>"),
        ("qwen3", "<|im_end|>"),
        ("gemma3", "<end_of_turn>"),
        ("phi3", "<|end|>"),
        ("qwen2_5", "<|im_end|>"),
    ],
)
def test_templates_of_their_makers_put_only_the_answer_and_its_end_behind_the_prompt(
    train: ModuleType, files: Path, name: str, end: str
) -> None:
    """None of them has a {% generation %} block that a trainer could find the answer by."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_of(files, "llama"))
    tokenizer.chat_template, tokenizer.bos_token = trl_template(name), "<|start|>"
    assert "generation %}" not in tokenizer.chat_template
    for roles in (["user"], ["system", "user"]):
        scaffold = train.build_scaffold(tokenizer, roles, "2026-01-31", "low")
        assert (
            scaffold.pieces[-1].strip().startswith(end) and len(scaffold.pieces) == len(roles) + 2
        )


# In the manner of Ministral's: a system prompt of its own with the day, strict roles.
STRICT_TEMPLATE = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set said = messages[1:] %}
{{- '[SYSTEM]' + messages[0].content + '[/SYSTEM]' }}{% else %}{% set said = messages %}
{{- '[SYSTEM]Today is ' + strftime_now('%Y-%m-%d') + '.[/SYSTEM]' }}{% endif %}
{%- if reasoning_effort == 'low' and strict %}{{ raise_exception('effort must be none or high') }}
{%- endif %}{% for one in said %}{% if (one.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{%- if one.role == 'user' %}{{ '[INST]' + one.content + '[/INST]' }}
{%- else %}{{ one.content + eos_token }}{% endif %}{% endfor %}"""


def test_a_strict_template_is_rendered_with_its_day_or_refused_in_a_sentence(
    train: ModuleType, files: Path, capsys: pytest.CaptureFixture
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_of(files, "llama"))
    tokenizer.bos_token = "<|start|>"
    tokenizer.chat_template = STRICT_TEMPLATE.replace(" and strict", " and false")
    pieces = train.build_scaffold(tokenizer, ["user"], "2026-01-31", "low").pieces
    head = "<|start|>[SYSTEM]Today is 2026-01-31.[/SYSTEM][INST]"
    assert pieces == (head, "[/INST]", "<|end|>")
    pieces = train.build_scaffold(tokenizer, ["system", "user"], "2026-01-31", "low").pieces
    assert pieces == ("<|start|>[SYSTEM]", "[/SYSTEM][INST]", "[/INST]", "<|end|>")
    tokenizer.chat_template = STRICT_TEMPLATE.replace(" and strict", "")
    with pytest.raises(SystemExit):
        train.build_scaffold(tokenizer, ["user"], "2026-01-31", "low")
    message = capsys.readouterr().err
    assert "refuses the prompt (reasoning effort low): effort must be none or high" in message


# --- four bits and their optimizer ------------------------------------------------------------


def test_four_bits_on_a_gpu_get_the_paged_optimizer_and_keep_it(train: ModuleType) -> None:
    def chosen(*flags: str, device: str = "cuda", earlier: Any = None) -> str | None:
        return train.choose_optimizer(train.parse_args([*flags]), device, earlier)

    assert chosen("--load_in_4bit") == "paged_adamw_8bit"
    assert chosen("--load_in_4bit", device="cpu") is None and chosen() is None
    assert chosen("--load_in_4bit", "--optim", "adamw_torch") is None
    began = {"training": {"optimizer": "paged_adamw_8bit"}}
    assert chosen("--load_in_4bit", device="cpu", earlier=began) == "paged_adamw_8bit"
    assert chosen("--load_in_4bit", earlier={"training": {}}) is None


@pytest.mark.gpu
def test_a_four_bit_run_on_a_gpu_is_paged(train: ModuleType, files: Path, tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: on a CPU bitsandbytes pages nothing")
    argv = flags_of(files, base_of(files, "llama"), tmp_path / "out", "--load_in_4bit")
    train.main(argv)
    assert read_json(tmp_path / "out/contract.json")["training"]["optimizer"] == "paged_adamw_8bit"
    again = interrupted(tmp_path / "out", tmp_path / "again")
    train.main([str(again) if word == str(tmp_path / "out") else word for word in argv])
    assert losses(again) == pytest.approx(losses(tmp_path / "out"), rel=1e-3)


# --- class weights ----------------------------------------------------------------------------


def test_class_weights_are_those_of_the_labels(
    train: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"label": name} for name in ["normal"] * 6 + ["hate"] * 2]
    data = train.Data(rows, [], ["normal", "hate"], "hate", [], None, None, {})

    def weights(text: str) -> Any:
        return train.class_weights(train.parse_args(["--class_weights", text]), data)

    assert weights("none") is None
    assert weights("balanced") == {"normal": 8 / 12, "hate": 8 / 4}
    assert weights("hate=3") == {"normal": 1.0, "hate": 3.0}
    assert weights("hate=2.5, normal=.5") == {"normal": 0.5, "hate": 2.5}
    for wrong in ("spam=2", "hate=0", "hate=-1", "hate=nan", "hate", "balance"):
        with pytest.raises(SystemExit):
            weights(wrong)
        assert "The labels are: normal, hate" in capsys.readouterr().err
    data.train = rows[:6]
    with pytest.raises(SystemExit):
        weights("balanced")
    assert "no training post is labelled hate" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bert", "gpt2", "modernbert", "qwen3"])
def test_the_weighted_loss_is_the_mean_of_weighted_posts(
    train: ModuleType, files: Path, kind: str
) -> None:
    import torch

    repo = train.open_repo(str(base_of(files, kind)), "model")
    config = train.read_base_config(repo)
    model = train.load_base(repo, config, "classify", ["a", "b", "c"], torch.float32, "cpu").eval()
    model.config.pad_token_id = 0
    ids, labels = torch.randint(3, 200, (5, 7)), torch.tensor([0, 1, 2, 2, 2])
    plain = torch.nn.functional.cross_entropy(model(ids).logits, labels, reduction="none")
    train.weigh_labels(model, [0.5, 1.0, 4.0])
    found = model(input_ids=ids, labels=labels)["loss"].item()
    expected = (plain * torch.tensor([0.5, 1.0, 4.0, 4.0, 4.0])).mean().item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert model(input_ids=ids).get("loss") is None


def test_class_weights_are_recorded_and_bind_a_resume(
    train: ModuleType, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    argv = flags_of(files, base_of(files, "bert", False), out, *CLASSIFY)
    train.main([*argv, "--class_weights", "hate=3"])
    training = read_json(out / "contract.json")["training"]
    assert training["class_weights"] == {"normal": 1.0, "hate": 3.0}
    weighted = losses(out)
    message = refusal(train.main, capsys, [*argv, "--class_weights", "hate=2"])
    assert "class_weights" in message and "hate=3" in message
    plain = tmp_path / "plain"
    train.main([str(plain) if word == str(out) else word for word in argv])
    assert losses(plain)[0] != weighted[0]


# --- presets ----------------------------------------------------------------------------------


def test_presets_of_this_projects_models(train: ModuleType) -> None:
    args = train.parse_args(["--preset", "gpt2_twitter"])
    found = args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size
    assert found == (2.5e-5, 1, 8) and args.gradient_accumulation_steps == 1
    assert (args.warmup_steps, args.weight_decay, args.task) == (0.1, 0.01, "classify")
    assert args.dataset_repo == "{you}/hsd-twitter" and args.model_name_or_path.endswith("gpt2")
    args = train.parse_args(["--preset", "ministral_qlora"])
    assert args.model_name_or_path == "mistralai/Ministral-3-3B-Instruct-2512"
    assert args.load_in_4bit and args.lr_scheduler_type == "cosine" and args.warmup_steps > 0
    assert args.report_to == ["wandb"] and args.task == "causal"
    args = train.parse_args(["--preset", "first_run"])
    assert "135M" in args.model_name_or_path and args.max_steps == 100
    # Flags of a preset's own data give way to the user's.
    args = train.parse_args(["--preset", "gpt2_twitter", "--train_file", "posts.jsonl"])
    train.check_training_arguments(args)
    assert args.dataset_repo is None


def test_a_presets_dataset_lies_in_the_users_namespace(
    train: ModuleType, alice: Hub, capsys: pytest.CaptureFixture
) -> None:
    message = refusal(train.main, capsys, ["--preset", "gpt2_twitter", "--report_to", "none"])
    assert "alice/hsd-twitter" in message and "no such repo" in message


# --- forms of data ----------------------------------------------------------------------------

POSTS = [
    {"text": post["text"], "label": post["label"], "target_groups": [post["group"]]}
    for post in sorted(tiny.made_posts()[:60], key=lambda post: post["label"])
]
# As many of each label in every part.
POSTS = [post for pair in zip(POSTS[:20], POSTS[::-1][:20], strict=True) for post in pair]
SYSTEM = {"role": "system", "content": "You label posts."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": f'Is this hate speech?\n\nPost: "{text}"\nAnswer:'}


def said(answer: str) -> dict[str, str]:
    return {"role": "assistant", "content": answer}


def as_messages(post: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [SYSTEM, user(post["text"]), said(post["label"])]}


def as_lists(post: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": [user(post["text"])], "completion": [said(f"Label: {post['label']}.")]}


def as_strings(post: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": user(post["text"])["content"], "completion": f" {post['label']}"}


def as_reasons(post: dict[str, Any]) -> dict[str, Any]:
    reason = f"{post['label']}\nBecause it is about {post['target_groups'][0]}, {post['text'][:9]}"
    return {"prompt": user(post["text"])["content"], "completion": reason}


def as_json(post: dict[str, Any]) -> dict[str, Any]:
    answer = json.dumps({"label": post["label"], "rationale": post["text"][::-1]})
    return {"prompt": [user(post["text"])], "completion": [said(answer)]}


def as_post(post: dict[str, Any]) -> dict[str, Any]:
    return dict(post)


FORMS: dict[str, tuple[Callable, str]] = {
    "messages": (as_messages, "{label}"),
    "lists": (as_lists, "Label: {label}."),
    "strings": (as_strings, "{label}"),
    "reasons": (as_reasons, "{label}\nBecause it is about {rationale}"),
    "json": (as_json, '{"label": "{label}", "rationale": "{rationale}"}'),
    "post": (as_post, "{label}"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_of_each_form_is_trained_on_and_evaluated(
    train: ModuleType,
    evaluate: Callable,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    name: str,
) -> None:
    form, answer = FORMS[name]
    rows = [form(post) for post in POSTS]
    tiny.write_jsonl(tmp_path / "train.jsonl", rows[:24])
    tiny.write_jsonl(tmp_path / "test.jsonl", rows[24:])
    tiny.write_jsonl(tmp_path / "posts.jsonl", POSTS[24:])
    base, out = base_of(files, "llama"), tmp_path / "out"
    argv = ["--train_file", str(tmp_path / "train.jsonl"), "--model_name_or_path", str(base)]
    train.main([*argv, "--output_dir", str(out), *RUN, "--max_length", "700"])
    printed = capsys.readouterr().out
    assert "labels: 12 normal, 12 hate (positive: hate)" in printed
    # A rationale may quote the post.
    ending = ": 'hate ... <|end|>'\n" if "{rationale}" in answer else "<|end|>'\n"
    (line,) = [line for line in printed.splitlines(True) if line.startswith("trained on, in")]
    assert line.endswith(ending)
    contract = read_json(out / "contract.json")
    assert contract["labels"] == ["normal", "hate"] and contract["positive_label"] == "hate"
    prompt = contract["prompt"]
    assert prompt["answer"] == answer
    if name != "post":
        assert prompt["user"] == 'Is this hate speech?\n\nPost: "{text}"\nAnswer:'
        assert prompt["system"] == ("You label posts." if name == "messages" else "")
    # Asked by the rows' own prompts, or by the learned one around a post: the same.
    given = ["--adapter", str(out), "--model_name_or_path", str(base)]
    scores = []
    for file in ("test", "posts"):
        folder = tmp_path / file
        argv = [*given, "--test_file", str(tmp_path / f"{file}.jsonl")]
        evaluate([*argv, "--output_dir", str(folder)])
        report = read_json(next(folder.rglob("metrics.json")))
        overall = report["strategies"][0]["overall"]
        assert overall["labels"] == {"normal": 8, "hate": 8}
        scores.append(overall["roc_auc"]["value"])
    assert scores[0] == scores[1]
    assert post_free(out / "contract.json")


def post_free(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    return not [post for post in POSTS if post["text"] in text]


@pytest.mark.parametrize("name", ["messages", "strings", "post"])
def test_a_hub_dataset_of_each_form_goes_through_the_chain(
    train: ModuleType,
    evaluate: Callable,
    alice: Hub,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    form, _ = FORMS[name]
    rows = [form(post) for post in POSTS]
    repo = f"alice/forms-{name}"
    api = HfApi(endpoint=alice.endpoint, token=alice.token)
    api.create_repo(repo, repo_type="dataset", private=True)
    for split, part in (("train", rows[:20]), ("validation", rows[20:28]), ("test", rows[28:])):
        file = tiny.write_jsonl(tmp_path / f"{split}.jsonl", part)
        api.upload_file(
            path_or_fileobj=file, path_in_repo=f"{split}.jsonl", repo_id=repo, repo_type="dataset"
        )
    adapter, base = f"alice/forms-{name}-lora", str(base_of(files, "llama"))
    argv = ["--dataset_repo", repo, "--model_name_or_path", base, "--hub_model_id", adapter, *RUN]
    train.main(argv)
    assert f"{repo} (default): 20 rows of" in capsys.readouterr().out
    evaluate(["--adapter", adapter, "--model_name_or_path", base])
    report = read_json(next(tmp_path.rglob("metrics.json")))
    assert report["strategies"][0]["overall"]["n"] == 12
    baselines = {one["name"]: one["overall"] for one in report["strategies"]}
    assert baselines["tfidf_lr"] is not None
    train.main(argv)
    assert "nothing to do" in capsys.readouterr().out
    assert post_free(alice.repo_folder(adapter) / "contract.json")


def test_a_classifier_of_three_labels_learns_them_from_its_rows(
    train: ModuleType,
    evaluate: Callable,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    kinds = ["neither", "offensive", "hateful"]
    rows = [{"text": post["text"], "label": kinds[number % 3]} for number, post in enumerate(POSTS)]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    base, out = base_of(files, "bert", False), tmp_path / "out"
    argv = ["--train_file", str(file), "--model_name_or_path", str(base)]
    argv += ["--output_dir", str(out), *RUN, *CLASSIFY]
    message = refusal(train.main, capsys, argv)
    assert "are hateful, neither, offensive, and 'hate' is none of them. Say which" in message
    argv += ["--positive_label", "hateful", "--class_weights", "balanced"]
    argv += ["--validation_file", str(file), "--save_steps", str(STEPS), "--logging_steps", "99"]
    train.main(argv)
    contract = read_json(out / "contract.json")
    assert contract["labels"] == ["hateful", "neither", "offensive"]
    given = ["--adapter", str(out), "--model_name_or_path", str(base)]
    evaluate([*given, "--test_file", str(file)])
    printed = capsys.readouterr().out
    assert "Each label against all others" in printed
    overall = read_json(next((out / "eval").rglob("metrics.json")))["strategies"][0]["overall"]
    assert set(overall["per_label"]) == {*kinds}
    hits = sum(one["recall"]["value"] * one["n"] for one in overall["per_label"].values())
    assert hits / overall["n"] == pytest.approx(overall["accuracy"]["value"])
    weighted = sum((one["f1"]["value"] or 0) * one["n"] for one in overall["per_label"].values())
    assert weighted / overall["n"] == pytest.approx(overall["f1_weighted"]["value"])
    # The trainer's own evaluation of the same posts, and the loss of a run that logs no step.
    logged = read_json(out / "all_results.json")
    for name in ("f1_macro", "f1_weighted"):
        assert logged[f"eval_{name}"] == pytest.approx(overall[name]["value"])
    for label, one in overall["per_label"].items():
        assert logged[f"eval_f1_{label}"] == pytest.approx(one["f1"]["value"])
    log = (out / "training.log").read_text(encoding="utf-8")
    assert "macro F1 0." in log and "F1 of hateful 0." in log
    assert logged["train_loss"] == losses(out)[-1] > 0


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "hate"} for role in roles]}


@pytest.mark.parametrize(
    ("rows", "flags", "says"),
    [
        ([{"tweet": "a", "class": 1}], [], "it has class, tweet. A row is one of: `messages`"),
        ([{"prompt": "a"}], [], "needs `text` and `label`, or a prompt with its answer"),
        ([3], [], "it is no object"),
        ([chat("user", "assistant") | {"text": "a \ud83d"}], [], "line 1 is no valid Unicode"),
        ([{"text": "a", "label": "\ud83d"}], [], "'\\ud83d' is half a character"),
        ([chat("user", "assistant", "user", "assistant")], [], "nothing before them but perhaps"),
        ([{"prompt": ["a"], "completion": "hate"}], [], "must be a string"),
        ([{"prompt": "a", "completion": 1}], [], "must be a string"),
        ([chat("user", "assistant"), {"text": "a", "label": "hate"}], [], "two forms"),
        (
            [{"prompt": str(n), "completion": f"well {n} or {n * n}"} for n in range(30)],
            [],
            "not all begin with one of the labels normal, hate",
        ),
        (
            [{"prompt": "a", "completion": "yes"}, {"prompt": "b", "completion": "no"}],
            [],
            "are no, yes, and 'hate' is none of them. Say which of them bias is to be measured "
            "for, for example --positive_label yes.",
        ),
        (
            [{"prompt": "a", "completion": "hate"}, {"prompt": "b", "completion": "hatee"}],
            [],
            "name no label. The labels are: normal, hate. Correct these answers, or train with the",
        ),
        ([{"text": "a", "label": "hate"}], ["--labels", "hate"], "give two labels or more"),
        (
            [{"prompt": "a", "completion": "hate", "label": "normal"}],
            [],
            "is labelled normal, and its answer says hate",
        ),
        (
            [{"text": "a", "label": "hate"}, {"text": "a", "label": "odd"}],
            [],
            "unknown labels ['odd']",
        ),
        (
            [chat("system", "user", "assistant"), chat("user", "assistant")],
            [],
            "different system messages",
        ),
    ],
)
def test_unclear_data_ends_with_what_to_do(
    train: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    rows: list[Any],
    flags: list[str],
    says: str,
) -> None:
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    argv = ["--train_file", str(file), "--output_dir", str(tmp_path / "out"), *flags]
    assert says in refusal(train.main, capsys, argv)
    assert not (tmp_path / "out").exists()


def test_a_few_posts_that_begin_alike_do_not_become_a_prompt(train: ModuleType) -> None:
    """The learned prompt is published with the adapter: it must hold no post."""

    def learn(texts: list[str], **more: str) -> str:
        rows = [{"prompt": [{"role": "user", "content": text}], **more} for text in texts]
        return train.learn_prompt(rows)["user"]

    secret = "my neighbour wrote this"
    assert learn([f"{secret} {number}" for number in range(9)]) == "{text}"
    assert learn([secret] * 30) == "{text}"
    assert learn([f"Post: {number}?" for number in range(10)]) == "Post: {text}?"
    lines = [f"Post:\n{number}\nHate?" for number in range(10)]
    assert learn(lines) == "Post:\n{text}\nHate?"
    assert learn(["A b C"], text="b") == "A {text} C"
    assert learn([f"{{text}} {number}" for number in range(10)]) == "{text}"
    answers = [f"{label}: {secret}" for label in ("hate", "normal")]
    assert train.learn_answer(answers, ["normal", "hate"])[0] == "{label}: {rationale}"


def test_labels_of_the_user_beat_the_usual_ones(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"text": str(number), "label": number % 3} for number in range(9)]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    argv = ["--train_file", str(file), "--labels", "clean", "rude", "vile"]
    data = train.read_local_data(train.parse_args([*argv, "--positive_label", "vile"]))
    assert [row["label"] for row in data.train[:3]] == data.labels == ["clean", "rude", "vile"]
    assert data.prompt["user"].count("clean or rude or vile") == 1
    assert data.positive_label == "vile"
    assert "3 clean, 3 rude, 3 vile (positive: vile)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "values", "names"),
    [
        (["1", "2"], [1, 2, "2", 0], ["1", "2", "2", "0"]),
        (["1", "0"], [1, 0, 1.0, 0.0, True], ["1", "0", "1", "0", "1"]),
        (["-1", "1"], [-1, 1, 0], ["-1", "1", "0"]),
        (
            ["normal", "hate"],
            [0, "1", 1.0, False, True],
            ["normal", "hate", "hate", "normal", "hate"],
        ),
        (["true", "false"], [True, False, "true"], ["true", "false", "true"]),
        (["not hate", "hate"], ["hate", 0, 2.0, 0.5], ["hate", "not hate", "2", "0.5"]),
    ],
)
def test_a_value_is_the_label_of_its_name_before_it_is_a_place(
    train: ModuleType, labels: list[str], values: list[Any], names: list[str]
) -> None:
    assert [train.label_name(value, labels) for value in values] == names


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        (["not hate", "hate"], ["not hate", "hate"]),
        (["no, none", "hate"], ["no, none", "hate"]),
        (["normal,", "hate"], ["normal", "hate"]),
        (["not hate, hate"], ["not hate", "hate"]),
        (["normal,hate"], ["normal", "hate"]),
        (["normal hate"], ["normal", "hate"]),
    ],
)
def test_a_label_may_hold_a_space_or_a_comma(
    train: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    labels: list[str],
) -> None:
    assert train.parse_args(["--labels", *given]).labels == labels
    file = tmp_path / "flags.json"
    for written in [given] if len(given) > 1 else [given, given[0]]:
        file.write_text(json.dumps({"labels": written}))
        assert train.parse_args(["--config_file", str(file)]).labels == labels
    if len(given) == 1:
        monkeypatch.setenv("HSD_LABELS", given[0])
        assert train.parse_args([]).labels == labels
    # Of any other list each word is one.
    args = train.parse_args(["--lora_target_modules", "q_proj, k_proj", "v_proj"])
    assert args.lora_target_modules == ["q_proj", "k_proj", "v_proj"]


def test_labels_that_are_numbers_are_neither_shifted_nor_inverted(
    train: ModuleType, tmp_path: Path
) -> None:
    rows = [{"text": str(number), "label": number % 2} for number in range(5)]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    argv = ["--train_file", str(file), "--labels", "1", "0", "--positive_label", "1"]
    data = train.read_local_data(train.parse_args(argv))
    assert [row["label"] for row in data.train] == ["0", "1", "0", "1", "0"]


def test_answers_of_two_words_are_labels_where_told(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"prompt": str(n), "completion": ("not hate", "hate")[n % 2]} for n in range(12)]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    argv = ["--train_file", str(file), "--output_dir", str(tmp_path / "out")]
    assert "--labels NAME NAME --positive_label NAME" in refusal(train.main, capsys, argv)
    data = train.read_local_data(train.parse_args([*argv, "--labels", "not hate", "hate"]))
    assert [row["label"] for row in data.train[:2]] == data.labels == ["not hate", "hate"]
    assert data.prompt["answer"] == "{label}"


def test_a_post_of_a_hub_dataset_without_a_label_is_named(
    train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["fine", "bad"])})
    rows = {"text": ["a", "b", "c"], "label": [1, 0, None]}
    for absent in (None, -1):
        folder = tmp_path / f"data{absent}"
        rows["label"][2] = absent
        Dataset.from_dict(rows, features).to_parquet(folder / "train.parquet")
        argv = ["--dataset_repo", str(folder), "--output_dir", str(tmp_path / "out")]
        message = refusal(train.main, capsys, argv)
        assert "(default/train) row 3 needs `text` and `label`" in message
