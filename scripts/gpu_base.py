"""What the rows of scripts/gpu-check share: limits of time, programs, where things are, results."""
import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUNDLE = os.path.join(HERE, "build", "gpu-bundle")
ROOT = BUNDLE if os.path.exists(os.path.join(BUNDLE, "dsrun")) and not os.environ.get("DSRUN") else HERE
OUT = os.path.abspath(os.environ.get("OUT") or os.path.join(HERE, "build", "gpu"))
SIMULATE = os.environ.get("GPU_CHECK_SIMULATE", "")
DEVICE = "cpu" if SIMULATE == "cpu" else "cuda"
PEAK = 989e12  # FLOP/s of an H100 or H200 in bf16, dense, by the datasheet
TOLD = "MFU is of 989 TFLOP/s, by 6N + 6·L·C·T operations a token (N: parameters that are multiplied with)"


class Failed(Exception):
    pass


class Skipped(Exception):
    pass


# ---- time: a row's own limit, within what its stage has left


class Clock:
    stage = row = float("inf")

    @classmethod
    def left(cls, most=float("inf")):
        return max(1.0, min(most, cls.stage - time.time(), cls.row - time.time()))


# ---- programs


def log(title, text, most=120000):
    if len(text) > most:
        text = text[: most // 4] + "\n[…]\n" + text[-3 * most // 4:]
    with open(os.path.join(OUT, "log.txt"), "a", errors="replace") as f:
        f.write("\n==== %s  %s\n%s\n" % (time.strftime("%H:%M:%S"), title, text))


def end(process):
    """dsrun ends the ranks it started when it is asked to; the rest is killed with its group."""
    for number, wait in ((signal.SIGTERM, 4), (signal.SIGTERM, 4), (signal.SIGKILL, 4)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait)
            break
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run(words, most, env=None, cwd=None):
    """→ exit code (None: it took too long), standard output, both outputs, seconds."""
    begun = time.time()
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        try:
            p = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd or ROOT,
                                 env=env or environment(), start_new_session=True)
        except OSError as e:
            log(" ".join(words), str(e))
            return 127, "", str(e), 0.0
        try:
            code = p.wait(Clock.left(most))
        except subprocess.TimeoutExpired:
            end(p)
            code = None
        out.seek(0), err.seek(0)
        text, errors = out.read(), err.read()
    took = time.time() - begun
    log("%s (code %s, %.1f s)" % (" ".join(words), code, took), text + errors)
    return code, text, text + errors, took


def last_line(text):
    """What a program ended with: its last line, or the one above Lua's traceback and places it looked at."""
    lines = [x.strip() for x in text.split("\nstack traceback:")[0].splitlines() if x.strip()]
    lines = [x for x in lines if not x.startswith("no file '") and not x.startswith("no field ")]
    return lines[-1][:300] if lines else "(nothing was printed)"


def must(words, most, **options):
    code, out, both, _ = run(words, most, **options)
    if code != 0:
        raise Failed("%s: %s" % ("it took too long" if code is None else "exit code %d" % code, last_line(both)))
    return out


def which(name):
    for folder in os.environ.get("PATH", "").split(":"):
        if os.access(os.path.join(folder, name), os.X_OK):
            return os.path.join(folder, name)
    return None


# ---- what there is


def dsrun():
    for path in (os.environ.get("DSRUN"), os.path.join(ROOT, "dsrun"), os.path.join(HERE, "build", "dsrun")):
        if path and os.path.isfile(path):
            if path.startswith(BUNDLE):  # a copy may have lost what makes files programs
                for file in (path, *glob.glob(BUNDLE + "/bin/*"), *glob.glob(BUNDLE + "/mpi/bin/*")):
                    os.chmod(file, 0o755)
            return path
    must(["make", "-j", str(os.cpu_count()), "all"], 500, cwd=HERE, env=dict(os.environ))
    return os.path.join(HERE, "build", "dsrun")


def stale():
    """A file that is newer than the bundle that is used; None."""
    if ROOT != BUNDLE:
        return None
    made = os.path.getmtime(os.path.join(BUNDLE, "dsrun"))
    for folder in ("lua", "models", "tests/cuda", "kernels", "runner"):
        for file in glob.glob(os.path.join(HERE, folder, "**", "*.*"), recursive=True):
            if os.path.getmtime(file) > made + 1:
                return os.path.relpath(file, HERE)
    return None


def python():
    """A Python that has PyTorch; None."""
    if not hasattr(python, "found"):
        python.found = None
        for path in ("python3", sys.executable, os.path.join(HERE, "build", "peers", "bin", "python")):
            code, out, _, _ = run([path, "-c", "import torch; print(torch.__version__, torch.version.cuda)"], 120,
                                  env=dict(os.environ))
            if code == 0:
                python.found, python.version = path, out.strip()
                break
    return python.found


def wheel_folders():
    """Folders of libraries in the nvidia wheels of the python3 on the path."""
    if not hasattr(wheel_folders, "found"):
        text = ("import site, sysconfig\n"
                "for d in dict.fromkeys([sysconfig.get_paths()['purelib'], *site.getsitepackages()]): print(d)")
        try:
            sites = subprocess.run(["python3", "-c", text], capture_output=True, text=True, timeout=60).stdout.split("\n")
        except (OSError, subprocess.TimeoutExpired):
            sites = []
        wheel_folders.found = [d for s in sites if s for d in sorted(glob.glob(s + "/nvidia/*/lib"))]
    return wheel_folders.found


def environment(**more):
    """Of dsrun. PyTorch gets the shell's: it knows where its libraries are."""
    env = dict(os.environ, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "8"))
    env.pop("OUT", None)
    env.setdefault("DS_TUNE", os.path.join(OUT, "products"))  # not the user's
    path = wheel_folders() + [x for x in env.get("LD_LIBRARY_PATH", "").split(":") if x]
    if path:
        env["LD_LIBRARY_PATH"] = ":".join(path)
    if SIMULATE == "1":
        places = [os.path.join(ROOT, "simt", "libds_cuda.so"), os.path.join(HERE, "build", "simt", "libds_cuda.so")]
        env["DS_CUDA_LIBRARY"] = next((p for p in places if os.path.exists(p)), places[-1])
    env.update(more)
    return env


def script(name):
    return os.path.join(ROOT, "scripts", name)


# ---- results


class Results:
    def __init__(self):
        os.makedirs(OUT, exist_ok=True)
        self.path = os.path.join(OUT, "results.json")
        self.rows = []
        if os.path.exists(self.path):
            try:
                with open(self.path) as f:
                    self.rows = json.load(f)["rows"]
            except (ValueError, KeyError, OSError):
                pass

    def add(self, row):
        names = [r["row"] for r in self.rows]
        if row["row"] in names:
            self.rows[names.index(row["row"])] = row
        else:
            self.rows.append(row)
        for name, text in (("results.json", json.dumps(dict(rows=self.rows), indent=1)), ("results.md", self.table())):
            with open(os.path.join(OUT, name + ".new"), "w") as f:
                f.write(text)
            os.rename(os.path.join(OUT, name + ".new"), os.path.join(OUT, name))

    def table(self):
        lines = ["# Results on a GPU", "", TOLD + ".", "", "| row | | seconds | |", "| --- | --- | --- | --- |"]
        for r in self.rows:
            lines.append("| %s | %s | %.0f | %s |" % (r["row"], r["status"], r["seconds"],
                                                    "<br>".join(n.replace("|", "/") for n in r.get("notes", []))))
        return "\n".join(lines) + "\n"


ROWS = {}


def row(stage, seconds):
    def register(f):
        ROWS[f.__name__.strip("_")] = (stage, seconds, f)
        return f
    return register
