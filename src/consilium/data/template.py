"""Chat templates, run in a separate process with limits of time and memory.

A chat template is a program (Jinja) that comes with a model. transformers runs it in Jinja's sandbox, which denies
access to files and to Python's own objects. The sandbox does not prevent infinite loops, or texts that fill the memory.
Therefore this module starts one process that renders (`python -m consilium.data.template`). The operating system ends
that process when one conversation takes more than `SECONDS` of CPU time. It serves all calls of the process that
started it, and ends with it.
"""

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilium.errors import DataError, first_line
from consilium.escape import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SECONDS", "close", "render"]

SECONDS = 10
"""Maximum CPU time, in seconds, that a template may take for one conversation."""
MEMORY = 2**30
"""Maximum number of bytes that a template may use, in addition to the memory of its process at the start."""
LONGEST = 2**24
"""Maximum number of characters of a rendered conversation."""
AT_ONCE = 64
"""Maximum number of conversations in one request to the process."""

Conversation = Sequence[Mapping[str, Any]]


def render(jobs: Sequence[tuple[Conversation, bool]], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Render conversations with a tokenizer's chat template.

    Args:
        jobs: messages, and whether to append the mark after which an answer begins.

    Raises:
        DataError: if the template refuses a conversation, takes too long, needs too much memory or writes too much.
    """
    settings = {
        "template": tokenizer.get_chat_template(),
        "tokens": {name: _plain(value) for name, value in tokenizer.special_tokens_map.items()},
        "seconds": SECONDS,
        "longest": LONGEST,
    }
    rendered_texts: list[str] = []
    for start in range(0, len(jobs), AT_ONCE):
        batch = jobs[start : start + AT_ONCE]
        answer = _process.ask({**settings, "jobs": batch})
        rendered_texts += answer["texts"]
        if "error" in answer:
            roles = ", ".join(str(turn["role"]) for turn in batch[len(answer["texts"])][0])
            raise DataError(
                one_line(f"the tokenizer's chat template {answer['error'].replace('ROLES', one_line(roles, 200))}", 800)
            )
    return rendered_texts


def _plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)


class _Process:
    """The process that renders. It is started at the first request, and restarted after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request; return the "texts", and the reason as "error" if a conversation could not be rendered."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            texts: list[str] = []
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                for line in process.stdout:
                    answer = json.loads(line)
                    if "text" not in answer:
                        return {"texts": texts, **answer}
                    texts.append(answer["text"])
            except BrokenPipeError:
                pass
            exit_code = process.wait()
            self._forget()
        if exit_code == -signal.SIGXCPU:
            reason = f"has not written a conversation of ROLES within {SECONDS} s of CPU time"
        else:
            reason = f"ended its process while it wrote a conversation of ROLES (exit code {exit_code})"
        return {"texts": texts, "error": f"{reason}; take a model with another template"}

    def _started(self) -> "subprocess.Popen[str]":
        if self._running is None or self._running.poll() is not None or self._owner != os.getpid():
            self._forget()
            self._owner = os.getpid()  # A forked process must not share its parent's pipes.
            self._running = subprocess.Popen(
                [sys.executable, "-P", "-m", "consilium.data.template"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            )  # fmt: skip
        return self._running

    def close(self) -> None:
        """End the process that renders; it would also end when the current process ends."""
        if self._running is not None and self._owner == os.getpid():
            self._running.kill()
            self._running.wait()
            self._forget()

    def _forget(self) -> None:
        for pipe in (self._running.stdin, self._running.stdout) if self._running else ():
            if pipe is not None:
                with contextlib.suppress(OSError):  # Closing flushes data to a process that may have ended.
                    pipe.close()
        self._running = None


_process = _Process()


def close() -> None:
    """End the process that renders, if there is one; the next call of `render` starts another."""
    _process.close()


atexit.register(close)

# --- in the process that renders --------------------------------------------------------------------------------------


def _serve() -> None:
    """Answer each line of stdin with one line {"text"} per conversation, then {} or {"error"}."""
    from transformers.utils.chat_template_utils import render_jinja_template

    size = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        request = json.loads(line)
        _answer({} if (error := _written(request, render_jinja_template)) is None else {"error": error})


def _written(request: Mapping[str, Any], render_template: Any) -> str | None:
    """Write the rendered conversations of a request to stdout; return the reason if one could not be rendered."""
    for messages, prompt in request["jobs"]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu_seconds = int(usage.ru_utime + usage.ru_stime) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds + request["seconds"], resource.RLIM_INFINITY))
        try:
            (text,), _ = render_template(
                conversations=[messages],
                chat_template=request["template"],
                add_generation_prompt=prompt,
                **request["tokens"],
            )
        except MemoryError:
            return (
                f"needs more than {MEMORY / 1e9:.1f} GB for a conversation of ROLES; take a model with another template"
            )
        except Exception as error:  # A template is a program and may raise any exception.
            return f"refuses a conversation of ROLES: {one_line(first_line(error), 300)}"
        if len(text) > request["longest"]:
            limit_note = f"at most {request['longest']:,} are allowed"
            return f"writes {len(text):,} characters for a conversation of ROLES; {limit_note}"
        _answer({"text": text})
    return None


def _answer(value: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
