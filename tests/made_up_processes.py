"""Functions called in two processes at once, which find each other as those of torchrun or srun do; some to call."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_training import Row, interrupt_at, quick_and_exact
from torch import Tensor
from torch.nn import functional

from medmap import criterion, train
from medmap.align import Output
from medmap.config import Config
from medmap.core.case import Batch
from medmap.core.processes import averaged, averaged_where_there, gathered, rank
from medmap.criterion import DiceCE, total_loss
from medmap.data.store import Store
from medmap.errors import InputError
from medmap.models import mmformer, uhved

LIMIT_S = 120
"""After so long, processes that wait for each other are a failed test."""


def in_two_processes(function: Callable[..., Any], *arguments: Any, starter: str = "torchrun") -> list[Any]:
    """What the function gives in process 0 and in process 1; an exception counts as what it gives."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["made_up_processes", "monai.losses", "lightning_fabric"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    names = [{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | STARTERS[starter](number) for number in range(2)]
    children = [
        context.Process(target=_work, args=(names[number], pipes[number][1], function, arguments))
        for number in range(2)
    ]
    for child in children:
        child.start()
    try:
        assert all(receive.poll(LIMIT_S) for receive, _ in pipes), "somebody waits for ever"
        return [receive.recv() for receive, _ in pipes]
    finally:
        for child in children:
            child.kill()
            child.join()


def _work(environment: dict[str, str], answer: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= environment
    with quick_and_exact():
        try:
            found = function(*arguments)
        except BaseException as error:
            found = error
        answer.send(found)


def torchrun(number: int) -> dict[str, str]:
    """What torchrun --nproc-per-node 2 says to one of its processes."""
    own, size = str(number), "2"
    return {
        "TORCHELASTIC_RUN_ID": "test",
        **dict.fromkeys(("RANK", "LOCAL_RANK"), own),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), size),
    }


def srun(number: int) -> dict[str, str]:
    """What srun says to one of the processes of a job of two machines with one task each."""
    return {
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NAME": "medmap",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_LOCALID": "0",
        **dict.fromkeys(("SLURM_PROCID", "SLURM_NODEID"), str(number)),
    }


STARTERS: dict[str, Callable[[int], dict[str, str]]] = {"torchrun": torchrun, "srun": srun}


# ---- what they do ------------------------------------------------------------------------------------------------


def trained(
    data: Path,
    runs: list[tuple[Config, Path]],
    resume: bool = False,
    interrupt: tuple[str, int] | None = None,
    fault: str = "",
) -> list[str]:
    """Trains one run after the other; the cases that this process was given, in their order.

    fault: what goes wrong on process 1 alone, in step 2
    """
    given: list[str] = []
    make, loss_of = train.training_batch, criterion.total_loss

    def made(cases: Any, modalities: Any, config: Config, step: int, *others: Any) -> Batch:
        if (fault, rank(), step) == ("input", 1, 1):
            raise InputError("the disk of machine 1")
        batch = make(cases, modalities, config, step, *others)
        given.extend(batch.ids)
        return batch

    def spoilt(output: Output, *others: Any) -> tuple[Tensor, dict[str, Tensor]]:
        bad = (fault, rank(), len(given)) == ("nan", 1, 2)
        return loss_of(output._replace(logits=output.logits * math.nan) if bad else output, *others)

    train.training_batch, criterion.total_loss = made, spoilt
    on_row: Callable[[Row], None] = interrupt_at(*interrupt) if interrupt else lambda row: None
    try:
        for config, run in runs:
            train.fit(config, Store(data), run, resume=resume, device="cpu", on_row=on_row)
    finally:
        train.training_batch, criterion.total_loss = make, loss_of
    return given


def trained_without_draws(*arguments: Any) -> list[str]:
    """`trained`, where networks draw no numbers of their own: those are others in each process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "dropout", lambda x, *others: x)
        patch.setattr(mmformer, "DROPOUT", 0.0)  # of attention
        patch.setattr(uhved, "_sampled", lambda q: q.mean)
        return trained(*arguments)


def joined(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function where processes have met."""
    from medmap.parallel import crew_of, launch

    launch(crew_of(), torch.device("cpu"), bf16=False)
    return function(*arguments)


def loss_of_rows(output: Output, target: Tensor, config: Config) -> tuple[float, dict[str, float], dict[str, Any]]:
    """Loss, terms and gradients of the logits where each process has its half of an output's rows, and of its own."""
    half = len(target) // 2
    rows = slice(rank() * half, (rank() + 1) * half)
    own = {"logits": output.logits, **{name: part.logits for name, part in output.auxiliary.items()}}
    leaves = {name: z[rows].clone().requires_grad_() for name, z in own.items()}
    auxiliary = {}
    for name, part in output.auxiliary.items():
        counted = None if part.rows is None else part.rows[rows]
        if counted is None or bool(counted.any()):
            auxiliary[name] = part._replace(logits=leaves[name], rows=counted)
    losses = {"everybody": leaves["logits"].square().mean()}
    if rank():
        losses["second"] = leaves["logits"].mean()
    mine = output._replace(logits=leaves["logits"], auxiliary=auxiliary, losses=losses)
    loss, terms = total_loss(mine, target[rows], DiceCE(), config)
    loss.backward()
    gradients = {name: (0 * z if z.grad is None else z.grad).detach().numpy() for name, z in leaves.items()}
    return float(loss.detach()), {name: float(term.detach()) for name, term in terms.items()}, gradients


def means() -> dict[str, Any]:
    """What the functions of `medmap.core.processes` give."""
    x = torch.tensor([1.0, 2.0 + rank()], requires_grad=True)
    mean = averaged(x)
    (3 * mean).sum().backward()
    there = averaged_where_there(torch.tensor(5.0) if rank() else None, torch.zeros(()))
    nan = averaged(torch.tensor(math.nan if rank() else 1.0))
    return {
        "mean": mean.tolist(),
        "gradient": x.grad.tolist() if x.grad is not None else None,
        "there": float(there),
        "nan": math.isnan(float(nan)),
        "gathered": gathered(f"of {rank()}"),
        "seed": train._step_seed(0, 3),
    }
