"""Runs experiments in processes that may be killed, without paying for imports each time.

As a script: a process that has imported everything and forks one child per job; jobs and results are lines of JSON.
`ForkServer` is the other end. Each job runs an experiment in a folder, or resumes it if one has begun there, and may
be told to end with SIGKILL after some seconds, or in place of the n-th operation that makes a write last.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

from consilium.engine import checkpoint
from consilium.experiment import from_json
from consilium.loop import resume, run


class ForkServer:
    """Use as a context manager: on leaving, the process and its children are gone."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.stdout.close()
        if self.process.wait(timeout=60):
            raise RuntimeError("the fork server failed; see its stderr")

    def job(self, saved, folder, after=None, at=None, fork=True):
        """Run or resume. Returns (exit code, or the negative signal; seconds; operations).

        Args:
            saved: an experiment as `to_json` saves it.
            fork: False: in the forking process itself, which then has all at hand that such a run loads late.
            after: seconds until SIGKILL.
            at: SIGKILL in place of the n-th write, fsync, rename or removal, from 1; of a write the first half is done,
                and with the fsync of a .jsonl file the end of its last line is lost as well.
        """
        order = {"experiment": saved, "folder": str(folder), "after": after, "at": at, "fork": fork}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the fork server has ended"
        return json.loads(line)


# --- in the forking process -----------------------------------------------------------------------------------------


def serve():
    sys.path.insert(0, str(Path(__file__).parent))
    import toy  # noqa: F401  registers itself

    from consilium.data.textfile import TextFileData

    TextFileData.load = functools.lru_cache(TextFileData.load)  # children inherit the data
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        experiment = from_json(order["experiment"])
        experiment.data.load(experiment.seed)
        if not order["fork"]:
            run(experiment, Path(order["folder"]))
            print(json.dumps([0, 0.0, 0]), file=replies, flush=True)
            continue
        operations, told = os.pipe()
        start = time.perf_counter()
        child = os.fork()
        if child == 0:
            os._exit(work(experiment, Path(order["folder"]), order["at"], told))
        os.close(told)
        status = wait(child, order["after"])
        seconds = time.perf_counter() - start
        with os.fdopen(operations) as pipe:
            count = int(pipe.read() or 0)
        print(json.dumps([status, seconds, count]), file=replies, flush=True)


def wait(child, after):
    if after is not None:
        deadline = time.perf_counter() + after
        while time.perf_counter() < deadline:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def work(experiment, folder, at, told):
    calls = deadly(at)
    try:
        resume(folder) if (folder / "config.json").exists() else run(experiment, folder)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    os.write(told, str(len(calls)).encode())
    return 0


def deadly(at):
    """Count the operations that make a write last; the `at`-th is the process's last."""
    calls = []

    def fatal(name):
        calls.append(name)
        return len(calls) == at

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(real):
        def call(*args, **kwargs):
            if fatal(real.__name__):
                if real is fsync and Path(f"/proc/self/fd/{args[0]}").readlink().suffix == ".jsonl":
                    os.ftruncate(args[0], os.fstat(args[0]).st_size - 20)
                die()
            return real(*args, **kwargs)

        return call

    class Written:
        """A file whose fatal write is half done."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            if fatal("write"):
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                die()
            return self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

    fsync, open_here = os.fsync, checkpoint.open_here
    os.fsync, checkpoint.open_here = wrap(os.fsync), lambda *args: Written(open_here(*args))
    Path.replace, Path.unlink = wrap(Path.replace), wrap(Path.unlink)
    return calls


if __name__ == "__main__":
    serve()
