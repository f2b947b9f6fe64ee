"""One variant in a process of its own, so that its memory is its own: `python -m pgfast.bench.training.worker SPEC`."""

from __future__ import annotations

import json
import os
import sys

from ..worker import be_expendable
from .settings import PUBLIC, Spec
from .stopwatch import Stopwatch


def main() -> None:
    """Run the spec of the command line; the result is one JSON line, whatever libraries print goes to stderr."""
    be_expendable()
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = Spec(**json.loads(sys.argv[1]))
    watch = Stopwatch(spec.warmup, spec.counted)
    if spec.variant == PUBLIC:
        from . import public_recipe

        public_recipe.train(spec, watch)
    else:
        from . import our_trainer

        our_trainer.train(spec, watch)
    reply.write(json.dumps(watch.result()) + "\n")
    reply.flush()


if __name__ == "__main__":
    main()
