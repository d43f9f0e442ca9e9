"""One run at a time in a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO

from flaxgpt.errors import InputError
from flaxgpt.run.folder import LOCK


def lock_folder(folder: Path) -> IO[str]:
    """Lock a run folder for as long as the file that is returned is open, which ends with this process at the latest.

    It is the operating system's lock (flock). A process that was killed holds none, so a file that is left over locks nothing, whatever
    it says, and there is no stale lock to be recognised. On file systems that several hosts share (NFS, Lustre mounted with flock, GPFS)
    it holds between hosts; that of a host which died, the server takes back (NFSv4: 90 s later by default). Where a file system has no
    locks, this locks nothing and says so on standard error. The file itself stays when the run is over.

    Raises:
        InputError: another process holds it; the file says which, on which host and since when.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(f"{folder} is being written by {holder}: wait for it, stop it, or choose another --out-dir") from None
    except OSError as error:
        print(f"{folder} can't be locked ({error.strerror}): nothing keeps another run from writing it too", file=sys.stderr)
    with contextlib.suppress(OSError):  # the name is only for the message, and for `flaxgpt.hosts.check_shared`
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")
        file.flush()
    return file
