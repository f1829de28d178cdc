"""What the server that loader processes fork from imports: everything they need, once. Nobody else imports it."""

import signal

import vlscale.data.stream  # noqa: F401

# Slurm's warning before the end of a job goes to every process of the step, and would end those that don't handle it.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
