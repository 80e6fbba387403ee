"""`python -m worker`: a worker process. `latentq worker` starts this."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from broker_config.connection import connect
from broker_config.errors import LatentqError
from broker_config.exit_status import exit_status
from broker_config.logs import configure_logging
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog
from worker.decode_worker import DecodeWorker
from worker.settings import load_worker_settings
from worker.temporary_folders import remove_abandoned

logger = logging.getLogger(__name__)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="latentq worker", description="Decodes jobs until stopped.")
    parser.add_argument("--vae", action="append", metavar="NAME", help="catalogue entry to serve; repeatable")
    parser.add_argument("--device", help="cuda:0, cpu …; default: the first CUDA device, else the CPU")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="overrides the catalogue's")
    parser.add_argument("--mode", choices=["exact", "fast"], help="default mode: exact on a CPU, fast on CUDA")
    parser.add_argument("--threads", type=int, help="torch threads on a CPU")
    parser.add_argument("--name", help="unique name; default: host, pid and a random part")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a worker; returns its exit status: 0 stopped, 2 not startable, 70 broken, 75 the broker is away."""
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    try:
        settings = load_settings()
        configure_logging(settings)
        own = load_worker_settings(
            vaes=tuple(arguments.vae) if arguments.vae else None,
            device=arguments.device,
            dtype=arguments.dtype,
            mode=arguments.mode,
            threads=arguments.threads,
            name=arguments.name,
        )
        remove_abandoned()
        connections = connect(settings, name=f"latentq-worker-{own.name}")
        worker = DecodeWorker(
            connections, settings=settings, worker_settings=own, catalog=VaeCatalog.load(settings.catalog)
        )
        worker.install_signal_handlers()
        return worker.run()
    except LatentqError as error:
        print(f"latentq worker: {error.message} [{error.code}]", file=sys.stderr)
        return exit_status(error)


if __name__ == "__main__":
    sys.exit(main())
