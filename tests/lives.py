"""Many short lives of a script without the seconds that importing torch takes: one process imports everything, computes
nothing, and forks a child for each life. The child runs the script's main(argv), as a command would.

Run as a program it is that process: it reads requests as JSON lines, answers each with a JSON line.
"""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Lives:
    """start(...) returns a Life. `close` ends the process behind it."""

    def __init__(self, folder):
        self.folder, self.count = Path(folder), 0
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, script, *argv, before=""):
        """Run script.main(argv) in a child that is a session of its own; `before` is Python code that it runs first."""
        self.count += 1
        return Life(self, self.folder / str(self.count), script, [str(word) for word in argv], before)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Life:
    def __init__(self, lives, path, script, argv, before):
        self.lives, self.out_file, self.err_file = lives, path.with_suffix(".out"), path.with_suffix(".err")
        files = [str(self.out_file), str(self.err_file)]
        self.pid = lives.ask(script=script, argv=argv, before=before, files=files)

    def wait(self, seconds=90):
        """The exit status, or minus the number of the signal that killed it."""
        end = time.monotonic() + seconds
        while (status := self.lives.ask(wait=self.pid)) is None:
            assert time.monotonic() < end, f"still running: {self.out} {self.err}"
            time.sleep(0.02)
        return status

    def wait_for(self, words, seconds=90):
        """Until its output holds these words."""
        end = time.monotonic() + seconds
        while words not in self.out:
            assert time.monotonic() < end, f"never said {words}: {self.out} {self.err}"
            time.sleep(0.02)

    @property
    def out(self):
        return self.out_file.read_text()

    @property
    def err(self):
        return self.err_file.read_text()

    def workers(self):
        """The process numbers of its children."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == self.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found


def running(pid):
    """False for a zombie, too: it has ended, and waits for its parent or for init to take notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def live(script, argv, before, files):
    """In the child: become a session, write to the files, run the script, leave with its exit status."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    status = 0
    try:
        exec(before, {})
        __import__(script).main(argv)
    except SystemExit as left:
        status, held = left.code or 0, left  # with its frames, as the interpreter holds it  # noqa: F841
    except BaseException:
        import traceback

        status = 1
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()  # as the interpreter does at its end; os._exit does not return into the parent's code
        finally:
            os._exit(status)


def main():
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # they may be ignored, as under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    import train_classifier  # noqa: F401
    import train_continual  # noqa: F401
    import train_multilabel  # noqa: F401
    import train_regressor  # noqa: F401

    gc.collect()
    gc.freeze()  # else the collector of each child writes into every object of torch, and so copies it

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            for file in request["files"]:
                open(file, "w").close()
            answer = os.fork()
            if answer == 0:
                live(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
