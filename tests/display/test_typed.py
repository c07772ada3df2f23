"""What is typed while something is drawn: not echoed, and read by whoever comes next."""

import os
import pty
import sys
import termios

PROGRAM = """
import sys, termios
from mlx_diffusiongemma.display.typed import unechoed

print("echo" if termios.tcgetattr(0)[3] & termios.ECHO else "quiet")
with unechoed():
    print("quiet" if not termios.tcgetattr(0)[3] & termios.ECHO else "echo")
    print("drawing", flush=True)
    sys.stdin.readline()
print("echo" if termios.tcgetattr(0)[3] & termios.ECHO else "quiet")
print("read", sys.stdin.readline().strip().upper())
"""


def test_typing_ahead_is_not_shown_and_not_lost():
    process, master = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM])
    seen = b""
    while b"drawing" not in seen:
        seen += os.read(master, 1024)
    assert termios.tcgetattr(master)[3] & termios.ECHO == 0
    os.write(master, b"go on\nlater\n")
    try:
        while part := os.read(master, 1024):
            seen += part
    except OSError:  # what Linux says at the end
        pass
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert seen.split() == b"echo quiet drawing echo read LATER".split()


def test_what_has_no_terminal_is_left_alone(monkeypatch):
    from mlx_diffusiongemma.display.typed import unechoed

    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with unechoed():
            pass
