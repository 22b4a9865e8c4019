"""The processes of one training: how many there are, who started them, and that they end together.

Lightning Fabric averages their gradients (PyTorch's DistributedDataParallel). They are started by medmap itself, which
runs its own command again for every further device, by torchrun, or by SLURM's srun; the last two say how many there
are. No torch before it is needed: the command line asks here first.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medmap.errors import ConfigError, InputError, MedmapError

if TYPE_CHECKING:
    import torch

MEDMAP, TORCHRUN, SRUN = "--devices", "torchrun", "srun"


@dataclass(frozen=True)
class Crew:
    """Processes that train together: so many on each machine, on so many machines; and what says so."""

    here: int = 1
    machines: int = 1
    starter: str = MEDMAP

    @property
    def size(self) -> int:
        """All of them."""
        return self.here * self.machines

    @property
    def number(self) -> int:
        """Which of them this process is, from 0."""
        return 0 if self.size == 1 else int(os.environ.get(NUMBERS[self.starter][0], 0))

    @property
    def is_echo(self) -> bool:
        """Whether a process beside this one was started with it and finds the same faults before they meet.

        One that medmap itself starts is not: the first has looked before.
        """
        return self.starter != MEDMAP and self.size > 1 and int(os.environ[NUMBERS[self.starter][1]]) > 0

    def check_batch(self, batch_size: int) -> None:
        """Raises ConfigError unless all of them get equally many samples."""
        if batch_size % self.size:
            low = batch_size // self.size * self.size
            near = " or ".join(str(size) for size in (low, low + self.size) if size)
            raise ConfigError(
                f"train.batch_size: {batch_size} is the batch of all processes together and cannot be divided among "
                f"{self.size} ({self.starter}); set it to {near}, or take as many processes as divide it"
            )


def crew_of(devices: int | None = None) -> Crew:
    """The processes that torchrun or srun have started this one with; else ``devices`` of them (1) on this machine.

    Raises ConfigError where ``devices`` contradicts what was started.
    """
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        here = int(environment["LOCAL_WORLD_SIZE"])
        found = Crew(here, int(environment["WORLD_SIZE"]) // here, TORCHRUN)
    elif "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:  # a job step is what srun ran
        if "SLURM_NTASKS_PER_NODE" not in environment:
            raise ConfigError(
                f"srun: started {environment['SLURM_NTASKS']} processes and does not say how many on each machine; "
                "give the job --ntasks-per-node=N, one for each GPU"
            )
        found = Crew(int(environment["SLURM_NTASKS_PER_NODE"]), int(environment["SLURM_NNODES"]), SRUN)
    else:
        return Crew(devices or 1)
    if devices not in (None, found.here):
        raise ConfigError(
            f"--devices {devices}: {found.starter} has started {found.here} processes on this machine; leave --devices "
            "out, or make both the same"
        )
    return found


def launch(crew: Crew, device: torch.device, bf16: bool) -> Any:
    """A Lightning Fabric whose processes have met; those that nobody has started yet are started.

    Raises InputError where the machine has fewer GPUs than processes.
    """
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    precision = "bf16-mixed" if bf16 else "32-true"
    if crew.size == 1:
        one: Any = 1 if device.index is None or device.type == "cpu" else [device.index]
        return Fabric(accelerator=device.type, devices=one, precision=precision)
    _check_devices(crew, device)
    from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy

    from medmap.core.processes import HERE

    # Of a 1×1×1 kernel both layouts in memory are one; only their names differ.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    environments = {MEDMAP: LightningEnvironment, TORCHRUN: TorchElasticEnvironment, SRUN: SLURMEnvironment}
    fabric = Fabric(
        accelerator=device.type,
        devices=crew.here,
        num_nodes=crew.machines,
        precision=precision,
        strategy=DDPStrategy(find_unused_parameters=True),  # who has no sample with a sequence lets its encoder rest
        plugins=[environments[crew.starter]()],
    )
    os.environ[HERE] = str(crew.here)
    fabric.launch()
    _STARTED.append(getattr(fabric.strategy.launcher, "procs", []))
    return fabric


def _check_devices(crew: Crew, device: torch.device) -> None:
    import torch

    if device.index is not None:
        raise InputError(f"--device {device}: names one device for {crew.size} processes; say {device.type}")
    if device.type == "cuda" and torch.cuda.device_count() < crew.here:
        raise InputError(
            f"{crew.starter}: {crew.here} processes on a machine that shows each of them {torch.cuda.device_count()} "
            "GPUs; every process must see as many as there are processes (SLURM: --gpus-per-node, not per task)"
        )


@contextmanager
def ending_together() -> Iterator[None]:
    """Where one process fails, all stop, and only the first to fail raises its error; the others leave in silence."""
    from medmap.core.processes import processes

    try:
        yield
    except BaseException as error:
        if processes() == 1:
            raise
        ours = [process for some in _STARTED for process in some]
        for some in _STARTED:
            some.clear()  # or Lightning's watch over them would kill this process before it has told why
        first = _first_to_fail()
        if not first:
            time.sleep(TELLING_S)  # whoever sees this one end might end the one that tells
        for process in ours:
            process.kill()
        if not first:
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None
        if _says_that_another_ended(error):
            raise MedmapError(
                "another process of this training ended without a word (killed, or out of memory?). The last good "
                "checkpoint is kept: medmap train --resume goes on from it, with any number of processes"
            ) from error
        raise


def _first_to_fail() -> bool:
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return int(_get_default_store().add("medmap/failed", 1)) == 1
    except (RuntimeError, ValueError):  # the process that counted is gone, and it has told why
        return False


def _says_that_another_ended(error: BaseException) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


TELLING_S = 2.0
_STARTED: list[list[Any]] = []
"""Processes that this one has started, by training: the second of several finds those of the first."""

NUMBERS = {MEDMAP: ("LOCAL_RANK", ""), TORCHRUN: ("RANK", "LOCAL_RANK"), SRUN: ("SLURM_PROCID", "SLURM_LOCALID")}
"""Where a process finds its number, among all and on its machine."""
