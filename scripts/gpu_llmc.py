"""The row of scripts/gpu-check that trains with llm.c, a second reference beside PyTorch.

Its sources are no part of this project: LLMC names a checkout of github.com/karpathy/llm.c, which make
gpu-bundle takes along when it is set. They are compiled where they run, with cuDNN's attention if the
checkout has cudnn-frontend/include, where llm.c's own Makefile looks for it; else with llm.c's.
"""
import array
import glob
import os
import random
import re
import shutil
import tempfile

from gpu_base import ROOT, SIMULATE, Failed, Skipped, last_line, must, row, run, script
from gpu_turns import turns

VOCABULARY, CONTEXT = 50257, 1024


def sources():
    for folder in (os.environ.get("LLMC"), os.path.join(ROOT, "llm.c")):
        if folder and os.path.exists(os.path.join(folder, "train_gpt2.cu")):
            return folder
    raise Skipped("no sources of llm.c: LLMC=folder names a checkout")


def compiler():
    """Where things are, as scripts/find-cuda says."""
    out = run([script("find-cuda")], 60, env=dict(os.environ))[1]
    found = dict(line.split(" := ", 1) for line in out.splitlines() if " := " in line)
    if "NVCC" not in found:
        raise Skipped("there is no nvcc to compile llm.c with")
    return found


def fitted(source, folder, nvcc):
    """A copy of the sources that CUDA 13 takes: it names a place in memory by a struct."""
    shutil.copytree(os.path.join(source, "llmc"), os.path.join(folder, "llmc"))
    shutil.copy(os.path.join(source, "train_gpt2.cu"), folder)
    version = re.search(r"release (\d+)", must([nvcc, "--version"], 30))
    if version and int(version.group(1)) >= 13:
        path = os.path.join(folder, "llmc", "cuda_utils.cuh")
        with open(path) as f:
            text = f.read()
        with open(path, "w") as f:
            f.write(re.sub(r"\bcudaCpuDeviceId\b", "cudaMemLocation{cudaMemLocationTypeHost, 0}", text))


def newest(folder, name):
    found = sorted(glob.glob(os.path.join(folder, name + ".so*")))
    return found[:1]


def build(source, folder):
    """Compiles it → the program, and how it was built."""
    at = compiler()
    fitted(source, folder, at["NVCC"])
    card = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], 30)[1].split()
    base = [at["NVCC"], "-O3", "--use_fast_math", "-std=c++17", "-arch=sm_" + (card[0].replace(".", "") if card else "90"),
            "-DENABLE_BF16", "train_gpt2.cu", "-o", "train"]
    include, stubs = at.get("CUDA_INCLUDE", ""), "-L" + os.path.join(at.get("CUDA_LIB", ""), "stubs")
    base += ["-I" + include, *at.get("CUBLASLT", "").split(), "-Xlinker", "-rpath," + at.get("CUDA_LIB", "")]
    if os.path.exists(os.path.join(include, "nvml.h")):
        base += [stubs, "-lnvidia-ml"]
    front, problem = os.path.abspath(os.path.join(source, "cudnn-frontend", "include")), "no cudnn-frontend/include"
    if os.path.exists(front) and "CUDNN_LIB" in at:
        words = ["-DENABLE_CUDNN", "llmc/cudnn_att.cpp", "-I" + front, "-I" + at.get("CUDNN_INCLUDE", include), stubs, "-lcuda",
                 *newest(at["CUDNN_LIB"], "libcudnn"), *newest(at["CUDA_LIB"], "libnvrtc"), "-Xlinker", "-rpath," + at["CUDNN_LIB"]]
        code, _, both, _ = run(base + words, 200, cwd=folder)
        if code == 0:
            return os.path.join(folder, "train"), "attention by cuDNN"
        problem = "compiling it with cuDNN " + ("took too long" if code is None else "fails: " + last_line(both))
    code, _, both, _ = run(base, 200, cwd=folder)
    if code != 0:
        raise Failed("llm.c does not compile: " + last_line(both))
    return os.path.join(folder, "train"), "its own attention: " + problem


def tokens(path, count):
    draw = random.Random(1)
    with open(path, "wb") as f:
        head = array.array("i", [20240520, 1, count] + [0] * 253)
        f.write(head.tobytes() + array.array("H", (draw.randrange(VOCABULARY) for _ in range(count))).tobytes())


def steps(program, folder, batch, count, fused):
    """Milliseconds of its steps, but for the first few."""
    data = os.path.join(folder, "tokens.bin")
    words = [program, "-e", "d12", "-i", data, "-j", data, "-b", str(batch), "-t", str(CONTEXT), "-d", str(batch * CONTEXT),
             "-x", str(count), "-v", "1000000", "-m", "0", "-s", "0", "-h", "0", "-l", "1e-4", "-c", "0.1", "-r", "0", "-ge", str(fused)]
    code, out, both, _ = run(words, 90, cwd=folder)
    if code != 0:
        raise Failed("llm.c %s: %s" % ("took too long" if code is None else "ended with code %d" % code, last_line(both)))
    found = [float(ms) for ms in re.findall(r"^step +\d+/.*\| *([\d.]+) ms *\|", out, re.M)][min(5, count // 2):]
    if not found:
        raise Failed("llm.c told no times: " + last_line(both))
    return found


@row("llmc", 420)
def llm_c_124M():
    """The same steps as gpt2_124M: ours before and after llm.c's."""
    source, batch, count = sources(), 64, 8 if SIMULATE else 30
    with tempfile.TemporaryDirectory() as folder:
        program, how = build(source, folder)
        tokens(os.path.join(folder, "tokens.bin"), 4 * batch * CONTEXT + 1)
        mine = [turns("gpt2-124M", batch, 2, alone=True)["values"]["dsrun"]]
        theirs = {fused: steps(program, folder, batch, count, fused) for fused in (0, 1)}
        mine.append(turns("gpt2-124M", batch, 2, alone=True)["values"]["dsrun"])
    best = {fused: batch * CONTEXT / (min(ms) * 1e-3) for fused, ms in theirs.items()}
    fused = max(best, key=best.get)
    ours = max(m["best"] for m in mine)
    notes = ["dsrun is %.3f times as fast as llm.c" % (ours / best[fused]),
             "llm.c: %.0f tokens/s (%s; GELU %s the products: -ge %d), batch %d" % (
                 best[fused], how, "within" if fused else "beside", fused, batch),
             "dsrun: %.0f tokens/s, batch %d" % (ours, mine[0]["batch"])]
    return dict(values=dict(dsrun=mine, llm_c=dict(ms=theirs, tok_s=best, built=how), ratio=ours / best[fused]), notes=notes)
