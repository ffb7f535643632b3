"""Speed and memory of every part, compared with peers in the same run on the same machine.

    python bench/speed.py                  # all sections
    python bench/speed.py moe llm --runs 9 # some of them
    python bench/speed.py moe --publish    # into bench/, over the results in the repository

Each case is a race. After a warm-up the contestants take turns, so whatever slows the machine slows
all of them. Printed is each one's median time and its ratio to ours (2.0: ours takes half as long);
`out/bench/<machine>-<precision>.json` keeps every sample, and for each section the versions and the
commit that it was measured with.

    moe        forward and backward of the sparse block; peers: a dense MLP of the same active work,
               the original's loop, transformers' Mixtral block, and our block with more experts
    scale      the sparse block with more and more images; attention with and without a window
    decode     the first token, and each next one; peers: transformers, llama.cpp, memory bandwidth
    llm        forward and backward of the language model; peer: transformers' Mistral
    train      a training step of CuMo at half the size; peer: transformers' parts. A step of the
               miniature; peer: one large matrix product (MFU)
    start      seconds from the command to the first word about a picture
    load       from_pretrained; peer: transformers
    memory     the peak memory of a training; peer: its estimate (engine/memory.py)
    tokenizer  seconds a megabyte; peers: the reference libraries

All peers run at their best setting: bfloat16 where the hardware has it, fused attention, grouped
products, and torch.compile (except the loop, which gets slower). "eager" is ours without it.
"""

import argparse
import gc
import importlib.util
import json
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder, whose tokenizers.py transformers would import
import train
from bench.peers import DEVICE, DTYPE, DenseMLP, LoopMoE, Process
from data import flags
from data.hub import find_model
from data.weights import write_json, write_tensors
from engine import memory
from engine.decode import fast_step, huge_pages
from engine.quant import quantize
from engine.rate import product_rate
from llm import LLM, LLMConfig, attention_mask, flex_attend
from mlp_moe import SparseMoE
from runs.pictures import draw_ratios
from runs.results import commit, cpu

# name -> (dim, hidden, out, images, tokens an image, activation)
MOE_SHAPES = {
    "CLIP-L": (1024, 4096, 1024, 16, 577, "quick_gelu"),
    "CuMo-7B's connector": (2048, 4096, 4096, 4, 576, "gelu"),
    "miniature CLIP": (192, 768, 192, 16, 65, "quick_gelu"),
}


# ------------------------------------------------------------------------------ racing


def race(contestants, runs):
    """{name: function} -> {name: [seconds, ...]}: one warm-up each, then `runs` turns."""
    seconds = {name: [] for name in contestants}
    for turn in range(runs + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def row(section, case, seconds, **more):
    """A row of the table: each median, and its ratio to the first one, which is ours."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = next(iter(medians.values()))
    ratios = {name: round(value / ours, 3) for name, value in medians.items()}
    cells = (f"{name} {medians[name] * 1e3:.1f} ms ({ratios[name]:.2f})" for name in seconds)
    print(f"{section:7} {case:34} " + "; ".join(cells), flush=True)
    spread = {name: [min(values), max(values)] for name, values in seconds.items()}
    return {"section": section, "case": case, "medians": medians, "ratios": ratios,
            "spread": spread, "seconds": seconds} | more  # fmt: skip


def forward_backward(module, x):
    """A function that runs both passes of module(x) and drops the gradients."""

    def run():
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))
        for p in [*module.parameters(), x]:
            p.grad = None

    return run


# ------------------------------------------------------------------------------ sections


def moe(runs):
    rows = []
    for case, (dim, hidden, out, images, tokens, act) in MOE_SHAPES.items():
        x = torch.randn(images, tokens, dim, device=DEVICE, dtype=DTYPE, requires_grad=True)

        def block(num_experts=4, dim=dim, hidden=hidden, out=out, act=act):
            return SparseMoE(dim, hidden, num_experts, 2, out, act).to(DEVICE, DTYPE)

        ours, dense = block(), DenseMLP(dim, 2 * hidden, out, act).to(DEVICE, DTYPE)
        modules = {"ours": torch.compile(ours), "ours, eager": ours,
                   "dense, same work": torch.compile(dense),
                   "loop": LoopMoE(dim, hidden, out, act).to(DEVICE, DTYPE)}  # fmt: skip
        contestants = {name: forward_backward(module, x) for name, module in modules.items()}
        rows.append(row("moe", f"{case}, {images} images", race(contestants, runs)))
        contestants = {f"{E} experts": forward_backward(torch.compile(block(E)), x)
                       for E in (4, 8, 16, 32)}  # fmt: skip
        rows.append(row("moe", f"{case}, more experts", race(contestants, runs)))
        torch.compiler.reset()  # else the next shape would compile with dynamic sizes
    rows.append(mixtral_block(runs))
    return rows


def scale(runs):
    """Forward and backward of CLIP-L's sparse block: time per image, however many there are."""
    dim, hidden, out, _, tokens, act = MOE_SHAPES["CLIP-L"]
    block = torch.compile(SparseMoE(dim, hidden, 4, 2, out, act).to(DEVICE, DTYPE), dynamic=True)
    contestants = {}
    for images in (16, 8, 4, 2, 1):
        x = torch.randn(images, tokens, dim, device=DEVICE, dtype=DTYPE, requires_grad=True)
        contestants[f"{images} images"] = forward_backward(block, x)
    seconds = race(contestants, runs)
    result = row("scale", "CLIP-L's block, images", seconds)
    a_image = {n: t / int(n.split()[0]) for n, t in result["medians"].items()}
    print("        ms an image: " + "; ".join(f"{n} {t * 1e3:.1f}" for n, t in a_image.items()))
    return [result | {"seconds_an_image": a_image}, attention(runs)]


@torch.no_grad()
def attention(runs, tokens=32768, window=4096, heads=2, head_dim=64):
    """FlexAttention forward with the block masks of llm.py: 32k tokens, a window of 4k or none."""
    shape = (1, heads, tokens, head_dim)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(3))
    places = torch.stack((torch.arange(tokens), torch.ones(tokens, dtype=torch.int64)))
    places, contestants = places[None].to(DEVICE), {}
    for name, w in (("window", window), ("full", None)):
        mask = attention_mask(places, places, w)
        contestants[name] = lambda m=mask: flex_attend(q, k, v, m)
    return row("scale", f"attention, {tokens} tokens", race(contestants, runs))


def mixtral_block(runs, dim=1024, hidden=3584, tokens=1024):
    """The block with 8 SwiGLU experts; peer: transformers' block for Mixtral."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=dim, intermediate_size=hidden, num_local_experts=8,
                           num_experts_per_tok=2)  # fmt: skip
    config._experts_implementation = "grouped_mm"  # twice as fast as its loop
    theirs = MixtralSparseMoeBlock(config).to(DEVICE, DTYPE)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.02)
    ours = SparseMoE(dim, hidden, 8, 2, act="silu", gated=True, bias=False).to(DEVICE, DTYPE)
    x = torch.randn(1, tokens, dim, device=DEVICE, dtype=DTYPE, requires_grad=True)
    contestants = {"ours": forward_backward(torch.compile(ours), x),
                   "ours, eager": forward_backward(ours, x),
                   "transformers": forward_backward(torch.compile(theirs), x)}  # fmt: skip
    return row("moe", f"Mixtral's block, {tokens} tokens", race(contestants, runs))


def llm(runs, layers=6, rows=2, tokens=512):
    """SmolLM2-135M's shape with a fifth of its layers, head and loss included."""
    import transformers

    cfg = LLMConfig(49152, 576, 1536, layers, 9, 3, tie_embeddings=True)
    ours = LLM(cfg).to(DEVICE, DTYPE).train()
    config = transformers.MistralConfig(**cfg.to_hf() | {"sliding_window": None})
    theirs = transformers.MistralForCausalLM._from_config(config, attn_implementation="sdpa")
    theirs = theirs.to(DEVICE, DTYPE).train()
    for block in (*ours.model.layers, *theirs.model.layers):
        block.compile()
    ids = torch.randint(cfg.vocab_size, (rows, tokens), device=DEVICE)

    def step(model, loss):
        def run():
            loss().backward()
            model.zero_grad(set_to_none=True)

        return run

    contestants = {
        "ours": step(ours, lambda: ours.loss(ours.hidden(ours.embed(ids))[0], ids)),
        "transformers": step(theirs, lambda: theirs(ids, labels=ids, use_cache=False).loss),
    }
    return [row("llm", f"{layers} layers, {rows} x {tokens} tokens", race(contestants, runs))]


def training(stage=3, **options):
    """(a Trainer of the miniature, its batches, its temporary folder)"""
    place = tempfile.TemporaryDirectory()
    given = {"out": place.name, "init": str(ROOT / "out" / "stage2")} | options
    cfg = train.resolve(given, stage)
    train.choose_precision(cfg)
    trainer = train.Trainer(cfg)
    trainer.model.train()
    return trainer, trainer.batches(), place


def train_(runs):
    if not (ROOT / "out" / "stage2" / "config.json").is_file():
        raise ValueError("section train starts from out/stage2: run `python train.py --stage 2`")
    return [half_size(runs), miniature(runs)]


def half_size(runs):
    """A step of CuMo at half the size; peer: one built from transformers (bench/half_size.py)."""
    seconds, peaks = {"ours": [], "transformers": []}, {}
    for _ in range(2):  # one process at a time, because 24 GB do not hold both
        for name in seconds:
            step = Process("half_size.py", name)
            steps = [step() for _ in range(3 + (runs + 1) // 2)]
            step.close()
            seconds[name] += [took for took, _ in steps[3:]]  # the first steps touch fresh memory
            peaks[name] = max(gb for _, gb in steps)
    result = row("train", "half size, one step", seconds, peak_memory_gb=peaks)
    print("        peak memory " + "; ".join(f"{n} {gb:.1f} GB" for n, gb in peaks.items()))
    return result


def miniature(runs):
    """Stage 3 of the miniature; peer: a large matrix product of as many operations."""
    trainer, batches, place = training()
    dtype = torch.bfloat16 if trainer.cfg.bf16 else torch.float32
    seconds, products, shares, speeds = [], [], [], []
    trainer.train_step([next(batches)])
    for _ in range(runs):
        before = trainer.seconds
        metrics = trainer.train_step([next(batches)])
        took, rate = trainer.seconds - before, product_rate(DEVICE, dtype)
        work = metrics["mfu"] * trainer.rates["mfu"] * took
        seconds.append(took)
        products.append(work / rate)
        shares.append(work / took / rate)
        speeds.append(metrics["tokens_per_s"])
    place.cleanup()
    more = {"mfu": statistics.median(shares), "tokens_per_s": statistics.median(speeds),
            "peak_memory_gb": round(memory.peak_memory(DEVICE) / memory.GB, 2)}  # fmt: skip
    result = row("train", "miniature, stage 3, one step",
                 {"ours": seconds, "one large product": products}, **more)  # fmt: skip
    print(f"        MFU {more['mfu']:.0%}, {more['tokens_per_s']:.0f} tokens/s")
    return result


def load(runs, layers=12):
    """A language model of 340 MB in bfloat16, four shards, from the file cache."""
    import transformers

    cfg = LLMConfig(32000, 1024, 4096, layers, 16, 4)
    with tempfile.TemporaryDirectory() as folder:
        model = LLM(cfg).to(torch.bfloat16)
        write_tensors(folder, model.public_state_dict(), max_shard_bytes=2**27)
        write_json(pathlib.Path(folder) / "config.json", cfg.to_hf())
        del model
        gc.collect()

        def read(model):  # transformers maps the file; touching each page loads it
            return [p.flatten()[::2048].sum().item() for p in model.parameters()]

        contestants = {
            "ours": lambda: read(LLM.from_pretrained(folder, torch.bfloat16, DEVICE)),
            "transformers": lambda: read(
                transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.bfloat16, low_cpu_mem_usage=True
                ).to(DEVICE)
            ),
        }
        return [row("load", f"{layers} layers, bfloat16", race(contestants, runs))]


def peak_memory(runs):
    """Peak memory of a training in a process of its own: of the card, or in main memory."""
    rows = []
    for name, options in {
        "float32": "",
        "recomputing": "--recompute all",
        "bf16-sr, bf16 moments": "--weights bf16-sr --moments bf16",
    }.items():
        code = (
            "import sys, torch, train; from bench import speed; from engine import memory;"
            "from data.flags import parse; cfg, given = parse(train.TrainConfig, sys.argv[1:]);"
            "given = {k: getattr(cfg, k) for k in given};"
            "trainer, batches, place = speed.training(**given);"
            "plan = train.choose_precision(trainer.cfg);"
            "[trainer.train_step([next(batches)]) for _ in range(3)];"
            "print(memory.peak_memory(trainer.cfg.device), memory.total(plan))"
        )
        words = [sys.executable, "-c", code, "--rows", "16", *options.split()]
        said = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        peak, expected = map(int, said.split()[-2:])
        print(f"memory  {name:34} peak {peak / 2**20:.0f} MB, estimate {expected / 2**20:.0f} MB "
              f"({expected / peak:.2f})")  # fmt: skip
        rows.append({"section": "memory", "case": name, "peak": peak, "estimate": expected})
    return rows


def start(runs):
    """From the command to the answer's first word, imports included: the miniature, cat.jpg."""
    words = [sys.executable, "sample.py", "--image", "cat.jpg", "--ask", "Where is the cat?"]
    find_model(ROOT / "out")

    def first_word():
        with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout.read(1), "no answer"
            process.kill()

    return [row("start", "sample.py --image cat.jpg", race({"ours": first_word}, runs))]


def bandwidth(x):
    """Bytes a second at which all cores together read x to sum it: the median of five."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        x.sum().item()
        seconds.append(time.perf_counter() - begin)
    return x.nbytes / statistics.median(seconds)


def decode(runs):
    """SmolLM2-135M, batch 1, a prompt of 32 tokens: seconds to the first token and a next one."""
    rows = []
    for precision in ("float32", str(DTYPE)[6:], "int8"):
        if not any(precision in r["case"] for r in rows):
            rows += decode_at(precision, runs)
    return rows + [many_answers(runs)]


def smollm2(precision="float32"):
    folder = ROOT / "weights" / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        raise ValueError("section decode asks SmolLM2: run runs/smollm2.sh")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    llm = LLM.from_pretrained(folder, dtype, DEVICE).eval()
    return folder, dtype, quantize(llm) if precision == "int8" else llm


def timed(run):
    def seconds(n):
        start = time.perf_counter()
        run(n)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return seconds


def decode_at(precision, runs, tokens=96):
    folder, dtype, ours = smollm2(precision)
    ids = torch.arange(100, 132, device=DEVICE)[None]
    contestants = {
        "ours, compiled": timed(lambda n: ours.generate(ids, max_new_tokens=n, step=fast_step)),
        "ours, eager": timed(lambda n: ours.generate(ids, max_new_tokens=n)),
    }
    if precision != "int8":
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE)
        how = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
        how["attention_mask"] = torch.ones_like(ids)
        contestants["transformers"] = timed(
            lambda n: theirs.generate(ids, max_new_tokens=n, min_new_tokens=n, **how)
        )
    packed, peer = pathlib.Path(f"{folder}.gguf"), None
    if importlib.util.find_spec("llama_cpp") and packed.is_file() and DEVICE == "cpu":
        kind = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}[precision]
        peer = Process("llama_peer.py", packed, kind, torch.get_num_threads())
        contestants[f"llama.cpp {kind}"] = lambda n: peer(n)[0]
    firsts, nexts = ({name: [] for name in contestants} for _ in range(2))
    # 512 MB on huge pages like those of the weights, because small pages are read more slowly
    block = huge_pages(2**29).view(torch.float32).to(DEVICE).normal_()
    speeds = []
    for turn in range(runs + 2):  # two warm-ups, because the second shape compiles again
        for name, seconds in contestants.items():
            first, whole = seconds(1), seconds(1 + tokens)
            if turn > 1:
                firsts[name].append(first)
                nexts[name].append((whole - first) / tokens)
            if turn > 1 and name == "ours, compiled":  # bandwidth changes over time
                speeds.append(bandwidth(block))
    if peer:
        peer.close()
    size = sum(t.nbytes for t in ours.state_dict().values())
    first = row("decode", f"first token, {precision}", firsts)
    rest = row("decode", f"a token, {precision}", nexts)
    speed = statistics.median(speeds)
    shares = [size / each / now for each, now in zip(nexts["ours, compiled"], speeds)]
    share = statistics.median(shares)
    print(f"        {size / 2**20:.0f} MB; {share:.0%} of the memory bandwidth, "
          f"{speed / 1e9:.0f} GB/s")  # fmt: skip
    return [first, rest | {"bytes": size, "gb_s": speed / 1e9, "share_of_bandwidth": share,
                           "shares": shares, "speeds": speeds}]  # fmt: skip


def many_answers(runs, rows=16, tokens=32):
    """16 prompts of unequal length in a batch, compared with one: seconds a token and answer."""
    _, _, llm = smollm2(str(DTYPE)[6:])
    ids = torch.randint(1000, (rows, 32), device=DEVICE)
    segments = (torch.arange(32) >= torch.arange(rows)[:, None]).long().to(DEVICE)
    contestants = {}
    for name, step in ((", compiled", fast_step), ("", None)):
        for n in (rows, 1):
            args = dict(tokens=ids[:n], segments=segments[:n], step=step)
            contestants[f"{n} at once{name}"] = (n, timed(
                lambda k, a=args: llm.generate(**a, max_new_tokens=k)))  # fmt: skip
    seconds = {name: [] for name in contestants}
    for turn in range(runs + 2):
        for name, (n, run) in contestants.items():
            took = (run(1 + tokens) - run(1)) / tokens / n
            seconds[name] += [took] if turn > 1 else []
    return row("decode", f"a token of each answer, {str(DTYPE)[6:]}", seconds)


def tokenizer(runs):
    """Seconds a megabyte, over 10 MB; peers: the reference libraries (bench/tokenizers.py)."""
    subprocess.run([sys.executable, ROOT / "bench" / "tokenizers.py"], check=True)
    measured = json.loads((ROOT / "bench" / "tokenizers.json").read_text())["rows"]
    rows = []
    for one in measured:
        if one["text"] == "all":
            name, _, reference = one["tokenizer"].partition(", ")
            seconds = {"ours": [1 / one["ours_mb_s"]], reference: [1 / one["reference_mb_s"]]}
            rows.append(row("tokenizer", f"{name}, a megabyte", seconds))
    return rows


NEEDS = {"moe": ("transformers",), "decode": ("transformers",), "llm": ("transformers",),
         "train": ("transformers",), "load": ("transformers",),
         "tokenizer": ("tokenizers", "sentencepiece", "mistral_common", "regex")}  # fmt: skip
SECTIONS = {"moe": moe, "start": start, "scale": scale, "decode": decode, "llm": llm,
            "train": train_, "load": load, "memory": peak_memory,
            "tokenizer": tokenizer}  # fmt: skip


def conditions():
    """What a measurement depends on."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else cpu()
    return {"machine": name, "precision": str(DTYPE), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "commit": commit(),
            "command": " ".join(["python", *sys.argv])}  # fmt: skip


def check_packages(names):
    """ValueError, with the command that installs them, for packages that the sections lack."""
    missing = {package for name in names for package in NEEDS.get(name, ())
               if not importlib.util.find_spec(package)}  # fmt: skip
    ready = [name for name in SECTIONS if not missing & {*NEEDS.get(name, ())}]
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} missing: pip install \".[bench]\", or name "
                         f"sections that run without: {' '.join(ready)}")  # fmt: skip


def print_header(here):
    """What a number means, and what it was measured with."""
    print(f"{here['machine']}, {here['threads']} threads, {here['precision']}, torch "
          f"{here['torch']}, commit {here['commit']}")  # fmt: skip
    print(f"{'section':7} {'case':34} median of each contestant (times ours)", flush=True)


def replace_section(content, section, rows, here):
    """The content of a results file with new `rows` of a section, and their conditions; the other
    sections keep theirs."""
    kept = [row for row in content.get("rows", []) if row["section"] != section]
    fixed = {name: here[name] for name in ("machine", "precision")}
    about = {name: value for name, value in here.items() if name not in fixed}
    sections = content.get("sections", {}) | {section: about}
    return fixed | {"sections": sections, "rows": kept + rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("sections", nargs="*", help=f"{' '.join(SECTIONS)}; none: all")
    parser.add_argument("--runs", type=int, default=5, help="runs of each, in turn")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="write into bench/, over the results in the repository, not out/bench/",
    )
    args = parser.parse_args()
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown or args.runs < 1:
        parser.error(f"{' '.join(unknown) or args.runs}: sections are {' '.join(SECTIONS)}, "
                     "--runs 1 or more")  # fmt: skip
    names = args.sections or list(SECTIONS)
    check_packages(names)
    here = conditions()
    print_header(here)
    name = re.sub(r"\W+", "-", f"{here['machine']} {here['precision'].split('.')[1]}").strip("-")
    folder = ROOT / "bench" if args.publish else ROOT / "out" / "bench"
    file = folder / (name.lower() + ".json")
    content = json.loads(file.read_text()) if file.is_file() else {}
    for name in names:
        content = replace_section(content, name, SECTIONS[name](args.runs), here)
        write_json(file, content)
    print(f"wrote {file.relative_to(ROOT)}")
    draw_ratios(content, file.with_suffix(".png"))


if __name__ == "__main__":
    flags.run(main)
