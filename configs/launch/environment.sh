# What every launch file sets: torchrun reads these. Sourced, not run.

# Signals that torchrun passes on to its workers, which save a checkpoint and end with code 3. By default it would die of
# SIGUSR1 and leave them behind. The first name is the default of torchrun's option --signals-to-handle (torch 2.13 sets the
# second name from it), the second is for torch that has no such option.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1

# Seconds that torchrun waits for them before it kills: a step and a checkpoint must fit. 30 by default, in old torch always.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN_SECONDS:-300}"

# A new store for every restart: in the old one the ranks find the addresses of those that are gone, and the restart fails.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# One thread a rank for the host's part of the work; more would wait in loops.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
