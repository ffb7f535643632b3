"""A CuMo under lmms-eval, which has about a hundred benchmarks and downloads their data.

    pip install ".[eval]"
    python extras/lmms_eval.py --model weights/CuMo-mistral-7b --dtype bfloat16 \\
        --tasks pope,gqa,textvqa_val,mme,scienceqa_img,mmbench_en_dev,seedbench
    python extras/lmms_eval.py --tasks mine --include my_tasks     # a folder with mine.yaml

A task gives a question, its pictures and the longest answer. Here they go into the model's own chat
template, the pictures first or where several have their tags, and are answered greedily, one
question at a time. A task's settings for sampling and beams are ignored. Prompts and scorers are
lmms-eval's and differ from the paper's in places: its TextVQA has no OCR words, its POPE counts
only "yes" or "no", and its MMBench has an OpenAI model judge answers that are not a letter.
`eval.py --benchmark` follows the paper.
"""

import difflib
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
# Without this folder, since this file must not be found as the package lmms_eval.
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]
from cumo import CuMo
from data.chat import IGNORE, end_tokens, render, with_tags
from data.flags import check_choice, check_device, parse, run
from data.hub import find_model
from data.tokenizer import Tokenizer
from data.weights import write_json
from engine.conversation import Printer, prompt
from engine.rate import has_fast_bf16
from sample import DTYPES

try:
    from lmms_eval.api.model import lmms
except (ImportError, RuntimeError):  # RuntimeError: see check_torchvision
    lmms = object


@dataclass
class LmmsConfig:
    model: str = ""  # a checkpoint or a folder of stages; empty: the last finished stage in out/
    tasks: str = ""  # names of lmms-eval's tasks, separated by commas: pope,gqa
    include: str = ""  # a folder with your own tasks
    limit: int = 0  # questions a task, for a first try; 0: all
    max_new_tokens: int = 1024  # longest answer, for tasks that set none
    out: str = "out"  # folder for lmms_eval.json
    dtype: str = ""  # of the weights: float32 or bfloat16; empty: float32
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run


def pictures(found):
    """The pictures (PIL) of a task: `found` is one, a list, lists in a list, or None."""
    if isinstance(found, list | tuple):
        return [image for item in found for image in pictures(item)]
    if not isinstance(found, Image.Image | None):
        raise ValueError(f"a task has a {type(found).__name__} instead of a picture; this model "
                         "takes neither video nor sound: leave the task out")  # fmt: skip
    return [found] if found else []


class Examinee(lmms):
    """lmms-eval's interface to a model: lists of requests in, lists of answers out."""

    def __init__(self, model, tokenizer, max_new_tokens=1024):
        super().__init__()
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens

    def autocast(self):
        """The precision of eval.py."""
        device = self.model.device
        return torch.autocast(device.type, torch.bfloat16, has_fast_bf16(device))

    def ask(self, question, images, options):
        """The greedy answer, up to the first of the texts `until`."""
        ids, pixels = prompt(self.model, self.tokenizer, question, images)
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        printer = Printer(self.tokenizer, [text for text in until if text], lambda text: None)
        ends = end_tokens(self.tokenizer, self.model.cfg.template)
        with self.autocast():
            self.model.generate(
                torch.tensor([ids], device=self.model.device),
                None if pixels is None else pixels.to(self.model.device),
                max_new_tokens=options.get("max_new_tokens") or self.max_new_tokens,
                eos_token_id=ends, stream=printer)  # fmt: skip
        return printer.finish()

    def document(self, request):
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]

    def generate_until(self, requests):
        answers = []
        for request in tqdm(requests, desc="answers"):
            question, options, show, *_ = request.args
            answers.append(self.ask(question, pictures(show(self.document(request))), options))
        return answers

    def generate_until_multi_round(self, requests):
        """A round knows of earlier rounds only what the task puts into its question."""
        answers = []
        for request in tqdm(requests, desc="answers"):
            question, options, show, next_round, *_ = request.args
            document, rounds, info, ended = self.document(request), [], None, False
            images = show(document)
            while not ended:
                rounds.append(self.ask(question, pictures(images), options))
                images, question, ended, rounds, info = next_round(
                    document, previous_output=rounds, round_idx=len(rounds),
                    previous_round_info=info)  # fmt: skip
                rounds = list(rounds)
            answers.append(rounds)
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests):
        """-> [(mean loss of the answer's tokens, whether it is the greedy answer)]. lmms-eval
        picks the choice with the lowest loss, as for its own models."""
        results = []
        for request in tqdm(requests, desc="choices"):
            question, answer, show, *_ = request.args
            document, model = self.document(request), self.model
            images = pictures(show(document))
            answer = answer if isinstance(answer, str) else answer(document)
            text = with_tags(question, len(images))
            turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer.strip()}]
            how = self.tokenizer, model.cfg.template, model.image_tokens, len(images)
            tokens, labels = torch.tensor(render(turns, *how), device=model.device)[:, None]
            _, pixels = prompt(model, self.tokenizer, question, images)
            with self.autocast():
                out = model(tokens, None if pixels is None else pixels.to(model.device), labels)
            greedy, labels = out.logits[:, :-1].argmax(-1), labels[:, 1:]
            same = (greedy == labels) | (labels == IGNORE)
            results.append((float(out.lm_loss), bool(same.all())))
        return results


def check_torchvision():
    """ValueError if torchvision, which lmms-eval needs, was built for another torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError as error:  # operator torchvision::nms does not exist
        raise ValueError(
            f"torchvision does not fit torch {torch.__version__} ({error}): install "
            "both together, for the same kind of machine (CPU or CUDA)"
        ) from None


def main():
    cfg, _ = parse(LmmsConfig, description=__doc__.split("\n")[0])
    check_torchvision()
    if lmms is object:
        raise ValueError('this needs lmms-eval: pip install ".[eval]"')
    check_choice("dtype", cfg.dtype, DTYPES)
    check_device(cfg.device)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import make_table

    manager = TaskManager("WARNING", include_path=cfg.include or None)
    tasks = [name.strip() for name in cfg.tasks.split(",") if name.strip()]
    for name in tasks or [""]:
        if name not in manager.all_tasks:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 3)) or "pope, gqa"
            raise ValueError(f"--tasks: lmms-eval has no {name!r}; it has {near} and others")
    path = find_model(cfg.model)
    model = CuMo.from_pretrained(path, device=cfg.device, dtype=DTYPES[cfg.dtype]).eval()
    examinee = Examinee(model, Tokenizer.from_pretrained(path), cfg.max_new_tokens)
    results = simple_evaluate(
        model=examinee, tasks=tasks, task_manager=manager, batch_size=1, limit=cfg.limit or None,
        log_samples=False, bootstrap_iters=0)  # fmt: skip
    print(make_table(results))
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    only_numbers = lambda row: {k: v for k, v in row.items() if isinstance(v, int | float)}
    numbers = {task: only_numbers(row) for task, row in results["results"].items()}
    content = {"model": str(path), "lmms_eval": version("lmms_eval"), "limit": cfg.limit}
    write_json(out / "lmms_eval.json", content | {"results": numbers})
    print(f"wrote {out / 'lmms_eval.json'}")


if __name__ == "__main__":
    run(main)
