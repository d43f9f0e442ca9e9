"""One run at a time in a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from flaxgpt.errors import InputError
from flaxgpt.run.folder import LOCK


def lock_folder(folder: Path) -> IO[str]:
    """Lock a run folder for as long as the file that is returned is open, which ends with this process at the latest.

    It is the operating system's lock (flock): a process that was killed holds none, so there is no stale one to be recognised. On
    file systems that several hosts share (NFS since Linux 2.6.12, Lustre mounted with flock, GPFS) it holds between hosts. Where there
    are no locks, this locks nothing. The file itself stays when the run is over.

    Raises:
        InputError: another process holds it; it is named.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(f"{folder} is being written by {holder}: wait for it, stop it, or choose another --out-dir") from None
    except OSError:
        return file
    with contextlib.suppress(OSError):  # the name is only for the message
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file
