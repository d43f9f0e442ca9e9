"""`compiled_once.py script.py ...` is `script.py ...`, where one of several processes on CPUs compiles, and the others take what it made.

JAX can share what is compiled, by a key in which CPUs differ from process to process: there only the first would ever find anything in its
cache, and the others compile all of it at each start. Here the key has the kinds of the devices, as JAX itself has it where a device
doesn't describe itself. The programs are the same.
"""

import runpy
import sys

import jax
from jax._src import cache_key

if __name__ == "__main__":
    cache_key._hash_accelerator_config = cache_key._hash_devices
    jax.config.update("jax_share_binary_between_hosts", True)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
