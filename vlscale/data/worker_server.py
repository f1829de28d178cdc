"""What the server that loader processes fork from imports: everything they need, once. Nobody else imports it."""

import signal

# Slurm signals every process of a step: the training process decides when its workers end, after its checkpoint.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)

import vlscale.data.stream  # noqa: E402, F401
