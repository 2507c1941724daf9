"""Types into a shell on a terminal, as a person would, and prints what the command got.

terminal.py SHELL PROGRAMS SCRIPT LINE...: in the shell, with the completion script read in, types each LINE, in which ^ stands
for the Tab key. The programs are functions there that print their words in angle brackets, one line for each command.
"""

import os
import pty
import select
import sys
import time

shell, programs, script, *lines = sys.argv[1:]
START = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
FUNCTION = '{0}() {{ if [ "$1" = --complete ]; then command {0} "$@"; else printf "<%s>" "$@"; echo "=END"; fi; }}'
FISH = 'function {0}; if test "$argv[1]" = --complete; command {0} $argv; else; printf "<%s>" $argv; echo "=END"; end; end'
SETUP = {
    "bash": ["PS1='ready> '", "bind 'set bell-style none'", "bind 'set enable-bracketed-paste off'"],
    "zsh": ["PS1='ready> '", "unsetopt beep", "autoload -Uz compinit", "compinit -u -D"],
    "fish": ["function fish_prompt; echo 'ready> '; end", "set fish_greeting"],
}
function = FISH if shell == "fish" else FUNCTION
setup = SETUP[shell] + [f"source {script}"] + [function.format(p) for p in ("nbdkit", "nbdkit-mount")]

pid, terminal = pty.fork()
if pid == 0:
    os.environ.update(PATH=f"{programs}:/usr/bin:/bin", TERM="dumb" if shell != "fish" else "xterm", COLUMNS="200", LC_ALL="C.UTF-8")
    os.environ["HOME"] = os.getcwd()
    os.execvp(START[shell][0], START[shell])


def read(until, seconds=60.0):
    """What the shell prints, up to a word."""
    text = b""
    deadline = time.monotonic() + seconds
    while until not in text:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            sys.exit(f"{shell} did not print {until!r}, but: {text.decode(errors='replace')}")
        try:
            text += os.read(terminal, 65536)
        except OSError:
            sys.exit(f"{shell} ended: {text.decode(errors='replace')}")
    return text


def quiet():
    """Waits until the shell has nothing more to say about a key."""
    while select.select([terminal], [], [], 0.4)[0]:
        os.read(terminal, 65536)


for number, line in enumerate(setup):
    os.write(terminal, f"{line}; echo 'do''ne{number}'\r".encode())
    read(f"done{number}".encode())
for line in lines:
    quiet()
    for number, part in enumerate(line.split("^")):
        if number:
            os.write(terminal, b"\t")
            quiet()
        os.write(terminal, part.encode())
    os.write(terminal, b"\r")
    said = read(b"=END").decode(errors="replace")
    print(said[: said.rindex("=END")].splitlines()[-1])
os.write(terminal, b"\x03\rexit\r")
