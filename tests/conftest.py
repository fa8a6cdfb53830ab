"""One thread for the tests and the processes they start: on a busy machine two wait for each other most of the time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
