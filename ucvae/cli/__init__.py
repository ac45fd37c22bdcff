"""The commands: one file each, and the only place where Hydra is imported."""

import os

# Before torch is imported. Threads of OpenMP that wait by spinning take the processor from each
# other when several runs share a machine: a coupled run on digits beside two others on 2 cores
# did 145 images/s, and 314 with this. Set in the environment, the variable is left as it is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
