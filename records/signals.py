"""Ending a process at once on SIGINT or SIGTERM, even while it is stuck inside a collective."""
import os
import signal
import socket
import threading


def end_on_signal(message=None):
    """Make SIGINT and SIGTERM end the process within a moment, with status 128 + signal number.

    Python's own handlers wait for the main thread to return to the interpreter, which it does not while it is inside a
    collective of NCCL or gloo. The C part of the handler writes to a socket all the same, and a thread reads that.

    message: printed to stderr; str, a function that returns it (and does not block), or None for nothing.
    Call it in the main thread (ValueError elsewhere). Nothing else of the process runs after the signal.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    ending = (signal.SIGINT, signal.SIGTERM)
    for number in ending:
        signal.signal(number, lambda number, frame: None)       # without a handler the socket is not written to
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def watch(writer=writer):       # holds the writing end, which would close when collected
        number = reader.recv(1)[0]
        while number not in ending:
            number = reader.recv(1)[0]
        try:
            text = message() if callable(message) else message
            if text:        # straight to the descriptor: the main thread may hold the lock of sys.stderr
                os.write(2, f"\n{text}\n".encode() if os.isatty(2) else f"{text}\n".encode())
        finally:
            os._exit(128 + number)

    threading.Thread(target=watch, name="end_on_signal", daemon=True).start()
