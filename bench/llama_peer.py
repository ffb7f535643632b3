"""llama.cpp as a contestant of bench/speed.py, in a process of its own (two pools of threads in one
would get in each other's way). Started with a .gguf file and a precision; then, for each line "N"
on standard input, it reads 32 tokens, makes N more, and prints the seconds that took.

    python bench/llama_peer.py weights/SmolLM2-135M-Instruct.gguf BF16 2     # threads
"""

import ctypes
import os
import sys
import tempfile
import time

import llama_cpp
import numpy as np

PROMPT = 32


def stored_as(file, precision, out):
    """`file` with every matrix in F32, BF16 or Q8_0."""
    params = llama_cpp.llama_model_quantize_default_params()
    kind = {"F32": "ALL_F32", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}[precision]
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
    params.allow_requantize = params.pure = True
    failed = llama_cpp.llama_model_quantize(file.encode(), out.encode(), ctypes.byref(params))
    assert not failed, f"llama.cpp could not write {out}"


def main():
    file, precision, threads = sys.argv[1:]
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp prints to both
    threads = int(threads)
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "model.gguf")
        stored_as(file, precision, out)
        model = llama_cpp.Llama(out, n_ctx=512, n_threads=threads, n_threads_batch=threads,
                                verbose=False)  # fmt: skip
    print("ready", file=said, flush=True)
    for line in sys.stdin:
        model.reset()
        start = time.perf_counter()
        ids = range(100, 100 + PROMPT)
        for _ in range(int(line)):
            model.eval(list(ids))
            last = np.ctypeslib.as_array(model._ctx.get_logits(), (model.n_vocab(),))
            assert last.min() < last.max(), "no logits"
            ids = [int(last.argmax())]
        print(time.perf_counter() - start, file=said, flush=True)


if __name__ == "__main__":
    main()
