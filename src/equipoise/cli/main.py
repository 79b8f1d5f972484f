"""Entry point: `equipoise COMMAND`. Exit 0 done, 2 wrong input (one line), 1 a failure of its own.

A command's module is imported only when that command runs, so `equipoise plan` never waits for torch.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback

import click

from equipoise.errors import InputError

COMMANDS: dict[str, str] = {
    "balance": "Balance a model end to end and prove it: profile, plan, apply, save, reload, evaluate, report.",
    "profile": "Measure load and importance of a model's experts on calibration text.",
    "plan": "Plan replicas and precision from a profile or a trace, under a byte budget.",
    "apply": "Write a balanced checkpoint from a model and a plan, shard by shard.",
    "eval": "Perplexity and lm-evaluation-harness tasks, with paired differences against another model.",
    "score": "Imbalance of a plan on another profile or trace (held out).",
    "report": "Write report.html of a run directory.",
    "export": "Write a plan's placement for SGLang, TensorRT-LLM or vllm-ascend.",
    "import": "Turn an engine's expert statistics into a profile.",
    "laser": "Calibrate routing by score distribution and load (LASER), and measure it on held-out text.",
    "stream": "Replay a model's load on a text, or traces, with the online balancer and what it is measured against.",
}
"""Command -> its line in `equipoise --help`. Its module is `equipoise.cli.<name>_command`, which has `command`."""


_WORLD = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # no room
    *(errno.EROFS, errno.EACCES, errno.EPERM),  # not allowed
    *(errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR),  # not a place for a file
)
"""What the system refuses because of where the user pointed, not because of a failure of Equipoise."""


class _Lazy(click.Group):
    """Loads a command's module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"equipoise.cli.{cmd_name}_command").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="equipoise", message="equipoise %(version)s")
def app() -> None:
    """Keep the experts of Mixture-of-Experts language models in balance at inference, without retraining.

    Try it on the bundled model: equipoise balance --out run
    """


def _fail(code: int, message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        result = app(arguments, prog_name="equipoise", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except InputError as error:
        return _fail(2, str(error))
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help())
        return 2
    except click.ClickException as error:
        where = f" (see `{error.ctx.command_path} --help`)" if isinstance(error, click.UsageError) and error.ctx else ""
        return _fail(2, " ".join(error.format_message().split()) + where)
    except (click.Abort, KeyboardInterrupt):
        return _fail(130, "interrupted; nothing half-written was left under its final name")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in _WORLD:
            return _fail(2, f"{error.strerror}: {error.filename or 'the destination'}; nothing was written there")
        traceback.print_exc()
        return 1
    except Exception:
        traceback.print_exc()
        return _fail(1, "this is a failure of equipoise itself; please report it with the lines above")


def main() -> None:
    """Console script."""
    # Threads that wait by spinning take the core from the one that works wherever cores are shared: a run of the
    # demo model took four times as long so (docs/experiments.md). Must be set before torch loads its OpenMP.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run())
