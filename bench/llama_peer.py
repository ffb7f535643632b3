"""llama.cpp in a process of its own, so that its threads do not compete with ours (bench/speed.py).

    python bench/llama_peer.py weights/SmolLM2-135M-Instruct.gguf BF16 2     # threads

Each line "n" on standard input reads a prompt of 32 tokens, generates n more, and prints the
seconds. The weights are converted to F32, BF16 or Q8_0 first.
"""

import argparse
import ctypes
import os
import sys
import tempfile
import time

import llama_cpp
import numpy as np

PROMPT = 32


def convert(file, precision, out):
    """Convert every matrix of `file` to F32, BF16 or Q8_0 and write the result to `out`."""
    params = llama_cpp.llama_model_quantize_default_params()
    kind = {"F32": "ALL_F32", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}[precision]
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
    params.allow_requantize = params.pure = True
    failed = llama_cpp.llama_model_quantize(file.encode(), out.encode(), ctypes.byref(params))
    assert not failed, f"llama.cpp could not write {out}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("file", help="weights, .gguf")
    parser.add_argument("precision", choices=("F32", "BF16", "Q8_0"))
    parser.add_argument("threads", type=int)
    args = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp prints to standard output too
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "model.gguf")
        convert(args.file, args.precision, out)
        model = llama_cpp.Llama(out, n_ctx=512, n_threads=args.threads,
                                n_threads_batch=args.threads, verbose=False)  # fmt: skip
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        model.reset()
        start = time.perf_counter()
        ids = range(100, 100 + PROMPT)
        for _ in range(int(line)):
            model.eval(list(ids))
            last = np.ctypeslib.as_array(model._ctx.get_logits(), (model.n_vocab(),))
            assert last.min() < last.max(), "no logits"
            ids = [int(last.argmax())]
        print(time.perf_counter() - start, file=replies, flush=True)


if __name__ == "__main__":
    main()
