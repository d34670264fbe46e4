"""The rows of scripts/gpu-check that measure training steps, in turns with PyTorch, and single kernels."""
import json
import os
import queue
import statistics
import subprocess
import tempfile
import threading
import time

from gpu_base import (DEVICE, PEAK, ROOT, SIMULATE, Clock, Failed, dsrun, end, environment, last_line, log, python,
                      row, run, script)

# ---- sides that take turns


class Side:
    """A process that answers lines of JSON."""

    def __init__(self, name, words, env):
        self.name, self.answers, self.lines = name, [], queue.Queue()
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        log("start of " + name, " ".join(words))
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        text=True, env=env, cwd=ROOT, start_new_session=True)
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.put(line)
        self.lines.put(None)

    def send(self, line):
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, OSError):
            pass

    def answer(self, most):
        try:
            line = self.lines.get(timeout=Clock.left(most))
        except queue.Empty:
            raise Failed("%s took too long" % self.name) from None
        if line is None:
            self.errors.seek(0)
            text = self.errors.read()
            lines = [x for x in text.splitlines() if "out of memory" in x.lower()]
            raise Failed("%s ended: %s" % (self.name, lines[0].strip()[:300] if lines else last_line(text)))
        return json.loads(line)

    def ask(self, line, most):
        self.send(line)
        return self.answer(most)

    def ready(self, most=120):
        self.told = self.answer(most)
        return self.told

    def close(self):
        self.send("q")
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            end(self.process)
        self.errors.seek(0)
        log("errors of " + self.name, self.errors.read(), 20000)
        self.errors.close()


def ours(model, batch, *words, **env):
    return Side("dsrun", [dsrun(), script("gpu_step.lua"), model, "batch=%d" % batch, "device=" + DEVICE, *words],
                environment(**env))


def peer(model, batch, *words):
    device = "cpu" if SIMULATE else DEVICE
    return Side("PyTorch", [python(), script("gpu_peer.py"), model, "batch=%d" % batch, "device=" + device, *words],
                dict(os.environ, PYTHONUNBUFFERED="1"))


SHAPES = {  # layers, width, context, parameters that no product uses
    "gpt2-124M": (12, 768, 1024, 0), "gpt2-350M": (24, 1024, 1024, 0), "gpt2-1558M": (48, 1600, 1024, 0),
    "llama-8B-4-layers": (4, 4096, 8192, 128256 * 4096), "tiny": (2, 32, 32, 0), "tiny-llama": (2, 32, 32, 96 * 32),
}


def started(make, batch, warm):
    """The side, warm, at the batch or, where memory does not do, at half of it and so on."""
    while True:
        side = make(batch)
        try:
            side.ready()
            begun = time.time()
            side.ask("warm 3", warm)
            side.batch, side.warm_seconds = batch, time.time() - begun
            return side
        except Failed as e:
            side.close()
            if "out of memory" not in str(e).lower() or batch == 1:
                raise
            batch //= 2


def summed(side, model):
    """A side's rounds as figures."""
    layers, width, context, unused = SHAPES[model]
    flops = 6 * (side.told["parameters"] - unused) + 6 * layers * width * context
    rates = [side.batch * context / (a["ms"] * 1e-3) for a in side.answers]
    out = dict(batch=side.batch, tok_s=rates, best=max(rates), median=statistics.median(rates),
               mfu=max(rates) * flops / PEAK, mfu_median=statistics.median(rates) * flops / PEAK,
               ms=[a["ms"] for a in side.answers], warm_seconds=side.warm_seconds,
               host_ms=min(a["host_ms"] for a in side.answers), loss=side.answers[-1]["loss"])
    for key in ("peak", "cached", "scratch", "launches", "waits", "takes"):
        if key in side.answers[-1]:
            out[key] = side.answers[-1][key]
    return out


def said(name, s):
    text = "%s: %.0f tokens/s (median %.0f), MFU %.1f %%, batch %d, host %.1f ms of a step of %.1f" % (
        name, s["best"], s["median"], 100 * s["mfu"], s["batch"], s["host_ms"], min(s["ms"]))
    if "peak" in s:
        text += ", peak %.1f GiB" % (s["peak"] / 2 ** 30)
    if "launches" in s:
        text += "; a step: %.0f launches, %.1f waits, %.1f takes, scratch %.2f GiB" % (
            s["launches"], s["waits"], s["takes"], s["scratch"] / 2 ** 30)
    return text


def turns(model, batch, rounds, words=(), mode="compile", goal=None, rest=True, alone=False, env=None, warm=240):
    """Steps of both sides in turns. rest: both give their cached memory back after each turn, so that the
    other has it. alone: without PyTorch."""
    if SIMULATE:
        model, batch = "tiny-llama" if "llama" in model else "tiny", 2
    sides, notes, values = [], [], {}
    try:
        if not alone and not python():
            notes.append("no PyTorch here")
        elif not alone:
            try:
                sides.append(started(lambda b: peer(model, b, "mode=" + mode), batch, warm))
                sides[0].ask("rest", 20)
            except Failed as e:
                sides = []
                notes.append(str(e))
        sides.append(started(lambda b: ours(model, b, *words, **(env or {})), batch, 90))
        for number in range(1 if SIMULATE else rounds):
            try:
                for side in sides:
                    if rest:
                        side.ask("warm 2", 60)
                    count = 2 if SIMULATE else max(3, min(200, round(2000 / side.answers[-1]["ms"]))) if side.answers else 3
                    got = side.ask("steps %d" % count, 60)
                    if number == 0 and not SIMULATE:  # the first says how many make a turn
                        got = side.ask("steps %d" % max(3, min(200, round(2000 / got["ms"]))), 60)
                    side.answers.append(got)
                    if rest:
                        side.ask("rest", 20)
            except Failed as e:
                notes.append(str(e))
                break
        for side in sides:
            if side.answers:
                values[side.name] = summed(side, model)
                notes.append(said(side.name, values[side.name]))
    finally:
        for side in sides:
            side.close()
    if "dsrun" not in values:
        raise Failed("; ".join(notes) or "no figures")
    if "PyTorch" in values:
        a, b = values["dsrun"], values["PyTorch"]
        values["ratio"], values["ratio_median"] = a["best"] / b["best"], a["median"] / b["median"]
        notes.insert(0, "dsrun is %.3f times as fast as PyTorch (medians: %.3f)" % (values["ratio"], values["ratio_median"]))
    if goal:
        notes.insert(0, "MFU wanted: %g %% is good, %g %% excellent" % goal)
    return dict(values=values, notes=notes)


ROUNDS = 5


@row("small", 220)
def gpt2_124M():
    return turns("gpt2-124M", 64, ROUNDS, goal=(45, 52))


@row("small", 60)
def gpt2_124M_fast_attention():
    return turns("gpt2-124M", 64, 3, alone=True, env=dict(DS_FAST_ATTENTION="1"), goal=(45, 52))


@row("small", 60)
def gpt2_124M_untimed():
    """Products by cuBLASLt's first candidates, without timing them."""
    return turns("gpt2-124M", 64, 3, alone=True, env=dict(DS_TUNE="0"), goal=(45, 52))


@row("small", 60)
def gpt2_124M_passes():
    """Biases' gradients and the slope of GELU as passes of their own, not beside products."""
    return turns("gpt2-124M", 64, 3, alone=True, env=dict(DS_EPILOGUES="forward"), goal=(45, 52))


@row("small", 150)
def small_batch():
    """Four sequences a step: our CUDA graph beside PyTorch's."""
    return turns("gpt2-124M", 4, ROUNDS, words=["graph=1"], mode="reduce-overhead", rest=False)


@row("small", 60)
def small_batch_without_graph():
    return turns("gpt2-124M", 4, 3, alone=True)


@row("small", 60)
def kernels():
    words = ["device=" + DEVICE] + (["rows=64"] if SIMULATE else [])
    code, out, both, _ = run([dsrun(), script("gpu_kernels.lua"), *words], 60)
    found = [json.loads(x) for x in out.splitlines() if x.startswith("{")]
    notes = []
    for f in found:
        if "error" in f:
            notes.append("%s: %s" % (f["name"], f["error"][:160]))
        elif "GB_s" in f:
            notes.append("%s: %.0f GB/s, %.0f %% of 4.3 TB/s (%.3f ms)" % (f["name"], f["GB_s"], f["GB_s"] / 43, f["ms"]))
        else:
            notes.append("%s: %.0f TFLOP/s (%.3f ms)" % (f["name"], f["TFLOP_s"], f["ms"]))
    bad = code != 0 or any("error" in f for f in found)
    if code != 0:
        notes.append("it ended early: " + last_line(both))
    return dict(values=found, notes=notes, status="failed" if bad else "ok")


@row("small", 200)
def gpt2_350M():
    return turns("gpt2-350M", 32, ROUNDS)


@row("large", 200)
def llama_8B_4_layers():
    return turns("llama-8B-4-layers", 1, ROUNDS)


@row("large", 330)
def gpt2_1558M():
    return turns("gpt2-1558M", 16, ROUNDS, warm=270)


@row("large", 100)
def gpt2_1558M_checkpointed():
    return turns("gpt2-1558M", 32, 3, words=["checkpoint=1"], alone=True)
