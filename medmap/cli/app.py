"""All verbs under one name, and what becomes of their errors: one clear line, never a traceback without --debug."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import medmap
from medmap.cli import about, console, data, doctor, export, predict, score, studies, train
from medmap.cli import explain as explaining
from medmap.cli import serve as serving
from medmap.cli.options import COMMON, RayCommand
from medmap.core.memory import keep_freed_memory
from medmap.errors import MedmapError

OK, ERROR, USAGE, SOME_FAILED = range(4)
INTERRUPTED = 130


class Verbs(TyperGroup):
    """-v, -q and --debug may stand anywhere, and errors are told in one place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _everywhere_first(args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console.fail("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if console.MANNER.debug or isinstance(error, _FRAMEWORK) or getattr(error, "errno", None) == errno.EPIPE:
                raise
            console.fail(explain(error))
            raise typer.Exit(ERROR) from None


def explain(error: Exception) -> str:
    """An error in one clear sentence: our own as they are, the usual ones of others with a cure."""
    if isinstance(error, MedmapError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"{error.name} is not installed; this part needs it: pip install 'medmap[{EXTRAS[error.name]}]'"
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "not enough memory; take a smaller train.patch, train.batch_size or model, or --device cpu"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'disk'}: {error.strerror}; check the place, its permissions and its free room"
    text = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {text[:300]}; run again with --debug and report it"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"medmap {medmap.__version__}")
        raise typer.Exit(OK)


def everywhere(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More words.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Results, warnings and errors only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Brain-tumour segmentation that keeps working when MRI sequences are missing.

    Begin with `medmap demo` (needs no data) or `medmap check FOLDER` (yours).
    """
    console.begin(quiet=quiet, verbose=verbose, debug=debug)


def main() -> None:
    """The console command."""
    keep_freed_memory()
    app(prog_name="medmap")


def _everywhere_first(args: list[str]) -> list[str]:
    """``medmap check PATH -v`` is ``medmap -v check PATH``."""
    end = args.index("--") if "--" in args else len(args)
    common = [arg for arg in args[:end] if arg in _EVERYWHERE]
    return common + [arg for arg in args[:end] if arg not in _EVERYWHERE] + args[end:]


_EVERYWHERE = ("-v", "--verbose", "-q", "--quiet", "--debug")
_FRAMEWORK = (
    typer.Exit,
    typer.Abort,
    *(kind for kind in typer.BadParameter.__mro__ if not issubclass(Exception, kind)),
)
EXTRAS = {
    "monai": "train",
    "lightning_fabric": "train",
    "matplotlib": "report",
    "jinja2": "report",
    "ray": "ray",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "ignite": "export",
    "fire": "export",
    "sklearn": "study",
    "fastapi": "serve",
    "uvicorn": "serve",
    "pydicom": "dicom",
    "dcm2niix": "dicom",
    "highdicom": "dicom",
}
"""Which extra brings a package that is imported late."""

VERBS = {
    "demo": about.demo,
    "doctor": doctor.doctor,
    "check": data.check,
    "simulate": data.simulate,
    "prepare": data.prepare,
    "train": train.train,
    "evaluate": score.evaluate,
    "compare": score.compare,
    "study": studies.study,
    "bench": studies.bench,
    "predict": predict.predict,
    "explain": explaining.explain,
    "report": score.report,
    "export": export.export,
    "serve": serving.serve,
    "check-backbone": about.check_backbone,
}
"""Every verb, in the order of the help."""

COMMANDS = {
    "train": train.TrainCommand,
    "evaluate": RayCommand,
    "predict": RayCommand,
    "study": RayCommand,
    "bench": RayCommand,
}
"""Verbs that take their options in a way of their own."""

app = typer.Typer(
    cls=Verbs,
    callback=everywhere,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=COMMON,
)
for _name, _verb in VERBS.items():
    app.command(_name, cls=COMMANDS.get(_name), epilog=COMMON)(_verb)
