"""Where Hydra looks for launchers: those of `steerlora.cli.launchers`, by the names it knows."""

from __future__ import annotations

try:
    from hydra_plugins.hydra_submitit_launcher import submitit_launcher
except ImportError:  # the extra `launchers`, without which there is nothing to launch with
    pass
else:
    from steerlora.cli.launchers import LocalJobs, SlurmJobs

    class SlurmLauncher(SlurmJobs, submitit_launcher.SlurmLauncher):
        """``hydra/launcher=submitit_slurm``."""

    class LocalLauncher(LocalJobs, submitit_launcher.LocalLauncher):
        """``hydra/launcher=submitit_local``."""
